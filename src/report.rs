//! What was saved and what was lost, measured the same way for every method.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One weight's outcome.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorReport {
    /// The tensor's name.
    pub name: String,
    /// (m, n).
    pub shape: (usize, usize),
    /// Stored dtype before (and of the factors).
    pub dtype: String,
    /// The method that was asked for.
    pub method: String,
    /// The metric that was minimised.
    pub metric: String,
    /// Why the weight was kept as it was, if it was.
    pub kept_dense: Option<String>,
    /// The shape of the result in a few words, e.g. `rank 212`.
    pub structure: String,
    /// Bytes on disk before.
    pub bytes_before: u64,
    /// Bytes on disk after, everything counted; parts shared by a group are counted with its first weight.
    pub bytes_after: u64,
    /// Numbers that carry values, after.
    pub params: usize,
    /// Multiply-adds ×2 of one product with a vector, after ÷ before.
    pub flops_ratio: f64,
    /// ‖W − Ŵ‖ ÷ ‖W‖, Frobenius.
    pub error: f64,
    /// The same in the metric that was minimised.
    pub metric_error: f64,
    /// The same in the Gram metric, where the statistics have one: the relative error of the outputs.
    pub output_error: Option<f64>,
    /// Computing time of the weight's group, shared evenly among its weights.
    pub seconds: f64,
    /// What else a reader should know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The outcome of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this crate.
    pub version: String,
    /// Every matched weight, in the order of the checkpoint.
    pub tensors: Vec<TensorReport>,
    /// Tensors that were carried through byte for byte.
    pub copied: usize,
    /// Size of the weight files before, in bytes.
    pub file_bytes_before: u64,
    /// Size of the weight files written, in bytes.
    pub file_bytes_after: u64,
    /// Wall-clock seconds of the run (of the last part, if it was resumed).
    pub seconds: f64,
    /// Threads that computed.
    pub threads: usize,
}

impl Report {
    /// Bytes of the matched weights before.
    pub fn bytes_before(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes_before).sum()
    }
    /// Bytes of the matched weights after.
    pub fn bytes_after(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes_after).sum()
    }
    /// Bytes of the matched weights after ÷ before.
    pub fn keep(&self) -> f64 {
        self.bytes_after() as f64 / self.bytes_before().max(1) as f64
    }
    /// Mean of a figure over the matched weights.
    pub fn mean(&self, figure: impl Fn(&TensorReport) -> f64) -> f64 {
        self.tensors.iter().map(figure).sum::<f64>() / self.tensors.len().max(1) as f64
    }
}

/// Bytes for people: `1.23 MB`.
pub fn human_bytes(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.tensors.iter().map(|t| t.name.len()).max().unwrap_or(6).max(6);
        writeln!(
            f,
            "{:width$}  {:>11} {:>10} {:>10} {:>6}  {:>7} {:>7} {:>7} {:>7}  structure",
            "tensor", "shape", "before", "after", "keep", "error", "metric", "output", "seconds"
        )?;
        for t in &self.tensors {
            writeln!(
                f,
                "{:width$}  {:>11} {:>10} {:>10} {:>6.3}  {:>7.4} {:>7.4} {:>7} {:>7.3}  {}",
                t.name,
                format!("{}x{}", t.shape.0, t.shape.1),
                human_bytes(t.bytes_before),
                human_bytes(t.bytes_after),
                t.bytes_after as f64 / t.bytes_before.max(1) as f64,
                t.error,
                t.metric_error,
                t.output_error.map_or("-".into(), |e| format!("{e:.4}")),
                t.seconds,
                t.kept_dense.as_ref().map_or_else(|| t.structure.clone(), |why| format!("kept dense: {why}")),
            )?;
            for note in &t.notes {
                writeln!(f, "{:width$}    {note}", "")?;
            }
        }
        let outputs: Vec<f64> = self.tensors.iter().filter_map(|t| t.output_error).collect();
        let output = match outputs.len() {
            0 => "-".into(),
            count => format!("{:.4}", outputs.iter().sum::<f64>() / count as f64),
        };
        writeln!(
            f,
            "{:width$}  {:>11} {:>10} {:>10} {:>6.3}  {:>7.4} {:>7.4} {:>7} {:>7.3}  (errors: means; seconds: summed)",
            "total",
            format!("{} weights", self.tensors.len()),
            human_bytes(self.bytes_before()),
            human_bytes(self.bytes_after()),
            self.keep(),
            self.mean(|t| t.error),
            self.mean(|t| t.metric_error),
            output,
            self.tensors.iter().map(|t| t.seconds).sum::<f64>(),
        )?;
        write!(
            f,
            "weight files: {} -> {} ({:.3}), {} tensors copied, {:.1} s on {} thread{}",
            human_bytes(self.file_bytes_before),
            human_bytes(self.file_bytes_after),
            self.file_bytes_after as f64 / self.file_bytes_before.max(1) as f64,
            self.copied,
            self.seconds,
            self.threads,
            if self.threads == 1 { "" } else { "s" },
        )
    }
}
