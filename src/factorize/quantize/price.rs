//! What an inner method's result costs once its numbers are on grids.

use std::sync::Arc;

use super::Quantize;
use super::fit::settled;
use crate::error::Result;
use crate::operator::{Grid, LinearOperator, Operator, Stacked};
use crate::scalar::{DType, Real};

impl Quantize {
    /// Bytes of an inner method's result once its numbers are on grids; shared parts once.
    pub(super) fn priced<T: Real>(
        &self,
        operator: &Operator<T>,
        bits: u8,
        seen: &mut Vec<*const Operator<T>>,
    ) -> Result<u64> {
        Ok(match operator {
            operator if settled(operator) => operator.bytes(),
            Operator::Dense(leaf) => self.bytes(leaf.shape(), bits, leaf.dtype()),
            Operator::Interpolative(leaf) => {
                let numbers = leaf.coefficients();
                leaf.bytes() - numbers.bytes() + self.priced(numbers, bits, seen)?
            }
            Operator::Product(parts) | Operator::Sum(parts) => {
                parts.iter().map(|part| self.priced(part, bits, seen)).sum::<Result<u64>>()?
            }
            Operator::Shared(inner) if seen.contains(&Arc::as_ptr(inner)) => 0,
            Operator::Shared(inner) => {
                seen.push(Arc::as_ptr(inner));
                self.priced(inner, bits, seen)?
            }
            Operator::NmSparse(leaf) => {
                let (m, n) = leaf.shape();
                let positions = m * leaf.pattern().position_bytes(n);
                positions as u64 + self.coded((m, n), (0..m).map(|_| leaf.pattern().values_per_row(n)), bits)
            }
            Operator::Bitmask(leaf) => {
                let (m, n) = leaf.shape();
                (m * n.div_ceil(8)) as u64 + self.coded((m, n), (0..m).map(|i| leaf.stored(i)), bits)
            }
            Operator::BlockDiagonal(leaf) => {
                let values: usize = leaf.extents().iter().map(|(rows, columns)| rows * columns).sum();
                let table = leaf.bytes() - leaf.dtype().bytes(values) as u64;
                let rows = leaf.extents().iter().flat_map(|&(rows, columns)| std::iter::repeat_n(columns, rows));
                table + self.coded((leaf.shape().0, leaf.widest()), rows, bits)
            }
            Operator::Mixture(leaf) => {
                let atoms = leaf.atoms().iter().map(|atom| self.priced(atom, bits, seen)).sum::<Result<u64>>()?;
                leaf.coefficients().bytes() + atoms
            }
            Operator::Stacked(leaf) => {
                let parts = leaf.parts().iter().map(|part| self.priced(part, bits, seen)).sum::<Result<u64>>()?;
                Stacked::<T>::place_bytes(leaf.shape().0, leaf.parts().len()) + parts
            }
            Operator::Basis(_) | Operator::Permutation(_) | Operator::Quantized(_) => operator.bytes(),
        })
    }

    /// Bytes of the codes of rows that store so many numbers each, with their grid.
    fn coded(&self, (m, n): (usize, usize), counts: impl Iterator<Item = usize>, bits: u8) -> u64 {
        let grid = self.bytes((m, n), bits, DType::F32) - m as u64 * Grid::<f32>::row_bytes(n, bits);
        grid + counts.map(|count| Grid::<f32>::row_bytes(count, bits)).sum::<u64>()
    }

    /// What a number of such a weight's factors costs in `bits`, as a fraction of what it costs now.
    pub(super) fn ratio(&self, bits: u8, shape: (usize, usize), dtype: DType) -> f64 {
        let row = (1, shape.0.min(shape.1).max(1));
        self.bytes(row, bits, dtype) as f64 / dtype.bytes(row.1) as f64
    }
}
