//! Where the slices of a Monarch matrix lie, what they cost, and the operator they make.

use ndarray::Array2;

use super::Groups;
use crate::error::{Error, Result};
use crate::operator::{BlockDiagonal, Operator, Permutation, Runs};
use crate::scalar::{DType, Real};

/// k chunks of neighbouring inputs × l groups of outputs.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    shape: (usize, usize),
    dtype: DType,
    groups: Groups,
    /// Inputs of each chunk; they differ by one at most.
    pub(super) widths: Vec<usize>,
    /// Outputs of each group.
    pub(super) heights: Vec<usize>,
}

/// Rank of each slice: `ranks[λ][κ]`.
pub(super) type RankTable = Vec<Vec<usize>>;

/// A slice as U·R: s×ρ and ρ×p.
#[derive(Debug, Clone)]
pub(super) struct Slice {
    pub(super) left: Array2<f64>,
    pub(super) right: Array2<f64>,
}

impl Layout {
    /// # Errors
    /// [`Error::Unsupported`] for more chunks than inputs or more groups than outputs.
    pub(super) fn new((m, n): (usize, usize), dtype: DType, k: usize, l: usize, groups: Groups) -> Result<Self> {
        for (what, blocks, len) in [("input", k, n), ("output", l, m)] {
            if blocks == 0 || blocks > len {
                return Err(Error::Unsupported(format!(
                    "{blocks} {what} blocks for {len} {what}s: expected 1 to {len}"
                )));
            }
        }
        let even = |len: usize, parts: usize| (0..parts).map(|i| len / parts + usize::from(i < len % parts)).collect();
        Ok(Layout { shape: (m, n), dtype, groups, widths: even(n, k), heights: even(m, l) })
    }

    /// The rows of W in the order of the groups.
    pub(super) fn rows(&self) -> Vec<usize> {
        match self.groups {
            Groups::Contiguous => (0..self.shape.0).collect(),
            Groups::Strided => {
                let l = self.heights.len();
                (0..l).flat_map(|group| (group..self.shape.0).step_by(l)).collect()
            }
        }
    }

    /// Rows that group λ stores: strided groups are padded to one height, which is what a stride takes.
    fn stored_height(&self, group: usize) -> usize {
        match self.groups {
            Groups::Contiguous => self.heights[group],
            Groups::Strided => self.heights[0],
        }
    }

    /// Numbers that one more rank of a slice takes.
    pub(super) fn rank_cost(&self, group: usize, chunk: usize) -> usize {
        self.stored_height(group) + self.widths[chunk]
    }

    /// The largest rank of a slice that is worth storing.
    pub(super) fn most(&self, group: usize, chunk: usize) -> usize {
        self.heights[group].min(self.widths[chunk]).min(u16::MAX.into())
    }

    fn extents(&self, ranks: &RankTable) -> [Vec<(usize, usize)>; 2] {
        let inner = self.widths.iter().enumerate();
        let first = inner.map(|(chunk, &width)| (ranks.iter().map(|group| group[chunk]).sum(), width));
        let outer = ranks.iter().enumerate();
        let second = outer.map(|(group, ranks)| (self.stored_height(group), ranks.iter().sum()));
        [first.collect(), second.collect()]
    }

    /// The permutation between the factors, unless it moves nothing.
    fn middle(&self, ranks: &RankTable) -> Result<Option<Permutation>> {
        let (k, l) = (self.widths.len(), self.heights.len());
        if k == 1 || l == 1 {
            return Ok(None);
        }
        let runs = match uniform(ranks) {
            Some(rank) if rank > 0 => Runs::Uniform(rank),
            _ => Runs::Table((0..k).flat_map(|chunk| ranks.iter().map(move |group| group[chunk] as u16)).collect()),
        };
        let total = ranks.iter().flatten().sum();
        Permutation::grid((total, total), k, l, runs).map(Some)
    }

    /// Bytes on disk of two block-diagonal factors with these ranks.
    pub(super) fn bytes(&self, ranks: &RankTable) -> u64 {
        let blocks = self.extents(ranks).iter().map(|e| BlockDiagonal::<f64>::bytes_of(e, self.dtype)).sum::<u64>();
        let cells = self.widths.len() * self.heights.len();
        let moves = self.widths.len() > 1 && self.heights.len() > 1;
        let table = moves && uniform(ranks).is_none_or(|rank| rank == 0);
        blocks + if table { 2 * cells as u64 } else { 0 }
    }

    /// The same rank everywhere, but for slices that have no such rank.
    pub(super) fn flat(&self, rank: usize) -> RankTable {
        let row = |group| (0..self.widths.len()).map(|chunk| rank.min(self.most(group, chunk))).collect();
        (0..self.heights.len()).map(row).collect()
    }

    /// Bytes beyond the values, whatever the ranks.
    pub(super) fn overhead(&self) -> u64 {
        let (k, l) = (self.widths.len() as u64, self.heights.len() as u64);
        8 * (k + l) + if k > 1 && l > 1 { 2 * k * l } else { 0 }
    }

    /// Bytes of the cheapest matrix that is not zero, with a table of ranks: one slice of rank 1.
    pub(super) fn lone(&self) -> u64 {
        let slices = (0..self.heights.len()).flat_map(|group| (0..self.widths.len()).map(move |chunk| (group, chunk)));
        let least = slices.map(|(group, chunk)| self.rank_cost(group, chunk)).min().unwrap_or(0);
        self.overhead() + self.dtype.bytes(least) as u64
    }

    /// The two block-diagonal factors of slices `slices[λ][κ]` (in the order of the groups).
    pub(super) fn factors<T: Real>(&self, slices: &[Vec<Slice>]) -> Result<Operator<T>> {
        let ranks: RankTable = slices.iter().map(|row| row.iter().map(|s| s.right.nrows()).collect()).collect();
        let [first, second] = self.extents(&ranks);
        let mut inner = Vec::with_capacity(first.iter().map(|(r, c)| r * c).sum());
        for chunk in 0..self.widths.len() {
            for row in slices {
                inner.extend(row[chunk].right.iter().map(|&v| T::from_f64(v)));
            }
        }
        let mut outer = Vec::with_capacity(second.iter().map(|(r, c)| r * c).sum());
        for (group, row) in slices.iter().enumerate() {
            for i in 0..self.stored_height(group) {
                for slice in row {
                    match i < self.heights[group] {
                        true => outer.extend(slice.left.row(i).iter().map(|&v| T::from_f64(v))),
                        false => outer.extend(std::iter::repeat_n(T::zero(), slice.left.ncols())),
                    }
                }
            }
        }
        let blocks = |values, extents| BlockDiagonal::rounded(values, extents, self.dtype).map(Operator::BlockDiagonal);
        let mut product = Vec::from_iter(self.outward()?);
        product.push(blocks(outer, second)?);
        product.extend(self.middle(&ranks)?.map(Operator::Permutation));
        product.push(blocks(inner, first)?);
        Operator::product_of(product)
    }

    /// From the order of the groups to that of the outputs.
    fn outward<T: Real>(&self) -> Result<Option<Operator<T>>> {
        let l = self.heights.len();
        if self.groups == Groups::Contiguous || l == 1 {
            return Ok(None);
        }
        let total = l * self.heights[0];
        let order = Permutation::grid((self.shape.0, total), l, self.heights[0], Runs::Uniform(1))?;
        Ok(Some(Operator::Permutation(order)))
    }
}

/// The rank of all slices, if it is one.
fn uniform(ranks: &RankTable) -> Option<usize> {
    let first = *ranks.first()?.first()?;
    ranks.iter().flatten().all(|&rank| rank == first).then_some(first)
}
