use ndarray::{Array1, Array2, array};
use pulp::Arch;

use super::*;
use crate::linalg::Faer;
use crate::operator::Nm;

fn numbers(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_fn((rows, columns), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    })
}

/// A Gram matrix of correlated inputs of very different sizes.
fn form(n: usize, tokens: usize, seed: u64) -> Array2<f64> {
    let mut x = numbers(n, tokens, seed);
    let common = numbers(1, tokens, seed + 1);
    for (j, mut row) in x.rows_mut().into_iter().enumerate() {
        row.scaled_add(0.8, &common.row(0));
        row *= 1.0 + (j % 5) as f64;
    }
    x.dot(&x.t()) / tokens as f64
}

fn error(target: &Array2<f64>, form: &Array2<f64>, coded: &Coded<f64>) -> f64 {
    let delta = &coded.values - target;
    (&delta.dot(form) * &delta).sum()
}

fn two_four(rule: Rule, w: &Array2<f64>, h: &Array2<f64>) -> Coded<f64> {
    let scores = score::scores(rule, w.view(), h.diag());
    prune(w.view(), scores.view(), Pattern::Groups(Nm::TWO_FOUR), 0)
}

fn assert_pattern(coded: &Coded<f64>, nm: Nm) {
    let n = coded.kept.ncols();
    for (row, values) in coded.kept.rows().into_iter().zip(coded.values.rows()) {
        for start in (0..n).step_by(nm.m()) {
            let end = n.min(start + nm.m());
            let expected = if end - start < nm.m() { end - start } else { nm.n() };
            assert_eq!(row.slice(ndarray::s![start..end]).iter().filter(|&&kept| kept).count(), expected);
        }
        assert!(row.iter().zip(values).all(|(&kept, &value)| kept || value == 0.0));
    }
}

#[test]
fn the_error_never_rises_from_sweep_to_sweep_for_any_pattern_and_start() {
    // More than one strip, a padded one, several blocks, a rest of the row.
    for (m, n, nm) in [(300, 70, Nm::TWO_FOUR), (20, 131, Nm::new(4, 8).unwrap()), (9, 33, Nm::new(1, 3).unwrap())] {
        let (w, h) = (numbers(m, n, 3), form(n, 2 * n, 5));
        let pattern = Pattern::Groups(nm);
        let tables = Tables::new(h.view(), 0.0, pattern);
        let factor = Factor::new(h.view(), 0.01, &Faer).unwrap();
        let wanda = prune(w.view(), score::scores(Rule::Wanda, w.view(), h.diag()).view(), pattern, 0);
        let starts = [wanda, obs(w.view(), &factor, pattern, 0, None).unwrap()];
        let ends = starts.map(|start| {
            assert_pattern(&start, nm);
            let mut descent = Descent::new(w.view(), h.view(), &tables, &start).unwrap();
            let mut last = error(&w, &h, &start);
            let first = last;
            for _ in 0..6 {
                descent.sweep();
                let now = descent.solution();
                assert_pattern(&now, nm);
                let now = error(&w, &h, &now);
                assert!(now <= last * (1.0 + 1e-12), "{m}x{n}: {last} to {now}");
                last = now;
            }
            (first, last)
        });
        // SparseGPT beats Wanda, and descent beats both by far.
        assert!(ends[1].0 < ends[0].0 && ends[1].1 < 0.95 * ends[1].0, "{ends:?}");
    }
}

#[test]
fn four_inputs_are_solved_by_brute_force() {
    let (w, h) = (numbers(50, 4, 1), form(4, 9, 2));
    let tables = Tables::new(h.view(), 0.0, Pattern::Groups(Nm::TWO_FOUR));
    let found = descend(w.view(), h.view(), &tables, &two_four(Rule::Magnitude, &w, &h), 1).unwrap();
    for i in 0..w.nrows() {
        // All pairs, each with its least squares by Cramer's rule.
        let target = w.row(i).dot(&h);
        let pairs = (0..4).flat_map(|a| (a + 1..4).map(move |b| (a, b)));
        let errors = pairs.map(|(a, b)| {
            let determinant = h[(a, a)] * h[(b, b)] - h[(a, b)] * h[(a, b)];
            let mut v = Array1::zeros(4);
            v[a] = (h[(b, b)] * target[a] - h[(a, b)] * target[b]) / determinant;
            v[b] = (h[(a, a)] * target[b] - h[(a, b)] * target[a]) / determinant;
            let delta = v - w.row(i);
            delta.dot(&h).dot(&delta)
        });
        let best = errors.fold(f64::INFINITY, f64::min);
        let delta = &found.values.row(i) - &w.row(i);
        let ours = delta.dot(&h).dot(&delta);
        assert!((ours - best).abs() <= 1e-10 * best, "row {i}: {ours} against {best}");
    }
}

