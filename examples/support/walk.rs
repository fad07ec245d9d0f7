//! A calibration text on its way through a model, layer by layer: all windows at once, one layer's weights at
//! a time. In memory are the residual stream and the input of the next linear layers, tokens × (hidden +
//! widest input) × 4 bytes.

// Each example uses a part of it.
#![allow(dead_code)]

use anyhow::{Context, Result};
use ndarray::{Array2, Axis, Zip};
use rayon::prelude::*;
use weightpress::linalg::{Faer, Kernels};
use weightpress::operator::LinearOperator;
use weightpress::stats::{GramAccumulator, Stats};

use super::llama::{Config, LINEAR, Layer, Llama, nothing_seen, weight_name};
use super::math::rms_norm;

/// The linear layers of a block (positions in [`LINEAR`]) by what they see: those of one row share an input.
pub const SITES: [&[usize]; 4] = [&[0, 1, 2], &[3], &[4, 5], &[6]];

/// The text between two steps.
pub struct Walk {
    /// The residual stream of each window, features × tokens.
    stream: Vec<Array2<f32>>,
    /// The input of the site that was reached.
    pub input: Vec<Array2<f32>>,
}

/// How many parts sums over windows are made of; fixed, so that they are the same at any number of threads.
const PARTS: usize = 4;

impl Walk {
    /// Before the first layer.
    pub fn new(model: &Llama, windows: &[&[usize]]) -> Result<Self> {
        let stream = windows.iter().map(|window| model.embed(window)).collect::<Result<Vec<_>>>()?;
        Ok(Walk { input: vec![Array2::zeros((0, 0)); stream.len()], stream })
    }

    /// Tokens on the way.
    pub fn tokens(&self) -> usize {
        self.stream.iter().map(Array2::ncols).sum()
    }

    /// On to the next site of [`SITES`], through the linear layers of the one before; `site` 4 is the end of
    /// the layer.
    pub fn advance(&mut self, site: usize, layer: &Layer, config: &Config) -> Result<()> {
        let eps = config.rms_norm_eps;
        self.stream.par_iter_mut().zip(&mut self.input).try_for_each(|(x, input)| {
            *input = match site {
                0 => rms_norm(x, &layer.input_norm, eps),
                1 => {
                    let turns = config.rotary(0, x.ncols());
                    layer.attend(input, &mut nothing_seen(config), &turns, config.heads())?
                }
                2 => {
                    *x += &layer.o.apply(input.view())?;
                    rms_norm(x, &layer.post_norm, eps)
                }
                3 => layer.gated(input)?,
                _ => {
                    *x += &layer.down.apply(input.view())?;
                    Array2::zeros((0, 0))
                }
            };
            Ok(())
        })
    }

    /// Through a whole layer.
    pub fn pass(&mut self, layer: &Layer, config: &Config) -> Result<()> {
        (0..=SITES.len()).try_for_each(|site| self.advance(site, layer, config))
    }

    /// To the input of the head, behind the last layer.
    pub fn finish(&mut self, model: &Llama) {
        let eps = model.config.rms_norm_eps;
        self.stream.par_iter().zip(&mut self.input).for_each(|(x, input)| *input = rms_norm(x, &model.norm, eps));
    }

    /// Mean of x·xᵀ over the tokens at this site, in f64.
    pub fn gram(&self) -> Result<Array2<f64>> {
        let parts = self.input.par_chunks(self.input.len().div_ceil(PARTS).max(1)).map(|windows| {
            let mut sum = GramAccumulator::new(windows.first().map_or(0, Array2::nrows));
            windows.iter().try_for_each(|x| sum.update(x.t())).map(|()| sum)
        });
        let mut parts = parts.collect::<weightpress::Result<Vec<_>>>()?.into_iter();
        let mut whole = parts.next().context("the calibration text is empty")?;
        parts.try_for_each(|part| whole.merge(&part))?;
        Ok(whole.finish())
    }

    /// Mean of (x − x')·x'ᵀ over the tokens, x being the input here on another walk and x' that on this one.
    /// Products of a window in f32, their sum in f64: small differences stay exact.
    pub fn drift(&self, other: &Walk) -> Array2<f64> {
        let pairs: Vec<_> = self.input.iter().zip(&other.input).collect();
        let n = pairs.first().map_or(0, |(x, _)| x.nrows());
        let parts = pairs.par_chunks(pairs.len().div_ceil(PARTS).max(1)).map(|pairs| {
            let mut sum = Array2::<f64>::zeros((n, n));
            for (compressed, dense) in pairs {
                let (apart, x) = (*dense - *compressed, compressed.t().as_standard_layout().into_owned());
                Zip::from(&mut sum)
                    .and(&Faer.matmul(apart.view(), x.view()))
                    .for_each(|s: &mut f64, p: &f32| *s += f64::from(*p));
            }
            sum
        });
        let parts: Vec<Array2<f64>> = parts.collect();
        parts.iter().fold(Array2::zeros((n, n)), |sum, part| sum + part) / self.tokens().max(1) as f64
    }
}

impl Llama {
    /// Gram matrices of the inputs of all linear layers, and of the head, over windows of text. Weights that see the same
    /// input (q, k, v; gate, up) share one. `done` is told after each layer.
    pub fn calibrate(&self, windows: &[&[usize]], done: &dyn Fn(usize)) -> Result<Stats> {
        let (mut walk, mut stats) = (Walk::new(self, windows)?, Stats::empty());
        for (i, layer) in self.layers.iter().enumerate() {
            for (site, members) in SITES.iter().enumerate() {
                walk.advance(site, layer, &self.config)?;
                let names: Vec<String> = members.iter().map(|&member| weight_name(i, LINEAR[member])).collect();
                stats.insert_gram(&names[0], walk.gram()?)?;
                names[1..].iter().try_for_each(|name| stats.insert_alias(name, &names[0]))?;
            }
            walk.advance(SITES.len(), layer, &self.config)?;
            done(i);
        }
        walk.finish(self);
        stats.insert_gram(self.head_name(), walk.gram()?)?;
        Ok(stats)
    }
}

/// W + W·D·(G + λI)⁻¹ as a factor on the right of W, from the Gram matrix G of the inputs x' and the drift
/// D = mean of (x − x')·x'ᵀ: what brings W·x' closest to W·x. λ is `damping` of G's mean diagonal; where x'
/// says nothing, W stays as it is.
pub fn correction(gram: &Array2<f64>, drift: &Array2<f64>, damping: f64) -> Result<Array2<f64>> {
    let n = gram.nrows();
    let mut damped = gram.clone();
    damped.diag_mut().iter_mut().for_each(|value| *value += damping * gram.diag().sum() / n as f64);
    // (D·A⁻¹)ᵀ = A⁻¹·Dᵀ.
    let solved = Faer.solve_spd(damped.view(), drift.t().as_standard_layout().into_owned())?;
    let mut factor = solved.reversed_axes();
    factor.diag_mut().mapv_inplace(|value| value + 1.0);
    debug_assert_eq!(factor.len_of(Axis(0)), n);
    Ok(factor)
}
