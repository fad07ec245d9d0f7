//! A matrix times a few vectors. Such a product is still as fast as the matrix is read, if it is read where it lies: a general
//! product first copies it into panels, which takes longer than what is then multiplied.
//!
//! Each lane of the machine's vectors is a column of the matrix. Each sum has an order of its own, whatever rows and vectors it
//! is computed beside and on however many threads.

use ndarray::{ArrayView2, ArrayViewMut2, s};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::cell::Cell;
use super::vector::{Ahead, alone, parts, share};
use crate::scalar::Real;
use crate::simd::{Aligned, prefetch};

/// Vectors that are multiplied together, at most, where the machine's vectors are of 64 bytes, and where they are shorter.
const WIDE: usize = 8;
const NARROW: usize = 6;
/// Vectors that are multiplied so at all: rows meet all of them at once, columns in two turns.
pub(crate) const MOST: usize = 2 * WIDE;

/// Vectors that are multiplied together on this machine.
fn together() -> usize {
    match Arch::new() {
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        Arch::V4(_) => WIDE,
        _ => NARROW,
    }
}

/// C ← α·A·B + β·C for B of few columns, if this is the faster way: A's rows or its columns lie in order in memory, and are so
/// many and so long that laying out vectors and adding up lanes is little beside the products. Else nothing, and false.
pub(super) fn multiply_few<T: Real>(
    alpha: T,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    beta: T,
    c: &mut ArrayViewMut2<'_, T>,
) -> bool {
    let ((m, k), n) = (a.dim(), b.ncols());
    let most = together();
    let by_rows = a.strides()[1] == 1 && n <= most && k >= 32 * n && m >= 16 * n;
    let by_columns = a.strides()[0] == 1 && n <= 2 * most && m.min(k) >= if n > most { 32 * n } else { 16 };
    if n < 2 || !(by_rows || by_columns) {
        return false;
    }
    let run = |y: &mut [T]| if by_rows { times::<T, T, false>(a, b, y) } else { times::<T, T, true>(a.t(), b, y) };
    match c.as_slice_mut() {
        Some(y) if alpha == T::one() && beta == T::zero() => run(y),
        _ => {
            let mut y = vec![T::zero(); m * n];
            run(&mut y);
            let scaled = |c: T, y: T| if beta == T::zero() { alpha * y } else { alpha * y + beta * c };
            for (mut c, y) in c.rows_mut().into_iter().zip(y.chunks_exact(n)) {
                c.iter_mut().zip(y).for_each(|(c, &y)| *c = scaled(*c, y));
            }
        }
    }
    true
}

/// y = A·B, or Aᵀ·B, row by row, for A whose rows lie in order in memory. (The last number of a row may be none: a zero.)
pub(crate) fn times<T: Real, C: Cell<T>, const TRANSPOSED: bool>(
    a: ArrayView2<'_, C>,
    b: ArrayView2<'_, T>,
    y: &mut [T],
) {
    if alone(&a) || y.is_empty() {
        return Arch::new().dispatch(Product::<T, C, TRANSPOSED> { a, b, y });
    }
    let n = b.ncols();
    let share = share(y.len() / n);
    y.par_chunks_mut(share * n).enumerate().for_each(|(i, y)| {
        let own = i * share..i * share + y.len() / n;
        let cells = own.start / C::PARTS..own.end.div_ceil(C::PARTS);
        let a = if TRANSPOSED { a.slice(s![.., cells]) } else { a.slice(s![own, ..]) };
        Arch::new().dispatch(Product::<T, C, TRANSPOSED> { a, b, y });
    });
}

/// Calls `part::<S, rows, vectors>(s, first)` for each part of n vectors, with as many rows at a time as there are registers for.
macro_rules! by_parts {
    ($product:ident, $s:ident, $n:expr) => {
        let (n, wide) = ($n, size_of::<T::V<S>>() >= 64);
        let parts = n.div_ceil(if wide { WIDE } else { NARROW });
        for part in 0..parts {
            let (first, end) = (part * n / parts, (part + 1) * n / parts);
            match (end - first, wide) {
                (1, true) => $product.part::<S, 4, 1>($s, first),
                (2, true) => $product.part::<S, 4, 2>($s, first),
                (3, true) => $product.part::<S, 4, 3>($s, first),
                (4, true) => $product.part::<S, 4, 4>($s, first),
                (5, true) => $product.part::<S, 4, 5>($s, first),
                (6, true) => $product.part::<S, 4, 6>($s, first),
                (7, true) => $product.part::<S, 3, 7>($s, first),
                (_, true) => $product.part::<S, 3, WIDE>($s, first),
                (1, false) => $product.part::<S, 2, 1>($s, first),
                (2, false) => $product.part::<S, 2, 2>($s, first),
                (3, false) => $product.part::<S, 2, 3>($s, first),
                (4, false) => $product.part::<S, 2, 4>($s, first),
                (5, false) => $product.part::<S, 2, 5>($s, first),
                (_, false) => $product.part::<S, 2, NARROW>($s, first),
            }
        }
    };
}

