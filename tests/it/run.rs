//! Whole runs on small synthetic checkpoints: bytes, threads, kills, refusals.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ndarray::Array2;
use weightpress::checkpoint::{Checkpoint, Entry, Payload, write_index, write_shard};
use weightpress::operator::LinearOperator;
use weightpress::run::{Emit, Observer, Options, Silent};
use weightpress::scalar::{DType, narrow};
use weightpress::stats::Stats;
use weightpress::tensor::Tensor;
use weightpress::{Error, Recipe};

/// Decaying, deterministic and without structure.
pub fn matrix(m: usize, n: usize, seed: usize) -> Array2<f32> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    Array2::from_shape_fn((m, n), |(_, j)| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / 8388608.0 - 1.0) / (1.0 + j as f32 * 0.2)
    })
}

pub fn entry(name: &str, values: &Array2<f32>, dtype: DType) -> Entry<'static> {
    let bytes = narrow(dtype, values.iter()).unwrap();
    Entry { name: name.into(), dtype, shape: values.shape().to_vec(), data: Payload::Bytes(bytes.into()) }
}

fn opaque(name: &str) -> Entry<'static> {
    let data = Payload::Bytes((0u8..24).collect::<Vec<_>>().into());
    Entry { name: name.into(), dtype: DType::parse("I64").unwrap(), shape: vec![3], data }
}

/// Two shards with an index, a configuration file, Gram matrices; 2·`layers` matrices.
pub fn model(folder: &Path, layers: usize, m: usize, n: usize) -> PathBuf {
    let path = folder.join("model");
    std::fs::create_dir_all(&path).unwrap();
    let mut map = BTreeMap::new();
    for half in 0..2 {
        let file = format!("model-{:05}-of-00002.safetensors", half + 1);
        let mut entries = vec![opaque(&format!("positions.{half}"))];
        for layer in (0..layers).filter(|layer| layer % 2 == half) {
            entries.push(entry(&format!("layers.{layer}.a.weight"), &matrix(m, n, layer * 2 + 1), DType::BF16));
            entries.push(entry(&format!("layers.{layer}.b.weight"), &matrix(n, m, layer * 2 + 2), DType::F32));
            entries.push(entry(&format!("layers.{layer}.norm"), &matrix(1, n, layer), DType::F16));
        }
        entries.iter().for_each(|e| drop(map.insert(e.name.clone(), file.clone())));
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_shard(&path.join(&file), &metadata, entries).unwrap();
    }
    write_index(&path, &Default::default(), &map).unwrap();
    std::fs::write(path.join("config.json"), "{}").unwrap();
    path
}

fn recipe(budget: &str, rest: &str) -> Recipe {
    Recipe::parse(&format!(
        "[[rule]]\nmatch = 'layers\\.(\\d+)\\.[ab]\\.weight'\nmethod = \"svd\"\nbudget = {{ {budget} }}\n{rest}"
    ))
    .unwrap()
}

pub fn run(
    model: &Path,
    out: &Path,
    recipe: &Recipe,
    options: Options,
) -> weightpress::Result<weightpress::report::Report> {
    let checkpoint = Checkpoint::open(model)?;
    recipe.plan(&checkpoint, &Stats::empty())?.run(out, &options, &Silent)
}

/// Every file of a folder but the report, whose seconds differ.
pub fn bytes_of(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file());
    let named = files.map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&p).unwrap()));
    named.filter(|(name, _)| name != "report.json").collect()
}

#[test]
fn a_run_keeps_its_budget_and_reports_what_is_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 3, 48, 32);
    for (index, allocate) in ["", "allocate = \"global\""].iter().enumerate() {
        let out = folder.path().join(format!("out{index}"));
        let report = run(&model, &out, &recipe("keep = 0.6", allocate), Options::default()).unwrap();
        assert!(report.keep() <= 0.6 && report.keep() > 0.5, "{}", report.keep());
        let compressed = Checkpoint::open(&out).unwrap();
        // Bytes in the report are the bytes of the tensors in the files.
        for t in &report.tensors {
            let parts = compressed.tensors().filter(|info| {
                info.name == t.name || info.name.strip_prefix(&t.name).is_some_and(|rest| rest.starts_with('.'))
            });
            assert_eq!(parts.map(|info| info.bytes).sum::<u64>(), t.bytes_after, "{}", t.name);
        }
        // The report's errors are those of the operators that a reader gets.
        let (original, mut loader) = (Checkpoint::open(&model).unwrap(), compressed.loader::<f32>().unwrap());
        for t in &report.tensors {
            let w = original.get(&t.name).unwrap().matrix::<f32>().unwrap().into_owned();
            let delta = &w - &loader.operator(&t.name).unwrap().to_dense();
            let error = (delta.mapv(|v| v * v).sum() / w.mapv(|v| v * v).sum()).sqrt();
            assert!((f64::from(error) - t.error).abs() < 1e-5, "{} {error} {}", t.name, t.error);
        }
        // What no rule matches is there byte for byte, and so are the side files.
        for name in ["positions.0", "positions.1", "layers.0.norm", "layers.2.norm"] {
            assert_eq!(compressed.get(name).unwrap().bytes, original.get(name).unwrap().bytes);
        }
        assert_eq!(std::fs::read(out.join("config.json")).unwrap(), b"{}");
        assert_eq!(
            Recipe::parse(&std::fs::read_to_string(out.join("recipe.toml")).unwrap()).unwrap(),
            recipe("keep = 0.6", allocate)
        );
        assert_eq!(report.file_bytes_after, compressed.file_bytes());
        assert!(!out.join(".weightpress").exists());
    }
}

