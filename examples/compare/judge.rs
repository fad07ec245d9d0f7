//! What a compressed model is worth: one number, the less the better.

use anyhow::{Result, bail, ensure};
use ndarray::Array2;
use regex::Regex;
use weightpress::checkpoint::Checkpoint;
use weightpress::linalg::Faer;
use weightpress::metric::Metric;
use weightpress::operator::LinearOperator;
use weightpress::stats::{Kind, Stats};

use crate::support::llama::{Config, Llama};
use crate::support::moved::Moved;
use crate::support::samples::{Given, Samples};
use crate::support::text::Tokens;

/// Tokens that see each other.
const WINDOW: usize = 512;

/// What it is judged by.
pub enum Judge {
    /// Perplexity over these tokens.
    Language(Vec<usize>),
    /// 1 − the mean cosine between embeddings of the paragraphs of a text or of the images of a folder, before and after.
    Encoder { samples: Box<Samples>, before: Array2<f32> },
    /// Mean relative error of the outputs of these weights.
    Outputs { stats: Box<Stats>, weights: Vec<String> },
}

impl Judge {
    /// By a text or by images, as the model's architecture has it.
    pub fn of_samples(checkpoint: &Checkpoint, given: &Given, tokens: usize) -> Result<Self> {
        if let Some(samples) = Samples::load(checkpoint, given)? {
            let before = samples.embed(&|_| ())?;
            return Ok(Judge::Encoder { samples: Box::new(samples), before });
        }
        let text = given.text()?;
        let vocabulary = Config::read(checkpoint)?.vocab_size;
        let ids = Tokens::read(checkpoint.root(), vocabulary, text)?.first(tokens.saturating_add(1)).ids;
        ensure!(ids.len() > WINDOW, "{} has {} tokens, at least {} are needed", text.display(), ids.len(), WINDOW + 1);
        Ok(Judge::Language(ids))
    }

    /// By the outputs of all weights that match and have statistics.
    pub fn of_outputs(checkpoint: &Checkpoint, stats: Stats, pattern: &str) -> Result<Self> {
        let pattern = Regex::new(&format!("^(?:{pattern})$"))?;
        let names = checkpoint.tensors().map(|tensor| tensor.name.clone());
        let weights: Vec<_> = names.filter(|name| pattern.is_match(name) && stats.has(name, Kind::Gram)).collect();
        if weights.is_empty() {
            bail!("the held-out statistics have no Gram matrix of any matched weight");
        }
        Ok(Judge::Outputs { stats: Box::new(stats), weights })
    }

    /// What the number is.
    pub fn what(&self) -> &'static str {
        match self {
            Judge::Language(_) => "perplexity",
            Judge::Encoder { .. } => "1 - cosine",
            Judge::Outputs { .. } => "output error",
        }
    }

    /// The number.
    pub fn loss(&self, dense: &Checkpoint, compressed: &Checkpoint) -> Result<f64> {
        match self {
            Judge::Language(ids) => Ok(Llama::load(compressed)?.mean_loss(ids, WINDOW, &|_| ())?.exp()),
            Judge::Encoder { samples, before } => {
                let after = samples.of(&mut compressed.loader()?, compressed)?.embed(&|_| ())?;
                Ok((1.0 - Moved::between(before, &after).mean_cosine).max(0.0))
            }
            Judge::Outputs { stats, weights } => {
                let (mut original, mut written) = (dense.loader::<f32>()?, compressed.loader::<f32>()?);
                let mut sum = 0.0;
                for name in weights {
                    let metric = Metric::gram(stats.gram(name)?);
                    let weight = original.operator(name)?.to_dense();
                    let error = metric.squared((&weight - &written.operator(name)?.to_dense()).view(), &Faer);
                    let norm = metric.norm_squared(weight.view(), &Faer);
                    sum += if norm > 0.0 { (error.max(0.0) / norm).sqrt() } else { 0.0 };
                }
                Ok(sum / weights.len() as f64)
            }
        }
    }
}
