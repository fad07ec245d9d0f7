//! A block-diagonal matrix of rectangular blocks.

use half::bf16;
use ndarray::{Array2, ArrayView2};
use pulp::Arch;

use super::coded::Coded;
use super::kernels::{Job, Output, Stretch, block_product, stretch_product};
use super::permutation::LONGEST;
use super::{Grid, LinearOperator, Permutation};
use crate::error::{Error, Result};
use crate::linalg::pages;
use crate::scalar::{DType, Real, check_finite};

/// diag(B₀, B₁, …) with blocks of any shape, one after the other along both axes. Like those of
/// [`Dense`](super::Dense), its values are exactly representable in its stored dtype.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockDiagonal<T: Real> {
    values: Values<T>,
    extents: Vec<(usize, usize)>,
    dtype: DType,
}

/// The blocks one after the other, each row-major. BF16 stays as it is: half the memory traffic. Codes are
/// written out for each product.
#[derive(Debug, Clone, PartialEq)]
enum Values<T: Real> {
    Wide(Vec<T>),
    Bf16(Vec<bf16>),
    Coded(Coded<T>),
}

impl<T: Real> BlockDiagonal<T> {
    /// A leaf stored in the compute type. `values` are the blocks one after the other, each row-major;
    /// `extents` their (rows, columns).
    ///
    /// # Errors
    /// As [`rounded`](Self::rounded).
    pub fn new(values: Vec<T>, extents: Vec<(usize, usize)>) -> Result<Self> {
        Self::rounded(values, extents, T::DTYPE)
    }

    /// A leaf stored in `dtype`; the values are rounded to it now (to nearest, ties to even).
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many values as the blocks hold, or more than 2²⁶ rows or
    /// columns; [`Error::UnsupportedDType`] if
    /// `dtype` holds no floats; [`Error::NonFinite`] if a value is not finite or overflows `dtype`.
    pub fn rounded(mut values: Vec<T>, extents: Vec<(usize, usize)>, dtype: DType) -> Result<Self> {
        if !dtype.is_float() {
            return Err(Error::UnsupportedDType { dtype });
        }
        check_sides(&extents)?;
        if Some(values.len()) != count(&extents) {
            return Err(Error::shape(format!("{} blocks", extents.len()), format!("{} values", values.len())));
        }
        if dtype != T::DTYPE {
            values.iter_mut().for_each(|v| *v = v.round_to(dtype));
        }
        check_finite("factor", &values)?;
        let values = match dtype {
            DType::BF16 => Values::Bf16(values.iter().map(|v| bf16::from_f64(v.wide())).collect()),
            _ => Values::Wide(values),
        };
        Ok(BlockDiagonal { values, extents, dtype })
    }

    /// The same blocks with the nearest values on a grid of all their rows, m × ⌈columns of the widest ÷ group⌉:
    /// groups count from the first column of each block.
    ///
    /// # Errors
    /// [`Error::Shape`] if the grid is of another shape.
    pub fn quantized(&self, grid: Grid<T>) -> Result<Self> {
        let (values, mut at) = (self.to_values(), 0);
        let rows = lengths(&self.extents).map(|count| {
            at += count;
            values[at - count..at].iter().copied().enumerate().collect()
        });
        let coded = Coded::nearest(grid, self.widest(), rows)?;
        Ok(BlockDiagonal { values: Values::Coded(coded), extents: self.extents.clone(), dtype: T::DTYPE })
    }

    /// Reads such a form back: each row's codes are a stream of bits, lowest first, ended on a whole byte.
    ///
    /// # Errors
    /// [`Error::Shape`] if extents, grid and codes do not fit each other.
    pub fn decode_codes(extents: Vec<(usize, usize)>, grid: Grid<T>, codes: Vec<u8>) -> Result<Self> {
        check_sides(&extents)?;
        let widest = extents.iter().map(|extent| extent.1).max().unwrap_or(0);
        let coded = Coded::new(grid, widest, lengths(&extents), codes)?;
        Ok(BlockDiagonal { values: Values::Coded(coded), extents, dtype: T::DTYPE })
    }

    /// The grid, if values are on one.
    pub fn grid(&self) -> Option<&Grid<T>> {
        self.codes().map(Coded::grid)
    }

    pub(super) fn codes(&self) -> Option<&Coded<T>> {
        if let Values::Coded(codes) = &self.values { Some(codes) } else { None }
    }

