//! Applying compressed weights: the dense matrix, two factors at a quarter of the rank, the pivot form at half
//! the bytes, 2:4 sparsity, and block-diagonal factors with a shuffle between them (√n blocks of √n×√n, a Monarch
//! matrix), side by side, for 1, 16 and 128 tokens.
//!
//! Small by default, so that `cargo bench -- --test` takes seconds. `WEIGHTPRESS_BENCH_N=4096` sets the
//! order of the matrix. Bound by bytes at batch 1: expect 2× for half of them where the dense matrix does
//! not fit into the cache. The groups "from memory" make sure of that: they go through copies of the weight, as
//! a token goes through the weights of a model; `WEIGHTPRESS_BENCH_MIB=512` sets how many MiB of each form. Weights that
//! are read from files lie on huge pages; so do these with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use ndarray::{Array2, Axis, s};
use weightpress::Result;
use weightpress::operator::{
    ActivationBits, Bitmask, BlockDiagonal, Dense, Grid, IndexSet, Interpolative, LinearOperator, Nm, NmSparse,
    Operator, Permutation, Quantized, Runs, Side, Stacked, ZeroPoint, ZeroPoints, apply_all,
};
use weightpress::scalar::DType;

fn variable(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}

fn order() -> usize {
    variable("WEIGHTPRESS_BENCH_N", 256)
}

fn numbers(m: usize, n: usize) -> Array2<f32> {
    Array2::from_shape_fn((m, n), |(i, j)| ((i * 7919 + j * 104_729) % 1000) as f32 / 1000.0 - 0.5)
}

