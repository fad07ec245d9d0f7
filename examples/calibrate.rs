//! Calibration statistics of the linear layers of a language model (Llama architecture) or an encoder of sentences (BERT
//! architecture) over a text, or of an encoder of images (DINOv2 architecture) over a folder of them.
//!
//! ```text
//! cargo run --release --example calibrate -- MODEL --text calibration.txt --out gram.safetensors
//! cargo run --release --example calibrate -- MODEL --text calibration.txt --fisher fisher.safetensors
//! cargo run --release --example calibrate -- MODEL --images FOLDER --out gram.safetensors
//! ```
//!
//! Windows are spread evenly over the whole text; an encoder of sentences sees its first paragraphs of 60 to 400 characters, one of
//! images the middle of each PNG and JPEG file, scaled to the size that config.json has. The file is what `compress --stats` reads: one mean of x·xᵀ for
//! each input site, shared by the weights that see the same input. `--fisher FILE` writes the squares of the loss's
//! gradients, summed over rows and columns, which the metrics `fisher` and `gram-fisher` need. An encoder has no loss: there
//! the gradients are those of its embeddings along random directions, which say how far an error turns them.
//!
//! Exit codes: 0 done, 2 the input was refused, 1 something failed on the way.

mod support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use weightpress::checkpoint::Checkpoint;
use weightpress::run::Observer;
use weightpress::stats::{Kind, Stats};

use support::exit;
use support::llama::Llama;
use support::progress::Bar;
use support::samples::{Given, Samples};
use support::text::{Tokens, windows};

#[derive(Parser)]
#[command(about = "Calibration statistics of a language model or an encoder over a text")]
struct Arguments {
    /// Folder with config.json and weights
    model: PathBuf,
    /// The text; of the kind that the model will see
    #[arg(long, value_name = "FILE", required_unless_present = "images")]
    text: Option<PathBuf>,
    /// A folder of images, for encoders of such
    #[arg(long, value_name = "DIR", conflicts_with = "text")]
    images: Option<PathBuf>,
    /// The file of Gram matrices to write
    #[arg(long, value_name = "FILE", required_unless_present = "fisher")]
    out: Option<PathBuf>,
    /// The file of Fisher sums to write
    #[arg(long, value_name = "FILE")]
    fisher: Option<PathBuf>,
    /// Tokens to take gradients over
    #[arg(long, value_name = "N", default_value_t = 8192)]
    fisher_tokens: usize,
    /// Tokens of one gradient
    #[arg(long, value_name = "N", default_value_t = 256)]
    fisher_window: usize,
    /// Tokens to run the model over
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    tokens: usize,
    /// Tokens that see each other
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
    /// Paragraphs, for encoders of sentences
    #[arg(long, value_name = "N", default_value_t = 300)]
    paragraphs: usize,
    /// Directions for the gradients of each paragraph or image, for encoders
    #[arg(long, value_name = "N", default_value_t = 4)]
    probes: usize,
}

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let Arguments { text, images, paragraphs, .. } = arguments;
    let given = Given { text: text.clone(), paragraphs: *paragraphs, images: images.clone() };
    if let Some(samples) = Samples::load(&checkpoint, &given)? {
        return encoder(&checkpoint, &samples, arguments);
    }
    let text = given.text()?;
    let model = Llama::load(&checkpoint)?;
    let tokens = Tokens::read(checkpoint.root(), model.config.vocab_size, text)?;
    if let Some(out) = &arguments.out {
        let windows = windows(&tokens.ids, text, arguments.tokens, arguments.window)?;
        let (start, bar) = (Instant::now(), Bar::default());
        bar.stage("Gram", model.layers.len() as u64);
        let stats = model.calibrate(&windows, &|i| bar.advance(1, &format!("layer {i}")))?;
        drop(bar);
        write(&checkpoint, stats, out, windows.iter().map(|window| window.len()), start)?;
    }
    if let Some(out) = &arguments.fisher {
        let windows = windows(&tokens.ids, text, arguments.fisher_tokens, arguments.fisher_window)?;
        let (start, bar) = (Instant::now(), Bar::default());
        bar.stage("Fisher", windows.len() as u64);
        let stats = model.fisher(&windows, &|_| bar.advance(1, ""))?;
        drop(bar);
        write(&checkpoint, stats, out, windows.iter().map(|window| window.len()), start)?;
    }
    Ok(())
}

fn encoder(checkpoint: &Checkpoint, samples: &Samples, arguments: &Arguments) -> Result<()> {
    let tokens = samples.tokens();
    if let Some(out) = &arguments.out {
        let (start, bar) = (Instant::now(), Bar::default());
        bar.stage("Gram", samples.blocks() as u64);
        let stats = samples.calibrate(&|i| bar.advance(1, &format!("layer {i}")))?;
        drop(bar);
        write(checkpoint, stats, out, tokens.iter().copied(), start)?;
    }
    if let Some(out) = &arguments.fisher {
        let (start, bar) = (Instant::now(), Bar::default());
        bar.stage("Fisher", (tokens.len() * arguments.probes) as u64);
        let stats = samples.fisher(arguments.probes, &|_| bar.advance(1, ""))?;
        drop(bar);
        write(checkpoint, stats, out, tokens.iter().copied(), start)?;
    }
    Ok(())
}

fn write(
    checkpoint: &Checkpoint,
    mut stats: Stats,
    out: &Path,
    samples: impl ExactSizeIterator<Item = usize>,
    start: Instant,
) -> Result<()> {
    // Whoever uses the statistics with another checkpoint is told.
    for tensor in checkpoint.tensors() {
        if stats.has(&tensor.name, Kind::Gram) || stats.has(&tensor.name, Kind::FisherRow) {
            stats.set_origin(&tensor.name, checkpoint.get(&tensor.name)?);
        }
    }
    let (count, tokens) = (samples.len(), samples.sum::<usize>());
    stats.save(out, Some(tokens as u64))?;
    exit::answer(&format!(
        "{count} samples of {tokens} tokens in {:.1} s, written to {}",
        start.elapsed().as_secs_f64(),
        out.display()
    ))
}
