//! Fisher sums: the squares of the loss's gradients, by a reverse pass written out for this architecture.
//!
//! Written out rather than left to an automatic differentiator, which would bring more crates than the rest of
//! the examples have. Tests hold it against finite differences.

// Each example uses a part of it.
#![allow(dead_code)]

use anyhow::{Context, Result, ensure};
use ndarray::{Array1, Array2, Axis, s};
use rayon::prelude::*;
use weightpress::linalg::{Faer, Kernels};
use weightpress::operator::{LinearOperator, Operator, apply_all};
use weightpress::stats::Stats;

use super::attention::{Heads, Rotary, attention};
use super::llama::{LINEAR, Layer, Llama, weight_name};
use super::math::{losses, rms_norm, rms_scale, scale_columns, softmax, swiglu, swiglu_back};

/// What the forward pass leaves of a layer, features × tokens.
struct Trace {
    start: Array2<f32>,
    attention_input: Array2<f32>,
    q: Array2<f32>,
    k: Array2<f32>,
    v: Array2<f32>,
    mixed: Array2<f32>,
    middle: Array2<f32>,
    mlp_input: Array2<f32>,
    gate: Array2<f32>,
    up: Array2<f32>,
    gated: Array2<f32>,
}

/// Is shown the gradient of each linear weight, m×n: layer, position in [`LINEAR`], gradient.
type Visitor<'v> = &'v mut dyn FnMut(usize, usize, Array2<f32>);

impl Llama {
    /// Sums over rows and columns of the squared gradients, mean over the windows: a window's first tokens see
    /// its last ones as targets, and the loss is their mean −ln p. Windows run in parallel.
    pub fn fisher(&self, windows: &[&[usize]], done: &(dyn Fn(usize) + Sync)) -> Result<Stats> {
        let names = (0..self.layers.len()).flat_map(|i| LINEAR.map(|part| weight_name(i, part))).collect::<Vec<_>>();
        squared_gradients(&names, windows.len(), done, |i, add| {
            self.gradients(windows[i], &mut |layer, part, gradient| add(layer * LINEAR.len() + part, &gradient))
                .map(drop)
        })
    }

    /// The mean −ln p of a window's tokens but the first, and its gradient by every linear weight, the last
    /// layer's first.
    pub fn gradients(&self, window: &[usize], visit: Visitor<'_>) -> Result<f64> {
        ensure!(window.len() > 1, "a window of {} tokens has nothing to predict", window.len());
        let (tokens, targets) = (&window[..window.len() - 1], &window[1..]);
        let (heads, eps) = (self.config.heads(), self.config.rms_norm_eps);
        let turns = self.config.rotary(0, tokens.len());
        let (mut x, mut traces) = (self.embed(tokens)?, Vec::new());
        for layer in &self.layers {
            let trace = Trace::of(layer, x, &turns, heads, eps)?;
            x = &trace.middle + &layer.down.apply(trace.gated.view())?;
            traces.push(trace);
        }
        let hidden = rms_norm(&x, &self.norm, eps);
        let mut logits = self.logits(hidden.view())?;
        let (each, sums) = losses(&mut logits, targets);
        // The gradient at the logits: (p − 1 at the target) ÷ tokens.
        let mean = 1.0 / tokens.len() as f64;
        scale_columns(&mut logits, &sums.iter().map(|sum| (mean / sum) as f32).collect::<Vec<_>>());
        targets.iter().enumerate().for_each(|(t, &target)| logits[(target, t)] -= mean as f32);
        let d = self.head().apply_transpose(logits.view())?;
        drop(logits);
        let mut d = norm_back(&x, &self.norm, eps, d);
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let Some(trace) = traces.pop() else { break };
            d = trace.back(layer, d, (&turns, heads, eps), &mut |part, gradient| visit(i, part, gradient))?;
        }
        Ok(each.iter().sum::<f64>() * mean)
    }
}

