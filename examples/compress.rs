//! Compresses a checkpoint. Without arguments: a small language model that ships with the crate.
//!
//! ```text
//! cargo run --release --example compress
//! cargo run --release --example compress -- INPUT --out DIR --method svd --metric gram --keep 0.8 --stats gram.safetensors
//! cargo run --release --example compress -- INPUT --out DIR --recipe recipe.toml --stats gram.safetensors --plan
//! ```
//!
//! Exit codes: 0 done, 2 the input or the recipe was refused, 1 something failed on the way.

mod support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use weightpress::allocate::{Allocate, Global};
use weightpress::budget::Budget;
use weightpress::checkpoint::Checkpoint;
use weightpress::factorize::Method;
use weightpress::metric::MetricSpec;
use weightpress::run::{Emit, Options};
use weightpress::stats::Stats;
use weightpress::{Error, Recipe, Rule};

use support::llama::Llama;
use support::progress::Bar;

/// The linear layers of the blocks of most decoder and encoder models.
const LINEAR_LAYERS: &str = r".*\.(layers?|blocks|h)\.\d+\..*\.weight";
const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/model");

#[derive(Parser)]
#[command(about = "Makes a checkpoint smaller by rewriting its weights; without INPUT, a bundled model")]
struct Arguments {
    /// A .safetensors file, or a folder that holds one or several with an index
    input: Option<PathBuf>,
    /// New or empty folder for the result
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// A recipe (TOML); excludes --method, --metric, --keep, --allocate and --match
    #[arg(long, value_name = "FILE", conflicts_with_all = ["method", "metric", "keep", "allocate", "pattern"])]
    recipe: Option<PathBuf>,
    /// The structure, by name
    #[arg(long, default_value = "svd")]
    method: String,
    /// The error that counts: frobenius, fisher, activation, gram, gram-fisher …
    #[arg(long, default_value = "frobenius")]
    metric: String,
    /// Bytes after ÷ before of the matched weights
    #[arg(long, value_name = "F", default_value_t = 0.8)]
    keep: f64,
    /// How the budget is spread over the weights
    #[arg(long, value_enum, default_value_t = Spread::Uniform)]
    allocate: Spread,
    /// Regular expression that matches the whole name of the weights to compress
    #[arg(long = "match", value_name = "REGEX", default_value = LINEAR_LAYERS)]
    pattern: String,
    /// Calibration statistics; may be given several times
    #[arg(long, value_name = "FILE")]
    stats: Vec<PathBuf>,
    /// The form of the result
    #[arg(long, value_enum, default_value_t = Form::Factored)]
    emit: Form,
    /// Only print what would be done
    #[arg(long)]
    plan: bool,
    /// Go on with a run that was stopped
    #[arg(long)]
    resume: bool,
    /// Print the report (or the plan's totals) as JSON
    #[arg(long)]
    json: bool,
    /// Weights at a time; 0 means one for each core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Seed of whatever is random
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Spread {
    Uniform,
    Global,
}

#[derive(Clone, Copy, ValueEnum)]
enum Form {
    Factored,
    Dense,
    Both,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.input {
        Some(input) => compress(&arguments, input),
        None => bundled(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let refused = error.downcast_ref::<Error>().is_none_or(Error::is_refusal);
            ExitCode::from(if refused { 2 } else { 1 })
        }
    }
}

fn options(arguments: &Arguments) -> Options {
    let emit = match arguments.emit {
        Form::Factored => Emit::Factored,
        Form::Dense => Emit::Dense,
        Form::Both => Emit::Both,
    };
    Options { emit, threads: arguments.threads, resume: arguments.resume }
}

fn recipe(arguments: &Arguments) -> Result<Recipe> {
    if let Some(path) = &arguments.recipe {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let mut recipe = Recipe::parse(&text).with_context(|| format!("in {}", path.display()))?;
        if arguments.seed != 0 {
            recipe.seed = arguments.seed;
        }
        return Ok(recipe);
    }
    let mut rule = Rule::new(&arguments.pattern, Method::named(&arguments.method)?, Budget::Keep(arguments.keep));
    rule.metric = MetricSpec::named(&arguments.metric)?;
    rule.allocate = match arguments.allocate {
        Spread::Uniform => Allocate::Uniform,
        Spread::Global => Allocate::Global(Global::default()),
    };
    Ok(Recipe { seed: arguments.seed, exclude: Vec::new(), rules: vec![rule] })
}

fn compress(arguments: &Arguments, input: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(input)?;
    let stats = Stats::open(&arguments.stats)?;
    let plan = recipe(arguments)?.plan(&checkpoint, &stats)?;
    if arguments.plan {
        println!("{plan}");
        return Ok(());
    }
    let Some(out) = &arguments.out else {
        bail!("--out DIR is needed (or --plan for a dry run)");
    };
    let threads = if arguments.threads > 0 { arguments.threads } else { rayon::current_num_threads() };
    eprintln!("peak memory about {}", weightpress::report::human_bytes(plan.memory(threads)));
    let bar = Bar::default();
    let report = plan.run(out, &options(arguments), &bar)?;
    drop(bar);
    match arguments.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => println!("{report}\nwritten to {}", out.display()),
    }
    Ok(())
}

/// Calibrates, compresses and evaluates the bundled model, and says what was saved and what was lost.
fn bundled(arguments: &Arguments) -> Result<()> {
    const WINDOW: usize = 512;
    let folder = Path::new(BUNDLED);
    let checkpoint = Checkpoint::open(folder)?;
    let model = Llama::load(&checkpoint)?;
    let read = |name: &str| -> Result<Vec<usize>> {
        let path = folder.join(name);
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.into_iter().map(usize::from).collect())
    };
    let heldout = read("heldout.txt")?;
    let bits = |model: &Llama| -> Result<f64> { Ok(model.mean_loss(&heldout, WINDOW)? / std::f64::consts::LN_2) };

    let start = std::time::Instant::now();
    let stats = model.calibrate(&read("calibration.txt")?, WINDOW)?;
    let calibrated = start.elapsed().as_secs_f64();
    let recipe = match &arguments.recipe {
        Some(_) => recipe(arguments)?,
        None => Recipe::parse(include_str!("recipes/bundled.toml"))?,
    };
    let plan = recipe.plan(&checkpoint, &stats)?;
    if arguments.plan {
        println!("{plan}");
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let out = arguments.out.clone().unwrap_or_else(|| scratch.path().join("compressed"));
    let bar = Bar::default();
    let report = plan.run(&out, &options(arguments), &bar)?;
    drop(bar);
    let form = if matches!(arguments.emit, Form::Both) { out.join("factored") } else { out.clone() };
    let compressed = Llama::load(&Checkpoint::open(form)?)?;
    let (before, after) = (bits(&model)?, bits(&compressed)?);
    if arguments.json {
        let all = serde_json::json!({ "bits_per_byte": { "before": before, "after": after }, "report": report });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!("{report}");
    println!("calibrated on {} bytes of text in {calibrated:.1} s", read("calibration.txt")?.len());
    println!(
        "held-out text, bits per byte: {before:.4} before, {after:.4} after ({:+.2} %)",
        100.0 * (after / before - 1.0)
    );
    match &arguments.out {
        Some(out) => println!("written to {}", out.display()),
        None => println!("add --out DIR to keep the result"),
    }
    Ok(())
}
