//! Codes and inputs as numbers of 16 bits, which matrix instructions multiply: bf16, the upper half of an `f32`.
//!
//! A code of b bits, up to seven, is a number with it behind the leading bit of 2ᵇ: what all have too much, 2ᵇ and half of
//! it, as codes count from the middle of their levels, leaves with the sum of the inputs. An input is the sum of three such
//! numbers, x = a + b + c with eight bits each, without any rounding. `tdpbf16ps` adds up the products of pairs of columns of 16
//! rows with up to 16 inputs, in `f32`: so one sum holds all three, and only has to be scaled. Numbers under 2⁻¹²⁶ count as
//! zero.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::panel::Unpacking;
use super::runs::{Runs, of_run};
use super::tiles::tiles;
use super::{BANDS, DIGITS, LANES, LINE, Lanes};
use crate::memory::prefetch_early;

/// Bits of the widest codes: as many as a number has behind its leading bit.
pub(super) const WIDEST: u8 = 7;

/// Codes of a step: a pair of columns of 16 rows in each vector.
pub(super) type Codes = [[Lanes<i32>; LANES]; BANDS];
/// Inputs of a step: 32 columns each, those of pairs side by side, the largest digits first.
pub(super) type Cut<const COUNT: usize> = [[Lanes<i32>; COUNT]; DIGITS];
/// Sums of a run: of each band, an input's with its rows.
pub(super) type Sums = [[Lanes<f32>; LANES]; BANDS];

/// What makes numbers of codes.
#[derive(Clone, Copy)]
pub(super) struct Table {
    bits: u8,
    /// The bits that codes take, and those of the leading one.
    codes: __m512i,
    leading: __m512i,
    unpacking: Unpacking,
}

impl Table {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn new(bits: u8) -> Self {
        let bits = bits.min(WIDEST);
        let (codes, leading) = (((1 << bits) - 1) << (WIDEST - bits), (127 + i16::from(bits)) << 7);
        let (codes, leading) = (_mm512_set1_epi16(codes), _mm512_set1_epi16(leading));
        Table { bits, codes, leading, unpacking: Unpacking::new(bits) }
    }

    /// What numbers have more than codes that count from the middle.
    #[inline]
    pub(super) fn more(&self) -> f32 {
        1.5 * f32::from(1u8 << self.bits)
    }

    /// Numbers of the codes that begin at some bit of each 16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn numbers<const KIND: u8>(&self, of: __m512i, at: u8) -> __m512i {
        let bits = if KIND == 0 { self.bits } else { KIND };
        let (left, right) = (WIDEST.saturating_sub(bits + at), (bits + at).saturating_sub(WIDEST));
        // (The widths of lanes that are bytes are not known to the compiler, but which of them move right.)
        let moves_right = if KIND == 0 { at > 0 } else { right > 0 };
        let moved = match moves_right {
            true => _mm512_srlv_epi16(of, _mm512_set1_epi16(i16::from(right))),
            false => _mm512_sllv_epi16(of, _mm512_set1_epi16(i16::from(left))),
        };
        // Codes where they are, the leading bit beside them.
        _mm512_ternarylogic_epi32::<0xea>(moved, self.codes, self.leading)
    }

    /// Numbers of a step, from its codes and others.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn all<const KIND: u8>(&self, codes: &[u8], to: &mut Codes) {
        self.unpack::<KIND, 0>(codes, 0, to);
        self.unpack::<KIND, 1>(codes, 0, to);
        self.unpack::<KIND, 2>(codes, 0, to);
        self.unpack::<KIND, 3>(codes, 0, to);
    }

    /// Numbers of a quarter of a step, from the codes of one or more steps; what has no codes there stays as it is.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    #[allow(unsafe_code)]
    pub(super) fn unpack<const KIND: u8, const QUARTER: usize>(&self, codes: &[u8], ahead: usize, to: &mut Codes) {
        // Chunks of 16, 8 or 4 columns, and the vectors that a quarter takes from each.
        let (first, chunks, vectors) = match KIND {
            2 => (QUARTER / 2, 1, 4),
            4 => (QUARTER, 1, 4),
            _ => (2 * QUARTER, 2, 2),
        };
        let bytes = self.unpacking.chunk::<KIND>();
        for chunk in 0..chunks {
            let from = (first + chunk) * bytes;
            let Some(codes) = codes.get(from..from + bytes) else { return };
            prefetch_early(&codes[0], ahead);
            prefetch_early(&codes[0], ahead + LINE);
            // SAFETY: a chunk is the bytes of two vectors. The machine has the instructions, or this were not called.
            let loaded = unsafe { self.unpacking.load::<KIND>(codes.as_ptr()) };
            for band in 0..BANDS {
                let of = if KIND == 0 { self.unpacking.only(loaded[band]) } else { loaded[band] };
                for vector in 0..vectors {
                    let at = match KIND {
                        2 => 2 * (QUARTER % 2 * 4 + vector),
                        4 => 4 * vector,
                        _ => 8 * vector,
                    };
                    let numbers = self.numbers::<KIND>(of, at as u8);
                    to[band][4 * QUARTER + chunk * vectors + vector] = Lanes(cast(numbers));
                }
            }
        }
    }
}

