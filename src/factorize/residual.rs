//! A chain: one method on the weight, another on what it leaves.
//!
//! > Ŵ = Ŵ₁ + Ŵ₂,  Ŵ₁ ≈ W,  Ŵ₂ ≈ W − Ŵ₁
//!
//! Low rank and sparse (Candès et al., J. ACM 58, 2011; OATS, ICLR 2025), low rank and quantised (LoftQ, LQ-LoRA, ICLR
//! 2024) and the like; either part may be a chain itself. `share` of the bytes go to the first, and what it leaves
//! unused to the second. `rounds` fit the first again to what the second leaves, and so on; a round is
//! taken only if it lowers the error. So is the second part, which some weights do not need.
//!
//! Metrics are those of both parts. Cost: the two methods' own, times rounds + 1. Fails where one of the
//! two alone is the better use of the bytes, which is often: the shares matter more than the methods.

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use super::sparse::{fraction, no_rank};
use super::{Bitmask, Factorize, Forecast, Method, Outline, Problem, Svd};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::metric::MetricSpec;
use crate::operator::{LinearOperator, Operator};
use crate::scalar::Real;

/// Two methods, one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Residual {
    /// The part of the bytes that the first method may use.
    pub share: f64,
    /// How often the two parts are fitted again to what the other leaves, at most.
    pub rounds: usize,
    /// What the weight goes through.
    pub first: Box<Method>,
    /// What the rest goes through.
    pub then: Box<Method>,
}

impl Default for Residual {
    /// Low rank and sparse, half of the bytes each.
    fn default() -> Self {
        Residual {
            share: 0.5,
            rounds: 2,
            first: Box::new(Method::Svd(Svd::default())),
            then: Box::new(Method::Bitmask(Bitmask::default())),
        }
    }
}

/// A pair of parts for each weight of a group.
struct Parts<T: Real> {
    first: Vec<Operator<T>>,
    then: Vec<Operator<T>>,
    error: f64,
}

impl Residual {
    fn limits(&self, before: u64, budget: &Budget) -> Result<(u64, u64)> {
        fraction("share", self.share)?;
        budget.check()?;
        no_rank("residual", budget)?;
        let limit = budget
            .byte_limit(before)
            .ok_or_else(|| Error::Unsupported(format!("residual knows no budget `{budget}`: use keep or bytes")))?;
        Ok((limit, (limit as f64 * self.share) as u64))
    }

