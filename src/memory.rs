//! How numbers come from memory fastest, in which processors differ.

#[cfg(target_arch = "x86_64")]
mod reading;

#[cfg(target_arch = "x86_64")]
pub(crate) use self::reading::Reading;

/// Bytes of a cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Asks for the cache lines that lie `ahead` bytes behind those of `of`.
#[inline(always)]
pub(crate) fn prefetch<L>(of: &L, ahead: usize) {
    ask::<true, L>(of, ahead);
}

/// The same for what comes much later: into the second cache, so that the nearest one keeps what is at work.
#[inline(always)]
pub(crate) fn prefetch_early<L>(of: &L, ahead: usize) {
    ask::<false, L>(of, ahead);
}

#[inline(always)]
fn ask<const NEAREST: bool, L>(of: &L, ahead: usize) {
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (of, ahead);
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of::<L>()).step_by(LINE) {
        let at = std::ptr::from_ref(of).wrapping_byte_add(ahead.wrapping_add(line)).cast();
        // SAFETY: SSE belongs to every x86-64 processor. A prefetch is a hint: it reads and writes nothing that a
        // program can see and faults on no address, so that one beyond the numbers does no harm, and the pointer to
        // it was computed by wrapping arithmetic.
        #[allow(unsafe_code)]
        unsafe {
            if NEAREST {
                _mm_prefetch::<_MM_HINT_T0>(at);
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at);
            }
        }
    }
}

/// Asks for what comes later in a row, and [`early`] for the rows that come next.
#[inline(always)]
pub(crate) fn prefetch_rows<L>(of: &L, ahead: usize, early: usize) {
    prefetch(of, ahead);
    if early > 0 {
        prefetch_early(of, early);
    }
}

/// How far ahead rows that come next, so many bytes behind those that are multiplied, should be asked for early; 0 if nothing is gained by it
/// here.
#[cfg(target_arch = "x86_64")]
pub(crate) fn early(next: usize) -> usize {
    Reading::here().early(next)
}

/// The same where nothing was measured.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn early(_next: usize) -> usize {
    0
}
