//! Products with rows of packed codes of 2 to 8 bits.
//!
//! AVX-512 with VNNI, AVX2, or NEON with `dotprod`: inputs in fixed point, sums of integers ([`integer`], `neon`), of panels of
//! rows side by side. Where there are too few rows for a panel, or groups do not end with whole chunks of codes: eight codes of any
//! width at a time for a few vectors ([`narrow`], AVX2), and elsewhere a row is unpacked into memory that stays in the nearest cache.

use std::ops::Range;

use ndarray::ArrayView2;
use pulp::Arch;

mod activations;
#[cfg(target_arch = "x86_64")]
mod integer;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod layout;
#[cfg(target_arch = "x86_64")]
mod narrow;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed;
mod row;
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
mod wide;

pub use self::activations::ActivationBits;
#[cfg(target_arch = "x86_64")]
use self::integer as panels;
#[cfg(target_arch = "aarch64")]
use self::neon as panels;
pub(crate) use self::packed::{Beside, PackedCodes, width};
pub(crate) use self::row::CodedRow;
use self::row::Plain;
use crate::scalar::Real;

/// Up to so many vectors meet rows that are not written out, where there is no kernel for any number of them.
const FEW: usize = 4;

/// Appends codes as a stream of bits, lowest first, ended on a whole byte.
pub(crate) fn pack(bits: u8, codes: &[u8], to: &mut Vec<u8>) {
    let (mut held, mut count) = (0u32, 0u32);
    for &code in codes {
        held |= u32::from(code) << count;
        count += u32::from(bits);
        while count >= 8 {
            to.push(held as u8);
            (held, count) = (held >> 8, count - 8);
        }
    }
    if count > 0 {
        to.push(held as u8);
    }
}

/// Calls with the place and value of each of the first `n` codes of a stream.
#[inline(always)]
pub(crate) fn each_code(bits: u8, from: &[u8], n: usize, mut each: impl FnMut(usize, u8)) {
    let mask = u64::from(u8::MAX >> (8 - bits));
    // Eight codes are as many bytes as a code has bits.
    for (at, chunk) in from.chunks(usize::from(bits)).enumerate().take(n.div_ceil(8)) {
        let mut eight = [0; 8];
        eight[..chunk.len()].copy_from_slice(chunk);
        let word = u64::from_le_bytes(eight);
        for k in 0..(n - 8 * at).min(8) {
            each(8 * at + k, (word >> (k * usize::from(bits)) & mask) as u8);
        }
    }
}

/// Rows of one kind, one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CodedRows<'a, T> {
    pub group: usize,
    pub codes: &'a PackedCodes,
    /// Scales of a row.
    pub groups: usize,
    pub beside: Beside<'a, T>,
    /// What they ask inputs for, at least.
    pub activations: ActivationBits,
}

impl<'a, T: Real> CodedRows<'a, T> {
    /// Some rows, from their codes as they are on disk.
    fn each<'h>(&self, range: Range<usize>, codes: &'h [u8]) -> impl Iterator<Item = CodedRow<'h, T>>
    where
        'a: 'h,
    {
        let (rows, first) = (*self, range.start);
        range.map(move |i| {
            let groups = i * rows.groups..(i + 1) * rows.groups;
            CodedRow {
                bits: rows.codes.bits(),
                group: rows.group,
                columns: rows.codes.shape().1,
                codes: &codes[(i - first) * rows.codes.width()..],
                beside: Beside {
                    scales: &rows.beside.scales[groups.clone()],
                    zeros: rows.beside.zeros.map(|zeros| &zeros[groups.clone()]),
                    offsets: rows.beside.offsets.map(|offsets| &offsets[groups]),
                },
            }
        })
    }

    /// Writes some rows out.
    pub(crate) fn write(&self, range: Range<usize>, arch: Arch, to: &mut [T]) {
        let (codes, columns) = (self.codes.rows(range.clone()), self.codes.shape().1);
        self.each(range, &codes).zip(to.chunks_mut(columns)).for_each(|(row, to)| row.write(arch, to));
    }

    /// Lays inputs out, the columns of a matrix; `None` if there are so many that rows had better be written out.
    ///
    /// # Panics
    /// If they are not as long as a row.
    pub(crate) fn inputs(&self, x: ArrayView2<'_, T>) -> Option<Inputs<T>> {
        assert_eq!(x.nrows(), self.codes.shape().1, "rows of x");
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        if self.codes.panels().is_some() {
            return panels::Inputs::new(x, self.activations, self.codes.bits(), self.group)
                .map(Kind::Fixed)
                .map(Inputs);
        }
        let plain = || x.columns().into_iter().map(|x| Plain::new(x, self.group)).collect();
        (x.ncols() <= FEW).then(|| Inputs(Kind::Plain(self.group, plain())))
    }

    /// Whether inputs that were laid out for other rows of as many columns serve these.
    pub(crate) fn meets(&self, x: &Inputs<T>) -> bool {
        match &x.0 {
            Kind::Plain(group, _) => *group == self.group && self.codes.panels().is_none(),
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            Kind::Fixed(x) => self.codes.panels().is_some() && panels::meets(self, x),
        }
    }

    /// The inner products of some rows, of which the first is a multiple of 32, with inputs that were laid out for them, row
    /// by row.
    pub(crate) fn products(&self, range: Range<usize>, arch: Arch, x: &Inputs<T>, y: &mut [T]) {
        match &x.0 {
            Kind::Plain(_, x) => {
                let codes = self.codes.rows(range.clone());
                self.each(range, &codes).zip(y.chunks_mut(x.len().max(1))).for_each(|(row, y)| row.dots(arch, x, y));
            }
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            Kind::Fixed(x) => panels::products(self, range, x, pulp::bytemuck::cast_slice_mut(y)),
        }
    }
}

