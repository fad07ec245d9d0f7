//! A group as one matrix.

use ndarray::{Array1, Array2, CowArray, Ix2, s};

use super::super::Problem;
use super::{Share, Svd};
use crate::error::{Error, Result};
use crate::metric::{Metric, Weighting};
use crate::scalar::Real;

/// A group as one matrix D·W, with the input metric of each block of columns.
pub(in crate::factorize) struct Joint<'j, T: Real> {
    pub(in crate::factorize) shape: (usize, usize),
    /// W, made anew each time unless it can be borrowed: it need not lie in memory while its square is decomposed.
    weight: Box<dyn Fn() -> CowArray<'j, T, Ix2> + 'j>,
    /// D's diagonal.
    pub(in crate::factorize) scale: Option<Array1<f64>>,
    /// (columns, input weighting) from left to right.
    pub(in crate::factorize) blocks: Vec<(usize, Weighting)>,
}

impl<'j, T: Real> Joint<'j, T> {
    pub(in crate::factorize) fn new(method: &Svd, group: &'j [Problem<'_, T>]) -> Result<Self> {
        let shapes: Vec<_> = group.iter().map(Problem::shape).collect();
        let shape = method.joint_shape(&shapes)?;
        let stacked = method.share != Some(Share::Output);
        let blocks = if stacked {
            vec![(shape.1, mean_input(shape.1, group.iter().map(|p| &p.metric.input))?)]
        } else {
            group.iter().map(|p| (p.shape().1, p.metric.input.clone())).collect()
        };
        let weight = move || match group {
            [lone] => lone.weight.into(),
            _ => {
                let (mut joint, mut at) = (Array2::zeros(shape), 0);
                for problem in group {
                    let (m, n) = problem.shape();
                    let part = if stacked { s![at..at + m, ..] } else { s![.., at..at + n] };
                    joint.slice_mut(part).assign(&problem.weight);
                    at += if stacked { m } else { n };
                }
                joint.into()
            }
        };
        Ok(Joint { shape, weight: Box::new(weight), scale: output_scale(group, stacked)?, blocks })
    }

    /// One matrix in a metric, made when it is needed.
    pub(in crate::factorize) fn lone(
        shape: (usize, usize),
        metric: &Metric,
        weight: impl Fn() -> CowArray<'j, T, Ix2> + 'j,
    ) -> Self {
        let blocks = vec![(shape.1, metric.input.clone())];
        Joint { shape, weight: Box::new(weight), scale: metric.output_scale(), blocks }
    }

    /// D·W.
    pub(in crate::factorize) fn weight(&self) -> CowArray<'j, T, Ix2> {
        let mut weight = (self.weight)();
        if let Some(d) = &self.scale {
            for (mut row, &d) in weight.rows_mut().into_iter().zip(d) {
                row.mapv_inplace(|w| w * T::from_f64(d));
            }
        }
        weight
    }
}

/// D for the joint rows: each weight's own if stacked; if side by side they must agree, so the first
/// counts only when all are the identity or the same.
fn output_scale<T: Real>(group: &[Problem<'_, T>], stacked: bool) -> Result<Option<Array1<f64>>> {
    let scales: Vec<_> = group.iter().map(|p| p.metric.output_scale()).collect();
    if scales.iter().all(Option::is_none) {
        return Ok(None);
    }
    if stacked {
        let parts = group.iter().zip(scales).map(|(p, scale)| scale.unwrap_or_else(|| Array1::ones(p.shape().0)));
        return Ok(Some(parts.flat_map(|part| part.to_vec()).collect()));
    }
    if scales.windows(2).any(|pair| pair[0] != pair[1]) {
        return Err(Error::Unsupported(
            "a shared output basis has one weighting of the outputs: use a metric without an output side".into(),
        ));
    }
    Ok(scales.into_iter().next().flatten())
}

/// The input metric of stacked weights of n inputs: theirs if they agree, else the mean.
pub(in crate::factorize) fn mean_input<'w>(
    n: usize,
    mut each: impl Iterator<Item = &'w Weighting> + Clone,
) -> Result<Weighting> {
    use std::sync::Arc;
    let all = each.clone();
    let Some(first) = each.next() else { return Ok(Weighting::Identity) };
    if each.all(|input| first.same(input)) {
        return Ok(first.clone());
    }
    let mut sum = Array2::<f64>::zeros((n, n));
    let count = all.clone().count();
    for input in all {
        match input {
            Weighting::Identity => sum.diag_mut().mapv_inplace(|v| v + 1.0),
            Weighting::Diagonal(d) => sum.diag_mut().zip_mut_with(&**d, |v, d| *v += d),
            Weighting::Gram(gram) => sum += &gram.matrix(),
        }
    }
    sum /= count as f64;
    Ok(Weighting::Gram(Arc::new(crate::stats::Gram::new("group mean", sum)?)))
}
