//! Inputs in fixed point, laid out as codes meet them.

use std::arch::x86_64::*;

use ndarray::ArrayView2;
use pulp::bytemuck::{self, cast};

use super::super::packed::chunk;
use super::{EACH, LANES, LIMBS, TOGETHER, available};
use crate::scalar::{DType, Real};

/// Columns that share a unit at most: sums of their products with 8 bits still fit with 8 bits to spare, and a large
/// input is felt no farther.
const LONGEST: usize = 256;

/// How the columns of a row are cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Layout {
    pub bits: u8,
    /// Columns that share scales.
    pub group: usize,
    pub columns: usize,
    /// Codes that begin in the same byte of a vector, or 1: a lane of it has every such column of a chunk.
    pub parts: usize,
    /// Consecutive columns that share scales and units.
    pub run: usize,
    /// Runs of a group.
    each: usize,
    /// Runs of a row, and lanes of the last.
    runs: usize,
    last: usize,
}

impl Layout {
    /// `None` if there is no kernel for such rows here: for inputs in another dtype, groups that end within a lane, and
    /// machines without the instructions.
    pub(super) fn new<T: Real>(bits: u8, group: usize, columns: usize) -> Option<Self> {
        if T::DTYPE != DType::F32 || !available() {
            return None;
        }
        let chunk = chunk(bits);
        let run = match group {
            group if group >= columns => columns.next_multiple_of(chunk).min(LONGEST),
            group => (1..=LONGEST / chunk).rev().map(|k| k * chunk).find(|run| group.is_multiple_of(*run))?,
        };
        let (each, runs) = (if group >= columns { usize::MAX } else { group / run }, columns.div_ceil(run));
        let last = columns.saturating_sub(runs.saturating_sub(1) * run).next_multiple_of(chunk) / EACH;
        Some(Layout { bits, group, columns, parts: chunk / EACH, run, each, runs, last })
    }

    #[inline]
    pub(super) fn runs(&self) -> usize {
        self.runs
    }

    /// The group of a run.
    #[inline]
    pub(super) fn group_of(&self, run: usize) -> usize {
        if self.each == 1 { run } else { run / self.each }
    }

    /// Lanes of a run.
    #[inline]
    pub(super) fn lanes(&self, run: usize) -> usize {
        if run + 1 < self.runs { self.run / EACH } else { self.last }
    }
}

/// Some inputs, up to [`TOGETHER`] of them side by side. There are none where [`available`] says no.
#[derive(Debug)]
pub(in super::super) struct Inputs {
    pub(super) layout: Layout,
    pub(super) vectors: usize,
    /// Vectors with those that stand in for missing ones.
    padded: usize,
    /// Four signed bytes each: run, [tile](Self::tiles), lane, limb (the largest first), vector.
    limbs: Vec<i32>,
    /// What sums of products begin with, as codes count from nothing and their numbers from the middle of the levels: run,
    /// tile, limb, vector.
    starts: Vec<i32>,
    /// 2ᵉ: run, tile, vector.
    units: Vec<f32>,
    /// Sums of runs, for zero points and offsets: run, tile, vector.
    sums: Vec<f32>,
}

impl Inputs {
    /// `None` if there is no kernel for such rows here.
    pub(in super::super) fn new<T: Real>(x: ArrayView2<'_, T>, bits: u8, group: usize) -> Option<Self> {
        let layout = Layout::new::<T>(bits, group, x.nrows())?;
        let (vectors, rest) = (x.ncols(), x.ncols() % TOGETHER);
        let padded = vectors - rest + if rest == 0 { 0 } else { rest.next_power_of_two() };
        let mut inputs = Inputs {
            limbs: vec![0; layout.runs() * layout.run / EACH * LIMBS * padded],
            starts: vec![0; layout.runs() * LIMBS * padded],
            units: vec![0.0; layout.runs() * padded],
            sums: vec![0.0; layout.runs() * padded],
            layout,
            vectors,
            padded,
        };
        let middle = 1 << (bits - 1);
        let mut lanes = vec![[0; LIMBS]; layout.run / EACH];
        let mut ordered = vec![0.0; layout.runs() * layout.run];
        for (first, width) in inputs.tiles().collect::<Vec<_>>() {
            for v in 0..width.min(vectors - first) {
                let column = x.column(first + v).to_vec();
                let column = bytemuck::cast_slice(&column);
                match layout.parts {
                    1 => interleave::<1>(column, &mut ordered),
                    2 => interleave::<2>(column, &mut ordered),
                    _ => interleave::<4>(column, &mut ordered),
                }
                for (run, x) in ordered.chunks(layout.run).enumerate() {
                    let mut sums = [0; LIMBS];
                    // SAFETY: the machine has the instructions, as `Layout::new` asked.
                    #[allow(unsafe_code)]
                    let unit = unsafe { split(x, &mut lanes, &mut sums) };
                    let at = run * padded + first;
                    inputs.units[at + v] = unit;
                    let whole = sums.iter().fold(0, |whole: i64, &sum| 256 * whole + i64::from(sum));
                    inputs.sums[at + v] = (whole as f64 * f64::from(unit)) as f32;
                    for (limb, sum) in sums.into_iter().enumerate() {
                        inputs.starts[LIMBS * at + limb * width + v] = -middle * sum;
                    }
                    let from = inputs.lane(run, first);
                    for (to, lane) in inputs.limbs[from..].chunks_mut(LIMBS * width).zip(&lanes) {
                        (0..LIMBS).for_each(|limb| to[limb * width + v] = lane[limb]);
                    }
                }
            }
        }
        Some(inputs)
    }

