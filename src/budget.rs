//! What a compressed weight may cost.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A limit on one weight, or on a group that is compressed together. Never exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    /// Bytes on disk after ÷ before, everything counted (indices, masks, scales), in (0, 1].
    Keep(f64),
    /// Bytes on disk.
    Bytes(u64),
    /// Rank (of a low-rank form), or the kept columns of a basis.
    Rank(usize),
    /// Fraction of the squared metric norm of W to keep at least: error² ≤ (1 − energy)·‖W‖².
    Energy(f64),
    /// Relative metric error ‖W − Ŵ‖ ÷ ‖W‖ to stay within.
    Error(f64),
}

impl Budget {
    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a fraction outside its range.
    pub fn check(&self) -> Result<()> {
        let sound = match *self {
            Budget::Keep(keep) => keep > 0.0 && keep <= 1.0,
            Budget::Energy(energy) => (0.0..=1.0).contains(&energy),
            Budget::Error(error) => (0.0..=1.0).contains(&error),
            Budget::Bytes(_) | Budget::Rank(_) => true,
        };
        if sound { Ok(()) } else { Err(Error::Unsupported(format!("budget {self}: expected a fraction of 1"))) }
    }

    /// The limit in bytes, for the forms that set one, of weights that take `before` bytes.
    pub fn byte_limit(&self, before: u64) -> Option<u64> {
        match *self {
            // A hair of slack, so that keep = 0.8 of 1000 bytes is 800 and not 799.
            Budget::Keep(keep) => Some((before as f64 * keep + 1e-6) as u64),
            Budget::Bytes(bytes) => Some(bytes),
            Budget::Rank(_) | Budget::Energy(_) | Budget::Error(_) => None,
        }
    }

    /// The largest allowed squared error, for the forms that set one.
    pub fn error_limit(&self, norm_squared: f64) -> Option<f64> {
        match *self {
            Budget::Energy(energy) => Some((1.0 - energy) * norm_squared),
            Budget::Error(error) => Some(error * error * norm_squared),
            Budget::Keep(_) | Budget::Bytes(_) | Budget::Rank(_) => None,
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::Keep(v) => write!(f, "keep {v}"),
            Budget::Bytes(v) => write!(f, "bytes {v}"),
            Budget::Rank(v) => write!(f, "rank {v}"),
            Budget::Energy(v) => write!(f, "energy {v}"),
            Budget::Error(v) => write!(f, "error {v}"),
        }
    }
}
