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

use super::{CodedRow, CodedRows, Prepared};
use crate::scalar::{DType, Real};
use crate::simd::prefetch;

/// Codes in a step.
const STEP: usize = 64;
/// Lanes of sums.
const LANES: usize = 16;
/// Signed bytes of an input.
const LIMBS: usize = 3;
/// Steps of a span at most: sums of as many products are exact as floats, and a large input is felt no farther.
const SPAN: usize = 8;
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

/// The bytes of an input in a step, limb after limb, the largest first.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Inputs([[i8; STEP]; LIMBS]);

/// What the sums of a span begin with, as codes count from nothing and their numbers from the middle of the levels: for
/// zero points of 1 if there are any.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Starts([[i32; LANES]; LIMBS]);

/// An input in fixed point. There is one only where [`available`] says so.
#[derive(Debug)]
pub(super) struct Fixed {
    steps: Vec<Inputs>,
    starts: Vec<Starts>,
    /// 2ᵉ of each span.
    units: Vec<f32>,
    /// Steps of a span.
    span: usize,
    /// The first group of each span.
    groups: Vec<u32>,
    /// Groups that a row has at least.
    least: usize,
    /// For groups that are shorter than a step: the group of each lane, counted from the step's first.
    lanes: Option<[u32; LANES]>,
}

impl Fixed {
    /// `None` if there is no kernel for such rows here.
    pub(super) fn new<T: Real>(x: &[T], bits: u8, group: usize, asymmetric: bool) -> Option<Self> {
        if T::DTYPE != DType::F32 || !available() {
            return None;
        }
        let x: &[f32] = bytemuck::cast_slice(x);
        /// Codes that share a lane.
        const EACH: usize = STEP / LANES;
        let (span, lanes) = if group >= x.len() {
            (SPAN, None)
        } else if group.is_multiple_of(STEP) {
            ((1..=SPAN).rev().find(|span| (group / STEP).is_multiple_of(*span)).unwrap_or(1), None)
        } else if STEP.is_multiple_of(group) && group.is_multiple_of(EACH) && x.len() > group * (LANES - 1) {
            (1, Some(std::array::from_fn(|lane| (lane * EACH / group) as u32)))
        } else {
            return None;
        };
        let spans = x.len().div_ceil(STEP * span);
        let groups: Vec<u32> = (0..spans).map(|at| (at * span * STEP / group) as u32).collect();
        let mut fixed = Fixed {
            least: groups.last().map_or(0, |&last| last as usize + 1).max(if lanes.is_some() { LANES } else { 0 }),
            steps: vec![Inputs([[0; STEP]; LIMBS]); x.len().div_ceil(STEP)],
            starts: vec![Starts([[0; LANES]; LIMBS]); spans],
            units: Vec::with_capacity(spans),
            span,
            groups,
            lanes,
        };
        let middle = if asymmetric { 1 } else { 1 << (bits - 1) };
        for (at, (x, steps)) in x.chunks(STEP * span).zip(fixed.steps.chunks_mut(span)).enumerate() {
            // SAFETY: the machine has the instructions, as was asked above.
            #[allow(unsafe_code)]
            let unit = unsafe { split(x, middle, steps, &mut fixed.starts[at]) };
            fixed.units.push(unit);
        }
        Some(fixed)
    }

    /// Whether a row is as long as the kernel reads.
    fn fits(&self, row: &Codes<'_>, bits: u8, zeros: bool) -> bool {
        row.codes.len() >= self.steps.len().saturating_sub(1) * width(bits) + STEP
            && row.scales.len() >= self.least
            && (!zeros || row.zeros.len() >= self.least)
    }

    /// Whether another input is cut as this one is.
    fn alike(&self, other: &Self) -> bool {
        let how = |x: &Self| (x.steps.len(), x.span, x.least, x.lanes);
        how(self) == how(other)
    }
}

/// Writes a span of inputs in bytes, and what its sums begin with; returns the power of two in which the largest has 23
/// bits, NaN if one is not finite.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
fn split(x: &[f32], middle: i32, steps: &mut [Inputs], Starts(starts): &mut Starts) -> f32 {
    const LARGEST: f32 = (127 << 16) as f32;
    // NaN and infinity have the largest bits.
    let largest = f32::from_bits(x.iter().fold(0, |largest, v| v.abs().to_bits().max(largest)));
    if !largest.is_finite() {
        return f32::NAN;
    }
    // The power of two at or above the quotient; the least normal number serves what is smaller still.
    let quotient = (largest / LARGEST).max(f32::MIN_POSITIVE);
    let below = f32::from_bits(quotient.to_bits() & !((1 << 23) - 1));
    let unit = if below < quotient { below * 2.0 } else { below };
    let inverse = unit.recip();
    for (x, Inputs(limbs)) in x.chunks(STEP).zip(steps) {
        let mut left = [0i32; STEP];
        for (left, v) in left.iter_mut().zip(x) {
            *left = (v * inverse).round_ties_even() as i32;
        }
        for limb in (0..LIMBS).rev() {
            for i in 0..STEP {
                // The digit from −128 to 127.
                let digit = left[i] as i8;
                left[i] = (left[i] - i32::from(digit)) >> 8;
                limbs[limb][i] = digit;
            }
            for (start, digits) in starts[limb].iter_mut().zip(limbs[limb].as_chunks::<{ STEP / LANES }>().0) {
                let mut sum = 0;
                for &digit in digits {
                    sum += i32::from(digit);
                }
                *start -= middle * sum;
            }
        }
    }
    unit
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

/// How codes of some bits become bytes.
#[derive(Clone, Copy)]
struct Spread {
    /// The bytes of each eight codes to lanes of eight bytes.
    order: __m512i,
    /// Where a code begins in its lane.
    shifts: __m512i,
    mask: __m512i,
}

impl Spread {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(bits: u8) -> Self {
        let order: [u8; STEP] = std::array::from_fn(|i| (i / 8) as u8 * bits + (i % 8) as u8);
        let shifts: [u8; STEP] = std::array::from_fn(|i| (i % 8) as u8 * bits);
        Spread { order: cast(order), shifts: cast(shifts), mask: _mm512_set1_epi8((u8::MAX >> (8 - bits)) as i8) }
    }

    /// 64 codes, from the bytes that begin with them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn codes(self, bytes: __m512i) -> __m512i {
        let lanes = _mm512_permutexvar_epi8(self.order, bytes);
        _mm512_and_si512(_mm512_multishift_epi64_epi8(self.shifts, lanes), self.mask)
    }
}

/// The bytes of a row's steps, with what the last one reads beyond them.
#[inline(always)]
fn whole<'a>(codes: &'a [u8], steps: usize, bits: u8, held: &'a mut Vec<u8>) -> &'a [u8] {
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
fn width(bits: u8) -> usize {
    usize::from(bits) * STEP / 8
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

/// Writes a row out, scale·(code − zero), where groups are whole vectors; whether that was done.
pub(super) fn write<T: Real>(row: &CodedRow<'_, T>, to: &mut [T]) -> bool {
    let fits = row.group.is_multiple_of(LANES) || row.group >= row.columns;
    if T::DTYPE != DType::F32 || !fits || !available() {
        return false;
    }
    let (scales, to) = (bytemuck::cast_slice(row.scales), bytemuck::cast_slice_mut(&mut to[..row.columns]));
    let middle = 1u8 << (row.bits - 1);
    let zero = |group: usize| f32::from(row.zeros.map_or(middle, |zeros| zeros[group]));
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
