//! What the products of leaves have in common that are no plain matrices in memory.

use std::ops::Range;

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

use crate::linalg::matmul_into;
use crate::scalar::Real;
use crate::threads::{Pace, alone};

/// An m×b matrix, row by row: `row(i, y)` adds to row i, which starts at zero. `stored` floats decide about threads.
pub(super) fn each_row<T: Real>(m: usize, b: usize, stored: usize, row: impl Fn(usize, &mut [T]) + Sync) -> Array2<T> {
    some_rows(m, b, 1, Pace::FLOATS.time(stored, b), row)
}

/// The same for some rows `together`, of which the first is number i; at the end there may be fewer. The time on one thread
/// decides about others.
pub(super) fn some_rows<T: Real>(
    m: usize,
    b: usize,
    together: usize,
    nanoseconds: usize,
    rows: impl Fn(usize, &mut [T]) + Sync,
) -> Array2<T> {
    let mut y = vec![T::zero(); m * b];
    if b > 0 {
        let call = |(at, y): (usize, &mut [T])| rows(at * together, y);
        if alone(nanoseconds) {
            y.chunks_mut(b * together).enumerate().for_each(call);
        } else {
            y.par_chunks_mut(b * together).enumerate().for_each(call);
        }
    }
    Array2::from_shape_vec((m, b), y).unwrap_or_default()
}

/// Calls for each of some panels of rows, with its number and memory that those before it may have left; the time on one thread
/// decides about others.
pub(super) fn each_panel<T: Send, S: Default, I>(
    panels: I,
    nanoseconds: usize,
    call: impl Fn(&mut S, (usize, T)) + Sync + Send,
) where
    I: Iterator<Item = T> + Send,
{
    let panels = panels.enumerate();
    if alone(nanoseconds) {
        let mut scratch = S::default();
        panels.for_each(|panel| call(&mut scratch, panel));
    } else {
        panels.collect::<Vec<_>>().into_par_iter().for_each_init(S::default, call);
    }
}

/// The numbers of a matrix, row by row, that is made anew if it has another shape.
pub(super) fn fitted<T: Real>(matrix: &mut Array2<T>, shape: (usize, usize)) -> &mut [T] {
    if matrix.dim() != shape {
        *matrix = Array2::zeros(shape);
    }
    matrix.as_slice_mut().unwrap_or_default()
}

/// Rows that are written out at a time: with many vectors more of them, as each panel's product lays out the vectors anew.
pub(super) fn panel_rows(vectors: usize) -> usize {
    if vectors > 32 { 512 } else { 128 }
}

/// Y ← A·X, for an m×n matrix A whose rows `write` writes out, some at a time.
pub(super) fn written<T: Real>(
    (m, n): (usize, usize),
    x: ArrayView2<'_, T>,
    mut y: ArrayViewMut2<'_, T>,
    write: impl Fn(Range<usize>, &mut [T]) + Sync + Send,
) {
    let height = panel_rows(x.ncols());
    let panel = |rows: &mut Array2<T>, (at, y): (usize, ArrayViewMut2<'_, T>)| {
        write(at * height..at * height + y.nrows(), fitted(rows, (y.nrows(), n)));
        matmul_into(T::one(), rows.view(), x, T::zero(), y);
    };
    each_panel(y.axis_chunks_iter_mut(Axis(0), height), Pace::FLOATS.time(m * n, x.ncols()), panel);
}

/// Y ← Y + Aᵀ·X, for a matrix A of n columns whose rows `write` writes out, some at a time.
pub(super) fn written_transposed<T: Real>(
    n: usize,
    x: ArrayView2<'_, T>,
    mut y: ArrayViewMut2<'_, T>,
    write: impl Fn(Range<usize>, &mut [T]),
) {
    let (height, mut rows) = (panel_rows(x.ncols()), Array2::default((0, 0)));
    for (at, x) in x.axis_chunks_iter(Axis(0), height).enumerate() {
        write(at * height..at * height + x.nrows(), fitted(&mut rows, (x.nrows(), n)));
        matmul_into(T::one(), rows.t(), x, T::one(), y.view_mut());
    }
}

/// y += value·x.
#[inline]
pub(super) fn accumulate<T: Real>(y: &mut [T], value: T, x: ArrayView1<'_, T>) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += value * x);
}
