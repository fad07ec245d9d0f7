use ndarray::{Array2, ShapeBuilder};

use super::*;
use crate::operator::{BlockDiagonal, LinearOperator};
use crate::scalar::DType;
use crate::testing::architectures;

const PLACES: [[u8; 2]; 6] = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];

/// Small integers, so that every order of summation is exact, in f32 and in bf16.
fn numbers(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 31 + j * 17 + seed * 5) % 13) as f32 - 6.0)
}

/// A matrix and its packed form.
fn example<L: Kept>(m: usize, n: usize) -> (TwoFour<L>, Array2<f32>) {
    let (all, groups) = (numbers(m, n, 1), n / 4);
    let pair = |i: usize, g: usize| PLACES[(i * 5 + g * 7 + g / 6) % 6];
    let kept = |i: usize, j: usize| j / 4 >= groups || pair(i, j / 4).contains(&((j % 4) as u8));
    let dense = Array2::from_shape_fn((m, n), |at| if kept(at.0, at.1) { all[at] } else { 0.0 });
    let values: Vec<f32> = all.indexed_iter().filter(|((i, j), _)| kept(*i, *j)).map(|(_, v)| *v).collect();
    let places = (0..m).flat_map(|i| (0..groups).map(move |g| pair(i, g)));
    (TwoFour::new((m, n), places, values.into_iter()), dense)
}

fn check<L: Kept>(m: usize, n: usize, batches: &[usize]) {
    let (packed, dense) = example::<L>(m, n);
    for i in 0..m {
        let (mut row, mut last) = (vec![0.0; n], None);
        packed.row(i, |column, value| {
            assert!(last.replace(column) < Some(column), "{m}x{n}: ascending");
            row[column] = value;
        });
        assert_eq!(row, dense.row(i).to_vec(), "{m}x{n}");
    }
    for &b in batches {
        let (x, z) = (numbers(n, b, 2), numbers(m, b, 3));
        let (y, t) = (dense.dot(&x), dense.t().dot(&z));
        for arch in architectures() {
            for layout in 0..3 {
                // Row-major, its transpose (a batch of tokens), every second column of something wider.
                let view = |x: &Array2<f32>| match layout {
                    0 => x.clone(),
                    1 => Array2::from_shape_fn(x.raw_dim().f(), |at| x[at]),
                    _ => {
                        Array2::from_shape_fn((x.nrows(), 2 * b), |(i, j)| if j % 2 == 0 { x[(i, j / 2)] } else { 9.0 })
                    }
                };
                let step = if layout == 2 { 2 } else { 1 };
                let case = format!("{m}x{n}, batch {b}, layout {layout}, {arch:?}");
                let mut got = Array2::from_elem((m, b), 7.0);
                if let Some(to) = got.as_slice_mut() {
                    packed.product_by(arch, view(&x).slice(ndarray::s![.., ..;step]), to);
                }
                assert_eq!(got, y, "{case}");
                let mut got = Array2::from_elem((n, b), 7.0);
                if let Some(to) = got.as_slice_mut() {
                    packed.product_transposed_by(arch, view(&z).slice(ndarray::s![.., ..;step]), to);
                }
                assert_eq!(got, t, "{case}, transposed");
            }
        }
    }
}

#[test]
fn equals_the_dense_product() {
    if cfg!(miri) {
        check::<f32>(9, 11, &[0, 1, 5]);
        check::<f32>(1, 19, &[17]);
        return check::<u16>(1, 66, &[1, 2]);
    }
    for (m, n) in
        [(1, 0), (1, 1), (3, 2), (2, 3), (1, 4), (5, 7), (8, 62), (9, 63), (7, 64), (17, 67), (33, 131), (8, 256)]
    {
        check::<f32>(m, n, &[0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 70]);
        check::<u16>(m, n, &[1, 2, 6, 16, 35]);
    }
    check::<f32>(4, 65, &[128, 200]);
    check::<u16>(4, 66, &[128]);
}

