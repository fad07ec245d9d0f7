//! `examples/python/load_factored.py` against the crate's own reader, on every form that is written.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use ndarray::Array2;
use weightpress::checkpoint::{Checkpoint, Entry, Payload, write_shard};
use weightpress::operator::codec::{Encoder, FORMAT_VERSION, Header, METADATA_KEY, Tree};
use weightpress::operator::{
    BlockDiagonal, Dense, IndexSet, Interpolative, LinearOperator, Mixture, Operator, Permutation, Runs, Side,
};
use weightpress::run::{Options, Silent};
use weightpress::scalar::DType;
use weightpress::stats::Stats;
use weightpress::{Recipe, Result};

use super::run::{entry, matrix, model};

/// A Python that has NumPy: `$PYTHON`, or one of the usual places.
pub fn python() -> Option<String> {
    let named = std::env::var("PYTHON").ok();
    let usual = ["python3", "/usr/bin/python3", "python"].map(str::to_owned);
    let has_numpy = |name: &String| {
        let output = Command::new(name).args(["-c", "import numpy"]).output();
        output.is_ok_and(|output| output.status.success())
    };
    named.into_iter().chain(usual).find(has_numpy)
}

/// Writes what Python makes of each compressed weight, checks the product with the factors, and
/// prints the names of all tensors.
const SCRIPT: &str = r#"
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import load_factored
for folder in sys.argv[2:]:
    checkpoint = load_factored.Checkpoint(folder)
    os.mkdir(os.path.join(folder, "python"))
    loaded = load_factored.load(folder)
    for i, name in enumerate(sorted(checkpoint.weights)):
        operator = checkpoint.operator(name)
        dense = operator.dense()
        assert dense.shape == operator.shape == tuple(checkpoint.weights[name]["shape"]), name
        assert np.abs(loaded[name] - dense).max() <= 1e-6 * np.abs(dense).max(), name
        x = np.random.default_rng(i).standard_normal((3, dense.shape[1]))
        y = x @ dense.T
        assert np.abs(operator.forward(x) - y).max() <= 1e-9 * np.abs(y).max(), name
        dense.astype("<f8").tofile(os.path.join(folder, "python", str(i)))
    print("\n".join([folder] + list(loaded)))
"#;

