//! Makes the layers of a language model (Llama architecture) more alike and leaves what it computes as it is, so that
//! the method `masa`, whose atoms are shared across layers, finds more to share.
//!
//! ```text
//! cargo run --release --example align -- MODEL --out DIR
//! ```
//!
//! Each key-value head of each layer is rotated towards the same head of the other layers: its rows of `v_proj` (and of
//! the bias, if there is one), and, the other way, the columns of `o_proj` that read it (see `weightpress::gauge`).
//! These tensors keep their dtypes, and rounding to those is all that changes what the model computes. The other
//! tensors are copied byte for byte, and so are files beside the weights.
//!
//! In memory are both projections of all layers, 8 bytes for each weight.
//!
//! Exit codes: 0 done, 2 the input was refused, 1 something failed on the way.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use ndarray::{Array2, ArrayView1, ArrayView2, s};
use weightpress::checkpoint::{Checkpoint, Payload, copy_file_atomic, write_index, write_shard};
use weightpress::gauge::{self, Attention, align_heads};
use weightpress::linalg::{Faer, Kernels};
use weightpress::run::Observer;
use weightpress::scalar::{check_finite, narrow, widen};

use support::attention::Heads;
use support::exit;
use support::llama::{Config, weight_name};
use support::progress::Bar;

#[derive(Parser)]
#[command(about = "Rotates value heads so that layers become alike; what the model computes stays the same")]
struct Arguments {
    /// Folder with config.json and weights
    model: PathBuf,
    /// New or empty folder for the result
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How often each head is rotated
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: u64,
}

const VALUE: &str = "self_attn.v_proj";
const OUTPUT: &str = "self_attn.o_proj";

fn main() -> ExitCode {
    exit::code(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { model, out, rounds } = arguments;
    let checkpoint = Checkpoint::open(model)?;
    let config = Config::read(&checkpoint)?;
    check_out(out, checkpoint.root())?;
    check_attention(&checkpoint)?;
    let count = config.num_hidden_layers;
    ensure!(count > 1, "layers become like others, and {} has {count}", model.display());
    let mut layers = (0..count).map(|i| load(&checkpoint, &config, i)).collect::<Result<Vec<_>>>()?;

    let atoms = (count / 3).max(1);
    let before = held(&layers, atoms)?;
    let Heads { queries, keys, .. } = config.heads();
    let bar = Bar::default();
    bar.stage("rounds", *rounds);
    for _ in 0..*rounds {
        align_heads(&mut layers, gauge::Heads { query: queries, key_value: keys }, 1)?;
        bar.advance(1, "");
    }
    drop(bar);
    let after = held(&layers, atoms)?;

    // A layer's memory is free as soon as its bytes are there.
    let mut rotated = BTreeMap::new();
    for (i, layer) in layers.into_iter().enumerate() {
        store(&checkpoint, i, &layer, &mut rotated)?;
    }
    write(&checkpoint, out, rotated)?;
    let least = atoms as f64 / count as f64;
    let mut lines = vec![
        format!("energy that {atoms} atoms hold of {count} layers ({least:.4} if these had nothing in common)"),
        format!("{:8}{:>8}{:>8}", "", "before", "after"),
    ];
    for (name, (before, after)) in ["v_proj", "o_proj"].iter().zip(before.iter().zip(after)) {
        lines.push(format!("{name:8}{before:8.4}{after:8.4}"));
    }
    lines.push(format!("written to {}", out.display()));
    exit::answer(&lines.join("\n"))
}

/// Refuses a folder that is in use, and makes none.
fn check_out(out: &Path, input: &Path) -> Result<()> {
    let place = |path: &Path| path.canonicalize().with_context(|| format!("{}", path.display()));
    if out.exists() {
        ensure!(place(out)? != place(input)?, "{} is the input's own folder: choose another", out.display());
        let occupied = out.read_dir().with_context(|| format!("{}", out.display()))?.next().is_some();
        ensure!(!occupied, "{} is not empty", out.display());
    }
    Ok(())
}

/// Refuses attention that is compressed, or that has tensors of unknown use: a norm or scales between values and output
/// would have to be the same for all features of a head.
fn check_attention(checkpoint: &Checkpoint) -> Result<()> {
    const LINEAR: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];
    if let Some((name, _)) = checkpoint.trees()?.first_key_value() {
        bail!("`{name}` is compressed already: rotate first, and compress then");
    }
    for tensor in checkpoint.tensors() {
        let Some((_, part)) = tensor.name.split_once(".self_attn.") else { continue };
        let linear = part.rsplit_once('.').is_some_and(|(l, p)| LINEAR.contains(&l) && ["weight", "bias"].contains(&p));
        ensure!(
            linear || part == "rotary_emb.inv_freq",
            "`{}` is nothing that attention of the Llama architecture has: rotated heads may not fit it",
            tensor.name
        );
    }
    Ok(())
}

