//! One matrix onto a grid.

use ndarray::{Array2, ArrayView2, Axis, CowArray, Ix2};

use super::Rounding;
use crate::coder::{Factor, Lattice, Levels, clip};
use crate::error::Result;
use crate::factorize::sparse::unusual;
use crate::linalg::Backend;
use crate::metric::Weighting;
use crate::operator::{Dense, Grid, Quantized, ZeroPoint};
use crate::scalar::Real;

/// How numbers get onto grids.
#[derive(Debug, Clone, Copy)]
pub(super) struct How<'a> {
    pub(super) levels: Levels,
    pub(super) rule: Rounding,
    pub(super) sweeps: usize,
    pub(super) damping: f64,
    pub(super) backend: &'a dyn Backend,
}

/// What descends may use more of the small eigenvalues than GPTQ's walk.
const DESCENT: f64 = 0.1;

impl How<'_> {
    /// The layout for a matrix of n columns: a group is not longer than a row.
    pub(super) fn levels(&self, n: usize) -> Levels {
        let group = if self.levels.group == 0 { n } else { self.levels.group.min(n) };
        Levels { group: group.max(1), ..self.levels }
    }

    /// The matrix on a grid nearest to a target, errors counted by the quadratic form of its columns.
    pub(super) fn round<T: Real>(
        &self,
        target: ArrayView2<'_, T>,
        input: &Weighting,
        notes: &mut Vec<String>,
    ) -> Result<Quantized<T>> {
        let (values, grid) = self.settle((target, None), target, input, notes)?;
        Quantized::nearest(values.view(), grid)
    }

    /// The same from `start`, of which only what is kept may differ from zero: entries and their grid.
    pub(super) fn settle<T: Real>(
        &self,
        (start, kept): (ArrayView2<'_, T>, Option<ArrayView2<'_, bool>>),
        target: ArrayView2<'_, T>,
        input: &Weighting,
        notes: &mut Vec<String>,
    ) -> Result<(Array2<T>, Grid<T>)> {
        let ((m, n), levels) = (target.dim(), self.levels(target.ncols()));
        let weights = diagonal::<T>(input, n);
        let weights = weights.broadcast((m, n)).unwrap_or(weights.view());
        // Without a place there is no weight, and no scale: a scale of zero holds an entry at zero.
        let held = |a: ArrayView2<'_, T>| {
            let mut held = a.to_owned();
            if let Some(kept) = kept {
                held.zip_mut_with(&kept, |v, &kept| *v = if kept { *v } else { T::zero() });
            }
            held
        };
        let grid = match kept {
            Some(_) => clip(start, held(weights).view(), levels)?,
            None => clip(start, weights, levels)?,
        };
        let (steps, zeros, offsets) = expand(&grid, (m, n));
        let steps = held(steps.view());
        // What is left to find is on a grid around zero.
        let offsets = offsets.map(|offsets| held(offsets.view()));
        let (start, target) = (around(start, offsets.as_ref()), around(target, offsets.as_ref()));
        let (start, target) = (start.view(), target.view());
        let placed = |values: Array2<T>| if let Some(offsets) = &offsets { values + offsets } else { values };
        let nearest = || Lattice::new(start, steps.view(), zeros.view(), levels.top());
        let Some(gram) = (match (self.rule, input) {
            (Rounding::Gram, Weighting::Gram(gram)) => Some(gram.matrix()),
            _ => None,
        }) else {
            return Ok((placed(nearest()?.values()), grid));
        };
        let begun = || -> Result<Lattice<T>> {
            let mut lattice = Lattice::new(target, steps.view(), zeros.view(), levels.top())?;
            if kept.is_some() {
                lattice.begin(nearest()?.values().view())?;
            }
            Ok(lattice)
        };
        let mut lattice = begun()?;
        let form = damped::<T>(gram, DESCENT * self.damping);
        let before = lattice.error(form.view())?;
        let walked = self.walk(target, gram, (steps.view(), zeros.view()), levels, notes)?;
        lattice.begin(walked.view())?;
        self.descend(&mut lattice, form.view(), &grid)?;
        if lattice.error(form.view())? > before {
            lattice = begun()?;
            self.descend(&mut lattice, form.view(), &grid)?;
        }
        // Groups of which nothing is stored keep the scale that they had.
        let (found, mut scales) = (lattice.steps(), grid.scales().values().to_owned());
        for ((i, j), &step) in found.indexed_iter().filter(|(_, step)| **step != T::zero()) {
            scales[(i, j / levels.group)] = step;
        }
        let scales = Dense::rounded(scales, grid.scales().dtype())?;
        Ok((placed(lattice.values()), grid.scaled(scales)?))
    }

    fn descend<T: Real>(&self, lattice: &mut Lattice<T>, form: ArrayView2<'_, T>, grid: &Grid<T>) -> Result<()> {
        for _ in 0..self.sweeps {
            lattice.rescale(form, grid.group(), grid.scales().dtype())?;
            lattice.sweep(form)?;
        }
        Ok(())
    }

    /// GPTQ's result, inputs of largest square first.
    fn walk<T: Real>(
        &self,
        target: ArrayView2<'_, T>,
        gram: ArrayView2<'_, f64>,
        (steps, zeros): (ArrayView2<'_, T>, ArrayView2<'_, T>),
        levels: Levels,
        notes: &mut Vec<String>,
    ) -> Result<Array2<T>> {
        let n = target.ncols();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| gram[(b, b)].total_cmp(&gram[(a, a)]).then(a.cmp(&b)));
        let turned = gram.select(Axis(0), &order).select(Axis(1), &order);
        let factor = Factor::<T>::new(turned.view(), self.damping, self.backend)?;
        unusual(&factor, self.damping, notes);
        let of = |a: ArrayView2<'_, T>| a.select(Axis(1), &order);
        let mut lattice = Lattice::new(of(target).view(), of(steps).view(), of(zeros).view(), levels.top())?;
        lattice.walk(&factor)?;
        let (found, mut values) = (lattice.values(), Array2::zeros(target.dim()));
        for (&to, from) in order.iter().zip(found.columns()) {
            values.column_mut(to).assign(&from);
        }
        Ok(values)
    }
}

