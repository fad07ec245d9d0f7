use std::sync::Arc;

use ndarray::{Array1, Array2};

use super::*;
use crate::factorize::Method;
use crate::linalg::Faer;
use crate::operator::LinearOperator;
use crate::operator::codec::{Decoder, Encoder};
use crate::stats::Gram;

/// Deterministic numbers without structure, in −1..1.
fn noise(m: usize, n: usize, seed: u64) -> Array2<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_simple_fn((m, n), || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    })
}

/// A Gram matrix of correlated inputs, of the given rank.
fn gram(n: usize, rank: usize) -> Weighting {
    let mut x = noise(n, rank, 5);
    for i in 1..n {
        let above = x.row(i - 1).to_owned();
        x.row_mut(i).scaled_add(0.8, &above);
    }
    Weighting::Gram(Arc::new(Gram::new("test", x.dot(&x.t())).unwrap()))
}

fn diagonal(n: usize) -> Weighting {
    Weighting::Diagonal(Arc::new(Array1::from_shape_fn(n, |i| 0.1 + ((i * 7) % 5) as f64)))
}

fn metrics(m: usize, n: usize) -> Vec<Metric> {
    let pairs = [
        (Weighting::Identity, Weighting::Identity),
        (diagonal(m), Weighting::Identity),
        (Weighting::Identity, diagonal(n)),
        (Weighting::Identity, gram(n, n + 5)),
        (diagonal(m), gram(n, n.div_ceil(3))),
    ];
    pairs.into_iter().map(|(output, input)| Metric { output, input }).collect()
}

fn all(lengths: &[usize]) -> Vec<Cosine> {
    let mut all = Vec::new();
    for side in [Along::Auto, Along::Right, Along::Left, Along::Both] {
        for basis in [Atoms::Auto, Atoms::Identity, Atoms::Dct2, Atoms::Dct3, Atoms::Hadamard] {
            let method = Cosine { basis, side, ..Cosine::default() };
            if method.transforms(lengths).is_ok() {
                all.push(method);
            }
        }
    }
    all
}

fn problem<'a>(w: &'a Array2<f64>, metric: &Metric, budget: Budget) -> Problem<'a, f64> {
    Problem::new("w", w.view(), budget).metric(metric.clone())
}

fn solve(method: &Cosine, problem: &Problem<'_, f64>) -> Operator<f64> {
    method.factorize(std::slice::from_ref(problem)).unwrap().remove(0)
}

fn error(problem: &Problem<'_, f64>, operator: &Operator<f64>) -> f64 {
    problem.metric.squared((&problem.weight - &operator.to_dense()).view(), &Faer)
}

#[test]
fn the_curve_is_the_measured_error_and_all_atoms_are_exact() {
    for (m, n) in [(9, 16), (16, 9), (8, 8), (1, 13), (13, 1), (7, 11)] {
        let w = noise(m, n, 1);
        for metric in metrics(m, n) {
            let norm = metric.squared(w.view(), &Faer);
            let rules = [(Select::Greedy, true), (Select::Energy, true), (Select::Energy, false)];
            for (method, (select, refit)) in all(&[m, n]).into_iter().flat_map(|m| rules.map(|rule| (m, rule))) {
                let method = Cosine { select, refit, ..method };
                if method.side == Along::Both {
                    let operator = solve(&method, &problem(&w, &metric, Budget::Rank(m.max(n))));
                    assert!(error(&problem(&w, &metric, Budget::Rank(1)), &operator) < 1e-18 * norm.max(1.0));
                    continue;
                }
                let found = method.decompose(&[problem(&w, &metric, Budget::Rank(2))]).unwrap().unwrap();
                assert!((found.norm_squared - norm).abs() < 1e-9 * norm);
                for (r, point) in found.curve.iter().enumerate().take(found.curve.len() - 1) {
                    let problem = problem(&w, &metric, Budget::Rank(r));
                    let operator = method.assemble(std::slice::from_ref(&problem), &found).unwrap().remove(0);
                    assert_eq!(operator.bytes(), point.bytes);
                    let measured = error(&problem, &operator);
                    // The ridge's share: none without a Gram matrix, and never below the truth.
                    let slack = if refit && matches!(metric.input, Weighting::Gram(_)) { 1e-4 } else { 1e-10 };
                    let context = format!("{m}x{n} {method:?} r={r}: {measured} against {}", point.error);
                    assert!(measured <= point.error + 1e-10 * norm, "{context}");
                    assert!(measured >= point.error - slack * norm, "{context}");
                }
                let whole = &found.curve[found.curve.len() - 2];
                assert!(whole.error <= 1e-9 * norm, "{method:?}");
            }
        }
    }
}

