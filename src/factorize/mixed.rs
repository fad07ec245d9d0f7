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
//! little where all outputs are alike, up to a third of the squared error where metrics know gradients (`gram-fisher`), more
//! where a few rows stand out. Rows of one width are one matrix; they cost 3 bits for each row beside, and a product one
//! pass more for each width.
//!
//! Cost: seven times that of `quantize`. Fails where the metric does not tell outputs apart (`frobenius`, rows of
//! one size): then it is `quantize`.

use ndarray::Array2;
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
    /// Rows × widths, relative to the squared norm of the weight.
    errors: Array2<T>,
    /// The same as offers, row by row.
    curves: Vec<Vec<Point>>,
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

    /// A weight at every width.
    fn rows<T: Real>(&self, problem: &Problem<'_, T>, norm_squared: f64, notes: &mut Vec<String>) -> Result<Rows<T>> {
        let output = &problem.metric.output;
        if matches!(output, Weighting::Gram(_)) {
            return Err(Error::Unsupported("mixed needs a metric that weighs outputs one by one".into()));
        }
        let widths = self.quantize.widths();
        let mut errors = Array2::zeros((problem.shape().0, widths.len()));
        let mut solved = Vec::new();
        for (&bits, mut errors) in widths.iter().zip(errors.columns_mut()) {
            notes.clear();
            let found = self.quantize.codes(problem, bits, notes)?;
            let gap = (&problem.weight - &found.to_dense()).mapv(|v| v.wide());
            let weighed = problem.metric.input.times(gap.view(), problem.backend);
            for (i, relative) in errors.iter_mut().enumerate() {
                let weight = if let Weighting::Diagonal(d) = output { d[i] } else { 1.0 };
                let error = weight * gap.row(i).dot(&weighed.row(i));
                *relative = T::from_f64(error.max(0.0) / norm_squared.max(f64::MIN_POSITIVE));
            }
            solved.push(found);
        }
        Rows::new(solved, errors)
    }
}

impl<T: Real> Rows<T> {
    fn new(widths: Vec<Quantized<T>>, errors: Array2<T>) -> Result<Self> {
        let m = errors.nrows();
        if widths.is_empty() || errors.ncols() != widths.len() || widths.iter().any(|width| width.shape().0 != m) {
            return Err(Error::shape(format!("errors of {} widths", widths.len()), errors.dim()));
        }
        let bytes: Vec<u64> = widths.iter().map(|width| width.bytes() / m.max(1) as u64).collect();
        let point = |(&bytes, error): (&u64, &T)| Point { bytes, error: error.wide() };
        let curves = errors.rows().into_iter().map(|row| bytes.iter().zip(row).map(point).collect()).collect();
        Ok(Rows { widths, errors, curves })
    }

    /// Bytes and error if all rows have one width.
    fn point(&self, width: usize) -> Point {
        total(self.curves.iter().map(|curve| curve[width]))
    }

    /// The best widths of rows within so many bytes.
    fn within(&self, limit: u64) -> Result<Choice> {
        let offers: Vec<Offer<'_>> = self.curves.iter().map(|curve| Offer { curve, floor: 0 }).collect();
        let (m, count) = (self.curves.len(), self.widths.len());
        let mut choices: Vec<Choice> = Vec::new();
        // One width for all needs no places. Of several it is not known how many will be used.
        let alone = (0..count).rev().find(|&width| self.point(width).bytes <= limit);
        choices.extend(alone.map(|width| self.choice(vec![width; m])));
        for used in [2, 4, count] {
            match allocate(&offers, limit.saturating_sub(Stacked::<T>::place_bytes(m, used))) {
                Ok(widths) => choices.push(self.choice(widths)),
                Err(Error::Budget { .. }) => {}
                Err(why) => return Err(why),
            }
        }
        let within = choices.into_iter().filter(|choice| choice.point.bytes <= limit);
        let order = |a: Point, b: Point| a.error.total_cmp(&b.error).then(a.bytes.cmp(&b.bytes));
        let best = within.min_by(|a, b| order(a.point, b.point));
        let least = || format!("{} bytes", self.point(0).bytes);
        best.ok_or_else(|| Error::Budget { asked: format!("{limit} bytes"), least: least() })
    }

