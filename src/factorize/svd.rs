//! Weighted low rank: SVD, FWSVD, ASVD and SVD-LLM are this one method under different metrics.
//!
//! Minimise tr(B·(W−Ŵ)·A·(W−Ŵ)ᵀ) over rank(Ŵ) ≤ r, with D = B^½ diagonal. The optimum is
//!
//! > Ŵ = D⁻¹·U·Uᵀ·D·W,  U = top-r eigenvectors of C = D·W·A·Wᵀ·D  (m×m),
//! > error² = Σ_{i>r} λᵢ(C)
//!
//! (Eckart–Young for D·W·A^½; Swift-SVD, 2026, Thm 3.1 in transposed form). Nothing of A is inverted,
//! so it may be singular: no Cholesky factor, no damping. One eigendecomposition serves every rank.
//! For tall W the same U comes from the n×n side: K = SᵀWᵀB·W·S with A = S·Sᵀ, U = D·W·S·V·Λ^{−½}.
//!
//! Squares are formed in f64: in f32 a Gram matrix loses what lies below 3·10⁻⁴ of its largest singular
//! value. Above a short side of 2048 an f32 product is tried first and kept only if a check of the
//! energy that it captured holds.
//!
//! Cost: one symmetric eigendecomposition of min(m, n) and a few products. Fails where W is NaN.
//! Directions in which the metric is zero (a singular A) are filled with plain SVD directions.

use ndarray::{Array2, ArrayView2, Axis, s};
use serde::{Deserialize, Serialize};

pub(super) use self::exact::{Spectrum, plain_spectrum, spectrum};
pub(super) use self::joint::{Joint, mean_input};
use super::pivot::interpolate;
use super::{Decomposition, Factorize, Forecast, Outline, Point, Problem};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::linalg::Backend;
use crate::metric::MetricSpec;
use crate::operator::{Dense, IndexSet, Interpolative, Operator, Side};
use crate::scalar::Real;

mod exact;
mod fast;
mod joint;

/// Truncated SVD under the problem's metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Svd {
    /// How the result is stored.
    pub form: Form,
    /// How it is computed.
    pub route: Route,
    /// What the weights of a group share; a lone weight needs none.
    pub share: Option<Share>,
}

/// The stored form of a rank-r matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Pivot rows (or columns) and interpolation coefficients: r(m+n−r) numbers and the pivots.
    #[default]
    Pivot,
    /// Two factors: r(m+n) numbers; what other tools call a low-rank pair.
    Factors,
}

/// The way to the singular subspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// A full eigendecomposition of the short side.
    #[default]
    Exact,
    /// Randomized block Krylov ([`leading_subspace`](crate::linalg::krylov::leading_subspace)): several
    /// times faster where the short side is large and the rank a quarter of it or less, at an excess of
    /// about 2 % over the optimal error, which is estimated and noted. For budgets that set a rank
    /// (`rank`, `keep`, `bytes`) only.
    Fast,
}

/// Which factor a group has in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Share {
    /// The right factor (the projection of the inputs): weights are stacked. Exact if they see the same
    /// inputs; otherwise their Gram matrices are averaged, as in Basis Sharing (ICLR 2025).
    Input,
    /// The left factor (the basis of the outputs): weights stand side by side, each with its own Gram
    /// matrix, exactly.
    Output,
}

impl Svd {
    /// Bytes of rank r for a joint matrix of M×N in a dtype.
    fn bytes(&self, (m, n): (usize, usize), rank: usize, outline: &Outline) -> u64 {
        let (numbers, indices) = match (self.form, self.side((m, n))) {
            (Form::Factors, _) => (rank * (m + n), 0),
            (Form::Pivot, Side::Left) => (rank * (m + n - rank), IndexSet::bytes_of(m, rank)),
            (Form::Pivot, Side::Right) => (rank * (m + n - rank), IndexSet::bytes_of(n, rank)),
        };
        outline.dtype.bytes(numbers) as u64 + indices
    }

    /// The largest rank of at least 1 that takes at most `limit` bytes.
    pub(super) fn rank_within(&self, shape: (usize, usize), limit: u64, outline: &Outline) -> Option<usize> {
        (1..=shape.0.min(shape.1)).rev().find(|&rank| self.bytes(shape, rank, outline) <= limit)
    }

    /// The interpolated side: the one that is shared, else the shorter one (cheaper pivots).
    fn side(&self, (m, n): (usize, usize)) -> Side {
        match self.share {
            Some(Share::Input) => Side::Right,
            Some(Share::Output) => Side::Left,
            None if m <= n => Side::Left,
            None => Side::Right,
        }
    }

