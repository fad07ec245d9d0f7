//! One safetensors file: the header is read and checked, the rest is mapped and left alone.
//!
//! The header is parsed here and not by the `safetensors` crate, because that crate merges equal
//! names silently, names no tensor in most of its errors, and may overflow on hostile offsets.
//! What is accepted here is accepted there as well; the tests hold the two against each other.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs::File;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::Payload;
use crate::error::{Error, Result};
use crate::scalar::DType;
use crate::tensor::Stored;

/// The longest JSON header or index that is read, as in the `safetensors` crate.
pub(super) const MAX_HEADER: u64 = 100_000_000;
/// The header's key that is no tensor.
pub(super) const METADATA: &str = "__metadata__";
/// Bytes of the header's length field.
pub(super) const LENGTH_BYTES: usize = 8;

/// What a header says about one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, unique in the checkpoint.
    pub name: String,
    /// Extent of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// The dtype it is stored in.
    pub dtype: DType,
    /// Bytes it takes in the file.
    pub bytes: u64,
    /// Position in [`Checkpoint::shards`](super::Checkpoint::shards) of the file that holds it.
    pub shard: usize,
    /// First byte, counted from the start of the file.
    begin: usize,
    /// One past the last byte.
    end: usize,
}

/// One safetensors file of a checkpoint, mapped read-only.
#[derive(Debug)]
pub struct Shard {
    /// The file's name relative to the checkpoint's folder.
    pub file: String,
    /// The header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// The tensors in the order of their bytes in the file.
    pub tensors: Vec<TensorInfo>,
    /// Size of the whole file in bytes.
    pub file_bytes: u64,
    path: PathBuf,
    map: Mmap,
}

impl Shard {
    /// Maps a file and checks its header: every byte belongs to exactly one tensor, whose shape and
    /// dtype take exactly as many. `shard` is what [`TensorInfo::shard`] will say.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened; [`Error::Checkpoint`] for anything wrong in it.
    pub(super) fn open(path: PathBuf, file: String, shard: usize) -> Result<Self> {
        let damaged = |detail: String| Error::Checkpoint { path: path.clone(), detail };
        // Opening a pipe would wait for ever, so the kind is looked at first.
        let kind = std::fs::metadata(&path).map_err(Error::io(&path))?;
        if !kind.is_file() {
            return Err(damaged("is not a regular file".into()));
        }
        let handle = File::open(&path).map_err(Error::io(&path))?;
        let file_bytes = handle.metadata().map_err(Error::io(&path))?.len();
        if file_bytes < LENGTH_BYTES as u64 {
            return Err(damaged(format!("{file_bytes} bytes are too few for a safetensors file")));
        }
        // SAFETY: the map is read-only and lives in the `Shard` beside everything that borrows from
        // it; `Mmap` is never handed out. Its bytes are only read as `u8`, for which every value is
        // valid. What no program can rule out is another process changing the file meanwhile; that
        // it must not is part of the contract of `Checkpoint::open`, and this crate itself replaces
        // files by renaming, never in place.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&handle) }.map_err(Error::io(&path))?;
        let (metadata, tensors) = parse(&map, shard).map_err(damaged)?;
        Ok(Self { file, metadata, tensors, file_bytes: map.len() as u64, path, map })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same bytes as a range of the file, for a copy that maps nothing.
    pub(super) fn payload(&self, info: &TensorInfo) -> Payload<'static> {
        Payload::File { path: self.path.clone(), offset: info.begin as u64, len: info.bytes }
    }

    /// Lets the system take back the memory of a tensor's pages; they are read again when looked at.
    pub(super) fn release(&self, info: &TensorInfo) {
        #[cfg(unix)]
        if info.begin < info.end {
            // SAFETY: the map is a shared, read-only map of a file, so that dropping its pages loses
            // nothing: whoever looks at them again, now or later, gets the file's same bytes. The
            // range was checked against the file when the header was read.
            #[allow(unsafe_code)]
            let advised = unsafe {
                let len = info.end - info.begin;
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, info.begin, len)
            };
            // Advice only: a system that does not take it keeps the pages longer.
            let _ = advised;
        }
        #[cfg(not(unix))]
        let _ = info;
    }

    /// The bytes of one of this file's tensors; nothing is read before they are looked at.
    pub(super) fn stored<'a>(&'a self, info: &'a TensorInfo) -> Option<Stored<'a>> {
        let bytes = self.map.get(info.begin..info.end)?;
        Some(Stored { shape: &info.shape, dtype: info.dtype, bytes })
    }
}

/// A JSON object whose keys are all different. (serde's maps keep the last of two without a word.)
pub(crate) struct Object<V>(pub BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Object<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Pairs<V> {
            type Value = Object<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    let value = map.next_value().map_err(|e| A::Error::custom(format!("`{key}`: {e}")))?;
                    if pairs.contains_key(&key) {
                        return Err(A::Error::custom(format!("`{key}` appears twice")));
                    }
                    pairs.insert(key, value);
                }
                Ok(Object(pairs))
            }
        }
        deserializer.deserialize_map(Pairs(PhantomData))
    }
}

