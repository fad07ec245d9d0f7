//! weightpress
pub mod budget;
pub mod error;
pub mod factorize;
pub mod linalg;
pub mod metric;
pub mod operator;
pub mod scalar;
pub mod stats;
pub mod tensor;
pub use error::{Error, Result};
