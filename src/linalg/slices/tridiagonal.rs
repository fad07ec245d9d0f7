//! The leading eigenvector of Gram matrices, one in each lane.
//!
//! Householder's tridiagonalisation T = Hᵀ·G·H, the largest eigenvalue of T by bisection on the sign of
//! the pivots of T − xI (Sylvester's law of inertia), its vector by inverse iteration, and back. (Golub and
//! Van Loan, Matrix Computations, §8.3 and §8.4; Barth, Martin and Wilkinson, Numer. Math. 9, 1967.)
//! Nothing in it depends on a start vector or on a gap: of two equal eigenvalues it finds one.

use pulp::Simd;

use super::dot;
use super::pack::Packed;
use crate::scalar::Real;
use crate::simd::{Lanes, take};

/// Rows of a tile of the Gram matrix.
const TILE: usize = 4;
/// Rows of the slices that are summed at a time: sums of sums round less, and the panel stays in the cache.
const PANEL: usize = 128;

/// Symmetric matrices of order n, one in each lane, and what it takes to find their leading vectors.
pub(super) struct Symmetric<'a, S: Simd, T: Lanes> {
    n: usize,
    stride: usize,
    /// The lower triangle by rows; the reflectors I − τ·v·vᵀ are kept above the diagonal.
    g: &'a mut [T::V<S>],
    tau: &'a mut [T::V<S>],
    /// T's diagonal, and what is below it.
    diagonal: &'a mut [T::V<S>],
    below: &'a mut [T::V<S>],
    /// Scratch.
    v: &'a mut [T::V<S>],
    w: &'a mut [T::V<S>],
    next: &'a mut [T::V<S>],
    product: &'a mut [T::V<S>],
    /// The leading eigenvector.
    pub(super) vector: &'a mut [T::V<S>],
}

impl<'a, S: Simd, T: Real> Symmetric<'a, S, T> {
    /// Vectors of memory for order n.
    pub(super) fn memory(n: usize) -> usize {
        n * (n | 1) + 8 * n
    }

    /// Matrices of zeros in the given memory.
    #[inline(always)]
    pub(super) fn zeros(s: S, memory: &mut &'a mut [T::V<S>], n: usize) -> Self {
        let zero = T::splat(s, T::zero());
        let mut part = |n: usize| {
            let part = take(memory, n);
            part.fill(zero);
            part
        };
        let stride = n | 1;
        Symmetric {
            n,
            stride,
            g: part(n * stride),
            tau: part(n),
            diagonal: part(n),
            below: part(n),
            v: part(n),
            w: part(n),
            next: part(n),
            product: part(n),
            vector: part(n),
        }
    }
    /// G = AᵀA, (rows)·n² multiply-adds ÷ 2.
    #[inline(always)]
    pub(super) fn gram(&mut self, s: S, a: &Packed<'_, S, T>) {
        let n = self.n;
        for panel in (0..a.long).step_by(PANEL) {
            let rows = panel..(panel + PANEL).min(a.long);
            // Beyond the last column a tile repeats it; what it finds there is not kept.
            let column = |j: usize| &a.values[j.min(n - 1) * a.stride..][rows.clone()];
            for i0 in (0..n).step_by(TILE) {
                let left: [_; TILE] = std::array::from_fn(|r| column(i0 + r));
                for j0 in (0..=i0).step_by(TILE) {
                    let right: [_; TILE] = std::array::from_fn(|c| column(j0 + c));
                    let tile = products::<S, T>(s, left, right);
                    for (i, sums) in (i0..n).zip(tile) {
                        for (j, sum) in (j0..=i).zip(sums) {
                            let g = &mut self.g[i * self.stride + j];
                            *g = T::vadd(s, *g, sum);
                        }
                    }
                }
            }
        }
    }

    /// The trace of G, before the tridiagonalisation.
    #[inline(always)]
    pub(super) fn trace(&self, s: S) -> T::V<S> {
        (0..self.n).fold(T::splat(s, T::zero()), |sum, i| T::vadd(s, sum, self.g[i * self.stride + i]))
    }

