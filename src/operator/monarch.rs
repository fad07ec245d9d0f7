//! Monarch matrices in the layout of the reference implementation.

use ndarray::ArrayView3;

use super::{BlockDiagonal, Operator, Permutation, Runs};
use crate::error::{Error, Result};
use crate::scalar::{DType, Real};

impl<T: Real> Operator<T> {
    /// The m×n matrix that Monarch layers hold as `blkdiag1` (w1, k×q×p) and `blkdiag2` (w2, l×s×r): with
    /// k·q = l·r, n ≤ k·p and m ≤ l·s,
    ///
    /// ```text
    /// h[κ·q + j] = Σ_π w1[κ,j,π]·x[κ·p + π]
    /// g[λ·r + ρ] = h[ρ·l + λ]
    /// y[σ·l + λ] = Σ_ρ w2[λ,σ,ρ]·g[λ·r + ρ]
    /// ```
    ///
    /// x is padded with zeros to k·p, y is cropped to m, as the layers do it. l need not divide q.
    ///
    /// Four inputs and outputs in two blocks (k = q = p = l = s = r = 2), each block of w1 full of ones, w2 picking
    /// one number a row:
    ///
    /// ```
    /// use ndarray::{Array3, array};
    /// use weightpress::scalar::DType;
    /// use weightpress::{LinearOperator, Operator};
    ///
    /// // w1[κ,j,π]: output j of block κ is x[2κ] + x[2κ+1], times j + 1.
    /// let w1 = Array3::from_shape_fn((2, 2, 2), |(_, j, _)| (j + 1) as f64);
    /// // w2[λ,σ,ρ]: output σ of block λ takes what came from block ρ = σ.
    /// let w2 = Array3::from_shape_fn((2, 2, 2), |(_, sigma, rho)| f64::from(sigma == rho));
    /// let monarch = Operator::monarch(w1.view(), w2.view(), (4, 4), DType::F64)?;
    /// // y[2σ + λ] = (λ + 1)·(x[2σ] + x[2σ+1])
    /// assert_eq!(
    ///     monarch.to_dense(),
    ///     array![[1., 1., 0., 0.], [2., 2., 0., 0.], [0., 0., 1., 1.], [0., 0., 2., 2.]]
    /// );
    /// assert_eq!(monarch.params(), 16);
    /// # Ok::<(), weightpress::Error>(())
    /// ```
    ///
    /// Source: Dao et al., ICML 2022; the rectangular form is that of its authors' code.
    ///
    /// # Errors
    /// [`Error::Shape`] if the extents do not fit together; otherwise as [`BlockDiagonal::rounded`].
    pub fn monarch(w1: ArrayView3<'_, T>, w2: ArrayView3<'_, T>, shape: (usize, usize), dtype: DType) -> Result<Self> {
        let ((k, q, p), (l, s, r), (m, n)) = (w1.dim(), w2.dim(), shape);
        let fits = k * q == l * r && (m > 0 && m <= l * s) && (n > 0 && n <= k * p);
        if !fits {
            return Err(Error::shape(
                format!("blocks for {m}x{n} with as many outputs ({k} x {q}) as inputs ({l} x {r})"),
                (w1.dim(), w2.dim()),
            ));
        }
        let blocks = |w: ArrayView3<'_, T>| {
            let (count, rows, columns) = w.dim();
            BlockDiagonal::rounded(w.iter().copied().collect(), vec![(rows, columns); count], dtype)
        };
        let grid = |shape, rows, columns| Permutation::grid(shape, rows, columns, Runs::Uniform(1));
        let mut factors = Vec::new();
        if l > 1 || m < s {
            factors.push(Operator::Permutation(grid((m, l * s), l, s)?));
        }
        factors.push(blocks(w2)?.into());
        if l > 1 && r > 1 {
            factors.push(Operator::Permutation(grid((l * r, l * r), r, l)?));
        }
        factors.push(blocks(w1)?.into());
        if n < k * p {
            factors.push(Operator::Permutation(grid((k * p, n), 1, k * p)?));
        }
        Operator::product_of(factors)
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, Array3};

    use super::*;
    use crate::operator::LinearOperator;

    fn numbers(dim: (usize, usize, usize), seed: usize) -> Array3<f64> {
        Array3::from_shape_fn(dim, |(a, b, c)| ((a * 31 + b * 17 + c * 7 + seed) % 19) as f64 - 9.0)
    }

    #[test]
    fn equals_the_definition_for_all_extents_that_fit() {
        // (k, q, p), (l, s, r): square; rectangular; l does not divide q; one block on either side.
        let cases = [
            ((2, 2, 2), (2, 2, 2)),
            ((4, 6, 3), (3, 5, 8)),
            ((3, 4, 2), (6, 2, 2)),
            ((2, 3, 4), (2, 4, 3)),
            ((1, 6, 5), (2, 3, 3)),
            ((5, 2, 3), (1, 4, 10)),
        ];
        for ((k, q, p), (l, s, r)) in cases {
            let (w1, w2) = (numbers((k, q, p), 1), numbers((l, s, r), 2));
            for (m, n) in [(l * s, k * p), (l * s - 1, k * p - 1)] {
                let naive = Array2::from_shape_fn((m, n), |(row, column)| {
                    let (sigma, lambda, kappa, pi) = (row / l, row % l, column / p, column % p);
                    (0..q)
                        .filter(|j| (kappa * q + j) % l == lambda)
                        .map(|j| w2[(lambda, sigma, (kappa * q + j) / l)] * w1[(kappa, j, pi)])
                        .sum()
                });
                let operator = Operator::monarch(w1.view(), w2.view(), (m, n), DType::F64).unwrap();
                assert_eq!(operator.to_dense(), naive, "{:?} {:?}", (k, q, p), (l, s, r));
                let x = Array2::from_shape_fn((n, 3), |(i, j)| (i + 2 * j) as f64);
                assert_eq!(operator.product(x.view()), naive.dot(&x));
            }
        }
    }

    #[test]
    fn extents_that_do_not_fit_are_refused() {
        let refused = |a, b, shape| Operator::monarch(numbers(a, 1).view(), numbers(b, 2).view(), shape, DType::F64);
        assert!(refused((2, 3, 2), (2, 2, 2), (4, 4)).is_err());
        assert!(refused((2, 2, 2), (2, 2, 2), (5, 4)).is_err());
        assert!(refused((2, 2, 2), (2, 2, 2), (4, 5)).is_err());
        assert!(refused((2, 2, 2), (2, 2, 2), (0, 4)).is_err());
    }
}
