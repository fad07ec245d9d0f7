//! The layers of a group as vectors, their Gram matrix, and runs of them.

use std::ops::Range;

use ndarray::{Array1, Array2, s};

use super::super::Problem;
use super::super::svd::mean_input;
use super::Masa;
use crate::error::Result;
use crate::linalg::{Backend, Eigh};
use crate::metric::Weighting;
use crate::operator::{LinearOperator, Operator};
use crate::scalar::Real;

/// A group with what its layers have in common.
pub(super) struct Layers<'g, 'a, T: Real> {
    pub(super) group: &'g [Problem<'a, T>],
    /// The mean of the metrics.
    pub(super) input: Weighting,
    pub(super) output: Array1<f64>,
    /// What the squared error of each layer counts: 1 ÷ its squared norm, so that errors can be compared; all the
    /// same if outputs are weighed, as those estimate the loss already.
    pub(super) weights: Vec<f64>,
    /// Whether outputs are weighed, so that errors of layers estimate what they do to the loss.
    pub(super) weighed: bool,
    /// √(w_i·w_j)·K_ij, L×L.
    gram: Array2<f64>,
}

/// Consecutive layers with atoms of their own.
#[derive(Debug, Clone)]
pub(super) struct Run<T> {
    pub(super) layers: Range<usize>,
    pub(super) atoms: Vec<Array2<T>>,
    /// Layers × atoms.
    pub(super) coefficients: Array2<f64>,
}

/// A solution.
#[derive(Debug)]
pub(super) struct Shares<T: Real> {
    pub(super) runs: Vec<Run<T>>,
    /// R_l, where it has a rank.
    pub(super) residuals: Vec<Option<Operator<T>>>,
    pub(super) error: f64,
}

impl<T: Real> Shares<T> {
    /// Atoms of all runs.
    pub(super) fn count(&self) -> usize {
        self.runs.iter().map(|run| run.atoms.len()).sum()
    }

    /// Σ c·D of a layer added to a matrix with a sign.
    pub(super) fn add_shared(&self, layer: usize, sign: f64, to: &mut Array2<T>) {
        for run in self.runs.iter().filter(|run| run.layers.contains(&layer)) {
            for (atom, &c) in run.atoms.iter().zip(run.coefficients.row(layer - run.layers.start)) {
                to.scaled_add(T::from_f64(sign * c), atom);
            }
        }
    }
}