    fn choice(&self, widths: Vec<usize>) -> Choice {
        let all = widths.iter().zip(&self.curves).map(|(&at, curve)| curve[at]);
        let mut point = total(all);
        let used = (0..self.widths.len()).filter(|at| widths.contains(at)).count();
        if used > 1 {
            point.bytes += Stacked::<T>::place_bytes(widths.len(), used);
        }
        Choice { point, widths }
    }

    /// Rows of the widths chosen.
    fn operator(&self, choice: &Choice) -> Result<Operator<T>> {
        let (mut parts, mut places) = (Vec::new(), vec![0u8; choice.widths.len()]);
        for (width, whole) in self.widths.iter().enumerate() {
            let own: Vec<usize> = (0..places.len()).filter(|&row| choice.widths[row] == width).collect();
            if own.len() == places.len() {
                return Ok(Operator::Quantized(whole.clone()));
            }
            if !own.is_empty() {
                own.iter().for_each(|&row| places[row] = parts.len() as u8);
                parts.push(Operator::Quantized(whole.select(&own)?));
            }
        }
        Ok(Operator::Stacked(Stacked::new(&places, parts)?))
    }
}

/// Widths of rows, by their position.
struct Choice {
    point: Point,
    widths: Vec<usize>,
}

fn total(points: impl Iterator<Item = Point>) -> Point {
    let zero = Point { bytes: 0, error: 0.0 };
    points.fold(zero, |sum, p| Point { bytes: sum.bytes + p.bytes, error: sum.error + p.error })
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
        let norm_squared = problem.metric.norm_squared(problem.weight, problem.backend);
        let rows = self.rows(problem, norm_squared, notes)?;
        Ok(vec![rows.operator(&rows.within(limit)?)?])
    }

    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        self.check()?;
        let (problem, mut notes) = (single("mixed", group)?, Vec::new());
        let norm_squared = problem.metric.norm_squared(problem.weight, problem.backend);
        let rows = self.rows(problem, norm_squared, &mut notes)?;
        // The widths themselves, with what they were solved to, and mixtures, which are put together when they are
        // chosen.
        let mut all = vec![(Point { bytes: 0, error: norm_squared }, None)];
        let mut add = |Point { bytes, error }: Point, solved: Option<Vec<Operator<T>>>| {
            if bytes < problem.bytes() || solved.is_some() {
                all.push((Point { bytes, error: error * norm_squared }, solved));
            }
        };
        for (at, width) in rows.widths.iter().enumerate() {
            let here = rows.point(at);
            add(here, Some(vec![Operator::Quantized(width.clone())]));
            let Some(next) = rows.widths.get(at + 1).map(|_| rows.point(at + 1)) else { continue };
            // Below 5 bits a step of a quarter of a bit is what neighbouring widths of others would be.
            let steps = if width.grid().bits() < 5 { 4 } else { 2 };
            for step in 1..=steps {
                add(rows.within(here.bytes + (next.bytes - here.bytes) * step / steps)?.point, None);
            }
        }
        all.sort_by(|a, b| a.0.bytes.cmp(&b.0.bytes).then(b.0.error.total_cmp(&a.0.error)));
        all.push((Point { bytes: problem.bytes(), error: 0.0 }, None));
        let (curve, solved) = all.into_iter().unzip();
        Ok(Some(Decomposition { norm_squared, curve, state: vec![rows.errors], notes, solved }))
    }

    fn has_curve(&self) -> bool {
        true
    }

    fn assemble(&self, group: &[Problem<'_, T>], found: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let problem = single("mixed", group)?;
        let limit = match problem.budget.byte_limit(problem.bytes()) {
            Some(limit) => limit,
            None => found.curve[found.choose(&problem.budget, problem.bytes())?].bytes,
        };
        if limit >= problem.bytes() {
            return problem.dense();
        }
        let widths = found.solved.iter().flatten().flatten().filter_map(|operator| match operator {
            Operator::Quantized(width) => Some(width.clone()),
            _ => None,
        });
        // (Of few columns all widths are one size: their order on the curve says nothing.)
        let mut widths: Vec<Quantized<T>> = widths.collect();
        widths.sort_by_key(|width| width.grid().bits());
        let rows = Rows::new(widths, found.state.first().cloned().unwrap_or_default())?;
        Ok(vec![rows.operator(&rows.within(limit)?)?])
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
        let norm_squared = problem.metric.norm_squared(w.view(), problem.backend);
        let rows = method.rows(&problem, norm_squared, &mut notes).unwrap();
        // What is said of rows is so of the whole.
        for width in 0..7 {
            let whole = Operator::Quantized(rows.widths[width].clone());
            let Point { bytes, error } = rows.point(width);
            assert_eq!(bytes, whole.bytes());
            assert!((error * norm_squared / problem.error_of(&whole) - 1.0).abs() < 1e-9);
        }
        // What the greedy choice may leave unspent: a step of one row, two widths of two bytes at most here.
        let (places, step) = (2, 4);
        for limit in rows.point(0).bytes + 2..rows.point(6).bytes {
            let choice = rows.within(limit).unwrap();
            let (found, operator) = (choice.point, rows.operator(&choice).unwrap());
            assert!(found.bytes <= limit && found.bytes == operator.bytes());
            assert!((found.error - problem.error_of(&operator) / norm_squared).abs() <= 1e-9);
            let mut best = f64::INFINITY;
            for choice in 0..343 {
                let chosen =
                    total([choice % 7, choice / 7 % 7, choice / 49].iter().zip(&rows.curves).map(|(&at, c)| c[at]));
                if chosen.bytes + places + step <= limit {
                    best = best.min(chosen.error);
                }
            }
            assert!(found.error <= best * (1.0 + 1e-12), "{limit}: {} {best}", found.error);
        }
    }

    #[test]
    fn the_curve_is_what_its_cuts_are() {
        let w = numbers(40, 64, 3);
        let method = Mixed { quantize: Quantize { group: 32, ..Quantize::default() } };
        let problem = problem(&w, 0.33);
        let found = method.decompose(std::slice::from_ref(&problem)).unwrap().unwrap();
        assert!(found.curve.len() > 20, "{:?}", found.curve);
        let last = found.curve.len() - 1;
        for point in &found.curve[1..last] {
            let exact = Problem { budget: Budget::Bytes(point.bytes), ..problem.clone() };
            let group = std::slice::from_ref(&exact);
            let cut = method.assemble(group, &found).unwrap();
            // The same as solved for that budget alone.
            assert_eq!(cut, method.factorize(group).unwrap());
            assert!(cut[0].bytes() <= point.bytes);
            assert!(problem.error_of(&cut[0]) <= point.error + 1e-9 * found.norm_squared);
        }
        let close = Problem { budget: Budget::Error(0.02), ..problem.clone() };
        let cut = method.factorize(std::slice::from_ref(&close)).unwrap();
        assert!(problem.error_of(&cut[0]) <= 0.02f64.powi(2) * found.norm_squared && cut[0].bytes() < problem.bytes());
    }

    #[test]
    fn columns_so_few_that_all_widths_are_one_size_and_weights_of_zeros() {
        for w in [numbers(12, 1, 3), numbers(12, 2, 5), Array2::zeros((12, 16))] {
            let found = Mixed::default().decompose(&[problem(&w, 1.0)]).unwrap().unwrap();
            for keep in [0.6, 0.8, 0.95] {
                let problem = problem(&w, keep);
                let group = std::slice::from_ref(&problem);
                match (Mixed::default().factorize(group), Mixed::default().assemble(group, &found)) {
                    (Ok(solved), Ok(cut)) => assert_eq!(solved, cut),
                    (Err(Error::Budget { .. }), Err(Error::Budget { .. })) => {}
                    other => panic!("{keep}: {other:?}"),
                }
            }
        }
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
