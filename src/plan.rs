//! A recipe held against a checkpoint: every job, size and refusal, before any work.

use std::collections::BTreeMap;
use std::fmt;

use crate::allocate::Allocate;
use crate::budget::Budget;
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::error::{Error, Result};
use crate::factorize::{Factorize, Forecast, Outline};
use crate::recipe::{OnError, Recipe, Rule, whole};
use crate::report::human_bytes;
use crate::stats::Stats;

/// A group of weights that is compressed together, mostly a group of one.
#[derive(Debug, Clone)]
pub struct Job {
    /// Position of its rule in the recipe.
    pub rule: usize,
    /// The weights' names.
    pub names: Vec<String>,
    /// Their shapes and dtypes.
    pub outlines: Vec<Outline>,
    /// The group's budget; under a global allocation, a guess until the curves are measured.
    pub budget: Budget,
    /// What it will take.
    pub forecast: Forecast,
    /// The shard that the results go into: that of the first weight.
    pub shard: usize,
    /// Why the group stays dense, if that is known already.
    pub kept: Option<String>,
}

impl Job {
    /// Bytes of the group before.
    pub fn bytes(&self) -> u64 {
        self.outlines.iter().map(Outline::bytes).sum()
    }
    /// Rough work, in multiply-adds: for progress bars and to start with the longest.
    pub fn cost(&self) -> u64 {
        self.outlines.iter().map(|o| (o.shape.0 * o.shape.1 * o.shape.0.min(o.shape.1)) as u64).sum()
    }
}

/// What will be done. Printing it is the dry run; [`run`](Plan::run) does it.
#[derive(Debug)]
pub struct Plan<'c> {
    pub(crate) checkpoint: &'c Checkpoint,
    pub(crate) stats: &'c Stats,
    /// The recipe.
    pub recipe: Recipe,
    /// What will be compressed, in the order of the checkpoint.
    pub jobs: Vec<Job>,
    /// Tensors that match a rule but are carried through, with the reason.
    pub passed: Vec<(String, String)>,
}

impl Recipe {
    /// Holds the recipe against a checkpoint and its statistics.
    ///
    /// # Errors
    /// [`Error::Recipe`] for a rule that matches nothing; [`Error::MissingStats`] with all missing keys;
    /// [`Error::Refused`] with all weights that cannot be compressed as asked.
    pub fn plan<'c>(&self, checkpoint: &'c Checkpoint, stats: &'c Stats) -> Result<Plan<'c>> {
        self.check()?;
        let mut planner =
            Planner { recipe: self, checkpoint, stats, refused: Vec::new(), missing: Vec::new(), passed: Vec::new() };
        let mut jobs = Vec::new();
        for (rule, members) in planner.groups(checkpoint)? {
            jobs.extend(planner.job(rule, &members));
        }
        if !planner.missing.is_empty() {
            return Err(Error::MissingStats { missing: planner.missing });
        }
        if !planner.refused.is_empty() {
            return Err(Error::Refused(planner.refused));
        }
        Ok(Plan { checkpoint, stats, recipe: self.clone(), jobs, passed: planner.passed })
    }
}

struct Planner<'a> {
    recipe: &'a Recipe,
    checkpoint: &'a Checkpoint,
    stats: &'a Stats,
    refused: Vec<(String, String)>,
    missing: Vec<String>,
    passed: Vec<(String, String)>,
}

