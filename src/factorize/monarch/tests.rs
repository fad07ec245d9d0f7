use std::sync::Arc;

use ndarray::{Array1, Array2, Axis, s};
use proptest::prelude::*;

use super::*;
use crate::linalg::{Faer, Kernels};
use crate::metric::{Metric, Weighting};
use crate::operator::{LinearOperator, Order, Runs};
use crate::stats::Gram;

fn numbers(m: usize, n: usize, seed: u64) -> Array2<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    Array2::from_shape_simple_fn((m, n), || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
    })
}

fn gram(n: usize, tokens: usize, seed: u64) -> Arc<Gram> {
    // Correlated inputs of very different size.
    let x = numbers(n, tokens, seed) + numbers(1, tokens, seed + 1);
    let x = x * Array1::from_shape_fn(n, |i| 0.3 + (i % 5) as f64).insert_axis(Axis(1));
    Arc::new(Gram::new("g", x.dot(&x.t()) / tokens as f64).unwrap())
}

fn run(method: &Monarch, problem: &Problem<'_, f64>) -> Operator<f64> {
    method.factorize(std::slice::from_ref(problem)).unwrap().remove(0)
}

/// The rows of each group and the columns of each chunk, straight from the definition.
fn cut(method: &Monarch, m: usize, n: usize) -> (Vec<Vec<usize>>, Vec<Vec<usize>>) {
    let (k, l) = method.blocks().unwrap();
    let even = |len: usize, parts: usize| {
        let mut ends = (0..=parts).map(|i| i * (len / parts) + i.min(len % parts));
        let mut start = ends.next().unwrap();
        ends.map(|end| (std::mem::replace(&mut start, end)..end).collect()).collect::<Vec<Vec<usize>>>()
    };
    let rows = match method.groups {
        Groups::Contiguous => even(m, l),
        Groups::Strided => (0..l).map(|group| (group..m).step_by(l).collect()).collect(),
    };
    (rows, even(n, k))
}

/// ‖W − Ŵ‖² of the best choice, straight from the definition: an SVD of each slice of D·W·A^½.
fn optimum(method: &Monarch, scaled: &Array2<f64>, rank: usize) -> f64 {
    let (m, n) = scaled.dim();
    let (rows, mut columns) = cut(method, m, n);
    if method.chunks == Some(Chunks::Energy) {
        let mut order: Vec<usize> = (0..n).collect();
        let energy = |j: usize| scaled.column(j).mapv(|v| v * v).sum();
        order.sort_by(|&i, &j| energy(j).total_cmp(&energy(i)));
        columns.iter_mut().flatten().zip(order).for_each(|(place, input)| *place = input);
    }
    let slices = rows.iter().flat_map(|rows| columns.iter().map(move |columns| (rows, columns)));
    let tail = |(rows, columns): (&Vec<usize>, &Vec<usize>)| {
        let slice = scaled.select(Axis(0), rows).select(Axis(1), columns);
        let found = Kernels::<f64>::svd(&Faer, slice.view()).unwrap();
        found.values.iter().skip(rank).map(|v| v * v).sum::<f64>()
    };
    slices.map(tail).sum()
}

