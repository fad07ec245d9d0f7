//! Tile registers for two pairs of sums by turns: while one pair is added up, the one before is written where it belongs.

use super::tiles::{Registers, tiles};
use super::{LANES, Lanes};

/// Assembly, for the registers that have the sums of a turn.
macro_rules! of_run {
    ($run:expr, $code:ident) => {
        match $run % 2 {
            0 => $code!("tmm0", "tmm1"),
            _ => $code!("tmm2", "tmm3"),
        }
    };
}
pub(super) use of_run;

/// Registers: four for sums, and two each for codes (tmm4, tmm5) and inputs (tmm6, tmm7) of a step.
pub(super) struct Runs(Registers);

impl Runs {
    /// For so many rows of inputs, and codes of so many lanes of 16 rows.
    ///
    /// # Panics
    /// Without the instructions, and for more rows or lanes than a register's.
    pub(super) fn new(rows: usize, lanes: usize) -> Self {
        assert!(rows <= LANES && lanes <= LANES, "rows and lanes of a register");
        let (sums, codes) = ((rows as u8, 64), (lanes as u8, 64));
        let inputs = (rows as u8, (lanes * size_of::<i32>()) as u16);
        Runs(Registers::new([sums, sums, sums, sums, codes, codes, inputs, inputs]))
    }

    /// Begins a turn.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn clear(&self, run: usize) {
        macro_rules! clear {
            ($first:literal, $second:literal) => {
                tiles!(concat!("tilezero ", $first), concat!("tilezero ", $second);)
            };
        }
        // SAFETY: the registers are configured, as there is a `Registers`, which stays on its thread: nothing that is called
        // while there is one touches them, since compilers emit tile instructions for their own intrinsics only, and the
        // system restores them for each thread. No memory is touched.
        unsafe { of_run!(run, clear) }
    }

    /// Writes one of the pair of sums of a turn.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn put<const OF: usize, N>(&self, run: usize, to: &mut [[Lanes<N>; LANES]; 2]) {
        const { assert!(size_of::<Lanes<N>>() == 64 && OF < 2) };
        macro_rules! put {
            ($first:literal, $second:literal) => {
                match OF {
                    0 => tiles!(
                        concat!("tilestored [{to} + {line}], ", $first);
                        to = in(reg) &raw mut to[OF],
                        line = in(reg) size_of::<Lanes<N>>(),
                    ),
                    _ => tiles!(
                        concat!("tilestored [{to} + {line}], ", $second);
                        to = in(reg) &raw mut to[OF],
                        line = in(reg) size_of::<Lanes<N>>(),
                    ),
                }
            };
        }
        // SAFETY: the registers are configured, as above. At most LANES rows of 64 bytes are written: there are as many, and registers
        // have no more. No other memory is touched, nor the stack.
        unsafe { of_run!(run, put) }
    }
}
