//! A Llama-architecture forward pass (RMSNorm, rotary positions, grouped queries, SwiGLU) in which
//! every linear layer is a weightpress operator, so that a factored checkpoint runs from its factors.

// Each example uses a part of it.
#![allow(dead_code)]

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use ndarray::{Array1, Array2, ArrayView2, Axis, Zip, s};
use rayon::prelude::*;
use serde::Deserialize;
use weightpress::checkpoint::{Checkpoint, Loader};
use weightpress::operator::{Dense, LinearOperator, Operator};
use weightpress::stats::{GramAccumulator, Stats};
use weightpress::tensor::Tensor;

/// The fields of config.json that matter here.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: Option<usize>,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub vocab_size: usize,
    model_type: Option<String>,
    hidden_act: Option<String>,
    rope_scaling: Option<serde_json::Value>,
}

impl Config {
    /// Refuses what this forward pass would get wrong in silence.
    fn check(&self) -> Result<()> {
        let known = self.model_type.as_deref().is_none_or(|name| name == "llama");
        ensure!(known, "model type `{}`: expected llama", self.model_type.as_deref().unwrap_or_default());
        let scaled = self.rope_scaling.as_ref().is_some_and(|scaling| !scaling.is_null());
        ensure!(!scaled, "scaled rotary positions (`rope_scaling`) are not supported");
        let act = self.hidden_act.as_deref().unwrap_or("silu");
        ensure!(act == "silu", "activation `{act}`: expected silu");
        let (heads, groups) = (self.num_attention_heads, self.num_key_value_heads);
        ensure!(heads > 0 && groups > 0 && heads % groups == 0, "{heads} heads in {groups} groups");
        Ok(())
    }

    /// Dimensions of a head.
    fn width(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }
}

/// Keys and values of the tokens seen so far, layer by layer.
#[derive(Clone)]
pub struct Cache {
    layers: Vec<(Array2<f32>, Array2<f32>)>,
}

impl Cache {
    /// Nothing seen.
    pub fn new(config: &Config) -> Self {
        let empty = || Array2::zeros((0, config.num_key_value_heads * config.width()));
        Cache { layers: (0..config.num_hidden_layers).map(|_| (empty(), empty())).collect() }
    }
}

struct Layer {
    input_norm: Array1<f32>,
    post_norm: Array1<f32>,
    q: Operator<f32>,
    k: Operator<f32>,
    v: Operator<f32>,
    o: Operator<f32>,
    gate: Operator<f32>,
    up: Operator<f32>,
    down: Operator<f32>,
}

/// A model ready to run.
pub struct Llama {
    pub config: Config,
    embedding: Dense<f32>,
    layers: Vec<Layer>,
    norm: Array1<f32>,
    head: Option<Operator<f32>>,
}

