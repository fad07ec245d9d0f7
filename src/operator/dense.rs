//! A plain matrix, with the dtype it is stored in.

use ndarray::{Array2, ArrayView2};

use super::{LinearOperator, matmul};
use crate::error::{Error, Result};
use crate::scalar::{DType, Real, check_finite};

/// A matrix leaf. Its values are always exactly representable in its stored dtype, so that what is
/// measured in memory is what the file holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense<T> {
    values: Array2<T>,
    dtype: DType,
}

impl<T: Real> Dense<T> {
    /// A leaf stored in the compute type: nothing is rounded.
    pub fn new(values: Array2<T>) -> Self {
        Dense { values: standard(values), dtype: T::DTYPE }
    }

    /// A leaf stored in `dtype`; the values are rounded to it now (to nearest, ties to even).
    ///
    /// # Errors
    /// [`Error::UnsupportedDType`] if `dtype` holds no floats, [`Error::NonFinite`] if a value is
    /// not finite or overflows `dtype`.
    pub fn rounded(values: Array2<T>, dtype: DType) -> Result<Self> {
        if !dtype.is_float() {
            return Err(Error::UnsupportedDType { dtype });
        }
        let mut values = standard(values);
        if dtype != T::DTYPE {
            values.mapv_inplace(|v| v.round_to(dtype));
        }
        check_finite("factor", &values)?;
        Ok(Dense { values, dtype })
    }

    /// A leaf of values that `dtype` holds exactly.
    pub(super) fn exact(values: Array2<T>, dtype: DType) -> Self {
        Dense { values, dtype }
    }

    /// The same values with every negative zero made positive.
    pub(super) fn positive_zeros(mut self) -> Self {
        self.values.mapv_inplace(|v| v + T::zero());
        self
    }

    /// The matrix.
    pub fn values(&self) -> ArrayView2<'_, T> {
        self.values.view()
    }

    /// The dtype it is stored in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

fn standard<T: Real>(values: Array2<T>) -> Array2<T> {
    if values.is_standard_layout() { values } else { values.as_standard_layout().into_owned() }
}

impl<T: Real> LinearOperator<T> for Dense<T> {
    fn shape(&self) -> (usize, usize) {
        self.values.dim()
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        matmul(self.values.view(), x)
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        matmul(self.values.t(), x)
    }
    fn params(&self) -> usize {
        self.values.len()
    }
    fn bytes(&self) -> u64 {
        self.dtype.bytes(self.values.len()) as u64
    }
    fn flops(&self, columns: usize) -> u64 {
        2 * self.values.len() as u64 * columns as u64
    }
    fn to_dense(&self) -> Array2<T> {
        self.values.clone()
    }
}
