//! Turns a checkpoint of Monarch layers (`NAME.blkdiag1`, `NAME.blkdiag2`) into a factored one (`NAME.weight`).
//!
//! ```text
//! cargo run --release --example convert -- INPUT --out DIR
//! cargo run --release --example convert -- INPUT --out DIR --shape '.*fc1=3072x768'
//! ```
//!
//! The layers do not store how far they pad: without `--shape` a weight has as many outputs as its bias, if there is
//! one, and otherwise as many outputs and inputs as its blocks. The other tensors are copied.
//!
//! Exit codes: 0 done, 2 the input was refused, 1 something failed on the way.

mod support {
    pub mod exit;
}

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::Parser;
use ndarray::Array3;
use regex::Regex;
use weightpress::checkpoint::{Checkpoint, Entry, Payload, copy_file_atomic, write_index, write_shard};
use weightpress::operator::codec::{Encoder, FORMAT_VERSION, Header, METADATA_KEY, Tree};
use weightpress::scalar::widen;
use weightpress::{LinearOperator, Operator};

use support::exit;

#[derive(Parser)]
#[command(about = "Monarch layers as a factored checkpoint")]
struct Arguments {
    /// A .safetensors file, or a folder that holds one or several with an index
    input: PathBuf,
    /// New or empty folder for the result
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Outputs and inputs of the layers whose whole name matches; the first that matches counts
    #[arg(long, value_name = "REGEX=MxN")]
    shape: Vec<Shape>,
}

#[derive(Clone)]
struct Shape(Regex, (usize, usize));

impl FromStr for Shape {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        let split = || {
            let (pattern, shape) = text.rsplit_once('=')?;
            let (m, n) = shape.split_once('x')?;
            Some((pattern, (m.parse().ok()?, n.parse().ok()?)))
        };
        let (pattern, shape) = split().with_context(|| format!("`{text}`: expected REGEX=MxN"))?;
        Ok(Shape(Regex::new(&format!("^(?:{pattern})$"))?, shape))
    }
}

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = Checkpoint::open(&arguments.input)?;
    let out = &arguments.out;
    std::fs::create_dir_all(out).with_context(|| format!("{}", out.display()))?;
    if out.read_dir().with_context(|| format!("{}", out.display()))?.next().is_some() {
        bail!("{} is not empty", out.display());
    }
    let layers: Vec<String> =
        checkpoint.tensors().filter_map(|t| t.name.strip_suffix(".blkdiag1").map(Into::into)).collect();
    if layers.is_empty() {
        bail!("{} has no tensor named `….blkdiag1`", arguments.input.display());
    }
    let (mut map, mut saved) = (BTreeMap::new(), (0, 0));
    for shard in checkpoint.shards() {
        let mut weights = BTreeMap::new();
        let mut entries = Vec::new();
        for tensor in &shard.tensors {
            let (layer, part) = tensor.name.rsplit_once('.').unwrap_or_default();
            match part {
                "blkdiag1" => {
                    let tree = convert(&checkpoint, layer, &arguments.shape, &mut entries)?;
                    saved.0 += tree.shape.0 * tree.shape.1;
                    weights.insert(format!("{layer}.weight"), tree);
                }
                "blkdiag2" if layers.iter().any(|other| other == layer) => {}
                _ => entries.push(checkpoint.entry(&tensor.name)?),
            }
        }
        let file = shard.path().file_name().context("a shard without a name")?.to_string_lossy().into_owned();
        let mut metadata = shard.metadata.clone();
        if !weights.is_empty() {
            let version = env!("CARGO_PKG_VERSION").into();
            let header = Header { format: FORMAT_VERSION, version, recipe: String::new(), weights };
            metadata.insert(METADATA_KEY.into(), serde_json::to_string(&header)?);
        }
        map.extend(entries.iter().map(|entry| (entry.name.clone(), file.clone())));
        saved.1 += entries.iter().map(|entry| entry.data.len()).sum::<u64>();
        write_shard(&out.join(&file), &metadata, entries)?;
    }
    if checkpoint.has_index() {
        write_index(out, checkpoint.index_metadata(), &map)?;
    }
    for file in checkpoint.side_files()? {
        copy_file_atomic(&file, &out.join(file.file_name().context("a file without a name")?))?;
    }
    exit::answer(&format!("{} layers, {} weights as dense matrices; {} bytes", layers.len(), saved.0, saved.1))
}

/// Adds the tensors of a layer to `entries`.
fn convert(checkpoint: &Checkpoint, layer: &str, shapes: &[Shape], entries: &mut Vec<Entry<'_>>) -> Result<Tree> {
    let name = format!("{layer}.weight");
    if checkpoint.info(&name).is_some() {
        bail!("`{layer}` has blocks and a tensor `{name}`");
    }
    let blocks = |part: &str| -> Result<_> {
        let name = format!("{layer}.{part}");
        let stored = checkpoint.get(&name)?;
        let &[count, rows, columns] = stored.shape else {
            bail!("`{name}` has the shape {:?}, expected blocks x rows x columns", stored.shape);
        };
        let values = widen::<f32>(stored.dtype, stored.bytes).with_context(|| format!("`{name}`"))?;
        Ok((Array3::from_shape_vec((count, rows, columns), values)?, stored.dtype))
    };
    let ((w1, dtype), (w2, _)) = (blocks("blkdiag1")?, blocks("blkdiag2")?);
    let given = shapes.iter().find(|Shape(pattern, _)| pattern.is_match(layer)).map(|Shape(_, shape)| *shape);
    let shape = given.unwrap_or_else(|| {
        let bias = checkpoint.info(&format!("{layer}.bias")).and_then(|bias| bias.shape.first().copied());
        (bias.unwrap_or(w2.dim().0 * w2.dim().1), w1.dim().0 * w1.dim().2)
    });
    let operator = Operator::monarch(w1.view(), w2.view(), shape, dtype).map_err(|e| e.of_tensor(layer))?;
    let mut encoder = Encoder::new();
    let node = encoder.encode(&name, &operator)?;
    entries.extend(encoder.into_tensors().into_iter().map(|tensor| Entry {
        name: tensor.name,
        dtype: tensor.dtype,
        shape: tensor.shape,
        data: Payload::Bytes(tensor.bytes.into()),
    }));
    Ok(Tree { shape: operator.shape(), dtype: dtype.to_string(), operator: node })
}
