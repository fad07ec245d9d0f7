//! A text as tokens: by the tokenizer beside the model, or as bytes if there is none and the vocabulary is that.

// Each example uses a part of it.
#![allow(dead_code)]

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokenizers::Tokenizer;

/// The tokens of a text, and where each one ends in it.
pub struct Tokens {
    pub ids: Vec<usize>,
    /// One past the last byte of each token.
    ends: Vec<usize>,
}

impl Tokens {
    /// Reads a text with what `model` (a folder) has for it, for a vocabulary of this size.
    pub fn read(model: &Path, vocabulary: usize, text: &Path) -> Result<Self> {
        let bytes = std::fs::read(text).with_context(|| format!("reading {}", text.display()))?;
        let path = model.join("tokenizer.json");
        if !path.exists() {
            ensure!(vocabulary == 256, "{} is missing, and {vocabulary} tokens are not bytes", path.display());
            let ends = (1..=bytes.len()).collect();
            return Ok(Tokens { ids: bytes.into_iter().map(usize::from).collect(), ends });
        }
        let tokenizer = Tokenizer::from_file(&path).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        let size = tokenizer.get_vocab_size(true);
        if size > vocabulary {
            bail!("{} has {size} tokens, the model's vocabulary {vocabulary}", path.display());
        }
        let string = String::from_utf8(bytes).with_context(|| format!("{}", text.display()))?;
        let encoded = tokenizer.encode(string, false).map_err(|e| anyhow!("{}: {e}", text.display()))?;
        let ids = encoded.get_ids().iter().map(|&id| id as usize).collect();
        Ok(Tokens { ids, ends: encoded.get_offsets().iter().map(|&(_, end)| end).collect() })
    }

    /// The first tokens, as many as asked for or as there are.
    pub fn first(mut self, count: usize) -> Self {
        self.ids.truncate(count);
        self.ends.truncate(count);
        self
    }

    /// Bytes of the text from the end of the first token to that of the last: what a score of all but the first
    /// covers.
    pub fn scored_bytes(&self) -> usize {
        self.ends.last().unwrap_or(&0) - self.ends.first().unwrap_or(&0)
    }
}

/// Windows spread evenly over a whole text: as many as `tokens` make up, or as there are.
pub fn windows<'t>(all: &'t [usize], text: &Path, tokens: usize, window: usize) -> Result<Vec<&'t [usize]>> {
    ensure!(window > 0 && tokens >= window, "{tokens} tokens in windows of {window}");
    let (text, has) = (text.display(), all.len());
    ensure!(has >= window, "{text} has {has} tokens, fewer than a window of {window}");
    let count = (tokens / window).min(has / window);
    let apart = (has - window) as f64 / (count.max(2) - 1) as f64;
    Ok((0..count).map(|i| (i as f64 * apart) as usize).map(|at| &all[at..at + window]).collect())
}
