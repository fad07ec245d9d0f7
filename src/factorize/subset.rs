//! Which rows of an orthogonal transform to keep, and with which coefficients.
//!
//! Y (p×q) is replaced by C·Q_I, where Q_I holds r rows of an orthogonal Q (q×q), so that
//! tr(O·(Y − C·Q_I)·N·(Y − C·Q_I)ᵀ) is least. In the coordinates of the transform, S = Y·Qᵀ and
//! M = Q·N·Qᵀ, and with J for the atoms not in I,
//!
//! > C = S_I + S_J·M_JI·M_II⁻¹,  error²(I) = Σ_{t>r} gainₜ,  gain = squared rows of L⁻¹·M·Sᵀ·O^½,
//!
//! where L is the Cholesky factor of M with rows and columns in the order of choice. C is exact for every
//! O: each row has its own normal equations. If M is diagonal (N = I, or N diagonal and Q = I), then
//! C = S_I, gain_f = M_ff·‖O^½·S_f‖², and the r largest gains are the best subset. Otherwise the best subset is NP-hard
//! to find (Natarajan, SIAM J. Comput. 24, 1995), and the order is a heuristic.
//!
//! M gets a ridge λ. It stands on both sides of the normal equations, so that C minimises the metric plus
//! λ·‖O^½(Y − C·Q_I)‖²: what a singular N does not see falls back on the plain projection, and r = q
//! reproduces Y.

use std::sync::Arc;

use ndarray::{Array1, Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::linalg::{Backend, Transform};
use crate::metric::Weighting;
use crate::scalar::Real;
use crate::stats::Gram;

/// The size of an atom's coefficients, by which [`Select::Energy`] ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Σ S². The best subset where atoms do not interact.
    #[default]
    L2,
    /// (Σ |S|)², as in the published code; never better in the error.
    L1,
}

/// How the atoms are chosen where the metric makes them interact; elsewhere the score decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Select {
    /// By score × the atom's own weight M_ff (for Q = I: Wanda's criterion, for whole inputs).
    Energy,
    /// One after the other, each time the atom that lowers the error most, given those before it
    /// (orthogonal matching pursuit).
    #[default]
    Greedy,
}

/// What to choose by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    pub score: Score,
    pub select: Select,
    pub refit: bool,
}

/// Atoms in the order of choice: the first r are the choice of r, for every r.
pub(super) struct Order {
    pub atoms: Vec<u32>,
    /// Squared error of keeping the first 0..=q. With a Gram matrix in N up to
    /// λ·‖O^½(S_I − C)‖² above the true one, never below it.
    pub errors: Vec<f64>,
}

/// N in the coordinates of a transform.
pub(super) struct Coupling {
    /// M + λI, unless M is diagonal.
    full: Option<Array2<f64>>,
    /// Diagonal of M.
    weights: Array1<f64>,
    ridge: f64,
}

/// λ ÷ mean diagonal of N. A diagonal N needs none but for zeros.
const RIDGE: (f64, f64) = (1e-6, 1e-12);
/// Atoms between two updates of the matrices by a product.
const BLOCK: usize = 64;

impl Coupling {
    /// M = Q·N·Qᵀ. O(q²·log q).
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a transform that does not exist for q.
    pub(super) fn new(kind: Transform, q: usize, inner: &Weighting) -> Result<Self> {
        kind.check(q)?;
        let (matrix, relative) = match inner {
            Weighting::Identity => return Ok(Coupling { full: None, weights: Array1::ones(q), ridge: 0.0 }),
            Weighting::Diagonal(d) if kind == Transform::Identity => {
                return Ok(Coupling { full: None, weights: d.to_vec().into(), ridge: 0.0 });
            }
            Weighting::Diagonal(d) => (Array2::from_diag(&**d), RIDGE.1),
            Weighting::Gram(gram) => (gram.matrix().to_owned(), RIDGE.0),
        };
        let mut full = kind.rows(kind.rows(matrix.view())?.reversed_axes().view())?;
        let weights = full.diag().to_owned();
        let mean = weights.sum() / q.max(1) as f64;
        let ridge = if mean > 0.0 { relative * mean } else { 1.0 };
        for i in 0..q {
            full[(i, i)] += ridge;
            for j in 0..i {
                let both = 0.5 * (full[(i, j)] + full[(j, i)]);
                (full[(i, j)], full[(j, i)]) = (both, both);
            }
        }
        Ok(Coupling { full: Some(full), weights, ridge })
    }