#[test]
fn a_global_budget_beats_a_uniform_one_at_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.safetensors");
    // One weight of rank 4 and one of full rank: uniform shares waste bytes on the first.
    let low = matrix(40, 4, 1).dot(&matrix(4, 40, 2));
    let full = Array2::from_shape_fn((40, 40), |(i, j)| matrix(40, 40, 3)[(i, j)] * (1.0 + j as f32 * 0.2));
    let entries = vec![entry("layers.0.a.weight", &low, DType::F32), entry("layers.1.a.weight", &full, DType::F32)];
    write_shard(&path, &BTreeMap::new(), entries).unwrap();
    let errors: Vec<f64> = ["", "allocate = { floor = 0.0 }"]
        .iter()
        .enumerate()
        .map(|(i, allocate)| {
            let out = folder.path().join(format!("out{i}"));
            let report = run(&path, &out, &recipe("keep = 0.6", allocate), Options::default()).unwrap();
            assert!(report.keep() <= 0.6);
            report.tensors.iter().map(|t| t.error.powi(2)).sum()
        })
        .collect();
    assert!(errors[1] < 0.5 * errors[0], "{errors:?}");
}

#[test]
fn an_error_budget_holds_for_what_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 4, 40, 56);
    // bf16 rounding alone costs about 2e-3: the tightest budget can only be met by staying dense.
    for (index, error) in [1e-4, 0.1, 0.3].iter().enumerate() {
        let out = folder.path().join(format!("out{index}"));
        let report = run(&model, &out, &recipe(&format!("error = {error}"), ""), Options::default()).unwrap();
        let over: Vec<_> = report.tensors.iter().filter(|t| t.error > error * (1.0 + 1e-6)).collect();
        assert!(over.is_empty(), "{error}: {over:?}");
        let kept = report.tensors.iter().filter(|t| t.dtype == "BF16" && t.kept_dense.is_some()).count();
        assert_eq!(kept == 4, *error < 1e-3, "{error}: {kept}");
    }
}

#[test]
fn the_dense_form_has_the_old_names_shapes_and_dtypes() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 2, 24, 40);
    let out = folder.path().join("out");
    run(&model, &out, &recipe("keep = 0.5", ""), Options { emit: Emit::Both, ..Options::default() }).unwrap();
    let (original, dense) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(out.join("dense")).unwrap());
    let factored = Checkpoint::open(out.join("factored")).unwrap();
    let outline = |c: &Checkpoint| c.tensors().map(|t| (t.name.clone(), t.shape.clone(), t.dtype)).collect::<Vec<_>>();
    assert_eq!(outline(&original), outline(&dense));
    let mut loader = factored.loader::<f32>().unwrap();
    let operator = loader.operator("layers.1.a.weight").unwrap().to_dense();
    let stored = dense.get("layers.1.a.weight").unwrap();
    assert_eq!(stored.matrix::<f32>().unwrap(), operator.mapv(|v| weightpress::scalar::Real::round_to(v, DType::BF16)));
    assert!(factored.file_bytes() < dense.file_bytes());
}

