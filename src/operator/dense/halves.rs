//! A matrix of bf16 in memory as it is in a file: half the bytes of `f32`, which a product with few vectors reads in half the
//! time. Arithmetic stays that of `f32`: numbers are widened, exactly, on their way into it.

use std::ops::Range;

use half::bf16;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

#[cfg(target_arch = "x86_64")]
use super::super::kernels::by_tiles;
use super::super::sparse::{written, written_transposed};
use crate::linalg::{MOST, pages, times};

/// Vectors that matrix instructions multiply faster, at least.
const TILED: usize = 5;

#[cfg(not(target_arch = "x86_64"))]
fn by_tiles(_: ArrayView2<'_, u32>, _: ArrayView2<'_, f32>, _: &mut [f32]) -> bool {
    false
}

/// m rows of ⌈n ÷ 2⌉ words of two numbers each, the first in the lower half. (After an odd last one there is a zero.)
#[derive(Debug, Clone)]
pub(super) struct Halves {
    words: Array2<u32>,
    columns: usize,
}

impl Halves {
    /// Of numbers that are exactly representable.
    pub(super) fn new(values: ArrayView2<'_, f32>) -> Self {
        let (m, n) = values.dim();
        let mut words = pages::with_capacity(m * n.div_ceil(2));
        let half = |of: &[f32], at: usize| of.get(at).map_or(0, |&v| u32::from(bf16::from_f32(v).to_bits()));
        let values = values.as_standard_layout();
        for row in values.rows() {
            let row = row.to_slice().unwrap_or_default();
            words.extend(row.chunks(2).map(|two| half(two, 0) | half(two, 1) << 16));
        }
        // (The shape fits.)
        Halves { words: Array2::from_shape_vec((m, n.div_ceil(2)), words).unwrap_or_default(), columns: n }
    }

    pub(super) fn dim(&self) -> (usize, usize) {
        (self.words.nrows(), self.columns)
    }

    /// Writes some rows out, one after the other.
    pub(super) fn write(&self, rows: Range<usize>, to: &mut [f32]) {
        for (to, row) in to.chunks_exact_mut(self.columns.max(1)).zip(rows) {
            let words = self.words.row(row);
            let (pairs, last) = to.as_chunks_mut::<2>();
            let [low, high] = [|word: u32| f32::from_bits(word << 16), |word: u32| f32::from_bits(word & 0xffff_0000)];
            pairs.iter_mut().zip(&words).for_each(|(to, &word)| *to = [low(word), high(word)]);
            last.iter_mut().zip(words.iter().last()).for_each(|(to, &word)| *to = low(word));
        }
    }

    /// Y ← A·X, Y row by row. With many vectors rows are written out first, some at a time.
    pub(super) fn product(&self, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        if x.ncols() >= TILED && by_tiles(self.words.view(), x, y) {
            return;
        }
        if x.ncols() <= MOST {
            times::<f32, u32, false>(self.words.view(), x, y);
        } else if let Ok(y) = ArrayViewMut2::from_shape((self.dim().0, x.ncols()), y) {
            written(self.dim(), x, y, |rows, to| self.write(rows, to));
        }
    }

    /// Y ← Aᵀ·X, Y row by row and zero before.
    pub(super) fn product_transposed(&self, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        if x.ncols() <= MOST {
            times::<f32, u32, true>(self.words.view(), x, y);
        } else if let Ok(y) = ArrayViewMut2::from_shape((self.columns, x.ncols()), y) {
            written_transposed(self.columns, x, y, |rows, to| self.write(rows, to));
        }
    }
}
