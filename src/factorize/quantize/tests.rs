use std::sync::Arc;

use ndarray::{Array2, ArrayView2};

use super::*;
use crate::factorize::Svd;
use crate::metric::{Metric, Weighting};
use crate::operator::LinearOperator;
use crate::operator::codec::{Decoder, Encoder};
use crate::stats::Gram;
use crate::testing::numbers;

/// Inputs that depend on each other, of very different size.
fn metric(n: usize) -> Metric {
    let mut x = numbers(n, n, 104_729);
    x.rows_mut().into_iter().enumerate().for_each(|(i, mut row)| row *= 1.0 / (1.0 + i as f64 / 4.0));
    x += &(numbers(n, 3, 17).dot(&numbers(3, n, 19)));
    Metric::gram(Arc::new(Gram::new("g", x.dot(&x.t()) / n as f64).unwrap()))
}

fn problem(w: ArrayView2<'_, f64>, budget: Budget) -> Problem<'_, f64> {
    Problem::new("w", w, budget).dtype(DType::BF16).metric(metric(w.ncols()))
}

fn one(method: &Quantize, problem: &Problem<'_, f64>) -> (Operator<f64>, f64) {
    let mut found = method.factorize(std::slice::from_ref(problem)).unwrap();
    let found = found.remove(0);
    let error = problem.error_of(&found);
    (found, error)
}

fn low_rank(form: super::super::Form) -> Option<Box<Method>> {
    Some(Box::new(Method::Svd(Svd { form, ..Svd::default() })))
}

#[test]
fn gram_aware_is_better_than_nearest_and_more_bits_are_better_than_fewer() {
    let w = numbers(40, 96, 31);
    let problem = problem(w.view(), Budget::Keep(0.9));
    let kinds = [ZeroPoint::None, ZeroPoint::Integer, ZeroPoint::Float];
    for (group, zero_point) in [(0, kinds[0]), (32, kinds[0]), (32, kinds[1]), (32, kinds[2])] {
        let mut last = f64::INFINITY;
        for bits in 2..=8 {
            let aware = Quantize { bits: Some(bits), group, zero_point, ..Quantize::default() };
            let nearest = Quantize { rule: Rounding::Nearest, ..aware.clone() };
            let ((found, aware), (_, nearest)) = (one(&aware, &problem), one(&nearest, &problem));
            assert!(aware < 0.9 * nearest, "{bits} bits, group {group}: {aware} of {nearest}");
            assert!(aware < last, "{bits} bits, group {group}: {aware} after {last}");
            assert_eq!(
                found.bytes(),
                Grid::<f64>::bytes_of((40, 96), bits, if group == 0 { 96 } else { 32 }, zero_point)
            );
            last = aware;
        }
    }
}

#[test]
fn what_was_integers_before_is_found_again() {
    // As GGUF's Q4_1 has it: scale and least number of each 32, sixteen levels from end to end.
    let (m, n) = (24, 96);
    let half = |v: f64| v.round_to(DType::F16);
    let w = Array2::from_shape_fn((m, n), |(i, j)| {
        let (g, code) = (j / 32, if j % 32 < 2 { 15 * (j % 32) } else { (i * 7 + j * 5 + i * j) % 16 });
        half(0.02 + (i * 3 + g) as f64 / 900.0) * code as f64 - half(0.13 + (i + 5 * g) as f64 / 700.0)
    });
    let problem = problem(w.view(), Budget::Keep(0.4));
    let off = |zero_point| {
        let method = Quantize { bits: Some(4), group: 32, zero_point, ..Quantize::default() };
        (one(&method, &problem).1 / problem.metric.norm_squared(w.view(), problem.backend)).sqrt()
    };
    let (float, integer) = (off(ZeroPoint::Float), off(ZeroPoint::Integer));
    assert!(float < 1e-3 && integer > 10.0 * float, "{float} {integer}");
}

#[test]
fn zero_points_beyond_the_range_of_f16_are_in_bf16() {
    let w = numbers(24, 48, 31) + 2e5;
    let inner = toml::from_str("type = 'monarch'").unwrap();
    for inner in [None, Some(Box::new(inner))] {
        let method = Quantize { bits: Some(4), group: 24, zero_point: ZeroPoint::Float, inner, ..Quantize::default() };
        let (found, error) = one(&method, &problem(w.view(), Budget::Keep(0.45)));
        assert!(error.is_finite() && found.to_dense().iter().all(|v| v.is_finite()), "{found}");
    }
}

#[test]
fn the_budget_decides_the_width() {
    let w = numbers(40, 128, 31);
    for (keep, bits) in [(0.99, 8), (0.5, 7), (0.27, 4), (0.2, 3), (0.14, 2)] {
        let problem = problem(w.view(), Budget::Keep(keep));
        let (found, _) = one(&Quantize::default(), &problem);
        assert!(matches!(&found, Operator::Quantized(leaf) if leaf.grid().bits() == bits), "{keep}: {found}");
        assert!(found.bytes() as f64 <= keep * problem.bytes() as f64);
        let outline = Outline { shape: (40, 128), dtype: DType::BF16 };
        let forecast =
            Factorize::<f64>::forecast(&Quantize::default(), &[outline], &MetricSpec::default(), &problem.budget);
        assert_eq!(forecast.unwrap().bytes, found.bytes());
        let curve = Quantize::default().decompose(std::slice::from_ref(&problem)).unwrap().unwrap();
        let cut = Quantize::default().assemble(std::slice::from_ref(&problem), &curve).unwrap();
        assert_eq!(cut[0], found);
    }
    let tight = problem(w.view(), Budget::Keep(0.1));
    assert!(matches!(Quantize::default().factorize(&[tight]), Err(Error::Budget { .. })));
    let bad = Quantize { bits: Some(9), ..Quantize::default() };
    assert!(bad.factorize(&[problem(w.view(), Budget::Keep(0.5))]).is_err());
    let within = problem(w.view(), Budget::Error(0.02));
    let (found, error) = one(&Quantize::default(), &within);
    let norm = within.metric.norm_squared(w.view(), within.backend);
    assert!((error / norm).sqrt() <= 0.02 && found.bytes() < within.bytes(), "{found}");
}

#[test]
fn sixteen_bits_are_the_inner_result() {
    let w = numbers(40, 64, 31);
    let problem = problem(w.view(), Budget::Keep(0.5));
    let inner = low_rank(super::super::Form::default()).unwrap();
    let wrapped = Quantize { bits: Some(16), inner: Some(inner.clone()), ..Quantize::default() };
    assert_eq!(vec![one(&wrapped, &problem).0], inner.factorize(std::slice::from_ref(&problem)).unwrap());
}

#[test]
fn factors_make_up_for_each_other_within_the_budget() {
    // A spectrum that falls, so that low rank is worth something.
    let (m, n) = (60, 80);
    let spectrum = Array2::from_diag(&ndarray::Array1::from_shape_fn(40, |k| 1.0 / (1.0 + k as f64)));
    let w = numbers(m, 40, 31).dot(&spectrum).dot(&numbers(40, n, 37));
    for form in [super::super::Form::Factors, super::super::Form::Pivot] {
        for (bits, keep) in [(3, 0.2), (4, 0.25), (8, 0.4)] {
            let problem = problem(w.view(), Budget::Keep(keep));
            let method = Quantize { bits: Some(bits), group: 32, inner: low_rank(form), ..Quantize::default() };
            let (found, error) = one(&method, &problem);
            assert!(found.bytes() as f64 <= keep * problem.bytes() as f64, "{found}: {}", found.bytes());
            assert!(found.bytes() as f64 >= 0.8 * keep * problem.bytes() as f64, "{found}: {}", found.bytes());
            // Each factor to its own nearest, of the same expression.
            let mut notes = Vec::new();
            let exact =
                method.inner(method.inner.as_ref().unwrap(), std::slice::from_ref(&problem), bits, &mut notes).unwrap();
            let nearest = how_nearest(&method, bits, &problem);
            let apart = leafwise(&exact[0], &nearest);
            let apart = problem.error_of(&apart);
            assert!(error < 0.9 * apart, "{form:?} {bits}: {error} of {apart}");
            let mut encoder = Encoder::new();
            let tree = encoder.encode("w", &found).unwrap();
            let tensors = encoder.into_tensors();
            assert_eq!(tensors.iter().map(|t| t.bytes.len() as u64).sum::<u64>(), found.bytes());
            assert_eq!(Decoder::<_, f64>::new(&tensors).decode(&tree).unwrap(), found);
        }
    }
}

fn how_nearest<'a>(method: &Quantize, bits: u8, problem: &Problem<'a, f64>) -> How<'a> {
    How { rule: Rounding::Nearest, ..method.how(bits, problem) }
}

