//! Fresh memory for large results.
//!
//! The first touch of a 4 KiB page costs a fault: for a 64 MiB result that is as long as a fast
//! transform of it. Linux gives pages of 2 MiB to those who ask (NumPy asks), a five hundredth of the faults.
//! And free memory, which an allocator may hold in pieces.

use ndarray::{Array2, ArrayBase};

use crate::scalar::Real;

/// From this size on huge pages are asked for: below, there is hardly a whole one inside.
const FROM: usize = 4 << 20;

/// A matrix of zeros, rows × columns, on huge pages if it is large and the system has them to give.
pub(crate) fn zeros<T: Real>(dim: (usize, usize)) -> Array2<T> {
    // Zeroed by the allocator: a large allocation is mapped, and not touched yet.
    let mut array: Array2<T> = ArrayBase::zeros(dim);
    if let Some(all) = array.as_slice_mut() {
        ask_for_huge_pages(all);
    }
    array
}

/// Empty memory for `length` numbers, on huge pages as [`zeros`].
pub(crate) fn with_capacity<T>(length: usize) -> Vec<T> {
    let mut memory = Vec::with_capacity(length);
    ask_for_huge_pages(memory.spare_capacity_mut());
    memory
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(memory: &mut [T]) {
    const PAGE: usize = 4096;
    let range = memory.as_mut_ptr_range();
    let first = (range.start as usize).next_multiple_of(PAGE);
    let end = range.end as usize / PAGE * PAGE;
    if size_of_val(memory) < FROM || end <= first {
        return;
    }
    // SAFETY: [first, end) lies inside the slice, which is borrowed exclusively, so it is mapped memory of
    // this process. MADV_HUGEPAGE changes how pages are backed, never what they hold; the call
    // keeps no pointer. It may fail (no such feature, an odd page size), and then nothing has changed.
    #[allow(unsafe_code)]
    let _ = unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_: &mut [T]) {}

/// Hands free memory back to the system: after much was freed between things that stay, glibc would keep it for
/// whoever allocates on the same thread.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn give_back() {
    // SAFETY: malloc_trim takes a number and no pointer, locks what it touches, and releases only pages that hold no
    // allocation.
    #[allow(unsafe_code)]
    let _ = unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn give_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_of_any_size() {
        for dim in [(0, 3), (1, 1), (3, 700_001), (1025, 1024)] {
            let mut zeros = zeros::<f64>(dim);
            assert!(zeros.iter().all(|&v| v == 0.0) && zeros.is_standard_layout());
            zeros.fill(1.0);
            assert_eq!(zeros.sum(), (dim.0 * dim.1) as f64);
        }
    }
}
