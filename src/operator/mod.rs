//! What a compressed weight *is*: an expression of cheap linear operators.
//!
//! A method writes such an expression; applying, measuring, saving and loading are written once per
//! node here, never once per method. The set of nodes is closed because the file format is.

use std::fmt::{self, Debug};
use std::sync::Arc;

use ndarray::{Array2, ArrayView2};

use self::chain::{chain, stages};
use self::rows::rows_by;
use crate::error::{Error, Result};
use crate::linalg::matmul_into;
use crate::scalar::Real;

mod basis;
mod bitmask;
mod block_diagonal;
mod chain;
pub mod codec;
mod coded;
mod dense;
mod index_set;
mod interpolative;
mod kernels;
mod layouts;
mod mixture;
mod monarch;
mod n_m;
mod permutation;
mod quantized;
mod rows;
mod sparse;
mod stacked;
mod together;

pub use self::basis::Basis;
pub use self::bitmask::Bitmask;
pub use self::block_diagonal::BlockDiagonal;
pub use self::dense::Dense;
pub use self::index_set::IndexSet;
pub use self::interpolative::{Interpolative, Side};
pub use self::kernels::ActivationBits;
pub use self::layouts::Cutlass;
pub use self::mixture::Mixture;
pub use self::n_m::{Nm, NmSparse};
pub use self::permutation::{Order, Permutation, Runs};
pub(crate) use self::quantized::scale_dtype;
pub use self::quantized::{Grid, Quantized, ZeroPoint, ZeroPoints};
pub use self::stacked::Stacked;
pub use self::together::apply_all;

/// A linear map of known cost. Shapes are (m, n) for y = Ŵ·x with x of length n.
pub trait LinearOperator<T: Real>: Debug + Send + Sync {
    /// (m, n): outputs and inputs.
    fn shape(&self) -> (usize, usize);
    /// Ŵ·X for X of n×b, columns being vectors; the result is m×b.
    ///
    /// # Panics
    /// If X has not n rows; [`apply`](Self::apply) returns an error instead.
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T>;
    /// Ŵᵀ·X for X of m×b; the result is n×b.
    ///
    /// # Panics
    /// If X has not m rows; [`apply_transpose`](Self::apply_transpose) returns an error instead.
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T>;
    /// Stored numbers that carry values (indices and masks are not counted here, but in `bytes`).
    fn params(&self) -> usize;
    /// Bytes on disk, everything counted: values in their stored dtype, indices, masks.
    fn bytes(&self) -> u64;
    /// Floating-point operations of a product with `columns` vectors.
    fn flops(&self, columns: usize) -> u64;
    /// Ŵ as a matrix, m×n.
    fn to_dense(&self) -> Array2<T>;

    /// Some rows of Ŵ in the order they are named in, r×n: what an embedding looks up, without the rest of it.
    ///
    /// Cost: that of the rows where a node has them at hand (matrices, codes, masks, sums of such, and products that begin
    /// with one, whose other factors cost a transposed product with r vectors); else a transposed product of the whole with
    /// r vectors.
    ///
    /// ```
    /// use ndarray::array;
    /// use weightpress::operator::{Dense, LinearOperator, Operator};
    ///
    /// let (left, right) = (Dense::new(array![[1.0], [2.0], [3.0]]), Dense::new(array![[4.0, 5.0]]));
    /// let embedding = Operator::product_of(vec![left.into(), right.into()])?;
    /// assert_eq!(embedding.select_rows(&[2, 0])?, array![[12.0, 15.0], [4.0, 5.0]]);
    /// # Ok::<(), weightpress::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such row.
    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        rows::by_units(self, rows)
    }

    /// Ŵ·X with the shapes checked.
    ///
    /// # Errors
    /// [`Error::Shape`] if X has not n rows.
    fn apply(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        if x.nrows() != self.shape().1 {
            return Err(Error::shape((self.shape().1, x.ncols()), x.dim()));
        }
        Ok(self.product(x))
    }
    /// Ŵᵀ·X with the shapes checked.
    ///
    /// # Errors
    /// [`Error::Shape`] if X has not m rows.
    fn apply_transpose(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        if x.nrows() != self.shape().0 {
            return Err(Error::shape((self.shape().0, x.ncols()), x.dim()));
        }
        Ok(self.product_transposed(x))
    }
    /// X·Ŵᵀ for activations of b×n, one token a row, as a linear layer applies its weight; b×m.
    ///
    /// # Errors
    /// [`Error::Shape`] if X has not n columns.
    fn forward(&self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        Ok(self.apply(x.reversed_axes())?.reversed_axes())
    }
}

