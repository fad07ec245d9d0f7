//! Calibration statistics: what the metrics need to know about a layer beside its weight.
//!
//! A statistics file is a safetensors file with, for a weight `w` of shape m×n,
//!
//! | key | shape | content |
//! |---|---|---|
//! | `w.gram` | n×n | mean over tokens of x·xᵀ, x being the layer's input |
//! | `w.fisher_row` | m | mean squared gradients, summed over each row |
//! | `w.fisher_col` | n | the same, summed over each column |
//! | `w.fisher` | m×n | the same, not summed; stands in for the two above |
//! | `w.sensitivity` | 1 | what a global allocation multiplies the squared error of `w` with |
//!
//! and in its metadata `tokens` (a number), `gram_alias` (a JSON object, `"x.gram": "w.gram"`: layers that see the
//! same input share one matrix) and `origin` (a JSON object from weight to fingerprint: what they were collected
//! on). Files are mapped, and read per key.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ndarray::{Array1, Array2};

use crate::checkpoint::{Checkpoint, Object};
use crate::error::{Error, Result};
use crate::tensor::{Stored, Tensor};

mod fisher;
mod gram;
mod kind;
mod origin;
mod save;
mod sensitivity;

pub use self::gram::{Gram, GramAccumulator};
pub use self::kind::Kind;

/// How many Gram matrices are kept alive for the next weight that shares one.
const KEPT: usize = 4;
/// Of these, how many bytes beside the newest.
const KEPT_BYTES: usize = 1 << 30;

const FISHER: &str = "fisher";

/// Statistics from files, from memory, or both. May be shared between threads.
#[derive(Debug, Default)]
pub struct Stats {
    files: Vec<Checkpoint>,
    /// Key to file.
    places: HashMap<String, usize>,
    given: BTreeMap<String, Given>,
    /// Key to key.
    aliases: BTreeMap<String, String>,
    /// Weight to fingerprint.
    origins: BTreeMap<String, String>,
    tokens: Option<u64>,
    cache: Mutex<Cache>,
}

/// A statistic that was put in by a program.
#[derive(Debug)]
enum Given {
    Gram(Arc<Gram>),
    Vector(Array1<f64>),
}

#[derive(Debug, Default)]
struct Cache {
    /// One lock per key, so that two threads never read the same matrix twice.
    slots: HashMap<String, Arc<Mutex<Weak<Gram>>>>,
    /// Newest first.
    recent: VecDeque<Arc<Gram>>,
    digests: HashMap<String, [u8; 32]>,
}

impl Cache {
    fn touch(&mut self, gram: &Arc<Gram>) {
        self.recent.retain(|other| !Arc::ptr_eq(other, gram));
        self.recent.push_front(Arc::clone(gram));
        self.recent.truncate(KEPT);
        let older = |cache: &Self| cache.recent.iter().skip(1).map(|gram| gram.memory()).sum::<usize>();
        while older(self) > KEPT_BYTES {
            self.recent.pop_back();
        }
    }
}

