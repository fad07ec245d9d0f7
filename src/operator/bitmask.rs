//! Unstructured sparsity: one bit for each entry says whether it is stored.
//!
//! Costs 1 bit for each of the m·n entries, whatever the pattern: rows may hold any number of values,
//! and no offsets are stored, since counting bits gives them. A stored value may be zero. Values are floats, or
//! codes on a [`Grid`] of the whole matrix.

use std::borrow::Cow;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use pulp::Arch;

use super::coded::Coded;
use super::kernels::MaskedRow;
use super::permutation::LONGEST;
use super::rows::rows_by;
use super::sparse::{each_panel, each_row, fitted};
use super::{Dense, Grid, LinearOperator};
use crate::error::{Error, Result};
use crate::linalg::matmul_into;
use crate::scalar::{DType, Real};
use crate::threads::Pace;

/// Up to so many vectors, each by itself.
const FEW: usize = 4;
/// Rows that are written out at a time.
const PANEL: usize = 512;

/// A matrix of which the marked entries are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Bitmask<T: Real> {
    columns: usize,
    /// ⌈n/64⌉ words for each row; bit j%64 of word j/64 marks column j.
    words: Vec<u64>,
    /// Where each row's values begin, and their number at the end.
    offsets: Vec<usize>,
    values: Values<T>,
}

/// What is stored, row by row, ascending columns.
#[derive(Debug, Clone, PartialEq)]
enum Values<T: Real> {
    /// 1 × stored.
    Plain(Dense<T>),
    Coded(Coded<T>),
}

/// Marks of a row in `from..to`.
fn marks(words: &[u64], from: usize, to: usize) -> usize {
    let of = |k: usize| {
        let (low, high) = (from.max(k * 64) - k * 64, to.min(k * 64 + 64) - k * 64);
        (words[k] >> low & (u64::MAX >> (64 - (high - low)))).count_ones() as usize
    };
    (from / 64..to.div_ceil(64)).map(of).sum()
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
        let values = Dense::rounded(values, dtype)?.positive_zeros();
        Ok(Bitmask { columns: n, offsets: offsets((m, n), &words), words, values: Values::Plain(values) })
    }

    /// The same places with the nearest values on a grid for m×n.
    ///
    /// # Errors
    /// [`Error::Shape`] if the grid is of another shape.
    pub fn quantized(&self, grid: Grid<T>) -> Result<Self> {
        let mut scratch = Vec::new();
        let rows = (0..self.shape().0).map(|i| self.row(Arch::new(), i, &mut scratch).entries().collect());
        let values = Values::Coded(Coded::nearest(grid, self.columns, rows)?);
        Ok(Bitmask { values, ..self.clone() })
    }

    /// The grid, if values are on one.
    pub fn grid(&self) -> Option<&Grid<T>> {
        self.coded().map(Coded::grid)
    }

    pub(super) fn coded(&self) -> Option<&Coded<T>> {
        if let Values::Coded(codes) = &self.values { Some(codes) } else { None }
    }

    /// The marks, m×n.
    pub fn kept(&self) -> Array2<bool> {
        let per_row = self.columns.div_ceil(64);
        Array2::from_shape_fn(self.shape(), |(i, j)| self.words[i * per_row + j / 64] >> (j % 64) & 1 == 1)
    }

    /// The number of values in a row.
    pub fn stored(&self, row: usize) -> usize {
        self.offsets[row + 1] - self.offsets[row]
    }

    /// Bytes on disk of `stored` values of an m×n matrix.
    pub fn bytes_of((m, n): (usize, usize), stored: usize, dtype: DType) -> u64 {
        (dtype.bytes(stored) + m * n.div_ceil(8)) as u64
    }

    /// The stored values, one row; those on a grid are written out.
    pub fn values(&self) -> Cow<'_, Dense<T>> {
        if let Values::Plain(values) = &self.values {
            return Cow::Borrowed(values);
        }
        let (mut all, mut scratch) = (Vec::new(), Vec::new());
        (0..self.shape().0).for_each(|i| all.extend(self.row(Arch::new(), i, &mut scratch).values));
        Cow::Owned(Dense::new(Array2::from_shape_vec((1, all.len()), all).unwrap_or_default()))
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
        let (words, offsets) = unpack((m, n), mask)?;
        let stored = offsets.last().copied().unwrap_or(0);
        if values.shape() != (1, stored) {
            return Err(Error::shape((1, stored), values.shape()));
        }
        Ok(Bitmask { columns: n, words, offsets, values: Values::Plain(values.positive_zeros()) })
    }

    /// The same of values on a grid: each row's codes are a stream of bits, lowest first, ended on a whole byte.
    ///
    /// # Errors
    /// [`Error::Shape`] if mask, grid and codes do not fit each other.
    pub fn decode_codes((m, n): (usize, usize), mask: &[u8], grid: Grid<T>, codes: Vec<u8>) -> Result<Self> {
        let (words, offsets) = unpack((m, n), mask)?;
        let coded = Coded::new(grid, n, offsets.windows(2).map(|pair| pair[1] - pair[0]), codes)?;
        Ok(Bitmask { columns: n, words, offsets, values: Values::Coded(coded) })
    }

    /// Codes of the marked places of rows of n columns.
    pub(super) fn of_codes(n: usize, words: Vec<u64>, coded: Coded<T>) -> Self {
        let offsets = offsets((coded.grid().scales().shape().0, n), &words);
        Bitmask { columns: n, words, offsets, values: Values::Coded(coded) }
    }

    /// What row i stores; values on a grid are written to `scratch`.
    pub(super) fn row<'a>(&'a self, arch: Arch, i: usize, scratch: &'a mut Vec<T>) -> MaskedRow<'a, T> {
        let per_row = self.columns.div_ceil(64);
        let words = &self.words[i * per_row..(i + 1) * per_row];
        let values = match &self.values {
            Values::Plain(values) => values.wide().get(self.offsets[i]..).unwrap_or_default(),
            Values::Coded(codes) => {
                let starts = (0..self.columns).step_by(codes.grid().group());
                let runs = starts.map(|from| marks(words, from, (from + codes.grid().group()).min(self.columns)));
                codes.write(arch, i, runs, scratch);
                scratch
            }
        };
        MaskedRow { words, values }
    }
}

