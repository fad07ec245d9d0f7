//! How much the error of a weight counts beside that of others.

use ndarray::Array1;

use super::{Given, Kind, Stats, fisher};
use crate::error::{Error, Result};

impl Stats {
    /// Puts in what an allocation multiplies the squared error of a weight with.
    ///
    /// # Errors
    /// [`Error::Statistics`] unless it is finite and positive, and if there is one already.
    pub fn insert_sensitivity(&mut self, weight: &str, value: f64) -> Result<()> {
        self.insert_vector(Kind::Sensitivity.key(weight), Array1::from_elem(1, value))
    }

    /// What an allocation multiplies the squared error of a weight with; 1 if nothing is known.
    ///
    /// # Errors
    /// [`Error::Statistics`] unless it is one finite, positive number.
    pub fn sensitivity(&self, weight: &str) -> Result<f64> {
        let key = Kind::Sensitivity.key(weight);
        let refuse = |detail: String| Error::Statistics { key: key.clone(), detail };
        let values = match (self.given.get(&key), self.stored(&key)) {
            (Some(Given::Vector(values)), _) => values.clone(),
            (_, Some(stored)) => fisher::read(stored).map_err(|e| refuse(e.to_string()))?,
            _ => return Ok(1.0),
        };
        fisher::check(&key, &values)?;
        match values.as_slice() {
            Some(&[value]) => Ok(value),
            _ => Err(refuse(format!("has {} numbers, expected one", values.len()))),
        }
    }
}
