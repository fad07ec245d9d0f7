//! Squares of eight numbers of 32 bits, turned around.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::super::{BANDS, LANES, LINE, Lanes, PANEL};
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

/// The totals of the rows of a panel, from those of each vector, of many of which these are some from one on; false, and nothing done,
/// without the instructions.
pub(in super::super) fn by_rows(totals: &[[Lanes<f32>; BANDS]], of: (usize, usize), y: &mut [f32]) -> bool {
    let present = available();
    if present {
        // SAFETY: the machine has the instructions, as was asked.
        #[allow(unsafe_code)]
        unsafe {
            put_squares(totals, of, y);
        }
    }
    present
}

/// The same by squares of eight.
#[target_feature(enable = "avx2")]
fn put_squares(totals: &[[Lanes<f32>; BANDS]], (first, vectors): (usize, usize), y: &mut [f32]) {
    for (at, totals) in totals.chunks(ROWS).enumerate() {
        for vector in 0..VECTORS {
            let mut columns = [_mm256_setzero_si256(); ROWS];
            for (column, of) in columns.iter_mut().zip(totals) {
                let halves: [[f32; ROWS]; LANES / ROWS] = cast(of[vector / 2].0);
                *column = cast(halves[vector % 2]);
            }
            for (row, y) in turned(columns).into_iter().zip(y.chunks_mut(vectors).skip(vector * ROWS)) {
                let row: [f32; ROWS] = cast(row);
                // (There may be more totals than vectors.)
                let to = y.get_mut(first + at * ROWS..).unwrap_or_default();
                match to.first_chunk_mut() {
                    Some(to) => *to = row,
                    None => to.iter_mut().zip(row).for_each(|(to, total)| *to = total),
                }
            }
        }
    }
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

// (Miri has none of these instructions.)
#[cfg(all(test, not(miri)))]
mod tests {
    use super::super::super as integer;
    use super::super::super::{EACH, TOGETHER};
    use super::*;

    #[test]
    fn totals_lie_by_rows_by_all_instructions() {
        let total = |v: usize, r: usize| (v * PANEL + r) as f32;
        let some = |range: std::ops::Range<usize>| -> Vec<[[f32; LANES]; BANDS]> {
            range.map(|v| std::array::from_fn(|band| std::array::from_fn(|r| total(v, band * LANES + r)))).collect()
        };
        for (vectors, rows) in
            [1, 2, 4, 5, 8, 9, 17, 33].into_iter().flat_map(|vectors| [(vectors, PANEL), (vectors, 19)])
        {
            // In two blocks; of the last, totals of none.
            for first in [0, 8, 16] {
                let totals: Vec<_> = some(first..vectors.max(first) + 3).into_iter().map(|of| of.map(Lanes)).collect();
                let exact = |at: usize| if at % vectors < first { -1.0 } else { total(at % vectors, at / vectors) };
                let exact: Vec<f32> = (0..rows * vectors).map(exact).collect();
                let mut y = vec![-1.0; rows * vectors];
                if by_rows(&totals, (first, vectors), &mut y) {
                    assert_eq!(y, exact, "{vectors} vectors of {rows} rows from {first} on, by AVX2");
                }
                if first == 0 || vectors > TOGETHER {
                    let mut y = vec![-1.0; rows * vectors];
                    integer::by_rows(&totals, (first, vectors), &mut y);
                    assert_eq!(y, exact, "{vectors} vectors of {rows} rows from {first} on");
                }
            }
        }
    }

    #[test]
    fn lines_are_the_same_by_all_instructions() {
        let chunks = std::array::from_fn(|at| (at * 31 + at / 256) as u8);
        let exact: [[u8; LINE]; PANEL] =
            std::array::from_fn(|row| std::array::from_fn(|at| chunks[(at / EACH * PANEL + row) * EACH + at % EACH]));
        let narrow = available();
        for (found, present) in [(integer::lines(&chunks), integer::available() || narrow), (lines(&chunks), narrow)] {
            assert_eq!(found, present.then_some(exact));
        }
    }
}
