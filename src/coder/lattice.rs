//! Numbers on a grid: minimise tr((Ŵ−W)·H·(Ŵ−W)ᵀ) where entry (i, j) is sᵢⱼ·(q − zᵢⱼ), q an integer in 0 … top.
//!
//! [`Lattice::walk`] is GPTQ (Frantar et al., ICLR 2023): left to right, each column is rounded to the nearest
//! entries, and later ones make up for what that lost; in the form of [`obs`](super::obs()), without an
//! inverse. [`Lattice::sweep`] goes on by coordinate descent: with everything else fixed, the error is a
//! parabola in one entry, and the best integer is the one nearest its vertex
//!
//! > ŵ_c − g_c ÷ H_cc,  g = H·(Ŵ−W)
//!
//! [`Lattice::rescale`] moves the scale of a group, its codes fixed, to the vertex of its own parabola. The error
//! never rises in either. A scale of zero holds its entry at zero, and so a support is kept.

use ndarray::{Array2, ArrayView2, s};
use pulp::{Arch, Simd, WithSimd};

use super::obs::before;
use super::{BLOCK, Factor, Strip, each, strips};
use crate::error::{Error, Result};
use crate::linalg::matmul_into;
use crate::scalar::{DType, Real};

/// A matrix on its way down, entries on a grid.
#[derive(Debug)]
pub struct Lattice<T> {
    shape: (usize, usize),
    top: T,
    strips: Vec<Rounded<T>>,
}

/// Some rows, transposed, and their grid.
#[derive(Debug)]
struct Rounded<T> {
    strip: Strip<T>,
    steps: Array2<T>,
    zeros: Array2<T>,
}

/// The integer nearest to v ≥ 0, which must be small against the type's precision; ties to even.
#[inline(always)]
fn nearest<T: Real>(v: T, magic: T) -> T {
    (v + magic) - magic
}

/// What added and taken away again rounds to an integer.
pub(super) fn magic<T: Real>() -> T {
    T::from_f64(1.5) / T::epsilon()
}

/// The entry nearest to v.
#[inline(always)]
pub(super) fn round<T: Real>(v: T, step: T, inverse: T, zero: T, top: T, magic: T) -> T {
    let code = (v * inverse + zero).max(T::zero()).min(top);
    step * (nearest(code, magic) - zero)
}

impl<T: Real> Lattice<T> {
    /// The nearest entries. `steps` and `zeros` are m×n like the target; `top` is the largest code.
    ///
    /// # Errors
    /// [`Error::Shape`] if shapes differ.
    pub fn new(target: ArrayView2<'_, T>, steps: ArrayView2<'_, T>, zeros: ArrayView2<'_, T>, top: u8) -> Result<Self> {
        if steps.dim() != target.dim() || zeros.dim() != target.dim() {
            return Err(Error::shape(target.dim(), (steps.dim(), zeros.dim())));
        }
        let top = T::from_f64(top.into());
        let turned = |a: ArrayView2<'_, T>| strips(a).into_iter().map(|strip| strip.target);
        let parts = strips(target).into_iter().zip(turned(steps).zip(turned(zeros)));
        let strips = parts.map(|(strip, (steps, zeros))| Rounded { strip, steps, zeros });
        let mut lattice = Lattice { shape: target.dim(), top, strips: strips.collect() };
        each(&mut lattice.strips, |part| part.nearest(top));
        Ok(lattice)
    }

    /// The same, begun at entries of the grid.
    ///
    /// # Errors
    /// [`Error::Shape`] if shapes differ.
    pub fn begin(&mut self, start: ArrayView2<'_, T>) -> Result<()> {
        if start.dim() != self.shape {
            return Err(Error::shape(self.shape, start.dim()));
        }
        for (part, from) in self.strips.iter_mut().zip(strips(start)) {
            part.strip.error = &from.target - &part.strip.target;
            part.strip.coded = from.target;
        }
        Ok(())
    }

    /// GPTQ's pass over all columns, left to right; what was there before is forgotten. mn² flops.
    ///
    /// # Errors
    /// [`Error::Shape`] if the factor is of another size.
    pub fn walk(&mut self, factor: &Factor<T>) -> Result<()> {
        let (n, upper, top) = (self.shape.1, factor.upper(), self.top);
        if upper.dim() != (n, n) {
            return Err(Error::shape((n, n), upper.dim()));
        }
        each(&mut self.strips, |part| {
            for start in (0..n).step_by(BLOCK) {
                let end = (start + BLOCK).min(n);
                let sums = before(&part.strip, upper, start, end);
                part.settle(Pass::Walk, sums, upper, start, top);
            }
        });
        Ok(())
    }