#[test]
fn a_shared_basis_is_stored_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.safetensors");
    let entries = (0..3).map(|i| entry(&format!("layers.{i}.a.weight"), &matrix(30, 40, i), DType::F32)).collect();
    write_shard(&path, &BTreeMap::new(), entries).unwrap();
    for share in ["input", "output"] {
        for form in ["pivot", "factors"] {
            let out = folder.path().join(format!("{share}-{form}"));
            let text = format!(
                "[[rule]]\nmatch = 'layers\\..*'\ngroup = 'all'\nbudget = {{ keep = 0.5 }}\nmethod = {{ type = 'svd', share = '{share}', form = '{form}' }}"
            );
            let report = run(&path, &out, &Recipe::parse(&text).unwrap(), Options::default()).unwrap();
            let compressed = Checkpoint::open(&out).unwrap();
            let total: u64 = compressed.tensors().map(|t| t.bytes).sum();
            assert_eq!(report.bytes_after(), total);
            assert!(report.keep() <= 0.5 && report.keep() > 0.4, "{}", report.keep());
            let mut loader = compressed.loader::<f32>().unwrap();
            let text: Vec<String> =
                (0..3).map(|i| loader.operator(&format!("layers.{i}.a.weight")).unwrap().to_string()).collect();
            assert!(text.iter().all(|t| t.contains("shared")), "{text:?}");
        }
    }
}

#[test]
fn one_and_two_threads_write_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 4, 40, 56);
    let outs: Vec<_> = [1, 2]
        .iter()
        .map(|&threads| {
            let out = folder.path().join(format!("out{threads}"));
            let recipe = recipe("keep = 0.6", "allocate = \"global\"");
            run(&model, &out, &recipe, Options { threads, ..Options::default() }).unwrap();
            bytes_of(&out)
        })
        .collect();
    assert_eq!(outs[0], outs[1]);
}

const CHILD: &str = "WEIGHTPRESS_TEST_CHILD";

fn slow_recipe() -> Recipe {
    recipe("keep = 0.6", "allocate = \"global\"")
}

/// Not a test of its own: the process that the next test kills.
#[test]
fn child_that_gets_killed() {
    /// Slows a run down, so that there is something to kill.
    struct Slow;
    impl Observer for Slow {
        fn advance(&self, _: u64, _: &str) {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let Ok(folder) = std::env::var(CHILD) else { return };
    let checkpoint = Checkpoint::open(Path::new(&folder).join("model")).unwrap();
    let stats = Stats::empty();
    let plan = slow_recipe().plan(&checkpoint, &stats).unwrap();
    plan.run(Path::new(&folder).join("killed"), &Options { threads: 2, ..Options::default() }, &Slow).unwrap();
}

#[test]
fn a_killed_run_resumes_and_ends_in_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 6, 40, 56);
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    run(&model, &whole, &slow_recipe(), Options::default()).unwrap();

    // Killed at three points: while measuring, while compressing, and after the first shard.
    for wanted in ["curve.safetensors", "factored.safetensors", "shard-"] {
        let exe = std::env::current_exe().unwrap();
        let _ = std::fs::remove_dir_all(&killed);
        let mut child = Command::new(exe)
            .args(["--exact", "run::child_that_gets_killed", "--nocapture"])
            .env(CHILD, folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        let there = || {
            let entries = std::fs::read_dir(killed.join(".weightpress")).ok()?;
            entries.flatten().find(|e| e.file_name().to_string_lossy().contains(wanted))
        };
        while there().is_none() {
            assert!(start.elapsed() < Duration::from_secs(60), "no {wanted} within a minute");
            assert!(child.try_wait().unwrap().is_none(), "the child ended before it was killed");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // Not resumed, the folder is refused; no half-written file has a final name.
        assert!(!killed.join("report.json").exists());
        let refused = run(&model, &killed, &slow_recipe(), Options::default()).unwrap_err();
        assert!(matches!(refused, Error::Output { .. }) && refused.to_string().contains("resume"), "{refused}");
        let other = run(&model, &killed, &recipe("keep = 0.7", ""), Options { resume: true, ..Options::default() });
        assert!(matches!(other, Err(Error::Output { .. })));
        run(&model, &killed, &slow_recipe(), Options { resume: true, ..Options::default() }).unwrap();
        assert_eq!(bytes_of(&whole), bytes_of(&killed), "killed at {wanted}");
        assert!(!killed.join(".weightpress").exists());
    }
}

#[test]
fn output_folders_that_cannot_be_used_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 2, 12, 8);
    let before = bytes_of(&model);
    let recipe = recipe("keep = 0.6", "");
    let is_output = |r: weightpress::Result<_>, text: &str| match r {
        Err(e @ Error::Output { .. }) => assert!(e.to_string().contains(text), "{e}"),
        other => panic!("{other:?}"),
    };
    is_output(run(&model, &model, &recipe, Options::default()), "input");
    is_output(run(&model, &model.join("../model"), &recipe, Options::default()), "input");
    let full = folder.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("precious.txt"), "mine").unwrap();
    is_output(run(&model, &full, &recipe, Options::default()), "not empty");
    is_output(run(&model, &full, &recipe, Options { resume: true, ..Options::default() }), "no run to resume");
    assert_eq!(std::fs::read(full.join("precious.txt")).unwrap(), b"mine");
    // A file in the way of the folder.
    let file = run(&model, &full.join("precious.txt"), &recipe, Options::default()).unwrap_err();
    assert!(matches!(file, Error::Io { .. } | Error::Output { .. }), "{file}");
    let out = folder.path().join("done");
    run(&model, &out, &recipe, Options::default()).unwrap();
    is_output(run(&model, &out, &recipe, Options { resume: true, ..Options::default() }), "finished");
    assert_eq!(bytes_of(&model), before);
}

