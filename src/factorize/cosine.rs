//! Projection on chosen rows of a fixed orthogonal transform (DCT column selection).
//!
//! > Ŵ = C·Q_I (right), Q_Iᵀ·C (left) or Q_Iᵀ·C·P_J (both),
//!
//! with Q, P a DCT-II, DCT-III, Hadamard matrix or the identity. The transform costs nothing to store, so that
//! the bytes are those of C and of the indices; with Q = I it drops inputs (or outputs) and makes the others
//! compensate. Plain metric: C = (W·Qᵀ)_I and the r largest column energies are the best choice, with
//! error² = ‖W‖² − kept ≤ (1 − r/n)·‖W‖² (Modoranu et al., *FFT-based Dynamic Subspace Selection*,
//! arXiv:2505.17967, from where the idea comes; there for gradients). Under a metric the coefficients are solved for
//! again, C = W·A·Q_Iᵀ·(Q_I·A·Q_Iᵀ)⁻¹, see [`subset`](super::subset).
//!
//! Metrics: the *coefficients* are exact for all of them, on every side. Right: A enters through Q·A·Qᵀ, B
//! drops out of C and only weighs the choice. Left: the same with A and B exchanged. Both: the minimiser is
//! the two projections one after the other. A Gram matrix gets the ridge 10⁻⁶·mean diagonal, towards the plain
//! projection. The *choice* of atoms is optimal where they do not interact (right with A = I, left with
//! B = I, identity basis with a diagonal metric), greedy elsewhere, alternating for `both`. With `refit = false` the
//! plain coefficients are kept, which minimises a metric without weights on the transformed side only: a
//! plan that asks for more is refused, while a direct call measures what it gives.
//!
//! Cost: O(mn·log n), and about 2n³ + 4mn² flops under a metric, for each transform that is tried. Fails
//! (against low rank) wherever rows are not smooth in their index, which trained weights are not.

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use self::two_sided::{core_bytes, steps};
use super::subset::{Coupling, Rule};
pub use super::subset::{Score, Select};
use super::{Decomposition, Factorize, Forecast, Outline, Point, Problem, single};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::linalg::Transform;
use crate::metric::{InputMetric, Metric, MetricSpec, OutputMetric, Weighting};
use crate::operator::{Basis, Dense, IndexSet, Operator, Side};
use crate::scalar::{DType, Real};

mod two_sided;

/// Projection on chosen rows of an orthogonal transform.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Cosine {
    /// The transform.
    pub basis: Atoms,
    /// Which side of W is transformed.
    pub side: Along,
    /// How large an atom's coefficients are.
    pub score: Score,
    /// How atoms are chosen under a metric in which they interact.
    pub select: Select,
    /// Whether coefficients are solved for in the metric.
    pub refit: bool,
}

impl Default for Cosine {
    fn default() -> Self {
        let (score, select) = (Score::default(), Select::default());
        Cosine { basis: Atoms::Auto, side: Along::Auto, score, select, refit: true }
    }
}

/// The transform that atoms are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Atoms {
    /// Whichever of the others gives the least error in the metric.
    #[default]
    Auto,
    /// Inputs (or outputs) themselves.
    Identity,
    /// DCT-II.
    Dct2,
    /// DCT-III.
    Dct3,
    /// Walsh–Hadamard; the length must be a power of two.
    Hadamard,
}

/// The side of W that is transformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Along {
    /// Right or left, whichever gives the smaller error at the budget's bytes.
    #[default]
    Auto,
    /// Inputs: C is m×r.
    Right,
    /// Outputs: C is r×n.
    Left,
    /// Both: C is r₁×r₂ with r₁/m ≈ r₂/n.
    Both,
}

/// One side's error curve over all numbers of kept atoms, by the best transform for each.
struct Table {
    side: Side,
    errors: Vec<f64>,
    /// Position in [`Transform::ALL`] of the transform that has this error.
    kinds: Vec<usize>,
    /// The order of atoms of each transform that was tried.
    orders: [Option<Vec<u32>>; Transform::ALL.len()],
}

impl Cosine {
    /// The transforms to try on all of these lengths.
    fn transforms(&self, lengths: &[usize]) -> Result<Vec<Transform>> {
        let one = match self.basis {
            Atoms::Auto => {
                let all = Transform::ALL.into_iter();
                return Ok(all.filter(|kind| lengths.iter().all(|&n| kind.supports(n))).collect());
            }
            Atoms::Identity => Transform::Identity,
            Atoms::Dct2 => Transform::Dct2,
            Atoms::Dct3 => Transform::Dct3,
            Atoms::Hadamard => Transform::Hadamard,
        };
        lengths.iter().try_for_each(|&n| one.check(n))?;
        Ok(vec![one])
    }

