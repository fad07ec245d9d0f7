//! Fisher information as weights of rows and columns.

use ndarray::Array1;

use super::Kind;
use crate::error::{Error, Result};
use crate::scalar::widen;
use crate::tensor::Stored;

/// Refuses what cannot weigh a sum of squares.
pub(super) fn check(key: &str, values: &Array1<f64>) -> Result<()> {
    let refuse = |detail: String| Err(Error::Statistics { key: key.into(), detail });
    match values.iter().enumerate().find(|(_, value)| !(value.is_finite() && **value >= 0.0)) {
        Some((at, value)) => refuse(format!("holds {value} at index {at}, which a mean of squares cannot be")),
        None if values.iter().all(|value| *value == 0.0) => refuse("is zero everywhere".into()),
        None => Ok(()),
    }
}

/// A stored vector.
pub(super) fn read(stored: Stored<'_>) -> Result<Array1<f64>> {
    match stored.shape {
        [_] => Ok(widen(stored.dtype, stored.bytes)?.into()),
        other => Err(Error::shape("one dimension", other)),
    }
}

/// Row or column sums of a stored matrix, row by row, so that it is never in memory as a whole.
pub(super) fn sum_up(stored: Stored<'_>, kind: Kind) -> Result<Array1<f64>> {
    let &[_, n] = stored.shape else {
        return Err(Error::shape("two dimensions", stored.shape));
    };
    // An empty matrix may claim any extent; with bytes there, n is bounded by their number.
    if stored.bytes.is_empty() {
        return Err(Error::shape("a matrix that is not empty", stored.shape));
    }
    let (mut rows, mut columns) = (Vec::new(), Array1::zeros(n));
    for row in stored.bytes.chunks(stored.dtype.bytes(n)) {
        let row = Array1::from(widen::<f64>(stored.dtype, row)?);
        rows.push(row.sum());
        columns += &row;
    }
    Ok(if kind == Kind::FisherRow { rows.into() } else { columns })
}
