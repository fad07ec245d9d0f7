//! The slices of least metric error.
//!
//! With D·W for W (D² = B), chunk κ of the columns meets the diagonal block G_κκ = S·Sᵀ of A. A slice alone has
//! its optimum at U·Uᵀ·W_κ, U the leading left singular vectors of W_κ·S: that is all there is to it if A is
//! diagonal, and the start if not. Then, for one row group at a time, each slice in turn is set to the
//! optimum given the others: with E the error outside chunk κ and C = E·A[:,κ],
//!
//! > T = W_κ + C·G_κκ⁺,  M_κ = U·Uᵀ·T,  U = leading left singular vectors of T·S = W_κ·S + C·N,  N = (S⁺)ᵀ
//!
//! which never raises tr(E·A·Eᵀ). Only the cross terms meet an inverse, and directions of G_κκ below
//! [`FLOOR`] have none.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, CowArray, Ix2, s};
use rayon::prelude::*;

use super::layout::{Layout, RankTable, Slice};
use crate::error::Result;
use crate::factorize::svd::{Spectrum, plain_spectrum};
use crate::factorize::{Point, Problem};
use crate::linalg::Backend;
use crate::metric::Weighting;
use crate::scalar::Real;

/// Relative to the largest eigenvalue of a diagonal block.
const FLOOR: f64 = 1e-6;

/// What one chunk of inputs contributes to the metric.
enum Root {
    Identity,
    Diagonal(Array1<f64>),
    /// S and N, p×p.
    Gram(Array2<f64>, Array2<f64>),
}

/// A problem cut into slices, in f64.
pub(super) struct Slices<'p> {
    layout: &'p Layout,
    /// D·W with its rows in the order of the groups.
    weight: Array2<f64>,
    /// The diagonal of D in that order.
    scale: Option<Array1<f64>>,
    roots: Vec<Root>,
    /// A in the order of the chunks.
    gram: Option<CowArray<'p, f64, Ix2>>,
    backend: &'p dyn Backend,
}

