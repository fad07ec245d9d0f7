//! Lists what is in a checkpoint: tensors, spectra, and the operators of a factored one.
//!
//! ```text
//! cargo run --release --example inspect -- examples/model --spectrum
//! cargo run --release --example inspect -- compressed/ --match '.*q_proj.*' --json
//! cargo run --release --example inspect -- compressed/ --check
//! ```
//!
//! Exit codes: 0 done, 2 the input was refused (or `--check` found something), 1 something failed on the way.

mod support {
    pub mod exit;
}

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use regex::Regex;
use serde::Serialize;
use serde_json::Value;
use weightpress::checkpoint::{Checkpoint, Loader, TensorInfo};
use weightpress::linalg::{Eigh, Faer, Kernels};
use weightpress::operator::codec::{Node, Tree};
use weightpress::report::human_bytes;
use weightpress::scalar::{DType, check_finite, widen};
use weightpress::{Error, LinearOperator};

use support::exit;

/// Matrices with a longer short side are not decomposed unless `--match` asks for them by name.
const LONGEST: usize = 2048;

#[derive(Parser)]
#[command(about = "Lists a checkpoint's tensors, spectra and operators")]
struct Arguments {
    /// A .safetensors file, or a folder that holds one or several with an index
    input: PathBuf,
    /// Regular expression that matches the whole name of the tensors to show
    #[arg(long = "match", value_name = "REGEX")]
    pattern: Option<String>,
    /// Singular values of each matrix: stable rank, rank that holds 90 % and 99 % of the energy
    #[arg(long)]
    spectrum: bool,
    /// Read every value; exit code 2 if one is NaN or infinite, or a compressed weight cannot be loaded
    #[arg(long)]
    check: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A tensor as it lies in a file.
#[derive(Serialize)]
struct Row {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    spectrum: Option<Spectrum>,
}

/// A compressed weight of a factored checkpoint.
#[derive(Serialize)]
struct Weight {
    shape: (usize, usize),
    dtype: String,
    bytes_before: u64,
    /// Of the tensors that it is made of; shared ones are counted with every weight that uses them.
    bytes: u64,
    operator: Node,
    #[serde(skip_serializing_if = "Option::is_none")]
    spectrum: Option<Spectrum>,
}

/// What is known of a matrix's singular values.
#[derive(Serialize)]
#[serde(untagged)]
enum Spectrum {
    Known(Summary),
    Skipped { skipped: String },
}

/// A few numbers instead of all singular values σ.
#[derive(Serialize)]
struct Summary {
    /// σ₁.
    largest: f64,
    /// Σσ² ÷ σ₁²: between 1 and the rank.
    stable_rank: f64,
    /// The least rank that holds 90 % of Σσ².
    rank_90: usize,
    /// The least rank that holds 99 % of Σσ².
    rank_99: usize,
    /// min(m, n).
    full: usize,
}

fn main() -> ExitCode {
    exit::code(inspect(&Arguments::parse()))
}

fn inspect(arguments: &Arguments) -> Result<()> {
    let checkpoint = Checkpoint::open(&arguments.input)?;
    let wanted = match &arguments.pattern {
        Some(pattern) => Some(Regex::new(&format!("^(?:{pattern})$")).context("--match")?),
        None => None,
    };
    let wanted = |name: &str| wanted.as_ref().is_none_or(|regex| regex.is_match(name));
    let limit = if arguments.pattern.is_some() { usize::MAX } else { LONGEST };
    let trees = checkpoint.trees()?;
    let mut loader = checkpoint.loader::<f64>()?;

    let mut weights = BTreeMap::new();
    for (name, tree) in trees.iter().filter(|(name, _)| wanted(name)) {
        let spectrum = arguments.spectrum.then(|| spectrum(&mut loader, name, tree.shape, limit)).transpose()?;
        weights.insert(name.clone(), weight(&checkpoint, tree, spectrum));
    }
    let mut rows = Vec::new();
    for tensor in checkpoint.tensors() {
        // The parts of a weight are shown with it.
        let part = tensor.name.rsplit_once('.').is_some_and(|(name, _)| wanted(name) && trees.contains_key(name));
        if !wanted(&tensor.name) && !part {
            continue;
        }
        let spectrum = match (arguments.spectrum && !part, tensor.shape.as_slice()) {
            (true, &[m, n]) if tensor.dtype.is_float() && m * n > 0 => {
                Some(spectrum(&mut loader, &tensor.name, (m, n), limit)?)
            }
            _ => None,
        };
        rows.push(row(&checkpoint, tensor, spectrum));
    }
    let shown = arguments.pattern.is_none() || !rows.is_empty() || !weights.is_empty();
    if !shown {
        bail!("{}: no tensor matches `{}`", arguments.input.display(), arguments.pattern.as_deref().unwrap_or(""));
    }
    let problems = match arguments.check {
        true => Some(check(&checkpoint, &mut loader, &trees, wanted)?),
        false => None,
    };
    if arguments.json {
        let all = serde_json::json!({ "tensors": rows, "weights": weights, "problems": problems });
        exit::answer(&serde_json::to_string_pretty(&all)?)?;
    } else {
        exit::answer(&table(&checkpoint, &rows, &weights))?;
    }
    match problems {
        Some(all) if !all.is_empty() => bail!("{} tensor(s) cannot be used: {}", all.len(), all.join("; ")),
        Some(_) if !arguments.json => exit::answer("checked: every value is finite, every compressed weight loads"),
        _ => Ok(()),
    }
}

fn row(checkpoint: &Checkpoint, tensor: &TensorInfo, spectrum: Option<Spectrum>) -> Row {
    let file = checkpoint.shards().get(tensor.shard).map_or(String::new(), |shard| shard.file.clone());
    let dtype = tensor.dtype.to_string();
    Row { name: tensor.name.clone(), dtype, shape: tensor.shape.clone(), bytes: tensor.bytes, file, spectrum }
}

fn weight(checkpoint: &Checkpoint, tree: &Tree, spectrum: Option<Spectrum>) -> Weight {
    let dtype = DType::parse(&tree.dtype);
    Weight {
        shape: tree.shape,
        dtype: tree.dtype.clone(),
        bytes_before: dtype.map_or(0, |dtype| dtype.bytes(tree.shape.0 * tree.shape.1) as u64),
        bytes: leaves(checkpoint, &value(&tree.operator)).iter().map(|leaf| leaf.bytes).sum(),
        operator: tree.operator.clone(),
        spectrum,
    }
}

/// A node as JSON: so that this program shows nodes that it has never heard of.
fn value(node: &Node) -> Value {
    serde_json::to_value(node).unwrap_or(Value::Null)
}

/// The tensors that a tree names.
fn leaves<'c>(checkpoint: &'c Checkpoint, node: &Value) -> Vec<&'c TensorInfo> {
    match node {
        Value::Object(fields) => fields.values().flat_map(|field| leaves(checkpoint, field)).collect(),
        Value::Array(nodes) => nodes.iter().flat_map(|node| leaves(checkpoint, node)).collect(),
        Value::String(text) => checkpoint.info(text).into_iter().collect(),
        _ => Vec::new(),
    }
}

