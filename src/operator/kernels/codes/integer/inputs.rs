//! Inputs, laid out as codes meet them: in fixed point an input beside the other for vectors of codes, each by itself for matrix
//! instructions with bytes; and in bf16 for those with numbers.

use std::arch::x86_64::*;
use std::ops::Range;

use ndarray::ArrayView2;
use pulp::bytemuck::{cast, cast_slice, cast_slice_mut};

use super::super::layout::sum;
use super::digits::{Cut, largest, moduli, totalled};
use super::matrix::Shape;
use super::way::{Layout, Rows, Way};
use super::{ActivationBits, Cutting, DIGITS, EACH, Kept, LANES, STEP, avx2, beside, bfloat, columns, few, turns};
use crate::operator::sparse::each_panel;
use crate::scalar::Real;

/// Some inputs, for codes of any width that are cut the same way. There are none where [`available`] says no.
#[derive(Debug)]
pub(in super::super) struct Inputs {
    pub(super) layout: Layout,
    pub(super) vectors: usize,
    /// Vectors with those that stand in for missing ones.
    padded: usize,
    pub(super) way: Way,
    /// Four signed bytes each: [tile](Self::tiles), run, lane, byte of an input (the largest first), vector. For matrix instructions
    /// tile, run, step, row (digit, vector), lane, or pairs of numbers, with zeros for columns beyond the run.
    limbs: Kept,
    /// What the bytes of a run add up to, with the other sign: tile, run, byte, vector. (Bits of an `f32` of numbers; not for bf16.)
    less: Vec<i32>,
    /// What a whole number is worth: tile, run, vector. (Not for bf16.)
    units: Vec<f32>,
    /// Sums of runs, for zero points and offsets: tile, run, vector.
    sums: Vec<f32>,
}

/// A tile of them.
pub(super) struct Tile<'a> {
    pub limbs: &'a mut [i32],
    pub less: &'a mut [i32],
    pub units: &'a mut [f32],
    pub sums: &'a mut [f32],
}

/// A tile, as vectors meet it.
#[derive(Clone, Copy)]
pub(super) struct OfTile<'a, const EACH_DIGIT: usize, const DIGITS: usize, const V: usize> {
    pub words: &'a [[[[i32; V]; EACH_DIGIT]; DIGITS]],
    pub starts: &'a [[[i32; V]; DIGITS]],
    pub units: &'a [[f32; V]],
    pub sums: &'a [[f32; V]],
}

/// Of a run: starts, units, sums and words.
type OfRun<'a, const EACH_DIGIT: usize, const DIGITS: usize, const V: usize> =
    (&'a [[i32; V]; DIGITS], &'a [f32; V], &'a [f32; V], &'a [[[[i32; V]; EACH_DIGIT]; DIGITS]]);

impl<'a, const EACH_DIGIT: usize, const DIGITS: usize, const V: usize> OfTile<'a, EACH_DIGIT, DIGITS, V> {
    /// What belongs to a run of some lanes, if there is such a one.
    #[inline(always)]
    pub(super) fn of_run(&self, number: usize, lanes: Range<usize>) -> Option<OfRun<'a, EACH_DIGIT, DIGITS, V>> {
        Some((self.starts.get(number)?, self.units.get(number)?, self.sums.get(number)?, self.words.get(lanes)?))
    }
}

impl Inputs {
    /// `None` if there is no kernel for such rows here.
    pub(in super::super) fn new<T: Real>(
        x: ArrayView2<'_, T>,
        activations: ActivationBits,
        bits: u8,
        group: usize,
    ) -> Option<Self> {
        let (way, layout) = Way::new::<T>(x.ncols(), Rows { activations, bits, group, columns: x.nrows() })?;
        Some(Self::laid_out(x, layout, way))
    }