impl Stats {
    /// No statistics.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Maps one or more statistics files; only their headers are read. `tokens` is the first file's
    /// that states it.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Checkpoint`] as for checkpoints; [`Error::Statistics`] if two
    /// files have the same key, or one key is both stored and an alias.
    pub fn open<P: AsRef<Path>>(files: &[P]) -> Result<Self> {
        let mut stats = Self::empty();
        for path in files {
            let file = Checkpoint::open(path)?;
            for shard in file.shards() {
                let damaged = |detail| Error::Checkpoint { path: shard.path().into(), detail };
                if let Some(text) = shard.metadata.get("tokens") {
                    let tokens =
                        text.parse().map_err(|e| damaged(format!("`tokens` in the metadata, `{text}`: {e}")))?;
                    stats.tokens.get_or_insert(tokens);
                }
                if let Some(text) = shard.metadata.get("gram_alias") {
                    let Object(aliases) = serde_json::from_str::<Object<String>>(text)
                        .map_err(|e| damaged(format!("`gram_alias` in the metadata: {e}")))?;
                    for (key, of) in aliases {
                        stats.add_alias(key, of)?;
                    }
                }
            }
            for shard in file.shards() {
                let Some(text) = shard.metadata.get(origin::ORIGIN) else { continue };
                let Object(origins) = serde_json::from_str::<Object<String>>(text).map_err(|e| Error::Checkpoint {
                    path: shard.path().into(),
                    detail: format!("`{}` in the metadata: {e}", origin::ORIGIN),
                })?;
                stats.origins.extend(origins);
            }
            for tensor in file.tensors() {
                if let Some(other) = stats.places.insert(tensor.name.clone(), stats.files.len()) {
                    let other = stats.files.get(other).map_or(String::new(), |file| place(file, &tensor.name));
                    let detail = format!("is both in {other} and in {}", place(&file, &tensor.name));
                    return Err(Error::Statistics { key: tensor.name.clone(), detail });
                }
            }
            stats.files.push(file);
        }
        // Only now is it known what is stored.
        match stats.aliases.iter().find(|(key, _)| stats.places.contains_key(*key)) {
            Some((key, of)) => Err(Error::Statistics {
                key: key.clone(),
                detail: format!("is stored, and an alias of `{of}` as well"),
            }),
            None => Ok(stats),
        }
    }

    /// Puts in a Gram matrix, n×n.
    ///
    /// # Errors
    /// [`Error::Statistics`] as in [`Gram::new`], and if there is one already.
    pub fn insert_gram(&mut self, weight: &str, gram: Array2<f64>) -> Result<()> {
        let key = Kind::Gram.key(weight);
        self.check_absent(&key)?;
        let gram = Arc::new(Gram::new(&key, gram)?);
        self.given.insert(key, Given::Gram(gram));
        Ok(())
    }

    /// Says that `weight` sees the same inputs as `of_weight`.
    ///
    /// # Errors
    /// [`Error::Statistics`] if `weight` has a Gram matrix already.
    pub fn insert_alias(&mut self, weight: &str, of_weight: &str) -> Result<()> {
        let key = Kind::Gram.key(weight);
        self.check_absent(&key)?;
        self.add_alias(key, Kind::Gram.key(of_weight))
    }

    /// Puts in the Fisher information of each row, m.
    ///
    /// # Errors
    /// [`Error::Statistics`] unless it is finite, nowhere negative and somewhere positive, and if
    /// there is one already.
    pub fn insert_fisher_row(&mut self, weight: &str, values: Array1<f64>) -> Result<()> {
        self.insert_vector(Kind::FisherRow.key(weight), values)
    }

    /// Puts in the Fisher information of each column, n.
    ///
    /// # Errors
    /// As [`insert_fisher_row`](Self::insert_fisher_row).
    pub fn insert_fisher_col(&mut self, weight: &str, values: Array1<f64>) -> Result<()> {
        self.insert_vector(Kind::FisherCol.key(weight), values)
    }

    /// The Gram matrix of a weight's inputs. The few that were asked for last are kept, so that
    /// weights that share their inputs share the matrix and its root.
    ///
    /// # Errors
    /// [`Error::MissingStats`]; [`Error::Statistics`] as in [`Gram::new`].
    pub fn gram(&self, weight: &str) -> Result<Arc<Gram>> {
        let key = self.gram_site(weight).ok_or_else(|| missing(Kind::Gram, weight))?;
        if let Some(Given::Gram(gram)) = self.given.get(&key) {
            return Ok(Arc::clone(gram));
        }
        let slot = Arc::clone(self.cache().slots.entry(key.clone()).or_default());
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let gram = match slot.upgrade() {
            Some(gram) => gram,
            None => {
                let unusable = |e: Error| Error::Statistics { key: key.clone(), detail: e.to_string() };
                let stored = self.stored(&key).ok_or_else(|| missing(Kind::Gram, weight))?;
                let gram = Arc::new(Gram::new(&key, stored.matrix().map_err(unusable)?.into_owned())?);
                self.release(&key);
                *slot = Arc::downgrade(&gram);
                gram
            }
        };
        self.cache().touch(&gram);
        Ok(gram)
    }

