//! What the forward passes compute beside products. Activations are features × tokens, so that every step
//! goes along rows of consecutive tokens, with the vectors of the machine (chosen by `pulp` at run time).

// Each example uses a part of it.
#![allow(dead_code)]

use ndarray::{Array1, Array2, Axis};
use pulp::Arch;

/// eˣ to about one unit in the last place; 0 and infinity are approached, not reached.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // x = n·ln 2 + r. Adding 1.5·2²³ rounds to an integer, and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    // Cephes' polynomial for eʳ.
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

/// erf to some 10⁻⁷.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.5 * a);
    // Numerical Recipes, erfc by a Chebyshev fit: relative error below 1.2·10⁻⁷.
    let p = 0.170_872_77;
    let p = p * t - 0.822_152_23;
    let p = p * t + 1.488_515_9;
    let p = p * t - 1.135_204;
    let p = p * t + 0.278_868_07;
    let p = p * t - 0.186_288_06;
    let p = p * t + 0.096_784_18;
    let p = p * t + 0.374_091_96;
    let p = p * t + 1.000_023_7;
    let p = p * t - 1.265_512_2;
    let rest = t * exp(p - a * a);
    if x >= 0.0 { 1.0 - rest } else { rest - 1.0 }
}

/// The rows of a matrix that has its elements in order.
fn rows(x: &Array2<f32>) -> std::slice::ChunksExact<'_, f32> {
    x.as_slice().unwrap_or_default().chunks_exact(x.ncols().max(1))
}

fn rows_mut(x: &mut Array2<f32>) -> std::slice::ChunksExactMut<'_, f32> {
    let columns = x.ncols().max(1);
    x.as_slice_mut().unwrap_or_default().chunks_exact_mut(columns)
}

/// 1/√(mean of squares + ε) of each token.
pub fn rms_scale(x: &Array2<f32>, eps: f32) -> Vec<f32> {
    let mut scale = vec![0.0f32; x.ncols()];
    Arch::new().dispatch(|| {
        match (x.as_slice(), &mut scale[..]) {
            // One token: its features are what lies in order.
            (Some(x), [scale]) => {
                let mut sums = [0.0f32; 32];
                let (whole, rest) = x.as_chunks::<32>();
                whole.iter().for_each(|x| sums.iter_mut().zip(x).for_each(|(s, v)| *s += v * v));
                sums.iter_mut().zip(rest).for_each(|(s, v)| *s += v * v);
                *scale = sums.iter().sum();
            }
            _ => rows(x).for_each(|row| scale.iter_mut().zip(row).for_each(|(s, v)| *s += v * v)),
        }
        scale.iter_mut().for_each(|s| *s = 1.0 / (*s / x.nrows() as f32 + eps).sqrt());
    });
    scale
}

/// Every token divided by its root mean square, every feature times its gain.
pub fn rms_norm(x: &Array2<f32>, gain: &Array1<f32>, eps: f32) -> Array2<f32> {
    let (mut y, scale) = (Array2::zeros(x.dim()), rms_scale(x, eps));
    Arch::new().dispatch(|| match (y.as_slice_mut(), x.as_slice(), gain.as_slice(), &scale[..]) {
        (Some(y), Some(x), Some(gain), [s]) => {
            y.iter_mut().zip(x).zip(gain).for_each(|((y, x), gain)| *y = x * s * gain);
        }
        _ => {
            for ((y, x), gain) in rows_mut(&mut y).zip(rows(x)).zip(gain) {
                y.iter_mut().zip(x).zip(&scale).for_each(|((y, x), s)| *y = x * s * gain);
            }
        }
    });
    y
}

