//! From a factored checkpoint back to operators.

use std::collections::BTreeMap;

use super::Checkpoint;
use crate::error::{Error, Result};
use crate::operator::codec::{Decoder, FORMAT_VERSION, Header, METADATA_KEY, Source, Tree};
use crate::operator::{ActivationBits, Dense, Operator};
use crate::scalar::Real;
use crate::tensor::Stored;

impl Source for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Stored<'_>> {
        self.get(name)
    }
}

impl Checkpoint {
    /// The compressed weights of a factored checkpoint and their operator trees; empty for a dense one.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the description is damaged or of a newer format.
    pub fn trees(&self) -> Result<BTreeMap<String, Tree>> {
        let mut all = BTreeMap::new();
        for shard in self.shards() {
            let Some(text) = shard.metadata.get(METADATA_KEY) else { continue };
            let damaged = |detail: String| Error::Checkpoint { path: shard.path().into(), detail };
            let version: Version = serde_json::from_str(text).map_err(|e| damaged(format!("metadata: {e}")))?;
            if version.format != FORMAT_VERSION {
                let detail = format!("factored format {}, this version reads {FORMAT_VERSION}", version.format);
                return Err(damaged(detail));
            }
            let header: Header = serde_json::from_str(text).map_err(|e| damaged(format!("metadata: {e}")))?;
            all.extend(header.weights);
        }
        Ok(all)
    }

    /// Parts that do not fit: not a user's shapes are at fault, but the file.
    fn contradiction(&self, error: Error) -> Error {
        let unfit = match &error {
            Error::Tensor { source, .. } => matches!(**source, Error::Shape { .. }),
            other => matches!(other, Error::Shape { .. }),
        };
        if !unfit {
            return error;
        }
        let detail = format!("damaged or changed since it was written, compress the original again ({error})");
        Error::Checkpoint { path: self.root().into(), detail }
    }

    /// Loads weights as operators; what they share is loaded once. See [`Loader`].
    ///
    /// # Errors
    /// As [`trees`](Self::trees).
    pub fn loader<T: Real>(&self) -> Result<Loader<'_, T>> {
        Ok(Loader { checkpoint: self, trees: self.trees()?, decoder: Decoder::new(self) })
    }
}

#[derive(serde::Deserialize)]
struct Version {
    format: u32,
}

/// Loads weights of a checkpoint, factored or dense, as operators.
#[derive(Debug)]
pub struct Loader<'c, T: Real> {
    checkpoint: &'c Checkpoint,
    trees: BTreeMap<String, Tree>,
    decoder: Decoder<'c, Checkpoint, T>,
}

impl<T: Real> Loader<'_, T> {
    /// The same, for packed codes that meet their inputs in so many bits, or more: faster with several vectors at once, and less
    /// exact. See [`ActivationBits`].
    ///
    /// ```no_run
    /// # fn main() -> weightpress::Result<()> {
    /// use weightpress::checkpoint::Checkpoint;
    /// use weightpress::operator::ActivationBits;
    ///
    /// let checkpoint = Checkpoint::open("compressed")?;
    /// let mut weights = checkpoint.loader::<f32>()?.with_activation_bits(ActivationBits::Eight);
    /// let head = weights.operator("lm_head.weight")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_activation_bits(self, activations: ActivationBits) -> Self {
        Loader { decoder: self.decoder.with_activation_bits(activations), ..self }
    }

    /// The names of the compressed weights.
    pub fn compressed(&self) -> impl Iterator<Item = &str> {
        self.trees.keys().map(String::as_str)
    }

    /// A weight by its original name: its operator if it was compressed, else the matrix itself.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Shape`] if it is no matrix, [`Error::Checkpoint`] if the parts of a compressed
    /// one do not fit its description, [`Error::NonFinite`].
    pub fn operator(&mut self, name: &str) -> Result<Operator<T>> {
        use crate::operator::LinearOperator;
        let mut load = || match self.trees.get(name) {
            Some(tree) => {
                let whole = |operator: Operator<T>| match operator.shape() == tree.shape {
                    true => Ok(operator),
                    false => Err(Error::shape(tree.shape, operator.shape())),
                };
                self.decoder.decode(&tree.operator).and_then(whole).map_err(|e| self.checkpoint.contradiction(e))
            }
            None => Ok(Operator::Dense(Dense::stored(&self.checkpoint.get(name)?, "weight")?)),
        };
        load().map_err(|e: Error| e.of_tensor(name))
    }
}
