//! The best of several methods for each weight, whatever it may cost.
//!
//! Every candidate, a complete method of its own, is run over a grid of budgets (one whose widths are its budgets,
//! over those); of all results the Pareto-optimal ones are kept: no other is both smaller and closer. They
//! are an error curve over honest bytes, and so the allocation of a rule ([`Global`](crate::allocate::Global))
//! spreads bytes over weights and over structures at once, "as it was" always among the choices. The results
//! themselves are kept with the curve: a second budget solves nothing anew.
//!
//! Cost: every candidate times levels. Fails where no candidate is any good.

use serde::{Deserialize, Serialize};

use super::{
    Bitmask, Decomposition, Factorize, Forecast, Method, Mixed, Outline, Point, Problem, Quantize, Residual, Rounding,
    Svd,
};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::metric::MetricSpec;
use crate::operator::{Operator, ZeroPoint};
use crate::scalar::Real;

/// Candidates, and the budgets that they are tried at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Auto {
    /// Fractions of the bytes, ascending.
    pub levels: Vec<f64>,
    /// The largest relative metric error that any weight may have; weights that no candidate brings below it
    /// stay dense.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cap: Option<f64>,
    /// The methods.
    pub candidates: Vec<Method>,
}

impl Default for Auto {
    fn default() -> Self {
        let quantize = |group, zero_point| Method::Quantize(Quantize { group, zero_point, ..Quantize::default() });
        // More than 8 bits: their nearest, and what it leaves in a few more.
        let eight = Quantize { bits: Some(8), group: 0, rule: Rounding::Nearest, ..Quantize::default() };
        let finer = Residual {
            share: 0.8,
            rounds: 0,
            first: Box::new(Method::Quantize(eight)),
            then: Box::new(quantize(128, ZeroPoint::None)),
        };
        Auto {
            levels: vec![0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8],
            cap: None,
            candidates: vec![
                quantize(0, ZeroPoint::None),
                quantize(0, ZeroPoint::Integer),
                Method::Mixed(Mixed::default()),
                quantize(32, ZeroPoint::Integer),
                // What was integers before, as in GGUF's Q4_1, is on such a grid to rounding.
                quantize(32, ZeroPoint::Float),
                Method::Residual(finer),
                Method::Svd(Svd::default()),
                Method::Bitmask(Bitmask::default()),
            ],
        }
    }
}

/// A candidate that uses less of a budget than this has no larger form.
const FILLS: f64 = 0.75;

/// One result of one candidate.
struct Found<T: Real> {
    point: Point,
    operators: Vec<Operator<T>>,
}

impl Auto {
    fn check(&self) -> Result<()> {
        let sound = self.levels.iter().all(|level| *level > 0.0 && *level <= 1.0);
        if self.candidates.is_empty() || self.levels.is_empty() || !sound {
            return Err(Error::Unsupported("auto: expected candidates, and levels that are fractions of 1".into()));
        }
        match self.cap {
            Some(cap) if !(0.0..=1.0).contains(&cap) => {
                Err(Error::Unsupported(format!("cap = {cap}: expected a fraction of 1")))
            }
            _ => Ok(()),
        }
    }

