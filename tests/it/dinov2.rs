//! The examples' encoder of images against a forward pass written from the definitions, in f64.

use std::path::Path;

use image::{Rgb, RgbImage};
use weightpress::checkpoint::Checkpoint;
use weightpress::ndarray::{Array1, Array2, Axis, concatenate, s};
use weightpress::stats::Kind;

use super::cli::run;
use super::encoder::{Naive, Weights, are_differences, are_sums, write_folder};
use super::run::matrix;
use super::support::dinov2::{Dinov2, Image};
use super::support::encoder::{Encoder, weight_name};
use super::support::samples::{Given, Samples};

const HIDDEN: usize = 8;
const FFN: usize = 12;
const HEADS: usize = 2;
const LAYERS: usize = 2;
const PATCH: usize = 3;
const ACROSS: usize = 2;
const EPS: f64 = 1e-6;
const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
const SPREAD: [f64; 3] = [0.229, 0.224, 0.225];

fn weights() -> Weights {
    let mut shapes = vec![
        ("embeddings.cls_token".to_owned(), 1, HIDDEN),
        ("embeddings.position_embeddings".to_owned(), 1 + ACROSS * ACROSS, HIDDEN),
        ("embeddings.patch_embeddings.projection.weight".to_owned(), HIDDEN, 3 * PATCH * PATCH),
        ("embeddings.patch_embeddings.projection.bias".to_owned(), 1, HIDDEN),
        ("layernorm.weight".to_owned(), 1, HIDDEN),
        ("layernorm.bias".to_owned(), 1, HIDDEN),
    ];
    for i in 0..LAYERS {
        for (part, name) in Dinov2::LINEAR.into_iter().enumerate() {
            let (m, n) = [(HIDDEN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN)][part.saturating_sub(3)];
            shapes.push((weight_name(i, name), m, n));
            shapes.push((format!("encoder.layer.{i}.{name}.bias"), 1, m));
        }
        for name in ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"] {
            shapes.push((format!("encoder.layer.{i}.{name}"), 1, HIDDEN));
        }
        for name in ["layer_scale1.lambda1", "layer_scale2.lambda1"] {
            shapes.push((format!("encoder.layer.{i}.{name}"), 1, HIDDEN));
        }
    }
    shapes.into_iter().enumerate().map(|(i, (name, m, n))| (name, matrix(m, n, 13 * i + 5))).collect()
}

fn write(folder: &Path, weights: &Weights) {
    let config = format!(
        r#"{{"model_type": "dinov2", "hidden_size": {HIDDEN}, "num_hidden_layers": {LAYERS}, "num_attention_heads": {HEADS},
            "layer_norm_eps": {EPS}, "patch_size": {PATCH}, "image_size": {}, "hidden_act": "gelu", "mlp_ratio": 4}}"#,
        PATCH * ACROSS
    );
    write_folder(folder, weights, &config, |name, (m, n)| match name {
        "embeddings.cls_token" | "embeddings.position_embeddings" => vec![1, m, n],
        "embeddings.patch_embeddings.projection.weight" => vec![m, 3, PATCH, PATCH],
        _ if m == 1 => vec![n],
        _ => vec![m, n],
    });
}

/// Pixels of some image.
fn pixels(of: u32) -> RgbImage {
    let side = (PATCH * ACROSS) as u32;
    RgbImage::from_fn(side, side, |x, y| Rgb([0, 1, 2].map(|c| ((x * 37 + y * 91 + c * 53 + of * 29) % 256) as u8)))
}

fn naive(weights: &Weights, pixels: &RgbImage, see: &mut dyn FnMut(&str, &Array2<f64>)) -> Array1<f64> {
    naive_in([MEAN, SPREAD], weights, pixels, see)
}

