//! What every backend has to do, as a program: [`check`] runs each kernel against naive f64 oracles.
//!
//! It belongs to the library, not to its tests, so that backends of other crates can be held to it:
//!
//! ```
//! use weightpress::linalg::{Faer, conformance};
//! conformance::check(&Faer)?;
//! # Ok::<(), weightpress::Error>(())
//! ```
//!
//! The matrices are empty, 1×1, rows, columns, tall, wide, of prime sizes, zero, rank-deficient and
//! graded; each is passed in row-major, column-major, strided and reversed storage. Results are judged by
//! what defines them (reconstruction, orthonormality, order), so that signs and the choice among equals
//! are free.

use ndarray::{Array1, Array2, ArrayView2, s};

use super::{Backend, Kernels};
use crate::error::{Error, Result};
use crate::scalar::Real;

/// Runs all checks in both compute types. Takes seconds.
///
/// # Errors
/// [`Error::Numerical`] names the first kernel that is wrong, and how.
pub fn check(backend: &dyn Backend) -> Result<()> {
    suite::<f32>(backend)?;
    suite::<f64>(backend)
}

fn suite<T: Real>(backend: &dyn Backend) -> Result<()> {
    let kernels = T::kernels(backend);
    for a in matrices() {
        let a = T::from_view(a.view()).into_owned();
        in_every_storage(&a, |view| {
            products(kernels, view)?;
            symmetric(kernels, view)?;
            singular(kernels, view)?;
            orthogonal(kernels, view)?;
            pivoted(kernels, view)?;
            definite(kernels, view)
        })?;
    }
    refusals(kernels)
}

/// Reproducible numbers in (−1, 1).
fn noise(m: usize, n: usize, seed: u64) -> Array2<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_simple_fn((m, n), || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
    })
}

fn matrices() -> Vec<Array2<f64>> {
    let shapes = [(0, 0), (0, 3), (3, 0), (1, 1), (1, 7), (7, 1), (2, 2), (31, 31), (97, 13), (13, 97), (61, 67)];
    let mut all: Vec<_> = shapes.iter().enumerate().map(|(i, &(m, n))| noise(m, n, i as u64)).collect();
    all.push(Array2::zeros((5, 8)));
    all.push(Array2::eye(9));
    all.push(Array2::ones((6, 4)));
    all.push(Array2::from_shape_fn((8, 10), |(i, j)| if i == j && i < 3 { 2.0 } else { 0.0 }));
    all.push(naive(noise(17, 2, 31).view(), noise(2, 11, 32).view()));
    all.push(&noise(40, 20, 33) * &Array1::from_shape_fn(20, |j| 0.3f64.powi(j as i32)));
    all
}