impl<'p> Slices<'p> {
    pub(super) fn new<T: Real>(problem: &'p Problem<'_, T>, layout: &'p Layout) -> Result<Self> {
        let rows = layout.rows();
        let mut weight = f64::from_view(problem.weight.select(Axis(0), &rows).view()).into_owned();
        if let Some(inputs) = &layout.inputs {
            weight = weight.select(Axis(1), inputs);
        }
        let scale = problem.metric.output_scale().map(|d| d.select(Axis(0), &rows));
        if let Some(d) = &scale {
            weight *= &d.view().insert_axis(Axis(1));
        }
        let gram: Option<CowArray<'p, f64, Ix2>> = match (&problem.metric.input, &layout.inputs) {
            (Weighting::Gram(gram), Some(inputs)) => {
                Some(gram.matrix().select(Axis(0), inputs).select(Axis(1), inputs).into())
            }
            (Weighting::Gram(gram), None) => Some(gram.matrix().into()),
            (Weighting::Identity | Weighting::Diagonal(_), _) => None,
        };
        let mut roots = Vec::with_capacity(layout.widths.len());
        let mut at = 0;
        for &width in &layout.widths {
            let range = at..at + width;
            at = range.end;
            roots.push(match (&problem.metric.input, &gram) {
                (Weighting::Diagonal(a), _) => {
                    let place = |i| layout.inputs.as_ref().map_or(i, |inputs| inputs[i]);
                    Root::Diagonal(range.map(|i| a[place(i)].sqrt()).collect())
                }
                (_, None) => Root::Identity,
                (_, Some(gram)) => {
                    let found = f64::kernels(problem.backend).eigh(gram.slice(s![range.clone(), range]).to_owned())?;
                    let floor = FLOOR * found.values.first().copied().unwrap_or(0.0).max(f64::MIN_POSITIVE);
                    let root = found.values.mapv(|v| v.max(0.0).sqrt());
                    let inverse = found.values.mapv(|v| if v > floor { 1.0 / v.sqrt() } else { 0.0 });
                    Root::Gram(&found.vectors * &root, &found.vectors * &inverse)
                }
            });
        }
        Ok(Slices { layout, weight, scale, roots, gram, backend: problem.backend })
    }

    /// Rows of group λ.
    fn band(&self, group: usize) -> ArrayView2<'_, f64> {
        let first: usize = self.layout.heights[..group].iter().sum();
        self.weight.slice(s![first..first + self.layout.heights[group], ..])
    }

    /// Columns of chunk κ.
    fn columns(&self, chunk: usize) -> std::ops::Range<usize> {
        let first: usize = self.layout.widths[..chunk].iter().sum();
        first..first + self.layout.widths[chunk]
    }

    /// W_κ·S + C·N.
    fn whitened(&self, chunk: usize, w: ArrayView2<'_, f64>, cross: Option<&Array2<f64>>) -> Array2<f64> {
        let kernels = f64::kernels(self.backend);
        match &self.roots[chunk] {
            Root::Identity => w.to_owned(),
            Root::Diagonal(root) => &w * root,
            Root::Gram(root, inverse) => {
                let mut z = kernels.matmul(w, root.view());
                if let Some(cross) = cross {
                    kernels.gemm(1.0, cross.view(), inverse.view(), 1.0, z.view_mut());
                }
                z
            }
        }
    }

    /// The singular values and left vectors of every slice by itself: `[λ][κ]`.
    pub(super) fn spectra(&self) -> Result<Vec<Vec<Spectrum<f64>>>> {
        let row = |group: usize| {
            let band = self.band(group);
            let slice = |chunk| {
                let w = band.slice(s![.., self.columns(chunk)]);
                plain_spectrum(self.whitened(chunk, w, None), self.backend)
            };
            (0..self.layout.widths.len()).map(slice).collect()
        };
        self.each_group(row)
    }

    /// The start: every slice by itself, at these ranks.
    pub(super) fn alone(&self, spectra: &[Vec<Spectrum<f64>>], ranks: &RankTable) -> Result<Vec<Vec<Slice>>> {
        let kernels = f64::kernels(self.backend);
        self.each_group(|group| {
            let slice = |chunk: usize| {
                let w = self.band(group);
                let left = leading(&spectra[group][chunk], ranks[group][chunk]);
                let right = kernels.matmul(left.t(), w.slice(s![.., self.columns(chunk)]));
                Slice { left, right }
            };
            Ok((0..self.layout.widths.len()).map(slice).collect())
        })
    }

    /// Sweeps of block-coordinate descent in the whole metric; exact metrics need none.
    pub(super) fn descend(&self, slices: Vec<Vec<Slice>>, ranks: &RankTable, sweeps: usize) -> Result<Vec<Vec<Slice>>> {
        let several = self.layout.widths.len() > 1 && sweeps > 0;
        let Some(gram) = self.gram.as_ref().filter(|_| several) else { return Ok(slices) };
        self.each_group(|group| self.descend_group(gram.view(), group, &slices[group], &ranks[group], sweeps))
    }

    fn descend_group(
        &self,
        gram: ArrayView2<'_, f64>,
        group: usize,
        start: &[Slice],
        ranks: &[usize],
        sweeps: usize,
    ) -> Result<Vec<Slice>> {
        let kernels = f64::kernels(self.backend);
        let band = self.band(group);
        let mut slices = start.to_vec();
        let mut error = band.to_owned();
        for (chunk, slice) in slices.iter().enumerate() {
            let part = error.slice_mut(s![.., self.columns(chunk)]);
            kernels.gemm(-1.0, slice.left.view(), slice.right.view(), 1.0, part);
        }
        for _ in 0..sweeps {
            for chunk in 0..slices.len() {
                let columns = self.columns(chunk);
                error.slice_mut(s![.., columns.clone()]).fill(0.0);
                let cross = kernels.matmul(error.view(), gram.slice(s![.., columns.clone()]));
                let w = band.slice(s![.., columns.clone()]);
                let found = plain_spectrum(self.whitened(chunk, w, Some(&cross)), self.backend)?;
                let left = leading(&found, ranks[chunk]);
                let mut right = kernels.matmul(left.t(), w);
                if let Root::Gram(_, inverse) = &self.roots[chunk] {
                    let inner = kernels.matmul(kernels.matmul(left.t(), cross.view()).view(), inverse.view());
                    kernels.gemm(1.0, inner.view(), inverse.t(), 1.0, right.view_mut());
                }
                let mut part = error.slice_mut(s![.., columns]);
                part.assign(&w);
                kernels.gemm(-1.0, left.view(), right.view(), 1.0, part);
                slices[chunk] = Slice { left, right };
            }
        }
        Ok(slices)
    }

    /// Takes D out again.
    pub(super) fn unscaled(&self, mut slices: Vec<Vec<Slice>>) -> Vec<Vec<Slice>> {
        if let Some(d) = &self.scale {
            let mut at = 0;
            for row in &mut slices {
                let height = row[0].left.nrows();
                for slice in row.iter_mut() {
                    slice.left /= &d.slice(s![at..at + height]).insert_axis(Axis(1));
                }
                at += height;
            }
        }
        slices
    }

    /// Groups are independent; with one there is nothing to share out, and the kernels may use all threads.
    fn each_group<R: Send>(&self, work: impl Fn(usize) -> Result<R> + Send + Sync) -> Result<Vec<R>> {
        match self.layout.heights.len() {
            1 => Ok(vec![work(0)?]),
            groups => (0..groups).into_par_iter().map(&work).collect(),
        }
    }

    /// Error of a slice alone at every rank, and its bytes.
    pub(super) fn curve(spectrum: &Spectrum<f64>, most: usize, price: impl Fn(usize) -> u64) -> Vec<Point> {
        let most = most.min(spectrum.values.len());
        // Summed from the small end.
        let mut tail: f64 = spectrum.values[most..].iter().rev().sum();
        let mut points = Vec::with_capacity(most + 1);
        for rank in (0..=most).rev() {
            points.push(Point { bytes: price(rank), error: tail });
            tail += rank.checked_sub(1).map_or(0.0, |last| spectrum.values[last]);
        }
        points.reverse();
        points
    }
}

