//! A matrix times one vector. Such a product is as fast as the matrix can be read, and made to be: rows in their
//! order in memory, several at a time for each reading of x, what comes next asked for early.
//!
//! Each sum has an order of its own, whatever rows it is computed beside and on however many threads.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, s};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::memory::{early, prefetch_rows};
use crate::scalar::Real;
use crate::threads::{self, Pace};

/// Rows that share the loads of x, or of sums.
const ROWS: usize = 4;
/// Vectors of a row at a time, and sums of each.
const UNROLL: usize = 4;
/// Bytes between what is multiplied and what is asked for.
const AHEAD: usize = 2048;
/// Products of a number that is read, at most, if they wait for memory.
const FEW: usize = 4;

/// C ← α·A·b + β·C for b of one column, if A's rows or its columns lie in order in memory; else nothing, and false.
pub(super) fn multiply_vector<T: Real>(
    alpha: T,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    beta: T,
    c: &mut ArrayViewMut2<'_, T>,
) -> bool {
    let (m, k) = a.dim();
    let (by_rows, by_columns) = (a.strides()[1] == 1 || k == 1, a.strides()[0] == 1 || m == 1);
    if b.ncols() != 1 || !(by_rows || by_columns) {
        return false;
    }
    let column = b.column(0);
    let mut copy = Vec::new();
    let x = column.to_slice().unwrap_or_else(|| {
        copy.extend(column.iter().copied());
        &copy
    });
    let run = |y: &mut [T]| if by_rows { rows_times(a, x, y) } else { columns_times(a.t(), x, y) };
    let mut c = c.column_mut(0);
    match c.as_slice_mut() {
        Some(y) if alpha == T::one() && beta == T::zero() => run(y),
        _ => {
            let mut y = vec![T::zero(); m];
            run(&mut y);
            match beta == T::zero() {
                true => c.iter_mut().zip(y).for_each(|(c, y)| *c = alpha * y),
                false => c.iter_mut().zip(y).for_each(|(c, y)| *c = alpha * y + beta * *c),
            }
        }
    }
    true
}

/// y[places[i]] = (A·x)[i], for A of as many rows as there are places, its rows in order in memory.
///
/// # Panics
/// If a place is beyond y.
pub(crate) fn rows_times_to<T: Real>(a: ArrayView2<'_, T>, x: &[T], y: &mut [T], places: &[usize]) {
    if alone(&a) {
        let mut places = places.iter();
        Arch::new().dispatch(Rows {
            a,
            x,
            each: |sums: &[T]| sums.iter().zip(&mut places).for_each(|(v, &i)| y[i] = *v),
        });
    } else {
        let mut product = vec![T::zero(); a.nrows()];
        rows_times(a, x, &mut product);
        product.iter().zip(places).for_each(|(v, &i)| y[i] = *v);
    }
}

/// Whether a product stays on this thread.
pub(super) fn alone<T>(a: &ArrayView2<'_, T>) -> bool {
    threads::alone(Pace::FLOATS.time(a.len(), 1))
}

/// Parts of a product with so many sums: some for each thread, none without a vector or two.
pub(super) fn share(sums: usize) -> usize {
    threads::share(sums).next_multiple_of(64)
}

/// y = A·x for A whose rows lie in order in memory.
fn rows_times<T: Real>(a: ArrayView2<'_, T>, x: &[T], y: &mut [T]) {
    let run = |a: ArrayView2<'_, T>, y: &mut [T]| {
        let mut rest = y;
        let each = |sums: &[T]| crate::simd::take(&mut rest, sums.len()).copy_from_slice(sums);
        Arch::new().dispatch(Rows { a, x, each });
    };
    if alone(&a) {
        return run(a, y);
    }
    let share = share(a.nrows());
    y.par_chunks_mut(share).enumerate().for_each(|(i, y)| run(a.slice(s![i * share..i * share + y.len(), ..]), y));
}

/// y = Aᵀ·x for A whose rows lie in order in memory.
fn columns_times<T: Real>(a: ArrayView2<'_, T>, x: &[T], y: &mut [T]) {
    if alone(&a) {
        return Arch::new().dispatch(Columns { a, x, y });
    }
    let share = share(a.ncols());
    y.par_chunks_mut(share).enumerate().for_each(|(i, y)| {
        let a = a.slice(s![.., i * share..i * share + y.len()]);
        Arch::new().dispatch(Columns { a, x, y });
    });
}

