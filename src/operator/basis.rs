//! Chosen rows of a fast orthogonal transform: a factor that costs its indices only.
//!
//! With Q an orthogonal [`Transform`] of length n and I a set of r indices, the right form is Q_I (r×n: the
//! chosen rows, the *atoms*) and the left form is its transpose, Q_Iᵀ (n×r). Neither holds a number; a
//! product is a transform and a gather, or a scatter and an inverse transform.

use ndarray::{Array2, ArrayView2, Axis};

use super::{IndexSet, LinearOperator, Side};
use crate::error::{Error, Result};
use crate::linalg::Transform;
use crate::scalar::Real;

/// Some rows of an orthogonal transform, on either side of a product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Basis {
    kind: Transform,
    side: Side,
    atoms: IndexSet,
}

impl Basis {
    /// The atoms `atoms` of the transform of length `atoms.len()`: r×n on the right, n×r on the left.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the transform does not exist for this length; [`Error::Shape`] for a
    /// length that no index can reach the end of.
    pub fn new(kind: Transform, side: Side, atoms: IndexSet) -> Result<Self> {
        kind.check(atoms.len())?;
        if u32::try_from(atoms.len()).is_err() {
            return Err(Error::shape("a transform of a length below 2^32", atoms.len()));
        }
        Ok(Basis { kind, side, atoms })
    }

    /// The transform that the atoms belong to.
    pub fn kind(&self) -> Transform {
        self.kind
    }
    /// The side of a product it stands on.
    pub fn side(&self) -> Side {
        self.side
    }
    /// Which rows of the transform are taken.
    pub fn atoms(&self) -> &IndexSet {
        &self.atoms
    }

    /// Q_I·X for X of n×b. A vector is a row of memory inside, so that column-major X (what `forward`
    /// passes) is read in place; the result is column-major as well.
    fn analyse<T: Real>(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let atoms: Vec<usize> = self.atoms.chosen().collect();
        if self.kind == Transform::Identity {
            return x.select(Axis(0), &atoms);
        }
        let y = self.kind.checked_rows(x.reversed_axes());
        Array2::from_shape_fn((y.nrows(), atoms.len()), |(i, t)| y[(i, atoms[t])]).reversed_axes()
    }

    /// Q_Iᵀ·X for X of r×b.
    fn synthesise<T: Real>(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        if self.kind == Transform::Identity {
            let mut y = Array2::zeros((self.atoms.len(), x.ncols()));
            self.atoms.chosen().zip(x.rows()).for_each(|(to, from)| y.row_mut(to).assign(&from));
            return y;
        }
        let mut y = Array2::zeros((x.ncols(), self.atoms.len()));
        for (mut to, from) in y.rows_mut().into_iter().zip(x.columns()) {
            self.atoms.chosen().zip(from).for_each(|(atom, &value)| to[atom] = value);
        }
        self.kind.inverse().checked_rows_in_place(&mut y);
        y.reversed_axes()
    }
}

