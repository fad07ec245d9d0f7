//! Some rows of an operator, by themselves.

use ndarray::{Array2, Axis};

use super::LinearOperator;
use crate::error::{Error, Result};
use crate::scalar::Real;

/// Rows that are found by one product: a vector of m numbers is written for each.
const TOGETHER: usize = 64;

/// Refuses rows that a matrix of m rows has not.
fn check_rows(m: usize, rows: &[usize]) -> Result<()> {
    match rows.iter().find(|&&row| row >= m) {
        Some(missing) => Err(Error::shape(format!("one of {m} rows"), missing)),
        None => Ok(()),
    }
}

/// Some rows of n numbers, each written by its number.
pub(super) fn rows_by<T: Real>(
    (m, n): (usize, usize),
    rows: &[usize],
    mut write: impl FnMut(usize, &mut [T]),
) -> Result<Array2<T>> {
    check_rows(m, rows)?;
    let mut chosen = Array2::zeros((rows.len(), n));
    let each = chosen.as_slice_mut().unwrap_or_default().chunks_exact_mut(n.max(1));
    rows.iter().zip(each).for_each(|(&row, to)| write(row, to));
    Ok(chosen)
}

/// Some rows of what has none at hand: its transposed products with as many unit vectors.
pub(super) fn by_units<T: Real, O: LinearOperator<T> + ?Sized>(of: &O, rows: &[usize]) -> Result<Array2<T>> {
    let (m, n) = of.shape();
    check_rows(m, rows)?;
    let mut chosen = Array2::zeros((rows.len(), n));
    for (rows, mut to) in rows.chunks(TOGETHER).zip(chosen.axis_chunks_iter_mut(Axis(0), TOGETHER)) {
        let mut units = Array2::zeros((m, rows.len()));
        rows.iter().enumerate().for_each(|(v, &row)| units[(row, v)] = T::one());
        to.assign(&of.product_transposed(units.view()).t());
    }
    Ok(chosen)
}
