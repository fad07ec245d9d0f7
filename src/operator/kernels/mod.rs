//! Products of structured leaves with many vectors.

mod bit_mask;
mod blocks;
mod codes;
mod turn;
mod two_four;

pub(crate) use self::bit_mask::MaskedRow;
pub(crate) use self::blocks::{Job, Output, Stretch, block_product, stretch_product, stretches};
pub(crate) use self::codes::{CodedRow, Prepared, each_code, pack};
pub(crate) use self::two_four::TwoFour;

/// Asks for the cache lines that lie `ahead` bytes behind those of `of`.
#[inline(always)]
fn prefetch<L>(of: &L, ahead: usize) {
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (of, ahead);
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of::<L>()).step_by(64) {
        let at = std::ptr::from_ref(of).wrapping_byte_add(ahead + line).cast();
        // SAFETY: SSE belongs to every x86-64 processor. A prefetch is a hint: it reads and writes nothing that a
        // program can see and faults on no address, so that one beyond the numbers does no harm, and the pointer to
        // it was computed by wrapping arithmetic.
        #[allow(unsafe_code)]
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(at);
        }
    }
}
