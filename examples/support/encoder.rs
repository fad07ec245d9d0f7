//! Encoders: what they have in common whatever they embed, and their calibration statistics: Gram matrices of what linear
//! layers see, and Fisher sums of embeddings.

// Each example uses a part of it.
#![allow(dead_code)]

use anyhow::{Context, Result, ensure};
use ndarray::{Array1, Array2, Axis, stack};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use weightpress::checkpoint::{Checkpoint, Loader};
use weightpress::stats::{GramAccumulator, Stats};

use super::fisher::squared_gradients;
use super::layers::{Layer, Trace, Visitor};

/// The linear layers of a block (positions in [`Encoder::LINEAR`]) by what they see, as [`Trace::inputs`] has it: those of
/// one row share an input.
const SITES: [&[usize]; 4] = [&[0, 1, 2], &[3], &[4], &[5]];

/// The name of a weight of layer `i`.
pub fn weight_name(i: usize, part: &str) -> String {
    format!("encoder.layer.{i}.{part}.weight")
}

/// The length of an embedding that has a direction.
fn length(embedding: &Array1<f32>) -> Result<f32> {
    let length = embedding.dot(embedding).sqrt();
    ensure!(length.is_normal(), "the model makes an embedding of length {length}, which has no direction");
    Ok(length)
}

