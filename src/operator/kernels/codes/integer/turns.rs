//! Products of codes with up to sixteen inputs, by matrix instructions of bytes: some columns of a panel after those of another.
//!
//! All digits of the inputs are the rows of one tile or of two. Two tiles of sums are added up while the two before are written
//! where vectors read them, and those before these become numbers: of both bands of a run and of the run before, or, if inputs
//! fill two tiles, of a band and of the other. To write a tile out takes 17 cycles, however few rows it has, and a tile that is
//! loaded waits for lines that are still on their way to the cache: so what is written is read only some time later, and codes are
//! unpacked a unit of 128 columns ahead. Some panels go by turns, as their codes and all that has been named should fit into the
//! nearest cache with the inputs of a unit, which come from the next cache once for all panels. Codes of eight bits are read where
//! they lie.

use std::arch::x86_64::*;

use pulp::bytemuck::allocation::zeroed_box;
use pulp::bytemuck::{Zeroable, cast, cast_slice_mut};

use super::inputs::Inputs;
use super::matrix::Shape;
use super::panel::{Pair, Signed};
use super::runs::Runs;
use super::vectors::{Panel, Scaling};
use super::way::Layout;
use super::{ActivationBits, BANDS, EACH, LANES, LIMBS, LINE, Lanes, TOGETHER};
use crate::memory::prefetch;

mod places;
mod products;

use self::places::Place;

/// Panels by turns.
pub(super) const PANELS: usize = 4;
/// Units of all panels, by turns, between what is unpacked and what is asked for.
const AHEAD: usize = 2;
/// Columns of a unit, and lanes of their codes.
pub(super) const COLUMNS: usize = 128;
const UNIT: usize = COLUMNS / EACH;

/// Two tiles of sums.
type Sums = [[Lanes<i32>; LANES]; 2];
/// Room for the packed codes of a unit.
type Rest = [u8; UNIT * size_of::<Pair>()];

/// How so many inputs meet codes of so many bits whose columns are cut this way, if that is the fastest: not one input, nor two where
/// sums leave their tiles so often that vectors are faster, nor digits that fill more than two tiles, nor, with codes of up to seven
/// bits, many digits of short runs, which numbers have in one sum. (One byte of an input would have runs of 32 columns, and be the
/// slower; up to four have three, which take hardly longer than two.)
pub(super) fn shape(inputs: usize, activations: ActivationBits, bits: u8, layout: &Layout) -> Option<Shape> {
    let full = activations == ActivationBits::TwentyFour;
    let together = inputs.next_power_of_two().clamp(TOGETHER, LANES);
    let digits = if full || together == TOGETHER { ActivationBits::TwentyFour } else { ActivationBits::Sixteen };
    let shape = Shape::of(together, digits, layout);
    let (fewest, most_rows) = match layout.run {
        COLUMNS => (2, 2 * LANES),
        64 if full => (2, LIMBS * TOGETHER),
        64 => (3, 2 * LANES),
        32 => (3, LIMBS * TOGETHER),
        _ => return None,
    };
    let most_rows = if bits == 8 { 2 * LANES } else { most_rows };
    (inputs >= fewest && shape.rows * shape.tiles <= most_rows).then_some(shape)
}

/// Runs of a row, with those that fill its last unit.
pub(super) fn all(layout: &Layout) -> usize {
    layout.runs().next_multiple_of(COLUMNS / layout.run)
}

/// Memory for the codes of a unit and the next, for the sums of two turns, and for what there is of a unit that ends a row.
#[repr(C, align(64))]
pub(super) struct Scratch {
    codes: [[Pair; UNIT]; 2],
    sums: [Sums; 2],
    rest: Rest,
}

// SAFETY: it has integers only, all bytes of which may be zero.
#[allow(unsafe_code)]
unsafe impl Zeroable for Scratch {}

impl Scratch {
    /// (It is too large to be made elsewhere and moved for each product.)
    pub(super) fn new() -> Box<Self> {
        zeroed_box()
    }
}

/// Tile registers for inputs of a shape.
pub(super) struct Tiles {
    shape: Shape,
    runs: Runs,
}

impl Tiles {
    /// # Panics
    /// Without the instructions, and for a shape of more than a register's rows and lanes.
    pub(super) fn new(shape: Shape) -> Self {
        Tiles { shape, runs: Runs::new(shape.rows, shape.lanes) }
    }
}

