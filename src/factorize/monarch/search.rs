//! The choice of block numbers where none are given, and of bytes where an error is.

use super::{Chunks, Cut, Monarch};
use crate::budget::Budget;
use crate::error::{Error, Result};
use crate::factorize::{Factorize, Problem, Svd};
use crate::operator::Operator;
use crate::scalar::Real;

/// A family is left after this many tries without a gain.
const PATIENCE: usize = 2;
/// Chunks of one group that are tried: square slices store the fewest pivot coefficients.
const CHUNKS: [usize; 5] = [2, 3, 4, 6, 8];
/// Steps of the search for the bytes that an error takes.
const BISECTIONS: usize = 16;

impl Monarch {
    /// What is worth trying, each family by rising block numbers.
    pub(super) fn families(&self, (m, n): (usize, usize)) -> Vec<Vec<Monarch>> {
        let of =
            |k, l, chunks| Monarch { input_blocks: Some(k), output_blocks: Some(l), chunks: Some(chunks), ..*self };
        let orders = self.chunks.map_or(vec![Chunks::Contiguous, Chunks::Energy], |chunks| vec![chunks]);
        let chunked = |order| CHUNKS.iter().filter(|&&k| k < n).map(|&k| of(k, 1, order)).collect();
        let mut families: Vec<Vec<Monarch>> = orders.iter().map(|&order| chunked(order)).collect();
        let squares = std::iter::successors(Some(2), |b| Some(b * 2)).take_while(|&b| b <= m.min(n) / 2);
        families.push(squares.map(|b| of(b, b, self.chunks.unwrap_or_default())).collect());
        families
    }

    /// The best within a number of bytes.
    pub(super) fn within<T: Real>(&self, problem: &Problem<'_, T>, limit: u64) -> Result<Operator<T>> {
        if limit >= problem.bytes() {
            return Ok(problem.dense()?.remove(0));
        }
        match self.blocks() {
            Some(_) => self.solve(problem, Cut::Bytes(limit)),
            None => self.searched(problem, limit),
        }
    }

    /// The best of low rank and of all families, told apart by what is left after one sweep.
    fn searched<T: Real>(&self, problem: &Problem<'_, T>, limit: u64) -> Result<Operator<T>> {
        let low_rank = Problem { budget: Budget::Bytes(limit), ..problem.clone() };
        let mut best = match Svd::default().factorize(std::slice::from_ref(&low_rank)) {
            Ok(mut operators) => {
                let operator = operators.remove(0);
                Ok((problem.error_of(&operator), None, operator))
            }
            Err(refused @ Error::Budget { .. }) => Err(refused),
            Err(other) => return Err(other),
        };
        for family in self.families(problem.shape()) {
            let (mut least, mut since) = (f64::INFINITY, 0);
            for one in family {
                let quick = Monarch { sweeps: self.sweeps.min(1), ..one };
                let operator = match quick.solve(problem, Cut::Bytes(limit)) {
                    Err(Error::Budget { .. }) => continue,
                    other => other?,
                };
                let error = problem.error_of(&operator);
                if best.as_ref().map_or(true, |(best, ..)| error < *best) {
                    best = Ok((error, Some(one), operator));
                }
                since = if error < least { 0 } else { since + 1 };
                least = least.min(error);
                if since == PATIENCE {
                    break;
                }
            }
        }
        match best? {
            (_, Some(one), _) if self.sweeps > 1 => one.solve(problem, Cut::Bytes(limit)),
            (_, _, operator) => Ok(operator),
        }
    }

    /// The fewest bytes, to a few parts in ten thousand, whose result stays within a squared error.
    pub(super) fn up_to<T: Real>(&self, problem: &Problem<'_, T>, limit: f64) -> Result<Operator<T>> {
        let (mut low, mut high) = (0, problem.bytes());
        let mut best = problem.dense()?.remove(0);
        for _ in 0..BISECTIONS {
            let middle = u64::midpoint(low, high);
            match self.within(problem, middle) {
                Ok(operator) if problem.error_of(&operator) <= limit => (best, high) = (operator, middle),
                Ok(_) | Err(Error::Budget { .. }) => low = middle,
                Err(other) => return Err(other),
            }
        }
        Ok(best)
    }
}
