//! Calibration statistics of an encoder: Gram matrices of what its linear layers see, and Fisher sums of its
//! embeddings.

// Each example uses a part of it.
#![allow(dead_code)]

use anyhow::{Context, Result, ensure};
use ndarray::{Array1, Array2, Axis};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use weightpress::linalg::{Faer, Kernels};
use weightpress::operator::LinearOperator;
use weightpress::stats::{GramAccumulator, Stats};

use super::attention::Heads;
use super::bert::{Bert, LINEAR, Layer, Linear, Trace, weight_name};
use super::fisher::{attention_back, squared_gradients};
use super::math::{gelu_back, layer_norm_back};

/// The linear layers of a block (positions in [`LINEAR`]) by what they see: those of one row share an input.
const SITES: [&[usize]; 4] = [&[0, 1, 2], &[3], &[4], &[5]];

impl Bert {
    /// Gram matrices of the inputs of all linear layers over sentences. All sentences go through one layer at a
    /// time, so that no more than one layer's matrices are being summed. `done` is told after each layer.
    pub fn calibrate(&self, sentences: &[Vec<usize>], done: &dyn Fn(usize)) -> Result<Stats> {
        // A fixed number of parts, summed in order: the same at any number of threads.
        const PARTS: usize = 4;
        let (heads, eps) = (self.heads(), self.eps());
        let mut stats = Stats::empty();
        let mut stream = sentences.iter().map(|tokens| self.start(tokens)).collect::<Result<Vec<_>>>()?;
        let size = stream.len().div_ceil(PARTS).max(1);
        for (i, layer) in self.layers.iter().enumerate() {
            let parts = stream.par_chunks_mut(size).map(|sentences| -> Result<_> {
                let mut sums: Vec<GramAccumulator> = Vec::new();
                for x in sentences {
                    let (trace, y) = layer.pass(std::mem::take(x), heads, eps)?;
                    let inputs = [&trace.start, &trace.mixed, &trace.middle, &trace.gelu];
                    if sums.is_empty() {
                        sums = inputs.map(|input| GramAccumulator::new(input.nrows())).into();
                    }
                    sums.iter_mut().zip(inputs).try_for_each(|(sum, input)| sum.update(input.t()))?;
                    *x = y;
                }
                Ok(sums)
            });
            let mut parts = parts.collect::<Result<Vec<_>>>()?.into_iter();
            let mut whole = parts.next().context("there are no sentences")?;
            for part in parts {
                whole.iter_mut().zip(&part).try_for_each(|(sum, more)| sum.merge(more))?;
            }
            for (members, sum) in SITES.iter().zip(whole) {
                let names: Vec<String> = members.iter().map(|&member| weight_name(i, LINEAR[member])).collect();
                stats.insert_gram(&names[0], sum.finish())?;
                names[1..].iter().try_for_each(|name| stats.insert_alias(name, &names[0]))?;
            }
            done(i);
        }
        Ok(stats)
    }

    /// Sums over rows and columns of the squared gradients of vᵀ·e, for the embedding e of a sentence and a v of
    /// random signs: in the mean over v these are the squares of e's Jacobian, and those what ‖δe‖² = 2·(1 − cos)
    /// is to second order. (They are the Fisher information of e as the mean of a Gaussian of unit variance.) Mean
    /// over the sentences and over `probes` directions for each.
    pub fn fisher(&self, sentences: &[Vec<usize>], probes: usize, done: &(dyn Fn(usize) + Sync)) -> Result<Stats> {
        ensure!(probes > 0, "no directions to take gradients along: at least one probe is needed for each paragraph");
        let names: Vec<String> = (0..self.layers.len()).flat_map(|i| LINEAR.map(|part| weight_name(i, part))).collect();
        squared_gradients(&names, sentences.len() * probes, done, |i, add| {
            let mut random = ChaCha8Rng::seed_from_u64(i as u64);
            let along = Array1::from_shape_simple_fn(self.features(), || 1.0 - 2.0 * (random.next_u32() & 1) as f32);
            self.gradients(&sentences[i / probes], &along, &mut |layer, part, gradient| {
                add(layer * LINEAR.len() + part, &gradient);
            })
            .map(drop)
        })
    }

    /// vᵀ·e for the embedding e, and its gradient by every linear weight (layer, position in [`LINEAR`], m×n), the
    /// last layer's first.
    pub fn gradients(
        &self,
        tokens: &[usize],
        along: &Array1<f32>,
        visit: &mut dyn FnMut(usize, usize, Array2<f32>),
    ) -> Result<f32> {
        let (mut x, mut traces) = (self.start(tokens)?, Vec::new());
        for layer in &self.layers {
            let (trace, y) = layer.pass(x, self.heads(), self.eps())?;
            traces.push(trace);
            x = y;
        }
        let mean = x.mean_axis(Axis(1)).context("no tokens")?;
        let length = mean.dot(&mean).sqrt();
        let unit = mean / length;
        let value = unit.dot(along);
        // e = m/‖m‖, of which only what is across e moves it; m is the mean of the tokens.
        let at_mean = (along - &(&unit * value)) / (length * tokens.len() as f32);
        let mut d = Array2::zeros(x.dim());
        d += &at_mean.insert_axis(Axis(1));
        for (i, (layer, trace)) in self.layers.iter().zip(traces).enumerate().rev() {
            d = trace.back(layer, d, self.heads(), self.eps(), &mut |part, gradient| visit(i, part, gradient))?;
        }
        Ok(value)
    }
}

impl Trace {
    /// The gradient at the block's input from that at its output.
    fn back(
        self,
        layer: &Layer,
        d: Array2<f32>,
        heads: Heads,
        eps: f32,
        visit: &mut dyn FnMut(usize, Array2<f32>),
    ) -> Result<Array2<f32>> {
        // Through a linear layer: its weight's gradient is d·xᵀ, that at its input Wᵀ·d.
        let mut through = |part: usize, linear: &Linear, d: &Array2<f32>, x: &Array2<f32>| {
            visit(part, Faer.matmul(d.view(), x.t().as_standard_layout().view()));
            linear.weight.apply_transpose(d.view())
        };
        let mut d = layer_norm_back(&self.end, &layer.norm.gain, eps, d);
        let mut at_up = through(5, &layer.down, &d, &self.gelu)?;
        gelu_back(&mut at_up, &self.up);
        d += &through(4, &layer.up, &at_up, &self.middle)?;
        let mut d = layer_norm_back(&self.attended, &layer.attention_norm.gain, eps, d);
        let at_mixed = through(3, &layer.output, &d, &self.mixed)?;
        let (d_q, d_k, d_v) = attention_back([&self.q, &self.k, &self.v], &at_mixed, heads, false);
        for (part, linear, at) in [(2, &layer.value, d_v), (1, &layer.key, d_k), (0, &layer.query, d_q)] {
            d += &through(part, linear, &at, &self.start)?;
        }
        Ok(d)
    }
}
