//! Sums of the products of the codes of a run with the digits of inputs.

use std::arch::x86_64::*;

use super::Sums;
use super::spread::Spread;

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
pub(super) fn sums_of_bytes<const KIND: u8, const PARTS: usize, const V: usize, const B: usize>(
    spread: &Spread,
    codes: &[u8],
    words: &[[[[i32; V]; 3]; PARTS]],
    starts: &[[i32; V]; 3],
    some: usize,
) -> Sums<3, V, B> {
    let mut sums = begun(starts);
    parts!(PARTS, add_bytes::<KIND, V, B>(spread, codes, words, some, &mut sums));
    sums
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_bytes<const KIND: u8, const PART: usize, const V: usize, const B: usize>(
    spread: &Spread,
    codes: &[u8],
    words: &[impl AsRef<[[[i32; V]; 3]]>],
    some: usize,
    sums: &mut Sums<3, V, B>,
) {
    for (codes, words) in codes.chunks_exact(spread.chunk::<KIND>()).zip(words) {
        let (codes, words) = (spread.lanes::<KIND, PART, B>(codes, some), &words.as_ref()[PART]);
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
pub(super) fn sums_of_pairs<const KIND: u8, const PARTS: usize, const V: usize, const B: usize>(
    spread: &Spread,
    codes: &[u8],
    words: &[[[[i32; V]; 3]; PARTS]],
    starts: &[[i32; V]; 3],
    some: usize,
) -> Sums<3, V, B> {
    // So many pairs of products with a byte are less than 2¹⁵.
    let bits = if KIND == 0 { spread.bits } else { KIND };
    let together = (i16::MAX as usize / (2 * 128 * ((1 << bits) - 1)) / PARTS).max(1);
    let mut sums = begun(starts);
    for (codes, words) in codes.chunks(together * spread.chunk::<KIND>()).zip(words.chunks(together)) {
        let mut halves = begun(&[[0; V]; 3]);
        parts!(PARTS, add_pairs::<KIND, V, B>(spread, codes, words, some, &mut halves));
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
    spread: &Spread,
    codes: &[u8],
    words: &[impl AsRef<[[[i32; V]; 3]]>],
    some: usize,
    halves: &mut Sums<3, V, B>,
) {
    for (codes, words) in codes.chunks_exact(spread.chunk::<KIND>()).zip(words) {
        let (codes, words) = (spread.lanes::<KIND, PART, B>(codes, some), &words.as_ref()[PART]);
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
pub(super) fn sums_of_twelve<const KIND: u8, const PARTS: usize, const V: usize, const B: usize>(
    spread: &Spread,
    codes: &[u8],
    words: &[[[[i32; V]; 4]; PARTS]],
    starts: &[[i32; V]; 2],
    some: usize,
) -> Sums<2, V, B> {
    let mut sums = begun(starts);
    parts!(PARTS, add_twelve::<KIND, V, B>(spread, codes, words, some, &mut sums));
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_twelve<const KIND: u8, const PART: usize, const V: usize, const B: usize>(
    spread: &Spread,
    codes: &[u8],
    words: &[impl AsRef<[[[i32; V]; 4]]>],
    some: usize,
    sums: &mut Sums<2, V, B>,
) {
    for (codes, words) in codes.chunks_exact(spread.chunk::<KIND>()).zip(words) {
        let (codes, words) = (spread.lanes::<KIND, PART, B>(codes, some), &words.as_ref()[PART]);
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