/// A model that makes one vector of each sample, by blocks of attention and two linear layers.
pub trait Encoder: Sync {
    /// What is embedded.
    type Sample: Sync;
    /// The linear layers of a block: query, key, value, output, up, down.
    const LINEAR: [&'static str; 6];

    /// Loads a Hugging Face folder, dense or factored, by a loader of its weights.
    fn load_by(weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint) -> Result<Self>
    where
        Self: Sized;
    fn layers(&self) -> &[Layer];
    /// Numbers of an embedding.
    fn features(&self) -> usize;
    /// Tokens of a sample.
    fn tokens(&self, sample: &Self::Sample) -> usize;
    /// The input of the first block, features × tokens.
    fn start(&self, sample: &Self::Sample) -> Result<Array2<f32>>;
    /// From the input of block `i` to its output.
    fn pass(&self, i: usize, x: Array2<f32>) -> Result<(Trace, Array2<f32>)>;
    /// The gradient at the input of block `i` from that at its output.
    fn back(&self, i: usize, trace: &Trace, d: Array2<f32>, visit: Visitor<'_>) -> Result<Array2<f32>>;
    /// The embedding, of any length, from the output of the last block.
    fn pooled(&self, x: &Array2<f32>) -> Result<Array1<f32>>;
    /// The gradient at the output of the last block from that at the embedding.
    fn pooled_back(&self, x: &Array2<f32>, d: Array1<f32>) -> Array2<f32>;

    /// Loads a Hugging Face folder.
    fn load(checkpoint: &Checkpoint) -> Result<Self>
    where
        Self: Sized,
    {
        Self::load_by(&mut checkpoint.loader()?, checkpoint)
    }

    /// The embedding of a sample, of length 1.
    fn embed(&self, sample: &Self::Sample) -> Result<Array1<f32>> {
        let mut x = self.start(sample)?;
        for i in 0..self.layers().len() {
            x = self.pass(i, x)?.1;
        }
        let embedding = self.pooled(&x)?;
        let length = length(&embedding)?;
        Ok(embedding / length)
    }

    /// Embeddings of samples, one a row. In parallel; `done` is told of each one's tokens.
    fn embed_all(&self, samples: &[Self::Sample], done: &(dyn Fn(usize) + Sync)) -> Result<Array2<f32>> {
        let each = samples.par_iter().map(|sample| {
            let embedding = self.embed(sample);
            done(self.tokens(sample));
            embedding
        });
        let rows = each.collect::<Result<Vec<_>>>()?;
        Ok(stack(Axis(0), &rows.iter().map(|row| row.view()).collect::<Vec<_>>())?)
    }

    /// Gram matrices of the inputs of all linear layers over samples. All samples go through one layer at a
    /// time, so that no more than one layer's matrices are being summed. `done` is told after each layer.
    fn calibrate(&self, samples: &[Self::Sample], done: &dyn Fn(usize)) -> Result<Stats> {
        // A fixed number of parts, summed in order: the same at any number of threads.
        const PARTS: usize = 4;
        let mut stats = Stats::empty();
        let mut stream = samples.iter().map(|sample| self.start(sample)).collect::<Result<Vec<_>>>()?;
        let size = stream.len().div_ceil(PARTS).max(1);
        for i in 0..self.layers().len() {
            let parts = stream.par_chunks_mut(size).map(|samples| -> Result<_> {
                let mut sums: Vec<GramAccumulator> = Vec::new();
                for x in samples {
                    let (trace, y) = self.pass(i, std::mem::take(x))?;
                    let inputs = trace.inputs();
                    if sums.is_empty() {
                        sums = inputs.map(|input| GramAccumulator::new(input.nrows())).into();
                    }
                    sums.iter_mut().zip(inputs).try_for_each(|(sum, input)| sum.update(input.t()))?;
                    *x = y;
                }
                Ok(sums)
            });
            let mut parts = parts.collect::<Result<Vec<_>>>()?.into_iter();
            let mut whole = parts.next().context("there is nothing to see")?;
            for part in parts {
                whole.iter_mut().zip(&part).try_for_each(|(sum, more)| sum.merge(more))?;
            }
            for (members, sum) in SITES.iter().zip(whole) {
                let names: Vec<String> = members.iter().map(|&member| weight_name(i, Self::LINEAR[member])).collect();
                stats.insert_gram(&names[0], sum.finish())?;
                names[1..].iter().try_for_each(|name| stats.insert_alias(name, &names[0]))?;
            }
            done(i);
        }
        Ok(stats)
    }

    /// Sums over rows and columns of the squared gradients of vᵀ·e, for the embedding e of a sample and a v of
    /// random signs: in the mean over v these are the squares of e's Jacobian, and those what ‖δe‖² = 2·(1 − cos)
    /// is to second order. (They are the Fisher information of e as the mean of a Gaussian of unit variance.) Mean
    /// over the samples and over `probes` directions for each.
    fn fisher(&self, samples: &[Self::Sample], probes: usize, done: &(dyn Fn(usize) + Sync)) -> Result<Stats> {
        ensure!(probes > 0, "no directions to take gradients along: at least one probe is needed for each sample");
        let names: Vec<String> =
            (0..self.layers().len()).flat_map(|i| Self::LINEAR.map(|part| weight_name(i, part))).collect();
        squared_gradients(&names, samples.len() * probes, done, |i, add| {
            let mut random = ChaCha8Rng::seed_from_u64(i as u64);
            let along = Array1::from_shape_simple_fn(self.features(), || 1.0 - 2.0 * (random.next_u32() & 1) as f32);
            self.gradients(&samples[i / probes], &along, &mut |layer, part, gradient| {
                add(layer * Self::LINEAR.len() + part, &gradient);
            })
            .map(drop)
        })
    }

    /// vᵀ·e for the embedding e, and its gradient by every linear weight (layer, position in
    /// [`Encoder::LINEAR`], m×n), the
    /// last layer's first.
    fn gradients(
        &self,
        sample: &Self::Sample,
        along: &Array1<f32>,
        visit: &mut dyn FnMut(usize, usize, Array2<f32>),
    ) -> Result<f32> {
        let (mut x, mut traces) = (self.start(sample)?, Vec::new());
        for i in 0..self.layers().len() {
            let (trace, y) = self.pass(i, x)?;
            traces.push(trace);
            x = y;
        }
        let embedding = self.pooled(&x)?;
        let length = length(&embedding)?;
        let unit = embedding / length;
        let value = unit.dot(along);
        // e = m/‖m‖, of which only what is across e moves it.
        let mut d = self.pooled_back(&x, (along - &(&unit * value)) / length);
        // (Each trace goes once it was used.)
        while let Some(trace) = traces.pop() {
            let i = traces.len();
            d = self.back(i, &trace, d, &mut |part, gradient| visit(i, part, gradient))?;
        }
        Ok(value)
    }
}
