//! The examples' forward and reverse passes on the bundled model, dense and from factors.

use std::path::Path;

use weightpress::checkpoint::Checkpoint;
use weightpress::factorize::{Factorize, Method, Problem};
use weightpress::metric::MetricSpec;
use weightpress::ndarray::{Array2, Axis, concatenate, s};
use weightpress::operator::{ActivationBits, Dense, LinearOperator, Operator};
use weightpress::run::{Options, Silent};
use weightpress::stats::Kind;
use weightpress::{Budget, Recipe, Rule, Stats};

use super::support::llama::{Cache, LINEAR, Llama, weight_name};
use super::support::walk::correction;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/model");

fn bundled() -> Llama {
    Llama::load(&Checkpoint::open(MODEL).unwrap()).unwrap()
}

fn text(length: usize) -> Vec<usize> {
    let text = std::fs::read(Path::new(MODEL).join("heldout.txt")).unwrap();
    text.into_iter().take(length).map(usize::from).collect()
}

/// The same model with all its linear layers cut in halves.
fn factored() -> Llama {
    let mut model = bundled();
    let svd = Method::named("svd").unwrap();
    for layer in &mut model.layers {
        for linear in layer.linear_mut() {
            let dense = linear.to_dense();
            *linear = svd.factorize(&[Problem::new("w", dense.view(), Budget::Keep(0.5))]).unwrap().remove(0);
        }
    }
    model
}

fn apart(a: &Array2<f32>, b: &Array2<f32>) -> f32 {
    let norm = |x: &Array2<f32>| x.iter().map(|v| v * v).sum::<f32>().sqrt();
    norm(&(a - b)) / norm(b)
}

#[test]
fn token_by_token_equals_the_whole_window() {
    let tokens = text(150);
    for model in [bundled(), factored()] {
        let whole = model.hidden(&tokens, &mut |_, _| Ok(())).unwrap();
        for steps in [1, 60] {
            let mut cache = Cache::new(&model.config);
            let parts: Vec<_> =
                tokens.chunks(steps).map(|part| model.extend(part, &mut cache, &mut |_, _| Ok(())).unwrap()).collect();
            let parts = concatenate(Axis(1), &parts.iter().map(|part| part.view()).collect::<Vec<_>>()).unwrap();
            assert!(apart(&parts, &whole) < 1e-5, "{steps} at a time: {}", apart(&parts, &whole));
        }
    }
}

#[test]
fn factors_give_what_their_dense_form_gives() {
    let (tokens, model) = (text(100), factored());
    let mut dense = factored();
    for layer in &mut dense.layers {
        for linear in layer.linear_mut() {
            *linear = Operator::Dense(Dense::new(linear.to_dense()));
        }
    }
    let [a, b] = [&model, &dense].map(|model| model.hidden(&tokens, &mut |_, _| Ok(())).unwrap());
    assert!(apart(&a, &b) < 1e-4, "{}", apart(&a, &b));
    // The loss of hidden states by the definition.
    let logits = dense.logits(b.slice(s![.., ..99])).unwrap().mapv(f64::from);
    let naive = (0..99).map(|t| {
        let sum: f64 = logits.column(t).iter().map(|z| z.exp()).sum();
        sum.ln() - logits[(tokens[t + 1], t)]
    });
    let naive = naive.sum::<f64>() / 99.0;
    let loss = dense.mean_loss(&tokens, 100, &|_| ()).unwrap();
    assert!((loss - naive).abs() < 1e-5, "{loss} {naive}");
}

#[test]
fn gradients_equal_finite_differences() {
    let (tokens, mut model) = (text(65), bundled());
    let last = model.layers.len() - 1;
    let mut all = Vec::new();
    let loss = model.gradients(&tokens, &mut |layer, part, gradient| all.push((layer, part, gradient))).unwrap();
    assert!((loss - model.mean_loss(&tokens, 64, &|_| ()).unwrap()).abs() < 1e-5);
    assert_eq!(all.len(), LINEAR.len() * model.layers.len());
    for (layer, part, gradient) in all.iter().filter(|(layer, ..)| [0, last].contains(layer)) {
        // Along the gradient itself the loss changes most: by the gradient's length.
        let length = gradient.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        let weight = model.layers[*layer].linear_mut()[*part].to_dense();
        let step = 0.003 / length.max(1e-3);
        let mut loss_at = |sign: f64| {
            let moved = &weight + &(gradient * (sign * step / length) as f32);
            *model.layers[*layer].linear_mut()[*part] = Operator::Dense(Dense::new(moved));
            model.mean_loss(&tokens, 64, &|_| ()).unwrap()
        };
        let difference = (loss_at(1.0) - loss_at(-1.0)) / (2.0 * step);
        loss_at(0.0);
        assert!((difference / length - 1.0).abs() < 0.01, "{layer} {}: {difference} {length}", LINEAR[*part]);
    }
}

#[test]
fn fisher_sums_are_those_of_the_squared_gradients() {
    let (text, model) = (text(99), bundled());
    let windows: Vec<&[usize]> = text.chunks(33).collect();
    let stats = model.fisher(&windows, &|_| ()).unwrap();
    let mut mean = Array2::<f64>::zeros((1, 1));
    for (i, window) in windows.iter().enumerate() {
        let mut visit = |layer: usize, part: usize, gradient: Array2<f32>| {
            if (layer, part) == (1, 4) {
                let square = gradient.mapv(|v| f64::from(v).powi(2) / 3.0);
                mean = if i == 0 { square } else { &mean + &square };
            }
        };
        model.gradients(window, &mut visit).unwrap();
    }
    let name = weight_name(1, LINEAR[4]);
    for (sums, naive) in [
        (stats.fisher_row(&name).unwrap(), mean.sum_axis(Axis(1))),
        (stats.fisher_col(&name).unwrap(), mean.sum_axis(Axis(0))),
    ] {
        assert!((&sums - &naive).iter().zip(&naive).all(|(d, v)| d.abs() <= 1e-9 * v));
    }
    // What ships beside the model was computed by another program on its calibration text.
    let known = Stats::open(&[Path::new(MODEL).join("fisher.safetensors")]).unwrap();
    assert!(known.has(&name, Kind::FisherRow));
}

