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
use crate::operator::{Dense, Grid, ZeroPoint, ZeroPoints, scale_dtype};
use crate::scalar::{DType, Real};

/// The layout of a grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Levels {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group: usize,
    /// Where zero is.
    pub zero: ZeroPoint,
}

impl Levels {
    /// The largest code.
    pub fn top(self) -> u8 {
        u8::MAX >> (8 - self.bits.clamp(1, 8))
    }

    /// The step of a grid over such a fraction of what lies between the least and the largest entry.
    fn step(self, (least, most): (f64, f64), range: f64) -> f64 {
        let top = f64::from(self.top());
        match self.zero {
            ZeroPoint::None => most.max(-least) * range / ((top + 1.0) / 2.0),
            ZeroPoint::Integer | ZeroPoint::Float => (most - least) * range / top,
        }
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
        let most = if self.zero == ZeroPoint::None { middle / (middle - 1.0) } else { 1.02 };
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
    let target = target.as_standard_layout();
    let part_of = |part: &[T]| T::from_f64(levels.step(extent(part, levels.zero), 0.4));
    let rows = |i: usize| target.row(i).to_slice().unwrap_or_default().to_vec();
    let first: Vec<T> = (0..m).flat_map(|i| rows(i).chunks(group).map(part_of).collect::<Vec<_>>()).collect();
    let first = Array2::from_shape_vec((m, groups), first).unwrap_or_default();
    // Zero points that are floats have the same dtype.
    let largest = match levels.zero {
        ZeroPoint::Float => target.iter().fold(0.0, |most: f64, v| most.max(v.wide().abs())),
        ZeroPoint::None | ZeroPoint::Integer => 0.0,
    };
    let dtype = scale_dtype(first.view(), largest);
    let arch = Arch::new();
    let one = |i: usize| -> Vec<Place<T>> {
        let weights = weights.row(i).to_vec();
        arch.dispatch(Row {
            row: target.row(i).to_slice().unwrap_or_default(),
            weights: &weights,
            group,
            levels,
            dtype,
        })
    };
    let found: Vec<Vec<Place<T>>> = match rayon::current_thread_index() {
        Some(_) => (0..m).map(one).collect(),
        None => (0..m).into_par_iter().map(one).collect(),
    };
    let found = found.concat();
    let floats = |of: fn(&Place<T>) -> T| {
        let all = Array2::from_shape_vec((m, groups), found.iter().map(of).collect()).unwrap_or_default();
        Dense::rounded(all, dtype)
    };
    let zeros = match levels.zero {
        ZeroPoint::None => ZeroPoints::None,
        ZeroPoint::Integer => {
            let codes = found.iter().map(|place| place.zero.wide() as u8).collect();
            ZeroPoints::Integer(Array2::from_shape_vec((m, groups), codes).unwrap_or_default())
        }
        ZeroPoint::Float => ZeroPoints::Float(floats(|place| place.offset)?),
    };
    Grid::new(levels.bits, group, floats(|place| place.step)?, zeros)
}

/// The least and the largest entry of a group; zero is among them where the grid has it.
fn extent<T: Real>(part: &[T], zero: ZeroPoint) -> (f64, f64) {
    let first = if zero == ZeroPoint::Float { part.first().copied().unwrap_or_default() } else { T::zero() };
    let both = part.iter().fold((first, first), |(least, most), &v| (least.min(v), most.max(v)));
    (both.0.wide(), both.1.wide())
}

/// The weighted mean of a group; the plain one where nothing counts.
fn mean<T: Real>(part: &[T], weights: &[T]) -> f64 {
    let sums = part.iter().zip(weights).fold((0.0, 0.0), |(sum, count), (v, w)| {
        let w = w.wide().max(1e-300);
        (sum + w * v.wide(), count + w)
    });
    sums.0 / sums.1
}

/// Where the numbers of a group are: step·(code − zero) + offset.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Place<T> {
    step: T,
    zero: T,
    offset: T,
}

/// A row, to find the place of each of its groups.
struct Row<'a, T> {
    row: &'a [T],
    weights: &'a [T],
    group: usize,
    levels: Levels,
    dtype: DType,
}

impl<T: Real> WithSimd for Row<'_, T> {
    type Output = Vec<Place<T>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<Place<T>> {
        let mut found = Vec::with_capacity(self.row.len().div_ceil(self.group));
        // (A closure, as `map` takes, would not be compiled for the vectors of S.)
        for (part, weights) in self.row.chunks(self.group).zip(self.weights.chunks(self.group)) {
            found.push(match self.levels.zero {
                ZeroPoint::Float => best::<S, T, true>(s, part, weights, self.levels, self.dtype),
                _ => best::<S, T, false>(s, part, weights, self.levels, self.dtype),
            });
        }
        found
    }
}

/// Least-squares steps of the best place that was tried.
const FITS: usize = 3;