/// Is shown the input of each linear layer: the weight's name and the activations, tokens × inputs.
type Hook<'h> = &'h mut dyn FnMut(&str, ArrayView2<'_, f32>) -> weightpress::Result<()>;

const EMBEDDING: &str = "model.embed_tokens.weight";

impl Llama {
    /// Loads a Hugging Face folder, dense or factored.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.root().join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let config: Config = serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        config.check().with_context(|| format!("in {}", path.display()))?;
        let mut weights = checkpoint.loader::<f32>()?;
        let vector = |name: &str| -> Result<Array1<f32>> {
            let stored = checkpoint.get(name)?;
            Ok(weightpress::scalar::widen::<f32>(stored.dtype, stored.bytes)?.into())
        };
        let layer = |weights: &mut Loader<'_, f32>, i: usize| -> Result<Layer> {
            let mut linear = |name: &str| weights.operator(&format!("model.layers.{i}.{name}.weight"));
            Ok(Layer {
                input_norm: vector(&format!("model.layers.{i}.input_layernorm.weight"))?,
                post_norm: vector(&format!("model.layers.{i}.post_attention_layernorm.weight"))?,
                q: linear("self_attn.q_proj")?,
                k: linear("self_attn.k_proj")?,
                v: linear("self_attn.v_proj")?,
                o: linear("self_attn.o_proj")?,
                gate: linear("mlp.gate_proj")?,
                up: linear("mlp.up_proj")?,
                down: linear("mlp.down_proj")?,
            })
        };
        let layers = (0..config.num_hidden_layers).map(|i| layer(&mut weights, i)).collect::<Result<_>>()?;
        let has_head = checkpoint.info("lm_head.weight").is_some();
        let head = if has_head { Some(weights.operator("lm_head.weight")?) } else { None };
        let embedding = checkpoint.get(EMBEDDING)?.matrix::<f32>()?.into_owned();
        let (rows, columns) = embedding.dim();
        ensure!(
            columns == config.hidden_size && rows == config.vocab_size,
            "{EMBEDDING} is {rows}x{columns}, config.json says {}x{}",
            config.vocab_size,
            config.hidden_size
        );
        let embedding = Dense::new(embedding);
        Ok(Llama { norm: vector("model.norm.weight")?, config, embedding, layers, head })
    }

    /// Final hidden states, tokens × hidden, of tokens that follow those in the cache; it takes them in.
    pub fn extend(&self, tokens: &[usize], cache: &mut Cache, hook: Hook<'_>) -> Result<Array2<f32>> {
        let config = &self.config;
        let (heads, width) = (config.num_attention_heads, config.width());
        if let Some(&wrong) = tokens.iter().find(|&&token| token >= config.vocab_size) {
            bail!("token {wrong} of a vocabulary of {}: the tokenizer is another model's", config.vocab_size);
        }
        let seen = cache.layers.first().map_or(0, |(k, _)| k.nrows());
        let (cos, sin) = rotary(seen..seen + tokens.len(), width, config.rope_theta);
        let mut x = self.embedding.values().select(Axis(0), tokens);
        for (i, (layer, (keys, values))) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            let h = rms_norm(&x, &layer.input_norm, config.rms_norm_eps);
            for part in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
                hook(&name(part), h.view())?;
            }
            let mut q = layer.q.forward(h.view())?;
            let mut k = layer.k.forward(h.view())?;
            let v = layer.v.forward(h.view())?;
            rotate(&mut q, width, &cos, &sin);
            rotate(&mut k, width, &cos, &sin);
            keys.append(Axis(0), k.view())?;
            values.append(Axis(0), v.view())?;
            let mixed = attention(&q, keys, values, heads, config.num_key_value_heads, width);
            hook(&name("self_attn.o_proj"), mixed.view())?;
            x += &layer.o.forward(mixed.view())?;
            let h = rms_norm(&x, &layer.post_norm, config.rms_norm_eps);
            hook(&name("mlp.gate_proj"), h.view())?;
            hook(&name("mlp.up_proj"), h.view())?;
            let mut gated = layer.gate.forward(h.view())?;
            let up = layer.up.forward(h.view())?;
            Zip::from(&mut gated).and(&up).for_each(|g, u| *g = *g / (1.0 + (-*g).exp()) * u);
            hook(&name("mlp.down_proj"), gated.view())?;
            x += &layer.down.forward(gated.view())?;
        }
        Ok(rms_norm(&x, &self.norm, config.rms_norm_eps))
    }

    /// The same of a text's first tokens.
    pub fn hidden(&self, tokens: &[usize], hook: Hook<'_>) -> Result<Array2<f32>> {
        self.extend(tokens, &mut Cache::new(&self.config), hook)
    }

    /// Logits, tokens × vocabulary.
    pub fn logits(&self, hidden: &Array2<f32>) -> Result<Array2<f32>> {
        Ok(match &self.head {
            Some(head) => head.forward(hidden.view())?,
            None => self.embedding.forward(hidden.view())?,
        })
    }

    /// Sum of −ln p of each target, in nats.
    fn loss(&self, tokens: &[usize], targets: &[usize]) -> Result<f64> {
        let hidden = self.hidden(tokens, &mut |_, _| Ok(()))?;
        let logits = self.logits(&hidden)?;
        let each = logits.rows().into_iter().zip(targets).map(|(row, &target)| {
            let top = row.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let sum: f64 = row.iter().map(|&z| f64::from((z - top).exp())).sum();
            sum.ln() + f64::from(top) - f64::from(row[target])
        });
        Ok(each.sum())
    }

    /// Mean −ln p in nats over a text cut into windows: window i sees tokens [iw, iw+w) and is scored on
    /// [iw+1, iw+w+1), so that every token but the very first counts once. Windows run in parallel.
    pub fn mean_loss(&self, tokens: &[usize], window: usize) -> Result<f64> {
        let count = tokens.len().saturating_sub(1);
        ensure!(count > 0, "the text is too short to be scored");
        let starts: Vec<usize> = (0..count).step_by(window).collect();
        let losses = starts.par_iter().map(|&start| {
            let end = (start + window).min(count);
            self.loss(&tokens[start..end], &tokens[start + 1..end + 1])
        });
        // Summed in order: the same figure at any number of threads.
        let losses = losses.collect::<Result<Vec<f64>>>()?;
        Ok(losses.iter().sum::<f64>() / count as f64)
    }

    /// Gram matrices of the inputs of all linear layers over windows of text. Weights that see the same
    /// input (q, k, v; gate, up) share one.
    pub fn calibrate(&self, windows: &[&[usize]]) -> Result<Stats> {
        // A fixed number of parts, merged in order: the same sums at any number of threads.
        const PARTS: usize = 8;
        let parts: Vec<_> = windows.chunks(windows.len().div_ceil(PARTS).max(1)).collect();
        let sums = parts.par_iter().map(|part| self.gram_sums(part)).collect::<Result<Vec<_>>>()?;
        let mut sums = sums.into_iter();
        let mut sites = sums.next().context("the calibration text is empty")?;
        for part in sums {
            for ((_, sum), (_, more)) in sites.iter_mut().zip(&part) {
                sum.merge(more)?;
            }
        }
        let mut stats = Stats::empty();
        for (name, gram) in sites {
            stats.insert_gram(&name, gram.finish())?;
        }
        for i in 0..self.config.num_hidden_layers {
            for part in ["self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"] {
                let name = format!("model.layers.{i}.{part}.weight");
                stats.insert_alias(&name, &owner(&name))?;
            }
        }
        Ok(stats)
    }
}

