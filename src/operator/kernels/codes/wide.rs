//! Codes of any width as numbers, 16 of them at a time: AVX-512 where [`integer`](super::integer) has no instructions.

use pulp::Simd;
use pulp::bytemuck::cast;
use pulp::x86::V4;

/// Lanes of a register.
const LANES: usize = 16;
/// Writes the codes of a row out in their order, counted from the middle of the levels, at any width: 16 codes lie in at
/// most four words of 32 bits, from which each lane takes the two that it may straddle.
pub(super) fn unpack(simd: V4, bits: u8, codes: &[u8], to: &mut [f32]) {
    simd.vectorize(Unpack { simd, bits, codes, to });
}

struct Unpack<'a> {
    simd: V4,
    bits: u8,
    codes: &'a [u8],
    to: &'a mut [f32],
}

impl pulp::NullaryFnOnce for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        use std::arch::x86_64::__m512i;
        let Unpack { simd, bits, codes, to } = self;
        let (avx, width) = (simd.avx512f, u32::from(bits));
        let lane = |of: &dyn Fn(u32) -> u32| -> __m512i {
            cast(std::array::from_fn::<u32, LANES, _>(|i| of(i as u32 * width)))
        };
        let (word, next) = (lane(&|bit| bit / 32), lane(&|bit| (bit / 32 + 1).min(15)));
        // A shift by 32 or more gives zero.
        let (right, left) = (lane(&|bit| bit % 32), lane(&|bit| 32 - bit % 32));
        let mask = avx._mm512_set1_epi32((1 << bits) - 1);
        let middle = simd.splat_f32s((1 << (bits - 1)) as f32);
        let step = 2 * usize::from(bits);
        for (at, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let words: [u8; 16] = match codes.get(at * step..at * step + 16).and_then(|part| part.first_chunk()) {
                Some(&whole) => whole,
                None => std::array::from_fn(|i| codes.get(at * step + i).copied().unwrap_or_default()),
            };
            // Four times over: a word beyond the last is the first again, of which nothing is left under the mask.
            let words: __m512i = avx._mm512_broadcast_i32x4(cast(words));
            let low = avx._mm512_srlv_epi32(avx._mm512_permutexvar_epi32(word, words), right);
            let high = avx._mm512_sllv_epi32(avx._mm512_permutexvar_epi32(next, words), left);
            let code = avx._mm512_and_si512(avx._mm512_or_si512(low, high), mask);
            *to = cast(simd.sub_f32s(cast(avx._mm512_cvtepi32_ps(code)), middle));
        }
    }
}
