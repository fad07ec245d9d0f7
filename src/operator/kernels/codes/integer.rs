//! Products with codes in integers: AVX-512 with VNNI and VBMI.
//!
//! Codes of any width become bytes: eight of them lie in as many bytes as a code has bits, from which each lane of
//! eight bytes takes its own (`vpermb`, `vpmultishiftqb`). An input is in fixed point, x = 2ᵉ·(2¹⁶a + 2⁸b + c) with signed
//! bytes a, b, c, and e such that the largest of a span of columns takes all bits: off by no more than 2⁻²³ of it, as
//! sums of `f32` are. `vpdpbusd` adds up the products of 64 codes with each of the three without any rounding; floats see
//! the sum of a span only, which is scaled then. Inputs that are not finite make a sum of NaN.

use std::arch::x86_64::*;
use std::ops::Range;

use pulp::bytemuck::{self, cast};

mod bytes;
mod fixed;

pub(super) use bytes::write;
use bytes::{Spread, whole, width};
pub(super) use fixed::Fixed;

use super::{CodedRows, Prepared};
use crate::scalar::Real;
use crate::simd::prefetch;

/// Codes in a step.
const STEP: usize = 64;
/// Lanes of sums.
const LANES: usize = 16;
/// Signed bytes of an input.
const LIMBS: usize = 3;
/// Bytes between what is multiplied and what is asked for.
const AHEAD: usize = 2048;
/// Vectors that meet a row together.
pub(super) const TOGETHER: usize = 2;

/// Whether the machine has the instructions. (The answer is kept by the standard library.)
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni")
}

/// The inner products of some rows with some inputs, row by row. All inputs are there in fixed point.
pub(super) fn products<T: Real>(rows: &CodedRows<'_, T>, range: Range<usize>, x: &[Prepared<T>], y: &mut [f32]) {
    let all = x.len();
    for first in (0..all).step_by(TOGETHER) {
        let (x, y) = (&x[first..all.min(first + TOGETHER)], &mut y[first..]);
        // As many sums as registers take: rows where inputs are few.
        match x.len() {
            1 => tiles::<T, 4, 1>(rows, range.clone(), x, y, all),
            _ => tiles::<T, 4, TOGETHER>(rows, range.clone(), x, y, all),
        }
    }
}

/// R rows at a time with V inputs; what is missing is computed for nothing.
fn tiles<T: Real, const R: usize, const V: usize>(
    rows: &CodedRows<'_, T>,
    range: Range<usize>,
    x: &[Prepared<T>],
    y: &mut [f32],
    stride: usize,
) {
    let Some(inputs) = all::<_, V>(std::array::from_fn(|v| x[v.min(x.len() - 1)].fixed.as_ref())) else { return };
    let (bits, steps) = (rows.bits, inputs[0].steps.len());
    let alike = inputs.iter().all(|x| x.alike(inputs[0]));
    for (first, y) in range.clone().step_by(R).zip(y.chunks_mut(R * stride)) {
        let mut held = [const { Vec::new() }; R];
        let mut each = [Codes::default(); R];
        let mut fit = alike;
        for ((r, each), held) in each.iter_mut().enumerate().zip(&mut held) {
            let row = rows.row((first + r).min(range.end - 1));
            let zeros = row.zeros.unwrap_or_default();
            *each =
                Codes { codes: whole(row.codes, steps, bits, held), scales: bytemuck::cast_slice(row.scales), zeros };
            fit &= inputs[0].fits(each, bits, rows.zeros.is_some());
        }
        assert!(fit, "rows and inputs of one kind");
        // SAFETY: the function needs instructions that the machine has, or there would be no `Fixed`: its
        // constructor asks for each of the features that the function is compiled for. Lengths were compared.
        #[allow(unsafe_code)]
        let sums = unsafe {
            match rows.zeros {
                Some(_) => tile::<true, R, V>(each, inputs, bits),
                None => tile::<false, R, V>(each, inputs, bits),
            }
        };
        for (y, sums) in y.chunks_mut(stride).zip(sums).take(range.end - first) {
            y.iter_mut().zip(sums).take(x.len()).for_each(|(y, sum)| *y = sum);
        }
    }
}

/// All of them, if all are there.
fn all<A: Copy, const N: usize>(each: [Option<A>; N]) -> Option<[A; N]> {
    let first = each[0]?;
    each.iter().all(Option::is_some).then(|| each.map(|one| one.unwrap_or(first)))
}