/// σ² are the eigenvalues of the smaller of W·Wᵀ and Wᵀ·W, in f64; or the reason why not.
fn spectrum(loader: &mut Loader<'_, f64>, name: &str, (m, n): (usize, usize), limit: usize) -> Result<Spectrum> {
    let full = m.min(n);
    if full > limit {
        return Ok(Spectrum::Skipped { skipped: format!("the short side is above {limit}: ask for it with --match") });
    }
    let w = match loader.operator(name) {
        Ok(operator) => operator.to_dense(),
        Err(Error::Tensor { source, .. }) if matches!(*source, Error::NonFinite { .. }) => {
            return Ok(Spectrum::Skipped { skipped: source.to_string() });
        }
        Err(other) => return Err(other.into()),
    };
    let kernels: &dyn Kernels<f64> = &Faer;
    let square = kernels.gram(if m <= n { w.view() } else { w.t() });
    let Eigh { values, .. } = kernels.eigh(square)?;
    let energies: Vec<f64> = values.iter().map(|v| v.max(0.0)).collect();
    let (first, total) = (energies.first().copied().unwrap_or(0.0), energies.iter().sum::<f64>());
    let rank = |fraction: f64| {
        let mut held = 0.0;
        let holds = |energy: &f64| {
            held += energy;
            held >= fraction * total
        };
        if total == 0.0 { 0 } else { energies.iter().position(holds).map_or(full, |at| at + 1) }
    };
    let stable_rank = if first > 0.0 { total / first } else { 0.0 };
    let (rank_90, rank_99) = (rank(0.9), rank(0.99));
    Ok(Spectrum::Known(Summary { largest: first.sqrt(), stable_rank, rank_90, rank_99, full }))
}

