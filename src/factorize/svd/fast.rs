//! The fast route: randomized block Krylov on the weighted matrix, known by its products only.

use std::ops::Range;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, CowArray, Ix2, s};

use super::exact::scale_columns;
use super::{Joint, Svd};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::factorize::{Decomposition, Outline, Point, Problem};
use crate::linalg::Backend;
use crate::linalg::krylov::{Krylov, Products, Subspace, leading_subspace, squares};
use crate::metric::Weighting;
use crate::scalar::Real;

/// D·W·S of a group. A diagonal S is multiplied in; of a Gram metric only G = S·Sᵀ is applied.
struct Weighted<'a, T: Real> {
    /// Borrowed unless it is scaled.
    weight: CowArray<'a, T, Ix2>,
    /// Columns that have a Gram matrix, and that matrix in the compute type and in f64.
    grams: Vec<(Range<usize>, Array2<T>, ArrayView2<'a, f64>)>,
    backend: &'a dyn Backend,
}

impl<'a, T: Real> Weighted<'a, T> {
    fn new(joint: &'a Joint<'_, T>, backend: &'a dyn Backend) -> Self {
        let (mut weight, mut grams, mut at) = (joint.weight(), Vec::new(), 0);
        for (columns, input) in &joint.blocks {
            let range = at..at + columns;
            at = range.end;
            match input {
                Weighting::Gram(gram) => grams.push((range, T::from_view(gram.matrix()).into_owned(), gram.matrix())),
                Weighting::Diagonal(_) => scale_columns(&mut weight.slice_mut(s![.., range]), input),
                Weighting::Identity => {}
            }
        }
        Weighted { weight, grams, backend }
    }
}

impl<T: Real> Products<T> for Weighted<'_, T> {
    fn shape(&self) -> (usize, usize) {
        self.weight.dim()
    }
    fn forward(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let kernels = T::kernels(self.backend);
        if self.grams.is_empty() {
            return kernels.matmul(x, self.weight.t());
        }
        let mut weighted = x.to_owned();
        for (range, gram, _) in &self.grams {
            let (from, to) = (x.slice(s![.., range.clone()]), weighted.slice_mut(s![.., range.clone()]));
            kernels.gemm(T::one(), from, gram.view(), T::zero(), to);
        }
        kernels.matmul(weighted.view(), self.weight.t())
    }
    fn transposed(&self, y: ArrayView2<'_, T>) -> Array2<T> {
        T::kernels(self.backend).matmul(y, self.weight.view())
    }
    fn inner(&self, x: ArrayView2<'_, T>) -> Array2<f64> {
        let (kernels, x) = (f64::kernels(self.backend), f64::from_view(x));
        if self.grams.is_empty() {
            return kernels.gram(x.view());
        }
        let mut weighted = x.to_owned();
        for (range, _, gram) in &self.grams {
            let (from, to) = (x.slice(s![.., range.clone()]), weighted.slice_mut(s![.., range.clone()]));
            kernels.gemm(1.0, from, gram.view(), 0.0, to);
        }
        kernels.symmetric_product(weighted.view(), x.view())
    }
    fn norm_squared(&self) -> f64 {
        if self.grams.is_empty() {
            return squares(self.weight.view());
        }
        let kernels = f64::kernels(self.backend);
        let mut rest = self.weight.to_owned();
        let mut total = 0.0;
        for (range, _, gram) in &self.grams {
            // tr(B·G·Bᵀ) = ⟨BᵀB, G⟩, half the work of B·G.
            let mut block = rest.slice_mut(s![.., range.clone()]);
            let square = kernels.gram(f64::from_view(block.t()).view());
            total += square.iter().zip(gram).map(|(a, b)| a * b).sum::<f64>();
            block.fill(T::zero());
        }
        total + squares(rest.view())
    }
}

/// The refusal of budgets that need the whole spectrum.
pub(super) fn needs_a_rank(budget: &Budget) -> Error {
    Error::Unsupported(format!(
        "budget {budget}: the fast route computes the leading directions only and needs `rank`, `keep` or `bytes`; \
         use route = \"exact\""
    ))
}

impl Svd {
    /// Ranks up to what the group's budget allows, with what was measured in the notes.
    pub(super) fn fast<T: Real>(
        &self,
        group: &[Problem<'_, T>],
        joint: &Joint<'_, T>,
        outline: &Outline,
        backend: &dyn Backend,
    ) -> Result<Decomposition<T>> {
        let (shape, budget) = (joint.shape, group[0].budget);
        let before: u64 = group.iter().map(Problem::bytes).sum();
        let rank = match (budget, budget.byte_limit(before)) {
            (Budget::Rank(rank), _) => rank.min(shape.0.min(shape.1)),
            // Dense is within the budget: no direction is wanted.
            (_, Some(limit)) if limit >= before => 0,
            (_, Some(limit)) => self.rank_within(shape, limit, outline).unwrap_or(0),
            _ => return Err(needs_a_rank(&budget)),
        };
        let how = Krylov::new(rank, group[0].seed);
        let found = leading_subspace(&Weighted::new(joint, backend), &how, backend)?;
        let mut left = found.norm_squared;
        let mut curve = vec![Point { bytes: 0, error: left }];
        for (index, energy) in found.energies.iter().enumerate() {
            left -= energy;
            curve.push(Point { bytes: self.bytes(shape, index + 1, outline), error: left.max(0.0) });
        }
        curve.push(Point { bytes: before, error: 0.0 });
        let notes = vec![note(&found)];
        let Subspace { vectors, mut images, norm_squared, .. } = found;
        let mut at = 0;
        for (columns, input) in &joint.blocks {
            unscale_columns(&mut images.slice_mut(s![.., at..at + columns]), input);
            at += columns;
        }
        Ok(Decomposition { norm_squared, curve, state: vec![vectors, images], notes, ..Decomposition::default() })
    }
}

/// Takes the scaling of [`scale_columns`] back.
fn unscale_columns<T: Real>(block: &mut ArrayViewMut2<'_, T>, weighting: &Weighting) {
    if let Weighting::Diagonal(a) = weighting {
        for (mut column, &a) in block.columns_mut().into_iter().zip(a.iter()) {
            column.mapv_inplace(|v| v / T::from_f64(a.sqrt()));
        }
    }
}

fn note<T>(found: &Subspace<T>) -> String {
    let error = (found.residual() / found.norm_squared.max(f64::MIN_POSITIVE)).sqrt();
    format!(
        "fast route: rank {} out of a basis of {}; error {:.3} % of the norm, estimated to be {:.2} % above the \
         optimum (proven: at most {:.0} %)",
        found.vectors.ncols(),
        found.basis,
        100.0 * error,
        100.0 * found.excess,
        100.0 * found.bound
    )
}