/// The same with other colours.
fn naive_in(
    [mean, spread]: [[f64; 3]; 2],
    weights: &Weights,
    pixels: &RgbImage,
    see: &mut dyn FnMut(&str, &Array2<f64>),
) -> Array1<f64> {
    let mut of = Naive { weights, heads: HEADS, eps: EPS, see };
    // A convolution whose windows lie side by side.
    let kernel = of.get("embeddings.patch_embeddings.projection.weight");
    let bias = of.row("embeddings.patch_embeddings.projection.bias");
    let patches = Array2::from_shape_fn((ACROSS * ACROSS, HIDDEN), |(patch, feature)| {
        let (top, left) = (patch / ACROSS * PATCH, patch % ACROSS * PATCH);
        let mut sum = bias[feature];
        for (c, y, x) in (0..3).flat_map(|c| (0..PATCH).flat_map(move |y| (0..PATCH).map(move |x| (c, y, x)))) {
            let light = f64::from(pixels.get_pixel((left + x) as u32, (top + y) as u32)[c]) / 255.0;
            sum += kernel[(feature, (c * PATCH + y) * PATCH + x)] * (light - mean[c]) / spread[c];
        }
        sum
    });
    let mut x = concatenate![Axis(0), of.get("embeddings.cls_token"), patches];
    x += &of.get("embeddings.position_embeddings");
    for i in 0..LAYERS {
        let name = |part: &str| format!("encoder.layer.{i}.{part}");
        let names = Dinov2::LINEAR.map(name);
        let seen = of.norm(&x, &name("norm1"));
        let mixed = of.attend(&seen, [0, 1, 2, 3].map(|part| names[part].clone()));
        x += &(mixed * of.row(&name("layer_scale1.lambda1")));
        let seen = of.norm(&x, &name("norm2"));
        x += &(of.widen(&seen, &names[4], &names[5]) * of.row(&name("layer_scale2.lambda1")));
    }
    let class = of.norm(&x.slice(s![..1, ..]).to_owned(), "layernorm").row(0).to_owned();
    &class / class.dot(&class).sqrt()
}

/// An encoder, and its weights.
fn encoder() -> (Weights, Dinov2) {
    let folder = tempfile::tempdir().unwrap();
    let weights = weights();
    write(folder.path(), &weights);
    (weights, load(folder.path()).unwrap())
}

fn load(folder: &Path) -> anyhow::Result<Dinov2> {
    Dinov2::load(&Checkpoint::open(folder).unwrap())
}

fn images(model: &Dinov2, count: u32) -> Vec<Image> {
    (0..count).map(|of| model.patches(&pixels(of))).collect()
}

fn near(found: &Array1<f32>, expected: &Array1<f64>) {
    let gap = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(gap < 1e-5, "{gap}");
}

#[test]
fn embeddings_are_those_of_the_definition() {
    let (weights, model) = encoder();
    let all = model.embed_all(&images(&model, 3), &|_| ()).unwrap();
    for of in 0..3 {
        near(&all.row(of).to_owned(), &naive(&weights, &pixels(of as u32), &mut |_, _| ()));
    }
}

#[test]
fn a_class_token_without_a_position_is_where_it_is() {
    let (folder, mut weights) = (tempfile::tempdir().unwrap(), weights());
    let positions = weights.remove("embeddings.position_embeddings").unwrap();
    weights.insert("embeddings.patch_position_embeddings".into(), positions.slice(s![1.., ..]).to_owned());
    write(folder.path(), &weights);
    let model = load(folder.path()).unwrap();
    let mut positions = positions;
    positions.row_mut(0).fill(0.0);
    weights.insert("embeddings.position_embeddings".into(), positions);
    let expected = naive(&weights, &pixels(1), &mut |_, _| ());
    near(&model.embed(&model.patches(&pixels(1))).unwrap(), &expected);
}

#[test]
fn gram_matrices_are_those_of_the_inputs() {
    let (weights, model) = encoder();
    let stats = model.calibrate(&images(&model, 6), &|_| ()).unwrap();
    are_sums(&stats, 6 * LAYERS, 6, |of, see| drop(naive(&weights, &pixels(of as u32), see)));
}

