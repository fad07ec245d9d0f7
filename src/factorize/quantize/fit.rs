//! The numbers of an expression onto grids, one factor after the other, each making up for those before.
//!
//! With the last factor of a product settled, Ŵ = R·L, the rest R faces a problem of the same kind:
//!
//! > ‖W − R·L‖²_A = ‖X* − R‖²_{L·A·Lᵀ} + what no R can change,  X* = W·A·Lᵀ·(L·A·Lᵀ)⁻¹
//!
//! so that every factor but the last is rounded to fit what the rounding of the others left, under the metric
//! that it then has. Between two dense factors stands an invertible matrix for free: the right one is
//! balanced and turned by a random rotation first, which spreads its outliers.

use std::sync::Arc;

use ndarray::{Array1, Array2, ArrayView2, Axis};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::leaf::How;
use crate::error::Result;
use crate::linalg::Backend;
use crate::metric::Weighting;
use crate::operator::{Bitmask, Dense, Interpolative, LinearOperator, NmSparse, Operator, Side, Stacked};
use crate::scalar::Real;
use crate::stats::Gram;

/// Rounds expressions; parts that several weights share are rounded once.
pub(super) struct Fit<'a, T: Real> {
    pub(super) how: How<'a>,
    pub(super) mix: bool,
    pub(super) seed: u64,
    pub(super) notes: &'a mut Vec<String>,
    pub(super) shared: Vec<[Arc<Operator<T>>; 2]>,
}

impl<T: Real> Fit<'_, T> {
    /// An expression of the form of `operator` near `target`, columns weighed by `input`.
    pub(super) fn fit(
        &mut self,
        operator: &Operator<T>,
        target: ArrayView2<'_, T>,
        input: &Weighting,
    ) -> Result<Operator<T>> {
        Ok(match operator {
            operator if settled(operator) => operator.clone(),
            Operator::Dense(_) => Operator::Quantized(self.how.round(target, input, self.notes)?),
            Operator::Interpolative(leaf) if leaf.side() == Side::Left => {
                let rest = target.select(Axis(0), &leaf.pivots().rest());
                let coefficients = self.fit(leaf.coefficients(), rest.view(), input)?;
                Operator::Interpolative(Interpolative::new(leaf.side(), leaf.pivots().clone(), coefficients)?)
            }
            Operator::Interpolative(leaf) => {
                let coefficients = self.alone(leaf.coefficients(), &Weighting::Identity)?;
                Operator::Interpolative(Interpolative::new(leaf.side(), leaf.pivots().clone(), coefficients)?)
            }
            Operator::Product(factors) => Operator::product_of(self.product(factors, target, input)?)?,
            Operator::Sum(terms) => self.sum(terms, target, input)?,
            Operator::Shared(inner) => {
                if let Some([_, known]) = self.shared.iter().find(|[from, _]| Arc::ptr_eq(from, inner)) {
                    return Ok(Operator::Shared(known.clone()));
                }
                let rounded = Arc::new(self.alone(inner, input)?);
                self.shared.push([inner.clone(), rounded.clone()]);
                Operator::Shared(rounded)
            }
            Operator::NmSparse(leaf) => {
                let (kept, start) = (leaf.kept(), leaf.to_dense());
                let (values, grid) = self.how.settle((start.view(), Some(kept.view())), target, input, self.notes)?;
                let placed = NmSparse::gather(leaf.pattern(), values.view(), kept.view(), T::DTYPE)?;
                Operator::NmSparse(placed.quantized(grid)?)
            }
            Operator::Bitmask(leaf) => {
                let (kept, start) = (leaf.kept(), leaf.to_dense());
                let (values, grid) = self.how.settle((start.view(), Some(kept.view())), target, input, self.notes)?;
                Operator::Bitmask(Bitmask::gather(values.view(), kept.view(), T::DTYPE)?.quantized(grid)?)
            }
            Operator::BlockDiagonal(leaf) => Operator::BlockDiagonal(self.blocks(leaf, target, input)?),
            Operator::Mixture(leaf) => Operator::Mixture(self.mixture(leaf, target, input)?),
            Operator::Stacked(leaf) => {
                let own = leaf.parts().iter().zip(leaf.rows());
                let parts = own.map(|(part, rows)| self.fit(part, target.select(Axis(0), rows).view(), input));
                Operator::Stacked(Stacked::new(&leaf.places(), parts.collect::<Result<_>>()?)?)
            }
            Operator::Basis(_) | Operator::Permutation(_) | Operator::Quantized(_) => operator.clone(),
        })
    }

    /// The same near what the operator is now.
    fn alone(&mut self, operator: &Operator<T>, input: &Weighting) -> Result<Operator<T>> {
        if settled(operator) { Ok(operator.clone()) } else { self.fit(operator, operator.to_dense().view(), input) }
    }

    fn product(
        &mut self,
        factors: &[Operator<T>],
        target: ArrayView2<'_, T>,
        input: &Weighting,
    ) -> Result<Vec<Operator<T>>> {
        let Some((last, rest)) = factors.split_last() else { return Ok(Vec::new()) };
        if rest.is_empty() {
            return Ok(vec![self.fit(last, target, input)?]);
        }
        if last.shape().0 == 0 {
            return Ok(factors.to_vec());
        }
        let last = match (rest.last(), last) {
            (Some(Operator::Dense(left)), Operator::Dense(right)) => {
                let turned = self.turned(left, right);
                Operator::Quantized(self.how.round(turned.view(), input, self.notes)?)
            }
            (_, last) => self.alone(last, input)?,
        };
        let (target, form) = absorbed(target, &last, input, self.how.backend)?;
        let mut rounded = self.product(rest, target.view(), &Weighting::Gram(Arc::new(form)))?;
        rounded.push(last);
        Ok(rounded)
    }

    /// The right factor of a product of two dense ones, in other coordinates between the two.
    fn turned(&self, left: &Dense<T>, right: &Dense<T>) -> Array2<T> {
        let norm = |v: ndarray::ArrayView1<'_, T>| v.iter().map(|v| v.wide() * v.wide()).sum::<f64>().sqrt();
        let (left, right) = (left.values(), right.values());
        let balance = |k: usize| {
            let (l, r) = (norm(left.column(k)), norm(right.row(k)));
            T::from_f64(if l > 0.0 && r > 0.0 { (l / r).sqrt() } else { 1.0 })
        };
        let scales = Array1::from_shape_fn(right.nrows(), balance);
        let balanced = &right * &scales.insert_axis(Axis(1));
        if !self.mix || balanced.nrows() < 2 {
            return balanced;
        }
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let r = balanced.nrows();
        // Any full-rank cloud of numbers around zero gives a rotation that spreads.
        let cloud = Array2::from_shape_simple_fn((r, r), || T::from_f64(normal(&mut random)));
        let kernels = T::kernels(self.how.backend);
        kernels.matmul(kernels.orthonormalize(cloud.view()).t(), balanced.view())
    }

    /// Each term near what the others leave.
    fn sum(&mut self, terms: &[Operator<T>], target: ArrayView2<'_, T>, input: &Weighting) -> Result<Operator<T>> {
        let mut dense: Vec<Array2<T>> = terms.iter().map(LinearOperator::to_dense).collect();
        let mut rounded = Vec::with_capacity(terms.len());
        for (at, term) in terms.iter().enumerate() {
            let others = dense.iter().enumerate().filter(|(other, _)| *other != at);
            let left = others.fold(target.to_owned(), |left, (_, other)| left - other);
            let term = self.fit(term, left.view(), input)?;
            dense[at] = term.to_dense();
            rounded.push(term);
        }
        Operator::sum_of(rounded)
    }
}