/// The inputs by their share of the squared metric norm, A_jj·‖D·W_j‖², largest first.
pub(super) fn by_energy<T: Real>(problem: &Problem<'_, T>) -> Vec<usize> {
    let d = problem.metric.output_scale();
    let energy = |(j, column): (usize, ArrayView1<'_, T>)| {
        let a = match &problem.metric.input {
            Weighting::Identity => 1.0,
            Weighting::Diagonal(a) => a[j],
            Weighting::Gram(gram) => gram.matrix()[(j, j)],
        };
        let of_row = |(i, v): (usize, &T)| (v.wide() * d.as_ref().map_or(1.0, |d| d[i])).powi(2);
        a * column.iter().enumerate().map(of_row).sum::<f64>()
    };
    let energies: Vec<f64> = problem.weight.columns().into_iter().enumerate().map(energy).collect();
    let mut order: Vec<usize> = (0..energies.len()).collect();
    order.sort_by(|&i, &j| energies[j].total_cmp(&energies[i]).then(i.cmp(&j)));
    order
}

/// The first `rank` left vectors; zeros where a slice has not as many, so that shapes are as planned.
fn leading(spectrum: &Spectrum<f64>, rank: usize) -> Array2<f64> {
    let (height, there) = spectrum.vectors.dim();
    let mut left = Array2::zeros((height, rank));
    let count = rank.min(there);
    left.slice_mut(s![.., ..count]).assign(&spectrum.vectors.slice(s![.., ..count]));
    left
}
