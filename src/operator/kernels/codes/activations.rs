//! How finely inputs are cut that meet codes as integers.

/// Bits of the integers that the inputs of a product become where packed codes are multiplied as integers.
///
/// Columns that share a scale meet their inputs as x ≈ u·q with a unit u for each run of columns, such that the largest input of a
/// run takes all bits, and signed integers q. Fewer bits are faster where arithmetic and not memory takes the time: several vectors
/// at once. What of it is stored is nothing: the same file serves all.
///
/// Kernels take inputs in so many bits *or more*: matrix instructions in two bytes where one is asked for, or in three, for two to
/// four inputs and for codes of up to seven bits in groups of 32 columns; AVX2 in two bytes for codes of seven and eight bits; and wherever rows are
/// written out or codes are not multiplied as integers, accuracy is full. Inputs in `f64` have it always.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum ActivationBits {
    /// A byte, in runs of up to 32 columns: off by up to 1/254 of the largest of a run. What llama.cpp and others take.
    Eight,
    /// Two bytes, in runs of up to 256 columns: off by up to 1/65,000 of the largest.
    Sixteen,
    /// Three bytes, in runs of up to 256 columns: off by no more than 2⁻²³ of the largest, as sums of `f32` are. Or all bits there are, and sums
    /// of `f32`, where that is faster (several inputs, by AVX2).
    #[default]
    TwentyFour,
}

impl ActivationBits {
    /// All there are, the fewest first.
    pub const ALL: [Self; 3] = [Self::Eight, Self::Sixteen, Self::TwentyFour];

    /// Their number: 8, 16 or 24.
    pub const fn bits(self) -> u8 {
        8 * self.bytes() as u8
    }

    /// Signed bytes of an input.
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::Eight => 1,
            Self::Sixteen => 2,
            Self::TwentyFour => 3,
        }
    }

    /// Columns that share a unit at most: sums of their products with 8 bits still fit with 8 bits to spare, and a large input is
    /// felt no farther. (One byte would feel it most.)
    pub(super) const fn longest(self) -> usize {
        match self {
            Self::Eight => 32,
            _ => 256,
        }
    }

    /// The unit in which the largest of a run of inputs takes all bits, NaN if it is not finite: a power of two where that costs
    /// nothing that counts, as products with it are exact. (Without branches: vectors of units come out of it.)
    #[inline(always)]
    pub(super) fn unit(self, largest: f32) -> f32 {
        // The largest digit is 127, and what comes behind it stays below its half. The least normal number serves what is smaller
        // still.
        let most = (127u32 << (8 * (self.bytes() - 1))) as f32;
        let quotient = (largest / most).max(f32::MIN_POSITIVE);
        // The power of two at or above it.
        let below = f32::from_bits(quotient.to_bits() & !((1 << 23) - 1));
        let power = if below < quotient { below * 2.0 } else { below };
        let unit = if self == Self::TwentyFour { power } else { quotient };
        // (Any unit serves zeros, and the least one would make numbers that processors are slow to multiply.)
        let unit = if largest == 0.0 { 1.0 } else { unit };
        if largest.is_finite() { unit } else { f32::NAN }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_have_a_unit_like_any() {
        for bits in ActivationBits::ALL {
            // (With the least one products of scales would be subnormal, which take processors hundreds of cycles.)
            assert_eq!(bits.unit(0.0), 1.0);
            assert_eq!(bits.unit(f32::MIN_POSITIVE / 4.0), f32::MIN_POSITIVE);
            assert!(bits.unit(f32::NAN).is_nan() && bits.unit(f32::INFINITY).is_nan());
        }
    }

    #[test]
    fn the_largest_takes_all_bits() {
        for (bits, most) in ActivationBits::ALL.into_iter().zip([127.0, 32_512.0, 8_323_072.0]) {
            for largest in [1.0, 0.7, 1.999_999_9, 3e-20, f32::MAX] {
                let whole = (largest * bits.unit(largest).recip()).round();
                assert!(whole <= most && whole > most / 2.01, "{bits:?}: {largest} is {whole} units");
                assert!(bits == ActivationBits::TwentyFour || whole == most, "{bits:?}: {largest} is {whole} units");
            }
        }
    }
}
