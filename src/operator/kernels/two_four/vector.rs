//! One vector, or a few: each of the stored values meets its input by a permutation of the 32 that they are stored for.

use ndarray::ArrayView2;
#[cfg(target_arch = "x86_64")]
use pulp::bytemuck;
use pulp::{Arch, Scalar, Simd};

use super::{Chunk, Kept, Places, TwoFour, WIDTH};
use crate::simd::Aligned;

/// Sums that are kept, a register each: of one vector few turns of the stream are worth more than the first cache, of several not.
const SUMS: usize = 4096;
const SUMS_OF_SEVERAL: usize = 256;
/// Vectors that meet the stored values together: as many as have registers for 64 numbers each.
const TOGETHER: usize = 4;
/// Bytes between what is multiplied and what is asked for: a core alone does not fetch ahead far enough.
const AHEAD: usize = 8192;

/// Whether so many vectors are few enough to be picked from.
pub(super) fn few(arch: Arch, vectors: usize) -> bool {
    match arch {
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        Arch::V4(_) => vectors <= 2 * TOGETHER,
        _ => vectors == 1,
    }
}

/// The columns of x one after the other, each in whole chunks.
pub(super) fn pack<L: Kept>(of: &TwoFour<L>, x: ArrayView2<'_, f32>) -> Aligned<f32> {
    let (length, mut packed) = (of.blocks() * WIDTH, Aligned::default());
    let full = of.columns / 4 * 4;
    for (column, to) in x.columns().into_iter().zip(packed.numbers(length * x.ncols()).chunks_exact_mut(length.max(1)))
    {
        to.iter_mut().zip(column).take(full).for_each(|(to, from)| *to = *from);
        (full..length).for_each(|i| to[i] = of.column(i).map_or(0.0, |i| column[i]));
    }
    packed
}

/// Rows `first..` of y = W·x, as many as y holds.
pub(super) fn run<L: Kept>(arch: Arch, of: &TwoFour<L>, x: &Aligned<f32>, first: usize, b: usize, y: &mut [f32]) {
    let parts = b.div_ceil(TOGETHER);
    // What all parts meet stays in the second cache.
    let rows = if parts > 1 { SUMS_OF_SEVERAL / TOGETHER } else { y.len() / b };
    for (i, y) in y.chunks_mut(rows * b).enumerate() {
        let first = first + i * rows;
        for part in 0..parts {
            let (start, end) = (part * b / parts, (part + 1) * b / parts);
            match end - start {
                1 => together::<L, 1>(arch, of, x, first, (start, b), y),
                2 => together::<L, 2>(arch, of, x, first, (start, b), y),
                3 => together::<L, 3>(arch, of, x, first, (start, b), y),
                _ => together::<L, TOGETHER>(arch, of, x, first, (start, b), y),
            }
        }
    }
}

/// The same for N of b vectors.
fn together<L: Kept, const N: usize>(
    arch: Arch,
    of: &TwoFour<L>,
    x: &Aligned<f32>,
    first: usize,
    (start, b): (usize, usize),
    y: &mut [f32],
) {
    let length = of.blocks() * WIDTH;
    let x: [_; N] = std::array::from_fn(|v| x.filled(length * b)[(start + v) * length..][..length].as_chunks().0);
    match arch {
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        Arch::V4(s) => s.vectorize(Columns { s, of, x, first, start, b, y }),
        #[cfg(target_arch = "x86_64")]
        Arch::V3(s) => s.vectorize(Columns { s, of, x, first, start, b, y }),
        _ => pulp::NullaryFnOnce::call(Columns { s: Scalar, of, x, first, start, b, y }),
    }
}

/// The sums of a chunk, at a width of its own.
trait Pick: Simd {
    /// What a column block holds of x.
    type Inputs;
    fn inputs(x: &[f32; WIDTH]) -> Self::Inputs;
    /// Asks for the chunks that come later.
    #[inline(always)]
    fn prefetch<L>(self, _: &Chunk<L>) {}
    /// Adds the products of a chunk with each vector to its sum, in any lane.
    fn chunk<L: Kept, const N: usize>(
        self,
        kept: &Chunk<L>,
        places: &Places,
        x: &[Self::Inputs; N],
        sums: &mut [Self::f32s; N],
    );
}

/// Some rows times some columns of x.
struct Columns<'a, S, L, const N: usize> {
    s: S,
    of: &'a TwoFour<L>,
    x: [&'a [[f32; WIDTH]]; N],
    first: usize,
    start: usize,
    b: usize,
    y: &'a mut [f32],
}

