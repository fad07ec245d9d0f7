//! Numbers in fixed point, and the signed digits they are cut into.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::{EACH, LANES, LIMBS};

/// How inputs are cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Digits {
    /// x = 2ᵉ·(2¹⁶a + 2⁸b + c): three bytes.
    Three,
    /// x = 2ᵉ·(2¹²(16a + b) + 16c + d): twice a byte and four bits, which meet a code times 16 and the code. So two
    /// registers of sums do, where codes leave four bits of a byte and half the lanes of a step.
    Two,
}

impl Digits {
    /// Digits that are added up by themselves.
    #[inline(always)]
    pub(super) fn count(self) -> usize {
        match self {
            Digits::Three => LIMBS,
            Digits::Two => 2,
        }
    }

    /// Bytes of a digit, as many as codes are there for it.
    #[inline(always)]
    pub(super) fn parts(self) -> usize {
        match self {
            Digits::Three => 1,
            Digits::Two => 2,
        }
    }

    /// What each byte counts, the largest first.
    fn weights(self) -> [i64; EACH] {
        match self {
            Digits::Three => [1 << 16, 1 << 8, 1, 0],
            Digits::Two => [1 << 16, 1 << 12, 1 << 4, 1],
        }
    }

    /// What sums of the bytes come to.
    pub(super) fn sum(self, totals: [i32; EACH], unit: f32) -> f32 {
        let whole: i64 = totals.iter().zip(self.weights()).map(|(&total, weight)| i64::from(total) * weight).sum();
        (whole as f64 * f64::from(unit)) as f32
    }
}

/// Sums of the products of all digits, from those of each.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn join<const DIGITS: usize>(sums: [__m512i; DIGITS]) -> __m512 {
    let (weight, rest) = match DIGITS {
        2 => (4096.0, sums[1]),
        _ => (65_536.0, _mm512_add_epi32(_mm512_slli_epi32::<8>(sums[1]), sums[DIGITS - 1])),
    };
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[0]), _mm512_set1_ps(weight), _mm512_cvtepi32_ps(rest))
}

/// Cuts numbers of a layout.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    digits: Digits,
    /// Where bytes of 16 columns go, as codes come out of vectors: four bytes of each lane, for each byte of a number, the
    /// largest first.
    order: __m512i,
    present: u64,
}

impl Cut {
    /// For codes of which so many begin in the same byte.
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(digits: Digits, parts: usize) -> Self {
        let bytes = digits.count() * digits.parts();
        let place: [u8; 64] = std::array::from_fn(|at| {
            let (byte, lane, at) = (at / 16, at / EACH % EACH, at % EACH);
            // (What is behind the last byte is masked away.)
            let column = lane / parts * EACH * parts + at * parts + lane % parts;
            (column * EACH + (bytes - 1).saturating_sub(byte)) as u8
        });
        Cut { digits, order: cast(place), present: u64::MAX >> (64 - 16 * bytes) }
    }

    /// The first 16 of some inputs in bytes; zeros where there are none, and where the unit is not a number.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
    pub(super) fn split(&self, x: &[f32], unit: f32) -> __m512i {
        let sixteen = x.first_chunk().copied().unwrap_or_else(|| padded(x));
        let whole = _mm512_cvtps_epi32(_mm512_mul_ps(cast(sixteen), _mm512_set1_ps(unit.recip())));
        // With half of its range added to each digit, digits count from nothing, each by itself; without it they have signs
        // again.
        let bytes = match self.digits {
            Digits::Three => {
                let halves = _mm512_set1_epi32(0x0080_8080);
                _mm512_xor_si512(_mm512_add_epi32(whole, halves), halves)
            }
            Digits::Two => {
                let all = _mm512_add_epi32(whole, _mm512_set1_epi32(0x0080_8808));
                let first = _mm512_and_si512(all, _mm512_set1_epi32(0xf));
                let middle = _mm512_and_si512(_mm512_slli_epi32::<4>(all), _mm512_set1_epi32(0x000f_ff00));
                let last = _mm512_slli_epi32::<24>(_mm512_srli_epi32::<16>(all));
                let apart = _mm512_or_si512(first, _mm512_or_si512(middle, last));
                _mm512_sub_epi8(apart, _mm512_set1_epi32(0x8008_8008_u32 as i32))
            }
        };
        _mm512_maskz_permutexvar_epi8(self.present, self.order, bytes)
    }
}

/// The sums of the bytes of each, which stand together.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn totalled(of: __m512i) -> [i32; EACH] {
    let of = _mm512_add_epi32(of, _mm512_shuffle_epi32::<0b10_11_00_01>(of));
    let of: [[i32; LANES / EACH]; EACH] = cast(_mm512_add_epi32(of, _mm512_shuffle_epi32::<0b01_00_11_10>(of)));
    of.map(|[sum, ..]| sum)
}

/// Some numbers, at most 16, and zeros.
pub(super) fn padded(of: &[f32]) -> [f32; LANES] {
    std::array::from_fn(|i| of.get(i).copied().unwrap_or_default())
}

/// The power of two in which the largest of a run of inputs has 23 bits, NaN if one is not finite.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) fn unit(x: &[f32]) -> f32 {
    const LARGEST: f32 = (127 << 16) as f32;
    // NaN and infinity have the largest bits.
    let (whole, rest) = x.as_chunks();
    let (mut largest, absolute) = (_mm512_setzero_si512(), _mm512_set1_epi32(i32::MAX));
    for &sixteen in whole.iter().chain((!rest.is_empty()).then_some(&padded(rest))) {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(cast::<[f32; LANES], _>(sixteen), absolute));
    }
    let largest = f32::from_bits(_mm512_reduce_max_epu32(largest));
    if !largest.is_finite() {
        return f32::NAN;
    }
    // The power of two at or above the quotient; the least normal number serves what is smaller still.
    let quotient = (largest / LARGEST).max(f32::MIN_POSITIVE);
    let below = f32::from_bits(quotient.to_bits() & !((1 << 23) - 1));
    if below < quotient { below * 2.0 } else { below }
}
