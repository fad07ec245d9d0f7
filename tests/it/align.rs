//! `examples/align.rs`: heads are rotated, and what attention computes stays the same to the rounding of the weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array2, ArrayView2, s};
use weightpress::Recipe;
use weightpress::checkpoint::{Checkpoint, Entry, Payload, write_index, write_shard};
use weightpress::run::Options;
use weightpress::scalar::DType;
use weightpress::tensor::Tensor;

use super::cli::run;
use super::run::{bytes_of, entry, matrix};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/model");

fn align(model: &Path, out: &Path) -> (Option<i32>, String, String) {
    run("align", [model.as_os_str(), "--out".as_ref(), out.as_os_str()])
}

#[track_caller]
fn assert_refused((code, printed, errors): (Option<i32>, String, String), part: &str) {
    assert!(code == Some(2) && printed.is_empty() && errors.contains(part), "{code:?} {printed}{errors}");
}

fn weight(checkpoint: &Checkpoint, layer: usize, part: &str) -> Array2<f64> {
    let name = format!("model.layers.{layer}.self_attn.{part}.weight");
    checkpoint.get(&name).unwrap().matrix::<f64>().unwrap().into_owned()
}

fn is_rotated(name: &str) -> bool {
    name.contains(".v_proj.") || name.ends_with(".o_proj.weight")
}

fn assert_others_are_copied(before: &Checkpoint, after: &Checkpoint) {
    assert_eq!(before.tensors().count(), after.tensors().count());
    for info in before.tensors() {
        let (own, other) = (before.get(&info.name).unwrap(), after.get(&info.name).unwrap());
        assert_eq!((own.dtype, own.shape), (other.dtype, other.shape));
        assert!(is_rotated(&info.name) || own.bytes == other.bytes, "{}", info.name);
    }
}

/// Whether O'·V' is O·V to what rounding each weight to a relative error of `unit` can do.
fn same_product([o, v]: [ArrayView2<'_, f64>; 2], [other_o, other_v]: [ArrayView2<'_, f64>; 2], unit: f64) -> bool {
    let gap = other_o.dot(&other_v) - o.dot(&v);
    // |O'V' - OV| ≤ (2u + u²)·|O|·|V| before rounding, and |O| ≤ |O'|/(1 - u).
    let bound = other_o.mapv(f64::abs).dot(&other_v.mapv(f64::abs)) * ((2.0 + unit) * unit / (1.0 - unit).powi(2));
    gap.iter().zip(&bound).all(|(gap, bound)| gap.abs() <= bound + 1e-12)
}

#[test]
fn attention_of_the_bundled_model_stays_and_its_layers_come_closer() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new/out");
    let (code, printed, errors) = align(MODEL.as_ref(), &out);
    assert_eq!(code, Some(0), "{printed}{errors}");

    let (before, after) = (Checkpoint::open(MODEL).unwrap(), Checkpoint::open(&out).unwrap());
    assert_others_are_copied(&before, &after);
    assert_eq!(before.shards()[0].metadata, after.shards()[0].metadata);
    for (name, bytes) in bytes_of(MODEL.as_ref()).iter().filter(|(name, _)| !name.ends_with(".safetensors")) {
        assert_eq!(&std::fs::read(out.join(name)).unwrap(), bytes, "{name}");
    }
    let (queries, keys, size) = (6, 3, 32);
    for layer in 0..6 {
        let [o, v] = ["o_proj", "v_proj"].map(|part| weight(&before, layer, part));
        let [other_o, other_v] = ["o_proj", "v_proj"].map(|part| weight(&after, layer, part));
        for query in 0..queries {
            let key = query * keys / queries;
            let columns = s![.., query * size..(query + 1) * size];
            let rows = s![key * size..(key + 1) * size, ..];
            let pair = [o.slice(columns), v.slice(rows)];
            // bfloat16 has 8 bits.
            let unit = 2f64.powi(-8);
            let same = |o, v| same_product(pair, [o, v], unit);
            assert!(same(other_o.slice(columns), other_v.slice(rows)), "layer {layer}, head {query}");
            // One without the other is no such thing: the heads have turned.
            assert!(!same(pair[0], other_v.slice(rows)) && !same(other_o.slice(columns), pair[1]));
        }
    }
    // name, before, after
    for part in ["v_proj", "o_proj"] {
        let line = printed.lines().find(|line| line.starts_with(part)).unwrap();
        let shares: Vec<f64> = line.split_whitespace().skip(1).map(|share| share.parse().unwrap()).collect();
        assert!(shares.len() == 2 && shares.iter().all(|share| (0.0..=1.0).contains(share)), "{printed}");
        assert!(part == "o_proj" || shares[1] > 1.05 * shares[0], "{printed}");
    }

    // What is there is not written over.
    let files = bytes_of(&out);
    assert_refused(align(MODEL.as_ref(), &out), "not empty");
    assert_eq!(bytes_of(&out), files);
}

const LAYERS: usize = 3;