/// A row as the kernel reads it.
#[derive(Debug, Clone, Copy, Default)]
struct Codes<'a> {
    /// With what the last step reads beyond its end.
    codes: &'a [u8],
    scales: &'a [f32],
    /// Empty if there are none.
    zeros: &'a [u8],
}

/// The sums of R rows with V inputs. (No closures and no calls in here: functions of the standard library know nothing of
/// the instructions, and vectors would have to be in memory.)
///
/// # Safety
/// The machine has the instructions, inputs are [alike](Fixed::alike), and rows [fit](Fixed::fits) them.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
#[allow(unsafe_code, clippy::needless_range_loop)]
unsafe fn tile<const ZEROS: bool, const R: usize, const V: usize>(
    rows: [Codes<'_>; R],
    x: [&Fixed; V],
    bits: u8,
) -> [[f32; V]; R] {
    let (spread, first, width) = (Spread::new(bits), x[0], width(bits));
    let lanes: __m512i = cast(first.lanes.unwrap_or([0; LANES]));
    let mut totals = [[_mm512_setzero_ps(); V]; R];
    for span in 0..first.groups.len() {
        // SAFETY: `Fixed::new` made as many `starts` and `units` as `groups`, and all inputs have as many of them and of
        // `steps`. A group's number is below those of scales and zeros, of which there are 16 if lanes name groups, so
        // that 16 lie in the row from `start` on. The codes hold 64 bytes from each step's first on. `Inputs` and `Starts`
        // begin where a cache line does, and so do the 64 bytes of each limb.
        unsafe {
            let group = *first.groups.get_unchecked(span) as usize;
            let mut sums = [[[_mm512_setzero_si512(); LIMBS]; V]; R];
            for v in 0..V {
                let starts = &x[v].starts.get_unchecked(span).0;
                for limb in 0..LIMBS {
                    let start = _mm512_load_si512(starts[limb].as_ptr().cast());
                    for r in 0..R {
                        sums[r][v][limb] = start;
                    }
                }
            }
            if ZEROS {
                for r in 0..R {
                    let zeros = rows[r].zeros;
                    let zero = match first.lanes {
                        None => _mm512_set1_epi32((*zeros.get_unchecked(group)).into()),
                        Some(_) => {
                            let start = group.min(zeros.len() - LANES);
                            let here = _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.as_ptr().add(start).cast()));
                            let lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32((group - start) as i32));
                            _mm512_permutexvar_epi32(lanes, here)
                        }
                    };
                    for v in 0..V {
                        for limb in 0..LIMBS {
                            sums[r][v][limb] = _mm512_mullo_epi32(sums[r][v][limb], zero);
                        }
                    }
                }
            }
            let from = span * first.span;
            for step in from..(from + first.span).min(first.steps.len()) {
                for r in 0..R {
                    let code = rows[r].codes.as_ptr().add(step * width);
                    prefetch(&*code, AHEAD);
                    let mut code = _mm512_loadu_si512(code.cast());
                    if bits < 8 {
                        code = spread.codes(code);
                    }
                    for v in 0..V {
                        let limbs = &x[v].steps.get_unchecked(step).0;
                        for limb in 0..LIMBS {
                            let limbs = _mm512_load_si512(limbs[limb].as_ptr().cast());
                            sums[r][v][limb] = _mm512_dpbusd_epi32(sums[r][v][limb], code, limbs);
                        }
                    }
                }
            }
            for r in 0..R {
                let scales = rows[r].scales;
                let scale = match first.lanes {
                    None => _mm512_set1_ps(*scales.get_unchecked(group)),
                    Some(_) => {
                        let start = group.min(scales.len() - LANES);
                        let here = _mm512_loadu_ps(scales.as_ptr().add(start));
                        let lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32((group - start) as i32));
                        _mm512_permutexvar_ps(lanes, here)
                    }
                };
                for v in 0..V {
                    let [high, middle, low] = sums[r][v];
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(*x[v].units.get_unchecked(span)));
                    let rest = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32::<8>(middle), low));
                    let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(65_536.0), rest);
                    totals[r][v] = _mm512_fmadd_ps(sum, scale, totals[r][v]);
                }
            }
        }
    }
    let mut found = [[0.0; V]; R];
    for r in 0..R {
        for v in 0..V {
            found[r][v] = _mm512_reduce_add_ps(totals[r][v]);
        }
    }
    found
}