/// A compressed weight: a linear-operator expression. Cloning is cheap for `Shared` parts only.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Operator<T: Real> {
    /// A matrix.
    Dense(Dense<T>),
    /// A matrix of which some rows (or columns) are those of the identity.
    Interpolative(Interpolative<T>),
    /// Chosen rows of a fast orthogonal transform (or their transpose).
    Basis(Basis),
    /// Blocks along the diagonal.
    BlockDiagonal(BlockDiagonal<T>),
    /// A (partial) permutation.
    Permutation(Permutation),
    /// N of every M consecutive entries of each row.
    NmSparse(NmSparse<T>),
    /// Entries anywhere, marked by one bit each.
    Bitmask(Bitmask<T>),
    /// A weighted sum of atoms.
    Mixture(Mixture<T>),
    /// Small integers on a grid.
    Quantized(Quantized<T>),
    /// Rows of several operators.
    Stacked(Stacked<T>),
    /// A product, the first factor leftmost; inner dimensions agree.
    Product(Vec<Operator<T>>),
    /// A sum of operators of one shape.
    Sum(Vec<Operator<T>>),
    /// A part that several weights use: one copy in memory and on disk.
    Shared(Arc<Operator<T>>),
}

impl<T: Real> Operator<T> {
    /// A product of at least one factor.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no factor or inner dimensions differ.
    pub fn product_of(factors: Vec<Operator<T>>) -> Result<Self> {
        if factors.is_empty() {
            return Err(Error::shape("at least one factor", 0));
        }
        for pair in factors.windows(2) {
            let (left, right) = (pair[0].shape(), pair[1].shape());
            if left.1 != right.0 {
                return Err(Error::shape((left.1, right.1), right));
            }
        }
        Ok(Operator::Product(factors))
    }

    /// A sum of at least one term.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no term or shapes differ.
    pub fn sum_of(terms: Vec<Operator<T>>) -> Result<Self> {
        let Some(first) = terms.first().map(LinearOperator::shape) else {
            return Err(Error::shape("at least one term", 0));
        };
        match terms.iter().find(|term| term.shape() != first) {
            Some(other) => Err(Error::shape(first, other.shape())),
            None => Ok(Operator::Sum(terms)),
        }
    }

    /// The operator as a trait object: one `match`, so that each method below is written once.
    fn node(&self) -> &dyn LinearOperator<T> {
        match self {
            Operator::Dense(node) => node,
            Operator::Interpolative(node) => node,
            Operator::Basis(node) => node,
            Operator::BlockDiagonal(node) => node,
            Operator::Permutation(node) => node,
            Operator::NmSparse(node) => node,
            Operator::Bitmask(node) => node,
            Operator::Mixture(node) => node,
            Operator::Quantized(node) => node,
            Operator::Stacked(node) => node,
            Operator::Shared(node) => node.node(),
            Operator::Product(_) | Operator::Sum(_) => self,
        }
    }

    /// The operator behind any sharing.
    fn unshared(&self) -> &Operator<T> {
        match self {
            Operator::Shared(inner) => inner.unshared(),
            other => other,
        }
    }

    /// Bytes on disk of several operators, shared parts counted once.
    pub fn total_bytes(all: &[Operator<T>]) -> u64 {
        fn visit<T: Real>(operator: &Operator<T>, seen: &mut Vec<*const Operator<T>>) -> u64 {
            match operator {
                Operator::Product(parts) | Operator::Sum(parts) => parts.iter().map(|part| visit(part, seen)).sum(),
                Operator::Mixture(leaf) => {
                    leaf.coefficients().bytes() + leaf.atoms().iter().map(|atom| visit(atom, seen)).sum::<u64>()
                }
                Operator::Stacked(leaf) => {
                    let own = leaf.bytes() - leaf.parts().iter().map(LinearOperator::bytes).sum::<u64>();
                    own + leaf.parts().iter().map(|part| visit(part, seen)).sum::<u64>()
                }
                Operator::Shared(inner) if seen.contains(&Arc::as_ptr(inner)) => 0,
                Operator::Shared(inner) => {
                    seen.push(Arc::as_ptr(inner));
                    visit(inner, seen)
                }
                leaf => leaf.bytes(),
            }
        }
        let mut seen = Vec::new();
        all.iter().map(|operator| visit(operator, &mut seen)).sum()
    }
}

impl<T: Real> From<Dense<T>> for Operator<T> {
    fn from(leaf: Dense<T>) -> Self {
        Operator::Dense(leaf)
    }
}

impl<T: Real> From<BlockDiagonal<T>> for Operator<T> {
    fn from(leaf: BlockDiagonal<T>) -> Self {
        Operator::BlockDiagonal(leaf)
    }
}

