//! MASA (Share Your Attention, AAAI 2026): matrix atoms shared across layers, W_l ≈ Σₛ c_ls·D_s, and what they
//! leave of each layer as pivoted low rank.
//!
//! > minimise Σ_l tr(B_l·E_l·A_l·E_lᵀ),  E_l = Σₛ c_ls·D_s + R_l − W_l,  rank R_l = r_l
//!
//! Matrix PCA is the solution without R for a common metric: the eigenvectors of the L×L Gram matrix of layers,
//! K_ij = tr(B̄·W_i·Ā·W_jᵀ), give atoms and coefficients (Eckart–Young of the layers as long vectors, whose matrix
//! is never formed). With `runs`, layers fall into runs with atoms of their own, cut by dynamic programming where
//! that loses the least. Then, each exact: coefficients in each layer's own metric, atoms by conjugate gradients
//! where metrics differ, residuals by weighted low rank: of equal bytes, or with
//! outputs weighed (`gram-fisher`, where errors of different layers can be compared) dealt by what they gain.
//!
//! What the atoms capture is noted beside S/L, what unrelated layers would give. In most dense language models
//! there is no more than that, and pivoted low rank of each layer alone (S = 0, which is tried too unless `atoms`
//! asks for others) is better. Made for layers that were tied, or trained to be shared.
//!
//! Cost: L²mn flops for K, and one eigenproblem for each layer and round. In memory are the atoms, the residuals
//! found (in the file's bytes), the eigenproblem of one layer at its highest (3½ times its short side squared; the layer itself is read again
//! afterwards; by the fast route the layer and a few times what is found of it), and a panel of rows of all layers,
//! together a quarter of one.

use std::sync::Arc;

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use self::layers::{Layers, Shares};
use super::sparse::{no_rank, too_little};
use super::{Factorize, Forecast, InParts, Outline, Problem, Route};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::metric::{InputMetric, MetricSpec, OutputMetric};
use crate::operator::{Dense, IndexSet, LinearOperator, Mixture, Operator};
use crate::scalar::Real;

mod atoms;
mod held;
mod layers;
mod residual;
#[cfg(test)]
mod tests;

/// Atoms shared by the layers of a group, and a low-rank residual for each.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Masa {
    /// S, the number of atoms of the whole group; by default tried out, with none at all among the choices.
    pub atoms: Option<usize>,
    /// Runs of consecutive layers with atoms of their own. One pool of as many atoms never captures less (it could
    /// hold the atoms of all runs); with more, a layer mixes fewer.
    pub runs: usize,
    /// Whether what is left of the budget goes to low-rank residuals.
    pub residual: bool,
    /// Rounds of atoms, coefficients and residuals.
    pub rounds: usize,
    /// The way to the residuals: [`Route::Fast`] for large layers, where outputs are not weighed.
    pub route: Route,
}

impl Default for Masa {
    fn default() -> Self {
        Masa { atoms: None, runs: 1, residual: true, rounds: 3, route: Route::Exact }
    }
}

/// Captured energy this much above S/L is worth having.
const WORTH: f64 = 1.05;

