//! Whether a product is shared out among threads, and in how many parts.
//!
//! To hand work over and to wait for it takes 5 to 50 µs, as threads that sleep have to be woken, and that is what counts: not
//! how many operations a product has, but how long they take, which for packed codes in matrix instructions is a thirtieth of what
//! it is for others. What is estimated here is off by a factor of three or so between machines.

/// Nanoseconds on one thread from which on work is shared out. (In tests soon enough for small matrices to be.)
const FROM: usize = if cfg!(test) { 1 << 12 } else { 100_000 };

/// Whether work of so many nanoseconds stays on this thread: little of it, that of a thread which has its own share of something
/// larger, and all where there is one thread.
pub(crate) fn alone(nanoseconds: usize) -> bool {
    nanoseconds < FROM || rayon::current_thread_index().is_some() || rayon::current_num_threads() == 1
}

/// How fast one thread is, in numbers a nanosecond.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    /// Stored numbers that come from memory.
    read: usize,
    /// Products with one vector each.
    multiplied: usize,
}

impl Pace {
    /// Floats, and whatever is made of them.
    pub(crate) const FLOATS: Pace = Pace { read: 8, multiplied: 64 };
    /// bf16 in matrix instructions.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const HALVES: Pace = Pace { read: 8, multiplied: 256 };
    /// Packed codes.
    pub(crate) const CODES: Pace = Pace { read: 64, multiplied: 256 };

    /// Nanoseconds of a product of so many stored numbers with some vectors.
    pub(crate) fn time(self, stored: usize, vectors: usize) -> usize {
        (stored / self.read).max(stored.saturating_mul(vectors) / self.multiplied)
    }
}

/// Parts of so many things that are shared out: a few for each thread, so that none waits long for the last.
pub(crate) fn share(all: usize) -> usize {
    all.div_ceil(4 * rayon::current_num_threads())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_shared_out_but_not_twice() {
        let several = rayon::current_num_threads() > 1;
        assert!(alone(0) && alone(FROM - 1));
        assert_eq!(alone(FROM), !several);
        assert!(rayon::scope(|_| alone(usize::MAX)), "a share is not shared out");
        // Few vectors wait for memory, many for arithmetic; nothing overflows.
        assert_eq!([1, 8, 16].map(|vectors| Pace::FLOATS.time(6400, vectors)), [800, 800, 1600]);
        assert_eq!([1, 4, 8].map(|vectors| Pace::CODES.time(6400, vectors)), [100, 100, 200]);
        assert!(Pace::CODES.time(usize::MAX, usize::MAX) >= FROM);
        let threads = rayon::current_num_threads();
        assert_eq!([0, 1, 8 * threads].map(share), [0, 1, 2]);
    }
}
