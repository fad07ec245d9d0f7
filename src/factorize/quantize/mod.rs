//! Quantisation: numbers of 2 to 8 bits for a weight, or for the factors that another method writes.
//!
//! > ŵᵢⱼ = s·(q − z) + c,  q in 0 … 2ᵇ−1, s and z or c of a group of consecutive columns of a row
//!
//! Scales come from a search over clipped ranges, each column's errors counted by its mean square input. Rule
//! `nearest` then rounds to the nearest number, exact where inputs do not interact. Rule `gram` walks as GPTQ
//! does (Frantar et al., ICLR 2023), inputs of largest square first, and goes on by coordinate descent on the integers
//! and by least-squares steps of the scales ([`Lattice`](crate::coder::Lattice)); its error is never above that
//! of the nearest numbers. A metric without a Gram matrix is minimised by both alike.
//!
//! With an `inner` method its result is rounded factor by factor, from the right: what the rounding of one
//! loses, those to the left make up for, as far as their own rounding lets them ([`fit`]). The inner method gets
//! the budget that makes the rounded result fit, and never so much that it would keep the weight whole.
//!
//! Cost of a weight under a Gram metric: n³/3 + (1 + 4·sweeps)·mn² flops for each width that is tried. Fails, that
//! is, loses to other forms, below 3 bits.

use serde::{Deserialize, Serialize};

use self::fit::Fit;
use self::leaf::How;
use super::group::kept_dense;
use super::sparse::{fraction, outline, single};
use super::{Decomposition, Factorize, Forecast, Method, Outline, Point, Problem};
use crate::budget::Budget;
use crate::coder::Levels;
use crate::error::{Error, Result};
use crate::metric::MetricSpec;
use crate::operator::{Dense, Grid, Operator, Quantized, ZeroPoint};
use crate::scalar::{DType, Real};

mod fit;
mod leaf;
mod parts;
mod price;
#[cfg(test)]
mod tests;

/// What decides to which number an entry goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rounding {
    /// Its own nearest.
    Nearest,
    /// The error of the whole row under the Gram matrix.
    #[default]
    Gram,
}

/// Small integers for numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Quantize {
    /// Bits of a code, 2 to 8, or 16 for numbers as they are. Without it: of a weight the most that the
    /// budget allows, of an inner method's numbers 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// Consecutive columns that share a scale; 0: a whole row.
    pub group: usize,
    /// Whether each group stores where its zero is.
    pub zero_point: ZeroPoint,
    /// How codes are chosen.
    pub rule: Rounding,
    /// Passes of coordinate descent after GPTQ's walk.
    pub sweeps: usize,
    /// Of the mean diagonal of the Gram matrix, added to it for the walk; a tenth of it for the descent.
    pub damping: f64,
    /// Whether the right one of two dense factors is rotated at random.
    pub mix: bool,
    /// Whose numbers; the weight's own without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inner: Option<Box<Method>>,
}

impl Default for Quantize {
    fn default() -> Self {
        Quantize {
            bits: None,
            group: 128,
            zero_point: ZeroPoint::None,
            rule: Rounding::Gram,
            sweeps: 4,
            damping: 0.01,
            mix: true,
            inner: None,
        }
    }
}

/// Widths of a weight's codes that a budget chooses from.
const WIDTHS: [u8; 7] = [2, 3, 4, 5, 6, 7, 8];
/// Bits of an inner method's numbers.
const INNER: u8 = 4;
/// From so many on, numbers stay as they are.
const WHOLE: u8 = 16;

impl Quantize {
    fn check(&self) -> Result<()> {
        fraction("damping", self.damping)?;
        match self.bits {
            None | Some(WHOLE) => Ok(()),
            Some(bits) if Grid::<f32>::BITS.contains(&bits) => Ok(()),
            Some(bits) => Err(Error::Unsupported(format!("bits = {bits}: expected 2 to 8, or 16"))),
        }
    }

