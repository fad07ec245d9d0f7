//! The problem of a group as one tall matrix whose rows are signals, and a dictionary model of it.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};

use super::super::Problem;
use super::super::svd::mean_input;
use crate::coder::Coded;
use crate::error::{Error, Result};
use crate::linalg::{Backend, Kernels};
use crate::metric::Weighting;
use crate::operator::IndexSet;
use crate::scalar::Real;

/// Rows of W, weight after weight, each an output.
pub(super) struct Signals<'a, T: Real> {
    /// M×n.
    pub(super) weight: Array2<T>,
    /// What the squared error of each row counts.
    pub(super) rows: Array1<f64>,
    /// Rows that share an input metric.
    pub(super) parts: Vec<(Range<usize>, Weighting)>,
    /// The mean of the metrics, of rows alike.
    pub(super) mean: Weighting,
    /// tr(B·W·A·Wᵀ).
    pub(super) norm: f64,
    pub(super) backend: &'a dyn Backend,
}

impl<'a, T: Real> Signals<'a, T> {
    /// Stacks a group of one number of inputs.
    pub(super) fn new(group: &[Problem<'a, T>]) -> Result<Self> {
        let Some(first) = group.first() else {
            return Err(Error::shape("a group of at least one weight", 0));
        };
        let views: Vec<_> = group.iter().map(|p| p.weight).collect();
        let weight = concatenate(Axis(0), &views).map_err(|e| Error::shape("weights that fit", e.to_string()))?;
        let mut parts: Vec<(Range<usize>, Weighting)> = Vec::new();
        let (mut rows, mut at) = (Vec::with_capacity(weight.nrows()), 0);
        for problem in group {
            let m = problem.shape().0;
            rows.extend(problem.metric.output_scale().map_or(vec![1.0; m], |d| d.mapv(|d| d * d).to_vec()));
            match parts.last_mut() {
                Some((range, input)) if input.same(&problem.metric.input) => range.end += m,
                _ => parts.push((at..at + m, problem.metric.input.clone())),
            }
            at += m;
        }
        let norm = group.iter().map(|p| p.metric.squared(p.weight, p.backend)).sum();
        Ok(Signals {
            weight,
            rows: rows.into(),
            parts,
            mean: mean_input(group[0].shape().1, group.iter().map(|p| &p.metric.input))?,
            norm,
            backend: first.backend,
        })
    }

    pub(super) fn kernels(&self) -> &'a dyn Kernels<f64> {
        f64::kernels(self.backend)
    }

    /// √B·W·A^½ under the mean metric: the signals as the plain norm sees them.
    pub(super) fn whitened(&self) -> Result<Array2<T>> {
        let mut y = match &self.mean {
            Weighting::Gram(gram) => T::kernels(self.backend)
                .matmul(self.weight.view(), T::from_view(gram.sqrt(self.backend)?.view()).view()),
            Weighting::Diagonal(a) => &self.weight * &a.mapv(|a| T::from_f64(a.sqrt())),
            Weighting::Identity => self.weight.clone(),
        };
        y *= &self.rows.mapv(|b| T::from_f64(b.sqrt())).insert_axis(Axis(1));
        Ok(y)
    }

    /// Bᵣ·A for some rows A.
    pub(super) fn weighed(&self, rows: Range<usize>, a: ArrayView2<'_, T>) -> Array2<f64> {
        a.mapv(|v| v.wide()) * self.rows.slice(s![rows]).insert_axis(Axis(1))
    }
}

/// W ≈ S·D.
#[derive(Debug, Clone)]
pub(super) struct Model<T> {
    /// D, k×n.
    pub(super) atoms: Array2<f64>,
    /// S, M×k.
    pub(super) codes: Coded<T>,
    /// Rows of W that are atoms themselves: the t-th of them has the unit code of atom t.
    pub(super) pivots: Option<IndexSet>,
    /// What an entry cost last, in each part.
    pub(super) prices: Vec<Option<f64>>,
    /// Squared metric error; infinite until it is coded.
    pub(super) error: f64,
}

impl<T: Real> Model<T> {
    pub(super) fn new(atoms: Array2<f64>, codes: Coded<T>, pivots: Option<IndexSet>) -> Self {
        Model { atoms, codes, pivots, prices: Vec::new(), error: f64::INFINITY }
    }

    /// The rows of a range that are coded.
    pub(super) fn coded(&self, range: &Range<usize>) -> Vec<usize> {
        let pivots: Vec<usize> = self.pivots.iter().flat_map(IndexSet::chosen).collect();
        range.clone().filter(|i| pivots.binary_search(i).is_err()).collect()
    }

    /// Gives pivots their unit codes.
    pub(super) fn with_units(mut self) -> Self {
        for (t, i) in self.pivots.iter().flat_map(IndexSet::chosen).enumerate() {
            (self.codes.values[(i, t)], self.codes.kept[(i, t)]) = (T::one(), true);
        }
        self
    }
}
