//! Which error counts: a weighted Frobenius norm of Δ = W − Ŵ.
//!
//! Every metric here is error² = tr(B·Δ·A·Δᵀ), with A on the side of the inputs (n×n) and B on the
//! side of the outputs (m×m, diagonal):
//!
//! | name | A | B | known as |
//! |---|---|---|---|
//! | `frobenius` | I | I | plain SVD |
//! | `fisher` | diag of summed squared gradients per input column | I | FWSVD (Hsu et al., ICLR 2022; its rows are inputs) |
//! | `fisher-rows` | I | the same per output row | |
//! | `fisher-both` | columns | rows | two-sided FWSVD |
//! | `activation` | diag of (mean x²)^α, α = ½ | I | ASVD (Yuan et al., 2023), Wanda |
//! | `gram` | mean of x·xᵀ | I | SVD-LLM (Wang et al., ICLR 2025), CoSpaDi |
//! | `gram-fisher` | mean of x·xᵀ | rows | two-sided, after GFWSVD (2025) |
//!
//! In a recipe a name stands for its pair; `{ input = "activation", alpha = 1.0, output = "fisher" }`
//! spells any pair out.

use std::fmt;
use std::sync::Arc;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, CowArray, Ix2};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::linalg::Backend;
use crate::named::{self, Named};
use crate::scalar::Real;
use crate::stats::{Gram, Kind, Stats};

/// The quadratic form on one side of the error.
#[derive(Debug, Clone, Default)]
pub enum Weighting {
    /// The identity.
    #[default]
    Identity,
    /// A diagonal of positive weights (of squared errors, not of errors).
    Diagonal(Arc<Array1<f64>>),
    /// A symmetric positive semidefinite matrix; it may be singular.
    Gram(Arc<Gram>),
}

impl Weighting {
    /// Whether both are the same form.
    pub(crate) fn same(&self, other: &Weighting) -> bool {
        match (self, other) {
            (Weighting::Identity, Weighting::Identity) => true,
            (Weighting::Diagonal(a), Weighting::Diagonal(b)) => Arc::ptr_eq(a, b) || a == b,
            (Weighting::Gram(a), Weighting::Gram(b)) => Arc::ptr_eq(a, b) || a.matrix() == b.matrix(),
            _ => false,
        }
    }

    /// X·A for rows X.
    pub(crate) fn times(&self, x: ArrayView2<'_, f64>, backend: &dyn Backend) -> Array2<f64> {
        match self {
            Weighting::Identity => x.to_owned(),
            Weighting::Diagonal(a) => &x * &**a,
            Weighting::Gram(gram) => f64::kernels(backend).matmul(x, gram.matrix()),
        }
    }
}

/// A metric with its numbers: error² = tr(B·Δ·A·Δᵀ).
#[derive(Debug, Clone, Default)]
pub struct Metric {
    /// B, m×m. Never a full Gram matrix.
    pub output: Weighting,
    /// A, n×n.
    pub input: Weighting,
}

impl Metric {
    /// The plain Frobenius norm.
    pub fn frobenius() -> Self {
        Metric::default()
    }

    /// The Gram metric: ‖Δ·X‖ for inputs X with mean x·xᵀ = `gram`.
    pub fn gram(gram: Arc<Gram>) -> Self {
        Metric { output: Weighting::Identity, input: Weighting::Gram(gram) }
    }

    /// √ of the diagonal of B, if it is not the identity.
    pub fn output_scale(&self) -> Option<Array1<f64>> {
        match &self.output {
            Weighting::Diagonal(d) => Some(d.mapv(f64::sqrt)),
            Weighting::Identity | Weighting::Gram(_) => None,
        }
    }

    /// tr(B·Δ·A·Δᵀ), in f64: error directions are often those in which A is tiny, where an f32 product
    /// would drown in the rounding of its large eigenvalues. mn² flops if A is a Gram matrix.
    pub fn squared<T: Real>(&self, delta: ArrayView2<'_, T>, backend: &dyn Backend) -> f64 {
        self.quadratic::<f64, T>(delta, backend)
    }

    /// The same of a weight itself, in the compute type: what is no small difference needs no f64.
    pub fn norm_squared<T: Real>(&self, weight: ArrayView2<'_, T>, backend: &dyn Backend) -> f64 {
        self.quadratic::<T, T>(weight, backend)
    }

