//! Products with few inputs by vectors of sixteen rows: AVX-512 with VNNI and VBMI.

use std::arch::x86_64::*;

use half::slice::HalfFloatSliceExt;
use pulp::bytemuck::cast;

use super::super::packed::{Floats, Grids};
use super::digits::join;
use super::inputs::Inputs;
use super::memory::Reading;
use super::panel::Unpacking;
use super::{ActivationBits, BANDS, LANES, LINE, Lanes, TOGETHER};
use crate::simd::prefetch;

/// Some rows.
pub(super) struct Panel<'a> {
    pub bits: u8,
    pub packed: &'a [u8],
    pub grids: &'a Grids,
    /// Where its groups begin in them.
    pub group: usize,
    /// What sums of products begin with.
    pub starts: &'a [i32],
}

/// Panels that are multiplied together, at most.
const PANELS: usize = Reading::TWO_STREAMS.panels;
/// Columns of a run that is too short for tiles of inputs to take turns.
const SHORT: usize = 32;

/// Bytes from the first of what is left of some panel to what should be asked for, so far on in the same panel, or in those that come
/// next: they follow in memory behind all that are multiplied together.
#[inline(always)]
pub(super) fn ahead(far: usize, rest: &[u8], together: &[Panel<'_>]) -> usize {
    let others = || together.iter().skip(1).map(|panel| panel.packed.len()).sum::<usize>();
    if rest.len() > far { far } else { far + others() }
}

/// Adds the products of one panel, or of as many as are read together, with all inputs. (Codes are unpacked for each few: that costs
/// less than to read them as bytes.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
pub(super) fn multiply<const KIND: u8, const PARTS: usize>(
    (activations, reading): (ActivationBits, Reading),
    panels: &[Panel<'_>],
    x: &Inputs,
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    use ActivationBits::{Eight, Sixteen, TwentyFour};
    // (Those of short runs meet all columns one after the other: to begin and end a run anew for each takes longer than to read codes again.)
    for (first, count, tiles) in x.stretches(x.layout.run > SHORT) {
        macro_rules! tiles {
            ($panels:expr, $totals:expr, $bytes:literal, $vectors:literal) => {
                multiply_tiles::<KIND, PARTS, $bytes, $vectors, _>(reading, $panels, x, (first, tiles), $totals)
            };
        }
        // Two panels where the sums of both stay in registers, else one after the other.
        match (panels.first_chunk::<PANELS>(), activations, count) {
            (Some(two), Eight, 1) => tiles!(two, totals, 1, 1),
            (Some(two), Eight, 2) => tiles!(two, totals, 1, 2),
            (Some(two), Eight, 4) => tiles!(two, totals, 1, 4),
            (Some(two), Sixteen, 1) => tiles!(two, totals, 2, 1),
            (Some(two), Sixteen, 2) => tiles!(two, totals, 2, 2),
            (Some(two), TwentyFour, 1) => tiles!(two, totals, 3, 1),
            _ => {
                for (panel, totals) in panels.iter().zip(totals.chunks_mut(x.padded())) {
                    let one = std::array::from_ref(panel);
                    match (activations, count) {
                        (Eight, 1) => tiles!(one, totals, 1, 1),
                        (Eight, 2) => tiles!(one, totals, 1, 2),
                        (Eight, 4) => tiles!(one, totals, 1, 4),
                        (Eight, _) => tiles!(one, totals, 1, 8),
                        (Sixteen, 1) => tiles!(one, totals, 2, 1),
                        (Sixteen, 2) => tiles!(one, totals, 2, 2),
                        (Sixteen, _) => tiles!(one, totals, 2, 4),
                        (TwentyFour, 1) => tiles!(one, totals, 3, 1),
                        (TwentyFour, 2) => tiles!(one, totals, 3, 2),
                        (TwentyFour, _) => tiles!(one, totals, 3, 4),
                    }
                }
            }
        }
    }
}

/// Totals of the rows of P panels with V inputs.
type Totals<const V: usize, const P: usize> = [[[__m512; BANDS]; V]; P];

/// Adds the products of P panels with tiles of V inputs from one on: a run of columns meets one tile after the other, so that codes come
/// from memory beside all products, and not only beside those of the first tile. (No closures and no calls in the inner loop but of what
/// has the same instructions: vectors would have to be in memory.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
#[allow(unsafe_code, clippy::needless_range_loop)]
fn multiply_tiles<const KIND: u8, const PARTS: usize, const BYTES: usize, const V: usize, const P: usize>(
    reading: Reading,
    panels: &[Panel<'_>; P],
    x: &Inputs,
    (first, tiles): (usize, usize),
    to: &mut [[Lanes<f32>; BANDS]],
) {
    let unpacking = Unpacking::new(panels[0].bits);
    let (chunk, shifted) = (unpacking.chunk(), panels[0].grids.shifted());
    debug_assert!(tiles == 1 || V >= TOGETHER && P == 1, "several tiles have as many inputs as there may be");
    // (Known to the compiler where there is one: its totals stay in registers.)
    let tiles = if V < TOGETHER || P > 1 { 1 } else { tiles };
    let mut rest = [&[][..]; P];
    for p in 0..P {
        rest[p] = panels[p].packed;
    }
    let Some(mut totals) = read::<V, P>(to, first, x.padded()) else { return };
    for number in 0..x.layout.runs() {
        let bytes = x.layout.lanes(number) / PARTS * chunk;
        // (Beyond what the first of several tiles reads.)
        let far = if tiles == 1 { reading.ahead / P } else { bytes.max(reading.ahead_by_turns) };
        let ahead = ahead(far, rest[0], panels);
        // (Cut out first: to look chunks up in all the rest takes 0 to 10 % longer.)
        let mut codes = [&[][..]; P];
        for p in 0..P {
            (codes[p], rest[p]) = rest[p].split_at(bytes.min(rest[p].len()));
        }
        for tile in 0..tiles {
            let first = first + tile * V;
            if tiles > 1 {
                let Some(of_tile) = read::<V, P>(to, first, x.padded()) else { return };
                totals = of_tile;
            }
            // Each of the lines of a chunk is asked for by every other tile, if there are several.
            let lines = if tiles == 1 { [0, LINE] } else { [tile % BANDS * LINE; BANDS] };
            let (units, whole) = x.beside(number, first, V);
            let mut sums = [[[[_mm512_setzero_si512(); BANDS]; V]; BYTES]; P];
            for p in 0..P {
                let Some(starts) = x.begin::<BYTES, V>(panels[p].starts, number, first) else { return };
                for limb in 0..BYTES {
                    for v in 0..V {
                        sums[p][limb][v] = [_mm512_set1_epi32(starts[limb][v]); BANDS];
                    }
                }
            }
            let limbs = x.words::<1, BYTES, V>(number, first).as_chunks::<PARTS>().0;
            for (at, limbs) in limbs.iter().enumerate() {
                for p in 0..P {
                    let Some(codes) = codes[p].get(at * chunk..(at + 1) * chunk) else { return };
                    prefetch(&codes[0], ahead + lines[0]);
                    prefetch(&codes[0], ahead + lines[1]);
                    // SAFETY: a chunk is the bytes of two vectors. The machine has the instructions, or this were not called.
                    let loaded = unsafe { unpacking.load::<KIND>(codes.as_ptr()) };
                    for part in 0..PARTS {
                        for limb in 0..BYTES {
                            for v in 0..V {
                                let input = _mm512_set1_epi32(limbs[part][limb][0][v]);
                                for band in 0..BANDS {
                                    let lane = unpacking.lane::<KIND>(loaded[band], part);
                                    let sum = &mut sums[p][limb][v][band];
                                    *sum = _mm512_dpbusd_epi32(*sum, lane, input);
                                }
                            }
                        }
                    }
                }
            }
            // (Written out for each panel: as a loop it is too long to be unrolled for certain, and if it is not, sums are in memory.)
            macro_rules! scale {
                ($p:literal) => {
                    if $p < P {
                        let scalings = panels[$p].scalings(panels[$p].group + x.layout.group_of(number));
                        for (band, scaling) in scalings.iter().enumerate() {
                            for v in 0..V {
                                let mut of = [_mm512_setzero_si512(); BYTES];
                                for limb in 0..BYTES {
                                    of[limb] = sums[$p][limb][v][band];
                                }
                                totals[$p][v][band] = scaling.scaled(totals[$p][v][band], of, units[v]);
                                if shifted {
                                    totals[$p][v][band] = scaling.shifted(totals[$p][v][band], whole[v]);
                                }
                            }
                        }
                    }
                };
            }
            const { assert!(P <= PANELS && PANELS == 2) };
            scale!(0);
            scale!(1);
            if tiles > 1 {
                write(totals, to, first, x.padded());
            }
        }
    }
    if tiles == 1 {
        write(totals, to, first, x.padded());
    }
}

/// Totals of some inputs from one on, of as many as a panel has; `None` if there are fewer panels.
#[inline]
#[target_feature(enable = "avx512f")]
fn read<const V: usize, const P: usize>(
    from: &[[Lanes<f32>; BANDS]],
    first: usize,
    padded: usize,
) -> Option<Totals<V, P>> {
    let mut totals = [[[_mm512_setzero_ps(); BANDS]; V]; P];
    for (p, totals) in totals.iter_mut().enumerate() {
        let of = from.get(p * padded + first..)?.first_chunk::<V>()?;
        for (total, of) in totals.iter_mut().zip(of) {
            *total = [cast(of[0].0), cast(of[1].0)];
        }
    }
    Some(totals)
}

/// Writes them where they were.
#[inline]
#[target_feature(enable = "avx512f")]
fn write<const V: usize, const P: usize>(
    totals: Totals<V, P>,
    to: &mut [[Lanes<f32>; BANDS]],
    first: usize,
    padded: usize,
) {
    for (p, totals) in totals.iter().enumerate() {
        for (to, of) in to[p * padded + first..].iter_mut().zip(totals) {
            *to = [Lanes(cast(of[0])), Lanes(cast(of[1]))];
        }
    }
}

impl Panel<'_> {
    /// What makes numbers of a group's sums, of each band; zeros if there is no such group.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn scalings(&self, group: usize) -> [Scaling; BANDS] {
        let scales = numbers(&self.grids.scales, group);
        // What codes count from the middle: zero points, or the numbers of the middle codes.
        let shift = match self.grids.zeros.get(group) {
            Some(zeros) => {
                let middle = _mm512_set1_epi32(1 << (self.bits - 1));
                let mut shift = [_mm512_setzero_ps(); BANDS];
                for band in 0..BANDS {
                    let zeros = _mm512_cvtepu8_epi32(cast::<[u8; LANES], _>(zeros.as_chunks().0[band]));
                    shift[band] = _mm512_mul_ps(scales[band], _mm512_cvtepi32_ps(_mm512_sub_epi32(middle, zeros)));
                }
                shift
            }
            None => numbers(&self.grids.offsets, group),
        };
        [Scaling { scales: scales[0], shift: shift[0] }, Scaling { scales: scales[1], shift: shift[1] }]
    }
}

/// What makes numbers of sums of codes that count from the middle: of 16 rows, a scale each and a number beside it.
#[derive(Clone, Copy)]
pub(super) struct Scaling {
    pub scales: __m512,
    pub shift: __m512,
}

impl Scaling {
    /// Adds the sums of the bytes of an input of some unit and sum.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn add<const BYTES: usize>(
        &self,
        total: __m512,
        sums: [__m512i; BYTES],
        unit: f32,
        whole: f32,
    ) -> __m512 {
        self.shifted(self.scaled(total, sums, unit), whole)
    }

    /// What codes that count from the middle make of it,
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scaled<const BYTES: usize>(&self, total: __m512, sums: [__m512i; BYTES], unit: f32) -> __m512 {
        let scale = _mm512_mul_ps(self.scales, _mm512_set1_ps(unit));
        _mm512_fmadd_ps(join(sums), scale, total)
    }

    /// and what is beside them.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn shifted(&self, total: __m512, whole: f32) -> __m512 {
        _mm512_fmadd_ps(self.shift, _mm512_set1_ps(whole), total)
    }
}

/// A group's numbers of each band; zeros if there are none at all.
#[inline]
#[target_feature(enable = "avx512f")]
fn numbers(of: &Floats, group: usize) -> [__m512; BANDS] {
    match of {
        Floats::Half(all) => match all.get(group) {
            Some(of) => {
                let of = of.reinterpret_cast().as_chunks::<LANES>().0;
                [_mm512_cvtph_ps(cast(of[0])), _mm512_cvtph_ps(cast(of[1]))]
            }
            None => [_mm512_setzero_ps(); BANDS],
        },
        Floats::Wide(all) => all.get(group).map_or([_mm512_setzero_ps(); BANDS], |of| cast(*of)),
    }
}
