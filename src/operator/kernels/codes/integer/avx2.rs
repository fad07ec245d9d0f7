//! Products with codes in integers by vectors of eight rows: AVX2, with AVX-VNNI where there is that.
//!
//! Codes lie in the order that wider vectors take, of which each is two here. Inputs are in fixed point too, in digits that the
//! machine has products for ([`Digits`]); or they stay numbers, and codes become such.

use std::arch::x86_64::*;

use half::slice::HalfFloatSliceExt;
use pulp::bytemuck::cast;

use super::super::packed::{Floats, Grids};
use super::inputs::Inputs;
use super::panel::kind;
use super::vectors::Panel;
use super::{ActivationBits, BANDS, EACH, LANES, Lanes, PANEL, TOGETHER};

mod cut;
mod spread;
mod square;
mod sums;

pub(super) use self::cut::lay_out;
pub(super) use self::spread::Spread;
pub(super) use self::square::{by_rows, lines};
use self::sums::{sums_of_bytes, sums_of_halves, sums_of_numbers, sums_of_pairs};

/// Rows in a vector, and vectors of the rows of a panel.
const ROWS: usize = 8;
const VECTORS: usize = PANEL / ROWS;
/// Inputs whose numbers meet codes together, at most.
const WIDEST: usize = 5;

/// Digits that inputs are cut into.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Digits {
    /// Signed bytes, as many as there are for so many bits, of which four meet their codes in one instruction (AVX-VNNI).
    Bytes(ActivationBits),
    /// The same for codes of few bits: pairs of products are added up in 16 bits.
    Pairs(ActivationBits),
    /// Two of twelve bits, in 16: for codes with which few pairs of bytes fit those, if any.
    Twelve,
    /// One of sixteen, for such codes, where no more is asked for.
    Sixteen,
    /// None: inputs in units, which meet codes as numbers in sums of `f32`. At full accuracy that multiplies as much as three bytes do, where
    /// each of those takes two instructions. With as many at a time.
    Numbers(usize),
}

impl Digits {
    /// What serves such codes on this machine, the fastest with so many inputs first.
    pub(super) fn all(inputs: usize, bits: u8, activations: ActivationBits) -> impl Iterator<Item = Self> {
        let fits = match (bits, activations) {
            (6.., ActivationBits::TwentyFour) => Digits::Twelve,
            (5.., ActivationBits::Sixteen) | (7.., ActivationBits::Eight) => Digits::Sixteen,
            _ => Digits::Pairs(activations),
        };
        let numbers = (activations == ActivationBits::TwentyFour).then(|| Digits::Numbers(together(inputs)));
        let mut others = [numbers, Some(fits)];
        if inputs < fewest(bits) {
            others.reverse();
        }
        let bytes = dots().then_some(Digits::Bytes(activations));
        bytes.into_iter().chain(others.into_iter().flatten().filter(|_| available()))
    }

    /// Bits of an input.
    pub(super) fn activations(self) -> ActivationBits {
        match self {
            Digits::Bytes(activations) | Digits::Pairs(activations) => activations,
            Digits::Twelve | Digits::Numbers(_) => ActivationBits::TwentyFour,
            Digits::Sixteen => ActivationBits::Sixteen,
        }
    }

    /// Their number, and the bits of each.
    pub(super) fn count(self) -> usize {
        match self {
            Digits::Bytes(activations) | Digits::Pairs(activations) => activations.bytes(),
            Digits::Twelve => 2,
            Digits::Sixteen | Digits::Numbers(_) => 1,
        }
    }
    pub(super) fn bits(self) -> u32 {
        if self == Digits::Twelve { 12 } else { 8 }
    }

    /// Inputs of so many columns for which this is faster than to write rows out, at most. (A general product of many inputs with
    /// the numbers of a small matrix, which stays in the cache, is as fast as one with its codes, and lays inputs out in less time.)
    pub(super) fn most(self, columns: usize) -> usize {
        if matches!(self, Digits::Numbers(_)) && columns < 2048 { 48 } else { usize::MAX }
    }

