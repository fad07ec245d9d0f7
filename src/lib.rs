//! weightpress
pub mod allocate;
pub mod budget;
pub mod checkpoint;
pub mod error;
pub mod factorize;
pub mod linalg;
pub mod metric;
mod named;
pub mod operator;
pub mod recipe;
pub mod scalar;
pub mod stats;
pub mod tensor;
pub use error::{Error, Result};
pub use recipe::{Recipe, Rule};
