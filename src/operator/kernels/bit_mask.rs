//! Products of a matrix of which a bit mask says what is stored.
//!
//! One vector: 16 bits of the mask spread as many stored values as they have over 16 lanes, which meet their
//! inputs there (AVX-512's expand); elsewhere bit by bit. Many: some rows are written out, by the same
//! instruction, and multiplied as what they are, which costs less than to look for each value's inputs.

use pulp::Arch;
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
use pulp::Simd;

use crate::scalar::Real;

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

    /// Writes the row out, zeros included, to whole words of the mask.
    pub(crate) fn spread(self, arch: Arch, to: &mut [T]) {
        #[cfg(all(target_arch = "x86_64", feature = "avx512"))]
        if let (Arch::V4(simd), Some((values, _))) = (arch, single(self.values, &[])) {
            return simd.vectorize(Spread { simd, words: self.words, values, to: pulp::bytemuck::cast_slice_mut(to) });
        }
        let _ = arch;
        to.fill(T::zero());
        self.entries().for_each(|(column, value)| to[column] = value);
    }
}

/// Both as what they are if T is f32.
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
fn single<'a, T: Real>(values: &'a [T], x: &'a [T]) -> Option<(&'a [f32], &'a [f32])> {
    use pulp::bytemuck::cast_slice;
    (T::DTYPE == crate::scalar::DType::F32).then(|| (cast_slice(values), cast_slice(x)))
}

/// Values that an instruction of its own has loaded. The compiler makes load and expand one instruction, which on a Zen 5
/// takes 1.76 ms for half of 4096×4096 where the two take 1.01, and without prefetches 2.7 where they take 1.1.
#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
#[inline(always)]
fn in_register(_proof: pulp::x86::V4, mut values: std::arch::x86_64::__m512) -> std::arch::x86_64::__m512 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn hold(values: &mut std::arch::x86_64::__m512) {
        // SAFETY: no instruction at all. It says that the register may change, so that the load stays one of its own;
        // it touches no memory, no stack and no flags.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::asm!("/* {0} */", inout(zmm_reg) * values, options(pure, nomem, nostack, preserves_flags));
        }
    }
    // SAFETY: a value of type V4 exists only where the processor has AVX-512F.
    #[allow(unsafe_code)]
    unsafe {
        hold(&mut values);
    }
    values
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
        use crate::memory::prefetch;
        use pulp::bytemuck::cast;
        /// Bytes between what is multiplied and what is asked for.
        const AHEAD: usize = 4096;
        let simd = self.simd;
        let mut sums = [simd.splat_f32s(0.0); 4];
        let mut values = self.values;
        for (&word, x) in self.words.iter().zip(self.x.as_chunks::<64>().0) {
            // The 64 values that come next, of which the word takes some.
            let next = match values.first_chunk::<64>() {
                Some(whole) => whole,
                None => &std::array::from_fn(|i| values.get(i).copied().unwrap_or_default()),
            };
            prefetch(next, AHEAD);
            for (part, (sum, x)) in sums.iter_mut().zip(x.as_chunks::<16>().0).enumerate() {
                let mask = (word >> (16 * part)) as u16;
                // Each part counts all bits before it, so that none waits for another. At most 16 in each: never beyond 48.
                let before = (word & !(u64::MAX << (16 * part))).count_ones() as usize;
                let stored = next[before.min(48)..].first_chunk::<16>().copied().unwrap_or_default();
                let spread = simd.avx512f._mm512_maskz_expand_ps(mask, in_register(simd, cast(stored)));
                *sum = simd.mul_add_e_f32s(cast(spread), cast(*x), *sum);
            }
            values = values.get(word.count_ones() as usize..).unwrap_or_default();
        }
        let [a, b, c, d] = sums;
        simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
    }
}

#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
struct Spread<'a> {
    simd: pulp::x86::V4,
    words: &'a [u64],
    values: &'a [f32],
    to: &'a mut [f32],
}

#[cfg(all(target_arch = "x86_64", feature = "avx512"))]
impl pulp::NullaryFnOnce for Spread<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        use pulp::bytemuck::cast;
        let mut values = self.values;
        for (&word, to) in self.words.iter().zip(self.to.as_chunks_mut::<64>().0) {
            for (part, to) in to.as_chunks_mut::<16>().0.iter_mut().enumerate() {
                let mask = (word >> (16 * part)) as u16;
                let stored = match values.first_chunk::<16>() {
                    Some(&whole) => whole,
                    None => std::array::from_fn(|i| values.get(i).copied().unwrap_or_default()),
                };
                *to = cast(self.simd.avx512f._mm512_maskz_expand_ps(mask, cast(stored)));
                values = values.get(mask.count_ones() as usize..).unwrap_or_default();
            }
        }
    }
}
