//! Products with codes in integers: AVX-512 with VNNI and VBMI.
//!
//! An input is in fixed point, x = 2ᵉ·(2¹⁶a + 2⁸b + c) with signed bytes a, b, c, and e such that the largest of a run of
//! columns takes all bits: off by no more than 2⁻²³ of it, as sums of `f32` are. Codes of any width become bytes, four
//! columns of 16 rows in a vector, and `vpdpbusd` adds up their products with each of the three without any rounding;
//! floats see the sum of a run only, which is scaled then, for 16 rows at once. Inputs that are not finite make a sum of NaN.
//! Where there are matrix instructions, more than a few inputs meet the bytes in those ([`many`]), with the same sums, or codes
//! of less than eight bits as numbers of 16 bits, in sums of `f32`, where that is faster ([`few`]).

use std::arch::x86_64::*;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use pulp::bytemuck::cast;

mod bfloat;
mod bytes;
mod digits;
mod few;
mod inputs;
mod layout;
mod many;
mod matrix;
mod panel;

pub(super) use self::bytes::write;
use self::digits::join;
use self::few::Scratch;
pub(super) use self::inputs::Inputs;
use self::layout::{Layout, Way};
use self::many::{Blocks, Task};
use self::matrix::Tiles;
use self::panel::{Lanes, Unpacking, kind, put, turned};
use super::CodedRows;
use super::packed::{Floats, Grids, LINE, PANEL};
use crate::scalar::Real;
use crate::simd::prefetch;

/// Rows in a vector.
const LANES: usize = 16;
/// Vectors of rows that are multiplied together.
const BANDS: usize = PANEL / LANES;
/// Codes in a lane of a vector.
const EACH: usize = 4;
/// Signed bytes of an input.
const LIMBS: usize = 3;
/// Inputs that meet codes together, at most: their sums fill the registers.
const TOGETHER: usize = 4;

/// Bytes between what is multiplied and what is asked for.
const AHEAD: usize = 4096;

/// Whether the machine has the instructions. (The answer is kept by the standard library.)
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni")
}

/// Whether there is a kernel for such rows here.
pub(super) fn takes<T: Real>(bits: u8, group: usize, columns: usize) -> bool {
    Layout::new::<T>(bits, group, columns).is_some()
}

/// Sixteen chunks of 32 bits of all rows of a panel as the rows have them; `None` without the instructions.
pub(super) fn lines(chunks: &[u8; LINE * PANEL]) -> Option<[[u8; LINE]; PANEL]> {
    if !available() {
        return None;
    }
    let all: [[[i32; LANES]; BANDS]; LINE / EACH] = cast(*chunks);
    let mut lines = [[0; LINE]; PANEL];
    for band in 0..BANDS {
        let of = all.map(|chunk| cast(chunk[band]));
        // SAFETY: the machine has the instructions, as was asked above.
        #[allow(unsafe_code)]
        let rows = unsafe { turned(of) };
        lines[band * LANES..][..LANES].iter_mut().zip(rows).for_each(|(line, row)| *line = cast(row));
    }
    Some(lines)
}

/// The inner products of some rows, of which the first begins a panel, with some inputs, row by row.
pub(super) fn products<T: Real>(rows: &CodedRows<'_, T>, range: Range<usize>, x: &Inputs, y: &mut [f32]) {
    let vectors = x.vectors.max(1);
    let Some(panels) = rows.codes.panels() else { return };
    assert!(meets(rows, x) && range.start.is_multiple_of(PANEL), "rows of the kind that inputs were laid out for");
    let (bits, grids, starts) = (rows.codes.bits(), rows.codes.grids(), x.starts(rows.codes.bits()));
    let of = panels.skip(range.start / PANEL);
    let panels = range.step_by(PANEL).zip(of).map(|(first, packed)| {
        let group = first / PANEL * rows.groups;
        Panel { bits, packed, grids, group, starts: &starts }
    });
    let panels: Vec<_> = panels.collect();
    let mut meeting = Meeting::new(x);
    let together = meeting.panels(x);
    let mut totals = vec![[Lanes::default(); BANDS]; panels.len().min(together) * x.padded()];
    for (panels, y) in panels.chunks(together).zip(y.chunks_mut(together * PANEL * vectors)) {
        let totals = &mut totals[..panels.len() * x.padded()];
        totals.fill([Lanes::default(); BANDS]);
        // SAFETY: the machine has the instructions, or there would be no `Inputs`: its constructor asks for each of the
        // features that the functions are compiled for.
        #[allow(unsafe_code)]
        unsafe {
            match kind(bits) {
                8 => meeting.multiply::<8, 1>(panels, x, totals),
                4 => meeting.multiply::<4, 2>(panels, x, totals),
                2 => meeting.multiply::<2, 4>(panels, x, totals),
                _ => meeting.multiply::<0, 1>(panels, x, totals),
            }
        }
        for (y, totals) in y.chunks_mut(PANEL * vectors).zip(totals.chunks(x.padded())) {
            // SAFETY: as above.
            #[allow(unsafe_code)]
            unsafe {
                by_rows(totals, vectors, y);
            }
        }
    }
}