/// Blocks of these extents, as an operator and dense.
fn wrapper(extents: &[(usize, usize)], dtype: DType, seed: usize) -> (BlockDiagonal<f32>, Array2<f32>) {
    let count = extents.iter().map(|(rows, columns)| rows * columns).sum();
    let values = (0..count).map(|i| ((i * 7 + seed) % 5) as f32 - 2.0).collect();
    let blocks = BlockDiagonal::rounded(values, extents.to_vec(), dtype).unwrap();
    let dense = blocks.to_dense();
    (blocks, dense)
}

/// Squares of `size`, and what is left.
fn squares(length: usize, size: usize) -> Vec<(usize, usize)> {
    (0..length).step_by(size).map(|start| size.min(length - start)).map(|size| (size, size)).collect()
}

fn check_wrapped<L: Kept>(left: &[(usize, usize)], right: &[(usize, usize)], dtype: DType, batches: &[usize]) {
    let ((left, a), (right, c)) = (wrapper(left, dtype, 1), wrapper(right, dtype, 2));
    let (packed, dense) = example::<L>(a.ncols(), c.nrows());
    let dense = a.dot(&dense).dot(&c);
    for &b in batches {
        let x = numbers(c.ncols(), b, 2);
        let y = dense.dot(&x);
        for arch in architectures() {
            for x in [x.clone(), Array2::from_shape_fn(x.raw_dim().f(), |at| x[at])] {
                let mut got = Array2::from_elem(y.raw_dim(), f32::NAN);
                let to = got.as_slice_mut().unwrap();
                if packed.wrapped_by(arch, (&left, &right), x.view(), to) {
                    assert_eq!(got, y, "{:?}, batch {b}, {arch:?}", dense.dim());
                } else {
                    assert!(super::vector::few(arch, b) || y.is_empty(), "{:?}, batch {b}, {arch:?}", dense.dim());
                }
            }
        }
    }
}

#[test]
fn blocks_around_it_are_part_of_it() {
    if cfg!(miri) {
        check_wrapped::<f32>(&squares(9, 5), &squares(10, 4), DType::F32, &[5, 18]);
        return check_wrapped::<u16>(&squares(5, 4), &squares(6, 4), DType::BF16, &[17]);
    }
    for (m, n, size) in [(64, 64, 16), (30, 50, 12), (21, 67, 7), (9, 63, 64), (70, 131, 1), (17, 5, 6)] {
        check_wrapped::<f32>(&squares(m, size), &squares(n, size), DType::F32, &[1, 5, 9, 16, 70, 130]);
        check_wrapped::<u16>(&squares(m, size), &squares(n, size), DType::BF16, &[2, 5, 16, 35]);
    }
    // Rectangles, some of no size; rows that no multiple of 8 cuts; several stretches, and several threads.
    let (left, right) = ([(3, 5), (2, 0), (0, 4), (7, 12)], [(6, 4), (3, 0), (0, 2), (10, 11)]);
    check_wrapped::<f32>(&left, &right, DType::F32, &[3, 16, 33]);
    check_wrapped::<f32>(&squares(1100, 20), &squares(539, 22), DType::F32, &[5, 10, 17, 70]);
    check_wrapped::<u16>(&[], &squares(8, 4), DType::F32, &[16]);
}

#[test]
#[cfg_attr(miri, ignore = "large")]
fn blocks_of_rows_and_threads_change_nothing() {
    // More rows than a block; enough for several threads.
    check::<f32>(1030, 130, &[1, 7, 17]);
    check::<f32>(4099, 20, &[1, 2]);
    check::<u16>(4099, 513, &[1]);
}

#[test]
fn only_what_is_stored_meets_what_is_not_finite() {
    let (packed, dense) = example::<f32>(2, 5);
    let mut x = numbers(5, 1, 2);
    let skipped = (0..4).find(|&j| dense[(0, j)] == 0.0).unwrap_or(0);
    x[(skipped, 0)] = f32::INFINITY;
    for arch in architectures() {
        let mut y = [0.0; 2];
        packed.product_by(arch, x.view(), &mut y);
        assert!(y[0].is_finite(), "{arch:?}");
    }
}
