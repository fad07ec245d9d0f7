//! A plain matrix, with the dtype it is stored in.

use ndarray::{Array2, ArrayView2, CowArray, Ix2};
use pulp::bytemuck::cast_slice_mut;

use self::halves::Halves;
use super::rows::rows_by;
use super::{LinearOperator, matmul};
use crate::error::{Error, Result};
use crate::scalar::{DType, Real, check_finite};
use crate::tensor::{Stored, Tensor};

mod halves;

/// A matrix leaf. Its values are always exactly representable in its stored dtype, so that what is
/// measured in memory is what the file holds.
#[derive(Debug, Clone)]
pub struct Dense<T: Real> {
    memory: Memory<T>,
    dtype: DType,
}

#[derive(Debug, Clone)]
enum Memory<T: Real> {
    Wide(Array2<T>),
    /// Only where T is `f32`.
    Halves(Halves),
}

impl<T: Real> Dense<T> {
    /// A leaf stored in the compute type: nothing is rounded.
    pub fn new(values: Array2<T>) -> Self {
        Dense { memory: Memory::Wide(standard(values)), dtype: T::DTYPE }
    }

    /// A leaf stored in `dtype`; the values are rounded to it now (to nearest, ties to even).
    ///
    /// Those of bf16 are bf16 in memory too if T is `f32`: half the bytes, which products with up to four vectors read in half the
    /// time, and with more where there are matrix instructions (AMX). Without those, products with more than 16 vectors write
    /// rows out first, and take a fifth to a third longer (by AVX2 those with 16 nearly twice as long). Sums are `f32` sums in
    /// any case. In matrix instructions numbers under 2⁻¹²⁶ count as zero, and vectors with an infinite number make NaN.
    ///
    /// ```
    /// use ndarray::array;
    /// use weightpress::operator::{Dense, LinearOperator};
    /// use weightpress::scalar::DType;
    ///
    /// let leaf = Dense::rounded(array![[0.5f32, -3.0, 0.2501]], DType::BF16)?;
    /// assert_eq!((leaf.bytes(), leaf.values().into_owned()), (6, array![[0.5, -3.0, 0.25]]));
    /// assert_eq!(leaf.apply(array![[2.0], [1.0], [4.0]].view())?, array![[-1.0]]);
    /// # Ok::<(), weightpress::Error>(())
    /// ```
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
        Ok(Dense { memory: Memory::Wide(values), dtype }.compact())
    }

    /// A leaf of what a file holds, in its dtype; those of f64 in the compute type, to which they are rounded.
    ///
    /// # Errors
    /// As [`Stored::matrix`], and [`Error::NonFinite`], which says what it is.
    pub(crate) fn stored(stored: &Stored<'_>, what: &str) -> Result<Self> {
        if let (DType::BF16, DType::F32, &[m, n]) = (stored.dtype, T::DTYPE, stored.shape)
            // (Of no bytes, rows or columns may be more than there is room for.)
            && !stored.bytes.is_empty()
            && let Some(halves) = Halves::stored((m, n), stored.bytes)
        {
            return match halves.not_finite() {
                Some((index, value)) => Err(Error::NonFinite { what: what.into(), index, value: value.to_f64() }),
                None => Ok(Dense { memory: Memory::Halves(halves), dtype: DType::BF16 }),
            };
        }
        let values = stored.matrix::<T>()?.into_owned();
        check_finite(what, &values)?;
        Ok(Self::exact(values, if stored.dtype == DType::F64 { T::DTYPE } else { stored.dtype }))
    }

    /// A leaf of values that `dtype` holds exactly.
    pub(super) fn exact(values: Array2<T>, dtype: DType) -> Self {
        Dense { memory: Memory::Wide(values), dtype }
    }

    /// The same values, in memory as they are in a file if that is bf16 and T is `f32`.
    fn compact(self) -> Self {
        let dtype = self.dtype;
        let memory = match self.memory {
            Memory::Wide(values) if dtype == DType::BF16 => match T::as_f32(values.view()) {
                Some(values) => Memory::Halves(Halves::new(values)),
                None => Memory::Wide(values),
            },
            other => other,
        };
        Dense { memory, dtype }
    }

    /// The same values with every negative zero made positive.
    pub(super) fn positive_zeros(self) -> Self {
        let mut leaf = self.widened();
        if let Memory::Wide(values) = &mut leaf.memory {
            values.mapv_inplace(|v| v + T::zero());
        }
        leaf
    }

    /// The matrix, in the compute type: borrowed if it is so in memory.
    pub fn values(&self) -> CowArray<'_, T, Ix2> {
        match &self.memory {
            Memory::Wide(values) => values.view().into(),
            Memory::Halves(halves) => {
                let mut values = Array2::zeros(halves.dim());
                halves.write(0..halves.dim().0, cast_slice_mut(values.as_slice_mut().unwrap_or_default()));
                values.into()
            }
        }
    }

    /// The values row by row; nothing of those that are bf16 in memory.
    pub(super) fn wide(&self) -> &[T] {
        match &self.memory {
            Memory::Wide(values) => values.as_slice().unwrap_or_default(),
            Memory::Halves(_) => &[],
        }
    }

    /// The same values, in memory in the compute type.
    pub(super) fn widened(self) -> Self {
        match self.memory {
            Memory::Wide(_) => self,
            Memory::Halves(_) => Dense { memory: Memory::Wide(self.to_dense()), dtype: self.dtype },
        }
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
        match &self.memory {
            Memory::Wide(values) => values.dim(),
            Memory::Halves(halves) => halves.dim(),
        }
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        match &self.memory {
            Memory::Wide(values) => matmul(values.view(), x),
            Memory::Halves(halves) => by_halves(halves.dim(), x, |x, y| halves.product(x, y)),
        }
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        match &self.memory {
            Memory::Wide(values) => matmul(values.t(), x),
            Memory::Halves(halves) => {
                let (m, n) = halves.dim();
                by_halves((n, m), x, |x, y| halves.product_transposed(x, y))
            }
        }
    }
    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        let (m, n) = self.shape();
        rows_by((m, n), rows, |row, to| match &self.memory {
            Memory::Wide(_) => to.copy_from_slice(&self.wide()[row * n..(row + 1) * n]),
            Memory::Halves(halves) => halves.write(row..row + 1, cast_slice_mut(to)),
        })
    }
    fn params(&self) -> usize {
        self.shape().0 * self.shape().1
    }
    fn bytes(&self) -> u64 {
        self.dtype.bytes(self.params()) as u64
    }
    fn flops(&self, columns: usize) -> u64 {
        2 * self.params() as u64 * columns as u64
    }
    fn to_dense(&self) -> Array2<T> {
        self.values().into_owned()
    }
}