    /// Columns of the widest block.
    pub fn widest(&self) -> usize {
        self.extents.iter().map(|extent| extent.1).max().unwrap_or(0)
    }

    /// (rows, columns) of each block.
    pub fn extents(&self) -> &[(usize, usize)] {
        &self.extents
    }

    /// The dtype it is stored in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The blocks one after the other, each row-major.
    pub fn to_values(&self) -> Vec<T> {
        match &self.values {
            Values::Wide(values) => values.clone(),
            Values::Bf16(values) => values.iter().map(|v| T::from_f64(v.to_f64())).collect(),
            Values::Coded(codes) => {
                let (arch, mut all, mut row) = (Arch::new(), Vec::with_capacity(codes.stored()), Vec::new());
                for (i, count) in lengths(&self.extents).enumerate() {
                    let group = codes.grid().group();
                    let runs = (0..count).step_by(group).map(|from| group.min(count - from));
                    codes.write(arch, i, runs, &mut row);
                    all.extend_from_slice(&row);
                }
                all
            }
        }
    }

    /// The extents of all blocks, if they are the same.
    pub fn uniform(&self) -> Option<(usize, usize)> {
        let first = self.extents.first()?;
        self.extents.iter().all(|extent| extent == first).then_some(*first)
    }

    /// Bytes on disk of blocks of these extents: the values and, unless they are all alike, two
    /// 32-bit extents of each block.
    pub fn bytes_of(extents: &[(usize, usize)], dtype: DType) -> u64 {
        let alike = extents.windows(2).all(|pair| pair[0] == pair[1]);
        let values: usize = extents.iter().map(|(rows, columns)| rows * columns).sum();
        let table = if alike && values > 0 { 0 } else { 8 * extents.len() };
        (dtype.bytes(values) + table) as u64
    }

    /// Rows of the result of [`between`](Self::between).
    pub(crate) fn height(
        &self,
        transposed: bool,
        scatter: Option<&Permutation>,
        gather: Option<&Permutation>,
    ) -> usize {
        let (rows, columns) = self.shape();
        match transposed {
            false => scatter.map_or(rows, Permutation::rows),
            true => gather.map_or(columns, Permutation::columns),
        }
    }

    /// Columns `from..` of y ← S·diag(B)·G·x, or its transpose Gᵀ·diag(B)ᵀ·Sᵀ·x, as many as x has, for
    /// permutations on either side, in one pass over the blocks: the shuffles are part of its loads and stores. Rows
    /// that nothing is written to stay as they are.
    pub(crate) fn between(
        &self,
        transposed: bool,
        scatter: Option<&Permutation>,
        gather: Option<&Permutation>,
        x: ArrayView2<'_, T>,
        (y, from): (&mut Array2<T>, usize),
    ) {
        let (targets, sources) = (scatter.map(Permutation::targets), gather.map(Permutation::sources));
        let (scatter, gather) = if transposed { (sources, targets) } else { (targets, sources) };
        let extents = &self.extents[..];
        match &self.values {
            Values::Wide(values) => block_product(&Job { values, extents, transposed, x, gather }, scatter, y, from),
            Values::Bf16(values) => block_product(&Job { values, extents, transposed, x, gather }, scatter, y, from),
            Values::Coded(_) => {
                let values = &self.to_values();
                block_product(&Job { values, extents, transposed, x, gather }, scatter, y, from);
            }
        }
    }

    /// A stretch of the blocks times the rows of x that it reads, on this thread.
    pub(crate) fn stretch(&self, arch: Arch, stretch: &Stretch, x: ArrayView2<'_, T>, out: Output<'_, T>) {
        match &self.values {
            Values::Wide(values) => stretch_product(arch, values, stretch, x, out),
            Values::Bf16(values) => stretch_product(arch, values, stretch, x, out),
            Values::Coded(_) => stretch_product(arch, &self.to_values(), stretch, x, out),
        }
    }

    /// The number of values.
    pub(super) fn stored(&self) -> usize {
        self.extents.iter().map(|(rows, columns)| rows * columns).sum()
    }

    fn alone(&self, transposed: bool, x: ArrayView2<'_, T>) -> Array2<T> {
        let mut y = pages::zeros((self.height(transposed, None, None), x.ncols()));
        self.between(transposed, None, None, x, (&mut y, 0));
        y
    }
}

