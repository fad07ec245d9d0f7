//! ARMOR (arXiv:2510.05528): W ≈ A·S·B, a 2:4 core between block-diagonal wrappers.
//!
//! A and B hold dense blocks along their diagonals and cost a few per cent of the weight; S keeps N of every M
//! entries. The default solver is exact block descent without gradients or step sizes:
//!
//! > A ← A − E·G·Zᵀ·(Z·G·Zᵀ)⁻¹ (Z = S·B),  B_q ← B_q − (YᵀY)⁻¹·Yᵀ·(E·G)_q·G_qq⁻¹ (Y = A·S),
//! > S: the best of all masks with its least-squares values, group after group
//!
//! with E = A·S·B − W. No step raises the error. It begins at NoWag-P's mask, first in the metric's diagonal
//! (cheap), then in the full Gram matrix. Weights of outputs are exact: rows are scaled by their roots, and A takes
//! that back. Columns of A have unit norm, but for that. Blocks are as large as the budget allows; a last one
//! may be smaller. `solver = "paper"` is the published alternation of Adam and random groups, in its own proxy of
//! the loss, to compare with.
//!
//! A group of weights with the same inputs may share B (`share = "input"`): they are solved as one tall weight.
//!
//! Cost: 6mn² flops for each sweep in the Gram metric, and about 4·mn·b for each diagonal one.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{Array2, Axis, concatenate, s};
use serde::{Deserialize, Serialize};

use self::state::{Form, State, parts};
use super::group::{checked, kept_dense};
use super::sparse::{fraction, no_rank, squares, too_little, unusual};
use super::svd::mean_input;
use super::{Factorize, Forecast, Outline, Problem, Share};
use crate::budget::Budget;
use crate::coder::{Coded, Factor, Pattern, Rule, prune, scores};
use crate::error::{Error, Result};
use crate::metric::{InputMetric, Metric, MetricSpec, Weighting};
use crate::operator::{BlockDiagonal, Nm, NmSparse, Operator};
use crate::scalar::{DType, Real};

mod core;
mod inertia;
mod paper;
mod state;

/// A 2:4 core between block-diagonal matrices.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Armor {
    /// N of the core's N:M.
    pub n: usize,
    /// M of it; at most 8.
    pub m: usize,
    /// Rows and columns of the wrappers' blocks; if not given, the largest multiple of M that `overhead` and
    /// the budget pay for.
    pub block: Option<usize>,
    /// What the wrappers may cost at most, as a fraction of the weight's parameters, if `block` is not given.
    pub overhead: f64,
    /// Sweeps in the diagonal of the metric.
    pub diagonal_sweeps: usize,
    /// Sweeps in the whole Gram matrix.
    pub sweeps: usize,
    /// How far a sweep begins beyond the end of the last one, as a fraction of what that one did; below 1. A sweep
    /// that ends with a larger error is taken back. 0: plain sweeps.
    pub inertia: f64,
    /// What is added to the diagonal of a Gram matrix, as a fraction of its mean.
    pub damping: f64,
    /// What the weights of a group share: B, if they share inputs.
    pub share: Option<Share>,
    /// How it is solved.
    pub solver: Solver,
    /// Iterations of solver `paper`.
    pub iterations: usize,
}

/// How the factors are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Solver {
    /// Closed-form sweeps in the metric; the error never rises.
    #[default]
    Exact,
    /// As published: Adam on all factors and one random group in each pair of blocks, in a proxy of the loss
    /// (normalised weights, diagonal of the metric). For reproduction; slower and worse.
    Paper,
}

impl Default for Armor {
    fn default() -> Self {
        Armor {
            n: 2,
            m: 4,
            block: None,
            overhead: 0.08,
            diagonal_sweeps: 8,
            sweeps: 12,
            inertia: 0.8,
            damping: 1e-3,
            share: None,
            solver: Solver::Exact,
            iterations: 20_000,
        }
    }
}

impl<T: Real> Factorize<T> for Armor {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        self.factorize_noting(group, &mut Vec::new())
    }

    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        let (first, outlines) = checked(group)?;
        let nm = self.check(&outlines, &first.budget)?;
        let Some(block) = self.choose(&outlines, nm, &first.budget)? else {
            return kept_dense(group);
        };
        let solved = self.solve(group, nm, block, notes).map_err(|e| e.of_tensor(first.name))?;
        write(group, &solved, nm)
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        budget.check()?;
        let nm = self.check(group, budget)?;
        let bytes = match self.choose(group, nm, budget)? {
            Some(block) => bytes(group, nm, block),
            None => group.iter().map(Outline::bytes).sum(),
        };
        let (m, n) = joint(group);
        let squares = if metric.input == InputMetric::Gram { 5 * n * n } else { 0 };
        let moments = if self.solver == Solver::Paper { 6 * m * n } else { 0 };
        Ok(Forecast { bytes, exact: true, memory: 8 * (13 * m * n + moments + squares) as u64 })
    }
}