    /// One pass of coordinate descent; the error does not rise. 2mn² flops.
    ///
    /// # Errors
    /// [`Error::Shape`] if H is of another size.
    pub fn sweep(&mut self, form: ArrayView2<'_, T>) -> Result<()> {
        let (n, top) = (self.shape.1, self.top);
        if form.dim() != (n, n) {
            return Err(Error::shape((n, n), form.dim()));
        }
        each(&mut self.strips, |part| {
            for start in (0..n).step_by(BLOCK) {
                let end = (start + BLOCK).min(n);
                let forces = part.forces(form, start, end);
                part.settle(Pass::Sweep, forces, form, start, top);
            }
        });
        Ok(())
    }

    /// Moves the scale of each group of `group` columns to its best, rounded to `dtype`; the error does not rise.
    /// All entries of a group must have one scale, or none. 2mn² flops.
    ///
    /// # Errors
    /// [`Error::Shape`] if H is of another size.
    pub fn rescale(&mut self, form: ArrayView2<'_, T>, group: usize, dtype: DType) -> Result<()> {
        let n = self.shape.1;
        if form.dim() != (n, n) {
            return Err(Error::shape((n, n), form.dim()));
        }
        each(&mut self.strips, |part| {
            for start in (0..n).step_by(group.max(1)) {
                part.rescale(form, start, (start + group).min(n), dtype);
            }
        });
        Ok(())
    }

    /// tr((Ŵ−W)·H·(Ŵ−W)ᵀ) now. 2mn² flops.
    ///
    /// # Errors
    /// [`Error::Shape`] if H is of another size.
    pub fn error(&mut self, form: ArrayView2<'_, T>) -> Result<f64> {
        let n = self.shape.1;
        if form.dim() != (n, n) {
            return Err(Error::shape((n, n), form.dim()));
        }
        let of = |part: &mut Rounded<T>| -> f64 {
            let (forces, error) = (part.forces(form, 0, n), &part.strip.error);
            forces.iter().zip(error).map(|(f, e)| f.wide() * e.wide()).sum()
        };
        Ok(each(&mut self.strips, of).into_iter().sum())
    }

    /// The entries reached, m×n.
    pub fn values(&self) -> Array2<T> {
        self.join(|part| &part.strip.coded)
    }

    /// Their scales, m×n.
    pub fn steps(&self) -> Array2<T> {
        self.join(|part| &part.steps)
    }

    fn join(&self, which: impl Fn(&Rounded<T>) -> &Array2<T>) -> Array2<T> {
        let mut all = Array2::zeros(self.shape);
        for part in &self.strips {
            let (first, rows) = (part.strip.first, part.strip.rows);
            all.slice_mut(s![first..first + rows, ..]).assign(&which(part).slice(s![.., ..rows]).t());
        }
        all
    }
}

impl<T: Real> Rounded<T> {
    fn nearest(&mut self, top: T) {
        let magic = magic();
        ndarray::Zip::from(&mut self.strip.coded)
            .and(&mut self.strip.error)
            .and(&self.strip.target)
            .and(&self.steps)
            .and(&self.zeros)
            .for_each(|coded, error, &target, &step, &zero| {
                *coded = round(target, step, inverse(step), zero, top, magic);
                *error = *coded - target;
            });
    }

    /// H·(Ŵ−W) in columns `start..end`, (block × lanes).
    fn forces(&self, form: ArrayView2<'_, T>, start: usize, end: usize) -> Array2<T> {
        let mut forces = Array2::zeros((end - start, self.strip.width()));
        matmul_into(T::one(), form.slice(s![start..end, ..]), self.strip.error.view(), T::zero(), forces.view_mut());
        forces
    }

    /// Settles the columns of a block one after the other, `tile` being what those to its left (of a walk) or all
    /// (of a sweep) do to it.
    fn settle(&mut self, pass: Pass, tile: Array2<T>, form: ArrayView2<'_, T>, start: usize, top: T) {
        let (end, width) = (start + tile.nrows(), self.strip.width());
        let form = form.slice(s![start..end, start..end]).as_standard_layout().into_owned();
        let rows = s![start..end, ..];
        let (mut coded, mut error) = (self.strip.coded.slice_mut(rows), self.strip.error.slice_mut(rows));
        let (target, steps, zeros) = (self.strip.target.slice(rows), self.steps.slice(rows), self.zeros.slice(rows));
        let mut tile = tile;
        if let (Some(tile), Some(form), Some(coded), Some(error), Some(target), Some(steps), Some(zeros)) = (
            tile.as_slice_mut(),
            form.as_slice(),
            coded.as_slice_mut(),
            error.as_slice_mut(),
            target.to_slice(),
            steps.to_slice(),
            zeros.to_slice(),
        ) {
            Arch::new().dispatch(Settle { pass, width, tile, form, coded, error, target, steps, zeros, top });
        }
    }