/// The same numbers as a row-major, column-major, strided and reversed view.
fn in_every_storage<T: Real>(a: &Array2<T>, mut run: impl FnMut(ArrayView2<'_, T>) -> Result<()>) -> Result<()> {
    let (m, n) = a.dim();
    run(a.view())?;
    let columns = a.t().as_standard_layout().into_owned();
    run(columns.t())?;
    let mut sparse = Array2::from_elem((2 * m, 3 * n), T::from_f64(1e3));
    sparse.slice_mut(s![..;2, ..;3]).assign(a);
    run(sparse.slice(s![..;2, ..;3]))?;
    let backwards = a.slice(s![..;-1, ..;-1]).as_standard_layout().into_owned();
    run(backwards.slice(s![..;-1, ..;-1]))
}

// ---------------------------------------------------------------------------------------- oracles

fn naive(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Array2<f64> {
    Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| (0..a.ncols()).map(|k| a[(i, k)] * b[(k, j)]).sum())
}

fn wide<T: Real>(a: ArrayView2<'_, T>) -> Array2<f64> {
    f64::from_view(a).into_owned()
}

fn norm(a: ArrayView2<'_, f64>) -> f64 {
    a.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Singular values in descending order by one-sided Jacobi rotations (Hestenes 1958).
fn jacobi_singular_values(a: ArrayView2<'_, f64>) -> Vec<f64> {
    let mut a = if a.nrows() < a.ncols() { a.t().to_owned() } else { a.to_owned() };
    for _ in 0..60 {
        let mut largest = 0.0f64;
        for p in 0..a.ncols() {
            for q in p + 1..a.ncols() {
                let (alpha, beta) = (a.column(p).dot(&a.column(p)), a.column(q).dot(&a.column(q)));
                let gamma = a.column(p).dot(&a.column(q));
                if gamma == 0.0 || gamma.abs() <= 1e-16 * (alpha * beta).sqrt() {
                    continue;
                }
                largest = largest.max(gamma.abs() / (alpha * beta).sqrt());
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                for i in 0..a.nrows() {
                    let (x, y) = (a[(i, p)], a[(i, q)]);
                    a[(i, p)] = c * x - c * t * y;
                    a[(i, q)] = c * t * x + c * y;
                }
            }
        }
        if largest <= 1e-14 {
            break;
        }
    }
    let mut values: Vec<f64> = a.columns().into_iter().map(|column| column.dot(&column).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

// ----------------------------------------------------------------------------------------- verdicts

fn wrong(kernel: &'static str, detail: impl Into<String>) -> Error {
    Error::Numerical { kernel, detail: detail.into() }
}

/// ‖got − want‖ ≤ 30·ε·√size·scale, with the shape.
fn close<T: Real>(
    kernel: &'static str,
    what: &str,
    got: ArrayView2<'_, f64>,
    want: ArrayView2<'_, f64>,
    scale: f64,
) -> Result<()> {
    if got.dim() != want.dim() {
        return Err(wrong(kernel, format!("{what}: {:?} instead of {:?}", got.dim(), want.dim())));
    }
    let off = norm((&got - &want).view());
    let allowed = 30.0 * T::epsilon().wide() * (1.0 + (want.nrows() + want.ncols()) as f64).sqrt() * scale;
    match off <= allowed {
        true => Ok(()),
        false => Err(wrong(kernel, format!("{what} of {:?}: off by {off:.2e}, allowed {allowed:.2e}", want.dim()))),
    }
}

fn orthonormal<T: Real>(kernel: &'static str, columns: ArrayView2<'_, f64>) -> Result<()> {
    let gram = naive(columns.t(), columns.view());
    let size = (gram.nrows() as f64).sqrt();
    close::<T>(kernel, "orthonormal columns", gram.view(), Array2::eye(gram.nrows()).view(), 1.0 + size)
}

fn require(kernel: &'static str, holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(wrong(kernel, format!("expected {what}"))) }
}

// ------------------------------------------------------------------------------------------ kernels

fn products<T: Real>(kernels: &dyn Kernels<T>, a: ArrayView2<'_, T>) -> Result<()> {
    let (m, k) = a.dim();
    let a64 = wide(a.view());
    for n in [1, 6] {
        let b = T::from_view(noise(n, k, 50).view()).into_owned();
        let expected = naive(a64.view(), wide(b.t()).view());
        let scale = norm(a64.view()) * norm(wide(b.view()).view());
        // What C holds must not matter if β is zero, not even if it is not a number.
        let mut c = Array2::from_elem((m, n), T::nan());
        kernels.gemm(T::one(), a.view(), b.t(), T::zero(), c.view_mut());
        close::<T>("gemm", "A·B", wide(c.view()).view(), expected.view(), scale)?;
        let start = noise(2 * n, m, 51);
        let mut c = T::from_view(start.view()).into_owned();
        kernels.gemm(T::from_f64(-2.0), a.view(), b.t(), T::from_f64(0.5), c.slice_mut(s![..;2, ..]).reversed_axes());
        let expected = 0.5 * &start.slice(s![..;2, ..]).t() - 2.0 * &expected;
        let scale = 2.0 * scale + norm(start.view());
        close::<T>("gemm", "β·C + α·A·B", wide(c.slice(s![..;2, ..]).t()).view(), expected.view(), scale)?;
        let untouched = c.slice(s![1..;2, ..]) == T::from_view(start.slice(s![1..;2, ..]));
        require("gemm", untouched, "numbers between the strides of C to be left alone")?;
    }
    let gram = kernels.gram(a.view());
    require("gram", gram == gram.t(), "an exactly symmetric result")?;
    let scale = norm(a64.view()).powi(2);
    close::<T>("gram", "A·Aᵀ", wide(gram.view()).view(), naive(a64.view(), a64.t()).view(), scale)?;

    let g = noise(k, k, 52);
    let b = T::from_view(naive(a64.view(), (&g + &g.t()).view()).view()).into_owned();
    let product = kernels.symmetric_product(a.view(), b.view());
    require("symmetric_product", product == product.t(), "an exactly symmetric result")?;
    let (b64, scale) = (wide(b.view()), norm(a64.view()) * norm(wide(b.view()).view()));
    close::<T>("symmetric_product", "A·Bᵀ", wide(product.view()).view(), naive(a64.view(), b64.t()).view(), scale)
}

fn symmetric<T: Real>(kernels: &dyn Kernels<T>, a: ArrayView2<'_, T>) -> Result<()> {
    // Indefinite, with numbers above the diagonal that must not be read.
    let a64 = wide(a.view());
    let mut full = naive(a64.view(), a64.t());
    let shift = full.diag().sum() / (1 + full.nrows()) as f64;
    full.diag_mut().mapv_inplace(|v| v - shift);
    let lower = T::from_view(full.view()).into_owned();
    let full = Array2::from_shape_fn(full.dim(), |(i, j)| lower[(i.max(j), i.min(j))].wide());
    let given = Array2::from_shape_fn(full.dim(), |(i, j)| if i >= j { lower[(i, j)] } else { T::from_f64(77.0) });
    let found = kernels.eigh(given)?;
    let (values, vectors) = (found.values.mapv(Real::wide), wide(found.vectors.view()));
    require("eigh", values.len() == full.nrows(), "n eigenvalues")?;
    require("eigh", values.to_vec().is_sorted_by(|a, b| a >= b), "descending eigenvalues")?;
    orthonormal::<T>("eigh", vectors.view())?;
    let again = naive((&vectors * &values).view(), vectors.t());
    close::<T>("eigh", "V·diag(λ)·Vᵀ", again.view(), full.view(), norm(full.view()))
}

fn singular<T: Real>(kernels: &dyn Kernels<T>, a: ArrayView2<'_, T>) -> Result<()> {
    let ((m, n), a64) = (a.dim(), wide(a.view()));
    let k = m.min(n);
    let found = kernels.svd(a)?;
    let (u, vt, values) = (wide(found.u.view()), wide(found.vt.view()), found.values.mapv(Real::wide));
    require("svd", u.dim() == (m, k) && vt.dim() == (k, n) && values.len() == k, "thin shapes")?;
    let ordered = values.to_vec().is_sorted_by(|a, b| a >= b) && values.iter().all(|v| *v >= 0.0);
    require("svd", ordered, "descending singular values, none negative")?;
    orthonormal::<T>("svd", u.view())?;
    orthonormal::<T>("svd", vt.t())?;
    let scale = norm(a64.view());
    close::<T>("svd", "U·diag(σ)·Vᵀ", naive((&u * &values).view(), vt.view()).view(), a64.view(), scale)?;
    let expected = Array2::from_shape_vec((1, k), jacobi_singular_values(a64.view()))
        .map_err(|e| Error::shape("k singular values", e.to_string()))?;
    close::<T>("svd", "singular values", values.insert_axis(ndarray::Axis(0)).view(), expected.view(), scale)
}

fn orthogonal<T: Real>(kernels: &dyn Kernels<T>, a: ArrayView2<'_, T>) -> Result<()> {
    let ((m, n), a64) = (a.dim(), wide(a.view()));
    let q = wide(kernels.orthonormalize(a).view());
    require("orthonormalize", q.dim() == (m, m.min(n)), "m×min(m, n)")?;
    orthonormal::<T>("orthonormalize", q.view())?;
    let again = naive(q.view(), naive(q.t(), a64.view()).view());
    close::<T>("orthonormalize", "Q·Qᵀ·A", again.view(), a64.view(), norm(a64.view()))
}

fn pivoted<T: Real>(kernels: &dyn Kernels<T>, a: ArrayView2<'_, T>) -> Result<()> {
    let ((m, n), a64) = (a.dim(), wide(a.view()));
    let found = kernels.pivoted_r(a);
    let r = wide(found.r.view());
    let mut seen = found.order.clone();
    seen.sort_unstable();
    require("pivoted_r", seen.iter().copied().eq(0..n), "a permutation of the columns")?;
    require("pivoted_r", r.dim() == (m.min(n), n), "R of min(m, n)×n")?;
    require("pivoted_r", r.indexed_iter().all(|((i, j), v)| i <= j || *v == 0.0), "zeros below the diagonal")?;
    let slack = 1.0 + 100.0 * T::epsilon().wide();
    let diagonal: Vec<f64> = r.diag().iter().map(|v| v.abs()).collect();
    let noise = 100.0 * T::epsilon().wide() * norm(a64.view());
    if let Some(i) = (1..diagonal.len()).find(|&i| diagonal[i] > slack * diagonal[i - 1] + noise) {
        let (before, after) = (diagonal[i - 1], diagonal[i]);
        return Err(wrong("pivoted_r", format!("{m}x{n}: the diagonal grows from {before:.6e} to {after:.6e} at {i}")));
    }
    let columns = a64.select(ndarray::Axis(1), &found.order);
    let scale = norm(a64.view()).powi(2);
    close::<T>("pivoted_r", "RᵀR", naive(r.t(), r.view()).view(), naive(columns.t(), columns.view()).view(), scale)
}

fn definite<T: Real>(kernels: &dyn Kernels<T>, a: ArrayView2<'_, T>) -> Result<()> {
    let a64 = wide(a.view());
    let mut full = naive(a64.view(), a64.t());
    full.diag_mut().mapv_inplace(|v| v + 1.0);
    let lower = T::from_view(full.view()).into_owned();
    let full = Array2::from_shape_fn(full.dim(), |(i, j)| lower[(i.max(j), i.min(j))].wide());
    let given = Array2::from_shape_fn(full.dim(), |(i, j)| if i >= j { lower[(i, j)] } else { T::from_f64(-9.0) });
    let factor = kernels.cholesky(given.view())?;
    let l = wide(factor.view());
    require("cholesky", l.indexed_iter().all(|((i, j), v)| i >= j || *v == 0.0), "zeros above the diagonal")?;
    close::<T>("cholesky", "L·Lᵀ", naive(l.view(), l.t()).view(), full.view(), norm(full.view()))?;

    for columns in [1, 4] {
        let b = T::from_view(noise(full.nrows(), columns, 60).view()).into_owned();
        let b64 = wide(b.view());
        let scale = (1.0 + norm(full.view())) * (1.0 + norm(b64.view()));
        let mut x = b.clone();
        kernels.solve_triangular(factor.view(), false, &mut x);
        close::<T>("solve_triangular", "L·X", naive(l.view(), wide(x.view()).view()).view(), b64.view(), scale)?;
        let mut x = b.t().as_standard_layout().into_owned().reversed_axes();
        kernels.solve_triangular(factor.t(), true, &mut x);
        close::<T>("solve_triangular", "Lᵀ·X", naive(l.t(), wide(x.view()).view()).view(), b64.view(), scale)?;
        let x = kernels.solve_spd(given.view(), b)?;
        close::<T>("solve_spd", "A·X", naive(full.view(), wide(x.view()).view()).view(), b64.view(), scale)?;
    }
    Ok(())
}

/// Bad input ends in an error, never in a panic or in numbers that look like a result.
fn refusals<T: Real>(kernels: &dyn Kernels<T>) -> Result<()> {
    let refused = |result: Result<()>| matches!(result, Err(Error::Numerical { .. }));
    for n in [1, 2, 40] {
        let mut a = T::from_view((&noise(n, n, 70) + &(Array2::<f64>::eye(n) * 9.0)).view()).into_owned();
        a[(n - 1, n - 1)] = T::from_f64(-1.0);
        require("cholesky", refused(kernels.cholesky(a.view()).map(drop)), "indefinite matrices to be refused")?;
        let zero = Array2::zeros((n, n));
        require("cholesky", refused(kernels.cholesky(zero.view()).map(drop)), "singular matrices to be refused")?;
        for bad in [T::nan(), T::infinity()] {
            a[(n - 1, 0)] = bad;
            require("svd", refused(kernels.svd(a.view()).map(drop)), "NaN and infinity to be refused")?;
            require("eigh", refused(kernels.eigh(a.clone()).map(drop)), "NaN and infinity to be refused")?;
            require("cholesky", refused(kernels.cholesky(a.view()).map(drop)), "NaN and infinity to be refused")?;
        }
    }
    let wide = Array2::zeros((2, 3));
    require("eigh", refused(kernels.eigh(wide.clone()).map(drop)), "matrices that are not square to be refused")?;
    require("cholesky", refused(kernels.cholesky(wide.view()).map(drop)), "matrices that are not square to be refused")
}
