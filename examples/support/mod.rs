//! What the examples share: a Llama forward pass over operators, and a progress bar.

pub mod llama;
pub mod progress;