    /// All that one candidate has to offer.
    fn offers<T: Real>(&self, method: &Method, group: &[Problem<'_, T>]) -> Result<Vec<Found<T>>> {
        let before: u64 = group.iter().map(Problem::bytes).sum();
        let found = |operators: Vec<Operator<T>>| {
            let error = group.iter().zip(&operators).map(|(p, o)| p.error_of(o).max(0.0)).sum();
            Found { point: Point { bytes: Operator::total_bytes(&operators), error }, operators }
        };
        let curve = if Factorize::<T>::has_curve(method) { method.decompose(group)? } else { None };
        let mut offers: Vec<Found<T>> = Vec::new();
        if let Some(curve) = curve.as_ref().filter(|curve| !curve.solved.is_empty()) {
            // Its own steps, with the errors that it measured. (The first is nothing, the last the group as it is.)
            for point in curve.curve.get(1..curve.curve.len().max(2) - 1).unwrap_or_default() {
                let tried: Vec<_> =
                    group.iter().map(|p| Problem { budget: Budget::Bytes(point.bytes), ..p.clone() }).collect();
                let operators = method.assemble(&tried, curve)?;
                let bytes = Operator::total_bytes(&operators);
                offers.push(Found { point: Point { bytes, error: point.error }, operators });
            }
        }
        for &level in &self.levels {
            let tried: Vec<_> = group.iter().map(|p| Problem { budget: Budget::Keep(level), ..p.clone() }).collect();
            let solved = match &curve {
                Some(curve) => method.assemble(&tried, curve),
                None => method.factorize(&tried),
            };
            match solved {
                // A step that is known already is not measured again.
                Ok(operators) if offers.iter().any(|o| o.operators == operators) => continue,
                Ok(operators) => offers.push(found(operators)),
                Err(Error::Budget { .. }) => continue,
                Err(why) => return Err(why),
            }
            let used = offers.last().map_or(0, |offer| offer.point.bytes);
            if (used as f64) < FILLS * level * before as f64 {
                break;
            }
        }
        Ok(offers)
    }
}

impl<T: Real> Factorize<T> for Auto {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        match self.decompose(group)? {
            Some(found) => self.assemble(group, &found),
            None => Ok(Vec::new()),
        }
    }

    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        self.check()?;
        group.iter().try_for_each(|problem| problem.check().map_err(|e| e.of_tensor(problem.name)))?;
        let norm_squared = group.iter().map(|p| p.metric.norm_squared(p.weight, p.backend)).sum::<f64>();
        let before: u64 = group.iter().map(Problem::bytes).sum();
        let mut all: Vec<Found<T>> = Vec::new();
        for method in &self.candidates {
            all.extend(self.offers(method, group)?);
            pareto(&mut all, before);
        }
        if let Some(cap) = self.cap {
            all.retain(|found| found.point.error <= cap * cap * norm_squared);
        }
        let mut curve = vec![Point { bytes: 0, error: norm_squared }];
        let mut solved = vec![None];
        for found in all {
            curve.push(found.point);
            solved.push(Some(found.operators));
        }
        curve.push(Point { bytes: before, error: 0.0 });
        let dense = group.iter().map(Problem::dense).collect::<Result<Vec<_>>>()?;
        solved.push(Some(dense.into_iter().flatten().collect()));
        Ok(Some(Decomposition { norm_squared, curve, solved, ..Decomposition::default() }))
    }

    fn has_curve(&self) -> bool {
        true
    }

    fn assemble(&self, group: &[Problem<'_, T>], found: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let Some(first) = group.first() else { return Ok(Vec::new()) };
        let choice = found.choose(&first.budget, group.iter().map(Problem::bytes).sum())?;
        // Choice 0, nothing, is a group of zeros: the smallest result holds that as well.
        found.solved.iter().skip(choice).flatten().next().cloned().ok_or_else(|| Error::Budget {
            asked: first.budget.to_string(),
            least: "more bytes, or a higher cap: no candidate fits".into(),
        })
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        self.check()?;
        budget.check()?;
        super::sparse::no_rank("auto", budget)?;
        let before: u64 = group.iter().map(Outline::bytes).sum();
        let limit = budget.byte_limit(before).unwrap_or(before).min(before);
        let (mut memory, mut least) = (0, before);
        for method in &self.candidates {
            for level in &self.levels {
                match Factorize::<T>::forecast(method, group, metric, &Budget::Keep(*level)) {
                    Ok(forecast) => {
                        memory = memory.max(forecast.memory);
                        least = least.min(forecast.bytes);
                    }
                    Err(Error::Budget { .. }) => {}
                    Err(why) => return Err(why),
                }
            }
        }
        if least > limit {
            return Err(Error::Budget { asked: budget.to_string(), least: format!("{least} bytes of {before}") });
        }
        // The results that are kept, each smaller than the group.
        let kept = before * (self.levels.len() + 4) as u64;
        Ok(Forecast { bytes: limit, exact: false, memory: memory + kept })
    }
}

/// Keeps what nothing else beats: ascending bytes, falling errors, all smaller than the group.
fn pareto<T: Real>(all: &mut Vec<Found<T>>, before: u64) {
    all.sort_by(|a, b| a.point.bytes.cmp(&b.point.bytes).then(a.point.error.total_cmp(&b.point.error)));
    let mut lowest = f64::INFINITY;
    all.retain(|found| {
        let better = found.point.error < lowest && found.point.bytes < before;
        lowest = if better { found.point.error } else { lowest };
        better
    });
}