    /// M_II, the metric of coefficients of the chosen atoms.
    ///
    /// # Errors
    /// As [`Gram::new`].
    pub(super) fn restricted(&self, chosen: &[usize]) -> Result<Weighting> {
        Ok(match &self.full {
            None if self.weights.iter().all(|&w| w == 1.0) => Weighting::Identity,
            None => Weighting::Diagonal(Arc::new(self.weights.select(Axis(0), chosen))),
            Some(full) => Weighting::Gram(Arc::new(Gram::new("atoms", block(full.view(), chosen, chosen))?)),
        })
    }

    /// Orders all atoms for coefficients S (p×q) and computes the error of every prefix. Without
    /// interaction O(pq); with it about q³/3 + 4pq² flops, and 2q³ more for [`Select::Greedy`].
    ///
    /// # Errors
    /// [`Error::Numerical`](crate::Error::Numerical) from the kernels.
    pub(super) fn order<T: Real>(
        &self,
        s: ArrayView2<'_, T>,
        outer: &Weighting,
        rule: Rule,
        backend: &dyn Backend,
    ) -> Result<Order> {
        // O^½·S, where it is needed as such.
        let folded = match (&self.full, rule.score) {
            (None, Score::L2) => None,
            _ => Some(fold(s, outer, backend)?),
        };
        let energies = match &folded {
            Some(folded) => folded.map_axis(Axis(0), |column| column.dot(&column)),
            None => energies(s, outer, backend),
        };
        let size = match (&folded, rule.score) {
            (Some(folded), Score::L1) => folded.map_axis(Axis(0), |c| c.iter().map(|v| v.abs()).sum::<f64>().powi(2)),
            _ => energies.clone(),
        };
        let scores = &size * &self.weights;
        let q = scores.len();
        let mut atoms: Vec<u32> = (0..q as u32).collect();
        // A stable sort: ties go to the lower index.
        atoms.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
        let losses: Vec<f64> = match (&self.full, folded) {
            (Some(full), Some(folded)) if rule.refit => {
                let kernels = f64::kernels(backend);
                // M·Sᵀ·O^½, one atom a row.
                let projected = kernels.matmul(full.view(), folded.t());
                if rule.select == Select::Greedy {
                    atoms = greedy(full.clone(), kernels.gram(projected.view()), backend);
                }
                let chosen: Vec<usize> = atoms.iter().map(|&f| f as usize).collect();
                let factor = kernels.cholesky(block(full.view(), &chosen, &chosen).view())?;
                let mut gains = projected.select(Axis(0), &chosen);
                kernels.solve_triangular(factor.view(), false, &mut gains);
                gains.rows().into_iter().zip(&chosen).map(|(z, &f)| z.dot(&z) - self.ridge * energies[f]).collect()
            }
            (Some(full), Some(folded)) => {
                // tr(M_JJ·T_JJ) with T = Sᵀ·O·S grows by these as atoms leave I, the last one first.
                let t = f64::kernels(backend).gram(folded.t());
                let cross = |&f: &u32, later: &[u32]| -> f64 {
                    let (f, at) = (f as usize, |&g: &u32| full[(f as usize, g as usize)] * t[(f as usize, g as usize)]);
                    self.weights[f] * t[(f, f)] + 2.0 * later.iter().map(at).sum::<f64>()
                };
                (0..q).map(|i| cross(&atoms[i], &atoms[i + 1..])).collect()
            }
            _ => atoms.iter().map(|&f| energies[f as usize] * self.weights[f as usize]).collect(),
        };
        // Summed from the small end.
        let mut errors = vec![0.0; q + 1];
        for t in (0..q).rev() {
            errors[t] = errors[t + 1] + losses[t];
        }
        errors.iter_mut().for_each(|e| *e = f64::max(*e, 0.0));
        Ok(Order { atoms, errors })
    }

