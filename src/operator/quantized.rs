//! A matrix of small integers: round numbers on a grid, packed.
//!
//! > wᵢⱼ = sᵢ_g·(qᵢⱼ − zᵢ_g),  q in 0 … 2ᵇ−1,  g = ⌊j ÷ group⌋
//!
//! Consecutive columns of a row, a group, share a scale s and, on an asymmetric grid, a zero point z, an
//! integer of as many bits; on a symmetric one z is 2ᵇ⁻¹. Codes are packed: on disk a row is a
//! stream of bits, lowest first, that ends on a whole byte; in memory rows may be side by side. An entry costs b bits and its part of
//! the group's scale: 4.125 bits for 4 bits in groups of 128 with a 16-bit scale.

use std::borrow::Cow;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use pulp::Arch;

use super::kernels::{CodedRows, PackedCodes, each_code, pack, width};
use super::permutation::LONGEST;
use super::sparse::{each_panel, fitted, some_rows};
use super::{Dense, LinearOperator};
use crate::error::{Error, Result};
use crate::linalg::matmul_into;
use crate::scalar::{DType, Real};

/// Rows of a call of the kernel that does not write them out.
const TOGETHER: usize = 128;

/// Rows that are written out at a time: with many vectors more of them, as each panel's product lays out the vectors anew.
fn panel_rows(vectors: usize) -> usize {
    if vectors > 32 { 512 } else { 128 }
}

/// The numbers that an m×n matrix may have: scales and zero points for each group of each row.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid<T> {
    bits: u8,
    group: usize,
    scales: Dense<T>,
    zeros: Option<Array2<u8>>,
}

impl<T: Real> Grid<T> {
    /// Widths that exist.
    pub const BITS: std::ops::RangeInclusive<u8> = 2..=8;

    /// A grid of 2^`bits` levels for groups of `group` columns; scales are m × groups, and so are zero points,
    /// if there are any.
    ///
    /// # Errors
    /// [`Error::Shape`] if bits are not 2 to 8, the group is empty, the two differ in shape or a zero point has
    /// more bits.
    pub fn new(bits: u8, group: usize, scales: Dense<T>, zeros: Option<Array2<u8>>) -> Result<Self> {
        if !Self::BITS.contains(&bits) {
            return Err(Error::shape("2 to 8 bits", bits));
        }
        if group == 0 || group > LONGEST {
            return Err(Error::shape("groups of 1 to 2^26 columns", group));
        }
        if let Some(zeros) = &zeros {
            if zeros.dim() != scales.shape() {
                return Err(Error::shape(scales.shape(), zeros.dim()));
            }
            if let Some(zero) = zeros.iter().find(|&&zero| zero > top(bits)) {
                return Err(Error::shape(format!("zero points of {bits} bits"), zero));
            }
        }
        Ok(Grid { bits, group, scales, zeros })
    }

