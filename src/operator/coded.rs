//! The stored numbers of a sparse leaf on a grid: rows of packed codes, as many in each as it stores.
//!
//! The grid is that of the whole matrix, m × ⌈n ÷ group⌉ scales: what of a row lies in one group of columns
//! shares a scale, however much of it is stored.

use pulp::Arch;

use super::kernels::{Beside, CodedRow, pack, width};
use super::{Grid, LinearOperator};
use crate::error::{Error, Result};
use crate::scalar::Real;

/// Rows of codes of any length.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Coded<T: Real> {
    grid: Grid<T>,
    /// Where each row's codes begin, and their end: (codes, bytes) before it.
    starts: Vec<(usize, usize)>,
    codes: Vec<u8>,
}

/// The end of each row, in codes and in bytes.
fn starts(bits: u8, counts: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    let mut at = (0, 0);
    let ends = counts.map(|count| {
        at = (at.0 + count, at.1 + width(count, bits));
        at
    });
    std::iter::once((0, 0)).chain(ends).collect()
}

impl<T: Real> Coded<T> {
    /// Packed codes as they are, `counts` of them in the rows of a matrix of n columns.
    ///
    /// # Errors
    /// [`Error::Shape`] if the grid is of another shape, or codes are missing, too many or followed by bits that are
    /// not zero.
    pub(super) fn new(grid: Grid<T>, n: usize, counts: impl Iterator<Item = usize>, codes: Vec<u8>) -> Result<Self> {
        let starts = starts(grid.bits(), counts);
        let expected = (starts.len() - 1, n.div_ceil(grid.group()));
        if grid.scales().shape() != expected {
            return Err(Error::shape(expected, grid.scales().shape()));
        }
        let end = starts.last().map_or(0, |end| end.1);
        if end != codes.len() {
            return Err(Error::shape(format!("{end} bytes of codes"), codes.len()));
        }
        let clean = |pair: &[(usize, usize)]| {
            let used = (pair[1].0 - pair[0].0) * usize::from(grid.bits()) % 8;
            used == 0 || codes[pair[1].1 - 1] >> used == 0
        };
        if !starts.windows(2).all(clean) {
            return Err(Error::shape("as many codes as there are places", "bits set beyond them"));
        }
        Ok(Coded { grid, starts, codes })
    }

