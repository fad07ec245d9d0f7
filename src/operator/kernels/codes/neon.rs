//! Products with codes in integers by vectors of four rows: NEON, with products of four bytes at a time.
//!
//! An input is in fixed point, x = u·(2¹⁶a + 2⁸b + c) with signed bytes a, b, c, and a unit u such that the largest of a run of
//! columns takes all bits: off by no more than 2⁻²³ of it, as sums of `f32` are; or in one or two bytes, if less is asked for
//! ([`ActivationBits`]). Codes of any width become bytes, four columns of four rows in a vector, and `sdot` adds up their products
//! with each of the bytes without any rounding; floats see the sum of a run only, which is scaled then. Inputs that are not finite
//! make a sum of NaN.

use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use ndarray::{ArrayView2, Axis};
use pulp::bytemuck::{cast, cast_slice};

use super::layout::{EACH, Layout, largest, sum};
use super::packed::{Floats, Grids, PANEL};
use super::{ActivationBits, CodedRows};
use crate::operator::sparse::each_panel;
use crate::scalar::{DType, Real};

mod spread;

use self::spread::Spread;

/// Rows in a vector, and vectors of the rows of a panel.
const ROWS: usize = 4;
const VECTORS: usize = PANEL / ROWS;
/// Inputs that meet codes together, at most: their sums fill the registers.
const TOGETHER: usize = 4;

/// Sums of the products of each byte with some inputs, for some vectors of rows.
type Sums<const BYTES: usize, const V: usize, const B: usize> = [[[int32x4_t; B]; V]; BYTES];

/// Whether the machine has the instructions. (The answer is kept by the standard library.)
pub(super) fn available() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Whether there is a kernel for such rows here: not for inputs in another dtype, rows without columns, groups that end within a
/// chunk of codes, and machines without the instructions.
pub(super) fn takes<T: Real>(bits: u8, group: usize, columns: usize) -> bool {
    layout::<T>(ActivationBits::default(), bits, group, columns).is_some()
}

/// How the columns of such rows are cut; `None` if there is no kernel for them.
fn layout<T: Real>(activations: ActivationBits, bits: u8, group: usize, columns: usize) -> Option<Layout> {
    let fits = T::DTYPE == DType::F32 && columns > 0 && available();
    if fits { Layout::cut(bits, group, columns, activations.longest()) } else { None }
}

/// Whether inputs are laid out for such rows.
pub(super) fn meets<T: Real>(rows: &CodedRows<'_, T>, x: &Inputs) -> bool {
    let layout = layout::<T>(rows.activations, rows.codes.bits(), rows.group, rows.codes.shape().1);
    (rows.activations, layout) == (x.activations, Some(x.layout))
}

/// Some inputs, for codes of any width that are cut the same way.
#[derive(Debug)]
pub(super) struct Inputs {
    activations: ActivationBits,
    layout: Layout,
    vectors: usize,
    /// Vectors with those that stand in for missing ones.
    padded: usize,
    /// Four signed bytes each: [tile](tiles), run, lane, byte of an input (the largest first), vector.
    words: Vec<i32>,
    /// What the bytes of a run add up to, with the other sign: tile, run, byte, vector.
    less: Vec<i32>,
    /// What a whole number is worth: tile, run, vector.
    units: Vec<f32>,
    /// Sums of runs, for zero points and offsets: tile, run, vector.
    sums: Vec<f32>,
}

/// A tile of them.
struct Tile<'a> {
    words: &'a mut [i32],
    less: &'a mut [i32],
    units: &'a mut [f32],
    sums: &'a mut [f32],
}

/// First vector and number of vectors of each tile.
fn tiles(padded: usize) -> impl ExactSizeIterator<Item = (usize, usize)> {
    (0..padded).step_by(TOGETHER).map(move |first| (first, TOGETHER.min(padded - first)))
}

