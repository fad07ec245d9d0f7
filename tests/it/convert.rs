//! `examples/convert.rs`: layers of two block-diagonal tensors become factored weights.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::{Array2, ArrayView3};
use weightpress::checkpoint::{Checkpoint, Entry, Payload, write_shard};
use weightpress::operator::LinearOperator;
use weightpress::scalar::{DType, narrow};

use super::cli::run;
use super::run::matrix;

fn blocks(name: &str, (count, rows, columns): (usize, usize, usize), dtype: DType) -> (Entry<'static>, Vec<f32>) {
    let values: Vec<f32> = matrix(1, count * rows * columns, count + rows).into_iter().collect();
    let bytes = narrow(dtype, &values).unwrap();
    let shape = vec![count, rows, columns];
    let rounded = weightpress::scalar::widen(dtype, &bytes).unwrap();
    (Entry { name: name.into(), dtype, shape, data: Payload::Bytes(bytes.into()) }, rounded)
}

fn plain(name: &str, shape: &[usize]) -> Entry<'static> {
    let bytes = vec![7; 4 * shape.iter().product::<usize>()];
    Entry { name: name.into(), dtype: DType::F32, shape: shape.into(), data: Payload::Bytes(bytes.into()) }
}

/// y[σl+λ] = Σ_j w2[λ,σ,c div l]·w1[κ,j,π] over c = κq + j with c mod l = λ.
fn dense(w1: ArrayView3<'_, f32>, w2: ArrayView3<'_, f32>, (m, n): (usize, usize)) -> Array2<f32> {
    let ((_, q, p), l) = (w1.dim(), w2.dim().0);
    Array2::from_shape_fn((m, n), |(row, column)| {
        let terms = (0..q).map(|j| (j, column / p * q + j)).filter(|(_, c)| c % l == row % l);
        terms.map(|(j, c)| w2[(row % l, row / l, c / l)] * w1[(column / p, j, column % p)]).sum()
    })
}

fn convert(input: &Path, out: &Path, rest: &[&str]) -> (Option<i32>, String, String) {
    let mut arguments = vec![input.as_os_str(), "--out".as_ref(), out.as_os_str()];
    arguments.extend(rest.iter().map(|argument| std::ffi::OsStr::new(*argument)));
    run("convert", arguments)
}

#[test]
fn layers_become_weights_that_multiply_alike() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    let (first1, a1) = blocks("net.a.blkdiag1", (4, 6, 3), DType::F32);
    let (first2, a2) = blocks("net.a.blkdiag2", (3, 5, 8), DType::F32);
    let (second1, b1) = blocks("net.b.blkdiag1", (2, 3, 4), DType::BF16);
    let (second2, b2) = blocks("net.b.blkdiag2", (2, 4, 3), DType::BF16);
    let others = [plain("net.a.bias", &[14]), plain("head.weight", &[2, 3])];
    let entries = [first1, first2, second1, second2].into_iter().chain(others).collect();
    write_shard(&input, &BTreeMap::new(), entries).unwrap();

    let out = folder.path().join("out");
    let (code, printed, errors) = convert(&input, &out, &["--shape", r".*\.b=7x6"]);
    assert_eq!(code, Some(0), "{printed}{errors}");
    let checkpoint = Checkpoint::open(&out).unwrap();
    let mut loader = checkpoint.loader::<f32>().unwrap();
    let view = |values: &'static [f32], dim| ArrayView3::from_shape(dim, values).unwrap();
    let [a1, a2, b1, b2] = [a1, a2, b1, b2].map(|values| &*values.leak());
    for (name, expected) in [
        // As many outputs as the bias has.
        ("net.a.weight", dense(view(a1, (4, 6, 3)), view(a2, (3, 5, 8)), (14, 12))),
        ("net.b.weight", dense(view(b1, (2, 3, 4)), view(b2, (2, 4, 3)), (7, 6))),
    ] {
        let operator = loader.operator(name).unwrap();
        assert_eq!(operator.shape(), expected.dim());
        assert!((operator.to_dense() - &expected).iter().all(|v| v.abs() < 1e-5), "{name}");
        let x = matrix(expected.ncols(), 3, 5);
        let difference = operator.apply(x.view()).unwrap() - expected.dot(&x);
        assert!(difference.iter().all(|v| v.abs() < 1e-5), "{name}");
    }
    assert_eq!(loader.compressed().count(), 2);
    for (name, bytes) in [("net.a.bias", 56), ("head.weight", 24)] {
        assert_eq!(checkpoint.get(name).unwrap().bytes, vec![7; bytes]);
    }
    // What is there is not written over.
    assert_eq!(convert(&input, &out, &[]).0, Some(2));
}

#[test]
fn what_is_no_monarch_layer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(Vec<Entry<'_>>, &str); 4] = [
        (vec![plain("a.weight", &[2, 2])], "blkdiag1"),
        (vec![blocks("a.blkdiag1", (2, 2, 2), DType::F32).0], "a.blkdiag2"),
        (vec![plain("a.blkdiag1", &[4, 2]), plain("a.blkdiag2", &[2, 2, 2])], "blocks x rows x columns"),
        (vec![blocks("a.blkdiag1", (2, 3, 2), DType::F32).0, blocks("a.blkdiag2", (2, 2, 2), DType::F32).0], "`a`"),
    ];
    for (index, (entries, expected)) in cases.into_iter().enumerate() {
        let input = folder.path().join(format!("{index}.safetensors"));
        write_shard(&input, &BTreeMap::new(), entries).unwrap();
        let out = folder.path().join(format!("out{index}"));
        let (code, _, errors) = convert(&input, &out, &[]);
        assert_eq!(code, Some(2), "{errors}");
        assert!(errors.contains(expected), "{errors}");
    }
}