#[test]
fn every_slice_is_optimal_in_the_plain_and_in_diagonal_metrics() {
    let diagonal = |len: usize| Weighting::Diagonal(Arc::new(Array1::from_shape_fn(len, |i| 0.2 + (i % 3) as f64)));
    let mut methods = Vec::new();
    for (k, l) in [(1, 1), (2, 2), (3, 4), (4, 3), (1, 5), (5, 1)] {
        let blocks = Monarch { input_blocks: Some(k), output_blocks: Some(l), ..Monarch::default() };
        methods.push(blocks);
        methods.push(Monarch { groups: Groups::Strided, ..blocks });
        methods.push(Monarch { chunks: Some(Chunks::Energy), ..blocks });
    }
    for (m, n) in [(8, 8), (12, 9), (9, 14), (13, 17), (24, 6)] {
        let w = numbers(m, n, 7);
        for metric in [Metric::frobenius(), Metric { output: diagonal(m), input: diagonal(n) }] {
            let (a, b) = (weights(&metric.input, n), weights(&metric.output, m));
            let scaled = &w * &a.insert_axis(Axis(0)) * b.insert_axis(Axis(1));
            for (method, rank) in methods.iter().flat_map(|method| [1, 2, 50].map(|rank| (method, rank))) {
                let problem = Problem::new("w", w.view(), Budget::Rank(rank)).metric(metric.clone());
                let operator = run(method, &problem);
                let (error, optimum) = (problem.error_of(&operator), optimum(method, &scaled, rank));
                let at = format!("{m}x{n} {method:?} rank {rank}");
                assert!((error - optimum).abs() <= 1e-12 + 1e-10 * optimum, "{at}: {error} against {optimum}");
                let outline = Outline { shape: (m, n), dtype: DType::F64 };
                let spec = MetricSpec::default();
                let forecast = Factorize::<f64>::forecast(method, &[outline], &spec, &problem.budget).unwrap();
                assert!(forecast.exact && forecast.bytes == operator.bytes(), "{at}");
            }
        }
    }
}

fn weights(weighting: &Weighting, len: usize) -> Array1<f64> {
    match weighting {
        Weighting::Diagonal(d) => d.mapv(f64::sqrt),
        _ => Array1::ones(len),
    }
}

#[test]
fn one_block_is_low_rank() {
    let w = numbers(14, 10, 3);
    let method = Monarch { input_blocks: Some(1), ..Monarch::default() };
    for metric in [Metric::frobenius(), Metric::gram(gram(10, 30, 5))] {
        let problem = Problem::new("w", w.view(), Budget::Rank(4)).metric(metric);
        let low_rank = Svd { form: crate::factorize::Form::Factors, ..Svd::default() };
        let theirs = low_rank.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
        let difference = run(&method, &problem).to_dense() - theirs.to_dense();
        assert!(difference.iter().all(|v| v.abs() < 1e-9));
    }
}

#[test]
fn chunks_by_energy_are_the_same_projection_of_reordered_inputs() {
    let (m, n) = (10, 9);
    let scale = Array1::from_shape_fn(n, |j| 1.0 + ((j * 5) % 9) as f64);
    let w = numbers(m, n, 4) * scale.view().insert_axis(Axis(0));
    let order: Vec<usize> = {
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| w.column(j).mapv(|v| v * v).sum().total_cmp(&w.column(i).mapv(|v| v * v).sum()));
        order
    };
    let sorted = w.select(Axis(1), &order);
    for form in [crate::factorize::Form::Factors, crate::factorize::Form::Pivot] {
        let of =
            |chunks| Monarch { input_blocks: Some(3), chunks: Some(chunks), form: Some(form), ..Monarch::default() };
        let ours = run(&of(Chunks::Energy), &Problem::new("w", w.view(), Budget::Rank(2))).to_dense();
        let theirs = run(&of(Chunks::Contiguous), &Problem::new("w", sorted.view(), Budget::Rank(2))).to_dense();
        assert!((ours.select(Axis(1), &order) - &theirs).iter().all(|v| v.abs() < 1e-10));
        assert!((&ours - &w).mapv(|v| v * v).sum() > 1e-6);
    }
}

#[test]
fn the_paper_s_square_case() {
    // Dao et al., 2022, §3: M[ℓ·b + j, κ·b + i] = L[j, ℓ, κ]·R[κ, j, i]: strided groups, rank 1, b = 2.
    let (left, right) = (numbers(4, 2, 1), numbers(4, 2, 2));
    let w = Array2::from_shape_fn((4, 4), |(row, column)| {
        let (l, j, k, i) = (row / 2, row % 2, column / 2, column % 2);
        left[(j * 2 + l, k)] * right[(k * 2 + j, i)]
    });
    let method = Monarch { input_blocks: Some(2), groups: Groups::Strided, ..Monarch::default() };
    let operator = run(&method, &Problem::new("w", w.view(), Budget::Rank(1)));
    assert!((operator.to_dense() - &w).iter().all(|v| v.abs() < 1e-12));
    assert_eq!(operator.params(), 16);
    let Operator::Product(factors) = &operator else { panic!("{operator}") };
    let [Operator::Permutation(out), Operator::BlockDiagonal(_), Operator::Permutation(_), Operator::BlockDiagonal(_)] =
        &factors[..]
    else {
        panic!("{operator}")
    };
    assert_eq!(*out.order(), Order::Grid { rows: 2, columns: 2, runs: Runs::Uniform(1) });
}