impl Inputs {
    /// `None` if there is no kernel for such rows here.
    pub(super) fn new<T: Real>(
        x: ArrayView2<'_, T>,
        activations: ActivationBits,
        bits: u8,
        group: usize,
    ) -> Option<Self> {
        let (layout, vectors) = (layout::<T>(activations, bits, group, x.nrows())?, x.ncols());
        let bytes = activations.bytes();
        let rest = vectors % TOGETHER;
        let padded = vectors - rest + if rest > 0 { rest.next_power_of_two() } else { 0 };
        let runs = layout.runs();
        let lanes = runs * (layout.run / EACH);
        let mut words = vec![0; lanes * bytes * padded];
        let mut less = vec![0; runs * bytes * padded];
        let (mut units, mut sums) = (vec![0.0; runs * padded], vec![0.0; runs * padded]);
        let digits = words.chunks_mut(lanes * bytes * TOGETHER).zip(less.chunks_mut(runs * bytes * TOGETHER));
        let beside = units.chunks_mut(runs * TOGETHER).zip(sums.chunks_mut(runs * TOGETHER));
        let of = digits.zip(beside).map(|((words, less), (units, sums))| Tile { words, less, units, sums });
        let of: Vec<_> = tiles(padded).zip(of).collect();
        // An entry takes a dozen steps or so.
        each_panel(of.into_iter(), x.len(), |_: &mut (), (_, ((first, count), tile))| {
            let columns: [Vec<T>; TOGETHER] = std::array::from_fn(|v| match first + v < vectors.min(first + count) {
                true => x.index_axis(Axis(1), first + v).to_vec(),
                false => Vec::new(),
            });
            let x = columns.each_ref().map(|column| cast_slice(column));
            match count {
                1 => lay_out(activations, &layout, tile, [x[0]]),
                2 => lay_out(activations, &layout, tile, [x[0], x[1]]),
                _ => lay_out(activations, &layout, tile, x),
            }
        });
        Some(Inputs { activations, layout, vectors, padded, words, less, units, sums })
    }

    /// A tile's words of a run: of each lane, so many of V inputs.
    #[inline(always)]
    fn words<const BYTES: usize, const V: usize>(&self, run: usize, first: usize) -> &[[[i32; V]; BYTES]] {
        let from = (first * self.layout.runs() + run * V) * (self.layout.run / EACH) * BYTES;
        self.words[from..from + self.layout.lanes(run) * BYTES * V].as_chunks().0.as_chunks().0
    }

    /// Where what a tile has beside its words of a run begins.
    #[inline(always)]
    fn beside(&self, run: usize, first: usize, width: usize) -> usize {
        first * self.layout.runs() + run * width
    }
}

/// Lays a tile out, in which a missing input has no numbers.
fn lay_out<const V: usize>(activations: ActivationBits, layout: &Layout, tile: Tile<'_>, x: [&[f32]; V]) {
    let bytes = activations.bytes();
    let words = tile.words.as_chunks_mut::<V>().0.chunks_mut(layout.run / EACH * bytes);
    let beside = tile.units.as_chunks_mut::<V>().0.iter_mut().zip(tile.sums.as_chunks_mut::<V>().0);
    let less = tile.less.as_chunks_mut::<V>().0.chunks_mut(bytes);
    for (run, ((words, less), (units, sums))) in words.zip(less).zip(beside).enumerate() {
        for (v, x) in x.iter().enumerate() {
            let x = layout.of_run(run, x);
            units[v] = activations.unit(largest(x));
            let per_unit = units[v].recip();
            let mut totals = [0; ActivationBits::TwentyFour.bytes()];
            for (lane, to) in words[..layout.lanes(run) * bytes].chunks_exact_mut(bytes).enumerate() {
                let of: [[i8; 4]; EACH] = std::array::from_fn(|at| {
                    let column = lane / layout.parts * EACH * layout.parts + at * layout.parts + lane % layout.parts;
                    let x = x.get(column).copied().unwrap_or_default();
                    // With half of its range added to each digit, digits count from nothing, each by itself; without it they
                    // have signs again. (What is not a number is zero.)
                    let whole = (x * per_unit).round_ties_even() as i32;
                    ((whole + 0x0080_8080) ^ 0x0080_8080).to_le_bytes().map(|byte| byte as i8)
                });
                for (byte, (to, total)) in to.iter_mut().zip(&mut totals).enumerate() {
                    let four = of.map(|of| of[bytes - 1 - byte]);
                    to[v] = i32::from_le_bytes(four.map(|byte| byte as u8));
                    *total += four.iter().map(|&byte| i32::from(byte)).sum::<i32>();
                }
            }
            sums[v] = sum(&totals[..bytes], 8, units[v]);
            less.iter_mut().zip(totals).for_each(|(less, total)| less[v] = -total);
        }
    }
}

/// Some rows.
struct Panel<'a> {
    bits: u8,
    packed: &'a [u8],
    grids: &'a Grids,
    /// Where its groups begin in them.
    group: usize,
    spread: &'a Spread,
}