    /// The nearest numbers on a grid to (column, value) of what each row stores.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn nearest(grid: Grid<T>, n: usize, rows: impl Iterator<Item = Vec<(usize, T)>>) -> Result<Self> {
        let (m, groups) = (grid.scales().shape().0, n.div_ceil(grid.group()));
        let (mut codes, mut counts) = (Vec::new(), Vec::new());
        for (i, row) in rows.enumerate() {
            if i >= m || grid.scales().shape().1 != groups {
                return Err(Error::shape((i + 1, groups), grid.scales().shape()));
            }
            let row: Vec<u8> = row.into_iter().map(|(j, value)| grid.code(i, j / grid.group(), value)).collect();
            pack(grid.bits(), &row, &mut codes);
            counts.push(row.len());
        }
        Self::new(grid, n, counts.into_iter(), codes)
    }

    pub(crate) fn grid(&self) -> &Grid<T> {
        &self.grid
    }
    /// The packed codes, each row ended on a whole byte.
    pub(super) fn codes(&self) -> &[u8] {
        &self.codes
    }
    /// Numbers stored.
    pub(super) fn stored(&self) -> usize {
        self.starts.last().map_or(0, |end| end.0)
    }
    /// Codes, scales and zero points.
    pub(super) fn bytes(&self) -> u64 {
        self.codes.len() as u64 + self.grid.own_bytes()
    }
    /// Numbers and scales.
    pub(super) fn params(&self) -> usize {
        self.stored() + self.grid.own_params()
    }

    /// Writes the numbers of row i out, of which `runs` lie in the groups, one after the other.
    pub(super) fn write(&self, arch: Arch, i: usize, runs: impl Iterator<Item = usize>, to: &mut Vec<T>) {
        let (from, end) = (self.starts[i], self.starts[i + 1]);
        let (count, bits) = (end.0 - from.0, self.grid.bits());
        to.clear();
        to.resize(count, T::zero());
        if count == 0 {
            return;
        }
        let codes = &self.codes[from.1..end.1];
        let beside = Beside { scales: &[T::one()], zeros: None, offsets: None };
        CodedRow { bits, group: count, columns: count, codes, beside }.write(arch, to);
        let (half, mut rest) = (1i16 << (bits - 1), &mut to[..]);
        for (g, run) in runs.enumerate().filter(|(_, run)| *run > 0) {
            let (now, later) = rest.split_at_mut(run.min(rest.len()));
            let scale = self.grid.scales().values()[(i, g)];
            let shift = T::from_f64((i16::from(self.grid.zero(i, g)) - half).into());
            let offset = self.grid.offset(i, g);
            now.iter_mut().for_each(|v| *v = scale * (*v - shift) + offset);
            rest = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, ArrayView2};

    use super::*;
    use crate::operator::{Bitmask, BlockDiagonal, Dense, Nm, NmSparse, Operator, ZeroPoint, ZeroPoints};
    use crate::scalar::DType;

    fn grid<T: Real>(m: usize, n: usize, bits: u8, group: usize, zero: ZeroPoint) -> Grid<T> {
        let groups = n.div_ceil(group);
        let scales = Array2::from_shape_fn((m, groups), |(i, g)| T::from_f64([0.5, -0.25, 1.0, 0.0][(i + g) % 4]));
        let zeros = match zero {
            ZeroPoint::None => ZeroPoints::None,
            ZeroPoint::Integer => {
                let code = |(i, g)| ((i * 3 + g) % (1 << bits.min(7))) as u8;
                ZeroPoints::Integer(Array2::from_shape_fn((m, groups), code))
            }
            ZeroPoint::Float => {
                let number = |(i, g)| T::from_f64(((i * 3 + g) % 5) as f64 / 4.0 - 0.75);
                ZeroPoints::Float(Dense::rounded(Array2::from_shape_fn((m, groups), number), DType::F16).unwrap())
            }
        };
        Grid::new(bits, group, Dense::rounded(scales, DType::F16).unwrap(), zeros).unwrap()
    }

    /// What of a matrix is kept, each number at its nearest on the grid.
    fn naive<T: Real>(
        matrix: ArrayView2<'_, T>,
        kept: ArrayView2<'_, bool>,
        grid: &Grid<T>,
        first: &dyn Fn(usize) -> usize,
    ) -> Array2<T> {
        Array2::from_shape_fn(matrix.dim(), |(i, j)| {
            if !kept[(i, j)] {
                return T::zero();
            }
            let g = (j - first(i)) / grid.group();
            let zero = T::from_f64(grid.zero(i, g).into());
            let number = T::from_f64(grid.code(i, g, matrix[(i, j)]).into()) - zero;
            grid.scales().values()[(i, g)] * number + grid.offset(i, g)
        })
    }

    fn check<T: Real>(operator: &Operator<T>, expected: &Array2<T>, what: &str) {
        assert_eq!(&operator.to_dense(), expected, "{what}");
        let (m, n) = expected.dim();
        for b in [1, 3, 7] {
            let x = Array2::from_shape_fn((n, b), |(i, j)| T::from_f64(((i * 3 + j * 5) % 7) as f64 - 3.0));
            let y = Array2::from_shape_fn((m, b), |(i, j)| T::from_f64(((i + j * 2) % 5) as f64 - 2.0));
            // Small multiples of a quarter: sums are exact in any order.
            assert_eq!(operator.product(x.view()), expected.dot(&x), "{what}, batch {b}");
            assert_eq!(operator.product_transposed(y.view()), expected.t().dot(&y), "{what}, batch {b}");
        }
    }

    fn all<T: Real>() {
        for (m, n) in [(3, 5), (4, 64), (5, 130), (2, 300)] {
            let matrix = Array2::from_shape_fn((m, n), |(i, j)| T::from_f64(((i * 7 + j * 3) % 11) as f64 / 2.0 - 2.5));
            // Row 1 is empty.
            let kept = Array2::from_shape_fn((m, n), |(i, j)| i != 1 && (i + j * j) % 3 != 0);
            let (none, integer, float) = (ZeroPoint::None, ZeroPoint::Integer, ZeroPoint::Float);
            let all =
                [(2, 7, integer), (3, 32, none), (4, 64, integer), (4, 7, float), (5, 128, none), (8, n, integer)];
            for (bits, group, zero) in all.into_iter().chain([(6, 32, float)]) {
                let what = format!("{m}x{n}, {bits} bits, groups of {group}");
                let on = grid::<T>(m, n, bits, group, zero);
                let plain = Bitmask::gather(matrix.view(), kept.view(), DType::BF16).unwrap();
                let coded = plain.quantized(on.clone()).unwrap();
                let expected = naive(matrix.view(), kept.view(), &on, &|_| 0);
                let mask = coded.encode_mask();
                let codes = coded.coded().unwrap().codes().to_vec();
                assert_eq!(Bitmask::decode_codes((m, n), &mask, on.clone(), codes.clone()).unwrap(), coded);
                assert!(Bitmask::decode_codes((m, n), &mask, on.clone(), [&codes[..], &[0]].concat()).is_err());
                let other = grid::<T>(m, n + group, bits, group, zero);
                assert!(plain.quantized(other).is_err());
                check(&Operator::Bitmask(coded), &expected, &what);

                for pattern in [Nm::TWO_FOUR, Nm::new(1, 3).unwrap()] {
                    let groups = pattern.groups(n) * pattern.m();
                    let kept =
                        Array2::from_shape_fn((m, n), |(i, j)| j >= groups || (j + i) % pattern.m() < pattern.n());
                    let plain = NmSparse::gather(pattern, matrix.view(), kept.view(), T::DTYPE).unwrap();
                    let coded = plain.quantized(on.clone()).unwrap();
                    assert_eq!((coded.kept(), coded.ranks()), (kept.clone(), plain.ranks()));
                    let codes = coded.codes().unwrap().codes().to_vec();
                    let back = NmSparse::decode_codes(pattern, n, &coded.encode_positions(), on.clone(), codes);
                    assert_eq!(back.unwrap(), coded);
                    check(&Operator::NmSparse(coded), &naive(matrix.view(), kept.view(), &on, &|_| 0), &what);
                }
            }
        }
        for extents in [vec![(2, 40), (2, 40)], vec![(2, 3), (1, 130), (4, 2)], vec![(0, 3), (3, 0), (2, 2)]] {
            let count = extents.iter().map(|(rows, columns)| rows * columns).sum::<usize>();
            let values = (0..count).map(|i| T::from_f64(((i * 7) % 11) as f64 / 2.0 - 2.5)).collect();
            let plain = BlockDiagonal::new(values, extents.clone()).unwrap();
            let (matrix, (m, n)) = (plain.to_dense(), plain.shape());
            let mut block = Vec::new();
            let mut column = 0;
            for &(rows, columns) in &extents {
                block.extend(std::iter::repeat_n(column..column + columns, rows));
                column += columns;
            }
            let kept = Array2::from_shape_fn((m, n), |(i, j)| block[i].contains(&j));
            for (bits, group, zero) in
                [(3, 16, ZeroPoint::Integer), (4, 200, ZeroPoint::None), (5, 3, ZeroPoint::Float)]
            {
                let on = grid::<T>(m, plain.widest(), bits, group, zero);
                let coded = plain.quantized(on.clone()).unwrap();
                let codes = coded.codes().unwrap().codes().to_vec();
                assert_eq!(BlockDiagonal::decode_codes(extents.clone(), on.clone(), codes).unwrap(), coded);
                assert!(BlockDiagonal::decode_codes(vec![(1 << 40, 1)], on.clone(), Vec::new()).is_err());
                let expected = naive(matrix.view(), kept.view(), &on, &|i| block[i].start);
                check(&Operator::BlockDiagonal(coded), &expected, &format!("{extents:?}"));
            }
        }
    }

    #[test]
    fn sparse_leaves_on_a_grid_are_what_their_dense_form_is() {
        all::<f32>();
        all::<f64>();
    }
}