#[test]
fn inputs_that_do_not_interact_give_wandas_mask_and_unchanged_weights() {
    let w = numbers(40, 66, 8);
    let h = Array2::from_diag(&Array1::from_shape_fn(66, |j| 0.1 + (j * 7 % 5) as f64));
    let wanda = two_four(Rule::Wanda, &w, &h);
    let factor = Factor::new(h.view(), 0.0, &Faer).unwrap();
    let pattern = Pattern::Groups(Nm::TWO_FOUR);
    let tables = Tables::new(h.view(), 0.0, pattern);
    let obs = obs(w.view(), &factor, pattern, 0, None).unwrap();
    let start = two_four(Rule::Magnitude, &w, &h);
    let descended = descend(w.view(), h.view(), &tables, &start, 1).unwrap();
    for found in [obs, descended] {
        assert_eq!(found.kept, wanda.kept);
        assert!((&found.values - &wanda.values).iter().all(|d| d.abs() < 1e-14));
    }
}

/// The algorithm as published: U from the inverse, errors propagated to the right one column at a time.
fn published(w: &Array2<f64>, h: &Array2<f64>, damping: f64) -> Array2<f64> {
    use crate::linalg::Kernels;
    let n = h.nrows();
    let mut damped = h.clone();
    let mean = damped.diag().mean().unwrap();
    damped.diag_mut().mapv_inplace(|d| d + damping * mean);
    let kernels: &dyn Kernels<f64> = &Faer;
    let inverse = kernels.solve_spd(damped.view(), Array2::eye(n)).unwrap();
    let u = kernels.cholesky(inverse.view()).unwrap().reversed_axes();
    let mut w = w.clone();
    let mut kept = Array2::from_elem(w.dim(), false);
    for c in 0..n {
        for i in 0..w.nrows() {
            if c % 4 == 0 {
                let score = |j: usize| w[(i, j)].powi(2) / u[(j, j)].powi(2);
                let mut order: Vec<usize> = (c..n.min(c + 4)).collect();
                order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
                let most = if n - c < 4 { n - c } else { 2 };
                order.iter().take(most).for_each(|&j| kept[(i, j)] = true);
            }
            let value = if kept[(i, c)] { w[(i, c)] } else { 0.0 };
            let e = (w[(i, c)] - value) / u[(c, c)];
            for j in c..n {
                w[(i, j)] -= e * u[(c, j)];
            }
            w[(i, c)] = value;
        }
    }
    w
}

#[test]
fn the_pass_equals_the_published_algorithm() {
    for (m, n) in [(7, 8), (18, 150), (260, 30)] {
        let (w, h) = (numbers(m, n, 4), form(n, n + 3, 6));
        let factor = Factor::new(h.view(), 0.01, &Faer).unwrap();
        let ours = obs(w.view(), &factor, Pattern::Groups(Nm::TWO_FOUR), 0, None).unwrap();
        let theirs = published(&w, &h, 0.01);
        assert!((&ours.values - &theirs).iter().all(|d| d.abs() < 1e-9), "{m}x{n}");
    }
}

#[test]
fn singular_dead_and_indefinite_forms_are_handled_and_reported() {
    let n = 24;
    let w = numbers(30, n, 2);
    let mut h = form(n, 5, 3); // rank 5 of 24
    for dead in [0, 13] {
        h.row_mut(dead).fill(0.0);
        h.column_mut(dead).fill(0.0);
    }
    let norm = (&w.dot(&h) * &w).sum();
    for shift in [0.0, -1e-7, -1e-5] {
        let h = &h + &(Array2::<f64>::eye(n) * (shift * h.diag().sum() / n as f64));
        let factor = Factor::new(h.view(), 0.0, &Faer).unwrap();
        assert!(factor.damping() > 0.0 && factor.dead() == 2, "{shift}");
        let pattern = Pattern::Groups(Nm::TWO_FOUR);
        let start = obs(w.view(), &factor, pattern, 0, None).unwrap();
        assert!(start.values.iter().all(|v| v.is_finite()), "{shift}");
        let ridge = factor.damping() * h.diag().sum() / n as f64;
        let tables = Tables::new(h.view(), ridge, pattern);
        let mut damped = h.clone();
        damped.diag_mut().mapv_inplace(|d| d + ridge);
        let found = descend(w.view(), damped.view(), &tables, &start, 3).unwrap();
        assert_pattern(&found, Nm::TWO_FOUR);
        assert!(found.values.iter().all(|v| v.is_finite()), "{shift}");
        assert!(error(&w, &damped, &found) <= error(&w, &damped, &start) && error(&w, &h, &found) < norm);
    }
    // Without a ridge the tables count what they could not invert, and solve the rest.
    let tables = Tables::new(h.view(), 0.0, Pattern::Groups(Nm::TWO_FOUR));
    assert!(tables.singular() >= 2);
    let start = two_four(Rule::Wanda, &w, &h);
    let found = descend(w.view(), h.view(), &tables, &start, 2).unwrap();
    assert!(error(&w, &h, &found) <= error(&w, &h, &start) * (1.0 + 1e-9));
    // Minus the identity is no quadratic form at all.
    assert!(Factor::<f64>::new((-Array2::<f64>::eye(3)).view(), 0.01, &Faer).is_ok_and(|f| f.dead() == 3));
}

