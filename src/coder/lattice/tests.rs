use ndarray::Array2;

use super::*;
use crate::coder::{Levels, clip};
use crate::linalg::{Faer, Kernels};
use crate::operator::ZeroPoint;
use crate::testing::{gram, numbers};

/// A target of m×n with scale and zero point of each entry.
fn case(m: usize, n: usize, levels: Levels) -> [Array2<f64>; 3] {
    let target = numbers(m, n, 31);
    let grid = clip(target.view(), Array2::ones((m, n)).view(), levels).unwrap();
    let scales = grid.scales().values();
    let steps = Array2::from_shape_fn((m, n), |(i, j)| scales[(i, j / levels.group)]);
    let zeros = Array2::from_shape_fn((m, n), |(i, j)| f64::from(grid.zero(i, j / levels.group)));
    [target, steps, zeros]
}

#[test]
fn the_walk_is_gptq() {
    let levels = Levels { bits: 3, group: 16, zero: ZeroPoint::Integer };
    let (m, n) = (20, 150);
    let ([w, steps, zeros], h) = (case(m, n, levels), gram(n));
    let factor = Factor::<f64>::new(h.view(), 0.01, &Faer).unwrap();
    let mut lattice = Lattice::new(w.view(), steps.view(), zeros.view(), levels.top()).unwrap();
    lattice.walk(&factor).unwrap();
    // As the paper has it: the upper Cholesky factor of the damped inverse, and updates of all later columns.
    let mut damped = h.clone();
    let mean = h.diag().sum() / n as f64;
    damped.diag_mut().mapv_inplace(|d| d + 0.01 * mean);
    let inverse = Kernels::<f64>::solve_spd(&Faer, damped.view(), Array2::eye(n)).unwrap();
    let upper = Kernels::<f64>::cholesky(&Faer, inverse.view()).unwrap().reversed_axes();
    let (mut left, mut expected) = (w.clone(), Array2::zeros((m, n)));
    for c in 0..n {
        for i in 0..m {
            let (step, zero) = (steps[(i, c)], zeros[(i, c)]);
            let code = (left[(i, c)] / step + zero).round().clamp(0.0, f64::from(levels.top()));
            expected[(i, c)] = step * (code - zero);
            let error = (left[(i, c)] - expected[(i, c)]) / upper[(c, c)];
            (c..n).for_each(|j| left[(i, j)] -= error * upper[(c, j)]);
        }
    }
    assert!((&lattice.values() - &expected).iter().all(|v| v.abs() < 1e-9));
}

#[test]
fn sweeps_and_scales_descend_and_stay_on_the_grid() {
    let (none, integer) = (ZeroPoint::None, ZeroPoint::Integer);
    for (bits, group, zero) in [(2, 16, none), (3, 70, integer), (4, 7, none), (8, 32, integer)] {
        let levels = Levels { bits, group, zero };
        let (m, n) = (270, 70);
        let ([w, steps, zeros], h) = (case(m, n, levels), gram(n));
        let mut lattice = Lattice::new(w.view(), steps.view(), zeros.view(), levels.top()).unwrap();
        let mut last = lattice.error(h.view()).unwrap();
        let first = last;
        for turn in 0..6 {
            match turn % 2 {
                0 => lattice.sweep(h.view()).unwrap(),
                _ => lattice.rescale(h.view(), group, DType::F16).unwrap(),
            }
            let now = lattice.error(h.view()).unwrap();
            assert!(now <= last * (1.0 + 1e-9), "{levels:?}: {now} after {last}");
            last = now;
        }
        assert!(last < 0.9 * first, "{levels:?}: {last} of {first}");
        let (values, steps) = (lattice.values(), lattice.steps());
        let delta = &values - &w;
        assert!(((delta.dot(&h) * &delta).sum() - last).abs() < 1e-9 * first);
        for ((&value, &step), &zero) in values.iter().zip(&steps).zip(&zeros) {
            let code = value / step + zero;
            assert!((code - code.round()).abs() < 1e-9 && code.round() >= 0.0 && code.round() <= levels.top().into());
            assert_eq!(step.round_to(DType::F16), step);
        }
        // A sweep of what has settled changes nothing: each entry is at the best of its own.
        (0..40).for_each(|_| lattice.sweep(h.view()).unwrap());
        let settled = lattice.values();
        lattice.sweep(h.view()).unwrap();
        assert_eq!(lattice.values(), settled);
        let (forces, steps) = ((&settled - &w).dot(&h), lattice.steps());
        for ((i, c), &force) in forces.indexed_iter() {
            let (step, code) = (steps[(i, c)], settled[(i, c)] / steps[(i, c)] + zeros[(i, c)]);
            for by in [-1.0, 1.0] {
                if (0.0..=f64::from(levels.top())).contains(&(code + by).round()) {
                    let delta = by * step;
                    assert!(2.0 * delta * force + delta * delta * h[(c, c)] > -1e-9);
                }
            }
        }
    }
}

