//! Unstructured sparsity: one bit for each entry says whether it is stored.
//!
//! Costs 1 bit for each of the m·n entries, whatever the pattern: rows may hold any number of values,
//! and no offsets are stored, since counting bits gives them. A stored value may be zero.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use pulp::Arch;

use super::kernels::MaskedRow;
use super::permutation::LONGEST;
use super::sparse::{each_panel, each_row};
use super::{Dense, LinearOperator};
use crate::error::{Error, Result};
use crate::linalg::matmul_into;
use crate::scalar::{DType, Real};

/// Up to so many vectors, each by itself.
const FEW: usize = 4;
/// Rows that are written out at a time.
const PANEL: usize = 512;

/// A matrix of which the marked entries are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Bitmask<T> {
    columns: usize,
    /// ⌈n/64⌉ words for each row; bit j%64 of word j/64 marks column j.
    words: Vec<u64>,
    /// Where each row's values begin, and their number at the end.
    offsets: Vec<usize>,
    /// 1 × stored, row by row, ascending columns.
    values: Dense<T>,
}

impl<T: Real> Bitmask<T> {
    /// Takes the entries of `matrix` that `kept` marks, m×n both, and rounds them to `dtype`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes differ; as [`Dense::rounded`].
    pub fn gather(matrix: ArrayView2<'_, T>, kept: ArrayView2<'_, bool>, dtype: DType) -> Result<Self> {
        let (m, n) = matrix.dim();
        if kept.dim() != (m, n) {
            return Err(Error::shape((m, n), kept.dim()));
        }
        let mut words = vec![0u64; m * n.div_ceil(64)];
        for ((i, j), _) in kept.indexed_iter().filter(|(_, mark)| **mark) {
            words[i * n.div_ceil(64) + j / 64] |= 1 << (j % 64);
        }
        let values: Vec<T> = matrix.iter().zip(&kept).filter(|(_, mark)| **mark).map(|(v, _)| *v).collect();
        let values = Array2::from_shape_vec((1, values.len()), values)
            .map_err(|e| Error::shape("one row of values", e.to_string()))?;
        Self::assemble((m, n), words, Dense::rounded(values, dtype)?)
    }

    fn assemble((m, n): (usize, usize), words: Vec<u64>, values: Dense<T>) -> Result<Self> {
        let per_row = n.div_ceil(64);
        let mut offsets = vec![0];
        offsets.extend((0..m).scan(0, |end, i| {
            *end += words[i * per_row..(i + 1) * per_row].iter().map(|word| word.count_ones() as usize).sum::<usize>();
            Some(*end)
        }));
        let stored = offsets.last().copied().unwrap_or(0);
        if values.shape() != (1, stored) {
            return Err(Error::shape((1, stored), values.shape()));
        }
        Ok(Bitmask { columns: n, words, offsets, values: values.positive_zeros() })
    }

    /// Bytes on disk of `stored` values of an m×n matrix.
    pub fn bytes_of((m, n): (usize, usize), stored: usize, dtype: DType) -> u64 {
        (dtype.bytes(stored) + m * n.div_ceil(8)) as u64
    }

    /// The stored values, one row.
    pub fn values(&self) -> &Dense<T> {
        &self.values
    }

    /// ⌈n/64⌉ words for each row; bit j%64 of word j/64 marks column j.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The mask as it is stored: ⌈n/8⌉ bytes for each row, bit j%8 of byte j/8 marks column j.
    pub fn encode_mask(&self) -> Vec<u8> {
        let (per_row, width) = (self.columns.div_ceil(64), self.columns.div_ceil(8));
        let rows = (0..self.shape().0).map(|i| &self.words[i * per_row..(i + 1) * per_row]);
        rows.flat_map(|row| row.iter().flat_map(|word| word.to_le_bytes()).take(width)).collect()
    }

    /// Reads the stored form back; the number of rows is that of the mask.
    ///
    /// # Errors
    /// [`Error::Shape`] if mask and values do not fit each other.
    pub fn decode((m, n): (usize, usize), mask: &[u8], values: Dense<T>) -> Result<Self> {
        let width = n.div_ceil(8);
        if n == 0 || n > LONGEST {
            return Err(Error::shape("1 to 2^26 columns", n));
        }
        if m.checked_mul(width) != Some(mask.len()) {
            return Err(Error::shape(format!("a mask of {m} x {width} bytes"), mask.len()));
        }
        let per_row = n.div_ceil(64);
        let mut words = vec![0u64; m * per_row];
        for (at, &byte) in mask.iter().enumerate() {
            let (i, k) = (at / width, at % width);
            if k + 1 == width && n % 8 != 0 && byte >> (n % 8) != 0 {
                return Err(Error::shape(format!("a mask of {n} bits in each row"), "bits set beyond them"));
            }
            words[i * per_row + k / 8] |= u64::from(byte) << (k % 8 * 8);
        }
        Self::assemble((m, n), words, values)
    }