    /// tr(B·Δ·A·Δᵀ) = ⟨(√B·Δ)ᵀ(√B·Δ), A⟩, with the products in P and the sums in f64.
    fn quadratic<P: Real, T: Real>(&self, delta: ArrayView2<'_, T>, backend: &dyn Backend) -> f64 {
        let scale = self.output_scale();
        let square = |v: P| v.wide() * v.wide();
        let of_row = |row: ArrayView1<'_, P>| match &self.input {
            Weighting::Diagonal(a) => row.iter().zip(a.iter()).map(|(&v, a)| square(v) * a).sum::<f64>(),
            _ => inner(row, row),
        };
        match &self.input {
            Weighting::Gram(gram) => {
                let squares = P::kernels(backend).gram(scaled::<P, T>(delta, 0, scale.as_ref()).t());
                squares.rows().into_iter().zip(gram.matrix().rows()).map(|(s, g)| inner(s, g)).sum()
            }
            Weighting::Identity | Weighting::Diagonal(_) => {
                /// Rows that are widened at a time.
                const PANEL: usize = 64;
                let mut total = 0.0;
                for (at, part) in delta.axis_chunks_iter(Axis(0), PANEL).enumerate() {
                    scaled(part, at * PANEL, scale.as_ref()).rows().into_iter().for_each(|row| total += of_row(row));
                }
                total
            }
        }
    }
}

/// Some rows in another type, times what is to be counted from the first of them on.
fn scaled<'v, P: Real, T: Real>(
    rows: ArrayView2<'v, T>,
    first: usize,
    scale: Option<&Array1<f64>>,
) -> CowArray<'v, P, Ix2> {
    let mut rows = P::from_view(rows);
    if let Some(scale) = scale {
        for (mut row, &d) in rows.rows_mut().into_iter().zip(scale.iter().skip(first)) {
            row.mapv_inplace(|v| v * P::from_f64(d));
        }
    }
    rows
}

/// Σ aᵢ·bᵢ in f64, in eight sums at a time.
fn inner<A: Real, B: Real>(a: ArrayView1<'_, A>, b: ArrayView1<'_, B>) -> f64 {
    let (Some(a), Some(b)) = (a.as_slice(), b.as_slice()) else {
        return a.iter().zip(b).map(|(a, b)| a.wide() * b.wide()).sum();
    };
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a.wide() * b.wide();
        }
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a.wide() * b.wide()).sum::<f64>()
}

/// The input side of a metric, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InputMetric {
    /// All inputs count alike.
    #[default]
    Identity,
    /// Summed squared gradients per input column.
    Fisher,
    /// (mean x²)^α per input.
    Activation,
    /// The Gram matrix of the inputs.
    Gram,
}

/// The output side of a metric, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputMetric {
    /// All outputs count alike.
    #[default]
    Identity,
    /// Summed squared gradients per output row.
    Fisher,
}

/// A metric as a recipe names it, before its statistics are looked up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetricSpec {
    /// The side of the inputs.
    pub input: InputMetric,
    /// The side of the outputs.
    pub output: OutputMetric,
    /// Exponent of the mean square for [`InputMetric::Activation`]; ASVD uses ½, 1 is the Gram diagonal.
    pub alpha: f64,
}

impl Default for MetricSpec {
    fn default() -> Self {
        MetricSpec { input: InputMetric::Identity, output: OutputMetric::Identity, alpha: 0.5 }
    }
}

const NAMES: [(&str, InputMetric, OutputMetric); 7] = [
    ("frobenius", InputMetric::Identity, OutputMetric::Identity),
    ("fisher", InputMetric::Fisher, OutputMetric::Identity),
    ("fisher-rows", InputMetric::Identity, OutputMetric::Fisher),
    ("fisher-both", InputMetric::Fisher, OutputMetric::Fisher),
    ("activation", InputMetric::Activation, OutputMetric::Identity),
    ("gram", InputMetric::Gram, OutputMetric::Identity),
    ("gram-fisher", InputMetric::Gram, OutputMetric::Fisher),
];

impl MetricSpec {
    /// The metric of a name of the table above.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the valid names.
    pub fn named(name: &str) -> Result<Self> {
        match NAMES.iter().find(|(known, ..)| *known == name) {
            Some(&(_, input, output)) => Ok(MetricSpec { input, output, ..Self::default() }),
            None => {
                let names: Vec<&str> = NAMES.iter().map(|(known, ..)| *known).collect();
                Err(Error::Unsupported(format!("unknown metric `{name}`, expected one of {}", names.join(", "))))
            }
        }
    }