/// Inputs, laid out for rows of one kind.
#[derive(Debug)]
pub(crate) struct Inputs<T>(Kind<T>);

#[derive(Debug)]
enum Kind<T> {
    /// With the length of groups.
    Plain(usize, Vec<Plain<T>>),
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    Fixed(panels::Inputs),
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::testing::{architectures, sizes};

    #[test]
    fn all_levels_agree_at_all_widths() {
        let fastest = if cfg!(miri) { Arch::Scalar } else { Arch::new() };
        let (m, n): (usize, usize) = if cfg!(miri) { (2, 21) } else { (37, 301) };
        let widths = sizes(&[2, 3, 4, 5, 6, 7, 8], &[3, 4, 8]);
        let groups = sizes(&[16, 7, 64, 128, 301], &[7, 21]);
        let x: Vec<Vec<f32>> =
            (0..9).map(|v| (0..n).map(|j| ((j * 37 + v * 11) % 101) as f32 / 50.0 - 1.0).collect()).collect();
        for (&bits, &group) in widths.iter().flat_map(|bits| groups.iter().map(move |group| (bits, group))) {
            let (groups, levels_of) = (n.div_ceil(group), 1usize << bits);
            let scales: Vec<f32> = (0..m * groups).map(|g| 0.25 + (g % 5) as f32 / 8.0).collect();
            let zeros: Vec<u8> = (0..m * groups).map(|g| (g * 7 % levels_of) as u8).collect();
            let number = |i: usize, j: usize| (i * 31 + j * 17 + i * j) % levels_of;
            let mut codes = Vec::new();
            for i in 0..m {
                pack(bits, &(0..n).map(|j| number(i, j) as u8).collect::<Vec<_>>(), &mut codes);
            }
            // In 16 bits and not.
            let offsets = [1.0, 1.0 + 1e-7]
                .map(|most: f32| (0..m * groups).map(|g| most - (g % 3) as f32 / 4.0).collect::<Vec<f32>>());
            for (zeros, offsets) in
                [(None, None), (Some(&zeros[..]), None), (None, Some(&offsets[0][..])), (None, Some(&offsets[1][..]))]
            {
                let beside = Beside { scales: &scales, zeros, offsets };
                let codes = PackedCodes::new(bits, group, (m, n), codes.clone(), beside);
                let rows = CodedRows { group, codes: &codes, groups, beside, activations: Default::default() };
                let value = |i: usize, j: usize| {
                    let g = i * groups + j / group;
                    let zero = zeros.map_or(levels_of / 2, |zeros| zeros[g].into());
                    let offset = offsets.map_or(0.0, |offsets| offsets[g]);
                    f64::from(scales[g]) * (number(i, j) as f64 - zero as f64) + f64::from(offset)
                };
                let inputs = |count: usize| Array2::from_shape_fn((n, count), |(j, v)| x[v][j]);
                let close = |got: &[f32], what: &str| {
                    let count = got.len() / m;
                    for (at, &y) in got.iter().enumerate() {
                        let terms = (0..n).map(|j| value(at / count, j) * f64::from(x[at % count][j]));
                        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                        // (Zero points shift what is left of sums around the middle.)
                        let slack = 1e-6 * (size + (levels_of * n / 2) as f64);
                        assert!(
                            (f64::from(y) - sum).abs() <= slack,
                            "{what}, {bits} bits, groups of {group}: {y} {sum}"
                        );
                    }
                };
                for &count in sizes(&[1, 2, 3, 4, 7, 9], &[1, 7]) {
                    let (x, mut y) = (inputs(count), vec![0.0; m * count]);
                    if let Some(x) = rows.inputs(x.view()) {
                        // Some rows, and the rest.
                        let (first, rest) = y.split_at_mut(count * m.min(32));
                        rows.products(0..m.min(32), fastest, &x, first);
                        rows.products(m.min(32)..m, fastest, &x, rest);
                        close(&y, "whatever is fastest");
                    }
                    let plain = |x| Plain::new(x, group);
                    let x: Vec<Plain<f32>> = x.columns().into_iter().map(plain).collect();
                    for arch in architectures() {
                        let codes = rows.codes.rows(0..m);
                        rows.each(0..m, &codes).zip(y.chunks_mut(count)).for_each(|(row, y)| row.dots(arch, &x, y));
                        close(&y, &format!("{arch:?}"));
                    }
                }
                for (arch, i) in architectures().into_iter().flat_map(|arch| [(arch, 1), (arch, m - 1)]) {
                    let mut row = vec![f32::NAN; n];
                    let codes = rows.codes.rows(i..i + 1);
                    rows.each(i..i + 1, &codes).for_each(|coded| coded.unpack(arch, &mut row));
                    assert!((0..n).all(|j| row[j] == number(i, j) as f32 - (levels_of / 2) as f32), "{arch:?}");
                }
                let mut all = vec![f32::NAN; m * n];
                rows.write(0..m, fastest, &mut all);
                let exact = |at: usize| all[at] == value(at / n, at % n) as f32;
                assert!((0..m * n).all(exact), "{bits} bits, groups of {group}");
            }
        }
    }