fn leafwise(operator: &Operator<f64>, how: &How<'_>) -> Operator<f64> {
    match operator {
        Operator::Dense(leaf) => {
            let found = how.round(leaf.values().view(), &crate::metric::Weighting::Identity, &mut Vec::new());
            Operator::Quantized(found.unwrap())
        }
        Operator::Interpolative(leaf) => {
            let numbers = leafwise(leaf.coefficients(), how);
            let leaf = crate::operator::Interpolative::new(leaf.side(), leaf.pivots().clone(), numbers).unwrap();
            Operator::Interpolative(leaf)
        }
        Operator::Product(parts) => Operator::Product(parts.iter().map(|part| leafwise(part, how)).collect()),
        other => other.clone(),
    }
}

/// Numbers of any structure to their own nearest on the same layout, nothing refitted.
fn nearest_of(operator: &Operator<f64>, how: &How<'_>) -> Operator<f64> {
    let mut fit = Fit { how: *how, mix: false, seed: 0, notes: &mut Vec::new(), shared: Vec::new() };
    let mut plain =
        |operator: &Operator<f64>| fit.fit(operator, operator.to_dense().view(), &Weighting::Identity).unwrap();
    match operator {
        Operator::Product(parts) => Operator::Product(parts.iter().map(|part| nearest_of(part, how)).collect()),
        Operator::Sum(parts) => Operator::Sum(parts.iter().map(|part| nearest_of(part, how)).collect()),
        other => plain(other),
    }
}

