//! Rotary positions and softmax attention on activations of features × tokens.

// Each example uses a part of it.
#![allow(dead_code)]

use std::ops::Range;

use anyhow::{Result, ensure};
use ndarray::{Array2, ArrayView2, s};
use weightpress::linalg::{Faer, Kernels};

use super::math::{scale_columns, softmax};

/// How the features divide into heads; several heads of queries may share one of keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub queries: usize,
    pub keys: usize,
    /// Features of each.
    pub width: usize,
}

impl Heads {
    /// So many of equal width, each of queries with keys and values of its own.
    pub fn even(features: usize, count: usize) -> Result<Self> {
        ensure!(features > 0 && count > 0 && features.is_multiple_of(count), "{features} features in {count} heads");
        Ok(Heads { queries: count, keys: count, width: features / count })
    }

    /// Features of a head of queries.
    pub fn own(&self, head: usize) -> Range<usize> {
        head * self.width..(head + 1) * self.width
    }
    /// Features of the keys and values that it sees.
    pub fn shared(&self, head: usize) -> Range<usize> {
        self.own(head * self.keys / self.queries)
    }
    /// What scores are multiplied with.
    pub fn scale(&self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }
}

/// cos and sin of frequency × position, width/2 × tokens.
pub struct Rotary {
    cos: Array2<f32>,
    sin: Array2<f32>,
}

impl Rotary {
    pub fn new(positions: Range<usize>, width: usize, theta: f64) -> Self {
        let start = positions.start;
        let angle = |(j, p): (usize, usize)| (start + p) as f64 / theta.powf(2.0 * j as f64 / width as f64);
        let table = |f: fn(f64) -> f64| Array2::from_shape_fn((width / 2, positions.len()), |at| f(angle(at)) as f32);
        Rotary { cos: table(f64::cos), sin: table(f64::sin) }
    }

    /// Rotates the halves of each head, as Hugging Face's Llama does.
    pub fn rotate(&self, x: &mut Array2<f32>) {
        self.turn(x, 1.0);
    }

    /// The other way round, which is also the transpose.
    pub fn rotate_back(&self, x: &mut Array2<f32>) {
        self.turn(x, -1.0);
    }

    fn turn(&self, x: &mut Array2<f32>, sign: f32) {
        let (half, tokens) = self.cos.dim();
        let (Some(cos), Some(sin)) = (self.cos.as_slice(), self.sin.as_slice()) else { return };
        for head in x.as_slice_mut().unwrap_or_default().chunks_exact_mut((2 * half * tokens).max(1)) {
            let (low, high) = head.split_at_mut(half * tokens);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (x0, x1, s) = (*a, *b, sign * sin);
                *a = x0 * cos - x1 * s;
                *b = x1 * cos + x0 * s;
            }
        }
    }
}

/// Mixes `v` for the queries `q` (features × tokens) over the keys `k` (both tokens × features, those of the
/// queries last). Causal: nobody sees a later token.
pub fn attention(
    q: &Array2<f32>,
    k: ArrayView2<'_, f32>,
    v: ArrayView2<'_, f32>,
    heads: Heads,
    causal: bool,
) -> Array2<f32> {
    /// Queries at a time: of the later keys, causal ones see none.
    const BLOCK: usize = 128;
    let tokens = q.ncols();
    let before = k.nrows() - tokens;
    let mut out = Array2::zeros((heads.queries * heads.width, tokens));
    for head in 0..heads.queries {
        for start in (0..tokens).step_by(BLOCK) {
            let block = start..(start + BLOCK).min(tokens);
            let visible = if causal { before + block.end } else { k.nrows() };
            let (k, v) = (k.slice(s![..visible, heads.shared(head)]), v.slice(s![..visible, heads.shared(head)]));
            let mut scores = Faer.matmul(k, q.slice(s![heads.own(head), block.clone()]));
            let sums = softmax(&mut scores, if causal { before + start } else { k.nrows() }, heads.scale());
            let mut mixed: Array2<f32> = Faer.matmul(v.t(), scores.view());
            scale_columns(&mut mixed, &sums.iter().map(|sum| 1.0 / sum).collect::<Vec<_>>());
            out.slice_mut(s![heads.own(head), block]).assign(&mixed);
        }
    }
    out
}