    /// Columns of a run, at most. (Of numbers fewer are added up one after the other than integers, which lose nothing.)
    pub(super) fn longest(self) -> usize {
        self.activations().longest().min(if matches!(self, Digits::Numbers(_)) { 128 } else { usize::MAX })
    }

    /// Inputs at a time, at most.
    pub(super) fn inputs(self) -> usize {
        if let Digits::Numbers(together) = self { together } else { TOGETHER }
    }

    /// What the last few are filled up to. (A number by itself has too few sums to hide how long each takes.)
    pub(super) fn padded(self, last: usize) -> usize {
        if let Digits::Numbers(_) = self { last.max(2) } else { last.next_power_of_two() }
    }

    /// Words of 32 bits in which the digits of four columns lie.
    pub(super) fn words(self) -> usize {
        match self {
            Digits::Bytes(activations) | Digits::Pairs(activations) => activations.bytes(),
            Digits::Twelve | Digits::Numbers(_) => EACH,
            Digits::Sixteen => 2,
        }
    }
}

/// Inputs of which numbers are faster to multiply than digits, at least.
fn fewest(bits: u8) -> usize {
    match bits {
        // (Pairs of such codes fit 16 bits for long. More inputs would have rows written out for a general product.)
        2 => 33,
        6.. => 2,
        _ => 3,
    }
}

/// Inputs whose numbers meet codes together, of so many: parts of the same size, whose sums fill the registers.
fn together(inputs: usize) -> usize {
    inputs.div_ceil(inputs.div_ceil(WIDEST).max(1)).max(2)
}

/// Whether codes of which so many lie in a byte become numbers that count from the middle of their levels. Else sums begin with what they have too
/// much, and are rounded as if codes were as large as all levels are: of the few that 4 bits have that makes two or three times of 10⁻⁷, and takes
/// 0.88 of the time.
const fn numbers_from_the_middle(parts: usize) -> bool {
    parts == 1
}

/// Whether the machine has what all functions here ask for.
fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Whether it has products of four bytes at a time, besides.
fn dots() -> bool {
    available() && is_x86_feature_detected!("avxvnni")
}

/// The bytes of a chunk of columns, eight rows after the others.
type Chunk = [[u8; 4 * ROWS]; VECTORS];
/// Sums of the products of digits with some inputs, for some vectors of rows.
type Sums<const DIGITS: usize, const V: usize, const B: usize> = [[[__m256i; B]; V]; DIGITS];

/// Adds the products of a panel with all inputs. Codes that do not lie in halves or quarters of bytes are written out as bytes, once for all
/// inputs, if those are more than one tile.
pub(super) fn multiply(
    (digits, spread, held): (Digits, &Spread, &mut Vec<u8>),
    panel: &Panel<'_>,
    x: &Inputs,
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    let most = if matches!(digits, Digits::Numbers(_)) { 2 } else { TOGETHER };
    let written = kind(panel.bits) == 0 && x.padded() > most;
    let packed = if written { spread.write(panel.packed, held) } else { panel.packed };
    let panel = &Panel { packed, ..*panel };
    for (first, count) in x.tiles() {
        let Some(totals) = totals.get_mut(first..) else { return };
        match if written { 8 } else { panel.bits } {
            8 => few::<8, 1>((digits, spread), panel, x, (first, count), totals),
            4 => few::<4, 2>((digits, spread), panel, x, (first, count), totals),
            2 => few::<2, 4>((digits, spread), panel, x, (first, count), totals),
            _ => few::<0, 1>((digits, spread), panel, x, (first, count), totals),
        }
    }
}

