//! Many methods at many budgets on one model: a table, a picture and JSON of quality against bytes on disk. The plain
//! baselines are always among them.
//!
//! ```text
//! cargo run --release --example compare -- examples/model --text examples/model/heldout.txt \
//!     --stats gram.safetensors --stats examples/model/fisher.safetensors --out DIR
//! cargo run --release --example compare -- MODEL --images FOLDER --stats gram.safetensors --out DIR
//! cargo run --release --example compare -- MODEL --held-out other-gram.safetensors --stats gram.safetensors --out DIR
//! ```
//!
//! Language models (Llama) are judged by perplexity, encoders of sentences (BERT) and of images (DINOv2) by how far embeddings
//! turn, any other model by the error of its layers' outputs under statistics of held-out inputs. A run that was stopped goes
//! on where it was: what DIR/compare.json has is not computed again. Text, images and held-out statistics must not be those
//! that calibrated.
//!
//! Exit codes: 0 done, 2 the input or a method was refused, 1 something failed on the way.

mod judge;
mod lines;
mod picture;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::{Deserialize, Serialize};
use weightpress::checkpoint::Checkpoint;
use weightpress::run::{Emit, Observer, Options};
use weightpress::stats::Stats;
use weightpress::{Error, Recipe};

use judge::Judge;
use lines::{Line, recipe};
use support::dinov2::files;
use support::exit;
use support::progress::Bar;
use support::samples::Given;

