//! The exact route: one symmetric eigendecomposition of the shorter side.

use std::cmp::Ordering;

use ndarray::{Array2, ArrayBase, ArrayView2, Axis, DataMut, Ix2, concatenate, s};

use super::Joint;
use crate::error::{Error, Result};
use crate::linalg::{Backend, Kernels};
use crate::metric::{Metric, Weighting};
use crate::scalar::Real;

/// Eigenvalues λ of C, largest first, and the matching orthonormal U (M×k), k the numerical rank of W.
pub(in crate::factorize) struct Spectrum<T> {
    pub(in crate::factorize) values: Vec<f64>,
    pub(in crate::factorize) vectors: Array2<T>,
}

/// σ² and the left singular vectors of a matrix, by the exact route.
pub(in crate::factorize) fn plain_spectrum<T: Real>(w: Array2<T>, backend: &dyn Backend) -> Result<Spectrum<T>> {
    metric_spectrum::<T, f64>(&Joint::lone(w.dim(), &Metric::frobenius(), || w.view().into()), backend)
}

/// A short side up to this is squared in f64 at once.
const SQUARE_IN_F64: usize = 2048;

pub(in crate::factorize) fn spectrum<T: Real>(joint: &Joint<'_, T>, backend: &dyn Backend) -> Result<Spectrum<T>> {
    let (m, n) = joint.shape;
    if m.min(n) > SQUARE_IN_F64 {
        let quick = metric_spectrum::<T, f32>(joint, backend)?;
        if trusted(&quick.values, m.min(n)) {
            return fill(joint, quick, backend);
        }
    }
    fill(joint, metric_spectrum::<T, f64>(joint, backend)?, backend)
}

/// Whether eigenvalues from an f32 product can be trusted: its error, about k·ε·λ₁ in all, must be a
/// thousandth of the tail beyond three quarters of the spectrum at most.
fn trusted(values: &[f64], k: usize) -> bool {
    let tail: f64 = values.iter().skip(k * 3 / 4).map(|v| v.max(0.0)).sum();
    let first = values.first().copied().unwrap_or(0.0);
    k as f64 * f64::from(f32::EPSILON) / 2.0 * first <= 1e-3 * tail
}

/// The eigenpairs of C with λ above rounding, by the cheaper side, computed in P.
fn metric_spectrum<T: Real, P: Real>(joint: &Joint<'_, T>, backend: &dyn Backend) -> Result<Spectrum<T>> {
    let kernels = P::kernels(backend);
    let (m, n) = joint.shape;
    let gram = joint.blocks.iter().any(|(_, input)| matches!(input, Weighting::Gram(_)));
    // With a Gram metric the n×n side needs the square root of A first, hence the handicap.
    let tall = joint.blocks.len() == 1 && if gram { 2 * m > 3 * n } else { m > n };
    if !tall {
        // Nothing but the square is in memory while it is decomposed.
        let found = kernels.eigh(square::<T, P>(joint, kernels))?;
        let values: Vec<f64> = found.values.iter().map(|v| v.wide()).collect();
        let k = count_above(&values, 1e-13).min(n);
        return Ok(Spectrum {
            vectors: T::from_view(found.vectors.slice(s![.., ..k])).into_owned(),
            values: values[..k].to_vec(),
        });
    }
    let weight = joint.weight();
    let mut y = P::from_view(weight.view());
    match &joint.blocks[0].1 {
        Weighting::Gram(gram) => y = kernels.matmul(y.view(), P::from_view(gram.sqrt(backend)?.view()).view()).into(),
        weighting => scale_columns(&mut y, weighting),
    }
    let found = kernels.eigh(kernels.gram(y.t()))?;
    let values: Vec<f64> = found.values.iter().map(|v| v.wide()).collect();
    // U = Y·V·Λ^{−½} is orthonormal to ε·λ₁/λᵢ, so that in f64 it needs no further care down to here.
    let k = count_above(&values, 1e-12);
    let mut u = kernels.matmul(y.view(), found.vectors.slice(s![.., ..k]));
    for (mut column, value) in u.columns_mut().into_iter().zip(&values) {
        column.mapv_inplace(|v| v / P::from_f64(value.sqrt()));
    }
    Ok(Spectrum { values: values[..k].to_vec(), vectors: T::from_view(u.view()).into_owned() })
}

/// C = D·W·A·Wᵀ·D.
fn square<T: Real, P: Real>(joint: &Joint<'_, T>, kernels: &dyn Kernels<P>) -> Array2<P> {
    let weight = joint.weight();
    let (mut sum, mut at) = (None, 0);
    for (columns, input) in &joint.blocks {
        let mut block = P::from_view(weight.slice(s![.., at..at + columns]));
        at += columns;
        let part = match input {
            Weighting::Gram(gram) => sandwich(kernels, block.view(), P::from_view(gram.matrix()).view()),
            weighting => {
                scale_columns(&mut block, weighting);
                kernels.gram(block.view())
            }
        };
        sum = Some(match sum {
            None => part,
            Some(sum) => sum + part,
        });
    }
    sum.unwrap_or_else(|| Array2::zeros((joint.shape.0, joint.shape.0)))
}