impl<S: Pick, L: Kept, const N: usize> pulp::NullaryFnOnce for Columns<'_, S, L, N> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Columns { s, of, x, first, start, b, y } = self;
        let rows = if N == 1 { SUMS } else { SUMS_OF_SEVERAL / N };
        let (padded, mut sums) = (of.padded(), Vec::with_capacity(rows));
        for (i, y) in y.chunks_mut(rows * b).enumerate() {
            let (from, count) = (first + i * rows, y.len() / b);
            sums.clear();
            sums.resize(count, [s.splat_f32s(0.0); N]);
            for block in 0..x[0].len() {
                let x = x.map(|x| S::inputs(&x[block]));
                let at = block * padded + from;
                let (chunks, places) = (&of.chunks[at..at + count], &of.places[at..at + count]);
                for ((sums, kept), places) in sums.iter_mut().zip(chunks).zip(places) {
                    s.prefetch(kept);
                    s.chunk(kept, places, &x, sums);
                }
            }
            for (y, sums) in y.chunks_exact_mut(b).zip(&sums) {
                y[start..start + N].iter_mut().zip(sums).for_each(|(y, sum)| *y = s.reduce_sum_f32s(*sum));
            }
        }
    }
}

impl Pick for Scalar {
    type Inputs = [f32; WIDTH];
    #[inline(always)]
    fn inputs(x: &[f32; WIDTH]) -> Self::Inputs {
        *x
    }
    #[inline(always)]
    fn chunk<L: Kept, const N: usize>(
        self,
        kept: &Chunk<L>,
        places: &Places,
        x: &[Self::Inputs; N],
        to: &mut [Self::f32s; N],
    ) {
        for (x, sum) in x.iter().zip(to) {
            let mut sums = [*sum, 0.0];
            for (i, pair) in kept.0.as_chunks::<2>().0.iter().enumerate() {
                let place = places[i / 8] >> (i % 8 * 4);
                let group = &x.as_chunks::<4>().0[i];
                for k in 0..2 {
                    sums[k] += pair[k].wide() * group[(place >> (2 * k) & 3) as usize];
                }
            }
            *sum = sums[0] + sums[1];
        }
    }
}

/// A register of stored values, widened.
pub(crate) trait Load: Sized {
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    fn sixteen(s: pulp::x86::V4, from: &[Self; 16]) -> std::arch::x86_64::__m512;
    /// Each of four in a register of its own; `which` holds 0, 1, 2 and 3 in all lanes.
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    fn four(
        s: pulp::x86::V4,
        from: &[Self; 4],
        which: &[std::arch::x86_64::__m512i; 4],
    ) -> [std::arch::x86_64::__m512; 4];
    #[cfg(target_arch = "x86_64")]
    fn eight(s: pulp::x86::V3, from: &[Self; 8]) -> std::arch::x86_64::__m256;
}

