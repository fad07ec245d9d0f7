//! 2:4 matrices in the layouts of others: what older checkpoints hold, and what sparse tensor cores read.

use std::borrow::Cow;

use ndarray::Array2;

use super::{Dense, LinearOperator, Nm, NmSparse};
use crate::error::{Error, Result};
use crate::scalar::{DType, Real};

/// A 2:4 matrix as CUTLASS's sparse GEMM takes it (and torch's `SparseSemiStructuredTensor`, 16-bit values).
///
/// The layout belongs to a version of a library at run time: nothing of it is ever stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Cutlass<'a, T: Real> {
    /// The stored values, m × n/2, row by row.
    pub values: Cow<'a, Dense<T>>,
    /// Positions, m × n/16 in the order of memory: 4 bits for each group of four, 4 groups in a word, words
    /// reordered as [`NmSparse::to_cutlass`] says.
    pub metadata: Array2<u16>,
}

/// The two positions of a group as CUTLASS writes them, first + 4·second, by rank: 01, 02, 03, 12, 13, 23.
const NIBBLES: [u16; 6] = [0x4, 0x8, 0xc, 0x9, 0xd, 0xe];

impl<T: Real> NmSparse<T> {
    /// Reads the layout `sparse-24-bitmask` of the package compressed-tensors (up to 0.14): `mask` has ⌈n/8⌉ bytes
    /// for each of the m rows, bit j mod 8, counted from the lowest, of byte ⌊j/8⌋ says whether column j is stored;
    /// `values` is m × n/2, row by row. Stored zeros keep their places. O(m·n).
    ///
    /// # Errors
    /// [`Error::Shape`] unless n is a positive multiple of four, the parts fit the shape and every group has
    /// exactly two marks.
    pub fn from_bitmask((m, n): (usize, usize), mask: &[u8], values: Dense<T>) -> Result<Self> {
        let width = n.div_ceil(8);
        if n == 0 || n % 4 != 0 {
            return Err(Error::shape("columns in groups of four", n));
        }
        if values.shape() != (m, n / 2) {
            return Err(Error::shape(format!("values of {m} x {}", n / 2), values.shape()));
        }
        if m.checked_mul(width) != Some(mask.len()) {
            return Err(Error::shape(format!("a mask of {m} x {width} bytes"), mask.len()));
        }
        let known = Nm::TWO_FOUR.masks();
        let mut ranks = Vec::with_capacity(m * n / 4);
        for (i, row) in mask.chunks(width).enumerate() {
            for group in 0..n / 4 {
                let marks = row[group / 2] >> (group % 2 * 4) & 0xf;
                let wrong =
                    || Error::shape("two marks in each group", format!("{marks:04b} in group {group} of row {i}"));
                ranks.push(known.iter().position(|&mask| mask == marks).ok_or_else(wrong)? as u8);
            }
            // Half of a last byte is padding.
            if n % 8 != 0 && row[width - 1] >> 4 != 0 {
                return Err(Error::shape(format!("a mask of {n} bits in row {i}"), "bits set beyond them"));
            }
        }
        Self::new(Nm::TWO_FOUR, n, ranks, values)
    }

    /// The matrix in the layout that CUTLASS's sparse GEMM reads, for values of 16 bits: a copy of the positions
    /// beside the values as they are. O(m·n).
    ///
    /// A group's positions p < q are the four bits p + 4q, the first of four groups the lowest bits of a word: the
    /// word (r, c), c < n/16. Its row becomes r′ = 64⌊r/64⌋ + 2(r mod 2) + ⌊(r mod 8)/4⌋ + 32⌊(r mod 4)/2⌋ +
    /// 4⌊(r mod 64)/8⌋; then the words off the diagonal of each 2×2 of (r′, c) change places; and (r′, c) lies at
    /// ⌊c/2⌋·2m + 2r′ + c mod 2 in memory.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another pattern than 2:4, or values that are not stored as F16 or BF16;
    /// [`Error::Shape`] unless m and n are multiples of 64: rows are reordered 64 at a time.
    pub fn to_cutlass(&self) -> Result<Cutlass<'_, T>> {
        let ((m, n), dtype) = (self.shape(), self.values().dtype());
        if self.pattern() != Nm::TWO_FOUR {
            let (n, m) = (self.pattern().n(), self.pattern().m());
            return Err(Error::Unsupported(format!("{n}:{m} sparsity: sparse tensor cores know 2:4 only")));
        }
        if !matches!(dtype, DType::F16 | DType::BF16) {
            return Err(Error::Unsupported(format!("2:4 values of {dtype} for CUTLASS: expected F16 or BF16")));
        }
        if m % 64 != 0 || n % 64 != 0 {
            return Err(Error::shape("multiples of 64 x 64", (m, n)));
        }
        let mut words = vec![0u16; m * n / 16];
        for (at, ranks) in self.ranks().chunks_exact(4).enumerate() {
            let word = ranks.iter().rev().fold(0, |word, &rank| word << 4 | NIBBLES[rank as usize]);
            words[place(m, at / (n / 16), at % (n / 16))] = word;
        }
        let metadata = Array2::from_shape_vec((m, n / 16), words);
        Ok(Cutlass { values: self.values(), metadata: metadata.map_err(|e| Error::shape((m, n / 16), e.to_string()))? })
    }
}

