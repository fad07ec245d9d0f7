//! Images as a vision transformer of the DINOv2 architecture has them, whose linear layers are weightpress operators.

// Each example uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use image::imageops::FilterType;
use image::{ImageReader, RgbImage};
use ndarray::{Array1, Array2, Axis, concatenate, s};
use rayon::prelude::*;
use serde::Deserialize;
use weightpress::checkpoint::{Checkpoint, Loader};
use weightpress::linalg::{Faer, Kernels};
use weightpress::scalar::widen;

use super::attention::Heads;
use super::encoder::Encoder;
use super::layers::{Layer, Norm, Trace, Visitor, sized};
use super::llama::json_of;
use super::math::{add_bias, layer_norm_back};

/// The fields of config.json that matter here.
#[derive(Debug, Clone, Deserialize)]
struct Config {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    layer_norm_eps: f32,
    hidden_act: String,
    image_size: usize,
    patch_size: usize,
    #[serde(default)]
    use_swiglu_ffn: bool,
}

/// What red, green and blue are in the mean, and how far they spread, of 1: those of ImageNet if preprocessor_config.json
/// says nothing else.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct Colours {
    image_mean: [f32; 3],
    image_std: [f32; 3],
}

impl Default for Colours {
    fn default() -> Self {
        Colours { image_mean: [0.485, 0.456, 0.406], image_std: [0.229, 0.224, 0.225] }
    }
}

impl Colours {
    fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let name = "preprocessor_config.json";
        if !checkpoint.root().join(name).exists() {
            return Ok(Colours::default());
        }
        let (path, colours) = json_of::<Self>(checkpoint, name)?;
        let spread = colours.image_std;
        ensure!(
            spread.iter().all(|of| of.is_normal()),
            "in {}: `image_std` is {spread:?}, which divides nothing",
            path.display()
        );
        Ok(colours)
    }
}

/// The largest image that a model may have, and how many times as long as wide a photograph may be: pixels that fit into memory.
const LARGEST: usize = 8192;
const NARROWEST: u32 = 32;

/// Squares of pixels, each a column: the red ones row by row, the green ones, the blue ones.
pub struct Image(Array2<f32>);

/// A vision transformer ready to run.
pub struct Dinov2 {
    config: Config,
    heads: Heads,
    colours: Colours,
    /// Of a patch's pixels.
    projection: Array2<f32>,
    bias: Array1<f32>,
    /// The class token at its position, then the positions of patches; features × tokens.
    positions: Array2<f32>,
    layers: Vec<Layer>,
    /// What the outputs of both parts of a block are multiplied with.
    scales: Vec<[Array1<f32>; 2]>,
    norm: Norm,
}

impl Dinov2 {
    /// All images of a folder: the middle of each, as large as fits.
    pub fn images(&self, folder: &Path) -> Result<Vec<Image>> {
        let size = self.config.image_size as u32;
        let read = |path: &Path| -> Result<Image> {
            let image = ImageReader::open(path)?.with_guessed_format()?.decode()?;
            // (The whole of it is scaled before the middle is cut out.)
            let (width, height) = (image.width(), image.height());
            let narrow = width.max(height) / width.min(height).max(1) > NARROWEST;
            ensure!(!narrow, "{width}x{height} pixels, more than {NARROWEST} times as long as wide");
            Ok(self.patches(&image.resize_to_fill(size, size, FilterType::CatmullRom).into_rgb8()))
        };
        let each = files(folder)?.into_par_iter();
        each.map(|path| read(&path).with_context(|| format!("reading {}", path.display()))).collect()
    }

    /// An image of the model's size in patches.
    pub fn patches(&self, pixels: &RgbImage) -> Image {
        let (patch, across) = (self.config.patch_size, self.config.image_size / self.config.patch_size);
        let Colours { image_mean, image_std } = &self.colours;
        Image(Array2::from_shape_fn((3 * patch * patch, across * across), |(at, of)| {
            let (colour, y, x) = (at / (patch * patch), at / patch % patch, at % patch);
            let pixel = pixels.get_pixel((of % across * patch + x) as u32, (of / across * patch + y) as u32);
            (f32::from(pixel[colour]) / 255.0 - image_mean[colour]) / image_std[colour]
        }))
    }
}

/// The PNG and JPEG files of a folder in the order of their names; at least one.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    paths.retain(|path| {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        ["png", "jpg", "jpeg"].contains(&extension.as_str())
    });
    paths.sort();
    ensure!(!paths.is_empty(), "{} has no PNG or JPEG files", folder.display());
    Ok(paths)
}

/// Every feature times its factor.
fn scaled(mut x: Array2<f32>, factors: &Array1<f32>) -> Array2<f32> {
    x *= &factors.view().insert_axis(Axis(1));
    x
}

impl Encoder for Dinov2 {
    type Sample = Image;
    const LINEAR: [&'static str; 6] = [
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "mlp.fc1",
        "mlp.fc2",
    ];

