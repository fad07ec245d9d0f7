use ndarray::Array1;

use super::super::{Form, Svd};
use super::*;
use crate::linalg::{Faer, Kernels};
use crate::metric::{Metric, Weighting};
use crate::scalar::DType;
use crate::stats::Gram;

fn numbers(rows: usize, columns: usize, factor: usize) -> Array2<f64> {
    Array2::from_shape_fn((rows, columns), |(i, j)| {
        ((i * 7919 + j * factor + i * i * j + factor * 13) % 1009) as f64 / 504.5 - 1.0
    })
}

fn gram(n: usize, factor: usize) -> Weighting {
    let x = numbers(n, 2 * n, factor);
    Weighting::Gram(Arc::new(Gram::new("g", x.dot(&x.t()) / (2 * n) as f64).unwrap()))
}

fn problems<'a>(weights: &'a [Array2<f64>], metrics: &[Metric], keep: f64) -> Vec<Problem<'a, f64>> {
    let metric = |l: usize| metrics[l % metrics.len()].clone();
    let of = |(l, w): (usize, &'a Array2<f64>)| Problem::new("w", w.view(), Budget::Keep(keep)).metric(metric(l));
    weights.iter().enumerate().map(of).collect()
}

fn error(group: &[Problem<'_, f64>], found: &[Operator<f64>]) -> f64 {
    group.iter().zip(found).map(|(p, o)| p.error_of(o)).sum()
}

#[test]
fn matrix_pca_is_the_svd_of_the_unfolding() {
    let (m, n, count) = (5, 7, 6);
    let weights: Vec<_> = (0..count).map(|l| numbers(m, n, 31 + 17 * l)).collect();
    let group = problems(&weights, &[Metric::frobenius()], 0.9);
    let parts: Vec<_> = group.iter().map(InParts::of).collect();
    let layers = Layers::new(&parts).unwrap();
    // Layers count by what they are relative to their norms.
    let norms: Vec<f64> = weights.iter().map(|w| w.iter().map(|v| v * v).sum::<f64>().sqrt()).collect();
    let unfolding = Array2::from_shape_fn((m * n, count), |(i, l)| weights[l][(i / n, i % n)] / norms[l]);
    let sigma = Kernels::<f64>::svd(&Faer, unfolding.view()).unwrap().values;
    for atoms in 1..=count {
        let masa = Masa { atoms: Some(atoms), residual: false, rounds: 1, ..Masa::default() };
        let found = layers.solve(&masa, atoms, u64::MAX, 1).unwrap();
        let tail: f64 = sigma.iter().skip(atoms).map(|s| s * s).sum();
        assert!((found.error - tail).abs() < 1e-9 * sigma[0] * sigma[0], "{atoms}: {} {tail}", found.error);
        let captured = 1.0 - tail / sigma.mapv(|s| s * s).sum();
        let (metric, plain) = layers.captured(atoms);
        assert!((metric - captured).abs() < 1e-12 && (plain - captured).abs() < 1e-12);
    }
}

#[test]
fn planted_atoms_are_found_in_any_metric() {
    let (m, n) = (8, 6);
    let atoms = [numbers(m, n, 31), numbers(m, n, 104_729)];
    let weights: Vec<_> = (0..7).map(|l| &atoms[0] * (1.0 + l as f64) + &atoms[1] * (3.0 - l as f64)).collect();
    let own: Vec<Metric> = (0..7).map(|l| Metric { input: gram(n, 7 + l), ..Metric::frobenius() }).collect();
    for metrics in [vec![Metric::frobenius()], own] {
        let group = problems(&weights, &metrics, 0.6);
        let found = Masa { atoms: Some(2), ..Masa::default() }.factorize(&group).unwrap();
        let norm: f64 = group.iter().map(|p| p.metric.squared(p.weight, p.backend)).sum();
        assert!(error(&group, &found) < 1e-12 * norm);
        assert!(Operator::total_bytes(&found) as f64 <= 0.6 * (7 * m * n * 8) as f64);
    }
    // And without being told how many.
    let group = problems(&weights, &[Metric::frobenius()], 0.6);
    let mut notes = Vec::new();
    let found = Masa::default().factorize_noting(&group, &mut notes).unwrap();
    assert!(error(&group, &found) < 1e-6, "{notes:?}");
    assert_eq!(notes.len(), 1, "{notes:?}");
}

#[test]
fn identical_layers_need_one_atom_and_unrelated_ones_none() {
    let (m, n) = (12, 10);
    let same: Vec<_> = (0..5).map(|_| numbers(m, n, 31)).collect();
    let group = problems(&same, &[Metric::frobenius()], 0.3);
    let found = Masa::default().factorize(&group).unwrap();
    assert!(error(&group, &found) < 1e-12);
    let mut notes = Vec::new();
    // Orthogonal to each other, and each of low rank.
    let unrelated: Vec<_> = (0..5)
        .map(|l| Array2::from_shape_fn((m, n), |(i, j)| if j / 2 == l { numbers(m, 1, 31 + l)[(i, 0)] } else { 0.0 }))
        .collect();
    let group = problems(&unrelated, &[Metric::frobenius()], 0.5);
    let found = Masa::default().factorize_noting(&group, &mut notes).unwrap();
    assert!(error(&group, &found) < 1e-12 && notes.iter().any(|note| note.contains("little in common")), "{notes:?}");
    assert!(found.iter().all(|operator| matches!(operator, Operator::Product(_))));
}

#[test]
fn runs_are_where_layers_change() {
    let (m, n) = (6, 5);
    let (a, b) = (numbers(m, n, 31), numbers(m, n, 104_729));
    let weights: Vec<_> = (0..8).map(|l| if l < 3 { &a * (1.0 + l as f64) } else { &b * (l as f64 - 1.0) }).collect();
    let group = problems(&weights, &[Metric::frobenius()], 0.9);
    let parts: Vec<_> = group.iter().map(InParts::of).collect();
    let layers = Layers::new(&parts).unwrap();
    assert_eq!(layers.cut(2, 2).unwrap(), [(0..3, 1), (3..8, 1)]);
    assert_eq!(layers.cut(2, 1).unwrap(), [(0..8, 2)]);
    assert_eq!(layers.cut(1, 4).unwrap(), [(0..8, 1)]);
    let three = layers.cut(4, 3).unwrap();
    assert_eq!((three.len(), three.iter().map(|run| run.1).sum::<usize>()), (3, 4));
    // One pool captures what two runs do, at least.
    let solve = |runs| {
        let masa = Masa { atoms: Some(2), runs, residual: false, rounds: 1, ..Masa::default() };
        layers.solve(&masa, 2, u64::MAX, 1).unwrap()
    };
    assert!(solve(1).error <= solve(2).error + 1e-9 && solve(2).error < 1e-9 * layers.energy());
    assert_eq!(solve(2).runs.len(), 2);
}

#[test]
fn rounds_descend_in_each_layers_own_metric() {
    let (m, n) = (14, 9);
    let common = numbers(m, n, 3);
    let weights: Vec<_> = (0..6).map(|l| &common * (1.0 + l as f64 / 3.0) + numbers(m, n, 31 + 17 * l) * 0.7).collect();
    let output = Weighting::Diagonal(Arc::new(Array1::from_shape_fn(m, |i| 0.5 + (i % 4) as f64)));
    let metrics: Vec<Metric> = (0..6).map(|l| Metric { input: gram(n, 7 + 100 * l), output: output.clone() }).collect();
    let group = problems(&weights, &metrics, 0.7);
    let parts: Vec<_> = group.iter().map(InParts::of).collect();
    let layers = Layers::new(&parts).unwrap();
    for residual in [false, true] {
        let mut last = f64::INFINITY;
        for rounds in 1..5 {
            let masa = Masa { atoms: Some(2), residual, rounds, ..Masa::default() };
            let found = layers.solve(&masa, 2, (0.7 * (6 * m * n * 8) as f64) as u64, rounds).unwrap();
            // Ranks may move between layers as the residuals change: a hair of slack for that.
            assert!(found.error <= last * (1.0 + 1e-3), "{residual} {rounds}: {} after {last}", found.error);
            last = found.error;
        }
    }
}

#[test]
fn the_fast_route_is_as_good_on_layers_of_low_rank() {
    use super::super::Route;
    // Two atoms and three directions of each layer's own, beside little noise.
    let (m, n) = (60, 48);
    let atoms = [numbers(m, n, 31), numbers(m, n, 104_729)];
    let weights: Vec<_> = (0..5)
        .map(|l| {
            let own = numbers(m, 3, 13 + 7 * l).dot(&numbers(3, n, 17 + 5 * l));
            &atoms[0] * (1.0 + l as f64) + &atoms[1] * (3.0 - l as f64) + own * 0.5 + numbers(m, n, 41 + l) * 1e-3
        })
        .collect();
    let group = problems(&weights, &[Metric { input: gram(n, 7), ..Metric::frobenius() }], 0.7);
    let solved = |route, residual| {
        let masa = Masa { atoms: Some(2), residual, route, ..Masa::default() };
        let found = masa.factorize(&group).unwrap();
        (error(&group, &found), Operator::total_bytes(&found))
    };
    let [exact, fast, none] =
        [(Route::Exact, true), (Route::Fast, true), (Route::Fast, false)].map(|(r, on)| solved(r, on));
    assert_eq!(exact.1, fast.1);
    assert!(fast.0 <= 1.25 * exact.0 && fast.0 < 1e-2 * none.0, "{fast:?} {exact:?} {none:?}");
    let output = Weighting::Diagonal(Arc::new(Array1::ones(m)));
    let group = problems(&weights, &[Metric { output, ..Metric::frobenius() }], 0.7);
    let masa = Masa { atoms: Some(2), route: Route::Fast, ..Masa::default() };
    assert!(matches!(masa.factorize(&group), Err(Error::Unsupported(_))));
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let weights = [numbers(4, 3, 31), numbers(4, 3, 7)];
    let group = problems(&weights, &[Metric::frobenius()], 0.5);
    assert!(matches!(Masa { atoms: Some(3), ..Masa::default() }.factorize(&group), Err(Error::Unsupported(_))));
    assert!(matches!(Masa { atoms: Some(2), ..Masa::default() }.factorize(&group), Err(Error::Budget { .. })));
    let other = [numbers(4, 3, 31), numbers(3, 4, 7)];
    let group = problems(&other, &[Metric::frobenius()], 0.5);
    assert!(matches!(Masa::default().factorize(&group), Err(Error::Shape { .. })));
}

#[test]
fn layers_in_parts_are_what_they_are_in_memory() {
    use crate::scalar::{DType, narrow};
    use crate::tensor::{Rows, Source, Stored};
    // More rows than a panel has, and a last panel that is not whole.
    let (m, n, count) = (150, 12, 4);
    let common = numbers(m, n, 3);
    let weights: Vec<_> = (0..count).map(|l| &common * (1.0 + l as f64) + numbers(m, n, 31 + 17 * l) * 0.5).collect();
    let bytes: Vec<_> = weights.iter().map(|w| narrow(DType::F32, w.iter()).unwrap()).collect();
    let shape = [m, n];
    let (reads, stored) =
        (std::sync::atomic::AtomicUsize::new(0), |bytes| Stored { shape: &shape, dtype: DType::F32, bytes });
    let seen = || {
        reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    };
    let rows: Vec<Rows<'_>> = bytes.iter().map(|bytes| Rows::new(stored(bytes), seen).unwrap()).collect();
    let read: Vec<Array2<f64>> = rows.iter().map(|rows| Source::<f64>::rows(rows, 0..m)).collect();
    let own: Vec<Metric> = (0..count).map(|l| Metric { input: gram(n, 7 + l), ..Metric::frobenius() }).collect();
    for metrics in [vec![Metric::frobenius()], own] {
        let group = problems(&read, &metrics, 0.8);
        let masa = Masa { atoms: Some(2), ..Masa::default() };
        let whole = masa.factorize(&group).unwrap();
        let parts: Vec<_> =
            group.iter().map(InParts::of).zip(&rows).map(|(p, weight)| InParts { weight, ..p }).collect();
        let before = reads.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(masa.factorize_parts(&parts, &mut Vec::new()).unwrap(), whole);
        assert!(reads.load(std::sync::atomic::Ordering::Relaxed) > before);
    }
    assert!(Rows::new(Stored { bytes: &bytes[0][1..], ..stored(&bytes[0]) }, || {}).is_err());
    assert!(Factorize::<f64>::factorize_parts(&super::super::Svd::default(), &[], &mut Vec::new()).is_err());
}

#[test]
fn what_is_held_is_the_same_operator() {
    let w = numbers(20, 30, 31).mapv(|v| v as f32);
    for form in [Form::Pivot, Form::Factors] {
        let problem = Problem::new("w", w.view(), Budget::Rank(4)).dtype(DType::BF16);
        let solved = Svd { form, ..Svd::default() }.factorize(&[problem]).unwrap().remove(0);
        assert_eq!(held::Held::new(&solved).unwrap().operator::<f32>().unwrap(), solved);
    }
}
