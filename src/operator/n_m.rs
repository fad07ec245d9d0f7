//! N:M sparsity: of every M consecutive inputs of a row exactly N have a stored value.
//!
//! A row's inputs are cut into groups of M from the left; what is left over at the end (n mod M inputs)
//! is stored densely. Which N of a group are stored is one number, the rank of the choice among all
//! C(M, N) in lexicographic order; a stored value may be zero and keeps its place. On disk the ranks of
//! a row are packed into bytes: digits in base C(M, N), as many as fit a byte, where that is denser than
//! whole bits (2:4: three groups a byte, 0.667 bit for each position), else ⌈log₂ C⌉ bits each.
//! In memory 2:4 in `f32` has a form of its own, for its kernels: 2 bits a position, `bf16` values as they are.
//! Values may be codes on a [`Grid`] of the whole matrix; then places are held as a [`Bitmask`] holds them.

use std::any::Any;
use std::borrow::Cow;

use ndarray::{Array2, ArrayView2};
use pulp::{Arch, bytemuck};

use super::coded::Coded;
use super::kernels::TwoFour;
use super::permutation::LONGEST;
use super::rows::rows_by;
use super::sparse::{accumulate, each_row};
use super::{Bitmask, BlockDiagonal, Dense, Grid, LinearOperator};
use crate::error::{Error, Result};
use crate::linalg::pages;
use crate::scalar::{DType, Real};

mod pattern;

pub use self::pattern::Nm;

/// A matrix of which N of every M consecutive entries of a row are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct NmSparse<T: Real> {
    pattern: Nm,
    shape: (usize, usize),
    dtype: DType,
    masks: Vec<u8>,
    stored: Stored<T>,
}

/// The values and their places, once.
#[derive(Debug, Clone, PartialEq)]
enum Stored<T: Real> {
    /// The rank of each group's choice, a byte each, and the values; row by row.
    Rows { ranks: Vec<u8>, values: Dense<T> },
    /// 2:4 in `f32`.
    Single(TwoFour<f32>),
    /// The same of `bf16` values, as bits.
    Half(TwoFour<u16>),
    /// Values on a grid.
    Coded(Bitmask<T>),
}

impl<T: Real> NmSparse<T> {
    /// Puts the parts together: `ranks`, m × groups row by row; `values`, m × values of a row, in ascending
    /// order of their columns. A negative zero becomes a positive one.
    ///
    /// # Errors
    /// [`Error::Shape`] if the parts do not fit.
    pub fn new(pattern: Nm, columns: usize, ranks: Vec<u8>, values: Dense<T>) -> Result<Self> {
        let (m, stored) = values.shape();
        let masks = pattern.masks();
        if stored != pattern.values_per_row(columns) || ranks.len() != m * pattern.groups(columns) {
            let expected = (m, pattern.values_per_row(columns), m * pattern.groups(columns));
            return Err(Error::shape(expected, (m, stored, ranks.len())));
        }
        if let Some(&rank) = ranks.iter().find(|&&rank| rank as usize >= masks.len()) {
            return Err(Error::shape(format!("ranks below {}", masks.len()), rank));
        }
        let (shape, dtype, values) = ((m, columns), values.dtype(), values.positive_zeros());
        let stored = match T::as_f32(values.values().view()).filter(|_| pattern == Nm::TWO_FOUR) {
            None => Stored::Rows { ranks, values },
            Some(values) => {
                let place = |mask: u8| [mask.trailing_zeros() as u8, 7 - mask.leading_zeros() as u8];
                let (places, values) = (ranks.iter().map(|&rank| place(masks[rank as usize])), values.iter().copied());
                match dtype {
                    DType::BF16 => Stored::Half(TwoFour::new(shape, places, values)),
                    _ => Stored::Single(TwoFour::new(shape, places, values)),
                }
            }
        };
        Ok(NmSparse { pattern, shape, dtype, masks, stored })
    }