/// Reads every value of the tensors and loads the compressed weights; all that is wrong.
fn check(
    checkpoint: &Checkpoint,
    loader: &mut Loader<'_, f64>,
    trees: &BTreeMap<String, Tree>,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<String>> {
    /// Bytes widened at a time; a multiple of every element's size.
    const BLOCK: usize = 1 << 20;
    let mut bad = Vec::new();
    for tensor in checkpoint.tensors().filter(|tensor| wanted(&tensor.name) && tensor.dtype.is_float()) {
        let stored = checkpoint.get(&tensor.name)?;
        for (at, block) in stored.bytes.chunks(BLOCK).enumerate() {
            if let Err(Error::NonFinite { index, value, .. }) = check_finite("", &widen::<f64>(stored.dtype, block)?) {
                let index = at * (BLOCK / stored.dtype.bytes(1)) + index;
                bad.push(format!("`{}` holds {value} at index {index}", tensor.name));
                break;
            }
        }
    }
    for name in trees.keys().filter(|name| wanted(name)) {
        if let Err(why) = loader.operator(name) {
            bad.push(why.to_string());
        }
    }
    Ok(bad)
}

fn table(checkpoint: &Checkpoint, rows: &[Row], weights: &BTreeMap<String, Weight>) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(6).max(6);
    let spectrum = |known: &Option<Spectrum>| known.as_ref().map_or(String::new(), |known| format!("  {known}"));
    let mut lines = vec![format!("{:width$}  {:<6} {:>14} {:>10}", "tensor", "dtype", "shape", "bytes")];
    for row in rows {
        let shape = row.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
        let (bytes, spectrum) = (human_bytes(row.bytes), spectrum(&row.spectrum));
        lines.push(format!("{:width$}  {:<6} {shape:>14} {bytes:>10}{spectrum}", row.name, row.dtype));
    }
    for (name, weight) in weights {
        let (m, n) = weight.shape;
        let (before, after) = (human_bytes(weight.bytes_before), human_bytes(weight.bytes));
        let ratio = weight.bytes as f64 / weight.bytes_before.max(1) as f64;
        lines.push(format!("\n{name}: {m}x{n} {}, {before} -> {after} ({ratio:.3})", weight.dtype));
        lines.extend(weight.spectrum.as_ref().map(|known| format!("  {known}")));
        tree(checkpoint, name, &value(&weight.operator), 1, &mut lines);
    }
    let bytes = human_bytes(rows.iter().map(|row| row.bytes).sum());
    let (files, compressed) = (checkpoint.shards().len(), weights.len());
    lines.push(format!("\n{} tensors, {bytes}, {files} file(s); {compressed} compressed weights", rows.len()));
    lines.join("\n")
}

impl fmt::Display for Spectrum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spectrum::Known(s) => write!(
                f,
                "largest {:.3}, stable rank {:.1}, 90 % of the energy in rank {}, 99 % in {}, of {}",
                s.largest, s.stable_rank, s.rank_90, s.rank_99, s.full
            ),
            Spectrum::Skipped { skipped } => write!(f, "skipped: {skipped}"),
        }
    }
}

/// One node a line, its tensors (`.0` is the weight's own) with dtype and shape, its parts indented.
fn tree(checkpoint: &Checkpoint, weight: &str, node: &Value, depth: usize, lines: &mut Vec<String>) {
    let Value::Object(fields) = node else { return };
    let mut line = fields.get("op").and_then(Value::as_str).unwrap_or("?").to_owned();
    for (key, field) in fields.iter().filter(|(key, _)| *key != "op") {
        line += &match field {
            Value::String(text) => match checkpoint.info(text) {
                Some(info) => {
                    let name = text.strip_prefix(weight).unwrap_or(text);
                    format!(", {key} {name} {} {:?}", info.dtype, info.shape)
                }
                None => format!(", {key} {text}"),
            },
            Value::Number(number) => format!(", {key} {number}"),
            _ => String::new(),
        };
    }
    lines.push(format!("{}{line}", "  ".repeat(depth)));
    for field in fields.values() {
        match field {
            Value::Array(parts) => parts.iter().for_each(|part| tree(checkpoint, weight, part, depth + 1, lines)),
            part => tree(checkpoint, weight, part, depth + 1, lines),
        }
    }
}