    /// b.
    pub fn bits(&self) -> u8 {
        self.bits
    }
    /// Columns that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }
    /// m × groups.
    pub fn scales(&self) -> &Dense<T> {
        &self.scales
    }
    /// m × groups, if the grid is asymmetric.
    pub fn zeros(&self) -> Option<ArrayView2<'_, u8>> {
        self.zeros.as_ref().map(|zeros| zeros.view())
    }
    /// The zero point of a group.
    pub fn zero(&self, row: usize, group: usize) -> u8 {
        self.zeros.as_ref().map_or(1 << (self.bits - 1), |zeros| zeros[(row, group)])
    }

    /// Bytes on disk of an m×n matrix: codes, scales of 16 bits and zero points.
    pub fn bytes_of((m, n): (usize, usize), bits: u8, group: usize, symmetric: bool) -> u64 {
        let groups = n.div_ceil(group.max(1));
        let zeros = if symmetric { 0 } else { width(groups, bits) };
        (m * (width(n, bits) + 2 * groups + zeros)) as u64
    }

    /// Bytes of a row of n codes.
    pub fn row_bytes(n: usize, bits: u8) -> u64 {
        width(n, bits) as u64
    }

    /// Bytes of scales and zero points.
    pub(super) fn own_bytes(&self) -> u64 {
        let zeros = self.zeros.as_ref().map_or(0, |zeros| zeros.nrows() * width(zeros.ncols(), self.bits));
        zeros as u64 + self.scales.bytes()
    }

    /// The nearest code to a value in a group of a row.
    pub(super) fn code(&self, row: usize, group: usize, value: T) -> u8 {
        let (scale, zero) = (self.scales.values()[(row, group)], T::from_f64(self.zero(row, group).into()));
        let nearest = if scale == T::zero() { zero } else { (value / scale + zero).round() };
        nearest.max(T::zero()).min(T::from_f64(top(self.bits).into())).wide() as u8
    }

    /// The nearest codes of a matrix, packed. Exact for numbers on the grid.
    pub fn encode(&self, values: ArrayView2<'_, T>) -> Vec<u8> {
        let mut packed = Vec::with_capacity(values.nrows() * width(values.ncols(), self.bits));
        let mut codes = vec![0u8; values.ncols()];
        for (i, row) in values.rows().into_iter().enumerate() {
            for (j, (code, &value)) in codes.iter_mut().zip(row).enumerate() {
                *code = self.code(i, j / self.group, value);
            }
            pack(self.bits, &codes, &mut packed);
        }
        packed
    }

    /// The zero points as they are stored: a row is a stream of bits.
    pub(super) fn packed_zeros(&self) -> Option<Vec<u8>> {
        let zeros = self.zeros.as_ref()?;
        let mut packed = Vec::with_capacity(zeros.nrows() * width(zeros.ncols(), self.bits));
        zeros.rows().into_iter().for_each(|row| pack(self.bits, &row.to_vec(), &mut packed));
        Some(packed)
    }

    /// Reads [`packed_zeros`](Self::packed_zeros) back.
    pub(super) fn unpack_zeros(bits: u8, dim: (usize, usize), packed: &[u8]) -> Result<Array2<u8>> {
        if !Self::BITS.contains(&bits) {
            return Err(Error::shape("2 to 8 bits", bits));
        }
        let bytes = width(dim.1, bits);
        if dim.0.checked_mul(bytes) != Some(packed.len()) {
            return Err(Error::shape(format!("{} x {bytes} bytes of zero points", dim.0), packed.len()));
        }
        let mut zeros = Array2::zeros(dim);
        for (mut to, from) in zeros.rows_mut().into_iter().zip(packed.chunks(bytes.max(1))) {
            each_code(bits, from, dim.1, |j, code| to[j] = code);
        }
        Ok(zeros)
    }
}

/// The largest code.
fn top(bits: u8) -> u8 {
    u8::MAX >> (8 - bits)
}

/// A matrix whose entries are on a grid.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized<T> {
    grid: Grid<T>,
    codes: PackedCodes,
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
        let (m, groups) = grid.scales.shape();
        if groups != columns.div_ceil(grid.group) {
            return Err(Error::shape(format!("scales of {} groups", columns.div_ceil(grid.group)), groups));
        }
        let width = width(columns, grid.bits);
        if m.checked_mul(width) != Some(codes.len()) {
            return Err(Error::shape(format!("{m} x {width} bytes of codes"), codes.len()));
        }
        let left = (8 - (columns * usize::from(grid.bits)) % 8) % 8;
        let clean = |row: &[u8]| row.last().is_none_or(|&last| left == 0 || last >> (8 - left) == 0);
        if !codes.chunks(width).all(clean) {
            return Err(Error::shape(format!("{columns} codes in each row"), "bits set beyond them"));
        }
        let codes = PackedCodes::new::<T>(grid.bits, grid.group, (m, columns), codes);
        Ok(Quantized { grid, codes })
    }

    /// The nearest entries on a grid.
    ///
    /// # Errors
    /// [`Error::Shape`] if the grid is of another shape.
    pub fn nearest(values: ArrayView2<'_, T>, grid: Grid<T>) -> Result<Self> {
        let expected = (values.nrows(), values.ncols().div_ceil(grid.group));
        if grid.scales.shape() != expected {
            return Err(Error::shape(expected, grid.scales.shape()));
        }
        let codes = grid.encode(values);
        Self::new(values.ncols(), grid, codes)
    }

    /// What entries may be.
    pub fn grid(&self) -> &Grid<T> {
        &self.grid
    }
    /// m rows of ⌈n·b/8⌉ bytes, as they are on disk. (In memory rows may be side by side: then they are gathered.)
    pub fn codes(&self) -> Cow<'_, [u8]> {
        self.codes.rows(0..self.shape().0)
    }

    fn rows(&self) -> CodedRows<'_, T> {
        CodedRows {
            group: self.grid.group,
            codes: &self.codes,
            groups: self.grid.scales.shape().1,
            scales: self.grid.scales.values().to_slice().unwrap_or_default(),
            zeros: self.grid.zeros.as_ref().and_then(|zeros| zeros.as_slice()),
        }
    }
}