    /// T = Hᵀ·G·H. (2/3)n³ multiply-adds.
    ///
    /// The rank-two update of one step waits for the product of the next, so that both pass over the
    /// matrix once.
    #[inline(always)]
    pub(super) fn tridiagonalize(&mut self, s: S) {
        let (n, stride) = (self.n, self.stride);
        let (zero, one, two) = (T::splat(s, T::zero()), T::splat(s, T::one()), T::splat(s, T::from_f64(2.0)));
        // A column this small is a rounding error of the matrix, and its square may underflow.
        let noise = T::vmul(s, self.trace(s), T::splat(s, T::epsilon() * T::from_f64(0.1)));
        let noise = T::vmul(s, noise, noise);
        for k in 0..n.saturating_sub(1) {
            for i in k..n {
                let g = &mut self.g[i * stride + k];
                *g = T::fnma(s, self.v[i], self.w[k], T::fnma(s, self.w[i], self.v[k], *g));
                self.next[i] = *g;
            }
            self.diagonal[k] = self.next[k];
            let x = &mut self.next[k + 1..];
            let (head, tail) = (x[0], dot::<S, T>(s, &x[1..], &x[1..]));
            let norm = T::vsqrt(s, T::fma(s, head, head, tail));
            // v₀ = x₀ ± ‖x‖ with the sign that does not cancel.
            let first = T::if_less(s, head, zero, T::vsub(s, head, norm), T::vadd(s, head, norm));
            let tau = T::vdiv(s, two, T::fma(s, first, first, tail));
            let negligible = |yes, no| T::if_less(s, noise, tail, no, yes);
            let tau = negligible(zero, tau);
            x[0] = negligible(one, first);
            self.below[k] = negligible(head, T::vsub(s, head, first));
            self.tau[k] = tau;
            self.g[k * stride + k + 1..][..n - k - 1].copy_from_slice(&self.next[k + 1..]);
            self.pass(s, k + 1);
            let along = dot::<S, T>(s, &self.product[k + 1..], &self.next[k + 1..]);
            // w = τ·(p − ½·τ·(pᵀv)·v).
            let half = T::vmul(s, T::vmul(s, tau, along), T::splat(s, T::from_f64(0.5)));
            for i in k + 1..n {
                self.w[i] = T::vmul(s, tau, T::fnma(s, half, self.next[i], self.product[i]));
                self.v[i] = self.next[i];
            }
        }
        if n > 0 {
            let (v, w) = (self.v[n - 1], self.w[n - 1]);
            self.diagonal[n - 1] = T::fnma(s, T::vadd(s, v, v), w, self.g[n * stride - stride + n - 1]);
        }
    }

    /// G ← G − v·wᵀ − w·vᵀ and p = G·next, for the rows and columns from `from`.
    #[inline(always)]
    fn pass(&mut self, s: S, from: usize) {
        let mut i = from;
        while i < self.n && !(self.n - i).is_multiple_of(TILE) {
            self.rows::<1>(s, from, i);
            i += 1;
        }
        while i < self.n {
            self.rows::<TILE>(s, from, i);
            i += TILE;
        }
    }

    #[inline(always)]
    fn rows<const R: usize>(&mut self, s: S, from: usize, i0: usize) {
        let stride = self.stride;
        let vi: [_; R] = std::array::from_fn(|r| self.v[i0 + r]);
        let wi: [_; R] = std::array::from_fn(|r| self.w[i0 + r]);
        let xi: [_; R] = std::array::from_fn(|r| self.next[i0 + r]);
        let mut sums = [T::splat(s, T::zero()); R];
        let (v, w, x) = (&self.v[from..i0], &self.w[from..i0], &self.next[from..i0]);
        let p = &mut self.product[from..i0];
        let mut rest = &mut self.g[i0 * stride..];
        let mut rows: [&mut [T::V<S>]; R] = std::array::from_fn(|_| {
            let row;
            (row, rest) = std::mem::take(&mut rest).split_at_mut(stride);
            row
        });
        {
            let left = rows.each_mut().map(|row| &mut row[from..i0]);
            for j in 0..p.len() {
                let (vj, wj, xj, mut pj) = (v[j], w[j], x[j], p[j]);
                for r in 0..R {
                    let g = T::fnma(s, vi[r], wj, T::fnma(s, wi[r], vj, left[r][j]));
                    left[r][j] = g;
                    sums[r] = T::fma(s, g, xj, sums[r]);
                    pj = T::fma(s, g, xi[r], pj);
                }
                p[j] = pj;
            }
        }
        // The corner on the diagonal.
        for r in 0..R {
            for c in 0..=r {
                let g = &mut rows[r][i0 + c];
                *g = T::fnma(s, vi[r], wi[c], T::fnma(s, wi[r], vi[c], *g));
                sums[r] = T::fma(s, *g, xi[c], sums[r]);
                if c < r {
                    sums[c] = T::fma(s, *g, xi[r], sums[c]);
                }
            }
        }
        self.product[i0..i0 + R].copy_from_slice(&sums);
    }

    /// The eigenvector of the largest eigenvalue, into `vector`. Lanes with a zero matrix hold anything.
    #[inline(always)]
    pub(super) fn leading(&mut self, s: S) {
        let shift = self.bound(s);

        self.inverse_iteration(s, shift);
        for k in (0..self.n.saturating_sub(1)).rev() {
            let (reflector, y) = (&self.g[k * self.stride + k + 1..][..self.n - k - 1], &mut self.vector[k + 1..]);
            let along = T::vmul(s, dot::<S, T>(s, reflector, y), self.tau[k]);
            reflector.iter().zip(y).for_each(|(&v, y)| *y = T::fnma(s, along, v, *y));
        }
    }

