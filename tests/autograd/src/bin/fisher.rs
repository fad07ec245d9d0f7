//! Fisher sums of a model's linear layers by candle, and how far others are from them.
//!
//! ```text
//! cargo run -p weightpress-autograd --bin fisher -- MODEL TEXT f32|f64 WINDOWS [OUT.safetensors [OTHER.safetensors …]]
//! ```
//!
//! The windows are those of `calibrate --fisher`: 256 tokens each, spread over the text. It takes gigabytes for each
//! billion weights many times over, and is slower than `calibrate`: it is there to check, not to be used.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use candle_core::DType;
use weightpress::Stats;
use weightpress::checkpoint::Checkpoint;
use weightpress_autograd::support::exit;
use weightpress_autograd::support::llama::Llama;
use weightpress_autograd::support::text::{Tokens, windows};
use weightpress_autograd::{Apart, Reference};

/// Tokens of one gradient.
const WINDOW: usize = 256;

fn main() -> std::process::ExitCode {
    exit::code(run(&std::env::args().skip(1).collect::<Vec<_>>()))
}

fn run(arguments: &[String]) -> Result<()> {
    let [model, text, dtype, count, files @ ..] = arguments else {
        bail!("expected MODEL TEXT f32|f64 WINDOWS [OUT [OTHER …]]");
    };
    let dtype = match dtype.as_str() {
        "f32" => DType::F32,
        "f64" => DType::F64,
        other => bail!("`{other}`: expected f32 or f64"),
    };
    let checkpoint = Checkpoint::open(Path::new(model))?;
    let text = PathBuf::from(text);
    let by_hand = Llama::load(&checkpoint)?;
    let layers = by_hand.config.num_hidden_layers;
    let tokens = Tokens::read(checkpoint.root(), by_hand.config.vocab_size, &text)?;
    let count: usize = count.parse().context("WINDOWS is no number")?;
    let windows = windows(&tokens.ids, &text, count * WINDOW, WINDOW)?;
    let ours = by_hand.fisher(&windows, &|_| ())?;
    drop(by_hand);
    let candle = Reference::load(&checkpoint, dtype)?.fisher(&windows, &|i| eprintln!("window {i}"))?;
    exit::answer(&format!("by hand: {}", Apart::between(&ours, &candle, layers)?))?;
    if let [out, others @ ..] = files {
        candle.save(Path::new(out), Some((windows.len() * WINDOW) as u64))?;
        for other in others {
            let apart = Apart::between(&Stats::open(&[other])?, &candle, layers)?;
            exit::answer(&format!("{other}: {apart}"))?;
        }
    }
    Ok(())
}
