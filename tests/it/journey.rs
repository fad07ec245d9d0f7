//! From a folder with weights to a smaller one and its perplexity, by the examples alone (docs/quickstart.md).

use std::path::Path;

use serde_json::Value;

use super::cli::run;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/model");

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no {key} in {value}"))
}

#[test]
fn the_bundled_model_is_calibrated_compressed_and_evaluated() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = |name: &str| Path::new(MODEL).join(name).to_str().unwrap().to_owned();
    let (gram, smaller) = (path("gram.safetensors"), path("smaller"));
    let calibrate = ["--text", &text("calibration.txt"), "--out", &gram, "--tokens", "2048", "--window", "128"];
    let (code, _, errors) = run("calibrate", [&[MODEL][..], &calibrate].concat());
    assert_eq!(code, Some(0), "{errors}");
    let compress = ["--out", &smaller, "--metric", "gram", "--stats", &gram, "--keep", "0.9"];
    let (code, _, errors) = run("compress", [&[MODEL][..], &compress].concat());
    assert_eq!(code, Some(0), "{errors}");

    let evaluate = ["--text", &text("heldout.txt"), "--tokens", "512", "--window", "128", "--decode", "4", "--json"];
    let (code, printed, errors) = run("evaluate", [&[MODEL, &smaller][..], &evaluate].concat());
    assert_eq!(code, Some(0), "{errors}");
    let scores: Value = serde_json::from_str(&printed).unwrap();
    let [dense, factored] = [&scores[0], &scores[1]];
    assert_eq!((number(dense, "compressed_weights"), number(factored, "compressed_weights")), (0.0, 42.0));
    assert!(number(factored, "file_bytes") < 0.95 * number(dense, "file_bytes"));
    let (before, after) = (number(dense, "perplexity"), number(factored, "perplexity"));
    assert!(before > 2.0 && before < 5.0 && after > before && after < 1.2 * before, "{before} {after}");
    // Tokens are bytes here.
    assert!((number(dense, "bits_per_byte") - before.log2()).abs() < 1e-9);
    assert!(number(dense, "decode_tokens_per_second") > 0.0);

    // What is not measured is not reported.
    let one = ["--text", &text("heldout.txt"), "--tokens", "100", "--window", "100", "--decode", "0", "--json"];
    let (code, printed, _) = run("evaluate", [&[MODEL][..], &one].concat());
    assert_eq!(code, Some(0));
    let scores: Value = serde_json::from_str(&printed).unwrap();
    assert!(scores[0]["decode_tokens_per_second"].is_null());
}

