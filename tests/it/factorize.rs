//! What every method must do, and the laws of weighted low rank.

use std::sync::Arc;

use ndarray::{Array1, Array2, Axis};
use proptest::prelude::*;
use weightpress::budget::Budget;
use weightpress::error::Error;
use weightpress::factorize::{Factorize, Method, Outline, Problem};
use weightpress::linalg::{Backend, Faer, Kernels};
use weightpress::metric::{Metric, MetricSpec, Weighting};
use weightpress::operator::codec::{Decoder, Encoder};
use weightpress::operator::{LinearOperator, Operator};
use weightpress::scalar::DType;
use weightpress::stats::Gram;

use super::run::matrix;

/// Every method in every form that a recipe can ask for.
fn methods() -> Vec<Method> {
    let mut texts: Vec<String> = Method::NAMES.iter().map(|name| format!("type = '{name}'")).collect();
    texts.push("type = 'svd'\nform = 'factors'".into());
    for rule in ["magnitude", "wanda", "ria", "nowag", "sparsegpt"] {
        texts.push(format!("type = 'two-four'\nrule = '{rule}'"));
    }
    for rule in ["nowag", "sparsegpt"] {
        texts.push(format!("type = 'bitmask'\nrule = '{rule}'"));
    }
    texts.push("type = 'bitmask'\nlevels = 3\nsweeps = 2".into());
    texts.push("type = 'armor'\nblock = 3\nsweeps = 2".into());
    texts.push("type = 'armor'\noverhead = 1.0\nsweeps = 2\ndiagonal-sweeps = 2".into());
    texts.push("type = 'two-four'\nn = 4\nm = 8\nsweeps = 2".into());
    texts.push("type = 'two-four'\nn = 1\nm = 3\nsweeps = 2".into());
    for rest in [
        "form = 'factors'",
        "form = 'factors'\nsolver = 'one-shot'\nratio = 2.0",
        "form = 'factors'\nsolver = 'ksvd'\niterations = 2",
        "form = 'factors'\npattern = [2, 4]\nrounds = 2",
        "solver = 'one-shot'\ninit = 'rows'",
        "pattern = [1, 3]",
        "ratio = 1.5\nrounds = 3",
    ] {
        texts.push(format!("type = 'cospadi'\n{rest}"));
    }
    for basis in ["identity", "dct2", "dct3", "auto"] {
        for side in ["left", "right", "both"] {
            texts.push(format!("type = 'cosine'\nbasis = '{basis}'\nside = '{side}'"));
        }
    }
    for (k, l) in [(1, 1), (2, 3), (4, 2)] {
        for rest in [
            "",
            "ranks = 'uniform'",
            "groups = 'strided'",
            "ranks = 'adaptive'\nsweeps = 0",
            "form = 'factors'",
            "form = 'pivot'",
        ] {
            texts.push(format!("type = 'monarch'\ninput-blocks = {k}\noutput-blocks = {l}\n{rest}"));
        }
    }
    texts.iter().map(|text| toml::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"))).collect()
}

fn wide(m: usize, n: usize, seed: usize) -> Array2<f64> {
    matrix(m, n, seed).mapv(f64::from)
}

fn gram(n: usize, tokens: usize) -> Arc<Gram> {
    let x = wide(n, tokens, 77) + Array2::<f64>::eye(n.max(tokens)).slice(ndarray::s![..n, ..tokens]);
    Arc::new(Gram::new("g", x.dot(&x.t())).unwrap())
}

const SHAPES: [(usize, usize); 9] = [(1, 1), (1, 9), (9, 1), (2, 2), (24, 16), (16, 24), (13, 17), (7, 31), (32, 32)];

fn metrics(m: usize, n: usize) -> Vec<(&'static str, Metric)> {
    let diagonal = |len: usize| Weighting::Diagonal(Arc::new(Array1::from_shape_fn(len, |i| 0.5 + (i % 5) as f64)));
    vec![
        ("frobenius", Metric::frobenius()),
        ("fisher", Metric { output: Weighting::Identity, input: diagonal(n) }),
        ("gram", Metric::gram(gram(n, n + 2))),
        ("gram-fisher", Metric { output: diagonal(m), input: Weighting::Gram(gram(n, n)) }),
    ]
}

fn supported(method: &Method, shape: (usize, usize), metric: &str, budget: &Budget) -> bool {
    let outline = Outline { shape, dtype: DType::F64 };
    let spec = MetricSpec::named(metric).unwrap();
    Factorize::<f64>::forecast(method, &[outline], &spec, budget).is_ok()
}

#[test]
fn every_method_keeps_shape_budget_and_determinism_and_survives_the_codec() {
    let mut solved = 0;
    for method in methods() {
        for (m, n) in SHAPES {
            let w = wide(m, n, m * 31 + n);
            for (name, metric) in metrics(m, n) {
                for keep in [0.3, 0.6, 0.9] {
                    let budget = Budget::Keep(keep);
                    let at = format!("{method:?} {m}x{n} {name} keep {keep}");
                    let problem = Problem::new("w", w.view(), budget).metric(metric.clone());
                    let group = std::slice::from_ref(&problem);
                    let operator = match method.factorize(group) {
                        Ok(mut operators) => operators.remove(0),
                        // What the plan refuses the method may refuse; nothing else.
                        Err(Error::Budget { .. } | Error::Unsupported(_))
                            if !supported(&method, (m, n), name, &budget) =>
                        {
                            continue;
                        }
                        Err(e) => panic!("{at}: {e}"),
                    };
                    assert!(supported(&method, (m, n), name, &budget), "{at}: solved what the plan refuses");
                    solved += 1;
                    assert_eq!(operator.shape(), (m, n), "{at}");
                    assert!(operator.bytes() as f64 <= keep * (m * n * 8) as f64 + 1e-6, "{at}: {}", operator.bytes());
                    let forecast = Factorize::<f64>::forecast(
                        &method,
                        &[Outline { shape: (m, n), dtype: DType::F64 }],
                        &MetricSpec::named(name).unwrap(),
                        &budget,
                    )
                    .unwrap();
                    assert!(
                        operator.bytes() <= forecast.bytes,
                        "{at}: {} forecast {}",
                        operator.bytes(),
                        forecast.bytes
                    );
                    assert_eq!(method.factorize(group).unwrap()[0], operator, "{at}: not deterministic");
                    let dense = operator.to_dense();
                    let x = wide(n, 3, 5);
                    let product = operator.apply(x.view()).unwrap();
                    assert!((&product - &dense.dot(&x)).iter().all(|v| v.abs() < 1e-10), "{at}: apply");
                    let y = wide(m, 3, 6);
                    let product = operator.apply_transpose(y.view()).unwrap();
                    assert!((&product - &dense.t().dot(&y)).iter().all(|v| v.abs() < 1e-10), "{at}: transpose");
                    assert!(operator.apply(wide(n + 1, 2, 1).view()).is_err(), "{at}: wrong shape");
                    let named = [m - 1, 0, m / 2, m - 1];
                    let (rows, expected) = (operator.select_rows(&named).unwrap(), dense.select(Axis(0), &named));
                    assert!((&rows - &expected).iter().all(|v| v.abs() < 1e-10), "{at}: rows");
                    assert_eq!(operator.select_rows(&[]).unwrap().dim(), (0, n), "{at}: no rows");
                    assert!(operator.select_rows(&[0, m]).is_err(), "{at}: a row that is not there");
                    let norm = metric.squared(w.view(), &Faer);
                    let error = metric.squared((&w - &dense).view(), &Faer);
                    assert!(error <= norm * (1.0 + 1e-9), "{at}: worse than zero, {error} of {norm}");
                    let mut encoder = Encoder::new();
                    let node = encoder.encode("w", &operator).unwrap();
                    let tensors = encoder.into_tensors();
                    let stored: usize = tensors.iter().map(|t| t.bytes.len()).sum();
                    assert_eq!(stored as u64, operator.bytes(), "{at}: bytes");
                    let text = serde_json::to_string(&node).unwrap();
                    let back: Operator<f64> =
                        Decoder::new(&tensors).decode(&serde_json::from_str(&text).unwrap()).unwrap();
                    assert_eq!(back, operator, "{at}: codec");
                }
            }
        }
    }
    assert!(solved > 500, "only {solved} cases were solved");
}

#[test]
fn what_is_not_finite_is_refused_and_zero_is_kept() {
    for method in methods() {
        let mut w = wide(32, 32, 3);
        w[(2, 3)] = f64::INFINITY;
        let problem = Problem::new("w", w.view(), Budget::Keep(0.8));
        let error = method.factorize(std::slice::from_ref(&problem)).unwrap_err();
        assert!(error.to_string().contains("inf"), "{method:?}: {error}");
        let zero = Array2::<f64>::zeros((32, 32));
        let problem = Problem::new("w", zero.view(), Budget::Keep(0.8));
        let operator = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        assert_eq!(operator.to_dense(), zero, "{method:?}");
        // Statistics of another size.
        let w = wide(24, 32, 3);
        let problem = Problem::new("w", w.view(), Budget::Keep(0.8)).metric(Metric::gram(gram(24, 24)));
        assert!(method.factorize(std::slice::from_ref(&problem)).is_err(), "{method:?}");
    }
}

#[test]
fn half_precision_factors_lose_little_and_are_what_is_measured() {
    for method in methods() {
        let w = matrix(32, 48, 9).mapv(|v| weightpress::scalar::Real::round_to(v, DType::BF16));
        let problem = Problem::new("w", w.view(), Budget::Keep(0.8)).dtype(DType::BF16);
        let half = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        assert!(half.bytes() <= (32 * 48 * 2) * 8 / 10);
        let (named, dense) = ([31, 0, 7], half.to_dense());
        let off = half.select_rows(&named).unwrap() - dense.select(Axis(0), &named);
        assert!(off.iter().all(|v| v.abs() < 1e-5), "{method:?}: rows");
        // What the same operator takes with 32-bit values; its indices weigh the same.
        let full = Problem::new("w", w.view(), Budget::Bytes(half.bytes() + 2 * half.params() as u64));
        let full = method.factorize(std::slice::from_ref(&full)).unwrap().remove(0);
        let error =
            |o: &Operator<f32>| (&w - &o.to_dense()).mapv(|v| v * v).sum().sqrt() / w.mapv(|v| v * v).sum().sqrt();
        // A mask costs relatively more beside halves, and leaves fewer entries.
        assert!(error(&half) < error(&full) * 1.05 + 0.02, "{method:?}: {} {}", error(&half), error(&full));
    }
}

/// Largest-first eigenvalues by cyclic Jacobi rotations: slow, simple and independent.
fn jacobi(mut a: Array2<f64>) -> Vec<f64> {
    let n = a.nrows();
    for _ in 0..60 {
        for p in 0..n {
            for q in p + 1..n {
                if a[(p, q)].abs() < 1e-300 {
                    continue;
                }
                let theta = 0.5 * (2.0 * a[(p, q)]).atan2(a[(q, q)] - a[(p, p)]);
                let (s, c) = theta.sin_cos();
                for k in 0..n {
                    let (x, y) = (a[(k, p)], a[(k, q)]);
                    a[(k, p)] = c * x - s * y;
                    a[(k, q)] = s * x + c * y;
                }
                for k in 0..n {
                    let (x, y) = (a[(p, k)], a[(q, k)]);
                    a[(p, k)] = c * x - s * y;
                    a[(q, k)] = s * x + c * y;
                }
            }
        }
    }
    let mut values = a.diag().to_vec();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Eckart–Young under any metric: error² is the tail of the spectrum of B^½·W·A·Wᵀ·B^½.
    #[test]
    fn weighted_low_rank_is_optimal(m in 1usize..14, n in 1usize..14, r in 1usize..6, tokens in 1usize..16, seed in 0usize..1000, rows in any::<bool>()) {
        let w = wide(m, n, seed);
        let a = gram(n, tokens);
        let b = Array1::from_shape_fn(m, |i| if rows { 0.3 + ((i * 7 + seed) % 5) as f64 } else { 1.0 });
        let metric = Metric { output: Weighting::Diagonal(Arc::new(b.clone())), input: Weighting::Gram(a.clone()) };
        let scaled = Array2::from_shape_fn((m, n), |(i, j)| w[(i, j)] * b[i].sqrt());
        let spectrum = jacobi(scaled.dot(&a.matrix()).dot(&scaled.t()));
        let total: f64 = spectrum.iter().map(|v| v.max(0.0)).sum();
        let tail: f64 = spectrum.iter().skip(r).map(|v| v.max(0.0)).sum();
        let problem = Problem::new("w", w.view(), Budget::Rank(r)).metric(metric.clone());
        let operator = Method::named("svd").unwrap().factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        let error = metric.squared((&w - &operator.to_dense()).view(), &Faer);
        prop_assert!((error - tail).abs() <= 1e-8 * total.max(1e-12), "{} against {} of {}", error, tail, total);
    }

    /// More rank never costs accuracy, and the curve tells the truth about every rank.
    #[test]
    fn the_curve_is_the_error_of_what_is_cut_from_it(m in 2usize..16, n in 2usize..16, seed in 0usize..1000) {
        let (w, method) = (wide(m, n, seed), Method::named("svd").unwrap());
        let metric = Metric::gram(gram(n, n + 1));
        let problem = |budget| Problem::new("w", w.view(), budget).metric(metric.clone());
        let group = [problem(Budget::Rank(1))];
        let found = method.decompose(&group).unwrap().unwrap();
        prop_assert!(found.curve.windows(2).all(|pair| pair[1].error <= pair[0].error * (1.0 + 1e-12)));
        for (rank, point) in found.curve.iter().enumerate().take(found.curve.len() - 1) {
            let operator = method.assemble(&[problem(Budget::Rank(rank))], &found).unwrap().remove(0);
            prop_assert_eq!(operator.bytes(), point.bytes);
            let error = metric.squared((&w - &operator.to_dense()).view(), &Faer);
            prop_assert!((error - point.error).abs() <= 1e-8 * found.norm_squared);
        }
    }

    /// Energy and error budgets are met, with no more bytes than the next smaller choice would need.
    #[test]
    fn error_budgets_are_met(m in 2usize..16, n in 2usize..16, error in 0.01f64..0.9, seed in 0usize..1000) {
        let w = wide(m, n, seed);
        for budget in [Budget::Error(error), Budget::Energy(1.0 - error * error)] {
            let problem = Problem::new("w", w.view(), budget);
            let operator = Method::named("svd").unwrap().factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
            let delta = &w - &operator.to_dense();
            prop_assert!(delta.mapv(|v| v * v).sum() <= error * error * w.mapv(|v| v * v).sum() * (1.0 + 1e-9));
            prop_assert!(operator.bytes() <= (m * n * 8) as u64);
        }
    }
}

#[test]
fn a_group_with_one_gram_matrix_is_solved_exactly_when_stacked() {
    let (a, b) = (wide(12, 20, 1), wide(8, 20, 2));
    let gram = gram(20, 24);
    let metric = Metric::gram(gram.clone());
    let group = [
        Problem::new("a", a.view(), Budget::Rank(5)).metric(metric.clone()),
        Problem::new("b", b.view(), Budget::Rank(5)).metric(metric.clone()),
    ];
    let method: Method = toml::from_str("type = 'svd'\nshare = 'input'").unwrap();
    let operators = method.factorize(&group).unwrap();
    let error: f64 =
        [&a, &b].iter().zip(&operators).map(|(w, o)| metric.squared((*w - &o.to_dense()).view(), &Faer)).sum();
    let joint = ndarray::concatenate![ndarray::Axis(0), a, b];
    let spectrum = jacobi(joint.dot(&gram.matrix()).dot(&joint.t()));
    let tail: f64 = spectrum.iter().skip(5).sum();
    assert!((error - tail).abs() < 1e-8 * spectrum.iter().sum::<f64>(), "{error} {tail}");
}

#[test]
fn a_group_that_shares_outputs_counts_each_gram_matrix() {
    let (a, b) = (wide(10, 14, 1), wide(10, 9, 2));
    let metrics = [Metric::gram(gram(14, 20)), Metric::gram(gram(9, 5))];
    let group = [
        Problem::new("a", a.view(), Budget::Rank(4)).metric(metrics[0].clone()),
        Problem::new("b", b.view(), Budget::Rank(4)).metric(metrics[1].clone()),
    ];
    let method: Method = toml::from_str("type = 'svd'\nshare = 'output'").unwrap();
    let operators = method.factorize(&group).unwrap();
    let each = [&a, &b].into_iter().zip(&operators).zip(&metrics);
    let error: f64 = each.map(|((w, o), metric)| metric.squared((w - &o.to_dense()).view(), &Faer)).sum();
    let c = a.dot(&gram(14, 20).matrix()).dot(&a.t()) + b.dot(&gram(9, 5).matrix()).dot(&b.t());
    let spectrum = jacobi(c);
    let tail: f64 = spectrum.iter().skip(4).sum();
    assert!((error - tail).abs() < 1e-8 * spectrum.iter().sum::<f64>(), "{error} {tail}");
}

#[test]
fn a_short_side_beyond_the_limit_takes_the_checked_f32_route_and_agrees() {
    // Slow decay: the f32 product is trusted; fast decay: it is not. Either way the error is right.
    let backend: &dyn Backend = &Faer;
    let (m, n, r) = (2052, 2060, 8);
    let left = f32_orthonormal(m, 40, 1);
    let right = f32_orthonormal(n, 40, 2);
    for decay in [0.5f64, 3.0] {
        let sigma = |i: usize| ((i + 1) as f64).powf(-decay);
        let scaled = Array2::from_shape_fn((m, 40), |(i, j)| left[(i, j)] * sigma(j) as f32);
        let w = Kernels::<f32>::matmul(&Faer, scaled.view(), right.t());
        let problem = Problem { backend, ..Problem::new("w", w.view(), Budget::Rank(r)) };
        let operator = Method::named("svd").unwrap().factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        let delta = &w - &operator.to_dense();
        let error = delta.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let tail = (r..40).map(|i| sigma(i).powi(2)).sum::<f64>().sqrt();
        assert!((error / tail - 1.0).abs() < 2e-3, "decay {decay}: {error} against {tail}");
    }
}

fn f32_orthonormal(n: usize, k: usize, seed: usize) -> Array2<f32> {
    Kernels::<f32>::orthonormalize(&Faer, matrix(n, k, seed).view())
}
