//! The leading singular triplets of many small matrices at once.
//!
//! Projections onto block structures (Monarch matrices, dictionary atoms) need σ₁, u₁ and v₁ of thousands of
//! small slices. A library's SVD called for each spends its time on start-up and on the other vectors; an
//! iteration (power method, Lanczos) may stop at the second pair where the start is unlucky. Here a
//! direct method runs on one slice in each lane of the vector unit: Gram matrix of the shorter side,
//! Householder tridiagonalisation, bisection and inverse iteration, then one step of the power method on the
//! slice itself, so that what the Gram matrix rounded away matters in second order only.
//!
//! A slice's result does not depend on the other slices of the call, nor on the number of threads, nor on the
//! width of the vectors.

use std::marker::PhantomData;

use ndarray::{Array1, ArrayView2};
use pulp::{Arch, Simd, WithSimd, bytemuck};
use rayon::prelude::*;

use super::{Faer, Kernels};
use crate::error::Result;
use crate::scalar::{Real, check_finite};
use crate::simd::{Aligned, LANES, take};

mod pack;
#[cfg(test)]
mod tests;
mod tridiagonal;

use self::pack::Packed;
use self::tridiagonal::Symmetric;

/// Up to this short side, and this many elements, slices run in lanes; larger ones by the backend one by one.
const SHORT_SIDE: usize = 256;
const ELEMENTS: usize = 1 << 20;

/// The leading singular triplet of a matrix A: A ≈ σ·u·vᵀ, the best approximation of rank one.
#[derive(Debug, Clone, PartialEq)]
pub struct SingularTriplet<T> {
    /// σ, the largest singular value.
    pub value: f64,
    /// u, one entry for each row; unit length, its first entry of largest absolute value positive.
    pub left: Array1<T>,
    /// v, one entry for each column; unit length.
    pub right: Array1<T>,
    /// ‖A − σ·u·vᵀ‖², measured with the numbers above, so that nothing cancels.
    pub residual: f64,
}

