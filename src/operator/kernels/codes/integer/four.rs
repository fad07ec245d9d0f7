//! Products of codes with up to four inputs, by matrix instructions of bytes: two panels by turns.
//!
//! All digits of four inputs are the rows of one tile, which the codes of both panels meet while it is at hand. To write sums
//! out takes 17 cycles, however few rows they have, and little goes beside it; so all else should be little: totals stay in
//! vectors, and codes of eight bits are read where they lie. As in [`few`](super::few), others are unpacked two steps ahead, and
//! sums are scaled some time after they were written: when the next run of the panel has begun.

use std::arch::x86_64::*;

use pulp::bytemuck::allocation::zeroed_box;
use pulp::bytemuck::{Zeroable, cast, cast_slice_mut, try_cast_slice};

use super::inputs::Inputs;
use super::matrix::Shape;
use super::panel::{Pair, Signed};
use super::runs::{Runs, of_run};
use super::tiles::tiles;
use super::vectors::{Panel, ahead};
use super::way::Layout;
use super::{BANDS, EACH, LANES, LIMBS, LINE, Lanes, TOGETHER};
use crate::simd::prefetch;

/// Inputs for which this is the faster way, at least.
pub(super) const FEWEST: usize = 3;
/// Digits of all inputs.
const ROWS: usize = LIMBS * TOGETHER;
/// Panels by turns.
pub(super) const PANELS: usize = 2;
/// Steps from codes that meet inputs to those that are unpacked, and steps that there is memory for.
const LATER: usize = 2;
const RING: usize = 2 * LATER;
/// Bytes between what is unpacked and what is asked for.
const AHEAD: usize = 2048;

/// Sums of a run: of each band, an input's digits with its rows.
type Sums = [[Lanes<i32>; ROWS]; BANDS];
/// Totals of a panel.
type Totals = [[__m512; BANDS]; TOGETHER];

/// How so few inputs meet codes of this layout; `None` if runs do not end with steps of full tiles, or of half of one.
pub(super) fn shape(layout: &Layout) -> Option<Shape> {
    let lanes = layout.run / EACH;
    (lanes == LANES / 2 || lanes.is_multiple_of(LANES)).then(|| Shape::of(TOGETHER, layout))
}

/// Memory for the codes of some steps, and the sums of each turn.
#[repr(C, align(64))]
pub(super) struct Scratch {
    codes: [[Pair; LANES]; RING],
    sums: [Sums; PANELS],
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

/// Tile registers: sums of two bands of each turn, and a step's codes of two bands and inputs.
pub(super) struct Tiles {
    lanes: usize,
    runs: Runs<ROWS>,
}

impl Tiles {
    /// # Panics
    /// Without the instructions, and for a shape of other than four inputs.
    pub(super) fn new(shape: Shape) -> Self {
        assert!((shape.tiles, shape.rows) == (1, ROWS) && shape.lanes <= LANES, "a tile of four inputs");
        Tiles { lanes: shape.lanes, runs: Runs::new(shape.lanes) }
    }

    /// Adds the products of a step's codes with inputs. (Codes of eight bits have no signs.)
    ///
    /// # Panics
    /// If there are fewer than fill the registers.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn add_up<const TURN: usize, const KIND: u8>(&self, codes: &[Pair], inputs: &[[i32; ROWS]]) {
        assert!(self.lanes <= codes.len() && self.lanes <= inputs.len(), "codes and inputs of a step");
        macro_rules! with {
            ($product:literal, $first:literal, $second:literal) => {
                tiles!(
                    "tileloadd tmm6, [{inputs} + {row}]",
                    "tileloadd tmm4, [{codes} + {line} * 2]",
                    concat!($product, " ", $first, ", tmm6, tmm4"),
                    "tileloadd tmm5, [{codes} + {line} * 2 + 64]",
                    concat!($product, " ", $second, ", tmm6, tmm5");
                    codes = in(reg) codes.as_ptr(),
                    line = in(reg) size_of::<Lanes<i32>>(),
                    inputs = in(reg) inputs.as_ptr(),
                    row = in(reg) self.lanes * size_of::<i32>(),
                )
            };
        }
        macro_rules! add_up {
            ($first:literal, $second:literal) => {
                if KIND == 8 { with!("tdpbsud", $first, $second) } else { with!("tdpbssd", $first, $second) }
            };
        }
        // SAFETY: the registers are configured, as [`Runs`] says. Of the codes as many pairs of vectors are read as there are lanes, the
        // first of each and then the second, and of the inputs as many rows of lanes as there are digits: there are these by the
        // assertion. No other memory is touched, nor the stack.
        unsafe { of_run!(TURN, add_up) }
    }
}

