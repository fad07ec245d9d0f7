//! Permutations, also partial ones: what pads, crops and shuffles between block-diagonal factors.

use std::sync::Arc;

use ndarray::{Array2, ArrayView2};

use super::LinearOperator;
use crate::error::{Error, Result};
use crate::scalar::Real;

/// A matrix of zeros and ones with at most one 1 in each row and in each column: y_i = x_{σ(i)}, or 0
/// where row i has none.
#[derive(Debug, Clone, PartialEq)]
pub struct Permutation {
    shape: (usize, usize),
    order: Order,
    sources: Arc<[u32]>,
    targets: Arc<[u32]>,
}

/// How a permutation is stored.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Order {
    /// The transpose of a grid: places 0, 1, … are rows × columns runs, row by row; the same runs, column by
    /// column, are the result. Input places from n on read as zero; output places from m on are dropped.
    Grid {
        /// Rows of the grid that is read.
        rows: usize,
        /// Columns of the grid that is read.
        columns: usize,
        /// Length of the runs.
        runs: Runs,
    },
    /// σ itself: entry i is the column of the 1 in row i, or n where there is none.
    List(Vec<u32>),
}

/// Lengths of the runs of a [`Order::Grid`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Runs {
    /// All of one length.
    Uniform(usize),
    /// A length for each, row by row: rows × columns entries.
    Table(Vec<u16>),
}

/// In the maps: nothing is there.
pub(crate) const NONE: u32 = u32::MAX;
/// Longer permutations are refused: no weight is that large, only a hostile file would say so.
pub(crate) const LONGEST: usize = 1 << 26;

impl Permutation {
    /// The transpose of a grid of runs, padded or cropped to m×n.
    ///
    /// With `rows` = 1 nothing moves: that is how to pad (m > n) or crop (m < n).
    ///
    /// # Errors
    /// [`Error::Shape`] if the larger of m and n is not the length of the grid, the table is not rows × columns
    /// long, uniform runs are of length 0, or the grid is longer than 2²⁶.
    pub fn grid(shape: (usize, usize), rows: usize, columns: usize, runs: Runs) -> Result<Self> {
        // (Each by itself as well: a grid of no rows may have any number of columns.)
        let cells = rows.checked_mul(columns).filter(|cells| rows.max(columns).max(*cells) <= LONGEST);
        let (cells, total) = match (cells, &runs) {
            (Some(cells), Runs::Uniform(run)) if *run > 0 => (cells, cells.checked_mul(*run)),
            (Some(cells), Runs::Table(table)) if table.len() == cells => {
                (cells, Some(table.iter().map(|&run| run as usize).sum()))
            }
            _ => return Err(Error::shape(format!("a grid of {rows}x{columns} runs"), "another table of lengths")),
        };
        let Some(total) = total.filter(|&total| total <= LONGEST && total == shape.0.max(shape.1)) else {
            return Err(Error::shape(format!("the length of {cells} runs, at most 2^26"), shape));
        };
        let length = |cell: usize| match &runs {
            Runs::Uniform(run) => *run,
            Runs::Table(table) => table[cell].into(),
        };
        let mut starts = Vec::with_capacity(cells);
        let mut at = 0;
        for cell in 0..cells {
            starts.push(at);
            at += length(cell);
        }
        let mut sources = Vec::with_capacity(total);
        for column in 0..columns {
            for row in 0..rows {
                let cell = row * columns + column;
                sources.extend((starts[cell]..starts[cell] + length(cell)).map(|from| from as u32));
            }
        }
        sources.truncate(shape.0);
        sources.iter_mut().filter(|from| **from as usize >= shape.1).for_each(|from| *from = NONE);
        Self::of(shape, Order::Grid { rows, columns, runs }, sources)
    }

    /// y_i = x_{σ(i)} with σ(i) = `list[i]`, or 0 where that is n; the shape is list.len() × n.
    ///
    /// # Errors
    /// [`Error::Shape`] if an entry is above n or occurs twice below it, or there are
    /// more than 2²⁶ rows or columns.
    pub fn list(n: usize, list: Vec<u32>) -> Result<Self> {
        if n > LONGEST || list.len() > LONGEST {
            return Err(Error::shape("at most 2^26 places", (list.len(), n)));
        }
        let place = |&from: &u32| if from as usize == n { NONE } else { from };
        let sources = list.iter().map(place).collect();
        Self::of((list.len(), n), Order::List(list), sources)
    }

    fn of(shape: (usize, usize), order: Order, sources: Vec<u32>) -> Result<Self> {
        let mut targets = vec![NONE; shape.1];
        for (to, &from) in sources.iter().enumerate().filter(|(_, from)| **from != NONE) {
            match targets.get_mut(from as usize) {
                Some(target) if *target == NONE => *target = to as u32,
                _ => return Err(Error::shape(format!("distinct indices below {}", shape.1), from)),
            }
        }
        Ok(Permutation { shape, order, sources: sources.into(), targets: targets.into() })
    }

