//! The command-line examples as processes: exit codes, messages, a disk that is full.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use weightpress::checkpoint::{Entry, Payload, write_index, write_shard};
use weightpress::report::Report;
use weightpress::scalar::DType;

use super::run::{bytes_of, entry, matrix, model};

const WEIGHTS: [&str; 2] = ["--match", r"layers\.\d+\.[ab]\.weight"];

/// An example's program, which `cargo test` builds beside this one.
fn example(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let folder = own.parent().and_then(Path::parent).unwrap().join("examples");
    let path = folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is missing: `cargo test` builds it, or `cargo build --examples`", path.display());
    path
}

pub fn run<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> (Option<i32>, String, String) {
    told(Command::new(example(name)).args(arguments).output().unwrap())
}

fn told(Output { status, stdout, stderr }: Output) -> (Option<i32>, String, String) {
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// `compress MODEL --out OUT …`.
fn compress(model: &Path, out: &Path, rest: &[&str]) -> (Option<i32>, String, String) {
    let mut arguments = vec![model.as_os_str(), "--out".as_ref(), out.as_os_str()];
    arguments.extend(rest.iter().map(OsStr::new));
    run("compress", arguments)
}

#[test]
fn a_checkpoint_is_compressed_and_inspected() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 2, 24, 16);
    let out = folder.path().join("out");
    let rest = [&WEIGHTS[..], &["--keep", "0.6", "--allocate", "global"]].concat();

    let (code, plan, _) = compress(&model, &out, &[&rest[..], &["--plan"]].concat());
    assert_eq!(code, Some(0));
    assert!(plan.contains("layers.1.b.weight") && plan.contains("peak memory"), "{plan}");
    let (code, plan, _) = compress(&model, &out, &[&rest[..], &["--plan", "--json"]].concat());
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert_eq!((code, plan["jobs"].as_array().map(Vec::len)), (Some(0), Some(4)));
    assert!(!out.exists(), "a plan writes nothing");

    let (code, printed, errors) = compress(&model, &out, &[&rest[..], &["--json"]].concat());
    assert_eq!(code, Some(0), "{errors}");
    let report: Report = serde_json::from_str(&printed).unwrap();
    let written: Report = serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap();
    assert_eq!(report, written);
    assert!(report.tensors.len() == 4 && report.keep() <= 0.6, "{printed}");

    let (code, table, _) = run("inspect", [out.as_os_str(), "--spectrum".as_ref(), "--check".as_ref()]);
    assert_eq!(code, Some(0));
    assert!(table.contains("interpolative") && table.contains("stable rank") && table.contains("finite"), "{table}");
    let (code, json, _) = run("inspect", [model.as_os_str(), "--json".as_ref()]);
    let listed: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, listed["tensors"].as_array().map(Vec::len)), (Some(0), Some(8)));
}

/// Exit code 2, nothing on standard output, one paragraph on standard error that contains all `parts`.
#[track_caller]
fn assert_refused((code, printed, errors): (Option<i32>, String, String), parts: &[&str]) {
    assert_eq!(code, Some(2), "{printed}{errors}");
    let message = errors.split_once("error: ").map_or("", |(_, message)| message).trim_end();
    assert!(!message.is_empty() && !message.contains("\n\n") && !message.contains("panicked"), "{errors}");
    assert!(message.lines().count() <= 12 && printed.is_empty(), "{printed}{errors}");
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn refusals_say_what_and_where_with_exit_code_2() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 2, 24, 16);
    let out = folder.path().join("out");
    let refused = |rest: &[&str], parts: &[&str]| {
        assert_refused(compress(&model, &out, &[&WEIGHTS[..], rest].concat()), parts);
        assert!(!out.exists());
    };
    refused(&["--method", "sdv"], &["`sdv`", "svd"]);
    refused(&["--metric", "gramm"], &["`gramm`", "gram-fisher"]);
    refused(&["--metric", "gram"], &["missing statistics", "layers.0.a.weight.gram", "layers.1.b.weight.gram"]);
    refused(&["--keep", "1.5"], &["keep 1.5"]);
    refused(&["--keep", "0.001"], &["4 tensor(s)", "layers.1.b.weight", "least possible"]);
    assert_eq!(compress(&model, &out, &["--nonsense"]).0, Some(2));
    assert_refused(compress(&model, &out, &["--match", "nothing"]), &["rule 1", "nothing"]);
    assert_refused(run("compress", [model.as_os_str()].into_iter().chain(WEIGHTS.map(OsStr::new))), &["--out"]);

    let recipe = folder.path().join("mine.toml");
    let text = "[[rule]]\nmatch = '.*'\nmethod = 'svd'\nbudget = { keep = 0.5 }\ncolour = 'red'\n";
    std::fs::write(&recipe, text).unwrap();
    let with_recipe = compress(&model, &out, &["--recipe", recipe.to_str().unwrap()]);
    assert_refused(with_recipe, &["mine.toml", "line 5, column 1", "colour", "allocate"]);

    // The input's own folder, and one that somebody needs.
    assert_refused(compress(&model, &model, &WEIGHTS), &["input"]);
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious.txt"), "mine").unwrap();
    assert_refused(compress(&model, &out, &WEIGHTS), &["out", "not empty"]);
    assert_eq!(std::fs::read(out.join("precious.txt")).unwrap(), b"mine");

    // A copy that was cut short.
    let shard = model.join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 5]).unwrap();
    let elsewhere = folder.path().join("elsewhere");
    assert_refused(compress(&model, &elsewhere, &WEIGHTS), &["model-00002-of-00002.safetensors", "only"]);
    assert!(!elsewhere.exists());
}