#[cfg(test)]
mod tests {
    use super::super::TwoFour;
    use super::*;
    use crate::operator::LinearOperator;
    use crate::scalar::DType;
    use crate::testing::numbers;

    #[test]
    fn above_8_bits_a_weight_is_quantised_twice() {
        let w = numbers(64, 256, 31);
        let problem = Problem::new("w", w.view(), Budget::Keep(0.8)).dtype(DType::BF16);
        let solve = |method: &dyn Factorize<f64>| method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        let (found, once) = (solve(&Auto::default()), solve(&Quantize { bits: Some(8), ..Quantize::default() }));
        assert!(matches!(found, Operator::Sum(_)) && found.bytes() as f64 <= 0.8 * problem.bytes() as f64, "{found}");
        let (twice, once) = (problem.error_of(&found), problem.error_of(&once));
        assert!(twice < 0.02 * once, "{twice} {once}");
    }

    #[test]
    fn rows_off_centre_get_a_zero_point() {
        let w = numbers(64, 256, 31) + 0.9;
        let problem = Problem::new("w", w.view(), Budget::Keep(0.52)).dtype(DType::BF16);
        let solve = |method: &dyn Factorize<f64>| method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        let (found, centred) = (solve(&Auto::default()), solve(&Quantize { bits: Some(8), ..Quantize::default() }));
        assert!(problem.error_of(&found) < 0.5 * problem.error_of(&centred), "{found}");
    }

    #[test]
    fn is_never_worse_than_a_candidate_at_its_level() {
        let w = numbers(40, 5, 31).dot(&numbers(5, 64, 37)) + numbers(40, 64, 41) * 0.3;
        let auto = Auto { candidates: Auto::default().candidates, ..Auto::default() };
        let whole = Problem::new("w", w.view(), Budget::Keep(1.0)).dtype(DType::BF16);
        let profile = auto.decompose(std::slice::from_ref(&whole)).unwrap().unwrap();
        assert!(profile.curve.windows(2).all(|p| p[0].bytes < p[1].bytes && p[0].error > p[1].error));
        for &level in &auto.levels {
            let problem = Problem { budget: Budget::Keep(level), ..whole.clone() };
            let group = std::slice::from_ref(&problem);
            let found = auto.assemble(group, &profile).unwrap();
            assert!(found[0].bytes() as f64 <= level * problem.bytes() as f64);
            assert_eq!(auto.factorize(group).unwrap(), found);
            for candidate in &auto.candidates {
                match candidate.factorize(group) {
                    Ok(other) => assert!(problem.error_of(&found[0]) <= problem.error_of(&other[0]) * (1.0 + 1e-12)),
                    Err(why) => assert!(matches!(why, Error::Budget { .. }), "{why}"),
                }
            }
        }
    }

    #[test]
    fn one_candidate_is_that_candidate() {
        let w = numbers(40, 64, 31);
        let problem = Problem::new("w", w.view(), Budget::Keep(0.65)).dtype(DType::BF16);
        let group = std::slice::from_ref(&problem);
        for method in
            [Method::TwoFour(TwoFour::default()), Method::Svd(Svd::default()), Method::Quantize(Quantize::default())]
        {
            let auto = Auto { candidates: vec![method.clone()], ..Auto::default() };
            assert_eq!(auto.factorize(group).unwrap(), method.factorize(group).unwrap());
        }
    }

    #[test]
    fn a_cap_keeps_weights_dense_that_nothing_else_serves() {
        let w = numbers(40, 64, 31);
        let problem = Problem::new("w", w.view(), Budget::Keep(1.0)).dtype(DType::BF16);
        let auto = |cap| Auto { candidates: vec![Method::Svd(Svd::default())], cap: Some(cap), ..Auto::default() };
        let count = |cap| auto(cap).decompose(std::slice::from_ref(&problem)).unwrap().unwrap().curve.len();
        assert_eq!(count(1e-6), 2);
        assert!(count(0.99) > 4);
        let tight = Problem { budget: Budget::Keep(0.5), ..problem.clone() };
        assert!(matches!(auto(1e-6).factorize(&[tight]), Err(Error::Budget { .. })));
        let none = Auto { candidates: Vec::new(), ..Auto::default() };
        assert!(none.factorize(&[problem]).is_err());
    }
}
