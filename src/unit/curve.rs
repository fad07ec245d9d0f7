//! Measured error curves, kept as files: between the passes of a run, and between runs if there is a cache.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{Worker, metadata, read};
use crate::allocate::{Errors, Global};
use crate::checkpoint::{Checkpoint, Entry, Payload, write_shard};
use crate::error::{Error, Result};
use crate::factorize::{Decomposition, Factorize, Point};
use crate::metric::{MetricSpec, OutputMetric};
use crate::operator::Operator;
use crate::operator::codec::{Decoder, Encoder, Node};
use crate::plan::Job;
use crate::scalar::{DType, Real, narrow};
use crate::tensor::Tensor;

/// A measured curve, kept between the two passes of a global allocation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Curve {
    key: String,
    pub norm_squared: f64,
    pub points: Vec<Point>,
    seconds: f64,
    notes: Vec<String>,
    /// The trees of the choices that are solved already, by number.
    #[serde(default)]
    solved: BTreeMap<usize, Vec<Node>>,
}

impl Curve {
    /// The points that an allocation may choose from, with errors that can be compared with those of
    /// others, times a sensitivity: nothing at all only if that is no loss, dense only if the rule has it.
    pub(crate) fn choices(&self, global: &Global, metric: &MetricSpec, sensitivity: f64) -> Vec<Point> {
        let first = usize::from(self.points.first().is_some_and(|p| p.error > 0.0));
        let last = self.points.len() - usize::from(!global.dense && self.points.len() > first + 1);
        let scale = match global.errors {
            Errors::Absolute => 1.0,
            Errors::Auto if metric.output == OutputMetric::Fisher => 1.0,
            Errors::Auto | Errors::Relative => 1.0 / self.norm_squared.max(f64::MIN_POSITIVE),
        };
        let weighed = |p: &Point| Point { bytes: p.bytes, error: sensitivity * (p.error * scale).powf(global.power) };
        self.points[first..last].iter().map(weighed).collect()
    }
}

impl Worker<'_, '_> {
    /// The error curve of a job, measured or read back.
    pub(crate) fn curve(&self, index: usize) -> Result<Curve> {
        let job = &self.plan.jobs[index];
        let (key, path) = self.place(index, job)?;
        if let Some(known) = read::<Curve>(&path, |curve: &Curve| curve.key == key)? {
            return Ok(known);
        }
        match job.outlines[0].dtype {
            DType::F64 => self.measure::<f64>(job, key, &path),
            _ => self.measure::<f32>(job, key, &path),
        }
    }

    /// A curve serves every budget: its digest, and its file.
    fn place(&self, index: usize, job: &Job) -> Result<(String, PathBuf)> {
        let key = self.digest(job, None)?;
        let path = match self.cache {
            Some(folder) => folder.join(format!("{key}.safetensors")),
            None => self.path(index, "curve"),
        };
        Ok((key, path))
    }

    fn measure<T: Real>(&self, job: &Job, key: String, path: &Path) -> Result<Curve> {
        let start = Instant::now();
        let method = &self.plan.recipe.rules[job.rule].method;
        let decomposition = self.with_group::<T, _>(job, |group| method.decompose(group))?.ok_or_else(|| {
            Error::Unsupported(format!("method `{}` has no error curve: use a uniform allocation", method.name()))
        })?;
        let state = decomposition.state.iter().enumerate().map(|(i, array)| {
            let bytes = narrow(T::DTYPE, array.iter())?;
            let shape = vec![array.nrows(), array.ncols()];
            Ok(Entry { name: format!("{STATE}{i:03}"), dtype: T::DTYPE, shape, data: Payload::Bytes(bytes.into()) })
        });
        let mut entries = state.collect::<Result<Vec<_>>>()?;
        let Decomposition { norm_squared, curve: points, notes, solved: operators, .. } = decomposition;
        let mut solved = BTreeMap::new();
        for (choice, operators) in operators.iter().enumerate() {
            // An encoder for each: parts are shared within a choice only.
            let mut encoder = Encoder::new();
            let Some(operators) = operators else { continue };
            let trees = operators.iter().enumerate().map(|(i, o)| encoder.encode(&format!("{choice}.{i}"), o));
            solved.insert(choice, trees.collect::<Result<Vec<_>>>()?);
            let entry = |t: crate::operator::codec::NamedTensor| Entry {
                name: t.name,
                dtype: t.dtype,
                shape: t.shape,
                data: Payload::Bytes(t.bytes.into()),
            };
            entries.extend(encoder.into_tensors().into_iter().map(entry));
        }
        let curve = Curve { key, norm_squared, points, seconds: start.elapsed().as_secs_f64(), notes, solved };
        write_shard(path, &metadata(&curve)?, entries)?;
        Ok(curve)
    }

    /// A decomposition that was measured before.
    pub(super) fn cached<T: Real>(&self, index: usize, job: &Job) -> Result<Option<Decomposition<T>>> {
        let (key, path) = self.place(index, job)?;
        let Some(known) = read(&path, |curve: &Curve| curve.key == key)? else { return Ok(None) };
        let Curve { norm_squared, points: curve, notes, solved: trees, .. } = known;
        let file = Checkpoint::open(&path)?;
        let mut names: Vec<&str> = file.tensors().map(|t| t.name.as_str()).filter(|n| n.starts_with(STATE)).collect();
        names.sort_unstable();
        let state = names.iter().map(|name| Ok(file.get(name)?.matrix::<T>()?.into_owned())).collect::<Result<_>>()?;
        let mut solved: Vec<Option<Vec<Operator<T>>>> = vec![None; if trees.is_empty() { 0 } else { curve.len() }];
        for (choice, trees) in trees {
            let mut decoder = Decoder::new(&file);
            if let Some(place) = solved.get_mut(choice) {
                *place = Some(trees.iter().map(|tree| decoder.decode(tree)).collect::<Result<_>>()?);
            }
        }
        Ok(Some(Decomposition { norm_squared, curve, state, notes, solved }))
    }
}

/// What the names of state matrices begin with.
const STATE: &str = "state.";
