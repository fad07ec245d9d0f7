//! Writing: bit for bit, canonical, and all or nothing.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::tempdir;
use weightpress::checkpoint::{
    Checkpoint, Entry, Payload, copy_file_atomic, write_file_atomic, write_index, write_shard,
};
use weightpress::scalar::DType;
use weightpress::{Error, Result};

use super::{INDEX, entry, names, shard};

#[test]
fn every_dtype_and_shape_survives_bit_for_bit() {
    let dtypes = [
        "BOOL",
        "F4",
        "F6_E2M3",
        "F6_E3M2",
        "U8",
        "I8",
        "F8_E5M2",
        "F8_E4M3",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "I16",
        "U16",
        "F16",
        "BF16",
        "I32",
        "U32",
        "F32",
        "C64",
        "F64",
        "I64",
        "U64",
    ];
    let shapes: [&[usize]; 6] = [&[], &[0], &[3, 0, 2], &[8], &[4, 2], &[2, 3, 4]];
    let bytes: Vec<u8> = (0..=255).collect();
    let mut entries = Vec::new();
    for dtype in dtypes {
        for shape in shapes {
            let parsed = DType::parse(dtype).unwrap();
            let count = shape.iter().product();
            // A single 4- or 6-bit number does not fill a byte.
            if shape.is_empty() && (dtype.starts_with("F4") || dtype.starts_with("F6")) {
                continue;
            }
            let start = entries.len() % 60;
            let data = &bytes[start..start + parsed.bytes(count)];
            entries.push(entry(&format!("{dtype}.{shape:?}"), dtype, shape, data));
        }
    }
    let folder = tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let size = write_shard(&path, &BTreeMap::from([("format".into(), "pt".into())]), entries.clone()).unwrap();
    let file = fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&file).unwrap();
    let ours = Checkpoint::open(&path).unwrap();
    assert_eq!((size, ours.file_bytes()), (file.len() as u64, file.len() as u64));
    assert_eq!((theirs.len(), ours.tensors().count()), (entries.len(), entries.len()));
    assert_eq!(ours.shards()[0].metadata["format"], "pt");
    for Entry { name, dtype, shape, data } in &entries {
        let Payload::Bytes(bytes) = data else { unreachable!() };
        let stored = ours.get(name).unwrap();
        assert_eq!((stored.shape, stored.dtype, stored.bytes), (shape.as_slice(), *dtype, &bytes[..]), "{name}");
        let info = ours.info(name).unwrap();
        assert_eq!((&info.shape, info.dtype, info.bytes), (shape, *dtype, bytes.len() as u64));
        let view = theirs.tensor(name).unwrap();
        assert_eq!((view.shape(), view.dtype().to_string(), view.data()), (&shape[..], dtype.to_string(), &bytes[..]));
    }
}

#[test]
fn the_bytes_are_those_of_the_safetensors_crate_in_any_order_of_entries() {
    let data: Vec<u8> = (0..64).collect();
    let parts = [
        ("b", Dtype::F32, vec![2]),
        ("a", Dtype::F32, vec![1, 1]),
        ("c\"\u{e9}", Dtype::I64, vec![1]),
        ("d", Dtype::U8, vec![3]),
    ];
    let bytes = |dtype: Dtype, shape: &[usize]| &data[..shape.iter().product::<usize>() * dtype.bitsize() / 8];
    let theirs = safetensors::serialize(
        parts.iter().map(|(n, d, s)| (*n, TensorView::new(*d, s.clone(), bytes(*d, s)).unwrap())),
        Some(HashMap::from([("k".into(), "v".into())])),
    )
    .unwrap();
    let folder = tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    for turn in 0..parts.len() {
        let mut entries: Vec<_> = parts.iter().map(|(n, d, s)| entry(n, &d.to_string(), s, bytes(*d, s))).collect();
        entries.rotate_left(turn);
        write_shard(&path, &BTreeMap::from([("k".into(), "v".into())]), entries).unwrap();
        assert_eq!(fs::read(&path).unwrap(), theirs);
    }
    assert_eq!(names(folder.path()), ["x.safetensors"]);
}

