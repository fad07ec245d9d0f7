//! Inputs in fixed point, laid out as codes meet them: for vectors of codes an input beside the other, for matrix instructions
//! each by itself.

use std::arch::x86_64::*;

use ndarray::{ArrayView2, Axis};
use pulp::bytemuck::{cast, cast_slice, cast_slice_mut};

use super::super::packed::chunk;
use super::matrix::Shape;
use super::panel::{Lanes, put, turned};
use super::{EACH, LANES, LIMBS, TOGETHER, available};
use crate::operator::sparse::each_panel;
use crate::scalar::{DType, Real};

/// Columns that share a unit at most: sums of their products with 8 bits still fit with 8 bits to spare, and a large
/// input is felt no farther.
const LONGEST: usize = 256;

/// Columns whose codes are in the nearest cache as bytes: 16 KiB of the rows of a panel, or of as many in all as are together.
pub(super) const UNPACKED: usize = 512;

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

/// Some inputs, for codes of any width that are cut the same way. There are none where [`available`] says no.
#[derive(Debug)]
pub(in super::super) struct Inputs {
    pub(super) layout: Layout,
    pub(super) vectors: usize,
    /// Vectors with those that stand in for missing ones.
    padded: usize,
    /// What more than [`TOGETHER`] are laid out for, where there are matrix instructions.
    pub(super) shape: Option<Shape>,
    /// Four signed bytes each: [tile](Self::tiles), run, lane, limb (the largest first), vector. For matrix instructions tile,
    /// run, step, limb, vector, lane, with zeros for lanes that a step has beyond the run.
    limbs: Vec<Lanes<i32>>,
    /// What the bytes of a run add up to, with the other sign: tile, run, limb, vector. (None for matrix instructions.)
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
        let shape = if x.ncols() > TOGETHER { Shape::new(x.ncols(), layout.run / EACH) } else { None };
        Some(Self::laid_out(x, layout, shape))
    }

    /// Laid out for vectors, or for matrix instructions of a shape.
    pub(super) fn laid_out<T: Real>(x: ArrayView2<'_, T>, layout: Layout, shape: Option<Shape>) -> Self {
        let (vectors, rest, runs) = (x.ncols(), x.ncols() % TOGETHER, layout.runs);
        let (padded, width) = match shape {
            Some(shape) => (vectors.next_multiple_of(shape.inputs()), shape.inputs()),
            None if rest == 0 => (vectors, TOGETHER),
            None => (vectors - rest + rest.next_power_of_two(), TOGETHER),
        };
        let lanes = runs * in_steps(shape, layout.run / EACH) * LIMBS;
        let mut limbs = vec![Lanes::default(); (lanes * padded).div_ceil(LANES)];
        let mut less = vec![0; if shape.is_some() { 0 } else { runs * LIMBS * padded }];
        let (mut units, mut sums) = (vec![0.0; runs * padded], vec![0.0; runs * padded]);
        let counts = units.chunks_mut(width * runs).zip(sums.chunks_mut(width * runs));
        let mut less_of = less.chunks_mut(width * runs * LIMBS);
        let tiles = counts.zip(cast_slice_mut(&mut limbs).chunks_mut(width * lanes)).map(|((units, sums), limbs)| {
            let less = less_of.next().unwrap_or_default();
            Tile { limbs, less, units, sums }
        });
        // An entry takes a dozen steps or so.
        each_panel(tiles, 16 * x.len(), |held: &mut Vec<T>, (at, tile)| {
            let (first, count) = (at * width, tile.units.len() / runs);
            // SAFETY: the machine has the instructions, as `Layout::new` asked.
            #[allow(unsafe_code)]
            unsafe {
                match (shape, count) {
                    (Some(shape), count) => lay_out_rows(&layout, shape, tile, columns(&x, first, count, held)),
                    (None, 1) => lay_out::<1>(&layout, tile, columns(&x, first, count, held)),
                    (None, 2) => lay_out::<2>(&layout, tile, columns(&x, first, count, held)),
                    (None, _) => lay_out::<TOGETHER>(&layout, tile, columns(&x, first, count, held)),
                }
            }
        });
        Inputs { layout, vectors, padded, shape, limbs, less, units, sums }
    }

    /// Vectors of all tiles.
    pub(super) fn padded(&self) -> usize {
        self.padded
    }

    /// First vector and number of vectors of each tile.
    pub(super) fn tiles(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (padded, width) = (self.padded, self.shape.map_or(TOGETHER, |shape| shape.inputs()));
        (0..padded).step_by(width).map(move |first| (first, width.min(padded - first)))
    }

    /// A tile's limbs of a run.
    #[inline(always)]
    pub(super) fn limbs(&self, run: usize, first: usize, width: usize) -> &[i32] {
        let lanes = in_steps(self.shape, self.layout.run / EACH);
        let from = (first * self.layout.runs + run * width) * lanes * LIMBS;
        &cast_slice(&self.limbs)[from..from + in_steps(self.shape, self.layout.lanes(run)) * LIMBS * width]
    }

    /// What sums of products begin with, as codes count from nothing and their numbers from the middle of the levels: tile,
    /// run, limb, vector.
    pub(super) fn starts(&self, bits: u8) -> Vec<i32> {
        self.less.iter().map(|sum| sum << (bits - 1)).collect()
    }

    /// Starts of a tile in a run.
    #[inline(always)]
    pub(super) fn begin<'a, const V: usize>(
        &self,
        starts: &'a [i32],
        run: usize,
        first: usize,
    ) -> Option<&'a [[i32; V]; LIMBS]> {
        starts[LIMBS * (first * self.layout.runs + run * V)..].as_chunks().0.first_chunk()
    }

    /// Units and sums of a tile in a run.
    #[inline(always)]
    pub(super) fn beside(&self, run: usize, first: usize, width: usize) -> (&[f32], &[f32]) {
        let at = first * self.layout.runs + run * width;
        (&self.units[at..at + width], &self.sums[at..at + width])
    }
}

