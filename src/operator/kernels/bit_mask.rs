//! Products of a matrix of which a bit mask says what is stored.
//!
//! One vector: 16 bits of the mask spread as many stored values as they have over 16 lanes, which meet their
//! inputs there (AVX-512's expand); elsewhere bit by bit. Many: they lie side by side in the lanes, and each
//! stored value times one row of x is added to sums in registers.

use pulp::{Arch, Simd, WithSimd};

use crate::scalar::Real;

/// Vectors of sums for a row at a time.
const SIDE: usize = 4;

/// Row i of a bit-mask matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaskedRow<'a, T> {
    /// Bit j%64 of word j/64 marks column j.
    pub words: &'a [u64],
    /// The values of this row first; others may follow.
    pub values: &'a [T],
}

impl<T: Real> MaskedRow<'_, T> {
    /// (column, value) of what is stored, in ascending order.
    pub(crate) fn entries(self) -> impl Iterator<Item = (usize, T)> {
        let bits = self.words.iter().enumerate().flat_map(|(k, &word)| {
            let mut word = word;
            std::iter::from_fn(move || {
                let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
                word &= word - 1;
                Some(k * 64 + bit)
            })
        });
        bits.zip(self.values.iter().copied())
    }

    /// The inner product with x, padded with anything finite to whole words.
    pub(crate) fn dot(self, arch: Arch, x: &[T]) -> T {
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        if let (Arch::V4(simd), Some((values, x))) = (arch, single(self.values, x)) {
            let sum = simd.vectorize(Expand { simd, words: self.words, values, x });
            return T::from_f64(sum.into());
        }
        let _ = arch;
        // Two sums, so that additions do not wait for each other.
        let mut sums = [T::zero(); 2];
        self.entries().enumerate().for_each(|(i, (column, value))| sums[i % 2] += value * x[column]);
        sums[0] + sums[1]
    }

    /// y = row·x for x of n×b, rows contiguous.
    pub(crate) fn times(self, arch: Arch, x: &[T], y: &mut [T]) {
        arch.dispatch(Times { row: self, x, y });
    }
}

/// Both as what they are if T is f32.
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
fn single<'a, T: Real>(values: &'a [T], x: &'a [T]) -> Option<(&'a [f32], &'a [f32])> {
    use pulp::bytemuck::cast_slice;
    (T::DTYPE == crate::scalar::DType::F32).then(|| (cast_slice(values), cast_slice(x)))
}

#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
struct Expand<'a> {
    simd: pulp::x86::V4,
    words: &'a [u64],
    values: &'a [f32],
    x: &'a [f32],
}

#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
impl pulp::NullaryFnOnce for Expand<'_> {
    type Output = f32;

    #[inline(always)]
    fn call(self) -> f32 {
        use pulp::bytemuck::cast;
        let (simd, mut values) = (self.simd, self.values);
        let mut sums = [simd.splat_f32s(0.0); 4];
        for (&word, x) in self.words.iter().zip(self.x.as_chunks::<64>().0) {
            for (part, (sum, x)) in sums.iter_mut().zip(x.as_chunks::<16>().0).enumerate() {
                let mask = (word >> (16 * part)) as u16;
                let stored = match values.first_chunk::<16>() {
                    Some(&whole) => whole,
                    // The last values of the matrix.
                    None => std::array::from_fn(|i| values.get(i).copied().unwrap_or_default()),
                };
                let spread = simd.avx512f._mm512_maskz_expand_ps(mask, cast(stored));
                *sum = simd.mul_add_e_f32s(cast(spread), cast(*x), *sum);
                values = values.get(mask.count_ones() as usize..).unwrap_or_default();
            }
        }
        let [a, b, c, d] = sums;
        simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
    }
}

struct Times<'a, T> {
    row: MaskedRow<'a, T>,
    x: &'a [T],
    y: &'a mut [T],
}

impl<T: Real> WithSimd for Times<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let (b, width) = (self.y.len(), SIDE * T::lanes::<S>());
        for (tile, y) in self.y.chunks_mut(width).enumerate() {
            let mut sums = [T::splat(s, T::zero()); SIDE];
            let start = tile * width;
            if y.len() == width {
                for (column, value) in self.row.entries() {
                    let value = T::splat(s, value);
                    let (x, _) = T::vectors::<S>(&self.x[column * b + start..][..width]);
                    sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum = T::fma(s, value, x, *sum));
                }
            } else {
                let vectors = y.len().div_ceil(T::lanes::<S>());
                for (column, value) in self.row.entries() {
                    let value = T::splat(s, value);
                    let x = &self.x[column * b + start..][..y.len()];
                    for (sum, x) in sums.iter_mut().zip(x.chunks(T::lanes::<S>())).take(vectors) {
                        *sum = T::fma(s, value, T::load(s, x), *sum);
                    }
                }
            }
            y.chunks_mut(T::lanes::<S>()).zip(sums).for_each(|(y, sum)| T::store(s, y, sum));
        }
    }
}