    fn sides(&self) -> &'static [Side] {
        match self.side {
            Along::Right => &[Side::Right],
            Along::Left => &[Side::Left],
            Along::Auto | Along::Both => &[Side::Right, Side::Left],
        }
    }

    fn rule(&self) -> Rule {
        Rule { score: self.score, select: self.select, refit: self.refit }
    }

    fn table<T: Real>(&self, problem: &Problem<'_, T>, side: Side) -> Result<Table> {
        let (inner, outer) = weightings(&problem.metric, side);
        let q = length(side, problem.shape());
        let (mut errors, mut kinds) = (vec![f64::INFINITY; q + 1], vec![0; q + 1]);
        let mut orders = [const { None }; Transform::ALL.len()];
        for kind in self.transforms(&[q])? {
            let coupling = Coupling::new(kind, q, inner)?;
            let order = coupling.order(spectrum(problem, side, kind)?.view(), outer, self.rule(), problem.backend)?;
            let place = Transform::ALL.iter().position(|&k| k == kind).unwrap_or(0);
            for (r, &error) in order.errors.iter().enumerate() {
                if error < errors[r] {
                    (errors[r], kinds[r]) = (error, place);
                }
            }
            orders[place] = Some(order.atoms);
        }
        Ok(Table { side, errors, kinds, orders })
    }

    /// The side that does better at the budget: by error for bytes, by bytes for an error. A number of
    /// atoms is compared at the bytes that it takes on the right.
    fn better<T: Real>(&self, problem: &Problem<'_, T>, mut found: Vec<Decomposition<T>>) -> Result<Decomposition<T>> {
        let budget = match (problem.budget, found.first()) {
            (Budget::Rank(r), Some(right)) => {
                Budget::Bytes(right.curve[r.min(right.curve.len().saturating_sub(2))].bytes)
            }
            (other, _) => other,
        };
        let cost = |d: &Decomposition<T>| {
            d.choose(&budget, problem.bytes()).map(|choice| {
                let point = d.curve[choice];
                if budget.byte_limit(0).is_some() { point.error } else { point.bytes as f64 }
            })
        };
        let costs: Vec<_> = found.iter().map(|d| cost(d).unwrap_or(f64::INFINITY)).collect();
        // The first of the least.
        let best = (0..costs.len()).min_by(|&a, &b| costs[a].total_cmp(&costs[b]));
        best.map(|i| found.swap_remove(i)).ok_or_else(|| Error::shape("a side", 0))
    }
}

/// (inner, outer): the weighting that meets the transform, and the other one.
fn weightings(metric: &Metric, side: Side) -> (&Weighting, &Weighting) {
    match side {
        Side::Right => (&metric.input, &metric.output),
        Side::Left => (&metric.output, &metric.input),
    }
}

/// The length that is transformed.
fn length(side: Side, (m, n): (usize, usize)) -> usize {
    if side == Side::Right { n } else { m }
}

/// W·Qᵀ, or the transpose of Q·W: one vector a row.
fn spectrum<T: Real>(problem: &Problem<'_, T>, side: Side, kind: Transform) -> Result<Array2<T>> {
    kind.rows(if side == Side::Right { problem.weight } else { problem.weight.reversed_axes() })
}

/// Bytes of r kept atoms.
fn bytes(side: Side, shape: (usize, usize), r: usize, dtype: DType) -> u64 {
    let (q, other) = (length(side, shape), shape.0 * shape.1 / length(side, shape).max(1));
    dtype.bytes(r * other) as u64 + IndexSet::bytes_of(q, r)
}

fn basis<T: Real>(kind: Transform, side: Side, len: usize, chosen: &[usize]) -> Result<Operator<T>> {
    let set = IndexSet::new(len, chosen.iter().map(|&f| f as u32).collect())?;
    Ok(Operator::Basis(Basis::new(kind, side, set)?))
}

fn first(order: &[u32], r: usize) -> Vec<usize> {
    let mut chosen: Vec<usize> = order.iter().take(r).map(|&f| f as usize).collect();
    chosen.sort_unstable();
    chosen
}

/// A table as matrices: [kind of every r; side], then one row of atoms for each transform.
fn decomposition<T: Real>(problem: &Problem<'_, T>, table: Table) -> Decomposition<T> {
    let number = |v: usize| T::from_f64(v as f64);
    let q = table.errors.len() - 1;
    let points = table.errors.iter().enumerate();
    let mut curve: Vec<Point> = points
        .map(|(r, &error)| Point { bytes: bytes(table.side, problem.shape(), r, problem.dtype), error })
        .collect();
    curve.push(Point { bytes: problem.bytes(), error: 0.0 });
    let side = number((table.side == Side::Left).into());
    let plan = Array2::from_shape_fn((2, q + 1), |(i, r)| if i == 0 { number(table.kinds[r]) } else { side });
    let atoms = Array2::from_shape_fn((Transform::ALL.len(), q), |(kind, t)| {
        table.orders[kind].as_ref().map_or(T::zero(), |order| number(order[t] as usize))
    });
    Decomposition { norm_squared: table.errors[0], curve, state: vec![plan, atoms], ..Decomposition::default() }
}

