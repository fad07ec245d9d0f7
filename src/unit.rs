//! One job of a plan, done once and kept as a file: a run that was stopped takes it from there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use ndarray::Array2;
use serde::{Deserialize, Serialize};

use crate::budget::Budget;
use crate::checkpoint::{Checkpoint, Entry, Payload, write_shard};
use crate::error::{Error, Result};
use crate::factorize::{Decomposition, Factorize, InParts, Method, Problem};
use crate::linalg::Backend;
use crate::linalg::pages;
use crate::metric::Metric;
use crate::operator::codec::{Encoder, Tree};
use crate::operator::{Dense, LinearOperator, Operator};
use crate::plan::{Job, Plan};
use crate::report::TensorReport;
use crate::scalar::{DType, Real, narrow};
use crate::stats::Kind;
use crate::tensor::{Rows, Source};

mod curve;

pub(crate) use self::curve::Curve;

/// What a unit file says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Unit {
    /// Digest of everything that the result depends on.
    pub key: String,
    /// The weights that have a new form in this file; the others of the job keep their bytes.
    pub rewritten: Vec<String>,
    /// The trees of the factored form.
    pub trees: BTreeMap<String, Tree>,
    /// The outcome.
    pub reports: Vec<TensorReport>,
}

/// The metadata key of unit files and cached curves.
const UNIT: &str = "unit";

/// A job with the folder that its files are kept in.
pub(crate) struct Worker<'p, 'c> {
    pub plan: &'p Plan<'c>,
    pub backend: &'p dyn Backend,
    pub folder: &'p Path,
    /// Where profiles outlive a run.
    pub cache: Option<&'p Path>,
    pub factored: bool,
    pub dense: bool,
}

fn no_thread(why: &dyn std::error::Error) -> Error {
    Error::Unsupported(format!("one more thread: {why}; allow the process more, or ask for fewer at a time"))
}