impl Planner<'_> {
    /// The matched matrices, grouped, in the order of the checkpoint.
    fn groups<'c>(&mut self, checkpoint: &'c Checkpoint) -> Result<Vec<(usize, Vec<&'c TensorInfo>)>> {
        let exclude = self.recipe.exclude.iter().map(|p| whole(p)).collect::<Result<Vec<_>>>()?;
        let patterns = self.recipe.rules.iter().map(|r| whole(&r.pattern)).collect::<Result<Vec<_>>>()?;
        let mut matched = vec![false; patterns.len()];
        let mut order: Vec<(usize, Vec<&TensorInfo>)> = Vec::new();
        let mut known: BTreeMap<(usize, String), usize> = BTreeMap::new();
        for tensor in checkpoint.tensors() {
            if exclude.iter().any(|p| p.is_match(&tensor.name)) {
                continue;
            }
            let found = patterns.iter().zip(&self.recipe.rules).enumerate();
            let Some((index, (pattern, rule))) = found.into_iter().find(|(_, (p, _))| p.is_match(&tensor.name)) else {
                continue;
            };
            matched[index] = true;
            if tensor.shape.len() != 2 || !tensor.dtype.is_float() || tensor.bytes == 0 {
                self.passed
                    .push((tensor.name.clone(), format!("{} {:?} is no matrix of floats", tensor.dtype, tensor.shape)));
                continue;
            }
            let key = match (&rule.group, pattern.captures(&tensor.name)) {
                (Some(template), Some(captures)) => {
                    let mut key = String::new();
                    captures.expand(template, &mut key);
                    key
                }
                _ => tensor.name.clone(),
            };
            let at = *known.entry((index, key)).or_insert_with(|| {
                order.push((index, Vec::new()));
                order.len() - 1
            });
            order[at].1.push(tensor);
        }
        match matched.iter().position(|m| !m) {
            Some(index) => {
                let pattern = &self.recipe.rules[index].pattern;
                Err(Error::Recipe {
                    at: None,
                    detail: format!("rule {}: no tensor is left for `{pattern}`", index + 1),
                })
            }
            None => Ok(order),
        }
    }

    fn job(&mut self, rule_index: usize, members: &[&TensorInfo]) -> Option<Job> {
        let rule = &self.recipe.rules[rule_index];
        let names: Vec<String> = members.iter().map(|t| t.name.clone()).collect();
        let outlines: Vec<Outline> =
            members.iter().map(|t| Outline { shape: (t.shape[0], t.shape[1]), dtype: t.dtype }).collect();
        let missing = names.iter().flat_map(|name| {
            let absent = rule.metric.needs().into_iter().filter(|&kind| !self.stats.has(name, kind));
            absent.map(|kind| kind.key(name)).collect::<Vec<_>>()
        });
        let before = self.missing.len();
        let missing: Vec<String> = missing.collect();
        self.missing.extend(missing);
        if self.missing.len() > before {
            return None;
        }
        let origins = names.iter().try_for_each(|name| match rule.metric.needs().is_empty() {
            true => Ok(()),
            false => self.stats.check_origin(name, self.checkpoint.get(name)?),
        });
        let result = origins.map_err(|e| e.to_string()).and_then(|()| self.forecast(rule, &names, &outlines));
        let bytes = outlines.iter().map(Outline::bytes).sum();
        let (forecast, kept) = match (result, rule.on_error) {
            (Ok(forecast), _) => (forecast, None),
            (Err(why), OnError::KeepDense) => (Forecast { bytes, exact: true, memory: 0 }, Some(why)),
            (Err(why), OnError::Fail) => {
                self.refused.push((names.join(", "), why));
                return None;
            }
        };
        let shard = members.first().map_or(0, |t| t.shard);
        Some(Job { rule: rule_index, names, outlines, budget: rule.budget, forecast, shard, kept })
    }

    fn forecast(&self, rule: &Rule, names: &[String], outlines: &[Outline]) -> Result<Forecast, String> {
        for (name, outline) in names.iter().zip(outlines) {
            self.stats.check_shape(name, outline.shape).map_err(|e| e.to_string())?;
        }
        if outlines.iter().any(|o| o.dtype != outlines[0].dtype) {
            return Err("a group has one dtype".into());
        }
        if rule.allocate != Allocate::Uniform && !Factorize::<f32>::has_curve(&rule.method) {
            return Err(format!("`{}` in this form has no error curve: use a uniform allocation", rule.method.name()));
        }
        // Under a global allocation the rule's bytes are for all weights; the share of each comes later.
        let budget = match (rule.allocate, rule.budget) {
            (Allocate::Global(_), Budget::Bytes(_)) => Budget::Keep(1.0),
            (_, budget) => budget,
        };
        Factorize::<f32>::forecast(&rule.method, outlines, &rule.metric, &budget).map_err(|e| e.to_string())
    }
}

impl Plan<'_> {
    /// Bytes of the matched weights before and after; an upper bound where a job is not exact.
    pub fn bytes(&self) -> (u64, u64) {
        (self.jobs.iter().map(Job::bytes).sum(), self.jobs.iter().map(|job| job.forecast.bytes).sum())
    }

    /// Peak working memory with that many jobs at a time, in bytes: the largest jobs together and
    /// the writer's buffer. Mapped files are not in it: the system takes those pages back at will.
    pub fn memory(&self, threads: usize) -> u64 {
        let mut each: Vec<u64> = self.jobs.iter().map(|job| job.forecast.memory).collect();
        each.sort_unstable_by(|a, b| b.cmp(a));
        each.iter().take(threads.max(1)).sum::<u64>() + (32 << 20)
    }
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.jobs.iter().flat_map(|job| &job.names).map(String::len).max().unwrap_or(6).max(6);
        writeln!(
            f,
            "{:width$}  {:>11} {:>10} {:>11}  {:<8} {:<12} budget",
            "tensor", "shape", "before", "after", "method", "metric"
        )?;
        for job in &self.jobs {
            let rule = &self.recipe.rules[job.rule];
            for (index, (name, outline)) in job.names.iter().zip(&job.outlines).enumerate() {
                let after = match index {
                    0 => format!("{}{}", if job.forecast.exact { "" } else { "<= " }, human_bytes(job.forecast.bytes)),
                    _ => "with above".into(),
                };
                let shape = format!("{}x{}", outline.shape.0, outline.shape.1);
                let budget = match (&job.kept, rule.allocate) {
                    (Some(why), _) => format!("kept dense: {why}"),
                    (None, Allocate::Uniform) => job.budget.to_string(),
                    (None, Allocate::Global(_)) => format!("{} over rule {}", job.budget, job.rule + 1),
                };
                writeln!(
                    f,
                    "{name:width$}  {shape:>11} {:>10} {after:>11}  {:<8} {:<12} {budget}",
                    human_bytes(outline.bytes()),
                    rule.method.name(),
                    rule.metric.to_string(),
                )?;
            }
        }
        for (name, why) in &self.passed {
            writeln!(f, "{name:width$}  copied: {why}")?;
        }
        let (before, after) = self.bytes();
        let exact = self.jobs.iter().all(|job| job.forecast.exact);
        write!(
            f,
            "{} weights in {} jobs: {} -> {}{} ({:.3}), peak memory about {} a thread",
            self.jobs.iter().map(|job| job.names.len()).sum::<usize>(),
            self.jobs.len(),
            human_bytes(before),
            if exact { "" } else { "at most " },
            human_bytes(after),
            after as f64 / before.max(1) as f64,
            human_bytes(self.memory(1)),
        )
    }
}