impl<T: Real> Factorize<T> for Cosine {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        match self.decompose(group)? {
            Some(decomposition) => self.assemble(group, &decomposition),
            None => self.two_sided(single(group, "cosine")?),
        }
    }

    /// With side `auto` the side is settled here, at the budget that the problem carries.
    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        let problem = single(group, "cosine")?;
        if self.side == Along::Both {
            return Ok(None);
        }
        let tables = self.sides().iter().map(|&side| Ok(decomposition(problem, self.table(problem, side)?)));
        self.better(problem, tables.collect::<Result<_>>()?).map(Some)
    }

    fn has_curve(&self) -> bool {
        self.side != Along::Both
    }

    fn assemble(&self, group: &[Problem<'_, T>], decomposition: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let problem = single(group, "cosine")?;
        let choice = decomposition.choose(&problem.budget, problem.bytes())?;
        let [plan, atoms] = decomposition.state.as_slice() else {
            return Err(Error::shape("a plan and its atoms", decomposition.state.len()));
        };
        if choice + 1 == decomposition.curve.len() {
            return problem.dense();
        }
        let bad = || Error::shape("a decomposition of this weight", (plan.dim(), atoms.dim()));
        let side = if plan.get((1, choice)).ok_or_else(bad)?.wide() == 0.0 { Side::Right } else { Side::Left };
        let place = plan[(0, choice)].wide() as usize;
        let kind = *Transform::ALL.get(place).ok_or_else(bad)?;
        let q = length(side, problem.shape());
        if atoms.dim() != (Transform::ALL.len(), q) || choice > q {
            return Err(bad());
        }
        let order: Vec<u32> = atoms.row(place).iter().map(|v| v.wide() as u32).collect();
        let chosen = first(&order, choice);
        let right = basis(kind, side, q, &chosen)?;
        let coupling = Coupling::new(kind, q, weightings(&problem.metric, side).0)?;
        let spectrum = spectrum(problem, side, kind)?;
        let c = coupling.coefficients(spectrum.view(), &chosen, self.refit, problem.backend)?;
        let operator = match side {
            Side::Right => vec![Operator::Dense(Dense::rounded(c, problem.dtype)?), right],
            Side::Left => vec![right, Operator::Dense(Dense::rounded(c.reversed_axes(), problem.dtype)?)],
        };
        Ok(vec![Operator::product_of(operator)?])
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        budget.check()?;
        let &[Outline { shape, dtype }] = group else {
            return Err(Error::Unsupported(format!("cosine compresses one weight at a time, not {}", group.len())));
        };
        let sides = self.sides();
        let transformed = |side| sides.contains(&side);
        if !self.refit
            && (metric.input != InputMetric::Identity && transformed(Side::Right)
                || metric.output != OutputMetric::Identity && transformed(Side::Left))
        {
            let fitting = match self.side {
                Along::Right => "frobenius, fisher-rows",
                Along::Left => "frobenius, fisher, activation, gram",
                Along::Auto | Along::Both => "frobenius",
            };
            return Err(Error::Unsupported(format!(
                "cosine with `refit = false` does not minimise {metric}: use {fitting}, or `refit = true`"
            )));
        }
        let lengths: Vec<usize> = sides.iter().map(|&side| length(side, shape)).collect();
        if self.basis != Atoms::Auto {
            self.transforms(&lengths)?;
        }
        let before = group[0].bytes();
        let two = self.side == Along::Both;
        // Bytes of a number of atoms (of a step for two sides), and the largest such number.
        let price =
            |side, r| if two { core_bytes(shape, steps(shape, r), dtype) } else { bytes(side, shape, r, dtype) };
        let most = |side| if two { shape.0.max(shape.1) } else { length(side, shape) };
        let of_budget = |&side: &Side| match (*budget, budget.byte_limit(before)) {
            (_, Some(limit)) if limit >= before => Some(before),
            (_, Some(limit)) => (1..=most(side)).rev().map(|r| price(side, r)).find(|&bytes| bytes <= limit),
            (Budget::Rank(r), _) if two => Some(core_bytes(shape, (r.min(shape.0), r.min(shape.1)), dtype)),
            (Budget::Rank(r), _) => Some(price(side, r.min(most(side)))),
            _ => Some(before),
        };
        let found: Vec<u64> = sides.iter().filter_map(of_budget).collect();
        let Some(&bytes) = found.iter().max() else {
            let least = sides.iter().map(|&side| price(side, 1)).min().unwrap_or(before);
            return Err(Error::Budget { asked: budget.to_string(), least: format!("{least} bytes of {before}") });
        };
        let open = matches!(budget, Budget::Energy(_) | Budget::Error(_));
        let exact = !open && found.iter().all(|&other| other == bytes);
        // W, its spectrum and the fold; M, T, the products and the Cholesky factor.
        let q = lengths.iter().max().map_or(0, |&q| q as u64);
        let (area, squares) =
            ((shape.0 * shape.1) as u64, if *metric == MetricSpec::default() { 0 } else { 6 * q * q });
        Ok(Forecast { bytes, exact, memory: 8 * (4 * area + squares) })
    }
}

#[cfg(test)]
mod tests;