#[test]
fn zeros_ties_and_negative_zeros_leave_two_slots_in_each_group() {
    let w = array![
        [0.0, 0.0, 0.0, 0.0, -0.0, -0.0, 1.0, -0.0],
        [1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0],
        [-0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]
    ];
    let h = form(8, 20, 9);
    for rule in [Rule::Magnitude, Rule::Wanda, Rule::Ria, Rule::Nowag] {
        assert_pattern(&two_four(rule, &w, &h), Nm::TWO_FOUR);
    }
    let magnitude = two_four(Rule::Magnitude, &w, &h);
    // Equal scores: the lower columns.
    assert_eq!(magnitude.kept.row(1).to_vec(), [true, true, false, false, true, true, false, false]);
    let factor = Factor::new(h.view(), 0.01, &Faer).unwrap();
    let found = obs(w.view(), &factor, Pattern::Groups(Nm::TWO_FOUR), 0, None).unwrap();
    assert_pattern(&found, Nm::TWO_FOUR);
    let tables = Tables::new(h.view(), 0.0, Pattern::Groups(Nm::TWO_FOUR));
    assert_pattern(&descend(w.view(), h.view(), &tables, &found, 2).unwrap(), Nm::TWO_FOUR);
}

#[test]
fn any_instruction_set_and_order_of_memory_gives_the_same_up_to_rounding() {
    #[allow(unused_mut)]
    let mut all = vec![Arch::Scalar, Arch::new()];
    #[cfg(target_arch = "x86_64")]
    all.extend(pulp::x86::V3::try_new().map(Arch::V3));
    let (w, h) = (numbers(70, 83, 3), form(83, 120, 5));
    let h = (&h + &h.t()) / 2.0;
    for pattern in [Pattern::Groups(Nm::TWO_FOUR), Pattern::Groups(Nm::new(3, 7).unwrap()), Pattern::Free] {
        let tables = Tables::new(h.view(), 0.0, pattern);
        let score = scores(Rule::Wanda, w.view(), h.diag());
        let start = prune(w.view(), score.view(), pattern, 70 * 40);
        let run = |arch, form| {
            let mut descent = Descent::new(w.view(), form, &tables, &start).unwrap();
            let prices = [1e-3; 70];
            for choice in [pass::Choice::Priced(&prices), pass::Choice::Masks, pass::Choice::Values] {
                descent.pass_by(arch, choice);
            }
            descent.solution()
        };
        let first = run(Arch::Scalar, h.view());
        for arch in &all {
            for form in [h.view(), h.t()] {
                let found = run(*arch, form);
                assert_eq!(found.kept, first.kept, "{pattern:?} {arch:?}");
                assert!((&found.values - &first.values).iter().all(|d| d.abs() < 1e-9), "{pattern:?} {arch:?}");
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let (w, h) = (numbers(600, 80, 3).mapv(|v| v as f32), form(80, 90, 5));
    let run = || {
        let pattern = Pattern::Groups(Nm::TWO_FOUR);
        let factor = Factor::new(h.view(), 0.01, &Faer).unwrap();
        let start = obs(w.view(), &factor, pattern, 0, None).unwrap();
        let free = obs(w.view(), &factor, Pattern::Free, 20_000, None).unwrap();
        let narrow = h.mapv(|v| v as f32);
        let tables = Tables::new(h.view(), 0.0, pattern);
        (descend(w.view(), narrow.view(), &tables, &start, 2).unwrap(), free)
    };
    let outside = run();
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(run), outside);
        assert_eq!(pool.scope(|_| run()), outside);
    }
}

#[test]
fn a_free_pattern_keeps_the_count_and_falls_with_its_price() {
    let (m, n) = (270, 150);
    let (w, h) = (numbers(m, n, 3), form(n, 2 * n, 5));
    let factor = Factor::new(h.view(), 0.01, &Faer).unwrap();
    let count = m * n * 3 / 5;
    let start = obs(w.view(), &factor, Pattern::Free, count, None).unwrap();
    let stored = |coded: &Coded<f64>| coded.kept.iter().filter(|&&kept| kept).count();
    assert_eq!(stored(&start), count);
    let wanda = prune(w.view(), score::scores(Rule::Wanda, w.view(), h.diag()).view(), Pattern::Free, count);
    assert_eq!(stored(&wanda), count);
    assert!(error(&w, &h, &start) < error(&w, &h, &wanda));
    let tables = Tables::new(h.view(), 0.0, Pattern::Free);
    let mut descent = Descent::new(w.view(), h.view(), &tables, &start).unwrap();
    let price = error(&w, &h, &start) / count as f64;
    let mut last = error(&w, &h, &start) + price * count as f64;
    for _ in 0..4 {
        let count = descent.sweep_priced(&vec![price; m]).unwrap();
        let now = descent.solution();
        assert_eq!(stored(&now), count);
        let total = error(&w, &h, &now) + price * count as f64;
        assert!(total <= last * (1.0 + 1e-12), "{last} to {total}");
        last = total;
    }
    let before = descent.solution();
    descent.refit();
    let after = descent.solution();
    assert_eq!(before.kept, after.kept);
    assert!(error(&w, &h, &after) <= error(&w, &h, &before) * (1.0 + 1e-12));
}