    /// Laid out for vectors, or for matrix instructions.
    pub(super) fn laid_out<T: Real>(x: ArrayView2<'_, T>, layout: Layout, way: Way) -> Self {
        let (vectors, width) = (x.ncols(), way.width());
        let runs = match way {
            Way::Numbers(_) => few::Blocks::new(&layout).all(),
            Way::Turns(_) => turns::all(&layout),
            _ => layout.runs(),
        };
        let (whole, last) = (vectors / width * width, vectors % width);
        let padded = match way {
            _ if last == 0 => vectors,
            Way::Vectors(_) => whole + last.next_power_of_two(),
            Way::Narrow(digits) => whole + digits.padded(last),
            _ => whole + width,
        };
        let digits = match way {
            Way::Vectors(activations) => runs * (layout.run / EACH) * activations.bytes() * width,
            Way::Narrow(digits) => runs * (layout.run / EACH) * digits.words() * width,
            Way::Turns(shape) | Way::Bytes(shape) => runs * shape.run(&layout),
            Way::Numbers(inputs) => runs * few::Blocks::new(&layout).steps() * DIGITS * inputs * LANES,
        };
        let mut limbs = Kept::new((digits * padded).div_ceil(width * LANES));
        let starts = match way {
            Way::Vectors(activations) => activations.bytes(),
            Way::Turns(shape) | Way::Bytes(shape) => shape.activations.bytes(),
            Way::Narrow(digits) => digits.count(),
            Way::Numbers(_) => 0,
        };
        let mut less = vec![0; runs * starts * padded];
        let (mut units, mut sums) = (vec![0.0; runs * padded], vec![0.0; runs * padded]);
        let counts = units.chunks_mut(width * runs).zip(sums.chunks_mut(width * runs));
        let mut less_of = less.chunks_mut((width * runs * starts).max(1));
        let mut tiles = counts.zip(cast_slice_mut(&mut limbs[..]).chunks_mut(digits)).map(|((units, sums), limbs)| {
            let less = less_of.next().unwrap_or_default();
            Tile { limbs, less, units, sums }
        });
        // Those of sixteen vectors: what lies side by side is gathered together.
        let each = LANES / width;
        let some = std::iter::from_fn(|| {
            let some: Vec<_> = tiles.by_ref().take(each).collect();
            (!some.is_empty()).then_some(some)
        });
        // An entry takes a nanosecond or so.
        each_panel(some, x.len(), |held: &mut Vec<T>, (at, tiles)| {
            let all = columns(&x, at * each * width, LANES, held);
            for (tile, x) in tiles.into_iter().zip(all.chunks(width)) {
                let count = tile.units.len() / runs;
                // SAFETY: the machine has the instructions: `Way::new` asks before it takes a way, and `Digits::all` for digits.
                #[allow(unsafe_code)]
                unsafe {
                    match (way, count) {
                        (Way::Turns(shape) | Way::Bytes(shape), _) => lay_out_rows(&layout, shape, tile, x),
                        (Way::Numbers(inputs), _) => lay_out_numbers(&layout, inputs, tile, x),
                        (Way::Vectors(activations), _) => beside::lay_out(activations, &layout, count, tile, x),
                        (Way::Narrow(digits), 1) => avx2::lay_out::<1>(digits, &layout, tile, x),
                        (Way::Narrow(digits), 2) => avx2::lay_out::<2>(digits, &layout, tile, x),
                        (Way::Narrow(digits), 3) => avx2::lay_out::<3>(digits, &layout, tile, x),
                        (Way::Narrow(digits), 4) => avx2::lay_out::<4>(digits, &layout, tile, x),
                        (Way::Narrow(digits), _) => avx2::lay_out::<5>(digits, &layout, tile, x),
                    }
                }
            }
        });
        Inputs { layout, vectors, padded, way, limbs, less, units, sums }
    }

    /// Vectors of all tiles.
    pub(super) fn padded(&self) -> usize {
        self.padded
    }

    /// Bytes of a vector as it is laid out.
    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.limbs[..]) / self.padded.max(1)
    }

    /// First vector and number of vectors of each tile.
    pub(super) fn tiles(&self) -> impl ExactSizeIterator<Item = (usize, usize)> + use<> {
        let (padded, width) = (self.padded, self.way.width());
        (0..padded).step_by(width).map(move |first| (first, width.min(padded - first)))
    }

    /// The same of a block of vectors, in which all tiles that are as wide as any come together, if they are to: first vector, vectors of a
    /// tile, and number of tiles.
    pub(super) fn stretches(
        &self,
        block: Range<usize>,
        together: bool,
    ) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (width, start) = (self.way.width(), block.start);
        let wide = if together { (block.len() / width).max(1) } else { 1 };
        let of_block = self.tiles().filter(move |(first, _)| block.contains(first));
        // (What is left is a tile of its own.)
        let begun = of_block.filter(move |&(first, count)| !together || first == start || count < width);
        begun.map(move |(first, count)| (first, count, if count < width { 1 } else { wide }))
    }

    /// The digits of all tiles and runs, for matrix instructions with bytes.
    #[inline(always)]
    pub(super) fn digits(&self) -> &[i32] {
        cast_slice(&self.limbs[..])
    }

    /// Those of all tiles, runs and steps, for matrix instructions with bf16.
    #[inline(always)]
    pub(super) fn numbers<const COUNT: usize>(&self) -> &[bfloat::Cut<COUNT>] {
        self.limbs.as_chunks().0.as_chunks().0
    }

    /// Units of the vectors of tiles in runs, of which there are so many before.
    #[inline(always)]
    pub(super) fn units<const COUNT: usize>(&self, places: Range<usize>) -> &[[f32; COUNT]] {
        &self.units.as_chunks().0[places]
    }

    /// Their sums.
    #[inline(always)]
    pub(super) fn sums<const COUNT: usize>(&self, places: Range<usize>) -> &[[f32; COUNT]] {
        &self.sums.as_chunks().0[places]
    }

    /// What sums of products begin with, as codes count from nothing and their numbers from the middle of the levels: tile,
    /// run, byte, vector.
    pub(super) fn starts(&self, bits: u8) -> Vec<i32> {
        let numbers = matches!(self.way, Way::Narrow(avx2::Digits::Numbers(_)));
        let middle = 1 << (bits - 1);
        let start = |sum| if numbers { cast(cast::<_, f32>(sum) * middle as f32) } else { sum * middle };
        self.less.iter().map(|&sum| start(sum)).collect()
    }

    /// A tile, for vectors, with what sums begin with: words of each lane and digit of V inputs, of each run starts, units and sums. (To cut
    /// a run's out of these takes less time than to look it up.)
    #[inline(always)]
    pub(super) fn of_tile<'a, const EACH_DIGIT: usize, const DIGITS: usize, const V: usize>(
        &'a self,
        starts: &'a [i32],
        first: usize,
    ) -> OfTile<'a, EACH_DIGIT, DIGITS, V> {
        let (at, words) = (first * self.layout.runs(), EACH_DIGIT * DIGITS);
        let all: &[i32] = cast_slice(&self.limbs[..]);
        OfTile {
            words: all[at * (self.layout.run / EACH) * words..].as_chunks().0.as_chunks().0.as_chunks().0,
            starts: starts[at * DIGITS..].as_chunks().0.as_chunks().0,
            units: self.units[at..].as_chunks().0,
            sums: self.sums[at..].as_chunks().0,
        }
    }
}