/// What is looked up meets no inputs, what is multiplied is off by little, and nothing of it is in the file.
#[test]
fn a_loader_chooses_the_bits_of_inputs() {
    let (text, out) = (text(64), tempfile::tempdir().unwrap());
    let rule = Rule::new(".*weight", Method::named("quantize").unwrap(), Budget::Keep(0.53));
    let exclude = vec![".*norm.*".to_owned()];
    let recipe = Recipe { rules: vec![rule], exclude, ..Recipe::default() };
    let path = out.path().join("smaller");
    let (original, none) = (Checkpoint::open(MODEL).unwrap(), Stats::default());
    recipe.plan(&original, &none).unwrap().run(&path, &Options::default(), &Silent).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    let [eight, sixteen, full] = ActivationBits::ALL.map(|bits| {
        let mut weights = checkpoint.loader().unwrap().with_activation_bits(bits);
        let mut model = Llama::load_by(&mut weights, &checkpoint).unwrap();
        for operator in &model.layers[0].linear_mut() {
            let Operator::Quantized(leaf) = &**operator else { panic!("{operator}") };
            assert_eq!(leaf.activation_bits(), bits);
        }
        (model.embed(&text).unwrap(), model.hidden(&text, &mut |_, _| Ok(())).unwrap())
    });
    assert_eq!((&eight.0, &sixteen.0), (&full.0, &full.0));
    assert!(apart(&sixteen.1, &full.1) < 1e-3, "{}", apart(&sixteen.1, &full.1));
    assert!(apart(&eight.1, &full.1) < 0.05, "{}", apart(&eight.1, &full.1));
}

/// Words are looked up in it, and hidden states multiplied with it.
#[test]
fn an_embedding_that_is_also_the_head_may_be_compressed() {
    let (text, model, out) = (text(128), bundled(), tempfile::tempdir().unwrap());
    let stats = model.calibrate(&text.chunks(64).collect::<Vec<_>>(), &|_| ()).unwrap();
    let hidden: Vec<_> =
        text.chunks(64).map(|window| model.hidden(window, &mut |_, _| Ok(())).unwrap().mapv(f64::from)).collect();
    let naive = hidden.iter().fold(Array2::<f64>::zeros((192, 192)), |sum, h| sum + h.dot(&h.t())) / 128.0;
    let (name, largest) = (model.head_name(), naive.iter().fold(0.0, |most: f64, v| most.max(v.abs())));
    let off = &stats.gram(name).unwrap().matrix() - &naive;
    assert!(off.iter().all(|v| v.abs() < 1e-5 * largest));

    let checkpoint = Checkpoint::open(MODEL).unwrap();
    let smaller = |metric: &str, keep: f64| {
        let rule = Rule::new(name, Method::named("quantize").unwrap(), Budget::Keep(keep));
        let rules = vec![Rule { metric: MetricSpec::named(metric).unwrap(), ..rule }];
        let recipe = Recipe { rules, ..Recipe::default() };
        let out = out.path().join(format!("{metric}{keep}"));
        recipe.plan(&checkpoint, &stats).unwrap().run(&out, &Options::default(), &Silent).unwrap();
        Llama::load(&Checkpoint::open(&out).unwrap()).unwrap()
    };
    let logits = |model: &Llama| model.logits(hidden[0].mapv(|v| v as f32).view()).unwrap();
    let off = |model: &Llama| apart(&logits(model), &logits(&bundled()));
    let eight = smaller("gram", 0.53);
    assert_eq!(eight.embed(&text).unwrap(), eight.head().to_dense().select(Axis(0), &text).reversed_axes());
    assert!(off(&eight) < 0.01, "{}", off(&eight));
    let four = [smaller("gram", 0.28), smaller("frobenius", 0.28)].map(|model| off(&model));
    assert!(four[0] < 0.7 * four[1], "{four:?}");
}

#[test]
fn the_correction_minimises_the_output_error() {
    let numbers = |rows: usize, columns: usize, seed: usize| {
        Array2::from_shape_fn((rows, columns), |(i, j)| (((i * 31 + j * 17 + i * j * seed) % 23) as f64 - 11.0) / 7.0)
    };
    let (w, x) = (numbers(4, 6, 1), numbers(6, 50, 3));
    let moved = &x + &(numbers(6, 50, 5) * 0.3);
    let gram = moved.dot(&moved.t()) / 50.0;
    let drift = (&x - &moved).dot(&moved.t()) / 50.0;
    let error = |target: &Array2<f64>| (w.dot(&x) - target.dot(&moved)).iter().map(|v| v * v).sum::<f64>();
    let best = w.dot(&correction(&gram, &drift, 0.0).unwrap());
    assert!(error(&best) < 0.9 * error(&w));
    for seed in 7..12 {
        let other = &best + &(numbers(4, 6, seed) * 0.01);
        assert!(error(&other) > error(&best));
    }
    // Without drift nothing is corrected.
    let none = correction(&gram, &Array2::zeros((6, 6)), 1e-2).unwrap();
    assert!((&none - &Array2::<f64>::eye(6)).iter().all(|v| v.abs() < 1e-12));
}
