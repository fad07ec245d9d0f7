//! Factorizations by the system's LAPACK, through ndarray-linalg (feature `lapack`).
//!
//! For machines with many cores and few huge matrices: a threaded MKL or OpenBLAS scales better inside
//! one factorization than faer does. On one core faer is level with them. Which library is linked is the
//! program's choice: it enables one provider feature of ndarray-linalg (`openblas-system`,
//! `intel-mkl-system`, `netlib-system`, …). The threads are the library's business too
//! (`OMP_NUM_THREADS`), and its results are as deterministic as it is.
//!
//! Two kinds of kernels are not LAPACK's: products are those of [`Faer`], level with MKL, and the
//! column-pivoted QR goes to [`Faer`], because neither ndarray-linalg nor lax binds `geqp3`.
//!
//! Debian 12's OpenBLAS knows no CPU newer than itself and then falls back on SSE3 kernels, several times
//! slower: set `OPENBLAS_CORETYPE=SkylakeX` (or `Haswell`) there.

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};
use ndarray_linalg::{Cholesky, Diag, Eigh as _, JobSvd, QR, SVDDC, SolveTriangularInplace, UPLO};

use super::{Eigh, Faer, Kernels, PivotedR, Svd, matmul_into};
use crate::error::{Error, Result};
use crate::scalar::Real;

/// LAPACK kernels: gesdd, syev, geqrf, potrf and trtrs of whatever library is linked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lapack;

fn failed(kernel: &'static str, detail: impl ToString) -> Error {
    Error::Numerical { kernel, detail: detail.to_string() }
}

/// LAPACK may loop for ever, or worse, on what is not finite.
fn finite<T: Real>(kernel: &'static str, a: ArrayView2<'_, T>) -> Result<()> {
    if a.iter().all(|v| v.is_finite()) { Ok(()) } else { Err(failed(kernel, "the matrix holds NaN or infinity")) }
}

/// A full symmetric copy of the lower triangle: which triangle LAPACK reads depends on the storage order.
fn from_lower<T: Real>(kernel: &'static str, a: ArrayView2<'_, T>) -> Result<Array2<T>> {
    let (m, n) = a.dim();
    if m != n {
        return Err(failed(kernel, format!("a square matrix is needed, not {m}x{n}")));
    }
    let full = Array2::from_shape_fn((n, n), |(i, j)| a[(i.max(j), i.min(j))]);
    finite(kernel, full.view())?;
    Ok(full)
}

/// A row-major copy. (`as_standard_layout` keeps the strides of axes of length 1, which lax refuses.)
fn rows<T: Real>(a: ArrayView2<'_, T>) -> Array2<T> {
    let mut out = Array2::zeros(a.dim());
    out.assign(&a);
    out
}

macro_rules! kernels {
    ($t:ty) => {
        impl Kernels<$t> for Lapack {
            fn gemm(
                &self,
                alpha: $t,
                a: ArrayView2<'_, $t>,
                b: ArrayView2<'_, $t>,
                beta: $t,
                c: ArrayViewMut2<'_, $t>,
            ) {
                matmul_into(alpha, a, b, beta, c);
            }

            fn symmetric_product(&self, a: ArrayView2<'_, $t>, b: ArrayView2<'_, $t>) -> Array2<$t> {
                Faer.symmetric_product(a, b)
            }

            fn eigh(&self, a: Array2<$t>) -> Result<Eigh<$t>> {
                let full = from_lower("eigh", a.view())?;
                drop(a);
                if full.is_empty() {
                    return Ok(Eigh { values: Array1::zeros(0), vectors: full });
                }
                let (values, vectors) = full.eigh(UPLO::Lower).map_err(|e| failed("eigh", e))?;
                // LAPACK sorts ascending.
                Ok(Eigh { values: values.slice(s![..;-1]).to_vec().into(), vectors: rows(vectors.slice(s![.., ..;-1])) })
            }

            fn svd(&self, a: ArrayView2<'_, $t>) -> Result<Svd<$t>> {
                let (m, n) = a.dim();
                if a.is_empty() {
                    return Ok(Svd { u: Array2::zeros((m, 0)), values: Array1::zeros(0), vt: Array2::zeros((0, n)) });
                }
                finite("svd", a.view())?;
                match rows(a).svddc(JobSvd::Some).map_err(|e| failed("svd", e))? {
                    (Some(u), values, Some(vt)) => Ok(Svd { u: rows(u.view()), values, vt: rows(vt.view()) }),
                    _ => Err(failed("svd", "no singular vectors were returned")),
                }
            }

            fn orthonormalize(&self, a: ArrayView2<'_, $t>) -> Array2<$t> {
                if a.is_empty() {
                    return Array2::zeros((a.nrows(), 0));
                }
                match rows(a.view()).qr() {
                    Ok((q, _)) => rows(q.view()),
                    // geqrf has no failure of its own.
                    Err(_) => Faer.orthonormalize(a),
                }
            }

            fn pivoted_r(&self, a: ArrayView2<'_, $t>) -> PivotedR<$t> {
                Faer.pivoted_r(a)
            }

            fn cholesky(&self, a: ArrayView2<'_, $t>) -> Result<Array2<$t>> {
                let full = from_lower("cholesky", a)?;
                if full.is_empty() {
                    return Ok(full);
                }
                let mut l = rows(full.cholesky(UPLO::Lower).map_err(|e| failed("cholesky", e))?.view());
                l.axis_iter_mut(Axis(0)).enumerate().for_each(|(i, mut row)| row.slice_mut(s![i + 1..]).fill(0.0));
                Ok(l)
            }

            fn solve_triangular(&self, l: ArrayView2<'_, $t>, upper: bool, b: &mut Array2<$t>) {
                if b.is_empty() {
                    return;
                }
                // trtrs checks for zeros on the diagonal; faer divides by them, like the definition.
                let triangle = if upper { UPLO::Upper } else { UPLO::Lower };
                let mut x = rows(b.view());
                match rows(l.view()).solve_triangular_inplace(triangle, Diag::NonUnit, &mut x) {
                    Ok(_) => *b = x,
                    Err(_) => Faer.solve_triangular(l, upper, b),
                }
            }
        }
    };
}

kernels!(f32);
kernels!(f64);
