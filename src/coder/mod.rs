//! Sparse approximation under a quadratic form: the coder that all sparse structures share.
//!
//! Given a target W (m×n), a symmetric positive semidefinite H (n×n) and a pattern of what may be
//! non-zero, minimise tr((Ŵ−W)·H·(Ŵ−W)ᵀ) over Ŵ of that pattern. Rows are independent of each other.
//!
//! [`prune`] gives the one-shot answers of the literature: a score for each weight, the best of each
//! group kept as they are. [`obs`] is SparseGPT: left to right, later weights make up for what earlier
//! ones lost. [`descend`] goes on from either by exact group coordinate descent: for one group of inputs
//! after another, the best of *all* its masks with the least-squares values of that mask, everything
//! else fixed; the error never rises. With g the gradient half H·(Ŵ−W) without the group's own part,
//!
//! > v = −H_PP⁻¹·g_P,  gain(P) = g_Pᵀ·H_PP⁻¹·g_P
//!
//! The inverses do not depend on the row and are computed once for each group and mask. Rows are laid
//! out across SIMD lanes; a block of columns is solved exactly, and what blocks do to each other goes
//! through matrix products.
//!
//! Results depend on nothing but the input: rows are cut into strips of a fixed size, on any number of
//! threads. On a rayon worker strips run one after the other, as everywhere in this crate.

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::scalar::Real;

mod clip;
mod conjugate;
mod descent;
mod lattice;
mod obs;
mod pass;
mod score;
mod search;
mod table;

pub use self::clip::{Levels, clip};
pub use self::conjugate::conjugate;
pub use self::descent::{Descent, descend};
pub use self::lattice::Lattice;

pub use self::obs::{Factor, obs};
pub(crate) use self::score::normalised;
pub use self::score::{Rule, prune, scores};
pub(crate) use self::search::{Judge, Vectors};
pub(crate) use self::table::Masks;
pub use self::table::{Pattern, Tables};

/// Rows in a strip: one unit of parallel work.
const STRIP: usize = 256;
/// Rows that are computed on side by side.
pub(crate) const LANES: usize = 16;
/// Columns that are solved one after the other between two matrix products.
const BLOCK: usize = 64;

/// A sparse matrix as the coder works on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Coded<T> {
    /// Ŵ, m×n, zero where nothing is kept.
    pub values: Array2<T>,
    /// Which entries are stored, m×n: a stored value may be zero.
    pub kept: Array2<bool>,
}

/// Some rows, transposed: n × (rows, padded with zeros to whole lanes).
#[derive(Debug)]
struct Strip<T> {
    first: usize,
    rows: usize,
    /// The target.
    target: Array2<T>,
    /// What stands for it now.
    coded: Array2<T>,
    /// coded − target.
    error: Array2<T>,
    kept: Array2<bool>,
}

impl<T: Real> Strip<T> {
    fn width(&self) -> usize {
        self.target.ncols()
    }
}

/// Cuts a matrix into strips; nothing is coded yet.
fn strips<T: Real>(target: ArrayView2<'_, T>) -> Vec<Strip<T>> {
    let (m, n) = target.dim();
    let cut = |first: usize| {
        let rows = STRIP.min(m - first);
        let width = rows.next_multiple_of(LANES);
        let turned = |a: ArrayView2<'_, T>| {
            let mut turned = Array2::zeros((n, width));
            turned.slice_mut(ndarray::s![.., ..rows]).assign(&a.slice(ndarray::s![first..first + rows, ..]).t());
            turned
        };
        let target = turned(target);
        let (coded, error) = (Array2::zeros((n, width)), Array2::zeros((n, width)));
        let kept = Array2::default((n, width));
        Strip { first, rows, target, coded, error, kept }
    };
    (0..m).step_by(STRIP).map(cut).collect()
}

/// Puts strips together again.
fn join<T: Real>((m, n): (usize, usize), strips: &[Strip<T>]) -> Coded<T> {
    let (mut values, mut kept) = (Array2::zeros((m, n)), Array2::default((m, n)));
    for strip in strips {
        let (rows, part) = (strip.first..strip.first + strip.rows, ndarray::s![.., ..strip.rows]);
        values.slice_mut(ndarray::s![rows.clone(), ..]).assign(&strip.coded.slice(part).t());
        kept.slice_mut(ndarray::s![rows, ..]).assign(&strip.kept.slice(part).t());
    }
    Coded { values, kept }
}

/// Runs on each strip: in parallel, unless the caller is a parallel worker already.
fn each<S: Send, R: Send>(strips: &mut [S], run: impl Fn(&mut S) -> R + Send + Sync) -> Vec<R> {
    match rayon::current_thread_index() {
        Some(_) => strips.iter_mut().map(run).collect(),
        None => strips.par_iter_mut().map(run).collect(),
    }
}

/// Refuses a quadratic form or a first solution of another shape.
fn check<T: Real>(target: ArrayView2<'_, T>, form: (usize, usize), start: Option<&Coded<T>>) -> Result<()> {
    let n = target.ncols();
    if form != (n, n) {
        return Err(Error::shape((n, n), form));
    }
    match start {
        Some(start) if start.values.dim() != target.dim() || start.kept.dim() != target.dim() => {
            Err(Error::shape(target.dim(), (start.values.dim(), start.kept.dim())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
