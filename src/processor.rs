//! What a processor says of itself, beyond what the standard library asks.

use std::arch::x86_64::{__cpuid_count, CpuidResult};

/// A leaf of what it says.
pub(crate) fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: all processors of this architecture have the instruction, and answer leaves that they do not know with what is of no
    // use, but does no harm. (Older compilers call it unsafe.)
    #[allow(unsafe_code, unused_unsafe)]
    unsafe {
        __cpuid_count(leaf, 0)
    }
}