    /// C (p×r) for the chosen atoms, from S (p×q): S_I without interaction or refit, else in f64 at
    /// 2pr(q−r) + 2pr² + r³/3 flops.
    ///
    /// # Errors
    /// [`Error::Numerical`](crate::Error::Numerical) from the kernels.
    pub(super) fn coefficients<T: Real>(
        &self,
        s: ArrayView2<'_, T>,
        chosen: &[usize],
        refit: bool,
        backend: &dyn Backend,
    ) -> Result<Array2<T>> {
        let kept = s.select(Axis(1), chosen);
        let Some(full) = self.full.as_ref().filter(|_| refit && !chosen.is_empty()) else { return Ok(kept) };
        let mut inside = vec![false; s.ncols()];
        chosen.iter().for_each(|&f| inside[f] = true);
        let rest: Vec<usize> = (0..s.ncols()).filter(|&f| !inside[f]).collect();
        let kernels = f64::kernels(backend);
        let left_out = f64::from_view(s).select(Axis(1), &rest);
        let right = kernels.matmul(block(full.view(), chosen, &rest).view(), left_out.t());
        let change = kernels.solve_spd(block(full.view(), chosen, chosen).view(), right)?;
        Ok(T::from_view((f64::from_view(kept.view()).into_owned() + change.t()).view()).into_owned())
    }
}

/// The given rows and columns of a matrix.
fn block(a: ArrayView2<'_, f64>, rows: &[usize], columns: &[usize]) -> Array2<f64> {
    Array2::from_shape_fn((rows.len(), columns.len()), |(i, j)| a[(rows[i], columns[j])])
}

/// O^½·S, or another root of O: only inner products of its columns matter.
fn fold<T: Real>(s: ArrayView2<'_, T>, outer: &Weighting, backend: &dyn Backend) -> Result<Array2<f64>> {
    let s = f64::from_view(s);
    Ok(match outer {
        Weighting::Identity => s.into_owned(),
        Weighting::Diagonal(o) => &s * &o.mapv(f64::sqrt).insert_axis(Axis(1)),
        Weighting::Gram(gram) => f64::kernels(backend).matmul(gram.sqrt(backend)?.t(), s.view()),
    })
}

/// sᵀ·O·s for every column s of S.
fn energies<T: Real>(s: ArrayView2<'_, T>, outer: &Weighting, backend: &dyn Backend) -> Array1<f64> {
    let mut sums = Array1::zeros(s.ncols());
    let gram_product = match outer {
        Weighting::Gram(gram) => Some(f64::kernels(backend).matmul(gram.matrix(), f64::from_view(s).view())),
        Weighting::Identity | Weighting::Diagonal(_) => None,
    };
    for (i, row) in s.rows().into_iter().enumerate() {
        match (outer, &gram_product) {
            (_, Some(product)) => {
                sums.iter_mut().zip(row).zip(product.row(i)).for_each(|((sum, v), p)| *sum += v.wide() * p);
            }
            (Weighting::Diagonal(o), _) => {
                sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += o[i] * v.wide().powi(2));
            }
            _ => sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += v.wide().powi(2)),
        }
    }
    sums
}

