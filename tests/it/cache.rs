//! Profiles that outlive a run.

use std::collections::BTreeMap;
use std::path::Path;

use weightpress::Recipe;
use weightpress::checkpoint::{Checkpoint, write_shard};
use weightpress::operator::LinearOperator;
use weightpress::run::{Options, Silent};
use weightpress::scalar::DType;
use weightpress::stats::Stats;

use super::run::{bytes_of, entry, matrix, model, run};

fn recipe(keep: f64, allocate: &str) -> Recipe {
    Recipe::parse(&format!(
        "[[rule]]\nmatch = 'layers\\.(\\d+)\\.[ab]\\.weight'\nmethod = \"auto\"\nbudget = {{ keep = {keep} }}\nallocate = \"{allocate}\""
    ))
    .unwrap()
}

/// Names and times of a folder's files.
fn files(folder: &Path) -> Vec<(std::path::PathBuf, std::time::SystemTime)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let mut files: Vec<_> = entries.map(|e| (e.path(), e.metadata().unwrap().modified().unwrap())).collect();
    files.sort();
    files
}

#[test]
fn a_second_budget_solves_nothing_anew_and_ends_in_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), 2, 40, 56);
    let cache = folder.path().join("profiles");
    let with = |name: &str, keep: f64, allocate: &str, cache: Option<&Path>| {
        let out = folder.path().join(name);
        let options = Options { cache: cache.map(Into::into), ..Options::default() };
        let report = run(&model, &out, &recipe(keep, allocate), options).unwrap();
        let (before, after) = report.tensors.iter().fold((0, 0), |a, t| (a.0 + t.bytes_before, a.1 + t.bytes_after));
        assert!(after as f64 <= keep * before as f64, "{name}: {after} of {before}");
        bytes_of(&out)
    };
    let first = with("first", 0.4, "global", Some(&cache));
    let profiles = files(&cache);
    assert_eq!(profiles.len(), 4);
    let second = with("second", 0.25, "global", Some(&cache));
    let third = with("third", 0.3, "uniform", Some(&cache));
    assert_eq!(files(&cache), profiles);
    assert_eq!(first, with("first-alone", 0.4, "global", None));
    assert_eq!(second, with("second-alone", 0.25, "global", None));
    assert_eq!(third, with("third-alone", 0.3, "uniform", None));
    assert_ne!(first, second);

    // What is damaged is measured again.
    let (path, _) = &profiles[0];
    std::fs::write(path, b"no safetensors").unwrap();
    assert_eq!(second, with("again", 0.25, "global", Some(&cache)));
    assert!(std::fs::metadata(path).unwrap().len() > 100);

    let out = weightpress::Checkpoint::open(folder.path().join("second")).unwrap();
    let mut loader = out.loader::<f32>().unwrap();
    let names: Vec<String> = loader.compressed().map(str::to_owned).collect();
    assert_eq!(names.len(), 4);
    for name in names {
        let operator = loader.operator(&name).unwrap();
        let x = ndarray::Array2::from_shape_fn((operator.shape().1, 3), |(i, j)| ((i + 2 * j) % 5) as f32 - 2.0);
        let off = &operator.apply(x.view()).unwrap() - &operator.to_dense().dot(&x);
        assert!(off.iter().all(|v| v.abs() < 1e-3), "{name}: {operator}");
    }
}

#[test]
fn a_sensitive_weight_gets_more_of_a_global_budget() {
    let folder = tempfile::tempdir().unwrap();
    let (path, cache) = (folder.path().join("two.safetensors"), folder.path().join("cache"));
    let entries = [1, 2].map(|i| entry(&format!("layers.{i}.a.weight"), &matrix(40, 40, i), DType::F32));
    write_shard(&path, &BTreeMap::new(), entries.into()).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let text = "[[rule]]\nmatch = '.*weight'\nmethod = \"svd\"\nbudget = { keep = 0.5 }\nallocate = { floor = 0.2 }";
    let recipe = Recipe::parse(text).unwrap();
    let errors = |out: &str, sensitivities: &[(usize, f64)]| {
        let mut stats = Stats::empty();
        for &(i, value) in sensitivities {
            stats.insert_sensitivity(&format!("layers.{i}.a.weight"), value).unwrap();
        }
        let options = Options { cache: Some(cache.clone()), ..Options::default() };
        let report = recipe.plan(&checkpoint, &stats).unwrap().run(folder.path().join(out), &options, &Silent).unwrap();
        assert!(report.keep() <= 0.5);
        [report.tensors[0].error, report.tensors[1].error]
    };
    let (plain, first) = (errors("plain", &[]), errors("first", &[(1, 10.0)]));
    assert!(first[0] < 0.8 * plain[0] && first[1] > plain[1], "{first:?} after {plain:?}");
    assert_eq!(errors("same", &[(1, 10.0), (2, 10.0)]), plain);
    // Nothing was measured again.
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
}
