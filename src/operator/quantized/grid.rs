//! The numbers that quantised entries may be: scales, and where their zero is.

use ndarray::{Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::super::kernels::{Beside, each_code, pack, width};
use super::super::permutation::LONGEST;
use super::super::{Dense, LinearOperator};
use crate::error::{Error, Result};
use crate::scalar::{DType, Real};

/// Whether each group says where its zero is, and how. (The names are those of torchao's `ZeroPointDomain`.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroPoint {
    /// It is the middle code: a symmetric grid.
    #[default]
    None,
    /// It is a code, as many bits as all others.
    Integer,
    /// A number of 16 bits stands for the middle code, and zero need not be on the grid.
    Float,
}

/// The zero points of all groups, m × groups.
#[derive(Debug, Clone, PartialEq)]
pub enum ZeroPoints<T: Real> {
    /// [`ZeroPoint::None`].
    None,
    /// [`ZeroPoint::Integer`]: the codes of zero.
    Integer(Array2<u8>),
    /// [`ZeroPoint::Float`]: the numbers of the middle code.
    Float(Dense<T>),
}

impl<T: Real> ZeroPoints<T> {
    /// Which of them they are.
    pub fn kind(&self) -> ZeroPoint {
        match self {
            ZeroPoints::None => ZeroPoint::None,
            ZeroPoints::Integer(_) => ZeroPoint::Integer,
            ZeroPoints::Float(_) => ZeroPoint::Float,
        }
    }
}

