//! Copying a group of slices into a buffer that holds one of them in each lane.

use ndarray::{ArrayView1, ArrayView2, Axis};
use pulp::{Simd, bytemuck};

use crate::scalar::Real;
use crate::simd::{Lanes, take};

/// No vector has more lanes.
pub(super) const LANES: usize = 16;
/// A slice whose largest entry is within 2^±8 needs no scaling.
const NEAR_ONE: i32 = 8;
/// 2^±126 are normal numbers of every type.
const LARGEST_POWER: i32 = 126;

/// Slices of one shape side by side, one in each lane: column j of all is `values[j·stride..][..long]`; there are at
/// most as many columns as rows.
pub(super) struct Packed<'a, S: Simd, T: Lanes> {
    pub(super) values: &'a mut [T::V<S>],
    pub(super) stride: usize,
    /// Rows.
    pub(super) long: usize,
    /// The largest absolute value of each.
    largest: [T::V<S>; 1],
}

impl<'a, S: Simd, T: Real> Packed<'a, S, T> {
    /// Vectors of memory for slices of a shape.
    pub(super) fn memory((long, short): (usize, usize)) -> usize {
        (long | 1) * short
    }

    /// Copies up to a vector's width of slices, all of one shape with no more columns than rows; lanes
    /// without a slice are zero.
    #[inline(always)]
    pub(super) fn new(s: S, memory: &mut &'a mut [T::V<S>], slices: &[ArrayView2<'_, T>]) -> Self {
        let (long, short) = slices.first().map_or((0, 0), |slice| slice.dim());
        // An odd stride spreads the columns over the sets of the cache.
        let stride = long | 1;
        let values = take(memory, stride * short);
        let mut lines = Lines::new(long);
        let mut largest = [T::splat(s, T::zero()); 4];
        let mut note = |i: usize, v: T::V<S>| largest[i % 4] = T::vmax(s, T::vabs(s, v), largest[i % 4]);
        if slices.iter().all(|slice| slice.strides()[1] == 1) {
            for i in 0..long {
                let rows = slices.iter().map(|slice| slice.index_axis(Axis(0), i));
                lines.transpose(s, rows, |j, v| {
                    note(j, v);
                    values[j * stride + i] = v;
                });
            }
        } else {
            for (j, column) in values.chunks_exact_mut(stride).enumerate() {
                let columns = slices.iter().map(|slice| slice.index_axis(Axis(1), j));
                lines.transpose(s, columns, |i, v| {
                    note(i, v);
                    column[i] = v;
                });
            }
        }
        let largest = T::vmax(s, T::vmax(s, largest[0], largest[1]), T::vmax(s, largest[2], largest[3]));
        Packed { values, stride, long, largest: [largest] }
    }

    /// The columns of all slices.
    #[inline(always)]
    pub(super) fn columns(&self) -> impl Iterator<Item = &[T::V<S>]> {
        self.values.chunks_exact(self.stride).map(|column| &column[..self.long])
    }

    /// Multiplies each slice by a power of two, so that squares neither overflow nor vanish; returns the exponents.
    #[inline(always)]
    pub(super) fn scale(&mut self, s: S) -> [i32; LANES] {
        let mut exponents = [0; LANES];
        let largest: &[T] = bytemuck::cast_slice(&self.largest);
        for (exponent, max) in exponents.iter_mut().zip(largest) {
            if *max > T::zero() {
                let power = max.log2().floor().wide() as i32;
                *exponent = if power.abs() <= NEAR_ONE { 0 } else { -power.clamp(-LARGEST_POWER, LARGEST_POWER) };
            }
        }
        if exponents.iter().any(|&e| e != 0) {
            let mut factor = [T::splat(s, T::one()); 1];
            let factors: &mut [T] = bytemuck::cast_slice_mut(&mut factor);
            factors.iter_mut().zip(exponents).for_each(|(f, e)| *f = T::from_f64(2f64.powi(e)));
            self.values.iter_mut().for_each(|v| *v = T::vmul(s, *v, factor[0]));
        }
        exponents
    }
}

