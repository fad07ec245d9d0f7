//! Tile registers for the sums of two runs by turns, of two bands each: while one run's are added up, those of the one before are
//! written where they belong.

use super::tiles::{Registers, tiles};
use super::{BANDS, Lanes};

/// Assembly, for the registers that have the sums of a run.
macro_rules! of_run {
    ($run:expr, $code:ident) => {
        match $run % 2 {
            0 => $code!("tmm0", "tmm1"),
            _ => $code!("tmm2", "tmm3"),
        }
    };
}
pub(super) use of_run;

/// Registers: four of COUNT sums of 16 rows, and two each for codes (tmm4, tmm5) and COUNT inputs (tmm6, tmm7) of a step.
pub(super) struct Runs<const COUNT: usize>(Registers);

impl<const COUNT: usize> Runs<COUNT> {
    /// For codes of so many lanes of 16 rows.
    ///
    /// # Panics
    /// Without the instructions, and for more lanes than a register's.
    pub(super) fn new(lanes: usize) -> Self {
        let (sums, codes) = ((COUNT as u8, 64), (lanes as u8, 64));
        let inputs = (COUNT as u8, (lanes * size_of::<i32>()) as u16);
        Runs(Registers::new([sums, sums, sums, sums, codes, codes, inputs, inputs]))
    }

    /// Begins a run.
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

    /// Writes the sums of a band of a run.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn put<const BAND: usize, N, const ROOM: usize>(&self, run: usize, to: &mut [[Lanes<N>; ROOM]; BANDS]) {
        const { assert!(COUNT <= ROOM && size_of::<Lanes<N>>() == 64 && BAND < BANDS) };
        macro_rules! put {
            ($first:literal, $second:literal) => {
                match BAND {
                    0 => tiles!(
                        concat!("tilestored [{to} + {line}], ", $first);
                        to = in(reg) &raw mut to[BAND],
                        line = in(reg) size_of::<Lanes<N>>(),
                    ),
                    _ => tiles!(
                        concat!("tilestored [{to} + {line}], ", $second);
                        to = in(reg) &raw mut to[BAND],
                        line = in(reg) size_of::<Lanes<N>>(),
                    ),
                }
            };
        }
        // SAFETY: the registers are configured, as above. COUNT rows of 64 bytes are written: there are no fewer, by the
        // assertion. No other memory is touched, nor the stack.
        unsafe { of_run!(run, put) }
    }
}
