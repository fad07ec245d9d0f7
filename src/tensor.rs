//! What holds numbers: an array in memory, or the bytes of a tensor inside a mapped file.

use ndarray::{Array2, ArrayBase, CowArray, Data, Ix2};

use crate::error::{Error, Result};
use crate::scalar::{DType, Real, widen};

/// Anything that can be read as a matrix.
pub trait Tensor {
    /// Extent of each dimension.
    fn shape(&self) -> &[usize];
    /// The dtype it is stored in.
    fn dtype(&self) -> DType;
    /// The matrix in the compute type: borrowed where it can be, widened where it must be.
    ///
    /// # Errors
    /// [`Error::Shape`] unless it has two dimensions; [`Error::UnsupportedDType`] unless it holds floats.
    fn matrix<T: Real>(&self) -> Result<CowArray<'_, T, Ix2>>;
}

impl<S: Real, D: Data<Elem = S>> Tensor for ArrayBase<D, Ix2> {
    fn shape(&self) -> &[usize] {
        ArrayBase::shape(self)
    }
    fn dtype(&self) -> DType {
        S::DTYPE
    }
    fn matrix<T: Real>(&self) -> Result<CowArray<'_, T, Ix2>> {
        Ok(T::cast(self.view()))
    }
}

/// Little-endian bytes in row-major order, as a safetensors file holds them.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    /// Extent of each dimension.
    pub shape: &'a [usize],
    /// How the bytes are to be read.
    pub dtype: DType,
    /// The bytes; they need no alignment.
    pub bytes: &'a [u8],
}

impl Tensor for Stored<'_> {
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn dtype(&self) -> DType {
        self.dtype
    }
    fn matrix<T: Real>(&self) -> Result<CowArray<'_, T, Ix2>> {
        let &[rows, columns] = self.shape else {
            return Err(Error::shape("two dimensions", self.shape));
        };
        let values = widen::<T>(self.dtype, self.bytes)?;
        let count = values.len();
        let array = Array2::from_shape_vec((rows, columns), values)
            .map_err(|_| Error::shape(self.shape, format!("{count} values")))?;
        Ok(array.into())
    }
}