/// With a tile of inputs: the fewer there are, the more rows at a time, so that sums fill the registers.
fn few<const KIND: u8, const PARTS: usize>(
    (digits, spread): (Digits, &Spread),
    panel: &Panel<'_>,
    x: &Inputs,
    (first, count): (usize, usize),
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    // SAFETY: inputs are laid out in such digits where the machine has the instructions for them: `Digits::all` asks.
    #[allow(unsafe_code)]
    unsafe {
        use ActivationBits::{Eight, Sixteen, TwentyFour};
        // Vectors of rows with one input, with two and with four.
        macro_rules! by {
            ($name:ident, $digits:literal: $one:literal, $two:literal, $four:literal) => {
                match count {
                    1 => $name::<KIND, PARTS, $digits, 1, $one>(spread, panel, x, first, totals),
                    2 => $name::<KIND, PARTS, $digits, 2, $two>(spread, panel, x, first, totals),
                    _ => $name::<KIND, PARTS, $digits, TOGETHER, $four>(spread, panel, x, first, totals),
                }
            };
        }
        match digits {
            // (What unpacks codes of other widths takes registers.)
            Digits::Bytes(TwentyFour) if KIND == 0 => by!(by_bytes, 3: 2, 2, 1),
            Digits::Bytes(TwentyFour) => by!(by_bytes, 3: 4, 2, 1),
            Digits::Bytes(Sixteen) => by!(by_bytes, 2: 4, 2, 1),
            Digits::Bytes(Eight) => by!(by_bytes, 1: 4, 4, 2),
            Digits::Pairs(TwentyFour) => by!(by_pairs, 3: 2, 1, 1),
            Digits::Pairs(Sixteen) => by!(by_pairs, 2: 4, 2, 1),
            Digits::Pairs(Eight) => by!(by_pairs, 1: 4, 4, 2),
            Digits::Twelve => by!(by_halves, 2: 4, 2, 1),
            Digits::Sixteen => by!(by_halves, 1: 4, 4, 2),
            Digits::Numbers(_) => match count {
                2 => by_numbers::<KIND, PARTS, 1, 2, 4>(spread, panel, x, first, totals),
                3 => by_numbers::<KIND, PARTS, 1, 3, 2>(spread, panel, x, first, totals),
                4 => by_numbers::<KIND, PARTS, 1, 4, 2>(spread, panel, x, first, totals),
                _ => by_numbers::<KIND, PARTS, 1, WIDEST, 2>(spread, panel, x, first, totals),
            },
        }
    }
}

/// A function that adds the products of a panel with V inputs from one on, B vectors of rows at a time.
macro_rules! tile {
    ($name:ident, $features:literal, $sums:ident, $each:literal, $bits:literal) => {
        #[target_feature(enable = $features)]
        fn $name<const KIND: u8, const PARTS: usize, const DIGITS: usize, const V: usize, const B: usize>(
            spread: &Spread,
            panel: &Panel<'_>,
            x: &Inputs,
            first: usize,
            totals: &mut [[Lanes<f32>; BANDS]],
        ) {
            let Some(to) = totals.first_chunk_mut::<V>() else { return };
            let mut totals = [[_mm256_setzero_ps(); VECTORS]; V];
            for v in 0..V {
                totals[v] = cast([to[v][0].0, to[v][1].0]);
            }
            let shifted = panel.grids.shifted();
            let (mut held, mut scales, mut shifts) =
                (usize::MAX, [_mm256_setzero_ps(); VECTORS], [_mm256_setzero_ps(); VECTORS]);
            let tile = x.of_tile::<$each, DIGITS, V>(panel.starts, first);
            let chunks = x.layout.run / EACH / PARTS;
            let runs = panel
                .packed
                .chunks(chunks * spread.chunk::<KIND>())
                .zip(tile.words.as_chunks::<PARTS>().0.chunks(chunks));
            let beside = tile.starts.iter().zip(tile.units).zip(tile.sums);
            for ((group, (codes, words)), ((starts, units), whole)) in x.layout.groups().zip(runs).zip(beside) {
                let group = panel.group + group;
                if group != held {
                    (held, scales) = (group, numbers(&panel.grids.scales, group));
                    shifts = shifts_of(panel, group, scales);
                }
                for some in 0..VECTORS / B {
                    let sums = $sums::<KIND, PARTS, DIGITS, V, B>(spread, codes, words, starts, some);
                    for b in 0..B {
                        let at = some * B + b;
                        for v in 0..V {
                            let mut of = [_mm256_setzero_si256(); DIGITS];
                            for digit in 0..DIGITS {
                                of[digit] = sums[digit][v][b];
                            }
                            let sum = join::<DIGITS, $bits>(of);
                            let scale = _mm256_mul_ps(scales[at], _mm256_set1_ps(units[v]));
                            totals[v][at] = _mm256_fmadd_ps(sum, scale, totals[v][at]);
                            if shifted {
                                totals[v][at] = _mm256_fmadd_ps(shifts[at], _mm256_set1_ps(whole[v]), totals[v][at]);
                            }
                        }
                    }
                }
            }
            for v in 0..V {
                let [lower, upper]: [[f32; LANES]; BANDS] = cast(totals[v]);
                to[v] = [Lanes(lower), Lanes(upper)];
            }
        }
    };
}

