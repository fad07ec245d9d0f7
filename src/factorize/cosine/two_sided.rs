//! Both sides at once: Q_Iᵀ·C·P_J with a core C of r₁×r₂.
//!
//! For given I and J the minimiser of tr(B·Δ·A·Δᵀ) is one projection after the other, in either order: with
//! the rows of I solved for, Y = C·P_J is left, under the metric Q_I·B·Q_Iᵀ of their coefficients. So the sides
//! take turns: I for the chosen J, J for the chosen I. Where atoms do not interact each turn is optimal and the
//! error never rises.

use ndarray::Array2;

use super::super::Problem;
use super::super::subset::Coupling;
use super::{Cosine, basis, first, spectrum};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::linalg::Transform;
use crate::operator::{Dense, IndexSet, LinearOperator, Operator, Side};
use crate::scalar::{DType, Real};

/// Turns of the alternation.
const ROUNDS: usize = 5;

/// (r₁, r₂) at step t of max(m, n).
pub(super) fn steps((m, n): (usize, usize), t: usize) -> (usize, usize) {
    let all = m.max(n).max(1);
    ((m * t).div_ceil(all), (n * t).div_ceil(all))
}

/// Bytes of an r₁×r₂ core and its indices.
pub(super) fn core_bytes((m, n): (usize, usize), (rows, columns): (usize, usize), dtype: DType) -> u64 {
    dtype.bytes(rows * columns) as u64 + IndexSet::bytes_of(m, rows) + IndexSet::bytes_of(n, columns)
}

impl Cosine {
    /// Solves [`Along::Both`](super::Along::Both): a core for each transform, the best of them within the budget.
    ///
    /// # Errors
    /// As [`Factorize::factorize`](crate::factorize::Factorize::factorize).
    pub(super) fn two_sided<T: Real>(&self, problem: &Problem<'_, T>) -> Result<Vec<Operator<T>>> {
        let shape @ (m, n) = problem.shape();
        let before = problem.bytes();
        let last = m.max(n);
        if let Some(limit) = problem.budget.byte_limit(before) {
            if limit >= before {
                return problem.dense();
            }
            let price = |t: usize| core_bytes(shape, steps(shape, t), problem.dtype);
            let step = (1..=last).rev().find(|&t| price(t) <= limit).ok_or_else(|| Error::Budget {
                asked: problem.budget.to_string(),
                least: format!("{} bytes of {before}", price(1)),
            })?;
            return Ok(vec![self.core(problem, steps(shape, step))?.0]);
        }
        if let Budget::Rank(r) = problem.budget {
            return Ok(vec![self.core(problem, (r.min(m), r.min(n)))?.0]);
        }
        // The least step within the error; the last one is dense.
        let norm = problem.metric.squared(problem.weight, problem.backend);
        let limit = problem.budget.error_limit(norm).unwrap_or(0.0);
        let (mut low, mut high, mut best) = (0, last, None);
        while low < high {
            let middle = low.midpoint(high);
            let (operator, error) = self.core(problem, steps(shape, middle))?;
            if error <= limit {
                (high, best) = (middle, Some(operator));
            } else {
                low = middle + 1;
            }
        }
        match best.filter(|operator| operator.bytes() < before) {
            Some(operator) => Ok(vec![operator]),
            None => problem.dense(),
        }
    }

    /// The best r₁×r₂ core over the transforms that fit both sides, and its squared metric error.
    fn core<T: Real>(&self, problem: &Problem<'_, T>, size: (usize, usize)) -> Result<(Operator<T>, f64)> {
        let (m, n) = problem.shape();
        let mut best: Option<(Operator<T>, f64)> = None;
        for kind in self.transforms(&[m, n])? {
            let operator = self.alternate(problem, kind, size)?;
            let error = problem.metric.squared((&problem.weight - &operator.to_dense()).view(), problem.backend);
            if best.as_ref().is_none_or(|(_, least)| error < *least) {
                best = Some((operator, error));
            }
        }
        best.ok_or_else(|| Error::Unsupported("no transform fits both sides".into()))
    }

    /// Chooses rows for the chosen columns and columns for the chosen rows in turn.
    fn alternate<T: Real>(
        &self,
        problem: &Problem<'_, T>,
        kind: Transform,
        size: (usize, usize),
    ) -> Result<Operator<T>> {
        let ((m, n), metric, backend) = (problem.shape(), &problem.metric, problem.backend);
        let (left, right) = (Coupling::new(kind, m, &metric.output)?, Coupling::new(kind, n, &metric.input)?);
        // n×m and m×n: transformed along their rows.
        let (of_outputs, of_inputs) = (spectrum(problem, Side::Left, kind)?, spectrum(problem, Side::Right, kind)?);
        let reduced = |coupling: &Coupling, s: &Array2<T>, chosen: &[usize]| {
            kind.rows(coupling.coefficients(s.view(), chosen, self.refit, backend)?.reversed_axes().view())
        };
        let order = left.order(of_outputs.view(), &metric.input, self.rule(), backend)?;
        let (mut rows, mut columns) = (first(&order.atoms, size.0), Vec::new());
        for _ in 0..ROUNDS {
            let s = reduced(&left, &of_outputs, &rows)?;
            let order = right.order(s.view(), &left.restricted(&rows)?, self.rule(), backend)?;
            let before = (rows.clone(), std::mem::replace(&mut columns, first(&order.atoms, size.1)));
            let s = reduced(&right, &of_inputs, &columns)?;
            let order = left.order(s.view(), &right.restricted(&columns)?, self.rule(), backend)?;
            rows = first(&order.atoms, size.0);
            if before == (rows.clone(), columns.clone()) {
                break;
            }
        }
        let s = reduced(&left, &of_outputs, &rows)?;
        let core = right.coefficients(s.view(), &columns, self.refit, backend)?;
        Operator::product_of(vec![
            basis(kind, Side::Left, m, &rows)?,
            Operator::Dense(Dense::rounded(core, problem.dtype)?),
            basis(kind, Side::Right, n, &columns)?,
        ])
    }
}
