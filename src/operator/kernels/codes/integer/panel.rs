//! Codes of some rows side by side: a vector has the same columns of 16 rows.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::bytes::Spread;
use super::{BANDS, EACH, LINE, Lanes};
use crate::memory::prefetch;

/// How codes of some bits come out of the bytes of vectors, two bands each.
#[derive(Clone, Copy)]
pub(super) struct Unpacking {
    spread: Spread,
    /// Bytes of a vector.
    bytes: usize,
    present: u64,
}

/// Bits that codes have, where their lanes are bytes, halves or quarters of them; 0 for those of other widths.
pub(super) const fn kind(bits: u8) -> u8 {
    match bits {
        2 | 4 | 8 => bits,
        _ => 0,
    }
}

/// For each part of a byte what brings its codes down to the lowest bits of theirs, as matrices of bits: bit i of the result is that of the
/// byte 7 − i of a matrix that a byte has.
const fn upper(bits: u8) -> [i64; EACH] {
    let (mut matrices, mut part) = ([0; EACH], 0);
    while bits > 0 && part * (bits as usize) < 8 {
        let mut bit = 0;
        while bit < bits as usize {
            matrices[part] |= 1 << (part * (bits as usize) + bit) << (8 * (7 - bit));
            bit += 1;
        }
        part += 1;
    }
    matrices
}

impl Unpacking {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(bits: u8) -> Self {
        let bytes = if kind(bits) == 0 { 8 * usize::from(bits) } else { 64 };
        Unpacking { spread: Spread::new(bits), bytes, present: u64::MAX >> (64 - bytes) }
    }

    /// The vectors of a chunk of columns, from bytes that begin with them.
    ///
    /// # Safety
    /// The machine has the instructions, and there are all the bytes of two vectors.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[allow(unsafe_code)]
    pub(super) unsafe fn load<const KIND: u8>(&self, codes: *const u8) -> [__m512i; BANDS] {
        // SAFETY: as the caller says.
        unsafe {
            match KIND {
                0 => {
                    let second = codes.add(self.bytes).cast();
                    [_mm512_maskz_loadu_epi8(self.present, codes.cast()), _mm512_maskz_loadu_epi8(self.present, second)]
                }
                _ => [_mm512_loadu_si512(codes.cast()), _mm512_loadu_si512(codes.add(64).cast())],
            }
        }
    }

    /// One of a chunk's lanes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
    pub(super) fn lane<const KIND: u8>(&self, codes: __m512i, part: usize) -> __m512i {
        match KIND {
            8 => codes,
            0 => self.only(codes),
            _ if part == 0 => _mm512_and_si512(codes, self.spread.mask()),
            // (Which takes one instruction, where to shift and to cut takes two.)
            _ => _mm512_gf2p8affine_epi64_epi8::<0>(codes, _mm512_set1_epi64(const { upper(KIND) }[part])),
        }
    }

    /// The only lane of a chunk, where none has codes that share bytes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn only(&self, codes: __m512i) -> __m512i {
        self.spread.codes(codes)
    }

    /// Bytes of a chunk. (That of whole vectors is known to the compiler.)
    #[inline(always)]
    pub(super) fn chunk<const KIND: u8>(&self) -> usize {
        BANDS * if KIND == 0 { self.bytes } else { LINE }
    }
}

/// A lane of codes of a panel.
pub(super) type Pair = [Lanes<i32>; BANDS];

/// Codes as signed bytes that count from the middle, for matrix instructions: those that are halves or quarters of bytes at
/// the upper end of theirs, as that takes the fewest instructions.
#[derive(Clone, Copy)]
pub(super) struct Signed {
    unpacking: Unpacking,
    upper: __m512i,
    half: __m512i,
}

impl Signed {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(bits: u8) -> Self {
        let upper = match kind(bits) {
            0 => 0,
            bits => u8::MAX << (8 - bits),
        };
        let half = if kind(bits) == 0 { 1u8 << (bits - 1) } else { 1 << 7 };
        let (upper, half) = (_mm512_set1_epi8(upper as i8), _mm512_set1_epi8(half as i8));
        Signed { unpacking: Unpacking::new(bits), upper, half }
    }

    /// What a code is multiplied with.
    #[inline(always)]
    pub(super) const fn times<const KIND: u8>() -> f32 {
        if KIND == 0 { 1.0 } else { (1u16 << (8 - KIND)) as f32 }
    }

    /// Bytes of a chunk.
    #[inline(always)]
    pub(super) fn chunk<const KIND: u8>(&self) -> usize {
        self.unpacking.chunk::<KIND>()
    }

    /// Unpacks some chunks, and asks for what is so many bytes ahead of them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[allow(unsafe_code)]
    pub(super) fn unpack<const KIND: u8, const PARTS: usize>(&self, codes: &[u8], ahead: usize, to: &mut [Pair]) {
        for (codes, to) in codes.chunks_exact(self.chunk::<KIND>()).zip(to.as_chunks_mut::<PARTS>().0) {
            prefetch(&codes[0], ahead);
            prefetch(&codes[0], ahead.wrapping_add(LINE));
            // SAFETY: a chunk is the bytes of two vectors. The machine has the instructions, or this were not called.
            let loaded = unsafe { self.unpacking.load::<KIND>(codes.as_ptr()) };
            for (part, to) in to.iter_mut().enumerate() {
                for band in 0..BANDS {
                    to[band] = Lanes(cast(self.lane::<KIND, PARTS>(loaded[band], part)));
                }
            }
        }
    }

    /// One of a chunk's lanes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn lane<const KIND: u8, const PARTS: usize>(&self, codes: __m512i, part: usize) -> __m512i {
        let moved = match KIND {
            8 => return _mm512_xor_si512(codes, self.half),
            0 => return _mm512_sub_epi8(self.unpacking.only(codes), self.half),
            _ if part + 1 == PARTS => codes,
            _ => _mm512_sllv_epi32(codes, _mm512_set1_epi32(i32::from(KIND) * (PARTS - 1 - part) as i32)),
        };
        // The bits of a code, of which the highest is turned: less half of all levels, with a sign.
        _mm512_ternarylogic_epi32::<0x6a>(moved, self.upper, self.half)
    }
}
