//! The examples' encoder of sentences against a forward pass written from the definitions, in f64.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView};
use weightpress::checkpoint::Checkpoint;
use weightpress::ndarray::{Array1, Array2, ArrayView1, Axis, s};
use weightpress::stats::Stats;

use super::run::matrix;
use super::support::bert::Bert;
use super::support::encoder::{Encoder, weight_name};

const HIDDEN: usize = 8;
const FFN: usize = 12;
const HEADS: usize = 2;
const LAYERS: usize = 2;
const VOCABULARY: usize = 11;
const LONGEST: usize = 16;
const EPS: f64 = 1e-12;

pub type Weights = HashMap<String, Array2<f32>>;

fn weights() -> Weights {
    let mut shapes = vec![
        ("embeddings.word_embeddings.weight".to_owned(), VOCABULARY, HIDDEN),
        ("embeddings.position_embeddings.weight".to_owned(), LONGEST, HIDDEN),
        ("embeddings.token_type_embeddings.weight".to_owned(), 2, HIDDEN),
        ("embeddings.LayerNorm.weight".to_owned(), 1, HIDDEN),
        ("embeddings.LayerNorm.bias".to_owned(), 1, HIDDEN),
    ];
    for i in 0..LAYERS {
        let linear = [
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", FFN, HIDDEN),
            ("output.dense", HIDDEN, FFN),
        ];
        for (name, m, n) in linear {
            shapes.push((format!("encoder.layer.{i}.{name}.weight"), m, n));
            shapes.push((format!("encoder.layer.{i}.{name}.bias"), 1, m));
        }
        for name in ["attention.output.LayerNorm", "output.LayerNorm"] {
            shapes.push((format!("encoder.layer.{i}.{name}.weight"), 1, HIDDEN));
            shapes.push((format!("encoder.layer.{i}.{name}.bias"), 1, HIDDEN));
        }
    }
    let each = shapes.into_iter().enumerate();
    each.map(|(i, (name, m, n))| (name, matrix(m, n, 17 * i + 3))).collect()
}

/// Writes a folder, each weight in the shape that it has there.
pub fn write_folder(
    folder: &std::path::Path,
    weights: &Weights,
    config: &str,
    shape: impl Fn(&str, (usize, usize)) -> Vec<usize>,
) {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = weights
        .iter()
        .map(|(name, w)| (name.clone(), shape(name, w.dim()), w.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, data)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("config.json"), config).unwrap();
}

fn write(folder: &std::path::Path, weights: &Weights) {
    let config = format!(
        r#"{{"architectures": ["BertModel"], "model_type": "bert", "hidden_size": {HIDDEN}, "num_hidden_layers": {LAYERS},
            "num_attention_heads": {HEADS}, "layer_norm_eps": {EPS}, "vocab_size": {VOCABULARY},
            "max_position_embeddings": {LONGEST}, "intermediate_size": {FFN}, "hidden_act": "gelu"}}"#
    );
    let vector = |name: &str, m: usize| m == 1 && name.contains("bias") || name.contains("LayerNorm");
    write_folder(folder, weights, &config, |name, (m, n)| if vector(name, m) { vec![n] } else { vec![m, n] });
}

/// The error function by its Taylor series, good to rounding for the small arguments here.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// What encoders are made of, one token a row, written from the definitions.
pub struct Naive<'a> {
    pub weights: &'a Weights,
    pub heads: usize,
    pub eps: f64,
    /// Is shown what each linear layer sees.
    pub see: &'a mut dyn FnMut(&str, &Array2<f64>),
}

