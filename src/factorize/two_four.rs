//! N:M sparsity: of every M consecutive inputs of a row N are kept, 2 of 4 by default.
//!
//! > minimise tr(B·(Ŵ−W)·A·(Ŵ−W)ᵀ) over Ŵ with N entries in each group of M
//!
//! Rows are independent and B drops out. By default (`rule = "coder"`) exact group coordinate descent from
//! SparseGPT's result ([`coder`](crate::coder)); the rules of the literature are there to compare with, each as its
//! paper defines it. Where A is diagonal the optimum is Wanda's mask with unchanged weights.
//!
//! Bytes: N/M of the values and 2/3 bit for each position (2:4); what is left of a row (n mod M inputs) is kept
//! whole. The size is fixed, so that there are two choices: this, or the weight as it is.
//!
//! Cost: n³/3 + mn² flops for SparseGPT, 2mn² more for each sweep. Fails, without wrappers or training, by what
//! half of the weights are worth: a language model survives, and is noticeably worse.

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use super::sparse::{Solver, Start, fraction, outline, single, too_little};
use super::{Decomposition, Factorize, Forecast, Outline, Point, Problem};
use crate::budget::Budget;
use crate::coder::Rule;
use crate::error::{Error, Result};
use crate::metric::{InputMetric, MetricSpec};
use crate::operator::{Dense, LinearOperator, Nm, NmSparse, Operator};
use crate::scalar::{DType, Real};

/// N of every M inputs of a row, chosen and refitted in the problem's metric.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct TwoFour {
    /// N, the weights kept in a group.
    pub n: usize,
    /// M, the inputs in a group; at most 8.
    pub m: usize,
    /// How they are chosen.
    pub rule: Rule,
    /// Sweeps of the coder.
    pub sweeps: usize,
    /// What they begin with, under a Gram matrix.
    pub start: Start,
    /// What is added to the diagonal of a Gram matrix, as a fraction of its mean; by default 0.01 in
    /// SparseGPT's pass, as in its paper, and 0.001 in the coder's sweeps.
    pub damping: Option<f64>,
}

impl Default for TwoFour {
    fn default() -> Self {
        TwoFour { n: 2, m: 4, rule: Rule::default(), sweeps: 5, start: Start::Auto, damping: None }
    }
}

/// Bytes of an m×n matrix in the packed form.
fn bytes(nm: Nm, (m, n): (usize, usize), dtype: DType) -> u64 {
    (dtype.bytes(m * nm.values_per_row(n)) + m * nm.position_bytes(n)) as u64
}

/// Choices of the curve: nothing (of use for zero weights only, at the full price), the pattern, dense.
const PATTERN: usize = 1;

impl<T: Real> Factorize<T> for TwoFour {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        match self.decompose(group)? {
            Some(decomposition) => self.assemble(group, &decomposition),
            None => Ok(Vec::new()),
        }
    }

    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        let problem = single("two-four", group)?;
        let (nm, solver) = self.settings()?;
        let mut notes = Vec::new();
        let coded = solver.groups(problem, nm, &mut notes)?;
        let sparse = NmSparse::gather(nm, coded.values.view(), coded.kept.view(), problem.dtype)?;
        let delta = &problem.weight - &sparse.to_dense();
        let norm_squared = problem.metric.norm_squared(problem.weight, problem.backend);
        let error = problem.metric.squared(delta.view(), problem.backend).max(0.0);
        let cost = sparse.bytes();
        let curve = vec![
            Point { bytes: cost, error: norm_squared.max(error) },
            Point { bytes: cost, error },
            Point { bytes: problem.bytes(), error: 0.0 },
        ];
        let (m, groups) = (problem.shape().0, nm.groups(problem.shape().1));
        let ranks = sparse.ranks();
        let ranks = Array2::from_shape_fn((m, groups), |(i, g)| T::from_f64(ranks[i * groups + g].into()));
        let state = vec![sparse.values().values().to_owned(), ranks];
        Ok(Some(Decomposition { norm_squared, curve, state, notes, ..Decomposition::default() }))
    }

    fn has_curve(&self) -> bool {
        true
    }

    fn assemble(&self, group: &[Problem<'_, T>], decomposition: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let problem = single("two-four", group)?;
        let (nm, _) = self.settings()?;
        let choice = decomposition.choose(&problem.budget, problem.bytes())?;
        if choice > PATTERN {
            return Ok(vec![Operator::Dense(Dense::rounded(problem.weight.to_owned(), problem.dtype)?)]);
        }
        let [values, ranks] = decomposition.state.as_slice() else {
            return Err(Error::shape("values and positions", decomposition.state.len()));
        };
        let ranks = ranks.iter().map(|rank| rank.wide() as u8).collect();
        let values = Dense::rounded(values.clone(), problem.dtype)?;
        Ok(vec![Operator::NmSparse(NmSparse::new(nm, problem.shape().1, ranks, values)?)])
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        let Outline { shape, dtype } = outline("two-four", group, budget)?;
        let (nm, _) = self.settings()?;
        let (before, cost) = (group[0].bytes(), bytes(nm, shape, dtype));
        let (bytes, exact) = match budget.byte_limit(before) {
            Some(limit) if limit >= before => (before, true),
            Some(limit) if limit >= cost => (cost, true),
            Some(_) => return Err(too_little(budget, cost.min(before), before)),
            None => (before.max(cost), false),
        };
        // The weight, its strips and their error; Gram matrix, factor and damped form.
        let squares = if metric.input == InputMetric::Gram { shape.1 * shape.1 } else { 0 };
        Ok(Forecast { bytes, exact, memory: 8 * (7 * shape.0 * shape.1 + 5 * squares) as u64 })
    }
}

impl TwoFour {
    fn settings(&self) -> Result<(Nm, Solver)> {
        let solver = Solver { rule: self.rule, sweeps: self.sweeps, start: self.start, damping: self.damping };
        self.damping.map_or(Ok(()), |damping| fraction("damping", damping))?;
        Ok((Nm::new(self.n, self.m)?, solver))
    }
}
