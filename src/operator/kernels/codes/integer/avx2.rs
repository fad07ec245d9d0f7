//! Products with codes in integers by vectors of eight rows: AVX2, with AVX-VNNI where there is that.
//!
//! Codes of 8, 4 and 2 bits lie in the order that wider vectors take, of which each is two here. Inputs are in fixed point too, in
//! digits that the machine has products for ([`Digits`]).

use std::arch::x86_64::*;

use half::f16;
use pulp::bytemuck::cast;

use super::super::packed::{Floats, Grids};
use super::inputs::Inputs;
use super::panel::Lanes;
use super::vectors::Panel;
use super::{BANDS, LANES, LINE, PANEL, TOGETHER};
use crate::simd::prefetch;

mod cut;

pub(super) use self::cut::lay_out;

/// Rows in a vector, and vectors of the rows of a panel.
const ROWS: usize = 8;
const VECTORS: usize = PANEL / ROWS;
/// Bytes between what is multiplied and what is asked for.
const AHEAD: usize = 1536;

/// Digits that inputs are cut into.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Digits {
    /// Three signed bytes, of which four meet their codes in one instruction (AVX-VNNI).
    Bytes,
    /// The same for codes of few bits: pairs of products are added up in 16 bits.
    Pairs,
    /// Two of twelve bits, in 16: for codes with which pairs of bytes would not fit those.
    Twelve,
}

impl Digits {
    /// What serves such codes on this machine, the fastest first.
    pub(super) fn all(bits: u8) -> impl Iterator<Item = Self> {
        let fits = match bits {
            8 => Some(Digits::Twelve),
            2 | 4 => Some(Digits::Pairs),
            _ => None,
        };
        let all = [fits.filter(|_| dots()).map(|_| Digits::Bytes), fits.filter(|_| available())];
        all.into_iter().flatten()
    }

    /// Their number, and the bits of each.
    pub(super) fn count(self) -> usize {
        if self == Digits::Twelve { 2 } else { 3 }
    }
    pub(super) fn bits(self) -> u32 {
        if self == Digits::Twelve { 12 } else { 8 }
    }

    /// Inputs for which this is faster than to write rows out, at most.
    pub(super) fn most(self) -> usize {
        if self == Digits::Bytes { usize::MAX } else { 32 }
    }

    /// Words of 32 bits in which the digits of four columns lie.
    pub(super) fn words(self) -> usize {
        if self == Digits::Twelve { 4 } else { 3 }
    }
}

/// Whether the machine has what all functions here ask for.
fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Whether it has products of four bytes at a time, besides.
fn dots() -> bool {
    available() && is_x86_feature_detected!("avxvnni") && std::env::var_os("WP_PLAIN").is_none()
}

/// The bytes of a chunk of columns, eight rows after the others.
type Chunk = [[u8; 4 * ROWS]; VECTORS];
/// Sums of the products of digits with some inputs, for some vectors of rows.
type Sums<const DIGITS: usize, const V: usize, const B: usize> = [[[__m256i; B]; V]; DIGITS];

/// Sixteen chunks of 32 bits of all rows of a panel as the rows have them; `None` without the instructions.
pub(super) fn lines(chunks: &[u8; LINE * PANEL]) -> Option<[[u8; LINE]; PANEL]> {
    // SAFETY: the machine has the instructions, as is asked.
    #[allow(unsafe_code)]
    available().then(|| unsafe { squares(pulp::bytemuck::cast_ref(chunks)) })
}

/// The same by squares of eight.
#[target_feature(enable = "avx2")]
fn squares(chunks: &[[Chunk; ROWS]; LINE / (4 * ROWS)]) -> [[u8; LINE]; PANEL] {
    let mut lines = [[0; LINE]; PANEL];
    for (at, chunks) in chunks.iter().enumerate() {
        for vector in 0..VECTORS {
            let rows = turned(std::array::from_fn(|chunk| cast(chunks[chunk][vector])));
            for (line, row) in lines[vector * ROWS..].iter_mut().zip(rows) {
                let row: [u8; 4 * ROWS] = cast(row);
                line[at * 4 * ROWS..][..4 * ROWS].copy_from_slice(&row);
            }
        }
    }
    lines
}

