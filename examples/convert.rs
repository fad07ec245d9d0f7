//! Turns layers that are compressed already into factored ones (`NAME.weight`): Monarch layers (`NAME.blkdiag1`,
//! `NAME.blkdiag2`) and the formats `sparse-24-bitmask` and `sparse-bitmask` of compressed-tensors up to 0.14
//! (`NAME.compressed`, `NAME.bitmask`, `NAME.shape`, and `NAME.row_offsets` in the second).
//!
//! ```text
//! cargo run --release --example convert -- INPUT --out DIR
//! cargo run --release --example convert -- INPUT --out DIR --shape '.*fc1=3072x768'
//! ```
//!
//! Monarch layers do not store how far they pad: without `--shape` a weight has as many outputs as its bias, if there is
//! one, and otherwise as many outputs and inputs as its blocks. The other tensors are copied, and so are files beside
//! the weights: a `sparsity_config` in a `config.json` says nothing of the result any more.
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
use ndarray::{Array2, Array3};
use regex::Regex;
use weightpress::checkpoint::{Checkpoint, Entry, Payload, copy_file_atomic, write_index, write_shard};
use weightpress::operator::codec::{Encoder, FORMAT_VERSION, Header, METADATA_KEY, Tree};
use weightpress::operator::{Bitmask, Dense, NmSparse};
use weightpress::scalar::{DType, widen};
use weightpress::{LinearOperator, Operator};

use support::exit;

#[derive(Parser)]
#[command(about = "Layers that are compressed already as a factored checkpoint")]
struct Arguments {
    /// A .safetensors file, or a folder that holds one or several with an index
    input: PathBuf,
    /// New or empty folder for the result
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Outputs and inputs of the Monarch layers whose whole name matches; the first that matches counts
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
    let layers: BTreeMap<&str, Kind> = checkpoint.tensors().filter_map(|t| Kind::of(&t.name)).collect();
    if layers.is_empty() {
        bail!("{} has no tensor named `….blkdiag1` or `….compressed`", arguments.input.display());
    }
    let (mut map, mut saved) = (BTreeMap::new(), (0, 0));
    for shard in checkpoint.shards() {
        let mut weights = BTreeMap::new();
        let mut entries = Vec::new();
        for tensor in &shard.tensors {
            let (layer, part) = tensor.name.rsplit_once('.').unwrap_or_default();
            match layers.get(layer) {
                Some(kind) if part == kind.parts()[0] => {
                    let operator = kind.read(&checkpoint, layer, &arguments.shape)?;
                    let (m, n) = operator.shape();
                    saved.0 += m * n;
                    weights.insert(format!("{layer}.weight"), encode(&checkpoint, layer, &operator, &mut entries)?);
                }
                Some(kind) if kind.parts().contains(&part) => {}
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

/// How a layer is stored.
#[derive(Clone, Copy)]
enum Kind {
    Monarch,
    Bitmask,
}

impl Kind {
    /// The layer that a tensor is the first part of.
    fn of(tensor: &str) -> Option<(&str, Kind)> {
        let (layer, part) = tensor.rsplit_once('.')?;
        let kind = [Kind::Monarch, Kind::Bitmask].into_iter().find(|kind| kind.parts()[0] == part)?;
        Some((layer, kind))
    }

    /// The last words of its tensors' names.
    fn parts(self) -> &'static [&'static str] {
        match self {
            Kind::Monarch => &["blkdiag1", "blkdiag2"],
            Kind::Bitmask => &["compressed", "bitmask", "shape", "row_offsets"],
        }
    }

    fn read(self, checkpoint: &Checkpoint, layer: &str, shapes: &[Shape]) -> Result<Operator<f32>> {
        match self {
            Kind::Monarch => monarch(checkpoint, layer, shapes),
            Kind::Bitmask => bitmask(checkpoint, layer),
        }
    }
}

/// Adds the tensors of a layer to `entries`.
fn encode(
    checkpoint: &Checkpoint,
    layer: &str,
    operator: &Operator<f32>,
    entries: &mut Vec<Entry<'_>>,
) -> Result<Tree> {
    let name = format!("{layer}.weight");
    if checkpoint.info(&name).is_some() {
        bail!("`{layer}` is compressed and has a tensor `{name}`");
    }
    let mut encoder = Encoder::new();
    let node = encoder.encode(&name, operator)?;
    let tensors = encoder.into_tensors();
    // All values of a layer are of one dtype; positions and masks are bytes.
    let dtype = tensors.iter().map(|tensor| tensor.dtype).find(|dtype| dtype.is_float()).context("no values")?;
    entries.extend(tensors.into_iter().map(|tensor| Entry {
        name: tensor.name,
        dtype: tensor.dtype,
        shape: tensor.shape,
        data: Payload::Bytes(tensor.bytes.into()),
    }));
    Ok(Tree { shape: operator.shape(), dtype: dtype.to_string(), operator: node })
}

fn monarch(checkpoint: &Checkpoint, layer: &str, shapes: &[Shape]) -> Result<Operator<f32>> {
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
    Ok(Operator::monarch(w1.view(), w2.view(), shape, dtype).map_err(|e| e.of_tensor(layer))?)
}

fn bitmask(checkpoint: &Checkpoint, layer: &str) -> Result<Operator<f32>> {
    let name = |part: &str| format!("{layer}.{part}");
    let stored = checkpoint.get(&name("shape"))?;
    let numbers = stored
        .bytes
        .chunks_exact(8)
        .filter_map(|bytes| usize::try_from(i64::from_le_bytes(bytes.try_into().ok()?)).ok());
    let shape: Vec<usize> = numbers.collect();
    let &[m, n] = shape.as_slice() else { bail!("`{}` does not hold two extents", name("shape")) };
    if stored.dtype.to_string() != "I64" {
        bail!("`{}` is of {}, expected I64", name("shape"), stored.dtype);
    }
    let mask = checkpoint.get(&name("bitmask"))?;
    if mask.dtype != DType::U8 {
        bail!("`{}` is of {}, expected U8", name("bitmask"), mask.dtype);
    }
    let stored = checkpoint.get(&name("compressed"))?;
    let values = widen::<f32>(stored.dtype, stored.bytes).with_context(|| format!("`{}`", name("compressed")))?;
    // The unstructured format says where rows begin, which the mask says as well.
    let free = checkpoint.info(&name("row_offsets")).is_some();
    let extents = match (free, stored.shape) {
        (true, &[count]) => (1, count),
        (false, &[rows, columns]) => (rows, columns),
        _ => bail!("`{}` has the shape {:?}", name("compressed"), stored.shape),
    };
    let values = Dense::rounded(Array2::from_shape_vec(extents, values)?, stored.dtype);
    let values = values.map_err(|e| e.of_tensor(name("compressed")))?;
    let operator = match free {
        true => Bitmask::decode((m, n), mask.bytes, values).map(Operator::Bitmask),
        false => NmSparse::from_bitmask((m, n), mask.bytes, values).map(Operator::NmSparse),
    };
    Ok(operator.map_err(|e| e.of_tensor(layer))?)
}
