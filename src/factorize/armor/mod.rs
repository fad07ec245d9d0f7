//! ARMOR (arXiv:2510.05528): W ≈ A·S·B, a 2:4 core between block-diagonal wrappers.
//!
//! A and B hold dense blocks along their diagonals and cost a few per cent of the weight; S keeps N of every M
//! entries. The default solver is exact block descent without gradients or step sizes:
//!
//! > A ← A − E·G·Zᵀ·(Z·G·Zᵀ)⁻¹ (Z = S·B),  B_q ← B_q − (YᵀY)⁻¹·Yᵀ·(E·G)_q·G_qq⁻¹ (Y = A·S),
//! > S: the best of all masks with its least-squares values, group after group
//!
//! with E = A·S·B − W. No step raises the error. It begins at NoWag-P's mask, first in the metric's diagonal
//! (cheap), then in the full Gram matrix. Columns of A have unit norm. Blocks are as large as the budget allows, a
//! last one may be smaller.
//!
//! Cost: 6mn² flops for each sweep in the Gram metric, and about 4·mn·b for each diagonal one.

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use self::state::{Form, State, parts};
use super::sparse::{fraction, outline, single, squares, too_little};
use super::{Factorize, Forecast, Outline, Problem};
use crate::budget::Budget;
use crate::coder::{Factor, Pattern, Rule, prune, scores};
use crate::error::{Error, Result};
use crate::metric::{InputMetric, MetricSpec, Weighting};
use crate::operator::{BlockDiagonal, Dense, Nm, NmSparse, Operator};
use crate::scalar::{DType, Real};

mod core;
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
    /// What is added to the diagonal of a Gram matrix, as a fraction of its mean.
    pub damping: f64,
}

impl Default for Armor {
    fn default() -> Self {
        Armor { n: 2, m: 4, block: None, overhead: 0.08, diagonal_sweeps: 8, sweeps: 6, damping: 1e-3 }
    }
}

impl<T: Real> Factorize<T> for Armor {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        let problem = single("armor", group)?;
        let nm = self.check()?;
        let outline = Outline { shape: problem.shape(), dtype: problem.dtype };
        let Some(block) = self.choose(&outline, nm, &problem.budget)? else {
            return Ok(vec![Operator::Dense(Dense::rounded(problem.weight.to_owned(), problem.dtype)?)]);
        };
        let solved = self.solve(problem, nm, block).map_err(|e| e.of_tensor(problem.name))?;
        Ok(vec![write(&solved, nm, problem.dtype)?])
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        let outline = outline("armor", group, budget)?;
        let nm = self.check()?;
        let bytes = match self.choose(&outline, nm, budget)? {
            Some(block) => bytes(&outline, nm, block),
            None => outline.bytes(),
        };
        let (m, n) = outline.shape;
        let squares = if metric.input == InputMetric::Gram { 5 * n * n } else { 0 };
        Ok(Forecast { bytes, exact: true, memory: 8 * (8 * m * n + squares) as u64 })
    }
}

/// Bytes of the three factors with blocks of (rows, columns).
fn bytes(outline: &Outline, nm: Nm, block: usize) -> u64 {
    let ((m, n), dtype) = (outline.shape, outline.dtype);
    let wrapper = |len| {
        let extents: Vec<_> = parts(len, block).into_iter().map(|part| (part.len(), part.len())).collect();
        BlockDiagonal::<f32>::bytes_of(&extents, dtype)
    };
    wrapper(m) + wrapper(n) + (dtype.bytes(m * nm.values_per_row(n)) + m * nm.position_bytes(n)) as u64
}

impl Armor {
    fn check(&self) -> Result<Nm> {
        fraction("damping", self.damping)?;
        fraction("overhead", self.overhead)?;
        if self.block == Some(0) {
            return Err(Error::Unsupported("block = 0: expected at least 1".into()));
        }
        Nm::new(self.n, self.m)
    }

    /// The size of the blocks; `None` if the weight may stay as it is.
    fn choose(&self, outline: &Outline, nm: Nm, budget: &Budget) -> Result<Option<usize>> {
        let ((m, n), before) = (outline.shape, outline.bytes());
        let Some(limit) = budget.byte_limit(before) else {
            return Err(Error::Unsupported(format!("armor solves for bytes, not for {budget}: use keep or bytes")));
        };
        if limit >= before {
            return Ok(None);
        }
        let fits = |&block: &usize| bytes(outline, nm, block) <= limit;
        let found = match self.block {
            Some(block) => Some(block).filter(fits),
            None => {
                let cheap = |&block: &usize| (block * (m + n)) as f64 <= self.overhead * (m * n) as f64;
                let sizes = (1..=m.max(n) / nm.m()).rev().map(|k| k * nm.m());
                sizes.filter(|block| cheap(block) || *block == nm.m()).find(fits)
            }
        };
        let least = bytes(outline, nm, self.block.unwrap_or(nm.m()));
        found.map(Some).ok_or_else(|| too_little(budget, least.min(before), before))
    }

    fn solve<'a, T: Real>(&self, problem: &Problem<'a, T>, nm: Nm, block: usize) -> Result<State<'a, T>> {
        let squares = squares(problem);
        let pattern = Pattern::Groups(nm);
        let score = scores(Rule::Nowag, problem.weight, squares.view());
        let start = prune(problem.weight, score.view(), pattern, 0);
        let mut state = State::new(problem.weight, start, (block, block), problem.backend);
        let narrow = squares.mapv(T::from_f64);
        self.sweep(&mut state, &Form::Diagonal(narrow.view()), nm, block, self.diagonal_sweeps, problem)?;
        if let Weighting::Gram(gram) = &problem.metric.input {
            let damping = Factor::<T>::new(gram.matrix(), self.damping, problem.backend)?.damping();
            let ridge = damping * squares.sum() / squares.len().max(1) as f64;
            let mut damped = gram.matrix().mapv(T::from_f64);
            damped.diag_mut().iter_mut().zip(&squares).for_each(|(d, full)| *d = T::from_f64(full + ridge));
            self.sweep(&mut state, &Form::Full(damped.view()), nm, block, self.sweeps, problem)?;
        }
        Ok(state)
    }

    fn sweep<T: Real>(
        &self,
        state: &mut State<'_, T>,
        form: &Form<'_, T>,
        nm: Nm,
        block: usize,
        sweeps: usize,
        problem: &Problem<'_, T>,
    ) -> Result<()> {
        for _ in 0..sweeps {
            state.refresh();
            state.step_left(form)?;
            state.step_right(form)?;
            state.step_core(form, nm, block, problem.backend);
        }
        Ok(())
    }
}

fn write<T: Real>(state: &State<'_, T>, nm: Nm, dtype: DType) -> Result<Operator<T>> {
    let wrapper = |blocks: &[Array2<T>]| {
        let values = blocks.iter().flat_map(|block| block.iter().copied()).collect();
        let extents = blocks.iter().map(|block| block.dim()).collect();
        BlockDiagonal::rounded(values, extents, dtype).map(Operator::BlockDiagonal)
    };
    let core = NmSparse::gather(nm, state.core.values.view(), state.core.kept.view(), dtype)?;
    Operator::product_of(vec![wrapper(&state.left)?, Operator::NmSparse(core), wrapper(&state.right)?])
}

#[cfg(test)]
mod tests;
