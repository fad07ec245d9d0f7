//! Inputs in fixed point, one beside the other, as vectors of codes meet them: words of a lane and a byte of all inputs of a tile.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::super::layout::sum;
use super::digits::{Cut, largest, moduli};
use super::inputs::Tile;
use super::way::Layout;
use super::{ActivationBits, EACH, LANES};

/// Vectors of a step of sixteen columns, at most: four words of each of eight inputs, or twelve of each of four.
const WORDS: usize = 4;
/// Steps of the longest run.
const STEPS: usize = ActivationBits::TwentyFour.longest() / LANES;

/// Lays a tile out, in which a missing input has no numbers. (All that products read is written, as it was not empty.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
pub(super) fn lay_out(activations: ActivationBits, layout: &Layout, count: usize, tile: Tile<'_>, x: &[&[f32]]) {
    use ActivationBits::{Eight, Sixteen, TwentyFour};
    match (activations, count) {
        (Eight, 1) => lay_out_tile::<1, 1>(activations, layout, tile, x),
        (Eight, 2) => lay_out_tile::<1, 2>(activations, layout, tile, x),
        (Eight, 4) => lay_out_tile::<1, 4>(activations, layout, tile, x),
        (Eight, _) => lay_out_tile::<1, 8>(activations, layout, tile, x),
        (Sixteen, 1) => lay_out_tile::<2, 1>(activations, layout, tile, x),
        (Sixteen, 2) => lay_out_tile::<2, 2>(activations, layout, tile, x),
        (Sixteen, _) => lay_out_tile::<2, 4>(activations, layout, tile, x),
        (TwentyFour, 1) => lay_out_tile::<3, 1>(activations, layout, tile, x),
        (TwentyFour, 2) => lay_out_tile::<3, 2>(activations, layout, tile, x),
        (TwentyFour, _) => lay_out_tile::<3, 4>(activations, layout, tile, x),
    }
}

/// The same of V inputs in so many bytes. (A run of each input is cut before any is turned: what is behind its last whole step is no
/// concern of the loop that turns.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vbmi,avx512vnni")]
#[allow(clippy::needless_range_loop)]
fn lay_out_tile<const BYTES: usize, const V: usize>(
    activations: ActivationBits,
    layout: &Layout,
    tile: Tile<'_>,
    x: &[&[f32]],
) {
    const { assert!(EACH * BYTES * V <= WORDS * LANES, "words of a step that there is room for") };
    let Some(x) = x.first_chunk::<V>() else { return };
    let cut = Cut::beside(BYTES, layout.parts, V);
    let words = tile.limbs.as_chunks_mut::<V>().0.chunks_mut(layout.run / EACH * BYTES);
    let beside = tile.units.as_chunks_mut::<V>().0.iter_mut().zip(tile.sums.as_chunks_mut::<V>().0);
    let less = tile.less.as_chunks_mut::<V>().0.as_chunks_mut::<BYTES>().0;
    let mut digits = [[_mm512_setzero_si512(); V]; STEPS];
    for (run, ((words, less), (units, sums))) in words.zip(less).zip(beside).enumerate() {
        let mut most = [_mm512_setzero_si512(); V];
        for v in 0..V {
            most[v] = moduli(layout.of_run(run, x[v]));
        }
        let largest = largest(most);
        let mut inverse = [0.0; V];
        for v in 0..V {
            units[v] = activations.unit(largest[v]);
            inverse[v] = units[v].recip();
        }
        for v in 0..V {
            let (whole, rest) = layout.of_run(run, x[v]).as_chunks::<LANES>();
            for (x, digits) in whole.iter().zip(&mut digits) {
                digits[v] = cut.split(x, inverse[v]);
            }
            if let (false, Some(digits)) = (rest.is_empty(), digits.get_mut(whole.len())) {
                digits[v] = cut.split(rest, inverse[v]);
            }
        }
        let mut totals = [_mm512_setzero_si512(); WORDS];
        let steps = words[..layout.lanes(run) * BYTES].chunks_mut(EACH * BYTES);
        for (to, digits) in steps.zip(&digits) {
            let words = turned::<BYTES, V>(*digits);
            for k in 0..(EACH * BYTES * V).div_ceil(LANES) {
                totals[k] = _mm512_dpbusd_epi32(totals[k], _mm512_set1_epi8(1), words[k]);
            }
            let words: [[i32; LANES]; WORDS] = cast(words);
            let (to, words) = (to.as_flattened_mut(), words.as_flattened());
            // (Of a known length but for the last step.)
            match to.len() == EACH * BYTES * V {
                true => to.copy_from_slice(&words[..EACH * BYTES * V]),
                false => to.copy_from_slice(&words[..to.len()]),
            }
        }
        let of_lanes: [[i32; LANES]; WORDS] = cast(totals);
        let of_lanes = of_lanes.as_flattened().as_chunks::<V>().0.as_chunks::<BYTES>().0;
        let mut totals = [[0; BYTES]; V];
        for of_lane in &of_lanes[..EACH] {
            for byte in 0..BYTES {
                for v in 0..V {
                    totals[v][byte] += of_lane[byte][v];
                }
            }
        }
        for v in 0..V {
            sums[v] = sum(&totals[v], 8, units[v]);
            for byte in 0..BYTES {
                less[byte][v] = -totals[v][byte];
            }
        }
    }
}

/// What vectors of one input each, with words where [`Cut::beside`] puts them, have word by word: four words of each byte, each of V
/// inputs.
#[inline]
#[target_feature(enable = "avx512f")]
#[allow(clippy::needless_range_loop)]
fn turned<const BYTES: usize, const V: usize>(of: [__m512i; V]) -> [__m512i; WORDS] {
    let mut words = [_mm512_setzero_si512(); WORDS];
    match V {
        1 => words[0] = of[0],
        2 => {
            words[0] = _mm512_unpacklo_epi32(of[0], of[1]);
            words[1] = _mm512_unpackhi_epi32(of[0], of[1]);
        }
        4 => words[..BYTES].copy_from_slice(&fours::<BYTES>(&of)),
        _ => {
            let (first, second) = (fours::<BYTES>(&of[..4]), fours::<BYTES>(&of[4..]));
            let (low, high) =
                (_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15));
            for k in 0..BYTES {
                words[2 * k] = _mm512_permutex2var_epi64(first[k], low, second[k]);
                words[2 * k + 1] = _mm512_permutex2var_epi64(first[k], high, second[k]);
            }
        }
    }
    words
}

/// The first columns of four rows, in each quarter.
#[inline]
#[target_feature(enable = "avx512f")]
fn fours<const BYTES: usize>(of: &[__m512i]) -> [__m512i; BYTES] {
    let (first, second) = (_mm512_unpacklo_epi32(of[0], of[1]), _mm512_unpacklo_epi32(of[2], of[3]));
    let mut columns = [_mm512_unpacklo_epi64(first, second); BYTES];
    if BYTES > 1 {
        columns[1] = _mm512_unpackhi_epi64(first, second);
    }
    if BYTES > 2 {
        let (third, fourth) = (_mm512_unpackhi_epi32(of[0], of[1]), _mm512_unpackhi_epi32(of[2], of[3]));
        columns[2] = _mm512_unpacklo_epi64(third, fourth);
    }
    columns
}
