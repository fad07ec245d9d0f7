//! The leading left singular subspace by randomized block Krylov iteration.
//!
//! For A of m×n known by its products, grow an orthonormal basis Q of the Krylov space of A·Aᵀ from a
//! random block, and take the best r directions of it (Rayleigh–Ritz):
//!
//! > Q = [Y₁ … Y_p],  Yⱼ₊₁ = orth((I − QQᵀ)·A·Aᵀ·Yⱼ),  QᵀA·AᵀQ = V·Θ·Vᵀ,  U = Q·V[:, ..r]
//!
//! (Musco and Musco, NeurIPS 2015; Halko, Martinsson and Tropp, SIAM Review 53, 2011.) The products
//! Aᵀ·Yⱼ serve both the next block and the small problem, so a basis of k directions costs 2k products
//! with a vector in all. Small blocks need fewer directions for the same error (a higher degree), large
//! ones multiply faster; r/8 is the compromise.
//!
//! The sketch is ±1 (a Gaussian one costs more than the product it feeds). Blocks are orthonormalised
//! twice by Cholesky QR with the small Gram matrix in f64 (Yamazaki, Tomov and Dongarra, SIAM J. Sci.
//! Comput. 37, 2015); a numerically dependent block goes through the eigenvectors of that matrix instead
//! (SVQB; Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002), which, unlike Householder QR, finds the
//! dependent directions: they are replaced by fresh random ones. The small problem is solved in f64: in
//! f32 its squares would mix up the directions near r.

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::Backend;
use crate::error::{Error, Result};
use crate::scalar::Real;

/// A matrix A = B·S of m×n of which only products are known; S may be any root of G = S·Sᵀ, and only G
/// is ever applied. For a plain matrix B = A and G = I. Vectors are passed as the rows of a block.
pub trait Products<T: Real> {
    /// (m, n).
    fn shape(&self) -> (usize, usize);
    /// X·G·Bᵀ for X of b×n; the result is b×m. For a plain matrix: A·x for each row x.
    fn forward(&self, x: ArrayView2<'_, T>) -> Array2<T>;
    /// Y·B for Y of b×m; the result is b×n. For a plain matrix: Aᵀ·y for each row y.
    fn transposed(&self, y: ArrayView2<'_, T>) -> Array2<T>;
    /// X·G·Xᵀ for X of b×n, in f64; b×b, symmetric (the lower triangle is read).
    fn inner(&self, x: ArrayView2<'_, T>) -> Array2<f64>;
    /// ‖A‖² = tr(B·G·Bᵀ).
    fn norm_squared(&self) -> f64;
}

/// A plain matrix by its products.
#[derive(Debug, Clone, Copy)]
pub struct Plain<'a, T: Real> {
    /// A, m×n.
    pub matrix: ArrayView2<'a, T>,
    /// Who multiplies.
    pub backend: &'a dyn Backend,
}

impl<T: Real> Products<T> for Plain<'_, T> {
    fn shape(&self) -> (usize, usize) {
        self.matrix.dim()
    }
    fn forward(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        T::kernels(self.backend).matmul(x, self.matrix.t())
    }
    fn transposed(&self, y: ArrayView2<'_, T>) -> Array2<T> {
        T::kernels(self.backend).matmul(y, self.matrix)
    }
    fn inner(&self, x: ArrayView2<'_, T>) -> Array2<f64> {
        f64::kernels(self.backend).gram(f64::from_view(x).view())
    }
    fn norm_squared(&self) -> f64 {
        squares(self.matrix)
    }
}

/// How far the iteration goes. All sizes are clamped to the matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Krylov {
    /// r, the number of directions wanted.
    pub rank: usize,
    /// Vectors per block.
    pub block: usize,
    /// k, the directions of the basis to start with; at least r.
    pub basis: usize,
    /// The basis grows up to this many directions while the estimated excess is above `tolerance`.
    pub largest: usize,
    /// Estimated relative excess of the Frobenius residual that is good enough.
    pub tolerance: f64,
    /// Seed of the ChaCha8 stream that the sketch is drawn from.
    pub seed: u64,
}

