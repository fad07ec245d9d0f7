//! A matrix of bf16 in memory as it is in a file: half the bytes of `f32`, which a product with few vectors reads in half the
//! time. Arithmetic stays that of `f32`: numbers are widened, exactly, on their way into it.

use std::ops::Range;

use half::bf16;
use ndarray::{ArrayView2, ArrayViewMut2};

use super::super::kernels::Aligned;
#[cfg(target_arch = "x86_64")]
use super::super::kernels::by_tiles;
use super::super::sparse::{written, written_transposed};
use crate::linalg::{MOST, most_by_rows, times};

/// Vectors that matrix instructions multiply faster, at least.
const TILED: usize = 5;

#[cfg(not(target_arch = "x86_64"))]
fn by_tiles(_: &[u32], _: (usize, usize), _: ArrayView2<'_, f32>, _: &mut [f32]) -> bool {
    false
}

/// m rows of ⌈n ÷ 2⌉ words of two numbers each, the first in the lower half. (After an odd last one there is a zero.)
#[derive(Debug, Clone)]
pub(super) struct Halves {
    words: Aligned<u32>,
    dim: (usize, usize),
}

impl Halves {
    /// Of numbers that are exactly representable.
    pub(super) fn new(values: ArrayView2<'_, f32>) -> Self {
        let (m, n) = values.dim();
        let half = |of: &[f32], at: usize| of.get(at).map_or(0, |&v| u32::from(bf16::from_f32(v).to_bits()));
        let values = values.as_standard_layout();
        let words = Aligned::new(m * n.div_ceil(2), |words| {
            for row in values.rows() {
                let row = row.to_slice().unwrap_or_default();
                words.extend(row.chunks(2).map(|two| half(two, 0) | half(two, 1) << 16));
            }
        });
        Halves { words, dim: (m, n) }
    }

    /// Of a file's bytes, row by row, which need no alignment; `None` if there are more or fewer of them.
    pub(super) fn stored((m, n): (usize, usize), bytes: &[u8]) -> Option<Self> {
        let row = n.checked_mul(size_of::<bf16>())?;
        if m.checked_mul(row)? != bytes.len() {
            return None;
        }
        let words = Aligned::new(m * n.div_ceil(2), |words| {
            for row in bytes.chunks_exact(row.max(1)) {
                let (pairs, last) = row.as_chunks();
                words.extend(pairs.iter().map(|&two| u32::from_le_bytes(two)));
                words.extend(last.first_chunk().map(|&one| u32::from(u16::from_le_bytes(one))));
            }
        });
        Some(Halves { words, dim: (m, n) })
    }

    /// The first number that is infinite or none, and its place, row by row.
    pub(super) fn not_finite(&self) -> Option<(usize, bf16)> {
        // (Without branches, as nearly all matrices have none.)
        let exponent = u32::from(bf16::INFINITY.to_bits());
        let full = |word: u32| word & exponent == exponent;
        if !self.words.iter().fold(false, |any, &word| any | full(word) | full(word >> 16)) {
            return None;
        }
        let halves = |word: u32| [word as u16, (word >> 16) as u16].map(bf16::from_bits);
        let (stride, columns) = (self.dim.1.div_ceil(2), self.dim.1);
        let mut numbers = self.words.iter().enumerate().flat_map(|(at, &word)| {
            let place = at / stride * columns + at % stride * 2;
            halves(word).into_iter().enumerate().map(move |(half, number)| (place + half, number))
        });
        numbers.find(|(_, number)| !number.is_finite())
    }

    pub(super) fn dim(&self) -> (usize, usize) {
        self.dim
    }

    /// Writes some rows out, one after the other.
    pub(super) fn write(&self, rows: Range<usize>, to: &mut [f32]) {
        let (_, n) = self.dim;
        for (to, row) in to.chunks_exact_mut(n.max(1)).zip(rows) {
            let words = &self.words[row * n.div_ceil(2)..][..n.div_ceil(2)];
            let (pairs, last) = to.as_chunks_mut::<2>();
            let [low, high] = [|word: u32| f32::from_bits(word << 16), |word: u32| f32::from_bits(word & 0xffff_0000)];
            pairs.iter_mut().zip(words).for_each(|(to, &word)| *to = [low(word), high(word)]);
            last.iter_mut().zip(words.iter().last()).for_each(|(to, &word)| *to = low(word));
        }
    }

    /// Y ← A·X, Y row by row.
    pub(super) fn product(&self, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        if x.ncols() < TILED || !by_tiles(&self.words, self.dim, x, y) {
            self.by_vectors::<false>(x, y);
        }
    }

    /// Y ← Aᵀ·X, Y row by row and zero before.
    pub(super) fn product_transposed(&self, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        self.by_vectors::<true>(x, y);
    }

    /// Either without matrix instructions: with many vectors rows are written out first, some at a time.
    fn by_vectors<const TRANSPOSED: bool>(&self, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        let (m, n) = self.dim;
        let (rows, write) = (if TRANSPOSED { n } else { m }, |rows, to: &mut [f32]| self.write(rows, to));
        let most = if TRANSPOSED { MOST } else { most_by_rows::<f32>() };
        if x.ncols() <= most {
            if let Ok(words) = ArrayView2::from_shape((m, n.div_ceil(2)), &self.words) {
                times::<f32, u32, TRANSPOSED>(words, x, y);
            }
        } else if let Ok(y) = ArrayViewMut2::from_shape((rows, x.ncols()), y) {
            match TRANSPOSED {
                true => written_transposed(n, x, y, write),
                false => written(self.dim, x, y, write),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    #[test]
    fn vectors_find_what_registers_do() {
        for (m, n) in [(1, 1), (7, 33), (130, 66), (600, 131)] {
            let numbers =
                |m, n, seed| Array2::from_shape_fn((m, n), |(i, j)| ((i * 31 + j * 17 + seed) % 64) as f32 - 31.0);
            let (wide, all) = (numbers(m, n, 1), Halves::new(numbers(m, n, 1).view()));
            for count in [1, 4, 5, 16, 17, 40] {
                // (Whole numbers: all sums are exact.)
                let x = numbers(n, count, 2);
                let (exact, mut one, mut other) = (wide.dot(&x), vec![f32::NAN; m * count], vec![f32::NAN; m * count]);
                all.by_vectors::<false>(x.view(), &mut one);
                all.product(x.view(), &mut other);
                assert_eq!((&one, &other), (&exact.into_raw_vec_and_offset().0, &one), "{m}x{n}, {count} vectors");
            }
        }
    }
}