/// Room for a line of each slice.
struct Lines<T> {
    zeros: Vec<T>,
    copies: Vec<T>,
}

impl<T: Real> Lines<T> {
    fn new(longest: usize) -> Self {
        Lines { zeros: vec![T::zero(); longest], copies: Vec::new() }
    }

    /// Calls `put` with the i-th elements of all lines as a vector, for each i.
    #[inline(always)]
    fn transpose<'a, S: Simd>(
        &mut self,
        s: S,
        views: impl Iterator<Item = ArrayView1<'a, T>> + Clone,
        mut put: impl FnMut(usize, T::V<S>),
    ) where
        T: 'a,
    {
        let width = T::lanes::<S>();
        let length = views.clone().next().map_or(0, |view| view.len());
        let mut lines: [&[T]; LANES] = [&self.zeros[..length]; LANES];
        if views.clone().any(|view| view.to_slice().is_none()) {
            self.copies.clear();
            views.clone().for_each(|view| self.copies.extend(view.iter()));
            lines.iter_mut().zip(self.copies.chunks_exact(length.max(1))).for_each(|(line, copy)| *line = copy);
        } else {
            lines.iter_mut().zip(views).for_each(|(line, view)| *line = view.to_slice().unwrap_or(*line));
        }
        let lines = &lines[..width];
        let whole = length - length % width;
        for start in (0..whole).step_by(width) {
            let mut tile = [T::splat(s, T::zero()); LANES];
            for row in 0..width {
                tile[row] = T::vectors::<S>(&lines[row][start..start + width]).0[0];
            }
            exchange::<S, T>(s, &mut tile);
            tile[..width].iter().enumerate().for_each(|(i, &v)| put(start + i, v));
        }
        let mut last = [T::splat(s, T::zero()); 1];
        for i in whole..length {
            let numbers: &mut [T] = bytemuck::cast_slice_mut(&mut last);
            numbers.iter_mut().zip(lines).for_each(|(number, line)| *number = line[i]);
            put(i, last[0]);
        }
    }
}

/// Transposes a square tile: blocks of 1, 2, 4, … off the diagonal change places (Eklundh, IEEE Trans. Computers
/// C-21, 1972).
#[inline(always)]
fn exchange<S: Simd, T: Real>(s: S, tile: &mut [T::V<S>; LANES]) {
    let (width, half) = (T::lanes::<S>(), T::splat(s, T::from_f64(0.5)));
    // Written out, so that the tile stays in registers and the permutations are constants.
    macro_rules! stage {
        ($block:literal: $($a:literal $b:literal),*) => {
            if $block < width {
                let mut odd = [T::splat(s, T::zero()); 1];
                let lanes: &mut [T] = bytemuck::cast_slice_mut(&mut odd);
                lanes.iter_mut().enumerate().for_each(|(i, odd)| *odd = T::from_f64(((i / $block) % 2) as f64));
                $(if $b < width {
                    let (a, b) = (tile[$a], tile[$b]);
                    tile[$a] = T::if_less(s, half, odd[0], T::rotate_right(s, b, $block), a);
                    tile[$b] = T::if_less(s, half, odd[0], b, T::rotate_right(s, a, width - $block));
                })*
            }
        };
    }
    stage!(1: 0 1, 2 3, 4 5, 6 7, 8 9, 10 11, 12 13, 14 15);
    stage!(2: 0 2, 1 3, 4 6, 5 7, 8 10, 9 11, 12 14, 13 15);
    stage!(4: 0 4, 1 5, 2 6, 3 7, 8 12, 9 13, 10 14, 11 15);
    stage!(8: 0 8, 1 9, 2 10, 3 11, 4 12, 5 13, 6 14, 7 15);
}