/// y = A·B, or Aᵀ·B.
struct Product<'a, T, C, const TRANSPOSED: bool> {
    a: ArrayView2<'a, C>,
    b: ArrayView2<'a, T>,
    y: &'a mut [T],
}

impl<T: Real, C: Cell<T>, const TRANSPOSED: bool> WithSimd for Product<'_, T, C, TRANSPOSED> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, s: S) {
        by_parts!(self, s, self.b.ncols());
    }
}

impl<T: Real, C: Cell<T>, const TRANSPOSED: bool> Product<'_, T, C, TRANSPOSED> {
    /// The products with N vectors, for R rows of A at a time.
    #[inline(always)]
    fn part<S: Simd, const R: usize, const N: usize>(&mut self, s: S, first: usize) {
        match TRANSPOSED {
            false => self.by_rows::<S, R, N>(s, first),
            true => self.by_columns::<S, R, N>(s, first),
        }
    }

    #[inline(always)]
    fn by_rows<S: Simd, const R: usize, const N: usize>(&mut self, s: S, first: usize) {
        let ((m, k), n, lanes) = (self.a.dim(), self.b.ncols(), T::lanes::<S>());
        let mut x = Aligned::default();
        let x = x.numbers(k.next_multiple_of(lanes) * C::PARTS * N);
        side_by_side(self.b.slice(s![.., first..first + N]), (lanes, C::PARTS), x);
        let x = T::vectors::<S>(x).0.as_chunks::<N>().0;
        let ahead = Ahead::new(&self.a, R);
        let row = |i: usize| self.a.row(i).to_slice().unwrap_or_default();
        let groups = m / R * R;
        for i in (0..groups).step_by(R) {
            let mut rows = [&[][..]; R];
            for (r, of) in rows.iter_mut().enumerate() {
                *of = row(i + r);
            }
            let y = &mut self.y[i * n..(i + R) * n];
            for (y, sums) in y.chunks_exact_mut(n).zip(dots::<S, T, C, R, N>(s, rows, x, ahead)) {
                y[first..first + N].copy_from_slice(&sums);
            }
        }
        for i in groups..m {
            let [sums] = dots::<S, T, C, 1, N>(s, [row(i)], x, ahead);
            self.y[i * n + first..][..N].copy_from_slice(&sums);
        }
    }
}

/// Rows times vectors that stand side by side.
#[inline(always)]
fn dots<S: Simd, T: Real, C: Cell<T>, const R: usize, const N: usize>(
    s: S,
    rows: [&[C]; R],
    x: &[[T::V<S>; N]],
    ahead: Ahead,
) -> [[T; N]; R] {
    let whole = whole::<S, T, C, R>(rows);
    let (x, last) = x.split_at(whole[0].len() * C::PARTS);
    let mut sums = [[T::splat(s, T::zero()); N]; R];
    // Loops over indices throughout: iterators over arrays leave the sums in memory.
    for (part, ahead) in ahead.parts::<C::V<S>>(whole[0].len()) {
        let (x, whole) = (&x[part.start * C::PARTS..part.end * C::PARTS], parts(&whole, &part));
        for (j, x) in x.chunks_exact(C::PARTS).enumerate() {
            for r in 0..R {
                prefetch(&whole[r][j], ahead);
                for (p, x) in x.iter().enumerate() {
                    let numbers = C::part(s, whole[r][j], p);
                    for v in 0..N {
                        sums[r][v] = T::fma(s, numbers, x[v], sums[r][v]);
                    }
                }
            }
        }
    }
    for r in 0..R {
        let rest = C::load(s, C::vectors::<S>(rows[r]).1);
        for (p, x) in last.iter().enumerate() {
            let numbers = C::part(s, rest, p);
            for v in 0..N {
                sums[r][v] = T::fma(s, numbers, x[v], sums[r][v]);
            }
        }
    }
    let mut totals = [[T::zero(); N]; R];
    for r in 0..R {
        for v in 0..N {
            totals[r][v] = T::vsum(s, sums[r][v]);
        }
    }
    totals
}

