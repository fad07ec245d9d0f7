//! One row of packed codes at a time: written out, and its inner products with inputs as they are.

use ndarray::ArrayView1;
use pulp::Arch;

#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
use super::wide;
use super::{Beside, each_code};
#[cfg(target_arch = "x86_64")]
use super::{integer, narrow};
use crate::scalar::Real;

/// A row of codes with what makes numbers of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CodedRow<'a, T> {
    pub bits: u8,
    /// Columns that share a scale.
    pub group: usize,
    pub columns: usize,
    /// The codes of this row first; others may follow.
    pub codes: &'a [u8],
    pub beside: Beside<'a, T>,
}

impl<T: Real> CodedRow<'_, T> {
    /// Half of all levels: where a symmetric grid has its zero.
    fn half(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// Writes the row out.
    pub(crate) fn write(&self, arch: Arch, to: &mut [T]) {
        self.scaled(arch, to);
        for (part, &offset) in to.chunks_mut(self.group).zip(self.beside.offsets.unwrap_or_default()) {
            part.iter_mut().for_each(|v| *v += offset);
        }
    }

    /// The row without its offsets.
    fn scaled(&self, arch: Arch, to: &mut [T]) {
        #[cfg(target_arch = "x86_64")]
        if integer::write(self, to) {
            return;
        }
        self.unpack(arch, to);
        // Compiled for the machine at hand.
        arch.dispatch(|| {
            for (g, (part, &scale)) in to.chunks_mut(self.group).zip(self.beside.scales).enumerate() {
                let shift = self.beside.zeros.map_or(0, |zeros| i16::from(zeros[g]) - i16::from(self.half()));
                let shift = T::from_f64(shift.into());
                part.iter_mut().for_each(|v| *v = scale * (*v - shift));
            }
        });
    }

    /// All codes, counted from the middle.
    pub(super) fn unpack(&self, arch: Arch, to: &mut [T]) {
        #[allow(unused_mut)]
        let (mut done, half) = (0, i16::from(self.half()));
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        if let (Arch::V4(simd), true) = (arch, T::DTYPE == crate::scalar::DType::F32) {
            wide::unpack(simd, self.bits, self.codes, pulp::bytemuck::cast_slice_mut(&mut to[..self.columns]));
            done = self.columns / 16 * 16;
        }
        #[cfg(target_arch = "x86_64")]
        if let (Some(simd), 0, crate::scalar::DType::F32) = (narrow::available(arch), done, T::DTYPE) {
            narrow::unpack(simd, self.bits, self.codes, pulp::bytemuck::cast_slice_mut(&mut to[..self.columns]));
            done = self.columns / 8 * 8;
        }
        let _ = arch;
        // Eight codes end on a whole byte.
        let rest = &self.codes[done * usize::from(self.bits) / 8..];
        each_code(self.bits, rest, self.columns - done, |j, code| {
            to[done + j] = T::from_f64(f64::from(i16::from(code) - half));
        });
    }

    /// The inner products with some inputs.
    pub(super) fn dots(&self, arch: Arch, x: &[Plain<T>], y: &mut [T]) {
        // Codes count from the middle, so that large terms need not cancel; zero points shift what is left.
        y.iter_mut().zip(x).for_each(|(y, x)| *y = self.shift(x));
        #[cfg(target_arch = "x86_64")]
        if let (Some(simd), true, crate::scalar::DType::F32) =
            (narrow::available(arch), narrow::fits(self.group, self.columns), T::DTYPE)
        {
            for (x, y) in x.chunks(narrow::TOGETHER).zip(y.chunks_mut(narrow::TOGETHER)) {
                // What is missing is computed for nothing.
                let each = std::array::from_fn(|v| pulp::bytemuck::cast_slice(&x[v.min(x.len() - 1)].values));
                narrow::dots(simd, self, each, pulp::bytemuck::cast_slice_mut(y));
            }
            return;
        }
        let mut numbers = vec![T::zero(); self.columns];
        self.unpack(arch, &mut numbers);
        for (y, x) in y.iter_mut().zip(x) {
            let groups = numbers.chunks(self.group).zip(x.values.chunks(self.group)).zip(self.beside.scales);
            *y = groups.fold(*y, |total, ((numbers, inputs), &scale)| total + scale * inner(numbers, inputs));
        }
    }

    /// What zero points beside the middle and offsets add to an inner product.
    fn shift(&self, x: &Plain<T>) -> T {
        let Beside { scales, zeros, offsets } = self.beside;
        let middle = f64::from(self.half());
        let zeros = zeros.unwrap_or_default().iter().zip(scales);
        let zeros = zeros.map(|(&zero, &scale)| scale * T::from_f64(middle - f64::from(zero)));
        let each = zeros.zip(&x.sums).map(|(number, &sum)| number * sum);
        let offsets = offsets.unwrap_or_default().iter().zip(&x.sums).map(|(&offset, &sum)| offset * sum);
        each.chain(offsets).fold(T::zero(), |a, b| a + b)
    }
}

/// An input as it is.
#[derive(Debug)]
pub(super) struct Plain<T> {
    values: Vec<T>,
    /// Its sum over each group, for zero points and offsets.
    sums: Vec<T>,
}

impl<T: Real> Plain<T> {
    pub(super) fn new(x: ArrayView1<'_, T>, group: usize) -> Self {
        let values = x.to_vec();
        let sums = values.chunks(group).map(|part| part.iter().copied().fold(T::zero(), |a, b| a + b)).collect();
        Plain { values, sums }
    }
}

/// Σ aᵢ·bᵢ in eight sums at a time.
fn inner<T: Real>(a: &[T], b: &[T]) -> T {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [T::zero(); 8];
    for (a, b) in a.iter().zip(b) {
        for k in 0..8 {
            sums[k] += a[k] * b[k];
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(&a, &b)| a * b);
    sums.into_iter().chain(rest).fold(T::zero(), |a, b| a + b)
}
