//! Kernels of the default backend: products, symmetric products, eigen and singular value decompositions,
//! pivoted QR, leading singular triplets of many small slices, and the block Krylov iteration beside the exact
//! decomposition it replaces.
//!
//! Small by default, so that `cargo bench -- --test` takes seconds. `WEIGHTPRESS_BENCH_N=4096` sets the
//! order of the matrices. One thread (a pool of one); compare ratios, not seconds.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use ndarray::{Array2, s};
use weightpress::linalg::krylov::{Krylov, Plain, leading_subspace};
use weightpress::linalg::{Faer, SparseCoder, Stop, leading_triplets};
use weightpress::scalar::Real;

fn order() -> usize {
    std::env::var("WEIGHTPRESS_BENCH_N").ok().and_then(|n| n.parse().ok()).unwrap_or(128)
}

/// Singular values that fall off, as those of weights do, without structure that a kernel could use.
fn matrix<T: Real>(m: usize, n: usize) -> Array2<T> {
    Array2::from_shape_fn((m, n), |(i, j)| {
        let mixed =
            (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (j as u64 + 1).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
        T::from_f64(((mixed >> 20) % 4096) as f64 / 2048.0 - 1.0 + 4.0 / (1.0 + (i + j) as f64))
    })
}

fn kernels<T: Real>(c: &mut Criterion, pool: &rayon::ThreadPool, scalar: &str) {
    let (n, faer) = (order(), T::kernels(&Faer));
    let a = matrix::<T>(n, n);
    let (eighth, half) = (a.slice(s![..n / 8, ..]), a.slice(s![..n / 2, ..]));
    let spd = faer.gram(a.view());
    let plain = Plain { matrix: a.view(), backend: &Faer };
    let how = Krylov { tolerance: 1.0, ..Krylov::new(n / 4, 0) };
    // As the rank-one Monarch projection cuts a matrix: n slices of √n×√n.
    let signals = matrix::<T>(4 * n, n).slice_move(s![..;-1, ..]);
    let side = n.isqrt();
    let cut = |i: usize| a.slice(s![i / side * side..(i / side + 1) * side, i % side * side..(i % side + 1) * side]);
    let slices: Vec<_> = (0..side * side).map(cut).collect();
    let rows: [(&str, &(dyn Fn() -> bool + Sync)); 11] = [
        ("gemm", &|| !faer.matmul(black_box(a.view()), a.view()).is_empty()),
        ("gemm, few rows by a transpose", &|| !faer.matmul(black_box(eighth.view()), a.t()).is_empty()),
        ("gram", &|| !faer.gram(black_box(a.view())).is_empty()),
        ("eigh", &|| faer.eigh(black_box(spd.clone())).is_ok()),
        ("svd", &|| faer.svd(black_box(a.view())).is_ok()),
        ("leading triplets, slices of √n×√n", &|| leading_triplets(black_box(&slices)).is_ok()),
        ("cholesky", &|| faer.cholesky(black_box(spd.view())).is_ok()),
        ("orthonormalize", &|| !faer.orthonormalize(black_box(a.view())).is_empty()),
        ("pivoted_r of the upper half", &|| !faer.pivoted_r(black_box(half.view())).order.is_empty()),
        ("batch-omp of 4n signals, s = n/32", &|| match SparseCoder::new(black_box(a.view())) {
            Ok(coder) => coder.encode(signals.view(), Stop::nonzeros(n / 32)).is_ok(),
            Err(_) => false,
        }),
        ("krylov, r = n/4", &|| leading_subspace(black_box(&plain), &how, &Faer).is_ok()),
    ];
    let mut group = c.benchmark_group(format!("linalg/{scalar}/{n}"));
    group.sample_size(10);
    for (name, run) in rows {
        // On a worker thread the kernels run sequentially.
        group.bench_function(name, |b| pool.install(|| b.iter(run)));
    }
    group.finish();
}

fn all(c: &mut Criterion) {
    let Ok(pool) = rayon::ThreadPoolBuilder::new().num_threads(1).build() else { return };
    kernels::<f32>(c, &pool, "f32");
    kernels::<f64>(c, &pool, "f64");
}

criterion_group!(benches, all);
criterion_main!(benches);