#[test]
fn without_interaction_the_choice_is_the_best_subset() {
    let (m, n, r) = (5, 8, 3);
    let w = noise(m, n, 2);
    let cases = [
        (Along::Right, Atoms::Dct2, Metric::frobenius()),
        (Along::Right, Atoms::Hadamard, Metric { output: diagonal(m), ..Metric::default() }),
        (Along::Right, Atoms::Identity, Metric { input: diagonal(n), output: diagonal(m) }),
        (Along::Left, Atoms::Dct3, Metric { input: gram(n, n), ..Metric::default() }),
    ];
    for (side, basis, metric) in cases {
        let method = Cosine { side, basis, ..Cosine::default() };
        let kind = method.transforms(&[]).unwrap()[0];
        let problem = problem(&w, &metric, Budget::Rank(r));
        let chosen = error(&problem, &solve(&method, &problem));
        let side = if side == Along::Right { Side::Right } else { Side::Left };
        let (q, s) = (length(side, (m, n)), spectrum(&problem, side, kind).unwrap());
        let least = (0u32..1 << q).filter(|mask| mask.count_ones() == r as u32).map(|mask| {
            let mut kept = s.clone();
            (0..q).filter(|f| mask >> f & 1 == 0).for_each(|f| kept.column_mut(f).fill(0.0));
            let back = kind.inverse().rows(kept.view()).unwrap();
            let delta = &w - &if side == Side::Right { back } else { back.reversed_axes() };
            metric.squared(delta.view(), &Faer)
        });
        let least = least.fold(f64::INFINITY, f64::min);
        assert!((chosen - least).abs() < 1e-12 * least, "{basis:?}: {chosen} against {least}");
    }
}

#[test]
fn coefficients_solve_the_normal_equations() {
    // The gradient of the error in C vanishes: no other coefficients of these atoms are better.
    let (m, n) = (12, 14);
    let w = noise(m, n, 3);
    let metric = Metric { output: diagonal(m), input: gram(n, 3 * n) };
    for (side, basis) in [(Along::Right, Atoms::Dct2), (Along::Left, Atoms::Dct3), (Along::Right, Atoms::Identity)] {
        let method = Cosine { side, basis, ..Cosine::default() };
        let problem = problem(&w, &metric, Budget::Rank(5));
        let delta = &w - &solve(&method, &problem).to_dense();
        let (Weighting::Diagonal(b), Weighting::Gram(a)) = (&metric.output, &metric.input) else { unreachable!() };
        let weighted = Array2::from_diag(&**b).dot(&delta).dot(&a.matrix());
        let Operator::Product(factors) = solve(&method, &problem) else { unreachable!() };
        let gradient = match side {
            Along::Right => weighted.dot(&factors[1].to_dense().t()),
            _ => factors[0].to_dense().t().dot(&weighted),
        };
        let scale = weighted.iter().map(|v| v.abs()).fold(0.0, f64::max);
        let worst = gradient.iter().map(|v| v.abs()).fold(0.0, f64::max);
        assert!(worst < 1e-4 * scale, "{basis:?}: {worst} of {scale}");
    }
}

