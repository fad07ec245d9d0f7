//! Files on disk: what is written is read back by us and by the `safetensors` crate, and whatever
//! is damaged ends in a typed error that names the file and the tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tempfile::{TempDir, tempdir};
use weightpress::checkpoint::{Checkpoint, Entry, Payload, write_shard};
use weightpress::scalar::DType;
use weightpress::tensor::Tensor;
use weightpress::{Error, Result};

mod random;
mod writing;

const INDEX: &str = "model.safetensors.index.json";

fn entry<'a>(name: &str, dtype: &str, shape: &[usize], bytes: &'a [u8]) -> Entry<'a> {
    let dtype = DType::parse(dtype).unwrap();
    Entry { name: name.into(), dtype, shape: shape.to_vec(), data: Payload::Bytes(Cow::Borrowed(bytes)) }
}

fn shard(path: &Path, tensors: &[&str]) {
    let entries = tensors.iter().map(|name| entry(name, "U8", &[name.len()], name.as_bytes())).collect();
    write_shard(path, &BTreeMap::new(), entries).unwrap();
}

fn raw(path: &Path, header: &str, data: &[u8]) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    fs::write(path, bytes).unwrap();
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

/// Opening fails as damaged, in `file`, with a message that contains all of `parts`.
#[track_caller]
fn assert_damaged(opened: Result<Checkpoint>, file: &str, parts: &[&str]) {
    match opened {
        Err(error @ Error::Checkpoint { .. }) => {
            let text = error.to_string();
            for part in parts.iter().chain([&file]) {
                assert!(text.contains(part), "`{part}` is not in: {text}");
            }
        }
        other => panic!("expected a damaged checkpoint, got {other:?}"),
    }
}

