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
    let in_order = n == 1 || x.strides()[0] == 1;
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

/// Some columns, up to 16 from one on, of rows of b numbers: by squares, as columns of numbers that lie far apart would
/// evict each other.
#[target_feature(enable = "avx512f")]
fn gather(rows: &[f32], b: usize, first: usize, to: &mut [f32]) {
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