impl Krylov {
    /// The defaults for rank r: blocks of r/8, a basis of 1.5r that grows to 2r where the estimate says
    /// more than 2 % excess.
    pub fn new(rank: usize, seed: u64) -> Self {
        Krylov { rank, block: (rank / 8).max(16), basis: rank + rank / 2, largest: 2 * rank, tolerance: 0.02, seed }
    }
}

/// An approximate leading left singular subspace, with what was measured of it.
#[derive(Debug, Clone)]
pub struct Subspace<T> {
    /// U, m×r', orthonormal columns by falling energy; r' < r only where A has no more directions.
    pub vectors: Array2<T>,
    /// Uᵀ·B, r'×n: the right factor of the approximation U·(UᵀB) of B.
    pub images: Array2<T>,
    /// ‖Aᵀ·uᵢ‖² in descending order; at most σᵢ².
    pub energies: Vec<f64>,
    /// ‖A‖².
    pub norm_squared: f64,
    /// Directions in the basis that U was chosen from.
    pub basis: usize,
    /// **Estimate** of ‖A − UUᵀA‖ ÷ (the least possible at rank r) − 1.
    ///
    /// Twice the energy that second-order perturbation theory says one more step would add, from the
    /// Ritz residuals ρᵢ = ‖(I − QQᵀ)A·Aᵀuᵢ‖: missing ≈ 2·Σᵢ ½(√(gᵢ² + 4ρᵢ²) − gᵢ), gᵢ = θᵢ − the mean
    /// energy of the last block. On power-law, exponential and flat spectra and on weights of language
    /// models it was between 0.5 and 8 times the true excess, mostly 1 to 2. Zero where the basis is the whole space.
    pub excess: f64,
    /// **Upper bound** of the same, up to rounding: by Ky Fan's inequality for A = QQᵀA + R the optimum
    /// is at least Σ_{r<i≤k} θᵢ, the energy of the basis beyond U. Far above the truth for flat spectra.
    pub bound: f64,
}

impl<T> Subspace<T> {
    /// ‖A − UUᵀA‖² = ‖A‖² − ‖UᵀA‖², measured.
    pub fn residual(&self) -> f64 {
        (self.norm_squared - self.energies.iter().sum::<f64>()).max(0.0)
    }
}

/// The leading `rank` left singular directions of A, approximately. About 4mnk flops for a basis of k,
/// 9k³ for the small problem and O((m+n)k²) for the rest; memory k(m+n).
///
/// # Errors
/// [`Error::Numerical`] if a product is not finite or the small problem does not converge.
pub fn leading_subspace<T: Real>(a: &dyn Products<T>, how: &Krylov, backend: &dyn Backend) -> Result<Subspace<T>> {
    let (m, n) = a.shape();
    let full = m.min(n);
    let rank = how.rank.min(full);
    let norm_squared = a.norm_squared();
    if !norm_squared.is_finite() {
        return Err(Error::Numerical { kernel: "krylov", detail: "the norm of the matrix is not finite".into() });
    }
    if rank == 0 {
        let (vectors, images) = (Array2::zeros((m, 0)), Array2::zeros((0, n)));
        let bound = if norm_squared > 0.0 && full > 0 { f64::INFINITY } else { 0.0 };
        return Ok(Subspace { vectors, images, energies: Vec::new(), norm_squared, basis: 0, excess: 0.0, bound });
    }
    let mut basis = Basis::new(a, how, backend);
    let mut size = how.basis.clamp(rank, full);
    loop {
        basis.grow(size)?;
        let found = basis.ritz(rank, norm_squared)?;
        let next = (size + size / 4 + how.block).min(how.largest).min(full);
        if found.excess <= how.tolerance || basis.exhausted || next <= size {
            return Ok(found);
        }
        size = next;
    }
}

/// The growing basis: rows of `q` are orthonormal, rows of `x` are their products Bᵀ·q.
struct Basis<'a, T: Real> {
    a: &'a dyn Products<T>,
    backend: &'a dyn Backend,
    block: usize,
    random: ChaCha8Rng,
    q: Array2<T>,
    x: Array2<T>,
    /// Size of the last block.
    last: usize,
    /// Whether no direction is left: the basis holds all of A.
    exhausted: bool,
}

