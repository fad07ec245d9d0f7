//! How a weight is compressed: one method, one file.
//!
//! A method minimises the **metric** of W − Ŵ over all Ŵ of its **structure** within a **budget**.
//! It takes a group of problems (a lone matrix is a group of one) and returns one operator for each.

use std::fmt::Debug;

use ndarray::{Array2, ArrayView2};
use serde::{Deserialize, Serialize};

use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::linalg::{Backend, Faer};
use crate::metric::{Metric, MetricSpec};
use crate::operator::{Dense, LinearOperator, Operator};
use crate::scalar::{DType, Real, check_finite};
use crate::tensor::Source;

mod armor;
mod auto;
mod bitmask;
mod cosine;
mod cospadi;
mod group;
mod masa;
mod method;
mod mixed;
mod monarch;
mod pivot;
mod quantize;
mod residual;
mod sparse;
mod subset;
mod svd;
mod two_four;

pub use self::armor::{Armor, Solver};
pub use self::auto::Auto;
pub use self::bitmask::Bitmask;
pub use self::cosine::{Along, Atoms, Cosine, Score, Select};
pub use self::cospadi::{Coding, Cospadi, Init};
pub use self::masa::Masa;
pub use self::method::Method;
pub use self::mixed::Mixed;
pub use self::monarch::{Chunks, Groups, Monarch, Ranks};
pub use self::quantize::{Quantize, Rounding};
pub use self::residual::Residual;
pub use self::sparse::Start;
pub use self::svd::{Form, Route, Share, Svd};
pub use self::two_four::TwoFour;
pub use crate::coder::Rule;

/// One weight to compress.
#[derive(Debug, Clone)]
pub struct Problem<'a, T: Real> {
    /// The tensor's name; it goes into errors and seeds.
    pub name: &'a str,
    /// W, m×n: outputs × inputs.
    pub weight: ArrayView2<'a, T>,
    /// The dtype that W is stored in and the factors will be stored in; it prices both.
    pub dtype: DType,
    /// Which error counts.
    pub metric: Metric,
    /// What the result may cost. All problems of a group carry the group's budget.
    pub budget: Budget,
    /// Seed of whatever is random.
    pub seed: u64,
    /// Who computes.
    pub backend: &'a dyn Backend,
}

/// A [`Problem`] of which rows are read when they are needed.
#[derive(Debug, Clone)]
pub struct InParts<'a, T: Real> {
    /// The tensor's name.
    pub name: &'a str,
    /// W, m×n.
    pub weight: &'a dyn Source<T>,
    /// The dtype that prices it.
    pub dtype: DType,
    /// Which error counts.
    pub metric: Metric,
    /// What the group may cost.
    pub budget: Budget,
    /// Seed of whatever is random.
    pub seed: u64,
    /// Who computes.
    pub backend: &'a dyn Backend,
}

impl<'a, T: Real> InParts<'a, T> {
    /// A problem that is in memory, in this form.
    pub fn of(problem: &'a Problem<'_, T>) -> Self {
        let Problem { name, ref weight, dtype, ref metric, budget, seed, backend } = *problem;
        InParts { name, weight, dtype, metric: metric.clone(), budget, seed, backend }
    }

    /// The problem with another weight in the place of this one, such as itself, read as a whole.
    pub fn whole<'w>(&self, weight: ArrayView2<'w, T>) -> Problem<'w, T>
    where
        'a: 'w,
    {
        let InParts { name, dtype, ref metric, budget, seed, backend, .. } = *self;
        Problem { name, weight, dtype, metric: metric.clone(), budget, seed, backend }
    }

    /// (m, n).
    pub fn shape(&self) -> (usize, usize) {
        self.weight.dim()
    }
}

impl<'a, T: Real> Problem<'a, T> {
    /// A problem with the plain metric, the compute type as storage, seed 0 and the default backend.
    pub fn new(name: &'a str, weight: ArrayView2<'a, T>, budget: Budget) -> Self {
        Problem { name, weight, dtype: T::DTYPE, metric: Metric::frobenius(), budget, seed: 0, backend: &Faer }
    }

    /// The same problem under another metric.
    pub fn metric(self, metric: Metric) -> Self {
        Problem { metric, ..self }
    }

    /// The same problem with another storage dtype.
    pub fn dtype(self, dtype: DType) -> Self {
        Problem { dtype, ..self }
    }

