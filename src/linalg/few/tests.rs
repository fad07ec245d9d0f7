use ndarray::Array2;

use super::*;
use crate::linalg::vector::{numbers, on};
use crate::testing::architectures;

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
            for arch in architectures() {
                // In either order of memory.
                for b in [b.view(), b.t().as_standard_layout().t()] {
                    let mut y = Array2::from_elem((m, n), T::one());
                    arch.dispatch(Product::<T, T, false> { a, b, y: y.as_slice_mut().unwrap() });
                    assert_eq!(y, naive(a, b), "{m}x{k}, {n} vectors, {arch:?}");
                }
                let mut y = Array2::from_elem((k, n), T::one());
                arch.dispatch(Product::<T, T, true> { a, b: c.t(), y: y.as_slice_mut().unwrap() });
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

/// Two bf16 in each word: rows that fill words and that do not, as they lie in memory.
#[test]
fn halves_equal_the_naive_product_of_what_they_stand_for() {
    for (m, k) in [(0, 5), (5, 0), (1, 1), (2, 7), (3, 32), (4, 65), (7, 128), (13, 201), (9, 1101)] {
        let wide = numbers::<f32>(m, k, 1);
        let half = |i: usize, j: usize| wide.get((i, j)).map_or(0, |v| v.to_bits() >> 16);
        let words = Array2::from_shape_fn((m, k.div_ceil(2)), |(i, j)| half(i, 2 * j) | half(i, 2 * j + 1) << 16);
        for n in 1..=MOST + 3 {
            let (b, c) = (numbers::<f32>(k, n, 2), numbers::<f32>(m, n, 3));
            for arch in architectures() {
                let mut y = Array2::from_elem((m, n), 1.0);
                let to = y.as_slice_mut().unwrap();
                arch.dispatch(Product::<f32, u32, false> { a: words.view(), b: b.view(), y: to });
                assert_eq!(y, naive(wide.view(), b.view()), "{m}x{k}, {n} vectors, {arch:?}");
                let mut y = Array2::from_elem((k, n), 1.0);
                let to = y.as_slice_mut().unwrap();
                arch.dispatch(Product::<f32, u32, true> { a: words.view(), b: c.view(), y: to });
                assert_eq!(y, naive(wide.t(), c.view()), "{m}x{k} transposed, {n} vectors, {arch:?}");
            }
        }
    }
}

/// Lanes that are vectors: one register of them, two, three and four, full and not; columns that are met by turns, and rows that are left over.
#[test]
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn vectors_across_lanes_equal_the_naive_product() {
    let Some(v3) = pulp::x86::V3::try_new() else { return };
    for (m, k) in [(0, 5), (5, 0), (1, 1), (6, 16), (7, 65), (13, 1101), (8, 4301)] {
        let wide = numbers::<f32>(m, k + 3, 1);
        let wide = wide.slice(s![.., 1..k + 1]);
        let half = |i: usize, j: usize| wide.get((i, j)).map_or(0, |v| v.to_bits() >> 16);
        let words = Array2::from_shape_fn((m, k.div_ceil(2)), |(i, j)| half(i, 2 * j) | half(i, 2 * j + 1) << 16);
        for n in [1, 7, 8, 9, 16, 17, 24, 25, 31, 32, 33] {
            let b = numbers::<f32>(k, n, 2);
            let expected = naive(wide, b.view());
            for b in [b.view(), b.t().as_standard_layout().t()] {
                let mut y = Array2::from_elem((m, n), f32::NAN);
                across::product(v3, wide, b, y.as_slice_mut().unwrap());
                assert_eq!(y, expected, "{m}x{k}, {n} vectors");
                y.fill(f32::NAN);
                across::product(v3, words.view(), b, y.as_slice_mut().unwrap());
                assert_eq!(y, expected, "{m}x{k} of halves, {n} vectors");
            }
            // A vector of no numbers leaves the others as they are.
            let (mut b, mut y) = (b, Array2::from_elem((m, n), f32::NAN));
            b.column_mut(n / 5).fill(f32::NAN);
            across::product(v3, words.view(), b.view(), y.as_slice_mut().unwrap());
            for (v, (y, expected)) in y.columns().into_iter().zip(expected.columns()).enumerate() {
                assert!(if v == n / 5 { k == 0 || y.iter().all(|y| y.is_nan()) } else { y == expected });
            }
        }
    }
}

#[test]
fn takes_what_it_is_for_and_leaves_what_is_there_already() {
    let (w, x) = (numbers::<f64>(290, 300, 1), numbers::<f64>(300, 9, 2));
    let eight = cfg!(target_arch = "x86_64") && !matches!(Arch::new(), Arch::Scalar);
    for (n, by_rows, by_columns) in
        [(1, false, false), (2, true, true), (6, true, true), (8, eight, true), (9, false, true)]
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
            times::<f32, f32, false>(a.view(), b.slice(s![.., ..n]), &mut down);
            times::<f32, f32, true>(a.view(), b.slice(s![..1030, ..n]), &mut across);
        };
        on(threads, &mut work);
        (down, across)
    };
    let (down, across) = run(1, 8);
    assert_eq!((&down, &across), (&run(2, 8).0, &run(2, 8).1));
    let first = |of: &[f32]| of.chunks_exact(8).flat_map(|row| row[..3].to_vec()).collect::<Vec<_>>();
    assert_eq!((first(&down), first(&across)), run(1, 3));
}

#[test]
fn vectors_have_lanes_where_that_was_measured_and_threads_change_no_bit() {
    let (w, x) = (numbers::<f32>(530, 1060, 1), numbers::<f32>(1060, 33, 2));
    for n in [9, 16, 32, 33] {
        let (x, mut c) = (x.slice(s![.., ..n]), Array2::from_elem((530, n), f32::NAN));
        let taken = multiply_few(1.0, w.view(), x, 0.0, &mut c.view_mut());
        assert_eq!(taken, n <= 32 && across_lanes::<f32>(), "{n} vectors");
        assert!(!taken || c == naive(w.view(), x), "{n} vectors");
    }
    // Enough for several threads, columns by turns, and not exact.
    let a = Array2::from_shape_fn((400, 4500), |(i, j)| ((i * 7919 + j * 104_729) % 1000) as f32 / 997.0 - 0.5);
    let b = Array2::from_shape_fn((4500, 20), |(i, j)| ((i * 31 + j * 7) % 17) as f32 / 7.0);
    let run = |threads: usize| {
        let mut y = vec![f32::NAN; 400 * 20];
        on(threads, &mut || times::<f32, f32, false>(a.view(), b.view(), &mut y));
        y
    };
    assert_eq!(run(1), run(2));
}
