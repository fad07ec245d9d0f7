//! Eight codes at a time, of any width: AVX2.
//!
//! Eight codes of b bits are b bytes. A word of 64 bits (32, where they fit) in all lanes, each shifted by its own amount,
//! leaves code k in the lowest bits of lane k; as the last digits of 2²³, an integer becomes a float in one step.

use pulp::bytemuck::{cast, cast_slice};
use pulp::x86::V3;
use pulp::{Arch, Simd, f32x8};

use super::CodedRow;
use crate::memory::prefetch;
use crate::scalar::Real;

/// Codes in a step.
const LANES: usize = 8;
/// Bytes between what is multiplied and what is asked for.
const AHEAD: usize = 512;
/// Vectors that meet a row together: it is read once for all of them.
pub(super) const TOGETHER: usize = 4;

/// The instruction set, on machines that have it.
pub(super) fn available(arch: Arch) -> Option<V3> {
    match arch {
        Arch::V3(simd) => Some(simd),
        #[cfg(feature = "avx512")]
        Arch::V4(simd) => Some(*simd),
        _ => None,
    }
}

/// Whether every group begins on a whole byte.
pub(super) fn fits(group: usize, columns: usize) -> bool {
    group.is_multiple_of(LANES) || group >= columns
}

/// A call of what is generic over the width.
macro_rules! by_bits {
    ($simd:expr, $bits:expr, $kernel:ident { $($field:tt)* }) => {
        match $bits {
            2 => $simd.vectorize($kernel::<2> { $($field)* }),
            3 => $simd.vectorize($kernel::<3> { $($field)* }),
            4 => $simd.vectorize($kernel::<4> { $($field)* }),
            5 => $simd.vectorize($kernel::<5> { $($field)* }),
            6 => $simd.vectorize($kernel::<6> { $($field)* }),
            7 => $simd.vectorize($kernel::<7> { $($field)* }),
            _ => $simd.vectorize($kernel::<8> { $($field)* }),
        }
    };
}

/// Writes whole steps of the codes of a row out in their order, counted from the middle of the levels.
pub(super) fn unpack(simd: V3, bits: u8, codes: &[u8], to: &mut [f32]) {
    by_bits!(simd, bits, Unpack { simd, codes, to });
}

/// Adds the inner products of a row with some vectors, at most [`TOGETHER`], to `y`.
pub(super) fn dots<T: Real>(simd: V3, row: &CodedRow<'_, T>, x: [&[f32]; TOGETHER], y: &mut [f32]) {
    let (codes, columns, group, scales) = (row.codes, row.columns, row.group, cast_slice(row.beside.scales));
    match y.len() {
        1 => by_bits!(simd, row.bits, One { simd, codes, columns, group, scales, x: x[0], y }),
        _ => by_bits!(simd, row.bits, Together { simd, codes, columns, group, scales, x, y }),
    }
}

/// The codes of a step, counted from the middle of the levels.
#[inline(always)]
fn eight<const BITS: usize>(simd: V3, codes: &[u8; BITS]) -> f32x8 {
    use std::arch::x86_64::{__m256, __m256i};
    let mut word = [0; 8];
    word[..BITS].copy_from_slice(codes);
    let (word, bits) = (u64::from_le_bytes(word), BITS as u64);
    let code: __m256i = match BITS {
        8 => simd.avx2._mm256_cvtepu8_epi32(cast([word, 0])),
        2..=4 => {
            let shifts: [u32; LANES] = std::array::from_fn(|k| (k * BITS) as u32);
            simd.avx2._mm256_srlv_epi32(cast(simd.splat_u32s(word as u32)), cast(shifts))
        }
        _ => {
            let words: __m256i = cast(simd.splat_u64s(word));
            // Low halves of the two, side by side: codes 0 to 3 in the lower half, 4 to 7 in the upper one.
            let a: __m256 = cast(simd.avx2._mm256_srlv_epi64(words, cast([0, bits, 4 * bits, 5 * bits])));
            let b: __m256 = cast(simd.avx2._mm256_srlv_epi64(words, cast([2 * bits, 3 * bits, 6 * bits, 7 * bits])));
            cast(simd.avx._mm256_shuffle_ps::<0b10_00_10_00>(a, b))
        }
    };
    let masked = match BITS {
        8 => code,
        _ => simd.avx2._mm256_and_si256(code, cast(simd.splat_u32s((1 << BITS) - 1))),
    };
    let float = simd.avx2._mm256_or_si256(masked, cast(simd.splat_u32s(0x4b00_0000)));
    simd.sub_f32s(cast(float), simd.splat_f32s(8_388_608.0 + (1u32 << (BITS - 1)) as f32))
}

/// Eight numbers or bytes from a place on; zeros beyond the end.
#[inline(always)]
fn padded<V: Copy + Default, const N: usize>(of: &[V], from: usize) -> [V; N] {
    std::array::from_fn(|k| of.get(from + k).copied().unwrap_or_default())
}

