//! A·W·B·x for block-diagonal A and B around a 2:4 matrix W, and many vectors.
//!
//! B writes to the panels that the kernel reads, and A reads its sums where they are: neither B·x nor W·B·x is
//! ever a matrix in memory.

use std::ops::Range;

use ndarray::{ArrayView2, s};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::{Output, Stretch, stretches};
use super::{KEPT, Kept, ROWS, TwoFour, WIDTH, batch, vector};
use crate::operator::BlockDiagonal;
use crate::simd::{Aligned, Lanes, take};
use crate::threads::{self, Pace};

/// Inputs that B turns upright at a time: they stay in the second cache.
const INPUTS: usize = 256;

/// The numbers of a vector.
struct Width;

impl WithSimd for Width {
    type Output = usize;

    fn with_simd<S: Simd>(self, _: S) -> usize {
        f32::lanes::<S>()
    }
}

/// A part of B·x: a stretch of rows of one panel.
struct Part<'a> {
    stretch: &'a Stretch,
    columns: Range<usize>,
    row: usize,
    to: &'a mut [f32],
}

impl<L: Kept> TwoFour<L> {
    /// y = A·W·B·x, row-major; false, and nothing done, if that is no faster than one after the other.
    pub(crate) fn wrapped(
        &self,
        (left, right): (&BlockDiagonal<f32>, &BlockDiagonal<f32>),
        x: ArrayView2<'_, f32>,
        y: &mut [f32],
    ) -> bool {
        self.wrapped_by(Arch::new(), (left, right), x, y)
    }

    pub(super) fn wrapped_by(
        &self,
        arch: Arch,
        (left, right): (&BlockDiagonal<f32>, &BlockDiagonal<f32>),
        x: ArrayView2<'_, f32>,
        y: &mut [f32],
    ) -> bool {
        let (b, lanes) = (x.ncols(), arch.dispatch(Width));
        if vector::few(arch, b) || y.is_empty() || self.chunks.is_empty() {
            return false;
        }
        let alone = threads::alone(Pace::FLOATS.time(self.chunks.len() * KEPT, b));
        let packed = self.packed(arch, right, x, alone);
        let (length, all) = (self.blocks() * WIDTH, b.div_ceil(lanes));
        let packed = packed.filled(length * all * lanes);
        let most = batch::rows_at_once(all);
        let share = if alone { most } else { most.min(threads::share(self.rows)) };
        let run = |(stretch, y): (&Stretch, &mut [f32])| {
            // Blocks may begin and end within what the kernel takes at once.
            let own = stretch.inputs.clone();
            let rows = own.start / ROWS * ROWS..own.end.next_multiple_of(ROWS);
            let mut memory = Aligned::default();
            for (from, vectors) in batch::panels(all) {
                let row = vectors * lanes;
                let sums = memory.numbers(rows.len() * row);
                sums.fill(0.0);
                let x = &packed[from * length * lanes..][..length * row];
                arch.dispatch(batch::Sums { of: self, x, rows: rows.clone(), vectors, sums });
                let sums = &sums[(own.start - rows.start) * row..][..own.len() * row];
                let Ok(sums) = ArrayView2::from_shape((own.len(), row), sums) else { continue };
                let out = Output::new(y, b, from * lanes, row.min(b - from * lanes));
                left.stretch(arch, stretch, sums, out);
            }
        };
        let (stretches, mut rest) = (stretches(left.extents(), share), y);
        let parts = stretches.iter().map(|stretch| (stretch, take(&mut rest, stretch.outputs.len() * b)));
        match alone {
            true => parts.for_each(run),
            false => parts.collect::<Vec<_>>().into_par_iter().for_each(run),
        }
        true
    }

    /// B·x as [`batch::Pack`] would pack it.
    fn packed(&self, arch: Arch, right: &BlockDiagonal<f32>, x: ArrayView2<'_, f32>, alone: bool) -> Aligned<f32> {
        let (b, lanes, length) = (x.ncols(), arch.dispatch(Width), self.blocks() * WIDTH);
        let (all, mut packed) = (b.div_ceil(lanes), Aligned::default());
        let (stretches, mut parts) = (stretches(right.extents(), INPUTS), Vec::new());
        let mut rest = packed.numbers(length * all * lanes);
        for (from, vectors) in batch::panels(all) {
            let row = vectors * lanes;
            let (mut panel, columns) = (take(&mut rest, length * row), from * lanes..b.min(from * lanes + row));
            parts.extend(stretches.iter().map(|stretch| {
                let to = take(&mut panel, stretch.outputs.len() * row);
                Part { stretch, columns: columns.clone(), row, to }
            }));
        }
        let run = |Part { stretch, columns, row, to }: Part<'_>| {
            let out = Output::new(to, row, 0, columns.len());
            right.stretch(arch, stretch, x.slice(s![stretch.inputs.clone(), columns]), out);
        };
        match alone {
            true => parts.into_iter().for_each(run),
            false => parts.into_par_iter().for_each(run),
        }
        // Where what is left of a row lies elsewhere.
        if self.columns % 4 == 3 {
            let (from, all) = (self.columns - 1, packed.numbers(length * all * lanes));
            for (first, vectors) in batch::panels(b.div_ceil(lanes)) {
                let row = vectors * lanes;
                let panel = &mut all[first * length * lanes..][..length * row];
                panel.copy_within(from * row..(from + 1) * row, (from + 2) * row);
                panel[from * row..(from + 1) * row].fill(0.0);
            }
        }
        packed
    }
}