/// Where each row's values begin, and their number at the end.
fn offsets((m, n): (usize, usize), words: &[u64]) -> Vec<usize> {
    let per_row = n.div_ceil(64);
    let mut end = 0;
    let ends = (0..m).map(|i| {
        end += words[i * per_row..(i + 1) * per_row].iter().map(|word| word.count_ones() as usize).sum::<usize>();
        end
    });
    std::iter::once(0).chain(ends).collect()
}

/// The words of a stored mask, and the offsets.
fn unpack((m, n): (usize, usize), mask: &[u8]) -> Result<(Vec<u64>, Vec<usize>)> {
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
    let offsets = offsets((m, n), &words);
    Ok((words, offsets))
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
                let mut scratch = Vec::new();
                let row = self.row(arch, i, &mut scratch);
                y.iter_mut().zip(packed.chunks(width)).for_each(|(y, x)| *y = row.dot(arch, x));
            });
        }
        let mut y = Array2::zeros((m, b));
        let panel = |(rows, scratch): &mut (Array2<T>, Vec<T>), (at, y): (usize, ArrayViewMut2<'_, T>)| {
            for (i, row) in fitted(rows, (y.nrows(), width)).chunks_mut(width).enumerate() {
                self.row(arch, at * PANEL + i, scratch).spread(arch, row);
            }
            matmul_into(T::one(), rows.slice(s![.., ..self.columns]), x, T::zero(), y);
        };
        each_panel(y.axis_chunks_iter_mut(Axis(0), PANEL), Pace::FLOATS.time(m * self.columns, b), panel);
        y
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let x = x.as_standard_layout();
        let (mut y, mut scratch) = (Array2::zeros((self.columns, x.ncols())), Vec::new());
        for (i, from) in x.rows().into_iter().enumerate() {
            self.row(Arch::new(), i, &mut scratch)
                .entries()
                .for_each(|(column, value)| y.row_mut(column).scaled_add(value, &from));
        }
        y
    }
    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        let mut scratch = Vec::new();
        rows_by(self.shape(), rows, |row, to| {
            self.row(Arch::new(), row, &mut scratch).entries().for_each(|(column, value)| to[column] = value);
        })
    }
    fn params(&self) -> usize {
        match &self.values {
            Values::Plain(values) => values.params(),
            Values::Coded(codes) => codes.params(),
        }
    }
    fn bytes(&self) -> u64 {
        match &self.values {
            Values::Plain(values) => Self::bytes_of(self.shape(), values.params(), values.dtype()),
            Values::Coded(codes) => Self::bytes_of(self.shape(), 0, DType::U8) + codes.bytes(),
        }
    }
    fn flops(&self, columns: usize) -> u64 {
        2 * (self.offsets.last().copied().unwrap_or(0) * columns) as u64
    }
    fn to_dense(&self) -> Array2<T> {
        let (mut dense, mut scratch) = (Array2::zeros(self.shape()), Vec::new());
        for i in 0..self.shape().0 {
            self.row(Arch::new(), i, &mut scratch).entries().for_each(|(column, value)| dense[(i, column)] = value);
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
            assert_eq!(Bitmask::decode((m, n), &mask, sparse.values().into_owned()).unwrap(), sparse);
        }
        let values = Dense::new(ndarray::array![[1.0f32]]);
        assert!(Bitmask::decode((1, 3), &[0b1000], values.clone()).is_err());
        assert!(Bitmask::decode((1, 3), &[0b11], values.clone()).is_err());
        assert!(Bitmask::decode((0, usize::MAX), &[], values.clone()).is_err());
        assert!(Bitmask::decode((2, 3), &[1], values).is_err());
    }
}
