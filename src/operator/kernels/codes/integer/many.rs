//! Products of codes with many inputs, by matrix instructions of bytes: some columns of some panels at a time.
//!
//! Of the columns of a block the nearest cache holds the digits of a tile of inputs, which come from the next cache once for
//! some panels, and codes as bytes: of one panel while those of the next are unpacked, or of all that more than one tile
//! meets. While matrix instructions add up the products of a band of rows of a run, vectors make numbers of the sums of the
//! run before and unpack codes by half steps: each by turns for a few dozen instructions, as a processor looks no farther ahead
//! to mix them. So what is done beside a product should be little: numbers of inputs and digits are known when this is compiled.

use std::arch::x86_64::*;
use std::ops::Range;

use pulp::bytemuck::cast;

use super::matrix::{Shape, Sums, Tiles};
use super::panel::{Pair, Signed};
use super::vectors::{Panel, Scaling};
use super::{ActivationBits, BANDS, EACH, Inputs, LANES, LIMBS, Lanes};

/// Columns of a block, unless a run has more.
const COLUMNS: usize = 128;

/// Columns of all blocks that inputs meet before the next: their codes are 16 KiB as bytes.
const TOGETHER: usize = 512;

/// Lanes of 4 KiB. A load waits for a store before it whose address differs by whole pages: codes that are unpacked should be
/// so far from those that have just been loaded, not from those that come next.
const PAGE: usize = 4096 / size_of::<Pair>();

/// Panels that meet inputs, with memory for their codes, and the totals: vector by vector of each panel.
pub(super) struct Task<'a, 'p> {
    pub panels: &'a [Panel<'p>],
    pub x: &'a Inputs,
    pub tiles: &'a Tiles,
    pub unpacked: &'a mut [Pair],
    pub totals: &'a mut [[Lanes<f32>; BANDS]],
}

/// How rows of a layout are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    /// Runs of a block.
    runs: usize,
    /// Panels that inputs meet before the next block.
    pub panels: usize,
    /// Lanes from a run to the next.
    stride: usize,
    /// Lanes of a block of a panel, with those that its last step goes beyond it.
    lanes: usize,
    /// Blocks that there is memory for: all that inputs meet, if there are more tiles than one, and what comes next.
    places: usize,
}

impl Blocks {
    pub(super) fn new(x: &Inputs, shape: Shape) -> Self {
        let (run, runs) = (x.layout.run, (COLUMNS / x.layout.run).max(1));
        let stride = run / EACH;
        // The last step may go beyond its run.
        let lanes = (runs - 1) * stride + shape.steps(stride) * shape.lanes;
        let panels = (TOGETHER / (runs * run)).max(1);
        let places = if x.tiles().len() > 1 { panels + 1 } else { 2 };
        Blocks { runs, panels, stride, lanes: lanes.next_multiple_of(PAGE), places }
    }

    /// Memory for codes.
    pub(super) fn scratch(&self) -> Vec<Pair> {
        vec![[Lanes::default(); BANDS]; self.places * self.lanes]
    }

    /// A place for the codes of a block of a panel.
    #[inline(always)]
    fn place(&self, number: usize) -> Range<usize> {
        number * self.lanes..(number + 1) * self.lanes
    }

    /// The place after one.
    #[inline(always)]
    fn after(&self, number: usize) -> usize {
        if number + 1 < self.places { number + 1 } else { 0 }
    }

