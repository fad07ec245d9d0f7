//! Scales and zero points for a matrix: the grid of least weighted error when each entry goes to the nearest number.
//!
//! The range of a group, from its least to its largest entry (or as far to both sides), is narrowed step by
//! step: what is clipped loses more, all others gain from the finer grid. The best of these has its scale moved
//! to the least-squares fit of the codes that it gave. (Clipping by searched ranges: Sung et al., DAC 2015, and
//! most quantisers since; the fit is a step of Lloyd's.)

use ndarray::{Array2, ArrayView2};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::lattice::magic;
use crate::error::{Error, Result};
use crate::operator::{Dense, Grid, scale_dtype};
use crate::scalar::{DType, Real};

/// The layout of a grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Levels {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group: usize,
    /// Whether zero lies in the middle.
    pub symmetric: bool,
}

impl Levels {
    /// The largest code.
    pub fn top(self) -> u8 {
        u8::MAX >> (8 - self.bits.clamp(1, 8))
    }

    /// Fractions of the full range that are tried.
    fn ranges(self) -> impl Iterator<Item = f64> {
        let (least, count) = match self.bits {
            ..=2 => (0.40, 32),
            3 => (0.50, 24),
            4 => (0.60, 20),
            5 => (0.75, 12),
            6 => (0.85, 8),
            _ => (0.94, 5),
        };
        // Both ends of a symmetric grid can hold the largest entry if one level is left unused.
        let middle = (f64::from(self.top()) + 1.0) / 2.0;
        let most = if self.symmetric { middle / (middle - 1.0) } else { 1.02 };
        (0..=count).map(move |k| most - (most - least) * f64::from(k) / f64::from(count))
    }
}

/// The grid for a matrix whose squared errors count as `weights`, m×n both. Scales have 16 bits.
///
/// # Errors
/// [`Error::Shape`] if shapes differ or the layout makes no sense.
pub fn clip<T: Real>(target: ArrayView2<'_, T>, weights: ArrayView2<'_, T>, levels: Levels) -> Result<Grid<T>> {
    let (m, n) = target.dim();
    if weights.dim() != (m, n) {
        return Err(Error::shape((m, n), weights.dim()));
    }
    let group = levels.group.max(1);
    let groups = n.div_ceil(group);
    let (target, half) = (target.as_standard_layout(), T::from_f64((f64::from(levels.top()) + 1.0) / 2.0));
    let range = |part: &[T]| part.iter().fold(T::zero(), |a, v| a.max(v.abs())) / half;
    let rows = |i: usize| target.row(i).to_slice().unwrap_or_default().to_vec();
    let first: Vec<T> = (0..m).flat_map(|i| rows(i).chunks(group).map(range).collect::<Vec<_>>()).collect();
    let first = Array2::from_shape_vec((m, groups), first).unwrap_or_default();
    let dtype = scale_dtype(first.mapv(|step| step * T::from_f64(0.4)).view());
    let arch = Arch::new();
    let one = |i: usize| -> Vec<(T, u8)> {
        let weights = weights.row(i).to_vec();
        arch.dispatch(Row {
            row: target.row(i).to_slice().unwrap_or_default(),
            weights: &weights,
            group,
            levels,
            dtype,
        })
    };
    let found: Vec<Vec<(T, u8)>> = match rayon::current_thread_index() {
        Some(_) => (0..m).map(one).collect(),
        None => (0..m).into_par_iter().map(one).collect(),
    };
    let found = found.concat();
    let scales = Array2::from_shape_vec((m, groups), found.iter().map(|f| f.0).collect()).unwrap_or_default();
    let zeros = Array2::from_shape_vec((m, groups), found.iter().map(|f| f.1).collect()).unwrap_or_default();
    Grid::new(levels.bits, group, Dense::rounded(scales, dtype)?, (!levels.symmetric).then_some(zeros))
}

/// A row, to find scale and zero point of each of its groups.
struct Row<'a, T> {
    row: &'a [T],
    weights: &'a [T],
    group: usize,
    levels: Levels,
    dtype: DType,
}