/// Lays a tile out for matrix instructions with bytes, in which a missing input has no numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
fn lay_out_rows(layout: &Layout, shape: Shape, tile: Tile<'_>, x: &[&[f32]]) {
    let Shape { inputs, activations, lanes, .. } = shape;
    let bytes_of = activations.bytes();
    let cut = Cut::new(bytes_of, layout.parts);
    let beside = tile.units.chunks_mut(inputs).zip(tile.sums.chunks_mut(inputs));
    let beside = beside.zip(tile.less.chunks_mut(bytes_of * inputs));
    for (run, (to, ((units, sums), less))) in tile.limbs.chunks_mut(shape.run(layout)).zip(beside).enumerate() {
        for (v, x) in x.iter().take(inputs).enumerate() {
            let x = layout.of_run(run, x);
            let [largest] = largest([moduli(x)]);
            units[v] = activations.unit(largest);
            let inverse = units[v].recip();
            let mut total = _mm512_setzero_si512();
            for (step, to) in to.chunks_mut(shape.step()).enumerate() {
                for lane in (0..lanes).step_by(LANES / EACH) {
                    let bytes = cut.split(x.get((step * lanes + lane) * EACH..).unwrap_or_default(), inverse);
                    total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
                    let bytes: [[i32; LANES / EACH]; EACH] = cast(bytes);
                    for (limb, of) in bytes.iter().enumerate().take(bytes_of) {
                        to[(limb * inputs + v) * lanes + lane..][..LANES / EACH].copy_from_slice(of);
                    }
                }
            }
            let total = totalled(total);
            sums[v] = sum(&total[..bytes_of], 8, units[v]);
            (0..bytes_of).for_each(|limb| less[limb * inputs + v] = -total[limb]);
        }
    }
}

/// Lays a tile out for matrix instructions with bf16, in which a missing input has no numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn lay_out_numbers(layout: &Layout, inputs: usize, tile: Tile<'_>, x: &[&[f32]]) {
    // Codes of a chunk of columns begin in the same 32 bits, of which the halves meet.
    let cutting = Cutting::of(EACH * layout.parts / 2);
    let limbs = tile.limbs.chunks_mut(few::Blocks::new(layout).steps() * DIGITS * inputs * LANES);
    for (run, (to, sums)) in limbs.zip(tile.sums.chunks_mut(inputs)).enumerate() {
        for (v, x) in x.iter().take(inputs).enumerate() {
            let x = layout.of_run(run, x);
            let mut total = _mm512_setzero_ps();
            for (step, to) in to.chunks_mut(DIGITS * inputs * LANES).enumerate() {
                let (digits, sums) = cutting.cut(x.get(step * STEP..).unwrap_or_default());
                total = _mm512_add_ps(total, sums);
                for (digit, to) in digits.iter().zip(to.chunks_mut(inputs * LANES)) {
                    to[v * LANES..][..LANES].copy_from_slice(&digit.0);
                }
            }
            sums[v] = _mm512_reduce_add_ps(total);
        }
    }
}
