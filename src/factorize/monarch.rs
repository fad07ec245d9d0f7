//! Monarch matrices: two block-diagonal factors with a permutation between them.
//!
//! The columns of W (m×n) are cut into k chunks of neighbouring inputs, its rows into l groups. Each of the
//! k·l slices gets a rank ρ of its own, U·R, and
//!
//! > Ŵ = P₂ · diag(U of group 0, …, group l−1) · P₁ · diag(R of chunk 0, …, chunk k−1)
//!
//! where row block κ of the right factor holds the R of chunk κ for all groups, and column block λ of the left
//! one the U of group λ for all chunks; P₁ carries one order into the other (Dao et al., ICML 2022, in the general
//! rectangular form). Σρ(s+p) numbers for slices of s×p. With one block it is low rank; at the
//! same size, more blocks reach a higher rank with less freedom.
//!
//! In the plain metric and in diagonal ones the slices are independent, so that truncated SVDs of
//! them are the optimum, error² = Σ over slices of Σ_{i>ρ} σᵢ². A Gram metric couples the chunks: from
//! the optima under its diagonal blocks, block-coordinate descent in the whole metric ([`solve`]).
//!
//! Cost: an eigendecomposition of order min(s, p) for each slice, once more in each sweep, and 2mn² flops for a
//! sweep. Fails to pay where low rank does better at the same bytes, as on most trained weights;
//! what it buys is a product whose blocks fit the cache.

use serde::{Deserialize, Serialize};

use self::layout::{Layout, RankTable};
use self::solve::Slices;
use super::svd::Spectrum;
use super::{Factorize, Forecast, Outline, Problem, Svd, single};
use crate::allocate::{Offer, allocate};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::metric::MetricSpec;
use crate::operator::Operator;
use crate::scalar::{DType, Real};

mod layout;
mod solve;

/// Monarch projection under the problem's metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Monarch {
    /// Chunks of neighbouring inputs, k; they need not divide n. Without it, and without `output_blocks`, the
    /// numbers 1, 2, 4, … are tried for both, 1 being [`Svd`], and the least error in the metric is kept.
    pub input_blocks: Option<usize>,
    /// Groups of outputs, l. One of the two alone stands for both.
    pub output_blocks: Option<usize>,
    /// Which outputs make a group.
    pub groups: Groups,
    /// Ranks of the slices.
    pub ranks: Ranks,
    /// Sweeps of block-coordinate descent under a Gram metric; 0 stays at its diagonal blocks.
    pub sweeps: usize,
}

impl Default for Monarch {
    fn default() -> Self {
        let (groups, ranks) = (Groups::default(), Ranks::default());
        Monarch { input_blocks: None, output_blocks: None, groups, ranks, sweeps: 4 }
    }
}

/// The outputs of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Groups {
    /// Neighbours. As many groups as heads keep each head in one group.
    #[default]
    Contiguous,
    /// Every l-th, as in the paper: one more permutation, and padding if l does not divide m.
    Strided,
}

/// How ranks are given to slices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ranks {
    /// Whichever of the two gives the smaller error before any sweep.
    #[default]
    Auto,
    /// All the same.
    Uniform,
    /// By the pooled spectra of all slices, for a table of two bytes a slice.
    Adaptive,
}

/// Tries of [`Monarch`] without block numbers end after this many without a gain.
const PATIENCE: usize = 2;
/// Steps of the search for the bytes that an error takes.
const BISECTIONS: usize = 16;

impl Monarch {
    /// (k, l) if they are given.
    fn blocks(&self) -> Option<(usize, usize)> {
        let (k, l) = (self.input_blocks, self.output_blocks);
        Some((k.or(l)?, l.or(k)?))
    }

    fn layout(&self, shape: (usize, usize), dtype: DType, (k, l): (usize, usize)) -> Result<Layout> {
        Layout::new(shape, dtype, k, l, self.groups)
    }

    /// The square block numbers worth trying.
    fn tries((m, n): (usize, usize)) -> impl Iterator<Item = (usize, usize)> {
        let most = m.min(n) / 2;
        std::iter::successors(Some(2), |b| Some(b * 2)).take_while(move |&b| b <= most).map(|b| (b, b))
    }