/// Orders atoms by what each lowers the error, K_jj/M_jj, given those before it: both matrices lose the
/// chosen atom (a Schur complement) before the next one is looked for. Rows of both are brought up to
/// date when they are needed, the rest in blocks, as in pivoted Cholesky.
fn greedy(mut m: Array2<f64>, mut k: Array2<f64>, backend: &dyn Backend) -> Vec<u32> {
    let kernels = f64::kernels(backend);
    let mut atoms = Vec::with_capacity(m.nrows());
    // The atoms that the rows of both matrices stand for.
    let mut names: Vec<u32> = (0..m.nrows() as u32).collect();
    while !names.is_empty() {
        let (q, size) = (names.len(), BLOCK.min(names.len()));
        // M loses Σ l·lᵀ and K loses Σ (h·lᵀ + l·hᵀ).
        let (mut l, mut h) = (Array2::<f64>::zeros((size, q)), Array2::<f64>::zeros((size, q)));
        let (mut diagonal_m, mut diagonal_k) = (m.diag().to_owned(), k.diag().to_owned());
        let mut open = vec![true; q];
        for b in 0..size {
            let gain = |j: usize| diagonal_k[j] / diagonal_m[j].max(f64::MIN_POSITIVE);
            // The first of the largest.
            let best = (0..q).rev().filter(|&j| open[j]).max_by(|&a, &b| gain(a).total_cmp(&gain(b)));
            let Some(j) = best else { break };
            let (mut row_m, mut row_k) = (m.row(j).to_owned(), k.row(j).to_owned());
            for (l, h) in l.rows().into_iter().zip(h.rows()).take(b) {
                row_m.scaled_add(-l[j], &l);
                row_k.scaled_add(-h[j], &l);
                row_k.scaled_add(-l[j], &h);
            }
            let root = row_m[j].max(f64::MIN_POSITIVE).sqrt();
            row_m /= root;
            row_k /= root;
            let half = 0.5 * row_k[j] / root;
            row_k.scaled_add(-half, &row_m);
            diagonal_m.zip_mut_with(&row_m, |d, l| *d -= l * l);
            diagonal_k.iter_mut().zip(&row_m).zip(&row_k).for_each(|((d, l), h)| *d -= 2.0 * l * h);
            l.row_mut(b).assign(&row_m);
            h.row_mut(b).assign(&row_k);
            open[j] = false;
            atoms.push(names[j]);
        }
        let rest: Vec<usize> = (0..q).filter(|&j| open[j]).collect();
        names = rest.iter().map(|&j| names[j]).collect();
        (m, k) = (block(m.view(), &rest, &rest), block(k.view(), &rest, &rest));
        (l, h) = (l.select(Axis(1), &rest), h.select(Axis(1), &rest));
        kernels.gemm(-1.0, l.t(), l.view(), 1.0, m.view_mut());
        kernels.gemm(-1.0, l.t(), h.view(), 1.0, k.view_mut());
        kernels.gemm(-1.0, h.t(), l.view(), 1.0, k.view_mut());
    }
    atoms
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Faer;

    fn numbers(m: usize, n: usize) -> Array2<f64> {
        Array2::from_shape_fn((m, n), |(i, j)| ((i * 31 + j * 17 + i * j * 5) % 23) as f64 / 11.0 - 1.0)
    }

    /// Squared error of the best coefficients for these atoms, by the definition.
    fn error(full: &Array2<f64>, s: &Array2<f64>, chosen: &[usize]) -> f64 {
        let kernels = f64::kernels(&Faer);
        let within = block(full.view(), chosen, chosen);
        let to_all = full.select(Axis(0), chosen);
        let c = kernels.solve_spd(within.view(), to_all.dot(&s.t())).unwrap();
        let mut delta = s.clone();
        chosen.iter().zip(c.rows()).for_each(|(&f, c)| delta.column_mut(f).zip_mut_with(&c, |d, c| *d -= c));
        (delta.dot(full) * &delta).sum()
    }

    #[test]
    fn greedy_takes_the_atom_that_lowers_the_error_most() {
        // More atoms than a block holds, so that the updates between blocks count.
        let (p, q) = (9, BLOCK + 21);
        let (x, s) = (numbers(q, 2 * q), numbers(p, q));
        let mut full = x.dot(&x.t()) / (2 * q) as f64;
        full.diag_mut().mapv_inplace(|d| d + 0.05);
        let projected = full.dot(&s.t());
        let order = greedy(full.clone(), projected.dot(&projected.t()), &Faer);
        let mut chosen: Vec<usize> = Vec::new();
        for &taken in &order[..q - 1] {
            let with = |f: usize| error(&full, &s, &[chosen.as_slice(), &[f]].concat());
            let least = (0..q).filter(|f| !chosen.contains(f)).map(with).fold(f64::INFINITY, f64::min);
            let this = with(taken as usize);
            assert!(this <= least + 1e-9 * error(&full, &s, &[]), "atom {}: {this} above {least}", chosen.len());
            chosen.push(taken as usize);
        }
        let mut all = order;
        all.sort_unstable();
        assert!(all.into_iter().eq(0..q as u32));
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        let s = Array2::<f64>::ones((2, 6));
        for inner in [Weighting::Identity, Weighting::Gram(Arc::new(Gram::new("eye", Array2::eye(6)).unwrap()))] {
            for score in [Score::L1, Score::L2] {
                let rule = Rule { score, select: Select::Greedy, refit: true };
                let coupling = Coupling::new(Transform::Identity, 6, &inner).unwrap();
                let order = coupling.order(s.view(), &Weighting::Identity, rule, &Faer).unwrap();
                assert_eq!(order.atoms, [0, 1, 2, 3, 4, 5]);
            }
        }
    }
}