/// Sums and products are handled here; leaves forward to their own file.
impl<T: Real> LinearOperator<T> for Operator<T> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Operator::Product(factors) => {
                (factors.first().map_or(0, |f| f.shape().0), factors.last().map_or(0, |f| f.shape().1))
            }
            Operator::Sum(terms) => terms.first().map_or((0, 0), |t| t.shape()),
            other => other.node().shape(),
        }
    }

    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        match self {
            Operator::Product(factors) => chain(&stages(factors), false, x),
            Operator::Sum(terms) => sum(together::products(terms, x).into_iter()),
            other => other.node().product(x),
        }
    }

    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        match self {
            Operator::Product(factors) => chain(&stages(factors), true, x),
            Operator::Sum(terms) => sum(terms.iter().map(|term| term.product_transposed(x))),
            other => other.node().product_transposed(x),
        }
    }

    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        match self {
            Operator::Product(factors) => match factors.split_first() {
                Some((first, rest)) => {
                    Ok(chain(&stages(rest), true, first.select_rows(rows)?.view().reversed_axes()).reversed_axes())
                }
                None => rows_by((0, 0), rows, |_, _| {}),
            },
            Operator::Sum(terms) => {
                let mut chosen = rows_by(self.shape(), rows, |_, _| {})?;
                terms.iter().try_for_each(|term| term.select_rows(rows).map(|of| chosen += &of))?;
                Ok(chosen)
            }
            other => other.node().select_rows(rows),
        }
    }

    fn params(&self) -> usize {
        match self {
            Operator::Product(parts) | Operator::Sum(parts) => parts.iter().map(LinearOperator::params).sum(),
            other => other.node().params(),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Operator::Product(parts) | Operator::Sum(parts) => parts.iter().map(LinearOperator::bytes).sum(),
            other => other.node().bytes(),
        }
    }

    fn flops(&self, columns: usize) -> u64 {
        match self {
            Operator::Product(parts) => parts.iter().map(|part| part.flops(columns)).sum(),
            Operator::Sum(parts) => {
                let (m, additions) = (self.shape().0, parts.len().saturating_sub(1));
                parts.iter().map(|part| part.flops(columns)).sum::<u64>() + (m * columns * additions) as u64
            }
            other => other.node().flops(columns),
        }
    }

    fn to_dense(&self) -> Array2<T> {
        match self {
            Operator::Product(factors) => match factors.split_last() {
                Some((last, rest)) => rest.iter().rev().fold(last.to_dense(), |y, factor| factor.product(y.view())),
                None => Array2::zeros((0, 0)),
            },
            // The last first: residuals, whose factors need memory beside the result.
            Operator::Sum(terms) => sum(terms.iter().rev().map(LinearOperator::to_dense)),
            other => other.node().to_dense(),
        }
    }
}

fn sum<T: Real>(mut terms: impl Iterator<Item = Array2<T>>) -> Array2<T> {
    let first = terms.next().unwrap_or_default();
    terms.fold(first, |total, term| total + term)
}

/// A·B by the crate's own product; shapes are the caller's business.
fn matmul<T: Real>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    matmul_into(T::one(), a, b, T::zero(), c.view_mut());
    c
}

impl<T: Real> fmt::Display for Operator<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let joined = |f: &mut fmt::Formatter<'_>, parts: &[Operator<T>], sign: &str| {
            parts.iter().enumerate().try_for_each(|(i, part)| match i {
                0 => write!(f, "{part}"),
                _ => write!(f, " {sign} {part}"),
            })
        };
        let (m, n) = self.shape();
        match self {
            Operator::Dense(_) => write!(f, "dense {m}x{n}"),
            Operator::Interpolative(_) => write!(f, "interpolative {m}x{n}"),
            Operator::Basis(leaf) => write!(f, "{} {m}x{n}", format!("{:?}", leaf.kind()).to_lowercase()),
            Operator::BlockDiagonal(leaf) => write!(f, "block-diagonal {m}x{n} ({} blocks)", leaf.extents().len()),
            Operator::Permutation(_) => write!(f, "permutation {m}x{n}"),
            Operator::NmSparse(leaf) => write!(f, "{}:{} sparse {m}x{n}", leaf.pattern().n(), leaf.pattern().m()),
            Operator::Bitmask(_) => write!(f, "bitmask {m}x{n}"),
            Operator::Mixture(leaf) => write!(f, "mixture {m}x{n} of {}", leaf.atoms().len()),
            Operator::Quantized(leaf) => write!(f, "{}-bit {m}x{n}", leaf.grid().bits()),
            Operator::Stacked(leaf) => {
                write!(f, "rows of ")?;
                joined(f, leaf.parts(), "and")
            }
            Operator::Product(factors) => joined(f, factors, "·"),
            Operator::Sum(terms) => joined(f, terms, "+"),
            Operator::Shared(inner) => write!(f, "shared {inner}"),
        }
    }
}
