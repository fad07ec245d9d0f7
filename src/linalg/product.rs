//! The matrix product on ndarray views of any strides, by the `gemm` crate; that with one vector or a few by kernels of their own.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};

use super::few::{most_by_rows, multiply_few};
use super::vector::multiply_vector;
use crate::scalar::Real;
use crate::threads::{self, Pace};

/// Multiply-adds from which on it counts how operands lie in memory.
const LARGE: usize = 1 << 20;

/// C ← α·A·B + β·C. Uses the global pool for large products, unless the calling thread is a rayon
/// worker already: then the caller is parallel and nesting would only add waiting.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn matmul_into<T: Real>(
    alpha: T,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    beta: T,
    mut c: ArrayViewMut2<'_, T>,
) {
    let ((m, k), n) = (a.dim(), b.ncols());
    assert_eq!((b.nrows(), c.dim()), (k, (m, n)), "product of {m}x{k} and {}x{n} into {:?}", b.nrows(), c.dim());
    if m == 0 || n == 0 {
        return;
    }
    // A few rows times a matrix are the transposed matrix times a few vectors.
    if m < n && m <= most_by_rows::<T>() {
        return matmul_into(alpha, b.reversed_axes(), a.reversed_axes(), beta, c.reversed_axes());
    }
    let by_vectors = match n {
        1 => multiply_vector(alpha, a, b, beta, &mut c),
        _ => multiply_few(alpha, a, b, beta, &mut c),
    };
    if by_vectors {
        return;
    }
    if costly_to_pack(&a, &b, &c) {
        let mut other = Array2::zeros((n, m)).reversed_axes();
        multiply(alpha, a, b, T::zero(), other.view_mut());
        if beta == T::zero() {
            c.assign(&other);
        } else {
            c.zip_mut_with(&other, |c, &product| *c = beta * *c + product);
        }
        return;
    }
    multiply(alpha, a, b, beta, c);
}

/// Whether the product goes faster by way of a C in the other storage order. The `gemm` crate makes C
/// column-major, by transposing everything if need be. Copying a left side that is row-major then into
/// its panels is slow (half of the time of 128 rows times 4096×4096), copying a right side is not.
fn costly_to_pack<T>(a: &ArrayView2<'_, T>, b: &ArrayView2<'_, T>, c: &ArrayViewMut2<'_, T>) -> bool {
    let ((m, k), n) = (a.dim(), b.ncols());
    let row_major = |strides: &[isize]| strides[1].abs() < strides[0].abs();
    let left = if row_major(a.strides()) { m * k } else { 0 };
    let right = if row_major(b.strides()) { 0 } else { n * k };
    // As the crate sees it, the left side is A if C is column-major, and Bᵀ if not.
    let (now, other) = if row_major(c.strides()) { (right, left) } else { (left, right) };
    m * n * k >= LARGE && now > 2 * (other + m * n)
}

