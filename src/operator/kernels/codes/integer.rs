//! Products with codes in integers: AVX-512 with VNNI, VBMI and GFNI, or AVX2.
//!
//! An input is in fixed point, x = u·(2¹⁶a + 2⁸b + c) with signed bytes a, b, c, and a unit u such that the largest of a run of
//! columns takes all bits: off by no more than 2⁻²³ of it, as sums of `f32` are; or in one or two bytes, if less is asked for
//! ([`ActivationBits`]). Codes of any width become bytes, four columns of 16 rows in a vector, and `vpdpbusd` adds up their
//! products with each of the bytes without any rounding; floats see the sum of a run only, which is scaled then, for 16 rows at
//! once. Inputs that are not finite make a sum of NaN. Where there are matrix instructions, more than one input meet the bytes in
//! those, up to sixteen at a time where their digits fill two tiles ([`turns`]) or three ([`many`]), or, more than four, codes of
//! less than eight bits as numbers of 16 bits, in sums of `f32`, where that is faster ([`few`]). Where there is no AVX-512, the
//! same codes meet inputs in vectors of 8 rows ([`avx2`]), and, where a byte takes two instructions, several as numbers.

use std::arch::x86_64::*;
use std::ops::Range;

use pulp::bytemuck::cast;

mod avx2;
mod beside;
mod bfloat;
mod bytes;
mod digits;
mod few;
mod inputs;
mod many;
mod matrix;
mod panel;
mod runs;
mod turns;
mod vectors;
mod way;

pub(super) use self::bytes::write;
use self::few::Scratch;
pub(super) use self::inputs::Inputs;
use self::many::{Blocks, Task};
use self::matrix::Tiles;
use self::panel::kind;
use self::vectors::Panel;
pub(super) use self::way::takes;
use self::way::{Rows, Way};
use super::super::cutting::{Cutting, DIGITS, STEP};
use super::super::kept::Kept;
use super::super::lanes::{LANES, Lanes, columns, padded, put, turned};
use super::super::tiles;
use super::layout::EACH;
use super::packed::{LINE, PANEL};
use super::{ActivationBits, CodedRows};
use crate::scalar::Real;

/// Vectors of rows that are multiplied together.
const BANDS: usize = PANEL / LANES;
/// Signed bytes of an input at full accuracy.
const LIMBS: usize = ActivationBits::TwentyFour.bytes();
/// Inputs of so many that meet codes together, at most: their sums fill the registers.
const TOGETHER: usize = 4;

/// Whether the machine has the instructions. (The answer is kept by the standard library.)
pub(super) fn available() -> bool {
    cfg!(feature = "avx512")
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("gfni")
}

/// Sixteen chunks of 32 bits of all rows of a panel as the rows have them; `None` without the instructions.
pub(super) fn lines(chunks: &[u8; LINE * PANEL]) -> Option<[[u8; LINE]; PANEL]> {
    if !available() {
        return avx2::lines(chunks);
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
    let mut meeting = Meeting::new(x, bits);
    let together = meeting.panels(x);
    let mut totals = vec![[Lanes::default(); BANDS]; panels.len().min(together) * x.padded()];
    let block = meeting.block(x);
    for first in (0..x.padded()).step_by(block) {
        let block = first..(first + block).min(x.padded());
        for (panels, y) in panels.chunks(together).zip(y.chunks_mut(together * PANEL * vectors)) {
            let totals = &mut totals[..panels.len() * x.padded()];
            totals.chunks_mut(x.padded()).for_each(|of| of[block.clone()].fill([Lanes::default(); BANDS]));
            meeting.multiply(panels, (x, block.clone()), totals);
            for (y, totals) in y.chunks_mut(PANEL * vectors).zip(totals.chunks(x.padded())) {
                by_rows(&totals[block.clone()], (first, vectors), y);
            }
        }
    }
}

/// The totals of some rows, from those of each vector; of many vectors, from one on.
fn by_rows(totals: &[[Lanes<f32>; BANDS]], (first, vectors): (usize, usize), y: &mut [f32]) {
    if vectors > TOGETHER && available() {
        // SAFETY: the machine has the instructions, as was asked.
        #[allow(unsafe_code)]
        unsafe {
            squares(totals, (first, vectors), y);
        }
        return;
    }
    if vectors > TOGETHER && avx2::by_rows(totals, (first, vectors), y) {
        return;
    }
    if let (Some(totals), true) = (totals.first_chunk::<TOGETHER>(), vectors == TOGETHER && available()) {
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            fours(totals, y);
        }
        return;
    }
    if let (Some(totals), 1) = (totals.first(), vectors) {
        y.chunks_mut(LANES).zip(totals).for_each(|(y, totals)| y.copy_from_slice(&totals.0[..y.len()]));
        return;
    }
    for (r, y) in y.chunks_mut(vectors).enumerate() {
        y.iter_mut().zip(totals).for_each(|(y, totals)| *y = totals[r / LANES].0[r % LANES]);
    }
}

