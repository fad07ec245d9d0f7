//! CoSpaDi (arXiv:2509.22075) and its kin: sparse codes over a dense dictionary, W ≈ S·D.
//!
//! > minimise tr(B·(S·D−W)·A·(S·D−W)ᵀ), D of k×n, S of m×k with few entries
//!
//! Rows of W are signals, rows of D atoms. A mask of one bit for each entry of S is part of the bytes. By default
//! (`form = "pivot"`) k rows of Ŵ *are* the atoms: their codes are unit vectors that cost nothing, which leaves
//! about twice the entries for each of the other rows. With full codes it is pivoted low rank; with sparser ones
//! there can be more atoms, up to a whole basis.
//!
//! `solver = "alternating"`: both half-steps exact. D = (SᵀBS)⁻¹SᵀB·W for given codes, whatever A is; codes by the
//! coder on H = D·A·Dᵀ ([`coder`](crate::coder)). In form `factors` first with orthonormal atoms, where both steps
//! are closed forms (COMPOT, arXiv:2602.15200). `solver = "one-shot"`: one step of each (ROCKET, arXiv:2602.11008).
//! `solver = "ksvd"`: CoSpaDi's own, K-SVD with Batch-OMP; slow at such densities (ms²k/2 for each sweep).
//!
//! A group of weights shares its dictionary: exact if they see the same inputs; else it is fitted in their mean
//! metric, then by conjugate gradients in each weight's own. Each weight's codes always are in its own.
//!
//! Cost: for each round 2mk² flops for each sweep and about as much for the rest; `ratio` unset, some ten rounds
//! more for the search. Fails where a weight has few outputs beside its inputs (the dictionary takes all the
//! bytes), and at equal bytes a plain [bit mask](super::Bitmask) is often better.

use std::sync::Arc;

use ndarray::{Array2, Axis, s};
use serde::{Deserialize, Serialize};

use self::refine::Entries;
use self::signals::{Model, Signals};
use self::sizes::Sizes;
use super::group::{checked, kept_dense};
use super::sparse::{no_rank, too_little};
use super::{Factorize, Forecast, Form, Outline, Problem};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::metric::{InputMetric, MetricSpec};
use crate::operator::{Bitmask, Dense, Interpolative, Nm, NmSparse, Operator, Side};
use crate::scalar::Real;

mod ksvd;
mod orthonormal;
mod refine;
mod signals;
mod sizes;
mod start;
#[cfg(test)]
mod tests;

/// Sparse codes over a dictionary.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Cospadi {
    /// Whether atoms are rows of the weight (`pivot`) or free (`factors`).
    pub form: Form,
    /// How both are found.
    pub solver: Coding,
    /// What the dictionary begins with.
    pub init: Init,
    /// Atoms for each entry of a code, k/s; by default tried out.
    pub ratio: Option<f64>,
    /// [N, M]: codes keep N of every M consecutive atoms, at most 8; by default entries are anywhere.
    pub pattern: Option<[usize; 2]>,
    /// Alternations with orthonormal atoms, by default 20; or sweeps of K-SVD, by default 8 (the paper's: 60).
    pub iterations: Option<usize>,
    /// Rounds of exact half-steps; by default 8 for `alternating`, else none.
    pub rounds: Option<usize>,
    /// Sweeps of the coder in each round, by default 2.
    pub sweeps: Option<usize>,
}

/// How dictionary and codes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Coding {
    /// Exact half-steps in turn.
    #[default]
    Alternating,
    /// K-SVD with Batch-OMP, for `form = "factors"`.
    Ksvd,
    /// Leading singular vectors, the largest codes, and the dictionary refitted once.
    OneShot,
}

/// What a dictionary begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// Leading singular vectors in the metric.
    #[default]
    Svd,
    /// Rows of the weight, drawn at random, as in the paper.
    Rows,
}

impl<T: Real> Factorize<T> for Cospadi {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        self.factorize_noting(group, &mut Vec::new())
    }

    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        let (first, outlines) = checked(group)?;
        let Some(sizes) = self.sizes(&outlines, &first.budget)? else {
            return kept_dense(group);
        };
        let model = self.solve(group, &sizes).map_err(|e| e.of_tensor(first.name))?;
        let k = model.atoms.nrows();
        let stored: usize = model.coded(&(0..sizes.rows())).iter().map(|&i| count(&model, i)).sum();
        notes.push(format!(
            "{k} atoms, {:.1} in a code, {:.3} of the numbers without the mask",
            stored as f64 / sizes.coded(k).max(1) as f64,
            sizes.paper(k, stored),
        ));
        self.write(group, &model)
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        let before: u64 = group.iter().map(Outline::bytes).sum();
        let sizes = self.sizes(group, budget)?;
        let (rows, n) = (group.iter().map(|o| o.shape.0).sum::<usize>(), group.first().map_or(0, |o| o.shape.1));
        let k = rows.min(n);
        let squares = if metric.input == InputMetric::Gram { 4 * n * n } else { 0 };
        let memory = 8 * (4 * rows * n + 8 * rows * k + 6 * k * k + 4 * k * n + squares) as u64;
        let exact = sizes.is_none();
        Ok(Forecast { bytes: budget.byte_limit(before).unwrap_or(before).min(before), exact, memory })
    }
}