/// The numbers that an m×n matrix may have: scales and zero points for each group of each row.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid<T: Real> {
    bits: u8,
    group: usize,
    scales: Dense<T>,
    zeros: ZeroPoints<T>,
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
    pub fn new(bits: u8, group: usize, scales: Dense<T>, zeros: ZeroPoints<T>) -> Result<Self> {
        if !Self::BITS.contains(&bits) {
            return Err(Error::shape("2 to 8 bits", bits));
        }
        if group == 0 || group > LONGEST {
            return Err(Error::shape("groups of 1 to 2^26 columns", group));
        }
        let shape = match &zeros {
            ZeroPoints::None => scales.shape(),
            ZeroPoints::Integer(zeros) => zeros.dim(),
            ZeroPoints::Float(zeros) => zeros.shape(),
        };
        if shape != scales.shape() {
            return Err(Error::shape(scales.shape(), shape));
        }
        if let ZeroPoints::Integer(zeros) = &zeros
            && let Some(zero) = zeros.iter().find(|&&zero| zero > top(bits))
        {
            return Err(Error::shape(format!("zero points of {bits} bits"), zero));
        }
        let zeros = match zeros {
            ZeroPoints::Integer(zeros) => ZeroPoints::Integer(zeros.as_standard_layout().into_owned()),
            ZeroPoints::Float(zeros) => ZeroPoints::Float(zeros.widened()),
            ZeroPoints::None => ZeroPoints::None,
        };
        Ok(Grid { bits, group, scales: scales.widened(), zeros })
    }

    /// The same with other scales of the same shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if they are of another.
    pub(crate) fn scaled(&self, scales: Dense<T>) -> Result<Self> {
        Grid::new(self.bits, self.group, scales, self.zeros.clone())
    }

    /// The scales and zero points of some rows.
    pub(super) fn select(&self, rows: &[usize]) -> Result<Self> {
        let dense = |of: &Dense<T>| Dense::rounded(of.values().select(Axis(0), rows), of.dtype());
        let zeros = match &self.zeros {
            ZeroPoints::None => ZeroPoints::None,
            ZeroPoints::Integer(zeros) => ZeroPoints::Integer(zeros.select(Axis(0), rows)),
            ZeroPoints::Float(zeros) => ZeroPoints::Float(dense(zeros)?),
        };
        Grid::new(self.bits, self.group, dense(&self.scales)?, zeros)
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
    /// m × groups, if there are any.
    pub fn zeros(&self) -> &ZeroPoints<T> {
        &self.zeros
    }
    /// The code of a group that scale × 0 is added to: its zero point, or the middle.
    pub fn zero(&self, row: usize, group: usize) -> u8 {
        match &self.zeros {
            ZeroPoints::Integer(zeros) => zeros[(row, group)],
            _ => 1 << (self.bits - 1),
        }
    }
    /// The number of that code: zero but where zero points are floats.
    pub fn offset(&self, row: usize, group: usize) -> T {
        match &self.zeros {
            ZeroPoints::Float(zeros) => zeros.values()[(row, group)],
            _ => T::zero(),
        }
    }

    /// Bytes on disk of an m×n matrix: codes, scales of 16 bits and zero points.
    pub fn bytes_of((m, n): (usize, usize), bits: u8, group: usize, zero: ZeroPoint) -> u64 {
        let groups = n.div_ceil(group.max(1));
        let zeros = match zero {
            ZeroPoint::None => 0,
            ZeroPoint::Integer => width(groups, bits),
            ZeroPoint::Float => 2 * groups,
        };
        (m * (width(n, bits) + 2 * groups + zeros)) as u64
    }

    /// Bytes of a row of n codes.
    pub fn row_bytes(n: usize, bits: u8) -> u64 {
        width(n, bits) as u64
    }

    /// All of it but the width, row by row.
    pub(super) fn beside(&self) -> Beside<'_, T> {
        let (zeros, offsets) = match &self.zeros {
            ZeroPoints::None => (None, None),
            ZeroPoints::Integer(zeros) => (zeros.as_slice(), None),
            ZeroPoints::Float(offsets) => (None, Some(offsets.wide())),
        };
        Beside { scales: self.scales.wide(), zeros, offsets }
    }

    /// Numbers that are stored beside the codes.
    pub(in super::super) fn own_params(&self) -> usize {
        let offsets = if let ZeroPoints::Float(zeros) = &self.zeros { zeros.params() } else { 0 };
        self.scales.params() + offsets
    }

    /// Bytes of scales and zero points.
    pub(in super::super) fn own_bytes(&self) -> u64 {
        let zeros = match &self.zeros {
            ZeroPoints::None => 0,
            ZeroPoints::Integer(zeros) => (zeros.nrows() * width(zeros.ncols(), self.bits)) as u64,
            ZeroPoints::Float(zeros) => zeros.bytes(),
        };
        zeros + self.scales.bytes()
    }

    /// The nearest code to a value in a group of a row.
    pub(in super::super) fn code(&self, row: usize, group: usize, value: T) -> u8 {
        let (scale, zero) = (self.scales.values()[(row, group)], T::from_f64(self.zero(row, group).into()));
        let value = value - self.offset(row, group);
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

    /// The integer zero points as they are stored: a row is a stream of bits.
    pub(in super::super) fn packed_zeros(&self) -> Option<Vec<u8>> {
        let ZeroPoints::Integer(zeros) = &self.zeros else { return None };
        let mut packed = Vec::with_capacity(zeros.nrows() * width(zeros.ncols(), self.bits));
        zeros.rows().into_iter().for_each(|row| pack(self.bits, &row.to_vec(), &mut packed));
        Some(packed)
    }

    /// Reads [`packed_zeros`](Self::packed_zeros) back.
    pub(in super::super) fn unpack_zeros(bits: u8, dim: (usize, usize), packed: &[u8]) -> Result<Array2<u8>> {
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

/// The dtype that holds such scales best in 16 bits, and numbers up to `largest` beside them: F16 unless a scale would be
/// subnormal or anything too large.
pub(crate) fn scale_dtype<T: Real>(scales: ArrayView2<'_, T>, largest: f64) -> DType {
    let fits = |v: &T| *v == T::zero() || (6.2e-5..6.5e4).contains(&v.wide().abs());
    if largest < 6.5e4 && scales.iter().all(fits) { DType::F16 } else { DType::BF16 }
}