/// Shape of the weights on top of each other.
fn joint(group: &[Outline]) -> (usize, usize) {
    (group.iter().map(|o| o.shape.0).sum(), group.first().map_or(0, |o| o.shape.1))
}

/// Bytes of all factors with blocks of this size, B counted once.
fn bytes(group: &[Outline], nm: Nm, block: usize) -> u64 {
    let n = joint(group).1;
    let wrapper = |len: usize, dtype: DType| {
        let extents: Vec<_> = parts(len, block).into_iter().map(|part| (part.len(), part.len())).collect();
        BlockDiagonal::<f32>::bytes_of(&extents, dtype)
    };
    let own = |o: &Outline| {
        let core = o.dtype.bytes(o.shape.0 * nm.values_per_row(n)) + o.shape.0 * nm.position_bytes(n);
        wrapper(o.shape.0, o.dtype) + core as u64
    };
    group.iter().map(own).sum::<u64>() + group.first().map_or(0, |o| wrapper(n, o.dtype))
}

impl Armor {
    fn check(&self, group: &[Outline], budget: &Budget) -> Result<Nm> {
        no_rank("armor", budget)?;
        fraction("damping", self.damping)?;
        fraction("overhead", self.overhead)?;
        fraction("inertia", self.inertia)?;
        if self.block == Some(0) {
            return Err(Error::Unsupported("block = 0: expected at least 1".into()));
        }
        if self.solver == Solver::Paper && self.block.is_some_and(|block| block % self.m != 0) {
            let what = format!("solver `paper` needs blocks of a multiple of {} inputs", self.m);
            return Err(Error::Unsupported(what));
        }
        match (self.share, group) {
            (Some(Share::Output), _) => {
                return Err(Error::Unsupported(
                    "armor shares the wrapper of the inputs: use `share = \"input\"`".into(),
                ));
            }
            (None, [_, _, ..]) => {
                let what = format!("armor of a group of {} weights needs `share = \"input\"`", group.len());
                return Err(Error::Unsupported(what));
            }
            (_, [first, rest @ ..]) => {
                if let Some(other) = rest.iter().find(|o| o.shape.1 != first.shape.1) {
                    return Err(Error::shape(format!("{} inputs in the whole group", first.shape.1), other.shape));
                }
            }
            _ => return Err(Error::shape("a group of at least one weight", 0)),
        }
        Nm::new(self.n, self.m)
    }

    /// The size of the blocks; `None` if the weights may stay as they are.
    fn choose(&self, group: &[Outline], nm: Nm, budget: &Budget) -> Result<Option<usize>> {
        let ((m, n), before) = (joint(group), group.iter().map(Outline::bytes).sum());
        let Some(limit) = budget.byte_limit(before) else {
            return Err(Error::Unsupported(format!("armor solves for bytes, not for {budget}: use keep or bytes")));
        };
        if limit >= before {
            return Ok(None);
        }
        let fits = |&block: &usize| bytes(group, nm, block) <= limit;
        let found = match self.block {
            Some(block) => Some(block).filter(fits),
            None => {
                let cheap = |&block: &usize| (block * (m + n)) as f64 <= self.overhead * (m * n) as f64;
                let sizes = (1..=m.max(n).div_ceil(nm.m())).rev().map(|k| k * nm.m());
                sizes.filter(|block| cheap(block) || *block == nm.m()).find(fits)
            }
        };
        let least = bytes(group, nm, self.block.unwrap_or(nm.m()));
        found.map(Some).ok_or_else(|| too_little(budget, least.min(before), before))
    }