impl Naive<'_> {
    pub fn get(&self, name: &str) -> Array2<f64> {
        self.weights[name].mapv(f64::from)
    }

    pub fn row(&self, name: &str) -> Array1<f64> {
        self.get(name).row(0).to_owned()
    }

    pub fn norm(&self, x: &Array2<f64>, name: &str) -> Array2<f64> {
        let (gain, bias) = (self.row(&format!("{name}.weight")), self.row(&format!("{name}.bias")));
        let one = |x: ArrayView1<'_, f64>| {
            let mean = x.mean().unwrap();
            let variance = x.mapv(|v| (v - mean).powi(2)).mean().unwrap();
            (x.mapv(|v| (v - mean) / (variance + self.eps).sqrt()) * &gain + &bias).to_vec()
        };
        let rows: Vec<f64> = x.rows().into_iter().flat_map(one).collect();
        Array2::from_shape_vec(x.dim(), rows).unwrap()
    }

    pub fn linear(&mut self, x: &Array2<f64>, name: &str) -> Array2<f64> {
        (self.see)(&format!("{name}.weight"), x);
        x.dot(&self.get(&format!("{name}.weight")).t()) + self.row(&format!("{name}.bias"))
    }

    /// Layers of these names: query, key, value, output.
    pub fn attend(&mut self, x: &Array2<f64>, names: [String; 4]) -> Array2<f64> {
        let [q, k, v, output] = names;
        let [q, k, v] = [q, k, v].map(|name| self.linear(x, &name));
        let width = x.ncols() / self.heads;
        let mut mixed = Array2::zeros(x.dim());
        for head in 0..self.heads {
            let part = s![.., head * width..(head + 1) * width];
            let scores = q.slice(part).dot(&k.slice(part).t()) / (width as f64).sqrt();
            for (t, scores) in scores.rows().into_iter().enumerate() {
                let exponentials = scores.mapv(f64::exp);
                let weights = &exponentials / exponentials.sum();
                let sum = weights.dot(&v.slice(part));
                mixed.slice_mut(s![t, head * width..(head + 1) * width]).assign(&sum);
            }
        }
        self.linear(&mixed, &output)
    }

    /// Two layers of these names with GELU between them.
    pub fn widen(&mut self, x: &Array2<f64>, up: &str, down: &str) -> Array2<f64> {
        let up = self.linear(x, up).mapv(|v| 0.5 * v * (1.0 + erf(v / 2f64.sqrt())));
        self.linear(&up, down)
    }
}

/// The embedding of some tokens. `see` is shown what each linear layer sees.
fn naive(weights: &Weights, tokens: &[usize], see: &mut dyn FnMut(&str, &Array2<f64>)) -> Array1<f64> {
    let mut of = Naive { weights, heads: HEADS, eps: EPS, see };
    let words = of.get("embeddings.word_embeddings.weight").select(Axis(0), tokens);
    let positions = of.get("embeddings.position_embeddings.weight").slice(s![..tokens.len(), ..]).to_owned();
    let kind = of.row("embeddings.token_type_embeddings.weight");
    let mut x = of.norm(&(words + positions + kind), "embeddings.LayerNorm");
    for i in 0..LAYERS {
        let name = |part: &str| format!("encoder.layer.{i}.{part}");
        let parts = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"];
        let mixed = of.attend(&x, parts.map(name));
        x = of.norm(&(&x + &mixed), &name("attention.output.LayerNorm"));
        let wide = of.widen(&x, &name("intermediate.dense"), &name("output.dense"));
        x = of.norm(&(&x + &wide), &name("output.LayerNorm"));
    }
    let mean = x.mean_axis(Axis(0)).unwrap();
    &mean / mean.dot(&mean).sqrt()
}

#[test]
fn embeddings_are_those_of_the_definition() {
    let (weights, model) = encoder();
    for tokens in [vec![3], vec![1, 7, 2, 2, 10], vec![5, 0, 9, 4, 4, 4, 8, 1, 6, 3, 2, 10, 7, 0, 1, 5]] {
        let (found, expected) = (model.embed(&tokens).unwrap(), naive(&weights, &tokens, &mut |_, _| ()));
        let gap = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(gap < 1e-5, "{gap}");
    }
    for refused in [vec![], vec![VOCABULARY], vec![0; LONGEST + 1]] {
        assert!(model.embed(&refused).is_err(), "{refused:?}");
    }
}

