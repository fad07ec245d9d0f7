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

    // The same weights under another configuration.
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    std::fs::copy(Path::new(MODEL).join("model.safetensors"), model.join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(Path::new(MODEL).join("config.json")).unwrap();
    let text = Path::new(MODEL).join("heldout.txt");
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    for (from, to, expected) in [
        ("\"model_type\": \"llama\"", "\"model_type\": \"bert\"", "model type `bert`"),
        ("\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\"}", "rope_scaling"),
        ("\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "activation `gelu`"),
        ("\"vocab_size\": 256", "\"vocab_size\": 300", "config.json says 300"),
        ("\"hidden_size\": 192,", "", "hidden_size"),
        ("\"num_key_value_heads\": 3", "\"num_key_value_heads\": 4", "6 heads in 4 groups"),
    ] {
        assert!(config.contains(from), "{from}");
        std::fs::write(Path::new(model).join("config.json"), config.replace(from, to)).unwrap();
        refused("evaluate", &[model, "--text", text], expected);
    }
}
