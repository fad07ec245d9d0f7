//! Codes of any width as bytes, and as numbers.

use std::arch::x86_64::*;

use pulp::bytemuck::{self, cast};

use super::super::CodedRow;
use super::{LANES, available};
use crate::scalar::{DType, Real};

/// Codes in a vector of bytes.
const STEP: usize = 64;

/// How codes of some bits become bytes.
#[derive(Clone, Copy)]
pub(super) struct Spread {
    /// The bytes of each eight codes to lanes of eight bytes.
    order: __m512i,
    /// Where a code begins in its lane.
    shifts: __m512i,
    mask: __m512i,
}

impl Spread {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(bits: u8) -> Self {
        let order: [u8; STEP] = std::array::from_fn(|i| (i / 8) as u8 * bits + (i % 8) as u8);
        let shifts: [u8; STEP] = std::array::from_fn(|i| (i % 8) as u8 * bits);
        Spread { order: cast(order), shifts: cast(shifts), mask: _mm512_set1_epi8((u8::MAX >> (8 - bits)) as i8) }
    }

    /// The lowest code of each byte.
    #[inline]
    pub(super) fn mask(self) -> __m512i {
        self.mask
    }

    /// 64 codes, from the bytes that begin with them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn codes(self, bytes: __m512i) -> __m512i {
        let lanes = _mm512_permutexvar_epi8(self.order, bytes);
        _mm512_and_si512(_mm512_multishift_epi64_epi8(self.shifts, lanes), self.mask)
    }
}

/// The bytes of a row's steps, with what the last one reads beyond them.
#[inline(always)]
pub(super) fn whole<'a>(codes: &'a [u8], steps: usize, bits: u8, held: &'a mut Vec<u8>) -> &'a [u8] {
    let length = steps.saturating_sub(1) * width(bits) + STEP;
    match codes.get(..length) {
        Some(codes) => codes,
        None => {
            held.extend_from_slice(codes);
            held.resize(length, 0);
            held
        }
    }
}

/// Bytes of a step.
#[inline(always)]
pub(super) fn width(bits: u8) -> usize {
    usize::from(bits) * STEP / 8
}

/// Writes a row out, scale·(code − zero) without offsets, where groups are whole vectors; whether that was done.
pub(in super::super) fn write<T: Real>(row: &CodedRow<'_, T>, to: &mut [T]) -> bool {
    let fits = row.group.is_multiple_of(LANES) || row.group >= row.columns;
    if T::DTYPE != DType::F32 || !fits || !available() {
        return false;
    }
    let (scales, to) = (bytemuck::cast_slice(row.beside.scales), bytemuck::cast_slice_mut(&mut to[..row.columns]));
    let middle = 1u8 << (row.bits - 1);
    let zero = |group: usize| f32::from(row.beside.zeros.map_or(middle, |zeros| zeros[group]));
    let mut held = Vec::new();
    let codes = whole(row.codes, row.columns.div_ceil(STEP), row.bits, &mut held);
    // SAFETY: the machine has the instructions, as was asked above.
    #[allow(unsafe_code)]
    unsafe {
        numbers(row.bits, codes, row.group.min(row.columns), scales, zero, to);
    }
    true
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
fn numbers(bits: u8, codes: &[u8], group: usize, scales: &[f32], zero: impl Fn(usize) -> f32, to: &mut [f32]) {
    let (spread, width) = (Spread::new(bits), width(bits));
    let (mut at, mut left) = (0, group);
    let (mut scale, mut middle) = (_mm512_set1_ps(scales[0]), _mm512_set1_ps(zero(0)));
    for (step, to) in to.chunks_mut(STEP).enumerate() {
        let code: &[u8; STEP] = match codes[step * width..].first_chunk() {
            Some(code) => code,
            None => break,
        };
        let mut code: __m512i = cast(*code);
        if bits < 8 {
            code = spread.codes(code);
        }
        let quarters: [[u8; LANES]; 4] = cast(code);
        for (to, quarter) in to.chunks_mut(LANES).zip(quarters) {
            if left == 0 {
                (at, left) = (at + 1, group);
                (scale, middle) = (_mm512_set1_ps(scales[at]), _mm512_set1_ps(zero(at)));
            }
            left -= to.len().min(left);
            let code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(cast(quarter)));
            let values: [f32; LANES] = cast(_mm512_mul_ps(_mm512_sub_ps(code, middle), scale));
            match to.first_chunk_mut() {
                Some(whole) => *whole = values,
                None => to.copy_from_slice(&values[..to.len()]),
            }
        }
    }
}
