//! Which weights statistics were collected on.

use super::Stats;
use crate::error::{Error, Result};
use crate::tensor::Stored;

/// The metadata key: a JSON object from weight to fingerprint.
pub(super) const ORIGIN: &str = "origin";

/// Bytes of a weight that go into its fingerprint.
const SAMPLE: usize = 4096;

/// blake3 of a weight's dtype, shape and first bytes, which tells checkpoints apart without reading them.
fn fingerprint(weight: Stored<'_>) -> String {
    let mut hash = blake3::Hasher::new();
    hash.update(format!("{}{:?}", weight.dtype, weight.shape).as_bytes());
    hash.update(weight.bytes.get(..SAMPLE).unwrap_or(weight.bytes));
    hash.finalize().to_hex().to_string()
}

impl Stats {
    /// Notes that what is known about a weight was collected on this one; [`save`](Self::save) keeps it.
    pub fn set_origin(&mut self, name: &str, weight: Stored<'_>) {
        self.origins.insert(name.into(), fingerprint(weight));
    }

    /// Whether what is known about a weight was collected on this one, by dtype, shape and first bytes. Statistics
    /// that do not say pass.
    ///
    /// # Errors
    /// [`Error::Statistics`] with the fingerprints expected and found.
    pub fn check_origin(&self, name: &str, weight: Stored<'_>) -> Result<()> {
        let found = fingerprint(weight);
        match self.origins.get(name) {
            Some(expected) if *expected != found => Err(Error::Statistics {
                key: name.into(),
                detail: format!(
                    "was another weight when they were collected: fingerprint {expected:.12}…, now {found:.12}…"
                ),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scalar::DType;

    #[test]
    fn another_weight_is_told_apart() {
        let (bytes, other) = ([1u8; 32], [2u8; 32]);
        let stored = |bytes, dtype, shape| Stored { shape, dtype, bytes };
        let mut stats = Stats::empty();
        stats.check_origin("w", stored(&bytes, DType::F32, &[2, 4])).unwrap();
        stats.set_origin("w", stored(&bytes, DType::F32, &[2, 4]));
        stats.check_origin("w", stored(&bytes, DType::F32, &[2, 4])).unwrap();
        stats.check_origin("v", stored(&other, DType::F32, &[2, 4])).unwrap();
        for wrong in [
            stored(&other, DType::F32, &[2, 4]),
            stored(&bytes, DType::F32, &[4, 2]),
            stored(&bytes, DType::BF16, &[4, 4]),
        ] {
            let error = stats.check_origin("w", wrong).unwrap_err();
            assert!(error.is_refusal() && error.to_string().contains("another weight"), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stats.safetensors");
        stats.insert_fisher_row("w", ndarray::array![1.0]).unwrap();
        stats.save(&path, None).unwrap();
        let back = Stats::open(&[path]).unwrap();
        assert!(back.check_origin("w", stored(&other, DType::F32, &[2, 4])).is_err());
        back.check_origin("w", stored(&bytes, DType::F32, &[2, 4])).unwrap();
    }
}