/// Every token with its mean taken off and divided by its standard deviation, every feature times its gain
/// plus its bias.
pub fn layer_norm(x: &mut Array2<f32>, gain: &Array1<f32>, bias: &Array1<f32>, eps: f32) {
    let (mut mean, mut scale) = (vec![0.0f32; x.ncols()], vec![0.0f32; x.ncols()]);
    let features = x.nrows() as f32;
    Arch::new().dispatch(|| {
        rows(x).for_each(|row| mean.iter_mut().zip(row).for_each(|(m, v)| *m += v));
        mean.iter_mut().for_each(|m| *m /= features);
        for row in rows(x) {
            scale.iter_mut().zip(row).zip(&mean).for_each(|((s, v), m)| *s += (v - m) * (v - m));
        }
        scale.iter_mut().for_each(|s| *s = 1.0 / (*s / features + eps).sqrt());
        for ((row, gain), bias) in rows_mut(x).zip(gain).zip(bias) {
            row.iter_mut().zip(&mean).zip(&scale).for_each(|((v, m), s)| *v = (*v - m) * s * gain + bias);
        }
    });
}

/// The gradient at [`layer_norm`]'s input x, from that at its output: with x̂ = (x − mean)·s and h = gain·d it is
/// s·(h − mean(h) − x̂·mean(h·x̂)) of each token.
pub fn layer_norm_back(x: &Array2<f32>, gain: &Array1<f32>, eps: f32, mut d: Array2<f32>) -> Array2<f32> {
    let features = x.nrows() as f32;
    d *= &gain.view().insert_axis(Axis(1));
    let mut unit = x - &(x.sum_axis(Axis(0)) / features);
    let scale = unit.fold_axis(Axis(0), 0.0f32, |sum, v| sum + v * v).mapv(|sum| 1.0 / (sum / features + eps).sqrt());
    unit *= &scale;
    let (mean, along) = (d.sum_axis(Axis(0)) / features, (&d * &unit).sum_axis(Axis(0)) / features);
    unit *= &along;
    d -= &unit;
    d -= &mean;
    d *= &scale;
    d
}

/// gate ← SiLU(gate)·up.
pub fn swiglu(gate: &mut Array2<f32>, up: &Array2<f32>) {
    Arch::new().dispatch(|| {
        let (gate, up) = (gate.as_slice_mut().unwrap_or_default(), up.as_slice().unwrap_or_default());
        gate.iter_mut().zip(up).for_each(|(g, u)| *g = *g / (1.0 + exp(-*g)) * u);
    });
}

/// The gradients at gate and up, from that at SiLU(gate)·up (which becomes the gate's).
pub fn swiglu_back(d: &mut Array2<f32>, gate: &Array2<f32>, up: &Array2<f32>) -> Array2<f32> {
    let mut d_up = Array2::zeros(up.dim());
    Arch::new().dispatch(|| {
        for (((d, d_up), gate), up) in rows_mut(d).zip(rows_mut(&mut d_up)).zip(rows(gate)).zip(rows(up)) {
            for (((d, d_up), g), u) in d.iter_mut().zip(d_up).zip(gate).zip(up) {
                let s = 1.0 / (1.0 + exp(-g));
                *d_up = *d * g * s;
                *d *= u * s * (1.0 + g * (1.0 - s));
            }
        }
    });
    d_up
}

/// GELU by the error function, in place.
pub fn gelu(x: &mut Array2<f32>) {
    Arch::new().dispatch(|| {
        for row in rows_mut(x) {
            row.iter_mut().for_each(|v| *v *= 0.5 * (1.0 + erf(*v * std::f32::consts::FRAC_1_SQRT_2)));
        }
    });
}

/// The gradient at [`gelu`]'s input x from that at its output, in place: times Φ(x) + x·φ(x).
pub fn gelu_back(d: &mut Array2<f32>, x: &Array2<f32>) {
    use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};
    Arch::new().dispatch(|| {
        for (d, x) in rows_mut(d).zip(rows(x)) {
            for (d, x) in d.iter_mut().zip(x) {
                let density = 0.5 * FRAC_1_SQRT_2 * FRAC_2_SQRT_PI * exp(-0.5 * x * x);
                *d *= 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2)) + x * density;
            }
        }
    });
}

/// Adds a bias to every token.
pub fn add_bias(x: &mut Array2<f32>, bias: &Array1<f32>) {
    for (row, bias) in rows_mut(x).zip(bias) {
        row.iter_mut().for_each(|v| *v += bias);
    }
}