    /// The fewest bytes that these parameters can do with, which is what they are refused below.
    fn least(&self, layout: &Layout) -> u64 {
        let flat = layout.bytes(&layout.flat(1));
        match self.ranks {
            Ranks::Uniform => flat,
            Ranks::Adaptive => layout.lone(),
            Ranks::Auto => flat.min(layout.lone()),
        }
    }

    /// The largest common rank within a limit.
    fn flat_within(layout: &Layout, limit: u64) -> Option<RankTable> {
        let most = layout.heights.iter().chain(&layout.widths).copied().max().unwrap_or(0);
        let within = |rank: usize| layout.bytes(&layout.flat(rank)) <= limit;
        if !within(1) {
            return None;
        }
        let (mut low, mut high) = (1, most + 1);
        while high - low > 1 {
            let middle = usize::midpoint(low, high);
            if within(middle) { low = middle } else { high = middle }
        }
        Some(layout.flat(low))
    }

    /// The ranks of least error by the slices' own spectra within a limit.
    fn ranks_within(
        &self,
        layout: &Layout,
        dtype: DType,
        found: &[Vec<Spectrum<f64>>],
        limit: u64,
    ) -> Result<RankTable> {
        let flat = Self::flat_within(layout, limit).filter(|_| self.ranks != Ranks::Adaptive);
        if self.ranks == Ranks::Uniform || limit < layout.lone() {
            let least = format!("{} bytes", self.least(layout));
            return flat.ok_or_else(|| Error::Budget { asked: format!("{limit} bytes"), least });
        }
        let (k, l) = (layout.widths.len(), layout.heights.len());
        let curves: Vec<_> = (0..l * k)
            .map(|cell| {
                let (group, chunk) = (cell / k, cell % k);
                let price = |rank: usize| dtype.bytes(rank * layout.rank_cost(group, chunk)) as u64;
                Slices::curve(&found[group][chunk], layout.most(group, chunk), price)
            })
            .collect();
        let offers: Vec<_> = curves.iter().map(|curve| Offer { curve, floor: 0 }).collect();
        let chosen = allocate(&offers, limit - layout.overhead())?;
        let error = |ranks: &mut dyn Iterator<Item = usize>| -> f64 {
            curves.iter().zip(ranks).map(|(curve, rank)| curve[rank.min(curve.len() - 1)].error).sum()
        };
        match flat {
            Some(flat) if error(&mut flat.iter().flatten().copied()) <= error(&mut chosen.iter().copied()) => Ok(flat),
            _ => Ok(chosen.chunks(k).map(<[usize]>::to_vec).collect()),
        }
    }

    /// One choice of block numbers, within bytes or at a rank.
    fn solve<T: Real>(&self, problem: &Problem<'_, T>, blocks: (usize, usize), budget: Cut) -> Result<Operator<T>> {
        let layout = self.layout(problem.shape(), problem.dtype, blocks)?;
        let slices = Slices::new(problem, &layout)?;
        let spectra = slices.spectra()?;
        let ranks = match budget {
            Cut::Rank(rank) => layout.flat(rank),
            Cut::Bytes(limit) => self.ranks_within(&layout, problem.dtype, &spectra, limit)?,
        };
        let found = slices.descend(slices.alone(&spectra, &ranks)?, &ranks, self.sweeps)?;
        layout.factors(&slices.unscaled(found))
    }

    /// The best within a number of bytes.
    fn within<T: Real>(&self, problem: &Problem<'_, T>, limit: u64) -> Result<Operator<T>> {
        if limit >= problem.bytes() {
            return Ok(problem.dense()?.remove(0));
        }
        if let Some(blocks) = self.blocks() {
            return self.solve(problem, blocks, Cut::Bytes(limit));
        }
        let low_rank = Problem { budget: Budget::Bytes(limit), ..problem.clone() };
        let mut best = match Svd::default().factorize(std::slice::from_ref(&low_rank)) {
            Ok(mut operators) => Ok((operators.remove(0), f64::INFINITY)),
            Err(refused @ Error::Budget { .. }) => Err(refused),
            Err(other) => return Err(other),
        };
        if let Ok((operator, error)) = &mut best {
            *error = problem.error_of(operator);
        }
        let mut since = 0;
        for blocks in Self::tries(problem.shape()) {
            if self.least(&self.layout(problem.shape(), problem.dtype, blocks)?) > limit {
                continue;
            }
            let operator = self.solve(problem, blocks, Cut::Bytes(limit))?;
            let error = problem.error_of(&operator);
            since = if best.as_ref().is_ok_and(|(_, least)| *least <= error) { since + 1 } else { 0 };
            if since == 0 {
                best = Ok((operator, error));
            } else if since == PATIENCE {
                break;
            }
        }
        best.map(|(operator, _)| operator)
    }

