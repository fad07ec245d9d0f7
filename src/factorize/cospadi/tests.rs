use ndarray::Array1;

use super::*;
use crate::linalg::Faer;
use crate::metric::{Metric, Weighting};
use crate::operator::LinearOperator;
use crate::stats::Gram;
use crate::testing::numbers;

fn gram(n: usize, factor: usize) -> Weighting {
    let x = numbers(n, 2 * n, factor);
    Weighting::Gram(Arc::new(Gram::new("g", x.dot(&x.t()) / (2 * n) as f64).unwrap()))
}

fn problem<'a>(w: &'a Array2<f64>, metric: &Metric, keep: f64) -> Problem<'a, f64> {
    Problem::new("w", w.view(), Budget::Keep(keep)).metric(metric.clone())
}

fn signals<'a>(group: &[Problem<'a, f64>]) -> Signals<'a, f64> {
    Signals::new(group).unwrap()
}

/// A model with some codes.
fn model(m: usize, n: usize, k: usize, seed: usize) -> Model<f64> {
    let kept = Array2::from_shape_fn((m, k), |(i, j)| (i * 5 + j * 3 + seed).is_multiple_of(3));
    let values = Array2::from_shape_fn((m, k), |at| if kept[at] { numbers(m, k, 31)[at] } else { 0.0 });
    Model::new(numbers(k, n, 17), crate::coder::Coded { values, kept }, None)
}

#[test]
fn the_dictionary_of_given_codes_is_least_squares_in_any_metric() {
    let (m, n, k) = (18, 10, 5);
    let w = numbers(m, n, 104_729);
    let output = Weighting::Diagonal(Arc::new(Array1::from_shape_fn(m, |i| 0.5 + (i % 4) as f64)));
    for input in [Weighting::Identity, gram(n, 7), Weighting::Diagonal(Arc::new(Array1::from_elem(n, 2.0)))] {
        let metric = Metric { output: output.clone(), input };
        let group = [problem(&w, &metric, 0.5)];
        let signals = signals(&group);
        let mut model = model(m, n, k, 0);
        signals.fit_atoms(&mut model).unwrap();
        signals.measure(&mut model);
        let at = |model: &Model<f64>| metric.squared((&w - &model.codes.values.dot(&model.atoms)).view(), &Faer);
        let best = at(&model);
        assert!((best - model.error).abs() < 1e-9 * signals.norm);
        for t in 0..20 {
            let mut other = model.clone();
            other.atoms[(t % k, t % n)] += if t % 2 == 0 { 1e-3 } else { -1e-3 };
            assert!(at(&other) >= best * (1.0 - 1e-9), "{} below {best}", at(&other));
        }
    }
}

#[test]
fn weights_of_different_inputs_descend_in_their_own_metrics() {
    let (n, k) = (12, 6);
    let (a, b) = (numbers(20, n, 104_729), numbers(14, n, 31));
    let metrics = [gram(n, 7), gram(n, 1009)].map(|input| Metric { input, ..Metric::frobenius() });
    let group = [problem(&a, &metrics[0], 0.5), problem(&b, &metrics[1], 0.5)];
    let signals = signals(&group);
    assert_eq!(signals.parts.len(), 2);
    let mut model = model(34, n, k, 1);
    let at = |model: &Model<f64>| {
        let product = model.codes.values.dot(&model.atoms);
        let error = |w: &Array2<f64>, from: usize, metric: &Metric| {
            metric.squared((w - &product.slice(s![from..from + w.nrows(), ..])).view(), &Faer)
        };
        error(&a, 0, &metrics[0]) + error(&b, 20, &metrics[1])
    };
    // The normal equations of the mean metric are not those of both.
    let mut last = f64::INFINITY;
    for _ in 0..4 {
        signals.fit_atoms(&mut model).unwrap();
        let error = at(&model);
        assert!(error <= last * (1.0 + 1e-9));
        last = error;
    }
    let mut once = model.clone();
    signals.fit_atoms(&mut once).unwrap();
    let mut other = once.clone();
    for t in 0..30 {
        other.atoms.assign(&once.atoms);
        other.atoms[(t % k, t % n)] += if t % 2 == 0 { 0.02 } else { -0.02 };
        assert!(at(&other) > at(&once));
    }
    // And codes are each in their own metric: fitted again, no error rises.
    let entries = Entries::Free(model.codes.kept.iter().filter(|&&kept| kept).count());
    signals.fit_codes(&mut model, entries, 2).unwrap();
    assert!(model.error <= last * (1.0 + 1e-9) && (model.error - at(&model)).abs() < 1e-9 * signals.norm);
}

