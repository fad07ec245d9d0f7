//! Products of codes of few bits in short groups with many inputs, by matrix instructions with bf16: blocks of two steps.
//!
//! What a processor does beside the products of a step, as [`bfloat`](super::bfloat) has them, is to unpack codes of the next
//! block and to scale sums of the block before. All go by turns of a few dozen instructions, as it looks no farther ahead to
//! mix them, and what was written is read only some time later: a tile that is loaded waits for lines that are still on their
//! way to the cache. Groups of more columns meet inputs as bytes ([`many`](super::many)), in half as many products, and are
//! seldom scaled.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::bfloat::{Codes, Cut, STEP, Sums, Table, Tiles, WIDEST};
use super::inputs::{Inputs, Layout};
use super::panel::Lanes;
use super::{BANDS, LANES, PANEL, Panel, Scaling};

/// Steps of a block.
const STEPS: usize = 2;
/// Inputs that are scaled together.
const FOUR: usize = 4;

/// Whether this is the way for codes of so many bits in runs of so many columns.
pub(super) fn takes(bits: u8, run: usize) -> bool {
    bits <= WIDEST && run <= STEPS * STEP
}

/// Memory for codes and sums of two blocks.
#[repr(C, align(4096))]
pub(super) struct Scratch {
    codes: [[Codes; STEPS]; 2],
    /// Of each run.
    sums: [[Sums; STEPS]; 2],
}

impl Scratch {
    pub(super) fn new() -> Box<Self> {
        let (codes, sums) = ([[Lanes::default(); LANES]; BANDS], [[Lanes::default(); LANES]; BANDS]);
        Box::new(Scratch { codes: [[codes; STEPS]; 2], sums: [[sums; STEPS]; 2] })
    }
}

/// How rows are cut into blocks.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    /// Runs of a block: two of a step each, or one.
    pub runs: usize,
    /// Blocks of a row.
    pub count: usize,
}

impl Blocks {
    pub(super) fn new(layout: &Layout) -> Self {
        let runs = if layout.run <= STEP { STEPS } else { 1 };
        Blocks { runs, count: layout.runs().div_ceil(runs) }
    }

    /// Runs of a row, with one that fills the last block.
    pub(super) fn all(&self) -> usize {
        self.runs * self.count
    }

    /// Steps of a run.
    pub(super) fn steps(&self) -> usize {
        STEPS / self.runs
    }

    /// Panels that so many tiles of inputs meet before the next block: more of them if the tiles come from farther away.
    pub(super) fn panels(&self, tiles: usize) -> usize {
        4 * tiles.clamp(1, 8)
    }
}

/// A block that has its sums, but not its totals.
struct Behind<'a, const COUNT: usize> {
    scalings: [[Scaling; BANDS]; STEPS],
    /// Whether there is more than scales.
    shifted: bool,
    /// What inputs add up to, of each run.
    whole: &'a [[f32; COUNT]],
    /// Where their totals begin.
    totals: usize,
}

impl<const COUNT: usize> Behind<'_, COUNT> {
    /// Adds the sums of some inputs to their totals.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(&self, four: usize, sums: &[Sums; STEPS], totals: &mut [[Lanes<f32>; BANDS]]) {
        let Some(to) = totals[self.totals + four * FOUR..].first_chunk_mut::<FOUR>() else { return };
        let mut totals = [[_mm512_setzero_ps(); BANDS]; FOUR];
        for v in 0..FOUR {
            for band in 0..BANDS {
                totals[v][band] = cast(to[v][band].0);
            }
        }
        for ((scalings, sums), whole) in self.scalings.iter().zip(sums).zip(self.whole) {
            let of: [&[Lanes<f32>; FOUR]; BANDS] = [&sums[0].as_chunks().0[four], &sums[1].as_chunks().0[four]];
            for v in 0..FOUR {
                for band in 0..BANDS {
                    totals[v][band] = _mm512_fmadd_ps(cast(of[band][v].0), scalings[band].scales, totals[v][band]);
                }
            }
            if self.shifted {
                let whole = &whole.as_chunks::<FOUR>().0[four];
                for v in 0..FOUR {
                    for band in 0..BANDS {
                        let whole = _mm512_set1_ps(whole[v]);
                        totals[v][band] = _mm512_fmadd_ps(scalings[band].shift, whole, totals[v][band]);
                    }
                }
            }
        }
        for v in 0..FOUR {
            for band in 0..BANDS {
                to[v][band] = Lanes(cast(totals[v][band]));
            }
        }
    }
}

/// What is beside the products of a block.
struct Beside<'a, const COUNT: usize> {
    table: &'a Table,
    tiles: &'a Tiles<COUNT>,
    /// Codes of the steps of the block that comes next, none behind the last, and bytes to what is asked for.
    coming: [&'a [u8]; STEPS],
    ahead: usize,
    behind: &'a Behind<'a, COUNT>,
    totals: &'a mut [[Lanes<f32>; BANDS]],
}

