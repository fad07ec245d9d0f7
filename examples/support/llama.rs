//! A Llama-architecture forward pass (RMSNorm, rotary positions, grouped queries, SwiGLU) in which
//! every linear layer is a weightpress operator, so that a factored checkpoint runs from its factors.

// Each example uses a part of it.
#![allow(dead_code)]

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use rayon::prelude::*;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use weightpress::checkpoint::{Checkpoint, Loader};
use weightpress::operator::{LinearOperator, Operator, apply_all};

use super::attention::{Heads, Rotary, attention};
use super::math::{losses, rms_norm, swiglu};

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
    /// Reads and checks a model's config.json.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let (path, config) = json_of::<Self>(checkpoint, "config.json")?;
        config.check().with_context(|| format!("in {}", path.display()))?;
        Ok(config)
    }

    /// Refuses what this forward pass would get wrong in silence.
    fn check(&self) -> Result<()> {
        let known = self.model_type.as_deref().is_none_or(|name| name == "llama");
        ensure!(
            known,
            "model type `{}`: expected llama, bert or dinov2",
            self.model_type.as_deref().unwrap_or_default()
        );
        let scaled = self.rope_scaling.as_ref().is_some_and(|scaling| !scaling.is_null());
        ensure!(!scaled, "scaled rotary positions (`rope_scaling`) are not supported");
        let act = self.hidden_act.as_deref().unwrap_or("silu");
        ensure!(act == "silu", "activation `{act}`: expected silu");
        let (heads, groups) = (self.num_attention_heads, self.num_key_value_heads);
        ensure!(heads > 0 && groups > 0 && heads % groups == 0, "{heads} heads in {groups} groups");
        Ok(())
    }

    pub fn heads(&self) -> Heads {
        let width = self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads);
        Heads { queries: self.num_attention_heads, keys: self.num_key_value_heads, width }
    }

    /// The turns of tokens that follow `seen` others.
    pub fn rotary(&self, seen: usize, tokens: usize) -> Rotary {
        Rotary::new(seen..seen + tokens, self.heads().width, self.rope_theta)
    }
}

/// Keys and values of the tokens seen so far, layer by layer, tokens × features.
#[derive(Clone)]
pub struct Cache {
    layers: Vec<Seen>,
}

/// What one layer has seen.
pub type Seen = (Array2<f32>, Array2<f32>);

impl Cache {
    /// Nothing seen.
    pub fn new(config: &Config) -> Self {
        Cache { layers: (0..config.num_hidden_layers).map(|_| nothing_seen(config)).collect() }
    }
}

/// The start of one layer's cache.
pub fn nothing_seen(config: &Config) -> Seen {
    let Heads { keys, width, .. } = config.heads();
    (Array2::zeros((0, keys * width)), Array2::zeros((0, keys * width)))
}

/// The linear layers of a block, in the order in which they are applied.
pub const LINEAR: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The name of a weight of layer `i`.
pub fn weight_name(i: usize, part: &str) -> String {
    format!("model.layers.{i}.{part}.weight")
}

/// One block. All activations are features × tokens.
pub struct Layer {
    pub input_norm: Array1<f32>,
    pub post_norm: Array1<f32>,
    pub q: Operator<f32>,
    pub k: Operator<f32>,
    pub v: Operator<f32>,
    pub o: Operator<f32>,
    pub gate: Operator<f32>,
    pub up: Operator<f32>,
    pub down: Operator<f32>,
}

impl Layer {
    /// Layer `i` of a checkpoint.
    pub fn load(weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint, i: usize) -> Result<Self> {
        let mut linear = |part: &str| weights.operator(&weight_name(i, part));
        Ok(Layer {
            input_norm: vector(checkpoint, &weight_name(i, "input_layernorm"))?,
            post_norm: vector(checkpoint, &weight_name(i, "post_attention_layernorm"))?,
            q: linear("self_attn.q_proj")?,
            k: linear("self_attn.k_proj")?,
            v: linear("self_attn.v_proj")?,
            o: linear("self_attn.o_proj")?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
        })
    }

    /// The linear layers, as [`LINEAR`] names them.
    pub fn linear_mut(&mut self) -> [&mut Operator<f32>; 7] {
        let Layer { q, k, v, o, gate, up, down, .. } = self;
        [q, k, v, o, gate, up, down]
    }

