//! What atoms leave of each layer, as weighted low rank.

use super::super::svd::Joint;
use super::super::{Factorize, Outline, Point, Problem, Route, Svd};
use super::held::Held;
use super::layers::{Layers, Shares};
use crate::allocate::{Offer, allocate};
use crate::budget::Budget;
use crate::error::Result;
use crate::scalar::Real;

impl<T: Real> Layers<'_, '_, T> {
    /// Low rank of W_l − Σ c·D for each layer within so many bytes for all of them: as many each, or dealt to where
    /// they gain most.
    pub(super) fn fit_residuals(&self, found: &mut Shares<T>, limit: u64, route: Route) -> Result<()> {
        let (svd, all) = (Svd { route, ..Svd::default() }, 0..self.group[0].shape().0);
        let each = limit / self.count().max(1) as u64;
        if route == Route::Fast {
            return self.fit_leading(found, each, &svd);
        }
        let decompose = |found: &Shares<T>, layer: usize| {
            let problem = &self.group[layer];
            let outline = Outline { shape: problem.shape(), dtype: problem.dtype };
            let left = || self.unshared(found, layer, &all).into();
            svd.profile(&Joint::lone(outline.shape, &problem.metric, left), &outline, outline.bytes(), self.backend())
                .map_err(|e| e.of_tensor(problem.name))
        };
        // The last choice is the weight kept dense: not for a residual. And without atoms no layer is given up.
        let choices = |found: &Shares<T>, curve: &[Point]| -> (usize, Vec<Point>) {
            let first = usize::from(found.count() == 0 && curve.len() > 2);
            (first, curve[first..curve.len().saturating_sub(1)].to_vec())
        };
        // What a layer gets may depend on all curves. One decomposition is in memory at a time, and made twice then.
        let dealt = match self.weighed {
            false => None,
            true => {
                let mut curves = Vec::with_capacity(self.count());
                for layer in 0..self.count() {
                    let mut curve = choices(found, &decompose(found, layer)?.curve).1;
                    curve.iter_mut().for_each(|point| point.error *= self.weights[layer]);
                    curves.push(curve);
                }
                let offers: Vec<Offer<'_>> = curves.iter().map(|curve| Offer { curve, floor: 0 }).collect();
                Some(allocate(&offers, limit)?)
            }
        };
        // Else the largest ranks of equal bytes, where errors are no price.
        for layer in 0..self.count() {
            let decomposition = decompose(found, layer)?;
            let (first, curve) = choices(found, &decomposition.curve);
            let largest = || curve.iter().rposition(|point| point.bytes <= each).unwrap_or(0);
            let rank = first + dealt.as_ref().map_or_else(largest, |dealt| dealt[layer]);
            found.residuals[layer] = None;
            if rank > 0 {
                let left = self.unshared(found, layer, &all);
                let problem = Problem { budget: Budget::Rank(rank), ..self.group[layer].whole(left.view()) };
                let solved = svd.assemble(std::slice::from_ref(&problem), &decomposition)?;
                found.residuals[layer] = solved.first().map(Held::new).transpose()?;
            }
        }
        Ok(())
    }

    /// The same of equal bytes for each layer, by their leading directions alone.
    fn fit_leading(&self, found: &mut Shares<T>, each: u64, svd: &Svd) -> Result<()> {
        let outline = Outline { shape: self.group[0].shape(), dtype: self.group[0].dtype };
        let rank = svd.rank_within(outline.shape, each, &outline);
        for layer in 0..self.count() {
            found.residuals[layer] = None;
            if let Some(rank) = rank {
                let left = self.unshared(found, layer, &(0..outline.shape.0));
                let problem = Problem { budget: Budget::Rank(rank), ..self.group[layer].whole(left.view()) };
                let solved = svd.factorize(std::slice::from_ref(&problem))?;
                found.residuals[layer] = solved.first().map(Held::new).transpose()?;
            }
        }
        Ok(())
    }
}
