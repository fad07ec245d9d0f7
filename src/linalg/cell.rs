//! What the rows of a matrix are made of in memory: numbers by themselves, or two of half the width in a word.

use pulp::{Simd, bytemuck};

use crate::scalar::Real;
use crate::simd::Lanes;

/// Some numbers that lie together, which vectors take apart.
pub(crate) trait Cell<T: Real>: bytemuck::Pod + Send + Sync {
    /// Numbers in one.
    const PARTS: usize;
    /// A vector of the machine, with as many of them as one of T has numbers.
    type V<S: Simd>: bytemuck::Pod + Send + Sync;
    /// Whole vectors of a row, and its rest.
    fn vectors<S: Simd>(row: &[Self]) -> (&[Self::V<S>], &[Self]);
    /// The first of a row, zeros beyond its end.
    fn load<S: Simd>(s: S, row: &[Self]) -> Self::V<S>;
    /// One number of each.
    fn part<S: Simd>(s: S, of: Self::V<S>, part: usize) -> T::V<S>;
}

impl<T: Real> Cell<T> for T {
    const PARTS: usize = 1;
    type V<S: Simd> = <T as Lanes>::V<S>;
    #[inline(always)]
    fn vectors<S: Simd>(row: &[Self]) -> (&[<T as Lanes>::V<S>], &[Self]) {
        <T as Lanes>::vectors::<S>(row)
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, row: &[Self]) -> <T as Lanes>::V<S> {
        <T as Lanes>::load(s, row)
    }
    #[inline(always)]
    fn part<S: Simd>(_: S, of: <T as Lanes>::V<S>, _: usize) -> <T as Lanes>::V<S> {
        of
    }
}

/// Two numbers in bf16, the first in the lower half.
impl Cell<f32> for u32 {
    const PARTS: usize = 2;
    type V<S: Simd> = S::u32s;
    #[inline(always)]
    fn vectors<S: Simd>(row: &[Self]) -> (&[S::u32s], &[Self]) {
        S::as_simd_u32s(row)
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, row: &[Self]) -> S::u32s {
        s.partial_load_u32s(row)
    }
    #[inline(always)]
    fn part<S: Simd>(s: S, of: S::u32s, part: usize) -> S::f32s {
        s.transmute_f32s_u32s(match part {
            0 => s.wrapping_dyn_shl_u32s(of, s.splat_u32s(16)),
            _ => s.and_u32s(of, s.splat_u32s(0xffff_0000)),
        })
    }
}
