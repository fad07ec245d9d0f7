//! What unit tests have in common.

use ndarray::Array2;
use pulp::Arch;

/// Every level of instructions that the machine has, whichever a product would take. (Miri knows the portable one.)
pub(crate) fn architectures() -> Vec<Arch> {
    if cfg!(miri) {
        return vec![Arch::Scalar];
    }
    #[allow(unused_mut)]
    let mut all = vec![Arch::Scalar, Arch::new()];
    #[cfg(target_arch = "x86_64")]
    all.extend(pulp::x86::V3::try_new().map(Arch::V3));
    all
}

/// All of these, or a few of them where each step is interpreted.
pub(crate) fn sizes<T>(all: &'static [T], interpreted: &'static [T]) -> &'static [T] {
    if cfg!(miri) { interpreted } else { all }
}

/// Numbers between −1 and 1 in no order, others for each factor.
pub(crate) fn numbers(rows: usize, columns: usize, factor: usize) -> Array2<f64> {
    Array2::from_shape_fn((rows, columns), |(i, j)| {
        ((i * 7919 + j * factor + i * i * j + 13) % 1009) as f64 / 504.5 - 1.0
    })
}

/// The Gram matrix of 2n inputs of length n.
pub(crate) fn gram(n: usize) -> Array2<f64> {
    let x = numbers(n, 2 * n, 104_729);
    x.dot(&x.t()) / (2 * n) as f64
}