impl Trace {
    fn of(layer: &Layer, start: Array2<f32>, turns: &Rotary, heads: Heads, eps: f32) -> Result<Self> {
        let attention_input = rms_norm(&start, &layer.input_norm, eps);
        let h = attention_input.view();
        let [mut q, mut k, v] = apply_all([&layer.q, &layer.k, &layer.v], h)?;
        turns.rotate(&mut q);
        turns.rotate(&mut k);
        let mixed = attention(&q, k.t(), v.t(), heads, true);
        let middle = &start + &layer.o.apply(mixed.view())?;
        let mlp_input = rms_norm(&middle, &layer.post_norm, eps);
        let [gate, up] = apply_all([&layer.gate, &layer.up], mlp_input.view())?;
        let mut gated = gate.clone();
        swiglu(&mut gated, &up);
        Ok(Trace { start, attention_input, q, k, v, mixed, middle, mlp_input, gate, up, gated })
    }

    /// The gradient at the layer's start from that at its end.
    fn back(
        self,
        layer: &Layer,
        d: Array2<f32>,
        (turns, heads, eps): (&Rotary, Heads, f32),
        visit: &mut dyn FnMut(usize, Array2<f32>),
    ) -> Result<Array2<f32>> {
        // Through a linear layer: its weight's gradient is d·xᵀ, that at its input Wᵀ·d.
        let mut through = |part: usize, weight: &Operator<f32>, d: &Array2<f32>, x: &Array2<f32>| {
            // Tokens × inputs: what the product reads without gathering.
            let x = x.t().as_standard_layout().into_owned();
            visit(part, Faer.matmul(d.view(), x.view()));
            weight.apply_transpose(d.view())
        };
        let mut d_gate = through(6, &layer.down, &d, &self.gated)?;
        let d_up = swiglu_back(&mut d_gate, &self.gate, &self.up);
        let mut at = through(5, &layer.up, &d_up, &self.mlp_input)?;
        at += &through(4, &layer.gate, &d_gate, &self.mlp_input)?;
        let d = d + norm_back(&self.middle, &layer.post_norm, eps, at);
        let at = through(3, &layer.o, &d, &self.mixed)?;
        let (mut d_q, mut d_k, d_v) = attention_back([&self.q, &self.k, &self.v], &at, heads, true);
        turns.rotate_back(&mut d_q);
        turns.rotate_back(&mut d_k);
        let mut at = through(2, &layer.v, &d_v, &self.attention_input)?;
        at += &through(1, &layer.k, &d_k, &self.attention_input)?;
        at += &through(0, &layer.q, &d_q, &self.attention_input)?;
        Ok(d + norm_back(&self.start, &layer.input_norm, eps, at))
    }
}

/// y = g·x·s with s = (mean x² + ε)^−½ of each token: s·g·d − x·s³·mean(g·d·x).
fn norm_back(x: &Array2<f32>, gain: &Array1<f32>, eps: f32, mut d: Array2<f32>) -> Array2<f32> {
    let scale = Array1::from(rms_scale(x, eps));
    d *= &gain.view().insert_axis(Axis(1));
    let along = (&d * x).sum_axis(Axis(0)) / x.nrows() as f32;
    let pull = &scale * &scale * &scale * along;
    d *= &scale;
    d - x * &pull
}