/// scores ← exp(scale·(scores − their largest)) down each column; the sums of the columns. Entries of row
/// p left of column p − `seen` become 0: what is in rows from `seen` on has not been read by then.
pub fn softmax(scores: &mut Array2<f32>, seen: usize, scale: f32) -> Vec<f32> {
    let columns = scores.ncols();
    let (mut top, mut sums) = (vec![f32::NEG_INFINITY; columns], vec![0.0f32; columns]);
    let first = |p: usize| p.saturating_sub(seen).min(columns);
    Arch::new().dispatch(|| {
        for (p, row) in rows(scores).enumerate() {
            top[first(p)..].iter_mut().zip(&row[first(p)..]).for_each(|(t, z)| *t = if *z > *t { *z } else { *t });
        }
        for (p, row) in rows_mut(scores).enumerate() {
            let (future, past) = row.split_at_mut(first(p));
            future.fill(0.0);
            for ((z, top), sum) in past.iter_mut().zip(&top[first(p)..]).zip(&mut sums[first(p)..]) {
                *z = exp((*z - top) * scale);
                *sum += *z;
            }
        }
    });
    sums
}

/// Every column times its factor.
pub fn scale_columns(x: &mut Array2<f32>, factors: &[f32]) {
    Arch::new().dispatch(|| {
        for row in rows_mut(x) {
            row.iter_mut().zip(factors).for_each(|(v, f)| *v *= f);
        }
    });
}

/// −ln p of each target under the softmax of its column, in nats. The logits become e^(z − their largest),
/// and what they sum up to is returned beside.
pub fn losses(logits: &mut Array2<f32>, targets: &[usize]) -> (Vec<f64>, Vec<f64>) {
    /// Rows whose sum stays in f32.
    const BLOCK: usize = 64;
    let columns = logits.ncols();
    let at: Vec<f32> = targets.iter().enumerate().map(|(t, &target)| logits[(target, t)]).collect();
    let (mut top, mut sums) = (vec![f32::NEG_INFINITY; columns], vec![0.0f64; columns]);
    Arch::new().dispatch(|| {
        for row in rows(logits) {
            top.iter_mut().zip(row).for_each(|(t, z)| *t = if *z > *t { *z } else { *t });
        }
        let mut part = vec![0.0f32; columns];
        for block in logits.as_slice_mut().unwrap_or_default().chunks_mut(BLOCK * columns.max(1)) {
            part.fill(0.0);
            for row in block.chunks_exact_mut(columns) {
                for ((z, top), part) in row.iter_mut().zip(&top).zip(&mut part) {
                    *z = exp(*z - top);
                    *part += *z;
                }
            }
            sums.iter_mut().zip(&part).for_each(|(sum, part)| *sum += f64::from(*part));
        }
    });
    let each = sums.iter().zip(&top).zip(&at).map(|((sum, top), at)| sum.ln() + f64::from(*top) - f64::from(*at));
    (each.collect(), sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_erf_are_those_of_the_books() {
        for i in -2000..=2000 {
            let x = i as f32 * 0.04;
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / exact - 1.0).abs() < 3e-7, "exp({x}): {ours} {exact}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::NAN).is_nan());
        for (x, exact) in [(0.0, 0.0), (0.1, 0.112_463), (0.5, 0.520_5), (1.0, 0.842_700_8), (2.5, 0.999_593)] {
            assert!((erf(x) - exact).abs() < 5e-7 && (erf(-x) + exact).abs() < 5e-7, "erf({x}): {}", erf(x));
        }
    }

    #[test]
    fn softmax_sees_the_past_only() {
        let mut scores = Array2::from_shape_fn((5, 3), |(p, q)| ((p * 7 + q * 3) % 5) as f32);
        let before = scores.clone();
        let sums = softmax(&mut scores, 2, 0.5);
        for q in 0..3 {
            let seen: f32 = (0..=q + 2).map(|p| (0.5 * before[(p, q)]).exp()).sum();
            for p in 0..5 {
                let expected = if p <= q + 2 { (0.5 * before[(p, q)]).exp() / seen } else { 0.0 };
                assert!((scores[(p, q)] / sums[q] - expected).abs() < 1e-6);
            }
        }
    }
}
