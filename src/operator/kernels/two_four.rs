//! A 2:4 matrix in memory, and its products.
//!
//! Rows are cut into chunks of 64 columns, of which 32 values and as many 2-bit places are stored, and chunks lie
//! column block by column block: what is read is one stream, and the 64 rows of x that it meets stay in the first
//! cache. One vector, or a few: the 16 columns' values that belong to 16 stored ones are picked by one permutation. Many: they
//! lie side by side in the lanes, and each stored value times one row of x is added to sums in registers.

use ndarray::ArrayView2;
use pulp::{Arch, Simd};
use rayon::prelude::*;

use crate::threads::{self, Pace};

mod batch;
mod spread;
#[cfg(test)]
mod tests;
mod vector;
mod wrapped;

/// Columns of a chunk.
const WIDTH: usize = 64;
/// Its stored values.
const KEPT: usize = WIDTH / 2;
/// Rows are padded to whole multiples of this, the most that a kernel takes at once.
const ROWS: usize = 8;
/// Rows whose sums stay in the cache while all columns go by.
const BLOCK: usize = 512;

/// Stored values of a row in 64 columns.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
struct Chunk<L>([L; KEPT]);

/// Their places in their groups, 2 bits each, the first lowest.
type Places = [u32; 2];

/// A stored number: `f32`, or the bits of a `bf16`.
pub(crate) trait Kept: vector::Load + Copy + Default + PartialEq + std::fmt::Debug + Send + Sync {
    /// Whether it is as wide as what it is multiplied with.
    const WIDE: bool;
    fn narrow(value: f32) -> Self;
    fn wide(self) -> f32;
    /// The first or the second of two, in all lanes.
    #[inline(always)]
    fn splat<S: Simd>(s: S, pair: &[Self; 2], second: bool) -> S::f32s {
        s.splat_f32s(pair[usize::from(second)].wide())
    }
    /// Each of four, in all lanes; `which` holds 0, 1, 2 and 3 in all lanes.
    #[inline(always)]
    fn splats<S: Simd>(s: S, four: &[Self; 4], which: &[S::u32s; 4]) -> [S::f32s; 4] {
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        if let Some(v4) = (&s as &dyn std::any::Any).downcast_ref::<pulp::x86::V4>() {
            // Loads are what limits a product: one serves four values. (The branch is decided when this is compiled.)
            return pulp::bytemuck::cast(vector::Load::four(*v4, four, &pulp::bytemuck::cast(*which)));
        }
        let _ = which;
        let pairs = four.as_chunks::<2>().0;
        std::array::from_fn(|i| Self::splat(s, &pairs[i / 2], i % 2 == 1))
    }
}

impl Kept for f32 {
    const WIDE: bool = true;
    fn narrow(value: f32) -> Self {
        value
    }
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
}

impl Kept for u16 {
    const WIDE: bool = false;
    fn narrow(value: f32) -> Self {
        half::bf16::from_f32(value).to_bits()
    }
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }
    #[inline(always)]
    fn splat<S: Simd>(s: S, pair: &[u16; 2], second: bool) -> S::f32s {
        // One load serves both.
        let both = s.splat_u32s(u32::from(pair[0]) | u32::from(pair[1]) << 16);
        s.transmute_f32s_u32s(match second {
            false => s.wrapping_dyn_shl_u32s(both, s.splat_u32s(16)),
            true => s.and_u32s(both, s.splat_u32s(0xFFFF_0000)),
        })
    }
}

/// A matrix of which 2 of every 4 consecutive entries of a row, and what is left over at its end, are stored.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TwoFour<L> {
    rows: usize,
    columns: usize,
    /// Chunk (row, block of columns) is number block · padded rows + row.
    chunks: Vec<Chunk<L>>,
    places: Vec<Places>,
}

impl<L: Kept> TwoFour<L> {
    /// From the two places of each full group and all stored values, row by row. What is left of a row is stored as
    /// one or two groups more: two values at places 0 and 1, one at place 0.
    pub(crate) fn new(
        (rows, columns): (usize, usize),
        places: impl Iterator<Item = [u8; 2]>,
        values: impl Iterator<Item = f32>,
    ) -> Self {
        let mut all = TwoFour { rows, columns, chunks: Vec::new(), places: Vec::new() };
        let count = all.blocks() * all.padded();
        all.chunks = vec![Chunk([L::default(); KEPT]); count];
        all.places = vec![[0; 2]; count];
        let (mut places, mut values) = (places, values);
        let (full, rest, padded) = (columns / 4, columns % 4, all.padded());
        for row in 0..rows {
            for group in 0..full + rest.div_ceil(2) {
                let (chunk, at) = (group / (WIDTH / 4) * padded + row, group % (WIDTH / 4));
                let pair = if group < full { places.next().unwrap_or_default() } else { [0, 1] };
                let stored = if group < full { 2 } else { (rest - 2 * (group - full)).min(2) };
                let [first, second] = pair.map(u32::from);
                all.places[chunk][at / 8] |= (first | second << 2) << (at % 8 * 4);
                for value in &mut all.chunks[chunk].0[2 * at..2 * at + stored] {
                    *value = L::narrow(values.next().unwrap_or_default());
                }
            }
        }
        all
    }

