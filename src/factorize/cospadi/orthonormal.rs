//! Orthonormal dictionaries: each half of the alternation has a closed form (COMPOT, arXiv:2602.15200).
//!
//! With DᵀD = I (atoms as columns, n×k), ‖Y − S·Dᵀ‖² = const + ‖Y·D − S‖²: the best codes of a pattern are the
//! largest entries of Y·D. For given codes the best D is the polar factor of YᵀS (Procrustes).

use ndarray::{Array2, ArrayView2, Axis};

use super::refine::Entries;
use crate::coder::{Coded, Pattern, prune};
use crate::error::Result;
use crate::linalg::Backend;
use crate::scalar::Real;

/// An alternation that gains less than this, relative to what is lost, is the last one.
const LEAST: f64 = 1e-4;

/// From orthonormal atoms D: at most `iterations` alternations. Returns codes S of Y ≈ S·Dᵀ.
pub(super) fn alternate<T: Real>(
    y: ArrayView2<'_, T>,
    mut atoms: Array2<T>,
    entries: Entries,
    iterations: usize,
    backend: &dyn Backend,
) -> Result<Coded<T>> {
    let kernels = T::kernels(backend);
    let square = |a: &Array2<T>| a.iter().map(|v| v.wide() * v.wide()).sum::<f64>();
    let norm = square(&y.to_owned());
    let mut last = f64::INFINITY;
    for iteration in 0.. {
        let coded = largest(kernels.matmul(y, atoms.view()), entries);
        let lost = norm - square(&coded.values);
        if iteration >= iterations || last - lost <= LEAST * lost {
            return Ok(coded);
        }
        last = lost;
        atoms = procrustes(kernels.matmul(y.t(), coded.values.view()), &atoms, backend)?;
    }
    Ok(largest(kernels.matmul(y, atoms.view()), entries))
}

/// The largest entries that a pattern allows.
fn largest<T: Real>(codes: Array2<T>, entries: Entries) -> Coded<T> {
    let count = match entries {
        Entries::Groups(nm) => {
            let sizes = codes.mapv(|c| c.wide().abs());
            return prune(codes.view(), sizes.view(), Pattern::Groups(nm), 0);
        }
        Entries::Free(count) if count < codes.len() => count,
        _ => return Coded { kept: Array2::from_elem(codes.dim(), true), values: codes },
    };
    let size = |at: usize| codes.as_slice().map_or(0.0, |codes| codes[at].wide().abs());
    let mut order: Vec<usize> = (0..codes.len()).collect();
    if count > 0 {
        order.select_nth_unstable_by(count - 1, |&a, &b| size(b).total_cmp(&size(a)).then(a.cmp(&b)));
    }
    let mut kept = Array2::from_elem(codes.dim(), false);
    let k = codes.ncols();
    order[..count].iter().for_each(|&at| kept[(at / k, at % k)] = true);
    let values = Array2::from_shape_fn(codes.dim(), |at| if kept[at] { codes[at] } else { T::zero() });
    Coded { values, kept }
}

/// Weight of the atoms at hand, relative to the mean singular value of M: it keeps those in place that no code uses.
const HOLD: f64 = 1e-2;

/// The matrix of orthonormal columns, n×k with k ≤ n, of largest ⟨D, M + δ·D₀⟩: a proximal step from D₀, so that
/// ⟨D, M⟩ does not fall, and the polar factor M·(MᵀM)^{−½} where it ends.
fn procrustes<T: Real>(m: Array2<T>, atoms: &Array2<T>, backend: &dyn Backend) -> Result<Array2<T>> {
    let kernels = f64::kernels(backend);
    let mut wide = m.mapv(|v| v.wide());
    let mean = (wide.iter().map(|v| v * v).sum::<f64>() / m.ncols().max(1) as f64).sqrt();
    if mean == 0.0 {
        return Ok(atoms.clone());
    }
    wide.zip_mut_with(atoms, |v, a| *v += HOLD * mean * a.wide());
    let found = kernels.eigh(kernels.gram(wide.t()))?;
    let floor = (1e-14 * found.values.first().copied().unwrap_or(0.0)).max(f64::MIN_POSITIVE);
    let scaled = &found.vectors / &found.values.mapv(|v| v.max(floor).sqrt()).insert_axis(Axis(0));
    let root = kernels.matmul(scaled.view(), found.vectors.t());
    Ok(T::from_view(kernels.matmul(wide.view(), root.view()).view()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{Faer, Kernels};
    use crate::operator::Nm;

    fn numbers(rows: usize, columns: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 7919 + j * 104_729 + i * i * j + 13) % 1009) as f64 / 504.5 - 1.0
        })
    }

    #[test]
    fn procrustes_steps_are_orthonormal_and_never_lose() {
        for (n, k) in [(6, 6), (9, 4), (5, 1)] {
            let mut m = numbers(n, k);
            let start = Kernels::<f64>::orthonormalize(&Faer, numbers(n + 3, k).slice(ndarray::s![3.., ..]));
            for deficient in [false, true] {
                if deficient {
                    m.column_mut(0).fill(0.0);
                }
                let (mut q, mut last) = (start.clone(), (&start * &m).sum());
                for _ in 0..60 {
                    q = procrustes(m.clone(), &q, &Faer).unwrap();
                    assert!((q.t().dot(&q) - Array2::<f64>::eye(k)).iter().all(|v| v.abs() < 1e-6));
                    let now = (&q * &m).sum();
                    assert!(now >= last - 1e-9, "{now} after {last}");
                    last = now;
                }
                // ⟨Q, M⟩ ends at the sum of the singular values: no orthonormal matrix has more.
                let nuclear: f64 = Kernels::<f64>::svd(&Faer, m.view()).unwrap().values.sum();
                assert!((last - nuclear).abs() < 1e-4 * (1.0 + nuclear), "{last} {nuclear}");
            }
        }
    }

    #[test]
    fn alternation_never_loses_and_keeps_its_count() {
        let y = numbers(30, 12);
        let start = Kernels::<f64>::orthonormalize(&Faer, numbers(12, 8).view());
        let mut last = 0.0;
        for iterations in 0..6 {
            let coded = alternate(y.view(), start.clone(), Entries::Free(100), iterations, &Faer).unwrap();
            assert_eq!(coded.kept.iter().filter(|&&kept| kept).count(), 100);
            // What is kept is what is explained.
            let kept = coded.values.iter().map(|v| v * v).sum::<f64>();
            assert!(kept >= last * (1.0 - 1e-12), "{kept} after {last}");
            last = kept;
        }
        let coded = alternate(y.view(), start, Entries::Groups(Nm::TWO_FOUR), 3, &Faer).unwrap();
        assert!(coded.kept.rows().into_iter().all(|row| row.iter().filter(|&&kept| kept).count() == 4));
    }
}
