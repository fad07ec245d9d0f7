//! Random layouts and random damage, held against the `safetensors` crate.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::tempdir;
use weightpress::Error;
use weightpress::checkpoint::{Checkpoint, Entry, Payload, write_shard};
use weightpress::scalar::DType;

use super::{INDEX, sharded};

type Layout = Vec<(String, DType, Vec<usize>, Vec<u8>)>;

fn layouts() -> impl Strategy<Value = Layout> {
    let dtypes =
        ["BOOL", "F4", "U8", "F8_E4M3", "F16", "BF16", "I32", "F32", "F64", "I64"].map(|d| DType::parse(d).unwrap());
    let one = (prop::sample::select(dtypes.to_vec()), prop::collection::vec(0usize..5, 0..4), any::<u8>());
    prop::collection::btree_map("[a-z.\"\\\\\u{e9}]{0,6}", one, 0..8).prop_map(|tensors| {
        let all = tensors.into_iter().map(|(name, (dtype, shape, seed))| {
            let count: usize = shape.iter().product();
            // An odd number of 4-bit values does not fill whole bytes.
            let dtype = if dtype.bytes(count) * 2 == count {
                dtype
            } else if dtype.bytes(2) == 1 {
                DType::U8
            } else {
                dtype
            };
            let bytes = (0..dtype.bytes(count)).map(|i| seed.wrapping_add(i as u8)).collect();
            (name, dtype, shape, bytes)
        });
        all.collect()
    })
}

fn write(path: &Path, layout: &Layout, metadata: &BTreeMap<String, String>) {
    let entries = layout.iter().map(|(name, dtype, shape, bytes)| Entry {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
        data: Payload::Bytes(Cow::Borrowed(bytes)),
    });
    write_shard(path, metadata, entries.collect()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_we_write_they_read(layout in layouts(), metadata in prop::collection::btree_map(".{0,4}", ".{0,9}", 0..3)) {
        let folder = tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write(&path, &layout, &metadata);
        let file = fs::read(&path).unwrap();
        prop_assert_eq!(u64::from_le_bytes(file[..8].try_into().unwrap()) % 8, 0);
        let (_, header) = SafeTensors::read_metadata(&file).unwrap();
        prop_assert_eq!(header.metadata().clone().unwrap_or_default().into_iter().collect::<BTreeMap<_, _>>(), metadata);
        let theirs = SafeTensors::deserialize(&file).unwrap();
        prop_assert_eq!(theirs.len(), layout.len());
        for (name, dtype, shape, bytes) in &layout {
            let view = theirs.tensor(name).unwrap();
            prop_assert_eq!((view.dtype().to_string(), view.shape(), view.data()), (dtype.to_string(), &shape[..], &bytes[..]));
        }
    }

    #[test]
    fn what_they_write_we_read(layout in layouts()) {
        let views = layout.iter().map(|(name, dtype, shape, bytes)| {
            let dtype: Dtype = serde_json::from_value(dtype.to_string().into()).unwrap();
            (name, TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        let folder = tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let ours = Checkpoint::open(&path).unwrap();
        prop_assert_eq!(ours.tensors().count(), layout.len());
        for (name, dtype, shape, bytes) in &layout {
            let stored = ours.get(name).unwrap();
            prop_assert_eq!((stored.dtype, stored.shape, stored.bytes), (*dtype, &shape[..], &bytes[..]));
        }
    }

    /// Damage never panics, and whatever we still accept the other reader accepts too.
    #[test]
    fn damage_never_panics(
        layout in layouts(),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        digits_only in any::<bool>(),
    ) {
        let folder = tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write(&path, &layout, &BTreeMap::from([("k".into(), "v".into())]));
        let mut file = fs::read(&path).unwrap();
        // Other digits in shapes and offsets keep the JSON readable, so that its meaning is tested.
        let digits: Vec<usize> = (8..file.len()).filter(|at| file[*at].is_ascii_digit()).collect();
        for (at, byte) in &hits {
            if digits_only && !digits.is_empty() {
                file[*at.get(&digits)] = b'0' + byte % 10;
            } else {
                let at = at.index(file.len());
                file[at] = *byte;
            }
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        fs::write(&path, &file).unwrap();
        match Checkpoint::open(&path) {
            Ok(opened) => {
                let theirs = SafeTensors::deserialize(&file).unwrap();
                prop_assert_eq!(theirs.len(), opened.tensors().count());
                for tensor in opened.tensors() {
                    prop_assert_eq!(opened.get(&tensor.name).unwrap().bytes, theirs.tensor(&tensor.name).unwrap().data());
                }
            }
            Err(Error::Checkpoint { path: named, .. }) => prop_assert_eq!(named, path),
            Err(other) => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn a_damaged_index_never_panics(hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let folder = sharded(r#"{"w":"a.safetensors","v":"a.safetensors","x":"b.safetensors"}"#);
        let mut text = fs::read(folder.path().join(INDEX)).unwrap();
        for (at, byte) in &hits {
            let at = at.index(text.len());
            text[at] = *byte;
        }
        fs::write(folder.path().join(INDEX), &text).unwrap();
        if let Err(error) = Checkpoint::open(folder.path()) {
            prop_assert!(matches!(error, Error::Checkpoint { .. } | Error::Io { .. }), "{:?}", error);
        }
    }
}