#[test]
fn refusals_come_before_any_work_and_name_everything() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), 2, 24, 16);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let stats = Stats::empty();
    let plan = |recipe: &Recipe| recipe.plan(&checkpoint, &stats).map(|_| ()).unwrap_err();
    match plan(&recipe("keep = 0.6", "metric = \"gram-fisher\"")) {
        Error::MissingStats { missing } => {
            assert_eq!(missing.len(), 8);
            assert!(missing.contains(&"layers.1.b.weight.gram".to_owned()));
            assert!(missing.contains(&"layers.0.a.weight.fisher_row".to_owned()));
        }
        other => panic!("{other}"),
    }
    match plan(&recipe("bytes = 10", "")) {
        Error::Refused(all) => {
            assert_eq!(all.len(), 4);
            assert!(all[0].1.contains("least possible"), "{}", all[0].1);
        }
        other => panic!("{other}"),
    }
    let nothing = Recipe::parse("[[rule]]\nmatch = 'nothing'\nmethod = 'svd'\nbudget = { keep = 0.5 }").unwrap();
    assert!(matches!(plan(&nothing), Error::Recipe { .. }));
    let both = "[[rule]]\nmatch = '.*weight'\nmethod = { type = 'cosine', side = 'both' }\nbudget = { keep = 0.6 }\nallocate = 'global'";
    match plan(&Recipe::parse(both).unwrap()) {
        Error::Refused(all) => assert!(all[0].1.contains("no error curve"), "{}", all[0].1),
        other => panic!("{other}"),
    }
    // The same budget under keep-dense is a plan, with the reason.
    let kept = recipe("bytes = 10", "on_error = \"keep-dense\"").plan(&checkpoint, &stats).unwrap();
    assert!(kept.jobs.iter().all(|job| job.kept.is_some()));
    assert!(kept.to_string().contains("kept dense"));
    let report = kept.run(folder.path().join("out"), &Options::default(), &Silent).unwrap();
    assert_eq!(report.bytes_after(), report.bytes_before());
}

#[test]
fn weights_that_are_not_finite_are_refused_by_name_or_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("one.safetensors");
    let mut bad = matrix(16, 16, 1);
    bad[(3, 5)] = f32::NAN;
    let entries =
        vec![entry("layers.0.a.weight", &bad, DType::F32), entry("layers.1.a.weight", &matrix(16, 16, 2), DType::F32)];
    write_shard(&path, &BTreeMap::new(), entries).unwrap();
    let out = folder.path().join("out");
    for allocate in ["", "allocate = \"global\""] {
        let error = run(&path, &out, &recipe("keep = 0.6", allocate), Options::default()).unwrap_err();
        assert!(error.to_string().contains("layers.0.a.weight") && error.to_string().contains("NaN"), "{error}");
        assert!(error.is_refusal());
        assert!(!out.join("one.safetensors").exists());
        std::fs::remove_dir_all(&out).unwrap();
    }
    for allocate in ["", "allocate = \"global\""] {
        let rest = format!("on_error = \"keep-dense\"\n{allocate}");
        let report = run(&path, &out, &recipe("keep = 0.8", &rest), Options::default()).unwrap();
        assert!(report.keep() <= 1.0);
        assert!(report.tensors[0].kept_dense.as_ref().unwrap().contains("NaN"));
        assert!(report.tensors[1].kept_dense.is_none());
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn a_cancelled_run_keeps_what_is_finished() {
    struct Cancel;
    impl Observer for Cancel {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path(), 2, 24, 16);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let stats = Stats::empty();
    let recipe = recipe("keep = 0.6", "");
    let plan = recipe.plan(&checkpoint, &stats).unwrap();
    let out = folder.path().join("out");
    assert!(matches!(plan.run(&out, &Options::default(), &Cancel), Err(Error::Cancelled)));
    plan.run(&out, &Options { resume: true, ..Options::default() }, &Silent).unwrap();
}
