//! `examples/convert.rs`: layers of two block-diagonal tensors, or of values and a bit mask, become factored weights.

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

/// 2×8, 16 bits: the mask and order of values that compressed-tensors writes.
fn masked(name: &str, mask: [u8; 2], values: &[f32], free: bool) -> Vec<Entry<'static>> {
    let entry = |part: &str, dtype, shape: &[usize], bytes: Vec<u8>| Entry {
        name: format!("{name}.{part}"),
        dtype,
        shape: shape.into(),
        data: Payload::Bytes(bytes.into()),
    };
    let extents = if free { vec![values.len()] } else { vec![2, values.len() / 2] };
    let signed = DType::parse("I64").unwrap();
    let numbers = |numbers: &[i64]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let mut entries = vec![
        entry("shape", signed, &[2, 1], numbers(&[2, 8])),
        entry("compressed", DType::BF16, &extents, narrow(DType::BF16, values).unwrap()),
        entry("bitmask", DType::U8, &[2, 1], mask.into()),
    ];
    if free {
        entries.push(entry("row_offsets", signed, &[2, 1], numbers(&[0, i64::from(mask[0].count_ones())])));
    }
    entries
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
fn values_with_a_bit_mask_become_weights() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.safetensors");
    // As compressed-tensors 0.12 packs [[0, -0, 0, 0, 1, 2, 0, 3], [5, 4, 0, 0, -9, 0, 0, 8]], with a pair of zeros.
    let mut entries = masked("a", [0b1010_1100, 0b1001_0011], &[0.0, 0.0, 2.0, 3.0, 5.0, 4.0, -9.0, 8.0], false);
    entries.extend(masked("b", [0b0000_0111, 0], &[1.0, 2.0, 3.0], true));
    entries.push(plain("a.bias", &[2]));
    write_shard(&input, &BTreeMap::new(), entries).unwrap();
    let out = folder.path().join("out");
    let (code, printed, errors) = convert(&input, &out, &[]);
    assert_eq!(code, Some(0), "{printed}{errors}");
    let checkpoint = Checkpoint::open(&out).unwrap();
    let mut loader = checkpoint.loader::<f32>().unwrap();
    let a = ndarray::array![[0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 3.0], [5.0, 4.0, 0.0, 0.0, -9.0, 0.0, 0.0, 8.0]];
    assert_eq!(loader.operator("a.weight").unwrap().to_dense(), a);
    assert_eq!(loader.operator("a.weight").unwrap().to_string(), "2:4 sparse 2x8");
    let mut b = Array2::zeros((2, 8));
    b.row_mut(0).slice_mut(ndarray::s![..3]).assign(&ndarray::array![1.0, 2.0, 3.0]);
    assert_eq!(loader.operator("b.weight").unwrap().to_dense(), b);
    assert!(checkpoint.info("a.shape").is_none() && checkpoint.info("b.row_offsets").is_none());
    assert_eq!(checkpoint.get("a.bias").unwrap().bytes, vec![7; 8]);
}

#[test]
fn what_is_no_such_layer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let values = [1.0; 8];
    let without = |part: &str| {
        let entries = masked("net.a", [0x33, 0x33], &values, false);
        entries.into_iter().filter(|entry| !entry.name.ends_with(part)).collect::<Vec<_>>()
    };
    let cases: [(Vec<Entry<'_>>, &str); 9] = [
        (
            masked("net.a", [0x33, 0x37], &values, false),
            "`net.a`: shape mismatch: expected \"two marks in each group\"",
        ),
        (masked("net.a", [0x33, 0x33], &values[..6], false), "`net.a`"),
        (masked("net.a", [0x33, 0x33], &values[..7], true), "`net.a`"),
        (without("shape"), "net.a.shape"),
        (without("bitmask"), "net.a.bitmask"),
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
