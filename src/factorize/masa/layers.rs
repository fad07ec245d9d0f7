//! The layers of a group as vectors, their Gram matrix, and runs of them.

use std::ops::Range;

use ndarray::{Array1, Array2, Axis, s};

use super::super::InParts;
use super::super::svd::mean_input;
use super::Masa;
use super::held::Held;
use crate::error::Result;
use crate::linalg::{Backend, Eigh};
use crate::metric::Weighting;
use crate::operator::{LinearOperator, Operator};
use crate::scalar::{Real, check_finite};

/// A group with what its layers have in common.
pub(super) struct Layers<'g, 'a, T: Real> {
    pub(super) group: &'g [InParts<'a, T>],
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
    /// The same in the plain norm, of layers of norm 1.
    plain: Array2<f64>,
}

/// What looks at a panel of rows of all layers.
type Look<'l, T> = dyn FnMut(&Range<usize>, &[Array2<T>]) -> Result<()> + 'l;

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
    pub(super) residuals: Vec<Option<Held>>,
    pub(super) error: f64,
}

impl<T: Real> Shares<T> {
    /// Atoms of all runs.
    pub(super) fn count(&self) -> usize {
        self.runs.iter().map(|run| run.atoms.len()).sum()
    }

    /// R_l.
    pub(super) fn residual(&self, layer: usize) -> Result<Option<Operator<T>>> {
        self.residuals[layer].as_ref().map(Held::operator).transpose()
    }

    /// Some rows of Σ c·D of a layer added to a matrix with a sign.
    fn add_shared(&self, layer: usize, rows: &Range<usize>, sign: f64, to: &mut Array2<T>) {
        for run in self.runs.iter().filter(|run| run.layers.contains(&layer)) {
            for (atom, &c) in run.atoms.iter().zip(run.coefficients.row(layer - run.layers.start)) {
                to.scaled_add(T::from_f64(sign * c), &atom.slice(s![rows.clone(), ..]));
            }
        }
    }
}

