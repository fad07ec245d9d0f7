//! A BERT-architecture encoder whose linear layers are weightpress operators, and how far the embeddings of
//! sentences move.

// Each example uses a part of it.
#![allow(dead_code)]

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use ndarray::{Array1, Array2, Axis};
use rayon::prelude::*;
use regex::Regex;
use serde::{Deserialize, Serialize};
use tokenizers::{Tokenizer, TruncationParams};
use weightpress::checkpoint::{Checkpoint, Loader};
use weightpress::operator::{LinearOperator, Operator, apply_all};

use super::attention::{Heads, attention};
use super::llama::{text_of, vector};
use super::math::{add_bias, gelu, layer_norm};

/// The fields of config.json that matter here.
#[derive(Debug, Clone, Deserialize)]
struct Config {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    layer_norm_eps: f32,
    vocab_size: usize,
    max_position_embeddings: usize,
    hidden_act: String,
    position_embedding_type: Option<String>,
}

/// The linear layers of a block, in the order in which they are applied.
pub const LINEAR: [&str; 6] = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
];

/// The name of a weight of layer `i`.
pub fn weight_name(i: usize, part: &str) -> String {
    format!("encoder.layer.{i}.{part}.weight")
}

/// A linear layer with its bias.
pub struct Linear {
    pub weight: Operator<f32>,
    bias: Array1<f32>,
}

impl Linear {
    fn apply(&self, x: &Array2<f32>) -> Result<Array2<f32>> {
        let [y] = Self::apply_all([self], x)?;
        Ok(y)
    }

    /// Several layers with the same input.
    fn apply_all<const N: usize>(layers: [&Self; N], x: &Array2<f32>) -> Result<[Array2<f32>; N]> {
        let mut all = apply_all(layers.map(|layer| &layer.weight), x.view())?;
        all.iter_mut().zip(layers).for_each(|(y, layer)| add_bias(y, &layer.bias));
        Ok(all)
    }
}

pub struct Norm {
    pub gain: Array1<f32>,
    bias: Array1<f32>,
}

impl Norm {
    fn apply(&self, x: &Array2<f32>, eps: f32) -> Array2<f32> {
        let mut y = x.clone();
        layer_norm(&mut y, &self.gain, &self.bias, eps);
        y
    }
}

/// One block, in the order in which its parts are applied.
pub struct Layer {
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub output: Linear,
    pub attention_norm: Norm,
    pub up: Linear,
    pub down: Linear,
    pub norm: Norm,
}

/// What a block computes on its way, features × tokens.
pub struct Trace {
    pub start: Array2<f32>,
    pub q: Array2<f32>,
    pub k: Array2<f32>,
    pub v: Array2<f32>,
    pub mixed: Array2<f32>,
    /// Before the norm behind attention, and after.
    pub attended: Array2<f32>,
    pub middle: Array2<f32>,
    /// Before GELU, and after.
    pub up: Array2<f32>,
    pub gelu: Array2<f32>,
    /// Before the last norm.
    pub end: Array2<f32>,
}

impl Layer {
    /// The linear layers, as [`LINEAR`] names them.
    pub fn linear_mut(&mut self) -> [&mut Operator<f32>; 6] {
        let Layer { query, key, value, output, up, down, .. } = self;
        [query, key, value, output, up, down].map(|linear| &mut linear.weight)
    }

    /// From the block's input to its output.
    pub fn pass(&self, start: Array2<f32>, heads: Heads, eps: f32) -> Result<(Trace, Array2<f32>)> {
        let [q, k, v] = Linear::apply_all([&self.query, &self.key, &self.value], &start)?;
        let mixed = attention(&q, k.t(), v.t(), heads, false);
        let attended = &start + &self.output.apply(&mixed)?;
        let middle = self.attention_norm.apply(&attended, eps);
        let up = self.up.apply(&middle)?;
        let mut after = up.clone();
        gelu(&mut after);
        let end = &middle + &self.down.apply(&after)?;
        let y = self.norm.apply(&end, eps);
        Ok((Trace { start, q, k, v, mixed, attended, middle, up, gelu: after, end }, y))
    }
}

/// An encoder ready to run.
pub struct Bert {
    config: Config,
    words: Operator<f32>,
    /// Position and token type 0 together.
    positions: Array2<f32>,
    norm: Norm,
    pub layers: Vec<Layer>,
}

