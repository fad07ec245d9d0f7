//! The index of a sharded checkpoint: `model.safetensors.index.json`, which tensor is in which file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::reader::{MAX_HEADER, Object, Shard};
use super::writer::write_file_atomic;
use crate::error::{Error, Result};

/// The index's name in every checkpoint that this crate writes.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// How every index of safetensors files ends.
pub(super) const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// A parsed index.
#[derive(Debug)]
pub(super) struct Index {
    pub path: PathBuf,
    pub metadata: Map<String, Value>,
    /// Tensor name to shard file; the file's path is relative, and `/`-separated.
    pub weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    metadata: Option<Map<String, Value>>,
    weight_map: Object<String>,
}

impl Index {
    /// Reads an index and checks that it names files inside the folder only.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Checkpoint`].
    pub(super) fn read(path: PathBuf) -> Result<Self> {
        let damaged = |detail: String| Error::Checkpoint { path: path.clone(), detail };
        let mut text = Vec::new();
        let file = File::open(&path).map_err(Error::io(&path))?;
        file.take(MAX_HEADER + 1).read_to_end(&mut text).map_err(Error::io(&path))?;
        if text.len() as u64 > MAX_HEADER {
            return Err(damaged(format!("is larger than the {MAX_HEADER} bytes allowed")));
        }
        let Document { metadata, weight_map: Object(weight_map) } =
            serde_json::from_slice(&text).map_err(|e| damaged(format!("cannot be read: {e}")))?;
        if weight_map.is_empty() {
            return Err(damaged("names no tensor".into()));
        }
        Self { path, metadata: metadata.unwrap_or_default(), weight_map }.normalised()
    }

    /// Brings the files' paths into one form.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if one leads out of the folder.
    fn normalised(mut self) -> Result<Self> {
        for (tensor, file) in &mut self.weight_map {
            *file = inside(file).ok_or_else(|| Error::Checkpoint {
                path: self.path.clone(),
                detail: format!("tensor `{tensor}` is said to be in `{file}`, which is not a file inside the folder"),
            })?;
        }
        Ok(self)
    }

    /// The shard files, sorted by name.
    pub(super) fn files(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }

    /// Opens the shards and checks that index and headers say the same.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Checkpoint`].
    pub(super) fn open_shards(&self, folder: &Path) -> Result<Vec<Shard>> {
        let mut shards = Vec::new();
        for file in self.files() {
            let path = folder.join(file);
            if !path.exists() {
                let tensor = self.weight_map.iter().find(|(_, f)| *f == file).map_or("", |(tensor, _)| tensor);
                return Err(self.damaged(format!("tensor `{tensor}` is said to be in `{file}`, which does not exist")));
            }
            shards.push(Shard::open(path, file.into(), shards.len())?);
        }
        self.compare(&shards)?;
        Ok(shards)
    }

    fn compare(&self, shards: &[Shard]) -> Result<()> {
        let mut holder: BTreeMap<&str, &str> = BTreeMap::new();
        for shard in shards {
            for tensor in &shard.tensors {
                if let Some(other) = holder.insert(&tensor.name, &shard.file) {
                    return Err(self
                        .damaged(format!("tensor `{}` is in two files, `{other}` and `{}`", tensor.name, shard.file)));
                }
            }
        }
        for (tensor, said) in &self.weight_map {
            match holder.remove(tensor.as_str()) {
                Some(found) if found == said => {}
                Some(found) => {
                    let detail = format!("tensor `{tensor}` is said to be in `{said}`, but it is in `{found}`");
                    return Err(self.damaged(detail));
                }
                None => {
                    let detail = format!("tensor `{tensor}` is said to be in `{said}`, which does not contain it");
                    return Err(self.damaged(detail));
                }
            }
        }
        match holder.first_key_value() {
            None => Ok(()),
            Some((tensor, file)) => {
                Err(self.damaged(format!("tensor `{tensor}` in `{file}` is missing from the index's weight_map")))
            }
        }
    }

    fn damaged(&self, detail: String) -> Error {
        Error::Checkpoint { path: self.path.clone(), detail }
    }
}

/// The same path without `.`, `/`-separated; `None` if it leads out of the folder or nowhere.
/// Symbolic links are followed later: whoever made them could have put the file there.
fn inside(file: &str) -> Option<String> {
    let mut parts = Vec::new();
    for component in Path::new(file).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    if parts.is_empty() || file.contains('\0') { None } else { Some(parts.join("/")) }
}

/// Writes `model.safetensors.index.json` for the shards that are already in `folder`, and returns
/// `total_size`, the bytes of all tensors, which it puts into `metadata`. Call it last: it reads
/// the shards' headers and refuses an index that does not say what they say.
///
/// # Errors
/// [`Error::Checkpoint`] if `weight_map` and the shards disagree; [`Error::Io`].
pub fn write_index(folder: &Path, metadata: &Map<String, Value>, weight_map: &BTreeMap<String, String>) -> Result<u64> {
    /// Sorted explicitly: whether `Map` is sorted is up to other crates' features.
    #[derive(Serialize)]
    struct Sorted<'a> {
        metadata: BTreeMap<&'a str, &'a Value>,
        weight_map: &'a BTreeMap<String, String>,
    }
    let path = folder.join(INDEX_FILE);
    let index = Index { path, metadata: Map::new(), weight_map: weight_map.clone() }.normalised()?;
    let shards = index.open_shards(folder)?;
    let total: u64 = shards.iter().flat_map(|shard| &shard.tensors).map(|tensor| tensor.bytes).sum();
    let total_value = Value::from(total);
    let mut metadata: BTreeMap<&str, &Value> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    metadata.insert("total_size", &total_value);
    let mut text = serde_json::to_vec_pretty(&Sorted { metadata, weight_map: &index.weight_map })
        .map_err(|e| index.damaged(format!("cannot be written: {e}")))?;
    text.push(b'\n');
    write_file_atomic(&index.path, &text)?;
    Ok(total)
}