impl<T: Real> Factorize<T> for Masa {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        self.factorize_noting(group, &mut Vec::new())
    }

    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        self.factorize_parts(&group.iter().map(InParts::of).collect::<Vec<_>>(), notes)
    }

    fn takes_parts(&self) -> bool {
        true
    }

    fn factorize_parts(&self, group: &[InParts<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        let Some(first) = group.first() else {
            return Err(Error::shape("a group of at least one weight", 0));
        };
        let outlines: Vec<Outline> = group.iter().map(|p| Outline { shape: p.shape(), dtype: p.dtype }).collect();
        let before: u64 = outlines.iter().map(Outline::bytes).sum();
        let limit = self.limit(&outlines, &first.budget)?;
        let checked = |p: &InParts<'_, T>| super::check_metric(&p.metric, p.shape()).map_err(|e| e.of_tensor(p.name));
        group.iter().try_for_each(checked)?;
        self.check_route(group.iter().any(|p| p.metric.output_scale().is_some()))?;
        let layers = Layers::new(group)?;
        if limit >= before {
            let whole = |p: &InParts<'_, T>| p.whole(p.weight.rows(0..p.shape().0).view()).dense();
            return Ok(group.iter().map(whole).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect());
        }
        let mut best: Option<Shares<T>> = None;
        for atoms in self.choices(&outlines, limit) {
            let rounds = if self.atoms.is_some() { self.rounds } else { 1 };
            let found = layers.solve(self, atoms, limit, rounds).map_err(|e| e.of_tensor(first.name))?;
            // Fewer atoms unless more are better by more than rounding.
            let least = 1e-9 * layers.energy();
            if best.as_ref().is_none_or(|best| found.error + least < best.error) {
                best = Some(found);
            }
        }
        let least = || too_little(&first.budget, self.least(&outlines).min(before), before);
        let mut best = best.ok_or_else(least)?;
        let count = best.count();
        if self.atoms.is_none() && count > 0 && self.rounds > 1 {
            let longer = layers.solve(self, count, limit, self.rounds).map_err(|e| e.of_tensor(first.name))?;
            best = if longer.error < best.error { longer } else { best };
        }
        self.note(&layers, &best, notes);
        write(group, best)
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        let limit = self.limit(group, budget)?;
        self.check_route(metric.output == OutputMetric::Fisher)?;
        let before: u64 = group.iter().map(Outline::bytes).sum();
        if limit < before && self.choices(group, limit).is_empty() {
            return Err(too_little(budget, self.least(group).min(before), before));
        }
        let (m, n) = group.first().map_or((0, 0), |o| o.shape);
        let squares = if metric.input == InputMetric::Gram { 4 * n * n } else { 0 };
        // Atoms (where their number is tried out: of the best solution so far and of the next), a few layers, what low
        // rank needs for one, and the results.
        let most = group.len().min((limit / first_bytes(group).max(1)) as usize + 1);
        let matrices = self.atoms.unwrap_or(2 * most) + 4;
        let low_rank = if self.residual && self.route == Route::Exact { 4 * m.min(n).pow(2) } else { 0 };
        let memory = (size_of::<T>() * matrices * m * n + 8 * (low_rank + squares)) as u64 + limit.min(before);
        Ok(Forecast { bytes: limit.min(before), exact: limit >= before, memory })
    }
}

/// Bytes of one layer.
fn first_bytes(group: &[Outline]) -> u64 {
    group.first().map_or(0, Outline::bytes)
}

/// Bytes of S atoms and the coefficients of all layers.
fn price(group: &[Outline], atoms: usize) -> u64 {
    let Some(first) = group.first() else { return 0 };
    first.dtype.bytes(atoms * (first.shape.0 * first.shape.1 + group.len())) as u64
}

impl Masa {
    /// Checks group and budget; the bytes allowed.
    fn limit(&self, group: &[Outline], budget: &Budget) -> Result<u64> {
        budget.check()?;
        no_rank("masa", budget)?;
        let Some(first) = group.first() else { return Err(Error::shape("a group of at least one weight", 0)) };
        if let Some(other) = group.iter().find(|o| o.shape != first.shape) {
            return Err(Error::shape(format!("{:?} in the whole group", first.shape), other.shape));
        }
        if let Some(other) = group.iter().find(|o| o.dtype != first.dtype) {
            return Err(Error::Unsupported(format!(
                "atoms shared by weights in {:?} and {:?}",
                first.dtype, other.dtype
            )));
        }
        if let Some(atoms) = self.atoms.filter(|&atoms| atoms > group.len()) {
            return Err(Error::Unsupported(format!(
                "{atoms} atoms for {} layers: expected at most as many",
                group.len()
            )));
        }
        let before: u64 = group.iter().map(Outline::bytes).sum();
        budget
            .byte_limit(before)
            .ok_or_else(|| Error::Unsupported(format!("masa has no error curve: it solves for bytes, not {budget}")))
    }

    /// The fast route has no error curves.
    fn check_route(&self, weighed: bool) -> Result<()> {
        if self.residual && weighed && self.route == Route::Fast {
            let why = "masa: where outputs are weighed, residuals are dealt by their error curves, which take \
                       route = \"exact\"";
            return Err(Error::Unsupported(why.into()));
        }
        Ok(())
    }

