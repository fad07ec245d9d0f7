//! Vectors of numbers for the kernels: one name for those of f32 and f64, at the width that `pulp` found.
//!
//! Code that runs a problem in each lane gives the same bits at any width; code that sums across lanes does not.

use half::bf16;
use pulp::{Simd, bytemuck};

/// No vector has more lanes.
pub(crate) const LANES: usize = 16;

/// A number with vectors of it. The names say what pulp's do; all functions are inlined into kernels that
/// are compiled for the instruction set `S`.
pub trait Lanes: bytemuck::Pod + Send + Sync {
    /// A vector of the machine; plain data.
    type V<S: Simd>: bytemuck::Pod + Send + Sync + std::fmt::Debug;
    /// Lanes of a vector.
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::V<S>>() / size_of::<Self>()
    }
    /// The same number in all lanes.
    fn splat<S: Simd>(s: S, a: Self) -> Self::V<S>;
    /// a + b.
    fn vadd<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// a − b.
    fn vsub<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// a·b.
    fn vmul<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// a ÷ b.
    fn vdiv<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// a·b + c, rounded once where the machine can.
    fn fma<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>, c: Self::V<S>) -> Self::V<S>;
    /// c − a·b, rounded once where the machine can.
    fn fnma<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>, c: Self::V<S>) -> Self::V<S>;
    /// √a.
    fn vsqrt<S: Simd>(s: S, a: Self::V<S>) -> Self::V<S>;
    /// |a|.
    fn vabs<S: Simd>(s: S, a: Self::V<S>) -> Self::V<S>;
    /// The larger of two.
    fn vmax<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>) -> Self::V<S>;
    /// `yes` where a < b, else `no`.
    fn if_less<S: Simd>(s: S, a: Self::V<S>, b: Self::V<S>, yes: Self::V<S>, no: Self::V<S>) -> Self::V<S>;
    /// Lane i of the result is lane i − amount of a, around the end.
    fn rotate_right<S: Simd>(s: S, a: Self::V<S>, amount: usize) -> Self::V<S>;
    /// The sum of the lanes.
    fn vsum<S: Simd>(s: S, a: Self::V<S>) -> Self;
    /// The first numbers of a slice, zeros beyond its end.
    fn load<S: Simd>(s: S, a: &[Self]) -> Self::V<S>;
    /// As many numbers as the slice takes.
    fn store<S: Simd>(s: S, to: &mut [Self], a: Self::V<S>);
    /// Exact widening.
    fn from_bf16(a: bf16) -> Self;
    /// Whole vectors of a slice, and its rest.
    fn vectors<S: Simd>(a: &[Self]) -> (&[Self::V<S>], &[Self]);
    /// Whole vectors of a slice, and its rest.
    fn vectors_mut<S: Simd>(a: &mut [Self]) -> (&mut [Self::V<S>], &mut [Self]);
}

macro_rules! lanes {
    ($t:ty, $v:ident, $splat:ident, $add:ident, $sub:ident, $mul:ident, $div:ident, $fma:ident, $fnma:ident,
     $sqrt:ident, $abs:ident, $max:ident, $less:ident, $select:ident, $rotate:ident, $sum:ident, $load:ident, $store:ident,
     $slice:ident, $slice_mut:ident) => {
        impl Lanes for $t {
            type V<S: Simd> = S::$v;
            #[inline(always)]
            fn splat<S: Simd>(s: S, a: Self) -> S::$v {
                s.$splat(a)
            }
            #[inline(always)]
            fn vadd<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$add(a, b)
            }
            #[inline(always)]
            fn vsub<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$sub(a, b)
            }
            #[inline(always)]
            fn vmul<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$mul(a, b)
            }
            #[inline(always)]
            fn vdiv<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$div(a, b)
            }
            #[inline(always)]
            fn fma<S: Simd>(s: S, a: S::$v, b: S::$v, c: S::$v) -> S::$v {
                s.$fma(a, b, c)
            }
            #[inline(always)]
            fn fnma<S: Simd>(s: S, a: S::$v, b: S::$v, c: S::$v) -> S::$v {
                s.$fnma(a, b, c)
            }
            #[inline(always)]
            fn vsqrt<S: Simd>(s: S, a: S::$v) -> S::$v {
                s.$sqrt(a)
            }
            #[inline(always)]
            fn vabs<S: Simd>(s: S, a: S::$v) -> S::$v {
                s.$abs(a)
            }
            #[inline(always)]
            fn vmax<S: Simd>(s: S, a: S::$v, b: S::$v) -> S::$v {
                s.$max(a, b)
            }
            #[inline(always)]
            fn if_less<S: Simd>(s: S, a: S::$v, b: S::$v, yes: S::$v, no: S::$v) -> S::$v {
                s.$select(s.$less(a, b), yes, no)
            }
            #[inline(always)]
            fn rotate_right<S: Simd>(s: S, a: S::$v, amount: usize) -> S::$v {
                s.$rotate(a, amount)
            }
            #[inline(always)]
            fn vsum<S: Simd>(s: S, a: S::$v) -> Self {
                s.$sum(a)
            }
            #[inline(always)]
            fn load<S: Simd>(s: S, a: &[Self]) -> S::$v {
                // A masked load is a call; a whole vector needs none.
                match S::$slice(a).0.first() {
                    Some(&whole) => whole,
                    None => s.$load(a),
                }
            }
            #[inline(always)]
            fn store<S: Simd>(s: S, to: &mut [Self], a: S::$v) {
                match S::$slice_mut(to).0.first_mut() {
                    Some(whole) => *whole = a,
                    None => s.$store(to, a),
                }
            }
            #[inline(always)]
            fn from_bf16(a: bf16) -> Self {
                // Weights are finite: no NaN to keep quiet, and so no branch.
                f32::from_bits(u32::from(a.to_bits()) << 16).into()
            }
            #[inline(always)]
            fn vectors<S: Simd>(a: &[Self]) -> (&[S::$v], &[Self]) {
                S::$slice(a)
            }
            #[inline(always)]
            fn vectors_mut<S: Simd>(a: &mut [Self]) -> (&mut [S::$v], &mut [Self]) {
                S::$slice_mut(a)
            }
        }
    };
}