    /// Shape of the joint matrix of a group.
    fn joint_shape(&self, shapes: &[(usize, usize)]) -> Result<(usize, usize)> {
        let Some(&first) = shapes.first() else {
            return Err(Error::shape("a group of at least one weight", 0));
        };
        match self.share {
            _ if shapes.len() == 1 => Ok(first),
            None => Err(Error::Unsupported(format!(
                "svd of a group of {} weights needs `share = \"input\"` or `share = \"output\"`",
                shapes.len()
            ))),
            Some(Share::Input) => match shapes.iter().find(|s| s.1 != first.1) {
                Some(other) => Err(Error::shape(format!("{} inputs in the whole group", first.1), other)),
                None => Ok((shapes.iter().map(|s| s.0).sum(), first.1)),
            },
            Some(Share::Output) => match shapes.iter().find(|s| s.0 != first.0) {
                Some(other) => Err(Error::shape(format!("{} outputs in the whole group", first.0), other)),
                None => Ok((first.0, shapes.iter().map(|s| s.1).sum())),
            },
        }
    }
}

impl<T: Real> Factorize<T> for Svd {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        match self.decompose(group)? {
            Some(decomposition) => self.assemble(group, &decomposition),
            None => Ok(Vec::new()),
        }
    }

    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        let (outline, backend) = self.start(group)?;
        let joint = Joint::new(self, group)?;
        if self.route == Route::Fast {
            return self.fast(group, &joint, &outline, backend).map(Some);
        }
        self.profile(&joint, &outline, group.iter().map(Problem::bytes).sum(), backend).map(Some)
    }

    fn has_curve(&self) -> bool {
        self.route == Route::Exact
    }

    fn assemble(&self, group: &[Problem<'_, T>], decomposition: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let (outline, backend) = self.start(group)?;
        let before = group.iter().map(Problem::bytes).sum();
        let choice = decomposition.choose(&group[0].budget, before)?;
        // U, and from the fast route the right factor UᵀDW.
        let (vectors, images) = match decomposition.state.as_slice() {
            [vectors] => (vectors, None),
            [vectors, images] => (vectors, Some(images)),
            other => return Err(Error::shape("one or two matrices of state", other.len())),
        };
        if choice > vectors.ncols() {
            let dense = |p: &Problem<'_, T>| Ok(Operator::Dense(Dense::rounded(p.weight.to_owned(), p.dtype)?));
            return group.iter().map(dense).collect();
        }
        let joint = Joint::new(self, group)?;
        let u = vectors.slice(s![.., ..choice]);
        let right = match images {
            Some(images) => images.slice(s![..choice, ..]).to_owned(),
            None => T::kernels(backend).matmul(u.t(), joint.weight().view()),
        };
        self.cut(group, &joint, u, right, &outline, backend)
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        let _ = metric; // All are minimised exactly.
        budget.check()?;
        let shapes: Vec<_> = group.iter().map(|o| o.shape).collect();
        let (m, n) = self.joint_shape(&shapes)?;
        let (k, outline) = (m.min(n), group[0]);
        let before: u64 = group.iter().map(Outline::bytes).sum();
        let side = k as u64;
        let (short, long) = (side, m.max(n) as u64);
        // Weight in T and f64, its product with the Gram matrix, the Gram matrix and its root, the eigenproblem.
        let memory = 8 * (3 * short * long + 2 * (n * n) as u64 + 4 * short * short);
        let (bytes, exact) = match (*budget, budget.byte_limit(before)) {
            (_, Some(limit)) if limit >= before => (before, true),
            (_, Some(limit)) => {
                let rank = self.rank_within((m, n), limit, &outline);
                let least = || format!("{} bytes of {before}", self.bytes((m, n), 1, &outline));
                let rank = rank.ok_or_else(|| Error::Budget { asked: budget.to_string(), least: least() })?;
                (self.bytes((m, n), rank, &outline), true)
            }
            (Budget::Rank(rank), _) => (self.bytes((m, n), rank.min(k), &outline), true),
            _ if self.route == Route::Fast => return Err(fast::needs_a_rank(budget)),
            _ => (before, false),
        };
        Ok(Forecast { bytes, exact, memory })
    }
}