    /// Refuses weights that do not fit the configuration.
    fn check(&mut self, i: usize, config: &Config) -> Result<()> {
        let (Heads { queries, keys, width }, hidden) = (config.heads(), config.hidden_size);
        let ffn = self.gate.shape().0;
        let (own, shared) = ((queries * width, hidden), (keys * width, hidden));
        let expected = [own, shared, shared, (hidden, queries * width), (ffn, hidden), (ffn, hidden), (hidden, ffn)];
        for ((part, linear), (m, n)) in LINEAR.iter().zip(self.linear_mut()).zip(expected) {
            let (rows, columns) = linear.shape();
            ensure!(
                (rows, columns) == (m, n),
                "{} is {rows}x{columns}, where config.json needs {m}x{n}",
                weight_name(i, part)
            );
        }
        for (part, norm) in [("input_layernorm", &self.input_norm), ("post_attention_layernorm", &self.post_norm)] {
            ensure!(
                norm.len() == hidden,
                "{} has {} numbers, where config.json needs {hidden}",
                weight_name(i, part),
                norm.len()
            );
        }
        Ok(())
    }

    /// The input of `o` from that of `q`, `k` and `v`; takes keys and values into the cache.
    pub fn attend(&self, h: &Array2<f32>, seen: &mut Seen, turns: &Rotary, heads: Heads) -> Result<Array2<f32>> {
        let [mut q, mut k, v] = apply_all([&self.q, &self.k, &self.v], h.view())?;
        turns.rotate(&mut q);
        turns.rotate(&mut k);
        seen.0.append(Axis(0), k.t())?;
        seen.1.append(Axis(0), v.t())?;
        Ok(attention(&q, seen.0.view(), seen.1.view(), heads, true))
    }

    /// The input of `down` from that of `gate` and `up`.
    pub fn gated(&self, h: &Array2<f32>) -> Result<Array2<f32>> {
        let [mut gate, up] = apply_all([&self.gate, &self.up], h.view())?;
        swiglu(&mut gate, &up);
        Ok(gate)
    }
}

/// A model ready to run.
pub struct Llama {
    pub config: Config,
    pub layers: Vec<Layer>,
    pub norm: Array1<f32>,
    embedding: Operator<f32>,
    head: Option<Operator<f32>>,
}

