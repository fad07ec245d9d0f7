//! One pass of the descent over some rows, in vectors whose lanes are rows.
//!
//! What H makes of the error is summed in registers, a few columns of H times two vectors of rows; the groups of the
//! block are then solved while these sums are in the cache.

use ndarray::ArrayView2;
use pulp::{Simd, WithSimd};

use super::BLOCK;
use super::descent::{Block, Part};
use super::search::{Judge, Vectors};
use super::table::Masks;
use crate::operator::Nm;
use crate::scalar::Real;
use crate::simd::Aligned;

/// Rows of a part.
pub(super) const WIDTH: usize = 32;
/// Columns of H that are multiplied at once.
const PANEL: usize = 8;
/// Vectors of rows that they are multiplied with.
const VECTORS: usize = 2;

/// What a sweep may change.
#[derive(Debug, Clone, Copy)]
pub(super) enum Choice<'a, T> {
    /// Masks and values.
    Masks,
    /// Masks, at a price for each entry of a row, and values.
    Priced(&'a [T]),
    /// Values only.
    Values,
}

/// The columns of each block of H, `PANEL` at a time, side by side: column c of row k of a panel is number
/// `k·PANEL + c`. H is symmetric, so that they are read from its rows.
pub(super) fn pack<T: Real>(form: ArrayView2<'_, T>, blocks: &mut [Block]) -> Aligned<T> {
    let (n, mut packed, mut at) = (form.nrows(), Aligned::default(), 0);
    for block in blocks.iter_mut() {
        block.packed = at;
        at += n * (block.end - block.start).next_multiple_of(PANEL);
    }
    let mut rest = packed.numbers(at);
    for first in blocks.iter().flat_map(|block| (block.start..block.end).step_by(PANEL).map(|c| c..block.end)) {
        let columns = first.start..first.end.min(first.start + PANEL);
        let panel = crate::simd::take(&mut rest, n * PANEL);
        for (to, row) in panel.chunks_exact_mut(PANEL).zip(form.rows()) {
            to.iter_mut().zip(row.iter().skip(columns.start)).take(columns.len()).for_each(|(to, from)| *to = *from);
        }
    }
    packed
}

/// H·error for the columns of a block, (block × `WIDTH`).
#[inline(always)]
fn forces<S: Simd, T: Real>(s: S, columns: &[T], error: &[T], to: &mut [T]) {
    let (error, to) = (T::vectors::<S>(error).0, T::vectors_mut::<S>(to).0);
    let (across, n) = (WIDTH / T::lanes::<S>(), error.len() * T::lanes::<S>() / WIDTH);
    let panels = columns.chunks_exact(n.max(1) * PANEL);
    for (panel, to) in panels.zip(to.chunks_exact_mut(PANEL * across)) {
        let (panel, _) = panel.as_chunks::<PANEL>();
        for v in (0..across).step_by(VECTORS) {
            let mut sums = [[T::splat(s, T::zero()); VECTORS]; PANEL];
            for (h, error) in panel.iter().zip(error.chunks_exact(across)) {
                let Some(error) = error[v..].first_chunk::<VECTORS>() else { continue };
                for (sums, &h) in sums.iter_mut().zip(h) {
                    let h = T::splat(s, h);
                    for (sum, &error) in sums.iter_mut().zip(error) {
                        *sum = T::fma(s, h, error, *sum);
                    }
                }
            }
            for (to, sums) in to.chunks_exact_mut(across).zip(sums) {
                to[v..v + VECTORS].copy_from_slice(&sums);
            }
        }
    }
}

/// All of H·error, n × `WIDTH`.
pub(super) struct Forces<'a, T> {
    pub(super) n: usize,
    pub(super) packed: &'a Aligned<T>,
    pub(super) blocks: &'a [Block],
    pub(super) error: &'a Aligned<T>,
}

impl<T: Real> WithSimd for Forces<'_, T> {
    type Output = Vec<T>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<T> {
        let Forces { n, packed, blocks, error } = self;
        let mut all = Vec::with_capacity(n * WIDTH);
        let mut memory = Aligned::default();
        for block in blocks {
            let to = memory.numbers(BLOCK * WIDTH);
            forces(s, block.columns(n, packed), error.filled(n * WIDTH), to);
            all.extend_from_slice(&to[..(block.end - block.start) * WIDTH]);
        }
        all
    }
}

impl Block {
    /// Its columns of H, packed.
    fn columns<'a, T: Real>(&self, n: usize, packed: &'a Aligned<T>) -> &'a [T] {
        let length = n * (self.end - self.start).next_multiple_of(PANEL);
        &packed.filled(self.packed + length)[self.packed..]
    }
}

/// All groups of some parts once.
pub(super) struct Pass<'a, 'b, T> {
    pub(super) form: ArrayView2<'a, T>,
    pub(super) packed: &'a Aligned<T>,
    pub(super) blocks: &'a [Block],
    pub(super) groups: &'a [(usize, usize, &'a Masks, &'a [T])],
    pub(super) choice: Choice<'a, T>,
    pub(super) parts: &'b mut [Part<T>],
}

