//! Sums of the products of the codes of a run with the digits of inputs.

use std::arch::x86_64::*;

use super::Sums;
use super::spread::Spread;

/// Words of a lane: so many of each digit of V inputs.
type Words<const EACH: usize, const DIGITS: usize, const V: usize> = [[[i32; V]; EACH]; DIGITS];

/// Calls what is generic over the part for each lane that the bytes of a chunk have, one after the other: the registers hold
/// sums and little more.
macro_rules! parts {
    ($parts:expr, $add:ident::<$kind:ident, $($which:ident),*>$of:tt) => {
        $add::<$kind, 0, $($which),*>$of;
        if $parts > 1 {
            $add::<$kind, 1, $($which),*>$of;
        }
        if $parts > 2 {
            $add::<$kind, 2, $($which),*>$of;
            $add::<$kind, 3, $($which),*>$of;
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

/// A function that adds the products of one lane of all chunks, and how codes meet so many words of a digit.
macro_rules! add {
    ($name:ident, $features:literal, $each:literal, $product:ident) => {
        #[inline]
        #[target_feature(enable = $features)]
        fn $name<const KIND: u8, const PART: usize, const DIGITS: usize, const V: usize, const B: usize>(
            spread: &Spread,
            codes: &[u8],
            words: &[impl AsRef<[Words<$each, DIGITS, V>]>],
            some: usize,
            sums: &mut Sums<DIGITS, V, B>,
        ) {
            for (codes, words) in codes.chunks_exact(spread.chunk::<KIND>()).zip(words) {
                let (codes, words) = (spread.lanes::<KIND, PART, B>(codes, some), &words.as_ref()[PART]);
                for b in 0..B {
                    for digit in 0..DIGITS {
                        for v in 0..V {
                            let mut of = [_mm256_setzero_si256(); $each];
                            for at in 0..$each {
                                of[at] = _mm256_set1_epi32(words[digit][at][v]);
                            }
                            sums[digit][v][b] = $product(sums[digit][v][b], codes[b], of);
                        }
                    }
                }
            }
        }
    };
}

/// A function that finds the sums of a run, where products are added to those themselves.
macro_rules! sums {
    ($name:ident, $features:literal, $each:literal, $add:ident) => {
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn $name<const KIND: u8, const PARTS: usize, const DIGITS: usize, const V: usize, const B: usize>(
            spread: &Spread,
            codes: &[u8],
            words: &[[Words<$each, DIGITS, V>; PARTS]],
            starts: &[[i32; V]; DIGITS],
            some: usize,
        ) -> Sums<DIGITS, V, B> {
            let mut sums = begun(starts);
            parts!(PARTS, $add::<KIND, DIGITS, V, B>(spread, codes, words, some, &mut sums));
            sums
        }
    };
}

add!(add_bytes, "avx2,avxvnni", 1, fours);
add!(add_pairs, "avx2", 1, pairs);
add!(add_halves, "avx2", 2, halves);
sums!(sums_of_bytes, "avx2,avxvnni", 1, add_bytes);
sums!(sums_of_halves, "avx2", 2, add_halves);

/// Of four bytes, in 32 bits.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn fours(sum: __m256i, codes: __m256i, [word]: [__m256i; 1]) -> __m256i {
    _mm256_dpbusd_avx_epi32(sum, codes, word)
}

/// Of two bytes, in 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs(sum: __m256i, codes: __m256i, [word]: [__m256i; 1]) -> __m256i {
    _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, word))
}

/// Of four bytes with 16 bits: the first and the third of a row meet one word, and the others the next.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(sum: __m256i, codes: __m256i, [even, odd]: [__m256i; 2]) -> __m256i {
    let of_even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0xff)), even);
    let of_odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), odd);
    _mm256_add_epi32(sum, _mm256_add_epi32(of_even, of_odd))
}

/// Codes of less than eight bits: products of some chunks are added up in 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sums_of_pairs<const KIND: u8, const PARTS: usize, const DIGITS: usize, const V: usize, const B: usize>(
    spread: &Spread,
    codes: &[u8],
    words: &[[Words<1, DIGITS, V>; PARTS]],
    starts: &[[i32; V]; DIGITS],
    some: usize,
) -> Sums<DIGITS, V, B> {
    // So many pairs of products with a byte are less than 2¹⁵.
    let bits = if KIND == 0 { spread.bits } else { KIND };
    let together = (i16::MAX as usize / (2 * 128 * ((1 << bits) - 1)) / PARTS).max(1);
    let mut sums = begun(starts);
    for (codes, words) in codes.chunks(together * spread.chunk::<KIND>()).zip(words.chunks(together)) {
        let mut halves = begun(&[[0; V]; DIGITS]);
        parts!(PARTS, add_pairs::<KIND, DIGITS, V, B>(spread, codes, words, some, &mut halves));
        for digit in 0..DIGITS {
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
