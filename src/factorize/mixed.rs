//! Quantisation with a width of its own for each row: every output gets the bits that its error is worth.
//!
//! > min Σᵢ eᵢ(bᵢ)  with  Σᵢ bytesᵢ(bᵢ) ≤ budget,  bᵢ in 2 … 8
//!
//! A metric that weighs outputs one by one makes the error of a weight the sum of its rows' errors, and what a row
//! of b bits loses does not depend on the widths of the others. So the whole weight is quantised once for each width
//! ([`Quantize`]), and each row chooses among its results as weights choose under a
//! global budget ([`allocate`](crate::allocate)). This is reverse water-filling over rows (Cover and Thomas, Elements of
//! Information Theory, 10.3.3), with widths that exist; Radio (Young, ICML 2025) spreads bits over groups of a model so.
//!
//! What it gains over one width is the ratio of the arithmetic to the geometric mean of what rows are worth:
//! little where all outputs are alike, a third of the error where metrics know gradients (`gram-fisher`), more where
//! a few rows stand out. Rows of one width are one matrix; they cost 3 bits for each row beside, and a product one
//! pass more for each width.
//!
//! Cost: seven times that of `quantize`. Fails where the metric does not tell outputs apart (`frobenius`, rows of
//! one size): then it is `quantize`.

use serde::{Deserialize, Serialize};

use super::sparse::{outline, single};
use super::{Decomposition, Factorize, Forecast, Outline, Point, Problem, Quantize};
use crate::allocate::{Offer, allocate};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::metric::{MetricSpec, Weighting};
use crate::operator::{LinearOperator, Operator, Quantized, Stacked};
use crate::scalar::Real;

/// Rows of different widths.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Mixed {
    /// How each row is quantised; without `bits` and `inner`.
    pub quantize: Quantize,
}

/// A weight at every width, and what each row of it costs and loses.
struct Rows<T: Real> {
    widths: Vec<Quantized<T>>,
    /// Row by row, by width.
    curves: Vec<Vec<Point>>,
    norm_squared: f64,
}

impl Mixed {
    fn check(&self) -> Result<()> {
        if self.quantize.bits.is_some() || self.quantize.inner.is_some() {
            return Err(Error::Unsupported(
                "mixed chooses the widths of a weight's rows: no `bits`, no `inner`".into(),
            ));
        }
        Ok(())
    }

    /// The group's weight at every width.
    fn rows<T: Real>(&self, problem: &Problem<'_, T>, notes: &mut Vec<String>) -> Result<Rows<T>> {
        self.check()?;
        let (m, output) = (problem.shape().0, &problem.metric.output);
        let weighs = |row: usize| match output {
            Weighting::Diagonal(d) => d[row],
            _ => 1.0,
        };
        if matches!(output, Weighting::Gram(_)) {
            return Err(Error::Unsupported("mixed needs a metric that weighs outputs one by one".into()));
        }
        let norm_squared = problem.metric.norm_squared(problem.weight, problem.backend);
        let (mut widths, mut curves) = (Vec::new(), vec![Vec::new(); m]);
        for bits in self.quantize.widths() {
            notes.clear();
            let found = self.quantize.codes(problem, bits, notes)?;
            let gap = (&problem.weight - &found.to_dense()).mapv(|v| v.wide());
            let weighed = problem.metric.input.times(gap.view(), problem.backend);
            let bytes = found.bytes() / m.max(1) as u64;
            for (i, curve) in curves.iter_mut().enumerate() {
                let error = weighs(i) * gap.row(i).dot(&weighed.row(i));
                curve.push(Point { bytes, error: error.max(0.0) });
            }
            widths.push(found);
        }
        Ok(Rows { widths, curves, norm_squared })
    }
}

impl<T: Real> Rows<T> {
    /// Bytes and error if all rows have one width.
    fn point(&self, width: usize) -> Point {
        let each = self.curves.iter().map(|curve| curve[width]);
        each.fold(Point { bytes: 0, error: 0.0 }, |sum, p| Point {
            bytes: sum.bytes + p.bytes,
            error: sum.error + p.error,
        })
    }

    /// The best rows within so many bytes.
    fn within(&self, limit: u64) -> Result<(Point, Operator<T>)> {
        // What the places of rows would cost if all widths were used; a lone width needs none.
        let places = Stacked::<T>::place_bytes(self.curves.len(), self.widths.len());
        let offers: Vec<Offer<'_>> = self.curves.iter().map(|curve| Offer { curve, floor: 0 }).collect();
        let alone = (0..self.widths.len()).rev().find(|&width| self.point(width).bytes <= limit);
        let mixed = match allocate(&offers, limit.saturating_sub(places)) {
            Ok(choice) => Some(choice),
            Err(Error::Budget { .. }) if alone.is_some() => None,
            Err(why) => return Err(why),
        };
        let error = |choice: &[usize]| choice.iter().zip(&self.curves).map(|(&at, curve)| curve[at].error).sum::<f64>();
        match (mixed, alone) {
            (Some(choice), Some(width)) if error(&choice) < self.point(width).error => self.of(&choice),
            (Some(choice), None) => self.of(&choice),
            (_, Some(width)) => Ok((self.point(width), Operator::Quantized(self.widths[width].clone()))),
            (None, None) => {
                Err(Error::Budget { asked: format!("{limit} bytes"), least: format!("{} bytes", self.point(0).bytes) })
            }
        }
    }