const WORDS: &str = "embeddings.word_embeddings.weight";
const POSITIONS: &str = "embeddings.position_embeddings.weight";

impl Bert {
    /// Loads a Hugging Face folder, dense or factored.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::load_by(&mut checkpoint.loader()?, checkpoint)
    }

    /// The same by a loader of its weights.
    pub fn load_by(weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint) -> Result<Self> {
        let (path, text) = text_of(checkpoint, "config.json")?;
        let config: Config = serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        let positions = config.position_embedding_type.as_deref().unwrap_or("absolute");
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        for (field, found, expected) in
            [("hidden_act", config.hidden_act.as_str(), "gelu"), ("position_embedding_type", positions, "absolute")]
        {
            ensure!(found == expected, "in {}: `{field}` is {found}, expected {expected}", path.display());
        }
        ensure!(heads > 0 && hidden % heads == 0, "in {}: {hidden} features in {heads} heads", path.display());
        let norm = |name: String| -> Result<Norm> {
            Ok(Norm {
                gain: sized(checkpoint, &format!("{name}.weight"), hidden)?,
                bias: sized(checkpoint, &format!("{name}.bias"), hidden)?,
            })
        };
        let mut linear = |name: String, outputs: Option<usize>, inputs: usize| -> Result<Linear> {
            let weight = weights.operator(&format!("{name}.weight"))?;
            let (m, n) = weight.shape();
            let outputs = outputs.unwrap_or(m);
            ensure!(
                (m, n) == (outputs, inputs),
                "{name}.weight is {m}x{n}, where config.json needs {outputs}x{inputs}"
            );
            Ok(Linear { weight, bias: sized(checkpoint, &format!("{name}.bias"), m)? })
        };
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("encoder.layer.{i}.{part}");
            let [query, key, value, output, up, down] = LINEAR.map(name);
            let up = linear(up, None, hidden)?;
            let ffn = up.weight.shape().0;
            layers.push(Layer {
                query: linear(query, Some(hidden), hidden)?,
                key: linear(key, Some(hidden), hidden)?,
                value: linear(value, Some(hidden), hidden)?,
                output: linear(output, Some(hidden), hidden)?,
                attention_norm: norm(name("attention.output.LayerNorm"))?,
                up,
                down: linear(down, Some(hidden), ffn)?,
                norm: norm(name("output.LayerNorm"))?,
            });
        }
        let fits = |name: &str, (m, n): (usize, usize), rows: usize| -> Result<()> {
            ensure!((m, n) == (rows, hidden), "{name} is {m}x{n}, config.json says {rows}x{hidden}");
            Ok(())
        };
        let types = weights.operator("embeddings.token_type_embeddings.weight")?.to_dense();
        ensure!(
            types.nrows() > 0 && types.ncols() == hidden,
            "token types of {:?}, expected [_, {hidden}]",
            types.dim()
        );
        let mut positions = weights.operator(POSITIONS)?.to_dense();
        fits(POSITIONS, positions.dim(), config.max_position_embeddings)?;
        positions += &types.row(0);
        let words = weights.operator(WORDS)?;
        fits(WORDS, words.shape(), config.vocab_size)?;
        Ok(Bert { words, positions, norm: norm("embeddings.LayerNorm".into())?, layers, config })
    }

    pub fn heads(&self) -> Heads {
        let heads = self.config.num_attention_heads;
        Heads { queries: heads, keys: heads, width: self.config.hidden_size / heads }
    }

    /// Numbers of an embedding.
    pub fn features(&self) -> usize {
        self.config.hidden_size
    }

    pub fn eps(&self) -> f32 {
        self.config.layer_norm_eps
    }

    /// The input of the first block, features × tokens.
    pub fn start(&self, tokens: &[usize]) -> Result<Array2<f32>> {
        let Config { vocab_size, max_position_embeddings: longest, .. } = self.config;
        ensure!(!tokens.is_empty() && tokens.len() <= longest, "{} tokens, expected 1 to {longest}", tokens.len());
        let unknown = tokens.iter().find(|&&token| token >= vocab_size);
        ensure!(
            unknown.is_none(),
            "token {unknown:?} of a vocabulary of {vocab_size}: the tokenizer is another model's"
        );
        let sum = self.words.select_rows(tokens)? + self.positions.slice(ndarray::s![..tokens.len(), ..]);
        Ok(self.norm.apply(&sum.t().as_standard_layout().into_owned(), self.eps()))
    }

    /// The mean of the last hidden states, of length 1.
    pub fn embed(&self, tokens: &[usize]) -> Result<Array1<f32>> {
        let mut x = self.start(tokens)?;
        for layer in &self.layers {
            x = layer.pass(x, self.heads(), self.eps())?.1;
        }
        let mean = x.mean_axis(Axis(1)).context("no tokens")?;
        Ok(&mean / mean.dot(&mean).sqrt())
    }

    /// Embeddings of sentences, one a row. In parallel.
    pub fn embed_all(&self, sentences: &[Vec<usize>], done: &(dyn Fn(usize) + Sync)) -> Result<Array2<f32>> {
        let each = sentences.par_iter().map(|tokens| {
            let embedding = self.embed(tokens);
            done(tokens.len());
            embedding
        });
        let rows = each.collect::<Result<Vec<_>>>()?;
        Ok(ndarray::stack(Axis(0), &rows.iter().map(|row| row.view()).collect::<Vec<_>>())?)
    }
}