/// Gradients at the queries, keys and values of attention (all features × tokens).
pub fn attention_back(
    [q, k, v]: [&Array2<f32>; 3],
    d: &Array2<f32>,
    heads: Heads,
    causal: bool,
) -> (Array2<f32>, Array2<f32>, Array2<f32>) {
    let (mut d_q, mut d_k, mut d_v) = (Array2::zeros(q.dim()), Array2::zeros(k.dim()), Array2::zeros(v.dim()));
    for head in 0..heads.queries {
        let (own, shared) = (s![heads.own(head), ..], s![heads.shared(head), ..]);
        let (q, k, v, d) = (q.slice(own), k.slice(shared), v.slice(shared), d.slice(own));
        // Probabilities, keys × queries.
        let mut p: Array2<f32> = Faer.matmul(k.t(), q);
        let seen = if causal { 0 } else { p.nrows() };
        let sums = softmax(&mut p, seen, heads.scale());
        scale_columns(&mut p, &sums.iter().map(|sum| 1.0 / sum).collect::<Vec<_>>());
        let add = |to: &mut Array2<f32>, rows, product: Array2<f32>| {
            let mut rows = to.slice_mut(s![rows, ..]);
            rows += &product;
        };
        add(&mut d_v, heads.shared(head), Faer.matmul(d, p.t()));
        let mut d_s: Array2<f32> = Faer.matmul(v.t(), d);
        let along = (&d_s * &p).sum_axis(Axis(0));
        d_s -= &along;
        d_s *= &p;
        d_s *= heads.scale();
        add(&mut d_q, heads.own(head), Faer.matmul(k, d_s.view()));
        add(&mut d_k, heads.shared(head), Faer.matmul(q, d_s.t()));
    }
    (d_q, d_k, d_v)
}

/// Sums over rows and columns of the squared gradients of some weights, mean over `count` losses. `gradients`
/// hands over those of the loss of a number, each with the position of its weight in `names`. Losses run in parallel.
pub fn squared_gradients(
    names: &[String],
    count: usize,
    done: &(dyn Fn(usize) + Sync),
    gradients: impl Fn(usize, &mut dyn FnMut(usize, &Array2<f32>)) -> Result<()> + Sync,
) -> Result<Stats> {
    // A fixed number of parts, summed in order: the same at any number of threads.
    const PARTS: usize = 4;
    type Sums = Vec<(Array1<f64>, Array1<f64>)>;
    let losses: Vec<usize> = (0..count).collect();
    let parts = losses.par_chunks(count.div_ceil(PARTS).max(1)).map(|losses| -> Result<Sums> {
        let mut sums: Sums = vec![Default::default(); names.len()];
        for &i in losses {
            gradients(i, &mut |at, gradient| {
                let (rows, columns) = squares(gradient);
                let sum = &mut sums[at];
                *sum = if i == losses[0] { (rows, columns) } else { (&sum.0 + &rows, &sum.1 + &columns) };
            })?;
            done(i);
        }
        Ok(sums)
    });
    let mut parts = parts.collect::<Result<Vec<_>>>()?.into_iter();
    let mut whole = parts.next().context("the calibration text is empty")?;
    for part in parts {
        for (sum, more) in whole.iter_mut().zip(part) {
            *sum = (&sum.0 + &more.0, &sum.1 + &more.1);
        }
    }
    let mut stats = Stats::empty();
    for (name, (rows, columns)) in names.iter().zip(whole) {
        stats.insert_fisher_row(name, rows / count as f64)?;
        stats.insert_fisher_col(name, columns / count as f64)?;
    }
    Ok(stats)
}

/// Sums of squares of the rows and of the columns.
fn squares(gradient: &Array2<f32>) -> (Array1<f64>, Array1<f64>) {
    let (m, n) = gradient.dim();
    let (mut rows, mut columns) = (Array1::zeros(m), Array1::<f64>::zeros(n));
    if let Some(columns) = columns.as_slice_mut() {
        pulp::Arch::new().dispatch(|| {
            for (row, values) in rows.iter_mut().zip(gradient.as_slice().unwrap_or_default().chunks_exact(n.max(1))) {
                let mut sums = [0.0f64; 16];
                for (i, (value, column)) in values.iter().zip(columns.iter_mut()).enumerate() {
                    let square = f64::from(*value) * f64::from(*value);
                    *column += square;
                    sums[i % 16] += square;
                }
                *row = sums.iter().sum();
            }
        });
    }
    (rows, columns)
}