/// The whole vectors of rows that are equally long.
#[inline(always)]
fn whole<S: Simd, T: Real, C: Cell<T>, const R: usize>(rows: [&[C]; R]) -> [&[C::V<S>]; R] {
    let (mut whole, count) = ([&[][..]; R], rows[0].len() / T::lanes::<S>());
    for r in 0..R {
        whole[r] = &C::vectors::<S>(rows[r]).0[..count];
    }
    whole
}

/// Where number i of vector v of n lies: of each vector the first parts of as many cells as there are lanes, then the second.
#[inline(always)]
fn place(i: usize, v: usize, n: usize, (lanes, parts): (usize, usize)) -> usize {
    let (cell, part) = (i / parts, i % parts);
    ((cell / lanes * parts + part) * n + v) * lanes + cell % lanes
}

/// Vectors side by side, zeros beyond their end.
#[inline(always)]
fn side_by_side<T: Real>(b: ArrayView2<'_, T>, shape: (usize, usize), to: &mut [T]) {
    let n = b.ncols();
    let mut put = |i: usize, v: usize, number: T| to[place(i, v, n, shape)] = number;
    match b.as_slice() {
        Some(numbers) => {
            for (i, row) in numbers.chunks_exact(n).enumerate() {
                row.iter().enumerate().for_each(|(v, &number)| put(i, v, number));
            }
        }
        None => {
            for (v, column) in b.columns().into_iter().enumerate() {
                column.iter().enumerate().for_each(|(i, &number)| put(i, v, number));
            }
        }
    }
}

impl<T: Real, C: Cell<T>, const TRANSPOSED: bool> Product<'_, T, C, TRANSPOSED> {
    #[inline(always)]
    fn by_columns<S: Simd, const R: usize, const N: usize>(&mut self, s: S, first: usize) {
        let ((m, k), n, lanes) = (self.a.dim(), self.b.ncols(), T::lanes::<S>());
        let mut memory = Aligned::default();
        let memory = memory.numbers(k.next_multiple_of(lanes) * C::PARTS * N);
        let sums = T::vectors_mut::<S>(memory).0.as_chunks_mut::<N>().0;
        let ahead = Ahead::new(&self.a, R);
        let groups = m / R * R;
        for i in (0..groups).step_by(R) {
            self.add::<S, R, N>(s, i, first, ahead, sums);
        }
        for i in groups..m {
            self.add::<S, 1, N>(s, i, first, ahead, sums);
        }
        for (i, y) in self.y.chunks_exact_mut(n).enumerate() {
            for v in 0..N {
                y[first + v] = memory[place(i, v, N, (lanes, C::PARTS))];
            }
        }
    }

    /// Adds multiples of R rows to the sums of N vectors, one after the other.
    #[inline(always)]
    fn add<S: Simd, const R: usize, const N: usize>(
        &self,
        s: S,
        i: usize,
        first: usize,
        ahead: Ahead,
        sums: &mut [[T::V<S>; N]],
    ) {
        let (mut rows, mut factors) = ([&[][..]; R], [[T::splat(s, T::zero()); N]; R]);
        for r in 0..R {
            rows[r] = self.a.row(i + r).to_slice().unwrap_or_default();
            for (v, factor) in factors[r].iter_mut().enumerate() {
                *factor = T::splat(s, self.b[(i + r, first + v)]);
            }
        }
        let whole = whole::<S, T, C, R>(rows);
        let (sums, last) = sums.split_at_mut(whole[0].len() * C::PARTS);
        for (part, ahead) in ahead.parts::<C::V<S>>(whole[0].len()) {
            let (sums, whole) = (&mut sums[part.start * C::PARTS..part.end * C::PARTS], parts(&whole, &part));
            for (j, sums) in sums.chunks_exact_mut(C::PARTS).enumerate() {
                whole.iter().for_each(|row| prefetch(&row[j], ahead));
                for (p, sums) in sums.iter_mut().enumerate() {
                    let mut own = *sums;
                    for r in 0..R {
                        let numbers = C::part(s, whole[r][j], p);
                        for v in 0..N {
                            own[v] = T::fma(s, numbers, factors[r][v], own[v]);
                        }
                    }
                    *sums = own;
                }
            }
        }
        for r in 0..R {
            let rest = C::load(s, C::vectors::<S>(rows[r]).1);
            for (p, last) in last.iter_mut().enumerate() {
                let numbers = C::part(s, rest, p);
                for v in 0..N {
                    last[v] = T::fma(s, numbers, factors[r][v], last[v]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
