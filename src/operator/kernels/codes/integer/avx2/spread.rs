//! Codes of any width as bytes of vectors of eight rows.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::super::super::packed::chunk;
use super::super::panel::kind;
use super::{Chunk, ROWS, VECTORS};
use crate::memory::Reading;

/// Codes of a row in a chunk, and bytes of half a vector.
const CODES: usize = 4;
const HALF: usize = 2 * ROWS;

/// How codes of some bits become bytes.
pub(in super::super) struct Spread {
    reading: Reading,
    bits: u8,
    /// Bytes of a chunk of the rows of a panel.
    bytes: usize,
    /// Chunks of which the products with a byte, added up by two columns each, are less than 2¹⁵.
    pub(super) together: usize,
    /// Where, of each vector, the sixteen bytes begin from which the codes of four rows come, and of the next four.
    begin: [[usize; 2]; VECTORS],
    /// Of each, the two bytes that have a code, for the codes of even places in a row and of odd ones.
    order: [[[u8; 2 * HALF]; 2]; VECTORS],
    /// What moves them to the upper byte.
    factors: [[i16; HALF]; 2],
}

impl Spread {
    pub(in super::super) fn new(bits: u8) -> Self {
        let width = usize::from(bits);
        let bytes = if kind(bits) == 0 { HALF * width } else { size_of::<Chunk>() };
        // (The bytes of a vector may be fewer than sixteen, but not those of a chunk.)
        let begin =
            std::array::from_fn(|vector| [0, 1].map(|half| ((2 * vector + half) * 2 * width).min(bytes - HALF)));
        // The codes of two rows are as many bytes as one has bits.
        let bit = |place: usize, odd: usize| (2 * (place % 4) + odd) * width;
        let order = std::array::from_fn(|vector| {
            [0, 1].map(|odd| {
                std::array::from_fn(|at| {
                    let (half, place) = (at / HALF, at % HALF / 2);
                    let first = (2 * vector + half) * 2 * width - begin[vector][half];
                    (first + place / 4 * width + bit(place, odd) / 8 + at % 2) as u8
                })
            })
        });
        let factors = [0, 1].map(|odd| std::array::from_fn(|place| 1 << (8 - bit(place, odd) % 8)));
        let (most, parts) = (2 * 128 * ((1 << bits) - 1), chunk(bits) / CODES);
        let together = (i16::MAX as usize / most / parts).max(1);
        Spread { reading: Reading::here(), bits, bytes, together, begin, order, factors }
    }

    /// Bytes of a chunk.
    #[inline(always)]
    pub(super) fn chunk<const KIND: u8>(&self) -> usize {
        if KIND == 0 { self.bytes } else { size_of::<Chunk>() }
    }

    /// The middle of the levels of codes.
    #[inline(always)]
    pub(super) fn middle(&self) -> f32 {
        (1 << (self.bits - 1)) as f32
    }

    /// The codes of a panel as bytes, in memory that may have been used before.
    pub(super) fn write<'a>(&self, codes: &[u8], to: &'a mut Vec<u8>) -> &'a [u8] {
        to.resize(codes.len() / self.bytes * size_of::<Chunk>(), 0);
        // SAFETY: there are such codes only where the machine has the instructions: `Digits::all` asks.
        #[allow(unsafe_code)]
        unsafe {
            self.write_chunks(codes, to);
        }
        to
    }

    #[target_feature(enable = "avx2")]
    fn write_chunks(&self, codes: &[u8], to: &mut [u8]) {
        for (codes, to) in codes.chunks_exact(self.bytes).zip(to.as_chunks_mut().0.as_chunks_mut::<VECTORS>().0) {
            self.reading.ask(&codes[0], [0, 1]);
            for (vector, to) in to.iter_mut().enumerate() {
                *to = cast::<_, [u8; CODES * ROWS]>(self.bytes_of(codes, vector));
            }
        }
    }

    /// Some vectors of a chunk; and with the first what comes so much later is asked for.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn load<const KIND: u8, const B: usize>(&self, chunk: &[u8], some: usize) -> [__m256i; B] {
        if some == 0 {
            self.reading.ask(&chunk[0], [0, 1]);
        }
        let mut vectors = [_mm256_setzero_si256(); B];
        for (b, to) in vectors.iter_mut().enumerate() {
            let vector = some * B + b;
            *to = if KIND == 0 { self.bytes_of(chunk, vector) } else { whole(chunk, vector) };
        }
        vectors
    }

    /// Of each row of some vectors, which were loaded, one of four bytes as the lowest, below others or, the last, below nothing.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn byte<const KIND: u8, const B: usize>(
        &self,
        chunk: &[u8],
        some: usize,
        at: usize,
        vectors: &[__m256i; B],
    ) -> [__m256i; B] {
        let mut bytes = *vectors;
        for (b, bytes) in bytes.iter_mut().enumerate() {
            // (To read them again takes none of the units that shift and multiply.)
            let rest = chunk.get((some * B + b) * CODES * ROWS + at..).and_then(|rest| rest.first_chunk());
            *bytes = match rest {
                Some(again) if KIND != 0 && at + 1 < CODES => cast::<[u8; CODES * ROWS], _>(*again),
                _ => _mm256_srl_epi32(*bytes, _mm_cvtsi32_si128(8 * at as i32)),
            };
        }
        bytes
    }

    /// Codes that do not lie in halves or quarters of bytes.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn bytes_of(&self, chunk: &[u8], vector: usize) -> __m256i {
        assert!(chunk.len() >= self.bytes, "a whole chunk");
        let from = chunk.as_ptr();
        let [lower, upper] = self.begin[vector];
        // SAFETY: both begin sixteen bytes before the end of a chunk at the latest, as `new` says, and there is a whole one.
        #[allow(unsafe_code)]
        let (lower, upper) =
            unsafe { (_mm_loadu_si128(from.add(lower).cast()), _mm_loadu_si128(from.add(upper).cast())) };
        let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(lower), upper);
        let [even, odd] = [0, 1].map(|odd| {
            let pairs = _mm256_shuffle_epi8(both, cast(self.order[vector][odd]));
            _mm256_mullo_epi16(pairs, cast(self.factors[odd]))
        });
        let odd = _mm256_and_si256(odd, _mm256_set1_epi16(0xff00_u16 as i16));
        let all = _mm256_or_si256(_mm256_srli_epi16::<8>(even), odd);
        _mm256_and_si256(all, _mm256_set1_epi8((u8::MAX >> (8 - self.bits)) as i8))
    }
}

/// The next lane of some vectors, in bytes. (Shifts by a number that the compiler knows.)
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn next<const KIND: u8, const B: usize>(vectors: &mut [__m256i; B]) -> [__m256i; B] {
    let mut lanes = *vectors;
    if matches!(KIND, 2 | 4) {
        for (lane, vector) in lanes.iter_mut().zip(vectors) {
            *lane = _mm256_and_si256(*vector, _mm256_set1_epi8((1 << KIND) - 1));
            *vector = if KIND == 2 { _mm256_srli_epi32::<2>(*vector) } else { _mm256_srli_epi32::<4>(*vector) };
        }
    }
    lanes
}

/// Codes of 8, 4 or 2 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn whole(chunk: &[u8], vector: usize) -> __m256i {
    let vectors: &[[u8; CODES * ROWS]] = chunk.as_chunks().0;
    vectors.get(vector).map_or(_mm256_setzero_si256(), |vector| cast(*vector))
}
