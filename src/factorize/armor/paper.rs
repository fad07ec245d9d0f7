//! The published solver, for reproduction: Adam and one random group at a time, in NoWag's proxy of the loss.
//!
//! > loss = Σᵢⱼ (W̄ᵢⱼ − Ŵᵢⱼ)²·dⱼ,  W = diag(r)·W̄·diag(c),  d = mean square of the inputs
//!
//! Each iteration: one Adam step on A, B and the kept entries of S together; then in each pair of blocks one
//! group, drawn with a probability in proportion to the gradient's ℓ1 norm on it, gets the best of its
//! masks with least-squares values. At the end r and c go into A and B. Stops after 100 iterations without a
//! relative gain of 10⁻⁶.

use std::ops::Range;

use ndarray::{Array2, ArrayView1, Zip, s};
use pulp::Scalar;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::Armor;
use super::state::State;
use crate::coder::{Coded, Judge, Pattern, Tables, Vectors, normalised, prune};
use crate::error::Result;
use crate::factorize::Problem;
use crate::linalg::Kernels;
use crate::operator::Nm;
use crate::scalar::Real;

const RATE: f64 = 1e-4;
const MEMORY: (f64, f64) = (0.9, 0.999);
const PATIENCE: usize = 100;
const GAIN: f64 = 1e-6;

/// Adam's two moments of one array.
struct Moments {
    first: Array2<f64>,
    second: Array2<f64>,
}

impl Moments {
    fn new(dim: (usize, usize)) -> Self {
        Moments { first: Array2::zeros(dim), second: Array2::zeros(dim) }
    }

    /// One step of iteration t (from 1).
    fn step(&mut self, values: &mut Array2<f64>, gradient: &Array2<f64>, t: usize) {
        let t = i32::try_from(t).unwrap_or(i32::MAX);
        let (one, two) = (1.0 - MEMORY.0.powi(t), 1.0 - MEMORY.1.powi(t));
        Zip::from(values).and(&mut self.first).and(&mut self.second).and(gradient).for_each(|v, a, b, &g| {
            *a += (1.0 - MEMORY.0) * (g - *a);
            *b += (1.0 - MEMORY.1) * (g * g - *b);
            *v -= RATE * (*a / one) / ((*b / two).sqrt() + 1e-8);
        });
    }
}

/// The gradient halves of all factors and the loss, for a diagonal form.
struct Gradient {
    left: Vec<Array2<f64>>,
    right: Vec<Array2<f64>>,
    core: Array2<f64>,
    loss: f64,
}

fn gradient(state: &State<'_, f64>, d: ArrayView1<'_, f64>, kernels: &dyn Kernels<f64>) -> Gradient {
    let (z, y) = (state.right_side(), state.left_side());
    let weighed = &state.error * &d;
    let left =
        state.rows.iter().map(|p| kernels.matmul(weighed.slice(s![p.clone(), ..]), z.slice(s![p.clone(), ..]).t()));
    let right =
        state.columns.iter().map(|q| kernels.matmul(y.slice(s![.., q.clone()]).t(), weighed.slice(s![.., q.clone()])));
    let mut half = Array2::zeros(weighed.dim());
    for (part, a) in state.rows.iter().zip(&state.left) {
        half.slice_mut(s![part.clone(), ..]).assign(&kernels.matmul(a.t(), weighed.slice(s![part.clone(), ..])));
    }
    let mut core = Array2::zeros(weighed.dim());
    for (part, b) in state.columns.iter().zip(&state.right) {
        core.slice_mut(s![.., part.clone()]).assign(&kernels.matmul(half.slice(s![.., part.clone()]), b.t()));
    }
    let loss = (&weighed * &state.error).sum();
    Gradient { left: left.collect(), right: right.collect(), core, loss }
}