impl<'a, T: Real> Basis<'a, T> {
    fn new(a: &'a dyn Products<T>, how: &Krylov, backend: &'a dyn Backend) -> Self {
        let (m, n) = a.shape();
        let block = how.block.clamp(1, m.min(n));
        let random = ChaCha8Rng::seed_from_u64(how.seed);
        let (q, x) = (Array2::zeros((0, m)), Array2::zeros((0, n)));
        Basis { a, backend, block, random, q, x, last: 0, exhausted: false }
    }

    /// Adds whole blocks until there are at least `size` directions, or none are left.
    fn grow(&mut self, size: usize) -> Result<()> {
        let ((m, n), mut used) = (self.a.shape(), self.q.nrows());
        let full = m.min(n);
        let room = (size + self.block).min(full);
        self.q = enlarged(&self.q, room);
        self.x = enlarged(&self.x, room);
        let mut restarts = 0;
        while used < size.min(full) && !self.exhausted {
            let mut rows = self.x.slice(s![used - self.last..used, ..]).to_owned();
            if rows.nrows() < self.block {
                rows = stack(&rows, &self.sketch(self.block - rows.nrows(), n))?;
            }
            let next = self.a.forward(rows.view());
            let fresh = self.fresh(self.q.slice(s![..used, ..]), next)?;
            let count = fresh.nrows().min(full - used).min(room - used);
            if count == 0 {
                // All of A·Aᵀ·Y is known; a new sketch tells whether there is anything else.
                self.exhausted = restarts > 0;
                (restarts, self.last) = (restarts + 1, 0);
                continue;
            }
            let fresh = fresh.slice(s![..count, ..]);
            self.x.slice_mut(s![used..used + count, ..]).assign(&self.a.transposed(fresh));
            self.q.slice_mut(s![used..used + count, ..]).assign(&fresh);
            (used, self.last, restarts) = (used + count, count, 0);
        }
        self.exhausted |= used == full;
        self.q = self.q.slice(s![..used, ..]).to_owned();
        self.x = self.x.slice(s![..used, ..]).to_owned();
        Ok(())
    }

    /// Independent signs.
    fn sketch(&mut self, rows: usize, n: usize) -> Array2<T> {
        let (mut word, mut left) = (0u64, 0);
        Array2::from_shape_simple_fn((rows, n), || {
            if left == 0 {
                (word, left) = (self.random.next_u64(), 64);
            }
            let sign = if word & 1 == 1 { T::one() } else { -T::one() };
            (word, left) = (word >> 1, left - 1);
            sign
        })
    }

    /// The part of the rows outside the basis, orthonormal; fewer rows where they depend on it.
    fn fresh(&self, q: ArrayView2<'_, T>, mut w: Array2<T>) -> Result<Array2<T>> {
        let kernels = T::kernels(self.backend);
        let largest = w.rows().into_iter().map(|row| squares(row.insert_axis(Axis(0)))).fold(0.0, f64::max);
        if !largest.is_finite() {
            return Err(Error::Numerical { kernel: "krylov", detail: "a product is not finite".into() });
        }
        // Below this a direction is rounding noise of what was projected out.
        let noise = largest * (16.0 * T::epsilon().wide()).powi(2).max(1e-14);
        for floor in [noise, 0.25] {
            if w.nrows() == 0 {
                break;
            }
            let inside = kernels.matmul(w.view(), q.t());
            kernels.gemm(-T::one(), inside.view(), q, T::one(), w.view_mut());
            w = orthonormal_rows(w, floor, self.backend)?;
        }
        Ok(w)
    }

    /// The best `rank` directions of the basis, and how much better the best of all may be.
    fn ritz(&self, rank: usize, norm_squared: f64) -> Result<Subspace<T>> {
        let (kernels, wide) = (T::kernels(self.backend), f64::kernels(self.backend));
        let k = self.q.nrows();
        let rank = rank.min(k);
        let small = self.a.inner(self.x.view());
        let found = wide.eigh(small.clone())?;
        let energies: Vec<f64> = found.values.iter().map(|v| v.max(0.0)).collect();
        let chosen = found.vectors.slice(s![.., ..rank]);
        let turn = T::from_view(chosen);
        let vectors = kernels.matmul(self.q.t(), turn.view());
        let images = kernels.matmul(turn.t(), self.x.view());

        let captured: f64 = energies[..rank].iter().sum();
        let residual = (norm_squared - captured).max(0.0);
        let beyond: f64 = energies[rank..].iter().sum();
        let excess_over = |optimum: f64| match residual <= norm_squared * T::epsilon().wide() || optimum >= residual {
            true => 0.0,
            false => (residual / optimum.max(0.0)).sqrt() - 1.0,
        };
        let (mut excess, mut bound) = (0.0, 0.0);
        if !self.exhausted {
            bound = excess_over(beyond);
            let gain = self.gain(&energies[..rank], chosen, small.view())?;
            excess = excess_over(residual - 2.0 * gain).min(bound);
        }
        let energies = energies[..rank].to_vec();
        Ok(Subspace { vectors, images, energies, norm_squared, basis: k, excess, bound })
    }

