//! weightpress
pub mod checkpoint;
pub mod error;
pub mod linalg;
pub mod scalar;
pub mod stats;
pub mod tensor;
pub use error::{Error, Result};
