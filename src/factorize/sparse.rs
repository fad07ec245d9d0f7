//! What the sparse methods have in common: a rule, applied to a problem.

use std::fmt::Display;

use ndarray::{Array1, Array2};

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

/// How the sparse methods solve, whatever their pattern.
#[derive(Debug, Clone, Copy)]
pub(super) struct Solver {
    pub(super) rule: Rule,
    pub(super) sweeps: usize,
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
        if factor.damping() > self.damping.unwrap_or(OBS_DAMPING) {
            notes.push(format!("Gram matrix not positive definite: damped by {:.0e} of its mean", factor.damping()));
        }
        if factor.dead() > 0 {
            notes.push(format!("{} inputs are never seen", factor.dead()));
        }
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
            _ => {
                let scores = scores(self.rule, problem.weight, squares(&problem.metric, problem.shape().1).view());
                return Ok(prune(problem.weight, scores.view(), pattern, 0));
            }
        };
        let form = self.form(gram, problem.backend, notes)?;
        let start = obs(problem.weight, &form.factor, pattern, 0, None)?;
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
    /// `count` entries anywhere by the rule, over all rows together.
    pub(super) fn free<T: Real>(
        &self,
        problem: &Problem<'_, T>,
        count: usize,
        notes: &mut Vec<String>,
    ) -> Result<Coded<T>> {
        let weights = problem.metric.output_scale().map(|scale| scale.mapv(|b| b * b));
        let row = |i: usize| weights.as_ref().map_or(1.0, |weights| weights[i]);
        let gram = match (self.rule, &problem.metric.input) {
            (Rule::Sparsegpt | Rule::Coder, Weighting::Gram(gram)) => gram,
            _ => {
                let mut scores = scores(self.rule, problem.weight, squares(&problem.metric, problem.shape().1).view());
                for (i, mut scores) in scores.rows_mut().into_iter().enumerate() {
                    // Nowag's score is a square, the others are not.
                    scores *= if self.rule == Rule::Nowag { row(i) } else { row(i).sqrt() };
                }
                return Ok(prune(problem.weight, scores.view(), Pattern::Free, count));
            }
        };
        let form = self.form(gram, problem.backend, notes)?;
        let start =
            obs(problem.weight, &form.factor, Pattern::Free, count, weights.as_ref().map(|weights| weights.view()))?;
        if self.rule == Rule::Sparsegpt || self.sweeps == 0 {
            return Ok(start);
        }
        let tables = Tables::new(gram.matrix(), form.ridge, Pattern::Free);
        let mut descent = Descent::new(problem.weight, form.damped.view(), &tables, &start)?;
        // The price at which single entries would number `count`; then what the sweeps say of it.
        let worth = |((i, j), w): ((usize, usize), &T)| w.wide().powi(2) * form.damped[(j, j)].wide() * row(i);
        let mut worths: Vec<f64> = problem.weight.indexed_iter().map(worth).collect();
        let place = count.min(worths.len().saturating_sub(1));
        let mut price = match worths.is_empty() {
            true => return Ok(start),
            false => *worths.select_nth_unstable_by(place, |a, b| b.total_cmp(a)).1,
        };
        for _ in 0..self.sweeps {
            let of_row = |i: usize| T::from_f64(price / row(i).max(f64::MIN_POSITIVE));
            let prices: Vec<T> = (0..problem.shape().0).map(of_row).collect();
            let stored = descent.sweep_priced(&prices).max(1);
            // Counts fall about with the square root of the price.
            price *= (stored as f64 / count.max(1) as f64).powi(2).clamp(0.25, 4.0);
        }
        descent.settle(count, row);
        (0..REFITS).for_each(|_| descent.refit());
        Ok(descent.solution())
    }
}

/// Passes over the values once the entries are settled.
const REFITS: usize = 2;

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
