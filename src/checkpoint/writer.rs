//! Files that appear complete or not at all: temporary file, flush, fsync, rename, fsync of the folder.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::reader::{LENGTH_BYTES, MAX_HEADER, METADATA, byte_count};
use super::{PARTIAL, file_name};
use crate::error::{Error, Result};
use crate::scalar::DType;

/// What is held in memory at once, in bytes, of a payload that comes from a file.
const BUFFER: usize = 1 << 20;

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct Entry<'a> {
    /// The name, unique in the file.
    pub name: String,
    /// How the bytes are to be read.
    pub dtype: DType,
    /// Extent of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
    /// The bytes: little-endian, row-major.
    pub data: Payload<'a>,
}

/// Makes bytes when they are written.
pub type Make<'a> = dyn Fn() -> Result<Vec<u8>> + Send + Sync + 'a;

/// Where a tensor's bytes come from.
#[derive(Clone)]
pub enum Payload<'a> {
    /// Memory, or a mapped file.
    Bytes(Cow<'a, [u8]>),
    /// A range of a file, copied through a small buffer.
    File {
        /// The file.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// Bytes that need not all be in memory at once.
    Made {
        /// Number of bytes.
        len: u64,
        /// Makes them; called once for each file that is written.
        make: Arc<Make<'a>>,
    },
}

impl std::fmt::Debug for Payload<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Payload of {} bytes", self.len())
    }
}

impl Payload<'_> {
    /// Number of bytes.
    pub fn len(&self) -> u64 {
        match self {
            Payload::Bytes(bytes) => bytes.len() as u64,
            Payload::File { len, .. } | Payload::Made { len, .. } => *len,
        }
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Writes a safetensors file and returns its size in bytes.
///
/// The bytes depend on the content only, not on the order of `entries`: tensors are sorted as the
/// `safetensors` crate sorts them (widest dtype first, then by name). Beyond the header it needs
/// 2 MiB of memory, and one tensor that is [`Payload::Made`]. The name appears when the file is complete and on
/// disk; on an error nothing does, unless it was the last step, the fsync of the folder, that failed.
///
/// # Errors
/// [`Error::Shape`] (with the tensor's name) if shape and dtype do not take as many bytes as there
/// are; what [`Payload::Made`] fails with; [`Error::Checkpoint`] if two tensors have one name or the header grows
/// too long; [`Error::Io`] with the path that failed, the source's or `path`.
pub fn write_shard(path: &Path, metadata: &BTreeMap<String, String>, mut entries: Vec<Entry<'_>>) -> Result<u64> {
    entries.sort_by(|a, b| b.dtype.stored().cmp(&a.dtype.stored()).then_with(|| a.name.cmp(&b.name)));
    let header = header(metadata, &entries).map_err(|refusal| match refusal {
        Refusal::File(detail) => Error::Checkpoint { path: path.into(), detail },
        Refusal::Tensor(error) => error,
    })?;
    atomically(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(Error::io(path))?;
        out.write_all(&header).map_err(Error::io(path))?;
        for entry in &entries {
            match &entry.data {
                Payload::Bytes(bytes) => out.write_all(bytes).map_err(Error::io(path))?,
                Payload::File { path: from, offset, len } => copy(from, *offset, Some(*len), out, path)?,
                Payload::Made { len, make } => {
                    let bytes = make().map_err(|e| e.of_tensor(&entry.name))?;
                    if bytes.len() as u64 != *len {
                        return Err(Error::shape(format!("{len} bytes"), bytes.len()).of_tensor(&entry.name));
                    }
                    out.write_all(&bytes).map_err(Error::io(path))?;
                }
            }
        }
        Ok(())
    })
}

/// Writes a small file; its name appears when it is complete and on disk.
///
/// # Errors
/// [`Error::Io`].
pub fn write_file_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    atomically(path, |out| out.write_all(bytes).map_err(Error::io(path))).map(drop)
}

/// Copies a file's bytes; the new name appears when the copy is complete and on disk.
///
/// # Errors
/// [`Error::Io`] with the path that failed.
pub fn copy_file_atomic(from: &Path, to: &Path) -> Result<()> {
    atomically(to, |out| copy(from, 0, None, out, to)).map(drop)
}

enum Refusal {
    File(String),
    Tensor(Error),
}

