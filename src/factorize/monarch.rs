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
use self::rank_one::rank_one;
use self::solve::{Slices, by_energy};
use super::svd::Spectrum;
use super::{Factorize, Forecast, Form, Outline, Problem, Svd, single};
use crate::allocate::{Offer, allocate};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::metric::MetricSpec;
use crate::operator::Operator;
use crate::scalar::{DType, Real};

mod layout;
mod rank_one;
mod search;
mod solve;

/// Monarch projection under the problem's metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Monarch {
    /// Chunks of inputs, k; they need not divide n. Without it, and without `output_blocks`, 1×1 (which is
    /// [`Svd`]), 2×1, 3×1, 4×1, … and 2×2, 4×4, 8×8, … are tried, and the least error in the metric is kept.
    pub input_blocks: Option<usize>,
    /// Groups of outputs, l. One of the two alone stands for both.
    pub output_blocks: Option<usize>,
    /// Which inputs make a chunk. Without it neighbours do, and if block numbers are tried, both ways are.
    pub chunks: Option<Chunks>,
    /// Which outputs make a group.
    pub groups: Groups,
    /// Ranks of the slices.
    pub ranks: Ranks,
    /// How slices are stored: two factors each, ρ(s+p) numbers, in two block-diagonal matrices; or pivot rows and
    /// coefficients, ρ(s+p−ρ), as a sum over chunks (contiguous groups only). Without it, whichever gives
    /// the smaller error before any sweep, pivots for 16 chunks at most.
    pub form: Option<Form>,
    /// Sweeps of block-coordinate descent under a Gram metric; 0 stays at its diagonal blocks.
    pub sweeps: usize,
}

impl Default for Monarch {
    fn default() -> Self {
        let (groups, ranks) = (Groups::default(), Ranks::default());
        Monarch { input_blocks: None, output_blocks: None, chunks: None, groups, ranks, form: None, sweeps: 4 }
    }
}

/// The inputs of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Chunks {
    /// Neighbours.
    #[default]
    Contiguous,
    /// Those of a like share in the squared metric norm of W: the first chunk takes the largest. Pivot storage
    /// names the inputs of each chunk anyway; two factors need a list of 2n or 4n bytes for it.
    Energy,
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

/// Pivots are stored as a sum over chunks; more terms than this are no longer fast.
const MOST_TERMS: usize = 16;

impl Monarch {
    /// (k, l) if they are given.
    fn blocks(&self) -> Option<(usize, usize)> {
        let (k, l) = (self.input_blocks, self.output_blocks);
        Some((k.or(l)?, l.or(k)?))
    }

    /// The layout of each form that may be chosen; `energy` gives the order of the inputs by their energy.
    fn layouts(&self, shape: (usize, usize), dtype: DType, energy: impl Fn() -> Vec<usize>) -> Result<Vec<Layout>> {
        let blocks @ (k, _) = self.blocks().ok_or_else(|| Error::Unsupported(NEEDS_BLOCKS.into()))?;
        let forms = match self.form {
            Some(form) => vec![form],
            None if self.groups == Groups::Contiguous && k <= MOST_TERMS => vec![Form::Factors, Form::Pivot],
            None => vec![Form::Factors],
        };
        let order = (self.chunks == Some(Chunks::Energy) && k > 1).then(energy);
        let layout = |form| {
            let layout = Layout::new(shape, dtype, blocks, self.groups, form)?;
            Ok(order.iter().cloned().fold(layout, Layout::dealt))
        };
        forms.into_iter().map(layout).collect()
    }

    /// The layouts as far as a plan can know them.
    fn outlines(&self, Outline { shape, dtype }: Outline) -> Result<Vec<Layout>> {
        self.layouts(shape, dtype, || (0..shape.1).collect())
    }

    /// The fewest bytes that these parameters can do with, which is what they are refused below.
    fn least(&self, layouts: &[Layout]) -> u64 {
        let of = |layout: &Layout| match self.ranks {
            Ranks::Uniform => layout.bytes(&layout.flat(1)),
            Ranks::Adaptive => layout.lone(),
            Ranks::Auto => layout.bytes(&layout.flat(1)).min(layout.lone()),
        };
        layouts.iter().map(of).min().unwrap_or(u64::MAX)
    }

