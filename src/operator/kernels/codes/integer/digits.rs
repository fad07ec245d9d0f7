//! Numbers in fixed point, and the signed bytes they are cut into: x = u·(2¹⁶a + 2⁸b + c), or one or two bytes.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::{EACH, LANES, padded};

/// Sums of the products of all bytes, from those of each, the largest first: up to three.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn join<const BYTES: usize>(of: [__m512i; BYTES]) -> __m512 {
    // All but the largest of three fit 32 bits together.
    let mut rest = of[BYTES - 1];
    if BYTES > 1 {
        rest = _mm512_add_epi32(_mm512_slli_epi32::<8>(of[BYTES - 2]), rest);
    }
    match BYTES {
        3 => _mm512_fmadd_ps(_mm512_cvtepi32_ps(of[0]), _mm512_set1_ps(65_536.0), _mm512_cvtepi32_ps(rest)),
        _ => _mm512_cvtepi32_ps(rest),
    }
}

/// Cuts numbers of a layout.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// Where bytes of 16 columns go, as codes come out of vectors: four bytes of each lane, for each byte of a number, the
    /// largest first.
    order: __m512i,
    present: u64,
}

impl Cut {
    /// Into so many bytes, for codes of which so many begin in the same one.
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(bytes: usize, parts: usize) -> Self {
        let place: [u8; 64] = std::array::from_fn(|at| {
            let (limb, lane, at) = (at / 16, at / EACH % EACH, at % EACH);
            // (What is behind the last limb is masked away.)
            let column = lane / parts * EACH * parts + at * parts + lane % parts;
            (column * EACH + (bytes - 1).saturating_sub(limb)) as u8
        });
        Cut { order: cast(place), present: u64::MAX >> (64 - 16 * bytes) }
    }

    /// The first 16 of some inputs in bytes; zeros where there are none, and where the unit is not a number.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
    pub(super) fn split(&self, x: &[f32], unit: f32) -> __m512i {
        let sixteen = x.first_chunk().copied().unwrap_or_else(|| padded(x));
        let whole = _mm512_cvtps_epi32(_mm512_mul_ps(cast(sixteen), _mm512_set1_ps(unit.recip())));
        // With half of its range added to each digit, digits count from nothing, each by itself; without it they have signs
        // again.
        let halves = _mm512_set1_epi32(0x0080_8080);
        let bytes = _mm512_xor_si512(_mm512_add_epi32(whole, halves), halves);
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

/// The largest of a run of inputs without its sign, which is not a number or infinite if one is.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) fn largest(x: &[f32]) -> f32 {
    // NaN and infinity have the largest bits.
    let (whole, rest) = x.as_chunks();
    let (mut largest, absolute) = (_mm512_setzero_si512(), _mm512_set1_epi32(i32::MAX));
    for &sixteen in whole.iter().chain((!rest.is_empty()).then_some(&padded(rest))) {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(cast::<[f32; LANES], _>(sixteen), absolute));
    }
    f32::from_bits(_mm512_reduce_max_epu32(largest))
}