fn forms(n: usize) -> Result<Vec<(&'static str, Operator<f32>)>> {
    let w = numbers(n, n);
    let dense = |a: Array2<f32>| Operator::Dense(Dense::new(a));
    let compact = |a: Array2<f32>| Ok(Operator::Dense(Dense::rounded(a, DType::BF16)?));
    let quarter = n / 4;
    // r(2n − r) = n²/2; the pivots lie scattered, as they do in a weight.
    let r = (n as f64 * (1.0 - 0.5f64.sqrt())) as usize;
    let pivots = || IndexSet::new(n, (0..r).map(|i| (i * n / r) as u32).collect());
    let left = Interpolative::new(Side::Left, pivots()?, Dense::new(w.slice(s![r.., ..r]).to_owned()))?;
    let right = Interpolative::new(Side::Right, pivots()?, Dense::new(w.slice(s![..r, r..]).to_owned()))?;
    let (tall, wide) = (w.slice(s![.., ..r]).to_owned(), w.slice(s![..r, ..]).to_owned());
    let factors = [w.slice(s![.., ..quarter]).to_owned(), w.slice(s![..quarter, ..]).to_owned()];
    // Without a rest if n is a square.
    let b = n.isqrt();
    let shuffle = || Permutation::grid((b * b, b * b), b, b, Runs::Uniform(1)).map(Operator::Permutation);
    let monarch = |dtype| {
        let values = || numbers(1, b * b * b).into_raw_vec_and_offset().0;
        let blocks = || BlockDiagonal::rounded(values(), vec![(b, b); b], dtype).map(Operator::BlockDiagonal);
        let pad = Operator::Permutation(Permutation::list(n, (0..b as u32 * b as u32).collect())?);
        Operator::product_of(vec![shuffle()?, blocks()?, shuffle()?, blocks()?, pad])
    };
    // Every choice of 2 of 4, in no order.
    let sparse = |dtype| {
        let ranks = (0..n * (n / 4)).map(|i| (i * 7919 % 104_729 % 6) as u8).collect();
        let values = Dense::rounded(numbers(n, Nm::TWO_FOUR.values_per_row(n)), dtype)?;
        NmSparse::new(Nm::TWO_FOUR, n, ranks, values).map(Operator::NmSparse)
    };
    let armor = |block: usize| {
        let wrapper = || {
            let mut extents = vec![(block, block); n / block];
            extents.extend(Some((n % block, n % block)).filter(|rest| rest.0 > 0));
            let count = extents.iter().map(|(rows, columns)| rows * columns).sum();
            BlockDiagonal::new(numbers(1, count).into_raw_vec_and_offset().0, extents).map(Operator::BlockDiagonal)
        };
        Operator::product_of(vec![wrapper()?, sparse(DType::F32)?, wrapper()?])
    };
    // Half the bytes: a bit for each entry, and 15 of 32 values.
    let kept = Array2::from_shape_fn((n, n), |(i, j)| (i * 31 + j * 17 + i * j) % 32 < 15);
    let masked = Bitmask::gather(w.view(), kept.view(), DType::F32)?;
    let met_in = |activations: ActivationBits, bits: u8, group: usize, zero: ZeroPoint| {
        let each = |value: f32| Dense::rounded(Array2::from_elem((n, n.div_ceil(group)), value), DType::F16);
        let zeros = match zero {
            ZeroPoint::None => ZeroPoints::None,
            ZeroPoint::Integer => ZeroPoints::Integer(Array2::from_elem((n, n.div_ceil(group)), 1)),
            ZeroPoint::Float => ZeroPoints::Float(each(0.02)?),
        };
        let nearest = Quantized::nearest(w.view(), Grid::new(bits, group.min(n), each(0.01)?, zeros)?)?;
        Ok(Operator::Quantized(nearest.with_activation_bits(activations)))
    };
    let codes = |bits, group, zero| met_in(ActivationBits::TwentyFour, bits, group, zero);
    let plain = |bits| codes(bits, 128, ZeroPoint::None);
    let fewer = |activations, bits, group| met_in(activations, bits, group, ZeroPoint::None);
    // Rows of 2 to 6 bits, 4 in the mean, in no order.
    let mixed = || {
        const WIDTHS: [u8; 20] = [4, 3, 5, 4, 2, 4, 3, 5, 4, 4, 6, 4, 3, 5, 4, 4, 3, 5, 4, 4];
        let places: Vec<u8> = (0..n).map(|i| WIDTHS[i * 7919 % 104_729 % WIDTHS.len()] - 2).collect();
        let part = |place: u8| {
            let rows: Vec<usize> = (0..n).filter(|&i| places[i] == place).collect();
            let scales = Dense::rounded(Array2::from_elem((rows.len(), n.div_ceil(128)), 0.01), DType::F16)?;
            let grid = Grid::new(place + 2, 128.min(n), scales, ZeroPoints::None)?;
            Quantized::nearest(w.select(Axis(0), &rows).view(), grid).map(Operator::Quantized)
        };
        Stacked::new(&places, (0..5).map(part).collect::<Result<_>>()?).map(Operator::Stacked)
    };
    Ok(vec![
        ("8 bits", plain(8)?),
        ("4 bits", plain(4)?),
        ("3 bits", plain(3)?),
        ("2 bits", plain(2)?),
        ("4 bits, groups of 64", codes(4, 64, ZeroPoint::Integer)?),
        ("4 bits, groups of 32", codes(4, 32, ZeroPoint::Integer)?),
        ("4 bits, groups of 32, float zero points", codes(4, 32, ZeroPoint::Float)?),
        ("8 bits, inputs of 16", fewer(ActivationBits::Sixteen, 8, 128)?),
        ("4 bits, inputs of 16", fewer(ActivationBits::Sixteen, 4, 128)?),
        ("4 bits, groups of 32, inputs of 16", fewer(ActivationBits::Sixteen, 4, 32)?),
        ("8 bits, inputs of 8", fewer(ActivationBits::Eight, 8, 128)?),
        ("4 bits, inputs of 8", fewer(ActivationBits::Eight, 4, 128)?),
        ("4 bits, groups of 32, inputs of 8", fewer(ActivationBits::Eight, 4, 32)?),
        ("rows of 2 to 6 bits", mixed()?),
        ("bit mask, half", Operator::Bitmask(masked)),
        ("2:4", sparse(DType::F32)?),
        ("2:4, bf16", sparse(DType::BF16)?),
        ("armor, blocks of 16", armor(16)?),
        ("armor, blocks of 64", armor(64)?),
        ("Monarch, √n blocks", monarch(DType::F32)?),
        ("Monarch, √n blocks, bf16", monarch(DType::BF16)?),
        ("factors r=n÷4", Operator::product_of(factors.clone().map(dense).into())?),
        ("factors r=n÷4, bf16", Operator::product_of(factors.map(compact).into_iter().collect::<Result<_>>()?)?),
        ("pivot rows, half", Operator::product_of(vec![Operator::Interpolative(left), dense(wide)])?),
        ("pivot columns, half", Operator::product_of(vec![dense(tall), Operator::Interpolative(right)])?),
        ("dense, bf16", compact(w.clone())?),
        ("dense", dense(w)),
    ])
}

