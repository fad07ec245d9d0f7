//! Rank 1 in metrics that leave slices independent: all leading triplets at once, in the compute type.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};

use super::Groups;
use super::layout::{Layout, Slice};
use crate::error::Result;
use crate::factorize::Problem;
use crate::linalg::leading_triplets;
use crate::metric::Weighting;
use crate::scalar::Real;

/// The slices of least error `[λ][κ]`, or none under a Gram metric.
pub(super) fn rank_one<T: Real>(problem: &Problem<'_, T>, layout: &Layout) -> Result<Option<Vec<Vec<Slice>>>> {
    let a = match &problem.metric.input {
        Weighting::Identity => None,
        Weighting::Diagonal(a) => Some(a.mapv(f64::sqrt)),
        Weighting::Gram(_) => return Ok(None),
    };
    let d = problem.metric.output_scale();
    // D·W·A^½ with its columns in the order of the chunks, if that is another matrix than W.
    let changed = (a.is_some() || d.is_some() || layout.inputs.is_some()).then(|| {
        let mut w = problem.weight.to_owned();
        for (scale, axis) in [(&a, 0), (&d, 1)] {
            if let Some(scale) = scale {
                w *= &scale.mapv(T::from_f64).insert_axis(Axis(axis));
            }
        }
        layout.inputs.as_ref().map_or(w.clone(), |inputs| w.select(Axis(1), inputs))
    });
    let w = changed.as_ref().map_or(problem.weight, |w| w.view());
    let (k, l) = (layout.widths.len(), layout.heights.len());
    let rows = layout.rows();
    let mut views: Vec<ArrayView2<'_, T>> = Vec::with_capacity(k * l);
    let mut first = 0;
    for &height in &layout.heights {
        let step = if layout.groups == Groups::Strided { l } else { 1 };
        let start = rows[first];
        first += height;
        let mut column = 0;
        for &width in &layout.widths {
            let end = start + (height - 1) * step + 1;
            views.push(w.slice_move(s![start..end;step, column..column + width]));
            column += width;
        }
    }
    let triplets = leading_triplets(&views)?;
    let wide = |v: &Array1<T>| v.mapv(|v| v.wide());
    let mut slices = Vec::with_capacity(l);
    let (mut triplets, mut first) = (triplets.into_iter(), 0);
    for &height in &layout.heights {
        let group = &rows[first..first + height];
        first += height;
        let mut column = 0;
        let row = triplets.by_ref().take(k).zip(&layout.widths).map(|(triplet, &width)| {
            let (mut left, mut right) = (wide(&triplet.left), wide(&triplet.right) * triplet.value);
            if let Some(d) = &d {
                left.iter_mut().zip(group).for_each(|(u, &row)| *u /= d[row]);
            }
            if let Some(a) = &a {
                let place = |at: usize| layout.inputs.as_ref().map_or(at, |inputs| inputs[at]);
                right.iter_mut().enumerate().for_each(|(i, v)| *v /= a[place(column + i)]);
            }
            column += width;
            let as_column = |v: Array1<f64>| -> Array2<f64> { v.insert_axis(Axis(1)) };
            Slice { left: as_column(left), right: as_column(right).reversed_axes() }
        });
        slices.push(row.collect());
    }
    Ok(Some(slices))
}