/// A tensor's entry as the JSON has it.
#[derive(Deserialize)]
struct Extent {
    dtype: String,
    shape: Vec<usize>,
    /// First byte and one past the last, counted from the end of the header.
    data_offsets: (usize, usize),
}

/// A header's value: which of the two is told by the key alone, as a tensor is never all strings.
#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Extent>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut header, mut seen) = (Header::default(), false);
                while let Some(key) = map.next_key::<String>()? {
                    let named = |e: A::Error| A::Error::custom(format!("tensor `{key}`: {e}"));
                    let twice = if key == METADATA {
                        let entries: Option<Object<String>> =
                            map.next_value().map_err(|e| A::Error::custom(format!("{METADATA}: {e}")))?;
                        header.metadata = entries.map_or_else(BTreeMap::new, |object| object.0);
                        std::mem::replace(&mut seen, true)
                    } else {
                        let extent: Extent = map.next_value().map_err(named)?;
                        header.tensors.insert(key.clone(), extent).is_some()
                    };
                    if twice {
                        return Err(A::Error::custom(format!("`{key}` is described twice")));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Reads and checks the header of a whole file. Allocates in proportion to the header that is
/// there, never to a number that the header states.
fn parse(file: &[u8], shard: usize) -> Result<(BTreeMap<String, String>, Vec<TensorInfo>), String> {
    let (length, rest) = file.split_first_chunk::<LENGTH_BYTES>().ok_or("is too short for a safetensors file")?;
    let stated = u64::from_le_bytes(*length);
    if stated > MAX_HEADER {
        return Err(format!("states a header of {stated} bytes, more than the {MAX_HEADER} allowed"));
    }
    let (json, data) = usize::try_from(stated).ok().and_then(|n| rest.split_at_checked(n)).ok_or_else(|| {
        format!("states a header of {stated} bytes, but only {} follow: the file is cut short", rest.len())
    })?;
    let text = str::from_utf8(json).map_err(|e| format!("the header is not UTF-8: {e}"))?;
    let header: Header = serde_json::from_str(text).map_err(|e| format!("the header cannot be read: {e}"))?;
    let tensors = lay_out(header.tensors, data.len(), shard, file.len() - data.len())?;
    Ok((header.metadata, tensors))
}

/// Sorts the tensors by offset and checks that they tile `data_bytes` exactly.
fn lay_out(
    extents: BTreeMap<String, Extent>,
    data_bytes: usize,
    shard: usize,
    data_begin: usize,
) -> Result<Vec<TensorInfo>, String> {
    let mut extents: Vec<(String, Extent)> = extents.into_iter().collect();
    // Stable, so that empty tensors at one place stay in the order of their names.
    extents.sort_by_key(|(_, extent)| extent.data_offsets);
    let mut tensors: Vec<TensorInfo> = Vec::with_capacity(extents.len());
    let mut next = 0;
    for (name, extent) in extents {
        let refuse = |detail: &dyn Display| Err(format!("tensor `{name}` {detail}"));
        let Extent { dtype, shape, data_offsets: (begin, end) } = extent;
        if end < begin {
            return refuse(&format_args!("ends at byte {end}, before its start at byte {begin}"));
        }
        if end > data_bytes {
            return refuse(&format_args!(
                "ends at byte {end} of the data, of which there are only {data_bytes}: the file is cut short"
            ));
        }
        if begin < next {
            let previous = tensors.last().map_or("", |t| &t.name);
            return refuse(&format_args!("starts at byte {begin}, inside tensor `{previous}`"));
        }
        if begin > next {
            return refuse(&format_args!("starts at byte {begin}, but bytes {next} to {begin} belong to no tensor"));
        }
        // Upper case only, as other readers have it.
        let Some(known) = DType::parse(&dtype).filter(|known| known.to_string() == dtype) else {
            return refuse(&format_args!("has the unknown dtype `{dtype}`"));
        };
        match byte_count(known, &shape) {
            Ok(bytes) if bytes == end - begin => {}
            Ok(bytes) => {
                let has = end - begin;
                return refuse(&format_args!(
                    "of shape {shape:?} and dtype {known} takes {bytes} bytes, but has {has}"
                ));
            }
            Err(why) => return refuse(&format_args!("of shape {shape:?} and dtype {known} {why}")),
        }
        next = end;
        let (begin, end) = (data_begin + begin, data_begin + end);
        tensors.push(TensorInfo { name, shape, dtype: known, bytes: (end - begin) as u64, shard, begin, end });
    }
    if next != data_bytes {
        let last = tensors.last().map_or("the header".into(), |t| format!("the last tensor, `{}`", t.name));
        return Err(format!("{} bytes after {last} belong to no tensor", data_bytes - next));
    }
    Ok(tensors)
}

/// Bytes that a tensor takes, or why no such tensor can be stored.
pub(super) fn byte_count(dtype: DType, shape: &[usize]) -> Result<usize, &'static str> {
    let count = shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
    let bits = count.and_then(|count| count.checked_mul(dtype.stored().bitsize()));
    match bits {
        None => Err("is larger than any memory"),
        Some(bits) if bits % 8 != 0 => Err("does not fill whole bytes"),
        Some(bits) => Ok(bits / 8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    #[test]
    fn tensors_come_in_the_order_of_their_bytes() {
        let header = r#"{"z":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"__metadata__":{"b":"2","a":"1"},
            "a":{"dtype":"BF16","shape":[2,1],"data_offsets":[3,7]},"e":{"dtype":"F32","shape":[0,9],"data_offsets":[3,3]}}  "#;
        let (metadata, tensors) = parse(&file(header, 7), 4).unwrap();
        assert_eq!(metadata, BTreeMap::from([("a".into(), "1".into()), ("b".into(), "2".into())]));
        let names: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["z", "e", "a"]);
        let start = 8 + header.len();
        let last = tensors.last().unwrap();
        assert_eq!((last.begin, last.end, last.bytes, last.shard), (start + 3, start + 7, 4, 4));
        assert_eq!((last.dtype, last.shape.as_slice()), (DType::BF16, &[2, 1][..]));
    }

    #[test]
    fn a_bad_header_is_refused_by_the_name_of_its_tensor() {
        let max = usize::MAX;
        let half = max / 2 + 1;
        for (header, data, expected) in [
            (r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#.into(), 4, "`w` of shape [2] and dtype F32 takes 8 bytes, but has 4"),
            (r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#.into(), 7, "`w` ends at byte 8 of the data, of which there are only 7"),
            (r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#.into(), 9, "1 bytes after the last tensor, `w`"),
            (r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#.into(), 8, "`w` ends at byte 0, before its start"),
            (r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#.into(), 12, "`w` starts at byte 4, but bytes 0 to 4 belong to no tensor"),
            (r#"{"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}}"#.into(), 7, "`w` starts at byte 3, inside tensor `v`"),
            (r#"{"w":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#.into(), 8, "`w` has the unknown dtype `F33`"),
            (r#"{"w":{"dtype":"f32","shape":[2],"data_offsets":[0,8]}}"#.into(), 8, "`w` has the unknown dtype `f32`"),
            (r#"{"w":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#.into(), 2, "`w` of shape [3] and dtype F4 does not fill whole bytes"),
            (format!(r#"{{"w":{{"dtype":"F32","shape":[{half},2],"data_offsets":[0,8]}}}}"#), 8, "`w` of shape"),
            (format!(r#"{{"w":{{"dtype":"F32","shape":[{half}],"data_offsets":[0,8]}}}}"#), 8, "is larger than any memory"),
            (format!(r#"{{"w":{{"dtype":"U8","shape":[8],"data_offsets":[0,{max}]}}}}"#), 8, "`w` ends at byte"),
            (r#"{"w":{"dtype":"U8","shape":[-1],"data_offsets":[0,8]}}"#.into(), 8, "tensor `w`"),
            (r#"{"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8,8]}}"#.into(), 8, "tensor `w`"),
            (r#"{"w":{"dtype":"U8","data_offsets":[0,8]}}"#.into(), 8, "tensor `w`: missing field `shape`"),
            (r#"{"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#.into(), 8, "`w` is described twice"),
            (r#"{"__metadata__":{"k":"1","k":"2"}}"#.into(), 0, "`k` appears twice"),
            (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "`__metadata__` is described twice"),
            (r#"{"__metadata__":{"k":1}}"#.into(), 0, "__metadata__: `k`"),
            ("[]".into(), 0, "cannot be read"),
            ("{} x".into(), 0, "cannot be read"),
            (String::new(), 0, "cannot be read"),
            ("{}".into(), 1, "1 bytes after the header"),
        ] {
            let why = parse(&file(&header, data), 0).unwrap_err();
            assert!(why.contains(expected), "{header}\n said: {why}\n not: {expected}");
        }
    }

    #[test]
    fn a_bad_length_field_allocates_nothing() {
        for (stated, expected) in [
            (3, "only 2 follow"),
            (MAX_HEADER, "only 2 follow"),
            (MAX_HEADER + 1, "more than"),
            (u64::MAX, "more than"),
        ] {
            let mut bytes = stated.to_le_bytes().to_vec();
            bytes.extend(b"{}");
            let why = parse(&bytes, 0).unwrap_err();
            assert!(why.contains(expected) && why.contains(&stated.to_string()), "{why}");
        }
        assert!(parse(&[0; 7], 0).is_err());
        let mut bytes = 4u64.to_le_bytes().to_vec();
        bytes.extend(b"{\"\xff\"");
        assert!(parse(&bytes, 0).unwrap_err().contains("not UTF-8"));
    }
}
