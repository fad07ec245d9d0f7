use std::sync::Arc;

use ndarray::Array1;

use super::*;
use crate::linalg::{Faer, Kernels};
use crate::metric::{Metric, MetricSpec, Weighting};
use crate::operator::LinearOperator;
use crate::stats::Gram;

fn numbers(m: usize, n: usize, seed: usize) -> Array2<f64> {
    Array2::from_shape_fn((m, n), |(i, j)| {
        ((((i + 3) * (j + 7) * (seed + 11)) % 101) as f64 / 50.0 - 1.0) * 0.9f64.powi(j as i32 / 3)
    })
}

/// A Gram matrix of rank `rank` over n inputs.
fn gram(n: usize, rank: usize) -> Arc<Gram> {
    let x = numbers(n, rank, 5);
    Arc::new(Gram::new("test", x.dot(&x.t())).unwrap())
}

#[test]
fn the_error_is_the_tail_of_the_whitened_spectrum() {
    for (m, n) in [(12, 20), (30, 11), (9, 9)] {
        let w = numbers(m, n, 1);
        let gram = gram(n, n + 3);
        let s = gram.sqrt(&Faer).unwrap();
        let singular = Kernels::<f64>::svd(&Faer, w.dot(s).view()).unwrap().values;
        for r in [1, 3, 8] {
            let problem = Problem::new("w", w.view(), Budget::Rank(r)).metric(Metric::gram(gram.clone()));
            for form in [Form::Pivot, Form::Factors] {
                let method = Svd { form, ..Svd::default() };
                let operator = &method.factorize(std::slice::from_ref(&problem)).unwrap()[0];
                let error = problem.metric.squared((&w - &operator.to_dense()).view(), &Faer);
                let tail: f64 = singular.iter().skip(r).map(|v| v * v).sum();
                let total: f64 = singular.iter().map(|v| v * v).sum();
                assert!((error - tail).abs() <= 1e-9 * total, "{m}x{n} r={r} {form:?}: {error} against {tail}");
            }
        }
    }
}

#[test]
fn a_singular_gram_matrix_is_no_obstacle() {
    for (m, n) in [(10, 24), (40, 24)] {
        let w = numbers(m, n, 2);
        let problem = Problem::new("w", w.view(), Budget::Rank(6)).metric(Metric::gram(gram(n, 4)));
        let operator = &Svd::default().factorize(std::slice::from_ref(&problem)).unwrap()[0];
        let delta = &w - &operator.to_dense();
        // Four directions carry the metric, so rank 6 loses nothing of it ...
        let norm = problem.metric.squared(w.view(), &Faer);
        assert!(problem.metric.squared(delta.view(), &Faer) <= 1e-12 * norm);
        // ... and the other two go to W itself: better than rank 4 alone.
        let four = Problem { budget: Budget::Rank(4), ..problem.clone() };
        let operator = &Svd::default().factorize(std::slice::from_ref(&four)).unwrap()[0];
        let plain = Metric::frobenius();
        assert!(plain.squared(delta.view(), &Faer) < 0.9 * plain.squared((&w - &operator.to_dense()).view(), &Faer));
    }
}

#[test]
fn the_fast_route_is_near_the_exact_one_under_every_metric() {
    let (m, n) = (90, 140);
    let w = numbers(m, n, 3) + &(numbers(m, n, 8).mapv(|v| 0.1 * v));
    let diagonal = |len: usize| Weighting::Diagonal(Arc::new(Array1::from_shape_fn(len, |i| 0.2 + (i % 7) as f64)));
    let inputs = [Weighting::Identity, diagonal(n), Weighting::Gram(gram(n, n + 5))];
    for (input, output) in inputs.into_iter().zip([diagonal(m), Weighting::Identity, diagonal(m)]) {
        let metric = Metric { output, input };
        for budget in [Budget::Rank(12), Budget::Keep(0.3)] {
            let problem = Problem { seed: 5, ..Problem::new("w", w.view(), budget).metric(metric.clone()) };
            let group = std::slice::from_ref(&problem);
            let solve = |route| {
                let method = Svd { route, ..Svd::default() };
                let decomposition = method.decompose(group).unwrap().unwrap();
                let operator = method.assemble(group, &decomposition).unwrap().remove(0);
                let error = metric.squared((&w - &operator.to_dense()).view(), &Faer);
                (decomposition, operator, error)
            };
            let (exact, wanted, least) = solve(Route::Exact);
            let (fast, operator, error) = solve(Route::Fast);
            assert_eq!(operator.bytes(), wanted.bytes());
            assert!((error / least).sqrt() <= 1.03, "{} for {}", error.sqrt(), least.sqrt());
            assert!((error / least).sqrt() >= 1.0 - 1e-9);
            assert!((fast.norm_squared - exact.norm_squared).abs() <= 1e-10 * exact.norm_squared);
            let predicted = fast.curve.iter().find(|point| point.bytes == operator.bytes()).unwrap().error;
            assert!((predicted - error).abs() <= 1e-9 * exact.norm_squared, "{predicted} for {error}");
            assert_eq!(fast.notes.len(), 1);
            assert_eq!(operator, solve(Route::Fast).1);
        }
    }
}

#[test]
fn the_fast_route_covers_groups_and_refuses_open_budgets() {
    let weights = [numbers(20, 30, 1), numbers(20, 24, 2)];
    let metric = |w: &Array2<f64>, i| if i == 0 { Metric::gram(gram(w.ncols(), 40)) } else { Metric::frobenius() };
    let problem = |(i, w)| Problem::new("w", ArrayView2::from(w), Budget::Rank(6)).metric(metric(w, i));
    let group: Vec<_> = weights.iter().enumerate().map(problem).collect();
    let error = |route| {
        let operators = Svd { route, share: Some(Share::Output), ..Svd::default() }.factorize(&group).unwrap();
        let each =
            group.iter().zip(&operators).map(|(p, o)| p.metric.squared((&p.weight - &o.to_dense()).view(), &Faer));
        each.sum::<f64>()
    };
    assert!((error(Route::Fast) / error(Route::Exact)).sqrt() <= 1.02);

    let method = Svd { route: Route::Fast, ..Svd::default() };
    let outline = Outline { shape: (20, 30), dtype: crate::scalar::DType::F32 };
    for budget in [Budget::Energy(0.9), Budget::Error(0.1)] {
        let forecast = Factorize::<f64>::forecast(&method, &[outline], &MetricSpec::default(), &budget);
        assert!(matches!(forecast, Err(Error::Unsupported(_))));
        let problem = Problem { budget, ..group[0].clone() };
        assert!(matches!(method.decompose(&[problem]), Err(Error::Unsupported(_))));
    }
    // Nothing to do, and nothing that can be done.
    let dense = Problem { budget: Budget::Keep(1.0), ..group[0].clone() };
    assert_eq!(method.factorize(std::slice::from_ref(&dense)).unwrap()[0].to_dense(), weights[0]);
    let starved = Problem { budget: Budget::Bytes(10), ..group[0].clone() };
    assert!(matches!(method.factorize(&[starved]), Err(Error::Budget { .. })));
}
