//! What the sparse methods have in common: a rule, applied to a problem.

use std::fmt::Display;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};
use serde::{Deserialize, Serialize};

use super::{Outline, Problem};
use crate::budget::Budget;
use crate::coder::{Coded, Descent, Factor, Pattern, Rule, Tables, descend, obs, prune, scores};
use crate::error::{Error, Result};
use crate::linalg::Backend;
use crate::metric::{Metric, Weighting};
use crate::operator::Nm;
use crate::scalar::Real;

/// SparseGPT's own.
const OBS_DAMPING: f64 = 0.01;
/// Less: what descends further also gets more out of small eigenvalues.
const CODER_DAMPING: f64 = 0.001;

/// What the coder's sweeps begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Whatever is best known: SparseGPT's result.
    #[default]
    Auto,
    /// The largest weights, as they are.
    Magnitude,
    /// Wanda's, as they are.
    Wanda,
    /// SparseGPT's result.
    Sparsegpt,
}

/// How the sparse methods solve, whatever their pattern.
#[derive(Debug, Clone, Copy)]
pub(super) struct Solver {
    pub(super) rule: Rule,
    pub(super) sweeps: usize,
    pub(super) start: Start,
    /// As a fraction of the mean diagonal; by default 1 % for SparseGPT, as in its paper, and 0.1 % for the coder.
    pub(super) damping: Option<f64>,
}

/// H of a problem with what was done to it.
pub(super) struct Form<T> {
    pub(super) factor: Factor<T>,
    /// H + ridge·I in the compute type.
    pub(super) damped: Array2<T>,
    pub(super) ridge: f64,
}

impl Solver {
    /// The factor of a Gram matrix, and the matrix with the same damping; notes what was unusual.
    pub(super) fn form<T: Real>(
        &self,
        gram: &crate::stats::Gram,
        backend: &dyn Backend,
        notes: &mut Vec<String>,
    ) -> Result<Form<T>> {
        let factor = Factor::<T>::new(gram.matrix(), self.damping.unwrap_or(OBS_DAMPING), backend)?;
        unusual(&factor, self.damping.unwrap_or(OBS_DAMPING), notes);
        let n = gram.dim();
        // An indefinite matrix needs more than what was asked for here as well.
        let raised = factor.damping() / self.damping.unwrap_or(OBS_DAMPING).max(f64::MIN_POSITIVE) > 1.0;
        let damping = if raised { factor.damping() } else { self.damping.unwrap_or(CODER_DAMPING) };
        let ridge = damping * gram.diagonal().sum() / (n - factor.dead()).max(1) as f64;
        let mut damped = gram.matrix().mapv(T::from_f64);
        for (d, &full) in damped.diag_mut().iter_mut().zip(&gram.diagonal()) {
            *d = T::from_f64(full + ridge);
        }
        Ok(Form { factor, damped, ridge })
    }

    /// N of every M by the rule.
    pub(super) fn groups<T: Real>(
        &self,
        problem: &Problem<'_, T>,
        nm: Nm,
        notes: &mut Vec<String>,
    ) -> Result<Coded<T>> {
        let pattern = Pattern::Groups(nm);
        let gram = match (self.rule, &problem.metric.input) {
            (Rule::Sparsegpt | Rule::Coder, Weighting::Gram(gram)) => gram,
            // Where inputs do not interact, Wanda's answer is the best there is, and no weight changes.
            _ => return Ok(scored(self.rule, problem, pattern, 0)),
        };
        let form = self.form(gram, problem.backend, notes)?;
        let start = self.first(problem, &form.factor, pattern, 0)?;
        if self.rule == Rule::Sparsegpt {
            return Ok(start);
        }
        let tables = Tables::new(gram.matrix(), form.ridge, pattern);
        if tables.singular() > 0 {
            notes.push(format!("{} groups of inputs are singular", tables.singular()));
        }
        descend(problem.weight, form.damped.view(), &tables, &start, self.sweeps)
    }
}

impl Solver {
    /// SparseGPT's result, or what the sweeps are to begin with instead.
    fn first<T: Real>(
        &self,
        problem: &Problem<'_, T>,
        factor: &Factor<T>,
        pattern: Pattern,
        count: usize,
    ) -> Result<Coded<T>> {
        match self.start {
            Start::Magnitude if self.rule == Rule::Coder => Ok(scored(Rule::Magnitude, problem, pattern, count)),
            Start::Wanda if self.rule == Rule::Coder => Ok(scored(Rule::Wanda, problem, pattern, count)),
            _ => {
                let rows = weights(problem);
                obs(problem.weight, factor, pattern, count, rows.as_ref().map(|rows| rows.view()))
            }
        }
    }

