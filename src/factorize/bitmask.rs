//! Unstructured sparsity: any entries, marked by one bit each.
//!
//! > minimise tr(B·(Ŵ−W)·A·(Ŵ−W)ᵀ) over Ŵ of k non-zero entries
//!
//! The bytes left after the mask (1 bit for each entry) decide k; entries are given to the rows and columns where
//! they are worth most. `rule = "coder"`: exact descent in groups of four at a price for each entry, which is
//! moved until k are left, from SparseGPT's result ([`coder`](crate::coder)). The best structure of all at mild
//! compression, since nothing limits where entries are; the slowest to multiply with.
//!
//! Cost: that of `two-four`, and 2mn² for each of three more passes. With `levels` that many solutions are measured, for
//! global allocations and for budgets of error; the one chosen is solved again.

use serde::{Deserialize, Serialize};

use super::sparse::{Solver, Start, fraction, outline, single, too_little};
use super::{Decomposition, Factorize, Forecast, Outline, Point, Problem};
use crate::budget::Budget;
use crate::coder::Rule;
use crate::error::{Error, Result};
use crate::metric::{InputMetric, MetricSpec};
use crate::operator::{Bitmask as Stored, Dense, LinearOperator, Operator};
use crate::scalar::Real;

/// The entries that are worth most, refitted in the problem's metric.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Bitmask {
    /// How entries are chosen.
    pub rule: Rule,
    /// Sweeps of the coder.
    pub sweeps: usize,
    /// What they begin with, under a Gram matrix.
    pub start: Start,
    /// What is added to the diagonal of a Gram matrix, as a fraction of its mean; by default 0.01 in
    /// SparseGPT's pass, as in its paper, and 0.001 in the coder's sweeps.
    pub damping: Option<f64>,
    /// How many densities are measured for an error curve; 0: none, and every budget in bytes is met to the
    /// last entry.
    pub levels: usize,
}

impl Default for Bitmask {
    fn default() -> Self {
        Bitmask { rule: Rule::default(), sweeps: 5, start: Start::Auto, damping: None, levels: 0 }
    }
}

impl Bitmask {
    fn solver(&self) -> Result<Solver> {
        self.damping.map_or(Ok(()), |damping| fraction("damping", damping))?;
        Ok(Solver { rule: self.rule, sweeps: self.sweeps, start: self.start, damping: self.damping })
    }

    fn solve<T: Real>(&self, problem: &Problem<'_, T>, count: usize, notes: &mut Vec<String>) -> Result<Stored<T>> {
        let coded = self.solver()?.free(problem, count, notes)?;
        Stored::gather(coded.values.view(), coded.kept.view(), problem.dtype)
    }
}

/// Entries that a limit below the dense size pays for; `None` if that is none at all.
fn count(outline: &Outline, limit: u64) -> Option<usize> {
    let left = limit.checked_sub(price(outline, 0))? / outline.dtype.bytes(1) as u64;
    let (m, n) = outline.shape;
    Some((left as usize).min(m * n)).filter(|&count| count > 0)
}

fn price(outline: &Outline, count: usize) -> u64 {
    Stored::<f32>::bytes_of(outline.shape, count, outline.dtype)
}

fn dense<T: Real>(problem: &Problem<'_, T>) -> Result<Vec<Operator<T>>> {
    Ok(vec![Operator::Dense(Dense::rounded(problem.weight.to_owned(), problem.dtype)?)])
}

fn outlined<T: Real>(problem: &Problem<'_, T>) -> Outline {
    Outline { shape: problem.shape(), dtype: problem.dtype }
}

impl<T: Real> Factorize<T> for Bitmask {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        self.factorize_noting(group, &mut Vec::new())
    }

    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        if let Some(decomposition) = self.decompose(group)? {
            return self.assemble(group, &decomposition);
        }
        let (problem, before) = (single("bitmask", group)?, outlined(single("bitmask", group)?).bytes());
        let limit = self.limit(&problem.budget, before)?;
        if limit >= before {
            return dense(problem);
        }
        let least = || too_little(&problem.budget, price(&outlined(problem), 1).min(before), before);
        let count = count(&outlined(problem), limit).ok_or_else(least)?;
        Ok(vec![Operator::Bitmask(self.solve(problem, count, notes)?)])
    }

    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        let problem = single("bitmask", group)?;
        self.solver()?;
        if self.levels == 0 {
            return Ok(None);
        }
        let (m, n) = problem.shape();
        let norm_squared = problem.metric.norm_squared(problem.weight, problem.backend);
        let mut curve = vec![Point { bytes: price(&outlined(problem), 0), error: norm_squared }];
        let mut notes = Vec::new();
        for level in 1..=self.levels {
            let count = m * n * level / (self.levels + 1);
            notes.clear();
            let stored = self.solve(problem, count, &mut notes)?;
            let delta = &problem.weight - &stored.to_dense();
            let error = problem.metric.squared(delta.view(), problem.backend).max(0.0);
            let last = curve.last().map_or(f64::INFINITY, |point| point.error);
            let better = error < last && stored.bytes() < problem.bytes() && count > 0;
            curve.extend(better.then_some(Point { bytes: stored.bytes(), error }));
        }
        curve.push(Point { bytes: problem.bytes(), error: 0.0 });
        Ok(Some(Decomposition { norm_squared, curve, notes, ..Decomposition::default() }))
    }

    fn has_curve(&self) -> bool {
        self.levels > 0
    }

    fn assemble(&self, group: &[Problem<'_, T>], decomposition: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let problem = single("bitmask", group)?;
        let choice = decomposition.choose(&problem.budget, problem.bytes())?;
        if choice + 1 == decomposition.curve.len() {
            return dense(problem);
        }
        let bytes = decomposition.curve[choice].bytes;
        let left = bytes.saturating_sub(price(&outlined(problem), 0));
        let count = left as usize / problem.dtype.bytes(1).max(1);
        Ok(vec![Operator::Bitmask(self.solve(problem, count, &mut Vec::new())?)])
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        let outline = outline("bitmask", group, budget)?;
        self.solver()?;
        let ((m, n), before) = (outline.shape, outline.bytes());
        let squares = if metric.input == InputMetric::Gram { 5 * n * n } else { 0 };
        let memory = 8 * (9 * m * n + squares) as u64;
        if self.levels > 0 && budget.byte_limit(before).is_none() {
            return Ok(Forecast { bytes: before, exact: false, memory });
        }
        let limit = self.limit(budget, before)?;
        if limit >= before {
            return Ok(Forecast { bytes: before, exact: true, memory });
        }
        // With a curve, the least is its first level.
        let first = m * n / (self.levels + 1);
        let least = if self.levels > 0 { first } else { 1 };
        let found = count(&outline, limit).filter(|&count| least > 0 && count >= least);
        let count = found.ok_or_else(|| too_little(budget, price(&outline, least.max(1)).min(before), before))?;
        Ok(Forecast { bytes: price(&outline, count), exact: self.levels == 0, memory })
    }
}

impl Bitmask {
    /// The bytes that a budget allows.
    fn limit(&self, budget: &Budget, before: u64) -> Result<u64> {
        budget.byte_limit(before).ok_or_else(|| {
            Error::Unsupported(format!(
                "bitmask without an error curve solves for bytes, not for {budget}: set `levels`"
            ))
        })
    }
}