#[test]
fn the_index_is_sorted_complete_and_checked() {
    let folder = tempdir().unwrap();
    shard(&folder.path().join("b.safetensors"), &["ww", "v"]);
    shard(&folder.path().join("a.safetensors"), &["xyz"]);
    let mut map: BTreeMap<String, String> = [("ww", "b.safetensors"), ("v", "b.safetensors"), ("xyz", "a.safetensors")]
        .map(|(k, v)| (k.into(), v.into()))
        .into();
    let metadata = serde_json::from_str(r#"{"z":1,"total_size":5,"a":{"n":null}}"#).unwrap();
    assert_eq!(write_index(folder.path(), &metadata, &map).unwrap(), 6);
    let text = fs::read_to_string(folder.path().join(INDEX)).unwrap();
    let at = |key: &str| text.find(key).unwrap();
    assert!(at("\"a\"") < at("\"total_size\": 6") && at("\"total_size\"") < at("\"z\"") && at("\"v\"") < at("\"ww\""));
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.index_metadata()["total_size"], 6);
    assert_eq!(opened.get("xyz").unwrap().bytes, b"xyz");

    map.remove("v");
    let refused = write_index(folder.path(), &metadata, &map).unwrap_err();
    assert!(matches!(&refused, Error::Checkpoint { detail, .. } if detail.contains("`v`")), "{refused}");
    assert_eq!(fs::read_to_string(folder.path().join(INDEX)).unwrap(), text);
}

#[test]
fn a_payload_is_streamed_from_the_middle_of_a_file() {
    let folder = tempdir().unwrap();
    let (source, path) = (folder.path().join("source"), folder.path().join("x.safetensors"));
    // More than the buffer, and no multiple of it.
    let bytes: Vec<u8> = (0..2_500_003u32).map(|i| (i % 251) as u8).collect();
    fs::write(&source, &bytes).unwrap();
    let data = Payload::File { path: source.clone(), offset: 3, len: 2_500_000 };
    let entries = vec![Entry { data, ..entry("w", "F32", &[5, 125_000], &[]) }, entry("v", "F32", &[1], &[1, 2, 3, 4])];
    write_shard(&path, &BTreeMap::new(), entries).unwrap();
    let opened = Checkpoint::open(&path).unwrap();
    assert_eq!(opened.get("w").unwrap().bytes, &bytes[3..]);
    assert_eq!(opened.get("v").unwrap().bytes, [1, 2, 3, 4]);
    copy_file_atomic(&source, &folder.path().join("copy")).unwrap();
    assert_eq!(fs::read(folder.path().join("copy")).unwrap(), bytes);
}