impl Load for f32 {
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    #[inline(always)]
    fn sixteen(_: pulp::x86::V4, from: &[f32; 16]) -> std::arch::x86_64::__m512 {
        bytemuck::cast(*from)
    }
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    #[inline(always)]
    fn four(
        s: pulp::x86::V4,
        from: &[f32; 4],
        which: &[std::arch::x86_64::__m512i; 4],
    ) -> [std::arch::x86_64::__m512; 4] {
        let all = s.avx512f._mm512_broadcast_f32x4(bytemuck::cast(*from));
        which.map(|which| s.avx512f._mm512_permutevar_ps(all, which))
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn eight(_: pulp::x86::V3, from: &[f32; 8]) -> std::arch::x86_64::__m256 {
        bytemuck::cast(*from)
    }
}

impl Load for u16 {
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    #[inline(always)]
    fn sixteen(s: pulp::x86::V4, from: &[u16; 16]) -> std::arch::x86_64::__m512 {
        let wide = s.avx512f._mm512_cvtepu16_epi32(bytemuck::cast(*from));
        bytemuck::cast(s.avx512f._mm512_slli_epi32::<16>(wide))
    }
    #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
    #[inline(always)]
    fn four(s: pulp::x86::V4, from: &[u16; 4], _: &[std::arch::x86_64::__m512i; 4]) -> [std::arch::x86_64::__m512; 4] {
        let pairs = from.as_chunks::<2>().0;
        std::array::from_fn(|i| bytemuck::cast(<u16 as Kept>::splat(s, &pairs[i / 2], i % 2 == 1)))
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn eight(s: pulp::x86::V3, from: &[u16; 8]) -> std::arch::x86_64::__m256 {
        let wide = s.avx2._mm256_cvtepu16_epi32(bytemuck::cast(*from));
        bytemuck::cast(s.avx2._mm256_slli_epi32::<16>(wide))
    }
}

/// Asks for the lines of the chunk that comes [`AHEAD`] bytes later.
#[inline(always)]
pub(super) fn prefetch<L>(kept: &Chunk<L>) {
    crate::memory::prefetch(kept, AHEAD);
}

/// Where the group of a lane begins among the numbers that a permutation chooses from.
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
const GROUPS: [u32; 16] = [0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28];
/// What brings the place of a lane down to the lowest bits.
#[cfg(target_arch = "x86_64")]
pub(super) const SHIFTS: [u32; 16] = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30];

#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
impl Pick for pulp::x86::V4 {
    type Inputs = [std::arch::x86_64::__m512; WIDTH / 16];
    #[inline(always)]
    fn inputs(x: &[f32; WIDTH]) -> Self::Inputs {
        bytemuck::cast(*x)
    }
    #[inline(always)]
    fn prefetch<L>(self, kept: &Chunk<L>) {
        prefetch(kept);
    }
    #[inline(always)]
    fn chunk<L: Kept, const N: usize>(
        self,
        kept: &Chunk<L>,
        places: &Places,
        x: &[Self::Inputs; N],
        to: &mut [Self::f32s; N],
    ) {
        const { assert!(super::KEPT == 32) };
        /// (a & b) | c.
        const AND_OR: i32 = 0xEA;
        let f = self.avx512f;
        let three = f._mm512_set1_epi32(3);
        // Loops over indices: iterators over arrays leave the sums in memory.
        let mut sums = *to;
        for (h, kept) in kept.0.as_chunks::<16>().0.iter().enumerate() {
            let word = f._mm512_set1_epi32(places[h] as i32);
            let shifted = f._mm512_srlv_epi32(word, bytemuck::cast(SHIFTS));
            let from = f._mm512_ternarylogic_epi32::<AND_OR>(shifted, three, bytemuck::cast(GROUPS));
            let kept = L::sixteen(self, kept);
            for v in 0..N {
                let picked = f._mm512_permutex2var_ps(x[v][2 * h], from, x[v][2 * h + 1]);
                sums[v] = bytemuck::cast(f._mm512_fmadd_ps(kept, picked, bytemuck::cast(sums[v])));
            }
        }
        *to = sums;
    }
}

#[cfg(target_arch = "x86_64")]
impl Pick for pulp::x86::V3 {
    type Inputs = [std::arch::x86_64::__m256; WIDTH / 8];
    #[inline(always)]
    fn inputs(x: &[f32; WIDTH]) -> Self::Inputs {
        bytemuck::cast(*x)
    }
    #[inline(always)]
    fn prefetch<L>(self, kept: &Chunk<L>) {
        prefetch(kept);
    }
    #[inline(always)]
    fn chunk<L: Kept, const N: usize>(
        self,
        kept: &Chunk<L>,
        places: &Places,
        x: &[Self::Inputs; N],
        to: &mut [Self::f32s; N],
    ) {
        const LOW: [u32; 8] = [0, 0, 4, 4, 0, 0, 4, 4];
        let (f, avx) = (self.avx2, self.avx);
        let three = avx._mm256_set1_epi32(3);
        let shifts: [[u32; 8]; 2] = bytemuck::cast(SHIFTS);
        let mut sums = *to;
        for (q, kept) in kept.0.as_chunks::<8>().0.iter().enumerate() {
            let word = avx._mm256_set1_epi32(places[q / 2] as i32);
            let shifted = f._mm256_srlv_epi32(word, bytemuck::cast(shifts[q % 2]));
            let from = f._mm256_or_si256(f._mm256_and_si256(shifted, three), bytemuck::cast(LOW));
            let kept = L::eight(self, kept);
            for v in 0..N {
                let low = f._mm256_permutevar8x32_ps(x[v][2 * q], from);
                let high = f._mm256_permutevar8x32_ps(x[v][2 * q + 1], from);
                let picked = avx._mm256_blend_ps::<0xF0>(low, high);
                sums[v] = bytemuck::cast(self.fma._mm256_fmadd_ps(kept, picked, bytemuck::cast(sums[v])));
            }
        }
        *to = sums;
    }
}
