//! What the examples share: exit codes, texts, forward passes over operators, calibration, and a progress bar.

pub mod attention;
pub mod bert;
pub mod dinov2;
pub mod encoder;
pub mod exit;
pub mod fisher;
pub mod layers;
pub mod llama;
pub mod math;
pub mod moved;
pub mod progress;
pub mod samples;
pub mod text;
pub mod walk;
