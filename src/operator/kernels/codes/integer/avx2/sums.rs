//! Sums of the products of the codes of a run with the digits of inputs.

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::EACH;
use super::spread::{Spread, next};
use super::{Sums, numbers_from_the_middle};

/// Words of a lane: so many of each digit of V inputs.
type Words<const EACH: usize, const DIGITS: usize, const V: usize> = [[[i32; V]; EACH]; DIGITS];

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

/// A function that adds the products of some chunks, and how codes meet so many words of a digit.
macro_rules! add {
    ($name:ident, $features:literal, $each:literal, $product:ident) => {
        #[inline]
        #[target_feature(enable = $features)]
        fn $name<const KIND: u8, const PARTS: usize, const DIGITS: usize, const V: usize, const B: usize>(
            spread: &Spread,
            codes: &[u8],
            words: &[[Words<$each, DIGITS, V>; PARTS]],
            some: usize,
            sums: &mut Sums<DIGITS, V, B>,
        ) {
            for (codes, words) in codes.chunks_exact(spread.chunk::<KIND>()).zip(words) {
                let mut vectors = spread.load::<KIND, B>(codes, some);
                for words in words {
                    let codes = next::<KIND, B>(&mut vectors);
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
            $add::<KIND, PARTS, DIGITS, V, B>(spread, codes, words, some, &mut sums);
            sums
        }
    };
}

add!(add_bytes, "avx2,avxvnni", 1, fours);
add!(add_pairs, "avx2", 1, pairs);
add!(add_halves, "avx2", 2, halves);
sums!(sums_of_bytes, "avx2,avxvnni", 1, add_bytes);
sums!(sums_of_halves, "avx2", 2, add_halves);

/// A vector of which the compiler knows no more than that: sums of integers it may add up in any order, and would keep the products of many lanes, for
/// which there are no registers (1.6 times the time).
#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn settled(mut sum: __m256i) -> __m256i {
    // SAFETY: there are no instructions.
    unsafe { asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags)) };
    sum
}

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
    settled(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, word)))
}

/// Of four bytes with 16 bits: the first and the third of a row meet one word, and the others the next.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(sum: __m256i, codes: __m256i, [even, odd]: [__m256i; 2]) -> __m256i {
    let of_even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0xff)), even);
    let of_odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(codes), odd);
    settled(_mm256_add_epi32(sum, _mm256_add_epi32(of_even, of_odd)))
}

/// Codes as numbers, column by column with the numbers of inputs, which are as much smaller as codes lie above the lowest bits of theirs.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn sums_of_numbers<
    const KIND: u8,
    const PARTS: usize,
    const DIGITS: usize,
    const V: usize,
    const B: usize,
>(
    spread: &Spread,
    codes: &[u8],
    words: &[[Words<EACH, DIGITS, V>; PARTS]],
    starts: &[[i32; V]; DIGITS],
    some: usize,
) -> Sums<DIGITS, V, B> {
    let mut sums = begun(starts);
    // (The compiler makes other instructions of masks that it knows, which take 3 % longer.)
    let (mut masks, middle) = ([_mm256_setzero_si256(); PARTS], _mm256_set1_ps(spread.middle()));
    for (part, mask) in masks.iter_mut().enumerate() {
        *mask = settled(_mm256_set1_epi32((u8::MAX as i32 >> (8 - 8 / PARTS)) << (8 / PARTS * part)));
    }
    for (codes, words) in codes.chunks_exact(spread.chunk::<KIND>()).zip(words) {
        let vectors = spread.load::<KIND, B>(codes, some);
        for at in 0..EACH {
            let bytes = spread.byte::<KIND, B>(codes, some, at, &vectors);
            for (part, words) in words.iter().enumerate() {
                let mut numbers = [_mm256_setzero_ps(); B];
                for b in 0..B {
                    // (Above the last byte there is nothing.)
                    let whole = PARTS == 1 && at + 1 == EACH;
                    let code = if whole { bytes[b] } else { _mm256_and_si256(bytes[b], masks[part]) };
                    numbers[b] = _mm256_cvtepi32_ps(code);
                    if numbers_from_the_middle(PARTS) {
                        numbers[b] = _mm256_sub_ps(numbers[b], middle);
                    }
                }
                meet(&numbers, &words[0][at], &mut sums[0]);
            }
        }
    }
    sums
}