#[test]
fn each_freedom_pays() {
    for (m, n) in [(16, 24), (32, 16), (23, 17)] {
        let w = noise(m, n, 4);
        for (i, metric) in metrics(m, n).into_iter().enumerate() {
            for keep in [0.2, 0.5, 0.8] {
                let problem = problem(&w, &metric, Budget::Keep(keep));
                let norm = metric.squared(w.view(), &Faer);
                let measure = |method: Cosine| error(&problem, &solve(&method, &problem));
                let auto = measure(Cosine::default());
                for method in all(&[m, n]) {
                    let (refit, plain) = (measure(method), measure(Cosine { refit: false, ..method }));
                    let context = format!("{m}x{n} metric {i} keep {keep} {method:?}");
                    assert!(refit <= norm * (1.0 + 1e-9), "{context}: worse than nothing");
                    if method.side != Along::Both {
                        assert!(auto <= refit * (1.0 + 1e-4) + 1e-9 * norm, "{context}: auto {auto}, this {refit}");
                        // At equal atoms, coefficients of the metric are better than plain ones.
                        let energy = measure(Cosine { select: Select::Energy, ..method });
                        if method.basis != Atoms::Auto && method.side != Along::Auto {
                            assert!(energy <= plain * (1.0 + 1e-6) + 1e-9 * norm, "{context}: {energy} above {plain}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn plain_projections_contract() {
    let w = noise(10, 15, 6);
    let norm = w.iter().map(|v| v * v).sum::<f64>();
    for basis in [Atoms::Identity, Atoms::Dct2, Atoms::Dct3] {
        let method = Cosine { basis, side: Along::Right, ..Cosine::default() };
        let found = method.decompose(&[problem(&w, &Metric::frobenius(), Budget::Rank(1))]).unwrap().unwrap();
        let l1 = Cosine { score: Score::L1, ..method };
        let l1 = l1.decompose(&[problem(&w, &Metric::frobenius(), Budget::Rank(1))]).unwrap().unwrap();
        for r in 0..=15 {
            assert!(found.curve[r].error <= (1.0 - r as f64 / 15.0) * norm + 1e-12);
            assert!(found.curve[r].error <= l1.curve[r].error + 1e-12);
        }
        assert!((0..=15).any(|r| found.curve[r].error < 0.999 * l1.curve[r].error), "{basis:?}: the scores differ");
    }
}

#[test]
fn an_identity_gram_matrix_changes_nothing() {
    let w = noise(11, 18, 7);
    let eye = Weighting::Gram(Arc::new(Gram::new("eye", Array2::eye(18)).unwrap()));
    let metric = Metric { input: eye, ..Metric::default() };
    for method in all(&[11, 18]) {
        let (with, without) =
            (problem(&w, &metric, Budget::Keep(0.6)), problem(&w, &Metric::frobenius(), Budget::Keep(0.6)));
        let (a, b) = (solve(&method, &with).to_dense(), solve(&method, &without).to_dense());
        assert!((a - b).iter().all(|v| v.abs() < 1e-9), "{method:?}");
    }
}

#[test]
fn budgets_hold_in_bytes_and_forecasts_are_right() {
    for (m, n) in [(20, 33), (64, 16), (1, 40), (40, 1), (300, 17)] {
        let w = noise(m, n, 8).mapv(|v| v as f32);
        for method in all(&[m, n]) {
            for dtype in [DType::F32, DType::BF16] {
                let problem = Problem::new("w", w.view(), Budget::Keep(1.0)).dtype(dtype);
                let outline = Outline { shape: (m, n), dtype };
                for keep in [0.1, 0.3, 0.5, 0.9, 1.0] {
                    let problem = Problem { budget: Budget::Keep(keep), ..problem.clone() };
                    let limit = problem.budget.byte_limit(problem.bytes()).unwrap();
                    let forecast =
                        Factorize::<f32>::forecast(&method, &[outline], &MetricSpec::default(), &problem.budget);
                    match method.factorize(std::slice::from_ref(&problem)) {
                        Ok(operators) => {
                            let (bytes, forecast) = (Operator::total_bytes(&operators), forecast.unwrap());
                            assert!(bytes <= limit && bytes <= forecast.bytes, "{m}x{n} {method:?} keep {keep}");
                            assert!(!forecast.exact || bytes == forecast.bytes, "{m}x{n} {method:?} keep {keep}");
                        }
                        Err(refused) => {
                            assert!(matches!(refused, Error::Budget { .. }), "{refused}");
                            assert!(matches!(forecast, Err(Error::Budget { .. })), "{m}x{n} {method:?} keep {keep}");
                        }
                    }
                }
                for budget in [Budget::Error(0.5), Budget::Energy(0.9), Budget::Error(0.0)] {
                    let problem = Problem { budget, dtype: DType::F32, ..problem.clone() };
                    let operator = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
                    let norm = problem.metric.squared(w.view(), &Faer);
                    let error = problem.metric.squared((&w - &operator.to_dense()).view(), &Faer);
                    assert!(error <= budget.error_limit(norm).unwrap() + 1e-6 * norm, "{m}x{n} {method:?} {budget}");
                }
            }
        }
    }
}

#[test]
fn two_sides_keep_the_energy_of_a_fixed_point() {
    // One round is not enough for these, five are.
    let (m, n) = (24, 40);
    let w = noise(m, n, 65);
    let weighted = Metric { output: diagonal(m), input: diagonal(n) };
    for (atoms, kind, metric) in [
        (Atoms::Dct2, Transform::Dct2, Metric::frobenius()),
        (Atoms::Identity, Transform::Identity, Metric::frobenius()),
        (Atoms::Identity, Transform::Identity, weighted),
    ] {
        let method = Cosine { basis: atoms, side: Along::Both, ..Cosine::default() };
        let problem = problem(&w, &metric, Budget::Rank(7));
        let operator = solve(&method, &problem);
        let Operator::Product(factors) = &operator else { panic!("a product") };
        let (Operator::Basis(rows), Operator::Dense(core), Operator::Basis(columns)) =
            (&factors[0], &factors[1], &factors[2])
        else {
            panic!("a core between two bases");
        };
        assert_eq!(core.shape(), (7, 7));
        // Weighted energies in the coordinates of both transforms.
        let diagonal_of = |weighting: &Weighting, len| match weighting {
            Weighting::Diagonal(d) => d.to_vec(),
            _ => vec![1.0; len],
        };
        let (b, a) = (diagonal_of(&metric.output, m), diagonal_of(&metric.input, n));
        let mut energy = kind.columns(kind.rows(w.view()).unwrap().view()).unwrap();
        energy.indexed_iter_mut().for_each(|((i, j), v)| *v = *v * *v * b[i] * a[j]);
        let of_row = |i: usize| columns.atoms().chosen().map(|j| energy[(i, j)]).sum::<f64>();
        let of_column = |j: usize| rows.atoms().chosen().map(|i| energy[(i, j)]).sum::<f64>();
        let kept = rows.atoms().chosen().map(of_row).sum::<f64>();
        assert!((error(&problem, &operator) - (energy.sum() - kept)).abs() < 1e-12 * energy.sum());
        // No row or column outside carries more than one inside, given the other side.
        let least = |set: &IndexSet, of: &dyn Fn(usize) -> f64| set.chosen().map(of).fold(f64::INFINITY, f64::min);
        let most = |set: &IndexSet, of: &dyn Fn(usize) -> f64| set.rest().into_iter().map(of).fold(0.0, f64::max);
        assert!(most(rows.atoms(), &of_row) <= least(rows.atoms(), &of_row) + 1e-12);
        assert!(most(columns.atoms(), &of_column) <= least(columns.atoms(), &of_column) + 1e-12);
    }
}

#[test]
fn a_singular_gram_matrix_of_few_directions_needs_few_atoms() {
    let w = noise(6, 10, 10);
    let method = Cosine { basis: Atoms::Dct2, side: Along::Right, ..Cosine::default() };
    // Three directions carry the metric: three atoms can lose nothing of it.
    let metric = Metric { input: gram(10, 3), ..Metric::default() };
    let three = problem(&w, &metric, Budget::Rank(3));
    assert!(error(&three, &solve(&method, &three)) < 1e-3 * metric.squared(w.view(), &Faer));
}

#[test]
fn zero_and_smooth_weights() {
    for method in all(&[6, 9]) {
        let zero = Array2::zeros((6, 9));
        let problem = problem(&zero, &Metric::frobenius(), Budget::Keep(0.5));
        assert_eq!(solve(&method, &problem).to_dense(), zero, "{method:?}");
    }
    // What the transform is for: smooth rows need few atoms, and `auto` sees it.
    let smooth = Array2::from_shape_fn((40, 64), |(i, j)| ((i + 1) as f64 * j as f64 / 300.0).cos());
    let problem = problem(&smooth, &Metric::frobenius(), Budget::Error(0.05));
    let operator = solve(&Cosine { side: Along::Right, ..Cosine::default() }, &problem);
    let Operator::Product(factors) = &operator else { panic!("a product") };
    let Operator::Basis(basis) = &factors[1] else { panic!("a basis") };
    assert_eq!(basis.kind(), Transform::Dct2);
    assert!(basis.atoms().count() <= 24, "{}", basis.atoms().count());
}

#[test]
fn files_give_the_same_operator_back_and_runs_repeat() {
    let w = noise(13, 32, 11).mapv(|v| v as f32);
    for method in all(&[13, 32]) {
        let problem = Problem::new("w", w.view(), Budget::Keep(0.7)).dtype(DType::BF16);
        let operator = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        let mut encoder = Encoder::new();
        let node = encoder.encode("w", &operator).unwrap();
        let tensors = encoder.into_tensors();
        assert_eq!(tensors.iter().map(|t| t.bytes.len() as u64).sum::<u64>(), operator.bytes());
        assert_eq!(Decoder::<_, f32>::new(&tensors).decode(&node).unwrap(), operator);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(pool.install(|| method.factorize(std::slice::from_ref(&problem))).unwrap()[0], operator);
    }
}

#[test]
fn recipes_and_refusals() {
    let text =
        "type = \"cosine\"\nbasis = \"dct3\"\nside = \"both\"\nscore = \"l1\"\nselect = \"energy\"\nrefit = false";
    let parsed: Method = toml::from_str(text).unwrap();
    let select = Select::Energy;
    let written = Cosine { basis: Atoms::Dct3, side: Along::Both, score: Score::L1, select, refit: false };
    assert_eq!(parsed, Method::Cosine(written));
    assert_eq!(Method::named("cosine").unwrap(), toml::from_str("type = \"cosine\"").unwrap());
    assert!(toml::from_str::<Method>("type = \"cosine\"\nrank = 4").is_err());

    let outline = Outline { shape: (12, 20), dtype: DType::F32 };
    let forecast = |method: Cosine, metric: &str, outlines: &[Outline]| {
        Factorize::<f32>::forecast(&method, outlines, &MetricSpec::named(metric).unwrap(), &Budget::Keep(0.5))
    };
    let plain = |side| Cosine { side, refit: false, ..Cosine::default() };
    assert!(forecast(Cosine::default(), "gram-fisher", &[outline]).is_ok());
    assert!(forecast(plain(Along::Right), "fisher-rows", &[outline]).is_ok());
    assert!(forecast(plain(Along::Left), "gram", &[outline]).is_ok());
    let refused = forecast(plain(Along::Right), "gram", &[outline]).unwrap_err();
    assert!(refused.to_string().contains("frobenius, fisher-rows"), "{refused}");
    assert!(forecast(plain(Along::Left), "fisher-rows", &[outline]).is_err());
    assert!(forecast(plain(Along::Auto), "activation", &[outline]).is_err());
    assert!(forecast(Cosine { basis: Atoms::Hadamard, ..Cosine::default() }, "frobenius", &[outline]).is_err());
    assert!(forecast(Cosine::default(), "frobenius", &[outline, outline]).is_err());

    let mut w = noise(4, 4, 12);
    w[(1, 2)] = f64::NAN;
    assert!(Cosine::default().factorize(&[problem(&w, &Metric::frobenius(), Budget::Keep(0.5))]).is_err());
    w[(1, 2)] = 0.0;
    let problem = problem(&w, &Metric::frobenius(), Budget::Keep(0.75));
    let mut damaged = Cosine::default().decompose(std::slice::from_ref(&problem)).unwrap().unwrap();
    damaged.state[1].fill(7.0);
    assert!(Cosine::default().assemble(std::slice::from_ref(&problem), &damaged).is_err());
    damaged.state[0].fill(9.0);
    assert!(Cosine::default().assemble(std::slice::from_ref(&problem), &damaged).is_err());
}