/// Lanes for which there are numbers, for some lanes of a run.
#[inline(always)]
fn in_steps(shape: Option<Shape>, lanes: usize) -> usize {
    shape.map_or(lanes, |shape| lanes.next_multiple_of(shape.lanes()))
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
            let digits = digits.map(cast::<_, [[i32; LANES / EACH]; EACH]>);
            for (lane, to) in to.iter_mut().enumerate() {
                for limb in 0..LIMBS {
                    to[limb] = digits.map(|of| of[limb][lane]);
                }
            }
        }
        for v in 0..V {
            let total = totalled(totals[v]);
            sums[v] = sum(total, units[v]);
            (0..LIMBS).for_each(|limb| less[limb][v] = -total[limb]);
        }
    }
}

/// Lays a tile out for matrix instructions, in which a missing input has no numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
fn lay_out_rows(layout: &Layout, shape: Shape, tile: Tile<'_>, x: [&[f32]; LANES]) {
    let (order, count, lanes) = (order(layout.parts), shape.inputs(), shape.lanes());
    let limbs = tile.limbs.chunks_mut(in_steps(Some(shape), layout.run / EACH) * LIMBS * count);
    let beside = tile.units.chunks_mut(count).zip(tile.sums.chunks_mut(count));
    for (run, (limbs, (units, sums))) in limbs.zip(beside).enumerate() {
        let from = run * layout.run;
        for (v, x) in x.iter().take(count).enumerate() {
            let x = x.get(from..x.len().min(from + layout.run)).unwrap_or_default();
            units[v] = unit(x);
            let mut total = _mm512_setzero_si512();
            for (step, limbs) in limbs.chunks_mut(LIMBS * count * lanes).enumerate() {
                for lane in (0..lanes).step_by(LANES / EACH) {
                    let at = (step * lanes + lane) * EACH;
                    let digits = split(x.get(at..).unwrap_or_default(), units[v], order);
                    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), digits);
                    let digits: [[i32; LANES / EACH]; EACH] = cast(digits);
                    for limb in 0..LIMBS {
                        limbs[(limb * count + v) * lanes + lane..][..LANES / EACH].copy_from_slice(&digits[limb]);
                    }
                }
            }
            sums[v] = sum(totalled(total), units[v]);
        }
    }
}

/// The sum of each limb.
fn totalled(of: __m512i) -> [i32; LIMBS] {
    let of: [[i32; LANES / EACH]; EACH] = cast(of);
    std::array::from_fn(|limb| of[limb].iter().sum())
}

/// What the sums of all limbs come to.
fn sum(total: [i32; LIMBS], unit: f32) -> f32 {
    let whole = total.iter().fold(0, |whole: i64, &sum| 256 * whole + i64::from(sum));
    (whole as f64 * f64::from(unit)) as f32
}

/// The numbers of some columns from one on, V at most, in their order each; none of those that are missing.
#[target_feature(enable = "avx512f")]
fn columns<'a, T: Real, const V: usize>(
    x: &'a ArrayView2<'_, T>,
    first: usize,
    count: usize,
    held: &'a mut Vec<T>,
) -> [&'a [f32]; V] {
    let ((n, b), count) = (x.dim(), count.min(V).min(x.ncols() - first));
    let in_order = n == 1 || x.strides()[0] == 1;
    if !in_order {
        held.resize(n * V, T::zero());
        match x.as_slice() {
            Some(all) => gather(cast_slice(all), b, first, cast_slice_mut(&mut held[..n * count])),
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
        cast_slice(column.unwrap_or_default())
    })
}

/// Some columns, up to 16 from one on, of rows of b numbers: by squares, as columns of numbers that lie far apart would
/// evict each other.
#[target_feature(enable = "avx512f")]
fn gather(rows: &[f32], b: usize, first: usize, to: &mut [f32]) {
    let n = rows.len() / b;
    let count = to.len() / n;
    for (square, rows) in rows.chunks(b * LANES).enumerate() {
        let rows: [_; LANES] = std::array::from_fn(|j| {
            let row = rows.get(j * b + first..j * b + first + count).unwrap_or_default();
            cast(row.first_chunk().copied().unwrap_or_else(|| padded(row)))
        });
        for (column, to) in turned(rows).into_iter().zip(to.chunks_mut(n)) {
            put(column, &mut to[square * LANES..]);
        }
    }
}

/// Some numbers, at most 16, and zeros.
fn padded(of: &[f32]) -> [f32; LANES] {
    std::array::from_fn(|i| of.get(i).copied().unwrap_or_default())
}

/// Where bytes of the digits of 16 columns go, as codes come out of vectors: four bytes of each lane, for each limb, the
/// largest first, and nothing.
#[target_feature(enable = "avx512f")]
fn order(parts: usize) -> __m512i {
    let place: [u8; 64] = std::array::from_fn(|byte| {
        let (limb, lane, at) = (byte / 16, byte / EACH % EACH, byte % EACH);
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
    let sixteen = x.first_chunk().copied().unwrap_or_else(|| padded(x));
    // With half of its range added to each digit, digits are bytes, and are signed again by its highest bit.
    let halves = _mm512_set1_epi32(0x0080_8080);
    let whole = _mm512_cvtps_epi32(_mm512_mul_ps(cast(sixteen), _mm512_set1_ps(unit.recip())));
    let digits = _mm512_xor_si512(_mm512_add_epi32(whole, halves), halves);
    _mm512_maskz_permutexvar_epi8((1 << (16 * LIMBS)) - 1, order, digits)
}