    /// Fisher information of each row of a weight, m; summed up if only the whole matrix is stored.
    ///
    /// # Errors
    /// [`Error::MissingStats`]; [`Error::Statistics`] unless it is finite, nowhere negative and
    /// somewhere positive.
    pub fn fisher_row(&self, weight: &str) -> Result<Array1<f64>> {
        self.vector(weight, Kind::FisherRow)
    }

    /// Fisher information of each column of a weight, n; summed up if only the whole matrix is stored.
    ///
    /// # Errors
    /// As [`fisher_row`](Self::fisher_row).
    pub fn fisher_col(&self, weight: &str) -> Result<Array1<f64>> {
        self.vector(weight, Kind::FisherCol)
    }

    /// Whether something is known. Reads nothing.
    pub fn has(&self, weight: &str, kind: Kind) -> bool {
        match kind {
            Kind::Gram => self.gram_site(weight).is_some(),
            Kind::Sensitivity => self.contains(&kind.key(weight)),
            Kind::FisherRow | Kind::FisherCol => {
                self.contains(&kind.key(weight)) || self.contains(&format!("{weight}.{FISHER}"))
            }
        }
    }

    /// The key that a weight's Gram matrix is stored under: equal for weights that share their
    /// inputs. `None` if there is none.
    pub fn gram_site(&self, weight: &str) -> Option<String> {
        let own = Kind::Gram.key(weight);
        let mut key = &own;
        // An alias may lead to another; a circle leads nowhere.
        for _ in 0..=self.aliases.len() {
            match self.aliases.get(key) {
                Some(next) => key = next,
                None => return self.contains(key).then(|| key.clone()),
            }
        }
        None
    }

    /// How many tokens the statistics were collected from, if known.
    pub fn tokens(&self) -> Option<u64> {
        self.tokens
    }

    /// blake3 of everything known about a weight but its sensitivity: keys, dtypes, shapes and bytes. A resumed run
    /// compares it. Equal content in a file and in memory has different digests.
    pub fn digest(&self, weight: &str) -> [u8; 32] {
        let mut whole = blake3::Hasher::new();
        let sensitivity = Kind::Sensitivity.key(weight);
        for key in self.keys(weight).into_iter().filter(|key| *key != sensitivity) {
            let known = self.cache().digests.get(&key).copied();
            let digest = known.unwrap_or_else(|| self.key_digest(&key));
            self.cache().digests.insert(key, digest);
            whole.update(&digest);
        }
        whole.finalize().into()
    }

    /// Checks, from headers alone, that what is known about a weight fits its `shape` (m, n).
    ///
    /// # Errors
    /// [`Error::Statistics`].
    pub fn check_shape(&self, weight: &str, shape: (usize, usize)) -> Result<()> {
        let (m, n) = shape;
        for key in self.keys(weight) {
            let expected = match key.rsplit('.').next() {
                Some("fisher_row") => vec![m],
                Some("fisher_col") => vec![n],
                Some("sensitivity") => vec![1],
                Some(FISHER) => vec![m, n],
                _ => vec![n, n],
            };
            let has = match self.given.get(&key) {
                Some(Given::Gram(gram)) => vec![gram.dim(); 2],
                Some(Given::Vector(values)) => vec![values.len()],
                None => self.stored(&key).map_or(Vec::new(), |stored| stored.shape.to_vec()),
            };
            if has != expected {
                let detail = format!("has shape {has:?}, but `{weight}` of shape [{m}, {n}] needs {expected:?}");
                return Err(Error::Statistics { key, detail });
            }
        }
        Ok(())
    }

