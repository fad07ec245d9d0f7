//! How a product is applied: factor by factor, but for permutations beside block-diagonal factors, which
//! cost no pass of their own.

use ndarray::{Array2, ArrayView2};

use super::{BlockDiagonal, LinearOperator, Operator, Permutation};
use crate::scalar::Real;

/// What a product does in one pass.
pub(super) enum Stage<'a, T: Real> {
    /// One factor.
    Factor(&'a Operator<T>),
    /// Blocks, with the permutations on either side as part of their stores and loads.
    Blocks { scatter: Option<&'a Permutation>, blocks: &'a BlockDiagonal<T>, gather: Option<&'a Permutation> },
}

impl<T: Real> Stage<'_, T> {
    pub(super) fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        match self {
            Stage::Factor(factor) => factor.product(x),
            Stage::Blocks { scatter, blocks, gather } => blocks.between(*scatter, *gather, x),
        }
    }
    pub(super) fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        match self {
            Stage::Factor(factor) => factor.product_transposed(x),
            Stage::Blocks { scatter, blocks, gather } => blocks.between_transposed(*scatter, *gather, x),
        }
    }
}

/// The passes of a product, leftmost first; each block-diagonal factor takes its neighbours along.
pub(super) fn stages<T: Real>(factors: &[Operator<T>]) -> Vec<Stage<'_, T>> {
    let permutation = |at: usize| match factors.get(at).map(Operator::unshared) {
        Some(Operator::Permutation(leaf)) => Some(leaf),
        _ => None,
    };
    let (mut stages, mut next) = (Vec::with_capacity(factors.len()), 0);
    while let Some(factor) = factors.get(next) {
        let scatter = permutation(next);
        let at = next + usize::from(scatter.is_some());
        next = match factors.get(at).map(Operator::unshared) {
            Some(Operator::BlockDiagonal(blocks)) => {
                let gather = permutation(at + 1);
                stages.push(Stage::Blocks { scatter, blocks, gather });
                at + 1 + usize::from(gather.is_some())
            }
            _ => {
                stages.push(Stage::Factor(factor));
                next + 1
            }
        };
    }
    stages
}

/// One stage after the other.
pub(super) fn chain<'s, S: 's, T: Real>(
    mut stages: impl Iterator<Item = &'s S>,
    x: ArrayView2<'_, T>,
    step: impl Fn(&S, ArrayView2<'_, T>) -> Array2<T>,
) -> Array2<T> {
    let first = stages.next().map_or_else(|| x.to_owned(), |first| step(first, x));
    stages.fold(first, |y, stage| step(stage, y.view()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::operator::codec::{Decoder, Encoder};
    use crate::operator::{Dense, Runs};
    use crate::scalar::DType;

    fn blocks(extents: &[(usize, usize)], dtype: DType) -> Operator<f64> {
        let count = extents.iter().map(|(rows, columns)| rows * columns).sum();
        let values = (0..count).map(|i| ((i * 7) % 13) as f64 - 6.0).collect();
        Operator::BlockDiagonal(BlockDiagonal::rounded(values, extents.to_vec(), dtype).unwrap())
    }

    fn grid(shape: (usize, usize), rows: usize, columns: usize, runs: Runs) -> Operator<f64> {
        Operator::Permutation(Permutation::grid(shape, rows, columns, runs).unwrap())
    }

    /// Products that mix fused and single factors, their factors, and the number of passes.
    fn products() -> Vec<(Vec<Operator<f64>>, usize)> {
        let monarch = vec![
            grid((7, 8), 2, 4, Runs::Uniform(1)),
            blocks(&[(4, 3), (4, 2)], DType::F64),
            grid((5, 5), 2, 2, Runs::Table(vec![1, 2, 2, 0])),
            Operator::Shared(Arc::new(blocks(&[(3, 3), (2, 3)], DType::BF16))),
            grid((6, 5), 1, 6, Runs::Uniform(1)),
        ];
        let list = Operator::Permutation(Permutation::list(3, vec![2, 3, 0, 1]).unwrap());
        let dense = Operator::Dense(Dense::new(Array2::from_shape_fn((3, 4), |(i, j)| (i + 2 * j) as f64)));
        let mixed = vec![dense, grid((4, 4), 2, 2, Runs::Uniform(1)), list, blocks(&[(1, 2), (2, 2)], DType::F64)];
        vec![(monarch, 2), (mixed, 3)]
    }

    #[test]
    fn fused_passes_equal_the_product_of_the_dense_factors() {
        for (factors, passes) in products() {
            assert_eq!(stages(&factors).len(), passes);
            let dense = factors.iter().map(Operator::to_dense).reduce(|a, b| a.dot(&b)).unwrap();
            let product = Operator::product_of(factors).unwrap();
            assert_eq!(product.to_dense(), dense);
            let numbers =
                |rows: usize, columns: usize| Array2::from_shape_fn((rows, columns), |(i, j)| (i * 3 + j) as f64);
            let (m, n) = dense.dim();
            for b in [1, 4] {
                assert_eq!(product.product(numbers(n, b).view()), dense.dot(&numbers(n, b)));
                assert_eq!(product.product_transposed(numbers(m, b).view()), dense.t().dot(&numbers(m, b)));
                assert_eq!(product.forward(numbers(b, n).view()).unwrap(), numbers(b, n).dot(&dense.t()));
            }
        }
    }

    #[test]
    fn files_give_the_same_product_back() {
        for (factors, _) in products() {
            let product = Operator::product_of(factors).unwrap();
            let mut encoder = Encoder::new();
            let node = encoder.encode("w", &product).unwrap();
            let tensors = encoder.into_tensors();
            assert_eq!(tensors.iter().map(|t| t.bytes.len() as u64).sum::<u64>(), product.bytes());
            let back: Operator<f64> = Decoder::new(&tensors).decode(&node).unwrap();
            assert_eq!(back, product);
        }
    }
}