/// A product of a matrix of this shape in `f32`, which T is where there are halves.
fn by_halves<T: Real>(
    (m, n): (usize, usize),
    x: ArrayView2<'_, T>,
    product: impl Fn(ArrayView2<'_, f32>, &mut [f32]),
) -> Array2<T> {
    assert_eq!(x.nrows(), n, "rows of x");
    let mut y = Array2::zeros((m, x.ncols()));
    if let (Some(x), Some(y)) = (T::as_f32(x), y.as_slice_mut()) {
        product(x, cast_slice_mut(y));
    }
    y
}

impl<T: Real> PartialEq for Dense<T> {
    /// Whether values and dtypes are equal, however they lie in memory.
    fn eq(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.values() == other.values()
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::scalar::narrow;

    fn numbers(m: usize, n: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((m, n), |(i, j)| ((i * 31 + j * 17 + seed) % 201) as f32 / 64.0 - 1.5)
    }

    /// Whole words and none, few vectors and so many that rows are written out, and enough for several threads.
    #[test]
    fn compact_values_are_the_same_values() {
        for (m, n) in [(0, 4), (4, 0), (1, 1), (5, 7), (130, 66), (200, 131), (1100, 1030)] {
            let compact = Dense::rounded(numbers(m, n, 1), DType::BF16).unwrap();
            let wide = compact.clone().widened();
            assert!(compact.wide().is_empty());
            assert_eq!((compact.shape(), compact.bytes(), compact.dtype()), (wide.shape(), wide.bytes(), wide.dtype()));
            assert_eq!((compact.values(), compact.to_dense()), (wide.values(), wide.to_dense()));
            assert_eq!((&compact, &compact.clone().widened()), (&wide, &wide));
            for count in [0, 1, 2, 9, 16, 17, 40] {
                let near = |a: Array2<f32>, b: Array2<f32>| {
                    assert_eq!(a.dim(), b.dim());
                    let worst = (a - b).iter().fold(0f32, |worst, off| worst.max(off.abs()));
                    assert!(worst < 1e-5 * (m.max(n) as f32 + 1.0), "{m}x{n}, {count} vectors: {worst}");
                };
                let (x, z) = (numbers(n, count, 2), numbers(m, count, 3));
                near(compact.product(x.view()), wide.product(x.view()));
                near(compact.product_transposed(z.view()), wide.product_transposed(z.view()));
                let (x, z) = (x.t().as_standard_layout().into_owned(), z.t().as_standard_layout().into_owned());
                near(compact.product(x.t()), wide.product(x.t()));
                near(compact.product_transposed(z.t()), wide.product_transposed(z.t()));
            }
        }
    }

    #[test]
    fn only_bf16_becomes_compact() {
        let single = Dense::new(numbers(2, 3, 1));
        let half = Dense::rounded(numbers(2, 3, 1), DType::F16).unwrap();
        let double = Dense::rounded(numbers(2, 3, 1).mapv(f64::from), DType::BF16).unwrap();
        assert_eq!((single.wide().len(), half.wide().len(), double.wide().len()), (6, 6, 6));
        assert!(single != half && single != Dense::new(numbers(2, 3, 2)));
        let other = Dense::rounded(numbers(2, 3, 2), DType::BF16).unwrap();
        assert!(other != Dense::rounded(numbers(2, 3, 1), DType::BF16).unwrap());
    }

    #[test]
    fn what_a_file_holds_is_what_its_numbers_make() {
        fn same<T: Real>(dtype: DType, (m, n): (usize, usize)) {
            let bytes = narrow(dtype, &numbers(m, n, 1)).unwrap();
            // (Bytes need no alignment.)
            let shifted = [&[1], &bytes[..]].concat();
            let stored = Stored { shape: &[m, n], dtype, bytes: &shifted[1..] };
            let kept = if dtype == DType::F64 { T::DTYPE } else { dtype };
            let made = Dense::<T>::rounded(numbers(m, n, 1).mapv(|v| T::from_f64(v.into())), kept).unwrap();
            let read = Dense::<T>::stored(&stored, "weight").unwrap();
            assert_eq!((&read, read.wide().len()), (&made, made.wide().len()), "{dtype:?}, {m}x{n}");
        }
        for shape in [(0, 3), (3, 0), (1, 1), (3, 4), (5, 7)] {
            for dtype in [DType::BF16, DType::F16, DType::F32, DType::F64] {
                same::<f32>(dtype, shape);
                same::<f64>(dtype, shape);
            }
        }
    }

    #[test]
    fn what_a_file_holds_is_refused_if_it_is_no_matrix_of_numbers() {
        for (at, number) in [(0, bf16::NAN), (3, bf16::INFINITY), (7, bf16::NEG_INFINITY), (14, bf16::NAN)] {
            let mut numbers = [bf16::from_f32(-2.5); 15];
            numbers[at] = number;
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            let stored = Stored { shape: &[3, 5], dtype: DType::BF16, bytes: &bytes };
            for refused in
                [Dense::<f32>::stored(&stored, "weight").err(), Dense::<f64>::stored(&stored, "weight").err()]
            {
                let Some(Error::NonFinite { what, index, value }) = refused else { panic!("{refused:?}") };
                assert_eq!((&what[..], index, value.to_bits()), ("weight", at, number.to_f64().to_bits()));
            }
        }
        let refused = |shape: &[usize], dtype, bytes: &[u8]| {
            Dense::<f32>::stored(&Stored { shape, dtype, bytes }, "weight").unwrap_err()
        };
        for bytes in [6, 7, 9, 12] {
            assert!(matches!(refused(&[2, 2], DType::BF16, &vec![0; bytes]), Error::Shape { .. }), "{bytes} bytes");
        }
        for (shape, bytes) in [([usize::MAX, 3], 6), ([usize::MAX, 0], 0), ([0, usize::MAX], 0)] {
            assert!(matches!(refused(&shape, DType::BF16, &vec![0; bytes]), Error::Shape { .. }), "{shape:?}");
        }
        assert!(matches!(refused(&[4], DType::BF16, &[0; 8]), Error::Shape { .. }));
        assert!(matches!(refused(&[2, 2], DType::U8, &[0; 4]), Error::UnsupportedDType { .. }));
    }

    #[test]
    fn rows_are_those_that_are_named() {
        let wide = Dense::rounded(numbers(9, 5, 1), DType::BF16).unwrap().widened();
        for leaf in [wide.clone(), wide.clone().compact()] {
            let chosen = leaf.select_rows(&[8, 0, 0, 3]).unwrap();
            assert_eq!(chosen, wide.values().select(ndarray::Axis(0), &[8, 0, 0, 3]));
            assert_eq!(leaf.select_rows(&[]).unwrap().dim(), (0, 5));
            let missing = leaf.select_rows(&[1, 9]).unwrap_err().to_string();
            assert!(missing.contains("one of 9 rows") && missing.contains('9'), "{missing}");
        }
    }
}