    /// The keys that exist for a weight, aliases resolved.
    fn keys(&self, weight: &str) -> Vec<String> {
        let kinds = [Kind::FisherRow, Kind::FisherCol, Kind::Sensitivity].map(|kind| kind.key(weight));
        let others = kinds.into_iter().chain([format!("{weight}.{FISHER}")]);
        self.gram_site(weight).into_iter().chain(others.filter(|key| self.contains(key))).collect()
    }

    fn contains(&self, key: &str) -> bool {
        self.places.contains_key(key) || self.given.contains_key(key)
    }

    fn stored(&self, key: &str) -> Option<Stored<'_>> {
        self.files.get(*self.places.get(key)?)?.get(key).ok()
    }

    /// Gives back the memory of a matrix that was read.
    fn release(&self, key: &str) {
        if let Some(file) = self.places.get(key).and_then(|place| self.files.get(*place)) {
            file.release(key);
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_alias(&mut self, key: String, of: String) -> Result<()> {
        let refuse = |detail| Err(Error::Statistics { key: key.clone(), detail });
        let suffix = format!(".{}", Kind::Gram);
        if !key.ends_with(&suffix) || !of.ends_with(&suffix) {
            return refuse(format!("is an alias of `{of}`, but both must end in `{suffix}`"));
        }
        match self.aliases.get(&key) {
            Some(other) if *other != of => refuse(format!("is an alias of `{other}` and of `{of}`")),
            _ => {
                self.aliases.insert(key, of);
                Ok(())
            }
        }
    }

    fn check_absent(&self, key: &str) -> Result<()> {
        if self.contains(key) || self.aliases.contains_key(key) {
            return Err(Error::Statistics { key: key.into(), detail: "is there already".into() });
        }
        Ok(())
    }

    fn insert_vector(&mut self, key: String, values: Array1<f64>) -> Result<()> {
        self.check_absent(&key)?;
        fisher::check(&key, &values)?;
        self.given.insert(key, Given::Vector(values));
        Ok(())
    }

    fn vector(&self, weight: &str, kind: Kind) -> Result<Array1<f64>> {
        let (key, whole) = (kind.key(weight), format!("{weight}.{FISHER}"));
        if let Some(Given::Vector(values)) = self.given.get(&key) {
            return Ok(values.clone());
        }
        let (key, values) = match (self.stored(&key), self.stored(&whole)) {
            (Some(stored), _) => (key, fisher::read(stored)),
            (None, Some(stored)) => (whole, fisher::sum_up(stored, kind)),
            (None, None) => return Err(missing(kind, weight)),
        };
        let values = values.map_err(|e| Error::Statistics { key: key.clone(), detail: e.to_string() })?;
        fisher::check(&key, &values)?;
        Ok(values)
    }

    fn key_digest(&self, key: &str) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        hash.update(&(key.len() as u64).to_le_bytes()).update(key.as_bytes());
        let mut numbers = |values: &mut dyn Iterator<Item = &f64>| {
            for value in values {
                hash.update(&value.to_le_bytes());
            }
        };
        match self.given.get(key) {
            Some(Given::Gram(gram)) => numbers(&mut gram.matrix().iter()),
            Some(Given::Vector(values)) => numbers(&mut values.iter()),
            None => {
                if let Some(Stored { shape, dtype, bytes }) = self.stored(key) {
                    hash.update(format!("{dtype}{shape:?}").as_bytes()).update(bytes);
                    self.release(key);
                }
            }
        }
        hash.finalize().into()
    }
}

/// Which file of a possibly sharded collection a key is in, for messages.
fn place(file: &Checkpoint, key: &str) -> String {
    let shard = file.info(key).and_then(|info| file.shards().get(info.shard));
    shard.map_or_else(|| file.root().display().to_string(), |shard| shard.path().display().to_string())
}

fn missing(kind: Kind, weight: &str) -> Error {
    Error::MissingStats { missing: vec![kind.key(weight)] }
}