/// The JSON header, padded with spaces so that the data start at a multiple of 8.
fn header(metadata: &BTreeMap<String, String>, entries: &[Entry<'_>]) -> Result<Vec<u8>, Refusal> {
    let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    names.sort_unstable();
    if let Some(name) = names.windows(2).find_map(|pair| if pair.first() == pair.last() { pair.first() } else { None })
    {
        return Err(Refusal::File(format!("would hold two tensors named `{name}`")));
    }
    if names.binary_search(&METADATA).is_ok() {
        return Err(Refusal::File(format!("no tensor may be named `{METADATA}`")));
    }
    let (mut extents, mut begin) = (Vec::with_capacity(entries.len()), 0u64);
    for entry in entries {
        let refuse = |expected| {
            let got = format!("{} bytes", entry.data.len());
            Refusal::Tensor(Error::Shape { expected, got }.of_tensor(&entry.name))
        };
        let of = format!("shape {:?} of {}", entry.shape, entry.dtype);
        let bytes =
            byte_count(entry.dtype, &entry.shape).map_err(|why| refuse(format!("bytes, but {of} {why}")))? as u64;
        if bytes != entry.data.len() {
            return Err(refuse(format!("{bytes} bytes for {of}")));
        }
        let end = begin.checked_add(bytes).ok_or_else(|| Refusal::File("would be larger than any disk".into()))?;
        extents.push(Extent { dtype: entry.dtype.to_string(), shape: &entry.shape, data_offsets: (begin, end) });
        begin = end;
    }
    let mut json = serde_json::to_vec(&Header { metadata, entries, extents })
        .map_err(|e| Refusal::File(format!("the header cannot be written: {e}")))?;
    json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
    if json.len() as u64 > MAX_HEADER {
        let detail = format!("the header would take {} bytes, more than the {MAX_HEADER} allowed", json.len());
        return Err(Refusal::File(detail));
    }
    Ok(json)
}

struct Header<'a> {
    metadata: &'a BTreeMap<String, String>,
    entries: &'a [Entry<'a>],
    extents: Vec<Extent<'a>>,
}

// Fields in the order in which the `safetensors` crate writes them.
#[derive(serde::Serialize)]
struct Extent<'a> {
    dtype: String,
    shape: &'a [usize],
    data_offsets: (u64, u64),
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA, self.metadata)?;
        }
        for (entry, extent) in self.entries.iter().zip(&self.extents) {
            map.serialize_entry(&entry.name, extent)?;
        }
        map.end()
    }
}

/// Runs `write` on a temporary file beside `path` and gives it that name; returns its size.
fn atomically(path: &Path, write: impl FnOnce(&mut BufWriter<&File>) -> Result<()>) -> Result<u64> {
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let prefix = file_name(path) + PARTIAL;
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix);
    #[cfg(unix)]
    {
        // As any new file, not private as temporary files are; the umask still applies.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    // From here on every early return drops `temp`, which removes the file.
    let temp = builder.tempfile_in(folder).map_err(Error::io(path))?;
    let mut out = BufWriter::with_capacity(BUFFER, temp.as_file());
    write(&mut out)?;
    out.flush().map_err(Error::io(path))?;
    drop(out);
    temp.as_file().sync_all().map_err(Error::io(path))?;
    let bytes = temp.as_file().metadata().map_err(Error::io(path))?.len();
    temp.persist(path).map_err(|e| e.error).map_err(Error::io(path))?;
    sync_folder(folder)?;
    Ok(bytes)
}

/// Makes the renaming itself survive a power cut. Elsewhere than on unix folders cannot be opened.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        match File::open(folder).and_then(|handle| handle.sync_all()) {
            // Some file systems cannot, and some folders may be written but not read.
            Err(e)
                if !matches!(
                    e.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied
                ) =>
            {
                return Err(Error::Io { path: folder.into(), source: e });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Copies `len` bytes (all, if `None`) of a file. Both sides' errors carry their own path.
fn copy(from: &Path, offset: u64, len: Option<u64>, out: &mut impl Write, to: &Path) -> Result<()> {
    let mut source = File::open(from).map_err(Error::io(from))?;
    source.seek(SeekFrom::Start(offset)).map_err(Error::io(from))?;
    let mut source = source.take(len.unwrap_or(u64::MAX));
    let mut buffer = vec![0; BUFFER];
    let mut copied = 0u64;
    loop {
        let read = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io(from)(e)),
        };
        out.write_all(buffer.get(..read).unwrap_or_default()).map_err(Error::io(to))?;
        copied += read as u64;
    }
    if len.is_some_and(|len| copied != len) {
        let what = format!("ends after {copied} of {} bytes from byte {offset}", len.unwrap_or_default());
        return Err(Error::io(from)(io::Error::new(io::ErrorKind::UnexpectedEof, what)));
    }
    Ok(())
}
