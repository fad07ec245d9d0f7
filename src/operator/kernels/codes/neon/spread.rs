//! Codes of any width as signed bytes of vectors of four rows.

use std::arch::aarch64::*;

use pulp::bytemuck::cast;

use super::super::packed::PANEL;
use super::{EACH, ROWS, VECTORS};

/// Bytes of a vector.
const BYTES: usize = EACH * ROWS;

/// How codes of some bits become bytes.
pub(super) struct Spread {
    /// Bytes of a chunk of the rows of a panel.
    bytes: usize,
    /// Where, of each vector, the sixteen bytes begin from which its codes come.
    begin: [usize; VECTORS],
    /// Of each, the byte in which a code begins.
    order: [[u8; BYTES]; VECTORS],
    /// Where in that it begins, with the other sign, as it moves to the right.
    shifts: [i8; BYTES],
    mask: u8,
}

impl Spread {
    pub(super) fn new(bits: u8) -> Self {
        let width = usize::from(bits);
        let bytes = if bits.is_power_of_two() { PANEL * EACH } else { PANEL * EACH * width / 8 };
        // (The codes of a vector may be fewer bytes than sixteen, but not those of a chunk.)
        let first = |vector: usize| vector * BYTES * width / 8;
        let begin = std::array::from_fn(|vector| first(vector).min(bytes - BYTES));
        let order = std::array::from_fn(|vector| {
            std::array::from_fn(|at| (first(vector).saturating_sub(begin[vector]) + at * width / 8) as u8)
        });
        let shifts = std::array::from_fn(|at| -((at * width % 8) as i8));
        Spread { bytes, begin, order, shifts, mask: u8::MAX >> (8 - bits) }
    }

    /// Bytes of a chunk.
    #[inline(always)]
    pub(super) fn chunk<const KIND: u8>(&self) -> usize {
        if KIND == 0 { self.bytes } else { PANEL * EACH }
    }

    /// A part of a vector of a chunk.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) fn lane<const KIND: u8>(&self, chunk: &[u8], part: usize, vector: usize) -> int8x16_t {
        if KIND == 0 {
            return self.bytes_of(chunk, vector);
        }
        let Some(&codes) = chunk.as_chunks::<BYTES>().0.get(vector) else { return vdupq_n_s8(0) };
        let codes: uint8x16_t = cast(codes);
        vreinterpretq_s8_u8(match KIND {
            // Less 128.
            8 => veorq_u8(codes, vdupq_n_u8(0x80)),
            _ => {
                let moved = vshlq_u8(codes, vdupq_n_s8(-((KIND * part as u8) as i8)));
                vandq_u8(moved, vdupq_n_u8((1 << KIND) - 1))
            }
        })
    }

    /// Codes that do not lie in halves or quarters of bytes: of each the byte in which it begins and the next one.
    #[inline]
    #[target_feature(enable = "neon")]
    fn bytes_of(&self, chunk: &[u8], vector: usize) -> int8x16_t {
        let Some(&bytes) = chunk.get(self.begin[vector]..).and_then(|of| of.first_chunk::<BYTES>()) else {
            return vdupq_n_s8(0);
        };
        let (bytes, order, shifts) = (cast(bytes), cast(self.order[vector]), cast(self.shifts));
        // (Beyond the sixteen bytes there is nothing of a code.)
        let lower = vshlq_u8(vqtbl1q_u8(bytes, order), shifts);
        let upper = vqtbl1q_u8(bytes, vaddq_u8(order, vdupq_n_u8(1)));
        let upper = vshlq_u8(upper, vaddq_s8(shifts, vdupq_n_s8(8)));
        vreinterpretq_s8_u8(vandq_u8(vorrq_u8(lower, upper), vdupq_n_u8(self.mask)))
    }
}