/// Adds the products of as many panels as are together, or fewer, with all inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
pub(super) fn multiply<const KIND: u8, const PARTS: usize>(
    tiles: &Tiles,
    panels: &[Panel<'_>],
    x: &Inputs,
    scratch: &mut Scratch,
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    macro_rules! turns {
        ($inputs:literal, $digits:literal, $runs:literal) => {
            Turns::<KIND, PARTS, $inputs, $digits, $runs>::multiply(tiles, panels, x, scratch, totals)
        };
    }
    // (No code is made for what [`shape`] has none.)
    match (tiles.shape.inputs, tiles.shape.activations.bytes(), x.layout.run) {
        (4, 3, 32) => turns!(4, 3, 4),
        (4, 3, 64) => turns!(4, 3, 2),
        (4, 3, _) => turns!(4, 3, 1),
        (8, 3, 32) if KIND == 8 => turns!(8, 3, 4),
        (8, 3, 64) if KIND == 8 => turns!(8, 3, 2),
        (8, 3, _) => turns!(8, 3, 1),
        (8, _, 32) if KIND == 8 => turns!(8, 2, 4),
        (8, _, 64) => turns!(8, 2, 2),
        (8, ..) => turns!(8, 2, 1),
        (_, _, 32) if KIND == 8 => turns!(16, 2, 4),
        (_, _, 64) => turns!(16, 2, 2),
        _ => turns!(16, 2, 1),
    }
}

/// A run of a panel that has its sums, but not its totals; [`usize::MAX`] of everything if there is none.
#[derive(Clone, Copy)]
struct Behind {
    /// The run, with those of other tiles of inputs before it, and its group, with those of other panels before it.
    run: usize,
    group: usize,
    /// Where its totals begin.
    totals: usize,
}

/// Panels that meet V inputs in so many digits, with so many runs in a unit.
struct Turns<'a, const KIND: u8, const PARTS: usize, const V: usize, const DIGITS: usize, const RUNS: usize> {
    panels: &'a [Panel<'a>],
    one: &'a Panel<'a>,
    x: &'a Inputs,
    /// For ROWS rows of inputs and WIDE lanes.
    registers: &'a Runs,
    signed: Signed,
    /// Bytes of the codes of a unit.
    unit: usize,
}

/// A unit whose products are added up, and what is done beside them.
struct Unit<'u> {
    codes: &'u [Pair; UNIT],
    inputs: &'u [i32],
    /// The codes that are unpacked, and how far ahead those are that should be asked for.
    coming: &'u [u8],
    in_place: bool,
    ahead: usize,
    to: &'u mut [Pair; UNIT],
}