    /// Energy that the top directions would gain from one more block, to second order.
    fn gain(&self, energies: &[f64], chosen: ArrayView2<'_, f64>, small: ArrayView2<'_, f64>) -> Result<f64> {
        let (k, kernels, wide) = (self.q.nrows(), T::kernels(self.backend), f64::kernels(self.backend));
        let last = k - self.last..k;
        // A·Aᵀ·Q stays inside Q but for its last block, so all Ritz residuals are combinations of this.
        let mut outside = self.a.forward(self.x.slice(s![last.clone(), ..]));
        for _ in 0..2 {
            let inside = kernels.matmul(outside.view(), self.q.t());
            kernels.gemm(-T::one(), inside.view(), self.q.view(), T::one(), outside.view_mut());
        }
        let gram = wide.gram(f64::from_view(outside.view()).view());
        let tails = chosen.slice(s![last.clone(), ..]);
        let products = wide.matmul(gram.view(), tails);
        let level = last.map(|i| small[(i, i)]).sum::<f64>() / self.last.max(1) as f64;
        let each = energies.iter().zip(products.columns()).zip(tails.columns()).map(|((energy, product), tail)| {
            let (gap, coupling) = (energy - level, product.dot(&tail).max(0.0));
            0.5 * ((gap * gap + 4.0 * coupling).sqrt() - gap)
        });
        Ok(each.sum())
    }
}

/// Orthonormal rows of the same span, without the directions of squared length up to `floor`.
fn orthonormal_rows<T: Real>(mut w: Array2<T>, floor: f64, backend: &dyn Backend) -> Result<Array2<T>> {
    let (kernels, wide) = (T::kernels(backend), f64::kernels(backend));
    let gram = wide.gram(f64::from_view(w.view()).view());
    let top = gram.diag().fold(0.0, |a: f64, b| a.max(*b));
    if let Ok(l) = wide.cholesky(gram.view()) {
        let smallest = l.diag().fold(f64::INFINITY, |a, b| a.min(b * b));
        // Beyond this condition a second pass would not repair the first.
        let limit = 100.0 * T::epsilon().wide().powi(2).max(1e-16);
        if smallest > floor && smallest > limit * top {
            kernels.solve_triangular(T::from_view(l.view()).view(), false, &mut w);
            return Ok(w);
        }
    }
    let found = wide.eigh(gram)?;
    let keep = found.values.iter().take_while(|&&v| v > floor && v > 1e-12 * top).count();
    let scale: Array1<f64> = found.values.iter().take(keep).map(|v| v.sqrt().recip()).collect();
    let turn = &found.vectors.slice(s![.., ..keep]) * &scale;
    Ok(kernels.matmul(T::from_view(turn.view()).t(), w.view()))
}

/// Σ of squares, in f64.
pub(crate) fn squares<T: Real>(a: ArrayView2<'_, T>) -> f64 {
    a.rows().into_iter().map(|row| row.iter().map(|v| v.wide() * v.wide()).sum::<f64>()).sum()
}

fn enlarged<T: Real>(a: &Array2<T>, rows: usize) -> Array2<T> {
    let mut larger = Array2::zeros((rows.max(a.nrows()), a.ncols()));
    larger.slice_mut(s![..a.nrows(), ..]).assign(a);
    larger
}

fn stack<T: Real>(a: &Array2<T>, b: &Array2<T>) -> Result<Array2<T>> {
    concatenate(Axis(0), &[a.view(), b.view()]).map_err(|e| Error::shape("rows of one length", e.to_string()))
}

#[cfg(test)]
mod tests;
