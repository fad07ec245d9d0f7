//! The products of a step, by matrix instructions.

use super::super::panel::Pair;
use super::super::runs::of_run;
use super::super::tiles::tiles;
use super::{Lanes, Turns};

impl<const KIND: u8, const PARTS: usize, const V: usize, const DIGITS: usize, const RUNS: usize>
    Turns<'_, KIND, PARTS, V, DIGITS, RUNS>
{
    /// Adds the products of a step's codes of the first band, or of that of the turn, with the first tile of inputs. (Codes of eight
    /// bits have no signs.)
    ///
    /// # Panics
    /// If there are fewer codes or inputs than fill the registers.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn first<const TURN: usize>(&self, codes: &[Pair], inputs: &[i32]) {
        assert!(Self::WIDE <= codes.len() && Self::INPUTS <= inputs.len(), "codes and inputs of a step");
        let band = if Self::TILES == 1 { 0 } else { TURN };
        macro_rules! with {
            ($product:literal, $sums:literal) => {
                tiles!(
                    "tileloadd tmm4, [{codes} + {line} * 2]",
                    "tileloadd tmm6, [{inputs} + {row}]",
                    concat!($product, " ", $sums, ", tmm6, tmm4");
                    codes = in(reg) codes.as_ptr().cast::<Lanes<i32>>().wrapping_add(band),
                    line = in(reg) size_of::<Lanes<i32>>(),
                    inputs = in(reg) inputs.as_ptr(),
                    row = in(reg) Self::WIDE * size_of::<i32>(),
                )
            };
        }
        macro_rules! first {
            ($first:literal, $second:literal) => {
                if KIND == 8 { with!("tdpbsud", $first) } else { with!("tdpbssd", $first) }
            };
        }
        // SAFETY: the registers are configured, as [`Runs`](super::Runs) says, for ROWS rows and WIDE lanes, as `multiply` asserts.
        // A vector is read for each lane of the step, the first or second of each pair of codes, and ROWS rows of lanes of inputs:
        // there are these by the assertion. No other memory is touched, nor the stack.
        unsafe { of_run!(TURN, first) }
    }

    /// The same of the second band, or of the second tile of inputs, after the first.
    ///
    /// # Panics
    /// As above.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn second<const TURN: usize>(&self, codes: &[Pair], inputs: &[i32]) {
        assert!(Self::WIDE <= codes.len() && Self::INPUTS <= inputs.len(), "codes and inputs of a step");
        macro_rules! with {
            ($product:literal, $sums:literal) => {
                match Self::TILES {
                    1 => tiles!(
                        "tileloadd tmm5, [{codes} + {line} * 2]",
                        concat!($product, " ", $sums, ", tmm6, tmm5");
                        codes = in(reg) codes.as_ptr().cast::<Lanes<i32>>().wrapping_add(1),
                        line = in(reg) size_of::<Lanes<i32>>(),
                    ),
                    _ => tiles!(
                        "tileloadd tmm7, [{inputs} + {row}]",
                        concat!($product, " ", $sums, ", tmm7, tmm4");
                        inputs = in(reg) inputs.as_ptr().wrapping_add(Self::ROWS * Self::WIDE),
                        row = in(reg) Self::WIDE * size_of::<i32>(),
                    ),
                }
            };
        }
        macro_rules! second {
            ($first:literal, $second:literal) => {
                if KIND == 8 { with!("tdpbsud", $second) } else { with!("tdpbssd", $second) }
            };
        }
        // SAFETY: as above; of inputs, the second ROWS rows of lanes are read.
        unsafe { of_run!(TURN, second) }
    }
}