    /// `count` entries anywhere by the rule, over all rows together.
    pub(super) fn free<T: Real>(
        &self,
        problem: &Problem<'_, T>,
        count: usize,
        notes: &mut Vec<String>,
    ) -> Result<Coded<T>> {
        let weights = weights(problem);
        let row = |i: usize| weights.as_ref().map_or(1.0, |weights| weights[i]);
        let gram = match (self.rule, &problem.metric.input) {
            (Rule::Sparsegpt | Rule::Coder, Weighting::Gram(gram)) => gram,
            _ => return Ok(scored(self.rule, problem, Pattern::Free, count)),
        };
        let form = self.form(gram, problem.backend, notes)?;
        let start = self.first(problem, &form.factor, Pattern::Free, count)?;
        if self.rule == Rule::Sparsegpt || self.sweeps == 0 {
            return Ok(start);
        }
        let tables = Tables::new(gram.matrix(), form.ridge, Pattern::Free);
        let mut descent = Descent::new(problem.weight, form.damped.view(), &tables, &start)?;
        let Some(price) = first_price(problem.weight, form.damped.diag(), count, row) else { return Ok(start) };
        at_a_price(&mut descent, price, problem.shape().0, count, self.sweeps, row)?;
        Ok(descent.solution())
    }
}

/// The price at which single entries, by themselves, would number `count`; `None` where there are none.
pub(super) fn first_price<T: Real>(
    target: ArrayView2<'_, T>,
    diagonal: ArrayView1<'_, T>,
    count: usize,
    row: impl Fn(usize) -> f64,
) -> Option<f64> {
    let worth = |((i, j), w): ((usize, usize), &T)| w.wide().powi(2) * diagonal[j].wide() * row(i);
    let mut worths: Vec<f64> = target.indexed_iter().map(worth).collect();
    let place = count.min(worths.len().checked_sub(1)?);
    Some(*worths.select_nth_unstable_by(place, |a, b| b.total_cmp(a)).1)
}

/// Sweeps at a price that is moved until about `count` entries are stored, then exactly so many, refitted.
/// Rows weigh against each other by `row`. Returns the last price.
pub(super) fn at_a_price<T: Real>(
    descent: &mut Descent<'_, T>,
    mut price: f64,
    rows: usize,
    count: usize,
    sweeps: usize,
    row: impl Fn(usize) -> f64 + Send + Sync,
) -> Result<f64> {
    for _ in 0..sweeps {
        let of_row = |i: usize| T::from_f64(price / row(i).max(f64::MIN_POSITIVE));
        let prices: Vec<T> = (0..rows).map(of_row).collect();
        let stored = descent.sweep_priced(&prices)?.max(1);
        // Counts fall about with the square root of the price.
        price *= (stored as f64 / count.max(1) as f64).powi(2).clamp(0.25, 4.0);
    }
    descent.settle(count, row);
    (0..REFITS).for_each(|_| descent.refit());
    Ok(price)
}

/// What the squared errors of each row count.
fn weights<T: Real>(problem: &Problem<'_, T>) -> Option<Array1<f64>> {
    problem.metric.output_scale().map(|scale| scale.mapv(|b| b * b))
}

/// The entries of the best scores, as they are.
fn scored<T: Real>(rule: Rule, problem: &Problem<'_, T>, pattern: Pattern, count: usize) -> Coded<T> {
    let mut scores = scores(rule, problem.weight, squares(&problem.metric, problem.shape().1).view());
    // Groups are of one row: what rows count matters where they compete.
    if let (Pattern::Free, Some(weights)) = (pattern, weights(problem)) {
        for (mut scores, &weight) in scores.rows_mut().into_iter().zip(&weights) {
            // Nowag's score is a square, the others are not.
            scores *= if rule == Rule::Nowag { weight } else { weight.sqrt() };
        }
    }
    prune(problem.weight, scores.view(), pattern, count)
}

/// Passes over the values once the entries are settled.
const REFITS: usize = 2;

/// Notes what a Gram matrix needed to be factorized.
pub(super) fn unusual<T: Real>(factor: &Factor<T>, asked: f64, notes: &mut Vec<String>) {
    if factor.damping() > asked {
        notes.push(format!("Gram matrix not positive definite: damped by {:.0e} of its mean", factor.damping()));
    }
    if factor.dead() > 0 {
        notes.push(format!("{} inputs are never seen", factor.dead()));
    }
}