/// The same of four vectors.
#[target_feature(enable = "avx512f")]
fn fours(totals: &[[Lanes<f32>; BANDS]; TOGETHER], y: &mut [f32]) {
    for (band, y) in y.as_chunks_mut::<TOGETHER>().0.chunks_mut(LANES).enumerate().take(BANDS) {
        let of = totals.map(|totals| cast::<_, __m512i>(totals[band].0));
        let (first, second) = (_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[0], of[1]));
        let (third, fourth) = (_mm512_unpacklo_epi32(of[2], of[3]), _mm512_unpackhi_epi32(of[2], of[3]));
        // Those of every fourth row each.
        let rows: [[[f32; TOGETHER]; LANES / TOGETHER]; TOGETHER] = [
            cast(_mm512_unpacklo_epi64(first, third)),
            cast(_mm512_unpackhi_epi64(first, third)),
            cast(_mm512_unpacklo_epi64(second, fourth)),
            cast(_mm512_unpackhi_epi64(second, fourth)),
        ];
        y.iter_mut().enumerate().for_each(|(r, y)| *y = rows[r % TOGETHER][r / TOGETHER]);
    }
}

/// The same by squares of sixteen.
#[target_feature(enable = "avx512f")]
fn squares(totals: &[[Lanes<f32>; BANDS]], (first, vectors): (usize, usize), y: &mut [f32]) {
    for (at, totals) in totals.chunks(LANES).enumerate() {
        for band in 0..BANDS {
            let columns = std::array::from_fn(|v| totals.get(v).map_or(_mm512_setzero_si512(), |of| cast(of[band].0)));
            for (row, y) in turned(columns).into_iter().zip(y.chunks_mut(vectors).skip(band * LANES)) {
                // (There may be more totals than vectors.)
                put(row, y.get_mut(first + at * LANES..).unwrap_or_default());
            }
        }
    }
}

/// How panels meet inputs, with memory for unpacked codes.
enum Meeting {
    Vectors(ActivationBits),
    Narrow(avx2::Digits, Box<avx2::Spread>, Vec<u8>),
    Turns(turns::Tiles, Box<turns::Scratch>),
    Bytes(Tiles, Blocks, Vec<[Lanes<i32>; BANDS]>),
    Eight(bfloat::Tiles<{ LANES / 2 }>, Box<Scratch>),
    Sixteen(bfloat::Tiles<LANES>, Box<Scratch>),
}