impl<const COUNT: usize> Beside<'_, COUNT> {
    /// Multiplies a block: of an even number or an odd one, of one run or of two.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
    fn multiply<const KIND: u8, const TURN: usize, const RUNS: usize>(
        &mut self,
        scratch: &mut Scratch,
        x: &[Cut<COUNT>; STEPS],
    ) {
        let Scratch { codes: [even, odd], sums: [of_even, of_odd] } = scratch;
        let (codes, to) = if TURN == 0 { (even, odd) } else { (odd, even) };
        let (now, before) = if TURN == 0 { (of_even, of_odd) } else { (of_odd, of_even) };
        self.step::<KIND, TURN, RUNS, 0>(&codes[0], &x[0], &mut to[0], now, before);
        self.step::<KIND, TURN, RUNS, 1>(&codes[1], &x[1], &mut to[1], now, before);
    }

    /// Adds the products of a step. (Compilers make it part of what calls it, as each has but one caller.)
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
    fn step<const KIND: u8, const TURN: usize, const RUNS: usize, const AT: usize>(
        &mut self,
        codes: &Codes,
        x: &Cut<COUNT>,
        to: &mut Codes,
        now: &mut [Sums; STEPS],
        before: &mut [Sums; STEPS],
    ) {
        let (table, tiles, coming, ahead) = (self.table, self.tiles, self.coming[AT], self.ahead);
        // Sums are put where they belong when the next run has begun.
        let begins = AT < RUNS;
        let run = if RUNS == 1 { TURN } else { AT };
        let last = if AT == 0 { &mut before[RUNS - 1] } else { &mut now[0] };
        if begins {
            tiles.clear(run);
        }
        tiles.first(run, codes, x);
        if begins {
            tiles.put::<0>(run + 1, last);
        }
        table.unpack::<KIND, 0>(coming, ahead, to);
        tiles.next(run, &x[1]);
        if begins {
            tiles.put::<1>(run + 1, last);
        }
        let fours = COUNT / FOUR / STEPS;
        self.behind.add(AT * fours, before, self.totals);
        table.unpack::<KIND, 1>(coming, ahead, to);
        tiles.next(run, &x[2]);
        table.unpack::<KIND, 2>(coming, ahead, to);
        for four in 1..fours {
            self.behind.add(AT * fours + four, before, self.totals);
        }
        table.unpack::<KIND, 3>(coming, ahead, to);
    }
}

/// Adds the products of as many panels as are together, or fewer, with all inputs, COUNT at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
pub(super) fn multiply<'p, const KIND: u8, const COUNT: usize>(
    panels: &[Panel<'p>],
    x: &Inputs,
    tiles: &Tiles<COUNT>,
    scratch: &mut Scratch,
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    let Some(one) = panels.first() else { return };
    let (layout, table) = (&x.layout, Table::new(one.bits));
    let (blocks, padded, of_tiles) = (Blocks::new(layout), x.padded(), x.tiles().len());
    let groups = layout.group_of(layout.runs().saturating_sub(1)) + 1;
    let bytes = |columns: usize| columns * PANEL * usize::from(one.bits) / 8;
    let (block, step) = (bytes(blocks.runs * layout.run), bytes(layout.run.min(STEP)));
    let codes = |panel: &Panel<'p>, number: usize| {
        let codes = panel.packed.get(number * block..).unwrap_or_default();
        [codes, codes.get(step..).unwrap_or_default()]
    };
    for (codes, to) in codes(one, 0).iter().zip(&mut scratch.codes[0]) {
        table.all::<KIND>(codes, to);
    }
    let nothing = Scaling { scales: _mm512_setzero_ps(), shift: _mm512_setzero_ps() };
    let shifted = one.grids.shifted();
    let mut behind = Behind { scalings: [[nothing; BANDS]; STEPS], shifted, whole: &[], totals: 0 };
    let mut turn = 0;
    for number in 0..blocks.count {
        let first = number * blocks.runs;
        // (A run that fills the last block has nothing to be scaled.)
        let runs = blocks.runs.min(layout.runs() - first);
        let of_runs: [usize; STEPS] = std::array::from_fn(|run| layout.group_of(first + run));
        // What comes after the block: the next one, or that of the panels that come next, which follow in memory.
        let (ahead, groups_ahead) = match number + 1 < blocks.count {
            true => (block, layout.group_of(first + blocks.runs) - of_runs[0]),
            false => (panels.len() * one.packed.len() - number * block, panels.len() * groups - of_runs[0]),
        };
        for tile in 0..of_tiles {
            let from = tile * blocks.all() + first;
            let whole = x.sums::<COUNT>(from..from + runs);
            let x = &x.numbers::<COUNT>().as_chunks::<STEPS>().0[tile * blocks.count + number];
            for (at, panel) in panels.iter().enumerate() {
                let coming = match panels.get(at + 1) {
                    Some(next) => codes(next, number),
                    None => codes(one, if tile + 1 < of_tiles { number } else { number + 1 }),
                };
                let mut beside = Beside { table: &table, tiles, coming, ahead, behind: &behind, totals };
                match (turn, blocks.runs) {
                    (0, 1) => beside.multiply::<KIND, 0, 1>(scratch, x),
                    (0, _) => beside.multiply::<KIND, 0, STEPS>(scratch, x),
                    (_, 1) => beside.multiply::<KIND, 1, 1>(scratch, x),
                    (_, _) => beside.multiply::<KIND, 1, STEPS>(scratch, x),
                }
                turn = 1 - turn;
                (behind.whole, behind.totals) = (whole, at * padded + tile * COUNT);
                for (scalings, group) in behind.scalings.iter_mut().zip(of_runs).take(runs) {
                    if tile == 0 {
                        panel.grids.ask_for(panel.group + group, groups_ahead);
                    }
                    *scalings = panel.scalings(panel.group + group);
                }
            }
        }
    }
    // (The number of the last run is that of the last block, or odd.)
    let (run, sums) = (if blocks.runs == 1 { 1 - turn } else { 1 }, &mut scratch.sums[1 - turn]);
    tiles.put::<0>(run, &mut sums[blocks.runs - 1]);
    tiles.put::<1>(run, &mut sums[blocks.runs - 1]);
    for four in 0..COUNT / FOUR {
        behind.add(four, sums, totals);
    }
}
