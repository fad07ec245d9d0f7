//! Inputs in digits, laid out for vectors of eight rows.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::super::super::layout::{Layout, largest, sum};
use super::super::inputs::Tile;
use super::super::{EACH, LANES, padded};
use super::{Digits, numbers_from_the_middle};

/// Lays a tile out, in which a missing input has no numbers.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn lay_out<const V: usize>(digits: Digits, layout: &Layout, tile: Tile<'_>, x: &[&[f32]]) {
    if let Digits::Numbers(_) = digits {
        return lay_out_numbers::<V>(digits, layout, tile, x);
    }
    let (cut, words) = (Cut::new(digits, layout.parts), digits.words());
    let runs = tile.limbs.as_chunks_mut::<V>().0.chunks_mut(layout.run / EACH * words);
    let beside = tile.units.as_chunks_mut::<V>().0.iter_mut().zip(tile.sums.as_chunks_mut::<V>().0);
    let less = tile.less.as_chunks_mut::<V>().0.chunks_mut(digits.count());
    for (run, ((to, less), (units, sums))) in runs.zip(less).zip(beside).enumerate() {
        for (v, x) in x.iter().enumerate().take(V) {
            let x = layout.of_run(run, x);
            units[v] = digits.activations().unit(largest(x));
            let mut total = _mm256_setzero_si256();
            for (step, to) in to[..layout.lanes(run) * words].chunks_mut(LANES / EACH * words).enumerate() {
                let halves = cut.split(x.get(step * LANES..).unwrap_or_default(), units[v]);
                for half in halves {
                    total = _mm256_add_epi32(total, cut.totals(half));
                }
                let lanes: [[i32; EACH]; LANES / EACH] = cast(halves);
                for (to, of) in to.chunks_mut(words).zip(lanes) {
                    to.iter_mut().zip(of).for_each(|(to, word)| to[v] = word);
                }
            }
            let [lower, upper]: [[i32; EACH]; 2] = cast(total);
            let of_words: [i32; EACH] = std::array::from_fn(|word| lower[word].wrapping_add(upper[word]));
            let totals = match digits {
                Digits::Twelve => [of_words[0].wrapping_add(of_words[1]), of_words[2].wrapping_add(of_words[3]), 0],
                Digits::Sixteen => [of_words[0].wrapping_add(of_words[1]), 0, 0],
                _ => [of_words[0], of_words[1], of_words[2]],
            };
            let totals = &totals[..digits.count()];
            sums[v] = sum(totals, digits.bits(), units[v]);
            less.iter_mut().zip(totals).for_each(|(less, total)| less[v] = -total);
        }
    }
}

/// The same of numbers in units, which are smaller by as much as their codes lie above the lowest bits of a byte.
#[target_feature(enable = "avx2")]
fn lay_out_numbers<const V: usize>(digits: Digits, layout: &Layout, tile: Tile<'_>, x: &[&[f32]]) {
    let (mut places, mut shares) = ([0; LANES], [0.0; LANES]);
    for (place, column) in Cut::new(digits, layout.parts).columns.into_iter().enumerate() {
        places[column] = place;
        shares[column] = 1.0 / (1 << (place / EACH % layout.parts * (8 / layout.parts))) as f32;
    }
    let runs = tile.limbs.as_chunks_mut::<V>().0.chunks_mut(layout.run);
    let beside = tile.units.as_chunks_mut::<V>().0.iter_mut().zip(tile.sums.as_chunks_mut::<V>().0);
    for (run, ((to, less), (units, sums))) in runs.zip(tile.less.as_chunks_mut::<V>().0).zip(beside).enumerate() {
        for (v, x) in x.iter().enumerate().take(V) {
            let x = layout.of_run(run, x);
            units[v] = digits.activations().unit(largest(x));
            let (inverse, mut totals) = (units[v].recip(), [0.0; LANES]);
            for (step, to) in to[..layout.lanes(run) * EACH].chunks_mut(LANES).enumerate() {
                let rest = x.get(step * LANES..).unwrap_or_default();
                let mut numbers = rest.first_chunk().copied().unwrap_or_else(|| padded(rest));
                for at in 0..LANES {
                    numbers[at] *= inverse;
                    totals[at] += numbers[at];
                    numbers[at] *= shares[at];
                }
                for (number, place) in numbers.into_iter().zip(places) {
                    to.get_mut(place).into_iter().for_each(|to| to[v] = cast(number));
                }
            }
            let total: f32 = totals.iter().sum();
            sums[v] = total * units[v];
            less[v] = cast(if numbers_from_the_middle(layout.parts) { 0.0 } else { -total });
        }
    }
}

