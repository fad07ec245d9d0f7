//! What processors of this architecture gain by.

use std::arch::x86_64::CpuidResult;
use std::sync::LazyLock;

use super::{LINE, prefetch, prefetch_early};
use crate::processor::cpuid;

/// Bytes of the rows that are multiplied together, at most, if the next are to be in the second cache before: a part of it.
const ROWS: usize = 1 << 18;

/// What is asked for before it is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Reading {
    /// Bytes between what is multiplied and what is asked for into the nearest cache.
    ahead: usize,
    /// Bytes of a window, a power of two: while one is multiplied, the halves of the next are asked for into the second cache side by side,
    /// as two streams. 0 if nothing is.
    window: usize,
}

impl Reading {
    /// Two streams are faster than one where memory answers late, and the second cache has room for more requests than the nearest
    /// one: on an Intel Xeon (the core of Emerald Rapids) codes come as fast as a program reads that does nothing else, and else take 1.1 to 1.2
    /// times as long.
    const TWO_STREAMS: Self = Reading { ahead: 4096, window: 16_384 };
    /// AMD's processors read one stream as fast: Zen 5, which was measured most, one that is asked for farther ahead faster than two of any
    /// distance, and Zen 4 as fast as bytes promise.
    const ONE_STREAM: Self = Reading { ahead: 8192, window: 0 };

    /// Bytes to rows that come next, if they are asked for into the second cache, else 0.
    pub(super) fn early(self, next: usize) -> usize {
        if self.window > 0 && next <= ROWS { next } else { 0 }
    }

    /// The same no nearer than so many bytes.
    #[inline(always)]
    pub(crate) fn beyond(self, bytes: usize) -> Self {
        Reading { ahead: self.ahead.max(bytes), ..self }
    }

    /// Asks for two lines ahead of a chunk, and for two of the next window, or for some of the two alone.
    #[inline(always)]
    pub(crate) fn ask(self, chunk: &u8, lines: [usize; 2]) {
        for line in lines {
            prefetch(chunk, self.ahead + line * LINE);
        }
        if self.window > 0 {
            // Chunks follow in memory, those of the next panel as well, so that windows may begin anywhere.
            let within = std::ptr::from_ref(chunk).addr() & (self.window - 1);
            for line in lines {
                prefetch_early(chunk, self.later(within, line));
            }
        }
    }

    /// Bytes from a chunk that begins somewhere within a window to the line that is asked for in a half of the next.
    #[inline(always)]
    fn later(self, within: usize, half: usize) -> usize {
        self.window + half * (self.window / 2) - within / 2
    }

    /// That of this machine. (It is asked once. Miri has no such instruction.)
    pub(crate) fn here() -> Self {
        static HERE: LazyLock<Reading> =
            LazyLock::new(|| if cfg!(miri) { Reading::ONE_STREAM } else { Reading::of(&cpuid(0)) });
        *HERE
    }

    /// That of a processor by the vendor that leaf 0 of `cpuid` names.
    fn of(vendor: &CpuidResult) -> Self {
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        if name.as_flattened() == b"AuthenticAMD" { Self::ONE_STREAM } else { Self::TWO_STREAMS }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a processor of some vendor says.
    fn of(vendor: &[u8; 12]) -> Reading {
        let word = |at: usize| u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]]);
        Reading::of(&CpuidResult { eax: 16, ebx: word(0), edx: word(4), ecx: word(8) })
    }

    #[test]
    fn each_line_of_a_window_is_asked_for_once_beside_the_one_before() {
        let reading = Reading::TWO_STREAMS;
        // Of chunks of two lines, wherever the first of them begins.
        for first in [0, LINE] {
            let chunks = (first..reading.window).step_by(2 * LINE);
            let asked = chunks.flat_map(|within| [0, 1].map(|half| (within + reading.later(within, half)) / LINE));
            let mut asked: Vec<_> = asked.collect();
            asked.sort_unstable();
            let lines = reading.window / LINE;
            assert_eq!(asked, (lines..2 * lines).collect::<Vec<_>>(), "chunks from {first} on");
        }
    }

    #[test]
    fn rows_that_come_next_are_asked_for_early_where_that_gains_and_if_they_are_a_part_of_the_cache() {
        assert_eq!(Reading::TWO_STREAMS.early(ROWS), ROWS);
        assert_eq!(Reading::TWO_STREAMS.early(ROWS + 1), 0);
        assert_eq!(Reading::ONE_STREAM.early(ROWS), 0);
    }

    #[test]
    fn processors_are_told_apart_by_vendor() {
        assert_eq!(of(b"AuthenticAMD"), Reading::ONE_STREAM);
        assert_eq!(of(b"GenuineIntel"), Reading::TWO_STREAMS);
        assert_eq!(of(b"CentaurHauls"), Reading::TWO_STREAMS);
    }
}
