//! Statistics files: found, shared, checked, saved; every bad one refused by its key.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};

use ndarray::{Array1, Array2, array};
use tempfile::tempdir;
use weightpress::Error;
use weightpress::checkpoint::{Checkpoint, Entry, Payload, write_shard};
use weightpress::linalg::Faer;
use weightpress::scalar::{DType, narrow};
use weightpress::stats::{Kind, Stats};

fn write(path: &Path, dtype: DType, tensors: &[(&str, &[usize], &[f64])], metadata: &[(&str, &str)]) -> PathBuf {
    let entries = tensors.iter().map(|(name, shape, values)| Entry {
        name: (*name).into(),
        dtype,
        shape: shape.to_vec(),
        data: Payload::Bytes(Cow::Owned(narrow(dtype, *values).unwrap())),
    });
    let metadata = metadata.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    write_shard(path, &metadata, entries.collect()).unwrap();
    path.into()
}

/// A positive definite matrix with `seed` on the diagonal.
fn gram(seed: f64) -> Array2<f64> {
    array![[seed, 0.25], [0.25, seed + 1.0]]
}

fn values(matrix: &Array2<f64>) -> Vec<f64> {
    matrix.iter().copied().collect()
}

/// It fails because of the statistics under `key`, and the message names the key and contains `part`.
#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: weightpress::Result<T>, key: &str, part: &str) {
    match result {
        Err(error @ Error::Statistics { .. }) => {
            let text = error.to_string();
            assert!(text.contains(&format!("`{key}`")) && text.contains(part), "not `{key}` and `{part}`: {text}");
        }
        other => panic!("expected `{key}` to be refused, got {other:?}"),
    }
}

#[track_caller]
fn assert_missing<T: std::fmt::Debug>(result: weightpress::Result<T>, key: &str) {
    match result {
        Err(Error::MissingStats { missing }) => assert_eq!(missing, [key]),
        other => panic!("expected `{key}` to be missing, got {other:?}"),
    }
}

