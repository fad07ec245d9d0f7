//! What atoms leave of each layer, as weighted low rank.

use super::super::{Decomposition, Factorize, Point, Svd};
use super::layers::{Layers, Shares};
use crate::allocate::{Offer, allocate};
use crate::budget::Budget;
use crate::error::Result;
use crate::scalar::Real;

impl<T: Real> Layers<'_, '_, T> {
    /// Low rank of W_l − Σ c·D for each layer within so many bytes for all of them: as many each, or dealt to where
    /// they gain most.
    pub(super) fn fit_residuals(&self, found: &mut Shares<T>, limit: u64) -> Result<()> {
        let svd = Svd::default();
        let mut solved: Vec<Decomposition<T>> = Vec::with_capacity(self.count());
        for layer in 0..self.count() {
            let left = self.left(found, layer, true, false);
            let problem = super::super::Problem { weight: left.view(), ..self.group[layer].clone() };
            let mut decomposition = svd.decompose(std::slice::from_ref(&problem))?;
            let curve = decomposition.iter_mut().flat_map(|d| &mut d.curve);
            curve.for_each(|point| point.error *= self.weights[layer]);
            solved.extend(decomposition);
        }
        // The last choice is the weight kept dense: not for a residual. And without atoms no layer is given up.
        let first = |d: &Decomposition<T>| usize::from(found.count() == 0 && d.curve.len() > 2);
        let curves: Vec<&[Point]> =
            solved.iter().map(|d| &d.curve[first(d)..d.curve.len().saturating_sub(1)]).collect();
        let offers: Vec<Offer<'_>> = curves.iter().map(|curve| Offer { curve, floor: 0 }).collect();
        // The largest ranks of equal bytes, where errors are no price.
        let each = limit / self.count().max(1) as u64;
        let largest = |curve: &[Point]| curve.iter().rposition(|point| point.bytes <= each).unwrap_or(0);
        let chosen = match self.weighed {
            true => allocate(&offers, limit)?,
            false => curves.iter().map(|curve| largest(curve)).collect(),
        };
        let firsts: Vec<usize> = solved.iter().map(first).collect();
        for (layer, (choice, decomposition)) in chosen.into_iter().zip(&solved).enumerate() {
            let rank = choice + firsts[layer];
            let left = self.left(found, layer, true, false);
            let budget = Budget::Rank(rank);
            let problem = super::super::Problem { weight: left.view(), budget, ..self.group[layer].clone() };
            let operators = match rank {
                0 => None,
                _ => svd.assemble(std::slice::from_ref(&problem), decomposition)?.pop(),
            };
            found.residuals[layer] = operators;
        }
        Ok(())
    }
}