    /// Where the blocks of A are: none reaches into two weights.
    fn rows<T: Real>(group: &[Problem<'_, T>], block: usize) -> Vec<Range<usize>> {
        let mut rows = Vec::new();
        for problem in group {
            let first = rows.last().map_or(0, |part: &Range<usize>| part.end);
            rows.extend(parts(problem.shape().0, block).into_iter().map(|p| first + p.start..first + p.end));
        }
        rows
    }

    fn solve<'a, T: Real>(
        &self,
        group: &[Problem<'a, T>],
        nm: Nm,
        block: usize,
        notes: &mut Vec<String>,
    ) -> Result<State<'a, T>> {
        let (first, n) = (&group[0], group[0].shape().1);
        let metric = Metric {
            output: Weighting::Identity,
            input: mean_input(group[0].shape().1, group.iter().map(|p| &p.metric.input))?,
        };
        let squares = squares(&metric, n);
        let (rows, columns) = (Self::rows(group, block), parts(n, block));
        if self.solver == Solver::Paper {
            return self.paper(group, squares.view(), (rows, columns), nm);
        }
        let scales: Vec<f64> = group
            .iter()
            .flat_map(|p| p.metric.output_scale().map_or_else(|| vec![1.0; p.shape().0], |scale| scale.to_vec()))
            .collect();
        let views: Vec<_> = group.iter().map(|p| p.weight).collect();
        let fit = |e: ndarray::ShapeError| Error::shape("weights that fit together", e.to_string());
        let mut weight = concatenate(Axis(0), &views).map_err(fit)?;
        // The mask of each weight by itself, its values in the scaled rows.
        let starts = group.iter().map(|p| {
            let score = scores(Rule::Nowag, p.weight, squares.view());
            prune(p.weight, score.view(), Pattern::Groups(nm), 0).kept
        });
        let starts: Vec<Array2<bool>> = starts.collect();
        let kept = concatenate(Axis(0), &starts.iter().map(|kept| kept.view()).collect::<Vec<_>>()).map_err(fit)?;
        for (mut row, &scale) in weight.rows_mut().into_iter().zip(&scales) {
            row.mapv_inplace(|w| w * T::from_f64(scale));
        }
        let values = Array2::from_shape_fn(weight.dim(), |at| if kept[at] { weight[at] } else { T::zero() });
        let mut state = State::new(weight, Coded { values, kept }, rows, columns, first.backend);
        let narrow = squares.mapv(T::from_f64);
        state.descend(&Form::Diagonal(narrow.view()), (nm, block), self.diagonal_sweeps, self.inertia)?;
        if let Weighting::Gram(gram) = &metric.input {
            let factor = Factor::<T>::new(gram.matrix(), self.damping, first.backend)?;
            unusual(&factor, self.damping, notes);
            let damping = factor.damping();
            let ridge = damping * squares.sum() / squares.len().max(1) as f64;
            let mut damped = gram.matrix().mapv(T::from_f64);
            damped.diag_mut().iter_mut().zip(&squares).for_each(|(d, full)| *d = T::from_f64(full + ridge));
            let form = Form::full(damped.view(), state.weight.view());
            // The last one is plain: it settles at the bottom of the valley.
            let last = self.sweeps.min(1);
            state.descend(&form, (nm, block), self.sweeps - last, self.inertia)?;
            state.descend(&form, (nm, block), last, 0.0)?;
        }
        state.scale_rows(|i| 1.0 / scales[i]);
        Ok(state)
    }
}

/// One product for each weight; B is one operator if there are several.
fn write<T: Real>(group: &[Problem<'_, T>], state: &State<'_, T>, nm: Nm) -> Result<Vec<Operator<T>>> {
    let wrapper = |blocks: &[Array2<T>], dtype| {
        let values = blocks.iter().flat_map(|block| block.iter().copied()).collect();
        let extents = blocks.iter().map(|block| block.dim()).collect();
        BlockDiagonal::rounded(values, extents, dtype).map(Operator::BlockDiagonal)
    };
    let right = wrapper(&state.right, group[0].dtype)?;
    let right = if group.len() > 1 { Operator::Shared(Arc::new(right)) } else { right };
    let (mut first, mut operators) = (0, Vec::with_capacity(group.len()));
    for problem in group {
        let end = first + problem.shape().0;
        let own: Vec<usize> = (0..state.rows.len()).filter(|&p| (first..end).contains(&state.rows[p].start)).collect();
        let blocks: Vec<Array2<T>> = own.iter().map(|&p| state.left[p].clone()).collect();
        let (values, kept) = (state.core.values.slice(s![first..end, ..]), state.core.kept.slice(s![first..end, ..]));
        let core = Operator::NmSparse(NmSparse::gather(nm, values, kept, problem.dtype)?);
        operators.push(Operator::product_of(vec![wrapper(&blocks, problem.dtype)?, core, right.clone()])?);
        first = end;
    }
    Ok(operators)
}

#[cfg(test)]
mod tests;