/// How far to ask ahead: some bytes in most of a row, and at its end for what follows in the rows that come next.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    row: usize,
    next: usize,
    early: usize,
}

impl Ahead {
    /// For so many rows of A at a time.
    pub(super) fn new<T>(a: &ArrayView2<'_, T>, rows: usize) -> Self {
        let (row, next) = (a.ncols() * size_of::<T>(), rows * a.strides()[0].unsigned_abs() * size_of::<T>());
        Ahead { row, next, early: early(next) }
    }

    /// How far ahead to ask early for the rows that come next, where each number is multiplied so often for each that is read; 0 if not. (More
    /// products take longer than memory, and what asks as well: bf16 with eight vectors 1.08 of the time.)
    #[inline(always)]
    pub(super) fn early(self, products: usize) -> usize {
        if products <= FEW { self.early } else { 0 }
    }

    /// Both parts of a row of `count` pieces of type V, and how far ahead in each.
    #[inline(always)]
    pub(super) fn parts<V>(self, count: usize) -> [(Range<usize>, usize); 2] {
        let most = self.row.saturating_sub(AHEAD) / size_of::<V>();
        [(0..most, AHEAD), (most..count, (AHEAD.min(self.row) + self.next).saturating_sub(self.row))]
    }
}

/// Parts of rows.
#[inline(always)]
pub(super) fn parts<'a, V, const R: usize>(rows: &[&'a [V]; R], part: &Range<usize>) -> [&'a [V]; R] {
    let mut parts = [&[][..]; R];
    for r in 0..R {
        parts[r] = &rows[r][part.start..part.end];
    }
    parts
}

/// Asks for what lies `ahead` bytes later, where vectors fill cache lines.
#[inline(always)]
fn ask<V>(vectors: &[V; UNROLL], ahead: usize, early: usize) {
    if size_of::<V>() >= 32 {
        prefetch_rows(vectors, ahead, early);
    }
}

/// Calls `each` with the sums of rows times x, in order.
struct Rows<'a, T, E> {
    a: ArrayView2<'a, T>,
    x: &'a [T],
    each: E,
}

impl<T: Real, E: FnMut(&[T])> WithSimd for Rows<'_, T, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Rows { a, x, mut each } = self;
        let (m, ahead) = (a.nrows(), Ahead::new(&a, ROWS));
        let row = |i: usize| a.row(i).to_slice().unwrap_or_default();
        let groups = m / ROWS * ROWS;
        for i in (0..groups).step_by(ROWS) {
            let sums: [T; ROWS] = dots(s, std::array::from_fn(|r| row(i + r)), x, ahead);
            each(&sums);
        }
        (groups..m).for_each(|i| each(&dots(s, [row(i)], x, ahead)));
    }
}

/// Several rows times x, each the same whatever it stands beside.
#[inline(always)]
fn dots<S: Simd, T: Real, const R: usize>(s: S, rows: [&[T]; R], x: &[T], ahead: Ahead) -> [T; R] {
    let zero = T::splat(s, T::zero());
    let (x, x_rest) = T::vectors::<S>(x);
    let (groups, last) = x.as_chunks::<UNROLL>();
    // Loops over indices throughout: iterators over arrays leave the sums in memory.
    let (mut whole, mut others) = ([(); R].map(|()| &[][..]), [(); R].map(|()| (&[][..], &[][..])));
    for r in 0..R {
        let (row, rest) = T::vectors::<S>(rows[r]);
        let (chunks, after) = row.as_chunks::<UNROLL>();
        (whole[r], others[r]) = (&chunks[..groups.len()], (&after[..last.len()], rest));
    }
    let mut sums = [[zero; UNROLL]; R];
    let early = ahead.early(1);
    for (part, ahead) in ahead.parts::<[T::V<S>; UNROLL]>(groups.len()) {
        let (groups, whole) = (&groups[part.clone()], parts(&whole, &part));
        for k in 0..groups.len() {
            let x = groups[k];
            for r in 0..R {
                let row = &whole[r][k];
                ask(row, ahead, early);
                for u in 0..UNROLL {
                    sums[r][u] = T::fma(s, row[u], x[u], sums[r][u]);
                }
            }
        }
    }
    let mut all = [T::zero(); R];
    for r in 0..R {
        let (row, rest) = others[r];
        for u in 0..last.len() {
            sums[r][u] = T::fma(s, row[u], last[u], sums[r][u]);
        }
        if !x_rest.is_empty() {
            sums[r][UNROLL - 1] = T::fma(s, T::load(s, rest), T::load(s, x_rest), sums[r][UNROLL - 1]);
        }
        let mut total = sums[r][0];
        for sum in &sums[r][1..] {
            total = T::vadd(s, total, *sum);
        }
        all[r] = T::vsum(s, total);
    }
    all
}

