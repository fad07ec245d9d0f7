//! Where the slices of a Monarch matrix lie, what they cost, and the operator they make.

use ndarray::Array2;

use super::Groups;
use crate::error::{Error, Result};
use crate::factorize::Form;
use crate::factorize::pivot::interpolate;
use crate::linalg::{Backend, Transform};
use crate::operator::{Basis, BlockDiagonal, Dense, IndexSet, Interpolative, Operator, Permutation, Runs, Side};
use crate::scalar::{DType, Real};

/// k chunks of neighbouring inputs × l groups of outputs.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    shape: (usize, usize),
    dtype: DType,
    groups: Groups,
    form: Form,
    /// The inputs in the order of the chunks, ascending in each, unless they are neighbours.
    pub(super) inputs: Option<Vec<usize>>,
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
    /// [`Error::Unsupported`] for more chunks than inputs or more groups than outputs, or pivots in strided groups.
    pub(super) fn new(
        (m, n): (usize, usize),
        dtype: DType,
        (k, l): (usize, usize),
        groups: Groups,
        form: Form,
    ) -> Result<Self> {
        if form == Form::Pivot && groups == Groups::Strided {
            return Err(Error::Unsupported("monarch stores pivots of contiguous groups only".into()));
        }
        for (what, blocks, len) in [("input", k, n), ("output", l, m)] {
            if blocks == 0 || blocks > len {
                return Err(Error::Unsupported(format!(
                    "{blocks} {what} blocks for {len} {what}s: expected 1 to {len}"
                )));
            }
        }
        let even = |len: usize, parts: usize| (0..parts).map(|i| len / parts + usize::from(i < len % parts)).collect();
        let (widths, heights) = (even(n, k), even(m, l));
        Ok(Layout { shape: (m, n), dtype, groups, form, inputs: None, widths, heights })
    }

    /// The same with the inputs dealt to the chunks in this order: the first chunk takes the first ones.
    pub(super) fn dealt(mut self, mut order: Vec<usize>) -> Self {
        let mut rest = &mut order[..];
        for &width in &self.widths {
            let (chunk, others) = rest.split_at_mut(width);
            chunk.sort_unstable();
            rest = others;
        }
        self.inputs = Some(order);
        self
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

    /// Numbers that a slice of this rank takes.
    pub(super) fn numbers(&self, group: usize, chunk: usize, rank: usize) -> usize {
        let both = self.stored_height(group) + self.widths[chunk];
        rank * if self.form == Form::Pivot { both - rank } else { both }
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

    /// Bytes on disk with these ranks.
    pub(super) fn bytes(&self, ranks: &RankTable) -> u64 {
        let blocks = |extents: &[(usize, usize)]| BlockDiagonal::<f64>::bytes_of(extents, self.dtype);
        let (k, l) = (self.widths.len(), self.heights.len());
        match self.form {
            Form::Factors => {
                let moves = k > 1 && l > 1 && uniform(ranks).is_none_or(|rank| rank == 0);
                let table = if moves { 2 * k * l } else { 0 };
                self.extents(ranks).iter().map(|extents| blocks(extents)).sum::<u64>() + table as u64 + self.dealing()
            }
            Form::Pivot => (0..k)
                .map(|chunk| {
                    let of_chunk: Vec<usize> = ranks.iter().map(|group| group[chunk]).collect();
                    let rest: Vec<_> = self.heights.iter().zip(&of_chunk).map(|(s, rank)| (s - rank, *rank)).collect();
                    let (rank, width) = (of_chunk.iter().sum(), self.widths[chunk]);
                    let select = if k > 1 { IndexSet::bytes_of(self.shape.1, width) } else { 0 };
                    let values = self.dtype.bytes(rank * width) as u64;
                    IndexSet::bytes_of(self.shape.0, rank) + blocks(&rest) + values + select
                })
                .sum(),
        }
    }

    /// The same rank everywhere, but for slices that have no such rank.
    pub(super) fn flat(&self, rank: usize) -> RankTable {
        let row = |group| (0..self.widths.len()).map(|chunk| rank.min(self.most(group, chunk))).collect();
        (0..self.heights.len()).map(row).collect()
    }

    /// The most that it can take beyond the values, whatever the ranks.
    pub(super) fn overhead(&self) -> u64 {
        let (k, l) = (self.widths.len() as u64, self.heights.len() as u64);
        match self.form {
            Form::Factors => 8 * (k + l) + if k > 1 && l > 1 { 2 * k * l } else { 0 } + self.dealing(),
            Form::Pivot => {
                let select = self.widths.iter().map(|&width| IndexSet::bytes_of(self.shape.1, width)).sum::<u64>();
                // A set takes a bit for each of its places at most.
                k * ((self.shape.0 as u64).div_ceil(8) + 8 * l) + if k > 1 { select } else { 0 }
            }
        }
    }

    /// Bytes of the permutation of the inputs that two factors need.
    fn dealing(&self) -> u64 {
        let n = self.shape.1;
        if self.inputs.is_some() { Permutation::list_width(n) * n as u64 } else { 0 }
    }

    /// Bytes of the cheapest matrix that is not zero, with a table of ranks: one slice of rank 1.
    pub(super) fn lone(&self) -> u64 {
        let slices = (0..self.heights.len()).flat_map(|group| (0..self.widths.len()).map(move |chunk| (group, chunk)));
        let least = slices.map(|(group, chunk)| self.numbers(group, chunk, 1)).min().unwrap_or(0);
        self.overhead() + self.dtype.bytes(least) as u64
    }

    /// The operator of slices `slices[λ][κ]` (in the order of the groups).
    pub(super) fn operator<T: Real>(&self, slices: &[Vec<Slice>], backend: &dyn Backend) -> Result<Operator<T>> {
        match self.form {
            Form::Factors => self.factors(slices),
            Form::Pivot => self.pivots(slices, backend),
        }
    }

    /// Each chunk of W as X·R, where R holds the pivot rows of its slices and X is the identity there; the
    /// coefficients of X in the other rows are a block for each group.
    fn pivots<T: Real>(&self, slices: &[Vec<Slice>], backend: &dyn Backend) -> Result<Operator<T>> {
        let kernels = f64::kernels(backend);
        let rounded = |values: &[f64]| values.iter().map(|&v| T::from_f64(v)).collect::<Vec<T>>();
        let (k, (m, n)) = (self.widths.len(), self.shape);
        let (mut terms, mut from) = (Vec::with_capacity(k), 0);
        for (chunk, &width) in self.widths.iter().enumerate() {
            let (mut pivots, mut rows, mut values, mut extents) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            let mut first = 0;
            for (row, &height) in slices.iter().zip(&self.heights) {
                let Slice { left, right } = &row[chunk];
                let (chosen, t) = match left.ncols() {
                    0 => (IndexSet::new(height, Vec::new())?, Array2::zeros((0, height))),
                    // An orthonormal basis keeps the coefficients accurate, and is one where columns are zero.
                    _ => interpolate(kernels.orthonormalize(left.view()).t(), backend)?,
                };
                for pivot in chosen.chosen() {
                    pivots.push((first + pivot) as u32);
                    rows.extend(rounded(&right.t().dot(&left.row(pivot)).to_vec()));
                }
                values.extend(rounded(&t.t().iter().copied().collect::<Vec<_>>()));
                extents.push((height - chosen.count(), chosen.count()));
                first += height;
            }
            let (set, count) = (IndexSet::new(m, pivots)?, rows.len() / width);
            let coefficients = BlockDiagonal::rounded(values, extents, self.dtype)?;
            let rows =
                Array2::from_shape_vec((count, width), rows).map_err(|e| Error::shape("pivot rows", e.to_string()))?;
            let mut product = vec![
                Operator::Interpolative(Interpolative::new(Side::Left, set, coefficients)?),
                Operator::Dense(Dense::rounded(rows, self.dtype)?),
            ];
            if k > 1 {
                let inputs = IndexSet::new(
                    n,
                    (from..from + width).map(|i| self.inputs.as_ref().map_or(i, |inputs| inputs[i]) as u32).collect(),
                )?;
                product.push(Operator::Basis(Basis::new(Transform::Identity, Side::Right, inputs)?));
            }
            from += width;
            terms.push(Operator::product_of(product)?);
        }
        if k == 1 { Ok(terms.remove(0)) } else { Operator::sum_of(terms) }
    }

    /// The two block-diagonal factors.
    fn factors<T: Real>(&self, slices: &[Vec<Slice>]) -> Result<Operator<T>> {
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
        if let Some(inputs) = &self.inputs {
            let list = inputs.iter().map(|&input| input as u32).collect();
            product.push(Operator::Permutation(Permutation::list(self.shape.1, list)?));
        }
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
