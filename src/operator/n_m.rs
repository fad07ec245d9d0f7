//! N:M sparsity: of every M consecutive inputs of a row exactly N have a stored value.
//!
//! A row's inputs are cut into groups of M from the left; what is left over at the end (n mod M inputs)
//! is stored densely. Which N of a group are stored is one number, the rank of the choice among all
//! C(M, N) in lexicographic order; a stored value may be zero and keeps its place. On disk the ranks of
//! a row are packed into bytes: digits in base C(M, N), as many as fit a byte, where that is denser than
//! whole bits (2:4: three groups a byte, 0.667 bit for each position), else ⌈log₂ C⌉ bits each.

use ndarray::{Array2, ArrayView2};

use super::sparse::{accumulate, each_row};
use super::{Dense, LinearOperator};
use crate::error::{Error, Result};
use crate::scalar::Real;

/// The pattern N:M: n of every m consecutive inputs are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nm {
    n: usize,
    m: usize,
}

impl Nm {
    /// 2 of 4, the pattern of sparse tensor cores.
    pub const TWO_FOUR: Nm = Nm { n: 2, m: 4 };
    /// The largest M: choices are enumerated, C(8, 4) = 70 at most.
    pub const LARGEST: usize = 8;

    /// n of every m.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless 1 ≤ n < m ≤ 8.
    pub fn new(n: usize, m: usize) -> Result<Self> {
        match n >= 1 && n < m && m <= Self::LARGEST {
            true => Ok(Nm { n, m }),
            false => Err(Error::Unsupported(format!("{n}:{m} sparsity: expected 1 ≤ n < m ≤ {}", Self::LARGEST))),
        }
    }

    /// N, the number of values in a group.
    pub fn n(self) -> usize {
        self.n
    }

    /// M, the inputs in a group.
    pub fn m(self) -> usize {
        self.m
    }

    /// All choices of N of M as bit masks (bit i: input i of the group), in lexicographic order of the
    /// chosen positions: 01, 02, 03, 12, 13, 23 for 2:4.
    pub fn masks(self) -> Vec<u8> {
        let mut all: Vec<u8> = (0..=(1u16 << self.m) - 1).map(|mask| mask as u8).collect();
        all.retain(|mask| mask.count_ones() as usize == self.n);
        // The lexicographic order of ascending positions is the falling order of the reversed bits.
        all.sort_by_key(|mask| std::cmp::Reverse(mask.reverse_bits()));
        all
    }

    /// Full groups in a row of `columns` inputs.
    pub fn groups(self, columns: usize) -> usize {
        columns / self.m
    }

    /// Stored values in a row of `columns` inputs.
    pub fn values_per_row(self, columns: usize) -> usize {
        self.groups(columns) * self.n + columns % self.m
    }

    /// (digits in a byte, bits of a digit): the first is 0 where whole bits are packed.
    fn packing(self) -> (usize, usize) {
        let choices = self.masks().len();
        let mut digits = 0;
        while choices.pow(digits as u32 + 1) <= 256 {
            digits += 1;
        }
        let bits = choices.next_power_of_two().trailing_zeros() as usize;
        if bits * digits > 8 { (digits, bits) } else { (0, bits) }
    }

    /// Bytes on disk of the positions of a row of `columns` inputs.
    pub fn position_bytes(self, columns: usize) -> usize {
        match self.packing() {
            (0, bits) => (self.groups(columns) * bits).div_ceil(8),
            (digits, _) => self.groups(columns).div_ceil(digits),
        }
    }

    /// Packs the ranks of a row.
    fn pack(self, ranks: &[u8]) -> Vec<u8> {
        let base = self.masks().len() as u8;
        match self.packing() {
            (0, bits) => {
                let mut bytes = vec![0u8; (ranks.len() * bits).div_ceil(8)];
                for (i, bit) in (0..ranks.len()).flat_map(|i| (0..bits).map(move |bit| (i, bit))) {
                    let at = i * bits + bit;
                    bytes[at / 8] |= (ranks[i] >> bit & 1) << (at % 8);
                }
                bytes
            }
            // The first group of a byte is its lowest digit.
            (digits, _) => ranks
                .chunks(digits)
                .map(|chunk| chunk.iter().rev().fold(0u8, |byte, &rank| byte * base + rank))
                .collect(),
        }
    }