/// y = Aᵀ·x, the sums in y itself, which stays in the first cache.
struct Columns<'a, T> {
    a: ArrayView2<'a, T>,
    x: &'a [T],
    y: &'a mut [T],
}

impl<T: Real> WithSimd for Columns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Columns { a, x, y } = self;
        y.fill(T::zero());
        let ahead = Ahead::new(&a, ROWS);
        let row = |i: usize| a.row(i).to_slice().unwrap_or_default();
        let groups = x.len() / ROWS * ROWS;
        for i in (0..groups).step_by(ROWS) {
            add(s, std::array::from_fn::<_, ROWS, _>(|r| (x[i + r], row(i + r))), y, ahead);
        }
        (groups..x.len()).for_each(|i| add(s, [(x[i], row(i))], y, ahead));
    }
}

/// Adds multiples of rows to y, one after the other.
#[inline(always)]
fn add<S: Simd, T: Real, const R: usize>(s: S, rows: [(T, &[T]); R], y: &mut [T], ahead: Ahead) {
    let factors = rows.map(|(factor, _)| T::splat(s, factor));
    let (y, y_rest) = T::vectors_mut::<S>(y);
    let (groups, last) = y.as_chunks_mut::<UNROLL>();
    let (mut whole, mut others) = ([(); R].map(|()| &[][..]), [(); R].map(|()| (&[][..], &[][..])));
    for r in 0..R {
        let (row, rest) = T::vectors::<S>(rows[r].1);
        let (chunks, after) = row.as_chunks::<UNROLL>();
        (whole[r], others[r]) = (&chunks[..groups.len()], (&after[..last.len()], rest));
    }
    let early = ahead.early(1);
    for (part, ahead) in ahead.parts::<[T::V<S>; UNROLL]>(groups.len()) {
        let (groups, whole) = (&mut groups[part.clone()], parts(&whole, &part));
        for k in 0..groups.len() {
            let mut sums = groups[k];
            for r in 0..R {
                let row = &whole[r][k];
                ask(row, ahead, early);
                for u in 0..UNROLL {
                    sums[u] = T::fma(s, row[u], factors[r], sums[u]);
                }
            }
            groups[k] = sums;
        }
    }
    for r in 0..R {
        let (row, rest) = others[r];
        for u in 0..last.len() {
            last[u] = T::fma(s, row[u], factors[r], last[u]);
        }
        if !y_rest.is_empty() {
            let sums = T::fma(s, T::load(s, rest), factors[r], T::load(s, y_rest));
            T::store(s, y_rest, sums);
        }
    }
}

/// Small integers.
#[cfg(test)]
pub(super) fn numbers<T: Real>(rows: usize, columns: usize, seed: usize) -> ndarray::Array2<T> {
    ndarray::Array2::from_shape_fn((rows, columns), |(i, j)| {
        T::from_f64((((i * 31 + j * 17 + seed) % 13) as f64) - 6.0)
    })
}