/// Tile registers: the sums of two bands of a run and of the next, and a step's codes of two bands and inputs of two digits.
pub(super) struct Tiles<const COUNT: usize>(Runs);

impl<const COUNT: usize> Tiles<COUNT> {
    /// # Panics
    /// Without the instructions.
    pub(super) fn new() -> Self {
        Tiles(Runs::new(COUNT, LANES))
    }

    /// Begins a run.
    #[inline(always)]
    pub(super) fn clear(&self, run: usize) {
        self.0.clear(run);
    }

    /// Adds the products of the codes of a step with the largest digits of inputs. The codes stay for the other digits.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn first(&self, run: usize, codes: &Codes, x: &Cut<COUNT>) {
        macro_rules! first {
            ($first:literal, $second:literal) => {
                tiles!(
                    "tileloadd tmm4, [{codes} + {line}]",
                    "tileloadd tmm6, [{x} + {line}]",
                    concat!("tdpbf16ps ", $first, ", tmm6, tmm4"),
                    "tileloadd tmm5, [{codes} + {line} + 1024]",
                    concat!("tdpbf16ps ", $second, ", tmm6, tmm5");
                    codes = in(reg) codes,
                    x = in(reg) &raw const x[0],
                    line = in(reg) size_of::<Lanes<i32>>(),
                )
            };
        }
        // SAFETY: the registers are configured, as [`Runs`] says. Of each band of the codes 16 rows of 64 bytes are read, and of the
        // digit one for each of COUNT inputs: as many as there are. No other memory is touched, nor the stack.
        unsafe { of_run!(run, first) }
    }

    /// Adds the products of the codes of the step with other digits.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn next(&self, run: usize, x: &[Lanes<i32>; COUNT]) {
        macro_rules! next {
            ($first:literal, $second:literal) => {
                tiles!(
                    "tileloadd tmm7, [{x} + {line}]",
                    concat!("tdpbf16ps ", $first, ", tmm7, tmm4"),
                    concat!("tdpbf16ps ", $second, ", tmm7, tmm5");
                    x = in(reg) x,
                    line = in(reg) size_of::<Lanes<i32>>(),
                )
            };
        }
        // SAFETY: the registers are configured, as above. COUNT rows of 64 bytes are read: as many as there are. No other
        // memory is touched, nor the stack.
        unsafe { of_run!(run, next) }
    }

    /// Writes the sums of a band of a run.
    #[inline(always)]
    pub(super) fn put<const BAND: usize>(&self, run: usize, to: &mut Sums) {
        self.0.put::<BAND, _>(run, to);
    }
}
