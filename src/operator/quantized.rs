//! A matrix of small integers: round numbers on a grid, packed.
//!
//! > wᵢⱼ = sᵢ_g·(qᵢⱼ − zᵢ_g),  q in 0 … 2ᵇ−1,  g = ⌊j ÷ group⌋
//!
//! Consecutive columns of a row, a group, share a scale s and, on an asymmetric grid, a zero point z, an
//! integer of as many bits; on a symmetric one z is 2ᵇ⁻¹. Or a group has a number of 16 bits that is added to all of its
//! entries, wᵢⱼ = sᵢ_g·(qᵢⱼ − 2ᵇ⁻¹) + cᵢ_g. Codes are packed: on disk a row is a
//! stream of bits, lowest first, that ends on a whole byte; in memory rows may be side by side. An entry costs b bits and its part of
//! the group's scale: 4.125 bits for 4 bits in groups of 128 with a 16-bit scale.

use std::borrow::Cow;
use std::ops::Range;

use ndarray::{Array2, ArrayView2, Axis};
use pulp::Arch;

use super::LinearOperator;
use super::kernels::{ActivationBits, CodedRows, Inputs, PackedCodes, width};
use super::permutation::LONGEST;
use super::rows::rows_by;
use super::sparse::{panel_rows, some_rows, written, written_transposed};
use crate::error::{Error, Result};
use crate::scalar::Real;
use crate::threads::{self, Pace};

mod grid;

pub(crate) use self::grid::scale_dtype;
pub use self::grid::{Grid, ZeroPoint, ZeroPoints};

/// Rows of a call of the kernel that does not write them out, at least (it takes multiples of them) and at most.
const TOGETHER: (usize, usize) = (32, 512);

/// A matrix whose entries are on a grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized<T: Real> {
    grid: Grid<T>,
    codes: PackedCodes,
    activations: ActivationBits,
}

impl<T: Real> Quantized<T> {
    /// A matrix of n columns from its packed codes.
    ///
    /// # Errors
    /// [`Error::Shape`] if the grid has not ⌈n ÷ group⌉ groups, or codes are missing, too many or followed by
    /// bits that are not zero.
    pub fn new(columns: usize, grid: Grid<T>, codes: Vec<u8>) -> Result<Self> {
        if columns == 0 || columns > LONGEST {
            return Err(Error::shape("1 to 2^26 columns", columns));
        }
        let (m, groups) = grid.scales().shape();
        if groups != columns.div_ceil(grid.group()) {
            return Err(Error::shape(format!("scales of {} groups", columns.div_ceil(grid.group())), groups));
        }
        let width = width(columns, grid.bits());
        if m.checked_mul(width) != Some(codes.len()) {
            return Err(Error::shape(format!("{m} x {width} bytes of codes"), codes.len()));
        }
        let left = (8 - (columns * usize::from(grid.bits())) % 8) % 8;
        let clean = |row: &[u8]| row.last().is_none_or(|&last| left == 0 || last >> (8 - left) == 0);
        if !codes.chunks(width).all(clean) {
            return Err(Error::shape(format!("{columns} codes in each row"), "bits set beyond them"));
        }
        let codes = PackedCodes::new(grid.bits(), grid.group(), (m, columns), codes, grid.beside());
        Ok(Quantized { grid, codes, activations: ActivationBits::default() })
    }

    /// The nearest entries on a grid.
    ///
    /// # Errors
    /// [`Error::Shape`] if the grid is of another shape.
    pub fn nearest(values: ArrayView2<'_, T>, grid: Grid<T>) -> Result<Self> {
        let expected = (values.nrows(), values.ncols().div_ceil(grid.group()));
        if grid.scales().shape() != expected {
            return Err(Error::shape(expected, grid.scales().shape()));
        }
        let codes = grid.encode(values);
        Self::new(values.ncols(), grid, codes)
    }

    /// The same with inputs in so many bits, or more: faster with several vectors at once, and less exact. Nothing of it is stored.
    pub fn with_activation_bits(self, activations: ActivationBits) -> Self {
        Quantized { activations, ..self }
    }
    /// Bits of its inputs, at least.
    pub fn activation_bits(&self) -> ActivationBits {
        self.activations
    }

