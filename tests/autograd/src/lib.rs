//! The Llama architecture in candle, written down a second time and apart from the examples' support code: its
//! gradients come from candle's automatic differentiation, and tests hold the hand-written reverse pass
//! (`examples/support/fisher.rs`) against them.
//!
//! Not published, and built by name only (`-p weightpress-autograd`): nothing of candle reaches the library.

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor, Var};
use ndarray::Array1;
use weightpress::checkpoint::Checkpoint;
use weightpress::stats::{Kind, Stats};
use weightpress::tensor::Tensor as _;

#[path = "../../../examples/support/mod.rs"]
pub mod support;

use support::llama::{Config, LINEAR, weight_name};

/// A model of which every linear weight of the blocks is a variable. Activations are tokens × features.
pub struct Reference {
    config: Config,
    dtype: DType,
    layers: Vec<Block>,
    embedding: Tensor,
    head: Tensor,
    norm: Tensor,
}

struct Block {
    /// As [`LINEAR`] names them.
    linear: Vec<Var>,
    input_norm: Tensor,
    post_norm: Tensor,
}

impl Reference {
    /// Loads a dense checkpoint; `dtype`, F32 or F64, is what everything is computed in.
    ///
    /// # Errors
    /// If config.json is not that of a Llama, or a tensor is missing or compressed.
    pub fn load(checkpoint: &Checkpoint, dtype: DType) -> Result<Self> {
        let config = Config::read(checkpoint)?;
        let matrix = |name: &str| -> Result<Tensor> {
            let stored = checkpoint.get(name)?;
            let values = stored.matrix::<f64>()?;
            let numbers = values.iter().copied().collect::<Vec<_>>();
            Ok(Tensor::from_vec(numbers, values.dim(), &Device::Cpu)?.to_dtype(dtype)?)
        };
        let vector = |name: &str| -> Result<Tensor> {
            let values = support::llama::vector(checkpoint, name)?;
            Ok(Tensor::from_vec(values.to_vec(), values.len(), &Device::Cpu)?.to_dtype(dtype)?)
        };
        let block = |i: usize| -> Result<Block> {
            let linear = LINEAR.iter().map(|part| Ok(Var::from_tensor(&matrix(&weight_name(i, part))?)?));
            Ok(Block {
                linear: linear.collect::<Result<_>>()?,
                input_norm: vector(&weight_name(i, "input_layernorm"))?,
                post_norm: vector(&weight_name(i, "post_attention_layernorm"))?,
            })
        };
        let embedding = matrix("model.embed_tokens.weight")?;
        let head = match checkpoint.info("lm_head.weight") {
            Some(_) => matrix("lm_head.weight")?,
            None => embedding.clone(),
        };
        let layers = (0..config.num_hidden_layers).map(block).collect::<Result<_>>()?;
        Ok(Reference { layers, embedding, head, norm: vector("model.norm.weight")?, config, dtype })
    }

    /// Mean −ln p of a window's tokens but the first, a scalar that can be differentiated.
    ///
    /// # Errors
    /// If the window has fewer than two tokens, or a token is not in the vocabulary.
    pub fn loss(&self, window: &[usize]) -> Result<Tensor> {
        ensure!(window.len() > 1, "a window of {} tokens has nothing to predict", window.len());
        let ids = |tokens: &[usize]| {
            let ids = tokens.iter().map(|&token| u32::try_from(token)).collect::<Result<Vec<_>, _>>()?;
            Ok::<_, anyhow::Error>(Tensor::new(ids, &Device::Cpu)?)
        };
        let count = window.len() - 1;
        let mut x = self.embedding.index_select(&ids(&window[..count])?, 0)?;
        for block in &self.layers {
            let [q, k, v, o, gate, up, down] = &block.linear[..] else { anyhow::bail!("seven linear layers a block") };
            let h = self.rms_norm(&x, &block.input_norm)?;
            let mixed = self.attention(&apply(q, &h)?, &apply(k, &h)?, &apply(v, &h)?)?;
            x = (x + apply(o, &mixed)?)?;
            let h = self.rms_norm(&x, &block.post_norm)?;
            let gated = (apply(gate, &h)?.silu()? * apply(up, &h)?)?;
            x = (x + apply(down, &gated)?)?;
        }
        let logits = apply(&self.head, &self.rms_norm(&x, &self.norm)?)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let target = shifted.gather(&ids(&window[1..])?.unsqueeze(1)?, 1)?.squeeze(1)?;
        Ok((shifted.exp()?.sum(D::Minus1)?.log()? - target)?.mean_all()?)
    }