#[test]
fn full_codes_are_pivoted_low_rank_and_sparse_ones_better() {
    let (m, n) = (48, 24);
    // Spectra that fall off slowly, as those of weights.
    let w = numbers(m, n, 104_729) + numbers(m, 3, 11).dot(&numbers(3, n, 5)) * 2.0;
    let metric = Metric { input: gram(n, 7), ..Metric::frobenius() };
    let error = |method: &dyn Factorize<f64>, keep: f64| {
        let problem = problem(&w, &metric, keep);
        let found = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        assert!(found.bytes() as f64 <= keep * problem.bytes() as f64);
        problem.error_of(&found)
    };
    for keep in [0.5, 0.8] {
        let (low_rank, sparse) = (error(&crate::factorize::Svd::default(), keep), error(&Cospadi::default(), keep));
        assert!(sparse <= low_rank * (1.0 + 1e-9), "keep {keep}: {sparse} of {low_rank}");
        let factors = |solver| Cospadi { form: Form::Factors, solver, ..Cospadi::default() };
        let (one, alternating) = (error(&factors(Coding::OneShot), keep), error(&factors(Coding::Alternating), keep));
        assert!(alternating < one, "keep {keep}: {alternating} of {one}");
        let truncated = error(&crate::factorize::Svd { form: Form::Factors, ..Default::default() }, keep);
        assert!(alternating < truncated);
    }
}

#[test]
fn a_group_shares_its_dictionary() {
    let n = 16;
    let (a, b) = (numbers(30, n, 104_729), numbers(20, n, 31));
    let metric = Metric { input: gram(n, 7), ..Metric::frobenius() };
    for method in [
        Cospadi::default(),
        Cospadi { form: Form::Factors, ..Cospadi::default() },
        Cospadi { form: Form::Factors, pattern: Some([2, 4]), ..Cospadi::default() },
        Cospadi { form: Form::Factors, solver: Coding::Ksvd, ..Cospadi::default() },
    ] {
        let group = [problem(&a, &metric, 0.7), problem(&b, &metric, 0.7)];
        let found = method.factorize(&group).unwrap();
        let before: u64 = group.iter().map(Problem::bytes).sum();
        assert!(Operator::total_bytes(&found) as f64 <= 0.7 * before as f64);
        let dictionaries: Vec<_> = found
            .iter()
            .map(|operator| match operator {
                Operator::Product(factors) => match factors.last() {
                    Some(Operator::Shared(atoms)) => Arc::as_ptr(atoms),
                    other => panic!("{other:?}"),
                },
                other => panic!("{other}"),
            })
            .collect();
        assert_eq!(dictionaries[0], dictionaries[1]);
        let lost: f64 = group.iter().zip(&found).map(|(p, o)| p.error_of(o)).sum();
        let norm: f64 = group.iter().map(|p| p.metric.squared(p.weight, p.backend)).sum();
        assert!(lost < 0.3 * norm, "{method:?}: {lost} of {norm}");
    }
    let other = numbers(20, n + 1, 31);
    let plain = Metric::frobenius();
    let group = [problem(&a, &plain, 0.7), problem(&other, &plain, 0.7)];
    assert!(matches!(Cospadi::default().factorize(&group), Err(Error::Shape { .. })));
}

#[test]
fn awkward_weights() {
    let metric = Metric::frobenius();
    // Zero weights, duplicate rows, a rank of one, a zero column.
    let mut twice = numbers(12, 9, 31);
    let first = twice.row(0).to_owned();
    (1..6).for_each(|i| twice.row_mut(i).assign(&first));
    twice.column_mut(3).fill(0.0);
    let rank_one = numbers(12, 1, 3).dot(&numbers(1, 9, 5));
    for w in [Array2::zeros((12, 9)), twice, rank_one] {
        for form in [Form::Pivot, Form::Factors] {
            for solver in [Coding::Alternating, Coding::OneShot] {
                let problem = problem(&w, &metric, 0.8);
                let found = Cospadi { form, solver, ..Cospadi::default() }.factorize(std::slice::from_ref(&problem));
                let found = found.unwrap().remove(0);
                assert!(problem.error_of(&found) <= 0.05 * metric.squared(w.view(), &Faer));
            }
        }
    }
    let refused = |text: &str| {
        let method: Cospadi = toml::from_str(text).unwrap();
        let outline = Outline { shape: (20, 10), dtype: crate::scalar::DType::F32 };
        Factorize::<f32>::forecast(&method, &[outline], &MetricSpec::default(), &Budget::Keep(0.5)).is_err()
    };
    assert!(refused("ratio = 0.5") && refused("solver = 'ksvd'") && refused("pattern = [4, 4]"));
    assert!(refused("pattern = [2, 4]\nratio = 2.0") && !refused("form = 'factors'\nsolver = 'ksvd'"));
}