#[test]
fn sweeps_never_raise_the_error_and_end_where_no_slice_can_be_improved() {
    for (tokens, seed) in [(200, 1), (9, 2)] {
        let (w, metric) = (numbers(18, 22, seed), Metric::gram(gram(22, tokens, seed)));
        let problem = Problem::new("w", w.view(), Budget::Rank(2)).metric(metric.clone());
        let at = |sweeps| Monarch { input_blocks: Some(4), output_blocks: Some(3), sweeps, ..Monarch::default() };
        let errors: Vec<f64> =
            [0, 1, 2, 3, 5, 8, 200].map(|sweeps| problem.error_of(&run(&at(sweeps), &problem))).to_vec();
        assert!(errors.windows(2).all(|pair| pair[1] <= pair[0] * (1.0 + 1e-9)), "{errors:?}");
        assert!(errors[4] < 0.9 * errors[0], "{errors:?}");
        // At the end a slice cannot be bettered by gradient steps within its row space and column space.
        let dense = run(&at(200), &problem).to_dense();
        let Weighting::Gram(gram) = &metric.input else { unreachable!() };
        let (gradient, whole) = ((&w - &dense).dot(&gram.matrix()), w.dot(&gram.matrix()));
        let (rows, columns) = cut(&at(200), 18, 22);
        for rows in &rows {
            for columns in &columns {
                let part = |a: &Array2<f64>| a.select(Axis(0), rows).select(Axis(1), columns);
                let norm = |a: &Array2<f64>| a.mapv(|v| v * v).sum().sqrt();
                let (slice, gradient) = (part(&dense), part(&gradient));
                let scale = norm(&slice) * norm(&part(&whole));
                let stationary = norm(&slice.t().dot(&gradient));
                assert!(stationary <= 1e-5 * scale, "{stationary} of {scale}");
            }
        }
    }
}

#[test]
fn sums_of_slices_that_share_a_chunk_are_recovered() {
    // A Monarch matrix is its own projection, whatever the metric.
    let method = Monarch {
        input_blocks: Some(3),
        output_blocks: Some(2),
        ranks: Ranks::Uniform,
        sweeps: 30,
        ..Monarch::default()
    };
    let start = numbers(10, 15, 9);
    let planted = run(&method, &Problem::new("w", start.view(), Budget::Rank(2))).to_dense();
    for metric in [Metric::frobenius(), Metric::gram(gram(15, 60, 4))] {
        let problem = Problem::new("w", planted.view(), Budget::Rank(2)).metric(metric);
        assert!((run(&method, &problem).to_dense() - &planted).iter().all(|v| v.abs() < 1e-8));
    }
}

#[test]
fn adaptive_ranks_follow_the_energy_and_cost_no_more() {
    // One slice of four holds nearly everything.
    let mut w = numbers(32, 32, 5) * 1e-3;
    w.slice_mut(s![..16, 16..]).assign(&numbers(16, 16, 6));
    let problem = Problem::new("w", w.view(), Budget::Keep(0.5));
    let by = |ranks| Monarch { input_blocks: Some(2), ranks, ..Monarch::default() };
    let (uniform, adaptive) = (run(&by(Ranks::Uniform), &problem), run(&by(Ranks::Adaptive), &problem));
    assert!(uniform.bytes() <= problem.bytes() / 2 && adaptive.bytes() <= problem.bytes() / 2);
    assert!(problem.error_of(&adaptive) < 0.05 * problem.error_of(&uniform));
    assert_eq!(run(&by(Ranks::Auto), &problem), adaptive);
}