/// Adds the products of one panel, or of [`PANELS`], with all inputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
pub(super) fn multiply<const KIND: u8, const PARTS: usize>(
    panels: &[Panel<'_>],
    x: &Inputs,
    tiles: &Tiles,
    scratch: &mut Scratch,
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    match tiles.lanes {
        LANES => Turns::<KIND, PARTS, LANES>::new(panels, x, tiles).multiply(scratch, totals),
        _ => Turns::<KIND, PARTS, { LANES / 2 }>::new(panels, x, tiles).multiply(scratch, totals),
    }
}

/// Where the codes of a step are: of a panel, so many bytes on by runs and steps, or in memory for unpacked ones.
#[derive(Clone, Copy, Default)]
struct Place {
    turn: usize,
    run: usize,
    step: usize,
    slot: usize,
}

/// Two panels, of which the second may be missing: at turn 2r or 2r + 1 it is run r of one or the other.
struct Turns<'a, const KIND: u8, const PARTS: usize, const WIDE: usize> {
    panels: &'a [Panel<'a>],
    x: &'a Inputs,
    tiles: &'a Tiles,
    signed: Signed,
    /// Steps of a run, and bytes of a run and of a step.
    steps: usize,
    run: usize,
    step: usize,
    /// Groups to those whose scales are asked for: twice as far ahead as codes.
    groups_ahead: usize,
}