    fn rescale(&mut self, form: ArrayView2<'_, T>, start: usize, end: usize, dtype: DType) {
        let forces = self.forces(form, start, end);
        let mut numbers = self.strip.coded.slice(s![start..end, ..]).to_owned();
        numbers.zip_mut_with(&self.steps.slice(s![start..end, ..]), |number, &step| *number *= inverse(step));
        let mut image = Array2::zeros(numbers.dim());
        matmul_into(T::one(), form.slice(s![start..end, start..end]), numbers.view(), T::zero(), image.view_mut());
        let width = self.strip.width();
        let (mut along, mut curvature) = (vec![0.0; width], vec![0.0; width]);
        for ((number, force), image) in numbers.rows().into_iter().zip(forces.rows()).zip(image.rows()) {
            let sums = along.iter_mut().zip(&mut curvature);
            for ((along, curvature), ((number, force), image)) in sums.zip(number.iter().zip(force).zip(image)) {
                *along += number.wide() * force.wide();
                *curvature += number.wide() * image.wide();
            }
        }
        // The new scale of each row, the old one where there is no better.
        let moved: Vec<T> = (0..width)
            .map(|lane| {
                let scales = (start..end).map(|c| self.steps[(c, lane)]);
                let step = scales.into_iter().find(|&step| step != T::zero()).unwrap_or_default();
                let (along, curvature) = (along[lane], curvature[lane]);
                if curvature.is_nan() || curvature <= 0.0 || step == T::zero() {
                    return step;
                }
                let moved = T::from_f64(step.wide() - along / curvature).round_to(dtype);
                let by = moved.wide() - step.wide();
                // After rounding a step may lead up again; a scale of zero would lose its codes.
                let worse = moved == T::zero() || !moved.is_finite() || by * (2.0 * along + by * curvature) >= 0.0;
                if worse { step } else { moved }
            })
            .collect();
        let magic = magic();
        for (c, number) in (start..end).zip(numbers.rows()) {
            let (mut steps, mut coded) = (self.steps.row_mut(c), self.strip.coded.row_mut(c));
            let (mut error, target, zeros) = (self.strip.error.row_mut(c), self.strip.target.row(c), self.zeros.row(c));
            for lane in (0..width).filter(|&lane| steps[lane] != T::zero()).collect::<Vec<_>>() {
                // The quotient may be off by rounding; a code is an integer above its zero point.
                let value = moved[lane] * (nearest(number[lane] + zeros[lane], magic) - zeros[lane]);
                (steps[lane], coded[lane], error[lane]) = (moved[lane], value, value - target[lane]);
            }
        }
    }
}

/// Which way a block is settled.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Pass {
    /// GPTQ's: the form is the factor R, and an entry makes up for what those before it lost.
    Walk,
    /// The form is H, and an entry goes to its vertex.
    Sweep,
}

/// A block of columns, transposed: block × width each, with block × block of the form.
struct Settle<'a, T> {
    pass: Pass,
    width: usize,
    tile: &'a mut [T],
    form: &'a [T],
    coded: &'a mut [T],
    error: &'a mut [T],
    target: &'a [T],
    steps: &'a [T],
    zeros: &'a [T],
    top: T,
}

impl<T: Real> WithSimd for Settle<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Settle { pass, width, tile, form, coded, error, target, steps, zeros, top } = self;
        let (lanes, block) = (T::lanes::<S>(), tile.len() / width.max(1));
        let (zero, one, magic, top) =
            (T::splat(s, T::zero()), T::splat(s, T::one()), T::splat(s, magic()), T::splat(s, top));
        for lane in (0..width).step_by(lanes) {
            for c in 0..block {
                let at = c * width + lane;
                let row = &form[c * block..(c + 1) * block];
                if row[c] <= T::zero() {
                    continue;
                }
                let per = T::splat(s, T::one() / row[c]);
                let (want, now, step) = (T::load(s, &target[at..]), T::load(s, &coded[at..]), T::load(s, &steps[at..]));
                let from = if pass == Pass::Walk { want } else { now };
                let vertex = T::fnma(s, T::load(s, &tile[at..]), per, from);
                // A scale of zero has an inverse of zero: its entry stays at zero.
                let there = T::if_less(s, zero, T::vabs(s, step), step, one);
                let inverse = T::vdiv(s, T::if_less(s, zero, T::vabs(s, step), one, zero), there);
                let middle = T::load(s, &zeros[at..]);
                let code = T::vmax(s, T::fma(s, vertex, inverse, middle), zero);
                let code = T::if_less(s, code, top, code, top);
                let code = T::vsub(s, T::vadd(s, code, magic), magic);
                let value = T::vmul(s, step, T::vsub(s, code, middle));
                let delta = T::vsub(s, value, from);
                T::store(s, &mut coded[at..], value);
                T::store(s, &mut error[at..], T::vsub(s, value, want));
                for (j, &r) in row.iter().enumerate().skip(c + 1) {
                    let to = &mut tile[j * width + lane..];
                    T::store(s, to, T::fma(s, delta, T::splat(s, r), T::load(s, to)));
                }
            }
        }
    }
}

#[inline(always)]
fn inverse<T: Real>(step: T) -> T {
    if step == T::zero() { T::zero() } else { T::one() / step }
}

#[cfg(test)]
mod tests;
