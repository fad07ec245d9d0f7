//! Products with few inputs by vectors of sixteen rows: AVX-512 with VNNI, VBMI and GFNI.

use std::arch::x86_64::*;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use pulp::bytemuck::cast;

use super::super::packed::{Floats, Grids};
use super::digits::join;
use super::inputs::Inputs;
use super::panel::Unpacking;
use super::{ActivationBits, BANDS, EACH, LANES, Lanes, TOGETHER};
use crate::memory::Reading;

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

/// Columns of a run that is too short for tiles of inputs to take turns.
const SHORT: usize = 32;

/// Bytes of inputs that meet all panels before the next do: they stay in the second cache beside codes and sums. (512 vectors with codes of
/// 4 bits in groups of 128: 4,096 columns in 0.75 to 0.86 of the time, 576 in 0.88 to 0.91. Short runs took 1.03 to 1.05, and have none.)
const BLOCK: usize = 512 << 10;

/// Vectors in such a block.
pub(super) fn block(x: &Inputs) -> usize {
    let all = x.padded().max(1);
    if x.layout.run > SHORT { (BLOCK / x.bytes().max(1) / LANES).max(1) * LANES } else { all }
}

/// Sums whose additions take turns hide how long each takes, if there are few: so many sets of them, one for every other part of a chunk.
const fn sets(parts: usize, sums: usize) -> usize {
    if parts > 1 && sums * BANDS <= 8 { 2 } else { 1 }
}

/// Adds the products of a panel with a block of inputs. (Codes are unpacked for each few: that costs less than to read them as bytes.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni,gfni")]
pub(super) fn multiply<const KIND: u8, const PARTS: usize>(
    activations: ActivationBits,
    panel: &Panel<'_>,
    (x, block): (&Inputs, Range<usize>),
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    use ActivationBits::{Eight, Sixteen, TwentyFour};
    let reading = Reading::here();
    // (Those of short runs meet all columns one after the other: to begin and end a run anew for each takes longer than to read codes again.)
    for (first, count, tiles) in x.stretches(block, x.layout.run > SHORT) {
        macro_rules! tiles {
            ($bytes:literal, $vectors:literal) => {
                multiply_tiles::<KIND, PARTS, $bytes, $vectors>(reading, panel, x, (first, tiles), totals)
            };
        }
        match (activations, count) {
            (Eight, 1) => tiles!(1, 1),
            (Eight, 2) => tiles!(1, 2),
            (Eight, 4) => tiles!(1, 4),
            (Eight, _) => tiles!(1, 8),
            (Sixteen, 1) => tiles!(2, 1),
            (Sixteen, 2) => tiles!(2, 2),
            (Sixteen, _) => tiles!(2, 4),
            (TwentyFour, 1) => tiles!(3, 1),
            (TwentyFour, 2) => tiles!(3, 2),
            (TwentyFour, _) => tiles!(3, 4),
        }
    }
}

/// Totals of the rows of a panel with V inputs.
type Totals<const V: usize> = [[__m512; BANDS]; V];