impl Armor {
    /// The published alternation. Groups are solved as one tall weight.
    pub(super) fn paper<'a, T: Real>(
        &self,
        group: &[Problem<'a, T>],
        d: ArrayView1<'_, f64>,
        (rows, columns): (Vec<Range<usize>>, Vec<Range<usize>>),
        nm: Nm,
    ) -> Result<State<'a, T>> {
        let views: Vec<_> = group.iter().map(|p| p.weight).collect();
        let joint = ndarray::concatenate(ndarray::Axis(0), &views)
            .map_err(|e| crate::Error::shape("weights that fit together", e.to_string()))?;
        let (normal, row_norms, column_norms) = normalised(joint.view());
        let score = normal.mapv(|w| w * w) * d;
        let start = prune(normal.view(), score.view(), Pattern::Groups(nm), 0);
        let (backend, mut random) = (group[0].backend, ChaCha8Rng::seed_from_u64(group[0].seed));
        let kernels = f64::kernels(backend);
        let mut state = State::new(normal, start, rows, columns, backend);
        let moments =
            |blocks: &[Array2<f64>]| -> Vec<Moments> { blocks.iter().map(|b| Moments::new(b.dim())).collect() };
        let (mut left, mut right) = (moments(&state.left), moments(&state.right));
        let mut core = Moments::new(state.core.values.dim());
        let (mut best, mut since) = (f64::INFINITY, 0);
        for t in 1..=self.iterations {
            let found = gradient(&state, d, kernels);
            since = if found.loss < best * (1.0 - GAIN) { 0 } else { since + 1 };
            best = best.min(found.loss);
            if since >= PATIENCE {
                break;
            }
            let each = |values: &mut [Array2<f64>], moments: &mut [Moments], gradients: &[Array2<f64>]| {
                for ((v, m), g) in values.iter_mut().zip(moments).zip(gradients) {
                    m.step(v, &(g * 2.0), t);
                }
            };
            each(&mut state.left, &mut left, &found.left);
            each(&mut state.right, &mut right, &found.right);
            let masked =
                Zip::from(&found.core).and(&state.core.kept).map_collect(|&g, &kept| if kept { 2.0 * g } else { 0.0 });
            core.step(&mut state.core.values, &masked, t);
            // Moments of what was kept once go on moving it: what is not kept stays zero.
            Zip::from(&mut state.core.values)
                .and(&state.core.kept)
                .for_each(|v, &kept| *v = if kept { *v } else { 0.0 });
            state.refresh();
            swap(&mut state, d, nm, kernels, &mut random);
            state.refresh();
        }
        let mut state = narrow(state);
        state.scale_rows(|i| row_norms[i]);
        state.scale_columns(&column_norms);
        Ok(state)
    }
}

/// One group of each pair of blocks: its best mask, with least-squares values.
fn swap(
    state: &mut State<'_, f64>,
    d: ArrayView1<'_, f64>,
    nm: Nm,
    kernels: &dyn Kernels<f64>,
    random: &mut ChaCha8Rng,
) {
    let found = gradient(state, d, kernels);
    for q in 0..state.columns.len() {
        let columns = state.columns[q].clone();
        let weighed = &state.right[q] * &d.slice(s![columns.clone()]);
        for p in 0..state.rows.len() {
            let rows = state.rows[p].clone();
            let block = found.core.slice(s![rows.clone(), columns.clone()]);
            let groups = columns.len().div_ceil(nm.m());
            let norm = |at: usize| {
                let (i, first) = (at / groups, at % groups * nm.m());
                block.slice(s![i, first..(first + nm.m()).min(columns.len())]).iter().map(|g| g.abs()).sum::<f64>()
            };
            let norms: Vec<f64> = (0..groups * rows.len()).map(norm).collect();
            let Some(at) = draw(&norms, random) else { continue };
            let (i, first) = (at / groups, at % groups * nm.m());
            let size = nm.m().min(columns.len() - first);
            let a = state.left[p].column(i);
            let scale = a.dot(&a);
            if scale <= 1e-8 {
                continue;
            }
            let wide = weighed.slice(s![first..first + size, ..]);
            let h = kernels.matmul(wide, state.right[q].slice(s![first..first + size, ..]).t());
            let tables = Tables::<f64>::new(h.view(), 0.0, Pattern::Groups(nm));
            let mut g: Vectors<f64> = [0.0; Nm::LARGEST];
            for a in 0..size {
                let old = |b: usize| state.core.values[(rows.start + i, columns.start + first + b)];
                g[a] = block[(i, first + a)] / scale - (0..size).map(|b| h[(a, b)] * old(b)).sum::<f64>();
            }
            for (_, _, masks, inverses) in tables.groups() {
                let (chosen, new) = masks.solve::<Scalar, f64>(Scalar, inverses, &g, Judge::Gain(0.0));
                for (a, &new) in new.iter().enumerate().take(size) {
                    let place = (rows.start + i, columns.start + first + a);
                    state.core.values[place] = new;
                    state.core.kept[place] = masks.places[chosen as usize].contains(&a);
                }
            }
        }
    }
}

/// A position, with a probability in proportion to its weight.
fn draw(weights: &[f64], random: &mut ChaCha8Rng) -> Option<usize> {
    let total: f64 = weights.iter().sum();
    let mut left = total * (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let positive = weights.iter().rposition(|&w| w > 0.0)?;
    let found = weights.iter().position(|&w| {
        left -= w;
        left < 0.0
    });
    Some(found.unwrap_or(positive))
}

/// The same factors in the compute type of the weights.
fn narrow<'a, T: Real>(state: State<'a, f64>) -> State<'a, T> {
    let cast = |a: &Array2<f64>| a.mapv(T::from_f64);
    let core = Coded { values: cast(&state.core.values), kept: state.core.kept };
    let mut other = State::new(cast(&state.weight), core, state.rows, state.columns, state.backend);
    other.left = state.left.iter().map(cast).collect();
    other.right = state.right.iter().map(cast).collect();
    other
}
