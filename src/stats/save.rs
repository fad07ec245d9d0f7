//! Writing a statistics file.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use super::origin::ORIGIN;
use super::{FISHER, Given, Kind, Stats};
use crate::checkpoint::{Entry, Payload, write_shard};
use crate::error::{Error, Result};
use crate::scalar::{DType, narrow, widen};

impl Stats {
    /// Writes all statistics into one file, in f32, with the aliases and `tokens` (if `None`, what
    /// [`tokens`](Self::tokens) says) in its metadata. The name appears when the file is complete.
    ///
    /// Matrices that are not f32 already are narrowed in memory, all of them at once.
    ///
    /// # Errors
    /// [`Error::Statistics`] if a value does not fit into f32; [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>, tokens: Option<u64>) -> Result<()> {
        let mut entries = Vec::new();
        for (key, given) in &self.given {
            let (shape, bytes) = match given {
                Given::Gram(gram) => (vec![gram.dim(), gram.dim()], to_f32(key, gram.matrix().iter())?),
                Given::Vector(values) => (vec![values.len()], to_f32(key, values.iter())?),
            };
            entries.push(entry(key, shape, bytes.into()));
        }
        for key in self.places.keys().filter(|key| is_statistic(key)) {
            let Some(stored) = self.stored(key) else { continue };
            let bytes = match stored.dtype {
                DType::F32 => Cow::Borrowed(stored.bytes),
                dtype => {
                    let wide = widen::<f64>(dtype, stored.bytes)
                        .map_err(|e| Error::Statistics { key: key.clone(), detail: e.to_string() })?;
                    to_f32(key, wide.iter())?.into()
                }
            };
            entries.push(entry(key, stored.shape.to_vec(), bytes));
        }
        let mut metadata = BTreeMap::new();
        if let Some(tokens) = tokens.or(self.tokens) {
            metadata.insert("tokens".into(), tokens.to_string());
        }
        if !self.aliases.is_empty() {
            // `Value` displays as JSON, and cannot fail to.
            let aliases = self.aliases.iter().map(|(key, of)| (key.clone(), of.clone().into()));
            metadata.insert("gram_alias".into(), serde_json::Value::Object(aliases.collect()).to_string());
        }
        if !self.origins.is_empty() {
            let origins = self.origins.iter().map(|(name, print)| (name.clone(), print.clone().into()));
            metadata.insert(ORIGIN.into(), serde_json::Value::Object(origins.collect()).to_string());
        }
        write_shard(path.as_ref(), &metadata, entries).map(drop)
    }
}

fn entry<'a>(key: &str, shape: Vec<usize>, bytes: Cow<'a, [u8]>) -> Entry<'a> {
    Entry { name: key.into(), dtype: DType::F32, shape, data: Payload::Bytes(bytes) }
}

fn is_statistic(key: &str) -> bool {
    let kinds = [Kind::Gram, Kind::FisherRow, Kind::FisherCol, Kind::Sensitivity].map(|kind| kind.to_string());
    key.rsplit_once('.').is_some_and(|(_, last)| last == FISHER || kinds.iter().any(|kind| kind == last))
}

fn to_f32<'a>(key: &str, values: impl Iterator<Item = &'a f64> + Clone) -> Result<Vec<u8>> {
    match values.clone().find(|value| !(**value as f32).is_finite()) {
        Some(value) => Err(Error::Statistics { key: key.into(), detail: format!("holds {value}, too large for F32") }),
        None => narrow(DType::F32, values),
    }
}