/// Adds the products of numbers of B vectors of rows with one of each of V inputs, which is read when its turn comes: the compiler would read
/// many beforehand, for which there are no registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
#[allow(unsafe_code)]
fn meet<const V: usize, const B: usize>(numbers: &[__m256; B], with: &[i32; V], sums: &mut [[__m256i; B]; V]) {
    macro_rules! meet {
        ($([$number:ident $b:literal])*: $([$v:literal: $($sum:ident $of:ident $at:literal),*])*) => {
            // SAFETY: the machine has the instructions, or this function would not be called. What is read are the V numbers of an array,
            // each by itself; nothing is written but registers.
            unsafe {
                asm!(
                    $(
                        concat!("vbroadcastss {one}, dword ptr [{with} + 4 * ", $v, "]"),
                        $(concat!("vfmadd231ps {", stringify!($sum), "}, {", stringify!($of), "}, {one}"),)*
                    )*
                    one = out(ymm_reg) _,
                    with = in(reg) with,
                    $($number = in(ymm_reg) numbers[$b],)*
                    $($($sum = inout(ymm_reg) sums[$v][$at],)*)*
                    options(readonly, nostack, preserves_flags)
                )
            }
        };
    }
    match (V, B) {
        (2, _) => meet!([n0 0] [n1 1] [n2 2] [n3 3]:
            [0: a0 n0 0, a1 n1 1, a2 n2 2, a3 n3 3] [1: b0 n0 0, b1 n1 1, b2 n2 2, b3 n3 3]),
        (3, _) => meet!([n0 0] [n1 1]: [0: a0 n0 0, a1 n1 1] [1: b0 n0 0, b1 n1 1] [2: c0 n0 0, c1 n1 1]),
        (4, _) => meet!([n0 0] [n1 1]:
            [0: a0 n0 0, a1 n1 1] [1: b0 n0 0, b1 n1 1] [2: c0 n0 0, c1 n1 1] [3: d0 n0 0, d1 n1 1]),
        _ => meet!([n0 0] [n1 1]:
            [0: a0 n0 0, a1 n1 1] [1: b0 n0 0, b1 n1 1] [2: c0 n0 0, c1 n1 1] [3: d0 n0 0, d1 n1 1]
            [4: e0 n0 0, e1 n1 1]),
    }
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
    let (mut codes, mut words) = (codes, words);
    // The first chunks are often all (of a run of 32 columns with up to 4 bits): sums begin when theirs are known, and do not wait for them in
    // registers.
    let first = next_pairs::<KIND, PARTS, DIGITS, V, B>(spread, &mut codes, &mut words, some);
    let mut sums = begun(starts);
    widen(&mut sums, &first);
    while !codes.is_empty() && !words.is_empty() {
        let of = next_pairs::<KIND, PARTS, DIGITS, V, B>(spread, &mut codes, &mut words, some);
        widen(&mut sums, &of);
    }
    sums
}

/// The sums of pairs of the next chunks, which are taken off.
#[inline]
#[target_feature(enable = "avx2")]
fn next_pairs<'a, const KIND: u8, const PARTS: usize, const DIGITS: usize, const V: usize, const B: usize>(
    spread: &Spread,
    codes: &mut &'a [u8],
    words: &mut &'a [[Words<1, DIGITS, V>; PARTS]],
    some: usize,
) -> Sums<DIGITS, V, B> {
    let (of_codes, codes_after) = codes.split_at(codes.len().min(spread.together * spread.chunk::<KIND>()));
    let (of_words, words_after) = words.split_at(words.len().min(spread.together));
    (*codes, *words) = (codes_after, words_after);
    let mut sums = begun(&[[0; V]; DIGITS]);
    add_pairs::<KIND, PARTS, DIGITS, V, B>(spread, of_codes, of_words, some, &mut sums);
    sums
}

/// Adds sums in 16 bits to those in 32.
#[inline]
#[target_feature(enable = "avx2")]
fn widen<const DIGITS: usize, const V: usize, const B: usize>(to: &mut Sums<DIGITS, V, B>, of: &Sums<DIGITS, V, B>) {
    for digit in 0..DIGITS {
        for v in 0..V {
            for b in 0..B {
                let wide = _mm256_madd_epi16(of[digit][v][b], _mm256_set1_epi16(1));
                to[digit][v][b] = _mm256_add_epi32(to[digit][v][b], wide);
            }
        }
    }
}
