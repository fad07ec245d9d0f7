//! Inputs in fixed point.

use pulp::bytemuck;

use super::{Codes, LANES, LIMBS, STEP, available, width};
use crate::scalar::{DType, Real};

/// Steps of a span at most: sums of as many products are exact as floats, and a large input is felt no farther.
const SPAN: usize = 8;

/// The bytes of an input in a step, limb after limb, the largest first.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Inputs(pub(super) [[i8; STEP]; LIMBS]);

/// What the sums of a span begin with, as codes count from nothing and their numbers from the middle of the levels: for
/// zero points of 1 if there are any.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Starts(pub(super) [[i32; LANES]; LIMBS]);

/// An input in fixed point. There is one only where [`available`] says so.
#[derive(Debug)]
pub(in super::super) struct Fixed {
    pub(super) steps: Vec<Inputs>,
    pub(super) starts: Vec<Starts>,
    /// 2ᵉ of each span.
    pub(super) units: Vec<f32>,
    /// Steps of a span.
    pub(super) span: usize,
    /// The first group of each span.
    pub(super) groups: Vec<u32>,
    /// Groups that a row has at least.
    least: usize,
    /// For groups that are shorter than a step: the group of each lane, counted from the step's first.
    pub(super) lanes: Option<[u32; LANES]>,
}

impl Fixed {
    /// `None` if there is no kernel for such rows here.
    pub(in super::super) fn new<T: Real>(x: &[T], bits: u8, group: usize, asymmetric: bool) -> Option<Self> {
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
    pub(super) fn fits(&self, row: &Codes<'_>, bits: u8, zeros: bool) -> bool {
        row.codes.len() >= self.steps.len().saturating_sub(1) * width(bits) + STEP
            && row.scales.len() >= self.least
            && (!zeros || row.zeros.len() >= self.least)
    }

    /// Whether another input is cut as this one is.
    pub(super) fn alike(&self, other: &Self) -> bool {
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