/// The totals of some rows, from those of each vector.
#[target_feature(enable = "avx512f")]
fn by_rows(totals: &[[Lanes<f32>; BANDS]], vectors: usize, y: &mut [f32]) {
    if vectors <= TOGETHER {
        for (r, y) in y.chunks_mut(vectors).enumerate() {
            y.iter_mut().zip(totals).for_each(|(y, totals)| *y = totals[r / LANES].0[r % LANES]);
        }
        return;
    }
    for (at, totals) in totals.chunks(LANES).enumerate() {
        for band in 0..BANDS {
            let columns = std::array::from_fn(|v| totals.get(v).map_or(_mm512_setzero_si512(), |of| cast(of[band].0)));
            for (row, y) in turned(columns).into_iter().zip(y.chunks_mut(vectors).skip(band * LANES)) {
                // (There may be more totals than vectors.)
                put(row, y.get_mut(at * LANES..).unwrap_or_default());
            }
        }
    }
}

/// How panels meet inputs, with memory for unpacked codes.
enum Meeting {
    Vectors,
    Bytes(Tiles, Blocks, Vec<[Lanes<i32>; BANDS]>),
    Eight(bfloat::Tiles<{ LANES / 2 }>, Box<Scratch>),
    Sixteen(bfloat::Tiles<LANES>, Box<Scratch>),
}

impl Meeting {
    fn new(x: &Inputs) -> Self {
        match x.way {
            Way::Bytes(shape) => {
                let blocks = Blocks::new(x, shape);
                Meeting::Bytes(Tiles::new(shape), blocks, blocks.scratch())
            }
            Way::Numbers(LANES) => Meeting::Sixteen(bfloat::Tiles::new(), Scratch::new()),
            Way::Numbers(_) => Meeting::Eight(bfloat::Tiles::new(), Scratch::new()),
            Way::Vectors => Meeting::Vectors,
        }
    }

    /// Panels that are multiplied together.
    fn panels(&self, x: &Inputs) -> usize {
        match self {
            Meeting::Vectors => 1,
            Meeting::Bytes(_, blocks, _) => blocks.panels,
            Meeting::Eight(..) | Meeting::Sixteen(..) => few::Blocks::new(&x.layout).panels(x.tiles().len()),
        }
    }

    /// Adds the products of some panels with all inputs.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    fn multiply<const KIND: u8, const PARTS: usize>(
        &mut self,
        panels: &[Panel<'_>],
        x: &Inputs,
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        match self {
            Meeting::Vectors => {
                for (panel, totals) in panels.iter().zip(totals.chunks_mut(x.padded())) {
                    panel.multiply::<KIND, PARTS>(x, totals);
                }
            }
            Meeting::Bytes(tiles, blocks, unpacked) => {
                let task = Task { panels, x, tiles, unpacked, totals };
                match x.way {
                    Way::Bytes(shape) if shape.inputs == LANES => blocks.multiply::<KIND, PARTS, LANES>(task),
                    _ => blocks.multiply::<KIND, PARTS, { LANES / 2 }>(task),
                }
            }
            Meeting::Eight(tiles, scratch) => few::multiply::<KIND, { LANES / 2 }>(panels, x, tiles, scratch, totals),
            Meeting::Sixteen(tiles, scratch) => few::multiply::<KIND, LANES>(panels, x, tiles, scratch, totals),
        }
    }
}

