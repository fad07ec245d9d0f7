//! One error type; its variants are told apart by what the caller can do about them.

use std::io::ErrorKind;
use std::path::PathBuf;

use crate::scalar::DType;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. No panic reaches a caller; bad input ends here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation (missing file, no permission, disk full).
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint, statistics file or index is damaged or contradicts itself.
    #[error("{}: {detail}", path.display())]
    Checkpoint {
        /// The damaged file.
        path: PathBuf,
        /// What is wrong in it.
        detail: String,
    },
    /// A tensor that was asked for by name is not there.
    #[error("no tensor named `{name}` in {}", path.display())]
    MissingTensor {
        /// The name asked for.
        name: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Shapes do not fit together.
    #[error("shape mismatch: expected {expected}, got {got}")]
    Shape {
        /// The shape that was needed.
        expected: String,
        /// The shape that was given.
        got: String,
    },
    /// The stored dtype cannot be computed on.
    #[error("dtype {dtype} cannot be computed on (F64, F32, F16 and BF16 can)")]
    UnsupportedDType {
        /// The dtype found.
        dtype: DType,
    },
    /// A NaN or an infinity where a number is needed.
    #[error("{what}: {value} at index {index}")]
    NonFinite {
        /// Which array.
        what: String,
        /// Row-major position of the first bad value.
        index: usize,
        /// The value itself: NaN, inf or -inf.
        value: f64,
    },
    /// The metric asks for statistics that were not given; the whole list, found before any work.
    #[error("missing statistics: {} (another metric needs none or others; a rule's `match` can leave weights out)", list(.missing))]
    MissingStats {
        /// The keys that are missing, e.g. `model.layers.0.mlp.up_proj.weight.gram`.
        missing: Vec<String>,
    },
    /// Statistics are there but cannot be used (wrong size, asymmetric, indefinite).
    #[error("statistics `{key}`: {detail}")]
    Statistics {
        /// The key in the statistics file.
        key: String,
        /// What is wrong.
        detail: String,
    },
    /// The budget cannot be met by this structure.
    #[error("budget cannot be met: {asked} asked for, the least possible is {least}")]
    Budget {
        /// What was asked for.
        asked: String,
        /// The least that this structure can do.
        least: String,
    },
    /// A method or combination that does not exist, e.g. a metric that a structure cannot minimise.
    #[error("{0}")]
    Unsupported(String),
    /// A numerical kernel failed (no convergence, not positive definite).
    #[error("{kernel} failed: {detail}")]
    Numerical {
        /// The kernel, e.g. `eigh`.
        kernel: &'static str,
        /// Why.
        detail: String,
    },
    /// A recipe that does not parse or does not make sense.
    #[error("recipe{}: {detail}", place(.at))]
    Recipe {
        /// Line and column, both from 1, where they are known.
        at: Option<(usize, usize)>,
        /// What is wrong, with the valid names where a name is unknown.
        detail: String,
    },
    /// Several tensors cannot be compressed as the recipe asks; found at plan time.
    #[error("{} tensor(s) refused:\n{}", .0.len(), refusals(.0))]
    Refused(Vec<(String, String)>),
    /// The output folder cannot be used.
    #[error("output {}: {detail}", path.display())]
    Output {
        /// The folder.
        path: PathBuf,
        /// Why not.
        detail: String,
    },
    /// The caller's observer asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// Any of the above, with the name of the tensor it happened to.
    #[error("tensor `{name}`: {source}")]
    Tensor {
        /// The tensor's name.
        name: String,
        /// What happened.
        source: Box<Error>,
    },
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

fn place(at: &Option<(usize, usize)>) -> String {
    at.map_or(String::new(), |(line, column)| format!(" at line {line}, column {column}"))
}

fn refusals(all: &[(String, String)]) -> String {
    let lines: Vec<String> = all.iter().map(|(name, why)| format!("  {name}: {why}")).collect();
    lines.join("\n")
}

impl Error {
    /// Attaches a tensor's name, once: an error that has one keeps it.
    pub fn of_tensor(self, name: impl Into<String>) -> Self {
        match self {
            Error::Tensor { .. } | Error::MissingTensor { .. } | Error::MissingStats { .. } => self,
            source => Error::Tensor { name: name.into(), source: Box::new(source) },
        }
    }

    /// Whether the input or the recipe is at fault, rather than the machine or the numerics.
    /// Programs use it to choose between "refused" and "failed" (exit codes 2 and 1 in the examples).
    pub fn is_refusal(&self) -> bool {
        match self {
            // What was named is not there: a wrong request. Anything else is the machine's fault.
            Error::Io { source, .. } => matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
            Error::Numerical { .. } | Error::Cancelled => false,
            Error::Tensor { source, .. } => source.is_refusal(),
            _ => true,
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn shape(expected: impl std::fmt::Debug, got: impl std::fmt::Debug) -> Self {
        Error::Shape { expected: format!("{expected:?}"), got: format!("{got:?}") }
    }
}