    /// Adds the products of as many panels as are together, or fewer, with all inputs, sixteen at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    pub(super) fn multiply<'a, const KIND: u8, const PARTS: usize>(&self, task: Task<'_, 'a>) {
        let Task { panels, x, tiles, unpacked, totals } = task;
        let Some(one) = panels.first() else { return };
        let (layout, signed) = (&x.layout, Signed::new(one.bits));
        let shape = Shape::of(LANES, ActivationBits::TwentyFour, layout);
        let registers = tiles.of(shape);
        // Lanes, steps and bytes of a run, and integers of its inputs.
        let (lanes, of_run, padded) = (layout.run / EACH, shape.run(layout), x.padded());
        let (steps, bytes) = (shape.steps(lanes), (lanes / PARTS * signed.chunk::<KIND>()).max(1));
        let groups = layout.group_of(layout.runs().saturating_sub(1)) + 1;
        // The codes of a panel's block, none behind the last, and what is ahead of them: the next block, or that of the panels
        // that come next, which follow in memory.
        let whole = self.runs * bytes;
        let codes_of = |panel: &Panel<'a>, block: usize| {
            let rest = panel.packed.get(block * whole..).unwrap_or_default();
            let behind = rest.len() + (panels.len() - 1) * panel.packed.len();
            (&rest[..whole.min(rest.len())], if rest.len() > whole { whole } else { behind })
        };
        let (codes, ahead) = codes_of(one, 0);
        for (codes, to) in codes.chunks(bytes).zip(unpacked[self.place(0)].chunks_mut(self.stride)) {
            signed.unpack::<KIND, PARTS>(codes, ahead, to);
        }
        let mut start = 0;
        let mut sums = Sums::default();
        // What has its sums, but not its totals: nothing yet.
        let nothing = Scaling { scales: _mm512_setzero_ps(), shift: _mm512_setzero_ps() };
        let (mut scaling, mut beside, mut totals_of) = ([nothing; BANDS], (&[0.0; LANES], &[0.0; LANES]), 0);
        for (block, first) in (0..layout.runs()).step_by(self.runs).enumerate() {
            let runs = self.runs.min(layout.runs() - first);
            let first_group = layout.group_of(first);
            // Groups from those of the block to those of the next, of the same panel or of those that come next.
            let groups_ahead = match first + self.runs < layout.runs() {
                true => layout.group_of(first + self.runs) - first_group,
                false => panels.len() * groups - first_group,
            };
            let mut number = start;
            for (tile, (begin, _)) in x.tiles().enumerate() {
                let from = tile * layout.runs() + first;
                let (units, whole) = (x.units::<LANES>(from..from + runs), x.sums::<LANES>(from..from + runs));
                number = start;
                for (at, panel) in panels.iter().enumerate() {
                    let places = [self.place(number), self.place(self.after(number))];
                    let Ok([codes, spare]) = unpacked.get_disjoint_mut(places) else { return };
                    number = self.after(number);
                    // Other tiles of inputs meet what is unpacked beside the first one.
                    let (coming, ahead) = match panels.get(at + 1) {
                        _ if tile > 0 => (&[][..], 0),
                        Some(next) => codes_of(next, block),
                        None => codes_of(one, block + 1),
                    };
                    let mut coming = coming.chunks(bytes);
                    let inputs = x.digits()[from * of_run..].chunks(of_run);
                    let of_runs = spare.chunks_mut(self.stride).zip(inputs).zip(units.iter().zip(whole));
                    for (run, ((to, inputs), all)) in of_runs.enumerate() {
                        let last = first + run + 1 == layout.runs();
                        let steps = if last { shape.steps(layout.lanes(first + run)) } else { steps };
                        let codes = &codes[run * self.stride..];
                        let mut rest = Rest { codes: coming.next().unwrap_or_default(), ahead, to };
                        registers.clear::<0>();
                        for (codes, inputs) in codes.chunks(shape.lanes).zip(inputs.chunks(shape.step())).take(steps) {
                            registers.add_up::<0>(codes, inputs);
                            rest.unpack::<KIND, PARTS, 0>(&signed, shape);
                        }
                        registers.put::<1>(&mut sums);
                        add::<0>(&scaling[0], &sums, beside, totals, totals_of);
                        registers.clear::<1>();
                        for (codes, inputs) in codes.chunks(shape.lanes).zip(inputs.chunks(shape.step())).take(steps) {
                            registers.add_up::<1>(codes, inputs);
                            rest.unpack::<KIND, PARTS, 1>(&signed, shape);
                        }
                        registers.put::<0>(&mut sums);
                        let group = panel.group + if run == 0 { first_group } else { layout.group_of(first + run) };
                        if tile == 0 {
                            panel.grids.ask_for(group, groups_ahead);
                        }
                        add::<1>(&scaling[1], &sums, beside, totals, totals_of);
                        scaling = scalings::<KIND>(panel, group);
                        (beside, totals_of) = (all, at * padded + begin);
                    }
                }
            }
            start = number;
        }
        registers.put::<1>(&mut sums);
        add::<0>(&scaling[0], &sums, beside, totals, totals_of);
        add::<1>(&scaling[1], &sums, beside, totals, totals_of);
    }
}

/// What is to be unpacked of a run, and how far ahead is what is asked for.
struct Rest<'a> {
    codes: &'a [u8],
    ahead: usize,
    to: &'a mut [Pair],
}

impl Rest<'_> {
    /// Unpacks half of a step. (For each band: compilers make it part of what calls it, as each has but one caller.)
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn unpack<const KIND: u8, const PARTS: usize, const BAND: usize>(&mut self, signed: &Signed, shape: Shape) {
        if self.codes.is_empty() {
            return;
        }
        let lanes = (shape.lanes / 2).next_multiple_of(PARTS).min(self.to.len());
        let bytes = (lanes / PARTS * signed.chunk::<KIND>()).min(self.codes.len());
        let (codes, to) = (self.codes, std::mem::take(&mut self.to));
        let (now, later) = to.split_at_mut(lanes);
        signed.unpack::<KIND, PARTS>(&codes[..bytes], self.ahead, now);
        (self.codes, self.to) = (&codes[bytes..], later);
    }
}

/// What makes numbers of a group's sums, of each band. (Each kernel has its own, which compilers make part of the loop then.)
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
fn scalings<const KIND: u8>(panel: &Panel<'_>, group: usize) -> [Scaling; BANDS] {
    let mut scalings = panel.scalings(group);
    for of in &mut scalings {
        of.scales = _mm512_mul_ps(of.scales, _mm512_set1_ps(1.0 / Signed::times::<KIND>()));
    }
    scalings
}

/// Adds the sums of the digits of some inputs of some units and sums to totals from one on, of a band.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
fn add<const BAND: usize>(
    scaling: &Scaling,
    sums: &Sums,
    (units, whole): (&[f32; LANES], &[f32; LANES]),
    totals: &mut [[Lanes<f32>; BANDS]],
    from: usize,
) {
    let Some(totals) = totals[from..].first_chunk_mut::<LANES>() else { return };
    let of = sums.0[BAND].as_chunks::<LANES>().0;
    let (high, middle, low) = (&of[0], &of[1], &of[LIMBS - 1]);
    let (high, middle, low) = (high.as_chunks::<4>().0, middle.as_chunks::<4>().0, low.as_chunks::<4>().0);
    let (totals, units, whole) = (totals.as_chunks_mut::<4>().0, units.as_chunks::<4>().0, whole.as_chunks::<4>().0);
    for four in 0..LANES / 4 {
        let (high, middle, low) = (&high[four], &middle[four], &low[four]);
        let (totals, units, whole) = (&mut totals[four], &units[four], &whole[four]);
        for v in 0..4 {
            let of = [cast(high[v].0), cast(middle[v].0), cast(low[v].0)];
            let total = &mut totals[v][BAND];
            *total = Lanes(cast(scaling.add(cast(total.0), of, units[v], whole[v])));
        }
    }
}