fn bias_name(i: usize) -> String {
    format!("model.layers.{i}.{VALUE}.bias")
}

/// The projections of layer `i`. The bias of the values is one more column, which rotates along.
fn load(checkpoint: &Checkpoint, config: &Config, i: usize) -> Result<Attention<f64>> {
    let (Heads { queries, keys, width }, hidden) = (config.heads(), config.hidden_size);
    let (given, read) = (keys * width, queries * width);
    let mut value = Array2::zeros((given, hidden + 1));
    let weights = numbers(checkpoint, &weight_name(i, VALUE), &[given, hidden])?;
    value.slice_mut(s![.., ..hidden]).assign(&ArrayView2::from_shape((given, hidden), &weights)?);
    if checkpoint.info(&bias_name(i)).is_some() {
        let bias = numbers(checkpoint, &bias_name(i), &[given])?;
        value.column_mut(hidden).assign(&ArrayView1::from(&bias));
    }
    let output = numbers(checkpoint, &weight_name(i, OUTPUT), &[hidden, read])?;
    Ok(Attention { value, output: Array2::from_shape_vec((hidden, read), output)? })
}

/// A tensor's values, if they are of the shape that fits the heads.
fn numbers(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
    let stored = checkpoint.get(name)?;
    ensure!(stored.shape == shape, "`{name}` has the shape {:?}, where config.json needs {shape:?}", stored.shape);
    let values = widen::<f64>(stored.dtype, stored.bytes).map_err(|e| e.of_tensor(name))?;
    check_finite("weight", &values).map_err(|e| e.of_tensor(name))?;
    checkpoint.release(name);
    Ok(values)
}

/// Takes the tensors of layer `i` into `rotated`, as bytes of the dtypes they had.
fn store(
    checkpoint: &Checkpoint,
    i: usize,
    layer: &Attention<f64>,
    rotated: &mut BTreeMap<String, Vec<u8>>,
) -> Result<()> {
    let hidden = layer.value.ncols() - 1;
    let (weights, bias) = layer.value.view().split_at(ndarray::Axis(1), hidden);
    let tensors =
        [(weight_name(i, VALUE), weights), (bias_name(i), bias), (weight_name(i, OUTPUT), layer.output.view())];
    for (name, values) in tensors {
        let Some(info) = checkpoint.info(&name) else { continue };
        let bytes = narrow(info.dtype, values)?;
        // Numbers near the end of f16 may have grown beyond it.
        let finite = check_finite("rotated", &widen::<f64>(info.dtype, &bytes)?);
        finite.map_err(|e| e.of_tensor(&name))?;
        rotated.insert(name, bytes);
    }
    Ok(())
}

/// The share of the energy of value and output projections that the best `atoms` matrices hold, mixed anew for each
/// layer, where all layers count the same: the largest eigenvalues of the matrix of cosines.
fn held(layers: &[Attention<f64>], atoms: usize) -> Result<[f64; 2]> {
    let share = |of: fn(&Attention<f64>) -> &Array2<f64>| -> Result<f64> {
        let flat: Vec<_> = layers.iter().map(|layer| of(layer).flatten()).collect();
        let mut cosines = Array2::from_shape_fn((flat.len(), flat.len()), |(i, j)| match j <= i {
            true => flat[i].dot(&flat[j]),
            // Only the lower triangle is read.
            false => 0.0,
        });
        let norms = cosines.diag().mapv(f64::sqrt);
        cosines.indexed_iter_mut().for_each(|((i, j), v)| *v /= (norms[i] * norms[j]).max(f64::MIN_POSITIVE));
        let values = Kernels::<f64>::eigh(&Faer, cosines)?.values;
        Ok(values.slice(s![..atoms]).sum() / values.sum().max(f64::MIN_POSITIVE))
    };
    Ok([share(|layer| &layer.value)?, share(|layer| &layer.output)?])
}

/// Writes the checkpoint with other bytes for some of its tensors. Each file appears when it is complete, those with
/// weights last.
fn write(checkpoint: &Checkpoint, out: &Path, mut rotated: BTreeMap<String, Vec<u8>>) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    for file in checkpoint.side_files()? {
        copy_file_atomic(&file, &out.join(file.file_name().context("a file without a name")?))?;
    }
    let mut places = BTreeMap::new();
    for shard in checkpoint.shards() {
        let mut entries = Vec::new();
        for tensor in &shard.tensors {
            let mut entry = checkpoint.entry(&tensor.name)?;
            if let Some(bytes) = rotated.remove(&tensor.name) {
                entry.data = Payload::Bytes(bytes.into());
            }
            entries.push(entry);
            places.insert(tensor.name.clone(), shard.file.clone());
        }
        let path = out.join(&shard.file);
        // An index may name files in folders.
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        write_shard(&path, &shard.metadata, entries)?;
    }
    if checkpoint.has_index() {
        write_index(out, checkpoint.index_metadata(), &places)?;
    }
    Ok(())
}