    /// The ranks of a row of `groups` groups; `None` if the bytes are no such thing.
    fn unpack(self, bytes: &[u8], groups: usize) -> Option<Vec<u8>> {
        let base = self.masks().len() as u8;
        let ranks: Vec<u8> = match self.packing() {
            (0, bits) => {
                let bit = |at: usize| bytes.get(at / 8).map_or(0, |byte| byte >> (at % 8) & 1);
                let rank = |i: usize| (0..bits).map(|b| bit(i * bits + b) << b).sum();
                (0..groups).map(rank).collect()
            }
            (digits, _) => {
                let digit = |i: usize| bytes.get(i / digits).map(|byte| byte / base.pow((i % digits) as u32) % base);
                (0..groups).map(digit).collect::<Option<_>>()?
            }
        };
        // Packing again finds ranks out of range, wrong lengths and bits beyond the end alike.
        (ranks.iter().all(|&rank| rank < base) && self.pack(&ranks) == bytes).then_some(ranks)
    }
}

/// A matrix of which N of every M consecutive entries of a row are stored.
#[derive(Debug, Clone, PartialEq)]
pub struct NmSparse<T> {
    pattern: Nm,
    columns: usize,
    /// Rank of each group's choice, row by row; one byte each, for kernels.
    ranks: Vec<u8>,
    values: Dense<T>,
    masks: Vec<u8>,
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
        let values = values.positive_zeros();
        Ok(NmSparse { pattern, columns, ranks, values, masks })
    }

    /// Takes the entries of `matrix` that `kept` marks, m×n both, and rounds them to `dtype`.
    ///
    /// # Errors
    /// [`Error::Shape`] unless each full group has exactly N marks and the rest of each row is all marked;
    /// as [`Dense::rounded`].
    pub fn gather(
        pattern: Nm,
        matrix: ArrayView2<'_, T>,
        kept: ArrayView2<'_, bool>,
        dtype: crate::scalar::DType,
    ) -> Result<Self> {
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

    /// N:M.
    pub fn pattern(&self) -> Nm {
        self.pattern
    }
    /// The rank of each full group's choice among [`Nm::masks`], row by row.
    pub fn ranks(&self) -> &[u8] {
        &self.ranks
    }
    /// The stored values, m × values of a row.
    pub fn values(&self) -> &Dense<T> {
        &self.values
    }

    /// The packed positions, m × [`Nm::position_bytes`].
    pub fn encode_positions(&self) -> Vec<u8> {
        let groups = self.pattern.groups(self.columns);
        (0..self.shape().0).flat_map(|i| self.pattern.pack(&self.ranks[i * groups..(i + 1) * groups])).collect()
    }

    /// Reads the packed form back.
    ///
    /// # Errors
    /// [`Error::Shape`] if the bytes are no positions of this pattern.
    pub fn decode(pattern: Nm, columns: usize, positions: &[u8], values: Dense<T>) -> Result<Self> {
        let (m, width) = (values.shape().0, pattern.position_bytes(columns));
        if columns == 0 {
            return Err(Error::shape("at least one column", columns));
        }
        if positions.len() != m * width {
            return Err(Error::shape(format!("{m} x {width} bytes of positions"), positions.len()));
        }
        let groups = pattern.groups(columns);
        let row = |i: usize| pattern.unpack(&positions[i * width..(i + 1) * width], groups);
        let ranks: Option<Vec<Vec<u8>>> = (0..m).map(row).collect();
        let ranks = ranks.ok_or_else(|| Error::shape("packed positions", "bytes that are none"))?.concat();
        Self::new(pattern, columns, ranks, values)
    }

    /// Calls `each` with the column and value of all that is stored in row i, in ascending order.
    fn row(&self, i: usize, mut each: impl FnMut(usize, T)) {
        let (groups, m) = (self.pattern.groups(self.columns), self.pattern.m);
        let row = self.values.values();
        let mut values = row.row(i).into_iter().copied();
        for (group, &rank) in self.ranks[i * groups..(i + 1) * groups].iter().enumerate() {
            let mut mask = self.masks[rank as usize];
            while mask != 0 {
                let Some(value) = values.next() else { return };
                each(group * m + mask.trailing_zeros() as usize, value);
                mask &= mask - 1;
            }
        }
        values.zip(groups * m..).for_each(|(value, column)| each(column, value));
    }
}