    /// What [`support::llama::Llama::fisher`] computes, by candle: sums over rows and columns of the squared
    /// gradient of each linear weight, mean over the windows. `done` is told of each window.
    ///
    /// # Errors
    /// Those of [`Self::loss`]; if there is no window.
    pub fn fisher(&self, windows: &[&[usize]], done: &dyn Fn(usize)) -> Result<Stats> {
        ensure!(!windows.is_empty(), "no windows");
        let vars = || self.layers.iter().flat_map(|block| &block.linear);
        let mut sums = Vec::new();
        for (i, window) in windows.iter().enumerate() {
            let gradients = self.loss(window)?.backward()?;
            for (at, var) in vars().enumerate() {
                let gradient = gradients.get(var).context("a weight without gradient")?;
                let squares = gradient.to_dtype(DType::F64)?.sqr()?;
                let (rows, columns) =
                    (Array1::from(squares.sum(1)?.to_vec1()?), Array1::from(squares.sum(0)?.to_vec1()?));
                match sums.get_mut(at) {
                    None => sums.push((rows, columns)),
                    Some((all_rows, all_columns)) => {
                        *all_rows += &rows;
                        *all_columns += &columns;
                    }
                }
            }
            done(i);
        }
        let mut stats = Stats::empty();
        for (at, (rows, columns)) in sums.into_iter().enumerate() {
            let name = weight_name(at / LINEAR.len(), LINEAR[at % LINEAR.len()]);
            stats.insert_fisher_row(&name, rows / windows.len() as f64)?;
            stats.insert_fisher_col(&name, columns / windows.len() as f64)?;
        }
        Ok(stats)
    }

    fn rms_norm(&self, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(self.config.rms_norm_eps))?;
        Ok(x.broadcast_div(&mean.sqrt()?)?.broadcast_mul(gain)?)
    }

    /// Heads × tokens × features of what is tokens × (heads · features).
    fn split(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        Ok(x.reshape((x.dim(0)?, heads, self.config.heads().width))?.transpose(0, 1)?.contiguous()?)
    }

    /// Rotary positions: feature i and the one half a head later turn together.
    fn turned(&self, x: &Tensor) -> Result<Tensor> {
        let (_, tokens, width) = x.dims3()?;
        let angles = (0..tokens).flat_map(|p| {
            (0..width / 2).map(move |j| p as f64 / self.config.rope_theta.powf(2.0 * j as f64 / width as f64))
        });
        let angles = Tensor::from_vec(angles.collect::<Vec<_>>(), (1, tokens, width / 2), &Device::Cpu)?;
        let (cos, sin) = (angles.cos()?.to_dtype(self.dtype)?, angles.sin()?.to_dtype(self.dtype)?);
        let (low, high) = (x.narrow(2, 0, width / 2)?, x.narrow(2, width / 2, width / 2)?);
        let first = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let second = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[first, second], 2)?)
    }

    /// Causal attention; each head of keys and values serves several of queries.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let heads = self.config.heads();
        let tokens = q.dim(0)?;
        let repeated = |x: Tensor| -> Result<Tensor> {
            let each = heads.queries / heads.keys;
            let x = x.unsqueeze(1)?.broadcast_as((heads.keys, each, tokens, heads.width))?;
            Ok(x.reshape((heads.queries, tokens, heads.width))?)
        };
        let q = self.turned(&self.split(q, heads.queries)?)?;
        let k = repeated(self.turned(&self.split(k, heads.keys)?)?)?;
        let v = repeated(self.split(v, heads.keys)?)?;
        let future = (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f64::NEG_INFINITY } else { 0.0 });
        let future = Tensor::from_vec(future.collect::<Vec<_>>(), (1, tokens, tokens), &Device::Cpu)?;
        let scores = (q.matmul(&k.transpose(1, 2)?)? / (heads.width as f64).sqrt())?;
        let scores = scores.broadcast_add(&future.to_dtype(self.dtype)?)?;
        let powers = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let p = powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?;
        Ok(p.matmul(&v)?.transpose(0, 1)?.reshape((tokens, heads.queries * heads.width))?)
    }
}

/// X·Wᵀ.
fn apply(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    Ok(x.matmul(&weight.t()?)?)
}

/// How far Fisher sums lie from others, the worst of all vectors: in norm, relative to the other's, and of a single
/// entry, relative to itself.
#[derive(Debug, Default)]
pub struct Apart {
    /// Vectors that were compared.
    pub vectors: usize,
    /// ‖a − b‖ ÷ ‖b‖ of the worst vector.
    pub norm: f64,
    /// |a − b| ÷ b of the worst entry.
    pub entry: f64,
    /// The weight of the worst entry.
    pub at: String,
}

impl Apart {
    /// Compares the row and column sums of all linear weights of a model of so many layers.
    ///
    /// # Errors
    /// If one of them lacks a vector.
    pub fn between(ours: &Stats, theirs: &Stats, layers: usize) -> Result<Self> {
        let mut apart = Apart::default();
        for name in (0..layers).flat_map(|i| LINEAR.map(|part| weight_name(i, part))) {
            for kind in [Kind::FisherRow, Kind::FisherCol] {
                let of = |stats: &Stats| match kind {
                    Kind::FisherRow => stats.fisher_row(&name),
                    _ => stats.fisher_col(&name),
                };
                let (a, b) = (of(ours)?, of(theirs)?);
                let norm = |x: &Array1<f64>| x.dot(x).sqrt();
                apart.vectors += 1;
                apart.norm = apart.norm.max(norm(&(&a - &b)) / norm(&b).max(f64::MIN_POSITIVE));
                for (a, b) in a.iter().zip(&b) {
                    let entry = (a - b).abs() / b.abs().max(f64::MIN_POSITIVE);
                    if entry > apart.entry {
                        (apart.entry, apart.at) = (entry, format!("{name} {kind:?}"));
                    }
                }
            }
        }
        Ok(apart)
    }
}

impl std::fmt::Display for Apart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Apart { vectors, norm, entry, at } = self;
        write!(f, "{vectors} vectors, the worst {norm:.1e} apart in norm, the worst entry {entry:.1e} ({at})")
    }
}
