//! Gram matrices of the inputs of a language model's linear layers (Llama architecture), over a text.
//!
//! ```text
//! cargo run --release --example calibrate -- MODEL --text calibration.txt --out gram.safetensors
//! ```
//!
//! Windows are spread evenly over the whole text. The file is what `compress --stats` reads: one mean of x·xᵀ for
//! each input site, shared by the weights that see the same input. (Fisher sums need gradients, which this forward
//! pass has none of.)
//!
//! Exit codes: 0 done, 2 the input was refused, 1 something failed on the way.

mod support {
    pub mod exit;
    pub mod llama;
    pub mod text;
}

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;
use weightpress::checkpoint::Checkpoint;

use support::exit;
use support::llama::Llama;
use support::text::Tokens;

#[derive(Parser)]
#[command(about = "Calibration statistics of a language model over a text")]
struct Arguments {
    /// Folder with config.json and weights
    model: PathBuf,
    /// The text; of the kind that the model will see
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// The statistics file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens to run the model over
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    tokens: usize,
    /// Tokens that see each other
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
}

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let model = Llama::load(&checkpoint)?;
    let tokens = Tokens::read(checkpoint.root(), model.config.vocab_size, &arguments.text)?;
    let (all, window) = (&tokens.ids, arguments.window);
    ensure!(window > 0 && arguments.tokens >= window, "{} tokens in windows of {window}", arguments.tokens);
    let (text, has) = (arguments.text.display(), all.len());
    ensure!(has >= window, "{text} has {has} tokens, fewer than a window of {window}");
    let count = (arguments.tokens / window).min(has / window);
    let apart = (has - window) as f64 / (count.max(2) - 1) as f64;
    let windows: Vec<&[usize]> =
        (0..count).map(|i| (i as f64 * apart) as usize).map(|at| &all[at..at + window]).collect();
    let start = Instant::now();
    let stats = model.calibrate(&windows)?;
    stats.save(&arguments.out, Some((count * window) as u64))?;
    exit::answer(&format!(
        "{} windows of {window} tokens in {:.1} s, written to {}",
        windows.len(),
        start.elapsed().as_secs_f64(),
        arguments.out.display()
    ))
}
