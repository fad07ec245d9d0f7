//! A matrix times a few vectors. Such a product is still as fast as the matrix is read, if it is read where it lies: a general
//! product first copies it into panels, which takes longer than what is then multiplied.
//!
//! Each lane of the machine's vectors is a column of the matrix, or, with more vectors, one of those. Each sum has an order of its own, whatever
//! rows it is computed beside and on however many threads, and whatever vectors as long as lanes are columns.

use ndarray::{ArrayView2, ArrayViewMut2, s};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::cell::Cell;
use super::vector::{Ahead, alone, parts, share};
use crate::memory::prefetch_rows;
use crate::scalar::{DType, Real};
use crate::simd::Aligned;

#[cfg(target_arch = "x86_64")]
mod across;

/// Vectors that are multiplied together, at most, where the machine's vectors are of 64 bytes, and where they are shorter.
const WIDE: usize = 8;
const NARROW: usize = 6;
/// Vectors that are multiplied so at all, and where each lane has one.
pub(crate) const MOST: usize = 2 * WIDE;
const WIDEST: usize = 4 * WIDE;

/// Whether several vectors have a lane each. (That was measured by AVX2 only.)
fn across_lanes<T: Real>() -> bool {
    let measured = match Arch::new() {
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => true,
        _ => false,
    };
    measured && T::DTYPE == DType::F32
}

/// Vectors that rows are multiplied with where they lie, at most, those of a matrix of bf16 as well.
pub(crate) fn most_by_rows<T: Real>() -> usize {
    if across_lanes::<T>() { WIDEST } else { MOST }
}

/// The most vectors that are faster so than by a general product on this machine, with rows that lie in order and with columns. (Rows are met
/// in turns if need be: by AVX2 eight vectors take two, and 0.7 of the time of a general product.)
fn most<T: Real>() -> (usize, usize) {
    let (by_rows, by_columns) = match Arch::new() {
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        Arch::V4(_) => (WIDE, 2 * WIDE),
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => (WIDE, 2 * NARROW),
        _ => (NARROW, 2 * NARROW),
    };
    (if across_lanes::<T>() { WIDEST } else { by_rows }, by_columns)
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
    let (most_by_rows, most_by_columns) = most::<T>();
    let by_rows = a.strides()[1] == 1 && n <= most_by_rows && k >= 32 * n && m >= 16 * n;
    let turns = n.div_ceil(most_by_columns / 2);
    let by_columns = a.strides()[0] == 1 && turns <= 2 && m.min(k) >= if turns == 2 { 32 * n } else { 16 };
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
    if y.is_empty() {
        return;
    }
    let run = |a, y| match Arch::new() {
        #[cfg(target_arch = "x86_64")]
        Arch::V3(v3) if !TRANSPOSED && across_lanes::<T>() && across::takes::<T, C>(b.ncols()) => {
            across::product(v3, a, b, y)
        }
        arch => arch.dispatch(Product::<T, C, TRANSPOSED> { a, b, y }),
    };
    if alone(&a) {
        return run(a, y);
    }
    let n = b.ncols();
    let share = share(y.len() / n);
    y.par_chunks_mut(share * n).enumerate().for_each(|(i, y)| {
        let own = i * share..i * share + y.len() / n;
        let cells = own.start / C::PARTS..own.end.div_ceil(C::PARTS);
        let a = if TRANSPOSED { a.slice(s![.., cells]) } else { a.slice(s![own, ..]) };
        run(a, y);
    });
}