    /// The layout of the fewest bytes for a common rank.
    fn cheapest(layouts: &[Layout], rank: usize) -> Option<&Layout> {
        layouts.iter().min_by_key(|layout| layout.bytes(&layout.flat(rank)))
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

    /// The ranks of least error by the slices' own spectra within a limit, and that error; none if nothing fits.
    fn ranks_within(
        &self,
        layout: &Layout,
        dtype: DType,
        found: &[Vec<Spectrum<f64>>],
        limit: u64,
    ) -> Result<Option<(RankTable, f64)>> {
        let k = layout.widths.len();
        let curves: Vec<_> = (0..layout.heights.len() * k)
            .map(|cell| {
                let (group, chunk) = (cell / k, cell % k);
                let price = |rank: usize| dtype.bytes(layout.numbers(group, chunk, rank)) as u64;
                Slices::curve(&found[group][chunk], layout.most(group, chunk), price)
            })
            .collect();
        let with_error = |ranks: RankTable| {
            let points = curves.iter().zip(ranks.iter().flatten());
            let error = points.map(|(curve, &rank)| curve[rank.min(curve.len() - 1)].error).sum();
            (ranks, error)
        };
        let flat = Self::flat_within(layout, limit).filter(|_| self.ranks != Ranks::Adaptive).map(with_error);
        if self.ranks == Ranks::Uniform || limit < layout.lone() {
            return Ok(flat);
        }
        let offers: Vec<_> = curves.iter().map(|curve| Offer { curve, floor: 0 }).collect();
        let chosen = allocate(&offers, limit - layout.overhead())?;
        let adaptive = with_error(chosen.chunks(k).map(<[usize]>::to_vec).collect());
        Ok(Some(match flat {
            Some(flat) if flat.1 <= adaptive.1 => flat,
            _ => adaptive,
        }))
    }

    /// One choice of block numbers, within bytes or at a rank.
    fn solve<T: Real>(&self, problem: &Problem<'_, T>, cut: Cut) -> Result<Operator<T>> {
        let layouts = self.layouts(problem.shape(), problem.dtype, || by_energy(problem))?;
        if let (Cut::Rank(1), Some(layout)) = (cut, Self::cheapest(&layouts, 1))
            && let Some(slices) = rank_one(problem, layout)?
        {
            return layout.operator(&slices, problem.backend);
        }
        // The slices are the same in all layouts.
        let slices = Slices::new(problem, &layouts[0])?;
        let spectra = slices.spectra()?;
        let mut best: Option<(&Layout, RankTable, f64)> = None;
        match cut {
            Cut::Rank(rank) => best = Self::cheapest(&layouts, rank).map(|layout| (layout, layout.flat(rank), 0.0)),
            Cut::Bytes(limit) => {
                for layout in &layouts {
                    let found = self.ranks_within(layout, problem.dtype, &spectra, limit)?;
                    if let Some((ranks, error)) = found.filter(|f| best.as_ref().is_none_or(|b| f.1 < b.2)) {
                        best = Some((layout, ranks, error));
                    }
                }
            }
        }
        let Some((layout, ranks, _)) = best else {
            let least = format!("{} bytes of {}", self.least(&layouts), problem.bytes());
            return Err(Error::Budget { asked: problem.budget.to_string(), least });
        };
        let found = slices.descend(slices.alone(&spectra, &ranks)?, &ranks, self.sweeps)?;
        layout.operator(&slices.unscaled(found), problem.backend)
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
            (Budget::Rank(rank), _) => self.solve(problem, Cut::Rank(rank)),
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
        let &[Outline { shape, .. }] = group else {
            return Err(Error::Unsupported(format!("monarch compresses one weight at a time, not {}", group.len())));
        };
        let before = group[0].bytes();
        let layouts = self.blocks().map(|_| self.outlines(group[0])).transpose()?;
        let (bytes, exact) = match (*budget, budget.byte_limit(before), &layouts) {
            (_, Some(limit), _) if limit >= before => (before, true),
            (_, Some(limit), Some(layouts)) => {
                let least = self.least(layouts);
                if limit < least {
                    return Err(Error::Budget {
                        asked: budget.to_string(),
                        least: format!("{least} bytes of {before}"),
                    });
                }
                match (&layouts[..], self.ranks) {
                    ([layout], Ranks::Uniform) => match Self::flat_within(layout, limit) {
                        Some(flat) => (layout.bytes(&flat), true),
                        None => (limit, false),
                    },
                    _ => (limit, false),
                }
            }
            (_, Some(limit), None) => {
                let low_rank = Factorize::<T>::forecast(&Svd::default(), group, metric, budget);
                let fits = |one: &Monarch| one.outlines(group[0]).is_ok_and(|layouts| one.least(&layouts) <= limit);
                if low_rank.is_err() && !self.families(shape).iter().flatten().any(fits) {
                    return low_rank;
                }
                (limit, false)
            }
            (Budget::Rank(rank), None, Some(layouts)) => {
                (Self::cheapest(layouts, rank).map_or(before, |layout| layout.bytes(&layout.flat(rank))), true)
            }
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