/// Runs something large on a thread of its own: what matrix products keep for each thread, up to two last-level caches, is
/// given back at its end, and so is what was freed.
fn on_its_own<R: Send>(work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = pool.map_err(|e| no_thread(&e))?;
    // Waiting for the pool from a worker of another would begin that one's next job meanwhile.
    let done = std::thread::scope(|scope| {
        let spawned = std::thread::Builder::new().spawn_scoped(scope, || pool.install(work));
        spawned.map(|thread| thread.join()).map_err(|e| no_thread(&e))
    });
    drop(pool);
    pages::give_back();
    done?.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl Worker<'_, '_> {
    /// The file of a job's result in one of the two forms.
    pub(crate) fn path(&self, job: usize, form: &str) -> PathBuf {
        self.folder.join(format!("{job:05}.{form}.safetensors"))
    }

    /// Digest of a job: crate version, method, metric, budget, seed, names, weights, statistics.
    pub(crate) fn key(&self, job: &Job) -> Result<String> {
        self.digest(job, Some(&job.budget))
    }

    /// The same for any budget, if there is none.
    fn digest(&self, job: &Job, budget: Option<&Budget>) -> Result<String> {
        let rule = &self.plan.recipe.rules[job.rule];
        let mut hash = blake3::Hasher::new();
        let text = serde_json::to_string(&(
            env!("CARGO_PKG_VERSION"),
            &rule.method,
            &rule.metric,
            budget,
            self.plan.recipe.seed,
        ))
        .map_err(|e| Error::Recipe { at: None, detail: e.to_string() })?;
        hash.update(text.as_bytes());
        for name in &job.names {
            let stored = self.plan.checkpoint.get(name)?;
            hash.update(format!("{name} {:?} {}", stored.shape, stored.dtype).as_bytes());
            hash.update(stored.bytes);
            self.plan.checkpoint.release(name);
            hash.update(&self.plan.stats.digest(name));
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    /// The result of a job, computed or read back.
    pub(crate) fn result(&self, index: usize, job: &Job) -> Result<Unit> {
        let key = self.key(job)?;
        let forms = [("factored", self.factored), ("dense", self.dense)];
        let mut known = None;
        for (form, wanted) in forms {
            if wanted {
                known = read::<Unit>(&self.path(index, form), |unit: &Unit| unit.key == key)?;
                if known.is_none() {
                    break;
                }
            }
        }
        if let Some(unit) = known {
            return Ok(unit);
        }
        let unit = match job.outlines[0].dtype {
            DType::F64 => self.compute::<f64>(index, job, key),
            _ => self.compute::<f32>(index, job, key),
        };
        unit.map_err(|e| e.of_tensor(job.names.join(", ")))
    }

    fn compute<T: Real>(&self, index: usize, job: &Job, key: String) -> Result<Unit> {
        let start = Instant::now();
        let rule = &self.plan.recipe.rules[job.rule];
        let mut unit = Unit { key, rewritten: Vec::new(), trees: BTreeMap::new(), reports: Vec::new() };
        let large = Factorize::<T>::takes_parts(&rule.method);
        let solved = match &job.kept {
            Some(why) => Err(Error::Unsupported(why.clone())),
            None if large => self.with_parts::<T, _>(job, |group| {
                let mut notes = Vec::new();
                let operators = on_its_own(|| rule.method.factorize_parts(group, &mut notes))?;
                let each = start.elapsed().as_secs_f64() / group.len() as f64;
                let reports = group.iter().zip(&operators).map(|(part, operator)| {
                    // The weight is read when nothing else is needed beside it.
                    let formed = operator.to_dense();
                    let weight = part.weight.rows(0..part.shape().0);
                    self.report(job, &part.whole(weight.view()), operator, formed, each)
                });
                Ok((noted(reports.collect::<Result<_>>()?, notes), operators))
            }),
            None => self.with_group::<T, _>(job, |group| {
                let (operators, notes) = self.solve(index, job, group)?;
                let each = start.elapsed().as_secs_f64() / group.len() as f64;
                let reports = group.iter().zip(&operators).map(|(p, o)| self.report(job, p, o, o.to_dense(), each));
                Ok((noted(reports.collect::<Result<_>>()?, notes), operators))
            }),
        };
        let (mut encoder, mut left) = (Encoder::new(), Vec::new());
        match solved {
            Ok((reports, operators)) => {
                unit.reports = reports;
                for (index, report) in unit.reports.iter_mut().enumerate() {
                    let (with, without) = (operators.get(..=index), operators.get(..index));
                    let bytes = |part: Option<&[Operator<T>]>| part.map_or(0, Operator::total_bytes);
                    report.bytes_after = bytes(with) - bytes(without);
                }
                for ((name, outline), operator) in job.names.iter().zip(&job.outlines).zip(operators) {
                    if matches!(&operator, Operator::Dense(leaf) if leaf.dtype() == outline.dtype) {
                        continue;
                    }
                    unit.rewritten.push(name.clone());
                    if self.factored {
                        let operator = encoder.encode(name, &operator)?;
                        let tree = Tree { shape: outline.shape, dtype: outline.dtype.to_string(), operator };
                        unit.trees.insert(name.clone(), tree);
                    }
                    // Else what is encoded is not needed any more.
                    match self.dense {
                        true => left.push((name, outline, operator)),
                        false if large => {
                            drop(operator);
                            pages::give_back();
                        }
                        false => {}
                    }
                }
            }
            Err(why) if rule.may_keep(&why) => {
                let why = job.kept.clone().unwrap_or_else(|| why.to_string());
                let each = job.names.iter().zip(&job.outlines);
                unit.reports = each
                    .map(|(name, outline)| TensorReport {
                        name: name.clone(),
                        shape: outline.shape,
                        dtype: outline.dtype.to_string(),
                        method: rule.method.name().into(),
                        metric: rule.metric.to_string(),
                        kept_dense: Some(why.clone()),
                        structure: "dense".into(),
                        bytes_before: outline.bytes(),
                        bytes_after: outline.bytes(),
                        params: outline.shape.0 * outline.shape.1,
                        flops_ratio: 1.0,
                        error: 0.0,
                        metric_error: 0.0,
                        output_error: None,
                        seconds: start.elapsed().as_secs_f64() / job.names.len() as f64,
                        notes: Vec::new(),
                    })
                    .collect();
            }
            Err(why) => return Err(why),
        }
        let entry = |name: &str, dtype: DType, shape: Vec<usize>, data| Entry { name: name.into(), dtype, shape, data };
        if self.factored {
            let entries = encoder.into_tensors().into_iter();
            let entries = entries.map(|t| entry(&t.name, t.dtype, t.shape, Payload::Bytes(t.bytes.into())));
            write_shard(&self.path(index, "factored"), &metadata(&unit)?, entries.collect())?;
        }
        if self.dense {
            // One is formed at a time.
            let entries = left.iter().map(|(name, outline, operator)| {
                let make = || narrow(outline.dtype, operator.to_dense().iter());
                let (len, shape) = (outline.bytes(), vec![outline.shape.0, outline.shape.1]);
                entry(name, outline.dtype, shape, Payload::Made { len, make: Arc::new(make) })
            });
            write_shard(&self.path(index, "dense"), &metadata(&unit)?, entries.collect())?;
        }
        Ok(unit)
    }

    /// From the cached decomposition if there is one, else from scratch; with the notes of the solution.
    fn solve<T: Real>(
        &self,
        index: usize,
        job: &Job,
        group: &[Problem<'_, T>],
    ) -> Result<(Vec<Operator<T>>, Vec<String>)> {
        let method = &self.plan.recipe.rules[job.rule].method;
        let decomposition = match self.cached(index, job)? {
            Some(cached) => Some(cached),
            None if self.cache.is_some() && Factorize::<T>::has_curve(method) => {
                self.curve(index)?;
                self.cached(index, job)?
            }
            // A limit in bytes needs no curve: some methods solve a single choice for less.
            None if job.budget.byte_limit(job.bytes()).is_some() => None,
            None => method.decompose(group)?,
        };
        match decomposition {
            Some(found) => Ok((within_error(method, group, &found)?, found.notes)),
            None => {
                let mut notes = Vec::new();
                Ok((method.factorize_noting(group, &mut notes)?, notes))
            }
        }
    }

    /// Builds the problems of a job and hands them over.
    pub(crate) fn with_group<T: Real, R>(
        &self,
        job: &Job,
        run: impl FnOnce(&[Problem<'_, T>]) -> Result<R>,
    ) -> Result<R> {
        self.with_parts(job, |parts| {
            let weights: Vec<_> = parts.iter().map(|part| part.weight.rows(0..part.shape().0)).collect();
            let problems: Vec<_> = parts.iter().zip(&weights).map(|(part, weight)| part.whole(weight.view())).collect();
            run(&problems)
        })
    }

    /// The same, of weights that are read when they are needed.
    fn with_parts<T: Real, R>(&self, job: &Job, run: impl FnOnce(&[InParts<'_, T>]) -> Result<R>) -> Result<R> {
        let (rule, checkpoint) = (&self.plan.recipe.rules[job.rule], self.plan.checkpoint);
        let mut weights = Vec::with_capacity(job.names.len());
        for name in &job.names {
            weights.push(Rows::new(checkpoint.get(name)?, move || checkpoint.release(name))?);
        }
        let mut parts = Vec::with_capacity(weights.len());
        for ((name, outline), weight) in job.names.iter().zip(&job.outlines).zip(&weights) {
            parts.push(InParts {
                name,
                weight: weight as &dyn Source<T>,
                dtype: outline.dtype,
                metric: rule.metric.resolve(name, self.plan.stats)?,
                budget: job.budget,
                seed: seed(self.plan.recipe.seed, &job.names[0]),
                backend: self.backend,
            });
        }
        run(&parts)
    }

    /// What a report says of a weight and its operator, of which `delta` is the dense form.
    fn report<T: Real>(
        &self,
        job: &Job,
        problem: &Problem<'_, T>,
        operator: &Operator<T>,
        mut delta: Array2<T>,
        seconds: f64,
    ) -> Result<TensorReport> {
        let rule = &self.plan.recipe.rules[job.rule];
        delta.zip_mut_with(&problem.weight, |o, &w| *o = w - *o);
        let relative = |metric: &Metric| {
            let norm = metric.norm_squared(problem.weight, self.backend);
            let error = metric.squared(delta.view(), self.backend).max(0.0);
            if error == 0.0 { 0.0 } else { (error / norm.max(f64::MIN_POSITIVE)).sqrt() }
        };
        let metric_error = relative(&problem.metric);
        let output_error = match self.plan.stats.has(problem.name, Kind::Gram) {
            true if rule.metric.is_gram() => Some(metric_error),
            true => Some(relative(&Metric::gram(self.plan.stats.gram(problem.name)?))),
            false => None,
        };
        let kept = matches!(operator, Operator::Dense(leaf) if leaf.dtype() == problem.dtype);
        let (m, n) = problem.shape();
        Ok(TensorReport {
            name: problem.name.into(),
            shape: (m, n),
            dtype: problem.dtype.to_string(),
            method: rule.method.name().into(),
            metric: rule.metric.to_string(),
            kept_dense: kept.then(|| "the budget allows it".into()),
            structure: operator.to_string(),
            bytes_before: problem.bytes(),
            bytes_after: operator.bytes(),
            params: operator.params(),
            flops_ratio: operator.flops(1) as f64 / (2 * m * n).max(1) as f64,
            error: relative(&Metric::frobenius()),
            metric_error,
            output_error,
            seconds,
            notes: Vec::new(),
        })
    }
}

/// Cuts at the group's budget; where rounding to the stored dtype pushes the error over the budget's
/// limit, cuts again with that much less room, and keeps the weights as they are if nothing else helps.
fn within_error<T: Real>(
    method: &Method,
    group: &[Problem<'_, T>],
    found: &Decomposition<T>,
) -> Result<Vec<Operator<T>>> {
    const TRIES: usize = 6;
    let Some(limit) = group.first().and_then(|p| p.budget.error_limit(found.norm_squared)) else {
        return method.assemble(group, found);
    };
    let mut room = limit;
    for _ in 0..TRIES {
        let budget = Budget::Error((room / found.norm_squared.max(f64::MIN_POSITIVE)).sqrt().min(1.0));
        let tighter: Vec<_> = group.iter().map(|p| Problem { budget, ..p.clone() }).collect();
        let operators = method.assemble(&tighter, found)?;
        let errors = group.iter().zip(&operators).map(|(p, o)| {
            let delta = &p.weight - &o.to_dense();
            p.metric.squared(delta.view(), p.backend)
        });
        let error: f64 = errors.sum();
        if error <= limit * (1.0 + 1e-9) {
            return Ok(operators);
        }
        room = (room - 1.5 * (error - limit)).max(0.0);
    }
    group.iter().map(|p| Ok(Operator::Dense(Dense::rounded(p.weight.to_owned(), p.dtype)?))).collect()
}

/// What is to be said of a group goes to its first weight.
fn noted(mut reports: Vec<TensorReport>, notes: Vec<String>) -> Vec<TensorReport> {
    if let Some(first) = reports.first_mut() {
        first.notes = notes;
    }
    reports
}

/// Each group draws from its own stream, so that no group depends on the order of the others.
fn seed(recipe: u64, name: &str) -> u64 {
    let digest = blake3::hash(format!("{recipe} {name}").as_bytes());
    let (first, _) = digest.as_bytes().split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
    u64::from_le_bytes(*first)
}

fn metadata<M: Serialize>(value: &M) -> Result<BTreeMap<String, String>> {
    let text = serde_json::to_string(value).map_err(|e| Error::Unsupported(e.to_string()))?;
    Ok(BTreeMap::from([(UNIT.to_owned(), text)]))
}

/// A kept file's description, if the file is there, sound and the wanted one; anything else is done anew.
fn read<M: for<'de> Deserialize<'de>>(path: &Path, wanted: impl Fn(&M) -> bool) -> Result<Option<M>> {
    if !path.exists() {
        return Ok(None);
    }
    let Ok(file) = Checkpoint::open(path) else { return Ok(None) };
    let text = file.shards().first().and_then(|shard| shard.metadata.get(UNIT));
    let value = text.and_then(|text| serde_json::from_str::<M>(text).ok());
    Ok(value.filter(wanted))
}
