//! diag(B₀, B₁, …)·x with the rows of x gathered and the rows of the result scattered on the way.
//!
//! Few vectors: each row of a block times x, as soon as it is read. Many: x is copied, gathered and widened to
//! whole vectors, to a panel with the vectors side by side, and a tile of rows times a tile of lanes is summed
//! in registers. Blocks that do not fit the cache go through the `gemm` crate.

use std::ops::Range;

use half::bf16;
use ndarray::{Array2, ArrayView2};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::operator::permutation::NONE;
use crate::scalar::Real;
use crate::simd::Lanes;
use crate::threads::{self, Pace};

mod panel;
#[cfg(test)]
mod tests;
mod tile;
mod vector;

/// A stored number that a kernel widens as it reads it.
pub(crate) trait Leaf<T: Lanes>: Copy + Send + Sync {
    /// All numbers, widened into the buffer if they are not of the compute type already.
    fn wide<'a>(from: &'a [Self], buffer: &'a mut Vec<T>) -> &'a [T];
}

impl<T: Real> Leaf<T> for T {
    #[inline(always)]
    fn wide<'a>(from: &'a [Self], _: &'a mut Vec<T>) -> &'a [T] {
        from
    }
}

impl<T: Real> Leaf<T> for bf16 {
    #[inline(always)]
    fn wide<'a>(from: &'a [Self], buffer: &'a mut Vec<T>) -> &'a [T] {
        buffer.clear();
        buffer.extend(from.iter().map(|narrow| T::from_bf16(*narrow)));
        buffer
    }
}

/// What is multiplied: diag(B)·G·x, or with Bᵀ for B.
pub(crate) struct Job<'a, T, L> {
    /// The blocks one after the other, each row-major.
    pub(crate) values: &'a [L],
    /// Their (rows, columns).
    pub(crate) extents: &'a [(usize, usize)],
    pub(crate) transposed: bool,
    pub(crate) x: ArrayView2<'a, T>,
    /// Place c of the blocks' input is row `gather[c]` of x, or zero.
    pub(crate) gather: Option<&'a [u32]>,
}

/// Columns `from..` of y ← S·diag(B)·G·x, as many as x has: place o of the blocks' output is row `scatter[o]` of y,
/// or dropped. Rows that nothing is written to stay as they are; y is row-major.
///
/// Runs on the global pool if the product is large, unless called on a rayon worker.
pub(crate) fn block_product<T: Real, L: Leaf<T>>(
    job: &Job<'_, T, L>,
    scatter: Option<&[u32]>,
    y: &mut Array2<T>,
    from: usize,
) {
    block_product_by(Arch::new(), job, scatter, y, from);
}

fn block_product_by<T: Real, L: Leaf<T>>(
    arch: Arch,
    job: &Job<'_, T, L>,
    scatter: Option<&[u32]>,
    y: &mut Array2<T>,
    from: usize,
) {
    let (columns, stride) = (job.x.ncols(), y.ncols());
    let Some(all) = y.as_slice_mut().filter(|all| !all.is_empty() && columns > 0) else { return };
    let blocks = job.blocks();
    let mut out = Output { all, stride, from, columns, first: 0, scatter };
    if blocks.len() < 2 || threads::alone(Pace::FLOATS.time(job.values.len(), columns)) {
        return arch.dispatch(Run { job, blocks: &blocks, out });
    }
    // They cannot write to y, where the rows of one share lie between those of another.
    let parts: Vec<_> = blocks
        .par_chunks(threads::share(blocks.len()))
        .map(|blocks| (blocks, arch.dispatch(Part { job, blocks })))
        .collect();
    for (blocks, part) in parts {
        for (o, numbers) in (blocks[0].output..).zip(part.chunks_exact(columns)) {
            if let Some(row) = out.row(o) {
                row.copy_from_slice(numbers);
            }
        }
    }
}

/// Consecutive blocks and where they are: what they read and write is counted from there.
pub(crate) struct Stretch {
    blocks: Vec<Block>,
    pub(crate) inputs: Range<usize>,
    pub(crate) outputs: Range<usize>,
}

/// All blocks in stretches of at least `length` inputs, but for the last.
pub(crate) fn stretches(extents: &[(usize, usize)], length: usize) -> Vec<Stretch> {
    let (mut all, mut value, mut at) = (Vec::<Stretch>::new(), 0, (0, 0));
    for &(height, width) in extents {
        let last = match all.pop() {
            Some(last) if last.inputs.len() < length => last,
            full => {
                all.extend(full);
                Stretch { blocks: Vec::new(), inputs: at.1..at.1, outputs: at.0..at.0 }
            }
        };
        let Stretch { mut blocks, inputs, outputs } = last;
        blocks.push(Block { value, input: at.1 - inputs.start, output: at.0 - outputs.start, height, width });
        (value, at) = (value + height * width, (at.0 + height, at.1 + width));
        all.push(Stretch { blocks, inputs: inputs.start..at.1, outputs: outputs.start..at.0 });
    }
    all
}

