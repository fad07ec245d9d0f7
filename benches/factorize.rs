//! Low rank under every metric: the exact and the fast route, to the rank of half the bytes, and the two
//! halves of the exact one (`decompose` serves all budgets, `assemble` cuts it at one); Monarch and DCT
//! projections, and the transform alone.
//!
//! Small by default, so that `cargo bench -- --test` takes seconds. `WEIGHTPRESS_BENCH_N=1024` sets the
//! number of rows; there are twice as many columns.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use ndarray::{Array1, Array2};
use weightpress::budget::Budget;
use weightpress::factorize::{Atoms, Cosine, Factorize, Form, Monarch, Problem, Route, Svd};
use weightpress::linalg::{Faer, Kernels, Transform};
use weightpress::metric::{Metric, Weighting};
use weightpress::stats::Gram;

fn order() -> usize {
    std::env::var("WEIGHTPRESS_BENCH_N").ok().and_then(|n| n.parse().ok()).unwrap_or(64)
}

/// Numbers whose singular values fall off slowly.
fn numbers(m: usize, n: usize) -> Array2<f32> {
    Array2::from_shape_fn((m, n), |(i, j)| {
        let mixed =
            (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (j as u64 + 1).wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
        (((mixed >> 20) % 4096) as f32 / 2048.0 - 1.0) / (1.0 + (j as f32).sqrt())
    })
}

fn metrics(n: usize) -> weightpress::Result<Vec<(&'static str, Metric)>> {
    let x = numbers(n, n + 8).mapv(f64::from);
    let diagonal = Weighting::Diagonal(Arc::new(Array1::from_shape_fn(n, |i| 1.0 + (i % 5) as f64)));
    Ok(vec![
        ("frobenius", Metric::frobenius()),
        ("activation", Metric { input: diagonal, ..Metric::default() }),
        ("gram", Metric::gram(Arc::new(Gram::new("bench", Faer.gram(x.view()))?))),
    ])
}

fn all(c: &mut Criterion) {
    let (m, n) = (order(), 2 * order());
    let w = numbers(m, n);
    let metrics = match metrics(n) {
        Ok(metrics) => metrics,
        Err(error) => return eprintln!("{error}"),
    };
    let Ok(pool) = rayon::ThreadPoolBuilder::new().num_threads(1).build() else { return };
    for (name, metric) in metrics {
        let problem = Problem::new("w", w.view(), Budget::Rank(m / 4)).metric(metric);
        let group_of_one = std::slice::from_ref(&problem);
        let mut group = c.benchmark_group(format!("factorize/svd/{name}/{m}x{n} r={}", m / 4));
        group.sample_size(10);
        for (route, method) in [
            ("exact, pivot form", Svd::default()),
            ("exact, factors", Svd { form: Form::Factors, ..Svd::default() }),
            ("fast, factors", Svd { form: Form::Factors, route: Route::Fast, ..Svd::default() }),
        ] {
            group.bench_function(route, |b| {
                pool.install(|| b.iter(|| method.factorize(black_box(group_of_one)).is_ok()))
            });
        }
        if let Ok(Some(decomposition)) = Svd::default().decompose(group_of_one) {
            group.bench_function("assemble only", |b| {
                pool.install(|| b.iter(|| Svd::default().assemble(group_of_one, black_box(&decomposition)).is_ok()))
            });
        }
        group.bench_function("cosine, DCT-II", |b| {
            let method = Cosine { basis: Atoms::Dct2, ..Cosine::default() };
            pool.install(|| b.iter(|| method.factorize(black_box(group_of_one)).is_ok()))
        });
        let half = Problem { budget: Budget::Keep(0.5), ..problem.clone() };
        group.bench_function("monarch, 4x4 blocks, half the bytes", |b| {
            let method = Monarch { input_blocks: Some(4), ..Monarch::default() };
            pool.install(|| b.iter(|| method.factorize(black_box(std::slice::from_ref(&half))).is_ok()))
        });
        group.finish();
    }
    let blocks = m.isqrt();
    c.bench_function(&format!("factorize/monarch/{m}x{n} {blocks}x{blocks} blocks, rank 1"), |b| {
        let method = Monarch { input_blocks: Some(blocks), form: Some(Form::Factors), ..Monarch::default() };
        let problem = Problem::new("w", w.view(), Budget::Rank(1));
        pool.install(|| b.iter(|| method.factorize(black_box(std::slice::from_ref(&problem))).is_ok()))
    });
    c.bench_function(&format!("transform/DCT-II of {m} rows of {n}"), |b| {
        pool.install(|| b.iter(|| Transform::Dct2.rows(black_box(w.view())).is_ok()))
    });
}

criterion_group!(benches, all);
criterion_main!(benches);