fn sized(checkpoint: &Checkpoint, name: &str, length: usize) -> Result<Array1<f32>> {
    let vector = vector(checkpoint, name)?;
    ensure!(vector.len() == length, "{name} has {} numbers, where {length} are needed", vector.len());
    Ok(vector)
}

/// The first paragraphs of 60 to 400 characters as tokens, 128 at most of each.
pub fn paragraphs(model: &Path, text: &Path, count: usize) -> Result<Vec<Vec<usize>>> {
    let path = model.join("tokenizer.json");
    let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    let truncation = TruncationParams { max_length: 128, ..TruncationParams::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    tokenizer.with_padding(None);
    let whole = std::fs::read_to_string(text).with_context(|| format!("reading {}", text.display()))?;
    let apart = Regex::new(r"\n\s*\n")?;
    let fit = apart.split(&whole).filter(|part| (60..=400).contains(&part.chars().count()));
    let encode = |part| -> Result<Vec<usize>> {
        let encoded = tokenizer.encode(part, true).map_err(|e| anyhow!("{}: {e}", text.display()))?;
        Ok(encoded.get_ids().iter().map(|&id| id as usize).collect())
    };
    let found = fit.take(count).map(encode).collect::<Result<Vec<_>>>()?;
    ensure!(
        found.len() > 2,
        "{} has {} paragraphs of 60 to 400 characters, at least 3 are needed",
        text.display(),
        found.len()
    );
    Ok(found)
}

/// How far embeddings have moved.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Moved {
    /// Between a sentence's embeddings before and after, mean.
    pub mean_cosine: f64,
    /// Rank correlation of the similarities of all pairs before and after.
    pub spearman: f64,
    /// Share of sentences whose nearest neighbour stays the same.
    pub same_neighbour: f64,
}

impl Moved {
    /// Compares embeddings of the same sentences, one a row.
    pub fn between(before: &Array2<f32>, after: &Array2<f32>) -> Self {
        let count = before.nrows();
        let (a, b) = (before.dot(&before.t()), after.dot(&after.t()));
        let pairs = |s: &Array2<f32>| -> Vec<f32> {
            (0..count).flat_map(|i| (i + 1..count).map(move |j| (i, j))).map(|at| s[at]).collect()
        };
        let nearest =
            |s: &Array2<f32>, i: usize| (0..count).filter(|&j| j != i).max_by(|&j, &k| s[(i, j)].total_cmp(&s[(i, k)]));
        let same = (0..count).filter(|&i| nearest(&a, i) == nearest(&b, i)).count();
        let cosines = (before * after).sum_axis(Axis(1)).mapv(f64::from);
        Moved {
            mean_cosine: cosines.sum() / count as f64,
            spearman: correlation(&ranks(&pairs(&a)), &ranks(&pairs(&b))),
            same_neighbour: same as f64 / count as f64,
        }
    }
}

/// The position of each value in their order.
fn ranks(values: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    order.into_iter().enumerate().for_each(|(rank, at)| ranks[at] = rank as f64);
    ranks
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let centred = |v: &[f64]| {
        let v = Array1::from(v.to_vec());
        let mean = v.sum() / v.len() as f64;
        v - mean
    };
    let (a, b) = (centred(a), centred(b));
    a.dot(&b) / (a.dot(&a) * b.dot(&b)).sqrt()
}
