//! One byte budget spread over many weights by their measured error curves.
//!
//! Each weight offers points (bytes, error); the choice that minimises the summed error within the
//! budget is a multiple-choice knapsack. Solved on the lower convex hull of each curve by bisection of
//! the Lagrange multiplier λ (minimise error + λ·bytes for each weight alone), then greedily filled
//! with what still fits. The gap to the optimum is at most one step of one weight.

use serde::{Deserialize, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::factorize::Point;
use crate::named::Named;

/// How the budget of a rule is spread over the weights that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Allocate {
    /// Every weight (or group) gets the budget by itself.
    #[default]
    Uniform,
    /// One budget for all of them together.
    Global(Global),
}

/// Parameters of the global allocation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Global {
    /// No weight gets less than this fraction of its uniform share of bytes.
    pub floor: f64,
    /// Whether a weight may be kept dense, at no error.
    pub dense: bool,
    /// What is summed over the weights.
    pub errors: Errors,
    /// The exponent of the squared errors before they are summed: 1 minimises their sum, more spares the
    /// weights that would be hit hardest, as the loss grows faster than the second order tells.
    pub power: f64,
}

/// What an allocation adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Errors {
    /// As they are if the metric weighs outputs by their gradients and so compares weights; relative if not.
    #[default]
    Auto,
    /// Squared errors relative to each weight's own squared norm.
    Relative,
    /// Squared errors as they are.
    Absolute,
}

impl Default for Global {
    fn default() -> Self {
        Global { floor: 0.8, dense: true, errors: Errors::Auto, power: 1.0 }
    }
}

impl Serialize for Allocate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Allocate::Uniform => serializer.serialize_str("uniform"),
            Allocate::Global(global) => global.serialize(serializer),
        }
    }
}

impl Named for Allocate {
    const WHAT: &'static str = "an allocation";
    type Table = Global;
    fn named(name: &str) -> Result<Self> {
        match name {
            "uniform" => Ok(Allocate::Uniform),
            "global" => Ok(Allocate::Global(Global::default())),
            _ => Err(Error::Unsupported(format!("unknown allocation `{name}`, expected one of uniform, global"))),
        }
    }
    fn from_table(global: Global) -> Result<Self> {
        if !(0.0..=1.0).contains(&global.floor) {
            return Err(Error::Unsupported(format!("floor = {}: expected a fraction of 1", global.floor)));
        }
        if !(global.power > 0.0 && global.power <= 16.0) {
            return Err(Error::Unsupported(format!("power = {}: expected a number above 0, at most 16", global.power)));
        }
        Ok(Allocate::Global(global))
    }
}

/// A weight's offer: its curve, and the least that it must be given.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// Points in any order.
    pub curve: &'a [Point],
    /// Points below this are not considered, unless none is above or the budget leaves no choice.
    pub floor: u64,
}