    /// Blocks of columns.
    fn blocks(&self) -> usize {
        (self.columns / 4 + (self.columns % 4).div_ceil(2)).div_ceil(WIDTH / 4)
    }

    fn padded(&self) -> usize {
        self.rows.next_multiple_of(ROWS)
    }

    /// What lies at row i of the packed x.
    fn column(&self, i: usize) -> Option<usize> {
        let (full, rest) = (self.columns / 4 * 4, self.columns % 4);
        match i.checked_sub(full) {
            None => Some(i),
            Some(i @ (0 | 1)) if i < rest => Some(full + i),
            Some(4) if rest == 3 => Some(full + 2),
            _ => None,
        }
    }

    /// Calls `each` with the column and value of all that is stored in row i, in ascending order.
    pub(crate) fn row(&self, i: usize, mut each: impl FnMut(usize, f32)) {
        let groups = (0..self.blocks() * (WIDTH / 4)).map(|group| {
            let (chunk, at) = (group / (WIDTH / 4) * self.padded() + i, group % (WIDTH / 4));
            (group, self.places[chunk][at / 8] >> (at % 8 * 4), &self.chunks[chunk].0[2 * at..2 * at + 2])
        });
        for (group, places, values) in groups {
            for (k, value) in values.iter().enumerate() {
                if let Some(column) = self.column(4 * group + (places >> (2 * k) & 3) as usize) {
                    each(column, value.wide());
                }
            }
        }
    }

    /// y = W·x; y is m×b, row-major.
    pub(crate) fn product(&self, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        self.product_by(Arch::new(), x, y);
    }

    fn product_by(&self, arch: Arch, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        let b = x.ncols();
        if y.is_empty() || self.chunks.is_empty() {
            return y.fill(0.0);
        }
        let x = x.as_standard_or_turned();
        let alone = threads::alone(Pace::FLOATS.time(self.chunks.len() * KEPT, b));
        let share = match alone {
            true => self.padded(),
            false => threads::share(self.rows).next_multiple_of(ROWS),
        };
        let few = vector::few(arch, b);
        let packed =
            if few { vector::pack(self, x.view()) } else { arch.dispatch(batch::Pack { of: self, x: x.view() }) };
        let run = |(i, y): (usize, &mut [f32])| {
            let first = i * share;
            match few {
                true => vector::run(arch, self, &packed, first, b, y),
                false => arch.dispatch(batch::Product { of: self, x: &packed, first, b, y }),
            }
        };
        match alone {
            true => run((0, y)),
            false => y.par_chunks_mut(share * b).enumerate().for_each(run),
        }
    }

    /// y = Wᵀ·x; y is n×b, row-major.
    pub(crate) fn product_transposed(&self, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        self.product_transposed_by(Arch::new(), x, y);
    }

    fn product_transposed_by(&self, arch: Arch, x: ArrayView2<'_, f32>, y: &mut [f32]) {
        let b = x.ncols();
        if y.is_empty() || self.chunks.is_empty() {
            return y.fill(0.0);
        }
        let few = spread::few(arch, b);
        let x = match few {
            true => spread::pack(x),
            false => arch.dispatch(batch::PackRows { x: x.as_standard_or_turned().view() }),
        };
        let part = |block| match few {
            true => spread::run(arch, self, &x, block, b),
            false => arch.dispatch(batch::Transposed { of: self, x: &x, block, b }),
        };
        let alone = threads::alone(Pace::FLOATS.time(self.chunks.len() * KEPT, b));
        let parts: Vec<Vec<f32>> = match alone {
            true => (0..self.blocks()).map(part).collect(),
            false => (0..self.blocks()).into_par_iter().map(part).collect(),
        };
        for (i, row) in parts.iter().flat_map(|part| part.chunks_exact(b)).enumerate() {
            if let Some(column) = self.column(i) {
                y[column * b..][..b].copy_from_slice(row);
            }
        }
    }
}

/// The layouts that kernels read: row-major, or its transpose.
trait Turned {
    fn as_standard_or_turned(&self) -> ndarray::CowArray<'_, f32, ndarray::Ix2>;
}

impl Turned for ArrayView2<'_, f32> {
    fn as_standard_or_turned(&self) -> ndarray::CowArray<'_, f32, ndarray::Ix2> {
        match self.t().is_standard_layout() {
            true => self.view().into(),
            false => self.as_standard_layout(),
        }
    }
}