impl Llama {
    /// Sums of x·xᵀ at each input site over some windows, in the order of the layers.
    fn gram_sums(&self, windows: &[&[usize]]) -> Result<Vec<(String, GramAccumulator)>> {
        let mut sites: Vec<(String, GramAccumulator)> = Vec::new();
        for window in windows {
            self.hidden(window, &mut |name, x| {
                if owner(name) != name {
                    return Ok(());
                }
                let at = sites.iter().position(|(site, _)| site == name).unwrap_or_else(|| {
                    sites.push((name.to_owned(), GramAccumulator::new(x.ncols())));
                    sites.len() - 1
                });
                sites[at].1.update(x)
            })?;
        }
        Ok(sites)
    }
}

/// The weight under which the Gram matrix of this weight's input is kept.
fn owner(name: &str) -> String {
    name.replace("self_attn.k_proj", "self_attn.q_proj")
        .replace("self_attn.v_proj", "self_attn.q_proj")
        .replace("mlp.up_proj", "mlp.gate_proj")
}

fn rms_norm(x: &Array2<f32>, gain: &Array1<f32>, eps: f32) -> Array2<f32> {
    let mut y = x.clone();
    for mut row in y.rows_mut() {
        let scale = 1.0 / (row.dot(&row) / row.len() as f32 + eps).sqrt();
        Zip::from(&mut row).and(gain).for_each(|v, g| *v *= scale * g);
    }
    y
}

/// cos and sin of position × frequency, tokens × width/2.
fn rotary(positions: Range<usize>, width: usize, theta: f64) -> (Array2<f32>, Array2<f32>) {
    let start = positions.start;
    let angle = |(p, j): (usize, usize)| (start + p) as f64 / theta.powf(2.0 * j as f64 / width as f64);
    let table = |f: fn(f64) -> f64| Array2::from_shape_fn((positions.len(), width / 2), |at| f(angle(at)) as f32);
    (table(f64::cos), table(f64::sin))
}

/// Rotates the halves of each head, as Hugging Face's Llama does.
fn rotate(x: &mut Array2<f32>, width: usize, cos: &Array2<f32>, sin: &Array2<f32>) {
    for (p, mut row) in x.rows_mut().into_iter().enumerate() {
        for head in 0..row.len() / width {
            for j in 0..width / 2 {
                let (a, b) = (head * width + j, head * width + j + width / 2);
                let (x0, x1, c, s) = (row[a], row[b], cos[(p, j)], sin[(p, j)]);
                row[a] = x0 * c - x1 * s;
                row[b] = x1 * c + x0 * s;
            }
        }
    }
}

/// Causal attention of the last tokens to all; groups of query heads share a key-value head.
fn attention(q: &Array2<f32>, k: &Array2<f32>, v: &Array2<f32>, heads: usize, kv: usize, width: usize) -> Array2<f32> {
    let seen = k.nrows() - q.nrows();
    let mut out = Array2::zeros((q.nrows(), heads * width));
    let scale = 1.0 / (width as f32).sqrt();
    for head in 0..heads {
        let group = head * kv / heads;
        let own = s![.., head * width..(head + 1) * width];
        let shared = s![.., group * width..(group + 1) * width];
        let mut scores = q.slice(own).dot(&k.slice(shared).t());
        for (p, mut row) in scores.rows_mut().into_iter().enumerate() {
            let (mut past, mut future) = row.view_mut().split_at(Axis(0), seen + p + 1);
            let top = past.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            past.mapv_inplace(|z| ((z - top) * scale).exp());
            future.fill(0.0);
            let sum = row.sum();
            row /= sum;
        }
        out.slice_mut(own).assign(&scores.dot(&v.slice(shared)));
    }
    out
}