impl<T: Real> WithSimd for Pass<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let (n, mut memory) = (self.form.nrows(), Aligned::default());
        for block in self.blocks {
            for part in &mut *self.parts {
                let tile = memory.numbers(BLOCK * WIDTH);
                forces(s, block.columns(n, self.packed), part.error.filled(n * WIDTH), tile);
                let (first, lanes) = (part.first, T::lanes::<S>());
                let mut lines = Lines {
                    forces: T::vectors_mut::<S>(tile).0,
                    target: T::vectors::<S>(part.target.filled(n * WIDTH)).0,
                    coded: T::vectors_mut::<S>(part.coded.numbers(n * WIDTH)).0,
                    error: T::vectors_mut::<S>(part.error.numbers(n * WIDTH)).0,
                    chosen: T::vectors_mut::<S>(part.chosen.numbers(self.groups.len() * WIDTH)).0,
                };
                for v in 0..WIDTH / lanes {
                    let price = match self.choice {
                        Choice::Priced(prices) => {
                            let at = (first + v * lanes).min(prices.len());
                            T::load(s, &prices[at..prices.len().min(at + lanes)])
                        }
                        _ => T::splat(s, T::zero()),
                    };
                    for (group, &(start, size, masks, inverses)) in
                        self.groups.iter().enumerate().take(block.groups.end).skip(block.groups.start)
                    {
                        let step = Step { block, start, size, masks, inverses, group, v };
                        let given = matches!(self.choice, Choice::Values);
                        step.take(s, self.form, &mut lines, price, given);
                    }
                }
            }
        }
    }
}

/// What a part holds, as vectors.
struct Lines<'a, V> {
    forces: &'a mut [V],
    target: &'a [V],
    coded: &'a mut [V],
    error: &'a mut [V],
    chosen: &'a mut [V],
}

/// One group of one vector of rows.
struct Step<'a, T> {
    block: &'a Block,
    start: usize,
    size: usize,
    masks: &'a Masks,
    inverses: &'a [T],
    group: usize,
    v: usize,
}

impl<T: Real> Step<'_, T> {
    #[inline(always)]
    fn take<S: Simd>(
        &self,
        s: S,
        form: ArrayView2<'_, T>,
        lines: &mut Lines<'_, T::V<S>>,
        price: T::V<S>,
        given: bool,
    ) {
        match self.size {
            4 => self.sized::<4, S>(s, form, lines, price, given),
            _ => self.sized::<{ Nm::LARGEST }, S>(s, form, lines, price, given),
        }
    }

    /// Solves a group of at most M inputs, and brings the forces of the later columns of the block up to date.
    #[inline(always)]
    fn sized<const M: usize, S: Simd>(
        &self,
        s: S,
        form: ArrayView2<'_, T>,
        lines: &mut Lines<'_, T::V<S>>,
        price: T::V<S>,
        given: bool,
    ) {
        let (size, across) = (self.size.min(M), WIDTH / T::lanes::<S>());
        // A known size lets the compiler write everything out.
        let size = if M == 4 { 4 } else { size };
        let (zero, offset) = (T::splat(s, T::zero()), self.start - self.block.start);
        // H of the group with all that the block has from there on.
        let row = |i: usize| -> &[T] {
            let row = form.index_axis_move(ndarray::Axis(0), self.start + i).to_slice().unwrap_or(&[]);
            row.get(self.start..self.block.end).unwrap_or(&[])
        };
        let rows: [&[T]; M] = std::array::from_fn(|i| if i < size { row(i) } else { &[] });
        let mut old: Vectors<T::V<S>> = [zero; Nm::LARGEST];
        let mut g = old;
        for (old, line) in old.iter_mut().zip(lines.coded[self.start * across..].chunks_exact(across)).take(size) {
            *old = line[self.v];
        }
        // The forces without the group's own part. The target is not in `old`: H·(coded − target) loses the coded part only.
        for i in 0..size {
            g[i] = lines.forces[(offset + i) * across + self.v];
            for j in 0..size {
                g[i] = T::fnma(s, T::splat(s, rows[i][j]), old[j], g[i]);
            }
        }
        let chosen = &mut lines.chosen[self.group * across + self.v];
        let judge = if given { Judge::Number(*chosen) } else { Judge::Gain(price) };
        let (number, new) = self.masks.solve::<S, T>(s, self.inverses, &g, judge);
        *chosen = number;
        let mut delta = [zero; M];
        for i in 0..size {
            let at = (self.start + i) * across + self.v;
            delta[i] = T::vsub(s, new[i], old[i]);
            lines.coded[at] = new[i];
            lines.error[at] = T::vsub(s, new[i], lines.target[at]);
        }
        let later = lines.forces[(offset + size) * across..].chunks_exact_mut(across);
        for (j, to) in (size..rows[0].len()).zip(later) {
            let mut force = to[self.v];
            for i in 0..size {
                force = T::fma(s, T::splat(s, rows[i][j]), delta[i], force);
            }
            to[self.v] = force;
        }
    }
}