    /// The fewest bytes, to a few parts in ten thousand, whose result stays within a squared error.
    fn up_to<T: Real>(&self, problem: &Problem<'_, T>, limit: f64) -> Result<Operator<T>> {
        let (mut low, mut high) = (0, problem.bytes());
        let mut best = problem.dense()?.remove(0);
        for _ in 0..BISECTIONS {
            let middle = u64::midpoint(low, high);
            match self.within(problem, middle) {
                Ok(operator) if problem.error_of(&operator) <= limit => (best, high) = (operator, middle),
                Ok(_) | Err(Error::Budget { .. }) => low = middle,
                Err(other) => return Err(other),
            }
        }
        Ok(best)
    }
}

/// What a solve is cut at.
#[derive(Debug, Clone, Copy)]
enum Cut {
    Bytes(u64),
    Rank(usize),
}

const NEEDS_BLOCKS: &str = "monarch with a rank budget needs `input-blocks` or `output-blocks`: it is the slices' rank";

impl<T: Real> Factorize<T> for Monarch {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        let problem = single(group, "monarch")?;
        let found = match (problem.budget, problem.budget.byte_limit(problem.bytes())) {
            (_, Some(limit)) => self.within(problem, limit),
            (Budget::Rank(rank), _) => match self.blocks() {
                Some(blocks) => self.solve(problem, blocks, Cut::Rank(rank)),
                None => Err(Error::Unsupported(NEEDS_BLOCKS.into())),
            },
            (budget, _) => {
                let norm = problem.metric.squared(problem.weight, problem.backend);
                self.up_to(problem, budget.error_limit(norm).unwrap_or(0.0))
            }
        };
        Ok(vec![found?])
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        let _ = metric; // All are minimised.
        budget.check()?;
        let &[Outline { shape, dtype }] = group else {
            return Err(Error::Unsupported(format!("monarch compresses one weight at a time, not {}", group.len())));
        };
        let before = group[0].bytes();
        let layout = self.blocks().map(|blocks| self.layout(shape, dtype, blocks)).transpose()?;
        let (bytes, exact) = match (*budget, budget.byte_limit(before), &layout) {
            (_, Some(limit), _) if limit >= before => (before, true),
            (_, Some(limit), Some(layout)) => {
                let least = self.least(layout);
                if limit < least {
                    return Err(Error::Budget {
                        asked: budget.to_string(),
                        least: format!("{least} bytes of {before}"),
                    });
                }
                match Self::flat_within(layout, limit).filter(|_| self.ranks == Ranks::Uniform) {
                    Some(flat) => (layout.bytes(&flat), true),
                    None => (limit, false),
                }
            }
            (_, Some(limit), None) => {
                let low_rank = Factorize::<T>::forecast(&Svd::default(), group, metric, budget);
                let fits = |blocks| Ok::<_, Error>(self.least(&self.layout(shape, dtype, blocks)?) <= limit);
                if low_rank.is_err() && !Self::tries(shape).any(|blocks| fits(blocks).unwrap_or(false)) {
                    return low_rank;
                }
                (limit, false)
            }
            (Budget::Rank(rank), None, Some(layout)) => (layout.bytes(&layout.flat(rank)), true),
            (Budget::Rank(_), None, None) => return Err(Error::Unsupported(NEEDS_BLOCKS.into())),
            (_, None, _) => (before, false),
        };
        let (area, n) = ((shape.0 * shape.1) as u64, shape.1 as u64);
        // W, E, the slices and their spectra in f64; the Gram matrix and the roots of its blocks.
        Ok(Forecast { bytes, exact, memory: 8 * (6 * area + 3 * n * n) })
    }
}

#[cfg(test)]
mod tests;