    /// Rows of the widths chosen.
    fn of(&self, choice: &[usize]) -> Result<(Point, Operator<T>)> {
        let (mut parts, mut places) = (Vec::new(), vec![0u8; choice.len()]);
        for (width, whole) in self.widths.iter().enumerate() {
            let own: Vec<usize> = (0..choice.len()).filter(|&row| choice[row] == width).collect();
            if own.is_empty() {
                continue;
            }
            own.iter().for_each(|&row| places[row] = parts.len() as u8);
            parts.push(Operator::Quantized(whole.select(&own)?));
        }
        let operator = match parts.len() {
            1 => parts.remove(0),
            _ => Operator::Stacked(Stacked::new(&places, parts)?),
        };
        let error = choice.iter().zip(&self.curves).map(|(&at, curve)| curve[at].error).sum();
        Ok((Point { bytes: operator.bytes(), error }, operator))
    }
}

impl<T: Real> Factorize<T> for Mixed {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        self.factorize_noting(group, &mut Vec::new())
    }

    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        let problem = single("mixed", group)?;
        let Some(limit) = problem.budget.byte_limit(problem.bytes()) else {
            return match self.decompose(group)? {
                Some(found) => self.assemble(group, &found),
                None => Ok(Vec::new()),
            };
        };
        self.check()?;
        if limit >= problem.bytes() {
            return problem.dense();
        }
        Ok(vec![self.rows(problem, notes)?.within(limit)?.1])
    }

    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        let (problem, mut notes) = (single("mixed", group)?, Vec::new());
        let rows = self.rows(problem, &mut notes)?;
        let norm_squared = rows.norm_squared;
        let (mut curve, mut solved) = (vec![Point { bytes: 0, error: norm_squared }], vec![None]);
        let last = rows.widths.len() - 1;
        for width in 0..last {
            let (from, to) = (rows.point(width).bytes, rows.point(width + 1).bytes);
            // Below 5 bits a step of a quarter of a bit is what neighbouring widths of others would be.
            let steps = if rows.widths[width].grid().bits() < 5 { 4 } else { 2 };
            let limits = (0..steps).map(|step| from + (to - from) * step / steps);
            for limit in limits.chain((width + 1 == last).then_some(to)) {
                let (point, operator) = rows.within(limit)?;
                // More bytes that buy nothing are no choice.
                if point.bytes < problem.bytes() && curve.last().is_none_or(|before| point.error < before.error) {
                    curve.push(point);
                    solved.push(Some(vec![operator]));
                }
            }
        }
        curve.push(Point { bytes: problem.bytes(), error: 0.0 });
        Ok(Some(Decomposition { norm_squared, curve, notes, solved, ..Decomposition::default() }))
    }

    fn has_curve(&self) -> bool {
        true
    }

    fn assemble(&self, group: &[Problem<'_, T>], found: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let problem = single("mixed", group)?;
        let choice = found.choose(&problem.budget, problem.bytes())?;
        // Choice 0, nothing, is a weight of zeros: any width holds that.
        match found.solved.get(choice.max(1)) {
            Some(Some(operators)) => Ok(operators.clone()),
            _ => problem.dense(),
        }
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        self.check()?;
        let outline = outline("mixed", group, budget)?;
        // What fits in the least width fits.
        let whole = Factorize::<T>::forecast(&self.quantize, group, metric, budget)?;
        let before = outline.bytes();
        let bytes = budget.byte_limit(before).map_or(before, |limit| limit.min(before));
        // Results at every width, and for a curve at those in between.
        Ok(Forecast { bytes, exact: false, memory: whole.memory + 8 * before })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ndarray::Array1;

    use super::*;
    use crate::metric::Metric;
    use crate::scalar::DType;
    use crate::stats::Gram;
    use crate::testing::numbers;

    /// Outputs that matter by 1 to 10⁴.
    fn metric(m: usize, n: usize) -> Metric {
        let x = numbers(n, 3 * n, 5);
        let rows = Array1::from_shape_fn(m, |i| 10f64.powf(((i * 7) % 5) as f64));
        let input = Weighting::Gram(Arc::new(Gram::new("w", x.dot(&x.t())).unwrap()));
        Metric { output: Weighting::Diagonal(Arc::new(rows)), input }
    }

    fn problem(w: &ndarray::Array2<f64>, keep: f64) -> Problem<'_, f64> {
        let budget = Budget::Keep(keep);
        Problem::new("w", w.view(), budget).dtype(DType::BF16).metric(metric(w.nrows(), w.ncols()))
    }

    #[test]
    fn never_behind_one_width_and_far_ahead_where_rows_differ() {
        let w = numbers(40, 64, 3);
        let method = Mixed { quantize: Quantize { group: 32, ..Quantize::default() } };
        for keep in [0.17, 0.22, 0.25, 0.3, 0.4, 0.5, 0.55] {
            let problem = problem(&w, keep);
            let error = |method: &dyn Factorize<f64>| {
                let found = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
                assert!(found.bytes() as f64 <= keep * problem.bytes() as f64, "{keep}: {}", found.bytes());
                problem.error_of(&found)
            };
            let (mixed, one) = (error(&method), error(&method.quantize));
            assert!(mixed <= one * (1.0 + 1e-12), "{keep}: {mixed} {one}");
            if [0.25, 0.3, 0.4].contains(&keep) {
                assert!(mixed < 0.4 * one, "{keep}: {mixed} {one}");
            }
        }
        // Less than two bits for each.
        let tight = method.factorize(&[problem(&w, 0.1)]);
        assert!(matches!(tight, Err(Error::Budget { .. })), "{tight:?}");
        // All of it.
        let whole = method.factorize(&[problem(&w, 1.0)]).unwrap();
        assert!(matches!(whole[0], Operator::Dense(_)));
    }

    #[test]
    fn the_best_choice_of_widths_on_a_small_weight() {
        let w = numbers(3, 16, 3);
        let method = Mixed::default();
        let (problem, mut notes) = (problem(&w, 0.4), Vec::new());
        let rows = method.rows(&problem, &mut notes).unwrap();
        // What is said of rows is so of the whole.
        for width in 0..7 {
            let whole = Operator::Quantized(rows.widths[width].clone());
            let Point { bytes, error } = rows.point(width);
            assert_eq!(bytes, whole.bytes());
            assert!((error / problem.error_of(&whole) - 1.0).abs() < 1e-9);
        }
        let steepest = rows.curves.iter().flatten().map(|p| p.error).fold(0.0, f64::max);
        for limit in rows.point(0).bytes + 2..rows.point(6).bytes {
            let (found, operator) = rows.within(limit).unwrap();
            assert!(found.bytes <= limit && found.bytes == operator.bytes());
            assert!((found.error - problem.error_of(&operator)).abs() <= 1e-9 * rows.norm_squared);
            let mut best = f64::INFINITY;
            for choice in 0..343 {
                let chosen = [choice % 7, choice / 7 % 7, choice / 49].map(|at| at);
                let cost: u64 = chosen.iter().zip(&rows.curves).map(|(&at, curve)| curve[at].bytes).sum();
                if cost + 2 <= limit {
                    best = best.min(chosen.iter().zip(&rows.curves).map(|(&at, curve)| curve[at].error).sum());
                }
            }
            // (One step of one row is what the allocator may miss.)
            assert!(found.error <= best + steepest, "{limit}: {} {best}", found.error);
        }
    }

    #[test]
    fn a_curve_that_falls_and_says_what_it_holds() {
        let w = numbers(40, 64, 3);
        let method = Mixed { quantize: Quantize { group: 32, ..Quantize::default() } };
        let problem = problem(&w, 0.33);
        let group = std::slice::from_ref(&problem);
        let found = method.decompose(group).unwrap().unwrap();
        assert!(found.curve.len() > 12, "{:?}", found.curve);
        for (pair, solved) in found.curve.windows(2).zip(&found.solved[1..]) {
            assert!(pair[1].bytes > pair[0].bytes && pair[1].error < pair[0].error, "{pair:?}");
            let Some(operators) = solved else { continue };
            assert_eq!(Operator::total_bytes(operators), pair[1].bytes);
            assert!((problem.error_of(&operators[0]) - pair[1].error).abs() <= 1e-9 * found.norm_squared);
        }
        let cut = method.assemble(group, &found).unwrap().remove(0);
        assert!(cut.bytes() as f64 <= 0.33 * problem.bytes() as f64);
        // Cut where it has a step, and solved for that budget alone: the same.
        let at = found.curve[8];
        let exact = Problem { budget: Budget::Bytes(at.bytes), ..problem.clone() };
        let alone = method.factorize(std::slice::from_ref(&exact)).unwrap().remove(0);
        assert!(problem.error_of(&alone) <= at.error * (1.0 + 1e-9));
    }

    #[test]
    fn what_it_cannot_do_is_said() {
        let w = numbers(8, 8, 3);
        for quantize in [
            Quantize { bits: Some(4), ..Quantize::default() },
            Quantize { inner: Some(Box::new(super::super::Method::Svd(Default::default()))), ..Quantize::default() },
        ] {
            let refused = Mixed { quantize }.factorize(&[problem(&w, 0.3)]);
            assert!(matches!(refused, Err(Error::Unsupported(_))));
        }
        let gram = Weighting::Gram(Arc::new(Gram::new("w", ndarray::Array2::eye(8)).unwrap()));
        let metric = Metric { output: gram, input: Weighting::Identity };
        let refused = Mixed::default().factorize(&[problem(&w, 0.3).metric(metric)]);
        assert!(matches!(refused, Err(Error::Unsupported(_))));
    }
}