impl Meeting {
    fn new(x: &Inputs, bits: u8) -> Self {
        match x.way {
            Way::Turns(shape) => Meeting::Turns(turns::Tiles::new(shape), turns::Scratch::new()),
            Way::Bytes(shape) => {
                let blocks = Blocks::new(x, shape);
                Meeting::Bytes(Tiles::new(shape), blocks, blocks.scratch())
            }
            Way::Numbers(LANES) => Meeting::Sixteen(bfloat::Tiles::new(), Scratch::new()),
            Way::Numbers(_) => Meeting::Eight(bfloat::Tiles::new(), Scratch::new()),
            Way::Vectors(activations) => Meeting::Vectors(activations),
            Way::Narrow(digits) => Meeting::Narrow(digits, Box::new(avx2::Spread::new(bits)), Vec::new()),
        }
    }

    /// Panels that are multiplied together.
    fn panels(&self, x: &Inputs) -> usize {
        match self {
            Meeting::Vectors(..) | Meeting::Narrow(..) => 1,
            Meeting::Turns(..) => turns::PANELS,
            Meeting::Bytes(_, blocks, _) => blocks.panels,
            Meeting::Eight(..) | Meeting::Sixteen(..) => few::Blocks::new(&x.layout).panels(x.tiles().len()),
        }
    }

    /// Vectors that meet all panels before the next do.
    fn block(&self, x: &Inputs) -> usize {
        match self {
            Meeting::Vectors(_) => vectors::block(x),
            _ => x.padded().max(1),
        }
    }

    /// Adds the products of some panels with a block of inputs.
    fn multiply(
        &mut self,
        panels: &[Panel<'_>],
        (x, block): (&Inputs, Range<usize>),
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        if let Meeting::Narrow(digits, spread, held) = self {
            let of = panels.iter().zip(totals.chunks_mut(x.padded()));
            return of.for_each(|(panel, totals)| avx2::multiply((*digits, spread, held), panel, x, totals));
        }
        // SAFETY: the machine has the instructions, or there would be no such `Inputs`: `Way::new` asks for each of the features
        // that the functions are compiled for.
        #[allow(unsafe_code)]
        unsafe {
            match kind(panels.first().map_or(0, |panel| panel.bits)) {
                8 => self.wide::<8, 1>(panels, (x, block), totals),
                4 => self.wide::<4, 2>(panels, (x, block), totals),
                2 => self.wide::<2, 4>(panels, (x, block), totals),
                _ => self.wide::<0, 1>(panels, (x, block), totals),
            }
        }
    }

    /// The same with AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni,gfni")]
    fn wide<const KIND: u8, const PARTS: usize>(
        &mut self,
        panels: &[Panel<'_>],
        (x, block): (&Inputs, Range<usize>),
        totals: &mut [[Lanes<f32>; BANDS]],
    ) {
        match self {
            Meeting::Vectors(activations) => {
                for (panel, totals) in panels.iter().zip(totals.chunks_mut(x.padded())) {
                    vectors::multiply::<KIND, PARTS>(*activations, panel, (x, block.clone()), totals);
                }
            }
            Meeting::Turns(tiles, scratch) => turns::multiply::<KIND, PARTS>(tiles, panels, x, scratch, totals),
            Meeting::Bytes(tiles, blocks, unpacked) => {
                let task = Task { panels, x, tiles, unpacked, totals };
                blocks.multiply::<KIND, PARTS>(task);
            }
            Meeting::Eight(tiles, scratch) => few::multiply::<KIND, { LANES / 2 }>(panels, x, tiles, scratch, totals),
            Meeting::Sixteen(tiles, scratch) => few::multiply::<KIND, LANES>(panels, x, tiles, scratch, totals),
            Meeting::Narrow(..) => {}
        }
    }
}

/// Whether inputs are laid out for such rows.
pub(super) fn meets<T: Real>(rows: &CodedRows<'_, T>, x: &Inputs) -> bool {
    let (bits, columns) = (rows.codes.bits(), rows.codes.shape().1);
    let asked = Rows { activations: rows.activations, bits, group: rows.group, columns };
    x.way.serves::<T>(x.vectors, asked) == Some(x.layout)
}

// (Miri has none of these instructions.)
#[cfg(all(test, not(miri)))]
mod tests;
