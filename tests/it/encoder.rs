//! The examples' encoder against a forward pass written from the definitions, in f64.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView};
use weightpress::checkpoint::Checkpoint;
use weightpress::ndarray::{Array1, Array2, ArrayView1, Axis, s};

use super::run::matrix;
use super::support::bert::{Bert, LINEAR, weight_name};

const HIDDEN: usize = 8;
const FFN: usize = 12;
const HEADS: usize = 2;
const LAYERS: usize = 2;
const VOCABULARY: usize = 11;
const LONGEST: usize = 16;
const EPS: f64 = 1e-12;

type Weights = HashMap<String, Array2<f32>>;

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

fn write(folder: &std::path::Path, weights: &Weights) {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = weights
        .iter()
        .map(|(name, w)| {
            let shape = if w.nrows() == 1 && name.contains("bias") || name.contains("LayerNorm") {
                vec![w.ncols()]
            } else {
                vec![w.nrows(), w.ncols()]
            };
            (name.clone(), shape, w.iter().flat_map(|v| v.to_le_bytes()).collect())
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, data)| (name.clone(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    let config = format!(
        r#"{{"architectures": ["BertModel"], "model_type": "bert", "hidden_size": {HIDDEN}, "num_hidden_layers": {LAYERS},
            "num_attention_heads": {HEADS}, "layer_norm_eps": {EPS}, "vocab_size": {VOCABULARY},
            "max_position_embeddings": {LONGEST}, "intermediate_size": {FFN}, "hidden_act": "gelu"}}"#
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
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

/// One token a row. `see` is shown what each linear layer sees.
fn naive(weights: &Weights, tokens: &[usize], see: &mut dyn FnMut(&str, &Array2<f64>)) -> Array1<f64> {
    let get = |name: &str| weights[name].mapv(f64::from);
    let row = |name: String| get(&name).row(0).to_owned();
    let norm = |x: Array2<f64>, name: &str| {
        let (gain, bias) = (row(format!("{name}.weight")), row(format!("{name}.bias")));
        let one = |x: ArrayView1<'_, f64>| {
            let mean = x.mean().unwrap();
            let variance = x.mapv(|v| (v - mean).powi(2)).mean().unwrap();
            (x.mapv(|v| (v - mean) / (variance + EPS).sqrt()) * &gain + &bias).to_vec()
        };
        let rows: Vec<f64> = x.rows().into_iter().flat_map(one).collect();
        Array2::from_shape_vec(x.dim(), rows).unwrap()
    };
    let mut linear = |x: &Array2<f64>, name: String| {
        see(&format!("{name}.weight"), x);
        x.dot(&get(&format!("{name}.weight")).t()) + row(format!("{name}.bias"))
    };
    let words = get("embeddings.word_embeddings.weight").select(Axis(0), tokens);
    let positions = get("embeddings.position_embeddings.weight").slice(s![..tokens.len(), ..]).to_owned();
    let kind = get("embeddings.token_type_embeddings.weight").row(0).to_owned();
    let mut x = norm(words + positions + kind, "embeddings.LayerNorm");
    for i in 0..LAYERS {
        let name = |part: &str| format!("encoder.layer.{i}.{part}");
        let [q, k, v] = ["query", "key", "value"].map(|part| linear(&x, name(&format!("attention.self.{part}"))));
        let width = HIDDEN / HEADS;
        let mut mixed = Array2::zeros(x.dim());
        for head in 0..HEADS {
            let part = s![.., head * width..(head + 1) * width];
            let scores = q.slice(part).dot(&k.slice(part).t()) / (width as f64).sqrt();
            for (t, scores) in scores.rows().into_iter().enumerate() {
                let exponentials = scores.mapv(f64::exp);
                let weights = &exponentials / exponentials.sum();
                let sum = weights.dot(&v.slice(part));
                mixed.slice_mut(s![t, head * width..(head + 1) * width]).assign(&sum);
            }
        }
        x = norm(&x + &linear(&mixed, name("attention.output.dense")), &name("attention.output.LayerNorm"));
        let up = linear(&x, name("intermediate.dense")).mapv(|v| 0.5 * v * (1.0 + erf(v / 2f64.sqrt())));
        x = norm(&x + &linear(&up, name("output.dense")), &name("output.LayerNorm"));
    }
    let mean = x.mean_axis(Axis(0)).unwrap();
    &mean / mean.dot(&mean).sqrt()
}

#[test]
fn embeddings_are_those_of_the_definition() {
    let (weights, model) = encoder();
    for tokens in [&[3][..], &[1, 7, 2, 2, 10], &[5, 0, 9, 4, 4, 4, 8, 1, 6, 3, 2, 10, 7, 0, 1, 5]] {
        let (found, expected) = (model.embed(tokens).unwrap(), naive(&weights, tokens, &mut |_, _| ()));
        let gap = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(gap < 1e-5, "{gap}");
    }
    assert!(
        model.embed(&[]).is_err() && model.embed(&[VOCABULARY]).is_err() && model.embed(&[0; LONGEST + 1]).is_err()
    );
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

#[test]
fn gram_matrices_are_those_of_the_inputs() {
    let (weights, model) = encoder();
    let stats = model.calibrate(&sentences(), &|_| ()).unwrap();
    let mut sums: HashMap<String, (Array2<f64>, usize)> = HashMap::new();
    for tokens in sentences() {
        naive(&weights, &tokens, &mut |name, x| {
            let zero = || (Array2::zeros((x.ncols(), x.ncols())), 0);
            let (sum, count) = sums.entry(name.to_owned()).or_insert_with(zero);
            *sum += &x.t().dot(x);
            *count += x.nrows();
        });
    }
    assert_eq!(sums.len(), 6 * LAYERS);
    for (name, (sum, count)) in sums {
        let (found, expected) = (stats.gram(&name).unwrap(), sum / count as f64);
        let gap = (&found.matrix() - &expected).iter().fold(0.0, |most: f64, v| most.max(v.abs()));
        assert!(gap < 1e-5, "{name}: {gap}");
    }
}

#[test]
fn gradients_equal_differences_of_the_definition() {
    let (mut weights, model) = encoder();
    let (tokens, along) = ([5, 0, 9, 4, 4, 8, 1], Array1::from_shape_fn(HIDDEN, |i| ((i * 5) % 7) as f32 - 2.5));
    let mut all = Vec::new();
    let value = model.gradients(&tokens, &along, &mut |layer, part, d| all.push((layer, part, d))).unwrap();
    let wide = along.mapv(f64::from);
    assert!((naive(&weights, &tokens, &mut |_, _| ()).dot(&wide) - f64::from(value)).abs() < 1e-4);
    assert_eq!(all.len(), 6 * LAYERS);
    for (layer, part, gradient) in all {
        let name = weight_name(layer, LINEAR[part]);
        let before = weights[&name].clone();
        // Entries one by one: the weights are f32, so that steps are large and their errors of third order.
        let mut difference = Array2::<f64>::zeros(before.dim());
        for (at, d) in difference.indexed_iter_mut() {
            let mut moved_by = |step: f32| {
                let entry = &mut weights.get_mut(&name).unwrap()[at];
                *entry = before[at] + step;
                let moved = f64::from(*entry) - f64::from(before[at]);
                (naive(&weights, &tokens, &mut |_, _| ()).dot(&wide), moved)
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
fn fisher_sums_estimate_how_far_embeddings_turn() {
    let (mut weights, model) = encoder();
    let stats = model.fisher(&sentences(), 200, &|_| ()).unwrap();
    let embeddings = |weights: &Weights| sentences().iter().map(|s| naive(weights, s, &mut |_, _| ())).collect();
    let before: Vec<Array1<f64>> = embeddings(&weights);
    // One row after the other: E‖δe‖² for independent changes of variance ε² is ε²·Σ of squared derivatives.
    let name = weight_name(1, LINEAR[4]);
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