/// Turns a square around: vector i of the result has element i of each.
#[inline]
#[target_feature(enable = "avx2")]
fn turned(rows: [__m256i; ROWS]) -> [__m256i; ROWS] {
    let mut pairs = rows;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Element c of half j of `fours[4q + c]` is column 4j + c of the rows from 4q on.
    let mut fours = pairs;
    for q in 0..2 {
        fours[4 * q] = _mm256_unpacklo_epi64(pairs[4 * q], pairs[4 * q + 2]);
        fours[4 * q + 1] = _mm256_unpackhi_epi64(pairs[4 * q], pairs[4 * q + 2]);
        fours[4 * q + 2] = _mm256_unpacklo_epi64(pairs[4 * q + 1], pairs[4 * q + 3]);
        fours[4 * q + 3] = _mm256_unpackhi_epi64(pairs[4 * q + 1], pairs[4 * q + 3]);
    }
    let mut columns = fours;
    for c in 0..4 {
        columns[c] = _mm256_permute2x128_si256::<0x20>(fours[c], fours[4 + c]);
        columns[4 + c] = _mm256_permute2x128_si256::<0x31>(fours[c], fours[4 + c]);
    }
    columns
}

/// Adds the products of a panel with all inputs.
pub(super) fn multiply(digits: Digits, panel: &Panel<'_>, x: &Inputs, totals: &mut [[Lanes<f32>; BANDS]]) {
    for (first, count) in x.tiles() {
        let Some(totals) = totals.get_mut(first..) else { return };
        match panel.bits {
            8 => few::<8, 1>(digits, panel, x, (first, count), totals),
            4 => few::<4, 2>(digits, panel, x, (first, count), totals),
            _ => few::<2, 4>(digits, panel, x, (first, count), totals),
        }
    }
}

/// With a tile of inputs: the fewer there are, the more rows at a time, so that sums fill the registers.
fn few<const KIND: u8, const PARTS: usize>(
    digits: Digits,
    panel: &Panel<'_>,
    x: &Inputs,
    (first, count): (usize, usize),
    totals: &mut [[Lanes<f32>; BANDS]],
) {
    // SAFETY: inputs are laid out in such digits where the machine has the instructions for them: `Digits::all` asks.
    #[allow(unsafe_code)]
    unsafe {
        match (digits, count) {
            (Digits::Bytes, 1) => by_bytes::<KIND, PARTS, 1, 4>(panel, x, first, totals),
            (Digits::Bytes, 2) => by_bytes::<KIND, PARTS, 2, 2>(panel, x, first, totals),
            (Digits::Bytes, _) => by_bytes::<KIND, PARTS, TOGETHER, 1>(panel, x, first, totals),
            (Digits::Pairs, 1) => by_pairs::<KIND, PARTS, 1, 2>(panel, x, first, totals),
            (Digits::Pairs, 2) => by_pairs::<KIND, PARTS, 2, 2>(panel, x, first, totals),
            (Digits::Pairs, _) => by_pairs::<KIND, PARTS, TOGETHER, 1>(panel, x, first, totals),
            (Digits::Twelve, 1) => by_twelve::<KIND, PARTS, 1, 4>(panel, x, first, totals),
            (Digits::Twelve, 2) => by_twelve::<KIND, PARTS, 2, 2>(panel, x, first, totals),
            (Digits::Twelve, _) => by_twelve::<KIND, PARTS, TOGETHER, 1>(panel, x, first, totals),
        }
    }
}

/// A function that adds the products of a panel with V inputs from one on, B vectors of rows at a time.
macro_rules! tile {
    ($name:ident, $features:literal, $sums:ident, $digits:literal, $words:literal, $bits:literal) => {
        #[target_feature(enable = $features)]
        fn $name<const KIND: u8, const PARTS: usize, const V: usize, const B: usize>(
            panel: &Panel<'_>,
            x: &Inputs,
            first: usize,
            totals: &mut [[Lanes<f32>; BANDS]],
        ) {
            let Some(to) = totals.first_chunk_mut::<V>() else { return };
            let mut totals: [[__m256; VECTORS]; V] = to.map(|of| cast(of.map(|band| band.0)));
            let mut codes: &[Chunk] = panel.packed.as_chunks().0.as_chunks().0;
            for number in 0..x.layout.runs() {
                let Some((of_run, rest)) = codes.split_at_checked(x.layout.lanes(number) / PARTS) else { return };
                codes = rest;
                let words = x.words::<$words, V>(number, first).as_chunks::<PARTS>().0;
                let Some(starts) = x.begin::<$digits, V>(panel.starts, number, first) else { return };
                let (units, whole) = x.beside(number, first, V);
                let group = panel.group + x.layout.group_of(number);
                for some in 0..VECTORS / B {
                    let sums = $sums::<KIND, PARTS, V, B>(of_run, words, starts, some);
                    for b in 0..B {
                        let at = some * B + b;
                        let (scales, shift) = scaling(panel, group, at);
                        for v in 0..V {
                            let mut of = [_mm256_setzero_si256(); $digits];
                            for digit in 0..$digits {
                                of[digit] = sums[digit][v][b];
                            }
                            let sum = join::<$digits, $bits>(of);
                            let scale = _mm256_mul_ps(scales, _mm256_set1_ps(units[v]));
                            let total = _mm256_fmadd_ps(sum, scale, totals[v][at]);
                            totals[v][at] = _mm256_fmadd_ps(shift, _mm256_set1_ps(whole[v]), total);
                        }
                    }
                }
            }
            *to = totals.map(|of| cast::<_, [[f32; LANES]; BANDS]>(of).map(Lanes));
        }
    };
}

