//! Products of codes of up to seven bits with many inputs, by matrix instructions with bf16: some steps at a time.
//!
//! What a processor does beside the products of a step, as [`bfloat`](super::bfloat) has them, is to unpack codes of two
//! steps later and to scale sums of the block before. All go by turns of a few dozen instructions, as it looks no farther ahead
//! to mix them, and what was written is read only some time later: a tile that is loaded waits for lines that are still on their
//! way to the cache. Long groups meet more than a tile of inputs as bytes ([`many`](super::many)), in half as many products.

use std::arch::x86_64::*;

use pulp::bytemuck::allocation::zeroed_box;
use pulp::bytemuck::{Zeroable, cast};

use super::bfloat::{Codes, Cut, Sums, Table, Tiles, WIDEST};
use super::inputs::Inputs;
use super::vectors::{Panel, Scaling};
use super::way::Layout;
use super::{BANDS, LANES, Lanes, PANEL, STEP};

/// Columns of the longest runs.
pub(super) const LONGEST: usize = 4 * STEP;
/// Steps from codes that meet inputs to those that are unpacked, and steps that there is memory for.
const LATER: usize = 2;
const RING: usize = 2 * LATER;
/// Runs of a block, at most.
const RUNS: usize = 2;
/// Inputs that are scaled together.
const FOUR: usize = 4;

/// Whether this is the faster way for so many inputs and codes that have such numbers, in runs of so many columns, which may be
/// parts of longer ones: short ones that are not, and long ones that fill their steps, with more than half a tile of inputs.
pub(super) fn takes(run: usize, part: bool, inputs: usize) -> bool {
    let long = run > LONGEST - STEP && inputs > LANES / 2 && inputs <= LANES;
    if run > 2 * STEP { long } else { !part }
}

/// Memory for the codes of some steps and the sums of two blocks.
#[repr(C, align(64))]
pub(super) struct Scratch {
    codes: [Codes; RING],
    /// Of each run.
    sums: [[Sums; RUNS]; 2],
}

// SAFETY: it has numbers of 32 bits only, all bytes of which may be zero.
#[allow(unsafe_code)]
unsafe impl Zeroable for Scratch {}

impl Scratch {
    /// (It is too large to be made elsewhere and moved for each product.)
    pub(super) fn new() -> Box<Self> {
        zeroed_box()
    }
}

/// How rows are cut into blocks.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    /// Runs of a block: two of one step each or of two, or one of four.
    runs: usize,
    steps: usize,
    /// Blocks of a row.
    count: usize,
}

impl Blocks {
    pub(super) fn new(layout: &Layout) -> Self {
        let (runs, steps) = match layout.run {
            ..=STEP => (2, 2),
            run if run <= 2 * STEP => (2, 4),
            _ => (1, 4),
        };
        Blocks { runs, steps, count: layout.runs().div_ceil(runs) }
    }

    /// Runs of a row, with one that fills the last block.
    pub(super) fn all(&self) -> usize {
        self.runs * self.count
    }

    /// Steps of a run.
    pub(super) fn steps(&self) -> usize {
        self.steps / self.runs
    }

    /// Panels that so many tiles of inputs meet before the next block: more of them if a block has more of the inputs, or if the
    /// tiles come from farther away.
    pub(super) fn panels(&self, tiles: usize) -> usize {
        2 * self.steps * tiles.clamp(1, 4)
    }
}

/// A block that has its sums, but not its totals.
struct Behind<'a, const COUNT: usize> {
    scalings: [[Scaling; BANDS]; RUNS],
    /// What inputs add up to, of each run.
    whole: &'a [[f32; COUNT]],
    /// Where their totals begin.
    totals: usize,
}