/// Refuses a parameter that is no fraction of one.
pub(super) fn fraction(what: &str, value: f64) -> Result<()> {
    match (0.0..=1.0).contains(&value) {
        true => Ok(()),
        false => Err(Error::Unsupported(format!("{what} = {value}: expected a fraction of 1"))),
    }
}

/// The weight of each input in the metric: the mean square of its activations under `gram`.
pub(super) fn squares(metric: &Metric, n: usize) -> Array1<f64> {
    match &metric.input {
        Weighting::Identity => Array1::ones(n),
        Weighting::Diagonal(d) => d.to_vec().into(),
        Weighting::Gram(gram) => gram.diagonal(),
    }
}

/// The only problem of a group, checked.
pub(super) fn single<'g, 'a, T: Real>(what: &str, group: &'g [Problem<'a, T>]) -> Result<&'g Problem<'a, T>> {
    let [problem] = group else { return Err(alone(what, group.len())) };
    problem.check().map_err(|e| e.of_tensor(problem.name))?;
    no_rank(what, &problem.budget)?;
    Ok(problem)
}

/// The only outline of a group.
pub(super) fn outline(what: &str, group: &[Outline], budget: &Budget) -> Result<Outline> {
    budget.check()?;
    no_rank(what, budget)?;
    let &[outline] = group else { return Err(alone(what, group.len())) };
    Ok(outline)
}

fn alone(what: &str, count: usize) -> Error {
    Error::Unsupported(format!("{what} compresses one weight at a time, not {count}"))
}

/// Refuses a budget that none of the sparse methods knows.
pub(super) fn no_rank(what: &str, budget: &Budget) -> Result<()> {
    match budget {
        Budget::Rank(_) => Err(Error::Unsupported(format!("{what} has no rank: use keep, bytes, energy or error"))),
        _ => Ok(()),
    }
}

/// A budget below the least.
pub(super) fn too_little(budget: &Budget, least: impl Display, before: u64) -> Error {
    Error::Budget { asked: budget.to_string(), least: format!("{least} bytes of {before}") }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{Bitmask, Factorize, TwoFour};
    use super::*;
    use crate::operator::LinearOperator;
    use crate::stats::Gram;
    use crate::testing::{gram, numbers};

    #[test]
    fn sweeps_descend_from_any_start() {
        let (w, metric) = (numbers(30, 48, 31), Metric::gram(Arc::new(Gram::new("g", gram(48)).unwrap())));
        let problem = Problem::new("w", w.view(), Budget::Keep(0.65)).metric(metric);
        let error = |method: &dyn Factorize<f64>| {
            let found = method.factorize(std::slice::from_ref(&problem)).unwrap();
            problem.metric.squared((&w - &found[0].to_dense()).view(), problem.backend)
        };
        let of = |start, sweeps| {
            let grouped = error(&TwoFour { start, sweeps, damping: Some(0.0), ..TwoFour::default() });
            (grouped, error(&Bitmask { start, sweeps, damping: Some(0.0), ..Bitmask::default() }))
        };
        for start in [Start::Magnitude, Start::Wanda, Start::Sparsegpt] {
            let (first, last) = (of(start, 0), of(start, 8));
            assert!(last.0 < 0.9 * first.0 && last.1 < 0.9 * first.1, "{start:?}: {first:?} to {last:?}");
        }
        assert_eq!(of(Start::Auto, 2), of(Start::Sparsegpt, 2));
        assert_ne!(of(Start::Auto, 0), of(Start::Wanda, 0));
        // Without sweeps a start is its rule.
        let wanda = TwoFour { rule: Rule::Wanda, ..TwoFour::default() };
        assert_eq!(of(Start::Wanda, 0).0, error(&wanda));
    }

    #[test]
    fn what_a_gram_matrix_needed_is_noted() {
        let n = 16;
        let (w, mut h) = (numbers(24, n, 31), gram(n));
        h.row_mut(3).fill(0.0);
        h.column_mut(3).fill(0.0);
        let metric = Metric::gram(Arc::new(Gram::new("g", h).unwrap()));
        let problem = Problem::new("w", w.view(), Budget::Keep(0.99)).metric(metric);
        let armor = super::super::Armor { overhead: 0.5, ..super::super::Armor::default() };
        for method in [&armor as &dyn Factorize<f64>, &Bitmask::default()] {
            let mut notes = Vec::new();
            method.factorize_noting(std::slice::from_ref(&problem), &mut notes).unwrap();
            assert_eq!(notes, ["1 inputs are never seen"], "{method:?}");
        }
    }
}