/// The leading singular triplet of each matrix, in order; strides and shapes may differ.
///
/// ‖A − σ·u·vᵀ‖² exceeds the least possible by a relative 10⁻⁶ at most in `f32` (measured; more only where
/// nothing but rounding is left of A), for any spectrum. Of singular values that are equal to rounding one is
/// taken. A zero matrix gives σ = 0 and the first unit vectors, a matrix without entries empty or first unit
/// vectors. Multiplications for a slice of m×n, n ≤ m: about mn²/2 + 2n³/3. Runs on the global pool unless
/// called on a rayon worker.
///
/// Sources: Golub and Van Loan, *Matrix Computations*, chapter 8; Dao et al., *Monarch*, ICML 2022, for the use.
///
/// # Errors
/// [`Error::NonFinite`](crate::Error::NonFinite) if a slice holds a NaN or an infinity; [`Error::Numerical`](crate::Error::Numerical) if the backend does not
/// converge for a large one.
pub fn leading_triplets<T: Real>(slices: &[ArrayView2<'_, T>]) -> Result<Vec<SingularTriplet<T>>> {
    leading_triplets_by(Arch::new(), slices)
}

fn leading_triplets_by<T: Real>(arch: Arch, slices: &[ArrayView2<'_, T>]) -> Result<Vec<SingularTriplet<T>>> {
    let groups = groups(slices, arch.dispatch(Width::<T>(PhantomData)));
    let solve = |memory: &mut Aligned<T>, group: &Vec<usize>| {
        let views: Vec<_> = group.iter().map(|&i| upright(slices[i].view())).collect();
        let found = arch.dispatch(Group { memory, views: &views });
        // What is not finite is named by its place in the slice as it was given.
        if found.is_err() {
            group.iter().try_for_each(|&i| check_finite("slice", slices[i].iter()))?;
        }
        found
    };
    let solved: Vec<Vec<SingularTriplet<T>>> = if groups.len() < 2 || rayon::current_thread_index().is_some() {
        let mut memory = Aligned::default();
        groups.iter().map(|group| solve(&mut memory, group)).collect::<Result<_>>()?
    } else {
        groups.par_iter().map_init(Aligned::default, solve).collect::<Result<_>>()?
    };
    let mut all = vec![None; slices.len()];
    for (group, found) in groups.iter().zip(solved) {
        for (&i, triplet) in group.iter().zip(found) {
            all[i] = Some(triplet.turned(is_upright(&slices[i])));
        }
    }
    Ok(all.into_iter().flatten().collect())
}

/// How many numbers of a type a vector holds.
struct Width<T>(PhantomData<T>);

impl<T: Real> WithSimd for Width<T> {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        T::lanes::<S>()
    }
}

/// No more columns than rows; of square matrices the one whose columns are contiguous, which is quicker to pack.
fn is_upright<T>(a: &ArrayView2<'_, T>) -> bool {
    let (rows, columns) = a.dim();
    rows > columns || (rows == columns && a.strides()[1] != 1)
}

fn upright<T>(a: ArrayView2<'_, T>) -> ArrayView2<'_, T> {
    if is_upright(&a) { a } else { a.reversed_axes() }
}

fn in_lanes((rows, columns): (usize, usize)) -> bool {
    rows.min(columns) <= SHORT_SIDE && rows * columns <= ELEMENTS
}

/// What slices that share vectors have in common.
type Kind = ((usize, usize), bool);

/// Indices of slices of one shape and storage order, in groups of up to `width`; large ones are alone.
fn groups<T: Real>(slices: &[ArrayView2<'_, T>], width: usize) -> Vec<Vec<usize>> {
    // The kinds met so far, each with the place of the group that is being filled.
    let mut open: Vec<(Kind, usize)> = Vec::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (i, slice) in slices.iter().enumerate() {
        let upright = upright(slice.view());
        let kind = (upright.dim(), upright.strides()[1] == 1);
        let width = if in_lanes(kind.0) { width } else { 1 };
        let at = open.iter().position(|(of, _)| *of == kind).unwrap_or_else(|| {
            open.push((kind, groups.len()));
            groups.push(Vec::new());
            open.len() - 1
        });
        if groups[open[at].1].len() == width {
            open[at].1 = groups.len();
            groups.push(Vec::new());
        }
        groups[open[at].1].push(i);
    }
    groups
}

impl<T: Real> SingularTriplet<T> {
    /// The triplet of a slice from that of its upright form: sides exchanged if need be, signs settled.
    fn turned(mut self, upright: bool) -> Self {
        if !upright {
            std::mem::swap(&mut self.left, &mut self.right);
        }
        let largest = self.left.iter().fold(T::zero(), |best, &x| if x.abs() > best.abs() { x } else { best });
        if largest < T::zero() {
            self.left.mapv_inplace(|x| -x);
            self.right.mapv_inplace(|x| -x);
        }
        self
    }

    /// What a zero matrix has.
    fn zero(rows: usize, columns: usize) -> Self {
        let first = |n: usize| Array1::from_shape_fn(n, |i| if i == 0 { T::one() } else { T::zero() });
        SingularTriplet { value: 0.0, left: first(rows), right: first(columns), residual: 0.0 }
    }
}

/// Slices of one upright shape, one in each lane.
struct Group<'a, 'b, T: Real> {
    memory: &'a mut Aligned<T>,
    views: &'a [ArrayView2<'b, T>],
}

impl<T: Real> WithSimd for Group<'_, '_, T> {
    type Output = Result<Vec<SingularTriplet<T>>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let views = self.views;
        let shape = views.first().map_or((0, 0), |view| view.dim());
        let (long, short) = shape;
        if short == 0 {
            return Ok(vec![SingularTriplet::zero(long, short); views.len()]);
        }
        if !in_lanes(shape) {
            return views.iter().map(|view| by_backend(view.view())).collect();
        }
        let size = Packed::<S, T>::memory(shape) + Symmetric::<S, T>::memory(short) + 2 * long;
        let (mut memory, _) = T::vectors_mut::<S>(self.memory.numbers(size * T::lanes::<S>()));
        let mut packed = Packed::new(s, &mut memory, views);
        let exponents = packed.scale(s);
        let mut gram = Symmetric::zeros(s, &mut memory, short);
        gram.gram(s, &packed);
        let traces = [gram.trace(s)];
        let traces = numbers::<S, T>(&traces);
        if let Some((bad, _)) = views.iter().zip(traces).find(|(_, trace)| !trace.is_finite()) {
            check_finite("slice", bad.iter())?;
        }
        gram.tridiagonalize(s);
        gram.leading(s);
        let (left, right) = (take(&mut memory, long), gram.vector);
        let (value, residual) = refine(s, &packed, left, right);
        let (left, right) = (numbers::<S, T>(left), numbers::<S, T>(right));
        let vector = |from: &[T], lane: usize| from.iter().skip(lane).step_by(T::lanes::<S>()).copied().collect();
        let each = (0..views.len()).map(|lane| {
            if traces[lane] == T::zero() {
                return SingularTriplet::zero(long, short);
            }
            let scale = 2f64.powi(-exponents[lane]);
            SingularTriplet {
                value: value[lane] * scale,
                left: vector(left, lane),
                right: vector(right, lane),
                residual: residual[lane] * scale * scale,
            }
        });
        Ok(each.collect())
    }
}

/// From v of any length: u = A·v, then v = Aᵀ·u, both of unit length; returns σ = ‖Aᵀ·u‖ and ‖A − σ·u·vᵀ‖².
#[inline(always)]
fn refine<S: Simd, T: Real>(
    s: S,
    a: &Packed<'_, S, T>,
    left: &mut [T::V<S>],
    right: &mut [T::V<S>],
) -> ([f64; LANES], [f64; LANES]) {
    left.fill(T::splat(s, T::zero()));
    let mut columns = a.columns();
    for four in right.chunks(4) {
        let columns: [_; 4] = std::array::from_fn(|_| columns.next().unwrap_or(&[]));
        match (columns, four) {
            ([a, b, c, d], &[va, vb, vc, vd]) => {
                for ((((u, &a), &b), &c), &d) in left.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                    *u = T::fma(s, d, vd, T::fma(s, c, vc, T::fma(s, b, vb, T::fma(s, a, va, *u))));
                }
            }
            (columns, rest) => {
                for (column, &v) in columns.into_iter().zip(rest) {
                    left.iter_mut().zip(column).for_each(|(u, &a)| *u = T::fma(s, a, v, *u));
                }
            }
        }
    }
    unit::<S, T>(s, left);
    for (column, v) in a.columns().zip(&mut *right) {
        *v = dot::<S, T>(s, column, left);
    }
    let sigma = unit::<S, T>(s, right);
    let mut residual = [0.0; LANES];
    for (column, &v) in a.columns().zip(&*right) {
        let scaled = T::vmul(s, v, sigma);
        let mut sums = [T::splat(s, T::zero()); 4];
        for (four, us) in column.chunks(4).zip(left.chunks(4)) {
            for ((&a, &u), sum) in four.iter().zip(us).zip(&mut sums) {
                let rest = T::fnma(s, u, scaled, a);
                *sum = T::fma(s, rest, rest, *sum);
            }
        }
        let sum = [T::vadd(s, T::vadd(s, sums[0], sums[1]), T::vadd(s, sums[2], sums[3]))];
        residual.iter_mut().zip(numbers::<S, T>(&sum)).for_each(|(total, part)| *total += part.wide());
    }
    let mut value = [0.0; LANES];
    value.iter_mut().zip(numbers::<S, T>(&[sigma])).for_each(|(value, sigma)| *value = sigma.wide());
    (value, residual)
}

