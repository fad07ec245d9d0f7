//! Copying the inputs of a block to a panel: a row for each, the vectors side by side.

use ndarray::Axis;
use pulp::Simd;

use super::{Job, NONE, Sources};
use crate::scalar::Real;
use crate::simd::{LANES, transpose};

/// Copies columns `from..from + count` of the block's rows of x; row i of the panel is `to[i·vectors..][..vectors]`,
/// with zeros in the lanes beyond `count` and in the rows that nothing is gathered for.
#[inline(always)]
pub(super) fn fill<S: Simd, T: Real, L>(
    s: S,
    job: &Job<'_, T, L>,
    sources: &Sources<'_>,
    (from, count): (usize, usize),
    vectors: usize,
    to: &mut [T],
) {
    let row = vectors * T::lanes::<S>();
    let x = job.x.slice(ndarray::s![.., from..from + count]);
    if count < row {
        to.fill(T::zero());
    }
    match *sources {
        Sources::Run { start, length } => {
            to[length * row..].fill(T::zero());
            if x.strides()[0] == 1 && x.strides()[1] != 1 {
                return columns(s, x.slice(ndarray::s![start..start + length, ..]), vectors, to);
            }
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
fn copy<T: Real>(from: ndarray::ArrayView1<'_, T>, to: &mut [T]) {
    match from.to_slice() {
        Some(from) => to.copy_from_slice(from),
        None => to.iter_mut().zip(from).for_each(|(to, from)| *to = *from),
    }
}

/// Columns that are contiguous, as of a transposed batch: by square tiles.
#[inline(always)]
fn columns<S: Simd, T: Real>(s: S, x: ndarray::ArrayView2<'_, T>, vectors: usize, to: &mut [T]) {
    let lanes = T::lanes::<S>();
    let (to, _) = T::vectors_mut::<S>(to);
    let length = x.nrows();
    for (v, group) in x.axis_chunks_iter(Axis(1), lanes).enumerate() {
        let mut lines: [&[T]; LANES] = [&[]; LANES];
        for (line, column) in lines.iter_mut().zip(group.columns()) {
            *line = column.to_slice().unwrap_or(&[]);
        }
        for start in (0..length).step_by(lanes) {
            let end = length.min(start + lanes);
            let mut tile = [T::splat(s, T::zero()); LANES];
            for (row, line) in tile.iter_mut().zip(&lines[..lanes]) {
                *row = <T as crate::simd::Lanes>::load(s, line.get(start..end).unwrap_or(&[]));
            }
            transpose::<S, T>(s, &mut tile);
            for (i, &row) in (start..end).zip(&tile) {
                to[i * vectors + v] = row;
            }
        }
    }
}
