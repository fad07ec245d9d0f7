//! Inputs in fixed point, laid out as codes meet them.

use std::arch::x86_64::*;

use ndarray::{ArrayView2, Axis};
use pulp::bytemuck::{self, cast};

use super::super::packed::chunk;
use super::{EACH, LANES, LIMBS, TOGETHER, available};
use crate::operator::sparse::each_panel;
use crate::scalar::{DType, Real};

/// Columns that share a unit at most: sums of their products with 8 bits still fit with 8 bits to spare, and a large
/// input is felt no farther.
const LONGEST: usize = 256;

/// Columns whose codes are in the nearest cache as bytes: 16 KiB of the rows of a panel.
const UNPACKED: usize = 512;

/// How the columns of a row are cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Layout {
    columns: usize,
    /// Codes that begin in the same byte of a vector, or 1: a lane of it has every such column of a chunk.
    parts: usize,
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
        Some(Layout { columns, parts: chunk / EACH, run, each, runs, last })
    }

    #[inline(always)]
    pub(super) fn runs(&self) -> usize {
        self.runs
    }

    /// Runs whose codes are unpacked together, that many inputs meet them before the next ones.
    pub(super) fn together(&self) -> usize {
        (UNPACKED / self.run).max(1)
    }

    /// The group of a run.
    #[inline(always)]
    pub(super) fn group_of(&self, run: usize) -> usize {
        if self.each == 1 { run } else { run / self.each }
    }

    /// Lanes of a run.
    #[inline(always)]
    pub(super) fn lanes(&self, run: usize) -> usize {
        if run + 1 < self.runs { self.run / EACH } else { self.last }
    }
}

/// Some inputs, up to [`TOGETHER`] of them side by side, for codes of any width that are cut the same way. There are none
/// where [`available`] says no.
#[derive(Debug)]
pub(in super::super) struct Inputs {
    pub(super) layout: Layout,
    pub(super) vectors: usize,
    /// Vectors with those that stand in for missing ones.
    padded: usize,
    /// Four signed bytes each: [tile](Self::tiles), run, lane, limb (the largest first), vector.
    limbs: Vec<i32>,
    /// What the bytes of a run add up to, with the other sign: tile, run, limb, vector.
    less: Vec<i32>,
    /// 2ᵉ: tile, run, vector.
    units: Vec<f32>,
    /// Sums of runs, for zero points and offsets: tile, run, vector.
    sums: Vec<f32>,
}

