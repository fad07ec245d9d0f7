//! Perplexity and speed of language models (Llama architecture) on a text, or how far the embeddings of encoders of sentences
//! (BERT architecture) or of images (DINOv2 architecture) move: dense or factored, side by side.
//!
//! ```text
//! cargo run --release --example evaluate -- examples/model --text examples/model/heldout.txt
//! cargo run --release --example evaluate -- MODEL COMPRESSED --text heldout.txt --tokens 8192
//! cargo run --release --example evaluate -- MODEL COMPRESSED --images FOLDER
//! ```
//!
//! The first tokens of the text are cut into windows; every token but the very first is scored once. A factored
//! checkpoint runs from its factors: no weight is rebuilt. Encoders are compared with the first one given, on the
//! paragraphs of the text that have 60 to 400 characters, or on the PNG and JPEG files of the folder.
//!
//! Exit codes: 0 done, 2 the input was refused, 1 something failed on the way.

mod support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use ndarray::Array2;
use serde::Serialize;
use weightpress::checkpoint::Checkpoint;
use weightpress::operator::ActivationBits;
use weightpress::run::Observer;

use support::exit;
use support::llama::{Cache, Llama};
use support::moved::Moved;
use support::progress::Bar;
use support::samples::{Given, Samples};
use support::text::Tokens;

#[derive(Parser)]
#[command(about = "Perplexity, bits per byte and tokens per second of one or several checkpoints")]
struct Arguments {
    /// Folders with config.json and weights, dense or factored; others are compared with the first
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// The text
    #[arg(long, value_name = "FILE", required_unless_present = "images")]
    text: Option<PathBuf>,
    /// A folder of images, for encoders of such
    #[arg(long, value_name = "DIR", conflicts_with = "text")]
    images: Option<PathBuf>,
    /// Tokens to score
    #[arg(long, value_name = "N", default_value_t = 8192)]
    tokens: usize,
    /// Tokens that see each other
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
    /// Tokens to decode one by one for the speed; 0 leaves it out
    #[arg(long, value_name = "N", default_value_t = 64)]
    decode: usize,
    /// Bits in which packed codes meet their inputs, at least: 8, 16 or 24
    #[arg(long, value_name = "BITS", default_value = "24", value_parser = activation_bits)]
    activation_bits: ActivationBits,
    /// Paragraphs to embed, for encoders of sentences
    #[arg(long, value_name = "N", default_value_t = 256)]
    paragraphs: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn activation_bits(text: &str) -> Result<ActivationBits> {
    let found = ActivationBits::ALL.into_iter().find(|of| of.bits().to_string() == text);
    found.context("expected 8, 16 or 24")
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
    let Arguments { text, images, paragraphs, .. } = arguments;
    let given = Given { text: text.clone(), paragraphs: *paragraphs, images: images.clone() };
    if Samples::fit(&Checkpoint::open(&arguments.models[0])?)? {
        return encoders(arguments, &given);
    }
    let text = given.text()?;
    let scores = arguments.models.iter().map(|model| score(model, text, arguments)).collect::<Result<Vec<_>>>()?;
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

/// What one encoder scored.
#[derive(Serialize)]
struct EncoderScore {
    model: PathBuf,
    file_bytes: u64,
    compressed_weights: usize,
    tokens_per_second: f64,
    /// Against the first one.
    moved: Moved,
}

fn encoders(arguments: &Arguments, given: &Given) -> Result<()> {
    let (mut scores, mut first) = (Vec::new(), None::<(Samples, Array2<f32>)>);
    for path in &arguments.models {
        let checkpoint = Checkpoint::open(path)?;
        let mut weights = checkpoint.loader()?.with_activation_bits(arguments.activation_bits);
        let samples = match &first {
            Some((samples, _)) => samples.of(&mut weights, &checkpoint)?,
            None => Samples::load_by(&mut weights, &checkpoint, given)?
                .with_context(|| format!("{} is no encoder", path.display()))?,
        };
        let tokens = samples.tokens();
        // (Similarities of fewer have no order.)
        ensure!(tokens.len() > 2, "{} samples, at least 3 are needed to see how they move", tokens.len());
        let tokens: usize = tokens.iter().sum();
        let (start, bar) = (Instant::now(), Bar::default());
        bar.stage("evaluating", tokens as u64);
        let embeddings = samples.embed(&|done| bar.advance(done as u64, ""))?;
        drop(bar);
        let seconds = start.elapsed().as_secs_f64();
        let (_, first) = first.get_or_insert_with(|| (samples, embeddings.clone()));
        ensure!(first.dim() == embeddings.dim(), "embeddings of {:?} and of {:?}", first.dim(), embeddings.dim());
        scores.push(EncoderScore {
            model: path.clone(),
            file_bytes: checkpoint.file_bytes(),
            compressed_weights: checkpoint.trees()?.len(),
            tokens_per_second: tokens as f64 / seconds,
            moved: Moved::between(first, &embeddings),
        });
    }
    if arguments.json {
        return exit::answer(&serde_json::to_string_pretty(&scores)?);
    }
    for EncoderScore { model, file_bytes, compressed_weights, tokens_per_second, moved } in &scores {
        exit::answer(&format!(
            "{}: {compressed_weights} weights from their factors, {file_bytes} bytes, {tokens_per_second:.0} tokens per second\n  \
             mean cosine {:.4}, Spearman {:.4}, same nearest neighbour {:.3}",
            model.display(),
            moved.mean_cosine,
            moved.spearman,
            moved.same_neighbour
        ))?;
    }
    Ok(())
}

fn score(path: &Path, text: &Path, arguments: &Arguments) -> Result<Score> {
    let checkpoint = Checkpoint::open(path)?;
    let mut weights = checkpoint.loader()?.with_activation_bits(arguments.activation_bits);
    let model = Llama::load_by(&mut weights, &checkpoint)?;
    let tokens = Tokens::read(checkpoint.root(), model.config.vocab_size, text)?;
    let tokens = tokens.first(arguments.tokens.saturating_add(1));
    let (count, window) = (tokens.ids.len(), arguments.window);
    ensure!(window > 0, "windows of 0 tokens");
    ensure!(
        count > window.min(arguments.tokens),
        "{} has {count} tokens, fewer than a window of {window} and one",
        text.display()
    );
    let start = Instant::now();
    let bar = Bar::default();
    bar.stage("evaluating", count as u64 - 1);
    let loss = model.mean_loss(&tokens.ids, window, &|scored| bar.advance(scored as u64, ""))?;
    drop(bar);
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
        std::hint::black_box(model.logits(hidden.view())?);
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
