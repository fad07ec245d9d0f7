//! Metrics against their definition.

use std::sync::Arc;

use ndarray::{Array1, Array2};
use weightpress::linalg::Faer;
use weightpress::metric::{Metric, Weighting};
use weightpress::stats::Gram;

use super::run::matrix;

#[test]
fn every_metric_is_the_trace_it_says() {
    for (m, n) in [(1, 1), (5, 9), (9, 5), (13, 13)] {
        let delta = matrix(m, n, 3).mapv(f64::from);
        let x = matrix(n, n + 2, 4).mapv(f64::from) + 0.1;
        let gram = Arc::new(Gram::new("g", x.dot(&x.t())).unwrap());
        let rows = Array1::from_shape_fn(m, |i| 0.5 + i as f64);
        let columns = Array1::from_shape_fn(n, |i| 2.0 + (i % 3) as f64);
        let inputs = [
            (Weighting::Identity, Array2::eye(n)),
            (Weighting::Diagonal(Arc::new(columns.clone())), Array2::from_diag(&columns)),
            (Weighting::Gram(gram.clone()), gram.matrix().to_owned()),
        ];
        let outputs = [
            (Weighting::Identity, Array2::eye(m)),
            (Weighting::Diagonal(Arc::new(rows.clone())), Array2::from_diag(&rows)),
        ];
        for (input, a) in &inputs {
            for (output, b) in &outputs {
                let metric = Metric { input: input.clone(), output: output.clone() };
                let trace = b.dot(&delta).dot(a).dot(&delta.t()).diag().sum();
                let got = metric.squared(delta.view(), &Faer);
                assert!((got - trace).abs() <= 1e-12 * trace, "{got} {trace}");
                let quick = metric.norm_squared(delta.mapv(|v| v as f32).view(), &Faer);
                assert!((quick - trace).abs() <= 1e-5 * trace, "{quick} {trace}");
            }
        }
    }
}