impl<'g, 'a, T: Real> Layers<'g, 'a, T> {
    pub(super) fn new(group: &'g [InParts<'a, T>]) -> Result<Self> {
        let input = mean_input(group[0].shape().1, group.iter().map(|p| &p.metric.input))?;
        let (m, count) = (group[0].shape().0, group.len());
        let mut output = Array1::<f64>::zeros(m);
        for problem in group {
            output += &problem.metric.output_scale().map_or(Array1::ones(m), |d| &d * &d);
        }
        output /= count as f64;
        let weighed = group.iter().any(|p| p.metric.output_scale().is_some());
        let empty = || Array2::zeros((0, 0));
        let mut layers =
            Layers { group, input, output, weights: vec![1.0; count], weighed, gram: empty(), plain: empty() };
        let (mut plain, mut norms, alike) = (Array2::zeros((count, count)), vec![0.0; count], layers.alike());
        let mut gram = layers.products(|rows, all| {
            for (i, x) in all.iter().enumerate() {
                check_finite("weight", x.iter()).map_err(|e| e.of_tensor(group[i].name))?;
                norms[i] += if alike { 0.0 } else { inner(&layers.own_image(i, rows, x), x) };
                all[..=i].iter().enumerate().for_each(|(j, y)| plain[(i, j)] += inner(x, y));
            }
            Ok(())
        })?;
        if alike {
            norms = gram.diag().to_vec();
        }
        let weight = |norm: f64| if norm > 0.0 && !weighed { 1.0 / norm } else { 1.0 };
        layers.weights = norms.into_iter().map(weight).collect();
        layers.weigh(&mut gram);
        let cosines = |i: usize, j: usize| {
            let norm = |i| f64::sqrt(plain[(i, i)]).max(f64::MIN_POSITIVE);
            plain[(i.max(j), i.min(j))] / (norm(i) * norm(j))
        };
        layers.plain = Array2::from_shape_fn((count, count), |(i, j)| cosines(i, j));
        layers.gram = gram;
        Ok(layers)
    }

    /// Panels of rows: of all layers together about a quarter of one layer.
    pub(super) fn panels(&self) -> impl Iterator<Item = Range<usize>> + Clone + use<T> {
        /// Fewer make no product worth its name.
        const LEAST: usize = 64;
        let m = self.group[0].shape().0;
        let height = m.div_ceil(4 * self.group.len()).max(LEAST);
        (0..m).step_by(height).map(move |first| first..m.min(first + height))
    }

    pub(super) fn count(&self) -> usize {
        self.group.len()
    }

    pub(super) fn backend(&self) -> &'a dyn Backend {
        self.group[0].backend
    }

    /// tr(B̄·W_i·Ā·W_jᵀ) of all pairs: m·n² flops for each layer, 2mn for each pair. `also` sees each panel.
    fn products(&self, mut also: impl FnMut(&Range<usize>, &[Array2<T>]) -> Result<()>) -> Result<Array2<f64>> {
        self.products_of(|layer, rows| Ok(self.group[layer].weight.rows(rows.clone())), &mut also)
    }

    /// √(w_i·w_j)·tr(B̄·X_i·Ā·X_jᵀ) of all pairs, of panels of X.
    pub(super) fn weighed_products(
        &self,
        part: impl Fn(usize, &Range<usize>) -> Result<Array2<T>>,
    ) -> Result<Array2<f64>> {
        let mut gram = self.products_of(part, &mut |_, _| Ok(()))?;
        self.weigh(&mut gram);
        Ok(gram)
    }

    fn products_of(
        &self,
        part: impl Fn(usize, &Range<usize>) -> Result<Array2<T>>,
        also: &mut Look<'_, T>,
    ) -> Result<Array2<f64>> {
        let count = self.count();
        let mut gram = Array2::zeros((count, count));
        for rows in self.panels() {
            let all: Vec<Array2<T>> = (0..count).map(|layer| part(layer, &rows)).collect::<Result<_>>()?;
            also(&rows, &all)?;
            for i in 0..count {
                let image = self.image(&rows, &all[i]);
                for j in 0..=i {
                    gram[(i, j)] += inner(&image, &all[j]);
                }
            }
        }
        for i in 0..count {
            for j in 0..i {
                gram[(j, i)] = gram[(i, j)];
            }
        }
        Ok(gram)
    }

    fn weigh(&self, gram: &mut Array2<f64>) {
        gram.indexed_iter_mut().for_each(|((i, j), v)| *v *= (self.weights[i] * self.weights[j]).sqrt());
    }

    /// Some rows of B̄·X·Ā.
    fn image(&self, rows: &Range<usize>, x: &Array2<T>) -> Array2<f64> {
        let mut image = self.input.times(x.mapv(|v| v.wide()).view(), self.backend());
        image *= &self.output.slice(s![rows.clone()]).insert_axis(Axis(1));
        image
    }

    /// Some rows of B_l·X·A_l of a layer.
    pub(super) fn own_image(&self, layer: usize, rows: &Range<usize>, x: &Array2<T>) -> Array2<f64> {
        let metric = &self.group[layer].metric;
        let mut image = metric.input.times(x.mapv(|v| v.wide()).view(), self.backend());
        if let Some(d) = metric.output_scale() {
            let d = d.slice(s![rows.clone()]).mapv(|d| d * d);
            image *= &d.insert_axis(Axis(1));
        }
        image
    }

    /// Eigenvalues of a run of K, the largest first, none below zero, and its eigenvectors.
    pub(super) fn spectrum(&self, gram: &Array2<f64>, run: &Range<usize>) -> Result<Eigh<f64>> {
        let mut found = f64::kernels(self.backend()).eigh(gram.slice(s![run.clone(), run.clone()]).to_owned())?;
        found.values.mapv_inplace(|v| v.max(0.0));
        Ok(found)
    }

    /// The fractions of the layers' energy that so many common atoms capture: in the metric, and in the plain norm
    /// with all layers alike, where unrelated layers give S/L.
    pub(super) fn captured(&self, atoms: usize) -> (f64, f64) {
        let count = self.count();
        let fraction = |gram: &Array2<f64>| {
            let Ok(found) = self.spectrum(gram, &(0..count)) else { return 0.0 };
            found.values.iter().take(atoms).sum::<f64>() / found.values.sum().max(f64::MIN_POSITIVE)
        };
        (fraction(&self.gram), fraction(&self.plain))
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
        let first = self.principal(&self.gram, &runs, |_| Ok(None))?;
        let mut found = Shares { runs: first, residuals: (0..count).map(|_| None).collect(), error: f64::INFINITY };
        if atoms > 0 {
            self.fit_coefficients(&mut found)?;
        }
        // Numbers of runs that need not all their atoms leave the rest to residuals.
        let stored: usize = found.runs.iter().map(|run| run.atoms.len() * run.layers.len()).sum();
        let (m, n) = self.group[0].shape();
        let dtype = self.group[0].dtype;
        let rest = limit.saturating_sub(dtype.bytes(found.count() * m * n + stored) as u64);
        for round in 0..rounds.max(1) {
            if round > 0 && atoms > 0 {
                self.fit_atoms(&mut found)?;
                self.fit_coefficients(&mut found)?;
            }
            if masa.residual {
                self.fit_residuals(&mut found, rest, masa.route)?;
            }
            if atoms == 0 || !masa.residual && self.alike() {
                break;
            }
        }
        found.error = self.error(&found)?;
        Ok(found)
    }

    /// Whether all layers have one metric.
    pub(super) fn alike(&self) -> bool {
        let first = &self.group[0].metric;
        self.group.iter().all(|p| p.metric.input.same(&first.input) && p.metric.output.same(&first.output))
    }

    /// Some rows of W_l − Σ c·D.
    pub(super) fn unshared(&self, found: &Shares<T>, layer: usize, rows: &Range<usize>) -> Array2<T> {
        let mut left = self.group[layer].weight.rows(rows.clone());
        found.add_shared(layer, rows, -1.0, &mut left);
        left
    }

    /// Some rows of W_l − R_l.
    pub(super) fn common(&self, residual: Option<&Operator<T>>, layer: usize, rows: &Range<usize>) -> Array2<T> {
        let mut left = self.group[layer].weight.rows(rows.clone());
        take_away(&mut left, residual, rows);
        left
    }

    /// Some rows of what nothing stands for, W_l − Σ c·D − R_l.
    pub(super) fn left(
        &self,
        found: &Shares<T>,
        residual: Option<&Operator<T>>,
        layer: usize,
        rows: &Range<usize>,
    ) -> Array2<T> {
        let mut left = self.unshared(found, layer, rows);
        take_away(&mut left, residual, rows);
        left
    }

    fn error(&self, found: &Shares<T>) -> Result<f64> {
        let mut error = 0.0;
        for layer in 0..self.count() {
            let residual = found.residual(layer)?;
            for rows in self.panels() {
                let left = self.left(found, residual.as_ref(), layer, &rows);
                error += self.weights[layer] * inner(&self.own_image(layer, &rows, &left), &left);
            }
        }
        Ok(error)
    }
}

/// Takes some rows of an operator from a matrix of as many.
fn take_away<T: Real>(from: &mut Array2<T>, operator: Option<&Operator<T>>, rows: &Range<usize>) {
    if let Some(operator) = operator {
        let mut chosen = Array2::zeros((operator.shape().0, rows.len()));
        chosen.slice_mut(s![rows.clone(), ..]).diag_mut().fill(T::one());
        *from -= &operator.product_transposed(chosen.view()).t();
    }
}

/// Σ a·b in f64.
pub(super) fn inner<A: Real, B: Real>(a: &Array2<A>, b: &Array2<B>) -> f64 {
    a.iter().zip(b).map(|(a, b)| a.wide() * b.wide()).sum()
}
