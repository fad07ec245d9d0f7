//! Dense kernels behind one small trait, so that a backend is a value chosen at run time.
//!
//! [`Faer`] (pure Rust) is the default; feature `lapack` adds `Lapack`. [`conformance`] holds any backend
//! to its word. All kernels take ndarray views of any strides and return row-major arrays. One layer of
//! parallelism at a time: on a rayon worker thread the kernels run sequentially (the caller is already
//! parallel over tensors), elsewhere they use the global pool.

use std::fmt::Debug;

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};

use crate::error::Result;
use crate::scalar::Real;

mod cell;
pub mod conformance;
mod dct;
mod faer;
mod few;
pub mod krylov;
#[cfg(feature = "lapack")]
mod lapack;
mod omp;
pub(crate) mod pages;
mod product;
mod slices;
mod transform;
mod vector;

pub use self::faer::Faer;
pub(crate) use self::few::{MOST, most_by_rows, times};
#[cfg(feature = "lapack")]
pub use self::lapack::Lapack;
pub use self::omp::{SparseCoder, SparseCodes, Stop};
pub(crate) use self::product::matmul_into;
use self::product::{mirror, upper_triangle};
pub use self::slices::{SingularTriplet, leading_triplets};
pub use self::transform::Transform;
pub(crate) use self::vector::rows_times_to;

/// Eigenvalues, largest first, and the orthonormal eigenvectors as columns: A = V·diag(λ)·Vᵀ.
#[derive(Debug, Clone)]
pub struct Eigh<T> {
    /// λ, in descending order.
    pub values: Array1<T>,
    /// V, n×n.
    pub vectors: Array2<T>,
}

/// The thin singular value decomposition A = U·diag(σ)·Vᵀ, with k = min(m, n).
#[derive(Debug, Clone)]
pub struct Svd<T> {
    /// U, m×k, orthonormal columns.
    pub u: Array2<T>,
    /// σ, in descending order.
    pub values: Array1<T>,
    /// Vᵀ, k×n, orthonormal rows.
    pub vt: Array2<T>,
}

/// The thin QR decomposition with column pivoting, A·P = Q·R, of which only R and P are kept.
#[derive(Debug, Clone)]
pub struct PivotedR<T> {
    /// R, k×n upper trapezoidal, in pivoted column order.
    pub r: Array2<T>,
    /// `order[j]` is the column of A that stands at position j.
    pub order: Vec<usize>,
}

/// The kernels of one compute type.
pub trait Kernels<T: Real>: Debug + Send + Sync {
    /// C ← α·A·B + β·C, with A m×k, B k×n, C m×n. 2mnk flops.
    ///
    /// # Panics
    /// If the shapes do not fit (a bug of the caller, as in ndarray).
    fn gemm(&self, alpha: T, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, beta: T, c: ArrayViewMut2<'_, T>);
    /// A·Bᵀ for A and B of m×n whose product is symmetric (B = A·G with a symmetric G, say): one
    /// triangle is computed and mirrored, so that the result is exactly symmetric. m²n flops.
    ///
    /// # Panics
    /// If the shapes differ (a bug of the caller, as in ndarray).
    fn symmetric_product(&self, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
        assert_eq!(a.dim(), b.dim(), "symmetric product of matrices of different shapes");
        let m = a.nrows();
        let mut c = Array2::zeros((m, m));
        upper_triangle(&|a, b, c| self.gemm(T::one(), a, b, T::zero(), c), a, b, c.view_mut());
        mirror(&mut c);
        c
    }
    /// Eigendecomposition of a symmetric matrix; only the lower triangle is read. The matrix is taken, so that its
    /// memory can be used or given back. About 9n³ flops.
    ///
    /// # Errors
    /// [`Error::Numerical`](crate::Error::Numerical) if it does not converge.
    fn eigh(&self, a: Array2<T>) -> Result<Eigh<T>>;
    /// Thin singular value decomposition.
    ///
    /// # Errors
    /// [`Error::Numerical`](crate::Error::Numerical) if it does not converge.
    fn svd(&self, a: ArrayView2<'_, T>) -> Result<Svd<T>>;
    /// Orthonormal basis of the columns of A, m×min(m, n), by Householder QR (thin Q).
    fn orthonormalize(&self, a: ArrayView2<'_, T>) -> Array2<T>;
    /// QR with column pivoting.
    fn pivoted_r(&self, a: ArrayView2<'_, T>) -> PivotedR<T>;
    /// Lower Cholesky factor L of a positive definite matrix, A = L·Lᵀ; the lower triangle is read.
    ///
    /// # Errors
    /// [`Error::Numerical`](crate::Error::Numerical) if A is not positive definite.
    fn cholesky(&self, a: ArrayView2<'_, T>) -> Result<Array2<T>>;
    /// B ← L⁻¹·B for a lower triangular L (pass a transposed view and `upper` for the other case).
    fn solve_triangular(&self, l: ArrayView2<'_, T>, upper: bool, b: &mut Array2<T>);

    /// A·Aᵀ, m×m, exactly symmetric. m²n flops.
    fn gram(&self, a: ArrayView2<'_, T>) -> Array2<T> {
        self.symmetric_product(a.view(), a)
    }
    /// A·B.
    fn matmul(&self, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
        let mut c = Array2::zeros((a.nrows(), b.ncols()));
        self.gemm(T::one(), a, b, T::zero(), c.view_mut());
        c
    }
    /// Solves A·X = B for a positive definite A by Cholesky.
    ///
    /// # Errors
    /// [`Error::Numerical`](crate::Error::Numerical) if A is not positive definite.
    fn solve_spd(&self, a: ArrayView2<'_, T>, mut b: Array2<T>) -> Result<Array2<T>> {
        let l = self.cholesky(a)?;
        self.solve_triangular(l.view(), false, &mut b);
        self.solve_triangular(l.t(), true, &mut b);
        Ok(b)
    }
}

/// A backend: the kernels of both compute types.
pub trait Backend: Kernels<f32> + Kernels<f64> {}
impl<B: Kernels<f32> + Kernels<f64>> Backend for B {}
