//! Products with few inputs by vectors of sixteen rows: AVX-512 with VNNI and VBMI.

use std::arch::x86_64::*;

use half::slice::HalfFloatSliceExt;
use pulp::bytemuck::cast;

use super::super::packed::{Floats, Grids};
use super::digits::join;
use super::inputs::Inputs;
use super::panel::Unpacking;
use super::{BANDS, LANES, LIMBS, Lanes, TOGETHER};
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

/// Panels that are multiplied together, with one input: two streams of codes come from memory faster than one. (With two inputs
/// their sums would have to be in memory.)
pub(super) const PANELS: usize = 2;
/// Bytes of all panels between what is multiplied and what is asked for.
const AHEAD: usize = 2048;

/// Bytes from the first of what is left of some panel to what should be asked for, so far on in the same panel, or in those that come
/// next: they follow in memory behind all that are multiplied together.
#[inline(always)]
pub(super) fn ahead(far: usize, rest: &[u8], together: &[Panel<'_>]) -> usize {
    let others = || together.iter().skip(1).map(|panel| panel.packed.len()).sum::<usize>();
    if rest.len() > far { far } else { far + others() }
}

/// Adds the products of one panel, or of [`PANELS`], with all inputs. (Codes are unpacked for each few: that costs less than to
/// read them as bytes.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
pub(super) fn multiply<const KIND: u8, const PARTS: usize>(
    panels: &[Panel<'_>],
    x: &Inputs,
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    for (first, count) in x.tiles() {
        if let (Some(panels), 1) = (panels.first_chunk::<PANELS>(), count) {
            tile::<KIND, PARTS, 1, PANELS>(panels, x, first, totals);
            continue;
        }
        for (panel, totals) in panels.iter().zip(totals.chunks_mut(x.padded())) {
            let panel = std::array::from_ref(panel);
            match count {
                1 => tile::<KIND, PARTS, 1, 1>(panel, x, first, totals),
                2 => tile::<KIND, PARTS, 2, 1>(panel, x, first, totals),
                _ => tile::<KIND, PARTS, TOGETHER, 1>(panel, x, first, totals),
            }
        }
    }
}

/// Adds the products of P panels with V inputs from one on. (No closures and no calls in the inner loop but of what has the same
/// instructions: vectors would have to be in memory.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
#[allow(unsafe_code, clippy::needless_range_loop)]
fn tile<const KIND: u8, const PARTS: usize, const V: usize, const P: usize>(
    panels: &[Panel<'_>; P],
    x: &Inputs,
    first: usize,
    to: &mut [[Lanes<f32>; BANDS]],
) {
    let unpacking = Unpacking::new(panels[0].bits);
    let chunk = unpacking.chunk();
    let mut totals = [[[_mm512_setzero_ps(); BANDS]; V]; P];
    let mut rest = [&[][..]; P];
    for p in 0..P {
        rest[p] = panels[p].packed;
        let Some(of) = to[p * x.padded() + first..].first_chunk::<V>() else { return };
        for v in 0..V {
            totals[p][v] = [cast(of[v][0].0), cast(of[v][1].0)];
        }
    }
    for number in 0..x.layout.runs() {
        let (units, whole) = x.beside(number, first, V);
        let mut sums = [[[[_mm512_setzero_si512(); BANDS]; V]; LIMBS]; P];
        for p in 0..P {
            let Some(starts) = x.begin::<LIMBS, V>(panels[p].starts, number, first) else { return };
            for limb in 0..LIMBS {
                for v in 0..V {
                    sums[p][limb][v] = [_mm512_set1_epi32(starts[limb][v]); BANDS];
                }
            }
        }
        let limbs = x.limbs(number, first, V).as_chunks::<V>().0.as_chunks::<LIMBS>().0.as_chunks::<PARTS>().0;
        let bytes = limbs.len() * chunk;
        let ahead = ahead(AHEAD / P, rest[0], panels);
        // (Cut out first: to look chunks up in all the rest takes 0 to 10 % longer.)
        let mut codes = [&[][..]; P];
        for p in 0..P {
            (codes[p], rest[p]) = rest[p].split_at(bytes.min(rest[p].len()));
        }
        for (at, limbs) in limbs.iter().enumerate() {
            for p in 0..P {
                let Some(codes) = codes[p].get(at * chunk..(at + 1) * chunk) else { return };
                prefetch(&codes[0], ahead);
                prefetch(&codes[0], ahead + 64);
                // SAFETY: a chunk is the bytes of two vectors. The machine has the instructions, or this were not called.
                let loaded = unsafe { unpacking.load::<KIND>(codes.as_ptr()) };
                for part in 0..PARTS {
                    for limb in 0..LIMBS {
                        for v in 0..V {
                            let input = _mm512_set1_epi32(limbs[part][limb][v]);
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
        for p in 0..P {
            let scalings = panels[p].scalings(panels[p].group + x.layout.group_of(number));
            for (band, scaling) in scalings.iter().enumerate() {
                for v in 0..V {
                    let limbs = [sums[p][0][v][band], sums[p][1][v][band], sums[p][2][v][band]];
                    totals[p][v][band] = scaling.add(totals[p][v][band], limbs, units[v], whole[v]);
                }
            }
        }
    }
    for p in 0..P {
        for (to, of) in to[p * x.padded() + first..].iter_mut().zip(totals[p]) {
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
    /// Adds the sums of the digits of an input of some unit and sum.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn add(&self, total: __m512, sums: [__m512i; LIMBS], unit: f32, whole: f32) -> __m512 {
        let scale = _mm512_mul_ps(self.scales, _mm512_set1_ps(unit));
        let total = _mm512_fmadd_ps(join(sums), scale, total);
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
