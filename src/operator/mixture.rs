//! A weighted sum of matrices that several weights share: Σₛ cₛ·Aₛ.
//!
//! Costs its coefficients only, beside the atoms, which are counted once for all weights that use them. The first
//! product forms the matrix and keeps it: after that it is applied at the cost of a dense one (forming it takes
//! 2·S·m·n flops).

use std::sync::OnceLock;

use ndarray::{Array2, ArrayView2};

use super::rows::rows_by;
use super::{Dense, LinearOperator, Operator, matmul};
use crate::error::{Error, Result};
use crate::scalar::Real;

/// Σₛ cₛ·Aₛ with atoms of one shape.
#[derive(Debug, Clone)]
pub struct Mixture<T: Real> {
    /// 1×S.
    coefficients: Dense<T>,
    atoms: Vec<Operator<T>>,
    formed: OnceLock<Array2<T>>,
}

impl<T: Real> PartialEq for Mixture<T> {
    fn eq(&self, other: &Self) -> bool {
        self.coefficients == other.coefficients && self.atoms == other.atoms
    }
}

impl<T: Real> Mixture<T> {
    /// Puts coefficients, 1×S, and as many atoms together.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no atom, their shapes differ, or there are more or fewer than coefficients;
    /// [`Error::Unsupported`] if an atom is anything but a (shared) dense or quantised matrix.
    pub fn new(coefficients: Dense<T>, atoms: Vec<Operator<T>>) -> Result<Self> {
        if coefficients.shape() != (1, atoms.len()) || atoms.is_empty() {
            return Err(Error::shape(
                format!("one coefficient for each of {} atoms", atoms.len()),
                coefficients.shape(),
            ));
        }
        // The matrix is formed: what a file describes in a few bytes must not become a large one.
        if let Some(other) =
            atoms.iter().find(|atom| !matches!(atom.unshared(), Operator::Dense(_) | Operator::Quantized(_)))
        {
            return Err(Error::Unsupported(format!(
                "a mixture of {other}: its atoms have to be dense or quantised matrices"
            )));
        }
        match atoms.iter().find(|atom| atom.shape() != atoms[0].shape()) {
            Some(other) => Err(Error::shape(atoms[0].shape(), other.shape())),
            None => Ok(Mixture { coefficients, atoms, formed: OnceLock::new() }),
        }
    }

    /// c, one row.
    pub fn coefficients(&self) -> &Dense<T> {
        &self.coefficients
    }

    /// The atoms.
    pub fn atoms(&self) -> &[Operator<T>] {
        &self.atoms
    }

    fn form(&self) -> Array2<T> {
        let mut sum = Array2::zeros(self.shape());
        for (&c, atom) in self.coefficients.values().iter().zip(&self.atoms) {
            match atom.unshared() {
                Operator::Dense(leaf) => sum.scaled_add(c, &leaf.values()),
                other => sum.scaled_add(c, &other.to_dense()),
            }
        }
        sum
    }

    fn formed(&self) -> ArrayView2<'_, T> {
        self.formed.get_or_init(|| self.form()).view()
    }
}

impl<T: Real> LinearOperator<T> for Mixture<T> {
    fn shape(&self) -> (usize, usize) {
        self.atoms.first().map_or((0, 0), |atom| atom.shape())
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        matmul(self.formed(), x)
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        matmul(self.formed().reversed_axes(), x)
    }
    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        let formed = self.formed();
        rows_by(self.shape(), rows, |row, to| formed.row(row).iter().zip(to).for_each(|(&from, to)| *to = from))
    }
    fn params(&self) -> usize {
        self.coefficients.params() + self.atoms.iter().map(LinearOperator::params).sum::<usize>()
    }
    fn bytes(&self) -> u64 {
        self.coefficients.bytes() + self.atoms.iter().map(LinearOperator::bytes).sum::<u64>()
    }
    fn flops(&self, columns: usize) -> u64 {
        let (m, n) = self.shape();
        2 * (m * n * columns) as u64
    }
    fn to_dense(&self) -> Array2<T> {
        self.formed.get().cloned().unwrap_or_else(|| self.form())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ndarray::array;

    use super::*;
    use crate::operator::Permutation;
    use crate::operator::codec::{Decoder, Encoder};

    #[test]
    fn sums_shares_and_round_trips() {
        let leaf =
            |seed: usize| Dense::new(Array2::from_shape_fn((3, 4), |(i, j)| ((i * 5 + j * 3 + seed) % 7) as f64));
        let atoms: Vec<Arc<Operator<f64>>> = [leaf(0), leaf(2)].map(|leaf| Arc::new(Operator::Dense(leaf))).into();
        let mix = |c: Array2<f64>| {
            let atoms = atoms.iter().map(|atom| Operator::Shared(atom.clone())).collect();
            Operator::Mixture(Mixture::new(Dense::new(c), atoms).unwrap())
        };
        let both = [mix(array![[2.0, -1.0]]), mix(array![[0.5, 3.0]])];
        let dense = atoms[0].to_dense() * 2.0 - atoms[1].to_dense();
        assert_eq!(both[0].to_dense(), dense);
        let x = Array2::from_shape_fn((4, 2), |(i, j)| (i + 2 * j) as f64);
        assert_eq!(both[0].product(x.view()), dense.dot(&x));
        assert_eq!(both[0].product_transposed(dense.view()), dense.t().dot(&dense));
        // Atoms are counted and stored once.
        assert_eq!(Operator::total_bytes(&both), 8 * (2 * 12 + 2 * 2));
        let mut encoder = Encoder::new();
        let nodes = [encoder.encode("a", &both[0]).unwrap(), encoder.encode("b", &both[1]).unwrap()];
        let tensors = encoder.into_tensors();
        assert_eq!(tensors.iter().map(|t| t.bytes.len()).sum::<usize>(), 8 * (2 * 12 + 2 * 2));
        let mut decoder = Decoder::new(&tensors);
        for (node, operator) in nodes.iter().zip(&both) {
            let text = serde_json::to_string(node).unwrap();
            let back: Operator<f64> = decoder.decode(&serde_json::from_str(&text).unwrap()).unwrap();
            assert_eq!(&back, operator);
        }
        // A part that is gone is not taken for one that has its place in memory.
        let mut encoder = Encoder::new();
        for i in 0..100 {
            let part = Operator::Shared(Arc::new(Operator::from(Dense::new(array![[i as f64]]))));
            encoder.encode(&format!("w{i}"), &part).unwrap();
        }
        assert_eq!(encoder.into_tensors().len(), 100);
        assert!(Mixture::new(Dense::new(array![[1.0f64]]), Vec::new()).is_err());
        assert!(Mixture::new(Dense::new(array![[1.0, 2.0]]), vec![leaf(0).into()]).is_err());
        let list = Operator::Permutation(Permutation::list(1 << 20, vec![0, 1, 2]).unwrap());
        let refused = Mixture::new(Dense::new(array![[1.0f64]]), vec![list]);
        assert!(matches!(refused, Err(Error::Unsupported(_))));
        let odd: Operator<f64> = Dense::new(array![[1.0]]).into();
        assert!(Mixture::new(Dense::new(array![[1.0, 2.0]]), vec![leaf(0).into(), odd]).is_err());
    }
}