tile!(by_bytes, "avx2,fma,f16c,avxvnni", sums_of_bytes, 3, 3, 8);
tile!(by_pairs, "avx2,fma,f16c", sums_of_pairs, 3, 3, 8);
tile!(by_twelve, "avx2,fma,f16c", sums_of_twelve, 2, 4, 12);

/// Calls what is generic over the part for each lane that the bytes of a chunk have, one after the other: the registers hold
/// sums and little more.
macro_rules! parts {
    ($parts:expr, $add:ident::<$kind:ident, $v:ident, $b:ident>($($of:expr),*)) => {
        $add::<$kind, 0, $v, $b>($($of),*);
        if $parts > 1 {
            $add::<$kind, 1, $v, $b>($($of),*);
        }
        if $parts > 2 {
            $add::<$kind, 2, $v, $b>($($of),*);
            $add::<$kind, 3, $v, $b>($($of),*);
        }
    };
}

/// A lane of some vectors of a chunk, in bytes; and with the first what comes so much later is asked for.
#[inline]
#[target_feature(enable = "avx2")]
fn lanes<const KIND: u8, const PART: usize, const B: usize>(chunk: &Chunk, some: usize) -> [__m256i; B] {
    if PART == 0 && some == 0 {
        prefetch(&chunk[0], AHEAD);
        prefetch(&chunk[0], AHEAD + LINE);
    }
    let mut codes: [__m256i; B] = chunk.as_chunks().0[some].map(cast::<[u8; 4 * ROWS], _>);
    for codes in &mut codes {
        if PART > 0 {
            *codes = _mm256_srlv_epi32(*codes, _mm256_set1_epi32(i32::from(KIND) * PART as i32));
        }
        if KIND < 8 {
            *codes = _mm256_and_si256(*codes, _mm256_set1_epi8((1 << KIND) - 1));
        }
    }
    codes
}

