use std::sync::Arc;

use ndarray::{Array1, Array2};

use super::*;
use crate::coder::{Coded, Tables, descend};
use crate::factorize::TwoFour;
use crate::linalg::Faer;
use crate::metric::Metric;
use crate::operator::LinearOperator;
use crate::stats::Gram;

pub(super) fn numbers(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_fn((rows, columns), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    })
}

pub(super) fn form(n: usize, seed: u64) -> Array2<f64> {
    let mut x = numbers(n, 2 * n, seed);
    let common = numbers(1, 2 * n, seed + 1);
    for (j, mut row) in x.rows_mut().into_iter().enumerate() {
        row.scaled_add(0.8, &common.row(0));
        row *= 1.0 + (j % 5) as f64;
    }
    x.dot(&x.t()) / (2 * n) as f64
}

pub(super) fn nowag(w: &Array2<f64>, squares: ndarray::ArrayView1<'_, f64>) -> Coded<f64> {
    let score = scores(Rule::Nowag, w.view(), squares);
    prune(w.view(), score.view(), Pattern::Groups(Nm::TWO_FOUR), 0)
}

#[test]
fn no_step_raises_the_loss_with_any_block_that_fits_or_not() {
    // Divisors, ragged last blocks, blocks that cut groups, a rest of the row, more blocks than lanes.
    for (m, n, block) in [(32, 48, 8), (30, 50, 8), (21, 33, 6), (80, 24, 4), (17, 36, 1), (40, 20, 16)] {
        let (w, g) = (numbers(m, n, 3), form(n, 5));
        let diagonal = g.diag().to_owned();
        let start = nowag(&w, diagonal.view());
        let mut state = State::new(w.clone(), start, parts(m, block), parts(n, block), &Faer);
        let forms = [Form::Diagonal(diagonal.view()), Form::full(g.view(), w.view())];
        for form in &forms {
            let mut last = state.loss(form);
            let first = last;
            for sweep in 0..4 {
                for step in 0..3 {
                    let said = match step {
                        0 => state.step_left(form).unwrap(),
                        1 => last + state.step_right(form).unwrap(),
                        _ => last + state.step_core(form, Nm::TWO_FOUR, block),
                    };
                    let carried = state.error.clone();
                    state.refresh();
                    let drift = (&carried - &state.error).iter().fold(0.0f64, |a, v| a.max(v.abs()));
                    assert!(drift < 1e-10, "{m}x{n}/{block}: the carried error is off by {drift}");
                    let now = state.loss(form);
                    assert!((said / now - 1.0).abs() < 1e-9, "{m}x{n}/{block} step {step}: {now}, said {said}");
                    assert!(now <= last * (1.0 + 1e-9), "{m}x{n}/{block} sweep {sweep} step {step}: {last} to {now}");
                    last = now;
                }
            }
            assert!(last < if block == 1 { 0.99 } else { 0.9 } * first, "{m}x{n}/{block}: {first} to {last}");
        }
        for (part, a) in state.rows.iter().zip(&state.left) {
            assert!(a.columns().into_iter().all(|c| (c.dot(&c) - 1.0).abs() < 1e-12), "{part:?}");
        }
        assert!(NmSparse::gather(Nm::TWO_FOUR, state.core.values.view(), state.core.kept.view(), DType::F64).is_ok());
    }
}

#[test]
fn between_identities_the_core_step_is_a_sweep_of_the_coder() {
    for (m, n) in [(40, 64), (7, 45)] {
        let (w, g) = (numbers(m, n, 1), form(n, 2));
        let start = nowag(&w, g.diag());
        let mut state = State::new(w.clone(), start.clone(), parts(m, 8), parts(n, 8), &Faer);
        state.step_core(&Form::full(g.view(), w.view()), Nm::TWO_FOUR, 8);
        let tables = Tables::new(g.view(), 0.0, Pattern::Groups(Nm::TWO_FOUR));
        let coder = descend(w.view(), g.view(), &tables, &start, 1).unwrap();
        assert_eq!(state.core.kept, coder.kept);
        assert!((&state.core.values - &coder.values).iter().all(|d| d.abs() < 1e-10));
    }
}

