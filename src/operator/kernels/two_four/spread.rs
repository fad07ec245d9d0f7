//! The transposed product with one vector: the stored values of a row, each in the lane of its column, times the row's
//! number, added to sums that stay in registers while all rows go by.

use ndarray::ArrayView2;
#[cfg(target_arch = "x86_64")]
use pulp::bytemuck;
use pulp::{Arch, Scalar, Simd};

#[cfg(target_arch = "x86_64")]
use super::vector::SHIFTS;
use super::vector::prefetch;
use super::{Chunk, Kept, Places, TwoFour, WIDTH};
use crate::simd::Aligned;

/// Whether so many vectors go one by one.
pub(super) fn few(arch: Arch, vectors: usize) -> bool {
    match arch {
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        Arch::V4(_) => vectors <= 2,
        _ => vectors == 1,
    }
}

/// The columns of x one after the other.
pub(super) fn pack(x: ArrayView2<'_, f32>) -> Aligned<f32> {
    let mut packed = Aligned::default();
    let to = packed.numbers(x.len()).chunks_exact_mut(x.nrows().max(1));
    for (to, column) in to.zip(x.columns()) {
        to.iter_mut().zip(column).for_each(|(to, from)| *to = *from);
    }
    packed
}

/// Wᵀ·x in one block of columns, 64×b, for x as [`pack`] packs it.
pub(super) fn run<L: Kept>(arch: Arch, of: &TwoFour<L>, x: &Aligned<f32>, block: usize, b: usize) -> Vec<f32> {
    let (m, at, mut y) = (of.rows, block * of.padded(), vec![0.0; WIDTH * b]);
    let (chunks, places) = (&of.chunks[at..at + m], &of.places[at..at + m]);
    for (column, x) in x.filled(m * b).chunks_exact(m.max(1)).enumerate() {
        let sums = match arch {
            #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
            Arch::V4(s) => s.vectorize(Rows { s, chunks, places, x }),
            #[cfg(target_arch = "x86_64")]
            Arch::V3(s) => s.vectorize(Rows { s, chunks, places, x }),
            _ => pulp::NullaryFnOnce::call(Rows { s: Scalar, chunks, places, x }),
        };
        y[column..].iter_mut().step_by(b).zip(sums).for_each(|(y, sum)| *y = sum);
    }
    y
}

/// How a chunk is spread over its columns.
trait Spread: Simd {
    /// The sums of all columns of a chunk.
    type Sums;
    fn zeros(self) -> Self::Sums;
    /// sums + x · chunk.
    fn add<L: Kept>(self, kept: &Chunk<L>, places: &Places, x: f32, sums: &mut Self::Sums);
    fn numbers(sums: Self::Sums) -> [f32; WIDTH];
}

struct Rows<'a, S, L> {
    s: S,
    chunks: &'a [Chunk<L>],
    places: &'a [Places],
    x: &'a [f32],
}

impl<S: Spread, L: Kept> pulp::NullaryFnOnce for Rows<'_, S, L> {
    type Output = [f32; WIDTH];

    #[inline(always)]
    fn call(self) -> [f32; WIDTH] {
        let Rows { s, chunks, places, x } = self;
        let mut sums = s.zeros();
        for ((kept, places), &x) in chunks.iter().zip(places).zip(x) {
            prefetch(kept);
            s.add(kept, places, x, &mut sums);
        }
        S::numbers(sums)
    }
}

impl Spread for Scalar {
    type Sums = [f32; WIDTH];
    #[inline(always)]
    fn zeros(self) -> Self::Sums {
        [0.0; WIDTH]
    }
    #[inline(always)]
    fn add<L: Kept>(self, kept: &Chunk<L>, places: &Places, x: f32, sums: &mut Self::Sums) {
        for (i, (pair, sums)) in kept.0.as_chunks::<2>().0.iter().zip(sums.as_chunks_mut::<4>().0).enumerate() {
            let place = places[i / 8] >> (i % 8 * 4);
            for (k, value) in pair.iter().enumerate() {
                sums[(place >> (2 * k) & 3) as usize] += value.wide() * x;
            }
        }
    }
    #[inline(always)]
    fn numbers(sums: Self::Sums) -> [f32; WIDTH] {
        sums
    }
}

/// The first value of each column's group among 16 stored ones, and its place in each group.
#[cfg(target_arch = "x86_64")]
const FIRST: [u32; 32] = {
    let (mut all, mut i) = ([0; 32], 0);
    while i < 32 {
        all[i] = i as u32 / 4 * 2;
        i += 1;
    }
    all
};
#[cfg(target_arch = "x86_64")]
const PLACE: [u32; 16] = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3];