/// Four heads of three features on two of keys and values, with biases, in two shards; `edit` may do harm.
fn small(path: PathBuf, edit: impl Fn(&mut Vec<Entry<'static>>)) -> PathBuf {
    let (hidden, read, given) = (8, 12, 6);
    std::fs::create_dir(&path).unwrap();
    let mut map = BTreeMap::new();
    for half in 0..2 {
        let file = format!("model-{:05}-of-00002.safetensors", half + 1);
        let mut entries = Vec::new();
        for layer in (0..LAYERS).filter(|layer| layer % 2 == half) {
            let mut push = |part: &str, m, n| {
                let values = matrix(m, n, 7 * layer + part.len() + m);
                entries.push(entry(&format!("model.layers.{layer}.{part}.weight"), &values, DType::F32));
            };
            push("self_attn.q_proj", read, hidden);
            push("self_attn.k_proj", given, hidden);
            push("self_attn.v_proj", given, hidden);
            push("self_attn.o_proj", hidden, read);
            push("mlp.up_proj", 24, hidden);
            let mut bias =
                entry(&format!("model.layers.{layer}.self_attn.v_proj.bias"), &matrix(1, given, layer), DType::F32);
            bias.shape = vec![given];
            entries.push(bias);
        }
        edit(&mut entries);
        entries.iter().for_each(|e| drop(map.insert(e.name.clone(), file.clone())));
        write_shard(&path.join(&file), &BTreeMap::new(), entries).unwrap();
    }
    write_index(&path, &Default::default(), &map).unwrap();
    let config = format!(
        r#"{{"model_type": "llama", "hidden_size": {hidden}, "num_hidden_layers": {LAYERS}, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 3, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "vocab_size": 16}}"#
    );
    std::fs::write(path.join("config.json"), config).unwrap();
    path
}

#[test]
fn a_bias_rotates_along_and_shards_keep_their_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let model = small(folder.path().join("model"), |_| ());
    let out = folder.path().join("out");
    // An empty folder will do.
    std::fs::create_dir(&out).unwrap();
    let (code, printed, errors) = align(&model, &out);
    assert_eq!(code, Some(0), "{printed}{errors}");
    let (before, after) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
    assert!(after.has_index());
    assert_others_are_copied(&before, &after);
    for info in before.tensors() {
        assert_eq!(after.info(&info.name).map(|other| other.shard), Some(info.shard), "{}", info.name);
    }
    let bias = |checkpoint: &Checkpoint, layer| {
        let stored = checkpoint.get(&format!("model.layers.{layer}.self_attn.v_proj.bias")).unwrap();
        let values = weightpress::scalar::widen::<f64>(stored.dtype, stored.bytes).unwrap();
        Array2::from_shape_vec((6, 1), values).unwrap()
    };
    for layer in 0..LAYERS {
        let [o, v, other_o, other_v] =
            [(&before, "o_proj"), (&before, "v_proj"), (&after, "o_proj"), (&after, "v_proj")]
                .map(|(checkpoint, part)| weight(checkpoint, layer, part));
        let (b, other_b) = (bias(&before, layer), bias(&after, layer));
        assert!(v != other_v && b != other_b);
        for query in 0..4 {
            let (columns, rows) = (s![.., 3 * query..3 * query + 3], s![query / 2 * 3..query / 2 * 3 + 3, ..]);
            for (v, other_v) in [(&v, &other_v), (&b, &other_b)] {
                let pairs = [[o.slice(columns), v.slice(rows)], [other_o.slice(columns), other_v.slice(rows)]];
                assert!(same_product(pairs[0], pairs[1], 2f64.powi(-24)), "layer {layer}, head {query}");
            }
        }
    }
}

#[test]
fn models_and_folders_that_do_not_do_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let out = path("out");
    let of = |layer: usize, part: &str| format!("model.layers.{layer}.self_attn.{part}");
    let broken = |name: &str, harmed: String, edit: &dyn Fn(&mut Entry<'static>)| {
        let model = small(path(name), |entries| entries.iter_mut().filter(|e| e.name == harmed).for_each(edit));
        assert_refused(align(&model, &out), &format!("`{harmed}`"));
        assert!(!out.exists());
    };
    broken("shape", of(1, "v_proj.weight"), &|e| e.shape = vec![8, 6]);
    broken("shape-o", of(2, "o_proj.weight"), &|e| e.shape = vec![12, 8]);
    broken("shape-bias", of(0, "v_proj.bias"), &|e| e.shape = vec![6, 1]);
    broken("renamed", of(2, "v_proj.weight"), &|e| e.name.insert_str(0, "old."));
    broken("dtype", of(0, "o_proj.weight"), &|e| e.dtype = DType::U32);
    broken("nan", of(1, "o_proj.weight"), &|e| {
        let mut bytes = vec![0; 8 * 12 * 4];
        bytes[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
        e.data = Payload::Bytes(bytes.into());
    });
    // What may stand between values and output.
    let name = of(0, "inner_norm.weight");
    let model = small(path("norm"), |entries| {
        if entries.iter().any(|e| e.name.starts_with("model.layers.0.")) {
            entries.push(entry(&name, &matrix(1, 12, 1), DType::F32));
        }
    });
    assert_refused(align(&model, &out), &format!("`{name}`"));

    let model = small(path("model"), |_| ());
    let recipe = "[[rule]]\nmatch = '.*up_proj.*'\nmethod = 'svd'\nbudget = { keep = 0.8 }";
    super::run::run(&model, &path("factored"), &Recipe::parse(recipe).unwrap(), Options::default()).unwrap();
    assert_refused(align(&path("factored"), &out), "`model.layers.0.mlp.up_proj.weight` is compressed already");
    let before = bytes_of(&model);
    assert_refused(align(&model, &model), "the input's own folder");
    assert_eq!(bytes_of(&model), before);
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    for (from, to, expected) in [
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "4 heads in 3 groups"),
        ("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 1", "has 1"),
        ("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", "model.layers.3.self_attn.v_proj.weight"),
        ("\"head_dim\": 3", "\"head_dim\": 2", "model.layers.0.self_attn.v_proj.weight"),
    ] {
        assert!(config.contains(from), "{from}");
        std::fs::write(model.join("config.json"), config.replace(from, to)).unwrap();
        assert_refused(align(&model, &out), expected);
    }
    std::fs::remove_file(model.join("config.json")).unwrap();
    assert_refused(align(&model, &out), "config.json");
    assert!(!out.exists());
}