    /// What entries may be.
    pub fn grid(&self) -> &Grid<T> {
        &self.grid
    }
    /// m rows of ⌈n·b/8⌉ bytes, as they are on disk. (In memory rows may be side by side: then they are gathered.)
    pub fn codes(&self) -> Cow<'_, [u8]> {
        self.codes.rows(0..self.shape().0)
    }

    /// Some of its rows, by themselves.
    pub(crate) fn select(&self, rows: &[usize]) -> Result<Self> {
        let (codes, width) = (self.codes(), width(self.shape().1, self.grid.bits()));
        let bytes = rows.iter().flat_map(|&row| &codes[row * width..(row + 1) * width]).copied().collect();
        let chosen = Self::new(self.shape().1, self.grid.select(rows)?, bytes)?;
        Ok(chosen.with_activation_bits(self.activations))
    }

    fn rows(&self) -> CodedRows<'_, T> {
        CodedRows {
            group: self.grid.group(),
            codes: &self.codes,
            groups: self.grid.scales().shape().1,
            beside: self.grid.beside(),
            activations: self.activations,
        }
    }
}

impl<T: Real> LinearOperator<T> for Quantized<T> {
    fn shape(&self) -> (usize, usize) {
        self.codes.shape()
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        if let Some(inputs) = self.inputs(x) {
            return self.products(&inputs, x.ncols());
        }
        let mut y = Array2::zeros((self.shape().0, x.ncols()));
        written(self.shape(), x, y.view_mut(), |rows, to| self.write(rows, to));
        y
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        assert_eq!(x.nrows(), self.shape().0, "rows of x");
        let mut y = Array2::zeros((self.shape().1, x.ncols()));
        written_transposed(self.shape().1, x, y.view_mut(), |rows, to| self.write(rows, to));
        y
    }
    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        rows_by(self.shape(), rows, |row, to| self.write(row..row + 1, to))
    }
    fn params(&self) -> usize {
        self.shape().0 * self.shape().1 + self.grid.own_params()
    }
    fn bytes(&self) -> u64 {
        self.codes.len() as u64 + self.grid.own_bytes()
    }
    fn flops(&self, columns: usize) -> u64 {
        2 * (self.shape().0 * self.shape().1 * columns) as u64
    }
    fn to_dense(&self) -> Array2<T> {
        let mut dense = Array2::zeros(self.shape());
        let height = panel_rows(1);
        for (at, mut to) in dense.axis_chunks_iter_mut(Axis(0), height).enumerate() {
            let first = at * height;
            self.write(first..first + to.nrows(), to.as_slice_mut().unwrap_or_default());
        }
        dense
    }
}

impl<T: Real> Quantized<T> {
    /// Writes some rows out.
    fn write(&self, rows: Range<usize>, to: &mut [T]) {
        self.rows().write(rows, Arch::new(), to);
    }

    /// Inputs, laid out for [`products`](Self::products); `None` where rows had better be written out.
    pub(super) fn inputs(&self, x: ArrayView2<'_, T>) -> Option<Inputs<T>> {
        self.rows().inputs(x)
    }

    /// Whether inputs that were laid out for another matrix of as many columns serve this one.
    pub(super) fn meets(&self, x: &Inputs<T>) -> bool {
        self.rows().meets(x)
    }

    /// The product of some rows, of which the first is a multiple of 32, with b inputs that were laid out, row by row.
    pub(super) fn some_products(&self, x: &Inputs<T>, first: usize, b: usize, y: &mut [T]) {
        self.rows().products(first..first + y.len() / b, Arch::new(), x, y);
    }

    /// Rows of a call, of so many in all: enough calls for all threads. (There may be no rows at all.)
    pub(super) fn together(rows: usize) -> usize {
        threads::share(rows).next_multiple_of(TOGETHER.0).clamp(TOGETHER.0, TOGETHER.1)
    }

    /// The product with b inputs that were laid out.
    pub(super) fn products(&self, x: &Inputs<T>, b: usize) -> Array2<T> {
        let (m, n) = self.shape();
        some_rows(m, b, Self::together(m), Pace::CODES.time(m * n, b), |first, y| self.some_products(x, first, b, y))
    }
}

#[cfg(test)]
mod tests;