#[test]
fn numpy_rebuilds_the_same_weights() {
    let Some(python) = python() else {
        // Not `eprintln!`, which the test harness would swallow.
        writeln!(std::io::stderr(), "skipped: no python3 with numpy to check examples/python with").unwrap();
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut folders = runs(folder.path());
    folders.push((by_hand(&folder.path().join("by-hand")).unwrap(), None));

    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python");
    let mut command = Command::new(&python);
    command.env("PYTHONDONTWRITEBYTECODE", "1").args(["-c", SCRIPT]).arg(&scripts);
    let output = command.args(folders.iter().map(|(folder, _)| folder)).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    let mut lines = printed.lines().peekable();

    for (folder, original) in &folders {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let mut loader = checkpoint.loader::<f64>().unwrap();
        let names: Vec<String> = loader.compressed().map(str::to_owned).collect();
        assert!(!names.is_empty());
        for (index, name) in names.iter().enumerate() {
            let ours = loader.operator(name).unwrap().to_dense();
            let bytes = std::fs::read(folder.join("python").join(index.to_string())).unwrap();
            let theirs: Vec<f64> = bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
            let theirs = Array2::from_shape_vec(ours.dim(), theirs).unwrap();
            let norm = |a: &Array2<f64>| a.mapv(|v| v * v).sum().sqrt();
            let error = norm(&(&ours - &theirs)) / norm(&ours);
            assert!(error <= 1e-6, "{} {name}: {error}", folder.display());
        }
        // The names are those of the checkpoint that was compressed.
        assert_eq!(lines.next(), Some(folder.to_str().unwrap()));
        let mut loaded = BTreeSet::new();
        while let Some(name) = lines.next_if(|line| !Path::new(line).is_absolute()) {
            loaded.insert(name.to_owned());
        }
        if let Some(original) = original {
            let original = Checkpoint::open(original).unwrap();
            assert_eq!(loaded, original.tensors().map(|t| t.name.clone()).collect());
        }
    }

    // As a program: a summary, and a file for programs that know nothing of factors.
    let (first, dense) = (&folders[0].0, folder.path().join("dense.npz"));
    let run = |rest: &[&Path]| {
        let script = scripts.join("load_factored.py");
        let output = Command::new(&python).arg(script).arg(first).args(rest).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(run(&[]).contains("interpolative"));
    run(&["--out".as_ref(), &dense]);
    assert!(std::fs::metadata(&dense).unwrap().len() > 0);
}

/// Compressed checkpoints in the forms of all methods, each with what it was made of.
fn runs(folder: &Path) -> Vec<(PathBuf, Option<PathBuf>)> {
    // 64 and 32: powers of two for Hadamard; wide and tall, BF16 and F32, in two shards.
    let mixed = model(folder, 3, 64, 32);
    let group = folder.join("group.safetensors");
    let entries = (0..3).map(|i| entry(&format!("layers.{i}.a.weight"), &matrix(30, 40, i), DType::F32)).collect();
    write_shard(&group, &BTreeMap::new(), entries).unwrap();

    let mut forms = Vec::new();
    let basis = |kind: &str, side: &str| format!("{{ type = 'cosine', basis = '{kind}', side = '{side}' }}");
    for method in ["'svd'".to_owned(), "{ type = 'svd', form = 'factors' }".into()] {
        forms.push((&mixed, format!("method = {method}\nbudget = {{ keep = 0.6 }}")));
    }
    forms.push((&mixed, "method = 'svd'\nbudget = { keep = 0.6 }\nallocate = 'global'".into()));
    for (kind, side) in [("identity", "right"), ("dct2", "left"), ("dct3", "right"), ("hadamard", "both")] {
        forms.push((&mixed, format!("method = {}\nbudget = {{ keep = 0.6 }}", basis(kind, side))));
    }
    for method in
        ["type = 'two-four'", "type = 'two-four', n = 4, m = 8", "type = 'bitmask'", "type = 'armor', block = 6"]
    {
        forms.push((&mixed, format!("method = {{ {method} }}\nbudget = {{ keep = 0.9 }}")));
    }
    for method in [
        "type = 'quantize', group = 10",
        "type = 'quantize', bits = 3, group = 0, zero-point = 'integer'",
        "type = 'quantize', bits = 4, group = 10, zero-point = 'float'",
        "type = 'mixed', quantize = { group = 10 }",
        "type = 'quantize', inner = { type = 'svd' }",
        "type = 'quantize', group = 10, inner = { type = 'two-four' }",
        "type = 'quantize', bits = 3, zero-point = 'float', group = 10, inner = { type = 'bitmask' }",
        "type = 'quantize', group = 4, inner = { type = 'monarch', output-blocks = 2, groups = 'strided' }",
        "type = 'quantize', inner = { type = 'cospadi' }",
        "type = 'residual', first = { type = 'quantize', bits = 2 }, then = { type = 'svd' }",
        "type = 'auto'",
    ] {
        forms.push((&mixed, format!("method = {{ {method} }}\nbudget = {{ keep = 0.5 }}")));
    }
    for rest in [
        "input-blocks = 3",
        "output-blocks = 2, groups = 'strided', ranks = 'uniform'",
        "output-blocks = 5, input-blocks = 1",
    ] {
        forms.push((&mixed, format!("method = {{ type = 'monarch', {rest} }}\nbudget = {{ keep = 0.6 }}")));
    }
    for (share, form) in [("input", "pivot"), ("output", "pivot"), ("input", "factors")] {
        let method = format!("{{ type = 'svd', share = '{share}', form = '{form}' }}");
        forms.push((&group, format!("method = {method}\ngroup = 'all'\nbudget = {{ keep = 0.5 }}")));
    }
    let compress = |(index, (input, rest)): (usize, (&PathBuf, String))| {
        let out = folder.join(format!("out{index}"));
        let recipe = Recipe::parse(&format!("[[rule]]\nmatch = 'layers\\.\\d+\\.[ab]\\.weight'\n{rest}")).unwrap();
        let checkpoint = Checkpoint::open(input).unwrap();
        let plan = |stats| recipe.plan(&checkpoint, stats).map(|plan| plan.run(&out, &Options::default(), &Silent));
        plan(&Stats::empty()).unwrap().unwrap();
        (out, Some(input.clone()))
    };
    forms.into_iter().enumerate().map(compress).collect()
}

/// What no method writes today: sums, a shared part inside, all three index dtypes, halves and doubles.
fn by_hand(folder: &Path) -> Result<PathBuf> {
    std::fs::create_dir(folder).unwrap();
    let dense = |m, n, dtype| Dense::rounded(matrix(m, n, m + n).mapv(f64::from), dtype);
    let leaf = |m, n, dtype| Ok::<_, weightpress::Error>(Operator::Dense(dense(m, n, dtype)?));
    let shared = Arc::new(leaf(4, 6, DType::F16)?);
    let pivots = |len, chosen: &[u32], t: Dense<f64>| {
        Ok::<_, weightpress::Error>(Operator::Interpolative(Interpolative::new(
            Side::Left,
            IndexSet::new(len, chosen.to_vec())?,
            t,
        )?))
    };
    let sum = Operator::sum_of(vec![
        leaf(9, 6, DType::F64)?,
        Operator::product_of(vec![leaf(9, 4, DType::BF16)?, Operator::Shared(shared.clone())])?,
    ])?;
    let other = Operator::product_of(vec![leaf(5, 4, DType::F32)?, Operator::Shared(shared.clone())])?;
    let atoms = vec![Operator::Shared(shared), leaf(4, 6, DType::BF16)?];
    let mixture = Operator::Mixture(Mixture::new(dense(1, 2, DType::F32)?, atoms)?);
    let list =
        Operator::product_of(vec![pivots(400, &[7, 399], dense(398, 2, DType::BF16)?)?, leaf(2, 3, DType::F32)?])?;
    let long = pivots(70_000, &[3, 65_537], dense(69_998, 2, DType::F16)?)?;

    let blocks = |extents: &[(usize, usize)]| {
        let count = extents.iter().map(|(rows, columns)| rows * columns).sum();
        let values = matrix(1, count, count).iter().map(|&v| v.into()).collect();
        BlockDiagonal::rounded(values, extents.to_vec(), DType::BF16).map(Operator::BlockDiagonal)
    };
    let grid = |shape, rows, columns, runs| Permutation::grid(shape, rows, columns, runs).map(Operator::Permutation);
    let alike = Operator::product_of(vec![
        grid((7, 8), 2, 4, Runs::Uniform(1))?,
        blocks(&[(4, 2), (4, 2)])?,
        Operator::Permutation(Permutation::list(5, vec![4, 5, 0, 2])?),
    ])?;
    let ragged = Operator::product_of(vec![
        blocks(&[(4, 3), (4, 2)])?,
        grid((5, 5), 2, 2, Runs::Table(vec![1, 2, 2, 0]))?,
        blocks(&[(3, 3), (2, 3)])?,
        grid((6, 5), 1, 6, Runs::Uniform(1))?,
    ])?;

    let mut encoder = Encoder::new();
    let mut weights = BTreeMap::new();
    let all = [
        ("sum", sum),
        ("other", other),
        ("list", list),
        ("long", long),
        ("alike", alike),
        ("ragged", ragged),
        ("mixture", mixture),
    ];
    for (name, operator) in all {
        let tree = Tree { shape: operator.shape(), dtype: "F32".into(), operator: encoder.encode(name, &operator)? };
        weights.insert(name.to_owned(), tree);
    }
    let header = Header { format: FORMAT_VERSION, version: "test".into(), recipe: String::new(), weights };
    let metadata = BTreeMap::from([(METADATA_KEY.to_owned(), serde_json::to_string(&header).unwrap())]);
    let tensors = encoder.into_tensors();
    let dtypes: BTreeSet<String> = tensors.iter().map(|t| t.dtype.to_string()).collect();
    assert!(["U16", "U32"].iter().all(|dtype| dtypes.contains(*dtype)), "{dtypes:?}");
    let entries = tensors.into_iter().map(|t| Entry {
        name: t.name,
        dtype: t.dtype,
        shape: t.shape,
        data: Payload::Bytes(t.bytes.into()),
    });
    write_shard(&folder.join("model.safetensors"), &metadata, entries.collect())?;
    Ok(folder.into())
}
