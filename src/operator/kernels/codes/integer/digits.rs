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
    /// Where bytes of 16 columns go, as codes come out of vectors: words of four bytes of a lane, for each byte of a number.
    order: __m512i,
    present: u64,
}

impl Cut {
    /// Into so many bytes, for codes of which so many begin in the same one: the lanes of a byte together, the largest byte first.
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(bytes: usize, parts: usize) -> Self {
        Self::placed(bytes, parts, |word| (word / EACH, word % EACH))
    }

    /// The same, the bytes of a lane together, once such vectors of so many inputs are turned in quarters: each word beside those of the
    /// other inputs.
    #[target_feature(enable = "avx512f")]
    pub(super) fn beside(bytes: usize, parts: usize, inputs: usize) -> Self {
        Self::placed(bytes, parts, |word| {
            let (quarter, at) = (word / EACH, word % EACH);
            let place = match inputs {
                1 => word,
                2 => at / 2 * LANES / 2 + quarter * 2 + at % 2,
                _ => at * EACH + quarter,
            };
            (place % bytes, place / bytes)
        })
    }

    /// With a byte, the largest being the first, and a lane for each word; those that there are not are zeros.
    #[target_feature(enable = "avx512f")]
    fn placed(bytes: usize, parts: usize, of: impl Fn(usize) -> (usize, usize)) -> Self {
        let (mut order, mut present) = ([0; 64], 0);
        for word in 0..LANES {
            let (byte, lane) = of(word);
            if byte >= bytes || lane >= EACH {
                continue;
            }
            for at in 0..EACH {
                let column = lane / parts * EACH * parts + at * parts + lane % parts;
                order[word * EACH + at] = (column * EACH + bytes - 1 - byte) as u8;
                present |= 1 << (word * EACH + at);
            }
        }
        Cut { order: cast::<[u8; 64], _>(order), present }
    }

    /// The first 16 of some inputs in bytes, with the inverse of their unit; zeros where there are none, and where that is not a number.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
    pub(super) fn split(&self, x: &[f32], inverse: f32) -> __m512i {
        let sixteen = x.first_chunk().copied().unwrap_or_else(|| padded(x));
        let whole = _mm512_cvtps_epi32(_mm512_mul_ps(cast(sixteen), _mm512_set1_ps(inverse)));
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

/// The largest of every sixteenth of a run of inputs without its sign, as bits: NaN and infinity have the largest.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) fn moduli(x: &[f32]) -> __m512i {
    let (whole, rest) = x.as_chunks();
    let (mut largest, absolute) = (_mm512_setzero_si512(), _mm512_set1_epi32(i32::MAX));
    for &sixteen in whole {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(cast::<[f32; LANES], _>(sixteen), absolute));
    }
    if !rest.is_empty() {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(cast::<[f32; LANES], _>(padded(rest)), absolute));
    }
    largest
}

/// The largest of each of some runs, from its [moduli], which is not a number or infinite if one is. (Four together take half the
/// instructions of one by one.)
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn largest<const V: usize>(of: [__m512i; V]) -> [f32; V] {
    let mut largest = [0.0; V];
    let (fours, rest) = of.as_chunks();
    let (to, to_rest) = largest.as_chunks_mut();
    for (to, [first, second, third, fourth]) in to.iter_mut().zip(fours) {
        let ab = _mm512_max_epu32(_mm512_unpacklo_epi32(*first, *second), _mm512_unpackhi_epi32(*first, *second));
        let cd = _mm512_max_epu32(_mm512_unpacklo_epi32(*third, *fourth), _mm512_unpackhi_epi32(*third, *fourth));
        let all = _mm512_max_epu32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        let all = _mm512_max_epu32(all, _mm512_shuffle_i32x4::<0b01_00_11_10>(all, all));
        let all = _mm512_max_epu32(all, _mm512_shuffle_i32x4::<0b10_11_00_01>(all, all));
        *to = cast::<_, [[f32; EACH]; LANES / EACH]>(all)[0];
    }
    for (to, of) in to_rest.iter_mut().zip(rest) {
        *to = f32::from_bits(_mm512_reduce_max_epu32(*of));
    }
    largest
}