impl<T: Real> LinearOperator<T> for Basis {
    fn shape(&self) -> (usize, usize) {
        let (n, r) = (self.atoms.len(), self.atoms.count());
        if self.side == Side::Left { (n, r) } else { (r, n) }
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        if self.side == Side::Left { self.synthesise(x) } else { self.analyse(x) }
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        if self.side == Side::Left { self.analyse(x) } else { self.synthesise(x) }
    }
    fn params(&self) -> usize {
        0
    }
    fn bytes(&self) -> u64 {
        IndexSet::bytes_of(self.atoms.len(), self.atoms.count())
    }
    fn flops(&self, columns: usize) -> u64 {
        self.kind.flops(self.atoms.len()) * columns as u64
    }
    fn to_dense(&self) -> Array2<T> {
        // Q_Iᵀ applied to the identity, one atom a row of memory.
        let atoms = self.synthesise(Array2::eye(self.atoms.count()).view());
        if self.side == Side::Left { atoms } else { atoms.reversed_axes() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::codec::{Decoder, Encoder, Node};
    use crate::operator::{Dense, Operator};

    fn bases() -> Vec<Basis> {
        let mut all = Vec::new();
        for (len, atoms) in [(8, vec![5, 0, 2]), (16, (1..16).collect()), (7, vec![6, 3]), (1, vec![0]), (5, vec![])] {
            for kind in Transform::ALL.into_iter().filter(|kind| kind.supports(len)) {
                for side in [Side::Left, Side::Right] {
                    all.push(Basis::new(kind, side, IndexSet::new(len, atoms.clone()).unwrap()).unwrap());
                }
            }
        }
        all
    }

    fn numbers(m: usize, n: usize) -> Array2<f64> {
        Array2::from_shape_fn((m, n), |(i, j)| ((i * 5 + j * 3) % 7) as f64 - 2.5)
    }

    fn close(a: &Array2<f64>, b: &Array2<f64>) -> bool {
        a.dim() == b.dim() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12)
    }

    #[test]
    fn products_equal_those_of_the_chosen_rows() {
        for basis in bases() {
            let (n, chosen) = (basis.atoms.len(), basis.atoms.chosen().collect::<Vec<_>>());
            let atoms = basis.kind.columns(Array2::<f64>::eye(n).view()).unwrap().select(Axis(0), &chosen);
            let dense = if basis.side == Side::Right { atoms } else { atoms.reversed_axes() };
            assert!(close(&basis.to_dense(), &dense), "{basis:?}");
            let (rows, columns) = dense.dim();
            for b in [1, 3] {
                let (x, y) = (numbers(columns, b), numbers(b, rows).reversed_axes());
                assert!(close(&basis.product(x.view()), &dense.dot(&x)), "{basis:?}");
                assert!(close(&basis.product_transposed(y.view()), &dense.t().dot(&y)), "{basis:?}");
            }
            assert_eq!(LinearOperator::<f64>::params(&basis), 0);
        }
    }

    #[test]
    fn files_hold_the_indices_and_give_the_same_operator_back() {
        for basis in bases() {
            let count = basis.atoms.count();
            let leaf = Operator::Basis(basis.clone());
            let factors = match basis.side {
                Side::Left => vec![leaf, Operator::Dense(Dense::new(numbers(count, 3)))],
                Side::Right => vec![Operator::Dense(Dense::new(numbers(3, count))), leaf],
            };
            let operator = Operator::product_of(factors).unwrap();
            let mut encoder = Encoder::new();
            let node = encoder.encode("w", &operator).unwrap();
            let tensors = encoder.into_tensors();
            assert_eq!(tensors.iter().map(|t| t.bytes.len() as u64).sum::<u64>(), operator.bytes());
            let node: Node = serde_json::from_str(&serde_json::to_string(&node).unwrap()).unwrap();
            assert_eq!(Decoder::<_, f64>::new(&tensors).decode(&node).unwrap(), operator);
        }
    }

    #[test]
    fn files_that_make_no_sense_are_refused() {
        let basis = Basis::new(Transform::Dct2, Side::Right, IndexSet::new(600, vec![1, 4]).unwrap()).unwrap();
        let mut encoder = Encoder::new();
        let Node::Basis { side, len, indices, .. } = encoder.encode("w", &Operator::<f64>::Basis(basis)).unwrap()
        else {
            panic!("a basis becomes a basis");
        };
        let mut tensors = encoder.into_tensors();
        let decode = |tensors: &Vec<_>, kind, len, indices: &str| {
            Decoder::<_, f64>::new(tensors).decode(&Node::Basis { kind, side, len, indices: indices.into() })
        };
        assert!(decode(&tensors, Transform::Dct3, len, &indices).is_ok());
        // No power of two, an index beyond the end, an unreachable length, no such tensor, no such list.
        assert!(decode(&tensors, Transform::Hadamard, len, &indices).is_err());
        assert!(decode(&tensors, Transform::Dct2, 4, &indices).is_err());
        assert!(decode(&tensors, Transform::Dct2, usize::MAX, &indices).is_err());
        assert!(decode(&tensors, Transform::Dct2, len, "other").is_err());
        tensors[0].bytes.reverse();
        assert!(decode(&tensors, Transform::Dct2, len, &indices).is_err());
        let unknown = r#"{"op":"basis","kind":"dct9","side":"right","len":600,"indices":"w.0"}"#;
        assert!(serde_json::from_str::<Node>(unknown).is_err());
    }
}