fn multiply<T: Real>(alpha: T, a: ArrayView2<'_, T>, b: ArrayView2<'_, T>, beta: T, mut c: ArrayViewMut2<'_, T>) {
    let ((m, k), n) = (a.dim(), b.ncols());
    let parallelism =
        if threads::alone(Pace::FLOATS.time(m * k, n)) { gemm::Parallelism::None } else { gemm::Parallelism::Rayon(0) };
    // SAFETY: the three views are valid for their shapes and strides (an invariant of ndarray), the
    // shapes were checked by the only caller to be m×k, k×n and m×n, and `c` is borrowed exclusively, so that it
    // overlaps neither `a` nor `b`. gemm takes (column stride, row stride) in elements.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c.strides()[1],
            c.strides()[0],
            beta != T::zero(),
            a.as_ptr(),
            a.strides()[1],
            a.strides()[0],
            b.as_ptr(),
            b.strides()[1],
            b.strides()[0],
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Below this order a symmetric product is computed whole.
const WHOLE: usize = 128;

/// The upper triangle of C ← A·Bᵀ by halves, so that most of it comes from few large products. (The
/// lower triangle would have the `gemm` crate pack its left side from rows, which is slow.)
pub(super) fn upper_triangle<T: Real>(
    gemm: &impl Fn(ArrayView2<'_, T>, ArrayView2<'_, T>, ArrayViewMut2<'_, T>),
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    c: ArrayViewMut2<'_, T>,
) {
    let m = a.nrows();
    if m <= WHOLE {
        return gemm(a, b.reversed_axes(), c);
    }
    let half = (m / 2).next_multiple_of(64);
    let ((above, below), (first, second)) = (a.split_at(Axis(0), half), b.split_at(Axis(0), half));
    let (top, bottom) = c.split_at(Axis(0), half);
    let (diagonal, corner) = top.split_at(Axis(1), half);
    gemm(above, second.reversed_axes(), corner);
    upper_triangle(gemm, above, first, diagonal);
    upper_triangle(gemm, below, second, bottom.split_at(Axis(1), half).1);
}

/// Copies the upper triangle of a square matrix to the lower one, in tiles that fit the cache.
pub(super) fn mirror<T: Real>(c: &mut Array2<T>) {
    const TILE: usize = 32;
    let m = c.nrows();
    for rows in (0..m).step_by(TILE) {
        for columns in (rows..m).step_by(TILE) {
            for i in rows..(rows + TILE).min(m) {
                for j in columns.max(i + 1)..(columns + TILE).min(m) {
                    c[(j, i)] = c[(i, j)];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::linalg::{Faer, Kernels};
    use crate::testing::sizes;

    fn numbers(rows: usize, columns: usize, seed: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |(i, j)| (((i * 31 + j * 17 + seed) % 13) as f64) - 6.0)
    }

    #[test]
    fn equals_the_naive_product_for_any_strides() {
        let small = &[(1, 1, 1), (3, 5, 2), (1, 7, 4), (0, 3, 4), (4, 0, 3)];
        let all = &[(1, 1, 1), (3, 5, 2), (1, 7, 4), (0, 3, 4), (4, 0, 3), (16, 3, 1), (33, 17, 29)];
        for &(m, k, n) in sizes(all, small) {
            let a = numbers(2 * m, 2 * k, 1);
            let b = numbers(n, k, 2);
            for (a, b) in
                [(a.slice(s![..;2, ..;2]), b.t()), (a.slice(s![..m, ..k]), b.slice(s![..;-1, ..]).reversed_axes())]
            {
                let start = numbers(m, n, 3);
                let mut c = start.clone();
                matmul_into(2.0, a, b, -1.0, c.view_mut());
                let naive = Array2::from_shape_fn((m, n), |(i, j)| {
                    2.0 * (0..k).map(|t| a[(i, t)] * b[(t, j)]).sum::<f64>() - start[(i, j)]
                });
                assert_eq!(c, naive);
            }
        }
    }

    #[test]
    fn the_way_by_the_other_storage_order_gives_the_same() {
        let (x, w, start) = (numbers(40, 400, 1), numbers(180, 400, 2), numbers(40, 180, 3));
        let naive = x.dot(&w.t());
        for beta in [0.0, -1.0] {
            let (mut c, mut d) = (start.clone(), start.t().as_standard_layout().into_owned());
            assert!(costly_to_pack(&x.view(), &w.t(), &c.view_mut()));
            assert!(!costly_to_pack(&x.view(), &w.t(), &d.view_mut().reversed_axes()));
            matmul_into(2.0, x.view(), w.t(), beta, c.view_mut());
            matmul_into(2.0, x.view(), w.t(), beta, d.view_mut().reversed_axes());
            let expected = 2.0 * &naive + beta * &start;
            assert_eq!(c, expected);
            assert_eq!(d.t(), expected);
        }
    }

    #[test]
    fn a_few_rows_are_a_few_vectors_of_the_transposed_product() {
        let (x, w) = (numbers(3, 300, 1), numbers(300, 200, 2));
        for w in [w.view(), w.t().as_standard_layout().t()] {
            let start = numbers(3, 200, 3);
            for x in [x.view(), x.slice(s![..1, ..])] {
                let mut c = start.slice(s![..x.nrows(), ..]).to_owned();
                matmul_into(2.0, x, w, -1.0, c.view_mut());
                assert_eq!(c, 2.0 * x.dot(&w) - start.slice(s![..x.nrows(), ..]));
            }
        }
    }

    #[test]
    fn a_symmetric_product_is_symmetric_to_the_bit() {
        for (m, n) in [(0, 3), (1, 1), (31, 5), (33, 40), (128, 7), (300, 3)] {
            let (a, g) = (numbers(m, n, 4), numbers(n, n, 5));
            let b = a.dot(&(&g + &g.t()));
            let c = Kernels::<f64>::symmetric_product(&Faer, a.view(), b.view());
            assert_eq!(c, a.dot(&b.t()), "{m}x{n}");
            assert_eq!(c, c.t());
        }
    }
}