#[derive(Parser)]
#[command(about = "Quality against bytes of many methods at many budgets: a table, a picture and JSON")]
struct Arguments {
    /// Folder with config.json and weights, or a .safetensors file with --held-out
    model: PathBuf,
    /// Held-out text to judge by
    #[arg(long, value_name = "FILE", required_unless_present_any = ["images", "held_out"])]
    text: Option<PathBuf>,
    /// A folder of held-out images to judge by, for encoders of such
    #[arg(long, value_name = "DIR", conflicts_with = "text")]
    images: Option<PathBuf>,
    /// Held-out Gram matrices to judge by, for models of any architecture
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "images"])]
    held_out: Option<PathBuf>,
    /// Folder for compare.json, compare.svg and what is measured once for all budgets
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Calibration statistics; may be given several times
    #[arg(long, value_name = "FILE")]
    stats: Vec<PathBuf>,
    /// Methods to compare, TOML; the baselines stay [default: one line for each family]
    #[arg(long, value_name = "FILE")]
    methods: Option<PathBuf>,
    /// Only lines whose name matches this regular expression, and the baselines
    #[arg(long, value_name = "REGEX")]
    only: Option<String>,
    /// Budgets: bytes of the matched weights after ÷ before
    #[arg(long, value_name = "F", value_delimiter = ',', default_values_t = [0.8, 0.5, 0.25])]
    keep: Vec<f64>,
    /// Regular expression that matches the whole name of the weights to compress
    #[arg(long = "match", value_name = "REGEX", default_value = r"(.*\.)?(layers?|blocks|h)\.\d+\..*\.weight")]
    pattern: String,
    /// Tokens to score
    #[arg(long, value_name = "N", default_value_t = 8192)]
    tokens: usize,
    /// Paragraphs to embed, for encoders of sentences
    #[arg(long, value_name = "N", default_value_t = 256)]
    paragraphs: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A method at a budget.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Row {
    /// What all of it depends on.
    key: String,
    line: String,
    baseline: bool,
    /// Bytes asked for, of those of the matched weights.
    asked: f64,
    /// Why there is no result: the method has no form of this size, or needs statistics that were not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
    /// What came out.
    #[serde(flatten)]
    result: Option<Outcome>,
    recipe: String,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Outcome {
    /// Bytes of the matched weights after ÷ before.
    keep: f64,
    /// Weight files in all.
    file_bytes: u64,
    /// The less the better; what it is stands at the head.
    loss: f64,
    /// Wall-clock time of the compression.
    seconds: f64,
}

/// compare.json.
#[derive(Debug, Serialize, Deserialize)]
struct Comparison {
    model: PathBuf,
    /// What `loss` is.
    loss: String,
    dense: Outcome,
    rows: Vec<Row>,
}

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(!arguments.keep.is_empty(), "no budget to compare at");
    let lines = lines::read(arguments.methods.as_deref(), arguments.only.as_deref())?;
    // All methods are read before the first one runs.
    for line in &lines {
        recipe(line, &arguments.pattern, line.keep.unwrap_or(arguments.keep[0]))?;
    }
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let stats = Stats::open(&arguments.stats)?;
    let Arguments { text, images, paragraphs, .. } = arguments;
    let judge = match &arguments.held_out {
        Some(file) => Judge::of_outputs(&checkpoint, Stats::open(&[file])?, &arguments.pattern)?,
        None => {
            let model = arguments.model.display();
            ensure!(arguments.model.is_dir(), "{model} is no folder with config.json, which --text and --images need");
            let given = Given { text: text.clone(), paragraphs: *paragraphs, images: images.clone() };
            Judge::of_samples(&checkpoint, &given, arguments.tokens)?
        }
    };
    fs::create_dir_all(&arguments.out).with_context(|| format!("making {}", arguments.out.display()))?;
    let file = arguments.out.join("compare.json");
    let inputs = inputs(arguments, &checkpoint)?;
    let known = known(&file)?;
    let dense = Outcome {
        keep: 1.0,
        file_bytes: checkpoint.file_bytes(),
        loss: judge.loss(&checkpoint, &checkpoint)?,
        seconds: 0.0,
    };
    let mut all = Comparison { model: arguments.model.clone(), loss: judge.what().into(), dense, rows: Vec::new() };
    let bar = Bar::default();
    let work = lines.iter().map(|line| budgets(line, &arguments.keep).len() as u64).sum();
    bar.stage("comparing", work);
    for line in &lines {
        for keep in budgets(line, &arguments.keep) {
            let recipe = recipe(line, &arguments.pattern, keep)?;
            let text = recipe.to_toml()?;
            let key = blake3::hash(format!("{inputs}\n{text}").as_bytes()).to_hex().to_string();
            let row = match known.iter().find(|row| row.key == key) {
                Some(row) => Row { line: line.name.clone(), ..row.clone() },
                None => {
                    let (result, refused) = match measure(&recipe, &checkpoint, &stats, &judge, &arguments.out) {
                        Ok(result) => (Some(result), None),
                        Err(why) if cannot_be(&why) => (None, Some(format!("{why:#}"))),
                        Err(why) => return Err(why.context(format!("`{}` at keep {keep}", line.name))),
                    };
                    let (name, baseline) = (line.name.clone(), line.baseline);
                    Row { key, line: name, baseline, asked: keep, refused, result, recipe: text }
                }
            };
            all.rows.push(row);
            // What an earlier run had and this one has not come to yet is kept.
            let later = known.iter().filter(|row| all.rows.iter().all(|new| new.key != row.key));
            let rows = all.rows.iter().chain(later).cloned().collect();
            save(&file, &Comparison { model: all.model.clone(), loss: all.loss.clone(), dense, rows })?;
            bar.advance(1, &format!("{} at {keep}", line.name));
        }
    }
    drop(bar);
    picture::draw(&arguments.out.join("compare.svg"), &all)?;
    match arguments.json {
        true => exit::answer(&serde_json::to_string_pretty(&all)?),
        false => exit::answer(&table(&all)),
    }
}

/// The budgets of a line: its own size if it has but one.
fn budgets(line: &Line, keep: &[f64]) -> Vec<f64> {
    line.keep.map_or_else(|| keep.to_vec(), |keep| vec![keep])
}

