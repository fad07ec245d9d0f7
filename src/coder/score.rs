//! One-shot pruning: a score for each weight, and the best of each group kept as they are.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use super::{Coded, Pattern};
use crate::scalar::Real;

/// How weights are chosen, and whether their values change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// |wᵢⱼ|.
    Magnitude,
    /// |wᵢⱼ|·‖xⱼ‖ (Sun et al., ICLR 2024).
    Wanda,
    /// (|wᵢⱼ|/Σᵢ|wᵢⱼ| + |wᵢⱼ|/Σⱼ|wᵢⱼ|)·‖xⱼ‖^½: relative importance and activations (Zhang et al., ICLR 2024).
    Ria,
    /// w̄ᵢⱼ²·‖xⱼ‖² of weights normalised by columns, then by rows: NoWag-P (Liu et al., 2025).
    Nowag,
    /// Left to right, later weights making up for earlier ones (Frantar, Alistarh, ICML 2023).
    Sparsegpt,
    /// Exact coordinate descent in the metric, from the result of `sparsegpt`.
    #[default]
    Coder,
}

/// NoWag's guard against rows and columns of zeros.
const NORM_FLOOR: f64 = 1e-5;

/// W normalised by column norms, then by row norms, in f64: (W̄, rows, columns) with
/// wᵢⱼ = rᵢ·w̄ᵢⱼ·cⱼ.
pub(crate) fn normalised<T: Real>(weight: ArrayView2<'_, T>) -> (Array2<f64>, Array1<f64>, Array1<f64>) {
    let mut w = weight.mapv(Real::wide);
    let norms = |w: &Array2<f64>, axis| w.map_axis(Axis(axis), |v| v.dot(&v).sqrt() + NORM_FLOOR);
    let columns = norms(&w, 0);
    w /= &columns;
    let rows = norms(&w, 1);
    w /= &rows.view().insert_axis(Axis(1));
    (w, rows, columns)
}

/// The score of each weight, m×n, with `squares` the mean square of each input. For the two rules that
/// solve for values it is Wanda's: that of inputs which do not interact.
pub fn scores<T: Real>(rule: Rule, weight: ArrayView2<'_, T>, squares: ArrayView1<'_, f64>) -> Array2<f64> {
    let sizes = || weight.mapv(|w| w.wide().abs());
    match rule {
        Rule::Magnitude => sizes(),
        Rule::Wanda | Rule::Sparsegpt | Rule::Coder => sizes() * squares.mapv(|d| d.max(0.0).sqrt()),
        Rule::Ria => {
            let sizes = sizes();
            let sum = |axis| sizes.sum_axis(Axis(axis)).mapv(|s| s.max(f64::MIN_POSITIVE));
            (&sizes / &sum(0) + &sizes / &sum(1).insert_axis(Axis(1))) * squares.mapv(|d| d.max(0.0).powf(0.25))
        }
        Rule::Nowag => normalised(weight).0.mapv(|w| w * w) * squares,
    }
}

/// Keeps the weights of the highest scores, with their values: N of each group, or `count` of the whole
/// matrix. Of equal scores the first ones (lowest column, then lowest row) are kept.
pub fn prune<T: Real>(
    weight: ArrayView2<'_, T>,
    scores: ArrayView2<'_, f64>,
    pattern: Pattern,
    count: usize,
) -> Coded<T> {
    let (m, n) = weight.dim();
    let mut kept = Array2::from_elem((m, n), false);
    match pattern {
        Pattern::Groups(nm) => {
            for (scores, mut kept) in scores.rows().into_iter().zip(kept.rows_mut()) {
                for start in (0..n).step_by(nm.m()) {
                    let size = nm.m().min(n - start);
                    let most = if size < nm.m() { size } else { nm.n() };
                    let mut order: Vec<usize> = (start..start + size).collect();
                    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                    order.iter().take(most).for_each(|&j| kept[j] = true);
                }
            }
        }
        Pattern::Free => {
            let flat: Vec<f64> = scores.iter().copied().collect();
            let mut order: Vec<usize> = (0..flat.len()).collect();
            order.sort_by(|&a, &b| flat[b].total_cmp(&flat[a]));
            order.iter().take(count).for_each(|&at| kept[(at / n, at % n)] = true);
        }
    }
    let values = Array2::from_shape_fn((m, n), |at| if kept[at] { weight[at] } else { T::zero() });
    Coded { values, kept }
}