#[test]
fn gradients_equal_differences_of_the_definition() {
    let (mut weights, model) = encoder();
    let along = Array1::from_shape_fn(HIDDEN, |i| ((i * 5) % 7) as f32 - 2.5);
    let (mut all, wide) = (Vec::new(), along.mapv(f64::from));
    let see = &mut |layer: usize, part: usize, d| all.push((weight_name(layer, Dinov2::LINEAR[part]), d));
    let value = model.gradients(&model.patches(&pixels(4)), &along, see).unwrap();
    let exact = |weights: &Weights| naive(weights, &pixels(4), &mut |_, _| ()).dot(&wide);
    assert!((exact(&weights) - f64::from(value)).abs() < 1e-4);
    assert_eq!(all.len(), 6 * LAYERS);
    are_differences(&mut weights, all, exact);
}

#[test]
fn files_are_read_in_order_scaled_and_cut_to_the_middle() {
    let ((weights, model), folder) = (encoder(), tempfile::tempdir().unwrap());
    assert!(format!("{:#}", model.images(folder.path()).err().unwrap()).contains("no PNG or JPEG files"));
    let side = (PATCH * ACROSS) as u32;
    // Twice as wide as the model's: the middle is what counts.
    let wide = RgbImage::from_fn(2 * side, side, |x, y| match x.checked_sub(side / 2) {
        Some(x) if x < side => *pixels(7).get_pixel(x, y),
        _ => Rgb([255, 0, 255]),
    });
    wide.save(folder.path().join("b.PNG")).unwrap();
    pixels(2).save(folder.path().join("a.png")).unwrap();
    std::fs::write(folder.path().join("notes.txt"), "no image").unwrap();
    let read = model.images(folder.path()).unwrap();
    assert_eq!(read.len(), 2);
    for (image, of) in read.iter().zip([2, 7]) {
        near(&model.embed(image).unwrap(), &naive(&weights, &pixels(of), &mut |_, _| ()));
    }
    let refused = |name: &str, expected: &str| {
        let found = format!("{:#}", model.images(folder.path()).err().unwrap());
        assert!(found.contains(name) && found.contains(expected), "{found}");
    };
    std::fs::write(folder.path().join("c.jpg"), "neither").unwrap();
    refused("c.jpg", "");
    std::fs::remove_file(folder.path().join("c.jpg")).unwrap();
    RgbImage::new(1, 33).save(folder.path().join("d.png")).unwrap();
    refused("d.png", "1x33 pixels");
    RgbImage::new(1, 32).save(folder.path().join("d.png")).unwrap();
    assert_eq!(model.images(folder.path()).unwrap().len(), 3);
    std::fs::create_dir(folder.path().join("e.png")).unwrap();
    refused("e.png", "");
}

#[test]
fn samples_are_what_the_architecture_takes() {
    let (folder, weights) = (tempfile::tempdir().unwrap(), weights());
    write(folder.path(), &weights);
    pixels(3).save(folder.path().join("one.png")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert!(Samples::fit(&checkpoint).unwrap());
    let given = Given { text: None, paragraphs: 1, images: Some(folder.path().to_owned()) };
    let samples = Samples::load(&checkpoint, &given).unwrap().unwrap();
    assert_eq!((samples.tokens(), samples.blocks()), (vec![1 + ACROSS * ACROSS], LAYERS));
    near(&samples.embed(&|_| ()).unwrap().row(0).to_owned(), &naive(&weights, &pixels(3), &mut |_, _| ()));
    assert!(samples.calibrate(&|_| ()).unwrap().has(&weight_name(1, "mlp.fc2"), Kind::Gram));
    assert!(samples.fisher(1, &|_| ()).unwrap().has(&weight_name(0, "mlp.fc1"), Kind::FisherRow));
    let refused = |given: &Given| format!("{:#}", Samples::load(&checkpoint, given).err().unwrap());
    assert!(refused(&Given { images: None, text: Some("a text".into()), ..given.clone() }).contains("--images"));
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"dinov2\"", "\"bert\"")).unwrap();
    assert!(refused(&given).contains("--text"));
    std::fs::write(&config, text.replace("\"dinov2\"", "\"llama\"")).unwrap();
    assert!(!Samples::fit(&checkpoint).unwrap() && Samples::load(&checkpoint, &given).unwrap().is_none());
}

