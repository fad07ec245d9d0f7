use ndarray::{Array2, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::*;
use crate::linalg::Svd;
use crate::testing::architectures;

/// Normal numbers, nearly (the sum of twelve uniform ones).
fn gaussian(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = move || random.next_u32() as f64 / 4_294_967_296.0 - 0.5;
    Array2::from_shape_simple_fn((rows, columns), || (0..12).map(|_| uniform()).sum())
}

/// A matrix with given leading singular values, the others those of a Gaussian matrix below the last given.
fn with_values(rows: usize, columns: usize, values: &[f64], seed: u64) -> Array2<f64> {
    let Svd { u, values: mut found, vt } = Kernels::<f64>::svd(&Faer, gaussian(rows, columns, seed).view()).unwrap();
    let scale = values[values.len() - 1] / found[values.len().min(found.len() - 1)];
    found *= scale;
    found.iter_mut().zip(values).for_each(|(found, value)| *found = *value);
    (&u * &found).dot(&vt)
}

/// Holds a triplet against the definition in f64: unit vectors, the sign, the residual and its excess over the least.
fn check<T: Real>(a: ArrayView2<'_, T>, found: &SingularTriplet<T>, excess: f64) {
    let a = a.mapv(|x| x.wide());
    let largest = a.fold(0.0, |max: f64, x| max.max(x.abs()));
    let scaled = if largest > 0.0 { &a / largest } else { a.clone() };
    let (u, v) = (found.left.mapv(|x| x.wide()), found.right.mapv(|x| x.wide()));
    let (value, residual) = match largest > 0.0 {
        true => (found.value / largest, found.residual / largest / largest),
        false => (found.value, found.residual),
    };
    let eps = T::epsilon().wide();
    let shape = a.dim();
    assert_eq!((u.len(), v.len()), shape);
    for unit in [&u, &v] {
        assert!(unit.is_empty() || (unit.dot(unit) - 1.0).abs() < 8.0 * eps, "{shape:?}: length {}", unit.dot(unit));
    }
    let peak = u.iter().fold(0.0, |best: f64, &x| if x.abs() > best.abs() { x } else { best });
    assert!(u.is_empty() || peak > 0.0, "{shape:?}: sign");
    let outer = Array2::from_shape_fn(shape, |(i, j)| value * u[i] * v[j]);
    let measured = (&scaled - &outer).mapv(|x| x * x).sum();
    let values = Kernels::<f64>::svd(&Faer, scaled.view()).unwrap().values;
    let energy = values.mapv(|x| x * x).sum();
    let least: f64 = values.iter().skip(1).map(|x| x * x).sum();
    // Each entry of u, of v and of their product is rounded.
    let noise = 16.0 * eps * eps * energy;
    assert!(measured <= least * (1.0 + excess) + noise, "{shape:?}: {} over, least {least}", measured / least - 1.0);
    assert!((residual - measured).abs() <= 1e-5 * measured + noise, "{shape:?}: said {residual}, is {measured}");
    let top = values.first().copied().unwrap_or(0.0);
    assert!((value - top).abs() <= 64.0 * eps * top, "{shape:?}: {value} for {top}");
}

fn check_all<T: Real>(slices: &[Array2<f64>]) {
    let slices: Vec<_> = slices.iter().map(|slice| slice.mapv(T::from_f64)).collect();
    let views: Vec<_> = slices.iter().map(|slice| slice.view()).collect();
    for arch in architectures() {
        let found = leading_triplets_by(arch, &views).unwrap();
        assert_eq!(found.len(), views.len());
        views.iter().zip(&found).for_each(|(view, found)| check(view.view(), found, 1e-6));
    }
}

#[test]
fn every_slice_is_optimal_whatever_its_spectrum() {
    let mut slices = Vec::new();
    for seed in 0..24 {
        slices.push(gaussian(32, 32, seed));
        slices.push(gaussian(17, 40, 100 + seed));
    }
    for (i, second) in [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.999_999, 1.0].into_iter().enumerate() {
        slices.push(with_values(24, 24, &[1.0, second], i as u64));
        slices.push(with_values(31, 16, &[1.0, second, second, second], 50 + i as u64));
        slices.push(with_values(8, 13, &[1.0, second, 0.01 * second], 70 + i as u64));
    }
    check_all::<f32>(&slices);
    check_all::<f64>(&slices);
}

#[test]
fn degenerate_slices() {
    let rank_one = Array2::from_shape_fn((9, 7), |(i, j)| (i as f64 - 3.5) * (j as f64 + 0.5));
    let diagonal = Array2::from_diag(&ndarray::arr1(&[1.0, -3.0, 2.0, 3.0, 0.0]));
    let mut one_entry = Array2::zeros((6, 6));
    one_entry[(4, 2)] = -2.0;
    let mut slices = vec![
        Array2::zeros((5, 5)),
        rank_one,
        Array2::from_elem((8, 8), 0.3),
        Array2::from_elem((8, 8), -0.3),
        Array2::eye(12),
        diagonal,
        one_entry,
        gaussian(1, 1, 1),
        gaussian(1, 20, 2),
        gaussian(20, 1, 3),
        gaussian(2, 2, 4),
        gaussian(3, 200, 5),
        gaussian(150, 2, 6),
    ];
    slices.extend([1e-30, 1e30, 3e-38, 1e-42].map(|scale| gaussian(10, 12, 7) * scale));
    check_all::<f32>(&slices);
    check_all::<f64>(&slices);
}

#[test]
fn nothing_to_do() {
    assert!(leading_triplets::<f32>(&[]).unwrap().is_empty());
    let empty: Vec<Array2<f32>> = [(0, 0), (0, 3), (4, 0)].map(Array2::zeros).into();
    let found = leading_triplets(&empty.iter().map(|a| a.view()).collect::<Vec<_>>()).unwrap();
    let sizes: Vec<_> = found.iter().map(|t| (t.left.len(), t.right.len(), t.value, t.residual)).collect();
    assert_eq!(sizes, [(0, 0, 0.0, 0.0), (0, 3, 0.0, 0.0), (4, 0, 0.0, 0.0)]);
}

#[test]
fn what_is_not_finite_is_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let good = gaussian(8, 8, 1).mapv(|x| x as f32);
        let mut other = good.clone();
        other[(2, 3)] = bad;
        let error = leading_triplets(&[good.view(), other.view()]).unwrap_err();
        assert!(matches!(error, crate::Error::NonFinite { index: 19, .. }), "{error}");
    }
}

