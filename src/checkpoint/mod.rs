//! Checkpoints as folders of safetensors files: lazy in, streamed and atomic out.
//!
//! Opening reads headers and the index; a tensor's bytes are read when they are looked at, straight
//! from the page cache. Writing goes through a bounded buffer into a temporary file that takes its
//! final name only when it is complete and on disk.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::tensor::Stored;

mod factored;
mod index;
mod reader;
mod writer;

pub use self::factored::Loader;
pub use self::index::write_index;
use self::index::{INDEX_FILE, INDEX_SUFFIX, Index};
pub(crate) use self::reader::Object;
pub use self::reader::{Shard, TensorInfo};
pub use self::writer::{Entry, Make, Payload, copy_file_atomic, write_file_atomic, write_shard};

/// The weights of a checkpoint that has no index.
const SINGLE_FILE: &str = "model.safetensors";
const SUFFIX: &str = ".safetensors";
/// Files that this crate writes beside the weights; they describe the run, not the model.
pub const RUN_FILES: [&str; 2] = ["report.json", "recipe.toml"];
/// Marks an unfinished file; what follows is random.
pub(crate) const PARTIAL: &str = ".partial-";
/// The extensions of other weight formats.
const OTHER_WEIGHTS: [&str; 15] = [
    "bin",
    "pt",
    "pth",
    "ckpt",
    "gguf",
    "ggml",
    "onnx",
    "onnx_data",
    "h5",
    "msgpack",
    "npz",
    "ot",
    "pdparams",
    "safetensors",
    "tflite",
];