/// A standard normal number (Box, Muller 1958).
fn normal(random: &mut ChaCha8Rng) -> f64 {
    let mut uniform = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let (a, b) = (1.0 - uniform(), uniform());
    (-2.0 * a.ln()).sqrt() * (2.0 * std::f64::consts::PI * b).cos()
}

/// X* and L·A·Lᵀ.
fn absorbed<T: Real>(
    target: ArrayView2<'_, T>,
    last: &Operator<T>,
    input: &Weighting,
    backend: &dyn Backend,
) -> Result<(Array2<T>, Gram)> {
    let kernels = f64::kernels(backend);
    let last = f64::from_view(last.to_dense().view()).into_owned();
    // L·A, and from it L·A·Lᵀ and L·A·Wᵀ.
    let weighed = input.times(last.view(), backend);
    let form = kernels.symmetric_product(weighed.view(), last.view());
    let right = kernels.matmul(weighed.view(), f64::from_view(target).t());
    let mean = form.diag().sum() / form.nrows().max(1) as f64;
    if mean <= 0.0 {
        // A zero weight: nothing to fit to.
        let zero = Array2::zeros((target.nrows(), form.nrows()));
        return Ok((zero, Gram::new("factor", Array2::eye(form.nrows()))?));
    }
    let mut ridge = 1e-8 * mean;
    loop {
        let mut damped = form.clone();
        damped.diag_mut().mapv_inplace(|d| d + ridge);
        match kernels.solve_spd(damped.view(), right.clone()) {
            Ok(found) if found.iter().all(|v| v.is_finite()) => {
                let found = found.t().mapv(T::from_f64).as_standard_layout().into_owned();
                return Ok((found, Gram::new("factor", form)?));
            }
            Err(why) if ridge > 1e-2 * mean => return Err(why),
            _ => ridge *= 100.0,
        }
    }
}

/// Whether there are no numbers in it, or they are on a grid.
pub(super) fn settled<T: Real>(operator: &Operator<T>) -> bool {
    match operator {
        Operator::Basis(_) | Operator::Permutation(_) | Operator::Quantized(_) => true,
        Operator::Stacked(leaf) => leaf.parts().iter().all(settled),
        Operator::NmSparse(leaf) => leaf.grid().is_some(),
        Operator::Bitmask(leaf) => leaf.grid().is_some(),
        Operator::BlockDiagonal(leaf) => leaf.grid().is_some(),
        _ => false,
    }
}
