use super::*;
use crate::linalg::{Faer, Kernels};

/// A matrix with the given singular values and pseudo-random singular vectors.
fn with_spectrum(m: usize, n: usize, values: impl Fn(usize) -> f64) -> (Array2<f64>, Vec<f64>) {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut noise = |rows, columns| {
        let draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
        };
        Kernels::<f64>::orthonormalize(&Faer, Array2::from_shape_simple_fn((rows, columns), draw).view())
    };
    let k = m.min(n);
    let sigma: Vec<f64> = (0..k).map(values).collect();
    let left = noise(m, k) * &Array1::from(sigma.clone());
    (left.dot(&noise(n, k).t()), sigma)
}

fn run<T: Real>(a: &Array2<T>, how: &Krylov) -> Subspace<T> {
    let found = leading_subspace(&Plain { matrix: a.view(), backend: &Faer }, how, &Faer).unwrap();
    let gram = f64::from_view(found.vectors.t()).dot(&f64::from_view(found.vectors.view()));
    let skew = (&gram - &Array2::<f64>::eye(gram.nrows())).iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    assert!(skew < 500.0 * T::epsilon().wide(), "not orthonormal by {skew}");
    let images = f64::from_view(found.vectors.t()).dot(&f64::from_view(a.view()));
    let off = squares((&images - &f64::from_view(found.images.view())).view());
    assert!(off.sqrt() <= 500.0 * T::epsilon().wide() * found.norm_squared.sqrt(), "images off by {off}");
    assert!(found.energies.is_sorted_by(|a, b| a >= b));
    found
}

/// ‖A − UUᵀA‖ ÷ the optimum − 1, from the definition.
fn true_excess(a: &Array2<f64>, u: &Array2<f64>, sigma: &[f64]) -> f64 {
    let rest = a - &u.dot(&u.t().dot(a));
    let tail: f64 = sigma[u.ncols()..].iter().map(|s| s * s).sum();
    (squares(rest.view()) / tail).sqrt() - 1.0
}

#[test]
fn the_excess_is_small_and_its_estimate_honest() {
    type Decay = fn(usize) -> f64;
    let spectra: [(&str, Decay); 5] = [
        ("i^-1/2", |i| (i as f64 + 1.0).powf(-0.5)),
        ("i^-1", |i| 1.0 / (i as f64 + 1.0)),
        ("i^-2", |i| (i as f64 + 1.0).powi(-2)),
        ("exponential", |i| (-(i as f64) / 40.0).exp()),
        ("nearly flat", |i| 1.0 - i as f64 / 400.0),
    ];
    for (name, spectrum) in spectra {
        for (m, n, rank) in [(256, 256, 64), (200, 330, 96), (330, 200, 40)] {
            let (a, sigma) = with_spectrum(m, n, spectrum);
            // No tolerance, so that it stops early and there is something to estimate.
            let how = Krylov { block: rank / 8, tolerance: 1.0, ..Krylov::new(rank, 3) };
            let found = run(&a, &how);
            let excess = true_excess(&a, &found.vectors, &sigma);
            let label = format!("{name} {m}x{n} r={rank}: {excess:.3e}, {:.3e}, {:.3e}", found.excess, found.bound);
            assert!(found.bound >= excess, "{label}");
            assert!(found.excess >= 0.5 * excess && found.excess <= 8.0 * excess + 1e-9, "{label}");
            assert!(found.energies.iter().zip(&sigma).all(|(e, s)| *e <= s * s * (1.0 + 1e-10)), "{label}");
            let measured = squares((&a - &found.vectors.dot(&found.vectors.t().dot(&a))).view());
            assert!((found.residual() - measured).abs() <= 1e-12 * found.norm_squared, "{label}");
            // With the default tolerance it goes on until the estimate is below 2 %, or to a basis of 2r;
            // the estimate may be half the truth.
            let found = run(&a, &Krylov { block: rank / 8, ..Krylov::new(rank, 3) });
            let excess = true_excess(&a, &found.vectors, &sigma);
            assert!(excess <= 0.04, "{label} then {excess:.3e} with {}", found.basis);
        }
    }
}

#[test]
fn single_precision_keeps_graded_spectra() {
    let (a, sigma) = with_spectrum(256, 256, |i| 1.0 / (i as f64 + 1.0));
    let single = f32::from_view(a.view()).into_owned();
    let found = run(&single, &Krylov::new(64, 1));
    let excess = true_excess(&a, &f64::from_view(found.vectors.view()).into_owned(), &sigma);
    assert!((0.0..=0.02).contains(&excess), "{excess}");
    let tail: f64 = sigma[64..].iter().map(|s| s * s).sum();
    assert!((found.residual() / tail).sqrt() - 1.0 <= 0.02);
}

#[test]
fn repeated_and_missing_directions_are_handled() {
    // Two distinct singular values: the Krylov space of one block closes after two blocks.
    let (a, sigma) = with_spectrum(120, 120, |i| if i < 50 { 1.0 } else { 0.1 });
    let found = run(&a, &Krylov { block: 8, ..Krylov::new(60, 2) });
    assert!(true_excess(&a, &found.vectors, &sigma) < 1e-6);
    // Rank 5, and rank 0.
    let (a, _) = with_spectrum(70, 40, |i| if i < 5 { 2.0 } else { 0.0 });
    let found = run(&a, &Krylov::new(20, 2));
    assert_eq!(found.vectors.dim(), (70, 5));
    assert!(found.residual() < 1e-12 && found.excess == 0.0 && found.bound == 0.0);
    let nothing = run(&Array2::<f64>::zeros((9, 7)), &Krylov::new(3, 0));
    assert_eq!(nothing.vectors.dim(), (9, 0));
    assert_eq!(nothing.residual(), 0.0);
    // More than everything, and nothing at all.
    let (a, sigma) = with_spectrum(13, 11, |i| 1.0 / (i as f64 + 1.0));
    let all = run(&a, &Krylov::new(99, 0));
    assert_eq!(all.vectors.dim(), (13, 11));
    assert!(all.energies.iter().zip(&sigma).all(|(e, s)| (e - s * s).abs() < 1e-12));
    assert_eq!(run(&a, &Krylov::new(0, 0)).vectors.dim(), (13, 0));
    assert_eq!(run(&Array2::<f64>::zeros((0, 4)), &Krylov::new(2, 0)).vectors.dim(), (0, 0));
}

#[test]
fn the_seed_decides() {
    let (a, _) = with_spectrum(64, 64, |i| 1.0 / (i as f64 + 1.0));
    let how = Krylov { block: 4, tolerance: 1.0, ..Krylov::new(16, 7) };
    assert_eq!(run(&a, &how).vectors, run(&a, &how).vectors);
    assert_ne!(run(&a, &how).vectors, run(&a, &Krylov { seed: 8, ..how }).vectors);
}

#[test]
fn what_is_not_finite_is_refused() {
    let mut a = Array2::<f64>::ones((20, 30));
    a[(3, 4)] = f64::NAN;
    let plain = Plain { matrix: a.view(), backend: &Faer };
    assert!(matches!(leading_subspace(&plain, &Krylov::new(4, 0), &Faer), Err(Error::Numerical { .. })));
    a[(3, 4)] = 1e200;
    let plain = Plain { matrix: a.view(), backend: &Faer };
    assert!(matches!(leading_subspace(&plain, &Krylov::new(4, 0), &Faer), Err(Error::Numerical { .. })));
}