#[test]
fn an_encoder_of_images_is_calibrated_compressed_evaluated_and_compared() {
    let (folder, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(model.path(), &weights());
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for (images, first) in [("seen", 0), ("held-out", 8)] {
        std::fs::create_dir(path(images)).unwrap();
        for of in first..first + 8 {
            pixels(of).save(Path::new(&path(images)).join(format!("{of}.png"))).unwrap();
        }
    }
    let model = model.path().to_str().unwrap();
    let done = |name: &str, arguments: &[&str]| {
        let (code, printed, errors) = run(name, [&[model], arguments].concat());
        assert_eq!(code, Some(0), "{name}: {errors}");
        printed
    };
    let (gram, fisher, smaller) = (path("gram.safetensors"), path("fisher.safetensors"), path("smaller"));
    let printed = done("calibrate", &["--images", &path("seen"), "--out", &gram, "--fisher", &fisher]);
    assert!(printed.contains("8 samples of 40 tokens"), "{printed}");
    let method = ["--method", "quantize", "--metric", "gram-fisher", "--keep", "0.5"];
    done("compress", &[&["--out", &smaller, "--stats", &gram, "--stats", &fisher], &method[..]].concat());
    let printed = done("evaluate", &[&smaller, "--images", &path("held-out"), "--json"]);
    let scores: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let cosine = |at: usize| scores[at]["moved"]["mean_cosine"].as_f64().unwrap();
    assert!((cosine(0) - 1.0).abs() < 1e-6 && cosine(1) < 1.0 && cosine(1) > 0.999, "{printed}");
    assert_eq!(scores[1]["compressed_weights"], 6 * LAYERS);
    let compared = path("compared");
    let compare = ["--images", &path("held-out"), "--stats", &gram, "--out", &compared, "--keep", "0.5"];
    let printed = done("compare", &[&compare[..], &["--only", "^quantize$", "--json"]].concat());
    let all: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(
        (&all["loss"], all["dense"]["loss"].as_f64().map(|loss| loss < 1e-6)),
        (&"1 - cosine".into(), Some(true))
    );
    // Another image is another comparison.
    let keys = |text: &str| {
        let all: serde_json::Value = serde_json::from_str(text).unwrap();
        all["rows"].as_array().unwrap().iter().map(|row| row["key"].to_string()).collect::<Vec<_>>()
    };
    pixels(99).save(Path::new(&path("held-out")).join("8.png")).unwrap();
    let again = done("compare", &[&compare[..], &["--only", "^quantize$", "--json"]].concat());
    assert!(keys(&again).iter().all(|key| !keys(&printed).contains(key)));

    let two = path("two");
    std::fs::create_dir(&two).unwrap();
    for of in 0..2 {
        pixels(of).save(Path::new(&two).join(format!("{of}.png"))).unwrap();
    }
    for (name, arguments, expected) in [
        ("evaluate", vec![model, "--images", &two], "at least 3 are needed"),
        ("evaluate", vec![model, "--text", &gram], "needs --images"),
        ("evaluate", vec![model, "--images", model], "no PNG or JPEG files"),
        ("calibrate", vec![model, "--out", &gram], "--text"),
    ] {
        let (code, _, errors) = run(name, arguments);
        assert!(code == Some(2) && errors.contains(expected), "{name}: {errors}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let refused = |change: &dyn Fn(&mut Weights)| {
        let (folder, mut weights) = (tempfile::tempdir().unwrap(), weights());
        change(&mut weights);
        write(folder.path(), &weights);
        format!("{:#}", load(folder.path()).err().unwrap())
    };
    let name = "encoder.layer.1.layer_scale2.lambda1";
    let found = refused(&|weights| drop(weights.remove(name)));
    assert!(found.contains(name), "{found}");
    let name = "embeddings.position_embeddings";
    let found = refused(&|weights| drop(weights.insert(name.into(), matrix(ACROSS * ACROSS, HIDDEN, 1))));
    assert!(found.contains(name) && found.contains("5x8"), "{found}");
    let found = refused(&|weights| drop(weights.remove(name)));
    assert!(found.contains(name), "{found}");
    let other = "embeddings.patch_position_embeddings";
    let found = refused(&|weights| {
        weights.remove(name);
        weights.insert(other.into(), matrix(3, HIDDEN, 1));
    });
    assert!(found.contains(other) && found.contains("4x8"), "{found}");
    let (folder, weights) = (tempfile::tempdir().unwrap(), weights());
    write(folder.path(), &weights);
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    for (from, to, expected) in [
        ("\"hidden_act\": \"gelu\"", "\"hidden_act\": \"relu\"", "`hidden_act` is relu, expected gelu"),
        ("\"mlp_ratio\": 4", "\"use_swiglu_ffn\": true", "`use_swiglu_ffn`"),
        ("\"num_attention_heads\": 2", "\"num_attention_heads\": 3", "8 features in 3 heads"),
        ("\"num_attention_heads\": 2", "\"num_attention_heads\": 0", "8 features in 0 heads"),
        ("\"patch_size\": 3", "\"patch_size\": 0", "patches of 0"),
        ("\"patch_size\": 3", "\"patch_size\": 7", "patches of 7 pixels in images of 6"),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "encoder.layer.2."),
        ("\"hidden_size\": 8", "\"hidden_size\": 0", "0 features in 2 heads"),
        ("\"image_size\": 6", "\"image_size\": 18446744073709551615", "expected 1 to 8192"),
    ] {
        assert!(text.contains(from), "{from}");
        std::fs::write(&config, text.replace(from, to)).unwrap();
        let found = format!("{:#}", load(folder.path()).err().unwrap());
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn colours_are_those_of_the_model() {
    let (folder, weights) = (tempfile::tempdir().unwrap(), weights());
    write(folder.path(), &weights);
    let told = |text: &str| {
        std::fs::write(folder.path().join("preprocessor_config.json"), text).unwrap();
        load(folder.path())
    };
    let model = told(r#"{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1], "size": {"height": 6}}"#).unwrap();
    let colours = [[0.1, 0.2, 0.3], [0.5, 0.25, 1.0]];
    near(&model.embed(&model.patches(&pixels(5))).unwrap(), &naive_in(colours, &weights, &pixels(5), &mut |_, _| ()));
    for (text, expected) in
        [(r#"{"image_mean": [0.5]}"#, "preprocessor_config.json"), (r#"{"image_std": [0.5, 0, 0.5]}"#, "`image_std`")]
    {
        let found = format!("{:#}", told(text).err().unwrap());
        assert!(found.contains(expected), "{found}");
    }
}

/// Images that were cut for another model, and a model that makes no numbers.
#[test]
fn what_cannot_be_embedded_is_refused() {
    let (mut weights, model) = encoder();
    let folder = tempfile::tempdir().unwrap();
    weights.insert("embeddings.position_embeddings".into(), matrix(10, HIDDEN, 1));
    write(folder.path(), &weights);
    let config = folder.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"image_size\": 6", "\"image_size\": 9")).unwrap();
    let found = format!("{:#}", load(folder.path()).unwrap().embed(&images(&model, 1)[0]).unwrap_err());
    assert!(found.contains("(27, 4)") && found.contains("(27, 9)"), "{found}");
    for name in ["layernorm.weight", "layernorm.bias"] {
        weights.get_mut(name).unwrap().fill(0.0);
    }
    weights.insert("embeddings.position_embeddings".into(), matrix(5, HIDDEN, 1));
    write(folder.path(), &weights);
    let model = load(folder.path()).unwrap();
    let image = &images(&model, 1)[0];
    let along = Array1::ones(HIDDEN);
    for found in [model.embed(image).err(), model.gradients(image, &along, &mut |_, _, _| ()).err()] {
        let found = format!("{:#}", found.unwrap());
        assert!(found.contains("no direction"), "{found}");
    }
}