#[test]
fn a_scale_of_zero_keeps_its_place_empty() {
    let levels = Levels { bits: 4, group: 8, zero: ZeroPoint::None };
    let ([w, mut steps, zeros], h) = (case(9, 40, levels), gram(40));
    steps.indexed_iter_mut().for_each(|((i, j), step)| *step = if (i + j) % 3 == 0 { 0.0 } else { *step });
    let mut lattice = Lattice::new(w.view(), steps.view(), zeros.view(), levels.top()).unwrap();
    let before = lattice.error(h.view()).unwrap();
    (0..3).for_each(|_| lattice.sweep(h.view()).unwrap());
    assert!(lattice.error(h.view()).unwrap() < before);
    assert!(lattice.values().indexed_iter().all(|((i, j), &v)| (i + j) % 3 != 0 || v == 0.0));
}

#[test]
fn clipping_is_never_worse_than_the_full_range() {
    let kinds = [ZeroPoint::None, ZeroPoint::Integer, ZeroPoint::Float];
    for (bits, zero) in (2..=8).flat_map(|bits| kinds.map(|zero| (bits, zero))) {
        let levels = Levels { bits, group: 24, zero };
        // Heavy tails: cubes.
        let (m, n) = (12, 50);
        let target = numbers(m, n, 31).mapv(|v| v * v * v);
        let weights = numbers(m, n, 17).mapv(|v| 0.1 + v * v);
        let grid = clip(target.view(), weights.view(), levels).unwrap();
        let found = crate::operator::Quantized::nearest(target.view(), grid).unwrap();
        let found = crate::operator::LinearOperator::to_dense(&found);
        for i in 0..m {
            for start in (0..n).step_by(24) {
                let columns = start..(start + 24).min(n);
                let of = |j: usize| target[(i, j)];
                let (least, most) = columns.clone().fold((0.0f64, 0.0f64), |a, j| (a.0.min(of(j)), a.1.max(of(j))));
                let top = f64::from(levels.top());
                let (step, zero) = match zero {
                    ZeroPoint::None => (most.max(-least) / ((top - 1.0) / 2.0), (top + 1.0) / 2.0),
                    _ => ((most - least) / top, (-least / ((most - least) / top)).round()),
                };
                let plain = |v: f64| step * ((v / step + zero).round().clamp(0.0, top) - zero);
                let loss = |f: &dyn Fn(usize) -> f64| -> f64 {
                    columns.clone().map(|j| weights[(i, j)] * (f(j) - of(j)).powi(2)).sum()
                };
                let (ours, full) = (loss(&|j| found[(i, j)]), loss(&|j| plain(of(j))));
                // The plain scale is not rounded to 16 bits (8 of them significant), and none of those that are tried equals it.
                let slack = 2e-5 * loss(&|_| 0.0);
                assert!(ours <= 1.1 * full + slack, "{levels:?}: {ours} of {full}");
            }
        }
    }
}