#[test]
fn large_slices_go_to_the_backend() {
    let a = with_values(SHORT_SIDE + 3, SHORT_SIDE + 1, &[2.0, 1.9], 3).mapv(|x| x as f32);
    let found = leading_triplets(&[a.view(), a.t()]).unwrap();
    check(a.view(), &found[0], 1e-6);
    check(a.t(), &found[1], 1e-6);
}

#[test]
fn a_slice_does_not_depend_on_its_neighbours_nor_on_its_strides() {
    let whole = gaussian(60, 90, 9).mapv(|x| x as f32);
    // Strided rows, a block, columns that are contiguous, both strides odd, reversed.
    let views = [
        whole.slice(s![1..;5, 30..42]),
        whole.slice(s![12..24, 3..15]),
        whole.slice(s![2..26;2, ..48;4]),
        whole.slice(s![..12, 5..17]).reversed_axes(),
        whole.slice(s![..24;-2, 7..31;-2]),
        whole.slice(s![.., 4..8]),
    ];
    let together = leading_triplets(&views).unwrap();
    let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(single.install(|| leading_triplets(&views)).unwrap(), together);
    for (view, found) in views.iter().zip(&together) {
        check(view.view(), found, 1e-6);
        assert_eq!(&leading_triplets(&[view.view()]).unwrap()[0], found);
        let tall = leading_triplets(&[view.t()]).unwrap().remove(0);
        assert!((tall.value - found.value).abs() <= 1e-6 * found.value);
    }
}
