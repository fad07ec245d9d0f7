//! One integration binary; its modules mirror `src`, and `examples`.

mod checkpoint;
mod cli;
mod convert;
mod factorize;
mod journey;
mod linalg;
mod metric;
mod python;
mod recipe;
mod run;
mod stats;