/// An encoder, and its weights.
fn encoder() -> (Weights, Bert) {
    let folder = tempfile::tempdir().unwrap();
    let weights = weights();
    write(folder.path(), &weights);
    let model = Bert::load(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    (weights, model)
}

/// Sentences of some lengths.
fn sentences() -> Vec<Vec<usize>> {
    (1..12).map(|length| (0..length).map(|at| (3 * at + length) % VOCABULARY).collect()).collect()
}

/// Holds Gram matrices against the sums of what `run` shows of each of `count` samples.
pub fn are_sums(stats: &Stats, weights: usize, count: usize, run: impl Fn(usize, &mut dyn FnMut(&str, &Array2<f64>))) {
    let mut sums: HashMap<String, (Array2<f64>, usize)> = HashMap::new();
    for sample in 0..count {
        run(sample, &mut |name, x| {
            let zero = || (Array2::zeros((x.ncols(), x.ncols())), 0);
            let (sum, count) = sums.entry(name.to_owned()).or_insert_with(zero);
            *sum += &x.t().dot(x);
            *count += x.nrows();
        });
    }
    assert_eq!(sums.len(), weights);
    for (name, (sum, count)) in sums {
        let (found, expected) = (stats.gram(&name).unwrap(), sum / count as f64);
        let gap = (&found.matrix() - &expected).iter().fold(0.0, |most: f64, v| most.max(v.abs()));
        assert!(gap < 1e-5, "{name}: {gap}");
    }
}

#[test]
fn gram_matrices_are_those_of_the_inputs() {
    let (weights, model) = encoder();
    let (all, stats) = (sentences(), model.calibrate(&sentences(), &|_| ()).unwrap());
    are_sums(&stats, 6 * LAYERS, all.len(), |sample, see| drop(naive(&weights, &all[sample], see)));
}

/// Holds gradients of v·e by each linear weight, m×n by name, against differences of what the definition makes of weights.
pub fn are_differences(weights: &mut Weights, gradients: Vec<(String, Array2<f32>)>, value: impl Fn(&Weights) -> f64) {
    for (name, gradient) in gradients {
        let before = weights[&name].clone();
        // Entries one by one: the weights are f32, so that steps are large and their errors of third order.
        let mut difference = Array2::<f64>::zeros(before.dim());
        for (at, d) in difference.indexed_iter_mut() {
            let mut moved_by = |step: f32| {
                let entry = &mut weights.get_mut(&name).unwrap()[at];
                *entry = before[at] + step;
                let moved = f64::from(*entry) - f64::from(before[at]);
                (value(weights), moved)
            };
            let (up, down) = (moved_by(1e-3), moved_by(-1e-3));
            *d = (up.0 - down.0) / (up.1 - down.1);
            weights.insert(name.clone(), before.clone());
        }
        let norm = |x: &Array2<f64>| x.iter().map(|v| v * v).sum::<f64>().sqrt();
        let gap = norm(&(&difference - &gradient.mapv(f64::from))) / norm(&difference);
        assert!(gap < 1e-3, "{name}: {gap}");
    }
}

#[test]
fn gradients_equal_differences_of_the_definition() {
    let (mut weights, model) = encoder();
    let (tokens, along) = (vec![5, 0, 9, 4, 4, 8, 1], Array1::from_shape_fn(HIDDEN, |i| ((i * 5) % 7) as f32 - 2.5));
    let (mut all, wide) = (Vec::new(), along.mapv(f64::from));
    let see = &mut |layer: usize, part: usize, d| all.push((weight_name(layer, Bert::LINEAR[part]), d));
    let value = model.gradients(&tokens, &along, see).unwrap();
    let exact = |weights: &Weights| naive(weights, &tokens, &mut |_, _| ()).dot(&wide);
    assert!((exact(&weights) - f64::from(value)).abs() < 1e-4);
    assert_eq!(all.len(), 6 * LAYERS);
    are_differences(&mut weights, all, exact);
}

#[test]
fn fisher_sums_estimate_how_far_embeddings_turn() {
    let (mut weights, model) = encoder();
    let stats = model.fisher(&sentences(), 200, &|_| ()).unwrap();
    let embeddings = |weights: &Weights| sentences().iter().map(|s| naive(weights, s, &mut |_, _| ())).collect();
    let before: Vec<Array1<f64>> = embeddings(&weights);
    // One row after the other: E‖δe‖² for independent changes of variance ε² is ε²·Σ of squared derivatives.
    let name = weight_name(1, Bert::LINEAR[4]);
    let (rows, columns) = (stats.fisher_row(&name).unwrap(), stats.fisher_col(&name).unwrap());
    assert!((rows.sum() / columns.sum() - 1.0).abs() < 1e-9);
    for i in 0..FFN {
        let mut sum = 0.0;
        for j in 0..HIDDEN {
            let step = 1e-3f32;
            weights.get_mut(&name).unwrap()[(i, j)] += step;
            let after: Vec<Array1<f64>> = embeddings(&weights);
            weights.get_mut(&name).unwrap()[(i, j)] -= step;
            let moved = before.iter().zip(&after).map(|(a, b)| (a - b).mapv(|d| d * d).sum()).sum::<f64>();
            sum += moved / before.len() as f64 / f64::from(step).powi(2);
        }
        assert!((rows[i] / sum - 1.0).abs() < 0.25, "row {i}: {} {sum}", rows[i]);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut weights = weights();
    weights.remove("encoder.layer.1.attention.self.key.bias");
    write(folder.path(), &weights);
    let found = Bert::load(&Checkpoint::open(folder.path()).unwrap()).err().unwrap();
    assert!(format!("{found:#}").contains("encoder.layer.1.attention.self.key.bias"), "{found:#}");
}