/// The inner products of some rows, of which the first begins a panel, with some inputs, row by row.
pub(super) fn products<T: Real>(rows: &CodedRows<'_, T>, range: Range<usize>, x: &Inputs, y: &mut [f32]) {
    let vectors = x.vectors.max(1);
    let Some(panels) = rows.codes.panels() else { return };
    assert!(meets(rows, x) && range.start.is_multiple_of(PANEL), "rows of the kind that inputs were laid out for");
    let (bits, grids) = (rows.codes.bits(), rows.codes.grids());
    let spread = Spread::new(bits);
    let mut totals = vec![[0.0; PANEL]; x.padded];
    let of = range.clone().step_by(PANEL).zip(panels.skip(range.start / PANEL)).zip(y.chunks_mut(PANEL * vectors));
    for ((first, packed), y) in of {
        let panel = Panel { bits, packed, grids, group: first / PANEL * rows.groups, spread: &spread };
        totals.fill([0.0; PANEL]);
        panel.multiply(x, &mut totals);
        for (r, y) in y.chunks_mut(vectors).enumerate() {
            y.iter_mut().zip(&totals).for_each(|(y, totals)| *y = totals[r]);
        }
    }
}

impl Panel<'_> {
    /// Adds the products with all inputs.
    fn multiply(&self, x: &Inputs, totals: &mut [[f32; PANEL]]) {
        match self.bits {
            8 => self.parts::<8, 1>(x, totals),
            4 => self.parts::<4, 2>(x, totals),
            2 => self.parts::<2, 4>(x, totals),
            _ => self.parts::<0, 1>(x, totals),
        }
    }

    /// Where so many codes begin in the same byte: as many rows at a time as there are registers for sums, codes and inputs.
    fn parts<const KIND: u8, const PARTS: usize>(&self, x: &Inputs, totals: &mut [[f32; PANEL]]) {
        for (first, count) in tiles(x.padded) {
            // Vectors of rows with one input, with two and with four.
            macro_rules! by {
                ($bytes:literal: $one:literal, $two:literal, $four:literal) => {
                    match count {
                        1 => self.tile::<KIND, PARTS, $bytes, 1, $one>(x, first, totals),
                        2 => self.tile::<KIND, PARTS, $bytes, 2, $two>(x, first, totals),
                        _ => self.tile::<KIND, PARTS, $bytes, TOGETHER, $four>(x, first, totals),
                    }
                };
            }
            // SAFETY: the machine has the instructions: there are inputs only where `available` says so.
            #[allow(unsafe_code)]
            unsafe {
                match x.activations {
                    ActivationBits::Eight => by!(1: 8, 8, 4),
                    ActivationBits::Sixteen => by!(2: 8, 4, 2),
                    ActivationBits::TwentyFour => by!(3: 4, 2, 2),
                }
            }
        }
    }

    /// Adds the products with V inputs from one on, B vectors of rows at a time.
    #[target_feature(enable = "neon,dotprod")]
    #[allow(clippy::needless_range_loop)]
    fn tile<const KIND: u8, const PARTS: usize, const BYTES: usize, const V: usize, const B: usize>(
        &self,
        x: &Inputs,
        first: usize,
        totals: &mut [[f32; PANEL]],
    ) {
        let Some(totals) = totals[first..].first_chunk_mut::<V>() else { return };
        let (mut codes, shifted) = (self.packed, self.grids.shifted());
        for run in 0..x.layout.runs() {
            let bytes = x.layout.lanes(run) / PARTS * self.spread.chunk::<KIND>();
            let Some((of_run, rest)) = codes.split_at_checked(bytes) else { return };
            codes = rest;
            let words = x.words::<BYTES, V>(run, first).as_chunks::<PARTS>().0;
            let at = x.beside(run, first, V);
            let less: &[[[i32; V]; BYTES]] = x.less[at * BYTES..].as_chunks().0.as_chunks().0;
            let (units, whole) = (&x.units[at..at + V], &x.sums[at..at + V]);
            let (scales, shift) = scaling(self.grids, self.bits, self.group + x.layout.group_of(run));
            for some in 0..VECTORS / B {
                let mut sums = self.begun::<KIND, BYTES, V, B>(&less[0]);
                for (codes, words) in of_run.chunks_exact(self.spread.chunk::<KIND>()).zip(words) {
                    self.add::<KIND, PARTS, BYTES, V, B>(codes, words, some, &mut sums);
                }
                for b in 0..B {
                    let vector = some * B + b;
                    let (scales, shift) = (four(&scales, vector), four(&shift, vector));
                    for v in 0..V {
                        let mut of = [vdupq_n_s32(0); BYTES];
                        for byte in 0..BYTES {
                            of[byte] = sums[byte][v][b];
                        }
                        let of = join(of);
                        let scale = vmulq_n_f32(scales, units[v]);
                        let mut total = vfmaq_f32(four(&totals[v], vector), of, scale);
                        if shifted {
                            total = vfmaq_n_f32(total, shift, whole[v]);
                        }
                        totals[v].as_chunks_mut().0[vector] = cast::<float32x4_t, [f32; ROWS]>(total);
                    }
                }
            }
        }
    }

    /// What sums begin with, as codes count from nothing and their numbers from the middle of the levels. (Those of eight bits
    /// have signs.)
    #[inline]
    #[target_feature(enable = "neon")]
    #[allow(clippy::needless_range_loop)]
    fn begun<const KIND: u8, const BYTES: usize, const V: usize, const B: usize>(
        &self,
        less: &[[i32; V]; BYTES],
    ) -> Sums<BYTES, V, B> {
        let mut sums = [[[vdupq_n_s32(0); B]; V]; BYTES];
        if KIND < 8 {
            for byte in 0..BYTES {
                for v in 0..V {
                    sums[byte][v] = [vdupq_n_s32(less[byte][v] << (self.bits - 1)); B];
                }
            }
        }
        sums
    }

    /// Adds the products of a chunk of columns. (No closures: they are compiled without the instructions, and sums would have to
    /// be in memory.)
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    #[allow(clippy::needless_range_loop)]
    fn add<const KIND: u8, const PARTS: usize, const BYTES: usize, const V: usize, const B: usize>(
        &self,
        codes: &[u8],
        words: &[[[i32; V]; BYTES]; PARTS],
        some: usize,
        sums: &mut Sums<BYTES, V, B>,
    ) {
        for part in 0..PARTS {
            let mut of_rows = [vdupq_n_s8(0); B];
            for b in 0..B {
                of_rows[b] = self.spread.lane::<KIND>(codes, part, some * B + b);
            }
            for byte in 0..BYTES {
                for v in 0..V {
                    let word = vreinterpretq_s8_s32(vdupq_n_s32(words[part][byte][v]));
                    for b in 0..B {
                        sums[byte][v][b] = dots(sums[byte][v][b], of_rows[b], word);
                    }
                }
            }
        }
    }
}

