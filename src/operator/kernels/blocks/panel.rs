//! The inputs of a block as a panel: a row for each, the vectors side by side.

use ndarray::{ArrayView1, ArrayView2, Axis};
use pulp::Simd;

use super::super::turn::columns;
use super::{Block, Job, Leaf, NONE, Sources};
use crate::scalar::Real;
use crate::simd::Aligned;

/// x as rows of whole vectors and the row of x that comes first, where that pays: if its columns are contiguous
/// (a batch of tokens) and the blocks read runs of its rows. Otherwise x itself.
#[inline(always)]
pub(super) fn upright<'a, S: Simd, T: Real, L: Leaf<T>>(
    s: S,
    job: &'a Job<'_, T, L>,
    blocks: &[Block],
    memory: &'a mut Aligned<T>,
) -> (ArrayView2<'a, T>, usize) {
    let x = job.x.view();
    let rows = blocks.iter().try_fold((usize::MAX, 0), |(first, end), block| {
        match job.sources(block.input, if job.transposed { block.height } else { block.width }) {
            Sources::Run { length: 0, .. } => Some((first, end)),
            Sources::Run { start, length } => Some((first.min(start), end.max(start + length))),
            Sources::Each(_) => None,
        }
    });
    let sideways = x.strides()[0] == 1 && x.strides()[1] != 1;
    let Some(rows) = rows.map(|(first, end)| first..end).filter(|rows| !rows.is_empty() && sideways) else {
        return (x, 0);
    };
    let vectors = x.ncols().div_ceil(T::lanes::<S>());
    let width = vectors * T::lanes::<S>();
    let to = memory.numbers(rows.len() * width);
    columns(s, x.slice(ndarray::s![rows.clone(), ..]), vectors, to);
    match ArrayView2::from_shape((rows.len(), width), &*to) {
        Ok(turned) => (turned, rows.start),
        Err(_) => (x, 0),
    }
}

/// The numbers of the panel from its first on, if x holds it as it should be: in rows of whole vectors.
#[inline(always)]
pub(super) fn in_place<'a, S: Simd, T: Real>(
    x: &'a ArrayView2<'_, T>,
    sources: &Sources<'_>,
    inputs: usize,
    from: usize,
    width: usize,
) -> Option<&'a [T]> {
    let stride = x.ncols();
    match *sources {
        Sources::Run { start, length }
            if length == inputs && length > 0 && from + width <= stride && stride.is_multiple_of(T::lanes::<S>()) =>
        {
            x.as_slice().map(|all| &all[start * stride + from..(start + length) * stride])
        }
        _ => None,
    }
}

/// Copies columns `from..` of the block's rows of x; row i of the panel is `to[i·vectors..][..vectors]`, with zeros in
/// the lanes beyond x and in the rows that nothing is gathered for.
#[inline(always)]
pub(super) fn fill<S: Simd, T: Real>(
    x: ArrayView2<'_, T>,
    sources: &Sources<'_>,
    from: usize,
    vectors: usize,
    to: &mut [T],
) {
    let row = vectors * T::lanes::<S>();
    let count = row.min(x.ncols() - from);
    let x = x.slice(ndarray::s![.., from..from + count]);
    if count < row {
        to.fill(T::zero());
    }
    match *sources {
        Sources::Run { start, length } => {
            to[length * row..].fill(T::zero());
            for (to, i) in to.chunks_exact_mut(row).zip(start..start + length) {
                copy(x.index_axis(Axis(0), i), &mut to[..count]);
            }
        }
        Sources::Each(map) => {
            for (to, &i) in to.chunks_exact_mut(row).zip(map) {
                match i {
                    NONE => to.fill(T::zero()),
                    i => copy(x.index_axis(Axis(0), i as usize), &mut to[..count]),
                }
            }
        }
    }
}

#[inline(always)]
fn copy<T: Real>(from: ArrayView1<'_, T>, to: &mut [T]) {
    match from.to_slice() {
        Some(from) => to.copy_from_slice(from),
        None => to.iter_mut().zip(from).for_each(|(to, from)| *to = *from),
    }
}
