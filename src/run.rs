//! Does what a plan says: job by job into kept files, shard by shard into the output folder.
//!
//! ```text
//! OUT/.weightpress/00012.factored.safetensors   a finished job (deleted when its shard is written)
//! OUT/.weightpress/shard-….json                 a finished shard's part of the report
//! OUT/model-00001-of-00002.safetensors          appears complete, by rename
//! OUT/…index.json, config, tokenizer, recipe.toml, and last of all report.json
//! ```

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, Shard, copy_file_atomic, write_file_atomic, write_index, write_shard};
use crate::error::{Error, Result};
use crate::linalg::{Backend, Faer};
use crate::operator::codec::{FORMAT_VERSION, Header, METADATA_KEY, Tree};
use crate::plan::{Job, Plan};
use crate::report::{Report, TensorReport};
use crate::unit::{Unit, Worker};

mod shares;
use self::shares::Share;

const WORK: &str = ".weightpress";

/// Which checkpoints to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Emit {
    /// Ours: smaller, self-describing; see `docs/format.md`.
    #[default]
    Factored,
    /// Ŵ under the old names and dtypes: loads in every tool, saves no bytes.
    Dense,
    /// Both, in the subfolders `factored` and `dense`.
    Both,
}

impl Emit {
    fn forms(self) -> &'static [&'static str] {
        match self {
            Emit::Factored => &["factored"],
            Emit::Dense => &["dense"],
            Emit::Both => &["factored", "dense"],
        }
    }
}

/// How to run a plan.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Which checkpoints to write.
    pub emit: Emit,
    /// Jobs at a time; 0 means one for each core. The bytes written do not depend on it.
    pub threads: usize,
    /// Go on with a run that was stopped.
    pub resume: bool,
    /// A folder, made if it is not there, in which error curves and the results that belong to them outlive the run,
    /// by digest of weight, statistics, method and metric: another budget then measures nothing anew.
    pub cache: Option<PathBuf>,
}

/// Is told how a run goes on; all methods have empty defaults. The library itself never prints.
pub trait Observer: Sync {
    /// A stage begins: its name and the work in it, in units of [`Job::cost`].
    fn stage(&self, name: &str, work: u64) {
        let _ = (name, work);
    }
    /// That much work of the stage is done; `what` was finished.
    fn advance(&self, work: u64, what: &str) {
        let _ = (work, what);
    }
    /// Asked between jobs; true ends the run with [`Error::Cancelled`]. What is finished is kept.
    fn cancelled(&self) -> bool {
        false
    }
}

/// An observer that looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;
impl Observer for Silent {}

impl Plan<'_> {
    /// Writes the compressed checkpoint to a folder that is new or empty.
    ///
    /// Nothing of the input is touched, and no half-written file carries a final name. A stopped run
    /// (an error, a kill) leaves its finished work in `OUT/.weightpress`; with [`Options::resume`] it
    /// goes on from there and ends in the same bytes as an undisturbed one.
    ///
    /// # Errors
    /// [`Error::Output`] for a folder that cannot be used; [`Error::Io`]; whatever a job meets, with
    /// the name of its tensor.
    pub fn run(&self, out: impl AsRef<Path>, options: &Options, observer: &dyn Observer) -> Result<Report> {
        self.run_on(out, options, observer, &Faer)
    }

    /// The same on another backend.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_on(
        &self,
        out: impl AsRef<Path>,
        options: &Options,
        observer: &dyn Observer,
        backend: &dyn Backend,
    ) -> Result<Report> {
        let out = out.as_ref();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads).build();
        let pool = pool.map_err(|e| Error::Unsupported(format!("{} threads: {e}", options.threads)))?;
        let run = Run {
            plan: self,
            out,
            options,
            observer,
            backend,
            start: Instant::now(),
            threads: pool.current_num_threads(),
        };
        run.prepare()?;
        pool.install(|| run.execute())
    }
}

struct Run<'p, 'c> {
    plan: &'p Plan<'c>,
    out: &'p Path,
    options: &'p Options,
    observer: &'p dyn Observer,
    backend: &'p dyn Backend,
    start: Instant,
    threads: usize,
}

/// A finished shard's part of the report.
#[derive(Serialize, Deserialize)]
struct Finished {
    /// Digests of its jobs, weights and statistics included.
    keys: Vec<String>,
    /// The weights that have a new form in this shard.
    rewritten: Vec<String>,
    reports: Vec<TensorReport>,
    /// Tensor name → file, for the index, of each form.
    names: BTreeMap<String, Vec<String>>,
}

impl Run<'_, '_> {
    fn work(&self) -> PathBuf {
        self.out.join(WORK)
    }

    fn folder(&self, form: &str) -> PathBuf {
        if self.options.emit == Emit::Both { self.out.join(form) } else { self.out.to_owned() }
    }