/// What sums begin with.
#[inline]
#[target_feature(enable = "avx2")]
fn begun<const DIGITS: usize, const V: usize, const B: usize>(starts: &[[i32; V]; DIGITS]) -> Sums<DIGITS, V, B> {
    let mut sums = [[[_mm256_setzero_si256(); B]; V]; DIGITS];
    for digit in 0..DIGITS {
        for v in 0..V {
            sums[digit][v] = [_mm256_set1_epi32(starts[digit][v]); B];
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn sums_of_bytes<const KIND: u8, const PARTS: usize, const V: usize, const B: usize>(
    codes: &[Chunk],
    words: &[[[[i32; V]; 3]; PARTS]],
    starts: &[[i32; V]; 3],
    some: usize,
) -> Sums<3, V, B> {
    let mut sums = begun(starts);
    parts!(PARTS, add_bytes::<KIND, V, B>(codes, words, some, &mut sums));
    sums
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_bytes<const KIND: u8, const PART: usize, const V: usize, const B: usize>(
    codes: &[Chunk],
    words: &[impl AsRef<[[[i32; V]; 3]]>],
    some: usize,
    sums: &mut Sums<3, V, B>,
) {
    for (codes, words) in codes.iter().zip(words) {
        let (codes, words) = (lanes::<KIND, PART, B>(codes, some), &words.as_ref()[PART]);
        for b in 0..B {
            for digit in 0..3 {
                for v in 0..V {
                    let input = _mm256_set1_epi32(words[digit][v]);
                    sums[digit][v][b] = _mm256_dpbusd_avx_epi32(sums[digit][v][b], codes[b], input);
                }
            }
        }
    }
}

/// Codes of less than eight bits: products of some chunks are added up in 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_pairs<const KIND: u8, const PARTS: usize, const V: usize, const B: usize>(
    codes: &[Chunk],
    words: &[[[[i32; V]; 3]; PARTS]],
    starts: &[[i32; V]; 3],
    some: usize,
) -> Sums<3, V, B> {
    // Of two products with a byte: 8·2·15·128 and 40·2·3·128 are less than 2¹⁵.
    let together = if KIND == 4 { 8 / PARTS } else { 40 / PARTS };
    let mut sums = begun(starts);
    for (codes, words) in codes.chunks(together).zip(words.chunks(together)) {
        let mut halves = begun(&[[0; V]; 3]);
        parts!(PARTS, add_pairs::<KIND, V, B>(codes, words, some, &mut halves));
        for digit in 0..3 {
            for v in 0..V {
                for b in 0..B {
                    let of_four = _mm256_madd_epi16(halves[digit][v][b], _mm256_set1_epi16(1));
                    sums[digit][v][b] = _mm256_add_epi32(sums[digit][v][b], of_four);
                }
            }
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_pairs<const KIND: u8, const PART: usize, const V: usize, const B: usize>(
    codes: &[Chunk],
    words: &[impl AsRef<[[[i32; V]; 3]]>],
    some: usize,
    halves: &mut Sums<3, V, B>,
) {
    for (codes, words) in codes.iter().zip(words) {
        let (codes, words) = (lanes::<KIND, PART, B>(codes, some), &words.as_ref()[PART]);
        for b in 0..B {
            for digit in 0..3 {
                for v in 0..V {
                    let input = _mm256_set1_epi32(words[digit][v]);
                    let of_two = _mm256_maddubs_epi16(codes[b], input);
                    halves[digit][v][b] = _mm256_add_epi16(halves[digit][v][b], of_two);
                }
            }
        }
    }
}

/// Codes of eight bits: of the four of a row the first and the third meet the words of these, and so do the others.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_twelve<const KIND: u8, const PARTS: usize, const V: usize, const B: usize>(
    codes: &[Chunk],
    words: &[[[[i32; V]; 4]; PARTS]],
    starts: &[[i32; V]; 2],
    some: usize,
) -> Sums<2, V, B> {
    let mut sums = begun(starts);
    parts!(PARTS, add_twelve::<KIND, V, B>(codes, words, some, &mut sums));
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_twelve<const KIND: u8, const PART: usize, const V: usize, const B: usize>(
    codes: &[Chunk],
    words: &[impl AsRef<[[[i32; V]; 4]]>],
    some: usize,
    sums: &mut Sums<2, V, B>,
) {
    for (codes, words) in codes.iter().zip(words) {
        let (codes, words) = (lanes::<KIND, PART, B>(codes, some), &words.as_ref()[PART]);
        for b in 0..B {
            let (even, odd) = (_mm256_and_si256(codes[b], _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(codes[b]));
            for digit in 0..2 {
                for v in 0..V {
                    let of_even = _mm256_madd_epi16(even, _mm256_set1_epi32(words[2 * digit][v]));
                    let of_odd = _mm256_madd_epi16(odd, _mm256_set1_epi32(words[2 * digit + 1][v]));
                    let of_four = _mm256_add_epi32(of_even, of_odd);
                    sums[digit][v][b] = _mm256_add_epi32(sums[digit][v][b], of_four);
                }
            }
        }
    }
}

/// The sum of the products of all digits, of so many bits.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn join<const DIGITS: usize, const BITS: i32>(of: [__m256i; DIGITS]) -> __m256 {
    // All but the largest fit 32 bits together.
    let mut rest = of[DIGITS - 1];
    for digit in (1..DIGITS - 1).rev() {
        rest = _mm256_add_epi32(_mm256_slli_epi32::<BITS>(of[digit]), rest);
    }
    let unit = _mm256_set1_ps((1 << (BITS as usize * (DIGITS - 1))) as f32);
    _mm256_fmadd_ps(_mm256_cvtepi32_ps(of[0]), unit, _mm256_cvtepi32_ps(rest))
}

/// What makes numbers of the sums of eight rows in a group: scales, and what codes count from the middle; zeros if there is no
/// such group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaling(panel: &Panel<'_>, group: usize, at: usize) -> (__m256, __m256) {
    let Grids { scales, zeros, offsets } = panel.grids;
    let scales = numbers(scales, group, at);
    let Some(zeros) = zeros.get(group) else { return (scales, numbers(offsets, group, at)) };
    let zeros: &[[u8; ROWS]] = zeros.as_chunks().0;
    let zeros = _mm256_cvtepu8_epi32(cast([zeros[at], [0; ROWS]]));
    let middle = _mm256_sub_epi32(_mm256_set1_epi32(1 << (panel.bits - 1)), zeros);
    (scales, _mm256_mul_ps(scales, _mm256_cvtepi32_ps(middle)))
}

/// Those of eight rows; zeros if there are none at all.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn numbers(of: &Floats, group: usize, at: usize) -> __m256 {
    match of {
        Floats::Half(all) => all.get(group).map_or(_mm256_setzero_ps(), |of| {
            let of: &[[f16; ROWS]] = of.as_chunks().0;
            _mm256_cvtph_ps(cast(of[at].map(f16::to_bits)))
        }),
        Floats::Wide(all) => all.get(group).map_or(_mm256_setzero_ps(), |of| {
            let of: &[[f32; ROWS]] = of.as_chunks().0;
            cast(of[at])
        }),
    }
}