    /// One part on what the other leaves.
    fn part<T: Real>(
        method: &Method,
        group: &[Problem<'_, T>],
        other: &[Operator<T>],
        bytes: u64,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Operator<T>>> {
        let left =
            |(i, p): (usize, &Problem<'_, T>)| other.get(i).map_or(p.weight.to_owned(), |o| &p.weight - &o.to_dense());
        let left: Vec<Array2<T>> = group.iter().enumerate().map(left).collect();
        let problems = group.iter().zip(&left).map(|(problem, left)| Problem {
            name: problem.name,
            weight: left.view(),
            dtype: problem.dtype,
            metric: problem.metric.clone(),
            budget: Budget::Bytes(bytes),
            seed: problem.seed,
            backend: problem.backend,
        });
        method.factorize_noting(&problems.collect::<Vec<_>>(), notes)
    }
}

/// Squared metric error of a group.
fn error_of<T: Real>(group: &[Problem<'_, T>], first: &[Operator<T>], then: &[Operator<T>]) -> f64 {
    let each = group.iter().enumerate().map(|(i, problem)| {
        let mut left = problem.weight.to_owned();
        first.get(i).into_iter().chain(then.get(i)).for_each(|part| left -= &part.to_dense());
        problem.metric.squared(left.view(), problem.backend).max(0.0)
    });
    each.sum()
}

impl<T: Real> Factorize<T> for Residual {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        self.factorize_noting(group, &mut Vec::new())
    }

    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        let Some(lead) = group.first() else { return Ok(Vec::new()) };
        group.iter().try_for_each(|problem| problem.check().map_err(|e| e.of_tensor(problem.name)))?;
        let (limit, share) = self.limits(group.iter().map(Problem::bytes).sum(), &lead.budget)?;
        let first = Self::part(&self.first, group, &[], share, notes)?;
        let alone = error_of(group, &first, &[]);
        let exact = group.iter().zip(&first).all(|(problem, operator)| problem.error_of(operator) <= 0.0);
        if exact {
            return Ok(first);
        }
        let spent = Operator::total_bytes(&first);
        let then = Self::part(&self.then, group, &first, limit.saturating_sub(spent), notes)?;
        let mut best = Parts { error: error_of(group, &first, &then), first, then };
        for _ in 0..self.rounds {
            let mut said = Vec::new();
            let room = limit.saturating_sub(Operator::total_bytes(&best.then)).min(share.max(spent));
            let first = Self::part(&self.first, group, &best.then, room, &mut said)?;
            let room = limit.saturating_sub(Operator::total_bytes(&first));
            let then = Self::part(&self.then, group, &first, room, &mut said)?;
            let error = error_of(group, &first, &then);
            if error.is_nan() || error >= best.error {
                break;
            }
            best = Parts { first, then, error };
        }
        if best.error >= alone {
            notes.push("the second part is left out: it lowers no error".into());
            return Ok(best.first);
        }
        best.first.into_iter().zip(best.then).map(|(first, then)| Operator::sum_of(vec![first, then])).collect()
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        let (limit, share) = self.limits(group.iter().map(Outline::bytes).sum(), budget)?;
        let first = Factorize::<T>::forecast(&*self.first, group, metric, &Budget::Bytes(share))?;
        let rest = Budget::Bytes(limit.saturating_sub(first.bytes));
        let then = Factorize::<T>::forecast(&*self.then, group, metric, &rest)?;
        let numbers: usize = group.iter().map(|outline| outline.shape.0 * outline.shape.1).sum();
        let memory = first.memory.max(then.memory) + (3 * size_of::<T>() * numbers) as u64;
        Ok(Forecast { bytes: (first.bytes + then.bytes).min(limit), exact: false, memory })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Form, Quantize, TwoFour};
    use super::*;
    use crate::testing::numbers;

    fn chain(first: Method, then: Method, share: f64, rounds: usize) -> Residual {
        Residual { share, rounds, first: Box::new(first), then: Box::new(then) }
    }

    #[test]
    fn a_chain_never_costs_error_and_rounds_lower_it() {
        let w = numbers(48, 4, 31).dot(&numbers(4, 64, 37)) + numbers(48, 64, 41).mapv(|v| v.powi(5));
        let svd = || Method::Svd(Svd { form: Form::Factors, ..Svd::default() });
        let bitmask = || Method::Bitmask(Bitmask::default());
        let two_four = || Method::TwoFour(TwoFour::default());
        let quantize = |bits| Method::Quantize(Quantize { bits: Some(bits), group: 32, ..Quantize::default() });
        let nested = Method::Residual(chain(svd(), bitmask(), 0.5, 1));
        for (first, then, keep, share) in [
            (svd(), bitmask(), 0.5, 0.4),
            (svd(), quantize(2), 0.5, 0.6),
            (quantize(3), svd(), 0.6, 0.5),
            (two_four(), svd(), 0.8, 0.7),
            (quantize(2), nested, 0.7, 0.3),
        ] {
            let problem = Problem::new("w", w.view(), Budget::Keep(keep)).dtype(crate::scalar::DType::BF16);
            let group = std::slice::from_ref(&problem);
            let error = |rounds| {
                let found = chain(first.clone(), then.clone(), share, rounds).factorize(group).unwrap();
                assert!(found[0].bytes() as f64 <= keep * problem.bytes() as f64);
                problem.error_of(&found[0])
            };
            let share = Budget::Bytes((keep * share * problem.bytes() as f64) as u64);
            let alone = first.factorize(&[Problem { budget: share, ..problem.clone() }]).unwrap();
            let (once, more) = (error(0), error(4));
            assert!(once <= problem.error_of(&alone[0]) && more <= once, "{first:?} + {then:?}: {once} {more}");
        }
    }

    #[test]
    fn a_planted_sum_is_found_better_than_by_either_part() {
        // Low rank plus a few large entries.
        let mut w = numbers(60, 3, 31).dot(&numbers(3, 80, 37));
        (0..60).for_each(|i| w[(i, (i * 37) % 80)] += 9.0);
        let problem = Problem::new("w", w.view(), Budget::Keep(0.3)).dtype(crate::scalar::DType::F32);
        let error = |method: &dyn Factorize<f64>| {
            problem.error_of(&method.factorize(std::slice::from_ref(&problem)).unwrap()[0])
        };
        let both = error(&Residual { rounds: 8, ..Residual::default() });
        assert!(both < 0.1 * error(&Svd::default()) && both < 0.1 * error(&Bitmask::default()), "{both}");
    }

    #[test]
    fn budgets_without_bytes_are_refused() {
        let w = numbers(8, 8, 31);
        for budget in [Budget::Rank(2), Budget::Error(0.1)] {
            let problem = Problem::new("w", w.view(), budget);
            assert!(matches!(Residual::default().factorize(&[problem]), Err(Error::Unsupported(_))));
        }
    }
}