impl Svd {
    /// Every rank's error of a joint matrix that takes `before` bytes as it is.
    pub(super) fn profile<T: Real>(
        &self,
        joint: &Joint<'_, T>,
        outline: &Outline,
        before: u64,
        backend: &dyn Backend,
    ) -> Result<Decomposition<T>> {
        let found = spectrum(joint, backend)?;
        // Tails are summed from the small end, so that none is lost beside the large eigenvalues.
        let mut curve = Vec::with_capacity(found.values.len() + 2);
        let mut tail = 0.0;
        for rank in (0..=found.values.len()).rev() {
            tail += found.values.get(rank).copied().unwrap_or(0.0);
            let bytes = if rank == 0 { 0 } else { self.bytes(joint.shape, rank, outline) };
            curve.push(Point { bytes, error: tail });
        }
        curve.reverse();
        curve.push(Point { bytes: before, error: 0.0 });
        Ok(Decomposition { norm_squared: tail, curve, state: vec![found.vectors], ..Decomposition::default() })
    }

    fn start<'a, T: Real>(&self, group: &[Problem<'a, T>]) -> Result<(Outline, &'a dyn Backend)> {
        let Some(first) = group.first() else {
            return Err(Error::shape("a group of at least one weight", 0));
        };
        group.iter().try_for_each(|p| p.check().map_err(|e| e.of_tensor(p.name)))?;
        Ok((Outline { shape: first.shape(), dtype: first.dtype }, first.backend))
    }

    /// Ŵ = D⁻¹·U·(Uᵀ·D·W) for the given U and right factor, in the stored form, cut into the group's weights.
    fn cut<T: Real>(
        &self,
        group: &[Problem<'_, T>],
        joint: &Joint<'_, T>,
        u: ArrayView2<'_, T>,
        right: Array2<T>,
        outline: &Outline,
        backend: &dyn Backend,
    ) -> Result<Vec<Operator<T>>> {
        let kernels = T::kernels(backend);
        let mut left = u.to_owned();
        if let Some(d) = &joint.scale {
            for (mut row, &d) in left.rows_mut().into_iter().zip(d) {
                row.mapv_inplace(|v| v / T::from_f64(d));
            }
        }
        let dense = |values: Array2<T>| Dense::rounded(values, outline.dtype);
        let (left, right) = match (self.form, self.side(joint.shape)) {
            (Form::Factors, _) => (Operator::Dense(dense(left)?), Operator::Dense(dense(right)?)),
            (Form::Pivot, Side::Left) => {
                // An orthonormal basis of the columns of D⁻¹U keeps the coefficients accurate.
                let basis = if joint.scale.is_some() { kernels.orthonormalize(left.view()) } else { left.clone() };
                let (pivots, t) = interpolate(basis.t(), backend)?;
                let chosen: Vec<usize> = pivots.chosen().collect();
                let rows = kernels.matmul(left.select(Axis(0), &chosen).view(), right.view());
                let x = Interpolative::new(Side::Left, pivots, dense(t.reversed_axes())?)?;
                (Operator::Interpolative(x), Operator::Dense(dense(rows)?))
            }
            (Form::Pivot, Side::Right) => {
                let basis = kernels.orthonormalize(right.t());
                let (pivots, t) = interpolate(basis.t(), backend)?;
                let chosen: Vec<usize> = pivots.chosen().collect();
                let columns = kernels.matmul(left.view(), right.select(Axis(1), &chosen).view());
                let x = Interpolative::new(Side::Right, pivots, dense(t)?)?;
                (Operator::Dense(dense(columns)?), Operator::Interpolative(x))
            }
        };
        if group.len() == 1 {
            return Ok(vec![Operator::product_of(vec![left, right])?]);
        }
        share(group, self.share, left, right)
    }
}

/// One operator for each weight: its own slice of one factor, the other factor shared.
fn share<T: Real>(
    group: &[Problem<'_, T>],
    share: Option<Share>,
    left: Operator<T>,
    right: Operator<T>,
) -> Result<Vec<Operator<T>>> {
    use std::sync::Arc;
    let stacked = share != Some(Share::Output);
    let (own, common) = if stacked { (left, Arc::new(right)) } else { (right, Arc::new(left)) };
    let Operator::Dense(own) = own else {
        return Err(Error::Unsupported("the factor that a group does not share is dense".into()));
    };
    let (dtype, own) = (own.dtype(), own.values());
    let mut at = 0;
    let mut operators = Vec::with_capacity(group.len());
    for problem in group {
        let (m, n) = problem.shape();
        let (range, axis) = if stacked { (at..at + m, Axis(0)) } else { (at..at + n, Axis(1)) };
        at = range.end;
        let part = own.slice_axis(axis, range.into()).to_owned();
        let part = Operator::Dense(Dense::rounded(part, dtype)?);
        let common = Operator::Shared(common.clone());
        operators.push(Operator::product_of(if stacked { vec![part, common] } else { vec![common, part] })?);
    }
    Ok(operators)
}

#[cfg(test)]
mod tests;