/// Adds the products of four bytes each. (The standard library's function is not stable.)
#[inline]
#[target_feature(enable = "neon,dotprod")]
#[allow(unsafe_code)]
fn dots(mut sums: int32x4_t, codes: int8x16_t, words: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is there, or this were not called. It reads and writes the named registers only.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {words:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            words = in(vreg) words,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The sum of the products of all bytes, up to three.
#[inline]
#[target_feature(enable = "neon")]
fn join<const BYTES: usize>(of: [int32x4_t; BYTES]) -> float32x4_t {
    // All but the largest of three fit 32 bits together.
    let mut rest = of[BYTES - 1];
    if BYTES > 1 {
        rest = vaddq_s32(vshlq_n_s32::<8>(of[BYTES - 2]), rest);
    }
    match BYTES {
        3 => vfmaq_n_f32(vcvtq_f32_s32(rest), vcvtq_f32_s32(of[0]), 65_536.0),
        _ => vcvtq_f32_s32(rest),
    }
}

/// Those of four rows.
#[inline]
fn four(of: &[f32; PANEL], vector: usize) -> float32x4_t {
    cast(of.as_chunks::<ROWS>().0[vector])
}

/// What makes numbers of the sums of all rows in a group: scales, and what codes count from the middle; zeros if there is no such
/// group.
#[inline]
fn scaling(grids: &Grids, bits: u8, group: usize) -> ([f32; PANEL], [f32; PANEL]) {
    let scales = numbers(&grids.scales, group);
    let shift = match grids.zeros.get(group) {
        Some(zeros) => std::array::from_fn(|r| scales[r] * ((1i32 << (bits - 1)) - i32::from(zeros[r])) as f32),
        None => numbers(&grids.offsets, group),
    };
    (scales, shift)
}

/// A group's numbers; zeros if there are none at all.
#[inline]
fn numbers(of: &Floats, group: usize) -> [f32; PANEL] {
    let mut numbers = [0.0; PANEL];
    match of {
        Floats::Half(all) => all.get(group).into_iter().for_each(|of| of.convert_to_f32_slice(&mut numbers)),
        Floats::Wide(all) => all.get(group).into_iter().for_each(|of| numbers = *of),
    }
    numbers
}