    /// Identifies a run: a resumed one must be the same.
    fn identity(&self) -> Result<String> {
        let tensors: Vec<_> =
            self.plan.checkpoint.tensors().map(|t| (&t.name, &t.shape, t.dtype.to_string(), t.shard)).collect();
        let text = serde_json::to_string(&(env!("CARGO_PKG_VERSION"), &self.plan.recipe, self.options.emit, tensors));
        let text = text.map_err(|e| Error::Recipe { at: None, detail: e.to_string() })?;
        Ok(blake3::hash(text.as_bytes()).to_hex().to_string())
    }

    fn refuse(&self, detail: impl Into<String>) -> Error {
        Error::Output { path: self.out.to_owned(), detail: detail.into() }
    }

    /// Makes the folder ready, or says why it cannot be used.
    fn prepare(&self) -> Result<()> {
        let identity = self.identity()?;
        if self.out.exists() {
            let (own, input) = (canonical(self.out)?, canonical(self.plan.checkpoint.root())?);
            if own == input {
                return Err(self.refuse("is the input's own folder: choose another"));
            }
            let mut entries = fs::read_dir(self.out).map_err(Error::io(self.out))?;
            let mark = self.work().join("run");
            match (entries.next().is_some(), self.options.resume) {
                (false, _) => {}
                (true, false) if mark.exists() => {
                    return Err(self.refuse("holds a run that was stopped: resume it, or choose an empty folder"));
                }
                (true, false) => return Err(self.refuse("is not empty")),
                (true, true) if self.out.join("report.json").exists() && !mark.exists() => {
                    return Err(self.refuse("holds a finished run: there is nothing to resume"));
                }
                (true, true) => {
                    let known = fs::read_to_string(&mark)
                        .map_err(|_| self.refuse("is not empty and holds no run to resume"))?;
                    if known != identity {
                        return Err(self.refuse(
                            "holds a run of another recipe, version, input or form: it cannot be resumed as this one",
                        ));
                    }
                    return Ok(());
                }
            }
        }
        if let Some(cache) = &self.options.cache {
            fs::create_dir_all(cache).map_err(Error::io(cache))?;
        }
        fs::create_dir_all(self.work()).map_err(Error::io(self.work()))?;
        for form in self.options.emit.forms() {
            fs::create_dir_all(self.folder(form)).map_err(Error::io(self.folder(form)))?;
        }
        write_file_atomic(&self.work().join("run"), identity.as_bytes())
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.observer.cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn execute(&self) -> Result<Report> {
        let forms = self.options.emit.forms();
        let work = self.work();
        let worker = Worker {
            plan: self.plan,
            backend: self.backend,
            folder: &work,
            cache: self.options.cache.as_deref(),
            factored: forms.contains(&"factored"),
            dense: forms.contains(&"dense"),
        };
        let shares = self.shares(&worker)?;
        let shards = self.plan.checkpoint.shards();
        let by_shard = |shard: usize| {
            let jobs = self.plan.jobs.iter().enumerate().filter(move |(_, job)| job.shard == shard);
            let share = |index: usize, job: &Job| match &shares[index] {
                Share::Budget(budget) => Job { budget: *budget, ..job.clone() },
                Share::Kept(why) => Job { kept: Some(why.clone()), ..job.clone() },
            };
            jobs.map(|(index, job)| (index, share(index, job))).collect::<Vec<_>>()
        };
        self.observer.stage("compressing", self.plan.jobs.iter().map(Job::cost).sum());
        let mut finished: Vec<Finished> = Vec::new();
        // Weights that went with their group into the shard of its first weight.
        let mut moved = HashSet::new();
        for (index, shard) in shards.iter().enumerate() {
            let done = self.shard(&worker, shard, by_shard(index), &moved)?;
            moved.extend(done.rewritten.iter().cloned());
            finished.push(done);
        }
        self.finish(finished)
    }

    /// Does the jobs of one shard and writes it, in every form asked for.
    fn shard(
        &self,
        worker: &Worker<'_, '_>,
        shard: &Shard,
        jobs: Vec<(usize, Job)>,
        moved: &HashSet<String>,
    ) -> Result<Finished> {
        let cost: u64 = jobs.iter().map(|(_, job)| job.cost()).sum();
        let note = self.work().join(format!("shard-{}.json", shard.file.replace('/', "_")));
        if let Ok(text) = fs::read(&note)
            && let Ok(known) = serde_json::from_slice::<Finished>(&text)
        {
            if known.keys != jobs.par_iter().map(|(_, job)| worker.key(job)).collect::<Result<Vec<_>>>()? {
                return Err(self.refuse(format!("`{}` was made of other weights or statistics", shard.file)));
            }
            self.observer.advance(cost, &shard.file);
            return Ok(known);
        }
        let units = jobs.par_iter().map(|(index, job)| {
            self.check_cancelled()?;
            let unit = worker.result(*index, job)?;
            self.observer.advance(job.cost(), &job.names[0]);
            Ok((*index, unit))
        });
        let units: BTreeMap<usize, Unit> = units.collect::<Result<_>>()?;
        let keys = units.values().map(|unit| unit.key.clone()).collect();
        let rewritten = units.values().flat_map(|unit| unit.rewritten.clone()).collect();
        let mut finished = Finished { keys, rewritten, reports: Vec::new(), names: BTreeMap::new() };
        for form in self.options.emit.forms() {
            let names = self.write(worker, shard, &units, moved, form)?;
            finished.names.insert((*form).into(), names);
        }
        finished.reports = units.values().flat_map(|unit| unit.reports.clone()).collect();
        let text = serde_json::to_vec(&finished).map_err(|e| self.refuse(e.to_string()))?;
        write_file_atomic(&note, &text)?;
        for index in units.keys() {
            for form in ["factored", "dense", "curve"] {
                let _ = fs::remove_file(worker.path(*index, form));
            }
        }
        Ok(finished)
    }

    /// Writes one shard in one form; returns the names of its tensors.
    fn write(
        &self,
        worker: &Worker<'_, '_>,
        shard: &Shard,
        units: &BTreeMap<usize, Unit>,
        moved: &HashSet<String>,
        form: &str,
    ) -> Result<Vec<String>> {
        let mut entries = Vec::new();
        for &index in units.keys() {
            let file = Checkpoint::open(worker.path(index, form))?;
            for tensor in file.tensors() {
                entries.push(file.entry(&tensor.name)?);
            }
        }
        let gone = |name: &String| moved.contains(name) || units.values().any(|unit| unit.rewritten.contains(name));
        for tensor in shard.tensors.iter().filter(|t| !gone(&t.name)) {
            entries.push(self.plan.checkpoint.entry(&tensor.name)?);
        }
        let replaced: BTreeMap<String, Tree> = units.values().flat_map(|unit| unit.trees.clone()).collect();
        let mut metadata = shard.metadata.clone();
        if form == "factored" && !replaced.is_empty() {
            let recipe = blake3::hash(self.plan.recipe.to_toml()?.as_bytes()).to_hex().to_string();
            let header =
                Header { format: FORMAT_VERSION, version: env!("CARGO_PKG_VERSION").into(), recipe, weights: replaced };
            metadata
                .insert(METADATA_KEY.into(), serde_json::to_string(&header).map_err(|e| self.refuse(e.to_string()))?);
        }
        let names = entries.iter().map(|e| e.name.clone()).collect();
        let path = self.folder(form).join(&shard.file);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        write_shard(&path, &metadata, entries)?;
        Ok(names)
    }

    /// Index, side files, recipe, and last of all the report: its presence says that all is there.
    fn finish(&self, finished: Vec<Finished>) -> Result<Report> {
        let shards = self.plan.checkpoint.shards();
        let tensors: Vec<TensorReport> = finished.iter().flat_map(|f| f.reports.clone()).collect();
        let matched: usize = tensors.len();
        let mut report = Report {
            version: env!("CARGO_PKG_VERSION").into(),
            tensors,
            copied: self.plan.checkpoint.tensors().count() - matched,
            file_bytes_before: self.plan.checkpoint.file_bytes(),
            file_bytes_after: 0,
            seconds: self.start.elapsed().as_secs_f64(),
            threads: self.threads,
        };
        for form in self.options.emit.forms() {
            let folder = self.folder(form);
            if self.plan.checkpoint.has_index() || shards.len() > 1 {
                let pairs = finished.iter().zip(shards).flat_map(|(f, shard)| {
                    f.names.get(*form).into_iter().flatten().map(|name| (name.clone(), shard.file.clone()))
                });
                write_index(&folder, self.plan.checkpoint.index_metadata(), &pairs.collect())?;
            }
            for file in self.plan.checkpoint.side_files()? {
                if let Some(name) = file.file_name() {
                    copy_file_atomic(&file, &folder.join(name))?;
                }
            }
            write_file_atomic(&folder.join("recipe.toml"), self.plan.recipe.to_toml()?.as_bytes())?;
            let sizes =
                shards.iter().map(|s| fs::metadata(folder.join(&s.file)).map_err(Error::io(folder.join(&s.file))));
            report.file_bytes_after = sizes.collect::<Result<Vec<_>>>()?.iter().map(fs::Metadata::len).sum();
            let text = serde_json::to_vec_pretty(&report).map_err(|e| self.refuse(e.to_string()))?;
            write_file_atomic(&folder.join("report.json"), &text)?;
        }
        fs::remove_dir_all(self.work()).map_err(Error::io(self.work()))?;
        Ok(report)
    }
}

fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(Error::io(path))
}
