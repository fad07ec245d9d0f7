//! Trained neural networks made smaller by rewriting their weights, without training.
//!
//! > Minimise the **metric** of W − Ŵ, over all Ŵ of a given **structure**, within a **budget**.
//!
//! A compressed weight is a [linear-operator expression](operator::Operator); a
//! [method](factorize::Method) writes such an expression; everything else — applying, measuring,
//! saving, reporting — is written once per node of the expression, never once per method.
//!
//! | axis | answers | here |
//! |---|---|---|
//! | structure | what form may Ŵ have? | [`factorize`]: weighted low rank, sparse patterns with or without wrappers, chosen columns of an orthogonal basis |
//! | metric | which error counts? | [`metric`]: Frobenius, Fisher, activation, Gram, and pairs of them |
//! | budget | what may it cost? | [`budget`]: bytes, rank, energy or error, for each weight or [spread over all](allocate) |
//!
//! # One matrix
//!
//! ```
//! use weightpress::ndarray::Array2;
//! use weightpress::{Budget, Factorize, LinearOperator, Problem, Svd};
//!
//! let w = Array2::from_shape_fn((64, 96), |(i, j)| ((i * j) as f32 / 50.0).sin());
//! let operators = Svd::default().factorize(&[Problem::new("w", w.view(), Budget::Keep(0.5))])?;
//! let x = Array2::<f32>::ones((96, 4));
//! let y = operators[0].apply(x.view())?;
//! assert_eq!(y.dim(), (64, 4));
//! assert!(operators[0].bytes() <= 64 * 96 * 4 / 2);
//! # Ok::<(), weightpress::Error>(())
//! ```
//!
//! # A checkpoint
//!
//! ```no_run
//! use weightpress::{Checkpoint, Recipe, Stats, run::{Options, Silent}};
//!
//! let checkpoint = Checkpoint::open("model/")?;
//! let stats = Stats::open(&["gram.safetensors"])?;
//! let recipe = Recipe::parse(r#"
//!     [[rule]]
//!     match = 'model\.layers\.\d+\..*_proj\.weight'
//!     method = "svd"
//!     metric = "gram"
//!     budget = { keep = 0.8 }
//! "#)?;
//! let plan = recipe.plan(&checkpoint, &stats)?;
//! println!("{plan}"); // the dry run: every size and refusal
//! let report = plan.run("smaller/", &Options::default(), &Silent)?;
//! println!("{report}");
//! # Ok::<(), weightpress::Error>(())
//! ```
//!
//! # Features
//!
//! * `avx512` (default): AVX-512 kernels, chosen at run time; a no-op on other processors.
//! * `lapack`: `linalg::Lapack`, a backend on the LAPACK that the program links; never in the default build.
//!
//! All of the public interface speaks [`ndarray`], which is re-exported. Nothing panics on bad input:
//! see [`Error`].

#![warn(missing_docs, missing_debug_implementations, unreachable_pub)]
#![deny(unsafe_code, clippy::undocumented_unsafe_blocks)]

pub mod allocate;
pub mod budget;
pub mod checkpoint;
pub mod coder;
pub mod error;
pub mod factorize;
pub mod gauge;
pub mod linalg;
mod memory;
pub mod metric;
mod named;
pub mod operator;
pub mod plan;
#[cfg(target_arch = "x86_64")]
mod processor;
pub mod recipe;
pub mod report;
pub mod run;
pub mod scalar;
mod simd;
pub mod stats;
pub mod tensor;
#[cfg(test)]
mod testing;
mod threads;
mod unit;

pub use ndarray;

pub use budget::Budget;
pub use checkpoint::Checkpoint;
pub use error::{Error, Result};
pub use factorize::{Factorize, Method, Problem, Svd};
pub use metric::Metric;
pub use operator::{LinearOperator, Operator};
pub use plan::Plan;
pub use recipe::{Recipe, Rule};
pub use report::Report;
pub use stats::Stats;