    /// Takes the entries of `matrix` that `kept` marks, m×n both, and rounds them to `dtype`.
    ///
    /// # Errors
    /// [`Error::Shape`] unless each full group has exactly N marks and the rest of each row is all marked;
    /// as [`Dense::rounded`].
    pub fn gather(pattern: Nm, matrix: ArrayView2<'_, T>, kept: ArrayView2<'_, bool>, dtype: DType) -> Result<Self> {
        let ((m, n), masks) = (matrix.dim(), pattern.masks());
        if kept.dim() != (m, n) {
            return Err(Error::shape((m, n), kept.dim()));
        }
        let full = pattern.groups(n) * pattern.m;
        let mut ranks = Vec::with_capacity(m * pattern.groups(n));
        let mut values = Vec::with_capacity(m * pattern.values_per_row(n));
        for (row, marks) in matrix.rows().into_iter().zip(kept.rows()) {
            for start in (0..full).step_by(pattern.m) {
                let mask = (0..pattern.m).fold(0u8, |mask, i| mask | u8::from(marks[start + i]) << i);
                let rank = masks.iter().position(|&known| known == mask);
                let wrong = || Error::shape(format!("{} marks in each group", pattern.n), mask.count_ones());
                ranks.push(rank.ok_or_else(wrong)? as u8);
            }
            if marks.iter().skip(full).any(|&mark| !mark) {
                return Err(Error::shape("marks on all that is left of a row", "fewer"));
            }
            values.extend(row.iter().zip(marks).filter(|(_, mark)| **mark).map(|(v, _)| *v));
        }
        let values = Array2::from_shape_vec((m, pattern.values_per_row(n)), values)
            .map_err(|e| Error::shape("one value for each mark", e.to_string()))?;
        Self::new(pattern, n, ranks, Dense::rounded(values, dtype)?)
    }

    /// The same places with the nearest values on a grid for m×n.
    ///
    /// # Errors
    /// [`Error::Shape`] if the grid is of another shape.
    pub fn quantized(&self, grid: Grid<T>) -> Result<Self> {
        let (m, n) = self.shape;
        let entries = |i: usize| {
            let mut entries = Vec::with_capacity(self.pattern.values_per_row(n));
            self.row(i, |column, value| entries.push((column, value)));
            entries
        };
        let coded = Coded::nearest(grid, n, (0..m).map(entries))?;
        Ok(self.coded(&self.ranks(), coded))
    }

    /// Reads such a form back: each row's codes are a stream of bits, lowest first, ended on a whole byte.
    ///
    /// # Errors
    /// [`Error::Shape`] if positions, grid and codes do not fit each other.
    pub fn decode_codes(pattern: Nm, columns: usize, positions: &[u8], grid: Grid<T>, codes: Vec<u8>) -> Result<Self> {
        let m = grid.scales().shape().0;
        let ranks = ranks(pattern, (m, columns), positions)?;
        let counts = std::iter::repeat_n(pattern.values_per_row(columns), m);
        let coded = Coded::new(grid, columns, counts, codes)?;
        let empty = Stored::Rows { ranks: Vec::new(), values: Dense::new(Array2::zeros((0, 0))) };
        let places = NmSparse { pattern, shape: (m, columns), dtype: T::DTYPE, masks: pattern.masks(), stored: empty };
        Ok(places.coded(&ranks, coded))
    }

    /// Such codes in the places of some ranks.
    fn coded(&self, ranks: &[u8], coded: Coded<T>) -> Self {
        let ((m, n), groups) = (self.shape, self.pattern.groups(self.shape.1));
        let mut words = vec![0u64; m * n.div_ceil(64)];
        for i in 0..m {
            let words = &mut words[i * n.div_ceil(64)..(i + 1) * n.div_ceil(64)];
            let mut mark = |column: usize| words[column / 64] |= 1 << (column % 64);
            for (group, &rank) in ranks[i * groups..(i + 1) * groups].iter().enumerate() {
                let mask = self.masks[rank as usize];
                (0..self.pattern.m).filter(|k| mask >> k & 1 == 1).for_each(|k| mark(group * self.pattern.m + k));
            }
            (groups * self.pattern.m..n).for_each(mark);
        }
        let stored = Stored::Coded(Bitmask::of_codes(n, words, coded));
        NmSparse { dtype: T::DTYPE, masks: self.masks.clone(), stored, ..*self }
    }

    /// The grid, if values are on one.
    pub fn grid(&self) -> Option<&Grid<T>> {
        self.codes().map(Coded::grid)
    }

    pub(super) fn codes(&self) -> Option<&Coded<T>> {
        if let Stored::Coded(form) = &self.stored { form.coded() } else { None }
    }

