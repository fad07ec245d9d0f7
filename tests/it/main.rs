//! One integration binary; its modules mirror `src`, and `examples`.

mod align;
mod cache;
mod checkpoint;
mod cli;
mod convert;
mod dinov2;
mod encoder;
mod factorize;
mod gptq;
mod journey;
mod linalg;
mod metric;
mod models;
mod python;
mod recipe;
mod run;
mod stats;
#[allow(dead_code)]
#[path = "../../examples/support/mod.rs"]
mod support;
