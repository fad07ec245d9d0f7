//! What the examples share: exit codes, a Llama forward pass over operators, and a progress bar.

pub mod exit;
pub mod llama;
pub mod progress;