/// Divides by the length, which is returned.
#[inline(always)]
fn unit<S: Simd, T: Real>(s: S, vector: &mut [T::V<S>]) -> T::V<S> {
    let length = T::vsqrt(s, dot::<S, T>(s, vector, vector));
    let scale = T::vdiv(s, T::splat(s, T::one()), length);
    vector.iter_mut().for_each(|v| *v = T::vmul(s, *v, scale));
    length
}

/// Σ aᵢ·bᵢ in each lane, in four partial sums.
#[inline(always)]
fn dot<S: Simd, T: Real>(s: S, a: &[T::V<S>], b: &[T::V<S>]) -> T::V<S> {
    let mut sums = [T::splat(s, T::zero()); 4];
    for (a, b) in a.chunks(4).zip(b.chunks(4)) {
        for ((&a, &b), sum) in a.iter().zip(b).zip(&mut sums) {
            *sum = T::fma(s, a, b, *sum);
        }
    }
    T::vadd(s, T::vadd(s, sums[0], sums[1]), T::vadd(s, sums[2], sums[3]))
}

/// One large slice: the eigenvector of its Gram matrix in f64.
fn by_backend<T: Real>(a: ArrayView2<'_, T>) -> Result<SingularTriplet<T>> {
    check_finite("slice", a.iter())?;
    let a = f64::from_view(a);
    let largest = a.fold(0.0, |max: f64, x| max.max(x.abs()));
    if largest == 0.0 {
        return Ok(SingularTriplet::zero(a.nrows(), a.ncols()));
    }
    let scaled = &a / largest;
    let found = Kernels::<f64>::eigh(&Faer, Kernels::<f64>::gram(&Faer, scaled.t()))?;
    let mut left = scaled.dot(&found.vectors.column(0));
    left /= left.dot(&left).sqrt();
    let mut right = left.dot(&scaled);
    let value = right.dot(&right).sqrt();
    right /= value;
    let (left, right) = (left.mapv(T::from_f64), right.mapv(T::from_f64));
    let rows = scaled.rows().into_iter().zip(&left);
    let squares = rows
        .map(|(row, u)| row.iter().zip(&right).map(|(a, v)| (a - value * u.wide() * v.wide()).powi(2)).sum::<f64>());
    let residual = squares.sum::<f64>() * largest * largest;
    Ok(SingularTriplet { value: value * largest, left, right, residual })
}

/// The numbers of vectors, lane by lane.
fn numbers<S: Simd, T: Real>(vectors: &[T::V<S>]) -> &[T] {
    bytemuck::cast_slice(vectors)
}