/// Is shown the input of each linear layer: the weight's name and the activations, tokens × inputs.
type Hook<'h> = &'h mut dyn FnMut(&str, ArrayView2<'_, f32>) -> weightpress::Result<()>;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

impl Llama {
    /// Loads a Hugging Face folder, dense or factored.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::load_by(&mut checkpoint.loader()?, checkpoint)
    }

    /// The same by a loader of its weights.
    pub fn load_by(weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint) -> Result<Self> {
        let mut model = Self::without_layers(weights, checkpoint)?;
        for i in 0..model.config.num_hidden_layers {
            let mut layer = Layer::load(weights, checkpoint, i)?;
            layer.check(i, &model.config)?;
            model.layers.push(layer);
        }
        Ok(model)
    }

    /// What is not in a layer.
    pub fn without_layers(weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint) -> Result<Self> {
        let config = Config::read(checkpoint)?;
        let has_head = checkpoint.info(HEAD).is_some();
        let head = if has_head { Some(weights.operator(HEAD)?) } else { None };
        let embedding = weights.operator(EMBEDDING)?;
        let expected = (config.vocab_size, config.hidden_size);
        let head_shape = head.as_ref().map_or(expected, LinearOperator::shape);
        for (name, (rows, columns)) in [(EMBEDDING, embedding.shape()), (HEAD, head_shape)] {
            ensure!(
                (rows, columns) == expected,
                "{name} is {rows}x{columns}, config.json says {}x{}",
                expected.0,
                expected.1
            );
        }
        let norm = vector(checkpoint, "model.norm.weight")?;
        ensure!(
            norm.len() == config.hidden_size,
            "model.norm.weight has {} numbers, config.json says {}",
            norm.len(),
            config.hidden_size
        );
        Ok(Llama { norm, config, embedding, layers: Vec::new(), head })
    }

    /// The embeddings of tokens, features × tokens.
    pub fn embed(&self, tokens: &[usize]) -> Result<Array2<f32>> {
        let known = self.config.vocab_size;
        if let Some(&wrong) = tokens.iter().find(|&&token| token >= known) {
            bail!("token {wrong} of a vocabulary of {known}: the tokenizer is another model's");
        }
        Ok(self.embedding.select_rows(tokens)?.reversed_axes().as_standard_layout().into_owned())
    }

    /// Final hidden states, features × tokens, of tokens that follow those in the cache; it takes them in.
    pub fn extend(&self, tokens: &[usize], cache: &mut Cache, hook: Hook<'_>) -> Result<Array2<f32>> {
        let (heads, eps) = (self.config.heads(), self.config.rms_norm_eps);
        let seen = cache.layers.first().map_or(0, |(k, _)| k.nrows());
        let turns = self.config.rotary(seen, tokens.len());
        let mut x = self.embed(tokens)?;
        for (i, (layer, seen)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            let mut show = |parts: &[&str], x: &Array2<f32>| -> Result<()> {
                parts.iter().try_for_each(|part| Ok(hook(&weight_name(i, part), x.t())?))
            };
            let h = rms_norm(&x, &layer.input_norm, eps);
            show(&LINEAR[..3], &h)?;
            let mixed = layer.attend(&h, seen, &turns, heads)?;
            show(&LINEAR[3..4], &mixed)?;
            x += &layer.o.apply(mixed.view())?;
            let h = rms_norm(&x, &layer.post_norm, eps);
            show(&LINEAR[4..6], &h)?;
            let gated = layer.gated(&h)?;
            show(&LINEAR[6..], &gated)?;
            x += &layer.down.apply(gated.view())?;
        }
        Ok(rms_norm(&x, &self.norm, eps))
    }

    /// The same of a text's first tokens.
    pub fn hidden(&self, tokens: &[usize], hook: Hook<'_>) -> Result<Array2<f32>> {
        self.extend(tokens, &mut Cache::new(&self.config), hook)
    }

    /// The name of the weight that makes logits of hidden states.
    pub fn head_name(&self) -> &'static str {
        if self.head.is_some() { HEAD } else { EMBEDDING }
    }

    /// The weight itself.
    pub fn head(&self) -> &dyn LinearOperator<f32> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Logits, vocabulary × tokens.
    pub fn logits(&self, hidden: ArrayView2<'_, f32>) -> Result<Array2<f32>> {
        Ok(self.head().apply(hidden)?)
    }

    /// Sum of −ln p of each target, in nats.
    fn loss(&self, tokens: &[usize], targets: &[usize]) -> Result<f64> {
        /// Tokens whose logits are in memory at a time.
        const PANEL: usize = 128;
        let hidden = self.hidden(tokens, &mut |_, _| Ok(()))?;
        let mut total = 0.0;
        for (i, targets) in targets.chunks(PANEL).enumerate() {
            let mut logits = self.logits(hidden.slice(s![.., i * PANEL..i * PANEL + targets.len()]))?;
            total += losses(&mut logits, targets).0.iter().sum::<f64>();
        }
        Ok(total)
    }

    /// Mean −ln p in nats over a text cut into windows: window i sees tokens [iw, iw+w) and is scored on
    /// [iw+1, iw+w+1), so that every token but the very first counts once. Windows run in parallel; `done` is
    /// told how many tokens each has scored.
    pub fn mean_loss(&self, tokens: &[usize], window: usize, done: &(dyn Fn(usize) + Sync)) -> Result<f64> {
        let count = tokens.len().saturating_sub(1);
        ensure!(count > 0, "the text is too short to be scored");
        let starts: Vec<usize> = (0..count).step_by(window).collect();
        let losses = starts.par_iter().map(|&start| {
            let end = (start + window).min(count);
            let loss = self.loss(&tokens[start..end], &tokens[start + 1..end + 1]);
            done(end - start);
            loss
        });
        // Summed in order: the same figure at any number of threads.
        let losses = losses.collect::<Result<Vec<f64>>>()?;
        Ok(losses.iter().sum::<f64>() / count as f64)
    }
}

/// What a JSON file beside the weights says, and where it is.
pub fn json_of<T: DeserializeOwned>(checkpoint: &Checkpoint, name: &str) -> Result<(PathBuf, T)> {
    let path = checkpoint.root().join(name);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let value = serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))?;
    Ok((path, value))
}

/// What config.json says of the architecture, if it says anything.
pub fn model_type(checkpoint: &Checkpoint) -> Result<Option<String>> {
    let (_, config) = json_of::<serde_json::Value>(checkpoint, "config.json")?;
    Ok(config["model_type"].as_str().map(str::to_owned))
}

/// A vector of a checkpoint.
pub fn vector(checkpoint: &Checkpoint, name: &str) -> Result<Array1<f32>> {
    let stored = checkpoint.get(name)?;
    Ok(weightpress::scalar::widen::<f32>(stored.dtype, stored.bytes)?.into())
}
