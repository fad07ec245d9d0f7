//! How far embeddings move when a model is compressed.

// Each example uses a part of it.
#![allow(dead_code)]

use ndarray::{Array1, Array2, Axis};
use serde::Serialize;

/// How far embeddings have moved.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Moved {
    /// Between an embedding before and after, mean.
    pub mean_cosine: f64,
    /// Rank correlation of the similarities of all pairs before and after.
    pub spearman: f64,
    /// Share of samples whose nearest neighbour stays the same.
    pub same_neighbour: f64,
}

impl Moved {
    /// Compares embeddings of the same samples, one a row.
    pub fn between(before: &Array2<f32>, after: &Array2<f32>) -> Self {
        let count = before.nrows();
        let (a, b) = (before.dot(&before.t()), after.dot(&after.t()));
        let pairs = |s: &Array2<f32>| -> Vec<f32> {
            (0..count).flat_map(|i| (i + 1..count).map(move |j| (i, j))).map(|at| s[at]).collect()
        };
        let nearest =
            |s: &Array2<f32>, i: usize| (0..count).filter(|&j| j != i).max_by(|&j, &k| s[(i, j)].total_cmp(&s[(i, k)]));
        let same = (0..count).filter(|&i| nearest(&a, i) == nearest(&b, i)).count();
        let cosines = (before * after).sum_axis(Axis(1)).mapv(f64::from);
        Moved {
            mean_cosine: cosines.sum() / count as f64,
            spearman: correlation(&ranks(&pairs(&a)), &ranks(&pairs(&b))),
            same_neighbour: same as f64 / count as f64,
        }
    }
}

/// The position of each value in their order.
fn ranks(values: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    order.into_iter().enumerate().for_each(|(rank, at)| ranks[at] = rank as f64);
    ranks
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let centred = |v: &[f64]| {
        let v = Array1::from(v.to_vec());
        let mean = v.sum() / v.len() as f64;
        v - mean
    };
    let (a, b) = (centred(a), centred(b));
    a.dot(&b) / (a.dot(&a) * b.dot(&b)).sqrt()
}
