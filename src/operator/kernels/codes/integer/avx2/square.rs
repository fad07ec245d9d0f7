//! Squares of eight numbers of 32 bits, turned around.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::super::{LINE, PANEL};
use super::{Chunk, ROWS, VECTORS, available};

/// Sixteen chunks of 32 bits of all rows of a panel as the rows have them; `None` without the instructions.
pub(in super::super) fn lines(chunks: &[u8; LINE * PANEL]) -> Option<[[u8; LINE]; PANEL]> {
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