/// Columns of G that [`sandwich`] takes at once.
const PANEL: usize = 128;

/// W·G·Wᵀ for a symmetric G, exactly symmetric. Wide W: only the lower triangle of G is multiplied, by
/// G = L + Lᵀ with half the diagonal in each, mn² + 2m²n flops instead of 2mn² + m²n.
fn sandwich<P: Real>(kernels: &dyn Kernels<P>, w: ArrayView2<'_, P>, g: ArrayView2<'_, P>) -> Array2<P> {
    let (m, n) = w.dim();
    if n <= m {
        return kernels.symmetric_product(kernels.matmul(w, g).view(), w);
    }
    let mut product = Array2::zeros((m, n));
    for start in (0..n).step_by(PANEL) {
        let end = (start + PANEL).min(n);
        let mut corner = g.slice(s![start..end, start..end]).to_owned();
        corner.indexed_iter_mut().for_each(|((i, j), v)| match i.cmp(&j) {
            Ordering::Less => *v = P::zero(),
            Ordering::Equal => *v *= P::from_f64(0.5),
            Ordering::Greater => {}
        });
        let mut panel = product.slice_mut(s![.., start..end]);
        kernels.gemm(P::one(), w.slice(s![.., end..]), g.slice(s![end.., start..end]), P::zero(), panel.view_mut());
        kernels.gemm(P::one(), w.slice(s![.., start..end]), corner.view(), P::one(), panel);
    }
    let half = kernels.matmul(product.view(), w.t());
    &half + &half.t()
}

fn count_above(values: &[f64], relative: f64) -> usize {
    let floor = values.first().map_or(0.0, |first| first.max(0.0) * relative).max(f64::MIN_POSITIVE);
    values.iter().take_while(|&&v| v > floor).count()
}

pub(in crate::factorize) fn scale_columns<P: Real, S: DataMut<Elem = P>>(
    block: &mut ArrayBase<S, Ix2>,
    weighting: &Weighting,
) {
    if let Weighting::Diagonal(a) = weighting {
        for (mut column, &a) in block.columns_mut().into_iter().zip(a.iter()) {
            column.mapv_inplace(|v| v * P::from_f64(a.sqrt()));
        }
    }
}

/// Adds the plain singular directions of what the metric does not see, so that ranks beyond those that
/// lower the metric error are spent on W itself rather than on rounding noise.
fn fill<T: Real>(joint: &Joint<'_, T>, found: Spectrum<T>, backend: &dyn Backend) -> Result<Spectrum<T>> {
    let (m, n) = joint.shape;
    let missing = m.min(n) - found.values.len();
    let plain = joint.blocks.iter().all(|(_, input)| matches!(input, Weighting::Identity));
    if missing == 0 || plain {
        return Ok(found);
    }
    let kernels = T::kernels(backend);
    let weight = joint.weight();
    let inside = kernels.matmul(found.vectors.t(), weight.view());
    let mut rest = weight.to_owned();
    kernels.gemm(-T::one(), found.vectors.view(), inside.view(), T::one(), rest.view_mut());
    let norm = |a: ArrayView2<'_, T>| a.iter().map(|v| v.wide().powi(2)).sum::<f64>();
    if norm(rest.view()) <= 1e-10 * norm(weight.view()) {
        return Ok(found);
    }
    let extra = plain_spectrum(rest, backend)?;
    let count = missing.min(count_above(&extra.values, 1e-8));
    let vectors = concatenate(Axis(1), &[found.vectors.view(), extra.vectors.slice(s![.., ..count])])
        .map_err(|e| Error::shape("columns of one length", e.to_string()))?;
    let mut values = found.values;
    values.resize(vectors.ncols(), 0.0);
    Ok(Spectrum { values, vectors })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Faer;

    #[test]
    fn a_sandwich_of_one_triangle_is_the_whole_one() {
        for (m, n) in [(0, 4), (1, 1), (3, 300), (40, 129), (5, 128), (9, 4)] {
            let w = Array2::from_shape_fn((m, n), |(i, j)| ((i * 31 + j * 17) % 13) as f64 - 6.0);
            let x = Array2::from_shape_fn((n, n), |(i, j)| ((i * 7 + j * 11) % 9) as f64 - 4.0);
            let g = &x + &x.t();
            let c = sandwich(&Faer, w.view(), g.view());
            assert_eq!(c, w.dot(&g).dot(&w.t()), "{m}x{n}");
        }
    }
}