#[test]
fn several_files_are_one_collection() {
    let folder = tempdir().unwrap();
    let alias = [("gram_alias", r#"{"k.gram":"q.gram"}"#), ("tokens", "16384")];
    let grams = write(&folder.path().join("g"), DType::F32, &[("q.gram", &[2, 2], &values(&gram(2.0)))], &alias);
    let row = [1.0, 0.0, 2.5];
    let rows = write(&folder.path().join("f"), DType::F64, &[("q.fisher_row", &[3], &row)], &[("tokens", "7")]);
    let stats = Stats::open(&[grams, rows]).unwrap();
    assert_eq!(stats.tokens(), Some(16384));
    assert_eq!(stats.gram("q").unwrap().matrix(), gram(2.0));
    assert_eq!(stats.fisher_row("q").unwrap(), Array1::from(row.to_vec()));
    assert_missing(stats.fisher_col("q"), "q.fisher_col");
    assert_missing(stats.gram("v"), "v.gram");
    assert_missing(Stats::empty().fisher_row("q"), "q.fisher_row");
    for (weight, kind, has) in [
        ("q", Kind::Gram, true),
        ("k", Kind::Gram, true),
        ("v", Kind::Gram, false),
        ("q", Kind::FisherRow, true),
        ("q", Kind::FisherCol, false),
        ("k", Kind::FisherRow, false),
    ] {
        assert_eq!(stats.has(weight, kind), has, "{}", kind.key(weight));
    }
}

#[test]
fn weights_that_share_their_input_share_the_matrix_and_its_root() {
    let folder = tempdir().unwrap();
    let grams: Vec<(String, Vec<f64>)> =
        (0..8).map(|i| (format!("w{i}.gram"), values(&gram(2.0 + f64::from(i))))).collect();
    let tensors: Vec<(&str, &[usize], &[f64])> = grams.iter().map(|(k, v)| (k.as_str(), &[2, 2][..], &v[..])).collect();
    let alias = [(
        "gram_alias",
        r#"{"k.gram":"w0.gram","v.gram":"k.gram","lost.gram":"gone.gram","a.gram":"b.gram","b.gram":"a.gram"}"#,
    )];
    let path = write(&folder.path().join("g"), DType::F32, &tensors, &alias);
    let stats = Stats::open(&[path]).unwrap();

    let first = Arc::downgrade(&stats.gram("w0").unwrap());
    // Nobody but the collection holds it now.
    let again = stats.gram("v").unwrap();
    assert!(first.upgrade().is_some_and(|first| Arc::ptr_eq(&first, &again)));
    assert_eq!(again.key(), "w0.gram");
    assert!(std::ptr::eq(again.sqrt(&Faer).unwrap(), stats.gram("k").unwrap().sqrt(&Faer).unwrap()));
    drop(again);
    for i in 1..8 {
        stats.gram(&format!("w{i}")).unwrap();
    }
    assert!(first.upgrade().is_none(), "an old matrix must not stay in memory for ever");
    assert_eq!(stats.gram("k").unwrap().matrix(), gram(2.0));

    // One that is still in use is found again however many came between.
    let held = stats.gram("w1").unwrap();
    for i in 2..8 {
        stats.gram(&format!("w{i}")).unwrap();
    }
    assert!(Arc::ptr_eq(&held, &stats.gram("w1").unwrap()));

    assert_eq!(stats.gram_site("v"), Some("w0.gram".into()));
    assert_eq!(stats.gram_site("w0"), stats.gram_site("k"));
    // An alias of nothing, as a cut of a larger file has it, and a circle.
    for weight in ["lost", "a", "b"] {
        assert_eq!(stats.gram_site(weight), None);
        assert_missing(stats.gram(weight), &format!("{weight}.gram"));
    }
}

#[test]
fn threads_read_a_matrix_once() {
    const N: usize = 200;
    let folder = tempdir().unwrap();
    let identity = values(&Array2::eye(N));
    let path = write(&folder.path().join("g"), DType::F32, &[("w.gram", &[N, N], &identity)], &[]);
    let (stats, start) = (Stats::open(&[path]).unwrap(), Barrier::new(8));
    let read = || {
        start.wait();
        stats.gram("w").unwrap()
    };
    let grams: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(read)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(grams.iter().all(|other| Arc::ptr_eq(other, &grams[0])));
}

#[test]
fn rows_and_columns_are_summed_from_the_whole_where_they_are_absent() {
    let folder = tempdir().unwrap();
    let whole = ("w.fisher", &[2, 3][..], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0][..]);
    let path = write(&folder.path().join("f"), DType::F32, &[whole], &[]);
    let stats = Stats::open(&[path]).unwrap();
    assert!(stats.has("w", Kind::FisherRow) && stats.has("w", Kind::FisherCol));
    assert_eq!(stats.fisher_row("w").unwrap(), array![6.0, 15.0]);
    assert_eq!(stats.fisher_col("w").unwrap(), array![5.0, 7.0, 9.0]);
    let path = write(&folder.path().join("both"), DType::BF16, &[whole, ("w.fisher_col", &[3], &[1.0, 1.0, 2.0])], &[]);
    assert_eq!(Stats::open(&[path]).unwrap().fisher_col("w").unwrap(), array![1.0, 1.0, 2.0]);
}

#[test]
fn bad_content_is_refused_by_its_key() {
    let folder = tempdir().unwrap();
    let indefinite = [1.0, 2.0, 2.0, 1.0];
    let huge = usize::MAX / 64;
    let tensors: [(&str, &[usize], &[f64]); 14] = [
        ("indefinite.gram", &[2, 2], &indefinite),
        ("asymmetric.gram", &[2, 2], &[1.0, 0.5, 0.4, 1.0]),
        ("nan.gram", &[2, 2], &[1.0, f64::NAN, 0.0, 1.0]),
        ("oblong.gram", &[1, 4], &indefinite),
        ("flat.gram", &[4], &indefinite),
        ("zero.gram", &[2, 2], &[0.0; 4]),
        ("empty.gram", &[0, huge], &[]),
        ("nan.fisher_row", &[2], &[1.0, f64::NAN]),
        ("negative.fisher_row", &[2], &[1.0, -1.0]),
        ("zero.fisher_row", &[2], &[0.0, 0.0]),
        ("matrix.fisher_row", &[2, 1], &[1.0, 1.0]),
        ("nan.fisher", &[1, 2], &[f64::NAN, 1.0]),
        ("flat.fisher", &[2], &[1.0, 1.0]),
        ("empty.fisher", &[huge, 0], &[]),
    ];
    let stats = Stats::open(&[write(&folder.path().join("bad"), DType::F32, &tensors, &[])]).unwrap();
    for (weight, part) in [
        ("indefinite", "eigenvalues from -1.000e0 to 3.000e0"),
        ("asymmetric", "not symmetric"),
        ("nan", "NaN at row 0, column 1"),
        ("oblong", "1x4, not square"),
        ("flat", "two dimensions"),
        ("zero", "zero diagonal"),
        ("empty", ""),
    ] {
        assert_refused(stats.gram(weight), &Kind::Gram.key(weight), part);
    }
    for (weight, part) in [
        ("nan", "NaN at index 1"),
        ("negative", "-1 at index 1"),
        ("zero", "zero everywhere"),
        ("matrix", "one dimension"),
    ] {
        assert_refused(stats.fisher_row(weight), &Kind::FisherRow.key(weight), part);
    }
    for (weight, part) in [("nan", "NaN at index 0"), ("flat", "two dimensions"), ("empty", "not empty")] {
        assert_refused(stats.fisher_col(weight), &format!("{weight}.fisher"), part);
    }
    let bytes = Entry {
        name: "w.gram".into(),
        dtype: DType::U8,
        shape: vec![2, 2],
        data: Payload::Bytes(Cow::Borrowed(&[1, 0, 0, 1])),
    };
    write_shard(&folder.path().join("u8"), &BTreeMap::new(), vec![bytes]).unwrap();
    assert_refused(Stats::open(&[folder.path().join("u8")]).unwrap().gram("w"), "w.gram", "dtype U8");
}

#[test]
fn a_key_that_is_there_twice_is_refused() {
    let folder = tempdir().unwrap();
    let matrix = values(&gram(2.0));
    let one = |name: &str, metadata: &[(&str, &str)]| {
        write(&folder.path().join(name), DType::F32, &[("w.gram", &[2, 2], &matrix)], metadata)
    };
    let alias = |name: &str, text: &str| write(&folder.path().join(name), DType::F32, &[], &[("gram_alias", text)]);
    let (first, second) = (one("first", &[]), one("second", &[]));
    assert_refused(Stats::open(&[&first, &second]), "w.gram", "first and in");
    assert_refused(
        Stats::open(&[one("both", &[("gram_alias", r#"{"w.gram":"v.gram"}"#)])]),
        "w.gram",
        "alias of `v.gram`",
    );
    let (a, b) = (alias("a", r#"{"k.gram":"w.gram"}"#), alias("b", r#"{"k.gram":"v.gram"}"#));
    assert_refused(Stats::open(&[&a, &b]), "k.gram", "of `w.gram` and of `v.gram`");
    assert!(Stats::open(&[&a, &a]).is_ok());
    assert_refused(Stats::open(&[alias("c", r#"{"k":"w"}"#)]), "k", "must end in `.gram`");
    for (name, metadata, part) in [
        ("d", ("gram_alias", "k=w"), "gram_alias"),
        ("e", ("gram_alias", r#"{"k.gram":"w.gram","k.gram":"w.gram"}"#), "`k.gram` appears twice"),
        ("f", ("tokens", "many"), "`many`"),
    ] {
        let path = one(name, &[metadata]);
        let error = Stats::open(&[&path]).unwrap_err();
        assert!(matches!(&error, Error::Checkpoint { path: p, .. } if *p == path), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    }

    let mut stats = Stats::open(&[&first]).unwrap();
    stats.insert_alias("k", "w").unwrap();
    stats.insert_fisher_row("w", array![1.0]).unwrap();
    assert_refused(stats.insert_gram("w", gram(1.0)), "w.gram", "already");
    assert_refused(stats.insert_gram("k", gram(1.0)), "k.gram", "already");
    assert_refused(stats.insert_alias("w", "x"), "w.gram", "already");
    assert_refused(stats.insert_fisher_row("w", array![1.0]), "w.fisher_row", "already");
    assert_refused(stats.insert_fisher_col("w", array![-1.0]), "w.fisher_col", "-1");
    stats.insert_sensitivity("w", 2.5).unwrap();
    assert_eq!((stats.sensitivity("w").unwrap(), stats.sensitivity("v").unwrap()), (2.5, 1.0));
    assert_refused(stats.insert_sensitivity("w", 1.0), "w.sensitivity", "already");
    for wrong in [0.0, -1.0, f64::INFINITY] {
        assert_refused(stats.insert_sensitivity("v", wrong), "v.sensitivity", "");
    }
    let path = write(&folder.path().join("s"), DType::F32, &[("v.sensitivity", &[2], &[1.0, 2.0])], &[]);
    let stored = Stats::open(&[&path]).unwrap();
    assert_refused(stored.sensitivity("v"), "v.sensitivity", "2 numbers");
    assert_refused(stored.check_shape("v", (4, 4)), "v.sensitivity", "[1]");
    let kept = folder.path().join("kept");
    stats.save(&kept, None).unwrap();
    assert_eq!(Stats::open(&[&kept]).unwrap().sensitivity("w").unwrap(), 2.5);
    assert_refused(stats.insert_gram("v", array![[f64::NAN]]), "v.gram", "NaN");
    assert!(!stats.has("v", Kind::Gram) && !stats.has("w", Kind::FisherCol));
}

#[test]
fn shapes_are_checked_from_headers_and_memory() {
    let folder = tempdir().unwrap();
    // The content is not even read: NaN would be refused.
    let nan = [f64::NAN; 6];
    let tensors: [(&str, &[usize], &[f64]); 5] = [
        ("w.gram", &[2, 2], &nan[..4]),
        ("w.fisher_row", &[3], &nan[..3]),
        ("w.fisher_col", &[2], &nan[..2]),
        ("w.fisher", &[3, 2], &nan),
        ("x.fisher", &[2, 3], &nan),
    ];
    let alias = [("gram_alias", r#"{"v.gram":"w.gram"}"#)];
    let mut stats = Stats::open(&[write(&folder.path().join("s"), DType::F32, &tensors, &alias)]).unwrap();
    stats.check_shape("w", (3, 2)).unwrap();
    stats.check_shape("v", (9, 2)).unwrap();
    stats.check_shape("unknown", (9, 9)).unwrap();
    assert_refused(stats.check_shape("v", (2, 9)), "w.gram", "`v` of shape [2, 9] needs [9, 9]");
    assert_refused(stats.check_shape("w", (4, 2)), "w.fisher_row", "needs [4]");
    assert_refused(stats.check_shape("w", (3, 3)), "w.gram", "needs [3, 3]");
    assert_refused(stats.check_shape("x", (3, 2)), "x.fisher", "needs [3, 2]");
    stats.insert_gram("m", gram(1.0)).unwrap();
    stats.insert_fisher_col("n", array![1.0]).unwrap();
    assert_refused(stats.check_shape("m", (1, 3)), "m.gram", "[2, 2]");
    assert_refused(stats.check_shape("n", (1, 3)), "n.fisher_col", "[1]");
    stats.check_shape("m", (1, 2)).unwrap();
}

#[test]
fn a_digest_changes_with_anything_known_about_the_weight_and_with_nothing_else() {
    let folder = tempdir().unwrap();
    let open = |name: &str, w: f64, row: f64, other: f64, dtype| {
        let (w, other) = (values(&gram(w)), values(&gram(other)));
        let tensors: [(&str, &[usize], &[f64]); 3] =
            [("w.gram", &[2, 2], &w), ("k.fisher_row", &[1], &[row]), ("other.gram", &[2, 2], &other)];
        let path = write(&folder.path().join(name), dtype, &tensors, &[("gram_alias", r#"{"k.gram":"w.gram"}"#)]);
        Stats::open(&[path]).unwrap()
    };
    let base = open("base", 2.0, 1.0, 2.0, DType::F32);
    let digest = base.digest("k");
    assert_eq!(digest, base.digest("k"));
    assert_eq!(digest, open("same", 2.0, 1.0, 3.0, DType::F32).digest("k"));
    assert_ne!(digest, open("gram", 3.0, 1.0, 2.0, DType::F32).digest("k"));
    assert_ne!(digest, open("row", 2.0, 2.0, 2.0, DType::F32).digest("k"));
    assert_ne!(digest, open("dtype", 2.0, 1.0, 2.0, DType::F64).digest("k"));
    assert_ne!(digest, base.digest("w"));
    assert_ne!(digest, base.digest("unknown"));
    let mut given = Stats::empty();
    given.insert_gram("k", gram(2.0)).unwrap();
    let before = given.digest("k");
    given.insert_fisher_row("k", array![1.0]).unwrap();
    assert_ne!(before, given.digest("k"));
}

#[test]
fn what_is_saved_opens_as_the_same() {
    let folder = tempdir().unwrap();
    let file = write(
        &folder.path().join("in"),
        DType::F64,
        &[("f.fisher", &[1, 2], &[1.0, 0.5]), ("note", &[1], &[0.0])],
        &[("tokens", "9")],
    );
    let mut stats = Stats::open(&[file]).unwrap();
    stats.insert_gram("q", gram(2.0)).unwrap();
    stats.insert_alias("k", "q").unwrap();
    stats.insert_fisher_row("q", array![0.5, 4.0]).unwrap();
    stats.insert_fisher_col("q", array![0.25]).unwrap();
    let path = folder.path().join("out.safetensors");
    for (tokens, expected) in [(None, 9), (Some(128), 128)] {
        stats.save(&path, tokens).unwrap();
        let saved = Stats::open(&[&path]).unwrap();
        assert_eq!(saved.tokens(), Some(expected));
        assert_eq!(saved.gram("k").unwrap().matrix(), gram(2.0));
        assert_eq!(saved.gram_site("k"), Some("q.gram".into()));
        assert_eq!(saved.fisher_row("q").unwrap(), array![0.5, 4.0]);
        assert_eq!(saved.fisher_col("q").unwrap(), array![0.25]);
        assert_eq!(saved.fisher_col("f").unwrap(), array![1.0, 0.5]);
    }
    let opened = Checkpoint::open(&path).unwrap();
    assert!(opened.tensors().all(|tensor| tensor.dtype == DType::F32));
    assert!(opened.info("note").is_none());

    let mut large = Stats::empty();
    large.insert_fisher_row("w", array![1e39]).unwrap();
    assert_refused(large.save(folder.path().join("no"), None), "w.fisher_row", "too large for F32");
    assert!(!folder.path().join("no").exists());
}

#[test]
fn a_damaged_or_absent_file_is_refused() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("s.safetensors");
    assert!(matches!(Stats::open(&[&path]), Err(Error::Io { path: p, .. }) if p == path));
    std::fs::write(&path, "nonsense, and more of it").unwrap();
    assert!(matches!(Stats::open(&[&path]), Err(Error::Checkpoint { path: p, .. }) if p == path));
    assert!(Stats::open::<&Path>(&[]).unwrap().tokens().is_none());
}
