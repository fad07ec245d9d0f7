//! Reading a checkpoint (open, widen every matrix) and writing one (canonical order, fsync, rename).
//!
//! Small by default, so that `cargo bench -- --test` takes seconds. `WEIGHTPRESS_BENCH_N=2048` sets the
//! order of its eight bf16 matrices. The row `bytes` reads the same file whole, for comparison.

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use weightpress::checkpoint::{Checkpoint, Entry, Payload, write_shard};
use weightpress::scalar::DType;
use weightpress::tensor::Tensor;

fn all(c: &mut Criterion) {
    let n: usize = std::env::var("WEIGHTPRESS_BENCH_N").ok().and_then(|n| n.parse().ok()).unwrap_or(128);
    let Ok(folder) = tempfile::tempdir() else { return };
    let path = folder.path().join("model.safetensors");
    let matrix: Vec<u8> =
        (0..n * n).flat_map(|i| half::bf16::from_f32((i % 251) as f32 - 125.0).to_le_bytes()).collect();
    let entries = || -> Vec<Entry<'_>> {
        let entry = |i| Entry {
            name: format!("layers.{i}.weight"),
            dtype: DType::BF16,
            shape: vec![n, n],
            data: Payload::Bytes(matrix.as_slice().into()),
        };
        (0..8).map(entry).collect()
    };
    let mut group = c.benchmark_group("checkpoint");
    group.throughput(Throughput::Bytes(8 * matrix.len() as u64));
    group.bench_function("write", |b| b.iter(|| write_shard(&path, &BTreeMap::new(), entries())));
    if write_shard(&path, &BTreeMap::new(), entries()).is_err() {
        return;
    }
    group.bench_function("read", |b| {
        b.iter(|| {
            let checkpoint = Checkpoint::open(&path)?;
            for tensor in checkpoint.tensors() {
                black_box(checkpoint.get(&tensor.name)?.matrix::<f32>()?);
            }
            Ok::<(), weightpress::Error>(())
        })
    });
    group.bench_function("bytes", |b| b.iter(|| std::fs::read(black_box(&path))));
    group.finish();
}

criterion_group!(benches, all);
criterion_main!(benches);