tile!(by_bytes, "avx2,fma,f16c,avxvnni", sums_of_bytes, 1, 8);
tile!(by_pairs, "avx2,fma,f16c", sums_of_pairs, 1, 8);
tile!(by_halves, "avx2,fma,f16c", sums_of_halves, 2, 12);
tile!(by_numbers, "avx2,fma,f16c", sums_of_numbers, 4, 0);

/// The sum of the products of all digits, of so many bits; of none if it is a number already.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn join<const DIGITS: usize, const BITS: i32>(of: [__m256i; DIGITS]) -> __m256 {
    if BITS == 0 {
        return _mm256_castsi256_ps(of[0]);
    }
    // All but the largest of three bytes fit 32 bits together, and all of two.
    let mut rest = of[DIGITS - 1];
    let apart = usize::from(DIGITS as i32 * BITS > 16);
    for digit in (apart..DIGITS - 1).rev() {
        rest = _mm256_add_epi32(_mm256_slli_epi32::<BITS>(of[digit]), rest);
    }
    if apart == 0 {
        return _mm256_cvtepi32_ps(rest);
    }
    let unit = _mm256_set1_ps((1 << (BITS as usize * (DIGITS - 1))) as f32);
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(of[0]), unit, _mm256_cvtepi32_ps(rest))
}

/// What codes of the rows of a panel count from the middle in a group of such scales, in numbers: zeros if there is nothing of the kind.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shifts_of(panel: &Panel<'_>, group: usize, scales: [__m256; VECTORS]) -> [__m256; VECTORS] {
    let Grids { zeros, offsets, .. } = panel.grids;
    let Some(zeros) = zeros.get(group) else { return numbers(offsets, group) };
    let mut shifts = scales;
    let middle = _mm256_set1_epi32(1 << (panel.bits - 1));
    for (shift, zeros) in shifts.iter_mut().zip(zeros.as_chunks().0) {
        let zeros = _mm256_cvtepu8_epi32(cast([*zeros, [0; ROWS]]));
        *shift = _mm256_mul_ps(*shift, _mm256_cvtepi32_ps(_mm256_sub_epi32(middle, zeros)));
    }
    shifts
}

/// Numbers of the rows of a panel; zeros if there are none at all.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn numbers(of: &Floats, group: usize) -> [__m256; VECTORS] {
    let mut numbers = [_mm256_setzero_ps(); VECTORS];
    match of {
        Floats::Half(all) => {
            let Some(of) = all.get(group) else { return numbers };
            for (to, of) in numbers.iter_mut().zip(of.reinterpret_cast().as_chunks::<ROWS>().0) {
                *to = _mm256_cvtph_ps(cast(*of));
            }
        }
        Floats::Wide(all) => {
            let Some(of) = all.get(group) else { return numbers };
            for (to, of) in numbers.iter_mut().zip(of.as_chunks::<ROWS>().0) {
                *to = cast(*of);
            }
        }
    }
    numbers
}