fn count<T: Real>(model: &Model<T>, row: usize) -> usize {
    model.codes.kept.row(row).iter().filter(|&&kept| kept).count()
}

impl Cospadi {
    /// Checks parameters, group and budget; `None` if the weights may stay as they are.
    fn sizes(&self, group: &[Outline], budget: &Budget) -> Result<Option<Sizes>> {
        budget.check()?;
        no_rank("cospadi", budget)?;
        let pattern = self.check(group)?;
        let before: u64 = group.iter().map(Outline::bytes).sum();
        let limit = budget.byte_limit(before).ok_or_else(|| {
            Error::Unsupported(format!("cospadi has no error curve: it solves for bytes, not {budget}"))
        })?;
        let sizes = Sizes::new(group, limit, self.form == Form::Pivot, pattern);
        if limit >= before {
            return Ok(None);
        }
        match sizes.range() {
            Some(_) => Ok(Some(sizes)),
            None => Err(too_little(budget, sizes.least().min(before), before)),
        }
    }

    fn check(&self, group: &[Outline]) -> Result<Option<Nm>> {
        let Some(first) = group.first() else { return Err(Error::shape("a group of at least one weight", 0)) };
        if let Some(other) = group.iter().find(|o| o.shape.1 != first.shape.1) {
            return Err(Error::shape(format!("{} inputs in the whole group", first.shape.1), other.shape));
        }
        if let Some(other) = group.iter().find(|o| o.dtype != first.dtype) {
            return Err(Error::Unsupported(format!(
                "a shared dictionary of weights in {:?} and {:?}",
                first.dtype, other.dtype
            )));
        }
        if let Some(ratio) = self.ratio.filter(|ratio| !(1.0..=1e6).contains(ratio)) {
            return Err(Error::Unsupported(format!(
                "ratio = {ratio}: expected at least 1 atom for each entry of a code"
            )));
        }
        let pattern = self.pattern.map(|[n, m]| Nm::new(n, m)).transpose()?;
        let unsupported = |what: &str| Err(Error::Unsupported(format!("cospadi: {what}")));
        match (self.solver, self.form, pattern) {
            (Coding::Ksvd, Form::Pivot, _) => unsupported("K-SVD moves all atoms: use form = \"factors\""),
            (Coding::Ksvd, _, Some(_)) => unsupported("K-SVD codes have no pattern"),
            (_, Form::Pivot, Some(_)) if group.len() > 1 => {
                unsupported("the unit codes of a group follow no pattern: use form = \"factors\"")
            }
            (_, _, Some(_)) if self.ratio.is_some() => unsupported("a pattern sets the ratio"),
            _ => Ok(pattern),
        }
    }

    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.solver == Coding::Alternating { 8 } else { 0 })
    }

    fn sweeps(&self) -> usize {
        self.sweeps.unwrap_or(2)
    }

    /// The operators of a group: slices of the codes, and the dictionary.
    fn write<T: Real>(&self, group: &[Problem<'_, T>], model: &Model<T>) -> Result<Vec<Operator<T>>> {
        let dtype = group.first().map_or(T::DTYPE, |p| p.dtype);
        let atoms = Operator::Dense(Dense::rounded(T::from_view(model.atoms.view()).into_owned(), dtype)?);
        let matrix = |rows: &[usize]| -> Result<Operator<T>> {
            let (values, kept) = (model.codes.values.select(Axis(0), rows), model.codes.kept.select(Axis(0), rows));
            Ok(match self.pattern {
                Some([n, m]) => {
                    Operator::NmSparse(NmSparse::gather(Nm::new(n, m)?, values.view(), kept.view(), dtype)?)
                }
                None if full(&kept) => Operator::Dense(Dense::rounded(values, dtype)?),
                None => Operator::Bitmask(Bitmask::gather(values.view(), kept.view(), dtype)?),
            })
        };
        let rows = 0..model.codes.values.nrows();
        match (&model.pivots, group) {
            (Some(pivots), [_]) => {
                let codes = Interpolative::new(Side::Left, pivots.clone(), matrix(&model.coded(&rows))?)?;
                Ok(vec![Operator::product_of(vec![Operator::Interpolative(codes), atoms])?])
            }
            (None, [_]) => Ok(vec![Operator::product_of(vec![matrix(&rows.collect::<Vec<_>>())?, atoms])?]),
            _ => {
                let (atoms, mut at) = (Arc::new(atoms), 0);
                let each = group.iter().map(|problem| {
                    let rows: Vec<usize> = (at..at + problem.shape().0).collect();
                    at += rows.len();
                    Operator::product_of(vec![matrix(&rows)?, Operator::Shared(atoms.clone())])
                });
                each.collect()
            }
        }
    }
}

fn full(kept: &Array2<bool>) -> bool {
    kept.iter().all(|&kept| kept)
}
