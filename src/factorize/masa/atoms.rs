//! Atoms and coefficients: matrix PCA, then least squares in each layer's own metric.

use std::ops::Range;

use ndarray::{Array1, Array2, Axis};

use super::layers::{Layers, Run, Shares};
use crate::error::Result;
use crate::scalar::Real;

/// Atoms whose eigenvalue is below this fraction of the first are none.
const NONE: f64 = 1e-12;
/// Conjugate-gradient steps for atoms.
const STEPS: usize = 4;

impl<T: Real> Layers<'_, '_, T> {
    /// Matrix PCA of each run: D_s = λ_s^{−½}·Σ_l √w_l·V_ls·X_l, c_ls = λ_s^½·V_ls/√w_l, from the products of layers X.
    pub(super) fn principal(
        &self,
        gram: &Array2<f64>,
        runs: &[(Range<usize>, usize)],
        layer: impl Fn(usize) -> Array2<T>,
    ) -> Result<Vec<Run<T>>> {
        let mut all = Vec::with_capacity(runs.len());
        for (range, count) in runs {
            let found = self.spectrum(gram, range)?;
            let floor = NONE * found.values.first().copied().unwrap_or(0.0);
            let used = found.values.iter().take(*count).take_while(|&&v| v > floor).count();
            let (mut atoms, mut coefficients) = (Vec::with_capacity(used), Array2::zeros((range.len(), used)));
            for t in 0..used {
                let mut v = found.vectors.column(t).to_owned();
                let largest = v.iter().fold(0.0f64, |best, &x| if x.abs() > best.abs() { x } else { best });
                v *= largest.signum();
                let mut atom = Array2::zeros(self.group[0].shape());
                for (l, v) in range.clone().zip(&mut v) {
                    let root = self.weights[l].sqrt();
                    atom.scaled_add(T::from_f64(*v * root), &layer(l));
                    *v /= root;
                }
                // Entries of unit mean square, whatever the metric: half types have a narrow range.
                let square = atom.iter().map(|v| v.wide() * v.wide()).sum::<f64>() / atom.len().max(1) as f64;
                let scale = if square > 0.0 { square.sqrt() } else { 1.0 };
                atom.mapv_inplace(|v| v / T::from_f64(scale));
                coefficients.column_mut(t).assign(&(&v * scale));
                atoms.push(atom);
            }
            all.push(Run { layers: range.clone(), atoms, coefficients });
        }
        Ok(all)
    }

    /// B_l·X·A_l of a layer.
    fn own_image(&self, layer: usize, x: &Array2<T>) -> Array2<f64> {
        let metric = &self.group[layer].metric;
        let mut image = metric.input.times(x.mapv(|v| v.wide()).view(), self.backend());
        if let Some(d) = metric.output_scale() {
            image *= &(&d * &d).insert_axis(Axis(1));
        }
        image
    }

    /// The best coefficients of each layer for its atoms, what its residual explains left out: S×S systems.
    pub(super) fn fit_coefficients(&self, found: &mut Shares<T>) {
        for at in 0..found.runs.len() {
            for layer in found.runs[at].layers.clone() {
                let target = self.left(found, layer, false, true);
                let run = &found.runs[at];
                let images: Vec<Array2<f64>> = run.atoms.iter().map(|atom| self.own_image(layer, atom)).collect();
                let inner = |a: &Array2<f64>, b: &Array2<T>| a.iter().zip(b).map(|(a, b)| a * b.wide()).sum::<f64>();
                let s = run.atoms.len();
                let mut squares = Array2::from_shape_fn((s, s), |(i, j)| inner(&images[i], &run.atoms[j]));
                let hold = 1e-12 * squares.diag().sum() / s.max(1) as f64;
                squares.diag_mut().mapv_inplace(|v| v + hold.max(f64::MIN_POSITIVE));
                let right = Array2::from_shape_fn((s, 1), |(i, _)| inner(&images[i], &target));
                // Atoms that the layer's metric does not see keep their coefficients.
                if let Ok(solved) = f64::kernels(self.backend()).solve_spd(squares.view(), right) {
                    let row = layer - run.layers.start;
                    found.runs[at].coefficients.row_mut(row).assign(&solved.column(0));
                }
            }
        }
    }

    /// Atoms of each run for given coefficients and residuals. In one metric they are PCA again; else a few steps
    /// of conjugate gradients on Σ_l c_ls·B_l·(Σ_t c_lt·D_t − X_l)·A_l = 0.
    pub(super) fn fit_atoms(&self, found: &mut Shares<T>) -> Result<()> {
        if self.alike() {
            let runs: Vec<_> = found.runs.iter().map(|run| (run.layers.clone(), run.atoms.len())).collect();
            let rest = |l: usize| self.left(found, l, false, true);
            let gram = self.products(rest);
            found.runs = self.principal(&gram, &runs, rest)?;
            return Ok(());
        }
        for at in 0..found.runs.len() {
            self.descend(found, at);
        }
        Ok(())
    }

    fn descend(&self, found: &mut Shares<T>, at: usize) {
        let layers = found.runs[at].layers.clone();
        let c = found.runs[at].coefficients.clone();
        let count = c.ncols();
        // Σ_l c_ls·B_l·(…)·A_l for each s, of one matrix for each layer.
        let gather = |of: &dyn Fn(usize) -> Array2<T>| -> Vec<Array2<f64>> {
            let mut sums = vec![Array2::zeros(self.group[0].shape()); count];
            for (row, l) in layers.clone().enumerate() {
                let image = self.own_image(l, &of(l));
                sums.iter_mut().enumerate().for_each(|(s, sum)| sum.scaled_add(self.weights[l] * c[(row, s)], &image));
            }
            sums
        };
        let mixed = |parts: &[Array2<f64>]| {
            let sum = |l: usize| {
                let mut sum = Array2::<f64>::zeros(self.group[0].shape());
                parts.iter().enumerate().for_each(|(s, part)| sum.scaled_add(c[(l - layers.start, s)], part));
                T::cast(sum.view()).into_owned()
            };
            gather(&sum)
        };
        let dot = |a: &[Array2<f64>], b: &[Array2<f64>]| -> f64 {
            a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b)).map(|(a, b)| a * b).sum()
        };
        // A diagonal preconditioner: the mean square of what an entry is multiplied with.
        let inputs: Array1<f64> = match &self.input {
            crate::metric::Weighting::Identity => Array1::ones(self.group[0].shape().1),
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
        let mut rest = gather(&|l| self.left(found, l, true, true));
        let mut direction = scaled(&rest);
        let mut along = dot(&rest, &direction);
        for _ in 0..STEPS {
            let forward = mixed(&direction);
            let curvature = dot(&direction, &forward);
            if along.is_nan() || along <= 0.0 || curvature.is_nan() || curvature <= 0.0 {
                return;
            }
            let step = along / curvature;
            for (atom, d) in found.runs[at].atoms.iter_mut().zip(&direction) {
                atom.zip_mut_with(d, |a, &d| *a += T::from_f64(step * d));
            }
            rest.iter_mut().zip(&forward).for_each(|(r, f)| r.scaled_add(-step, f));
            let next = scaled(&rest);
            let after = dot(&rest, &next);
            direction = next.into_iter().zip(&direction).map(|(n, d)| n + d * (after / along)).collect();
            along = after;
        }
    }
}