/// Where word (r, c) of m rows lies in memory.
fn place(m: usize, r: usize, c: usize) -> usize {
    // The low six bits of the row, from the highest: 543210 becomes 154302.
    let row = r & !0x3f | (r & 0b10) << 4 | (r & 0b11_1000) >> 1 | (r & 1) << 1 | (r & 0b100) >> 2;
    let (row, c) = match (row % 2, c % 2) {
        (0, 1) => (row + 1, c - 1),
        (1, 0) => (row - 1, c + 1),
        _ => (row, c),
    };
    c / 2 * 2 * m + 2 * row + c % 2
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(m: usize, n: usize) -> Vec<u8> {
        (0..m).flat_map(|i| (0..n / 4).map(move |g| ((i * 5 + g * 7 + i * g) % 6) as u8)).collect()
    }

    fn sparse(m: usize, n: usize, dtype: DType) -> NmSparse<f32> {
        let values = Array2::from_shape_fn((m, n / 2), |(i, j)| (i * 3 + j) as f32 % 7.0 - 3.0);
        NmSparse::new(Nm::TWO_FOUR, n, ranks(m, n), Dense::rounded(values, dtype).unwrap()).unwrap()
    }

    #[test]
    fn the_older_layout_is_read_with_its_zeros() {
        for (m, n) in [(1, 4), (3, 8), (5, 12), (2, 64), (7, 100)] {
            let expected = sparse(m, n, DType::BF16);
            // Bits from the positions of the marks, not of the values: some of these are zero.
            let mut mask = vec![0u8; m * n.div_ceil(8)];
            let pairs = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];
            for (at, &rank) in expected.ranks().iter().enumerate() {
                for offset in pairs[rank as usize] {
                    let (i, j) = (at / (n / 4), at % (n / 4) * 4 + offset);
                    mask[i * n.div_ceil(8) + j / 8] |= 1 << (j % 8);
                }
            }
            let read = NmSparse::from_bitmask((m, n), &mask, expected.values().into_owned()).unwrap();
            assert_eq!(read, expected);
            mask[0] ^= 1;
            assert!(NmSparse::from_bitmask((m, n), &mask, expected.values().into_owned()).is_err());
        }
        // What the package itself writes of [[0, -0, 0, 0, 1, 2, 0, 3], [5, 4, 3, 2, -9, 0, 0, 8]]: ties go anywhere.
        let values = Dense::new(ndarray::array![[0.0f32, -0.0, 2.0, 3.0], [5.0, 4.0, -9.0, 8.0]]);
        let read = NmSparse::from_bitmask((2, 8), &[0b1010_0011, 0b1001_0011], values.clone()).unwrap();
        let dense =
            ndarray::array![[0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 3.0], [5.0, 4.0, 0.0, 0.0, -9.0, 0.0, 0.0, 8.0]];
        assert_eq!(read.to_dense(), dense);
        assert!(read.values().values().iter().all(|v| *v != 0.0 || v.is_sign_positive()));
        // Other shapes, short parts, bits in the padding.
        assert!(NmSparse::from_bitmask((2, 6), &[0, 0], values.clone()).is_err());
        assert!(NmSparse::from_bitmask((2, 8), &[0xa3], values.clone()).is_err());
        assert!(NmSparse::from_bitmask((1, 8), &[0xa3], values).is_err());
        let values = Dense::new(ndarray::array![[1.0f32, 2.0]]);
        assert!(NmSparse::from_bitmask((1, 4), &[0x03], values.clone()).is_ok());
        assert!(NmSparse::from_bitmask((1, 4), &[0x13], values).is_err());
        assert!(NmSparse::from_bitmask((0, 0), &[], Dense::new(Array2::<f32>::zeros((0, 0)))).is_err());
    }

    #[test]
    fn words_lie_where_the_reference_scatters_them() {
        // By a transcription of the definition into another language, for the same matrices.
        for (m, n, first, digest) in GOLDEN {
            let sparse = sparse(m, n, DType::BF16);
            let Cutlass { values, metadata } = sparse.to_cutlass().unwrap();
            assert_eq!((values.shape(), metadata.dim()), ((m, n / 2), (m, n / 16)));
            assert_eq!(metadata.iter().take(8).copied().collect::<Vec<_>>(), first);
            let sum = metadata.iter().fold(0u32, |sum, &word| sum.wrapping_mul(31).wrapping_add(word.into()));
            assert_eq!(sum, digest, "{m}x{n}");
        }
        // No two words share a place.
        let mut places: Vec<usize> = (0..128).flat_map(|r| (0..6).map(move |c| place(128, r, c))).collect();
        places.sort_unstable();
        assert_eq!(places, (0..128 * 6).collect::<Vec<_>>());
    }

    #[test]
    fn what_tensor_cores_cannot_read_is_refused() {
        for (m, n, dtype) in [(64, 64, DType::F32), (32, 64, DType::BF16), (64, 32, DType::F16)] {
            assert!(sparse(m, n, dtype).to_cutlass().is_err(), "{m}x{n} {dtype}");
        }
        let values = Dense::rounded(Array2::<f32>::zeros((64, 32)), DType::F16).unwrap();
        let other = NmSparse::new(Nm::new(4, 8).unwrap(), 64, vec![0; 64 * 8], values).unwrap();
        assert!(matches!(other.to_cutlass(), Err(Error::Unsupported(_))));
    }

    #[rustfmt::skip]
    const GOLDEN: [(usize, usize, [u16; 8], u32); 2] = [
        (64, 64, [0x9c84, 0xe48c, 0x84ed, 0x8c9d, 0xe98e, 0x8888, 0x8e98, 0x8888], 0x4e2a_cac2),
        (192, 128, [0x9c84, 0xe48c, 0x84ed, 0x8c9d, 0xe98e, 0x8888, 0x8e98, 0x8888], 0x2cc3_d200),
    ];
}