/// Where the bytes of four columns go, for one byte of each, two and three: the largest of all first.
const ORDERS: [[u8; 16]; 3] = {
    let mut orders = [[128; 16]; 3];
    let mut at = 0;
    while at < 3 * 3 * EACH {
        let (bytes, byte, column) = (at / (3 * EACH) + 1, at / EACH % 3, at % EACH);
        if byte < bytes {
            orders[bytes - 1][byte * EACH + column] = (column * EACH + bytes - 1 - byte) as u8;
        }
        at += 1;
    }
    orders
};

/// Cuts numbers of a layout.
struct Cut {
    digits: Digits,
    /// The columns of four lanes, in the order in which they lie in words.
    columns: [usize; LANES],
}

impl Cut {
    fn new(digits: Digits, parts: usize) -> Self {
        let columns = std::array::from_fn(|at| {
            let (lane, at) = (at / EACH, at % EACH);
            // Of four, the first and the third share a word, if digits take half of one.
            let at = if matches!(digits, Digits::Twelve | Digits::Sixteen) { at % 2 * 2 + at / 2 } else { at };
            lane / parts * EACH * parts + at * parts + lane % parts
        });
        Cut { digits, columns }
    }

    /// The words of the first 16 of some inputs, of a lane after the other, four each; zeros where there are none.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn split(&self, x: &[f32], unit: f32) -> [__m256i; 2] {
        let sixteen = self.columns.map(|column| x.get(column).copied().unwrap_or_default());
        let halves: [__m256; 2] = cast(sixteen);
        let scale = _mm256_set1_ps(unit.recip());
        let mut words = [_mm256_setzero_si256(); 2];
        for (words, half) in words.iter_mut().zip(halves) {
            let whole = _mm256_cvtps_epi32(_mm256_mul_ps(half, scale));
            *words = match self.digits {
                Digits::Twelve => {
                    let large = _mm256_srai_epi32::<12>(_mm256_add_epi32(whole, _mm256_set1_epi32(1 << 11)));
                    _mm256_packs_epi32(large, _mm256_sub_epi32(whole, _mm256_slli_epi32::<12>(large)))
                }
                // (Numbers are no digits, and are not cut.)
                Digits::Sixteen | Digits::Numbers(_) => _mm256_packs_epi32(whole, _mm256_setzero_si256()),
                Digits::Bytes(of) | Digits::Pairs(of) => {
                    // With half of its range added to each digit, digits count from nothing, each by itself; without it they
                    // have signs again.
                    let middle = _mm256_set1_epi32(0x0080_8080);
                    let bytes = _mm256_xor_si256(_mm256_add_epi32(whole, middle), middle);
                    _mm256_shuffle_epi8(bytes, cast([ORDERS[of.bytes() - 1]; 2]))
                }
            };
        }
        words
    }

    /// What the digits of each word add up to.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn totals(&self, words: __m256i) -> __m256i {
        let halves = match self.digits {
            Digits::Twelve | Digits::Sixteen => words,
            _ => _mm256_maddubs_epi16(_mm256_set1_epi8(1), words),
        };
        _mm256_madd_epi16(halves, _mm256_set1_epi16(1))
    }
}
