//! The default backend: factorizations by faer, products by gemm, nothing to install.

use ::faer::dyn_stack::{MemBuffer, MemStack};
use ::faer::linalg::matmul::triangular::{self, BlockStructure};
use ::faer::linalg::{cholesky::llt, householder, qr, svd, triangular_solve};
use ::faer::prelude::*;
use ::faer::traits::RealField;
use ::faer::{Accum, Conj, diag::Diag};
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};

use self::symmetric::eigh;
use super::{Eigh, Kernels, PivotedR, Svd, matmul_into, mirror};
use crate::error::{Error, Result};
use crate::scalar::Real;

mod symmetric;

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

/// Elements that are moved together between row-major and column-major storage: going element by
/// element along the other order would miss the cache at every step.
const STRIPE: usize = 16;

/// A row-major copy.
fn to_rows<T: Real>(a: MatRef<'_, T>) -> Array2<T> {
    let mut out = Array2::zeros(a.shape());
    for (stripe, mut part) in out.axis_chunks_iter_mut(Axis(1), STRIPE).enumerate() {
        let columns = (0..part.ncols()).map(|j| a.col(stripe * STRIPE + j).try_as_col_major().map(|c| c.as_slice()));
        match columns.collect::<Option<Vec<&[T]>>>() {
            Some(columns) => part.rows_mut().into_iter().enumerate().for_each(|(i, row)| {
                row.into_iter().zip(&columns).for_each(|(to, column)| *to = column[i]);
            }),
            None => part.indexed_iter_mut().for_each(|((i, j), to)| *to = a[(i, stripe * STRIPE + j)]),
        }
    }
    out
}

/// A column-major copy, which faer's factorizations work on in place.
fn to_columns<T: Real + RealField>(a: MatRef<'_, T>) -> Mat<T> {
    let (m, n) = a.shape();
    let mut out = Mat::zeros(m, n);
    for start in (0..m).step_by(STRIPE) {
        let stripe = start..(start + STRIPE).min(m);
        let rows = stripe.clone().map(|i| a.row(i).try_as_row_major().map(|row| row.as_slice()));
        let Some(rows) = rows.collect::<Option<Vec<&[T]>>>() else {
            return a.to_owned();
        };
        for j in 0..n {
            if let Some(column) = out.col_mut(j).try_as_col_major_mut() {
                column.as_slice_mut()[stripe.clone()].iter_mut().zip(&rows).for_each(|(to, row)| *to = row[j]);
            }
        }
    }
    out
}

fn symmetric_product<T: Real + RealField>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> Array2<T> {
    assert_eq!(a.shape(), b.shape(), "symmetric product of matrices of different shapes");
    let m = a.nrows();
    let mut out = Array2::zeros((m, m));
    if let Some(slice) = out.as_slice_mut() {
        // The lower triangle by columns is the upper one by rows.
        let (full, half) = (BlockStructure::Rectangular, BlockStructure::TriangularLower);
        let c = MatMut::from_column_major_slice_mut(slice, m, m);
        triangular::matmul(c, half, Accum::Replace, a, full, b.transpose(), full, T::from_f64(1.0), par());
    }
    mirror(&mut out);
    out
}

/// Refuses what an iteration would turn into nonsense, or never end on.
fn finite<T: Real + RealField>(kernel: &'static str, a: MatRef<'_, T>) -> Result<()> {
    match a.is_all_finite() {
        true => Ok(()),
        false => Err(Error::Numerical { kernel, detail: "the matrix holds NaN or infinity".into() }),
    }
}

/// The order of a square matrix with a finite lower triangle.
fn square<T: Real + RealField>(kernel: &'static str, a: MatRef<'_, T>) -> Result<usize> {
    match a.shape() {
        (m, n) if m == n => {
            let rows = (0..n).map(|i| finite(kernel, a.get(i..i + 1, ..i + 1)));
            rows.collect::<Result<()>>().map(|()| n)
        }
        (m, n) => Err(Error::Numerical { kernel, detail: format!("a square matrix is needed, not {m}x{n}") }),
    }
}

fn thin_svd<T: Real + RealField>(a: MatRef<'_, T>) -> Result<Svd<T>> {
    let (m, n) = a.shape();
    let k = m.min(n);
    finite("svd", a)?;
    if k == 0 {
        return Ok(Svd { u: Array2::zeros((m, 0)), values: Array1::zeros(0), vt: Array2::zeros((0, n)) });
    }
    let (mut u, mut v, mut values) = (Mat::<T>::zeros(m, k), Mat::<T>::zeros(n, k), Diag::<T>::zeros(k));
    let thin = svd::ComputeSvdVectors::Thin;
    let mut memory = MemBuffer::new(svd::svd_scratch::<T>(m, n, thin, thin, par(), default()));
    svd::svd(a, values.as_mut(), Some(u.as_mut()), Some(v.as_mut()), par(), MemStack::new(&mut memory), default())
        .map_err(|e| Error::Numerical { kernel: "svd", detail: format!("{e:?} on {m}x{n}") })?;
    let values = values.column_vector();
    Ok(Svd { u: to_rows(u.as_ref()), values: Array1::from_shape_fn(k, |i| values[i]), vt: to_rows(v.transpose()) })
}

fn thin_q<T: Real + RealField>(a: MatRef<'_, T>) -> Array2<T> {
    let ((m, n), mut factors) = (a.shape(), to_columns(a));
    let size = m.min(n);
    if size == 0 {
        return Array2::zeros((m, 0));
    }
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
    to_rows(q.as_ref())
}

fn pivoted_r<T: Real + RealField>(a: MatRef<'_, T>) -> PivotedR<T> {
    let ((m, n), mut factors) = (a.shape(), to_columns(a));
    let size = m.min(n);
    if factors.norm_max() == T::from_f64(0.0) {
        // faer divides by the largest column norm; here, too, for empty matrices.
        return PivotedR { r: Array2::zeros((size, n)), order: (0..n).collect() };
    }
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
    let mut r = to_rows(factors.get(..size, ..));
    r.rows_mut().into_iter().enumerate().for_each(|(i, mut row)| row.slice_mut(s![..i]).fill(T::from_f64(0.0)));
    PivotedR { r, order }
}

fn cholesky<T: Real + RealField>(a: MatRef<'_, T>) -> Result<Array2<T>> {
    let n = square("cholesky", a)?;
    let mut l = to_columns(a);
    let mut memory = MemBuffer::new(llt::factor::cholesky_in_place_scratch::<T>(n, par(), default()));
    llt::factor::cholesky_in_place(l.as_mut(), default(), par(), MemStack::new(&mut memory), default())
        .map_err(|e| Error::Numerical { kernel: "cholesky", detail: format!("{e:?} on {n}x{n}") })?;
    let mut l = to_rows(l.as_ref());
    l.rows_mut().into_iter().enumerate().for_each(|(i, mut row)| row.slice_mut(s![i + 1..]).fill(T::from_f64(0.0)));
    Ok(l)
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
            fn symmetric_product(&self, a: ArrayView2<'_, $t>, b: ArrayView2<'_, $t>) -> Array2<$t> {
                with_view(a, |a| with_view(b, |b| symmetric_product(a, b)))
            }
            fn eigh(&self, a: Array2<$t>) -> Result<Eigh<$t>> {
                eigh(a)
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
