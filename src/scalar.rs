//! Numbers: what is computed in ([`Real`]: f32, f64) and what is stored ([`DType`]).
//!
//! Half types are storage only, in files and (bf16) in memory. They are widened on their way into arithmetic (exact) and narrowed
//! when a leaf is made (round to nearest, ties to even); arithmetic in them would be two orders of magnitude slower on a CPU.

use std::fmt;

use half::{bf16, f16};
use ndarray::{ArrayView2, CowArray, Ix2, NdFloat};
use safetensors::Dtype as Stored;

use crate::error::{Error, Result};
use crate::linalg::{Backend, Kernels, pages};
use crate::simd::Lanes;

/// A dtype as it is stored in a file.
#[derive(Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DType {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// Unsigned byte; bit masks are stored so.
    U8,
    /// Unsigned 16-bit; index lists are stored so.
    U16,
    /// Unsigned 32-bit; index lists are stored so.
    U32,
    /// Any other dtype of the safetensors format: carried through byte for byte.
    Opaque(Opaque),
}

/// A stored dtype that this crate only copies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Opaque(Stored);

impl DType {
    /// Whether tensors of this dtype can be compressed.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::F16 | DType::BF16)
    }

    /// Bytes that `count` elements take on disk (sub-byte dtypes are packed).
    pub fn bytes(self, count: usize) -> usize {
        (count * self.stored().bitsize()).div_ceil(8)
    }

    /// Reads the name the safetensors format uses, e.g. `BF16`; any case.
    pub fn parse(name: &str) -> Option<Self> {
        let stored: Stored = serde_json::from_value(serde_json::Value::String(name.to_uppercase())).ok()?;
        Some(stored.into())
    }

    pub(crate) fn stored(self) -> Stored {
        match self {
            DType::F64 => Stored::F64,
            DType::F32 => Stored::F32,
            DType::F16 => Stored::F16,
            DType::BF16 => Stored::BF16,
            DType::U8 => Stored::U8,
            DType::U16 => Stored::U16,
            DType::U32 => Stored::U32,
            DType::Opaque(Opaque(stored)) => stored,
        }
    }
}

impl fmt::Debug for Opaque {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl From<Stored> for DType {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::F64 => DType::F64,
            Stored::F32 => DType::F32,
            Stored::F16 => DType::F16,
            Stored::BF16 => DType::BF16,
            Stored::U8 => DType::U8,
            Stored::U16 => DType::U16,
            Stored::U32 => DType::U32,
            other => DType::Opaque(Opaque(other)),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.stored())
    }
}