#[test]
fn auto_is_never_above_low_rank_at_the_same_bytes_and_finds_blocks_where_they_are() {
    let method = Monarch::default();
    let low_rank =
        |problem: &Problem<'_, f64>| Svd::default().factorize(std::slice::from_ref(problem)).unwrap().remove(0);
    let w = numbers(32, 48, 8);
    for metric in [Metric::frobenius(), Metric::gram(gram(48, 100, 3))] {
        for keep in [0.3, 0.6] {
            let problem = Problem::new("w", w.view(), Budget::Keep(keep)).metric(metric.clone());
            let (ours, theirs) = (run(&method, &problem), low_rank(&problem));
            assert!(ours.bytes() as f64 <= keep * problem.bytes() as f64);
            assert!(problem.error_of(&ours) <= problem.error_of(&theirs));
        }
    }
    let four = Monarch { input_blocks: Some(4), ..method };
    let planted = run(&four, &Problem::new("w", w.view(), Budget::Rank(1))).to_dense();
    let problem = Problem::new("w", planted.view(), Budget::Keep(0.3));
    assert!(problem.error_of(&low_rank(&problem)) > 1e-3);
    assert!(problem.error_of(&run(&method, &problem)) < 1e-12);
}

#[test]
fn error_budgets_are_met_with_few_bytes() {
    let w = numbers(24, 24, 2);
    let method = Monarch { input_blocks: Some(2), ..Monarch::default() };
    for budget in [Budget::Error(0.4), Budget::Energy(0.9)] {
        let problem = Problem::new("w", w.view(), budget);
        let operator = run(&method, &problem);
        let limit = budget.error_limit(problem.metric.squared(w.view(), &Faer)).unwrap();
        assert!(problem.error_of(&operator) <= limit);
        let fewer = Problem { budget: Budget::Bytes(operator.bytes() * 9 / 10), ..problem.clone() };
        assert!(problem.error_of(&run(&method, &fewer)) > limit);
    }
    // Nothing to lose: the weight itself.
    let problem = Problem::new("w", w.view(), Budget::Error(0.0));
    assert_eq!(run(&method, &problem).to_dense(), w);
}

#[test]
fn what_cannot_be_is_refused() {
    let w = numbers(6, 5, 1);
    let group = [Problem::new("w", w.view(), Budget::Rank(1))];
    let refused = |method: Monarch| Factorize::<f64>::factorize(&method, &group).unwrap_err().to_string();
    assert!(refused(Monarch::default()).contains("input-blocks"));
    assert!(refused(Monarch { input_blocks: Some(6), ..Monarch::default() }).contains("6 input blocks for 5 inputs"));
    assert!(refused(Monarch { output_blocks: Some(0), ..Monarch::default() }).contains("expected 1 to 5"));
    let two = [group[0].clone(), group[0].clone()];
    assert!(matches!(Monarch::default().factorize(&two), Err(Error::Unsupported(_))));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_shape_keeps_its_budget_and_its_product((m, n, k, l) in (1usize..20, 1usize..20, 1usize..6, 1usize..6), keep in 0.2..1.0f64, strided: bool) {
        let groups = if strided { Groups::Strided } else { Groups::Contiguous };
        let method = Monarch { input_blocks: Some(k), output_blocks: Some(l), groups, ..Monarch::default() };
        let w = numbers(m, n, (m * 20 + n) as u64);
        let problem = Problem::new("w", w.view(), Budget::Keep(keep)).metric(Metric::gram(gram(n, n + 3, 1)));
        let outline = Outline { shape: (m, n), dtype: DType::F64 };
        let planned = Factorize::<f64>::forecast(&method, &[outline], &MetricSpec::default(), &problem.budget);
        match method.factorize(std::slice::from_ref(&problem)) {
            Ok(operators) => {
                prop_assert!(planned.is_ok(), "{planned:?} but {} bytes", operators[0].bytes());
                prop_assert!(operators[0].bytes() as f64 <= keep * problem.bytes() as f64 + 1e-6);
                let x = numbers(n, 3, 4);
                let difference = operators[0].product(x.view()) - operators[0].to_dense().dot(&x);
                prop_assert!(difference.iter().all(|v| v.abs() < 1e-9));
            }
            Err(_) => prop_assert!(planned.is_err()),
        }
    }
}