    /// An upper bound of the largest eigenvalue of T, tight to rounding.
    #[inline(always)]
    fn bound(&mut self, s: S) -> T::V<S> {
        let n = self.n;
        let number = |x: f64| T::splat(s, T::from_f64(x));
        let zero = number(0.0);
        let (mut low, mut high) = (zero, zero);
        for i in 0..n {
            // Gershgorin's discs.
            let before = if i > 0 { self.below[i - 1] } else { zero };
            let after = if i + 1 < n { self.below[i] } else { zero };
            let radius = T::vadd(s, T::vabs(s, before), T::vabs(s, after));
            low = T::vmax(s, self.diagonal[i], low);
            high = T::vmax(s, T::vadd(s, self.diagonal[i], radius), high);
            self.product[i] = T::vmul(s, before, before);
        }
        high = T::fma(s, high, T::splat(s, T::from_f64(8.0) * T::epsilon()), high);
        // Two bits a pass, three points at once to hide the latency of the divisions.
        let passes = (-T::epsilon().wide().log2()) as usize / 2 + 3;
        for _ in 0..passes {
            let width = T::vsub(s, high, low);
            let points = [0.25, 0.5, 0.75].map(|part| T::fma(s, width, number(part), low));
            let mut pivots = [T::splat(s, -T::one()); 3];
            let mut largest = pivots;
            for (&d, &e) in self.diagonal[..n].iter().zip(&self.product[..n]) {
                for t in 0..3 {
                    pivots[t] = T::vsub(s, T::vsub(s, d, points[t]), T::vdiv(s, e, pivots[t]));
                    largest[t] = T::vmax(s, pivots[t], largest[t]);
                }
            }
            // All pivots negative: the point is above the spectrum.
            let pick = |t: usize, yes, no| T::if_less(s, largest[t], zero, yes, no);
            let below = pick(0, low, pick(1, points[0], pick(2, points[1], points[2])));
            high = pick(0, points[0], pick(1, points[1], pick(2, points[2], high)));
            low = below;
        }
        high
    }

    /// Solves (T − shift·I)·y = y four times: the shift is above the spectrum, so no pivoting is needed.
    #[inline(always)]
    fn inverse_iteration(&mut self, s: S, shift: T::V<S>) {
        let n = self.n;
        let (one, zero) = (T::splat(s, T::one()), T::splat(s, T::zero()));
        let floor = T::vsub(s, zero, T::vmul(s, shift, T::splat(s, T::epsilon())));
        let mut pivot = T::splat(s, -T::one());
        for i in 0..n {
            // As in `bound`, to the bit: there all pivots were negative.
            pivot = T::vsub(s, T::vsub(s, self.diagonal[i], shift), T::vdiv(s, self.product[i], pivot));
            // w = 1 ÷ pivot, v = what is below the diagonal of the unit lower triangular factor.
            self.w[i] = T::vdiv(s, one, T::if_less(s, pivot, floor, pivot, floor));
            self.v[i] = T::vmul(s, self.below[i], self.w[i]);
            // Any vector will do that is not nearly orthogonal to the one sought: numbers in ±[1/2, 1).
            let mixed = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
            let size = 0.5 + (mixed & 0xFFFF) as f64 / 131_072.0;
            self.vector[i] = T::splat(s, T::from_f64(if mixed >> 20 & 1 == 0 { size } else { -size }));
        }
        for _ in 0..4 {
            let y = &mut self.vector[..n];
            for i in 1..n {
                y[i] = T::fnma(s, self.v[i - 1], y[i - 1], y[i]);
            }
            let mut after = zero;
            let mut squares = zero;
            for i in (0..n).rev() {
                let coupling = if i + 1 < n { self.v[i] } else { zero };
                after = T::fnma(s, coupling, after, T::vmul(s, y[i], self.w[i]));
                y[i] = after;
                squares = T::fma(s, after, after, squares);
            }
            let scale = T::vdiv(s, one, T::vsqrt(s, squares));
            y.iter_mut().for_each(|y| *y = T::vmul(s, *y, scale));
        }
    }
}

/// The 4×4 products of two quadruples of columns.
#[inline(always)]
fn products<S: Simd, T: Real>(s: S, left: [&[T::V<S>]; TILE], right: [&[T::V<S>]; TILE]) -> [[T::V<S>; TILE]; TILE] {
    let mut sums = [[T::splat(s, T::zero()); TILE]; TILE];
    let length = left[0].len();
    let (left, right) = (left.map(|column| &column[..length]), right.map(|column| &column[..length]));
    for i in 0..length {
        let (x, y) = (left.map(|column| column[i]), right.map(|column| column[i]));
        for r in 0..TILE {
            for c in 0..TILE {
                sums[r][c] = T::fma(s, x[r], y[c], sums[r][c]);
            }
        }
    }
    sums
}