#[test]
fn texts_and_models_that_do_not_do_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short.txt");
    std::fs::write(&short, "too short").unwrap();
    let short = short.to_str().unwrap();
    let out = folder.path().join("out.safetensors");
    let refused = |name: &str, arguments: &[&str], expected: &str| {
        let (code, _, errors) = run(name, arguments);
        assert_eq!(code, Some(2), "{errors}");
        assert!(errors.contains(expected), "{errors}");
    };
    refused("evaluate", &[MODEL, "--text", short], "fewer than a window of 512");
    refused("calibrate", &[MODEL, "--text", short, "--out", out.to_str().unwrap()], "fewer than a window of 512");
    refused("evaluate", &[MODEL, "--text", "no/such/text"], "no/such/text");
    refused("evaluate", &[MODEL, "--text", short, "--activation-bits", "12"], "expected 8, 16 or 24");

    // The same weights under another configuration.
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::copy(Path::new(MODEL).join("model.safetensors"), model.join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(Path::new(MODEL).join("config.json")).unwrap();
    let text = Path::new(MODEL).join("heldout.txt");
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    for (from, to, expected) in [
        ("\"model_type\": \"llama\"", "\"model_type\": \"bert\"", "missing field `layer_norm_eps`"),
        ("\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\"}", "rope_scaling"),
        ("\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "activation `gelu`"),
        ("\"vocab_size\": 256", "\"vocab_size\": 300", "config.json says 300"),
        ("\"model_type\": \"llama\"", "\"model_type\": \"mamba\"", "model type `mamba`: expected llama"),
        ("\"hidden_size\": 192,", "", "missing field `hidden_size`"),
        ("\"vocab_size\": 256,", "", "missing field `vocab_size`"),
        ("\"rms_norm_eps\"", "\"other\"", "missing field `rms_norm_eps`"),
        ("\"num_key_value_heads\": 3", "\"num_key_value_heads\": 4", "6 heads in 4 groups"),
    ] {
        assert!(config.contains(from), "{from}");
        std::fs::write(Path::new(model).join("config.json"), config.replace(from, to)).unwrap();
        refused("evaluate", &[model, "--text", text], expected);
    }
    // A tokenizer of more words than the model knows, one that cannot be read, and none.
    std::fs::write(Path::new(model).join("config.json"), &config).unwrap();
    let tokenizer = Path::new(model).join("tokenizer.json");
    let words: String = (0..300).map(|i| format!("\"w{i}\": {i}, ")).collect();
    let words = format!("{{{words}\"[UNK]\": 300}}");
    let level = format!("{{\"type\": \"WordLevel\", \"vocab\": {words}, \"unk_token\": \"[UNK]\"}}");
    std::fs::write(&tokenizer, format!("{{\"version\": \"1.0\", \"added_tokens\": [], \"model\": {level}}}")).unwrap();
    refused("evaluate", &[model, "--text", text], "has 301 tokens, the model's vocabulary 256");
    std::fs::write(&tokenizer, "{").unwrap();
    refused("evaluate", &[model, "--text", text], "tokenizer.json");
    std::fs::remove_file(&tokenizer).unwrap();
    // A layer more than there are tensors.
    let (from, more) = ("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 7");
    assert!(config.contains(from));
    std::fs::write(Path::new(model).join("config.json"), config.replace(from, more)).unwrap();
    refused("evaluate", &[model, "--text", text], "model.layers.6.");
}

/// The bundled model with a few of its bytes changed.
fn another_model(folder: &Path) -> String {
    std::fs::create_dir(folder).unwrap();
    let checkpoint = weightpress::Checkpoint::open(MODEL).unwrap();
    let mut entries: Vec<_> = checkpoint.tensors().map(|tensor| checkpoint.entry(&tensor.name).unwrap()).collect();
    for entry in entries.iter_mut().filter(|entry| entry.name.ends_with("_proj.weight")) {
        let mut bytes = checkpoint.get(&entry.name).unwrap().bytes.to_vec();
        bytes[0] ^= 1;
        entry.data = weightpress::checkpoint::Payload::Bytes(bytes.into());
    }
    weightpress::checkpoint::write_shard(&folder.join("model.safetensors"), &Default::default(), entries).unwrap();
    std::fs::copy(Path::new(MODEL).join("config.json"), folder.join("config.json")).unwrap();
    folder.to_str().unwrap().to_owned()
}

#[test]
fn statistics_are_collected_compressed_with_layer_by_layer_and_refused_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = |name: &str| Path::new(MODEL).join(name).to_str().unwrap().to_owned();
    let (gram, fisher, out) = (path("gram.safetensors"), path("fisher.safetensors"), path("out"));
    let (calibration, heldout) = (text("calibration.txt"), text("heldout.txt"));
    let fine = |name: &str, arguments: &[&str]| {
        let (code, printed, errors) = run(name, arguments);
        assert_eq!(code, Some(0), "{errors}");
        printed
    };
    let tokens = ["--tokens", "1024", "--window", "128", "--fisher-tokens", "256", "--fisher-window", "64"];
    let files = ["--text", &calibration, "--out", &gram, "--fisher", &fisher];
    fine("calibrate", &[&[MODEL][..], &files, &tokens].concat());

    // Of these weights, and of no others.
    let other = another_model(&folder.path().join("other"));
    let plan = ["--metric", "gram-fisher", "--stats", &gram, "--stats", &fisher, "--plan"];
    fine("compress", &[&[MODEL][..], &plan].concat());
    let (code, _, errors) = run("compress", [&[other.as_str()][..], &plan].concat());
    assert!(code == Some(2) && errors.contains("was another weight"), "{errors}");

    let sequential = ["--text", &calibration, "--out", &out, "--tokens", "1024", "--window", "128", "--keep", "0.7"];
    fine("sequential", &[&[MODEL][..], &sequential].concat());
    let evaluate = ["--text", &heldout, "--tokens", "256", "--window", "128", "--decode", "0", "--json"];
    let scores: Value = serde_json::from_str(&fine("evaluate", &[&[MODEL, &out][..], &evaluate].concat())).unwrap();
    assert_eq!(number(&scores[1], "compressed_weights"), 42.0);
    let (before, after) = (number(&scores[0], "perplexity"), number(&scores[1], "perplexity"));
    assert!(after > before && after < 1.5 * before, "{before} {after}");

    // Stopped after three layers and gone on with: the same files.
    let file = |i: usize| Path::new(&out).join(format!("layer-{i:04}.safetensors"));
    let bytes = |i: usize| std::fs::read(file(i)).unwrap();
    let known = [bytes(3), bytes(5)];
    for i in 3..6 {
        std::fs::remove_file(file(i)).unwrap();
    }
    std::fs::remove_file(Path::new(&out).join("model.safetensors.index.json")).unwrap();
    let refused = |arguments: &[&str], expected: &str| {
        let (code, _, errors) = run("sequential", arguments);
        assert!(code == Some(2) && errors.contains(expected), "{errors}");
    };
    refused(&[&[MODEL][..], &sequential].concat(), "--resume");
    refused(&[&[MODEL][..], &sequential[..8], &["--keep", "0.6", "--resume"]].concat(), "was made of other");
    refused(&[&[other.as_str()][..], &sequential, &["--resume"]].concat(), "was made of other");
    fine("sequential", &[&[MODEL][..], &sequential, &["--resume"]].concat());
    assert_eq!([bytes(3), bytes(5)], known);
    refused(&[&[MODEL][..], &sequential[..4], &["--metric", "frobenius", "--resume"]].concat(), "expected gram");
}