    /// The length of what it makes: m.
    pub fn rows(&self) -> usize {
        self.shape.0
    }
    /// The length of what it takes: n.
    pub fn columns(&self) -> usize {
        self.shape.1
    }
    /// How it is stored.
    pub fn order(&self) -> &Order {
        &self.order
    }
    /// For each row the column of its 1, or `u32::MAX`.
    pub fn sources(&self) -> &[u32] {
        &self.sources
    }
    /// For each column the row of its 1, or `u32::MAX`.
    pub fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// Bytes on disk: those of the table or of the list; a uniform grid takes none.
    pub fn stored_bytes(&self) -> u64 {
        match &self.order {
            Order::Grid { runs: Runs::Uniform(_), .. } => 0,
            Order::Grid { runs: Runs::Table(table), .. } => 2 * table.len() as u64,
            Order::List(list) => Self::list_width(self.shape.1) * list.len() as u64,
        }
    }

    /// Bytes of an entry of a list for n columns: 2 while n itself fits 16 bits.
    pub(crate) fn list_width(n: usize) -> u64 {
        if n < 1 << 16 { 2 } else { 4 }
    }
}

/// Rows of x by their index; zero where there is none.
fn pick<T: Real>(from: &[u32], x: ArrayView2<'_, T>) -> Array2<T> {
    let mut y = Array2::zeros((from.len(), x.ncols()));
    for (mut y, &from) in y.rows_mut().into_iter().zip(from).filter(|(_, from)| **from != NONE) {
        y.assign(&x.row(from as usize));
    }
    y
}

impl<T: Real> LinearOperator<T> for Permutation {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        pick(&self.sources, x)
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        pick(&self.targets, x)
    }
    fn params(&self) -> usize {
        0
    }
    fn bytes(&self) -> u64 {
        self.stored_bytes()
    }
    fn flops(&self, _: usize) -> u64 {
        0
    }
    fn to_dense(&self) -> Array2<T> {
        let mut dense = Array2::zeros(self.shape);
        for (to, &from) in self.sources.iter().enumerate().filter(|(_, from)| **from != NONE) {
            dense[(to, from as usize)] = T::one();
        }
        dense
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_transposed() {
        // 2×3 runs of 1: the stride permutation.
        let stride = Permutation::grid((6, 6), 2, 3, Runs::Uniform(1)).unwrap();
        assert_eq!(stride.sources(), [0, 3, 1, 4, 2, 5]);
        // Runs of their own lengths: a bb ccc / dddd e -
        let table = Runs::Table(vec![1, 2, 3, 4, 1, 0]);
        let table = Permutation::grid((11, 11), 2, 3, table).unwrap();
        assert_eq!(table.sources(), [0, 6, 7, 8, 9, 1, 2, 10, 3, 4, 5]);
        assert_eq!(table.stored_bytes(), 12);
        // Cropped to four, padded by two.
        let cropped = Permutation::grid((4, 6), 2, 3, Runs::Uniform(1)).unwrap();
        assert_eq!(cropped.sources(), [0, 3, 1, 4]);
        assert_eq!(cropped.targets(), [0, 2, NONE, 1, 3, NONE]);
        let padded = Permutation::grid((6, 4), 1, 6, Runs::Uniform(1)).unwrap();
        assert_eq!(padded.sources(), [0, 1, 2, 3, NONE, NONE]);
    }

    #[test]
    fn multiplies_like_its_dense_form() {
        let list = Permutation::list(5, vec![4, 5, 0, 2]).unwrap();
        let grid = Permutation::grid((5, 6), 3, 2, Runs::Uniform(1)).unwrap();
        for permutation in [list, grid] {
            let dense: Array2<f64> = permutation.to_dense();
            let (m, n) = dense.dim();
            let numbers = |rows| Array2::from_shape_fn((rows, 3), |(i, j)| (i * 3 + j + 1) as f64);
            assert_eq!(permutation.product(numbers(n).view()), dense.dot(&numbers(n)));
            assert_eq!(permutation.product_transposed(numbers(m).view()), dense.t().dot(&numbers(m)));
        }
    }

    #[test]
    fn refuses_what_is_no_permutation() {
        assert!(Permutation::list(3, vec![1, 1]).is_err());
        assert!(Permutation::list(3, vec![4]).is_err());
        assert!(Permutation::grid((7, 6), 2, 3, Runs::Uniform(1)).is_err());
        assert!(Permutation::grid((5, 5), 2, 3, Runs::Uniform(1)).is_err());
        assert!(Permutation::grid((0, 0), 2, 3, Runs::Uniform(0)).is_err());
        assert!(Permutation::grid((1 << 27, 1), 1, 1 << 27, Runs::Uniform(1)).is_err());
        assert!(Permutation::grid((6, 6), 2, 3, Runs::Table(vec![1; 5])).is_err());
        assert!(Permutation::grid((0, 0), 0, usize::MAX, Runs::Uniform(1)).is_err());
        assert!(Permutation::grid((1, 1), usize::MAX, 3, Runs::Uniform(1)).is_err());
        assert!(Permutation::grid((1, 1), 3, 3, Runs::Uniform(usize::MAX)).is_err());
    }
}