/// A stretch of blocks times x, the rows of its inputs, which may be wider than what is written; on this thread.
pub(crate) fn stretch_product<T: Real, L: Leaf<T>>(
    arch: Arch,
    values: &[L],
    stretch: &Stretch,
    x: ArrayView2<'_, T>,
    out: Output<'_, T>,
) {
    let job = Job { values, extents: &[], transposed: false, x, gather: None };
    arch.dispatch(Run { job: &job, blocks: &stretch.blocks, out });
}

/// Where a block begins, and its extents as stored.
struct Block {
    value: usize,
    input: usize,
    output: usize,
    height: usize,
    width: usize,
}

impl<T: Real, L: Leaf<T>> Job<'_, T, L> {
    fn blocks(&self) -> Vec<Block> {
        let (mut value, mut input, mut output) = (0, 0, 0);
        let each = self.extents.iter().map(|&(height, width)| {
            let block = Block { value, input, output, height, width };
            let (outputs, inputs) = if self.transposed { (width, height) } else { (height, width) };
            (value, input, output) = (value + height * width, input + inputs, output + outputs);
            block
        });
        each.collect()
    }

    /// The rows of x that a block reads: a run of them, or one by one.
    fn sources(&self, first: usize, count: usize) -> Sources<'_> {
        let Some(map) = self.gather.map(|map| &map[first..first + count]) else {
            return Sources::Run { start: first, length: count };
        };
        let start = map.first().filter(|&&start| start != NONE).map_or(0, |&start| start as usize);
        let run =
            map.iter().zip(start..).take_while(|&(&from, expected)| from != NONE && from as usize == expected).count();
        match map[run..].iter().all(|&from| from == NONE) {
            true => Sources::Run { start, length: run },
            false => Sources::Each(map),
        }
    }
}

/// Rows of x that a block reads.
enum Sources<'a> {
    /// Rows `start..start + length`, then zeros.
    Run { start: usize, length: usize },
    /// Any rows, and zeros.
    Each(&'a [u32]),
}

impl Sources<'_> {
    /// The same in a matrix whose first row is row `origin` of x; only runs are read from such.
    fn from(self, origin: usize) -> Self {
        match self {
            Sources::Run { start, length } => Sources::Run { start: start.saturating_sub(origin), length },
            each => each,
        }
    }
}

/// Where the results go: columns `from..from + columns` of rows of `stride` numbers.
pub(crate) struct Output<'a, T> {
    all: &'a mut [T],
    stride: usize,
    from: usize,
    columns: usize,
    /// The place of the output that comes first, if nothing is scattered.
    first: usize,
    scatter: Option<&'a [u32]>,
}

impl<'a, T> Output<'a, T> {
    /// The rows in their order.
    pub(crate) fn new(all: &'a mut [T], stride: usize, from: usize, columns: usize) -> Self {
        Output { all, stride, from, columns, first: 0, scatter: None }
    }

    /// The row of place o, unless it is dropped.
    #[inline(always)]
    fn row(&mut self, o: usize) -> Option<&mut [T]> {
        let row = self.scatter.map_or(o - self.first, |map| map[o] as usize);
        (row != NONE as usize).then(|| &mut self.all[row * self.stride + self.from..][..self.columns])
    }
}

/// Some blocks, compiled for one instruction set.
struct Run<'a, 'b, T, L> {
    job: &'a Job<'b, T, L>,
    blocks: &'a [Block],
    out: Output<'a, T>,
}

impl<T: Real, L: Leaf<T>> WithSimd for Run<'_, '_, T, L> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        match self.job.x.ncols() * 4 < T::lanes::<S>() {
            true => vector::run(s, self.job, self.blocks, self.out),
            false => tile::run(s, self.job, self.blocks, self.out),
        }
    }
}

/// The same into memory of its own, where the rows lie in the order of the blocks' output.
struct Part<'a, 'b, T, L> {
    job: &'a Job<'b, T, L>,
    blocks: &'a [Block],
}

impl<T: Real, L: Leaf<T>> WithSimd for Part<'_, '_, T, L> {
    type Output = Vec<T>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<T> {
        let Part { job, blocks } = self;
        let rows: usize = blocks.iter().map(|block| if job.transposed { block.width } else { block.height }).sum();
        let columns = job.x.ncols();
        let mut all = vec![T::zero(); rows * columns];
        let first = blocks.first().map_or(0, |block| block.output);
        let out = Output { all: &mut all, stride: columns, from: 0, columns, first, scatter: None };
        // The function that serves one thread: not compiled twice.
        s.vectorize(Run { job, blocks, out });
        all
    }
}
