//! A matrix times a few vectors. Such a product is still as fast as the matrix is read, if it is read where it lies: a general
//! product first copies it into panels, which takes longer than what is then multiplied.
//!
//! Each lane of the machine's vectors is a column of the matrix. Each sum has an order of its own, whatever rows and vectors it
//! is computed beside and on however many threads.

use ndarray::{ArrayView2, ArrayViewMut2, s};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::vector::{Ahead, alone, parts, share};
use crate::scalar::Real;
use crate::simd::{Aligned, prefetch};

/// Vectors that are multiplied together, at most, where the machine's vectors are of 64 bytes, and where they are shorter.
const WIDE: usize = 8;
const NARROW: usize = 6;
/// Vectors that are multiplied so at all: rows meet all of them at once, columns in two turns.
pub(super) const MOST: usize = 2 * WIDE;

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
    let run = |y: &mut [T]| if by_rows { times::<T, false>(a, b, y) } else { times::<T, true>(a.t(), b, y) };
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

/// y = A·B, or Aᵀ·B, row by row, for A whose rows lie in order in memory.
fn times<T: Real, const TRANSPOSED: bool>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, y: &mut [T]) {
    if alone(&a) {
        return Arch::new().dispatch(Product::<T, TRANSPOSED> { a, b, y });
    }
    let n = b.ncols();
    let share = share(y.len() / n);
    y.par_chunks_mut(share * n).enumerate().for_each(|(i, y)| {
        let own = i * share..i * share + y.len() / n;
        let a = if TRANSPOSED { a.slice(s![.., own]) } else { a.slice(s![own, ..]) };
        Arch::new().dispatch(Product::<T, TRANSPOSED> { a, b, y });
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
struct Product<'a, T, const TRANSPOSED: bool> {
    a: ArrayView2<'a, T>,
    b: ArrayView2<'a, T>,
    y: &'a mut [T],
}

impl<T: Real, const TRANSPOSED: bool> WithSimd for Product<'_, T, TRANSPOSED> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, s: S) {
        by_parts!(self, s, self.b.ncols());
    }
}

impl<T: Real, const TRANSPOSED: bool> Product<'_, T, TRANSPOSED> {
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
        let x = x.numbers(k.next_multiple_of(lanes) * N);
        side_by_side(self.b.slice(s![.., first..first + N]), lanes, x);
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
            for (y, sums) in y.chunks_exact_mut(n).zip(dots::<S, T, R, N>(s, rows, x, ahead)) {
                y[first..first + N].copy_from_slice(&sums);
            }
        }
        for i in groups..m {
            let [sums] = dots::<S, T, 1, N>(s, [row(i)], x, ahead);
            self.y[i * n + first..][..N].copy_from_slice(&sums);
        }
    }
}