impl<T: Real> WithSimd for Row<'_, T> {
    type Output = Vec<(T, u8)>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<(T, u8)> {
        let groups = self.row.chunks(self.group).zip(self.weights.chunks(self.group));
        groups.map(|(part, weights)| best(s, part, weights, self.levels, self.dtype)).collect()
    }
}

/// Least-squares steps of the best scale that was tried.
const FITS: usize = 3;

#[inline(always)]
fn best<S: Simd, T: Real>(s: S, part: &[T], weights: &[T], levels: Levels, dtype: DType) -> (T, u8) {
    let (top, wide) = (T::from_f64(levels.top().into()), f64::from(levels.top()));
    let middle = T::from_f64((wide + 1.0) / 2.0);
    let least = part.iter().fold(T::zero(), |a, &v| a.min(v)).wide();
    let most = part.iter().fold(T::zero(), |a, &v| a.max(v)).wide();
    if least == 0.0 && most == 0.0 {
        return (T::zero(), middle.wide() as u8);
    }
    let usable = |step: f64| {
        let step = T::from_f64(step).round_to(dtype);
        (step != T::zero() && step.is_finite()).then_some(step)
    };
    // Scale, zero point, error and the scale that fits its codes best; at first all zeros.
    let (error, fit) = loss(s, part, weights, T::zero(), middle, top);
    let mut found = (T::zero(), middle, error, fit);
    for range in levels.ranges() {
        // There is one level more on one side of a symmetric grid: it may be either.
        let (step, zero) = match levels.symmetric {
            true => (most.max(-least) * range / middle.wide(), middle),
            false => {
                let step = (most - least) * range / wide;
                (step, T::from_f64((-least * range / step).round().clamp(0.0, wide)))
            }
        };
        let sides: &[f64] = match levels.bits {
            _ if !levels.symmetric => &[1.0],
            ..=5 => &[-1.0, 1.0],
            _ if most > -least => &[-1.0],
            _ => &[1.0],
        };
        for step in sides.iter().filter_map(|side| usable(side * step)) {
            let (error, fit) = loss(s, part, weights, step, zero, top);
            if error < found.2 {
                found = (step, zero, error, fit);
            }
        }
    }
    for _ in 0..FITS {
        let Some(step) = usable(found.3.wide()).filter(|&step| step != found.0) else { break };
        let (error, fit) = loss(s, part, weights, step, found.1, top);
        if error >= found.2 {
            break;
        }
        found = (step, found.1, error, fit);
    }
    (found.0, found.1.wide() as u8)
}

/// Σ weight·(v − its nearest)², and the scale that fits those codes best.
#[inline(always)]
fn loss<S: Simd, T: Real>(s: S, part: &[T], weights: &[T], step: T, zero: T, top: T) -> (T, T) {
    let none = T::splat(s, T::zero());
    let inverse = T::splat(s, if step == T::zero() { T::zero() } else { T::one() / step });
    let (steps, zeros, tops, magic) = (T::splat(s, step), T::splat(s, zero), T::splat(s, top), T::splat(s, magic()));
    let (mut errors, mut along, mut squares) = (none, none, none);
    let mut add = |value: T::V<S>, weight: T::V<S>| {
        let code = T::vmax(s, T::fma(s, value, inverse, zeros), none);
        let code = T::if_less(s, code, tops, code, tops);
        let number = T::vsub(s, T::vsub(s, T::vadd(s, code, magic), magic), zeros);
        let error = T::fnma(s, steps, number, value);
        errors = T::fma(s, T::vmul(s, weight, error), error, errors);
        along = T::fma(s, T::vmul(s, weight, value), number, along);
        squares = T::fma(s, T::vmul(s, weight, number), number, squares);
    };
    let ((values, rest), (counts, counts_rest)) = (T::vectors::<S>(part), T::vectors::<S>(weights));
    values.iter().zip(counts).for_each(|(&value, &weight)| add(value, weight));
    if !rest.is_empty() {
        // Beyond the end weights are zero.
        add(T::load(s, rest), T::load(s, counts_rest));
    }
    let (errors, along, squares) = (T::vsum(s, errors), T::vsum(s, along), T::vsum(s, squares));
    (errors, if squares > T::zero() { along / squares } else { step })
}