    fn load_by(weights: &mut Loader<'_, f32>, checkpoint: &Checkpoint) -> Result<Self> {
        let (path, config) = json_of::<Config>(checkpoint, "config.json")?;
        let (hidden, patch) = (config.hidden_size, config.patch_size);
        let heads =
            Heads::even(hidden, config.num_attention_heads).with_context(|| format!("in {}", path.display()))?;
        let act = &config.hidden_act;
        ensure!(act == "gelu", "in {}: `hidden_act` is {act}, expected gelu", path.display());
        ensure!(!config.use_swiglu_ffn, "in {}: `use_swiglu_ffn` is not supported", path.display());
        let size = config.image_size;
        let across = size.checked_div(patch).unwrap_or(0);
        let fits = across > 0 && size <= LARGEST;
        ensure!(fits, "in {}: patches of {patch} pixels in images of {size}, expected 1 to {LARGEST}", path.display());
        let colours = Colours::of(checkpoint)?;
        let (mut layers, mut scales) = (Vec::new(), Vec::new());
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("encoder.layer.{i}.{part}");
            let norms = ["norm1", "norm2"].map(name);
            layers.push(Layer::load(weights, checkpoint, Self::LINEAR.map(name), norms, hidden)?);
            let scale = |part: &str| sized(checkpoint, &name(&format!("{part}.lambda1")), hidden);
            scales.push([scale("layer_scale1")?, scale("layer_scale2")?]);
        }
        let matrix = |name: &str, (m, n): (usize, usize)| -> Result<Array2<f32>> {
            let stored = checkpoint.get(name)?;
            let numbers = widen::<f32>(stored.dtype, stored.bytes)?;
            let shape = stored.shape;
            Array2::from_shape_vec((m, n), numbers).with_context(|| format!("{name} is {shape:?}, expected {m}x{n}"))
        };
        let class = matrix("embeddings.cls_token", (1, hidden))?;
        let (name, patches) = ("embeddings.position_embeddings", across * across);
        // (Checkpoints that went through other formats may lack the first one, which then is zero.)
        let of_patches = "embeddings.patch_position_embeddings";
        let mut positions = match checkpoint.get(name).is_err() && checkpoint.get(of_patches).is_ok() {
            true => concatenate![Axis(0), Array2::zeros((1, hidden)), matrix(of_patches, (patches, hidden))?],
            false => matrix(name, (1 + patches, hidden))?,
        };
        let mut first = positions.row_mut(0);
        first += &class.row(0);
        let projection = "embeddings.patch_embeddings.projection";
        Ok(Dinov2 {
            projection: matrix(&format!("{projection}.weight"), (hidden, 3 * patch * patch))?,
            bias: sized(checkpoint, &format!("{projection}.bias"), hidden)?,
            positions: positions.t().as_standard_layout().into_owned(),
            norm: Norm::load(checkpoint, "layernorm", hidden)?,
            config,
            heads,
            colours,
            layers,
            scales,
        })
    }

    fn layers(&self) -> &[Layer] {
        &self.layers
    }

    fn features(&self) -> usize {
        self.config.hidden_size
    }

    fn tokens(&self, _: &Image) -> usize {
        self.positions.ncols()
    }

    fn start(&self, image: &Image) -> Result<Array2<f32>> {
        let (found, expected) = (image.0.dim(), (self.projection.ncols(), self.positions.ncols() - 1));
        ensure!(found == expected, "an image of {found:?} numbers and patches for a model of {expected:?}");
        let mut patches: Array2<f32> = Faer.matmul(self.projection.view(), image.0.view());
        add_bias(&mut patches, &self.bias);
        let mut x = self.positions.clone();
        let mut of_patches = x.slice_mut(s![.., 1..]);
        of_patches += &patches;
        Ok(x)
    }

    /// Norms come before what is added up.
    fn pass(&self, i: usize, x: Array2<f32>) -> Result<(Trace, Array2<f32>)> {
        let (layer, eps, [first, second]) = (&self.layers[i], self.config.layer_norm_eps, &self.scales[i]);
        let input = layer.norms[0].apply(&x, eps);
        let ([q, k, v, mixed], output) = layer.attend(&input, self.heads)?;
        let attended = &x + &scaled(output, first);
        let middle = layer.norms[1].apply(&attended, eps);
        let ([up, gelu], down) = layer.widen(&middle)?;
        let y = &attended + &scaled(down, second);
        Ok((Trace { input, q, k, v, mixed, middle, up, gelu, normed: [x, attended] }, y))
    }

    fn back(&self, i: usize, trace: &Trace, mut d: Array2<f32>, visit: Visitor<'_>) -> Result<Array2<f32>> {
        let (layer, eps, [first, second]) = (&self.layers[i], self.config.layer_norm_eps, &self.scales[i]);
        let [x, attended] = &trace.normed;
        let at_middle = layer.widen_back(trace, &scaled(d.clone(), second), visit)?;
        d += &layer_norm_back(attended, &layer.norms[1].gain, eps, at_middle);
        let at_input = layer.attend_back(trace, &scaled(d.clone(), first), self.heads, visit)?;
        d += &layer_norm_back(x, &layer.norms[0].gain, eps, at_input);
        Ok(d)
    }

    /// The class token behind the last norm.
    fn pooled(&self, x: &Array2<f32>) -> Result<Array1<f32>> {
        let class = x.slice(s![.., ..1]).as_standard_layout().into_owned();
        Ok(self.norm.apply(&class, self.config.layer_norm_eps).column(0).to_owned())
    }

    fn pooled_back(&self, x: &Array2<f32>, d: Array1<f32>) -> Array2<f32> {
        let class = x.slice(s![.., ..1]).as_standard_layout().into_owned();
        let at_class = layer_norm_back(&class, &self.norm.gain, self.config.layer_norm_eps, d.insert_axis(Axis(1)));
        let mut at_each = Array2::zeros(x.dim());
        at_each.slice_mut(s![.., ..1]).assign(&at_class);
        at_each
    }
}