#[inline(always)]
fn best<S: Simd, T: Real, const FREE: bool>(s: S, part: &[T], weights: &[T], levels: Levels, dtype: DType) -> Place<T> {
    let (top, wide) = (T::from_f64(levels.top().into()), f64::from(levels.top()));
    let middle = T::from_f64((wide + 1.0) / 2.0);
    let (least, most) = extent(part, levels.zero);
    let rounded = |v: f64| T::from_f64(v).round_to(dtype);
    let usable = |step: f64| Some(rounded(step)).filter(|&step| step != T::zero() && step.is_finite());
    // A range is narrowed towards the mean.
    let mean = if FREE { mean(part, weights) } else { 0.0 };
    let center = |range: f64| if FREE { mean + range * (0.5 * (least + most) - mean) } else { 0.0 };
    // At first all numbers are one.
    let mut found = Place { step: T::zero(), zero: middle, offset: rounded(center(0.0)) };
    if least == most {
        return found;
    }
    let mut lost = loss::<S, T, FREE>(s, part, weights, found, top);
    for range in levels.ranges() {
        let step = levels.step((least, most), range);
        let zero = T::from_f64((-least * range / step).round().clamp(0.0, wide));
        let place = |step: f64, zero: T, offset: f64| {
            Some(Place { step: usable(step)?, zero, offset: if FREE { rounded(offset) } else { T::zero() } })
        };
        let places = match levels.zero {
            // There is one level more on one side: it may be either.
            ZeroPoint::None if levels.bits <= 5 => [place(-step, middle, 0.0), place(step, middle, 0.0)],
            ZeroPoint::None if most > -least => [place(-step, middle, 0.0), None],
            ZeroPoint::None => [place(step, middle, 0.0), None],
            ZeroPoint::Integer => [place(step, zero, 0.0), None],
            // The middle of all codes is half a step below the middle code; or zero is on the grid.
            ZeroPoint::Float => {
                [place(step, middle, center(range) + 0.5 * step), place(step, middle, step * (middle - zero).wide())]
            }
        };
        for place in places.into_iter().flatten() {
            let now = loss::<S, T, FREE>(s, part, weights, place, top);
            if now.error < lost.error {
                (found, lost) = (place, now);
            }
        }
    }
    for _ in 0..FITS {
        let (step, offset) = lost.fit::<FREE>(found);
        let Some(step) = usable(step) else { break };
        let place = Place { step, offset: rounded(offset), ..found };
        if place == found || !place.offset.is_finite() {
            break;
        }
        let now = loss::<S, T, FREE>(s, part, weights, place, top);
        if now.error >= lost.error {
            break;
        }
        (found, lost) = (place, now);
    }
    found
}

/// Weighted sums over a group of values v (less the offset), numbers k = code − zero of the nearest, and errors; in each
/// lane, or of all.
struct Sums<V> {
    error: V,
    /// Σ w·v·k, Σ w·k².
    along: V,
    squares: V,
    /// Σ w, Σ w·k, Σ w·v: where offsets are free.
    counts: V,
    numbers: V,
    values: V,
}

impl<T: Real> Sums<T> {
    /// The step and offset that fit these numbers best.
    #[inline(always)]
    fn fit<const FREE: bool>(&self, at: Place<T>) -> (f64, f64) {
        let (along, squares, step) = (self.along.wide(), self.squares.wide(), at.step.wide());
        if !FREE {
            return (if squares > 0.0 { along / squares } else { step }, 0.0);
        }
        let (counts, numbers, values) = (self.counts.wide(), self.numbers.wide(), self.values.wide());
        let determinant = counts * squares - numbers * numbers;
        let flat = determinant <= 1e-6 * counts * squares;
        let step = if flat { step } else { (counts * along - numbers * values) / determinant };
        let shift = if counts > 0.0 { (values - step * numbers) / counts } else { 0.0 };
        (step, at.offset.wide() + shift)
    }
}

/// What is lost where each value goes to its nearest number.
#[inline(always)]
fn loss<S: Simd, T: Real, const FREE: bool>(s: S, part: &[T], weights: &[T], at: Place<T>, top: T) -> Sums<T> {
    let none = T::splat(s, T::zero());
    let mut sums = Sums { error: none, along: none, squares: none, counts: none, numbers: none, values: none };
    let inverse = T::splat(s, if at.step == T::zero() { T::zero() } else { T::one() / at.step });
    let (step, zero, offset) = (T::splat(s, at.step), T::splat(s, at.zero), T::splat(s, at.offset));
    let (top, magic) = (T::splat(s, top), T::splat(s, magic()));
    let nearest = Nearest { inverse, step, zero, offset, top, magic, none };
    let ((vectors, rest), (weighed, weighed_rest)) = (T::vectors::<S>(part), T::vectors::<S>(weights));
    for (&value, &weight) in vectors.iter().zip(weighed) {
        nearest.add::<S, T, FREE>(s, value, weight, &mut sums);
    }
    if !rest.is_empty() {
        // Beyond the end weights are zero.
        nearest.add::<S, T, FREE>(s, T::load(s, rest), T::load(s, weighed_rest), &mut sums);
    }
    Sums {
        error: T::vsum(s, sums.error),
        along: T::vsum(s, sums.along),
        squares: T::vsum(s, sums.squares),
        counts: T::vsum(s, sums.counts),
        numbers: T::vsum(s, sums.numbers),
        values: T::vsum(s, sums.values),
    }
}

