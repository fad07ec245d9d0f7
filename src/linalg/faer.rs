//! The default backend: factorizations by faer, products by gemm, nothing to install.

use ::faer::dyn_stack::{MemBuffer, MemStack};
use ::faer::linalg::matmul::triangular::{self, BlockStructure};
use ::faer::linalg::{cholesky::llt, evd, householder, qr, svd, triangular_solve};
use ::faer::prelude::*;
use ::faer::traits::RealField;
use ::faer::{Accum, Conj, diag::Diag};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2};

use super::{Eigh, Kernels, PivotedR, Svd, matmul_into};
use crate::error::{Error, Result};
use crate::scalar::Real;

/// Pure-Rust kernels. Products use the `gemm` crate, factorizations faer 0.24.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faer;

/// faer's own solvers read a global setting; these wrappers pass the rule of [`super`] instead.
fn par() -> Par {
    if rayon::current_thread_index().is_some() { Par::Seq } else { Par::rayon(0) }
}

/// A faer view of an ndarray view, without a copy unless the strides are unusual.
fn with_view<T: Real, R>(a: ArrayView2<'_, T>, run: impl FnOnce(MatRef<'_, T>) -> R) -> R {
    let (m, n) = a.dim();
    let transposed = a.t();
    if let Some(slice) = a.as_slice() {
        run(MatRef::from_row_major_slice(slice, m, n))
    } else if let Some(slice) = transposed.as_slice() {
        run(MatRef::from_column_major_slice(slice, m, n))
    } else {
        let copy: Vec<T> = a.iter().copied().collect();
        run(MatRef::from_row_major_slice(&copy, m, n))
    }
}

fn to_array<T: Real>(a: MatRef<'_, T>) -> Array2<T> {
    Array2::from_shape_fn((a.nrows(), a.ncols()), |(i, j)| a[(i, j)])
}

fn gram<T: Real + RealField>(a: MatRef<'_, T>) -> Array2<T> {
    let m = a.nrows();
    let mut out = Mat::<T>::zeros(m, m);
    let (full, half) = (BlockStructure::Rectangular, BlockStructure::TriangularLower);
    triangular::matmul(out.as_mut(), half, Accum::Replace, a, full, a.transpose(), full, T::from_f64(1.0), par());
    Array2::from_shape_fn((m, m), |(i, j)| out[(i.max(j), i.min(j))])
}

fn eigh<T: Real + RealField>(a: MatRef<'_, T>) -> Result<Eigh<T>> {
    let n = a.nrows();
    let (mut vectors, mut values) = (Mat::<T>::zeros(n, n), Diag::<T>::zeros(n));
    let scratch = evd::self_adjoint_evd_scratch::<T>(n, evd::ComputeEigenvectors::Yes, par(), default());
    let mut memory = MemBuffer::new(scratch);
    evd::self_adjoint_evd(a, values.as_mut(), Some(vectors.as_mut()), par(), MemStack::new(&mut memory), default())
        .map_err(|e| Error::Numerical { kernel: "eigh", detail: format!("{e:?} on {n}x{n}") })?;
    let values = values.column_vector();
    // faer sorts ascending; we want the largest first.
    Ok(Eigh {
        values: Array1::from_shape_fn(n, |i| values[n - 1 - i]),
        vectors: Array2::from_shape_fn((n, n), |(i, j)| vectors[(i, n - 1 - j)]),
    })
}

fn thin_svd<T: Real + RealField>(a: MatRef<'_, T>) -> Result<Svd<T>> {
    let (m, n) = a.shape();
    let k = m.min(n);
    let (mut u, mut v, mut values) = (Mat::<T>::zeros(m, k), Mat::<T>::zeros(n, k), Diag::<T>::zeros(k));
    let thin = svd::ComputeSvdVectors::Thin;
    let mut memory = MemBuffer::new(svd::svd_scratch::<T>(m, n, thin, thin, par(), default()));
    svd::svd(a, values.as_mut(), Some(u.as_mut()), Some(v.as_mut()), par(), MemStack::new(&mut memory), default())
        .map_err(|e| Error::Numerical { kernel: "svd", detail: format!("{e:?} on {m}x{n}") })?;
    let values = values.column_vector();
    Ok(Svd { u: to_array(u.as_ref()), values: Array1::from_shape_fn(k, |i| values[i]), vt: to_array(v.transpose()) })
}