#[test]
fn inspect_finds_what_is_no_number() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.safetensors");
    let mut bad = matrix(16, 8, 1);
    bad[(3, 5)] = f32::NAN;
    let entries = vec![entry("good", &matrix(4, 4, 2), DType::F32), entry("bad", &bad, DType::BF16)];
    write_shard(&path, &BTreeMap::new(), entries).unwrap();
    let (code, _, errors) = run("inspect", [path.as_os_str(), "--spectrum".as_ref(), "--check".as_ref()]);
    assert_eq!(code, Some(2));
    assert!(errors.contains("`bad` holds NaN at index 29") && !errors.contains("good"), "{errors}");
    let (code, _, errors) = run("inspect", [path.as_os_str(), "--match".as_ref(), "none".as_ref()]);
    assert_eq!(code, Some(2));
    assert!(errors.contains("`none`"), "{errors}");
    let (code, _, errors) = run("inspect", [folder.path().join("gone")]);
    assert_eq!(code, Some(2));
    assert_eq!(errors.matches("No such file").count(), 1, "{errors}");
}

/// Two shards; the second carries a table that is larger than everything else together.
#[cfg(unix)]
fn lopsided(folder: &Path) -> PathBuf {
    let path = folder.join("lopsided");
    std::fs::create_dir(&path).unwrap();
    let mut map = BTreeMap::new();
    for shard in 0..2 {
        let file = format!("model-{:05}-of-00002.safetensors", shard + 1);
        let mut entries = vec![entry(&format!("layers.{shard}.a.weight"), &matrix(32, 24, shard), DType::BF16)];
        if shard == 1 {
            let data = Payload::Bytes(vec![7; 400_000].into());
            entries.push(Entry { name: "table".into(), dtype: DType::U8, shape: vec![400_000], data });
        }
        entries.iter().for_each(|e| drop(map.insert(e.name.clone(), file.clone())));
        write_shard(&path.join(&file), &BTreeMap::new(), entries).unwrap();
    }
    write_index(&path, &Default::default(), &map).unwrap();
    path
}

/// A limit on the size of files stands in for a disk that is full: writing on fails in the same place,
/// and needs no rights to set up.
#[cfg(unix)]
#[test]
fn a_full_disk_ends_a_run_that_can_be_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let model = lopsided(folder.path());
    let before = bytes_of(&model);
    let (whole, out) = (folder.path().join("whole"), folder.path().join("out"));
    let rest = [&WEIGHTS[..], &["--keep", "0.6"]].concat();
    assert_eq!(compress(&model, &whole, &rest).0, Some(0));

    // In blocks of 512 or 1024 bytes, as the shell likes: more than a weight, less than the table.
    let script = r#"ulimit -f 128 && trap '' XFSZ && exec "$@""#;
    let mut limited = Command::new("sh");
    limited.args(["-c", script, "sh"]).arg(example("compress")).arg(&model).arg("--out").arg(&out).args(&rest);
    let (code, printed, errors) = told(limited.output().unwrap());
    assert_eq!(code, Some(1), "{printed}{errors}");
    assert!(errors.contains("model-00002-of-00002.safetensors") && errors.contains("File too large"), "{errors}");

    // The first shard is there; of the second there is nothing, not even under another name.
    let names: Vec<String> = bytes_of(&out).into_keys().collect();
    assert_eq!(names, ["model-00001-of-00002.safetensors"]);
    assert_eq!(bytes_of(&model), before);

    let (code, _, errors) = compress(&model, &out, &[&rest[..], &["--resume"]].concat());
    assert_eq!(code, Some(0), "{errors}");
    assert_eq!(bytes_of(&out), bytes_of(&whole));
}
