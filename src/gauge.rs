//! Changes of weights that change no output: freedom to spend before compressing.
//!
//! Attention multiplies what a value head gives with the columns of the output projection that read it, and nothing
//! stands between them but a sum over positions. Any invertible matrix M may go in and its inverse out,
//! V_h → M·V_h, O_g → O_g·M⁻¹ for every query head g that reads the key-value head h. With an orthogonal M no
//! number grows. [`align_heads`] uses it to make layers look alike, which is what sharing atoms across layers
//! ([`Masa`](crate::factorize::Masa)) lives on.

use ndarray::{Array2, s};

use crate::error::{Error, Result};
use crate::linalg::{Faer, Kernels};
use crate::scalar::{Real, check_finite};

/// The value and the output projection of one attention layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Attention<T> {
    /// V: (key-value heads · head size) × inputs.
    pub value: Array2<T>,
    /// O: outputs × (heads · head size).
    pub output: Array2<T>,
}

/// How many heads read and give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads; each `query / key_value` consecutive ones read the same key-value head.
    pub query: usize,
    /// Key-value heads.
    pub key_value: usize,
}

/// Rotates each key-value head of each layer towards the sum of that head over the other layers: generalised Procrustes
/// analysis (Gower, Psychometrika 40, 1975), `rounds` times. What attention computes stays the same to rounding;
/// Σ_h ‖Σ_l V_lh‖² does not fall. About 4·h²·n flops for each head, layer and round, h the head size.
///
/// Layers must not have a bias in the value projection (rotate it along, if they do), nor a norm between values and
/// output.
///
/// # Errors
/// [`Error::Shape`] if layers differ in shape or heads do not divide them; [`Error::NonFinite`].
pub fn align_heads<T: Real>(layers: &mut [Attention<T>], heads: Heads, rounds: usize) -> Result<()> {
    let Some(first) = layers.first() else { return Ok(()) };
    let (rows, columns) = (first.value.nrows(), first.output.ncols());
    let Heads { query, key_value } = heads;
    let divides = key_value > 0 && query % key_value == 0 && rows % key_value == 0;
    let size = if divides { rows / key_value } else { 0 };
    if !divides || columns != query * size {
        let expected = format!("values of {key_value} heads, and outputs of {query} heads of the same size");
        return Err(Error::shape(expected, (first.value.dim(), first.output.dim())));
    }
    let shapes = (first.value.dim(), first.output.dim());
    for layer in layers.iter() {
        if (layer.value.dim(), layer.output.dim()) != shapes {
            return Err(Error::shape(shapes, (layer.value.dim(), layer.output.dim())));
        }
        check_finite("value projection", layer.value.iter())?;
        check_finite("output projection", layer.output.iter())?;
    }
    for head in 0..key_value {
        let range = s![head * size..(head + 1) * size, ..];
        for _ in 0..rounds {
            let mut sum = Array2::<f64>::zeros((size, first_inputs(layers)));
            layers.iter().for_each(|layer| sum += &layer.value.slice(range).mapv(|v| v.wide()));
            for layer in layers.iter_mut() {
                let own = layer.value.slice(range).mapv(|v| v.wide());
                let rotation = T::from_view(nearest(&(&sum - &own).dot(&own.t()))?.view()).into_owned();
                let turned = rotation.dot(&layer.value.slice(range));
                sum += &(turned.mapv(|v| v.wide()) - &own);
                layer.value.slice_mut(range).assign(&turned);
                for reader in head * query / key_value..(head + 1) * query / key_value {
                    let range = s![.., reader * size..(reader + 1) * size];
                    let turned = layer.output.slice(range).dot(&rotation.t());
                    layer.output.slice_mut(range).assign(&turned);
                }
            }
        }
    }
    Ok(())
}

fn first_inputs<T>(layers: &[Attention<T>]) -> usize {
    layers.first().map_or(0, |layer| layer.value.ncols())
}

/// The orthogonal M of largest ⟨M, C⟩.
fn nearest(c: &Array2<f64>) -> Result<Array2<f64>> {
    let svd = Kernels::<f64>::svd(&Faer, c.view())?;
    Ok(svd.u.dot(&svd.vt))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(rows: usize, columns: usize, factor: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 7919 + j * factor + i * i * j + factor * 13) % 1009) as f64 / 504.5 - 1.0
        })
    }

    /// Causal attention of one layer with fixed scores: positions × inputs to positions × outputs.
    fn forward(layer: &Attention<f64>, heads: Heads, x: &Array2<f64>) -> Array2<f64> {
        let (t, size) = (x.nrows(), layer.value.nrows() / heads.key_value);
        let values = x.dot(&layer.value.t());
        let mut mixed = Array2::zeros((t, heads.query * size));
        for g in 0..heads.query {
            let h = g * heads.key_value / heads.query;
            for i in 0..t {
                let score = |j: usize| ((g * 5 + i * 3 + j * 7) % 4) as f64 * 0.5;
                let total: f64 = (0..=i).map(|j| score(j).exp()).sum();
                for j in 0..=i {
                    let from = values.slice(s![j, h * size..(h + 1) * size]).to_owned();
                    mixed.slice_mut(s![i, g * size..(g + 1) * size]).scaled_add(score(j).exp() / total, &from);
                }
            }
        }
        mixed.dot(&layer.output.t())
    }

    #[test]
    fn attention_stays_and_layers_come_closer() {
        for heads in
            [Heads { query: 4, key_value: 2 }, Heads { query: 3, key_value: 3 }, Heads { query: 4, key_value: 1 }]
        {
            let (size, n) = (5, 12);
            let layer = |l: usize| Attention {
                value: numbers(heads.key_value * size, n, 31 + 17 * l),
                output: numbers(n, heads.query * size, 7 + 1009 * l),
            };
            let before: Vec<_> = (0..4).map(layer).collect();
            let likeness = |layers: &[Attention<f64>]| {
                let sum = layers.iter().fold(Array2::<f64>::zeros(layers[0].value.dim()), |sum, l| sum + &l.value);
                sum.mapv(|v| v * v).sum()
            };
            let x = numbers(6, n, 3);
            let mut after = before.clone();
            let mut last = likeness(&before);
            for _ in 0..3 {
                align_heads(&mut after, heads, 1).unwrap();
                assert!(likeness(&after) >= last * (1.0 - 1e-12));
                last = likeness(&after);
            }
            assert!(last > 1.2 * likeness(&before));
            for (a, b) in before.iter().zip(&after) {
                let gap = forward(a, heads, &x) - forward(b, heads, &x);
                assert!(gap.iter().all(|v| v.abs() < 1e-10));
            }
        }
        // Layers that differ by a rotation only become the same.
        let heads = Heads { query: 2, key_value: 1 };
        let value = numbers(5, 12, 31);
        let rotation = nearest(&numbers(5, 5, 77)).unwrap();
        let other = Attention { value: rotation.dot(&value), output: numbers(3, 10, 9) };
        let mut layers = [Attention { value, output: numbers(3, 10, 5) }, other];
        align_heads(&mut layers, heads, 5).unwrap();
        assert!((&layers[0].value - &layers[1].value).iter().all(|v| v.abs() < 1e-9));
        assert!(align_heads(&mut layers, Heads { query: 3, key_value: 1 }, 1).is_err());
        assert!(align_heads(&mut layers, Heads { query: 2, key_value: 0 }, 1).is_err());
        layers[1].value[(0, 0)] = f64::NAN;
        assert!(align_heads(&mut layers, heads, 1).is_err());
    }
}