/// Chooses one point of each offer: the least summed error within `budget` bytes. Returns the number
/// of the chosen point of each. O(N log N) for N points in all.
///
/// # Errors
/// [`Error::Budget`] if even the cheapest points exceed the budget.
pub fn allocate(offers: &[Offer<'_>], budget: u64) -> Result<Vec<usize>> {
    if offers.iter().any(|offer| offer.curve.is_empty()) {
        return Err(Error::shape("at least one point for each weight", 0));
    }
    let hulls = |floors: bool| -> Vec<Vec<usize>> { offers.iter().map(|offer| lower_hull(offer, floors)).collect() };
    let least =
        |hulls: &[Vec<usize>]| -> u64 { offers.iter().zip(hulls).map(|(o, hull)| o.curve[hull[0]].bytes).sum() };
    let mut hulls_used = hulls(true);
    if least(&hulls_used) > budget {
        // Few and coarse choices: the floors give way, the budget does not.
        hulls_used = hulls(false);
    }
    let (hulls, least) = (&hulls_used, least(&hulls_used));
    if least > budget {
        return Err(Error::Budget { asked: format!("{budget} bytes"), least: format!("{least} bytes") });
    }
    // Slopes of all hull steps, steepest first, are the candidates for λ: the best budget-feasible
    // choice takes every step above some slope.
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (which, (offer, hull)) in offers.iter().zip(hulls).enumerate() {
        for (at, pair) in hull.windows(2).enumerate() {
            let (from, to) = (offer.curve[pair[0]], offer.curve[pair[1]]);
            steps.push(((from.error - to.error) / (to.bytes - from.bytes) as f64, which, at + 1));
        }
    }
    // Equal slopes are taken in order of the weights, so that the result is the same everywhere.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let (mut position, mut spent) = (vec![0usize; offers.len()], least);
    for (_, which, step) in steps {
        let (curve, hull) = (offers[which].curve, &hulls[which]);
        let more = curve[hull[step]].bytes - curve[hull[step - 1]].bytes;
        // A step that does not fit ends its weight's climb; cheaper ones of others may still fit.
        if position[which] + 1 == step && spent + more <= budget {
            position[which] = step;
            spent += more;
        }
    }
    let mut choice: Vec<usize> = hulls.iter().zip(&position).map(|(hull, &at)| hull[at]).collect();
    // What is left buys points off the hull.
    for (offer, chosen) in offers.iter().zip(&mut choice) {
        let (now, left) = (offer.curve[*chosen], budget - spent);
        let better =
            offer.curve.iter().enumerate().filter(|(_, p)| p.bytes >= offer.floor && p.bytes <= now.bytes + left);
        let best = better.min_by(|a, b| a.1.error.total_cmp(&b.1.error).then(a.1.bytes.cmp(&b.1.bytes)));
        if let Some((index, point)) = best.filter(|(_, p)| p.error < now.error) {
            *chosen = index;
            spent = spent - now.bytes + point.bytes;
        }
    }
    Ok(choice)
}

/// Indices of the lower convex hull of the points at or above the floor: bytes rise, errors fall, and
/// each step buys no more than the one before.
fn lower_hull(offer: &Offer<'_>, floors: bool) -> Vec<usize> {
    let floor = if floors { offer.floor } else { 0 };
    let mut order: Vec<usize> = (0..offer.curve.len()).filter(|&i| offer.curve[i].bytes >= floor).collect();
    if order.is_empty() {
        order = (0..offer.curve.len()).collect();
    }
    order.sort_by(|&a, &b| {
        let (a, b) = (offer.curve[a], offer.curve[b]);
        a.bytes.cmp(&b.bytes).then(a.error.total_cmp(&b.error))
    });
    let mut hull: Vec<usize> = Vec::new();
    for i in order {
        let point = offer.curve[i];
        if hull.last().is_some_and(|&last| offer.curve[last].error <= point.error) {
            continue;
        }
        while let [.., before, last] = hull[..] {
            let (a, b) = (offer.curve[before], offer.curve[last]);
            // b lies above the line from a to the new point. (On the line it stays: small steps fit where
            // the large one over it does not.)
            let line = (a.error - point.error) * (b.bytes - a.bytes) as f64;
            if (a.error - b.error) * (point.bytes - a.bytes) as f64 >= line {
                break;
            }
            hull.pop();
        }
        hull.push(i);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: &[(u64, f64)]) -> Vec<Point> {
        points.iter().map(|&(bytes, error)| Point { bytes, error }).collect()
    }

    #[test]
    fn near_the_best_of_all_choices_and_never_over_budget() {
        let curves = [
            curve(&[(0, 9.0), (2, 5.0), (4, 4.5), (5, 1.0), (9, 0.0)]),
            curve(&[(1, 8.0), (3, 2.0), (6, 1.5), (8, 0.0)]),
            curve(&[(2, 3.0), (4, 2.9), (10, 0.0)]),
        ];
        let offers: Vec<Offer<'_>> = curves.iter().map(|curve| Offer { curve, floor: 0 }).collect();
        for budget in 3..=27 {
            let choice = allocate(&offers, budget).unwrap();
            let cost: u64 = choice.iter().zip(&curves).map(|(&i, c)| c[i].bytes).sum();
            let error: f64 = choice.iter().zip(&curves).map(|(&i, c)| c[i].error).sum();
            assert!(cost <= budget);
            let mut best = f64::INFINITY;
            for a in &curves[0] {
                for b in &curves[1] {
                    for c in &curves[2] {
                        if a.bytes + b.bytes + c.bytes <= budget {
                            best = best.min(a.error + b.error + c.error);
                        }
                    }
                }
            }
            // One step of one weight is the guarantee; the largest step here buys 6.
            assert!(error <= best + 6.0, "budget {budget}: {error} against {best}");
            if budget == 27 {
                assert_eq!(error, 0.0);
            }
        }
        assert!(matches!(allocate(&offers, 2), Err(Error::Budget { .. })));
    }

    #[test]
    fn the_floor_counts() {
        let line = curve(&[(0, 10.0), (5, 5.0), (10, 0.0)]);
        let steep = curve(&[(0, 20.0), (5, 10.0), (10, 0.0)]);
        let offers = |floor| [Offer { curve: &line, floor }, Offer { curve: &steep, floor: 0 }];
        assert_eq!(allocate(&offers(0), 10).unwrap(), [0, 2]);
        assert_eq!(allocate(&offers(5), 10).unwrap(), [1, 1]);
    }
}