impl<'g, 'a, T: Real> Layers<'g, 'a, T> {
    pub(super) fn new(group: &'g [Problem<'a, T>]) -> Result<Self> {
        let input = mean_input(group)?;
        let m = group[0].shape().0;
        let mut output = Array1::<f64>::zeros(m);
        for problem in group {
            output += &problem.metric.output_scale().map_or(Array1::ones(m), |d| &d * &d);
        }
        output /= group.len() as f64;
        let weighed = group.iter().any(|p| p.metric.output_scale().is_some());
        let weight = |p: &Problem<'_, T>| match p.metric.norm_squared(p.weight, p.backend) {
            norm if norm > 0.0 && !weighed => 1.0 / norm,
            _ => 1.0,
        };
        let weights = group.iter().map(weight).collect();
        let mut layers = Layers { group, input, output, weights, weighed, gram: Array2::zeros((0, 0)) };
        layers.gram = layers.products(|l| group[l].weight.to_owned());
        Ok(layers)
    }

    pub(super) fn count(&self) -> usize {
        self.group.len()
    }

    pub(super) fn backend(&self) -> &'a dyn Backend {
        self.group[0].backend
    }

    /// √(w_i·w_j)·tr(B̄·X_i·Ā·X_jᵀ) of all pairs: m·n² flops for each layer, 2mn for each pair.
    pub(super) fn products(&self, layer: impl Fn(usize) -> Array2<T>) -> Array2<f64> {
        let count = self.count();
        let mut gram = Array2::zeros((count, count));
        let all: Vec<Array2<T>> = (0..count).map(layer).collect();
        for i in 0..count {
            let image = self.image(&all[i]);
            for j in 0..=i {
                let sum: f64 = image.iter().zip(&all[j]).map(|(a, b)| a * b.wide()).sum();
                let sum = sum * (self.weights[i] * self.weights[j]).sqrt();
                (gram[(i, j)], gram[(j, i)]) = (sum, sum);
            }
        }
        gram
    }

    /// B̄·X·Ā.
    pub(super) fn image(&self, x: &Array2<T>) -> Array2<f64> {
        let mut image = self.input.times(x.mapv(|v| v.wide()).view(), self.backend());
        image *= &self.output.view().insert_axis(ndarray::Axis(1));
        image
    }

    /// Eigenvalues of a run of K, the largest first, none below zero, and its eigenvectors.
    pub(super) fn spectrum(&self, gram: &Array2<f64>, run: &Range<usize>) -> Result<Eigh<f64>> {
        let mut found = f64::kernels(self.backend()).eigh(gram.slice(s![run.clone(), run.clone()]))?;
        found.values.mapv_inplace(|v| v.max(0.0));
        Ok(found)
    }

    /// The fractions of the layers' energy that so many common atoms capture: in the metric, and in the plain norm
    /// with all layers alike, where unrelated layers give S/L.
    pub(super) fn captured(&self, atoms: usize) -> (f64, f64) {
        let inner = |i: usize, j: usize| -> f64 {
            self.group[i].weight.iter().zip(self.group[j].weight).map(|(a, b)| a.wide() * b.wide()).sum()
        };
        let count = self.count();
        let norms: Vec<f64> = (0..count).map(|i| inner(i, i).max(f64::MIN_POSITIVE).sqrt()).collect();
        let mut plain = Array2::zeros((count, count));
        for i in 0..count {
            for j in 0..=i {
                let cosine = inner(i, j) / (norms[i] * norms[j]);
                (plain[(i, j)], plain[(j, i)]) = (cosine, cosine);
            }
        }
        let fraction = |gram: &Array2<f64>| {
            let Ok(found) = self.spectrum(gram, &(0..count)) else { return 0.0 };
            found.values.iter().take(atoms).sum::<f64>() / found.values.sum().max(f64::MIN_POSITIVE)
        };
        (fraction(&self.gram), fraction(&plain))
    }

    /// tr K, the energy of all layers.
    pub(super) fn energy(&self) -> f64 {
        self.gram.diag().sum()
    }

    /// The cut into so many runs of consecutive layers, with `atoms` in all, that loses the least energy, by dynamic
    /// programming over (runs, layers, atoms). About L² small eigenproblems.
    pub(super) fn cut(&self, atoms: usize, runs: usize) -> Result<Vec<(Range<usize>, usize)>> {
        let count = self.count();
        let (atoms, runs) = (atoms.min(count), runs.min(atoms).max(1));
        if runs == 1 {
            return Ok(vec![(0..count, atoms)]);
        }
        // (first, end, energy beyond s atoms) of every run that may be.
        let mut lost = Vec::with_capacity(count * (count + 1) / 2);
        for (first, end) in (0..count).flat_map(|first| (first + 1..=count).map(move |end| (first, end))) {
            let values = self.spectrum(&self.gram, &(first..end))?.values;
            let mut tails = vec![0.0; values.len() + 1];
            (0..values.len()).rev().for_each(|s| tails[s] = tails[s + 1] + values[s]);
            lost.push((first, end, tails));
        }
        // best[end][s] after some runs, and where its last run began with how many atoms.
        let mut best = vec![vec![f64::INFINITY; atoms + 1]; count + 1];
        best[0][0] = 0.0;
        let mut steps: Vec<Vec<Vec<(usize, usize)>>> = Vec::new();
        for _ in 0..runs {
            let mut next = vec![vec![f64::INFINITY; atoms + 1]; count + 1];
            let mut step = vec![vec![(0, 0); atoms + 1]; count + 1];
            for &(first, end, ref tails) in &lost {
                for used in (0..=atoms).filter(|&used| best[first][used].is_finite()) {
                    for (s, tail) in tails.iter().enumerate().take(atoms - used + 1) {
                        let cost = best[first][used] + tail;
                        if cost < next[end][used + s] {
                            (next[end][used + s], step[end][used + s]) = (cost, (first, s));
                        }
                    }
                }
            }
            steps.push(step);
            best = next;
        }
        let (mut found, mut end, mut left) = (Vec::new(), count, atoms);
        for step in steps.iter().rev() {
            let (first, s) = step[end][left];
            found.push((first..end, s));
            (end, left) = (first, left - s);
        }
        found.reverse();
        Ok(found)
    }

    /// Atoms and residuals within a limit.
    pub(super) fn solve(&self, masa: &Masa, atoms: usize, limit: u64, rounds: usize) -> Result<Shares<T>> {
        let count = self.count();
        let runs = if atoms == 0 { Vec::new() } else { self.cut(atoms, masa.runs)? };
        let own = |l: usize| self.group[l].weight.to_owned();
        let first = self.principal(&self.gram, &runs, own)?;
        let mut found = Shares { runs: first, residuals: vec![None; count], error: f64::INFINITY };
        if atoms > 0 {
            self.fit_coefficients(&mut found);
        }
        // Numbers of runs that need not all their atoms leave the rest to residuals.
        let stored: usize = found.runs.iter().map(|run| run.atoms.len() * run.layers.len()).sum();
        let (m, n) = self.group[0].shape();
        let dtype = self.group[0].dtype;
        let rest = limit.saturating_sub(dtype.bytes(found.count() * m * n + stored) as u64);
        for round in 0..rounds.max(1) {
            if round > 0 && atoms > 0 {
                self.fit_atoms(&mut found)?;
                self.fit_coefficients(&mut found);
            }
            if masa.residual {
                self.fit_residuals(&mut found, rest)?;
            }
            if atoms == 0 || !masa.residual && self.alike() {
                break;
            }
        }
        found.error = self.error(&found);
        Ok(found)
    }

    /// Whether all layers have one metric.
    pub(super) fn alike(&self) -> bool {
        let first = &self.group[0].metric;
        self.group.iter().all(|p| p.metric.input.same(&first.input) && p.metric.output.same(&first.output))
    }

    /// W_l less what stands for it.
    pub(super) fn left(&self, found: &Shares<T>, layer: usize, shared: bool, residual: bool) -> Array2<T> {
        let mut left = self.group[layer].weight.to_owned();
        if shared {
            found.add_shared(layer, -1.0, &mut left);
        }
        if let (true, Some(operator)) = (residual, &found.residuals[layer]) {
            left -= &operator.to_dense();
        }
        left
    }

    fn error(&self, found: &Shares<T>) -> f64 {
        let of = |l: usize| {
            let left = self.left(found, l, true, true);
            self.weights[l] * self.group[l].metric.squared(left.view(), self.backend())
        };
        (0..self.count()).map(of).sum()
    }
}