    /// Whether it is the plain Gram metric.
    pub fn is_gram(&self) -> bool {
        self.input == InputMetric::Gram && self.output == OutputMetric::Identity
    }

    /// Which statistics it needs.
    pub fn needs(&self) -> Vec<Kind> {
        let input = match self.input {
            InputMetric::Identity => None,
            InputMetric::Fisher => Some(Kind::FisherCol),
            InputMetric::Activation | InputMetric::Gram => Some(Kind::Gram),
        };
        let output = (self.output == OutputMetric::Fisher).then_some(Kind::FisherRow);
        input.into_iter().chain(output).collect()
    }

    /// Looks the statistics of one weight up.
    ///
    /// # Errors
    /// [`Error::MissingStats`], [`Error::Statistics`], or what reading them meets.
    pub fn resolve(&self, weight: &str, stats: &Stats) -> Result<Metric> {
        let input = match self.input {
            InputMetric::Identity => Weighting::Identity,
            InputMetric::Fisher => Weighting::Diagonal(Arc::new(floored(stats.fisher_col(weight)?))),
            InputMetric::Activation => {
                let mean_square = stats.gram(weight)?.diagonal();
                Weighting::Diagonal(Arc::new(floored(mean_square.mapv(|v| v.max(0.0).powf(self.alpha)))))
            }
            InputMetric::Gram => Weighting::Gram(stats.gram(weight)?),
        };
        let output = match self.output {
            OutputMetric::Identity => Weighting::Identity,
            // Summed squared gradients of row i are about E[gᵢ²]·tr(E[x·xᵀ]), and Σᵢⱼ of them is counted by
            // rows and by columns: divided by what the input side says already, the metric is an estimate
            // of the loss and its errors can be compared between weights.
            OutputMetric::Fisher => {
                let rows = floored(stats.fisher_row(weight)?);
                let counted = match &input {
                    Weighting::Identity => 1.0,
                    Weighting::Diagonal(columns) => columns.sum(),
                    Weighting::Gram(gram) => gram.diagonal().sum(),
                };
                Weighting::Diagonal(Arc::new(rows / counted.max(f64::MIN_POSITIVE)))
            }
        };
        Ok(Metric { output, input })
    }
}

/// Diagonal weights are divided by later, so they get a floor: √w at least a thousandth of the median √w.
/// (An absolute floor, as the published code has it, would depend on the scale of the gradients.)
fn floored(mut weights: Array1<f64>) -> Array1<f64> {
    let mut sorted = weights.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(1.0);
    let top = sorted.last().copied().unwrap_or(1.0);
    // A median of zero (most entries dead) falls back on the largest weight.
    let floor = 1e-6 * if median > 0.0 { median } else { top * 1e-6 };
    weights.mapv_inplace(|w| w.max(floor).max(f64::MIN_POSITIVE));
    weights
}

impl fmt::Display for MetricSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = NAMES.iter().find(|(_, input, output)| (*input, *output) == (self.input, self.output));
        f.write_str(known.map_or("activation-fisher", |(name, ..)| name))?;
        match self.input == InputMetric::Activation && self.alpha != 0.5 {
            true => write!(f, "({})", self.alpha),
            false => Ok(()),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Table {
    input: InputMetric,
    output: OutputMetric,
    alpha: f64,
}

impl Default for Table {
    fn default() -> Self {
        let MetricSpec { input, output, alpha } = MetricSpec::default();
        Table { input, output, alpha }
    }
}

impl Serialize for MetricSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let known = NAMES.iter().find(|(_, input, output)| (*input, *output) == (self.input, self.output));
        match known {
            Some((name, ..)) if self.alpha == 0.5 => serializer.serialize_str(name),
            _ => Table { input: self.input, output: self.output, alpha: self.alpha }.serialize(serializer),
        }
    }
}

impl Named for MetricSpec {
    const WHAT: &'static str = "a metric";
    type Table = Table;
    fn named(name: &str) -> Result<Self> {
        MetricSpec::named(name)
    }
    fn from_table(Table { input, output, alpha }: Table) -> Result<Self> {
        match alpha > 0.0 && alpha <= 4.0 {
            true => Ok(MetricSpec { input, output, alpha }),
            false => Err(Error::Unsupported(format!("alpha = {alpha}: expected a number above 0, at most 4"))),
        }
    }
}

impl<'de> Deserialize<'de> for MetricSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        named::deserialize(deserializer)
    }
}
