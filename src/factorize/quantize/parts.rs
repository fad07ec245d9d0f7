//! Block-diagonal factors and mixtures of atoms onto grids.

use std::sync::Arc;

use ndarray::{Array2, ArrayView2, s};

use super::fit::Fit;
use crate::error::Result;
use crate::metric::Weighting;
use crate::operator::{
    BlockDiagonal, Dense, Grid, LinearOperator, Mixture, Operator, ZeroPoint, ZeroPoints, scale_dtype,
};
use crate::scalar::Real;
use crate::stats::Gram;

impl<T: Real> Fit<'_, T> {
    /// Each block near what is best in its place: rows of other blocks do not count, and what no block can reach acts
    /// on it through the metric, B* = (X·A)_C·(A_CC)⁻¹ in the columns C of the block.
    pub(super) fn blocks(
        &mut self,
        leaf: &BlockDiagonal<T>,
        target: ArrayView2<'_, T>,
        input: &Weighting,
    ) -> Result<BlockDiagonal<T>> {
        let levels = self.how.levels(leaf.widest());
        let (m, groups) = (target.nrows(), leaf.widest().div_ceil(levels.group));
        let (mut scales, mut zeros) = (Array2::zeros((m, groups)), Array2::zeros((m, groups)));
        let mut offsets = Array2::zeros((m, groups));
        let (mut values, mut row, mut column) = (Vec::new(), 0, 0);
        let weighed = match input {
            Weighting::Gram(_) => Some(input.times(target.mapv(|v| v.wide()).view(), self.how.backend)),
            _ => None,
        };
        for &(rows, columns) in leaf.extents() {
            let (own, here) = (s![row..row + rows, column..column + columns], column..column + columns);
            (row, column) = (row + rows, column + columns);
            if rows * columns == 0 {
                continue;
            }
            let (best, input) = match (input, &weighed) {
                (Weighting::Gram(gram), Some(weighed)) => {
                    let form = gram.matrix().slice(s![here.clone(), here]).to_owned();
                    let ridge = 1e-8 * form.diag().sum() / columns as f64;
                    let mut damped = form.clone();
                    damped.diag_mut().mapv_inplace(|d| d + ridge.max(f64::MIN_POSITIVE));
                    let right = weighed.slice(own).reversed_axes().as_standard_layout().into_owned();
                    let solved = f64::kernels(self.how.backend).solve_spd(damped.view(), right);
                    // A block that no input reaches may be anything: what it was will do.
                    let best = solved.ok().filter(|best| best.iter().all(|v| v.is_finite()));
                    let best = best.map(|best| best.t().mapv(T::from_f64).as_standard_layout().into_owned());
                    (best, Weighting::Gram(Arc::new(Gram::new("block", form)?)))
                }
                (Weighting::Diagonal(d), _) => (None, Weighting::Diagonal(Arc::new(d.slice(s![here]).to_owned()))),
                _ => (None, Weighting::Identity),
            };
            let best = best.unwrap_or_else(|| target.slice(own).to_owned());
            let found = self.how.round(best.view(), &input, self.notes)?;
            let (grid, rows) = (found.grid(), row - rows..row);
            let used = grid.scales().shape().1;
            scales.slice_mut(s![rows.clone(), ..used]).assign(&grid.scales().values());
            match grid.zeros() {
                ZeroPoints::None => {}
                ZeroPoints::Integer(from) => zeros.slice_mut(s![rows, ..used]).assign(from),
                ZeroPoints::Float(from) => offsets.slice_mut(s![rows, ..used]).assign(&from.values()),
            }
            values.extend(found.to_dense());
        }
        let largest = offsets.iter().fold(0.0, |most: f64, v: &T| most.max(v.wide().abs()));
        let dtype = scale_dtype(scales.view(), largest);
        let zeros = match levels.zero {
            ZeroPoint::None => ZeroPoints::None,
            ZeroPoint::Integer => ZeroPoints::Integer(zeros),
            ZeroPoint::Float => ZeroPoints::Float(Dense::rounded(offsets, dtype)?),
        };
        let grid = Grid::new(levels.bits, levels.group, Dense::rounded(scales, dtype)?, zeros)?;
        BlockDiagonal::new(values, leaf.extents().to_vec())?.quantized(grid)
    }

    /// Atoms by themselves, once for all that share them; then the coefficients that are best for them.
    pub(super) fn mixture(
        &mut self,
        leaf: &Mixture<T>,
        target: ArrayView2<'_, T>,
        input: &Weighting,
    ) -> Result<Mixture<T>> {
        let atoms = leaf.atoms().iter().map(|atom| self.fit(atom, atom.to_dense().view(), input));
        let atoms = atoms.collect::<Result<Vec<Operator<T>>>>()?;
        let dense: Vec<Array2<T>> = atoms.iter().map(LinearOperator::to_dense).collect();
        let backend = self.how.backend;
        let images: Vec<_> = dense.iter().map(|atom| input.times(atom.mapv(|v| v.wide()).view(), backend)).collect();
        let inner = |a: &Array2<f64>, b: ArrayView2<'_, T>| a.iter().zip(b).map(|(a, b)| a * b.wide()).sum::<f64>();
        let count = atoms.len();
        let mut squares = Array2::from_shape_fn((count, count), |(i, j)| inner(&images[i], dense[j].view()));
        let hold = 1e-12 * squares.diag().sum() / count as f64;
        squares.diag_mut().mapv_inplace(|v| v + hold.max(f64::MIN_POSITIVE));
        let right = Array2::from_shape_fn((count, 1), |(i, _)| inner(&images[i], target));
        let dtype = leaf.coefficients().dtype();
        let best = f64::kernels(backend).solve_spd(squares.view(), right).ok();
        let best = best.and_then(|c| Dense::rounded(c.t().mapv(T::from_f64), dtype).ok());
        // Atoms that the metric does not see keep their coefficients.
        Mixture::new(best.unwrap_or_else(|| leaf.coefficients().clone()), atoms)
    }
}