    /// (m, n).
    pub fn shape(&self) -> (usize, usize) {
        self.weight.dim()
    }

    /// Bytes of W as it is stored now.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.weight.len()) as u64
    }

    /// The weight as it is.
    pub(crate) fn dense(&self) -> Result<Vec<Operator<T>>> {
        Ok(vec![Operator::Dense(Dense::rounded(self.weight.to_owned(), self.dtype)?)])
    }

    /// Squared metric error of an operator in the place of W.
    pub(crate) fn error_of(&self, operator: &Operator<T>) -> f64 {
        self.metric.squared((&self.weight - &operator.to_dense()).view(), self.backend)
    }

    /// Refuses weights that are not finite and metrics that do not fit the shape.
    ///
    /// # Errors
    /// [`Error::NonFinite`], [`Error::Shape`].
    pub fn check(&self) -> Result<()> {
        check_finite("weight", self.weight.iter())?;
        check_metric(&self.metric, self.shape())?;
        self.budget.check()
    }
}

/// Refuses metrics that do not fit a shape.
fn check_metric(metric: &Metric, (m, n): (usize, usize)) -> Result<()> {
    use crate::metric::Weighting;
    for (weighting, len) in [(&metric.output, m), (&metric.input, n)] {
        let got = match weighting {
            Weighting::Identity => len,
            Weighting::Diagonal(d) => d.len(),
            Weighting::Gram(gram) => gram.dim(),
        };
        if got != len {
            return Err(Error::shape(format!("statistics of {len} for a weight of {m}x{n}"), got));
        }
    }
    Ok(())
}

/// The only problem of a group, checked.
fn single<'g, 'a, T: Real>(group: &'g [Problem<'a, T>], method: &str) -> Result<&'g Problem<'a, T>> {
    let [problem] = group else {
        return Err(Error::Unsupported(format!("{method} compresses one weight at a time, not {}", group.len())));
    };
    problem.check().map_err(|e| e.of_tensor(problem.name))?;
    Ok(problem)
}

/// One choice on the way from nothing to everything.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Bytes on disk of the whole group.
    pub bytes: u64,
    /// Squared metric error of the whole group.
    pub error: f64,
}

/// What a method computed once and can cut at any budget: the price list for allocation.
#[derive(Debug, Clone, Default)]
pub struct Decomposition<T: Real> {
    /// Squared metric norm of the group's weights.
    pub norm_squared: f64,
    /// Bytes and error of every choice, by its number (for low rank: its rank; 0 keeps nothing). The
    /// last one is the group itself, kept dense at no error.
    pub curve: Vec<Point>,
    /// Whatever [`Factorize::assemble`] needs, as matrices, so that it can be kept on disk.
    pub state: Vec<Array2<T>>,
    /// What a reader of the report should know, such as the measured quality of an approximation.
    pub notes: Vec<String>,
    /// For methods that solve each choice by itself: its operators, by its number. Empty for the others.
    pub solved: Vec<Option<Vec<Operator<T>>>>,
}

impl<T: Real> Decomposition<T> {
    /// The choice of least error that a budget allows.
    ///
    /// # Errors
    /// [`Error::Budget`] if even the cheapest choice is over it.
    pub fn choose(&self, budget: &Budget, before: u64) -> Result<usize> {
        let least = |what: String| Error::Budget { asked: budget.to_string(), least: what };
        if let Some(limit) = budget.byte_limit(before) {
            // Choice 0 keeps nothing: only a zero weight is worth that.
            let nothing = self.curve.first().is_some_and(|point| point.error > 0.0);
            let within = self.curve.iter().enumerate().skip(nothing.into()).filter(|(_, point)| point.bytes <= limit);
            let best = within.min_by(|a, b| a.1.error.total_cmp(&b.1.error).then(a.1.bytes.cmp(&b.1.bytes)));
            let cheapest = self.curve.iter().skip(nothing.into()).map(|point| point.bytes).min().unwrap_or(0);
            return best.map(|(choice, _)| choice).ok_or_else(|| least(format!("{cheapest} bytes of {before}")));
        }
        if let Some(limit) = budget.error_limit(self.norm_squared) {
            let within = self.curve.iter().enumerate().filter(|(_, point)| point.error <= limit);
            let best = within.min_by_key(|(_, point)| point.bytes);
            let lowest = self.curve.iter().map(|point| point.error).fold(f64::INFINITY, f64::min);
            let lowest = (lowest.max(0.0) / self.norm_squared.max(f64::MIN_POSITIVE)).sqrt();
            return best.map(|(choice, _)| choice).ok_or_else(|| least(format!("a relative error of {lowest:.3e}")));
        }
        match *budget {
            // A limit, not a demand: a weight of lower rank gets by with that.
            Budget::Rank(rank) if self.curve.len() >= 2 => Ok(rank.min(self.curve.len() - 2)),
            _ => Err(least("a decomposition with at least one choice".into())),
        }
    }
}