#[test]
fn without_sweeps_it_is_nowag() {
    let (w, g) = (numbers(24, 40, 9), form(40, 4));
    let start = nowag(&w, g.diag());
    let metric = Metric::gram(Arc::new(Gram::new("g", g).unwrap()));
    let problem = Problem::new("w", w.view(), Budget::Keep(0.8)).metric(metric);
    let method = Armor { block: Some(1), diagonal_sweeps: 0, sweeps: 0, ..Armor::default() };
    let operator = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
    assert_eq!(operator.to_dense(), start.values);
}

/// Loss at the start and after some sweeps, for W made of such a product.
fn planted(size: usize, distance: f64, seed: u64, (sweeps, inertia): (usize, f64)) -> (f64, f64) {
    let block = 4;
    let ones = Array1::<f64>::ones(size);
    let core = nowag(&numbers(size, size, seed), ones.view());
    let wrap = |seed: u64| {
        let mut whole = Array2::<f64>::zeros((size, size));
        for (p, part) in parts(size, block).into_iter().enumerate() {
            let near_identity = Array2::<f64>::eye(block) + numbers(block, block, seed + p as u64) * distance;
            whole.slice_mut(ndarray::s![part.clone(), part]).assign(&near_identity);
        }
        whole
    };
    let w = wrap(seed + 100).dot(&core.values).dot(&wrap(seed + 200));
    let blocks = || parts(size, block);
    let mut state = State::new(w.clone(), nowag(&w, ones.view()), blocks(), blocks(), &Faer);
    let form = Form::Diagonal(ones.view());
    let first = state.loss(&form);
    state.descend(&form, (Nm::TWO_FOUR, block), sweeps, inertia).unwrap();
    (first, state.loss(&form))
}

#[test]
fn a_planted_product_is_found_and_with_inertia_sooner() {
    for seed in 1..5 {
        let (first, plain) = planted(32, 0.2, seed, (150, 0.0));
        assert!(first > 1.0 && plain < 1e-3 * first, "{first} to {plain}");
        // Near the identity both find it; further off, where no product is found, inertia saves half of the sweeps.
        let after = |distance, sweeps, inertia| planted(32, distance, seed, (sweeps, inertia)).1;
        let (plain, fast) = (after(0.2, 20, 0.0), after(0.2, 20, 0.8));
        assert!(fast < 0.6 * plain, "{fast} and {plain} after 20 sweeps");
        let (plain, fast) = (after(0.5, 40, 0.0), after(0.5, 20, 0.8));
        assert!(fast < plain, "{fast} after 20 sweeps, {plain} after 40 plain ones");
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let (w, g) = (numbers(96, 64, 7).mapv(|v| v as f32), form(64, 8));
    let metric = Metric::gram(Arc::new(Gram::new("g", g).unwrap()));
    let problem = Problem::new("w", w.view(), Budget::Keep(0.7)).metric(metric).dtype(DType::BF16);
    let run = || Armor::default().factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let one = pool(1).install(run);
    assert!((2..4).all(|threads| pool(threads).install(run) == one) && run() == one);
}

/// The published proxy of the loss: normalised weights, diagonal metric.
fn proxy(w: &Array2<f64>, compressed: &Array2<f64>, squares: &Array1<f64>) -> f64 {
    let (_, rows, columns) = crate::coder::normalised(w.view());
    let delta = (compressed - w) / &columns / &rows.insert_axis(Axis(1));
    (&delta * &delta * squares).sum()
}

#[test]
fn the_published_solver_descends_in_its_proxy_and_the_exact_one_is_below_it_after_few_sweeps() {
    let (m, n, block) = (24, 32, 4);
    let (w, squares) = (numbers(m, n, 3) * 0.1, Array1::from_shape_fn(n, |j| 0.2 + (j * 7 % 5) as f64));
    let metric = Metric { output: Weighting::Identity, input: Weighting::Diagonal(Arc::new(squares.clone())) };
    let problem = Problem::new("w", w.view(), Budget::Keep(0.9)).metric(metric);
    let run = |iterations, solver| {
        let method = Armor { block: Some(block), iterations, solver, overhead: 1.0, ..Armor::default() };
        method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0)
    };
    let start = proxy(&w, &nowag(&w, squares.view()).values, &squares);
    let few = proxy(&w, &run(50, Solver::Paper).to_dense(), &squares);
    let many = run(400, Solver::Paper);
    let paper = proxy(&w, &many.to_dense(), &squares);
    assert!(few < 0.99 * start && paper < 0.95 * few, "{start}, {few}, {paper}");
    assert_eq!(run(400, Solver::Paper), many);
    // The exact solver in the same loss.
    let (normal, ..) = crate::coder::normalised(w.view());
    let core = nowag(&normal, squares.view());
    let mut state = State::new(normal, core, parts(m, block), parts(n, block), &Faer);
    let form = Form::Diagonal(squares.view());
    state.descend(&form, (Nm::TWO_FOUR, block), 20, 0.0).unwrap();
    assert!(state.loss(&form) < paper, "{} against {paper}", state.loss(&form));
}