/// Compresses into a folder that is gone afterwards, and judges what came out.
fn measure(recipe: &Recipe, checkpoint: &Checkpoint, stats: &Stats, judge: &Judge, out: &Path) -> Result<Outcome> {
    let scratch = tempfile::tempdir_in(out)?;
    let folder = scratch.path().join("compressed");
    let options = Options { emit: Emit::Factored, cache: Some(out.join("curves")), ..Options::default() };
    let report = recipe.plan(checkpoint, stats)?.run(&folder, &options, &weightpress::run::Silent)?;
    let loss = judge.loss(checkpoint, &Checkpoint::open(&folder)?)?;
    let (keep, file_bytes, seconds) = (report.keep(), report.file_bytes_after, report.seconds);
    Ok(Outcome { keep, file_bytes, loss, seconds })
}

/// Whether a method has no form of this size or not its statistics, which is no reason to stop.
fn cannot_be(why: &anyhow::Error) -> bool {
    fn budget(error: &Error) -> bool {
        match error {
            Error::Budget { .. } | Error::MissingStats { .. } => true,
            Error::Tensor { source, .. } => budget(source),
            Error::Refused(all) => all.iter().all(|(_, why)| why.contains("budget cannot be met")),
            _ => false,
        }
    }
    why.downcast_ref::<Error>().is_some_and(budget)
}

/// All that figures depend on beside the recipe: files by length and time of change.
fn inputs(arguments: &Arguments, checkpoint: &Checkpoint) -> Result<String> {
    let mut all = format!("{} {} {}", env!("CARGO_PKG_VERSION"), arguments.tokens, arguments.paragraphs);
    let shards = checkpoint.shards().iter().map(|shard| shard.path());
    let images = arguments.images.as_deref().map(files).transpose()?.unwrap_or_default();
    let given = arguments.stats.iter().chain(&arguments.text).chain(&images).chain(&arguments.held_out);
    let given = given.map(PathBuf::as_path);
    for path in shards.chain(given) {
        let about = fs::metadata(path).with_context(|| format!("reading {}", path.display()))?;
        let changed = about.modified()?.duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
        all += &format!("\n{} {} {changed}", path.display(), about.len());
    }
    Ok(all)
}

/// The rows of an earlier run.
fn known(file: &Path) -> Result<Vec<Row>> {
    match fs::read_to_string(file) {
        Ok(text) => {
            let earlier: Comparison =
                serde_json::from_str(&text).with_context(|| format!("{} is no comparison", file.display()))?;
            Ok(earlier.rows)
        }
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(why) => Err(why).with_context(|| format!("reading {}", file.display())),
    }
}

/// Whole or not at all.
fn save(file: &Path, all: &Comparison) -> Result<()> {
    let whole = file.with_extension("json.part");
    let writing = || format!("writing {}", file.display());
    fs::write(&whole, serde_json::to_string_pretty(all)?).with_context(writing)?;
    fs::rename(&whole, file).with_context(writing)
}

fn table(all: &Comparison) -> String {
    let mut text = format!(
        "{}\n{:<46} {:>6} {:>7} {:>14} {:>12} {:>8}\n{:<46} {:>6} {:>7} {:>14} {:>12.5}",
        all.model.display(),
        "",
        "asked",
        "keep",
        "bytes on disk",
        all.loss,
        "seconds",
        "dense",
        "",
        "1",
        all.dense.file_bytes,
        all.dense.loss
    );
    for row in &all.rows {
        let mark = if row.baseline { "(baseline) " } else { "" };
        text += &format!("\n{:<46} {:>6}", format!("{mark}{}", row.line), row.asked);
        text += &match &row.result {
            Some(r) => format!(" {:>7.4} {:>14} {:>12.5} {:>8.1}", r.keep, r.file_bytes, r.loss, r.seconds),
            None if row.refused.as_ref().is_some_and(|why| why.starts_with("missing statistics")) => {
                "  needs statistics that were not given".into()
            }
            None => "  has no form of this size".into(),
        };
    }
    text
}