/// A tile of them.
struct Tile<'a> {
    limbs: &'a mut [i32],
    less: &'a mut [i32],
    units: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Inputs {
    /// `None` if there is no kernel for such rows here.
    pub(in super::super) fn new<T: Real>(x: ArrayView2<'_, T>, bits: u8, group: usize) -> Option<Self> {
        let layout = Layout::new::<T>(bits, group, x.nrows())?;
        let (vectors, rest) = (x.ncols(), x.ncols() % TOGETHER);
        let padded = vectors - rest + if rest == 0 { 0 } else { rest.next_power_of_two() };
        let (lanes, runs) = (layout.runs * layout.run / EACH * LIMBS, layout.runs);
        let (mut limbs, mut less) = (vec![0; lanes * padded], vec![0; runs * LIMBS * padded]);
        let (mut units, mut sums) = (vec![0.0; runs * padded], vec![0.0; runs * padded]);
        let counts = units.chunks_mut(TOGETHER * runs).zip(sums.chunks_mut(TOGETHER * runs));
        let bytes = limbs.chunks_mut(TOGETHER * lanes).zip(less.chunks_mut(TOGETHER * runs * LIMBS));
        let tiles = bytes.zip(counts).map(|((limbs, less), (units, sums))| Tile { limbs, less, units, sums });
        // An entry takes a dozen steps or so.
        each_panel(tiles, 16 * x.len(), |held: &mut Vec<T>, (at, tile)| {
            let first = at * TOGETHER;
            // SAFETY: the machine has the instructions, as `Layout::new` asked.
            #[allow(unsafe_code)]
            unsafe {
                match tile.units.len() / runs {
                    1 => lay_out::<1>(&layout, tile, columns(&x, first, held)),
                    2 => lay_out::<2>(&layout, tile, columns(&x, first, held)),
                    _ => lay_out::<TOGETHER>(&layout, tile, columns(&x, first, held)),
                }
            }
        });
        Some(Inputs { layout, vectors, padded, limbs, less, units, sums })
    }

    /// First vector and number of vectors of each tile.
    pub(super) fn tiles(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let padded = self.padded;
        (0..padded).step_by(TOGETHER).map(move |first| (first, TOGETHER.min(padded - first)))
    }

    /// A tile's limbs of a run.
    #[inline(always)]
    pub(super) fn limbs(&self, run: usize, first: usize, width: usize) -> &[i32] {
        let lanes = self.layout.run / EACH;
        let from = (first * self.layout.runs + run * width) * lanes * LIMBS;
        &self.limbs[from..from + self.layout.lanes(run) * LIMBS * width]
    }

    /// What sums of products begin with, as codes count from nothing and their numbers from the middle of the levels: tile,
    /// run, limb, vector.
    pub(super) fn starts(&self, bits: u8) -> Vec<i32> {
        self.less.iter().map(|sum| sum << (bits - 1)).collect()
    }

    /// Starts, units and sums of a tile in a run.
    #[allow(clippy::type_complexity)]
    #[inline(always)]
    pub(super) fn beside<'a, const V: usize>(
        &'a self,
        starts: &'a [i32],
        run: usize,
        first: usize,
    ) -> Option<(&'a [[i32; V]; LIMBS], &'a [f32; V], &'a [f32; V])> {
        let at = first * self.layout.runs + run * V;
        let starts = starts[LIMBS * at..].as_chunks().0.first_chunk()?;
        Some((starts, self.units[at..].first_chunk()?, self.sums[at..].first_chunk()?))
    }
}

/// Lays a tile out, in which a missing input has no numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
fn lay_out<const V: usize>(layout: &Layout, tile: Tile<'_>, x: [&[f32]; V]) {
    let order = order(layout.parts);
    let limbs = tile.limbs.as_chunks_mut::<V>().0.as_chunks_mut::<LIMBS>().0.chunks_mut(layout.run / EACH);
    let beside = tile.units.as_chunks_mut::<V>().0.iter_mut().zip(tile.sums.as_chunks_mut::<V>().0);
    let less = tile.less.as_chunks_mut::<V>().0.as_chunks_mut::<LIMBS>().0;
    for (run, ((limbs, less), (units, sums))) in limbs.zip(less).zip(beside).enumerate() {
        let from = run * layout.run;
        let x = x.map(|x| x.get(from..x.len().min(from + layout.run)).unwrap_or_default());
        *units = x.map(|x| unit(x));
        let mut totals = [_mm512_setzero_si512(); V];
        for (step, to) in limbs[..layout.lanes(run)].chunks_mut(LANES / EACH).enumerate() {
            let mut digits = [_mm512_setzero_si512(); V];
            for v in 0..V {
                digits[v] = split(x[v].get(step * LANES..).unwrap_or_default(), units[v], order);
                totals[v] = _mm512_dpbusd_epi32(totals[v], _mm512_set1_epi8(1), digits[v]);
            }
            let digits = digits.map(cast::<_, [[i32; EACH]; LANES / EACH]>);
            for (lane, to) in to.iter_mut().enumerate() {
                for limb in 0..LIMBS {
                    to[limb] = digits.map(|of| of[lane][limb]);
                }
            }
        }
        for v in 0..V {
            let of: [[i32; EACH]; LANES / EACH] = cast(totals[v]);
            let total: [i32; LIMBS] = std::array::from_fn(|limb| of.iter().map(|of| of[limb]).sum());
            let whole = total.iter().fold(0, |whole: i64, &sum| 256 * whole + i64::from(sum));
            sums[v] = (whole as f64 * f64::from(units[v])) as f32;
            (0..LIMBS).for_each(|limb| less[limb][v] = -total[limb]);
        }
    }
}