/// Columns of the block of each row.
fn lengths(extents: &[(usize, usize)]) -> impl Iterator<Item = usize> {
    extents.iter().flat_map(|&(rows, columns)| std::iter::repeat_n(columns, rows))
}

/// Blocks of no size take no bytes, however long they say they are.
fn check_sides(extents: &[(usize, usize)]) -> Result<()> {
    let sides = [extents.iter().map(|e| e.0 as u128).sum::<u128>(), extents.iter().map(|e| e.1 as u128).sum()];
    match sides.iter().find(|&&side| side > LONGEST as u128) {
        Some(&side) => Err(Error::shape("at most 2^26 rows and columns", side)),
        None => Ok(()),
    }
}

/// Numbers that blocks hold, unless that overflows.
fn count(extents: &[(usize, usize)]) -> Option<usize> {
    extents.iter().try_fold(0usize, |sum, (rows, columns)| sum.checked_add(rows.checked_mul(*columns)?))
}

impl<T: Real> LinearOperator<T> for BlockDiagonal<T> {
    fn shape(&self) -> (usize, usize) {
        self.extents.iter().fold((0, 0), |(m, n), (rows, columns)| (m + rows, n + columns))
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        self.alone(false, x)
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        self.alone(true, x)
    }
    fn params(&self) -> usize {
        self.codes().map_or_else(|| self.stored(), Coded::params)
    }
    fn bytes(&self) -> u64 {
        match self.codes() {
            None => Self::bytes_of(&self.extents, self.dtype),
            Some(codes) => {
                let values = self.dtype.bytes(self.stored()) as u64;
                Self::bytes_of(&self.extents, self.dtype) - values + codes.bytes()
            }
        }
    }
    fn flops(&self, columns: usize) -> u64 {
        2 * self.stored() as u64 * columns as u64
    }
    fn to_dense(&self) -> Array2<T> {
        let mut dense = pages::zeros(self.shape());
        let (values, mut at, mut corner) = (self.to_values(), 0, (0, 0));
        for &(rows, columns) in &self.extents {
            for i in 0..rows {
                for j in 0..columns {
                    dense[(corner.0 + i, corner.1 + j)] = values[at + i * columns + j];
                }
            }
            at += rows * columns;
            corner = (corner.0 + rows, corner.1 + columns);
        }
        dense
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize) -> Vec<f64> {
        (0..count).map(|i| ((i * 7) % 11) as f64 - 5.0).collect()
    }

    #[test]
    fn multiplies_like_its_dense_form() {
        for extents in [vec![(2, 3)], vec![(2, 3), (1, 1), (4, 2)], vec![(0, 3), (3, 0), (2, 2)], vec![]] {
            for dtype in [DType::F64, DType::BF16] {
                let blocks = BlockDiagonal::rounded(numbers(count(&extents).unwrap()), extents.clone(), dtype).unwrap();
                let dense = blocks.to_dense();
                assert_eq!(dense.dim(), blocks.shape());
                for b in [0, 1, 5] {
                    let (x, y) = (numbers(dense.ncols() * b), numbers(dense.nrows() * b));
                    let x = Array2::from_shape_vec((dense.ncols(), b), x).unwrap();
                    let y = Array2::from_shape_vec((dense.nrows(), b), y).unwrap();
                    assert_eq!(blocks.product(x.view()), dense.dot(&x));
                    assert_eq!(blocks.product_transposed(y.view()), dense.t().dot(&y));
                }
            }
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        assert!(matches!(BlockDiagonal::new(numbers(5), vec![(2, 3)]), Err(Error::Shape { .. })));
        assert!(BlockDiagonal::new(numbers(5), vec![(usize::MAX, 3)]).is_err());
        assert!(BlockDiagonal::new(vec![f64::NAN], vec![(1, 1)]).is_err());
        assert!(BlockDiagonal::<f64>::new(vec![], vec![(1 << 40, 0)]).is_err());
        assert!(BlockDiagonal::<f64>::new(vec![], vec![(usize::MAX, 0), (1, 0)]).is_err());
        assert!(BlockDiagonal::rounded(numbers(6), vec![(2, 3)], DType::U8).is_err());
        assert!(BlockDiagonal::rounded(vec![1e6], vec![(1, 1)], DType::F16).is_err());
    }
}