/// Two shards `a.safetensors` {w, v} and `b.safetensors` {x}, and the index given.
fn sharded(weight_map: &str) -> TempDir {
    let folder = tempdir().unwrap();
    shard(&folder.path().join("a.safetensors"), &["w", "v"]);
    shard(&folder.path().join("b.safetensors"), &["x"]);
    fs::write(folder.path().join(INDEX), format!(r#"{{"metadata":{{"k":1}},"weight_map":{weight_map}}}"#)).unwrap();
    folder
}

#[test]
fn an_unaligned_tensor_is_read_right() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let mut header = String::from(
        r#"{"odd":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"F32","shape":[1,2],"data_offsets":[1,9]}}"#,
    );
    // The data start at a multiple of 8, so `w` at an odd address.
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let mut data = vec![9];
    data.extend([1.5f32, -2.25].iter().flat_map(|v| v.to_le_bytes()));
    raw(&path, &header, &data);
    let opened = Checkpoint::open(&path).unwrap();
    let stored = opened.get("w").unwrap();
    assert_eq!(stored.bytes.as_ptr() as usize % 2, 1);
    assert_eq!(stored.matrix::<f64>().unwrap(), ndarray::array![[1.5, -2.25]]);
}

#[test]
fn a_sharded_folder_opens_and_a_missing_tensor_is_named() {
    let folder = sharded(r#"{"w":"a.safetensors","v":"./a.safetensors","x":"b.safetensors"}"#);
    fs::write(folder.path().join("consolidated.safetensors"), "not in the index, so never looked at").unwrap();
    for path in [folder.path().to_owned(), folder.path().join(INDEX)] {
        let opened = Checkpoint::open(path).unwrap();
        assert!(opened.has_index());
        assert_eq!(opened.root(), folder.path());
        assert_eq!(opened.index_metadata()["k"], 1);
        let all: Vec<_> = opened.tensors().map(|t| (t.name.as_str(), t.shard)).collect();
        assert_eq!(all, [("v", 0), ("w", 0), ("x", 1)]);
        assert_eq!(opened.shards()[1].file, "b.safetensors");
        assert_eq!(opened.get("x").unwrap().bytes, b"x");
        let missing = opened.get("nothing").unwrap_err();
        assert!(matches!(&missing, Error::MissingTensor { name, .. } if name == "nothing"), "{missing:?}");
        assert!(opened.info("nothing").is_none());
    }
}

#[test]
fn a_folder_without_an_index_gives_the_single_file_or_all() {
    let folder = tempdir().unwrap();
    shard(&folder.path().join("1.safetensors"), &["a"]);
    shard(&folder.path().join("2.safetensors"), &["b"]);
    shard(&folder.path().join("._1.safetensors"), &["hidden"]);
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.tensors().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert!(!opened.has_index() && opened.index_metadata().is_empty());

    shard(&folder.path().join("3.safetensors"), &["a"]);
    assert_damaged(Checkpoint::open(folder.path()), "3.safetensors", &["`a`", "`1.safetensors`"]);

    shard(&folder.path().join("model.safetensors"), &["m"]);
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.tensors().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["m"]);

    // An index beside a whole model that it does not name: nobody knows which is meant.
    fs::write(folder.path().join(INDEX), r#"{"weight_map":{"a":"1.safetensors"}}"#).unwrap();
    assert_damaged(Checkpoint::open(folder.path()), INDEX, &["`model.safetensors`"]);
    assert!(Checkpoint::open(folder.path().join(INDEX)).is_ok());

    let other = tempdir().unwrap();
    shard(&other.path().join("diffusion.safetensors"), &["d"]);
    shard(&other.path().join("old.safetensors"), &["d"]);
    let index = other.path().join("diffusion.safetensors.index.json");
    fs::write(index, r#"{"weight_map":{"d":"diffusion.safetensors"}}"#).unwrap();
    assert!(Checkpoint::open(other.path()).unwrap().has_index());
}

#[test]
fn an_index_that_contradicts_the_shards_is_refused() {
    for (weight_map, parts) in [
        (r#"{"w":"a.safetensors","v":"a.safetensors","x":"c.safetensors"}"#, ["`x`", "`c.safetensors`"]),
        (r#"{"w":"a.safetensors","v":"a.safetensors","x":"a.safetensors"}"#, ["`x`", "`a.safetensors`"]),
        (r#"{"w":"a.safetensors","v":"b.safetensors","x":"b.safetensors"}"#, ["`v`", "it is in `a.safetensors`"]),
        (
            r#"{"w":"a.safetensors","v":"a.safetensors","y":"b.safetensors","x":"b.safetensors"}"#,
            ["`y`", "not contain"],
        ),
        (r#"{"w":"a.safetensors"}"#, ["`v`", "missing from the index"]),
        (r#"{"w":"a.safetensors","w":"b.safetensors"}"#, ["`w`", "twice"]),
        (r#"{"w":"../a.safetensors"}"#, ["`w`", "`../a.safetensors`"]),
        (r#"{"w":"sub/../../a.safetensors"}"#, ["`w`", "not a file inside the folder"]),
        (r#"{"w":"/etc/passwd"}"#, ["`w`", "`/etc/passwd`"]),
        (r#"{"w":""}"#, ["`w`", "not a file inside the folder"]),
        (r#"{"w":"."}"#, ["`w`", "not a file inside the folder"]),
        (r#"{"w":"a\u0000"}"#, ["`w`", "not a file inside the folder"]),
        (r#"{"w":7}"#, ["`w`", "cannot be read"]),
        (r#"{}"#, ["names no tensor", ""]),
        (r#"[]"#, ["cannot be read", ""]),
    ] {
        let folder = sharded(weight_map);
        assert_damaged(Checkpoint::open(folder.path()), INDEX, &parts);
    }
    let folder = sharded(r#"{"w":"a.safetensors","v":"a.safetensors","x":"b.safetensors"}"#);
    shard(&folder.path().join("b.safetensors"), &["x", "w"]);
    assert_damaged(Checkpoint::open(folder.path()), INDEX, &["`w`", "`a.safetensors`", "`b.safetensors`"]);
    fs::write(folder.path().join(INDEX), "{").unwrap();
    assert_damaged(Checkpoint::open(folder.path()), INDEX, &["cannot be read"]);
}

#[cfg(unix)]
#[test]
fn a_shard_may_be_a_link_and_need_not_be_named_as_one() {
    let (folder, blobs) = (tempdir().unwrap(), tempdir().unwrap());
    shard(&blobs.path().join("53aa5117"), &["w"]);
    std::os::unix::fs::symlink(blobs.path().join("53aa5117"), folder.path().join("model.safetensors")).unwrap();
    fs::write(blobs.path().join("c0"), "{}").unwrap();
    std::os::unix::fs::symlink(blobs.path().join("c0"), folder.path().join("config.json")).unwrap();
    std::os::unix::fs::symlink(blobs.path().join("gone"), folder.path().join("gone.json")).unwrap();
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.get("w").unwrap().bytes, b"w");
    assert_eq!(opened.side_files().unwrap(), [folder.path().join("config.json")]);
    assert!(Checkpoint::open(blobs.path().join("53aa5117")).is_ok());
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert_damaged(Checkpoint::open(folder.path()), folder.path().to_str().unwrap(), &["no *.safetensors file"]);
    let missing = Checkpoint::open(at("nowhere")).unwrap_err();
    assert!(matches!(&missing, Error::Io { path, .. } if *path == at("nowhere")), "{missing:?}");
    fs::write(at("empty.safetensors"), "").unwrap();
    assert_damaged(Checkpoint::open(at("empty.safetensors")), "empty.safetensors", &["0 bytes are too few"]);
    fs::write(at("text.safetensors"), "version https://git-lfs.github.com/spec/v1").unwrap();
    assert_damaged(Checkpoint::open(at("text.safetensors")), "text.safetensors", &["more than"]);
    raw(&at("cut.safetensors"), r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, &[0; 5]);
    assert_damaged(Checkpoint::open(at("cut.safetensors")), "cut.safetensors", &["`w`", "cut short"]);
    fs::create_dir(at("model.safetensors")).unwrap();
    assert!(matches!(Checkpoint::open(at("model.safetensors")), Err(Error::Checkpoint { .. })));
    #[cfg(unix)]
    assert_damaged(Checkpoint::open("/dev/null"), "/dev/null", &["not a regular file"]);
}

#[test]
fn side_files_are_what_a_copy_needs() {
    let folder = tempdir().unwrap();
    shard(&folder.path().join("model.safetensors"), &["w"]);
    let wanted = [
        "LICENSE",
        "NOTICE.txt",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "modeling_x.py",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.txt",
    ];
    let unwanted = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "old.PT",
        "model.gguf",
        "model.onnx",
        "tf_model.h5",
        "flax_model.msgpack",
        "adapter.safetensors",
        "report.json",
        "recipe.toml",
        ".gitattributes",
        "config.json.partial-Ab12Cd",
    ];
    for name in wanted.iter().chain(&unwanted) {
        fs::write(folder.path().join(name), "").unwrap();
    }
    fs::create_dir(folder.path().join("onnx")).unwrap();
    let files = Checkpoint::open(folder.path()).unwrap().side_files().unwrap();
    let files: Vec<_> = files.iter().map(|f| f.strip_prefix(folder.path()).unwrap().to_str().unwrap()).collect();
    assert_eq!(files, wanted);
    let lone = Checkpoint::open(folder.path().join("model.safetensors")).unwrap();
    assert!(lone.side_files().unwrap().is_empty());
    assert_eq!(lone.root(), folder.path());
}

#[test]
fn parts_that_contradict_their_description_say_what_to_do() {
    let folder = tempdir().unwrap();
    let model = folder.path().join("one.safetensors");
    let weight = super::run::entry("a.weight", &super::run::matrix(24, 40, 1), DType::F32);
    write_shard(&model, &BTreeMap::new(), vec![weight]).unwrap();
    let text = "[[rule]]\nmatch = '.*'\nmethod = { type = 'quantize', bits = 4 }\nbudget = { keep = 0.5 }";
    let out = folder.path().join("out");
    let recipe = weightpress::Recipe::parse(text).unwrap();
    super::run::run(&model, &out, &recipe, weightpress::run::Options::default()).unwrap();
    let load = || Checkpoint::open(&out)?.loader::<f32>()?.operator("a.weight");
    load().unwrap();

    let file = out.join("one.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let said = br#"bits\":4"#;
    let at = bytes.windows(said.len()).position(|part| part == said).unwrap();
    bytes[at + said.len() - 1] = b'3';
    fs::write(&file, bytes).unwrap();
    let error = load().unwrap_err();
    let Error::Tensor { name, source } = &error else { panic!("{error:?}") };
    assert!(name == "a.weight" && matches!(**source, Error::Checkpoint { .. }), "{error:?}");
    assert!(error.to_string().contains("compress the original again"), "{error}");
}