fn thin_q<T: Real + RealField>(a: MatRef<'_, T>) -> Array2<T> {
    let ((m, n), mut factors) = (a.shape(), a.to_owned());
    let size = m.min(n);
    let block = qr::no_pivoting::factor::recommended_block_size::<T>(m, n);
    let mut coefficients = Mat::<T>::zeros(block, size);
    let scratch = qr::no_pivoting::factor::qr_in_place_scratch::<T>(m, n, block, par(), default());
    let mut memory = MemBuffer::new(scratch);
    qr::no_pivoting::factor::qr_in_place(
        factors.as_mut(),
        coefficients.as_mut(),
        par(),
        MemStack::new(&mut memory),
        default(),
    );
    let mut q = Mat::<T>::identity(m, size);
    let scratch = householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<T>(m, block, size);
    let mut memory = MemBuffer::new(scratch);
    householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
        factors.get(.., ..size),
        coefficients.as_ref(),
        Conj::No,
        q.as_mut(),
        par(),
        MemStack::new(&mut memory),
    );
    to_array(q.as_ref())
}

fn pivoted_r<T: Real + RealField>(a: MatRef<'_, T>) -> PivotedR<T> {
    let ((m, n), mut factors) = (a.shape(), a.to_owned());
    let size = m.min(n);
    let (mut order, mut inverse) = (vec![0usize; n], vec![0usize; n]);
    let block = qr::no_pivoting::factor::recommended_block_size::<T>(m, n);
    let mut coefficients = Mat::<T>::zeros(block, size);
    let scratch = qr::col_pivoting::factor::qr_in_place_scratch::<usize, T>(m, n, block, par(), default());
    let mut memory = MemBuffer::new(scratch);
    qr::col_pivoting::factor::qr_in_place(
        factors.as_mut(),
        coefficients.as_mut(),
        &mut order,
        &mut inverse,
        par(),
        MemStack::new(&mut memory),
        default(),
    );
    PivotedR {
        r: Array2::from_shape_fn((size, n), |(i, j)| if i <= j { factors[(i, j)] } else { T::from_f64(0.0) }),
        order,
    }
}

fn cholesky<T: Real + RealField>(a: MatRef<'_, T>) -> Result<Array2<T>> {
    let n = a.nrows();
    let mut l = a.to_owned();
    let mut memory = MemBuffer::new(llt::factor::cholesky_in_place_scratch::<T>(n, par(), default()));
    llt::factor::cholesky_in_place(l.as_mut(), default(), par(), MemStack::new(&mut memory), default())
        .map_err(|e| Error::Numerical { kernel: "cholesky", detail: format!("{e:?} on {n}x{n}") })?;
    Ok(Array2::from_shape_fn((n, n), |(i, j)| if i >= j { l[(i, j)] } else { T::from_f64(0.0) }))
}

fn solve<T: Real + RealField>(l: MatRef<'_, T>, upper: bool, b: &mut Array2<T>) {
    let (m, n) = b.dim();
    if !b.is_standard_layout() {
        *b = b.as_standard_layout().into_owned();
    }
    let Some(slice) = b.as_slice_mut() else { return };
    let b = MatMut::from_row_major_slice_mut(slice, m, n);
    if upper {
        triangular_solve::solve_upper_triangular_in_place(l, b, par());
    } else {
        triangular_solve::solve_lower_triangular_in_place(l, b, par());
    }
}

// The generic code above is instantiated here and nowhere else: each faer factorization costs
// seconds of compile time per scalar.
macro_rules! kernels {
    ($t:ty) => {
        impl Kernels<$t> for Faer {
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
            fn gram(&self, a: ArrayView2<'_, $t>) -> Array2<$t> {
                with_view(a, gram)
            }
            fn eigh(&self, a: ArrayView2<'_, $t>) -> Result<Eigh<$t>> {
                with_view(a, eigh)
            }
            fn svd(&self, a: ArrayView2<'_, $t>) -> Result<Svd<$t>> {
                with_view(a, thin_svd)
            }
            fn orthonormalize(&self, a: ArrayView2<'_, $t>) -> Array2<$t> {
                with_view(a, thin_q)
            }
            fn pivoted_r(&self, a: ArrayView2<'_, $t>) -> PivotedR<$t> {
                with_view(a, pivoted_r)
            }
            fn cholesky(&self, a: ArrayView2<'_, $t>) -> Result<Array2<$t>> {
                with_view(a, cholesky)
            }
            fn solve_triangular(&self, l: ArrayView2<'_, $t>, upper: bool, b: &mut Array2<$t>) {
                with_view(l, |l| solve(l, upper, b));
            }
        }
    };
}

kernels!(f32);
kernels!(f64);