/// Whether inputs are laid out for such rows.
pub(super) fn meets<T: Real>(rows: &CodedRows<'_, T>, x: &Inputs) -> bool {
    x.meet::<T>(rows.codes.bits(), rows.group, rows.codes.shape().1)
}

/// Some rows.
struct Panel<'a> {
    bits: u8,
    packed: &'a [u8],
    grids: &'a Grids,
    /// Where its groups begin in them.
    group: usize,
    /// What sums of products begin with.
    starts: &'a [i32],
}

impl Panel<'_> {
    /// Adds the products with all inputs. (Codes are unpacked for each few: that costs less than to read them as bytes.)
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    fn multiply<const KIND: u8, const PARTS: usize>(&self, x: &Inputs, totals: &mut [[Lanes<f32>; BANDS]]) {
        for (first, count) in x.tiles() {
            match count {
                1 => self.tile::<KIND, PARTS, 1>(x, first, totals),
                2 => self.tile::<KIND, PARTS, 2>(x, first, totals),
                _ => self.tile::<KIND, PARTS, TOGETHER>(x, first, totals),
            }
        }
    }

    /// Adds the products with V inputs from one on. (No closures and no calls in the inner loop but of what has the same
    /// instructions: vectors would have to be in memory.)
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
    #[allow(unsafe_code, clippy::needless_range_loop)]
    fn tile<const KIND: u8, const PARTS: usize, const V: usize>(
        &self,
        x: &Inputs,
        first: usize,
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        let Some(to) = totals[first..].first_chunk_mut::<V>() else { return };
        let mut totals: [[__m512; BANDS]; V] = to.map(|of| of.map(|band| cast(band.0)));
        let unpacking = Unpacking::new(self.bits);
        let mut codes = self.packed.chunks_exact(unpacking.chunk());
        for number in 0..x.layout.runs() {
            let group = self.group + x.layout.group_of(number);
            let Some(starts) = x.begin::<V>(self.starts, number, first) else { return };
            let (units, whole) = x.beside(number, first, V);
            let mut sums = [[[_mm512_setzero_si512(); BANDS]; V]; LIMBS];
            for limb in 0..LIMBS {
                for v in 0..V {
                    sums[limb][v] = [_mm512_set1_epi32(starts[limb][v]); BANDS];
                }
            }
            let limbs = x.limbs(number, first, V).as_chunks::<V>().0.as_chunks::<LIMBS>().0.as_chunks::<PARTS>().0;
            for (limbs, codes) in limbs.iter().zip(&mut codes) {
                prefetch(&codes[0], AHEAD);
                prefetch(&codes[0], AHEAD + 64);
                // SAFETY: a chunk is the bytes of two vectors. The machine has the instructions, or this were not called.
                let loaded = unsafe { unpacking.load::<KIND>(codes.as_ptr()) };
                for part in 0..PARTS {
                    for limb in 0..LIMBS {
                        for v in 0..V {
                            let input = _mm512_set1_epi32(limbs[part][limb][v]);
                            for band in 0..BANDS {
                                let lane = unpacking.lane::<KIND>(loaded[band], part);
                                let sum = &mut sums[limb][v][band];
                                *sum = _mm512_dpbusd_epi32(*sum, lane, input);
                            }
                        }
                    }
                }
            }
            let scalings = self.scalings(group);
            for (band, scaling) in scalings.iter().enumerate() {
                for v in 0..V {
                    let limbs = [sums[0][v][band], sums[1][v][band], sums[2][v][band]];
                    totals[v][band] = scaling.add(totals[v][band], limbs, units[v], whole[v]);
                }
            }
        }
        *to = totals.map(|of| of.map(|band| Lanes(cast(band))));
    }

    /// What makes numbers of a group's sums, of each band; zeros if there is no such group.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scalings(&self, group: usize) -> [Scaling; BANDS] {
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
struct Scaling {
    scales: __m512,
    shift: __m512,
}

impl Scaling {
    /// Adds the sums of the digits of an input of some unit and sum.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add(&self, total: __m512, sums: [__m512i; LIMBS], unit: f32, whole: f32) -> __m512 {
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

#[cfg(test)]
mod tests;