/// Does it on a worker thread, alone, or on this one, with the others.
#[cfg(test)]
pub(super) fn on(threads: usize, work: &mut (impl FnMut() + Send)) {
    match threads {
        1 => rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::testing::{architectures, sizes};

    /// The sums are small integers: exact in any order.
    fn equals_the_naive_product<T: Real>() {
        for &m in sizes(&[0, 1, 2, 3, 4, 5, 7, 8, 33], &[0, 1, 5]) {
            for &k in sizes(&[0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 130], &[0, 1, 9]) {
                let (a, x) = (numbers::<T>(m, k + 3, 1), numbers::<T>(1, k, 2).into_raw_vec_and_offset().0);
                let z = numbers::<T>(1, m, 3).into_raw_vec_and_offset().0;
                // Rows that lie apart.
                let a = a.slice(s![.., 1..k + 1]);
                let dot = |i: usize| (0..k).map(|j| a[(i, j)] * x[j]).fold(T::zero(), |a, b| a + b);
                let down = |j: usize| (0..m).map(|i| a[(i, j)] * z[i]).fold(T::zero(), |a, b| a + b);
                for arch in architectures() {
                    let mut y = Vec::new();
                    arch.dispatch(Rows { a, x: &x, each: |sums: &[T]| y.extend_from_slice(sums) });
                    assert_eq!(y, (0..m).map(dot).collect::<Vec<_>>(), "{m}x{k} {arch:?}");
                    let mut y = vec![T::one(); k];
                    arch.dispatch(Columns { a, x: &z, y: &mut y });
                    assert_eq!(y, (0..k).map(down).collect::<Vec<_>>(), "{m}x{k} {arch:?}");
                }
                let (mut y, places) = (vec![T::one(); 2 * m], (0..m).map(|i| 2 * i).collect::<Vec<_>>());
                rows_times_to(a, &x, &mut y, &places);
                assert!((0..m).all(|i| y[2 * i] == dot(i) && y[2 * i + 1] == T::one()));
                if a.is_empty() {
                    // Views of nothing have no strides.
                    continue;
                }
                // All layouts, and what is there already.
                let (column, start) = (Array2::from_shape_fn((k, 2), |(j, _)| x[j]), numbers::<T>(m, 2, 4));
                let columns = a.t().as_standard_layout().into_owned();
                for (a, apart) in [(a, false), (columns.t(), false), (a, true)] {
                    for (alpha, beta) in
                        [(1.0, 0.0), (2.0, 0.0), (2.0, -1.0)].map(|(a, b)| (T::from_f64(a), T::from_f64(b)))
                    {
                        let mut c = if apart { start.clone() } else { start.slice(s![.., ..1]).to_owned() };
                        let b = column.slice(s![.., ..1]);
                        assert!(multiply_vector(alpha, a, b, beta, &mut c.slice_mut(s![.., ..1])));
                        assert!((0..m).all(|i| c[(i, 0)] == alpha * dot(i) + beta * start[(i, 0)]));
                    }
                }
            }
        }
        let skewed = numbers::<T>(6, 6, 1);
        let (skewed, mut c) = (skewed.slice(s![..;2, ..;2]), numbers::<T>(3, 1, 1));
        assert!(!multiply_vector(T::one(), skewed, numbers(3, 1, 1).view(), T::zero(), &mut c.view_mut()));
    }

    #[test]
    fn one_vector_equals_the_naive_product() {
        equals_the_naive_product::<f32>();
        equals_the_naive_product::<f64>();
    }

    #[test]
    fn threads_change_no_bit() {
        // Enough for several threads, and not exact.
        let a = Array2::from_shape_fn((1030, 1050), |(i, j)| ((i * 7919 + j * 104_729) % 1000) as f32 / 997.0 - 0.5);
        let x: Vec<f32> = (0..1050).map(|i| ((i * 31) % 17) as f32 / 7.0).collect();
        let run = |threads: usize| {
            let (mut rows, mut columns) = (vec![0.0; 1030], vec![0.0; 1050]);
            let (mut spread, places) = (vec![0.0; 1030], (0..1030).rev().collect::<Vec<_>>());
            let mut work = || {
                rows_times(a.view(), &x, &mut rows);
                columns_times(a.view(), &x[..1030], &mut columns);
                rows_times_to(a.view(), &x, &mut spread, &places);
            };
            on(threads, &mut work);
            spread.reverse();
            (rows, columns, spread)
        };
        let (rows, columns, spread) = run(1);
        assert_eq!(rows, spread);
        assert_eq!((rows, columns, spread), run(2));
    }
}
