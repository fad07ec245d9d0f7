//! Four bits under a Gram matrix against the nearest numbers and a reference GPTQ in NumPy.

use std::io::Write;
use std::process::Command;
use std::sync::Arc;

use ndarray::Array2;
use weightpress::budget::Budget;
use weightpress::checkpoint::Checkpoint;
use weightpress::factorize::{Factorize, Problem, Quantize, Rounding};
use weightpress::metric::Metric;
use weightpress::operator::LinearOperator;
use weightpress::stats::Gram;
use weightpress::tensor::Tensor;

use super::python::python;
use super::run::matrix;

/// Frantar et al., ICLR 2023, Algorithm 1, on a symmetric grid with the largest modulus of each group as its end: the
/// error of each weight, in order of the inputs' places and in that of their mean squares.
const SCRIPT: &str = r#"
import sys
import numpy as np

def gptq(W, H, bits, group, order, damping=0.01):
    W, H, (m, n) = W.copy(), H.copy(), W.shape
    top, zero = 2**bits - 1, 2 ** (bits - 1)
    ends = [np.abs(W[:, g:g + group]).max(1) for g in range(0, n, group)]
    scales = np.stack([(2 * end / top).astype(np.float16).astype(np.float64) for end in ends], 1)
    H[np.diag_indices(n)] += damping * np.mean(np.diag(H))
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    W, Q = W[:, order], np.zeros_like(W)
    for i, j in enumerate(order):
        s = scales[:, j // group]
        q = s * (np.clip(np.round(W[:, i] / s) + zero, 0, top) - zero)
        W[:, i:] -= np.outer((W[:, i] - q) / U[i, i], U[i, i:])
        Q[:, j] = q
    return Q

folder, count = sys.argv[1], int(sys.argv[2])
for k in range(count):
    W, H = (np.fromfile(f"{folder}/{what}{k}", "<f8") for what in ("weight", "gram"))
    n = int(round(len(H) ** 0.5))
    W, H = W.reshape(-1, n), H.reshape(n, n)
    for order in (np.arange(n), np.argsort(-np.diag(H), kind="stable")):
        D = gptq(W, H, 4, 32, order) - W
        print(np.sum((D @ H) * D))
"#;

#[test]
fn four_bits_are_closer_than_the_nearest_and_than_gptq() {
    let model = Checkpoint::open(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/model")).unwrap();
    let names: Vec<&str> = model.tensors().map(|t| t.name.as_str()).filter(|n| n.contains(".layers.")).collect();
    let names: Vec<&str> = names.into_iter().filter(|name| name.ends_with("_proj.weight")).step_by(9).collect();
    assert!(names.len() >= 3, "{names:?}");
    let folder = tempfile::tempdir().unwrap();
    let write = |name: String, values: &Array2<f64>| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        std::fs::write(folder.path().join(name), bytes).unwrap();
    };
    let mut ours = Vec::new();
    for (k, name) in names.iter().enumerate() {
        let w: Array2<f64> = model.get(name).unwrap().matrix().unwrap().into_owned();
        // A few strong directions, as activations have them, above inputs of many sizes.
        let n = w.ncols();
        let mut x = matrix(n, 2 * n, k + 1).mapv(f64::from);
        x.rows_mut().into_iter().enumerate().for_each(|(i, mut row)| row *= 0.2 + (i * 37 % 50) as f64 / 25.0);
        x += &(matrix(n, 4, 99).mapv(f64::from).dot(&matrix(4, 2 * n, 98).mapv(f64::from)));
        let gram = x.dot(&x.t()) / (2 * n) as f64;
        write(format!("weight{k}"), &w);
        write(format!("gram{k}"), &gram);
        let metric = Metric::gram(Arc::new(Gram::new(name, gram).unwrap()));
        let problem = Problem::new(name, w.view(), Budget::Keep(0.9)).metric(metric);
        let error = |rule| {
            let method = Quantize { bits: Some(4), group: 32, rule, ..Quantize::default() };
            let found = method.factorize(std::slice::from_ref(&problem)).unwrap().remove(0);
            problem.metric.squared((&w - &found.to_dense()).view(), problem.backend)
        };
        let (aware, nearest) = (error(Rounding::Gram), error(Rounding::Nearest));
        assert!(aware < nearest, "{name}: {aware} of {nearest}");
        ours.push(aware);
    }
    let Some(python) = python() else {
        writeln!(std::io::stderr(), "skipped: no python3 with numpy to run a reference GPTQ with").unwrap();
        return;
    };
    let arguments = [folder.path().to_str().unwrap().to_owned(), names.len().to_string()];
    let output = Command::new(python).args(["-c", SCRIPT]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    let theirs: Vec<f64> = printed.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert_eq!(theirs.len(), 2 * ours.len());
    for order in 0..2 {
        let ratios = ours.iter().zip(theirs.iter().skip(order).step_by(2)).map(|(ours, theirs)| (ours / theirs).ln());
        let mean = (ratios.sum::<f64>() / ours.len() as f64).exp();
        assert!(mean <= 1.0, "order {order}: squared errors {mean} of GPTQ's");
    }
}