    /// First vector and number of vectors of each tile.
    pub(super) fn tiles(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let padded = self.padded;
        (0..padded).step_by(TOGETHER).map(move |first| (first, TOGETHER.min(padded - first)))
    }

    /// Where a tile's limbs of a run begin.
    fn lane(&self, run: usize, first: usize) -> usize {
        (run * self.padded + first) * (self.layout.run / EACH) * LIMBS
    }

    /// A tile's limbs of a run.
    pub(super) fn limbs(&self, run: usize, first: usize, width: usize) -> &[i32] {
        let from = self.lane(run, first);
        &self.limbs[from..from + self.layout.lanes(run) * LIMBS * width]
    }

    /// Starts, units and sums of a tile in a run.
    #[allow(clippy::type_complexity)]
    pub(super) fn start<const V: usize>(
        &self,
        run: usize,
        first: usize,
    ) -> Option<(&[[i32; V]; LIMBS], &[f32; V], &[f32; V])> {
        let at = run * self.padded + first;
        let starts = self.starts[LIMBS * at..].as_chunks().0.first_chunk()?;
        Some((starts, self.units[at..].first_chunk()?, self.sums[at..].first_chunk()?))
    }
}

/// Puts columns in the order in which codes come out of vectors; what is behind the last stays as it is.
fn interleave<const PARTS: usize>(x: &[f32], to: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<PARTS>();
    for (at, part) in whole.iter().enumerate() {
        let to = &mut to[at / EACH * EACH * PARTS..];
        (0..PARTS).for_each(|e| to[e * EACH + at % EACH] = part[e]);
    }
    let (at, rest) = (whole.len(), rest.iter().enumerate());
    rest.for_each(|(e, &v)| to[at / EACH * EACH * PARTS + e * EACH + at % EACH] = v);
}

/// Writes a run of inputs in bytes, and their sums; returns the power of two in which the largest has 23 bits, NaN if one
/// is not finite.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
fn split(x: &[f32], lanes: &mut [[i32; LIMBS]], sums: &mut [i32; LIMBS]) -> f32 {
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
    let inverse = _mm512_set1_ps(unit.recip());
    // With half of its range added to each digit, digits are bytes, and are signed again by its highest bit.
    let halves = _mm512_set1_epi32(0x0080_8080);
    // From four numbers of three bytes, the largest last, to three lanes of four bytes, the largest first.
    let order: [[u8; 16]; 4] = [[2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, 128, 128, 128, 128]; 4];
    let (order, ones) = (cast(order), _mm512_set1_epi8(1));
    let mut total = _mm512_setzero_si512();
    for (x, lanes) in x.chunks(LANES).zip(lanes.chunks_mut(EACH)) {
        let mut sixteen = [0.0f32; LANES];
        sixteen[..x.len()].copy_from_slice(x);
        let whole = _mm512_cvtps_epi32(_mm512_mul_ps(cast(sixteen), inverse));
        let digits = _mm512_xor_si512(_mm512_add_epi32(whole, halves), halves);
        let digits = _mm512_shuffle_epi8(digits, order);
        total = _mm512_dpbusd_epi32(total, ones, digits);
        let digits: [[i32; 4]; 4] = cast(digits);
        for (lane, [high, middle, low, _]) in lanes.iter_mut().zip(digits) {
            *lane = [high, middle, low];
        }
    }
    let total: [[i32; 4]; 4] = cast(total);
    for (limb, sum) in sums.iter_mut().enumerate() {
        *sum = total[0][limb] + total[1][limb] + total[2][limb] + total[3][limb];
    }
    unit
}
