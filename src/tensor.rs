//! What holds numbers: an array in memory, or the bytes of a tensor inside a mapped file.

use std::fmt::Debug;
use std::ops::Range;

use ndarray::{Array2, ArrayBase, ArrayView2, CowArray, Data, Ix2, s};

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

/// A matrix of which rows are read when they are needed, so that not all of it has to be in memory.
pub trait Source<T: Real>: Debug + Sync {
    /// (rows, columns).
    fn dim(&self) -> (usize, usize);
    /// Some consecutive rows in the compute type.
    fn rows(&self, range: Range<usize>) -> Array2<T>;
}

impl<T: Real> Source<T> for ArrayView2<'_, T> {
    fn dim(&self) -> (usize, usize) {
        ArrayBase::dim(self)
    }
    fn rows(&self, range: Range<usize>) -> Array2<T> {
        self.slice(s![range, ..]).to_owned()
    }
}

impl<S: Real, D: Data<Elem = S>> Tensor for ArrayBase<D, Ix2> {
    fn shape(&self) -> &[usize] {
        ArrayBase::shape(self)
    }
    fn dtype(&self) -> DType {
        S::DTYPE
    }
    fn matrix<T: Real>(&self) -> Result<CowArray<'_, T, Ix2>> {
        Ok(T::from_view(self.view()))
    }
}

/// Bytes of a matrix that are widened row by row. The pages that were read are given back after each part.
pub(crate) struct Rows<'a> {
    dim: (usize, usize),
    stored: Stored<'a>,
    release: Box<dyn Fn() + Sync + 'a>,
}

impl<'a> Rows<'a> {
    /// `release` is called after each part.
    ///
    /// # Errors
    /// As [`Tensor::matrix`].
    pub(crate) fn new(stored: Stored<'a>, release: impl Fn() + Sync + 'a) -> Result<Self> {
        let &[rows, columns] = stored.shape else {
            return Err(Error::shape("two dimensions", stored.shape));
        };
        if stored.dtype.bytes(rows * columns) != stored.bytes.len() {
            return Err(Error::shape(stored.shape, format!("{} bytes", stored.bytes.len())));
        }
        // Whether it holds floats.
        widen::<f32>(stored.dtype, &[])?;
        Ok(Rows { dim: (rows, columns), stored, release: Box::new(release) })
    }
}

impl Debug for Rows<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rows of a stored {}x{} matrix", self.dim.0, self.dim.1)
    }
}

impl<T: Real> Source<T> for Rows<'_> {
    fn dim(&self) -> (usize, usize) {
        self.dim
    }
    fn rows(&self, range: Range<usize>) -> Array2<T> {
        /// Bytes of the file that are looked at before they are released.
        const PANEL: usize = 4 << 20;
        let (count, width) = (range.len(), self.stored.dtype.bytes(self.dim.1));
        let bytes = &self.stored.bytes[range.start * width..range.end * width];
        let mut values = Vec::with_capacity(count * self.dim.1);
        for panel in bytes.chunks((PANEL / width.max(1)).max(1) * width.max(1)) {
            // The dtype was checked at the beginning: what cannot be read shows in the shape.
            if let Ok(part) = widen::<T>(self.stored.dtype, panel) {
                values.extend_from_slice(&part);
            }
            (self.release)();
        }
        let shape = (count, self.dim.1);
        Array2::from_shape_vec(shape, values).unwrap_or_else(|_| Array2::from_elem(shape, T::nan()))
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
