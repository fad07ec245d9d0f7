//! The examples' encoder against a forward pass written from the definitions, in f64.

use std::collections::HashMap;

use safetensors::tensor::{Dtype, TensorView};
use weightpress::checkpoint::Checkpoint;
use weightpress::ndarray::{Array1, Array2, ArrayView1, Axis, s};

use super::run::matrix;
use super::support::bert::Bert;

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

/// One token a row.
fn naive(weights: &Weights, tokens: &[usize]) -> Array1<f64> {
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
    let linear =
        |x: &Array2<f64>, name: String| x.dot(&get(&format!("{name}.weight")).t()) + row(format!("{name}.bias"));
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
    let folder = tempfile::tempdir().unwrap();
    let weights = weights();
    write(folder.path(), &weights);
    let model = Bert::load(&Checkpoint::open(folder.path()).unwrap()).unwrap();
    for tokens in [&[3][..], &[1, 7, 2, 2, 10], &[5, 0, 9, 4, 4, 4, 8, 1, 6, 3, 2, 10, 7, 0, 1, 5]] {
        let (found, expected) = (model.embed(tokens).unwrap(), naive(&weights, tokens));
        let gap = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(gap < 1e-5, "{gap}");
    }
    assert!(
        model.embed(&[]).is_err() && model.embed(&[VOCABULARY]).is_err() && model.embed(&[0; LONGEST + 1]).is_err()
    );
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