#[test]
fn every_structure_takes_a_grid() {
    let (m, n) = (64, 64);
    let w = numbers(m, 24, 31).dot(&numbers(24, n, 37)) + numbers(m, n, 41) * 0.3;
    let methods = [
        "type = 'two-four'",
        "type = 'bitmask'",
        "type = 'armor'\nblock = 8\niterations = 20",
        "type = 'monarch'",
        "type = 'cospadi'",
        "type = 'cospadi'\nform = 'factors'\nsolver = 'one-shot'",
        "type = 'residual'",
    ];
    for text in methods {
        let inner: Method = toml::from_str(text).unwrap();
        let (none, integer, float) = (ZeroPoint::None, ZeroPoint::Integer, ZeroPoint::Float);
        for (bits, zero_point, keep) in [(8, none, 0.5), (4, none, 0.33), (5, integer, 0.4), (4, float, 0.4)] {
            let problem = problem(w.view(), Budget::Keep(keep));
            let inner = Some(Box::new(inner.clone()));
            let method = Quantize { bits: Some(bits), group: 24, zero_point, inner, ..Quantize::default() };
            let (found, error) = one(&method, &problem);
            assert!(found.bytes() as f64 <= keep * problem.bytes() as f64, "{text}: {} bytes", found.bytes());
            // What is on a grid stays as it is, at the bytes that were foreseen.
            assert_eq!(method.priced(&found, bits, &mut Vec::new()).unwrap(), found.bytes(), "{text}");
            let mut notes = Vec::new();
            let exact =
                method.inner(method.inner.as_ref().unwrap(), std::slice::from_ref(&problem), bits, &mut notes).unwrap();
            assert_eq!(method.priced(&exact[0], bits, &mut Vec::new()).unwrap(), found.bytes(), "{text}");
            let apart = problem.error_of(&nearest_of(&exact[0], &how_nearest(&method, bits, &problem)));
            assert!(error < apart, "{text}, {bits} bits: {error} of {apart}");
            // As its dense form does, and through a file.
            let (dense, x) = (found.to_dense(), numbers(n, 3, 43));
            let wide = (&found.product(x.view()) - &dense.dot(&x)).iter().fold(0.0f64, |a, v| a.max(v.abs()));
            assert!(wide < 1e-9, "{text}: {wide}");
            let mut encoder = Encoder::new();
            let tree = serde_json::to_string(&encoder.encode("w", &found).unwrap()).unwrap();
            let tensors = encoder.into_tensors();
            assert_eq!(tensors.iter().map(|t| t.bytes.len() as u64).sum::<u64>(), found.bytes(), "{text}");
            let back = Decoder::<_, f64>::new(&tensors).decode(&serde_json::from_str(&tree).unwrap()).unwrap();
            assert_eq!(back, found, "{text}");
        }
    }
}

#[test]
fn atoms_are_rounded_once_for_all_layers() {
    let shared = [numbers(24, 32, 3), numbers(24, 32, 5)];
    let layers: Vec<Array2<f64>> =
        (0..6).map(|l| &shared[0] * (1.0 + l as f64) + &shared[1] * (2.0 - l as f64)).collect();
    let problems: Vec<_> = layers.iter().map(|w| problem(w.view(), Budget::Keep(0.35))).collect();
    let inner: Method = toml::from_str("type = 'masa'\natoms = 2\nresidual = false").unwrap();
    let method = Quantize { bits: Some(8), inner: Some(Box::new(inner)), ..Quantize::default() };
    let found = method.factorize(&problems).unwrap();
    let before: u64 = problems.iter().map(Problem::bytes).sum();
    assert!(Operator::total_bytes(&found) as f64 <= 0.35 * before as f64);
    for (problem, operator) in problems.iter().zip(&found) {
        let norm = problem.metric.norm_squared(problem.weight, problem.backend);
        assert!(problem.error_of(operator) < 1e-3 * norm, "{operator}");
    }
}

#[test]
fn a_form_of_one_size_stays_what_it_is() {
    let w = numbers(24, 40, 31);
    let inner = Some(Box::new(Method::named("two-four").unwrap()));
    let method = Quantize { group: 0, inner, ..Quantize::default() };
    // There is room for all entries in four bits, and even in eight.
    for keep in [0.3, 0.999] {
        let (found, _) = one(&method, &problem(w.view(), Budget::Keep(keep)));
        assert!(matches!(found, Operator::NmSparse(_)), "{keep}: {found}");
    }
    let (found, _) = one(&method, &problem(w.view(), Budget::Keep(1.0)));
    assert!(matches!(found, Operator::Dense(_)), "{found}");
    // Half of the entries and their places, in four bits, and not less.
    let tight = problem(w.view(), Budget::Keep(0.15));
    assert!(matches!(method.factorize(&[tight]), Err(Error::Budget { least, .. }) if least.contains("of 1920")));
}