    /// With one number in each input nothing hides what its last bits make.
    #[test]
    fn a_number_alone_is_multiplied_with_all_its_bits() {
        let (m, n): (usize, usize) = if cfg!(miri) { (2, 37) } else { (40, 300) };
        let groups = sizes(&[32, 64, 128, 300], &[32]);
        for (bits, &group) in (2..=8).flat_map(|bits| groups.iter().map(move |group| (bits, group))) {
            let (groups, levels) = (n.div_ceil(group), 1usize << bits);
            let number = |i: usize, j: usize| ((i * 31 + j * 17 + i * j) % levels) as u8;
            let mut codes = Vec::new();
            (0..m).for_each(|i| pack(bits, &(0..n).map(|j| number(i, j)).collect::<Vec<_>>(), &mut codes));
            let scales = vec![1.0f32; m * groups];
            let beside = Beside { scales: &scales, zeros: None, offsets: None };
            let codes = PackedCodes::new(bits, group, (m, n), codes, beside);
            let rows = CodedRows { group, codes: &codes, groups, beside, activations: Default::default() };
            for count in [1, 2, 4, 5, 9, 17] {
                let at = |v: usize| (v * 89 + group + 7 * count) % n;
                let value = |v: usize| (0.123_456_7 + v as f32) * if v.is_multiple_of(2) { 1.0 } else { -1e-5 };
                let x = Array2::from_shape_fn((n, count), |(j, v)| if j == at(v) { value(v) } else { 0.0 });
                let (x, mut y) = (rows.inputs(x.view()), vec![f32::NAN; m * count]);
                assert!(x.is_some() || count > FEW, "a few are always taken");
                let Some(x) = x else { continue };
                rows.products(0..m, if cfg!(miri) { Arch::Scalar } else { Arch::new() }, &x, &mut y);
                for (place, &y) in y.iter().enumerate() {
                    let (i, v) = (place / count, place % count);
                    let expected = (f32::from(number(i, at(v))) - levels as f32 / 2.0) * value(v);
                    // (Some kernels multiply numbers of the size of all levels.)
                    let slack = 2.0 * levels as f32 * value(v).abs() * f32::EPSILON;
                    assert!((y - expected).abs() <= slack, "{bits} bits, groups of {group}: {y} {expected}");
                }
            }
        }
    }
}