    /// What row i stores.
    fn row(&self, i: usize) -> MaskedRow<'_, T> {
        let per_row = self.columns.div_ceil(64);
        let values = self.values.values().to_slice().unwrap_or_default();
        let values = values.get(self.offsets[i]..).unwrap_or_default();
        MaskedRow { words: &self.words[i * per_row..(i + 1) * per_row], values }
    }
}

impl<T: Real> LinearOperator<T> for Bitmask<T> {
    fn shape(&self) -> (usize, usize) {
        (self.offsets.len() - 1, self.columns)
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let (arch, (m, _), b) = (Arch::new(), self.shape(), x.ncols());
        // To whole words of the mask: a kernel may look at columns that do not exist.
        let width = self.columns.next_multiple_of(64);
        if b <= FEW {
            let mut packed = vec![T::zero(); width * b];
            for (to, from) in packed.chunks_mut(width).zip(x.columns()) {
                to.iter_mut().zip(from).for_each(|(to, &from)| *to = from);
            }
            return each_row(m, b, self.params(), |i, y| {
                y.iter_mut().zip(packed.chunks(width)).for_each(|(y, x)| *y = self.row(i).dot(arch, x));
            });
        }
        let mut y = Array2::zeros((m, b));
        let panel = |(at, y): (usize, ArrayViewMut2<'_, T>)| {
            let mut rows = Array2::zeros((y.nrows(), width));
            for (i, mut row) in rows.rows_mut().into_iter().enumerate() {
                if let Some(row) = row.as_slice_mut() {
                    self.row(at * PANEL + i).spread(arch, row);
                }
            }
            matmul_into(T::one(), rows.slice(s![.., ..self.columns]), x, T::zero(), y);
        };
        each_panel(y.axis_chunks_iter_mut(Axis(0), PANEL), m * self.columns * b, panel);
        y
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let x = x.as_standard_layout();
        let mut y = Array2::zeros((self.columns, x.ncols()));
        for (i, from) in x.rows().into_iter().enumerate() {
            self.row(i).entries().for_each(|(column, value)| y.row_mut(column).scaled_add(value, &from));
        }
        y
    }
    fn params(&self) -> usize {
        self.values.params()
    }
    fn bytes(&self) -> u64 {
        Self::bytes_of(self.shape(), self.params(), self.values.dtype())
    }
    fn flops(&self, columns: usize) -> u64 {
        self.values.flops(columns)
    }
    fn to_dense(&self) -> Array2<T> {
        let mut dense = Array2::zeros(self.shape());
        for i in 0..self.shape().0 {
            self.row(i).entries().for_each(|(column, value)| dense[(i, column)] = value);
        }
        dense
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiplies_and_round_trips_for_lengths_around_a_word() {
        for (m, n) in [(3, 1), (2, 8), (4, 63), (3, 64), (5, 65), (2, 130), (0, 5), (7, 300)] {
            let matrix = Array2::from_shape_fn((m, n), |(i, j)| ((i * 7 + j * 3) % 11) as f64 - 5.0);
            // Row 1 is empty; among the rest some stored values are zero.
            let kept = Array2::from_shape_fn((m, n), |(i, j)| i != 1 && (i + j * j) % 3 != 0);
            let sparse = Bitmask::gather(matrix.view(), kept.view(), DType::BF16).unwrap();
            let dense = Array2::from_shape_fn((m, n), |at| if kept[at] { matrix[at] } else { 0.0 });
            assert_eq!(sparse.to_dense(), dense);
            let x = Array2::from_shape_fn((3, n), |(i, j)| (i + 2 * j) as f64 - 3.0);
            assert_eq!(sparse.product(x.t()), dense.dot(&x.t()));
            let y = Array2::from_shape_fn((m, 2), |(i, j)| (i * 2 + j) as f64);
            assert_eq!(sparse.product_transposed(y.view()), dense.t().dot(&y));
            for b in [1, 5, 16, 70] {
                let x = Array2::from_shape_fn((n, b), |(i, j)| ((i * 3 + j * 5) % 7) as f64 - 3.0);
                assert_eq!(sparse.product(x.view()), dense.dot(&x), "{m}x{n}, batch {b}");
                let narrow = |a: &Array2<f64>| a.mapv(|v| v as f32);
                let single = Bitmask::gather(narrow(&matrix).view(), kept.view(), DType::F32).unwrap();
                assert_eq!(single.product(narrow(&x).view()), narrow(&dense).dot(&narrow(&x)), "{m}x{n}, batch {b}");
            }
            let mask = sparse.encode_mask();
            assert_eq!((mask.len() + 2 * sparse.params()) as u64, sparse.bytes());
            assert_eq!(Bitmask::decode((m, n), &mask, sparse.values().clone()).unwrap(), sparse);
        }
        let values = Dense::new(ndarray::array![[1.0f32]]);
        assert!(Bitmask::decode((1, 3), &[0b1000], values.clone()).is_err());
        assert!(Bitmask::decode((1, 3), &[0b11], values.clone()).is_err());
        assert!(Bitmask::decode((0, usize::MAX), &[], values.clone()).is_err());
        assert!(Bitmask::decode((2, 3), &[1], values).is_err());
    }
}