/// The numbers of V columns from one on, in their order each; none of those that are missing.
fn columns<'a, T: Real, const V: usize>(
    x: &'a ArrayView2<'_, T>,
    first: usize,
    held: &'a mut Vec<T>,
) -> [&'a [f32]; V] {
    let ((n, b), count) = (x.dim(), V.min(x.ncols() - first));
    let in_order = n == 1 || x.strides()[0] == 1;
    if !in_order {
        held.resize(n * V, T::zero());
        match x.as_slice() {
            // Row by row, since columns of numbers that lie far apart evict each other.
            Some(all) => all.chunks(b).enumerate().for_each(|(j, row)| {
                row[first..first + count].iter().enumerate().for_each(|(v, &value)| held[v * n + j] = value);
            }),
            None => (0..count).for_each(|v| {
                held[v * n..].iter_mut().zip(x.column(first + v)).for_each(|(to, &value)| *to = value);
            }),
        }
    }
    let held = &held[..];
    std::array::from_fn(|v| {
        if v >= count {
            return [].as_slice();
        }
        let column = if in_order { x.index_axis(Axis(1), first + v).to_slice() } else { held.get(v * n..(v + 1) * n) };
        bytemuck::cast_slice(column.unwrap_or_default())
    })
}

/// Where bytes of the digits of 16 columns go, as codes come out of vectors: four bytes of each limb, the largest first,
/// and nothing, for each lane.
#[target_feature(enable = "avx512f")]
fn order(parts: usize) -> __m512i {
    let place: [u8; 64] = std::array::from_fn(|byte| {
        let (lane, limb, at) = (byte / 16, byte / EACH % EACH, byte % EACH);
        // (What is behind the last limb is masked away.)
        let column = lane / parts * EACH * parts + at * parts + lane % parts;
        (column * EACH + 2usize.saturating_sub(limb)) as u8
    });
    cast(place)
}

/// The power of two in which the largest of a run of inputs has 23 bits, NaN if one is not finite.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn unit(x: &[f32]) -> f32 {
    const LARGEST: f32 = (127 << 16) as f32;
    // NaN and infinity have the largest bits.
    let largest = f32::from_bits(x.iter().fold(0, |largest, v| v.abs().to_bits().max(largest)));
    if !largest.is_finite() {
        return f32::NAN;
    }
    // The power of two at or above the quotient; the least normal number serves what is smaller still.
    let quotient = (largest / LARGEST).max(f32::MIN_POSITIVE);
    let below = f32::from_bits(quotient.to_bits() & !((1 << 23) - 1));
    if below < quotient { below * 2.0 } else { below }
}

/// The first 16 of some inputs in bytes; zeros where there are none, and where the unit is not a number.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
fn split(x: &[f32], unit: f32, order: __m512i) -> __m512i {
    let sixteen = match x.first_chunk::<LANES>() {
        Some(&sixteen) => sixteen,
        None => std::array::from_fn(|i| x.get(i).copied().unwrap_or_default()),
    };
    // With half of its range added to each digit, digits are bytes, and are signed again by its highest bit.
    let halves = _mm512_set1_epi32(0x0080_8080);
    let whole = _mm512_cvtps_epi32(_mm512_mul_ps(cast(sixteen), _mm512_set1_ps(unit.recip())));
    let digits = _mm512_xor_si512(_mm512_add_epi32(whole, halves), halves);
    _mm512_maskz_permutexvar_epi8(0x0fff_0fff_0fff_0fff, order, digits)
}