impl<'a, const KIND: u8, const PARTS: usize, const WIDE: usize> Turns<'a, KIND, PARTS, WIDE> {
    #[target_feature(enable = "avx512f")]
    fn new(panels: &'a [Panel<'a>], x: &'a Inputs, tiles: &'a Tiles) -> Self {
        let signed = Signed::new(panels.first().map_or(8, |panel| panel.bits));
        let bytes = |lanes: usize| lanes / PARTS * signed.chunk::<KIND>();
        let lanes = x.layout.run / EACH;
        let groups_ahead = x.layout.group_of(2 * AHEAD / bytes(lanes)).max(2);
        Turns {
            panels,
            x,
            tiles,
            signed,
            steps: lanes.div_ceil(WIDE),
            run: bytes(lanes),
            step: bytes(WIDE),
            groups_ahead,
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    fn multiply(&self, scratch: &mut Scratch, totals: &mut [[Lanes<f32>; BANDS]]) {
        let (now, mut coming) = (Place::default(), Place::default());
        for to in &mut scratch.codes[..LATER] {
            let codes = self.codes(coming);
            self.unpack::<0>(codes, to);
            self.unpack::<1>(codes, to);
            coming = self.after(coming);
        }
        let mut places = [now, coming];
        let runs = self.x.layout.runs();
        let (mut first, mut second) =
            ([[_mm512_setzero_ps(); BANDS]; TOGETHER], [[_mm512_setzero_ps(); BANDS]; TOGETHER]);
        for run in 0..runs {
            self.turn::<0>(run, &mut places, scratch, &mut first);
            self.turn::<1>(run, &mut places, scratch, &mut second);
        }
        self.put::<1, 0>(scratch);
        self.put::<1, 1>(scratch);
        self.add::<0, true>(runs - 1, &scratch.sums[0], &mut first);
        self.add::<1, true>(runs - 1, &scratch.sums[1], &mut second);
        for (to, of) in totals.chunks_mut(TOGETHER).zip([first, second]) {
            for (to, of) in to.iter_mut().zip(of) {
                *to = [Lanes(cast(of[0])), Lanes(cast(of[1]))];
            }
        }
    }

    /// The codes of a step, none behind the last, and how far those are that should be asked for.
    #[inline(always)]
    fn codes(&self, place: Place) -> (&'a [u8], usize) {
        let packed = self.panels.get(place.turn).map_or(&[][..], |panel| panel.packed);
        let rest = packed.get(place.run + place.step..).unwrap_or_default();
        (&rest[..self.step.min(rest.len())], ahead(AHEAD, rest, self.panels))
    }

    /// Where the next step is.
    #[inline(always)]
    fn after(&self, Place { turn, run, step, slot }: Place) -> Place {
        let slot = (slot + 1) % RING;
        match (step + self.step < self.run, turn) {
            (true, _) => Place { turn, run, step: step + self.step, slot },
            (_, 0) => Place { turn: 1, run, step: 0, slot },
            _ => Place { turn: 0, run: run + self.run, step: 0, slot },
        }
    }

    /// Unpacks half of the codes of a step.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn unpack<const HALF: usize>(&self, (codes, ahead): (&[u8], usize), to: &mut [Pair; LANES]) {
        // (How many there are is known to the compiler, but for those of the last step.)
        let half = if KIND == 0 { self.step / 2 } else { WIDE / PARTS / 2 * BANDS * LINE };
        let of_half = match codes.get(HALF * half..(HALF + 1) * half) {
            Some(codes) => codes,
            None => codes.get(HALF * half..).unwrap_or_default(),
        };
        let to = &mut to[HALF * WIDE / 2..(HALF + 1) * WIDE / 2];
        match KIND {
            8 => {
                of_half.chunks(LINE).for_each(|line| prefetch(&line[0], ahead));
                if in_place(codes, WIDE).is_none() {
                    cast_slice_mut(to)[..of_half.len()].copy_from_slice(of_half);
                }
            }
            _ => self.signed.unpack::<KIND, PARTS>(of_half, ahead, to),
        }
    }

    /// Adds the sums of a run of a panel to its totals. (Compilers make it part of what calls it, as each has but one caller.)
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add<const TURN: usize, const LAST: bool>(&self, run: usize, sums: &Sums, totals: &mut Totals) {
        let Some(panel) = self.panels.get(TURN) else { return };
        let Some(starts) = self.x.begin::<LIMBS, TOGETHER>(panel.starts, run, 0) else { return };
        let group = panel.group + self.x.layout.group_of(run);
        panel.grids.ask_for(group, self.groups_ahead);
        let scalings = panel.scalings(group);
        let (units, whole) = (&self.x.units::<TOGETHER>(run..run + 1)[0], &self.x.sums::<TOGETHER>(run..run + 1)[0]);
        for band in 0..BANDS {
            let mut scaling = scalings[band];
            scaling.scales = _mm512_mul_ps(scaling.scales, _mm512_set1_ps(1.0 / Signed::times::<KIND>()));
            for v in 0..TOGETHER {
                let of = [&sums[band][v], &sums[band][TOGETHER + v], &sums[band][2 * TOGETHER + v]];
                let of = begun::<KIND>(of, starts.map(|of| of[v]));
                totals[v][band] = scaling.add(totals[v][band], of, units[v], whole[v]);
            }
        }
    }

    /// Adds up the products of a run of a panel, writes out the sums of the turn before, and adds those of the run before to
    /// totals.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    fn turn<const TURN: usize>(
        &self,
        run: usize,
        [now, coming]: &mut [Place; 2],
        scratch: &mut Scratch,
        totals: &mut Totals,
    ) {
        let inputs = &self.x.digits().as_chunks::<ROWS>().0[run * self.steps * WIDE..];
        self.tiles.runs.clear(TURN);
        for (step, inputs) in inputs.chunks_exact(WIDE).enumerate().take(self.steps) {
            if TURN < self.panels.len() {
                let in_place = if KIND == 8 { in_place(self.codes(*now).0, WIDE) } else { None };
                let codes = in_place.unwrap_or(&scratch.codes[now.slot]);
                self.tiles.add_up::<TURN, KIND>(codes, inputs);
            }
            let (codes, slot) = (self.codes(*coming), coming.slot);
            if step == 0 {
                self.put_other::<TURN, 0>(scratch);
            }
            self.unpack::<0>(codes, &mut scratch.codes[slot]);
            if step == 0 {
                self.put_other::<TURN, 1>(scratch);
            }
            self.unpack::<1>(codes, &mut scratch.codes[slot]);
            (*now, *coming) = (self.after(*now), self.after(*coming));
        }
        if let Some(before) = run.checked_sub(1) {
            self.add::<TURN, false>(before, &scratch.sums[TURN], totals);
        }
    }

    /// Writes out a band's sums of the turn before.
    #[inline(always)]
    fn put_other<const TURN: usize, const BAND: usize>(&self, scratch: &mut Scratch) {
        if TURN == 0 { self.put::<1, BAND>(scratch) } else { self.put::<0, BAND>(scratch) }
    }

    /// Writes out a band's sums of a panel, if there is one.
    #[inline(always)]
    fn put<const TURN: usize, const BAND: usize>(&self, scratch: &mut Scratch) {
        if TURN < self.panels.len() {
            self.tiles.runs.put::<BAND, _, ROWS>(TURN, &mut scratch.sums[TURN]);
        }
    }
}

/// So many lanes of codes of eight bits where they lie, if all are there.
#[inline(always)]
fn in_place(codes: &[u8], lanes: usize) -> Option<&[Pair]> {
    codes.get(..lanes * size_of::<Pair>()).and_then(|codes| try_cast_slice(codes).ok())
}

/// The sums of the digits of an input, with what those of codes of eight bits begin with, which have no signs.
#[inline]
#[target_feature(enable = "avx512f")]
fn begun<const KIND: u8>(sums: [&Lanes<i32>; LIMBS], starts: [i32; LIMBS]) -> [__m512i; LIMBS] {
    let mut begun = [_mm512_setzero_si512(); LIMBS];
    for limb in 0..LIMBS {
        let sum = cast(sums[limb].0);
        begun[limb] = if KIND == 8 { _mm512_add_epi32(sum, _mm512_set1_epi32(starts[limb])) } else { sum };
    }
    begun
}