    /// Which entries are stored, m×n.
    pub fn kept(&self) -> Array2<bool> {
        let mut kept = Array2::from_elem(self.shape, false);
        (0..self.shape.0).for_each(|i| self.row(i, |column, _| kept[(i, column)] = true));
        kept
    }

    /// N:M.
    pub fn pattern(&self) -> Nm {
        self.pattern
    }
    /// The rank of each full group's choice among [`Nm::masks`], row by row; collected from the form that kernels
    /// read, if there is one.
    pub fn ranks(&self) -> Cow<'_, [u8]> {
        if let Stored::Rows { ranks, .. } = &self.stored {
            return ranks.into();
        }
        let mut ranks = Vec::new();
        let mut chosen = vec![0u8; self.pattern.groups(self.shape.1)];
        for i in 0..self.shape.0 {
            chosen.fill(0);
            self.row(i, |column, _| {
                if let Some(mask) = chosen.get_mut(column / self.pattern.m) {
                    *mask |= 1 << (column % self.pattern.m);
                }
            });
            let rank = |mask: &u8| self.masks.iter().position(|known| known == mask).unwrap_or_default() as u8;
            ranks.extend(chosen.iter().map(rank));
        }
        ranks.into()
    }
    /// The stored values, m × values of a row; collected as [`ranks`](Self::ranks).
    pub fn values(&self) -> Cow<'_, Dense<T>> {
        if let Stored::Rows { values, .. } = &self.stored {
            return Cow::Borrowed(values);
        }
        let mut values = Vec::with_capacity(self.stored());
        (0..self.shape.0).for_each(|i| self.row(i, |_, value| values.push(value)));
        let dim = (self.shape.0, self.pattern.values_per_row(self.shape.1));
        Cow::Owned(Dense::exact(Array2::from_shape_vec(dim, values).unwrap_or_default(), self.dtype))
    }

    /// The packed positions, m × [`Nm::position_bytes`].
    pub fn encode_positions(&self) -> Vec<u8> {
        let (groups, ranks) = (self.pattern.groups(self.shape.1), self.ranks());
        (0..self.shape.0).flat_map(|i| self.pattern.pack(&ranks[i * groups..(i + 1) * groups])).collect()
    }

    /// Reads the packed form back.
    ///
    /// # Errors
    /// [`Error::Shape`] if the bytes are no positions of this pattern.
    pub fn decode(pattern: Nm, columns: usize, positions: &[u8], values: Dense<T>) -> Result<Self> {
        let ranks = ranks(pattern, (values.shape().0, columns), positions)?;
        Self::new(pattern, columns, ranks, values)
    }

    /// Calls `each` with the column and value of all that is stored in row i, in ascending order.
    fn row(&self, i: usize, mut each: impl FnMut(usize, T)) {
        let (ranks, values) = match &self.stored {
            Stored::Rows { ranks, values } => (ranks, values),
            Stored::Single(form) => return form.row(i, |column, value| each(column, T::from_f64(value.into()))),
            Stored::Half(form) => return form.row(i, |column, value| each(column, T::from_f64(value.into()))),
            Stored::Coded(form) => {
                let mut scratch = Vec::new();
                return form
                    .row(Arch::new(), i, &mut scratch)
                    .entries()
                    .for_each(|(column, value)| each(column, value));
            }
        };
        let (groups, m) = (self.pattern.groups(self.shape.1), self.pattern.m);
        let row = values.values();
        let mut values = row.row(i).into_iter().copied();
        for (group, &rank) in ranks[i * groups..(i + 1) * groups].iter().enumerate() {
            let mut mask = self.masks[rank as usize];
            while mask != 0 {
                let Some(value) = values.next() else { return };
                each(group * m + mask.trailing_zeros() as usize, value);
                mask &= mask - 1;
            }
        }
        values.zip(groups * m..).for_each(|(value, column)| each(column, value));
    }

    /// The number of values.
    fn stored(&self) -> usize {
        self.shape.0 * self.pattern.values_per_row(self.shape.1)
    }

    /// A·W·B·x in one pass; `None` if there is no kernel for that, or it would be no faster than factor by factor.
    pub(super) fn wrapped(
        &self,
        left: &BlockDiagonal<T>,
        right: &BlockDiagonal<T>,
        x: ArrayView2<'_, T>,
    ) -> Option<Array2<T>> {
        if left.grid().is_some() || right.grid().is_some() {
            return None;
        }
        let single = |blocks| (blocks as &dyn Any).downcast_ref::<BlockDiagonal<f32>>();
        let (around, x) = ((single(left)?, single(right)?), T::as_f32(x)?);
        let mut y: Array2<T> = pages::zeros((left.shape().0, x.ncols()));
        let to = bytemuck::cast_slice_mut(y.as_slice_mut()?);
        let done = match &self.stored {
            Stored::Rows { .. } | Stored::Coded(_) => false,
            Stored::Single(form) => form.wrapped(around, x, to),
            Stored::Half(form) => form.wrapped(around, x, to),
        };
        done.then_some(y)
    }

    /// The product by the kernels of 2:4; `None` if the matrix is not in their form.
    fn by_kernel(&self, transposed: bool, x: ArrayView2<'_, T>) -> Option<Array2<T>> {
        match &self.stored {
            Stored::Rows { .. } => return None,
            Stored::Coded(form) if transposed => return Some(form.product_transposed(x)),
            Stored::Coded(form) => return Some(form.product(x)),
            Stored::Single(_) | Stored::Half(_) => {}
        }
        let (m, n) = self.shape;
        let mut y: Array2<T> = pages::zeros((if transposed { n } else { m }, x.ncols()));
        let (x, to) = (T::as_f32(x)?, bytemuck::cast_slice_mut(y.as_slice_mut()?));
        match (&self.stored, transposed) {
            (Stored::Rows { .. } | Stored::Coded(_), _) => return None,
            (Stored::Single(form), false) => form.product(x, to),
            (Stored::Single(form), true) => form.product_transposed(x, to),
            (Stored::Half(form), false) => form.product(x, to),
            (Stored::Half(form), true) => form.product_transposed(x, to),
        }
        Some(y)
    }
}

