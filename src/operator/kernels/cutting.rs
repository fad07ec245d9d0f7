//! Numbers as sums of three in bf16, the upper half of an `f32`: x = a + b + c with eight bits each, without any rounding.

use std::arch::x86_64::*;

use pulp::bytemuck::cast;

use super::lanes::{LANES, Lanes, padded};

/// Columns that meet in an instruction.
pub(super) const STEP: usize = 2 * LANES;
/// Numbers that one is cut into.
pub(super) const DIGITS: usize = 3;

/// Cuts numbers.
pub(super) struct Cutting {
    /// The upper halves of columns, in the order in which they meet others.
    order: __m512i,
}

impl Cutting {
    /// Pairs of columns of which the second comes so many after the first.
    #[target_feature(enable = "avx512f")]
    pub(super) fn of(half: usize) -> Self {
        let column = |at: usize| at / 2 / half * 2 * half + at / 2 % half + at % 2 * half;
        Cutting { order: cast(std::array::from_fn::<_, STEP, _>(|at| 2 * column(at) as u16 + 1)) }
    }

    /// The digits of up to 32 columns, and sums of some of them each; zeros where there are none.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq")]
    pub(super) fn cut(&self, x: &[f32]) -> ([Lanes<i32>; DIGITS], __m512) {
        let (first, second) = match x.as_chunks::<LANES>().0 {
            [first, second, ..] => (*first, *second),
            _ => (padded(x), padded(x.get(LANES..).unwrap_or_default())),
        };
        let (mut first, mut second): (__m512, __m512) = (cast(first), cast(second));
        let sums = _mm512_add_ps(first, second);
        let upper = _mm512_castsi512_ps(_mm512_set1_epi32(0xffff_0000_u32 as i32));
        let mut digits = [Lanes::default(); DIGITS];
        for digit in &mut digits {
            *digit = Lanes(cast(_mm512_permutex2var_epi16(cast(first), self.order, cast(second))));
            // What is cut off is exact, and so is the rest.
            first = _mm512_sub_ps(first, _mm512_and_ps(first, upper));
            second = _mm512_sub_ps(second, _mm512_and_ps(second, upper));
        }
        (digits, sums)
    }
}