fn all(c: &mut Criterion) {
    let n = order();
    let forms = match forms(n) {
        Ok(forms) => forms,
        Err(error) => return eprintln!("{error}"),
    };
    let Ok(pool) = rayon::ThreadPoolBuilder::new().num_threads(1).build() else { return };
    for batch in [1, 2, 3, 4, 8, 16, 128] {
        let x = numbers(batch, n);
        let mut group = c.benchmark_group(format!("operator/f32/{n}/batch {batch}"));
        for (name, operator) in &forms {
            group.bench_function(*name, |b| {
                // On a worker thread products run sequentially.
                pool.install(|| b.iter(|| operator.forward(black_box(x.view())).is_ok()))
            });
        }
        group.finish();
    }
    let least = (variable("WEIGHTPRESS_BENCH_MIB", 1) << 20) as u64;
    for batch in [1, 2, 4, 8, 16] {
        let x = numbers(batch, n);
        let mut group = c.benchmark_group(format!("operator/f32/{n}/from memory, batch {batch}"));
        for (name, operator) in &forms {
            let (mut copies, mut next) = (Vec::new(), 0);
            group.bench_function(*name, |b| {
                // Here, so that what is filtered out takes no memory.
                copies.resize(least.div_ceil(operator.bytes()) as usize, operator.clone());
                pool.install(|| {
                    b.iter(|| {
                        next = (next + 1) % copies.len();
                        copies[next].forward(black_box(x.view())).is_ok()
                    })
                })
            });
        }
        group.finish();
    }
    // With the transpose: gradients, and factors that stand on the other side.
    for batch in [1, 16] {
        let x = numbers(n, batch);
        let mut group = c.benchmark_group(format!("operator/f32/{n}/transposed, batch {batch}"));
        for (name, operator) in forms.iter().filter(|form| form.0.ends_with("bits") || form.0 == "dense") {
            group.bench_function(*name, |b| {
                pool.install(|| b.iter(|| operator.product_transposed(black_box(x.view()))))
            });
        }
        group.finish();
    }
}

/// One token through matrices of a small language model and their two factors of half the bytes, beside ndarray's own
/// product. All fit into the cache: of what memory allows, `evaluate` tells.
fn one_vector(c: &mut Criterion) {
    let Ok(pool) = rayon::ThreadPoolBuilder::new().num_threads(1).build() else { return };
    for (m, n) in [(576, 576), (1536, 576), (576, 1536)] {
        let (w, x, r) = (numbers(m, n), numbers(1, n), m * n / (2 * (m + n)));
        let dense = |a: Array2<f32>| Operator::Dense(Dense::new(a));
        let factors = vec![dense(numbers(m, r)), dense(numbers(r, n))];
        let Ok(factors) = Operator::product_of(factors) else { return };
        let mut group = c.benchmark_group(format!("operator/f32/{m}x{n}/one vector"));
        let column = x.row(0);
        group.bench_function("ndarray", |b| b.iter(|| w.dot(black_box(&column))));
        for (name, operator) in [("dense", dense(w.clone())), ("factors, half", factors)] {
            group.bench_function(name, |b| pool.install(|| b.iter(|| operator.forward(black_box(x.view())).is_ok())));
        }
        group.finish();
    }
}

/// Queries, keys and values, and gate and up, of a small language model in 4 bits: one by one, and together.
fn same_input(c: &mut Criterion) {
    let n = 576;
    let codes = |m: usize, activations| {
        let scales = Dense::rounded(Array2::from_elem((m, n / 64), 0.01), DType::F16)?;
        let nearest = Quantized::nearest(numbers(m, n).view(), Grid::new(4, 64, scales, ZeroPoints::None)?)?;
        Ok(Operator::Quantized(nearest.with_activation_bits(activations)))
    };
    for (bits, activations) in [(24, ActivationBits::TwentyFour), (8, ActivationBits::Eight)] {
        let all: Result<Vec<_>> = [576, 192, 192, 1536, 1536].into_iter().map(|m| codes(m, activations)).collect();
        let Ok([q, k, v, gate, up]) = all.as_deref() else { return };
        for batch in [1, 16, 512] {
            let x = numbers(n, batch);
            let mut group = c.benchmark_group(format!("operator/f32/one input, batch {batch}, inputs of {bits}"));
            let alone = |of: &[&Operator<f32>]| of.iter().all(|of| of.apply(black_box(x.view())).is_ok());
            group.bench_function("q, k, v one by one", |b| b.iter(|| alone(&[q, k, v])));
            group.bench_function("q, k, v together", |b| b.iter(|| apply_all([q, k, v], black_box(x.view())).is_ok()));
            group.bench_function("gate, up one by one", |b| b.iter(|| alone(&[gate, up])));
            group
                .bench_function("gate, up together", |b| b.iter(|| apply_all([gate, up], black_box(x.view())).is_ok()));
            group.finish();
        }
    }
}

criterion_group!(benches, all, one_vector, same_input);
criterion_main!(benches);