/// A place, in all lanes.
struct Nearest<V> {
    inverse: V,
    step: V,
    zero: V,
    offset: V,
    top: V,
    magic: V,
    none: V,
}

impl<V: Copy> Nearest<V> {
    /// Adds what a vector of values makes of the sums.
    #[inline(always)]
    fn add<S: Simd, T: Real<V<S> = V>, const FREE: bool>(&self, s: S, value: V, weight: V, sums: &mut Sums<V>) {
        let value = if FREE { T::vsub(s, value, self.offset) } else { value };
        let code = T::vmax(s, T::fma(s, value, self.inverse, self.zero), self.none);
        let code = T::if_less(s, code, self.top, code, self.top);
        let number = T::vsub(s, T::vsub(s, T::vadd(s, code, self.magic), self.magic), self.zero);
        let error = T::fnma(s, self.step, number, value);
        sums.error = T::fma(s, T::vmul(s, weight, error), error, sums.error);
        sums.along = T::fma(s, T::vmul(s, weight, value), number, sums.along);
        sums.squares = T::fma(s, T::vmul(s, weight, number), number, sums.squares);
        if FREE {
            sums.counts = T::vadd(s, sums.counts, weight);
            sums.numbers = T::fma(s, weight, number, sums.numbers);
            sums.values = T::fma(s, weight, value, sums.values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::architectures;

    struct Lost<'a, T, const FREE: bool>(&'a [T], &'a [T], Place<T>, T);

    impl<T: Real, const FREE: bool> WithSimd for Lost<'_, T, FREE> {
        type Output = Sums<T>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, s: S) -> Sums<T> {
            loss::<S, T, FREE>(s, self.0, self.1, self.2, self.3)
        }
    }

    fn all<T>(sums: &Sums<T>) -> [&T; 6] {
        [&sums.error, &sums.along, &sums.squares, &sums.counts, &sums.numbers, &sums.values]
    }

    fn equals_the_sums_of_the_definition<T: Real, const FREE: bool>(slack: f64) {
        let top = 7.0;
        for (arch, count) in architectures().into_iter().flat_map(|arch| [1, 5, 16, 24, 61].map(|count| (arch, count)))
        {
            let number = |j: usize, factor: usize| T::from_f64((j * factor % 101) as f64 / 64.0 - 0.75);
            let part: Vec<T> = (0..count).map(|j| number(j, 37)).collect();
            let weights: Vec<T> = (0..count).map(|j| number(j, 29) * number(j, 29) + T::one()).collect();
            // (Negative steps are steps; some values are beyond either end.)
            for (step, zero, offset) in [(0.17, 4.0, 0.11), (-0.09, 3.0, -0.2), (0.0, 4.0, 0.3)] {
                let at = Place { step: T::from_f64(step), zero: T::from_f64(zero), offset: T::from_f64(offset) };
                let found = arch.dispatch(Lost::<T, FREE>(&part, &weights, at, T::from_f64(top)));
                let mut expected = [0.0; 6];
                for (v, w) in part.iter().zip(&weights).map(|(v, w)| (v.wide(), w.wide())) {
                    let v = if FREE { v - at.offset.wide() } else { v };
                    let code = if step == 0.0 { zero } else { (v / at.step.wide() + zero).clamp(0.0, top).round() };
                    let k = code - zero;
                    let error = v - at.step.wide() * k;
                    let terms = [w * error * error, w * v * k, w * k * k, w, w * k, w * v];
                    let counted = if FREE { 6 } else { 3 };
                    (0..counted).for_each(|sum| expected[sum] += terms[sum]);
                }
                for (which, (found, expected)) in all(&found).into_iter().zip(expected).enumerate() {
                    let off = (found.wide() - expected).abs();
                    assert!(
                        off <= slack * (1.0 + expected.abs()),
                        "{arch:?}, {count}, {step}, sum {which}: off by {off}"
                    );
                }
            }
        }
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        equals_the_sums_of_the_definition::<f64, false>(1e-12);
        equals_the_sums_of_the_definition::<f64, true>(1e-12);
        equals_the_sums_of_the_definition::<f32, false>(1e-4);
        equals_the_sums_of_the_definition::<f32, true>(1e-4);
    }
}