/// The ranks that m × n packed positions hold.
fn ranks(pattern: Nm, (m, n): (usize, usize), positions: &[u8]) -> Result<Vec<u8>> {
    if n == 0 || n > LONGEST {
        return Err(Error::shape("1 to 2^26 columns", n));
    }
    let width = pattern.position_bytes(n);
    if m.checked_mul(width) != Some(positions.len()) {
        return Err(Error::shape(format!("{m} x {width} bytes of positions"), positions.len()));
    }
    let row = |i: usize| pattern.unpack(&positions[i * width..(i + 1) * width], pattern.groups(n));
    let ranks: Option<Vec<Vec<u8>>> = (0..m).map(row).collect();
    Ok(ranks.ok_or_else(|| Error::shape("packed positions", "bytes that are none"))?.concat())
}

impl<T: Real> LinearOperator<T> for NmSparse<T> {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        assert_eq!(x.nrows(), self.shape.1, "rows of x");
        if let Some(y) = self.by_kernel(false, x) {
            return y;
        }
        let x = x.as_standard_layout();
        each_row(self.shape().0, x.ncols(), self.params(), |i, y| {
            self.row(i, |column, value| accumulate(y, value, x.row(column)));
        })
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        assert_eq!(x.nrows(), self.shape.0, "rows of x");
        if let Some(y) = self.by_kernel(true, x) {
            return y;
        }
        let x = x.as_standard_layout();
        let mut y = Array2::zeros((self.shape.1, x.ncols()));
        for (i, from) in x.rows().into_iter().enumerate() {
            self.row(i, |column, value| y.row_mut(column).scaled_add(value, &from));
        }
        y
    }
    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        rows_by(self.shape, rows, |row, to| self.row(row, |column, value| to[column] = value))
    }
    fn params(&self) -> usize {
        self.codes().map_or(self.stored(), Coded::params)
    }
    fn bytes(&self) -> u64 {
        let positions = (self.shape.0 * self.pattern.position_bytes(self.shape.1)) as u64;
        positions + self.codes().map_or(self.dtype.bytes(self.stored()) as u64, Coded::bytes)
    }
    fn flops(&self, columns: usize) -> u64 {
        2 * (self.stored() * columns) as u64
    }
    fn to_dense(&self) -> Array2<T> {
        let mut dense = Array2::zeros(self.shape());
        for i in 0..self.shape().0 {
            self.row(i, |column, value| dense[(i, column)] = value);
        }
        dense
    }
}

#[cfg(test)]
mod tests;