    fn how<'a, T: Real>(&self, bits: u8, problem: &Problem<'a, T>) -> How<'a> {
        let levels = Levels { bits, group: self.group, zero: self.zero_point };
        let (rule, sweeps, damping) = (self.rule, self.sweeps, self.damping);
        How { levels, rule, sweeps, damping, backend: problem.backend }
    }

    /// The widths that a weight may have.
    pub(super) fn widths(&self) -> Vec<u8> {
        self.bits.map_or(WIDTHS.to_vec(), |bits| vec![bits])
    }

    fn bytes(&self, shape: (usize, usize), bits: u8, dtype: DType) -> u64 {
        match bits {
            WHOLE => dtype.bytes(shape.0 * shape.1) as u64,
            _ => Grid::<f32>::bytes_of(
                shape,
                bits,
                if self.group == 0 { shape.1 } else { self.group.min(shape.1) },
                self.zero_point,
            ),
        }
    }

    /// A weight in so many bits.
    fn weight<T: Real>(&self, problem: &Problem<'_, T>, bits: u8, notes: &mut Vec<String>) -> Result<Operator<T>> {
        if bits == WHOLE {
            return Ok(Operator::Dense(Dense::rounded(problem.weight.to_owned(), problem.dtype)?));
        }
        Ok(Operator::Quantized(self.codes(problem, bits, notes)?))
    }

    /// A weight in so many bits, at most 8.
    pub(super) fn codes<T: Real>(
        &self,
        problem: &Problem<'_, T>,
        bits: u8,
        notes: &mut Vec<String>,
    ) -> Result<Quantized<T>> {
        self.how(bits, problem).round(problem.weight, &problem.metric.input, notes)
    }

    /// The most bits that fit a budget in bytes; `None` if the weight itself does.
    fn fitting(&self, shape: (usize, usize), dtype: DType, budget: &Budget) -> Result<Option<u8>> {
        let before = dtype.bytes(shape.0 * shape.1) as u64;
        let limit = budget.byte_limit(before).unwrap_or(before);
        if before <= limit {
            return Ok(None);
        }
        let bytes = |bits: u8| self.bytes(shape, bits, dtype);
        let widths = self.widths();
        let best = widths.iter().copied().filter(|&bits| bytes(bits) <= limit).max();
        let least = || widths.iter().map(|&bits| bytes(bits)).min().unwrap_or(before);
        best.map(Some)
            .ok_or_else(|| Error::Budget { asked: budget.to_string(), least: format!("{} bytes of {before}", least()) })
    }

    /// The inner method's result of which the rounded form fits the group's budget best.
    fn inner<T: Real>(
        &self,
        method: &Method,
        group: &[Problem<'_, T>],
        bits: u8,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Operator<T>>> {
        let before: u64 = group.iter().map(Problem::bytes).sum();
        let Some(first) = group.first() else { return Ok(Vec::new()) };
        let limit = match (first.budget, first.budget.byte_limit(before)) {
            (_, Some(limit)) => limit,
            (Budget::Rank(_), None) => return method.factorize_noting(group, notes),
            (other, None) => return Err(no_error(&other)),
        };
        // Its own form, even where all entries would fit: a byte less than the weight itself.
        let whole = before.saturating_sub(1);
        let found = method.decompose(group)?;
        if let Some(found) = &found {
            notes.extend(found.notes.iter().cloned());
        }
        // A curve is cut in no time; whatever is solved anew each time may leave a little more unused.
        let enough = if found.is_some() { 0.995 } else { 0.97 };
        let (mut low, mut high) = (0, before);
        let mut room = ((limit as f64 / self.ratio(bits, first.shape(), first.dtype)) as u64).min(whole);
        let (mut best, mut least) = (None, u64::MAX);
        for _ in 0..TRIES {
            let budget = Budget::Bytes(room);
            let tried: Vec<_> = group.iter().map(|p| Problem { budget, ..p.clone() }).collect();
            let mut said = Vec::new();
            let solved = match &found {
                Some(found) => method.assemble(&tried, found),
                None => method.factorize_noting(&tried, &mut said),
            };
            let operators = match solved {
                Ok(operators) => operators,
                Err(Error::Budget { .. }) if high - room > 1 => {
                    (low, room) = (room, room + (high - room) / 2);
                    continue;
                }
                Err(why) if best.is_none() && least == u64::MAX => return Err(why),
                Err(_) => break,
            };
            let mut seen = Vec::new();
            let size = operators.iter().map(|o| self.priced(o, bits, &mut seen)).sum::<Result<u64>>()?;
            let fits = size <= limit;
            if fits {
                (best, low) = (Some((operators, said)), room);
            } else {
                high = room;
            }
            least = least.min(size);
            let full = fits && (room >= whole || size as f64 >= enough * limit as f64);
            if full || high - low <= 1 {
                break;
            }
            let scaled = (room as f64 * limit as f64 / size.max(1) as f64) as u64;
            // Ranks are whole numbers: what is hardly too large has to come down by more than a hair.
            let scaled = if fits { scaled } else { scaled - scaled / 64 };
            room = if scaled > low && scaled < high { scaled } else { low + (high - low) / 2 }.min(whole);
        }
        let (operators, said) = best.ok_or_else(|| Error::Budget {
            asked: first.budget.to_string(),
            least: format!("about {least} bytes of {before}"),
        })?;
        notes.extend(said);
        Ok(operators)
    }

    /// The widths that save anything of a weight, with their bytes.
    fn offered(&self, shape: (usize, usize), dtype: DType) -> Vec<(u8, u64)> {
        let before = dtype.bytes(shape.0 * shape.1) as u64;
        let all = self.widths().into_iter().map(|bits| (bits, self.bytes(shape, bits, dtype)));
        all.filter(|&(_, bytes)| bytes < before).collect()
    }
}

/// Cuts of an inner method's result until it fits.
const TRIES: usize = 8;

fn no_error(budget: &Budget) -> Error {
    Error::Unsupported(format!(
        "quantize of another method's numbers knows no budget `{budget}`: use keep, bytes or rank"
    ))
}

impl<T: Real> Factorize<T> for Quantize {
    fn factorize(&self, group: &[Problem<'_, T>]) -> Result<Vec<Operator<T>>> {
        self.factorize_noting(group, &mut Vec::new())
    }

    fn factorize_noting(&self, group: &[Problem<'_, T>], notes: &mut Vec<String>) -> Result<Vec<Operator<T>>> {
        self.check()?;
        let Some(method) = &self.inner else {
            let problem = single("quantize", group)?;
            if problem.budget.byte_limit(0).is_none() {
                return match self.decompose(group)? {
                    Some(found) => self.assemble(group, &found),
                    None => Ok(Vec::new()),
                };
            }
            return match self.fitting(problem.shape(), problem.dtype, &problem.budget)? {
                Some(bits) => Ok(vec![self.weight(problem, bits, notes)?]),
                None => problem.dense(),
            };
        };
        group.iter().try_for_each(|problem| problem.check().map_err(|e| e.of_tensor(problem.name)))?;
        let bits = self.bits.unwrap_or(INNER);
        if bits == WHOLE {
            return method.factorize_noting(group, notes);
        }
        let before = group.iter().map(Problem::bytes).sum();
        if group.iter().any(|problem| problem.budget.byte_limit(before).is_some_and(|limit| limit >= before)) {
            return kept_dense(group);
        }
        let operators = self.inner(method, group, bits, notes)?;
        let Some(first) = group.first() else { return Ok(operators) };
        let mut fit = Fit { how: self.how(bits, first), mix: self.mix, seed: first.seed, notes, shared: Vec::new() };
        let pairs = group.iter().zip(&operators);
        pairs.map(|(problem, operator)| fit.fit(operator, problem.weight, &problem.metric.input)).collect()
    }

    fn decompose(&self, group: &[Problem<'_, T>]) -> Result<Option<Decomposition<T>>> {
        self.check()?;
        if self.inner.is_some() {
            return Ok(None);
        }
        let problem = single("quantize", group)?;
        let norm_squared = problem.metric.norm_squared(problem.weight, problem.backend);
        let (mut curve, mut notes) = (vec![Point { bytes: 0, error: norm_squared }], Vec::new());
        let mut solved = vec![None];
        for (bits, bytes) in self.offered(problem.shape(), problem.dtype) {
            notes.clear();
            let found = self.weight(problem, bits, &mut notes)?;
            let error = problem.error_of(&found);
            solved.push(Some(vec![found]));
            // A width that is no better than a lesser one is never chosen.
            let before = curve.last().map_or(error, |point| point.error);
            curve.push(Point { bytes, error: error.max(0.0).min(before) });
        }
        curve.push(Point { bytes: problem.bytes(), error: 0.0 });
        Ok(Some(Decomposition { norm_squared, curve, notes, solved, ..Decomposition::default() }))
    }

    fn has_curve(&self) -> bool {
        self.inner.is_none()
    }

    fn assemble(&self, group: &[Problem<'_, T>], found: &Decomposition<T>) -> Result<Vec<Operator<T>>> {
        let problem = single("quantize", group)?;
        let choice = found.choose(&problem.budget, problem.bytes())?;
        // Choice 0, nothing, is a weight of zeros: any width holds that.
        match found.solved.get(choice.max(1)) {
            Some(Some(operators)) => Ok(operators.clone()),
            _ => problem.dense(),
        }
    }

    fn forecast(&self, group: &[Outline], metric: &MetricSpec, budget: &Budget) -> Result<Forecast> {
        self.check()?;
        budget.check()?;
        let before: u64 = group.iter().map(Outline::bytes).sum();
        let (mut numbers, mut inputs) = (0, 0);
        for outline in group {
            numbers = numbers.max(outline.shape.0 * outline.shape.1);
            inputs = inputs.max(outline.shape.1);
        }
        // Target, entries, errors, scales and zero points twice; H in both precisions and its factor.
        let own = (8 * size_of::<T>() * numbers + if metric.is_gram() { 32 * inputs * inputs } else { 0 }) as u64;
        let Some(method) = &self.inner else {
            let outline = outline("quantize", group, budget)?;
            let bytes = match budget.byte_limit(before) {
                Some(_) => self
                    .fitting(outline.shape, outline.dtype, budget)?
                    .map_or(before, |bits| self.bytes(outline.shape, bits, outline.dtype)),
                None => before,
            };
            return Ok(Forecast { bytes, exact: budget.byte_limit(before).is_some(), memory: own });
        };
        let bits = self.bits.unwrap_or(INNER);
        let (shape, dtype) = group.first().map_or(((1, 1), DType::BF16), |outline| (outline.shape, outline.dtype));
        if bits == WHOLE {
            return Factorize::<T>::forecast(&**method, group, metric, budget);
        }
        let room = match (budget, budget.byte_limit(before)) {
            (_, Some(limit)) if limit >= before => return Ok(Forecast { bytes: before, exact: true, memory: own }),
            (_, Some(limit)) => {
                Budget::Bytes(((limit as f64 / self.ratio(bits, shape, dtype)) as u64).min(before.saturating_sub(1)))
            }
            (Budget::Rank(_), None) => *budget,
            (other, None) => return Err(no_error(other)),
        };
        let inner = Factorize::<T>::forecast(&**method, group, metric, &room)?;
        let bytes = budget.byte_limit(before).unwrap_or(inner.bytes);
        Ok(Forecast { bytes, exact: false, memory: inner.memory + own })
    }
}