impl<T: Real> LinearOperator<T> for NmSparse<T> {
    fn shape(&self) -> (usize, usize) {
        (self.values.shape().0, self.columns)
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let x = x.as_standard_layout();
        each_row(self.shape().0, x.ncols(), self.params(), |i, y| {
            self.row(i, |column, value| accumulate(y, value, x.row(column)));
        })
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let x = x.as_standard_layout();
        let mut y = Array2::zeros((self.columns, x.ncols()));
        for (i, from) in x.rows().into_iter().enumerate() {
            self.row(i, |column, value| y.row_mut(column).scaled_add(value, &from));
        }
        y
    }
    fn params(&self) -> usize {
        self.values.params()
    }
    fn bytes(&self) -> u64 {
        self.values.bytes() + (self.shape().0 * self.pattern.position_bytes(self.columns)) as u64
    }
    fn flops(&self, columns: usize) -> u64 {
        self.values.flops(columns)
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
mod tests {
    use super::*;
    use crate::scalar::DType;

    #[test]
    fn masks_are_all_choices_in_lexicographic_order() {
        assert_eq!(Nm::TWO_FOUR.masks(), [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100]);
        assert_eq!(Nm::new(4, 8).unwrap().masks().len(), 70);
        assert_eq!(Nm::new(7, 8).unwrap().masks().len(), 8);
        assert!(Nm::new(0, 4).is_err() && Nm::new(4, 4).is_err() && Nm::new(2, 9).is_err());
    }

    #[test]
    fn positions_survive_packing_for_every_pattern_and_length() {
        for (n, m) in (2..=8).flat_map(|m| (1..m).map(move |n| (n, m))) {
            let pattern = Nm::new(n, m).unwrap();
            let choices = pattern.masks().len();
            for groups in [0, 1, 2, 3, 4, 7, 24, 25] {
                let ranks: Vec<u8> = (0..groups).map(|i| ((i * 7 + 5) % choices) as u8).collect();
                let bytes = pattern.pack(&ranks);
                assert_eq!(bytes.len(), pattern.position_bytes(groups * m), "{n}:{m} {groups}");
                assert_eq!(pattern.unpack(&bytes, groups).as_ref(), Some(&ranks), "{n}:{m} {groups}");
            }
        }
        assert_eq!(Nm::TWO_FOUR.position_bytes(576), 48);
        // Bytes that no row packs to: digits out of range, and digits beyond the end.
        assert_eq!(Nm::TWO_FOUR.unpack(&[216], 3), None);
        assert_eq!(Nm::TWO_FOUR.unpack(&[6], 1), None);
        assert_eq!(Nm::TWO_FOUR.unpack(&[5, 0], 3), None);
        assert_eq!(Nm::new(4, 8).unwrap().unpack(&[70], 1), None);
        assert_eq!(Nm::new(4, 8).unwrap().unpack(&[0x80], 1), None);
    }

    #[test]
    fn zeros_keep_their_place_and_lose_their_sign() {
        let matrix = ndarray::array![[-0.0, 0.0, 3.0, 0.0, 5.0], [0.0, -0.0, -0.0, 0.0, -0.0]];
        let kept = ndarray::array![[true, false, false, true, true], [false, true, true, false, true]];
        let sparse = NmSparse::gather(Nm::TWO_FOUR, matrix.view(), kept.view(), DType::BF16).unwrap();
        assert_eq!(sparse.ranks(), [2, 3]);
        assert!(sparse.values().values().iter().all(|v: &f64| v.is_sign_positive()));
        assert_eq!(sparse.to_dense(), ndarray::array![[0.0, 0.0, 0.0, 0.0, 5.0], [0.0; 5]]);
        let back = NmSparse::decode(Nm::TWO_FOUR, 5, &sparse.encode_positions(), sparse.values().clone()).unwrap();
        assert_eq!(back, sparse);
        let wrong = ndarray::array![[true, true, true, false, true], [true, true, false, false, true]];
        assert!(NmSparse::gather(Nm::TWO_FOUR, matrix.view(), wrong.view(), DType::F32).is_err());
    }

    #[test]
    fn multiplies_like_its_dense_form() {
        for (n, m, rows, columns) in [(2, 4, 5, 13), (1, 4, 3, 8), (4, 8, 7, 27), (3, 5, 1, 5), (2, 4, 2, 3)] {
            let pattern = Nm::new(n, m).unwrap();
            let matrix = Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 7 + j * 3) % 11) as f64 - 5.0);
            let masks = pattern.masks();
            let kept = Array2::from_shape_fn((rows, columns), |(i, j)| {
                j / m >= columns / m || masks[(i + j / m) % masks.len()] >> (j % m) & 1 == 1
            });
            let sparse = NmSparse::gather(pattern, matrix.view(), kept.view(), DType::F64).unwrap();
            let dense = Array2::from_shape_fn((rows, columns), |at| if kept[at] { matrix[at] } else { 0.0 });
            assert_eq!(sparse.to_dense(), dense);
            let x = Array2::from_shape_fn((3, columns), |(i, j)| (i + 2 * j) as f64 - 3.0);
            assert_eq!(sparse.product(x.t()), dense.dot(&x.t()));
            let y = Array2::from_shape_fn((rows, 2), |(i, j)| (i * 2 + j) as f64);
            assert_eq!(sparse.product_transposed(y.view()), dense.t().dot(&y));
        }
    }
}