struct Unpack<'a, const BITS: usize> {
    simd: V3,
    codes: &'a [u8],
    to: &'a mut [f32],
}

impl<const BITS: usize> pulp::NullaryFnOnce for Unpack<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let (steps, words) = (self.to.as_chunks_mut::<LANES>().0, self.codes.as_chunks::<BITS>().0);
        for (to, codes) in steps.iter_mut().zip(words) {
            *to = cast(eight(self.simd, codes));
        }
    }
}

struct One<'a, const BITS: usize> {
    simd: V3,
    codes: &'a [u8],
    columns: usize,
    group: usize,
    scales: &'a [f32],
    x: &'a [f32],
    y: &'a mut [f32],
}

impl<const BITS: usize> pulp::NullaryFnOnce for One<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let One { simd, codes, columns, group, scales, x, y } = self;
        let mut total = simd.splat_f32s(0.0);
        for (g, &scale) in scales.iter().enumerate() {
            let (from, end) = (g * group, (g * group + group).min(columns));
            let (codes, x) = (&codes[from / LANES * BITS..], &x[from..end]);
            let (steps, words) = (x.as_chunks::<LANES>().0, codes.as_chunks::<BITS>().0);
            // Two sums, so that no product waits for the one before.
            let mut sums = (simd.splat_f32s(0.0), simd.splat_f32s(0.0));
            let ((pairs, odd), (word_pairs, _)) = (steps.as_chunks::<2>(), words.as_chunks::<2>());
            for (x, codes) in pairs.iter().zip(word_pairs) {
                prefetch(&codes[0][0], AHEAD);
                sums.0 = simd.mul_add_e_f32s(eight(simd, &codes[0]), cast(x[0]), sums.0);
                sums.1 = simd.mul_add_e_f32s(eight(simd, &codes[1]), cast(x[1]), sums.1);
            }
            if let (Some(&x), Some(codes)) = (odd.first(), words.get(2 * pairs.len())) {
                sums.0 = simd.mul_add_e_f32s(eight(simd, codes), cast(x), sums.0);
            }
            if !x.len().is_multiple_of(LANES) {
                // Beyond the end codes may be another row's: inputs are zero there.
                let (codes, x) = (padded(codes, steps.len() * BITS), padded::<_, LANES>(x, steps.len() * LANES));
                sums.1 = simd.mul_add_e_f32s(eight::<BITS>(simd, &codes), cast(x), sums.1);
            }
            total = simd.mul_add_e_f32s(simd.add_f32s(sums.0, sums.1), simd.splat_f32s(scale), total);
        }
        y.iter_mut().for_each(|y| *y += simd.reduce_sum_f32s(total));
    }
}

struct Together<'a, const BITS: usize> {
    simd: V3,
    codes: &'a [u8],
    columns: usize,
    group: usize,
    scales: &'a [f32],
    x: [&'a [f32]; TOGETHER],
    y: &'a mut [f32],
}

impl<const BITS: usize> pulp::NullaryFnOnce for Together<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Together { simd, codes, columns, group, scales, x, y } = self;
        let mut totals = [simd.splat_f32s(0.0); TOGETHER];
        for (g, &scale) in scales.iter().enumerate() {
            let (from, end) = (g * group, (g * group + group).min(columns));
            let (codes, count) = (&codes[from / LANES * BITS..], (end - from) / LANES);
            let [a, b, c, d] = x.map(|x| &x[from..end].as_chunks::<LANES>().0[..count]);
            let mut sums = [simd.splat_f32s(0.0); TOGETHER];
            for (k, codes) in codes.as_chunks::<BITS>().0.iter().take(count).enumerate() {
                let value = eight(simd, codes);
                sums[0] = simd.mul_add_e_f32s(value, cast(a[k]), sums[0]);
                sums[1] = simd.mul_add_e_f32s(value, cast(b[k]), sums[1]);
                sums[2] = simd.mul_add_e_f32s(value, cast(c[k]), sums[2]);
                sums[3] = simd.mul_add_e_f32s(value, cast(d[k]), sums[3]);
            }
            if !(end - from).is_multiple_of(LANES) {
                let value = eight::<BITS>(simd, &padded(codes, count * BITS));
                for (sum, x) in sums.iter_mut().zip(x) {
                    let x = padded::<_, LANES>(&x[from..end], count * LANES);
                    *sum = simd.mul_add_e_f32s(value, cast(x), *sum);
                }
            }
            let scale = simd.splat_f32s(scale);
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = simd.mul_add_e_f32s(sum, scale, *total);
            }
        }
        y.iter_mut().zip(totals).for_each(|(y, total)| *y += simd.reduce_sum_f32s(total));
    }
}
