//! Columns side by side in vectors.

use ndarray::{ArrayView2, Axis};
use pulp::Simd;

use crate::simd::{LANES, Lanes, transpose};

/// Row i of x is `to[i·vectors..][..vectors]`, with zeros in the lanes beyond x; for columns that are contiguous, as
/// of a transposed batch: by square tiles.
#[inline(always)]
pub(super) fn columns<S: Simd, T: Lanes>(s: S, x: ArrayView2<'_, T>, vectors: usize, to: &mut [T]) {
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
            let mut tile = [T::splat(s, T::zeroed()); LANES];
            for (row, line) in tile.iter_mut().zip(&lines[..lanes]) {
                *row = <T as Lanes>::load(s, line.get(start..end).unwrap_or(&[]));
            }
            transpose::<S, T>(s, &mut tile);
            for (i, &row) in (start..end).zip(&tile) {
                to[i * vectors + v] = row;
            }
        }
    }
}
