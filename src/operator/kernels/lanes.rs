//! Vectors of AVX-512 in memory, and numbers on their way into them.

use std::arch::x86_64::*;

use ndarray::{ArrayView2, Axis};
use pulp::bytemuck::{Pod, Zeroable, cast, cast_slice, cast_slice_mut};

use crate::scalar::Real;

/// Numbers of 32 bits in a vector.
pub(super) const LANES: usize = 16;

/// A vector in memory.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(super) struct Lanes<N>(pub(super) [N; LANES]);

// SAFETY: all its bytes may be zero.
#[allow(unsafe_code)]
unsafe impl Zeroable for Lanes<i32> {}
// SAFETY: 16 integers of four bytes fill the 64 bytes of its alignment: there are no others between or behind them, and any
// bytes are integers.
#[allow(unsafe_code)]
unsafe impl Pod for Lanes<i32> {}

/// Turns a square around: vector i of the result has element i of each.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn turned(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut pairs = rows;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Element c of quarter j of `fours[4q + c]` is column 4j + c of the rows from 4q on.
    let mut fours = pairs;
    for q in 0..4 {
        fours[4 * q] = _mm512_unpacklo_epi64(pairs[4 * q], pairs[4 * q + 2]);
        fours[4 * q + 1] = _mm512_unpackhi_epi64(pairs[4 * q], pairs[4 * q + 2]);
        fours[4 * q + 2] = _mm512_unpacklo_epi64(pairs[4 * q + 1], pairs[4 * q + 3]);
        fours[4 * q + 3] = _mm512_unpackhi_epi64(pairs[4 * q + 1], pairs[4 * q + 3]);
    }
    let mut columns = fours;
    for c in 0..4 {
        let upper = _mm512_shuffle_i32x4::<0x44>(fours[c], fours[4 + c]);
        let lower = _mm512_shuffle_i32x4::<0x44>(fours[8 + c], fours[12 + c]);
        columns[c] = _mm512_shuffle_i32x4::<0x88>(upper, lower);
        columns[4 + c] = _mm512_shuffle_i32x4::<0xdd>(upper, lower);
        let upper = _mm512_shuffle_i32x4::<0xee>(fours[c], fours[4 + c]);
        let lower = _mm512_shuffle_i32x4::<0xee>(fours[8 + c], fours[12 + c]);
        columns[8 + c] = _mm512_shuffle_i32x4::<0x88>(upper, lower);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(upper, lower);
    }
    columns
}

/// Writes the numbers of a vector, as many as there is room for.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn put(vector: __m512i, to: &mut [f32]) {
    let numbers: [f32; LANES] = cast(vector);
    match to.first_chunk_mut() {
        Some(to) => *to = numbers,
        None => to.copy_from_slice(&numbers[..to.len()]),
    }
}

/// Some numbers, at most 16, and zeros.
pub(super) fn padded(of: &[f32]) -> [f32; LANES] {
    std::array::from_fn(|i| of.get(i).copied().unwrap_or_default())
}

/// The numbers of some columns from one on, sixteen at most, in their order each; none of those that are missing.
pub(super) fn columns<'a, T: Real>(
    x: &'a ArrayView2<'_, T>,
    first: usize,
    count: usize,
    held: &'a mut Vec<T>,
) -> [&'a [f32]; LANES] {
    let ((n, b), count) = (x.dim(), count.min(LANES).min(x.ncols() - first));
    let in_order = n <= 1 || x.strides()[0] == 1;
    if !in_order {
        held.resize(n * count, T::zero());
        match x.as_slice() {
            Some(all) if cfg!(feature = "avx512") && is_x86_feature_detected!("avx512f") => {
                let to = cast_slice_mut(held);
                // SAFETY: the machine has the instructions, as was asked.
                #[allow(unsafe_code)]
                unsafe {
                    gather(cast_slice(all), b, first, to);
                }
            }
            _ => x.rows().into_iter().enumerate().for_each(|(j, row)| {
                (0..count).for_each(|v| held[v * n + j] = row[first + v]);
            }),
        }
    }
    let held = &held[..];
    std::array::from_fn(|v| {
        if v >= count {
            return [].as_slice();
        }
        let column = if in_order { x.index_axis(Axis(1), first + v).to_slice() } else { held.get(v * n..(v + 1) * n) };
        cast_slice(column.unwrap_or_default())
    })
}

