//! Atoms and coefficients: matrix PCA, then least squares in each layer's own metric.

use std::ops::Range;

use ndarray::{Array1, Array2, Axis, s};

use super::layers::{Layers, Run, Shares, inner};
use crate::error::Result;
use crate::operator::Operator;
use crate::scalar::Real;

/// Atoms whose eigenvalue is below this fraction of the first are none.
const NONE: f64 = 1e-12;
/// Conjugate-gradient steps for atoms.
const STEPS: usize = 4;

impl<T: Real> Layers<'_, '_, T> {
    /// Matrix PCA of each run: D_s = λ_s^{−½}·Σ_l √w_l·V_ls·X_l, c_ls = λ_s^½·V_ls/√w_l, from the products of layers X,
    /// which are W less what `residual` gives for each.
    pub(super) fn principal(
        &self,
        gram: &Array2<f64>,
        runs: &[(Range<usize>, usize)],
        residual: impl Fn(usize) -> Result<Option<Operator<T>>>,
    ) -> Result<Vec<Run<T>>> {
        let mut all = Vec::with_capacity(runs.len());
        for (range, count) in runs {
            let found = self.spectrum(gram, range)?;
            let floor = NONE * found.values.first().copied().unwrap_or(0.0);
            let used = found.values.iter().take(*count).take_while(|&&v| v > floor).count();
            let mut vectors = found.vectors.slice(s![.., ..used]).to_owned();
            for mut v in vectors.columns_mut() {
                let largest = v.iter().fold(0.0f64, |best, &x| if x.abs() > best.abs() { x } else { best });
                v *= largest.signum();
            }
            let mut atoms = vec![Array2::zeros(self.group[0].shape()); used];
            for (row, layer) in range.clone().enumerate() {
                let (root, residual) = (self.weights[layer].sqrt(), residual(layer)?);
                for rows in self.panels() {
                    let x = self.common(residual.as_ref(), layer, &rows);
                    for (atom, v) in atoms.iter_mut().zip(vectors.row(row)) {
                        atom.slice_mut(s![rows.clone(), ..]).scaled_add(T::from_f64(v * root), &x);
                    }
                }
            }
            let roots = range.clone().map(|l| self.weights[l].sqrt()).collect::<Array1<f64>>();
            let mut coefficients = vectors / &roots.insert_axis(Axis(1));
            for (atom, mut c) in atoms.iter_mut().zip(coefficients.columns_mut()) {
                // Entries of unit mean square, whatever the metric: half types have a narrow range.
                let square = atom.iter().map(|v| v.wide() * v.wide()).sum::<f64>() / atom.len().max(1) as f64;
                let scale = if square > 0.0 { square.sqrt() } else { 1.0 };
                atom.mapv_inplace(|v| v / T::from_f64(scale));
                c *= scale;
            }
            all.push(Run { layers: range.clone(), atoms, coefficients });
        }
        Ok(all)
    }

    /// The best coefficients of each layer for its atoms, what its residual explains left out: S×S systems. Layers of
    /// one metric share theirs.
    pub(super) fn fit_coefficients(&self, found: &mut Shares<T>) -> Result<()> {
        let alike = self.alike();
        for at in 0..found.runs.len() {
            let mut common = None;
            for layer in found.runs[at].layers.clone() {
                let (run, s) = (&found.runs[at], found.runs[at].atoms.len());
                let known = common.clone().filter(|_| alike);
                let residual = found.residual(layer)?;
                let (mut squares, mut right) = (Array2::zeros((s, s)), Array2::zeros((s, 1)));
                for rows in self.panels() {
                    let parts: Vec<Array2<T>> =
                        run.atoms.iter().map(|atom| atom.slice(s![rows.clone(), ..]).to_owned()).collect();
                    let target = self.own_image(layer, &rows, &self.common(residual.as_ref(), layer, &rows));
                    parts.iter().enumerate().for_each(|(i, part)| right[(i, 0)] += inner(&target, part));
                    if known.is_some() {
                        continue;
                    }
                    for (i, part) in parts.iter().enumerate() {
                        let image = self.own_image(layer, &rows, part);
                        parts[..=i].iter().enumerate().for_each(|(j, other)| squares[(i, j)] += inner(&image, other));
                    }
                }
                let squares = known.unwrap_or_else(|| {
                    let whole: Array2<f64> = Array2::from_shape_fn((s, s), |(i, j)| squares[(i.max(j), i.min(j))]);
                    let hold: f64 = 1e-12 * whole.diag().sum() / s.max(1) as f64;
                    whole + Array2::from_diag(&Array1::from_elem(s, hold.max(f64::MIN_POSITIVE)))
                });
                // Atoms that the layer's metric does not see keep their coefficients.
                if let Ok(solved) = f64::kernels(self.backend()).solve_spd(squares.view(), right) {
                    let row = layer - run.layers.start;
                    found.runs[at].coefficients.row_mut(row).assign(&solved.column(0));
                }
                common = Some(squares);
            }
        }
        Ok(())
    }

