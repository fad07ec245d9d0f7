//! What the blocks of encoders are made of: linear layers with a bias, whose weights are weightpress operators, and norms.

// Each example uses a part of it.
#![allow(dead_code)]

use anyhow::{Result, ensure};
use ndarray::{Array1, Array2};
use weightpress::checkpoint::{Checkpoint, Loader};
use weightpress::linalg::{Faer, Kernels};
use weightpress::operator::{LinearOperator, Operator, apply_all};

use super::attention::{Heads, attention};
use super::fisher::attention_back;
use super::llama::vector;
use super::math::{add_bias, gelu, gelu_back, layer_norm};

/// A linear layer with its bias.
pub struct Linear {
    pub weight: Operator<f32>,
    bias: Array1<f32>,
}

impl Linear {
    fn apply(&self, x: &Array2<f32>) -> Result<Array2<f32>> {
        let [y] = Self::apply_all([self], x)?;
        Ok(y)
    }

    /// Several layers with the same input.
    fn apply_all<const N: usize>(layers: [&Self; N], x: &Array2<f32>) -> Result<[Array2<f32>; N]> {
        let mut all = apply_all(layers.map(|layer| &layer.weight), x.view())?;
        all.iter_mut().zip(layers).for_each(|(y, layer)| add_bias(y, &layer.bias));
        Ok(all)
    }
}

/// A layer norm.
pub struct Norm {
    pub gain: Array1<f32>,
    bias: Array1<f32>,
}

impl Norm {
    pub fn load(checkpoint: &Checkpoint, name: &str, features: usize) -> Result<Self> {
        let of = |part: &str| sized(checkpoint, &format!("{name}.{part}"), features);
        Ok(Norm { gain: of("weight")?, bias: of("bias")? })
    }

    pub fn apply(&self, x: &Array2<f32>, eps: f32) -> Array2<f32> {
        let mut y = x.clone();
        layer_norm(&mut y, &self.gain, &self.bias, eps);
        y
    }
}

/// A vector of a checkpoint that has this length.
pub fn sized(checkpoint: &Checkpoint, name: &str, length: usize) -> Result<Array1<f32>> {
    let vector = vector(checkpoint, name)?;
    ensure!(vector.len() == length, "{name} has {} numbers, where {length} are needed", vector.len());
    Ok(vector)
}

/// One block: attention and two layers with GELU between them, and two norms, which architectures put in different places.
pub struct Layer {
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub output: Linear,
    pub up: Linear,
    pub down: Linear,
    pub norms: [Norm; 2],
}

/// What a block computes on its way, features × tokens.
pub struct Trace {
    /// What q, k and v are computed from.
    pub input: Array2<f32>,
    pub q: Array2<f32>,
    pub k: Array2<f32>,
    pub v: Array2<f32>,
    pub mixed: Array2<f32>,
    /// What the two layers see.
    pub middle: Array2<f32>,
    /// Before GELU, and after.
    pub up: Array2<f32>,
    pub gelu: Array2<f32>,
    /// What the norms see.
    pub normed: [Array2<f32>; 2],
}

impl Trace {
    /// What the linear layers see: q, k and v; output; up; down.
    pub fn inputs(&self) -> [&Array2<f32>; 4] {
        [&self.input, &self.mixed, &self.middle, &self.gelu]
    }
}

/// Is shown the gradient of each linear weight, m×n: its position in [`Layer::linear_mut`]'s order, gradient.
pub type Visitor<'v> = &'v mut dyn FnMut(usize, Array2<f32>);

impl Layer {
    /// Linear layers and norms of these names.
    pub fn load(
        weights: &mut Loader<'_, f32>,
        checkpoint: &Checkpoint,
        names: [String; 6],
        norms: [String; 2],
        hidden: usize,
    ) -> Result<Self> {
        let mut linear = |name: String, outputs: Option<usize>, inputs: usize| -> Result<Linear> {
            let weight = weights.operator(&format!("{name}.weight"))?;
            let (m, n) = weight.shape();
            let outputs = outputs.unwrap_or(m);
            ensure!(
                (m, n) == (outputs, inputs),
                "{name}.weight is {m}x{n}, where config.json needs {outputs}x{inputs}"
            );
            Ok(Linear { weight, bias: sized(checkpoint, &format!("{name}.bias"), m)? })
        };
        let [query, key, value, output, up, down] = names;
        let up = linear(up, None, hidden)?;
        let ffn = up.weight.shape().0;
        let [first, second] = norms;
        Ok(Layer {
            query: linear(query, Some(hidden), hidden)?,
            key: linear(key, Some(hidden), hidden)?,
            value: linear(value, Some(hidden), hidden)?,
            output: linear(output, Some(hidden), hidden)?,
            up,
            down: linear(down, Some(hidden), ffn)?,
            norms: [Norm::load(checkpoint, &first, hidden)?, Norm::load(checkpoint, &second, hidden)?],
        })
    }

    /// The linear layers: query, key, value, output, up, down.
    pub fn linear_mut(&mut self) -> [&mut Operator<f32>; 6] {
        let Layer { query, key, value, output, up, down, .. } = self;
        [query, key, value, output, up, down].map(|linear| &mut linear.weight)
    }

    /// q, k, v, what they mix to, and the output of that.
    pub fn attend(&self, input: &Array2<f32>, heads: Heads) -> Result<([Array2<f32>; 4], Array2<f32>)> {
        let [q, k, v] = Linear::apply_all([&self.query, &self.key, &self.value], input)?;
        let mixed = attention(&q, k.t(), v.t(), heads, false);
        let output = self.output.apply(&mixed)?;
        Ok(([q, k, v, mixed], output))
    }

    /// What the first of two layers gives, that after GELU, and what the second one makes of it.
    pub fn widen(&self, middle: &Array2<f32>) -> Result<([Array2<f32>; 2], Array2<f32>)> {
        let up = self.up.apply(middle)?;
        let mut after = up.clone();
        gelu(&mut after);
        let down = self.down.apply(&after)?;
        Ok(([up, after], down))
    }

    /// The gradient at the input of [`Layer::attend`] from that at its output.
    pub fn attend_back(&self, trace: &Trace, d: &Array2<f32>, heads: Heads, visit: Visitor<'_>) -> Result<Array2<f32>> {
        let at_mixed = through(3, &self.output, d, &trace.mixed, visit)?;
        let (d_q, d_k, d_v) = attention_back([&trace.q, &trace.k, &trace.v], &at_mixed, heads, false);
        let mut d = through(2, &self.value, &d_v, &trace.input, visit)?;
        d += &through(1, &self.key, &d_k, &trace.input, visit)?;
        d += &through(0, &self.query, &d_q, &trace.input, visit)?;
        Ok(d)
    }

    /// The gradient at the input of [`Layer::widen`] from that at its output.
    pub fn widen_back(&self, trace: &Trace, d: &Array2<f32>, visit: Visitor<'_>) -> Result<Array2<f32>> {
        let mut at_up = through(5, &self.down, d, &trace.gelu, visit)?;
        gelu_back(&mut at_up, &trace.up);
        through(4, &self.up, &at_up, &trace.middle, visit)
    }
}

/// Through a linear layer: its weight's gradient is d·xᵀ, that at its input Wᵀ·d.
fn through(part: usize, linear: &Linear, d: &Array2<f32>, x: &Array2<f32>, visit: Visitor<'_>) -> Result<Array2<f32>> {
    visit(part, Faer.matmul(d.view(), x.t().as_standard_layout().view()));
    Ok(linear.weight.apply_transpose(d.view())?)
}