/// The first so many lanes.
fn present(count: usize) -> __mmask16 {
    ((1u32 << count.min(LANES)) - 1) as __mmask16
}

/// Some columns, up to 16 from one on, of rows of b numbers.
#[target_feature(enable = "avx512f")]
fn gather(rows: &[f32], b: usize, first: usize, to: &mut [f32]) {
    // (All columns, if there is room for all.)
    match b {
        2 if to.len() == rows.len() => take_apart::<2>(rows, to),
        4 if to.len() == rows.len() => take_apart::<4>(rows, to),
        8 if to.len() == rows.len() => take_apart::<8>(rows, to),
        _ => by_squares(rows, b, first, to),
    }
}

/// All columns of rows of B numbers, a power of two: every other number, and of those every other, until one of each row is left.
#[target_feature(enable = "avx512f")]
fn take_apart<const B: usize>(rows: &[f32], to: &mut [f32]) {
    let n = rows.len() / B;
    let (even, odd): ([i32; LANES], [i32; LANES]) =
        (std::array::from_fn(|i| 2 * i as i32), std::array::from_fn(|i| 2 * i as i32 + 1));
    let whole = rows.as_chunks::<LANES>().0.as_chunks::<B>().0;
    for (square, rows) in whole.iter().enumerate() {
        let mut columns = [_mm512_setzero_si512(); B];
        for k in 0..B {
            columns[k] = cast(rows[k]);
        }
        for _ in 0..B.ilog2() {
            let of = columns;
            for k in 0..B / 2 {
                columns[k] = _mm512_permutex2var_epi32(of[2 * k], cast(even), of[2 * k + 1]);
                columns[B / 2 + k] = _mm512_permutex2var_epi32(of[2 * k], cast(odd), of[2 * k + 1]);
            }
        }
        for (column, to) in columns.into_iter().zip(to.chunks_mut(n)) {
            put(column, &mut to[square * LANES..]);
        }
    }
    for (j, row) in rows.chunks_exact(B).enumerate().skip(whole.len() * LANES) {
        (0..B).for_each(|v| to[v * n + j] = row[v]);
    }
}

/// The same by squares, as columns of numbers that lie far apart would evict each other.
#[target_feature(enable = "avx512f")]
fn by_squares(rows: &[f32], b: usize, first: usize, to: &mut [f32]) {
    let n = rows.len() / b;
    let count = to.len() / n;
    for (square, rows) in rows.chunks(b * LANES).enumerate() {
        let rows: [_; LANES] = std::array::from_fn(|j| {
            let row = rows.get(j * b + first..j * b + first + count).unwrap_or_default();
            // SAFETY: as many numbers are read as the row has, at most 16; the machine has the instruction, or this were not
            // called.
            #[allow(unsafe_code)]
            unsafe {
                cast(_mm512_maskz_loadu_ps(present(row.len()), row.as_ptr()))
            }
        });
        for (column, to) in turned(rows).into_iter().zip(to.chunks_mut(n)) {
            put(column, &mut to[square * LANES..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::testing::sizes;

    #[test]
    fn columns_are_those_of_the_matrix() {
        for &b in sizes(&[1, 2, 3, 4, 5, 8, 16, 17, 33], &[1, 3, 5]) {
            for &n in sizes(&[0, 1, 2, 15, 16, 17, 40, 64, 130], &[0, 17]) {
                let x = Array2::from_shape_fn((n, b), |(j, v)| (j * b + v) as f32);
                let turned = x.t().as_standard_layout().into_owned();
                for x in [x.view(), turned.t()] {
                    for (first, count) in (0..b).flat_map(|first| [1, 3, LANES].map(|count| (first, count))) {
                        let mut held = Vec::new();
                        for (v, column) in columns(&x, first, count, &mut held).into_iter().enumerate() {
                            let there = v < count && first + v < b;
                            let want = if there { x.column(first + v).to_vec() } else { Vec::new() };
                            assert_eq!(column, want, "{n} rows of {b}, column {}", first + v);
                        }
                    }
                }
            }
        }
    }
}