impl<T: Real> LinearOperator<T> for Quantized<T> {
    fn shape(&self) -> (usize, usize) {
        self.codes.shape()
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let (arch, (m, n), b) = (Arch::new(), self.shape(), x.ncols());
        let rows = self.rows();
        if let Some(x) = rows.inputs(x) {
            return some_rows(m, b, TOGETHER, m * n, |first, y| {
                rows.products(first..first + y.len() / b, arch, &x, y);
            });
        }
        let mut y = Array2::zeros((m, b));
        let height = panel_rows(b);
        let panel = |rows: &mut Array2<T>, (at, y): (usize, ArrayViewMut2<'_, T>)| {
            matmul_into(T::one(), self.panel(arch, at * height, y.nrows(), rows), x, T::zero(), y);
        };
        each_panel(y.axis_chunks_iter_mut(Axis(0), height), m * n * b, panel);
        y
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        assert_eq!(x.nrows(), self.shape().0, "rows of x");
        let (mut y, mut scratch) = (Array2::zeros((self.shape().1, x.ncols())), Array2::default((0, 0)));
        let height = panel_rows(x.ncols());
        for (at, x) in x.axis_chunks_iter(Axis(0), height).enumerate() {
            let rows = self.panel(Arch::new(), at * height, x.nrows(), &mut scratch);
            matmul_into(T::one(), rows.t(), x, T::one(), y.view_mut());
        }
        y
    }
    fn params(&self) -> usize {
        self.shape().0 * self.shape().1 + self.grid.scales.params()
    }
    fn bytes(&self) -> u64 {
        self.codes.len() as u64 + self.grid.own_bytes()
    }
    fn flops(&self, columns: usize) -> u64 {
        2 * (self.shape().0 * self.shape().1 * columns) as u64
    }
    fn to_dense(&self) -> Array2<T> {
        let (mut dense, mut scratch) = (Array2::zeros(self.shape()), Array2::default((0, 0)));
        let height = panel_rows(1);
        for (at, mut to) in dense.axis_chunks_iter_mut(Axis(0), height).enumerate() {
            let count = to.nrows();
            to.assign(&self.panel(Arch::new(), at * height, count, &mut scratch));
        }
        dense
    }
}

impl<T: Real> Quantized<T> {
    /// Some rows from one on, written out.
    fn panel<'s>(&self, arch: Arch, first: usize, count: usize, panel: &'s mut Array2<T>) -> ArrayView2<'s, T> {
        self.rows().write(first..first + count, arch, fitted(panel, (count, self.shape().1)));
        panel.view()
    }
}

/// The dtype that holds such scales best in 16 bits: F16 unless one would be subnormal or too large.
pub(crate) fn scale_dtype<T: Real>(scales: ArrayView2<'_, T>) -> DType {
    let fits = |v: &T| *v == T::zero() || (6.2e-5..6.5e4).contains(&v.wide().abs());
    if scales.iter().all(fits) { DType::F16 } else { DType::BF16 }
}

#[cfg(test)]
mod tests;
