use ndarray::{Array2, s};

use super::*;
use crate::linalg::Kernels;

fn numbers(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    Array2::from_shape_fn((rows, columns), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
    })
}

/// Textbook: correlate what is left, take the best atom, solve the normal equations, and again.
fn naive(atoms: &Array2<f64>, signal: &[f64], nonzeros: usize, residual: f64) -> (Vec<usize>, Vec<f64>, f64) {
    let signal = Array1::from(signal.to_vec());
    let (mut support, mut values, mut rest) = (Vec::new(), Array1::zeros(0), signal.clone());
    while support.len() < nonzeros && rest.dot(&rest) > residual {
        let correlation = |k: usize| atoms.row(k).dot(&rest).abs() / atoms.row(k).dot(&atoms.row(k)).sqrt();
        let free = (0..atoms.nrows()).filter(|k| !support.contains(k) && correlation(*k).is_finite());
        let Some(best) = free.max_by(|&a, &b| correlation(a).total_cmp(&correlation(b))) else { break };
        support.push(best);
        let chosen = atoms.select(Axis(0), &support);
        let right = chosen.dot(&signal).insert_axis(Axis(1));
        values = Kernels::<f64>::solve_spd(&Faer, chosen.dot(&chosen.t()).view(), right).unwrap().remove_axis(Axis(1));
        rest = &signal - &values.dot(&chosen);
    }
    (support, values.to_vec(), rest.dot(&rest))
}

#[test]
fn equals_the_textbook_for_all_sizes() {
    for (k, d, count, nonzeros) in
        [(1, 1, 1, 1), (5, 3, 4, 3), (16, 20, 7, 5), (63, 40, 130, 8), (64, 64, 9, 64), (150, 90, 20, 40)]
    {
        let (atoms, signals) = (numbers(k, d, 1) * 3.0, numbers(count, d, 2));
        let coder = SparseCoder::new(atoms.view()).unwrap();
        let codes = coder.encode(signals.view(), Stop::nonzeros(nonzeros)).unwrap();
        assert_eq!(codes.shape(), (count, k));
        let from_gram = SparseCoder::from_gram(atoms.dot(&atoms.t()).view()).unwrap();
        let energies: Vec<f64> = signals.rows().into_iter().map(|row| row.dot(&row)).collect();
        let again =
            from_gram.encode_correlations(signals.dot(&atoms.t()).view(), &energies, Stop::nonzeros(nonzeros)).unwrap();
        for (i, signal) in signals.rows().into_iter().enumerate() {
            let (support, values, residual) = naive(&atoms, signal.as_slice().unwrap(), nonzeros.min(d).min(k), 1e-20);
            let (found, numbers): (Vec<usize>, Vec<f64>) = codes.signal(i).unzip();
            assert_eq!(found, support, "{k} atoms of length {d}, signal {i}");
            assert_eq!(again.signal(i).map(|(atom, _)| atom).collect::<Vec<_>>(), support);
            let largest = values.iter().fold(1.0, |a: f64, v| a.max(v.abs()));
            assert!(numbers.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-8 * largest));
            assert!((codes.residuals()[i] - residual).abs() < 1e-9, "{} {residual}", codes.residuals()[i]);
            // What is left is orthogonal to all atoms of the support.
            let rest = &signal - &codes.to_dense().row(i).dot(&atoms);
            assert!(support.iter().all(|&atom| atoms.row(atom).dot(&rest).abs() < 1e-8));
        }
        // One signal alone gives the same codes.
        let alone = coder.encode(signals.slice(s![count - 1.., ..]), Stop::nonzeros(nonzeros)).unwrap();
        assert!(alone.signal(0).zip(codes.signal(count - 1)).all(|(a, b)| a == b || (a.1 - b.1).abs() < 1e-12));
    }
}

#[test]
fn stops_at_an_error() {
    let (atoms, signals) = (numbers(40, 24, 3), numbers(30, 24, 4));
    let codes = SparseCoder::new(atoms.view()).unwrap().encode(signals.view(), Stop::residual(2.0)).unwrap();
    for (i, signal) in signals.rows().into_iter().enumerate() {
        let (support, _, residual) = naive(&atoms, signal.as_slice().unwrap(), 24, 2.0);
        assert_eq!(codes.signal(i).map(|(atom, _)| atom).collect::<Vec<_>>(), support);
        assert!(codes.residuals()[i] <= 2.0 && (codes.residuals()[i] - residual).abs() < 1e-10);
    }
}

#[test]
fn over_orthonormal_atoms_it_keeps_the_largest() {
    let atoms = Kernels::<f64>::orthonormalize(&Faer, numbers(12, 8, 5).view());
    let signals = numbers(9, 12, 6);
    let codes = SparseCoder::new(atoms.t()).unwrap().encode(signals.view(), Stop::nonzeros(3)).unwrap();
    for (code, signal) in codes.to_dense().rows().into_iter().zip(signals.rows()) {
        let all = signal.dot(&atoms);
        let mut sorted: Vec<f64> = all.iter().map(|v| v.abs()).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for (&found, &value) in code.iter().zip(&all) {
            let expected = if value.abs() >= sorted[2] { value } else { 0.0 };
            assert!((found - expected).abs() < 1e-12);
        }
    }
}

#[test]
fn duplicates_zeros_and_bad_numbers() {
    // Atom 1 is atom 0 again, atom 2 is zero; signal 0 is an atom, signal 1 nothing.
    let atoms = ndarray::array![[1.0f32, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]];
    let signals = ndarray::array![[2.0f32, 4.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 5.0]];
    let coder = SparseCoder::new(atoms.view()).unwrap();
    let codes = coder.encode(signals.view(), Stop::nonzeros(4)).unwrap();
    assert_eq!((codes.signal(0).count(), codes.signal(1).count(), codes.signal(2).count()), (1, 0, 2));
    assert!(codes.to_dense().iter().all(|v| v.is_finite()) && codes.to_dense().column(2).iter().all(|v| *v == 0.0));
    assert!(SparseCoder::new(ndarray::array![[f32::NAN]].view()).is_err());
    assert!(coder.encode(ndarray::array![[1.0f32, f32::INFINITY, 0.0]].view(), Stop::nonzeros(1)).is_err());
    assert!(coder.encode(ndarray::array![[1.0f32]].view(), Stop::nonzeros(1)).is_err());
    assert!(SparseCoder::from_gram(numbers(2, 3, 1).view()).is_err());
    assert!(
        SparseCoder::<f64>::from_gram(Array2::eye(2).view())
            .unwrap()
            .encode(numbers(1, 2, 1).view(), Stop::nonzeros(1))
            .is_err()
    );
    assert_eq!(coder.encode(Array2::zeros((0, 3)).view(), Stop::nonzeros(1)).unwrap().stored(), 0);
}
