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
use weightpress::stats::{Kind, Stats};
use weightpress::{Plan, Recipe, Rule};

use support::exit;
use support::llama::Llama;
use support::progress::Bar;

/// The linear layers of the blocks of most decoder and encoder models.
const LINEAR_LAYERS: &str = r"(.*\.)?(layers?|blocks|h)\.\d+\..*\.weight";
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
    /// The structure, by name [default: svd]
    #[arg(long, value_name = "NAME")]
    method: Option<String>,
    /// The error that counts: frobenius, fisher, activation, gram, gram-fisher … [default: frobenius]
    #[arg(long, value_name = "NAME")]
    metric: Option<String>,
    /// Bytes after ÷ before of the matched weights [default: 0.8]
    #[arg(long, value_name = "F")]
    keep: Option<f64>,
    /// How the budget is spread over the weights [default: uniform]
    #[arg(long, value_enum)]
    allocate: Option<Spread>,
    /// Regular expression that matches the whole name of the weights to compress [default: the linear layers]
    #[arg(long = "match", value_name = "REGEX")]
    pattern: Option<String>,
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
    /// Keep measured error curves here, for runs with another budget
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Print the report (or the plan) as JSON
    #[arg(long)]
    json: bool,
    /// Weights at a time; 0 means one for each core
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Seed of whatever is random [default: the recipe's, or 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
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
    exit::code(match &arguments.input {
        Some(input) => compress(&arguments, input),
        None => bundled(&arguments),
    })
}

fn options(arguments: &Arguments) -> Options {
    let emit = match arguments.emit {
        Form::Factored => Emit::Factored,
        Form::Dense => Emit::Dense,
        Form::Both => Emit::Both,
    };
    Options { emit, threads: arguments.threads, resume: arguments.resume, cache: arguments.cache.clone() }
}

/// The recipe of `--recipe`, or the given one with what the other arguments say.
fn recipe(arguments: &Arguments, mut recipe: Recipe) -> Result<Recipe> {
    if let Some(path) = &arguments.recipe {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        recipe = Recipe::parse(&text).with_context(|| format!("in {}", path.display()))?;
    }
    recipe.seed = arguments.seed.unwrap_or(recipe.seed);
    for rule in &mut recipe.rules {
        if let Some(name) = &arguments.method {
            rule.method = Method::named(name)?;
        }
        if let Some(name) = &arguments.metric {
            rule.metric = MetricSpec::named(name)?;
        }
        rule.budget = arguments.keep.map_or(rule.budget, Budget::Keep);
        match arguments.allocate {
            Some(Spread::Uniform) => rule.allocate = Allocate::Uniform,
            Some(Spread::Global) => rule.allocate = Allocate::Global(Global::default()),
            None => {}
        }
        rule.pattern = arguments.pattern.clone().unwrap_or_else(|| rule.pattern.clone());
    }
    Ok(recipe)
}

/// The dry run: for people, or what of it a program wants to know.
fn show(plan: &Plan<'_>, arguments: &Arguments) -> Result<()> {
    if !arguments.json {
        return exit::answer(&plan.to_string());
    }
    let jobs = plan.jobs.iter().map(|job| {
        serde_json::json!({
            "names": job.names, "rule": job.rule, "budget": job.budget, "bytes_before": job.bytes(),
            "bytes_after": job.forecast.bytes, "exact": job.forecast.exact, "kept_dense": job.kept,
        })
    });
    let (jobs, (before, after)) = (jobs.collect::<Vec<_>>(), plan.bytes());
    let all = serde_json::json!({
        "jobs": jobs, "copied": plan.passed, "bytes_before": before, "bytes_after": after,
        "memory": plan.memory(threads(arguments)),
    });
    exit::answer(&serde_json::to_string_pretty(&all)?)
}

fn threads(arguments: &Arguments) -> usize {
    if arguments.threads > 0 { arguments.threads } else { rayon::current_num_threads() }
}

fn compress(arguments: &Arguments, input: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(input)?;
    let stats = Stats::open(&arguments.stats)?;
    let rule = Rule::new(LINEAR_LAYERS, Method::named("svd")?, Budget::Keep(0.8));
    let recipe = recipe(arguments, Recipe { rules: vec![rule], ..Recipe::default() })?;
    let plan = recipe.plan(&checkpoint, &stats)?;
    if arguments.plan {
        return show(&plan, arguments);
    }
    let Some(out) = &arguments.out else {
        bail!("--out DIR is needed (or --plan for a dry run)");
    };
    eprintln!("peak memory about {}", weightpress::report::human_bytes(plan.memory(threads(arguments))));
    let bar = Bar::default();
    let report = plan.run(out, &options(arguments), &bar)?;
    drop(bar);
    match arguments.json {
        true => exit::answer(&serde_json::to_string_pretty(&report)?),
        false => exit::answer(&format!("{report}\nwritten to {}", out.display())),
    }
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
    let bits =
        |model: &Llama| -> Result<f64> { Ok(model.mean_loss(&heldout, WINDOW, &|_| ())? / std::f64::consts::LN_2) };

    let start = std::time::Instant::now();
    let mut stats = model.calibrate(&read("calibration.txt")?.chunks(WINDOW).collect::<Vec<_>>(), &|_| ())?;
    // Gradients take an automatic differentiator; these were computed once, on the same text.
    let fisher = Stats::open(&[folder.join("fisher.safetensors")])?;
    for tensor in checkpoint.tensors().filter(|t| fisher.has(&t.name, Kind::FisherRow)) {
        stats.insert_fisher_row(&tensor.name, fisher.fisher_row(&tensor.name)?)?;
        stats.insert_fisher_col(&tensor.name, fisher.fisher_col(&tensor.name)?)?;
    }
    let calibrated = start.elapsed().as_secs_f64();
    let mut own = Recipe::parse(include_str!("recipes/bundled.toml"))?;
    if arguments.method.is_some() || arguments.pattern.is_some() {
        // Its groups are for its own method and its own names: the rule for single weights stays.
        own.rules.drain(..own.rules.len() - 1);
    }
    let recipe = recipe(arguments, own)?;
    let plan = recipe.plan(&checkpoint, &stats)?;
    if arguments.plan {
        return show(&plan, arguments);
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
        return exit::answer(&serde_json::to_string_pretty(&all)?);
    }
    let kept = match &arguments.out {
        Some(out) => format!("written to {}", out.display()),
        None => "add --out DIR to keep the result".into(),
    };
    exit::answer(&format!(
        "{report}\ncalibrated on {} bytes of text in {calibrated:.1} s\n\
         held-out text, bits per byte: {before:.4} before, {after:.4} after ({:+.2} %)\n{kept}",
        read("calibration.txt")?.len(),
        100.0 * (after / before - 1.0)
    ))
}