/// Adds the products of a panel with tiles of V inputs from one on: a run of columns meets one tile after the other, so that codes come
/// from memory beside all products, and not only beside those of the first tile. (No closures and no calls in the inner loop but of what
/// has the same instructions: vectors would have to be in memory.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni,gfni")]
#[allow(unsafe_code, clippy::needless_range_loop)]
fn multiply_tiles<const KIND: u8, const PARTS: usize, const BYTES: usize, const V: usize>(
    reading: Reading,
    panel: &Panel<'_>,
    x: &Inputs,
    (first, tiles): (usize, usize),
    to: &mut [[Lanes<f32>; BANDS]],
) {
    let unpacking = Unpacking::new(panel.bits);
    let (chunk, shifted) = (unpacking.chunk::<KIND>(), panel.grids.shifted());
    debug_assert!(tiles == 1 || V >= TOGETHER, "several tiles have as many inputs as there may be");
    // (Known to the compiler where there is one: its totals stay in registers.)
    let tiles = if V < TOGETHER { 1 } else { tiles };
    let sets = const { sets(PARTS, BYTES * V) };
    let one = x.of_tile::<1, BYTES, V>(panel.starts, first);
    let mut rest = panel.packed;
    let Some(mut totals) = read::<V>(to, first) else { return };
    for (number, group) in x.layout.groups().enumerate() {
        let (begin, lanes) = (number * (x.layout.run / EACH), x.layout.lanes(number));
        let bytes = lanes / PARTS * chunk;
        // (Cut out first: to look chunks up in all the rest takes 0 to 10 % longer.)
        let codes;
        (codes, rest) = rest.split_at(bytes.min(rest.len()));
        // (Beyond what the first of several tiles reads.)
        let reading = if tiles == 1 { reading } else { reading.beyond(bytes) };
        for at in 0..tiles {
            let first = first + at * V;
            let tile = if tiles == 1 { one } else { x.of_tile(panel.starts, first) };
            if tiles > 1 {
                let Some(of_tile) = read::<V>(to, first) else { return };
                totals = of_tile;
            }
            // Of the two that are asked for beside a chunk each is by every other tile, if there are several.
            let asked = if tiles == 1 { [0, 1] } else { [at % 2; 2] };
            let Some((starts, units, whole, words)) = tile.of_run(number, begin..begin + lanes) else { return };
            let mut sums = [[[[_mm512_setzero_si512(); BANDS]; V]; BYTES]; 2];
            for limb in 0..BYTES {
                for v in 0..V {
                    sums[0][limb][v] = [_mm512_set1_epi32(starts[limb][v]); BANDS];
                }
            }
            for (codes, limbs) in codes.chunks_exact(chunk).zip(words.as_chunks::<PARTS>().0) {
                reading.ask(&codes[0], asked);
                // SAFETY: a chunk is the bytes of two vectors. The machine has the instructions, or this were not called.
                let loaded = unsafe { unpacking.load::<KIND>(codes.as_ptr()) };
                for part in 0..PARTS {
                    for limb in 0..BYTES {
                        for v in 0..V {
                            let input = _mm512_set1_epi32(limbs[part][limb][0][v]);
                            for band in 0..BANDS {
                                let lane = unpacking.lane::<KIND>(loaded[band], part);
                                let sum = &mut sums[part % sets][limb][v][band];
                                *sum = _mm512_dpbusd_epi32(*sum, lane, input);
                            }
                        }
                    }
                }
            }
            let scalings = panel.scalings(panel.group + group);
            for (band, scaling) in scalings.iter().enumerate() {
                for v in 0..V {
                    let mut of = [_mm512_setzero_si512(); BYTES];
                    for limb in 0..BYTES {
                        of[limb] = sums[0][limb][v][band];
                        if sets > 1 {
                            of[limb] = _mm512_add_epi32(of[limb], sums[1][limb][v][band]);
                        }
                    }
                    totals[v][band] = scaling.scaled(totals[v][band], of, units[v]);
                    if shifted {
                        totals[v][band] = scaling.shifted(totals[v][band], whole[v]);
                    }
                }
            }
            if tiles > 1 {
                write(totals, to, first);
            }
        }
    }
    if tiles == 1 {
        write(totals, to, first);
    }
}

/// Totals of some inputs from one on; `None` if there are fewer.
#[inline]
#[target_feature(enable = "avx512f")]
fn read<const V: usize>(from: &[[Lanes<f32>; BANDS]], first: usize) -> Option<Totals<V>> {
    let mut totals = [[_mm512_setzero_ps(); BANDS]; V];
    for (total, of) in totals.iter_mut().zip(from.get(first..)?.first_chunk::<V>()?) {
        *total = [cast(of[0].0), cast(of[1].0)];
    }
    Some(totals)
}

/// Writes them where they were.
#[inline]
#[target_feature(enable = "avx512f")]
fn write<const V: usize>(totals: Totals<V>, to: &mut [[Lanes<f32>; BANDS]], first: usize) {
    for (to, of) in to[first..].iter_mut().zip(totals) {
        *to = [Lanes(cast(of[0])), Lanes(cast(of[1]))];
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
