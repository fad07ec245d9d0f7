//! Compresses a language model (Llama architecture) layer by layer, each layer calibrated on what the
//! compressed ones before it give.
//!
//! ```text
//! cargo run --release --example sequential -- MODEL --text calibration.txt --out DIR --keep 0.8
//! ```
//!
//! One-shot compression minimises ‖(W − Ŵ)·X‖ over the inputs X of the dense model. But what a compressed layer
//! will see is X', which the errors before it have moved. Here the text walks through both models at once, and
//! ‖W·X − Ŵ·X'‖ is minimised: with G = X'·X'ᵀ, that is the problem of W·X·X'ᵀ·G⁻¹ under the Gram matrix G, for
//! any method. Inside a layer the order is q, k, v; o; gate, up; down, each with inputs that the ones before
//! have made already.
//!
//! Each finished layer is a file of its own: `--resume` goes on after the last. In memory are two layers and the
//! text, tokens × (hidden + widest input) × 8 bytes.
//!
//! Exit codes: 0 done, 2 the input was refused, 1 something failed on the way.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use rayon::prelude::*;
use weightpress::budget::Budget;
use weightpress::checkpoint::{Checkpoint, Entry, Payload, copy_file_atomic, write_index, write_shard};
use weightpress::factorize::{Factorize, Method, Problem};
use weightpress::linalg::{Faer, Kernels};
use weightpress::metric::MetricSpec;
use weightpress::ndarray::Array2;
use weightpress::operator::codec::{Encoder, FORMAT_VERSION, Header, METADATA_KEY, Tree};
use weightpress::operator::{LinearOperator, Operator};
use weightpress::run::Observer;
use weightpress::stats::Stats;

use support::exit;
use support::llama::{LINEAR, Layer, Llama, weight_name};
use support::progress::Bar;
use support::text::{Tokens, windows};
use support::walk::{SITES, Walk, correction};

#[derive(Parser)]
#[command(about = "Compresses a model layer by layer, each calibrated on the compressed ones before it")]
struct Arguments {
    /// Folder with config.json and weights
    model: PathBuf,
    /// The calibration text
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// New or empty folder for the result
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The structure, by name
    #[arg(long, value_name = "NAME", default_value = "svd")]
    method: String,
    /// The same as TOML, with parameters, e.g. '{ type = "svd", form = "factors" }'
    #[arg(long, value_name = "TOML", conflicts_with = "method")]
    method_toml: Option<String>,
    /// The error that counts: gram or gram-fisher
    #[arg(long, value_name = "NAME", default_value = "gram")]
    metric: String,
    /// Bytes after ÷ before of each linear layer
    #[arg(long, value_name = "F", default_value_t = 0.8)]
    keep: f64,
    /// Files of other statistics (Fisher sums); may be given several times
    #[arg(long, value_name = "FILE")]
    stats: Vec<PathBuf>,
    /// Tokens to calibrate on
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    tokens: usize,
    /// Tokens that see each other
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
    /// How far the weights hold on to themselves: a share of the mean square of the inputs
    #[arg(long, value_name = "F", default_value_t = 1e-2)]
    damping: f64,
    /// Go on with a run that was stopped
    #[arg(long)]
    resume: bool,
}

/// In the metadata of a layer's file: what it was made of.
const MADE_OF: &str = "sequential";

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

/// What does not change from layer to layer.
struct Run<'a> {
    arguments: &'a Arguments,
    checkpoint: &'a Checkpoint,
    method: Method,
    metric: MetricSpec,
    budget: Budget,
}