/// A checkpoint, mapped read-only.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    shards: Vec<Shard>,
    /// Name to (shard, position in the shard).
    places: HashMap<String, (usize, usize)>,
    index_metadata: Map<String, Value>,
    has_index: bool,
    lone_file: bool,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index, or a folder. In a folder the index is followed, or
    /// `model.safetensors` is taken alone, or all `*.safetensors` files together, in this order.
    ///
    /// The files must not be changed while the checkpoint is open: they are mapped, not copied.
    /// (Replacing one by renaming another over it is fine.)
    ///
    /// # Errors
    /// [`Error::Io`] if something cannot be opened; [`Error::Checkpoint`] if a header or the index
    /// is damaged, if they contradict each other, or if there are no weights.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if fs::metadata(path).map_err(Error::io(path))?.is_dir() {
            return Self::open_folder(path);
        }
        let root = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if file_name(path).ends_with(INDEX_SUFFIX) {
            return Self::open_index(root, path.to_owned());
        }
        let shard = Shard::open(path.to_owned(), file_name(path), 0)?;
        Ok(Self { lone_file: true, ..Self::assemble(root, vec![shard], None)? })
    }

    fn open_folder(folder: &Path) -> Result<Self> {
        let names: Vec<String> = list(folder)?.iter().map(|file| file_name(file)).collect();
        let has = |name: &str| names.iter().any(|other| other == name);
        let indexes: Vec<&String> = names.iter().filter(|name| name.ends_with(INDEX_SUFFIX)).collect();
        let index = match indexes.as_slice() {
            _ if has(INDEX_FILE) => Some(INDEX_FILE),
            // Another stem, as diffusion models have it.
            [only] if !has(SINGLE_FILE) => Some(only.as_str()),
            _ => None,
        };
        if let Some(index) = index {
            let opened = Self::open_index(folder, folder.join(index))?;
            if has(SINGLE_FILE) && !opened.shards.iter().any(|shard| shard.file == SINGLE_FILE) {
                let detail = format!("does not name `{SINGLE_FILE}`, which is there too: open one of them by its path");
                return Err(Error::Checkpoint { path: folder.join(index), detail });
            }
            return Ok(opened);
        }
        let files: Vec<String> = if has(SINGLE_FILE) {
            vec![SINGLE_FILE.into()]
        } else {
            names.into_iter().filter(|name| name.ends_with(SUFFIX)).collect()
        };
        if files.is_empty() {
            let detail = "the folder contains no *.safetensors file".into();
            return Err(Error::Checkpoint { path: folder.into(), detail });
        }
        let shards = files.into_iter().enumerate().map(|(at, file)| Shard::open(folder.join(&file), file, at));
        Self::assemble(folder, shards.collect::<Result<_>>()?, None)
    }

    fn open_index(folder: &Path, path: PathBuf) -> Result<Self> {
        let index = Index::read(path)?;
        let shards = index.open_shards(folder)?;
        Self::assemble(folder, shards, Some(index))
    }

    fn assemble(root: &Path, shards: Vec<Shard>, index: Option<Index>) -> Result<Self> {
        let mut places = HashMap::new();
        for (at, shard) in shards.iter().enumerate() {
            for (position, tensor) in shard.tensors.iter().enumerate() {
                if let Some((other, _)) = places.insert(tensor.name.clone(), (at, position)) {
                    let other = shards.get(other).map_or("", |shard| &shard.file);
                    let detail = format!("tensor `{}` is also in `{other}`", tensor.name);
                    return Err(Error::Checkpoint { path: shard.path().into(), detail });
                }
            }
        }
        let has_index = index.is_some();
        let index_metadata = index.map_or_else(Map::new, |index| index.metadata);
        Ok(Self { root: root.into(), shards, places, index_metadata, has_index, lone_file: false })
    }

    /// The checkpoint's folder; the parent if a lone file was opened.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The weight files, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors: shard after shard, and in each in the order of their bytes.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.shards.iter().flat_map(|shard| &shard.tensors)
    }

    /// What is known of a tensor without reading it.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let (shard, position) = self.places.get(name)?;
        self.shards.get(*shard)?.tensors.get(*position)
    }

    /// A tensor's bytes, borrowed from the map: nothing is read before they are looked at.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn get(&self, name: &str) -> Result<Stored<'_>> {
        self.info(name)
            .and_then(|info| self.shards.get(info.shard)?.stored(info))
            .ok_or_else(|| Error::MissingTensor { name: name.into(), path: self.root.clone() })
    }

    /// A tensor to be copied into another file, through a small buffer and not through the map.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn entry(&self, name: &str) -> Result<Entry<'static>> {
        let found = self.info(name).and_then(|info| Some((info, self.shards.get(info.shard)?.payload(info))));
        let (info, data) = found.ok_or_else(|| Error::MissingTensor { name: name.into(), path: self.root.clone() })?;
        Ok(Entry { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), data })
    }

    /// Tells the system that a tensor's bytes are not needed for now: their memory is free for others,
    /// and they are read again when they are looked at. A program that walks through a checkpoint
    /// larger than its memory calls this after each tensor.
    pub fn release(&self, name: &str) {
        if let Some((shard, info)) = self.info(name).and_then(|info| Some((self.shards.get(info.shard)?, info))) {
            shard.release(info);
        }
    }

    /// The index's `metadata`; empty without an index.
    pub fn index_metadata(&self) -> &Map<String, Value> {
        &self.index_metadata
    }

    /// Whether the checkpoint was opened through an index.
    pub fn has_index(&self) -> bool {
        self.has_index
    }

    /// Size of all weight files together, headers included, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.file_bytes).sum()
    }

    /// Everything a copy of the model needs beside its weights (configuration, tokenizer, licence),
    /// sorted: the regular files of the folder except weights of any format, indexes, hidden files
    /// and [`RUN_FILES`]. Empty if a lone file was opened.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be listed.
    pub fn side_files(&self) -> Result<Vec<PathBuf>> {
        if self.lone_file {
            return Ok(Vec::new());
        }
        let mut files = list(&self.root)?;
        files.retain(|file| {
            let name = file_name(file).to_lowercase();
            let weights =
                file.extension().is_some_and(|e| OTHER_WEIGHTS.iter().any(|other| e.eq_ignore_ascii_case(other)));
            let shard = self.shards.iter().any(|shard| shard.path() == file);
            !(weights
                || shard
                || name.ends_with(".index.json")
                || name.contains(PARTIAL)
                || RUN_FILES.contains(&&*name))
        });
        Ok(files)
    }
}

/// The regular files of a folder (links followed) that are not hidden, sorted.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.is_file() && !file_name(&path).starts_with('.') {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The last component; lossy, for messages and comparisons with names that are known.
fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
