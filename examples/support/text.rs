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