#[test]
fn bytes_may_be_made_when_they_are_written() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let made = |len: u64, make: &(dyn Fn() -> Result<Vec<u8>> + Send + Sync)| {
        let data = Payload::Made { len, make: std::sync::Arc::new(make) };
        assert_eq!((data.len(), format!("{data:?}")), (len, format!("Payload of {len} bytes")));
        write_shard(
            &path,
            &BTreeMap::new(),
            vec![Entry { data, ..entry("w", "U8", &[3], b"") }, entry("v", "U8", &[1], b"v")],
        )
    };
    let calls = std::sync::atomic::AtomicUsize::new(0);
    made(3, &|| {
        calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(b"abc".to_vec())
    })
    .unwrap();
    assert_eq!((Checkpoint::open(&path).unwrap().get("w").unwrap().bytes, calls.into_inner()), (&b"abc"[..], 1));
    // Another length than was said, in the header or in the end, or none at all.
    let before = fs::read(&path).unwrap();
    for error in [
        made(4, &|| Ok(vec![0; 4])).unwrap_err(),
        made(3, &|| Ok(vec![0; 2])).unwrap_err(),
        made(3, &|| Err(Error::Unsupported("never".into()))).unwrap_err(),
    ] {
        assert!(error.to_string().contains("`w`") && fs::read(&path).unwrap() == before, "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_write_that_fails_half_way_leaves_nothing() {
    let (folder, sources) = (tempdir().unwrap(), tempdir().unwrap());
    let path = folder.path().join("x.safetensors");
    let short = sources.path().join("short");
    fs::write(&short, [0; 10]).unwrap();
    let from = |name: &str, path: &Path, offset| {
        let data = Payload::File { path: path.into(), offset, len: 8 };
        Entry { data, ..entry(name, "F32", &[2], &[]) }
    };
    let big = vec![1u8; 3 << 20];
    for (bad, said) in
        [(from("z", &sources.path().join("gone"), 0), "gone"), (from("z", &short, 3), "short: ends after 7 of 8 bytes")]
    {
        // The big one, of a wider dtype, goes to disk before the bad one is met.
        let entries = vec![bad, entry("a", "F64", &[big.len() / 8], &big)];
        let error = write_shard(&path, &BTreeMap::new(), entries).unwrap_err();
        assert!(matches!(error, Error::Io { .. }) && error.to_string().contains(said), "{error}");
        assert!(names(folder.path()).is_empty());
    }
    let wrong = vec![entry("good", "F32", &[1], &[0; 4]), entry("bad", "F32", &[2], &[0; 4])];
    let error = write_shard(&path, &BTreeMap::new(), wrong).unwrap_err();
    assert_eq!(error.to_string(), "tensor `bad`: shape mismatch: expected 8 bytes for shape [2] of F32, got 4 bytes");
    for (entries, said) in [
        (
            vec![entry("w", "U8", &[1], &[0]), entry("v", "U8", &[1], &[0]), entry("w", "F32", &[1], &[0; 4])],
            "two tensors named `w`",
        ),
        (vec![entry("__metadata__", "U8", &[1], &[0])], "`__metadata__`"),
    ] {
        let error = write_shard(&path, &BTreeMap::new(), entries).unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }) && error.to_string().contains(said), "{error}");
    }
    for shape in [&[usize::MAX, 2][..], &[usize::MAX]] {
        let error = write_shard(&path, &BTreeMap::new(), vec![entry("huge", "F32", shape, &[])]).unwrap_err();
        assert!(error.to_string().contains("`huge`"), "{error}");
    }
    assert!(names(folder.path()).is_empty());

    // The final rename fails: a folder has the name.
    fs::create_dir(&path).unwrap();
    assert!(matches!(write_file_atomic(&path, b"x"), Err(Error::Io { path: p, .. }) if p == path));
    assert_eq!(names(folder.path()), ["x.safetensors"]);
    let nowhere = folder.path().join("no/such/folder.json");
    assert!(matches!(copy_file_atomic(&short, &nowhere), Err(Error::Io { path, .. }) if path == nowhere));
}

#[test]
fn a_failed_write_keeps_the_old_file_and_a_good_one_replaces_it() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("x");
    write_file_atomic(&path, b"old").unwrap();
    assert!(copy_file_atomic(&folder.path().join("gone"), &path).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"old");
    write_file_atomic(&path, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(names(folder.path()), ["x"]);
}

#[cfg(unix)]
#[test]
fn files_have_ordinary_permissions_and_a_locked_folder_is_an_error() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempdir().unwrap();
    let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
    write_file_atomic(&ours, b"x").unwrap();
    fs::write(&plain, b"x").unwrap();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&ours), mode(&plain));

    let locked = folder.path().join("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    let written = write_file_atomic(&locked.join("x"), b"x");
    match written {
        Err(error) => {
            assert!(matches!(&error, Error::Io { path, .. } if *path == locked.join("x")), "{error:?}");
            assert!(names(&locked).is_empty());
        }
        // The superuser may write anywhere.
        Ok(()) => assert_eq!(names(&locked), ["x"]),
    }
}
