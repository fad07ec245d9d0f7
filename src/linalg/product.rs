//! The matrix product on ndarray views of any strides, by the `gemm` crate.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use crate::scalar::Real;

/// Below this many multiply-adds a product runs on one thread.
const PARALLEL_FROM: usize = 1 << 20;

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
    let parallelism = if m * n * k < PARALLEL_FROM || rayon::current_thread_index().is_some() {
        gemm::Parallelism::None
    } else {
        gemm::Parallelism::Rayon(0)
    };
    // SAFETY: the three views are valid for their shapes and strides (an invariant of ndarray), the
    // shapes were checked above to be m×k, k×n and m×n, and `c` is borrowed exclusively, so that it
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

/// Rows of a symmetric product that are computed at once.
pub(super) const PANEL: usize = 128;

/// Copies the lower triangle of a square matrix to the upper one, in tiles that fit the cache.
pub(super) fn mirror<T: Real>(c: &mut Array2<T>) {
    const TILE: usize = 32;
    let m = c.nrows();
    for rows in (0..m).step_by(TILE) {
        for columns in (rows..m).step_by(TILE) {
            for i in rows..(rows + TILE).min(m) {
                for j in columns.max(i + 1)..(columns + TILE).min(m) {
                    c[(i, j)] = c[(j, i)];
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

    fn numbers(rows: usize, columns: usize, seed: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |(i, j)| (((i * 31 + j * 17 + seed) % 13) as f64) - 6.0)
    }

    #[test]
    fn equals_the_naive_product_for_any_strides() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 2), (1, 7, 4), (16, 3, 1), (33, 17, 29), (0, 3, 4), (4, 0, 3)] {
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