impl<const COUNT: usize> Behind<'_, COUNT> {
    /// Adds the sums of some inputs to their totals.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(&self, four: usize, sums: &[Sums; RUNS], totals: &mut [[Lanes<f32>; BANDS]]) {
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
            let whole = &whole.as_chunks::<FOUR>().0[four];
            for v in 0..FOUR {
                let whole = _mm512_set1_ps(whole[v]);
                for band in 0..BANDS {
                    totals[v][band] = _mm512_fmadd_ps(scalings[band].shift, whole, totals[v][band]);
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

/// What is beside the products of a block of some steps.
struct Beside<'a, const COUNT: usize, const STEPS: usize> {
    table: &'a Table,
    tiles: &'a Tiles<COUNT>,
    /// Codes that are unpacked in each step, none behind the last, and bytes to what is asked for.
    later: [&'a [u8]; STEPS],
    ahead: usize,
    behind: &'a Behind<'a, COUNT>,
    totals: &'a mut [[Lanes<f32>; BANDS]],
}

impl<const COUNT: usize, const STEPS: usize> Beside<'_, COUNT, STEPS> {
    /// Multiplies a block of one run or of two, after an even number of blocks or an odd one.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
    fn multiply<const KIND: u8, const OF: usize, const TURN: usize>(
        &mut self,
        scratch: &mut Scratch,
        x: &[Cut<COUNT>; STEPS],
    ) {
        self.step::<KIND, OF, TURN, 0>(scratch, x);
        self.step::<KIND, OF, TURN, 1>(scratch, x);
        if STEPS > 2 {
            self.step::<KIND, OF, TURN, 2>(scratch, x);
            self.step::<KIND, OF, TURN, 3>(scratch, x);
        }
    }

    /// Adds the products of a step. (Compilers make it part of what calls it, as each has but one caller.)
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
    fn step<const KIND: u8, const OF: usize, const TURN: usize, const AT: usize>(
        &mut self,
        scratch: &mut Scratch,
        x: &[Cut<COUNT>; STEPS],
    ) {
        let (table, tiles, later, ahead, x) = (self.table, self.tiles, self.later[AT], self.ahead, &x[AT]);
        let place = (TURN * STEPS + AT) % RING;
        let [a, b, c, d] = &mut scratch.codes;
        let (codes, to) = match place {
            0 => (a, c),
            1 => (b, d),
            2 => (c, a),
            _ => (d, b),
        };
        // Sums are put where they belong when the next run has begun.
        let begins = AT.is_multiple_of(STEPS / OF);
        let run = if OF == 1 { TURN } else { AT / (STEPS / OF) };
        let [even, odd] = &mut scratch.sums;
        let (now, before) = if TURN == 0 { (even, odd) } else { (odd, even) };
        let last = if AT == 0 { &mut before[OF - 1] } else { &mut now[0] };
        if begins {
            tiles.clear(run);
        }
        tiles.first(run, codes, x);
        if begins {
            tiles.put::<0>(run + 1, last);
        }
        table.unpack::<KIND, 0>(later, ahead, to);
        tiles.next(run, &x[1]);
        if begins {
            tiles.put::<1>(run + 1, last);
        }
        let fours = |at: usize| at * (COUNT / FOUR) / STEPS;
        let mut fours = fours(AT)..fours(AT + 1);
        if let Some(four) = fours.next() {
            self.behind.add(four, before, self.totals);
        }
        table.unpack::<KIND, 1>(later, ahead, to);
        tiles.next(run, &x[2]);
        table.unpack::<KIND, 2>(later, ahead, to);
        for four in fours {
            self.behind.add(four, before, self.totals);
        }
        table.unpack::<KIND, 3>(later, ahead, to);
    }
}

/// Adds the products of as many panels as are together, or fewer, with all inputs, COUNT at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
pub(super) fn multiply<const KIND: u8, const COUNT: usize>(
    panels: &[Panel<'_>],
    x: &Inputs,
    tiles: &Tiles<COUNT>,
    scratch: &mut Scratch,
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    // (Codes of eight bits have no such numbers, so that inputs are never laid out so for them: no code is made for those.)
    if KIND > WIDEST {
        return;
    }
    let blocks = Blocks::new(&x.layout);
    match (blocks.steps, blocks.runs) {
        (2, 2) => blocks.multiply::<KIND, COUNT, 2, 2>(panels, x, tiles, scratch, totals),
        (4, 2) => blocks.multiply::<KIND, COUNT, 4, 2>(panels, x, tiles, scratch, totals),
        _ => blocks.multiply::<KIND, COUNT, 4, 1>(panels, x, tiles, scratch, totals),
    }
}

impl Blocks {
    /// Adds them, where a block has so many steps and runs.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi")]
    fn multiply<const KIND: u8, const COUNT: usize, const STEPS: usize, const OF: usize>(
        &self,
        panels: &[Panel<'_>],
        x: &Inputs,
        tiles: &Tiles<COUNT>,
        scratch: &mut Scratch,
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        let Some(one) = panels.first() else { return };
        let (layout, table) = (&x.layout, Table::new(one.bits));
        let (padded, of_tiles, more) = (x.padded(), x.tiles().len(), _mm512_set1_ps(table.more()));
        let groups = layout.group_of(layout.runs().saturating_sub(1)) + 1;
        let bytes = |columns: usize| columns * PANEL * usize::from(one.bits) / 8;
        let (block, of_run, step) = (bytes(OF * layout.run), bytes(layout.run), bytes(layout.run.min(STEP)));
        // Where the codes of a step begin, in a block of some number.
        let begin = |number: usize, at: usize| number * block + at / (STEPS / OF) * of_run + at % (STEPS / OF) * step;
        for (at, to) in scratch.codes.iter_mut().enumerate().take(LATER) {
            table.all::<KIND>(one.packed.get(begin(0, at)..).unwrap_or_default(), to);
        }
        let nothing = Scaling { scales: _mm512_setzero_ps(), shift: _mm512_setzero_ps() };
        let mut behind = Behind { scalings: [[nothing; BANDS]; RUNS], whole: &[], totals: 0 };
        let mut turn = 0;
        for number in 0..self.count {
            let first = number * OF;
            // (A run that fills the last block has nothing to be scaled.)
            let runs = OF.min(layout.runs() - first);
            let of_runs: [usize; RUNS] = std::array::from_fn(|run| layout.group_of(first + run));
            // What comes after the block: the next one, or that of the panels that come next, which follow in memory.
            let (ahead, groups_ahead) = match number + 1 < self.count {
                true => (block, layout.group_of(first + OF) - of_runs[0]),
                false => (panels.len() * one.packed.len() - number * block, panels.len() * groups - of_runs[0]),
            };
            for tile in 0..of_tiles {
                let from = tile * self.all() + first;
                let whole = x.sums::<COUNT>(from..from + runs);
                let x = &x.numbers::<COUNT>().as_chunks::<STEPS>().0[tile * self.count + number];
                for (at, panel) in panels.iter().enumerate() {
                    let (next, then) = match panels.get(at + 1) {
                        Some(next) => (next, number),
                        None => (one, if tile + 1 < of_tiles { number } else { number + 1 }),
                    };
                    let mut later = [&[][..]; STEPS];
                    for (at, later) in later.iter_mut().enumerate() {
                        let (of, from) = match at + LATER < STEPS {
                            true => (panel, begin(number, at + LATER)),
                            false => (next, begin(then, at + LATER - STEPS)),
                        };
                        *later = of.packed.get(from..).unwrap_or_default();
                    }
                    let mut beside = Beside { table: &table, tiles, later, ahead, behind: &behind, totals };
                    match turn {
                        0 => beside.multiply::<KIND, OF, 0>(scratch, x),
                        _ => beside.multiply::<KIND, OF, 1>(scratch, x),
                    }
                    turn = 1 - turn;
                    (behind.whole, behind.totals) = (whole, at * padded + tile * COUNT);
                    for (scalings, group) in behind.scalings.iter_mut().zip(of_runs).take(runs) {
                        if tile == 0 {
                            panel.grids.ask_for(panel.group + group, groups_ahead);
                        }
                        *scalings = panel.scalings(panel.group + group);
                        for of in scalings {
                            of.shift = _mm512_fnmadd_ps(of.scales, more, of.shift);
                        }
                    }
                }
            }
        }
        // (The registers of the last run are those of the last block, or the second ones.)
        let (run, sums) = (if OF == 1 { 1 - turn } else { 1 }, &mut scratch.sums[1 - turn]);
        tiles.put::<0>(run, &mut sums[OF - 1]);
        tiles.put::<1>(run, &mut sums[OF - 1]);
        for four in 0..COUNT / FOUR {
            behind.add(four, sums, totals);
        }
    }
}