#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
impl Spread for pulp::x86::V4 {
    type Sums = [std::arch::x86_64::__m512; WIDTH / 16];
    #[inline(always)]
    fn zeros(self) -> Self::Sums {
        [self.avx512f._mm512_setzero_ps(); WIDTH / 16]
    }
    #[inline(always)]
    fn add<L: Kept>(self, kept: &Chunk<L>, places: &Places, x: f32, sums: &mut Self::Sums) {
        let f = self.avx512f;
        let first: [[u32; 16]; 2] = bytemuck::cast(FIRST);
        let (one, three, x) = (f._mm512_set1_epi32(1), f._mm512_set1_epi32(3), f._mm512_set1_ps(x));
        let shifts: [u32; 32] = std::array::from_fn(|i| SHIFTS[FIRST[i] as usize]);
        let shifts: [[u32; 16]; 2] = bytemuck::cast(shifts);
        for (h, values) in kept.0.as_chunks::<16>().0.iter().enumerate() {
            let (values, word) = (L::sixteen(self, values), f._mm512_set1_epi32(places[h] as i32));
            for (half, sum) in sums[2 * h..2 * h + 2].iter_mut().enumerate() {
                let from = bytemuck::cast(first[half]);
                // Both places of the column's group, less its own: two bits that vanish where a value belongs.
                let both = f._mm512_srlv_epi32(word, bytemuck::cast(shifts[half]));
                let own: std::arch::x86_64::__m512i = bytemuck::cast(PLACE.map(|place| place | place << 2));
                let both = f._mm512_xor_si512(both, own);
                let is_first = f._mm512_testn_epi32_mask(both, three);
                let is_second = f._mm512_testn_epi32_mask(both, f._mm512_slli_epi32::<2>(three));
                let spread = f._mm512_maskz_permutexvar_ps(is_first, from, values);
                let spread = f._mm512_mask_permutexvar_ps(spread, is_second, f._mm512_or_si512(from, one), values);
                *sum = f._mm512_fmadd_ps(spread, x, *sum);
            }
        }
    }
    #[inline(always)]
    fn numbers(sums: Self::Sums) -> [f32; WIDTH] {
        bytemuck::cast(sums)
    }
}

#[cfg(target_arch = "x86_64")]
impl Spread for pulp::x86::V3 {
    type Sums = [std::arch::x86_64::__m256; WIDTH / 8];
    #[inline(always)]
    fn zeros(self) -> Self::Sums {
        [self.avx._mm256_setzero_ps(); WIDTH / 8]
    }
    #[inline(always)]
    fn add<L: Kept>(self, kept: &Chunk<L>, places: &Places, x: f32, sums: &mut Self::Sums) {
        let (f, avx) = (self.avx2, self.avx);
        let (three, x) = (avx._mm256_set1_epi32(3), avx._mm256_set1_ps(x));
        let first: [[u32; 8]; 4] = bytemuck::cast(FIRST);
        let own: [[u32; 8]; 2] = bytemuck::cast(PLACE);
        for (i, sum) in sums.iter_mut().enumerate() {
            // Four values for these eight columns, among the eight that are loaded.
            let values = L::eight(self, &kept.0.as_chunks().0[i / 2]);
            let word = avx._mm256_set1_epi32(places[i / 4] as i32);
            let from: [u32; 8] = first[i % 2];
            let shifts: [u32; 8] = first[i % 4].map(|first| SHIFTS[first as usize]);
            let place = f._mm256_srlv_epi32(word, bytemuck::cast(shifts));
            let mut spread = avx._mm256_setzero_ps();
            for (k, place) in [place, f._mm256_srli_epi32::<2>(place)].into_iter().enumerate() {
                let here = f._mm256_cmpeq_epi32(f._mm256_and_si256(place, three), bytemuck::cast(own[0]));
                let value = f._mm256_permutevar8x32_ps(values, bytemuck::cast(from.map(|from| from + k as u32)));
                spread = avx._mm256_or_ps(spread, avx._mm256_and_ps(value, bytemuck::cast(here)));
            }
            *sum = self.fma._mm256_fmadd_ps(spread, x, *sum);
        }
    }
    #[inline(always)]
    fn numbers(sums: Self::Sums) -> [f32; WIDTH] {
        bytemuck::cast(sums)
    }
}
