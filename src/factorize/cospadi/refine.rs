//! Exact half-steps: the dictionary for given codes, and codes for a given dictionary.

use ndarray::{Array2, Axis, s};

use super::super::sparse::{at_a_price, first_price};
use super::signals::{Model, Signals};
use crate::coder::{Coded, Descent, Pattern, Tables, conjugate, prune};
use crate::error::Result;
use crate::metric::Weighting;
use crate::operator::Nm;
use crate::scalar::Real;

/// How many entries the codes have.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Entries {
    /// Every one, exactly: least squares.
    All,
    /// So many, anywhere.
    Free(usize),
    /// N of every M atoms.
    Groups(Nm),
}

/// Conjugate-gradient steps for weights that see different inputs.
const STEPS: usize = 4;
/// And steps towards the values of codes that are settled.
const CONJUGATE: usize = 8;
/// What is added to a diagonal, as a fraction of its mean: of the dictionary's normal equations, where it only
/// holds unused atoms in place, and of the atoms' Gram matrix.
const HOLD: f64 = 1e-7;
const DAMPING: f64 = 1e-6;

impl<T: Real> Signals<'_, T> {
    /// The best dictionary for the codes that a model has. With one input metric A it drops out of the normal
    /// equations, SᵀBS·D = SᵀB·W; with several, conjugate gradients on Σ SᵀBS·D·A = Σ SᵀB·W·A from there.
    pub(super) fn fit_atoms(&self, model: &mut Model<T>) -> Result<()> {
        let kernels = self.kernels();
        let values = model.codes.values.view();
        let pieces = self.parts.iter().map(|(rows, input)| {
            let (codes, weight) = (values.slice(s![rows.clone(), ..]), self.weight.slice(s![rows.clone(), ..]));
            let weighed = self.weighed(rows.clone(), codes);
            let wide = codes.mapv(|v| v.wide());
            let right = kernels.matmul(weighed.t(), weight.mapv(|v| v.wide()).view());
            (kernels.matmul(weighed.t(), wide.view()), right, input)
        });
        let pieces: Vec<(Array2<f64>, Array2<f64>, &Weighting)> = pieces.collect();
        let k = model.atoms.nrows();
        let mut total = Array2::<f64>::zeros((k, k));
        pieces.iter().for_each(|(squares, ..)| total += squares);
        let hold = (HOLD * total.diag().sum() / k.max(1) as f64).max(f64::MIN_POSITIVE);
        total.diag_mut().mapv_inplace(|v| v + hold);
        let mut right = &model.atoms * hold;
        pieces.iter().for_each(|(_, part, _)| right += part);
        model.atoms = kernels.solve_spd(total.view(), right)?;
        match pieces.len() {
            1 => Ok(()),
            _ => self.descend_atoms(model, &pieces, &total),
        }
    }

    /// Conjugate gradients, preconditioned by the solution for a common metric.
    fn descend_atoms(
        &self,
        model: &mut Model<T>,
        pieces: &[(Array2<f64>, Array2<f64>, &Weighting)],
        total: &Array2<f64>,
    ) -> Result<()> {
        let kernels = self.kernels();
        let image = |atoms: &Array2<f64>| {
            pieces.iter().fold(Array2::zeros(atoms.dim()), |sum: Array2<f64>, (squares, _, input)| {
                sum + input.times(kernels.matmul(squares.view(), atoms.view()).view(), self.backend)
            })
        };
        let n = model.atoms.ncols();
        let mut common = self.mean.times(Array2::eye(n).view(), self.backend);
        let ridge = (DAMPING * common.diag().sum() / n.max(1) as f64).max(f64::MIN_POSITIVE);
        common.diag_mut().mapv_inplace(|v| v + ridge);
        let precondition = |gradient: &Array2<f64>| -> Result<Array2<f64>> {
            let left = kernels.solve_spd(total.view(), gradient.clone())?;
            Ok(kernels.solve_spd(common.view(), left.reversed_axes())?.reversed_axes())
        };
        let dot = |a: &Array2<f64>, b: &Array2<f64>| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let mut residual = -image(&model.atoms);
        for (_, right, input) in pieces {
            residual += &input.times(right.view(), self.backend);
        }
        let mut direction = precondition(&residual)?;
        let mut along = dot(&residual, &direction);
        for _ in 0..STEPS {
            let forward = image(&direction);
            let curvature = dot(&direction, &forward);
            // Nothing left to gain, or nothing but rounding.
            if along.is_nan() || along <= 0.0 || curvature <= 0.0 {
                break;
            }
            model.atoms.scaled_add(along / curvature, &direction);
            residual.scaled_add(-along / curvature, &forward);
            let next = precondition(&residual)?;
            let after = dot(&residual, &next);
            direction = next + &direction * (after / along);
            along = after;
        }
        Ok(())
    }

    /// Codes for the atoms that a model has, and the error of both. Each weight in its own metric, by the coder
    /// with H = D·A·Dᵀ: from the codes at hand, or from least squares over all atoms if there are none.
    pub(super) fn fit_codes(&self, model: &mut Model<T>, entries: Entries, sweeps: usize) -> Result<()> {
        let kernels = self.kernels();
        let k = model.atoms.nrows();
        let coded_rows: usize = self.parts.iter().map(|(rows, _)| model.coded(rows).len()).sum();
        model.prices.resize(self.parts.len(), None);
        model.error = self.norm;
        let mut before = 0;
        for (part, (range, input)) in self.parts.iter().enumerate() {
            let weighted = input.times(model.atoms.view(), self.backend);
            let form = kernels.matmul(weighted.view(), model.atoms.t());
            let ridge = (DAMPING * form.diag().sum() / k.max(1) as f64).max(f64::MIN_POSITIVE);
            let mut damped = form.clone();
            damped.diag_mut().mapv_inplace(|v| v + ridge);
            let rows = model.coded(range);
            let weight = self.weight.select(Axis(0), &rows).mapv(|v| v.wide());
            let cross = kernels.matmul(weight.view(), weighted.t());
            let target = kernels.solve_spd(damped.view(), cross.t().to_owned())?.reversed_axes();
            let target = T::from_view(target.view()).into_owned();
            let row = |i: usize| self.rows[rows[i]];
            let share = |count: usize, upto: usize| (count as u128 * upto as u128 / coded_rows.max(1) as u128) as usize;
            let start = |kept: Array2<bool>| Coded { values: model.codes.values.select(Axis(0), &rows), kept };
            let single = T::from_view(damped.view());
            let mut coded = match entries {
                Entries::All => Coded { kept: Array2::from_elem(target.dim(), true), values: target.clone() },
                Entries::Groups(nm) => {
                    let tables = Tables::new(damped.view(), 0.0, Pattern::Groups(nm));
                    let kept = model.codes.kept.select(Axis(0), &rows);
                    let start = if kept.iter().any(|&kept| kept) {
                        start(kept)
                    } else {
                        let scores = target.mapv(|c| c.wide().abs()) * damped.diag().mapv(f64::sqrt);
                        prune(target.view(), scores.view(), Pattern::Groups(nm), 0)
                    };
                    crate::coder::descend(target.view(), single.view(), &tables, &start, sweeps)?
                }
                Entries::Free(count) => {
                    let count = share(count, before + rows.len()) - share(count, before);
                    let tables = Tables::new(damped.view(), 0.0, Pattern::Free);
                    let kept = model.codes.kept.select(Axis(0), &rows);
                    let first = first_price(target.view(), single.diag(), count, row).unwrap_or(0.0);
                    let start = match kept.iter().any(|&kept| kept) {
                        true => start(kept),
                        false => Coded { values: target.clone(), kept: Array2::from_elem(target.dim(), true) },
                    };
                    let mut descent = Descent::new(target.view(), single.view(), &tables, &start)?;
                    let price = model.prices[part].unwrap_or(first);
                    model.prices[part] = Some(at_a_price(&mut descent, price, rows.len(), count, sweeps, row)?);
                    descent.solution()
                }
            };
            if entries != Entries::All {
                conjugate(target.view(), single.view(), &mut coded, CONJUGATE)?;
            }
            before += rows.len();
            for (i, &at) in rows.iter().enumerate() {
                model.codes.values.row_mut(at).assign(&coded.values.row(i));
                model.codes.kept.row_mut(at).assign(&coded.kept.row(i));
            }
            model.error += self.error_of(model, range, &weighted, &form);
        }
        model.error = model.error.max(0.0);
        Ok(())
    }

    /// The error of a model as it is.
    pub(super) fn measure(&self, model: &mut Model<T>) {
        model.error = self.norm;
        for (range, input) in &self.parts {
            let weighted = input.times(model.atoms.view(), self.backend);
            let form = self.kernels().matmul(weighted.view(), model.atoms.t());
            model.error += self.error_of(model, range, &weighted, &form);
        }
        model.error = model.error.max(0.0);
    }

    /// tr(B·(SHSᵀ − 2·S·(WAD)ᵀ)) over some rows: their error without their norm.
    fn error_of(
        &self,
        model: &Model<T>,
        range: &std::ops::Range<usize>,
        weighted: &Array2<f64>,
        form: &Array2<f64>,
    ) -> f64 {
        let kernels = self.kernels();
        let codes = model.codes.values.slice(s![range.clone(), ..]).mapv(|v| v.wide());
        let weight = self.weight.slice(s![range.clone(), ..]).mapv(|v| v.wide());
        let mut rest = kernels.matmul(codes.view(), form.view());
        kernels.gemm(-2.0, weight.view(), weighted.t(), 1.0, rest.view_mut());
        let rows = self.rows.slice(s![range.clone()]);
        codes.rows().into_iter().zip(rest.rows()).zip(rows).map(|((c, r), b)| b * c.dot(&r)).sum()
    }

    /// Rounds of both until one gains less than `least` of the error, or makes it worse; the best is returned.
    pub(super) fn refine(
        &self,
        mut model: Model<T>,
        entries: Entries,
        rounds: usize,
        sweeps: usize,
    ) -> Result<Model<T>> {
        const LEAST: f64 = 2e-3;
        let mut best = model.clone();
        for _ in 0..rounds {
            self.fit_atoms(&mut model)?;
            self.fit_codes(&mut model, entries, sweeps)?;
            let gained = best.error - model.error;
            if gained > 0.0 {
                best = model.clone();
            }
            if gained <= LEAST * best.error {
                break;
            }
        }
        Ok(best)
    }
}