    /// Numbers of atoms worth a try within a limit.
    fn choices(&self, group: &[Outline], limit: u64) -> Vec<usize> {
        let layers = group.len();
        let mut choices = match self.atoms {
            Some(atoms) => vec![atoms],
            None => vec![0, 1, layers / 8, layers / 4, layers / 2, layers * 3 / 4],
        };
        // Without residuals as many atoms as there is room for are the best choice.
        if !self.residual && self.atoms.is_none() {
            choices = (1..=layers).rev().find(|&s| price(group, s) <= limit).into_iter().collect();
        }
        choices.sort_unstable();
        choices.dedup();
        choices.retain(|&atoms| self.cheapest(group, atoms) <= limit && (self.residual || atoms > 0));
        choices
    }

    /// Bytes of so many atoms; without any, each layer has a rank of at least one.
    fn cheapest(&self, group: &[Outline], atoms: usize) -> u64 {
        let rank_one = |outline: &Outline| {
            let (m, n) = outline.shape;
            outline.dtype.bytes((m + n).saturating_sub(1)) as u64 + IndexSet::bytes_of(m.min(n), 1)
        };
        if atoms == 0 { group.iter().map(rank_one).sum() } else { price(group, atoms) }
    }

    /// The least that any choice takes.
    fn least(&self, group: &[Outline]) -> u64 {
        match (self.atoms, self.residual) {
            (Some(atoms), _) => self.cheapest(group, atoms),
            (None, false) => price(group, 1),
            (None, true) => self.cheapest(group, 0).min(price(group, 1)),
        }
    }

    fn note<T: Real>(&self, layers: &Layers<'_, '_, T>, found: &Shares<T>, notes: &mut Vec<String>) {
        let (count, total) = (found.count(), layers.count());
        // What sharing would capture if it were used.
        let asked = if count == 0 { (total / 3).max(1) } else { count };
        let ((metric, captured), fair) = (layers.captured(asked), asked as f64 / total.max(1) as f64);
        notes.push(format!(
            "{count} atoms; {asked} of {total} capture {metric:.3} of the energy in the metric and {captured:.3} in the \
             plain norm, where unrelated layers give {fair:.3}"
        ));
        if captured < WORTH * fair && asked < total {
            notes.push("layers have little in common: low rank of each alone (method svd) is the better choice".into());
        }
    }
}

/// The operators of the layers; atoms are shared by the layers of a run.
fn write<T: Real>(group: &[InParts<'_, T>], found: Shares<T>) -> Result<Vec<Operator<T>>> {
    let dtype = group.first().map_or(T::DTYPE, |p| p.dtype);
    let mut mixtures: Vec<Option<Operator<T>>> = vec![None; group.len()];
    for run in found.runs {
        let store = |atom: Array2<T>| Ok(Arc::new(Operator::Dense(Dense::rounded(atom, dtype)?)));
        let atoms: Vec<Arc<Operator<T>>> = run.atoms.into_iter().map(store).collect::<Result<_>>()?;
        if atoms.is_empty() {
            continue;
        }
        for (layer, c) in run.layers.zip(run.coefficients.rows()) {
            let c = Dense::rounded(c.mapv(T::from_f64).insert_axis(ndarray::Axis(0)), dtype)?;
            let shared = atoms.iter().map(|atom| Operator::Shared(atom.clone())).collect();
            mixtures[layer] = Some(Operator::Mixture(Mixture::new(c, shared)?));
        }
    }
    let nothing = |p: &InParts<'_, T>| -> Result<Operator<T>> {
        // Neither atoms nor residual: rank 0.
        let (m, n) = p.shape();
        let zeros = |m, n| Dense::rounded(Array2::zeros((m, n)), dtype).map(Operator::Dense);
        Operator::product_of(vec![zeros(m, 0)?, zeros(0, n)?])
    };
    let each = group.iter().zip(mixtures).zip(found.residuals).map(|((problem, mixture), residual)| {
        let residual = residual.map(|held| held.operator()).transpose()?;
        match (mixture, residual.filter(|residual| residual.bytes() > 0)) {
            (Some(mixture), Some(residual)) => Operator::sum_of(vec![mixture, residual]),
            (Some(only), None) | (None, Some(only)) => Ok(only),
            (None, None) => nothing(problem),
        }
    });
    each.collect()
}
