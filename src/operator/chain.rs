//! How a product is applied: factor by factor, but for permutations beside block-diagonal factors, which
//! cost no pass of their own, and for block-diagonal factors around a 2:4 one, which are one pass with it.

use ndarray::{Array2, ArrayView2, Axis, CowArray};

use super::{BlockDiagonal, LinearOperator, Operator, Permutation};
use crate::linalg::pages;
use crate::scalar::Real;

/// What a product does in one pass.
pub(super) enum Stage<'a, T: Real> {
    /// One factor.
    Factor(&'a Operator<T>),
    /// Blocks, with the permutations on either side as part of their stores and loads.
    Blocks { scatter: Option<&'a Permutation>, blocks: &'a BlockDiagonal<T>, gather: Option<&'a Permutation> },
    /// Blocks, N:M and blocks, with nothing in between.
    Wrapped(Box<[Stage<'a, T>; 3]>),
}

impl<T: Real> Stage<'_, T> {
    /// What it makes of x; of its transpose, if that is asked for.
    fn run(&self, transposed: bool, x: ArrayView2<'_, T>) -> Array2<T> {
        match self {
            Stage::Factor(factor) if transposed => factor.product_transposed(x),
            Stage::Factor(factor) => factor.product(x),
            Stage::Blocks { scatter, blocks, gather } => {
                let mut y = pages::zeros((blocks.height(transposed, *scatter, *gather), x.ncols()));
                blocks.between(transposed, *scatter, *gather, x, (&mut y, 0));
                y
            }
            Stage::Wrapped(parts) => match &**parts {
                [Stage::Blocks { blocks: left, .. }, Stage::Factor(core), Stage::Blocks { blocks: right, .. }]
                    if !transposed =>
                {
                    let core = if let Operator::NmSparse(core) = core.unshared() { Some(core) } else { None };
                    let fused = core.and_then(|core| core.wrapped(left, right, x));
                    fused.unwrap_or_else(|| chain(&parts[..], transposed, x))
                }
                parts => chain(parts, transposed, x),
            },
        }
    }
}

/// Takes blocks, N:M and blocks at the end of the stages together.
fn wrap<T: Real>(stages: &mut Vec<Stage<'_, T>>) {
    let found = match &stages[..] {
        [.., Stage::Blocks { scatter: None, gather: None, .. }, Stage::Factor(core), last] => {
            matches!(core.unshared(), Operator::NmSparse(_))
                && matches!(last, Stage::Blocks { scatter: None, gather: None, .. })
        }
        _ => false,
    };
    if !found {
        return;
    }
    let parts = stages.split_off(stages.len() - 3);
    match <[Stage<'_, T>; 3]>::try_from(parts) {
        Ok(parts) => stages.push(Stage::Wrapped(Box::new(parts))),
        Err(parts) => stages.extend(parts),
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
                wrap(&mut stages);
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

/// Vectors that go through several block-diagonal factors at a time, so that what is between them stays in
/// the cache.
const PANEL: usize = 64;

/// One stage after the other: from the last to the first, or transposed from the first to the last.
pub(super) fn chain<T: Real>(stages: &[Stage<'_, T>], transposed: bool, x: ArrayView2<'_, T>) -> Array2<T> {
    let order: Vec<&Stage<'_, T>> = if transposed { stages.iter().collect() } else { stages.iter().rev().collect() };
    let Some((last, before)) = order.split_last() else { return x.to_owned() };
    let through = |x| before.iter().fold(CowArray::from(x), |x, stage| CowArray::from(stage.run(transposed, x.view())));
    let blocks_only = before.iter().all(|stage| matches!(stage, Stage::Blocks { .. }));
    match last {
        Stage::Blocks { scatter, blocks, gather } if blocks_only && !before.is_empty() && x.ncols() > PANEL => {
            let mut y = pages::zeros((blocks.height(transposed, *scatter, *gather), x.ncols()));
            for (i, x) in x.axis_chunks_iter(Axis(1), PANEL).enumerate() {
                blocks.between(transposed, *scatter, *gather, through(x).view(), (&mut y, i * PANEL));
            }
            y
        }
        _ => last.run(transposed, through(x).view()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::operator::codec::{Decoder, Encoder};
    use crate::operator::{Dense, Nm, NmSparse, Runs};
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
        let masked = |shape: (usize, usize), dtype| {
            let kept = Array2::from_shape_fn(shape, |(i, j)| j >= shape.1 / 4 * 4 || (i + j) % 4 < 2);
            let values = Array2::from_shape_fn(shape, |(i, j)| ((i * 5 + j * 3) % 7) as f64 - 3.0);
            Operator::NmSparse(NmSparse::gather(Nm::TWO_FOUR, values.view(), kept.view(), dtype).unwrap())
        };
        let right = Operator::Shared(Arc::new(blocks(&[(5, 5), (5, 5), (1, 1)], DType::F64)));
        let armor = vec![blocks(&[(4, 4), (3, 3)], DType::F64), masked((7, 11), DType::BF16), right];
        let shuffled = vec![
            blocks(&[(4, 4), (4, 4)], DType::BF16),
            masked((8, 5), DType::F64),
            grid((5, 8), 2, 4, Runs::Uniform(1)),
            blocks(&[(4, 3), (4, 2)], DType::F64),
        ];
        vec![(monarch, 2), (mixed, 3), (armor, 1), (shuffled, 3)]
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
            for b in [1, 4, 2 * PANEL + 3] {
                assert_eq!(product.product(numbers(n, b).view()), dense.dot(&numbers(n, b)));
                assert_eq!(product.product_transposed(numbers(m, b).view()), dense.t().dot(&numbers(m, b)));
                assert_eq!(product.forward(numbers(b, n).view()).unwrap(), numbers(b, n).dot(&dense.t()));
            }
        }
    }

    #[test]
    fn blocks_around_2_of_4_are_one_pass_in_f32_too() {
        let extents = |length: usize, size: usize| -> Vec<(usize, usize)> {
            (0..length).step_by(size).map(|start| size.min(length - start)).map(|size| (size, size)).collect()
        };
        for (m, n, size) in [(64, 48, 16), (30, 53, 12), (9, 131, 5), (17, 63, 64)] {
            for dtype in [DType::F32, DType::BF16] {
                let wrapper = |length: usize| {
                    let extents = extents(length, size);
                    let count = extents.iter().map(|(rows, columns)| rows * columns).sum();
                    let values = (0..count).map(|i| ((i * 7) % 5) as f32 - 2.0).collect();
                    Operator::BlockDiagonal(BlockDiagonal::rounded(values, extents, dtype).unwrap())
                };
                let kept = Array2::from_shape_fn((m, n), |(i, j)| j >= n / 4 * 4 || (i + j) % 4 < 2);
                let values = Array2::from_shape_fn((m, n), |(i, j)| ((i * 5 + j * 3) % 7) as f32 - 3.0);
                let core = NmSparse::gather(Nm::TWO_FOUR, values.view(), kept.view(), dtype).unwrap();
                let factors = vec![wrapper(m), Operator::NmSparse(core), Operator::Shared(Arc::new(wrapper(n)))];
                assert_eq!(stages(&factors).len(), 1);
                let product = Operator::product_of(factors).unwrap();
                let dense = product.to_dense();
                for b in [1, 5, 16, 70] {
                    let x = Array2::from_shape_fn((b, n), |(i, j)| ((i * 3 + j) % 9) as f32 - 4.0);
                    let y = Array2::from_shape_fn((m, b), |(i, j)| ((i * 3 + j) % 9) as f32 - 4.0);
                    assert_eq!(product.forward(x.view()).unwrap(), x.dot(&dense.t()));
                    assert_eq!(product.product(x.t().as_standard_layout().view()), dense.dot(&x.t()));
                    assert_eq!(product.product_transposed(y.view()), dense.t().dot(&y));
                }
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