#[test]
fn a_group_shares_its_input_wrapper_and_counts_it_once() {
    let (a, b, g) = (numbers(24, 40, 1), numbers(18, 40, 2), form(40, 3));
    let metric = Metric::gram(Arc::new(Gram::new("g", g).unwrap()));
    let budget = Budget::Keep(0.8);
    let group = [
        Problem::new("a", a.view(), budget).metric(metric.clone()),
        Problem::new("b", b.view(), budget).metric(metric.clone()),
    ];
    let method = Armor { share: Some(Share::Input), overhead: 1.0, ..Armor::default() };
    let operators = method.factorize(&group).unwrap();
    let outlines = group.each_ref().map(|p| Outline { shape: p.shape(), dtype: p.dtype });
    let spec = MetricSpec::named("gram").unwrap();
    let forecast = Factorize::<f64>::forecast(&method, &outlines, &spec, &budget).unwrap();
    assert_eq!(Operator::total_bytes(&operators), forecast.bytes);
    assert!(forecast.exact && forecast.bytes <= (42 * 40 * 8) * 8 / 10);
    let shared = |operator: &Operator<f64>| match operator {
        Operator::Product(factors) => match factors.last() {
            Some(Operator::Shared(inner)) => inner.clone(),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    };
    assert!(Arc::ptr_eq(&shared(&operators[0]), &shared(&operators[1])));
    let mut loss = [0.0, 0.0];
    for (problem, operator) in group.iter().zip(&operators) {
        let plain = TwoFour::default().factorize(std::slice::from_ref(problem)).unwrap().remove(0);
        for (loss, operator) in loss.iter_mut().zip([operator, &plain]) {
            *loss += metric.squared((&problem.weight - &operator.to_dense()).view(), &Faer);
        }
    }
    assert!(loss[0] < 0.9 * loss[1], "{loss:?}");
    let alone = Armor { share: None, ..method };
    assert!(alone.factorize(&group).is_err());
    assert!(Factorize::<f64>::forecast(&alone, &outlines, &spec, &budget).is_err());
}

#[test]
fn weights_of_outputs_count() {
    let (w, g) = (numbers(40, 32, 5), Arc::new(Gram::new("g", form(32, 6)).unwrap()));
    let rows = Array1::from_shape_fn(40, |i| if i % 3 == 0 { 100.0 } else { 1.0 });
    let weighed = Metric { output: Weighting::Diagonal(Arc::new(rows)), input: Weighting::Gram(g.clone()) };
    let error = |metric: Metric| {
        let problem = Problem::new("w", w.view(), Budget::Keep(0.9)).metric(metric);
        let method = Armor { overhead: 1.0, ..Armor::default() };
        let found = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0).to_dense();
        weighed.squared((&w - &found).view(), &Faer)
    };
    let (with, without) = (error(weighed.clone()), error(Metric::gram(g)));
    assert!(with < 0.8 * without, "{with} against {without}");
}
