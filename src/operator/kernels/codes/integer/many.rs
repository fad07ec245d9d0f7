//! Products with many inputs, by matrix instructions: some columns of some panels at a time.
//!
//! Of the columns of a block the nearest cache holds the codes of all panels as bytes, and the limbs of a tile of inputs, which
//! comes from the next cache once for all of them.

use std::arch::x86_64::*;
use std::ops::Range;

use pulp::bytemuck::cast;

use super::inputs::{Layout, UNPACKED};
use super::matrix::{Registers, Sums};
use super::panel::{Lanes, Unpacking, unpack};
use super::{BANDS, EACH, Inputs, LANES, LIMBS, LINE, Panel};

/// Columns of a block, unless a run has more.
const COLUMNS: usize = 128;

/// How rows of a layout are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks {
    /// Runs of a block.
    runs: usize,
    /// Panels that inputs meet before the next block.
    pub panels: usize,
    /// Lanes of a block of a panel.
    lanes: usize,
}

impl Blocks {
    pub(super) fn new(layout: &Layout) -> Self {
        let runs = (COLUMNS / layout.run).max(1);
        Blocks { runs, panels: (UNPACKED / (runs * layout.run)).max(1), lanes: runs * layout.run / EACH }
    }

    /// Memory for the codes of a block of all panels.
    pub(super) fn scratch(&self) -> Vec<[Lanes<i32>; BANDS]> {
        // (A step of matrix instructions may go beyond the last run.)
        vec![[Lanes::default(); BANDS]; self.panels * self.lanes + LANES]
    }

    /// Adds the products of as many panels as are together, or fewer, with all inputs: vector by vector of each panel.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    pub(super) fn multiply<const KIND: u8, const PARTS: usize>(
        &self,
        panels: &[Panel<'_>],
        x: &Inputs,
        registers: &Registers,
        unpacked: &mut [[Lanes<i32>; BANDS]],
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        let Some(one) = panels.first() else { return };
        let (layout, unpacking, mut sums) = (&x.layout, Unpacking::new(one.bits), Sums::default());
        // Codes count from the middle, as matrix instructions take signed bytes.
        let less = 1 << (one.bits - 1);
        // While codes of a block are multiplied, as many bytes of the next one are asked for.
        let lines = (registers.lanes() / PARTS * unpacking.chunk()).div_ceil(LINE);
        let mut from = 0;
        for first in (0..layout.runs()).step_by(self.runs) {
            let numbers = first..layout.runs().min(first + self.runs);
            let lanes = numbers.clone().map(|run| layout.lanes(run)).sum::<usize>();
            let bytes = from..from + lanes / PARTS * unpacking.chunk();
            for (panel, to) in panels.iter().zip(unpacked.chunks_mut(self.lanes)) {
                unpack::<KIND, PARTS>(&unpacking, &panel.packed[bytes.clone()], less, to);
            }
            from = bytes.end;
            let last = numbers.end == layout.runs();
            for (tile, (begin, count)) in x.tiles().enumerate() {
                for (at, panel) in panels.iter().enumerate() {
                    // Panels follow each other in memory.
                    let next = if last { panels.len() * panel.packed.len() } else { from };
                    let ahead = (panel.packed.as_ptr().wrapping_add(next), if tile == 0 { lines } else { 0 });
                    let totals = &mut totals[at * x.padded() + begin..][..count];
                    let codes = &unpacked[at * self.lanes..];
                    panel.block(x, registers, (numbers.clone(), begin), codes, ahead, &mut sums, totals);
                }
            }
        }
    }
}

impl Panel<'_> {
    /// Adds the products of some runs with a tile of inputs.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    #[allow(clippy::too_many_arguments)]
    fn block(
        &self,
        x: &Inputs,
        registers: &Registers,
        (numbers, first): (Range<usize>, usize),
        codes: &[[Lanes<i32>; BANDS]],
        (mut ahead, lines): (*const u8, usize),
        sums: &mut Sums,
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        let (count, each) = (totals.len(), x.layout.run / EACH);
        for (at, number) in numbers.enumerate() {
            let limbs = x.limbs(number, first, count);
            registers.add_up(limbs, &codes[at * each..], (ahead, lines), sums);
            ahead = ahead.wrapping_add(limbs.len() / (LIMBS * count * registers.lanes()) * lines * LINE);
            let group = self.group + x.layout.group_of(number);
            let (Some(lower), Some(upper)) = (self.scaling(group, 0), self.scaling(group, 1)) else { return };
            let (units, whole) = x.beside(number, first, count);
            for (v, (total, (&unit, &whole))) in totals.iter_mut().zip(units.iter().zip(whole)).enumerate() {
                for (band, scaling) in [lower, upper].into_iter().enumerate() {
                    let limbs = [0, 1, 2].map(|limb| cast(sums.0[limb][band][v].0));
                    let sum: __m512 = scaling.add(cast(total[band].0), limbs, unit, whole);
                    total[band] = Lanes(cast(sum));
                }
            }
        }
    }
}