/// Expands `call!(count, first)` for each part of n vectors, of so many at most, with its count as a literal.
macro_rules! by_parts {
    ($n:expr, $most:expr, $call:ident) => {
        let (n, parts) = ($n, $n.div_ceil($most));
        for part in 0..parts {
            let (first, end) = (part * n / parts, (part + 1) * n / parts);
            // (What is beyond the most is never called, and not compiled.)
            match end - first {
                1 => $call!(1, first),
                2 => $call!(2, first),
                3 => $call!(3, first),
                4 => $call!(4, first),
                5 if $most >= 5 => $call!(5, first),
                6 if $most >= 6 => $call!(6, first),
                7 if $most >= 7 => $call!(7, first),
                _ if $most >= 8 => $call!(8, first),
                _ => {}
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
        // As many sums as there are registers for, beside what takes cells apart.
        let wide = size_of::<T::V<S>>() >= 64;
        match (TRANSPOSED, wide) {
            (false, true) if C::PARTS > 1 => self.by_rows::<S, 4, 4>(s),
            (false, true) if self.b.ncols() <= 6 => self.by_rows::<S, 4, 6>(s),
            (false, true) => self.by_rows::<S, 3, WIDE>(s),
            (false, false) => self.by_rows::<S, 2, NARROW>(s),
            (true, true) => {
                macro_rules! part {
                    ($n:literal, $first:ident) => {
                        self.by_columns::<S, { if $n > 6 { 3 } else { 4 } }, $n>(s, $first)
                    };
                }
                by_parts!(self.b.ncols(), WIDE, part);
            }
            (true, false) => {
                macro_rules! part {
                    ($n:literal, $first:ident) => {
                        self.by_columns::<S, 2, $n>(s, $first)
                    };
                }
                by_parts!(self.b.ncols(), NARROW, part);
            }
        }
    }
}

impl<T: Real, C: Cell<T>, const TRANSPOSED: bool> Product<'_, T, C, TRANSPOSED> {
    /// R rows at a time, which meet up to TOGETHER vectors, and then others while they are at hand.
    #[inline(always)]
    fn by_rows<S: Simd, const R: usize, const TOGETHER: usize>(&mut self, s: S) {
        let ((m, k), n, lanes) = (self.a.dim(), self.b.ncols(), T::lanes::<S>());
        let (mut x, length) = (Aligned::default(), k.next_multiple_of(lanes) * C::PARTS);
        let x = x.numbers(length * n);
        macro_rules! lay_out {
            ($n:literal, $first:ident) => {
                side_by_side(
                    self.b.slice(s![.., $first..$first + $n]),
                    (lanes, C::PARTS),
                    &mut x[length * $first..length * ($first + $n)],
                )
            };
        }
        by_parts!(n, TOGETHER, lay_out);
        let (ahead, groups) = (Ahead::new(&self.a, R), m / R * R);
        // (Loops: what a closure calls is not compiled for the machine's vectors.)
        for i in (0..groups).step_by(R) {
            self.rows::<S, R, TOGETHER>(s, i, x, ahead);
        }
        for i in groups..m {
            self.rows::<S, 1, TOGETHER>(s, i, x, ahead);
        }
    }

    /// The products of R rows from one on.
    #[inline(always)]
    fn rows<S: Simd, const R: usize, const TOGETHER: usize>(&mut self, s: S, i: usize, x: &[T], ahead: Ahead) {
        let (n, mut rows) = (self.b.ncols(), [&[][..]; R]);
        for (r, of) in rows.iter_mut().enumerate() {
            *of = self.a.row(i + r).to_slice().unwrap_or_default();
        }
        let (y, length) = (&mut self.y[i * n..(i + R) * n], x.len() / n);
        macro_rules! put {
            ($n:literal, $first:ident) => {{
                let x = T::vectors::<S>(&x[length * $first..length * ($first + $n)]).0.as_chunks().0;
                for (y, sums) in y.chunks_exact_mut(n).zip(dots::<S, T, C, R, $n>(s, rows, x, ahead)) {
                    y[$first..$first + $n].copy_from_slice(&sums);
                }
            }};
        }
        by_parts!(n, TOGETHER, put);
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
    let early = ahead.early(C::PARTS * N);
    // Loops over indices throughout: iterators over arrays leave the sums in memory.
    for (part, ahead) in ahead.parts::<C::V<S>>(whole[0].len()) {
        let (x, whole) = (&x[part.start * C::PARTS..part.end * C::PARTS], parts(&whole, &part));
        for (j, x) in x.chunks_exact(C::PARTS).enumerate() {
            for r in 0..R {
                prefetch_rows(&whole[r][j], ahead, early);
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
        let early = ahead.early(C::PARTS * N);
        for (part, ahead) in ahead.parts::<C::V<S>>(whole[0].len()) {
            let (sums, whole) = (&mut sums[part.start * C::PARTS..part.end * C::PARTS], parts(&whole, &part));
            for (j, sums) in sums.chunks_exact_mut(C::PARTS).enumerate() {
                for row in &whole {
                    prefetch_rows(&row[j], ahead, early);
                }
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
