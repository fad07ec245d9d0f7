//! Perplexity and speed of language models (Llama architecture) on a text: dense or factored, side by side.
//!
//! ```text
//! cargo run --release --example evaluate -- examples/model --text examples/model/heldout.txt
//! cargo run --release --example evaluate -- MODEL COMPRESSED --text heldout.txt --tokens 8192
//! ```
//!
//! The first tokens of the text are cut into windows; every token but the very first is scored once. A factored
//! checkpoint runs from its factors: no weight is rebuilt.
//!
//! Exit codes: 0 done, 2 the input was refused, 1 something failed on the way.

mod support {
    pub mod exit;
    pub mod llama;
    pub mod text;
}

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Parser;
use serde::Serialize;
use weightpress::checkpoint::Checkpoint;

use support::exit;
use support::llama::{Cache, Llama};
use support::text::Tokens;

#[derive(Parser)]
#[command(about = "Perplexity, bits per byte and tokens per second of one or several checkpoints")]
struct Arguments {
    /// Folders with config.json and weights, dense or factored; others are compared with the first
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// The text
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens to score
    #[arg(long, value_name = "N", default_value_t = 8192)]
    tokens: usize,
    /// Tokens that see each other
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
    /// Tokens to decode one by one for the speed; 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 64)]
    decode: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What one model scored.
#[derive(Serialize)]
struct Score {
    model: PathBuf,
    file_bytes: u64,
    compressed_weights: usize,
    tokens: usize,
    perplexity: f64,
    bits_per_byte: f64,
    prefill_tokens_per_second: Option<f64>,
    decode_tokens_per_second: Option<f64>,
    seconds: f64,
}

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let scores = arguments.models.iter().map(|model| score(model, arguments)).collect::<Result<Vec<_>>>()?;
    if arguments.json {
        return exit::answer(&serde_json::to_string_pretty(&scores)?);
    }
    for score in &scores {
        let relative = |ours: f64, first: f64| match std::ptr::eq(score, &scores[0]) {
            true => String::new(),
            false => format!(" ({:+.2} %)", 100.0 * (ours / first - 1.0)),
        };
        let weights = match score.compressed_weights {
            0 => "dense".to_owned(),
            count => format!("{count} weights from their factors"),
        };
        let mut text = format!("{}: {weights}, {} bytes", score.model.display(), score.file_bytes);
        text += &format!(
            "\n  perplexity {:.4}{} over {} tokens, {:.4} bits per byte, {:.1} s",
            score.perplexity,
            relative(score.perplexity, scores[0].perplexity),
            score.tokens,
            score.bits_per_byte,
            score.seconds
        );
        let speeds = [
            ("prefill", score.prefill_tokens_per_second, scores[0].prefill_tokens_per_second),
            ("decode", score.decode_tokens_per_second, scores[0].decode_tokens_per_second),
        ];
        for (what, speed, first) in speeds {
            if let (Some(speed), Some(first)) = (speed, first) {
                text += &format!("\n  {what} {speed:.1} tokens per second{}", relative(speed, first));
            }
        }
        exit::answer(&text)?;
    }
    Ok(())
}

fn score(path: &Path, arguments: &Arguments) -> Result<Score> {
    let checkpoint = Checkpoint::open(path)?;
    let model = Llama::load(&checkpoint)?;
    let tokens = Tokens::read(checkpoint.root(), model.config.vocab_size, &arguments.text)?;
    let tokens = tokens.first(arguments.tokens.saturating_add(1));
    let (count, window) = (tokens.ids.len(), arguments.window);
    ensure!(window > 0, "windows of 0 tokens");
    ensure!(
        count > window.min(arguments.tokens),
        "{} has {count} tokens, fewer than a window of {window} and one",
        arguments.text.display()
    );
    let start = Instant::now();
    let loss = model.mean_loss(&tokens.ids, window)?;
    let seconds = start.elapsed().as_secs_f64();
    let (mut prefill, mut decode) = (None, None);
    if arguments.decode > 0 {
        let first = &tokens.ids[..window.min(count)];
        let speed = fastest(3, || model.hidden(first, &mut |_, _| Ok(())).map(drop))?;
        prefill = Some(first.len() as f64 / speed);
        let steps = &tokens.ids[..arguments.decode.min(count)];
        decode = Some(steps.len() as f64 / fastest(3, || step_by_step(&model, steps))?);
    }
    Ok(Score {
        model: path.into(),
        file_bytes: checkpoint.file_bytes(),
        compressed_weights: checkpoint.trees()?.len(),
        tokens: count - 1,
        perplexity: loss.exp(),
        bits_per_byte: loss * (count - 1) as f64 / std::f64::consts::LN_2 / tokens.scored_bytes().max(1) as f64,
        prefill_tokens_per_second: prefill,
        decode_tokens_per_second: decode,
        seconds,
    })
}

/// Tokens one at a time, each with its logits, as a generator would.
fn step_by_step(model: &Llama, tokens: &[usize]) -> Result<()> {
    let mut cache = Cache::new(&model.config);
    for token in tokens {
        let hidden = model.extend(&[*token], &mut cache, &mut |_, _| Ok(()))?;
        std::hint::black_box(model.logits(&hidden)?);
    }
    Ok(())
}

/// Seconds of the fastest of several runs.
fn fastest(runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..runs {
        let start = Instant::now();
        work()?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(least)
}