/// Rows times vectors that stand side by side.
#[inline(always)]
fn dots<S: Simd, T: Real, const R: usize, const N: usize>(
    s: S,
    rows: [&[T]; R],
    x: &[[T::V<S>; N]],
    ahead: Ahead,
) -> [[T; N]; R] {
    let whole = whole::<S, T, R>(rows);
    let (x, last) = x.split_at(whole[0].len());
    let mut sums = [[T::splat(s, T::zero()); N]; R];
    // Loops over indices throughout: iterators over arrays leave the sums in memory.
    for (part, ahead) in ahead.parts::<T::V<S>>(x.len()) {
        let (x, whole) = (&x[part.clone()], parts(&whole, &part));
        for j in 0..x.len() {
            for r in 0..R {
                prefetch(&whole[r][j], ahead);
                for v in 0..N {
                    sums[r][v] = T::fma(s, whole[r][j], x[j][v], sums[r][v]);
                }
            }
        }
    }
    if let Some(last) = last.first() {
        for r in 0..R {
            let rest = T::load(s, T::vectors::<S>(rows[r]).1);
            for v in 0..N {
                sums[r][v] = T::fma(s, rest, last[v], sums[r][v]);
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
fn whole<S: Simd, T: Real, const R: usize>(rows: [&[T]; R]) -> [&[T::V<S>]; R] {
    let (mut whole, count) = ([&[][..]; R], rows[0].len() / T::lanes::<S>());
    for r in 0..R {
        whole[r] = &T::vectors::<S>(rows[r]).0[..count];
    }
    whole
}

/// Vectors side by side: of each the numbers of as many lanes, zeros beyond their end.
fn side_by_side<T: Real>(b: ArrayView2<'_, T>, lanes: usize, to: &mut [T]) {
    let n = b.ncols();
    let mut put = |i: usize, v: usize, number: T| to[(i / lanes * n + v) * lanes + i % lanes] = number;
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

impl<T: Real, const TRANSPOSED: bool> Product<'_, T, TRANSPOSED> {
    #[inline(always)]
    fn by_columns<S: Simd, const R: usize, const N: usize>(&mut self, s: S, first: usize) {
        let ((m, k), n, lanes) = (self.a.dim(), self.b.ncols(), T::lanes::<S>());
        let mut memory = Aligned::default();
        let memory = memory.numbers(k.next_multiple_of(lanes) * N);
        let sums = T::vectors_mut::<S>(memory).0.as_chunks_mut::<N>().0;
        let ahead = Ahead::new(&self.a, R);
        let groups = m / R * R;
        for i in (0..groups).step_by(R) {
            self.add::<S, R, N>(s, i, first, ahead, sums);
        }
        for i in groups..m {
            self.add::<S, 1, N>(s, i, first, ahead, sums);
        }
        for (y, sums) in self.y.chunks_mut(lanes * n).zip(memory.chunks_exact(N * lanes)) {
            for (l, y) in y.chunks_exact_mut(n).enumerate() {
                for v in 0..N {
                    y[first + v] = sums[v * lanes + l];
                }
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
        let whole = whole::<S, T, R>(rows);
        let (sums, last) = sums.split_at_mut(whole[0].len());
        for (part, ahead) in ahead.parts::<T::V<S>>(sums.len()) {
            let (sums, whole) = (&mut sums[part.clone()], parts(&whole, &part));
            for j in 0..sums.len() {
                let mut own = sums[j];
                for r in 0..R {
                    prefetch(&whole[r][j], ahead);
                    for v in 0..N {
                        own[v] = T::fma(s, whole[r][j], factors[r][v], own[v]);
                    }
                }
                sums[j] = own;
            }
        }
        if let Some(last) = last.first_mut() {
            for r in 0..R {
                let rest = T::load(s, T::vectors::<S>(rows[r]).1);
                for v in 0..N {
                    last[v] = T::fma(s, rest, factors[r][v], last[v]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::linalg::vector::{levels, numbers, on};

    fn naive<T: Real>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
        Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
            a.row(i).iter().zip(b.column(j)).fold(T::zero(), |sum, (&a, &b)| sum + a * b)
        })
    }

    /// The sums are small integers: exact in any order.
    fn equals_the_naive_product<T: Real>() {
        for (m, k) in [(0, 5), (5, 0), (1, 1), (2, 7), (3, 16), (4, 33), (7, 64), (13, 100), (9, 1100)] {
            // Rows that lie apart.
            let a = numbers::<T>(m, k + 3, 1);
            let a = a.slice(s![.., 1..k + 1]);
            for n in 1..=MOST + 3 {
                let (b, c) = (numbers::<T>(k, n, 2), numbers::<T>(n, m, 3));
                for arch in levels() {
                    // In either order of memory.
                    for b in [b.view(), b.t().as_standard_layout().t()] {
                        let mut y = Array2::from_elem((m, n), T::one());
                        arch.dispatch(Product::<T, false> { a, b, y: y.as_slice_mut().unwrap() });
                        assert_eq!(y, naive(a, b), "{m}x{k}, {n} vectors, {arch:?}");
                    }
                    let mut y = Array2::from_elem((k, n), T::one());
                    arch.dispatch(Product::<T, true> { a, b: c.t(), y: y.as_slice_mut().unwrap() });
                    assert_eq!(y, naive(a.t(), c.t()), "{m}x{k} transposed, {n} vectors, {arch:?}");
                }
            }
        }
    }

    #[test]
    fn a_few_vectors_equal_the_naive_product() {
        equals_the_naive_product::<f32>();
        equals_the_naive_product::<f64>();
    }

    #[test]
    fn takes_what_it_is_for_and_leaves_what_is_there_already() {
        let (w, x) = (numbers::<f64>(290, 300, 1), numbers::<f64>(300, 9, 2));
        for (n, by_rows, by_columns) in
            [(1, false, false), (2, true, true), (6, true, true), (8, together() == WIDE, true), (9, false, true)]
        {
            let (x, z) = (x.slice(s![.., ..n]), x.slice(s![..290, ..n]));
            for (a, b, taken) in [(w.view(), x, by_rows), (w.t(), z, by_columns)] {
                for (alpha, beta) in [(1.0, 0.0), (2.0, 0.0), (2.0, -1.0)] {
                    let start = numbers::<f64>(a.nrows(), n, 3);
                    for mut c in [start.clone(), start.t().as_standard_layout().into_owned().reversed_axes()] {
                        assert_eq!(multiply_few(alpha, a, b, beta, &mut c.view_mut()), taken, "{n}");
                        let expected = if taken { alpha * naive(a, b) + beta * &start } else { start.clone() };
                        assert_eq!(c, expected);
                    }
                }
            }
        }
        // Neither rows nor columns lie in order; so small that nothing is gained.
        let (apart, mut c) = (w.slice(s![..;2, ..;2]), numbers::<f64>(145, 2, 1));
        assert!(!multiply_few(1.0, apart, x.slice(s![..150, ..2]), 0.0, &mut c.view_mut()));
        let (small, mut c) = (w.slice(s![..8, ..8]), numbers::<f64>(8, 2, 1));
        assert!(!multiply_few(1.0, small, x.slice(s![..8, ..2]), 0.0, &mut c.view_mut()));
    }

    #[test]
    fn neither_threads_nor_neighbours_change_a_bit() {
        // Enough for several threads, and not exact.
        let a = Array2::from_shape_fn((1030, 1050), |(i, j)| ((i * 7919 + j * 104_729) % 1000) as f32 / 997.0 - 0.5);
        let b = Array2::from_shape_fn((1050, 8), |(i, j)| ((i * 31 + j * 7) % 17) as f32 / 7.0);
        let run = |threads: usize, n: usize| {
            let (mut down, mut across) = (vec![0.0; 1030 * n], vec![0.0; 1050 * n]);
            let mut work = || {
                times::<f32, false>(a.view(), b.slice(s![.., ..n]), &mut down);
                times::<f32, true>(a.view(), b.slice(s![..1030, ..n]), &mut across);
            };
            on(threads, &mut work);
            (down, across)
        };
        let (down, across) = run(1, 8);
        assert_eq!((&down, &across), (&run(2, 8).0, &run(2, 8).1));
        let first = |of: &[f32]| of.chunks_exact(8).flat_map(|row| row[..3].to_vec()).collect::<Vec<_>>();
        assert_eq!((first(&down), first(&across)), run(1, 3));
    }
}
