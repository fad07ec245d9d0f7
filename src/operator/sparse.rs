//! What the products of the sparse nodes have in common. The place where faster kernels go.

use ndarray::{Array2, ArrayView1};
use rayon::prelude::*;

use crate::scalar::Real;

/// Below this many multiply-adds a product runs on one thread.
const PARALLEL_FROM: usize = 1 << 20;

/// An m×b matrix, row by row: `row(i, y)` adds to row i, which starts at zero. `stored` values times b
/// decide whether rows are worth several threads; on a rayon worker they never are.
pub(super) fn each_row<T: Real>(m: usize, b: usize, stored: usize, row: impl Fn(usize, &mut [T]) + Sync) -> Array2<T> {
    let mut y = vec![T::zero(); m * b];
    if b > 0 {
        if stored * b < PARALLEL_FROM || rayon::current_thread_index().is_some() {
            y.chunks_mut(b).enumerate().for_each(|(i, y)| row(i, y));
        } else {
            y.par_chunks_mut(b).enumerate().for_each(|(i, y)| row(i, y));
        }
    }
    Array2::from_shape_vec((m, b), y).unwrap_or_default()
}

/// Calls for each of some panels of rows, with its number; `work` multiply-adds decide about threads.
pub(super) fn each_panel<T: Send, I>(panels: I, work: usize, call: impl Fn((usize, T)) + Sync + Send)
where
    I: ExactSizeIterator<Item = T> + Send,
{
    let panels: Vec<_> = panels.enumerate().collect();
    if work < PARALLEL_FROM || rayon::current_thread_index().is_some() {
        panels.into_iter().for_each(call);
    } else {
        panels.into_par_iter().for_each(call);
    }
}

/// y += value·x.
#[inline]
pub(super) fn accumulate<T: Real>(y: &mut [T], value: T, x: ArrayView1<'_, T>) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += value * x);
}