/// What squared errors of each column count by themselves, 1×n; ones where nothing counts.
fn diagonal<T: Real>(input: &Weighting, n: usize) -> Array2<T> {
    let values: Vec<f64> = match input {
        Weighting::Identity => vec![1.0; n],
        Weighting::Diagonal(d) => d.to_vec(),
        Weighting::Gram(gram) => gram.diagonal().to_vec(),
    };
    // Scaled, so that squares of small numbers stay above zero in f32, and never zero.
    let largest = values.iter().fold(0.0f64, |a, &v| a.max(v));
    let scale = if largest > 0.0 { 1.0 / largest } else { 1.0 };
    Array2::from_shape_fn((1, n), |(_, j)| T::from_f64((values[j] * scale).max(1e-6)))
}

/// H with a part of its mean diagonal added.
pub(super) fn damped<T: Real>(gram: ArrayView2<'_, f64>, damping: f64) -> Array2<T> {
    let ridge = damping * gram.diag().sum() / gram.nrows().max(1) as f64;
    let mut form = gram.mapv(T::from_f64);
    form.diag_mut().iter_mut().zip(gram.diag()).for_each(|(d, &full)| *d = T::from_f64(full + ridge));
    form
}

/// Numbers less their offsets, if there are any.
fn around<'a, T: Real>(numbers: ArrayView2<'a, T>, offsets: Option<&Array2<T>>) -> CowArray<'a, T, Ix2> {
    offsets.map_or_else(|| numbers.into(), |offsets| (&numbers - offsets).into())
}

/// Scale, zero point and, if there are any, offset of each entry.
fn expand<T: Real>(grid: &Grid<T>, dim: (usize, usize)) -> (Array2<T>, Array2<T>, Option<Array2<T>>) {
    let scales = grid.scales().values();
    let steps = Array2::from_shape_fn(dim, |(i, j)| scales[(i, j / grid.group())]);
    let zeros = Array2::from_shape_fn(dim, |(i, j)| T::from_f64(grid.zero(i, j / grid.group()).into()));
    let floats = grid.zeros().kind() == ZeroPoint::Float;
    let offsets = floats.then(|| Array2::from_shape_fn(dim, |(i, j)| grid.offset(i, j / grid.group())));
    (steps, zeros, offsets)
}