    /// Atoms of each run for given coefficients and residuals. In one metric they are PCA again; else a few steps
    /// of conjugate gradients on Σ_l c_ls·B_l·(Σ_t c_lt·D_t − X_l)·A_l = 0.
    pub(super) fn fit_atoms(&self, found: &mut Shares<T>) -> Result<()> {
        if self.alike() {
            let runs: Vec<_> = found.runs.iter().map(|run| (run.layers.clone(), run.atoms.len())).collect();
            // New ones need the layers and residuals only: two sets are never in memory.
            found.runs.iter_mut().for_each(|run| run.atoms.clear());
            let residual = |l: usize| found.residual(l);
            let gram = self.weighed_products(|l, rows| Ok(self.common(residual(l)?.as_ref(), l, rows)))?;
            found.runs = self.principal(&gram, &runs, residual)?;
            return Ok(());
        }
        for at in 0..found.runs.len() {
            // Rows meet each other in no metric: each panel by itself.
            self.panels().try_for_each(|rows| self.descend(found, at, &rows))?;
        }
        Ok(())
    }

    fn descend(&self, found: &mut Shares<T>, at: usize, rows: &Range<usize>) -> Result<()> {
        let layers = found.runs[at].layers.clone();
        let c = found.runs[at].coefficients.clone();
        let (count, n) = (c.ncols(), self.group[0].shape().1);
        // Σ_l c_ls·B_l·(…)·A_l for each s, of one matrix for each layer.
        let gather = |of: &dyn Fn(usize) -> Result<Array2<T>>| -> Result<Vec<Array2<f64>>> {
            let mut sums = vec![Array2::zeros((rows.len(), n)); count];
            for (row, l) in layers.clone().enumerate() {
                let image = self.own_image(l, rows, &of(l)?);
                sums.iter_mut().enumerate().for_each(|(s, sum)| sum.scaled_add(self.weights[l] * c[(row, s)], &image));
            }
            Ok(sums)
        };
        let mixed = |parts: &[Array2<f64>]| {
            let sum = |l: usize| {
                let mut sum = Array2::<f64>::zeros((rows.len(), n));
                parts.iter().enumerate().for_each(|(s, part)| sum.scaled_add(c[(l - layers.start, s)], part));
                Ok(T::from_view(sum.view()).into_owned())
            };
            gather(&sum)
        };
        let dot = |a: &[Array2<f64>], b: &[Array2<f64>]| -> f64 {
            a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b)).map(|(a, b)| a * b).sum()
        };
        // A diagonal preconditioner: the mean square of what an entry is multiplied with.
        let inputs: Array1<f64> = match &self.input {
            crate::metric::Weighting::Identity => Array1::ones(n),
            crate::metric::Weighting::Diagonal(a) => (**a).clone(),
            crate::metric::Weighting::Gram(gram) => gram.diagonal(),
        };
        let floor = 1e-6 * inputs.mean().unwrap_or(1.0);
        let inverse = inputs.mapv(|a| 1.0 / a.max(floor).max(f64::MIN_POSITIVE));
        let scaled = |parts: &[Array2<f64>]| -> Vec<Array2<f64>> {
            let of = |(s, part): (usize, &Array2<f64>)| {
                let square: f64 = layers.clone().zip(c.column(s)).map(|(l, c)| self.weights[l] * c * c).sum();
                part * &inverse / square.max(f64::MIN_POSITIVE)
            };
            parts.iter().enumerate().map(of).collect()
        };
        let mut rest = gather(&|l| Ok(self.left(found, found.residual(l)?.as_ref(), l, rows)))?;
        let mut direction = scaled(&rest);
        let mut along = dot(&rest, &direction);
        for _ in 0..STEPS {
            let forward = mixed(&direction)?;
            let curvature = dot(&direction, &forward);
            if along.is_nan() || along <= 0.0 || curvature.is_nan() || curvature <= 0.0 {
                break;
            }
            let step = along / curvature;
            for (atom, d) in found.runs[at].atoms.iter_mut().zip(&direction) {
                atom.slice_mut(s![rows.clone(), ..]).zip_mut_with(d, |a, &d| *a += T::from_f64(step * d));
            }
            rest.iter_mut().zip(&forward).for_each(|(r, f)| r.scaled_add(-step, f));
            let next = scaled(&rest);
            let after = dot(&rest, &next);
            direction = next.into_iter().zip(&direction).map(|(n, d)| n + d * (after / along)).collect();
            along = after;
        }
        Ok(())
    }
}
