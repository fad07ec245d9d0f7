//! The inner product with a row of 2-, 4- or 8-bit codes, 16 of them at a time.

use pulp::Simd;
use pulp::bytemuck::{cast, cast_slice};
use pulp::x86::V4;

use super::CodedRow;
use crate::scalar::{DType, Real};
use crate::simd::Aligned;
use crate::simd::prefetch;

/// Lanes of a register.
const LANES: usize = 16;
/// Bytes between what is multiplied and what is asked for.
const AHEAD: usize = 1024;

/// An input as 16 words of codes meet it: number k of word l in row k, lane l; zeros at its end.
#[derive(Debug)]
pub(super) struct Planes {
    numbers: Aligned<f32>,
    length: usize,
    /// For each lane of a block, the group that it is in, counted from the block's first; `None` if a block lies
    /// in one group.
    lanes: Option<[u32; LANES]>,
}

impl Planes {
    /// `None` if there is no kernel for such rows.
    pub(super) fn new<T: Real>(x: &[T], bits: u8, group: usize) -> Option<Self> {
        if T::DTYPE != DType::F32 || !matches!(bits, 2 | 4 | 8) {
            return None;
        }
        let x: &[f32] = cast_slice(x);
        let in_word = 32 / usize::from(bits);
        let block = in_word * LANES;
        // A block lies in one group, or a group is some whole lanes of a block.
        let lanes = match group {
            _ if group >= x.len() || group.is_multiple_of(block) => None,
            _ if block.is_multiple_of(group) && group.is_multiple_of(in_word) => {
                Some(std::array::from_fn(|lane| (lane * in_word / group) as u32))
            }
            _ => return None,
        };
        let length = x.len().next_multiple_of(block);
        let mut numbers = Aligned::default();
        let planes: &mut [f32] = numbers.numbers(length);
        for (at, &value) in x.iter().enumerate() {
            let (start, l, k) = (at / block * block, at % block / in_word, at % in_word);
            planes[start + k * LANES + l] = value;
        }
        Some(Planes { numbers, length, lanes })
    }

    pub(super) fn dot<T: Real>(&self, simd: V4, row: &CodedRow<'_, T>) -> f32 {
        let scales: &[f32] = cast_slice(row.scales);
        let job = Dot { simd, planes: self, codes: row.codes, columns: row.columns, scales, group: row.group };
        match row.bits {
            2 => simd.vectorize(Job::<2>(job)),
            4 => simd.vectorize(Job::<4>(job)),
            _ => simd.vectorize(Job::<8>(job)),
        }
    }
}

struct Dot<'a> {
    simd: V4,
    planes: &'a Planes,
    codes: &'a [u8],
    columns: usize,
    scales: &'a [f32],
    group: usize,
}

struct Job<'a, const BITS: usize>(Dot<'a>);

impl<const BITS: usize> pulp::NullaryFnOnce for Job<'_, BITS> {
    type Output = f32;

    #[inline(always)]
    fn call(self) -> f32 {
        let Dot { simd, planes, codes, columns, scales, group } = self.0;
        let block = 32 / BITS * LANES;
        let numbers: &[pulp::f32x16] = cast_slice(planes.numbers.filled(planes.length));
        // What the lowest four bits of a shifted word stand for.
        let table: [f32; LANES] = std::array::from_fn(|i| (i % (1 << BITS.min(4))) as f32 - (1 << (BITS - 1)) as f32);
        let table = cast(table);
        let lanes = planes.lanes.map(cast);
        let per_block = block / group.min(block);
        let mut total = [simd.splat_f32s(0.0); 2];
        let bytes = (columns * BITS).div_ceil(8);
        let codes = &codes[..bytes.min(codes.len())];
        for (at, numbers) in numbers.chunks_exact(32 / BITS).enumerate() {
            let words: [u8; 64] = match codes.get(at * 64..at * 64 + 64).and_then(|part| part.first_chunk()) {
                Some(&whole) => whole,
                None => std::array::from_fn(|i| codes.get(at * 64 + i).copied().unwrap_or_default()),
            };
            if let Some(here) = codes.get(at * 64) {
                prefetch(here, AHEAD);
            }
            let mut sums = [simd.splat_f32s(0.0); 2];
            for (k, &x) in numbers.iter().enumerate() {
                let value = number::<BITS>(simd, cast(words), k, table);
                sums[k % 2] = simd.mul_add_e_f32s(value, x, sums[k % 2]);
            }
            let sum = simd.add_f32s(sums[0], sums[1]);
            let scale = match lanes {
                None => simd.splat_f32s(scales[(at * block / group).min(scales.len() - 1)]),
                Some(lanes) => {
                    let first = at * per_block;
                    let here: [f32; LANES] = match scales.get(first..first + LANES).and_then(|s| s.first_chunk()) {
                        Some(&whole) => whole,
                        None => std::array::from_fn(|i| scales.get(first + i).copied().unwrap_or_default()),
                    };
                    cast(simd.avx512f._mm512_permutexvar_ps(lanes, cast(here)))
                }
            };
            total[at % 2] = simd.mul_add_e_f32s(sum, scale, total[at % 2]);
        }
        simd.reduce_sum_f32s(simd.add_f32s(total[0], total[1]))
    }
}

/// Number k of each word, counted from the middle of the levels.
#[inline(always)]
fn number<const BITS: usize>(
    simd: V4,
    words: std::arch::x86_64::__m512i,
    k: usize,
    table: std::arch::x86_64::__m512,
) -> pulp::f32x16 {
    use std::arch::x86_64::{__m128i, __m512i};
    let shift: __m128i = cast([(k * BITS) as u64, 0]);
    let shifted: __m512i = simd.avx512f._mm512_srl_epi32(words, shift);
    match BITS {
        8 => {
            // A byte in the lowest bits of 2²³ as a float is 2²³ and as much; subtracted, it is itself.
            let byte = simd.avx512f._mm512_and_si512(shifted, simd.avx512f._mm512_set1_epi32(0xff));
            let float = simd.avx512f._mm512_or_si512(byte, simd.avx512f._mm512_set1_epi32(0x4b00_0000));
            simd.sub_f32s(cast(float), simd.splat_f32s(8_388_608.0 + 128.0))
        }
        _ => cast(simd.avx512f._mm512_permutexvar_ps(shifted, table)),
    }
}

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