lanes!(
    f32,
    f32s,
    splat_f32s,
    add_f32s,
    sub_f32s,
    mul_f32s,
    div_f32s,
    mul_add_e_f32s,
    negate_mul_add_e_f32s,
    sqrt_f32s,
    abs_f32s,
    max_f32s,
    less_than_f32s,
    select_f32s,
    rotate_right_f32s,
    reduce_sum_f32s,
    partial_load_f32s,
    partial_store_f32s,
    as_simd_f32s,
    as_mut_simd_f32s
);
lanes!(
    f64,
    f64s,
    splat_f64s,
    add_f64s,
    sub_f64s,
    mul_f64s,
    div_f64s,
    mul_add_e_f64s,
    negate_mul_add_e_f64s,
    sqrt_f64s,
    abs_f64s,
    max_f64s,
    less_than_f64s,
    select_f64s,
    rotate_right_f64s,
    reduce_sum_f64s,
    partial_load_f64s,
    partial_store_f64s,
    as_simd_f64s,
    as_mut_simd_f64s
);

/// Memory that starts where a cache line does: vectors that straddle two lines load at half the speed.
#[derive(Debug, Default)]
pub(crate) struct Aligned<T>(Vec<T>);

impl<T: Lanes> Aligned<T> {
    const LINE: usize = 64;

    /// `length` numbers, of which those not written before are zero.
    pub(crate) fn numbers(&mut self, length: usize) -> &mut [T] {
        let slack = Self::LINE / size_of::<T>();
        if self.0.is_empty() {
            // Zeroed by the allocator, which need not touch what is new.
            self.0 = vec![T::zeroed(); length + slack];
        } else if self.0.len() < length + slack {
            self.0.resize(length + slack, T::zeroed());
        }
        let start = self.0.as_ptr().align_offset(Self::LINE).min(slack);
        &mut self.0[start..start + length]
    }

    /// The numbers that were written before, `length` at most.
    pub(crate) fn filled(&self, length: usize) -> &[T] {
        let start = self.0.as_ptr().align_offset(Self::LINE).min(Self::LINE / size_of::<T>());
        &self.0[start.min(self.0.len())..(start + length).min(self.0.len())]
    }
}

/// Takes the first `n` elements off a slice.
///
/// # Panics
/// If there are fewer.
pub(crate) fn take<'a, V>(rest: &mut &'a mut [V], n: usize) -> &'a mut [V] {
    let (first, others) = std::mem::take(rest).split_at_mut(n);
    *rest = others;
    first
}

/// Transposes a square tile, the first [`Lanes::lanes`] vectors: blocks of 1, 2, 4, … off the diagonal change places (Eklundh, IEEE Trans. Computers
/// C-21, 1972).
#[inline(always)]
pub(crate) fn transpose<S: Simd, T: Lanes>(s: S, tile: &mut [T::V<S>; LANES]) {
    let (width, half) = (T::lanes::<S>(), T::splat(s, T::from_bf16(bf16::from_f32_const(0.5))));
    let one = T::from_bf16(bf16::ONE);
    // Written out, so that the tile stays in registers and the permutations are constants.
    macro_rules! stage {
        ($block:literal: $($a:literal $b:literal),*) => {
            if $block < width {
                let mut odd = [T::splat(s, T::zeroed()); 1];
                let lanes: &mut [T] = bytemuck::cast_slice_mut(&mut odd);
                lanes.iter_mut().enumerate().for_each(|(i, odd)| *odd = if (i / $block) % 2 == 1 { one } else { T::zeroed() });
                $(if $b < width {
                    let (a, b) = (tile[$a], tile[$b]);
                    tile[$a] = T::if_less(s, half, odd[0], T::rotate_right(s, b, $block), a);
                    tile[$b] = T::if_less(s, half, odd[0], b, T::rotate_right(s, a, width - $block));
                })*
            }
        };
    }
    stage!(1: 0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15);
    stage!(2: 0 2, 1 3, 4 6, 5 7, 8 10, 9 11, 12 14, 13 15);
    stage!(4: 0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15);
    stage!(8: 0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15);
}