/// What a plan can say about a group before any work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forecast {
    /// Bytes on disk of the result: exact if `exact`, else an upper bound.
    pub bytes: u64,
    /// Whether `bytes` is what will be written.
    pub exact: bool,
    /// Peak working memory in bytes, weights and statistics included.
    pub memory: u64,
}

/// The outline of a weight: all that a plan knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outline {
    /// (m, n).
    pub shape: (usize, usize),
    /// The dtype that prices it.
    pub dtype: DType,
}

impl Outline {
    /// Bytes as it is stored now.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(self.shape.0 * self.shape.1) as u64
    }
}

/// A way to compress weights. Anybody may implement it; the built-in ones are in [`Method`].
pub trait Factorize<T: Real>: Debug + Send + Sync {
    /// Compresses a group: one operator for each problem, in order, within the group's budget.
    ///
    /// # Errors
    /// [`Error::Budget`] if the structure cannot be that cheap; [`Error::NonFinite`],
    /// [`Error::Shape`], [`Error::Numerical`] for problems that cannot be solved.
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>>;

    /// The same, with what a reader of the report should know added to `notes`.
    ///
    /// # Errors
    /// As [`factorize`](Self::factorize).
    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        match self.decompose(group)? {
            Some(found) => {
                notes.extend(found.notes.iter().cloned());
                self.assemble(group, &found)
            }
            None => self.factorize(group),
        }
    }

    /// Whether a group may come in parts, and need not be in memory as a whole.
    fn takes_parts(&self) -> bool {
        false
    }

    /// The same as [`factorize_noting`](Self::factorize_noting) for weights that are read when they are needed, by methods
    /// that take them so.
    ///
    /// # Errors
    /// As [`factorize`](Self::factorize); [`Error::Unsupported`] if the method does not.
    fn factorize_parts(&self, group: &[InParts<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        let _ = (group, notes);
        Err(Error::Unsupported("this method needs whole weights".into()))
    }

    /// Computes what serves every budget, for methods that can: the error curve and the state that
    /// [`assemble`](Self::assemble) cuts. `None` if each budget has to be solved by itself.
    ///
    /// # Errors
    /// As [`factorize`](Self::factorize).
    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        let _ = group;
        Ok(None)
    }

    /// Whether [`decompose`](Self::decompose) returns a curve, and one for every budget: what a global
    /// allocation needs. A plan asks before any work.
    fn has_curve(&self) -> bool {
        false
    }

    /// Cuts a decomposition at the group's budget. Equal to [`factorize`](Self::factorize), at less cost.
    ///
    /// # Errors
    /// As [`factorize`](Self::factorize).
    fn assemble(&self, group: &[Problem<'_, T>], decomposition: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let _ = decomposition;
        self.factorize(group)
    }

    /// Bytes and memory of a group at a budget, from its outline.
    ///
    /// # Errors
    /// [`Error::Budget`] with the least possible cost; [`Error::Unsupported`] for a metric that this
    /// structure cannot minimise.
    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast>;
}

impl<T: Real, F: Factorize<T> + ?Sized> Factorize<T> for Box<F> {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        (**self).factorize(group)
    }
    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        (**self).factorize_noting(group, notes)
    }
    fn takes_parts(&self) -> bool {
        (**self).takes_parts()
    }
    fn factorize_parts(&self, group: &[InParts<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        (**self).factorize_parts(group, notes)
    }
    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        (**self).decompose(group)
    }
    fn has_curve(&self) -> bool {
        (**self).has_curve()
    }
    fn assemble(&self, group: &[Problem<'_, T>], decomposition: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        (**self).assemble(group, decomposition)
    }
    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        (**self).forecast(group, metric, budget)
    }
}