impl<'a, const KIND: u8, const PARTS: usize, const V: usize, const DIGITS: usize, const RUNS: usize>
    Turns<'a, KIND, PARTS, V, DIGITS, RUNS>
{
    /// Tiles of the digits of all inputs, and rows of each.
    const TILES: usize = (V * DIGITS).div_ceil(LANES);
    const ROWS: usize = V * DIGITS / Self::TILES;
    /// Lanes of a step, and steps of a run.
    const WIDE: usize = if RUNS == 4 { LANES / 2 } else { LANES };
    const STEPS: usize = UNIT / RUNS / Self::WIDE;
    /// Integers of the inputs of a step.
    const INPUTS: usize = V * DIGITS * Self::WIDE;

    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    fn multiply(
        Tiles { shape, runs }: &Tiles,
        panels: &[Panel<'_>],
        x: &Inputs,
        scratch: &mut Scratch,
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        const { assert!(Self::TILES <= 2 && Self::ROWS * Self::TILES == V * DIGITS && Self::WIDE <= LANES) };
        let of = (shape.inputs, shape.lanes, shape.rows, shape.tiles, x.layout.run);
        assert!(of == (V, Self::WIDE, Self::ROWS, Self::TILES, COLUMNS / RUNS), "inputs of this shape");
        let Some(one) = panels.first() else { return };
        let signed = Signed::new(one.bits);
        let unit = UNIT / PARTS * signed.chunk::<KIND>();
        let turns = Turns::<KIND, PARTS, V, DIGITS, RUNS> { panels, one, x, registers: runs, signed, unit };
        for tile in 0..x.tiles().len() {
            turns.tile(tile, scratch, totals);
        }
    }

    /// Adds the products with a tile of inputs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    fn tile(&self, tile: usize, scratch: &mut Scratch, totals: &mut [[Lanes<f32>; BANDS]]) {
        let (layout, padded, all) = (&self.x.layout, self.x.padded(), all(&self.x.layout));
        let inputs = &self.x.digits()[tile * all * Self::STEPS * Self::INPUTS..];
        let Scratch { codes: [even, odd], sums, rest } = scratch;
        let mut coming = Place::default();
        let mut asked = (0..AHEAD).fold(coming, |place, _| self.after(place));
        let mut in_place = self.in_place(coming);
        let ahead = self.offset(asked).wrapping_sub(self.offset(coming));
        self.unpack(self.codes(coming, rest), ahead, even, in_place.is_some());
        const NONE: Behind = Behind { run: usize::MAX, group: usize::MAX, totals: usize::MAX };
        let (mut slot, mut turn, mut behind) = (0, 0, [NONE; 2]);
        for (unit, inputs) in inputs.chunks_exact(RUNS * Self::STEPS * Self::INPUTS).take(all / RUNS).enumerate() {
            for (at, panel) in self.panels.iter().enumerate() {
                let (codes, to) = if slot == 0 { (&*even, &mut *odd) } else { (&*odd, &mut *even) };
                slot = 1 - slot;
                let codes = in_place.unwrap_or(codes);
                (coming, asked) = (self.after(coming), self.after(asked));
                let ahead = self.offset(asked).wrapping_sub(self.offset(coming));
                in_place = self.in_place(coming);
                let mut of =
                    Unit { codes, inputs, coming: self.codes(coming, rest), in_place: in_place.is_some(), ahead, to };
                let mut next = Behind { run: tile * all + unit * RUNS, group: 0, totals: at * padded + tile * V };
                for run in 0..RUNS {
                    // (Runs that fill the last unit have no groups of their own, and nothing to be scaled.)
                    next.group = panel.group + layout.group_of((unit * RUNS + run).min(layout.runs() - 1));
                    panel.grids.ask_for(next.group, PANELS);
                    if Self::TILES > 1 {
                        self.turn::<0>(run, &mut of, sums, &behind[0], totals);
                        self.turn::<1>(run, &mut of, sums, &behind[0], totals);
                    } else if turn == 0 {
                        self.turn::<0>(run, &mut of, sums, &behind[0], totals);
                    } else {
                        self.turn::<1>(run, &mut of, sums, &behind[1], totals);
                    }
                    behind[turn] = next;
                    turn = if Self::TILES > 1 { 0 } else { 1 - turn };
                    next.run += 1;
                }
            }
        }
        // The sums of the turn before the last have been written.
        let [even, odd] = sums;
        if Self::TILES > 1 {
            self.registers.put::<0, _>(1, odd);
            self.registers.put::<1, _>(1, odd);
            self.add_all::<0>(&behind[0], even, totals);
            self.add_all::<1>(&behind[0], odd, totals);
        } else {
            let (before, last) = if turn == 0 { (even, odd) } else { (odd, even) };
            self.registers.put::<0, _>(1 - turn, last);
            self.registers.put::<1, _>(1 - turn, last);
            self.add_all::<0>(&behind[turn], before, totals);
            self.add_all::<0>(&behind[1 - turn], last, totals);
        }
    }

    /// Unpacks codes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn unpack(&self, codes: &[u8], ahead: usize, to: &mut [Pair], in_place: bool) {
        match KIND {
            8 => {
                codes.chunks(LINE).for_each(|line| prefetch(&line[0], ahead));
                if !in_place {
                    cast_slice_mut(to).copy_from_slice(codes);
                }
            }
            _ => self.signed.unpack::<KIND, PARTS>(codes, ahead, to),
        }
    }

    /// Unpacks a quarter of the codes of a run that comes, or of the half of them that belongs to a turn, if it has two.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn quarter<const TURN: usize, const QUARTER: usize>(&self, run: usize, unit: &mut Unit<'_>) {
        let (part, parts) = if Self::TILES == 1 { (QUARTER, 4) } else { (4 * TURN + QUARTER, 8) };
        let (of_run, chunk) = (UNIT / RUNS / PARTS, self.signed.chunk::<KIND>());
        let (first, end) = (run * of_run + part * of_run / parts, run * of_run + (part + 1) * of_run / parts);
        self.unpack(
            &unit.coming[first * chunk..end * chunk],
            unit.ahead,
            &mut unit.to[first * PARTS..end * PARTS],
            unit.in_place,
        );
    }

    /// Adds up the products of a run of a panel, of both bands or of one, writes out the sums of the turn before, and adds those of the
    /// turn before this to totals.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    fn turn<const TURN: usize>(
        &self,
        run: usize,
        unit: &mut Unit<'_>,
        sums: &mut [Sums; 2],
        behind: &Behind,
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        let [even, odd] = sums;
        let (read, written) = if TURN == 0 { (&*even, odd) } else { (&*odd, even) };
        let other = 1 - TURN;
        let scalings = self.scalings(behind);
        self.registers.clear(TURN);
        let at = |step: usize| run * Self::STEPS + step;
        let codes = &unit.codes[at(0) * Self::WIDE..][..Self::WIDE];
        let inputs = &unit.inputs[at(0) * Self::INPUTS..][..Self::INPUTS];
        self.first::<TURN>(codes, inputs);
        self.quarter::<TURN, 0>(run, unit);
        self.registers.put::<0, _>(other, written);
        self.second::<TURN>(codes, inputs);
        self.quarter::<TURN, 1>(run, unit);
        self.registers.put::<1, _>(other, written);
        if Self::STEPS > 1 {
            let codes = &unit.codes[at(1) * Self::WIDE..][..Self::WIDE];
            let inputs = &unit.inputs[at(1) * Self::INPUTS..][..Self::INPUTS];
            self.first::<TURN>(codes, inputs);
            self.add::<TURN, 0>(&scalings, behind, read, totals);
            self.second::<TURN>(codes, inputs);
        } else {
            self.add::<TURN, 0>(&scalings, behind, read, totals);
        }
        self.quarter::<TURN, 2>(run, unit);
        self.quarter::<TURN, 3>(run, unit);
        self.add::<TURN, 1>(&scalings, behind, read, totals);
    }

    /// What makes numbers of the sums of a run, of each band.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scalings(&self, behind: &Behind) -> [Scaling; BANDS] {
        let mut scalings = self.one.scalings(behind.group);
        for of in &mut scalings {
            of.scales = _mm512_mul_ps(of.scales, _mm512_set1_ps(1.0 / Signed::times::<KIND>()));
        }
        scalings
    }

    /// Adds half of the sums of a turn to their totals: of a band each, or of half of the inputs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    #[allow(clippy::needless_range_loop)]
    fn add<const TURN: usize, const HALF: usize>(
        &self,
        scalings: &[Scaling; BANDS],
        &Behind { run, totals: from, .. }: &Behind,
        sums: &Sums,
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        let Some(totals) = totals.get_mut(from..).and_then(|totals| totals.first_chunk_mut::<V>()) else { return };
        let (units, whole) = (&self.x.units::<V>(run..run + 1)[0], &self.x.sums::<V>(run..run + 1)[0]);
        let starts = if KIND == 8 { &self.one.starts[run * V * DIGITS..][..V * DIGITS] } else { &[] };
        let (band, inputs) = match Self::TILES {
            1 => (HALF, 0..V),
            _ => (TURN, HALF * V / 2..(HALF + 1) * V / 2),
        };
        let scaling = &scalings[band];
        for v in inputs {
            let mut of = [_mm512_setzero_si512(); DIGITS];
            for digit in 0..DIGITS {
                let row = digit * V + v;
                let sum = if Self::TILES == 1 { &sums[band][row] } else { &sums[row / Self::ROWS][row % Self::ROWS] };
                of[digit] = cast(sum.0);
                if KIND == 8 {
                    of[digit] = _mm512_add_epi32(of[digit], _mm512_set1_epi32(starts[row]));
                }
            }
            let total = &mut totals[v][band];
            *total = Lanes(cast(scaling.add(cast(total.0), of, units[v], whole[v])));
        }
    }

    /// Adds all of them.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    fn add_all<const TURN: usize>(&self, behind: &Behind, sums: &Sums, totals: &mut [[Lanes<f32>; BANDS]]) {
        let scalings = self.scalings(behind);
        self.add::<TURN, 0>(&scalings, behind, sums, totals);
        self.add::<TURN, 1>(&scalings, behind, sums, totals);
    }
}