impl fmt::Debug for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// A type that is computed in: `f32` or `f64`. Sealed.
pub trait Real: NdFloat + Default + sealed::Sealed + Lanes {
    /// The dtype that stores this type without loss.
    const DTYPE: DType;
    /// Nearest value of this type.
    fn from_f64(value: f64) -> Self;
    /// Exact widening.
    fn wide(self) -> f64;
    /// Rounds to the nearest value that `dtype` can hold (ties to even); may overflow to infinity.
    fn round_to(self, dtype: DType) -> Self;
    /// The kernels of a backend for this type.
    fn kernels(backend: &dyn Backend) -> &dyn Kernels<Self>;
    /// The same view if this type is `f32`.
    fn as_f32(view: ArrayView2<'_, Self>) -> Option<ArrayView2<'_, f32>>;
    /// The same view if this type is `f64`.
    fn as_f64(view: ArrayView2<'_, Self>) -> Option<ArrayView2<'_, f64>>;
    /// The view in this compute type: borrowed if it is of this type, converted if not.
    // (Not named `cast`: later Rust has functions of `f32` and `f64` of that name.)
    fn from_view<S: Real>(view: ArrayView2<'_, S>) -> CowArray<'_, Self, Ix2>;
}

impl Real for f32 {
    fn as_f32(view: ArrayView2<'_, Self>) -> Option<ArrayView2<'_, Self>> {
        Some(view)
    }
    fn as_f64(_: ArrayView2<'_, Self>) -> Option<ArrayView2<'_, f64>> {
        None
    }
    fn from_view<S: Real>(view: ArrayView2<'_, S>) -> CowArray<'_, Self, Ix2> {
        match S::as_f32(view) {
            Some(same) => same.into(),
            None => view.mapv(|v| Self::from_f64(v.wide())).into(),
        }
    }
    const DTYPE: DType = DType::F32;
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn wide(self) -> f64 {
        self.into()
    }
    fn round_to(self, dtype: DType) -> Self {
        match dtype {
            DType::F16 => f16::from_f32(self).to_f32(),
            DType::BF16 => bf16::from_f32(self).to_f32(),
            _ => self,
        }
    }
    fn kernels(backend: &dyn Backend) -> &dyn Kernels<Self> {
        backend
    }
}

impl Real for f64 {
    fn as_f64(view: ArrayView2<'_, Self>) -> Option<ArrayView2<'_, Self>> {
        Some(view)
    }
    fn as_f32(_: ArrayView2<'_, Self>) -> Option<ArrayView2<'_, f32>> {
        None
    }
    fn from_view<S: Real>(view: ArrayView2<'_, S>) -> CowArray<'_, Self, Ix2> {
        match S::as_f64(view) {
            Some(same) => same.into(),
            None => view.mapv(|v| Self::from_f64(v.wide())).into(),
        }
    }
    const DTYPE: DType = DType::F64;
    fn from_f64(value: f64) -> Self {
        value
    }
    fn wide(self) -> f64 {
        self
    }
    fn round_to(self, dtype: DType) -> Self {
        match dtype {
            DType::F32 => f64::from(self as f32),
            DType::F16 => f16::from_f32(round_to_odd(self)).to_f64(),
            DType::BF16 => bf16::from_f32(round_to_odd(self)).to_f64(),
            _ => self,
        }
    }
    fn kernels(backend: &dyn Backend) -> &dyn Kernels<Self> {
        backend
    }
}

/// f64 → f32 so that a second rounding to a half type equals rounding once: what is inexact becomes odd
/// (half's own `from_f64` drops the low 32 bits before it rounds).
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back == value || !nearest.is_finite() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    // The odd neighbour on the other side of the value.
    if (back < value) == (value > 0.0) {
        f32::from_bits(nearest.to_bits() + 1)
    } else {
        f32::from_bits(nearest.to_bits() - 1)
    }
}

/// Widens little-endian bytes of a float dtype. The bytes need no alignment.
///
/// # Errors
/// [`Error::UnsupportedDType`] for other dtypes; [`Error::Shape`] if the length is not a multiple.
pub fn widen<T: Real>(dtype: DType, bytes: &[u8]) -> Result<Vec<T>> {
    fn each<T, const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        let (chunks, rest) = bytes.as_chunks::<N>();
        if !rest.is_empty() {
            return Err(Error::shape(format!("a multiple of {N} bytes"), bytes.len()));
        }
        let mut values = pages::with_capacity(chunks.len());
        values.extend(chunks.iter().map(|chunk| read(*chunk)));
        Ok(values)
    }
    match dtype {
        DType::F64 => each(bytes, |b| T::from_f64(f64::from_le_bytes(b))),
        DType::F32 => each(bytes, |b| T::from_f64(f32::from_le_bytes(b).into())),
        DType::F16 => each(bytes, |b| T::from_f64(f16::from_le_bytes(b).to_f64())),
        DType::BF16 => each(bytes, |b| T::from_f64(bf16::from_le_bytes(b).to_f64())),
        dtype => Err(Error::UnsupportedDType { dtype }),
    }
}

/// Narrows to little-endian bytes of a float dtype, rounding to nearest (ties to even).
///
/// # Errors
/// [`Error::UnsupportedDType`] for dtypes that are not floats.
pub fn narrow<'a, T: Real>(dtype: DType, values: impl IntoIterator<Item = &'a T>) -> Result<Vec<u8>> {
    let values = values.into_iter().map(|v| v.wide());
    Ok(match dtype {
        DType::F64 => values.flat_map(f64::to_le_bytes).collect(),
        DType::F32 => values.flat_map(|v| (v as f32).to_le_bytes()).collect(),
        DType::F16 => values.flat_map(|v| f16::from_f32(round_to_odd(v)).to_le_bytes()).collect(),
        DType::BF16 => values.flat_map(|v| bf16::from_f32(round_to_odd(v)).to_le_bytes()).collect(),
        dtype => return Err(Error::UnsupportedDType { dtype }),
    })
}

/// Refuses NaN and infinities, naming the first.
///
/// # Errors
/// [`Error::NonFinite`].
pub fn check_finite<'a, T: Real>(what: &str, values: impl IntoIterator<Item = &'a T>) -> Result<()> {
    match values.into_iter().enumerate().find(|(_, v)| !v.is_finite()) {
        Some((index, value)) => Err(Error::NonFinite { what: what.into(), index, value: value.wide() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_types_survive_a_round_trip_and_round_to_even() {
        for bits in 0..=u16::MAX {
            for (dtype, finite) in
                [(DType::BF16, bf16::from_bits(bits).is_finite()), (DType::F16, f16::from_bits(bits).is_finite())]
            {
                if finite {
                    let wide: Vec<f32> = widen(dtype, &bits.to_le_bytes()).unwrap();
                    assert_eq!(narrow(dtype, &wide).unwrap(), bits.to_le_bytes());
                    assert_eq!(wide[0].round_to(dtype), wide[0]);
                }
            }
        }
        // 1 + 2^-8 lies half-way between two bf16 values: the even one is 1.
        assert_eq!((1.0f32 + 2f32.powi(-8)).round_to(DType::BF16), 1.0);
        // f64 is rounded once, not by way of f32.
        let tricky = 1.0 + 2f64.powi(-8) + 2f64.powi(-30);
        assert_eq!(tricky.round_to(DType::BF16), 1.0 + 2f64.powi(-7));
    }

    #[test]
    fn dtype_names_and_sizes() {
        assert_eq!(DType::parse("bf16"), Some(DType::BF16));
        assert_eq!(DType::parse("nonsense"), None);
        assert_eq!(DType::parse("F4").unwrap().bytes(5), 3);
        assert_eq!(DType::F32.to_string(), "F32");
    }
}