fn run(arguments: &Arguments) -> Result<()> {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(&arguments.model)?;
    let mut weights = checkpoint.loader::<f32>()?;
    let model = Llama::without_layers(&mut weights, &checkpoint)?;
    let metric = MetricSpec::named(&arguments.metric)?;
    ensure!(metric.is_gram(), "metric `{}`: expected gram or gram-fisher", arguments.metric);
    let method = match &arguments.method_toml {
        Some(text) => {
            let table: BTreeMap<String, Method> = toml::from_str(&format!("method = {text}"))?;
            table.into_values().next().context("no method")?
        }
        None => Method::named(&arguments.method)?,
    };
    let budget = Budget::Keep(arguments.keep);
    budget.check()?;
    ensure!(checkpoint.trees()?.is_empty(), "{} is compressed already", arguments.model.display());
    let tokens = Tokens::read(checkpoint.root(), model.config.vocab_size, &arguments.text)?;
    let windows = windows(&tokens.ids, &arguments.text, arguments.tokens, arguments.window)?;
    let out = &arguments.out;
    let occupied = out.is_dir() && std::fs::read_dir(out)?.next().is_some();
    ensure!(
        arguments.resume || !occupied,
        "{} is not empty; --resume goes on with a run that was stopped",
        out.display()
    );
    std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;

    let run = Run { arguments, checkpoint: &checkpoint, method, metric, budget };
    let layers = model.config.num_hidden_layers;
    let keys = run.keys(layers, &windows)?;
    let bar = Bar::default();
    bar.stage("layers", layers as u64);
    let (mut dense, mut compressed) = (Walk::new(&model, &windows)?, Walk::new(&model, &windows)?);
    for (i, key) in keys.iter().enumerate() {
        let path = out.join(file(i));
        let mut layer = Layer::load(&mut weights, &checkpoint, i)?;
        if path.exists() {
            let done = finished(&path, i, key)?;
            dense.pass(&layer, &model.config)?;
            compressed.pass(&done, &model.config)?;
        } else {
            let operators = run.layer(i, &model, &mut layer, &mut dense, &mut compressed)?;
            run.write(i, key, &operators)?;
        }
        bar.advance(1, &weight_name(i, ""));
    }
    drop(bar);
    run.finish(layers)?;
    let (before, after) = (checkpoint.file_bytes(), Checkpoint::open(out)?.file_bytes());
    exit::answer(&format!(
        "{layers} layers over {} tokens in {:.1} s, {before} bytes before, {after} after, written to {}",
        dense.tokens(),
        start.elapsed().as_secs_f64(),
        out.display()
    ))
}

fn file(i: usize) -> String {
    format!("layer-{i:04}.safetensors")
}

/// A layer that an earlier run has written.
fn finished(path: &Path, i: usize, key: &str) -> Result<Layer> {
    let shard = Checkpoint::open(path)?;
    let made_of = shard.shards().first().and_then(|shard| shard.metadata.get(MADE_OF));
    if made_of.map(String::as_str) != Some(key) {
        bail!("{} was made of other weights, text or settings", path.display());
    }
    Layer::load(&mut shard.loader()?, &shard, i)
}

