//! Sentences as a BERT-architecture encoder has them, whose linear layers are weightpress operators.

// Each example uses a part of it.
#![allow(dead_code)]

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use ndarray::{Array1, Array2, Axis};
use regex::Regex;
use serde::Deserialize;
use tokenizers::{Tokenizer, TruncationParams};
use weightpress::checkpoint::{Checkpoint, Loader};
use weightpress::operator::{LinearOperator, Operator};

use super::attention::Heads;
use super::encoder::Encoder;
use super::layers::{Layer, Norm, Trace, Visitor};
use super::llama::json_of;
use super::math::layer_norm_back;

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

/// An encoder ready to run.
pub struct Bert {
    config: Config,
    heads: Heads,
    words: Operator<f32>,
    /// Position and token type 0 together.
    positions: Array2<f32>,
    norm: Norm,
    layers: Vec<Layer>,
}

const WORDS: &str = "embeddings.word_embeddings.weight";
const POSITIONS: &str = "embeddings.position_embeddings.weight";

impl Encoder for Bert {
    type Sample = Vec<usize>;
    const LINEAR: [&'static str; 6] = [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ];

    fn load_by(weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint) -> Result<Self> {
        let (path, config) = json_of::<Config>(checkpoint, "config.json")?;
        let positions = config.position_embedding_type.as_deref().unwrap_or("absolute");
        let hidden = config.hidden_size;
        let heads =
            Heads::even(hidden, config.num_attention_heads).with_context(|| format!("in {}", path.display()))?;
        for (field, found, expected) in
            [("hidden_act", config.hidden_act.as_str(), "gelu"), ("position_embedding_type", positions, "absolute")]
        {
            ensure!(found == expected, "in {}: `{field}` is {found}, expected {expected}", path.display());
        }
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("encoder.layer.{i}.{part}");
            let norms = ["attention.output.LayerNorm", "output.LayerNorm"].map(name);
            layers.push(Layer::load(weights, checkpoint, Self::LINEAR.map(name), norms, hidden)?);
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
        let norm = Norm::load(checkpoint, "embeddings.LayerNorm", hidden)?;
        Ok(Bert { words, positions, norm, layers, heads, config })
    }

    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn features(&self) -> usize {
        self.config.hidden_size
    }

    fn tokens(&self, tokens: &Vec<usize>) -> usize {
        tokens.len()
    }

    fn start(&self, tokens: &Vec<usize>) -> Result<Array2<f32>> {
        let Config { vocab_size, max_position_embeddings: longest, .. } = self.config;
        ensure!(!tokens.is_empty() && tokens.len() <= longest, "{} tokens, expected 1 to {longest}", tokens.len());
        let unknown = tokens.iter().find(|&&token| token >= vocab_size);
        ensure!(
            unknown.is_none(),
            "token {unknown:?} of a vocabulary of {vocab_size}: the tokenizer is another model's"
        );
        let sum = self.words.select_rows(tokens)? + self.positions.slice(ndarray::s![..tokens.len(), ..]);
        Ok(self.norm.apply(&sum.t().as_standard_layout().into_owned(), self.config.layer_norm_eps))
    }

    /// Norms come behind what is added up.
    fn pass(&self, i: usize, x: Array2<f32>) -> Result<(Trace, Array2<f32>)> {
        let (layer, eps) = (&self.layers[i], self.config.layer_norm_eps);
        let ([q, k, v, mixed], output) = layer.attend(&x, self.heads)?;
        let attended = &x + &output;
        let middle = layer.norms[0].apply(&attended, eps);
        let ([up, gelu], down) = layer.widen(&middle)?;
        let end = &middle + &down;
        let y = layer.norms[1].apply(&end, eps);
        Ok((Trace { input: x, q, k, v, mixed, middle, up, gelu, normed: [attended, end] }, y))
    }

    fn back(&self, i: usize, trace: &Trace, d: Array2<f32>, visit: Visitor<'_>) -> Result<Array2<f32>> {
        let (layer, eps) = (&self.layers[i], self.config.layer_norm_eps);
        let [attended, end] = &trace.normed;
        let mut d = layer_norm_back(end, &layer.norms[1].gain, eps, d);
        d += &layer.widen_back(trace, &d, visit)?;
        let mut d = layer_norm_back(attended, &layer.norms[0].gain, eps, d);
        d += &layer.attend_back(trace, &d, self.heads, visit)?;
        Ok(d)
    }

    /// The mean of the last hidden states.
    fn pooled(&self, x: &Array2<f32>) -> Result<Array1<f32>> {
        x.mean_axis(Axis(1)).context("no tokens")
    }

    fn pooled_back(&self, x: &Array2<f32>, d: Array1<f32>) -> Array2<f32> {
        let mut at_each = Array2::zeros(x.dim());
        at_each += &(d / x.ncols() as f32).insert_axis(Axis(1));
        at_each
    }
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