impl Run<'_> {
    /// For each layer the digest of all that its result depends on.
    fn keys(&self, layers: usize, windows: &[&[usize]]) -> Result<Vec<String>> {
        let Arguments { damping, stats, .. } = self.arguments;
        let mut hash = blake3::Hasher::new();
        let settings = (env!("CARGO_PKG_VERSION"), &self.method, &self.arguments.metric, self.budget, damping, windows);
        hash.update(serde_json::to_string(&settings)?.as_bytes());
        for path in stats {
            hash.update(&std::fs::read(path).with_context(|| format!("reading {}", path.display()))?);
        }
        let rest = self.checkpoint.tensors().filter(|tensor| !tensor.name.starts_with("model.layers."));
        rest.map(|tensor| tensor.name.as_str()).try_for_each(|name| self.take_in(&mut hash, name))?;
        (0..layers)
            .map(|i| {
                self.of_layer(i).try_for_each(|name| self.take_in(&mut hash, name))?;
                Ok(hash.finalize().to_hex().to_string())
            })
            .collect()
    }

    fn take_in(&self, hash: &mut blake3::Hasher, name: &str) -> Result<()> {
        let stored = self.checkpoint.get(name)?;
        hash.update(format!("{name} {} {:?}", stored.dtype, stored.shape).as_bytes()).update(stored.bytes);
        self.checkpoint.release(name);
        Ok(())
    }

    fn of_layer(&self, i: usize) -> impl Iterator<Item = &str> {
        let prefix = format!("model.layers.{i}.");
        let names = self.checkpoint.tensors().map(|tensor| tensor.name.as_str());
        names.filter(move |name| name.starts_with(&prefix))
    }

    /// Compresses a layer site by site; both walks are at its end afterwards. `layer` becomes the compressed one.
    fn layer(
        &self,
        i: usize,
        model: &Llama,
        layer: &mut Layer,
        dense: &mut Walk,
        compressed: &mut Walk,
    ) -> Result<Vec<(String, Operator<f32>)>> {
        let original = Layer::load(&mut self.checkpoint.loader()?, self.checkpoint, i)?;
        let mut all = Vec::new();
        for (site, members) in SITES.iter().enumerate() {
            dense.advance(site, &original, &model.config)?;
            compressed.advance(site, layer, &model.config)?;
            let gram = compressed.gram()?;
            let factor = correction(&gram, &compressed.drift(dense), self.arguments.damping)?;
            let names: Vec<String> = members.iter().map(|&member| weight_name(i, LINEAR[member])).collect();
            let mut stats = Stats::open(&self.arguments.stats)?;
            stats.insert_gram(&names[0], gram)?;
            names[1..].iter().try_for_each(|name| stats.insert_alias(name, &names[0]))?;
            let solved = names.par_iter().map(|name| self.solve(name, &factor, &stats)).collect::<Result<Vec<_>>>()?;
            for ((&member, name), operator) in members.iter().zip(names).zip(solved) {
                *layer.linear_mut()[member] = operator.clone();
                all.push((name, operator));
            }
        }
        dense.advance(SITES.len(), &original, &model.config)?;
        compressed.advance(SITES.len(), layer, &model.config)?;
        Ok(all)
    }

    /// Compresses W·F, F being the correction.
    fn solve(&self, name: &str, factor: &Array2<f64>, stats: &Stats) -> Result<Operator<f32>> {
        use weightpress::tensor::Tensor;
        let stored = self.checkpoint.get(name)?;
        let weight = stored.matrix::<f64>()?;
        stats.check_shape(name, weight.dim())?;
        stats.check_origin(name, stored)?;
        let target = Faer.matmul(weight.view(), factor.view()).mapv(|value| value as f32);
        let problem = Problem::new(name, target.view(), self.budget)
            .dtype(stored.dtype)
            .metric(self.metric.resolve(name, stats)?);
        let mut operators = self.method.factorize(&[problem])?;
        operators.pop().with_context(|| format!("no result for {name}"))
    }

    /// A layer's file: its operators, and what else it has.
    fn write(&self, i: usize, key: &str, operators: &[(String, Operator<f32>)]) -> Result<()> {
        let (mut encoder, mut weights) = (Encoder::new(), BTreeMap::new());
        for (name, operator) in operators {
            let (dtype, shape) = (self.checkpoint.get(name)?.dtype.to_string(), operator.shape());
            weights.insert(name.clone(), Tree { shape, dtype, operator: encoder.encode(name, operator)? });
        }
        let others = self.of_layer(i).filter(|name| operators.iter().all(|(other, _)| other != name));
        let mut entries = others.map(|name| self.checkpoint.entry(name)).collect::<weightpress::Result<Vec<_>>>()?;
        entries.extend(encoder.into_tensors().into_iter().map(|tensor| Entry {
            name: tensor.name,
            dtype: tensor.dtype,
            shape: tensor.shape,
            data: Payload::Bytes(tensor.bytes.into()),
        }));
        let header =
            Header { format: FORMAT_VERSION, version: env!("CARGO_PKG_VERSION").into(), recipe: key.into(), weights };
        let metadata = BTreeMap::from([
            ("format".to_owned(), "pt".to_owned()),
            (METADATA_KEY.to_owned(), serde_json::to_string(&header)?),
            (MADE_OF.to_owned(), key.to_owned()),
        ]);
        write_shard(&self.arguments.out.join(file(i)), &metadata, entries)?;
        Ok(())
    }

    /// Everything outside of the layers, the side files, and last of all the index.
    fn finish(&self, layers: usize) -> Result<()> {
        const REST: &str = "rest.safetensors";
        let out = &self.arguments.out;
        let inside = |name: &str| (0..layers).any(|i| name.starts_with(&format!("model.layers.{i}.")));
        let rest = self.checkpoint.tensors().filter(|tensor| !inside(&tensor.name));
        let entries =
            rest.map(|tensor| self.checkpoint.entry(&tensor.name)).collect::<weightpress::Result<Vec<_>>>()?;
        write_shard(&out.join(REST), &BTreeMap::from([("format".to_owned(), "pt".to_owned())]), entries)?;
        for path in self.checkpoint.side_files()? {
            if let Some(name) = path.file_name() {
                copy_file_atomic(&path, &out.join(name))?;
            }
        }
        let mut places = BTreeMap::new();
        for file in (0..layers).map(file).chain([REST.to_owned()]) {
            let shard = Checkpoint::open(out.join(&file))?;
            places.extend(shard.tensors().map(|tensor| (tensor.name.clone(), file.clone())));
        }
        write_index(out, &serde_json::Map::new(), &places)?;
        Ok(())
    }
}
