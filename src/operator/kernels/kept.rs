//! Memory for the digits of inputs, which a thread keeps from one product to the next: to get it anew, filled with zeros, takes
//! about as long as to write the digits.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use super::lanes::Lanes;

/// Vectors that a thread keeps at most: 4 MiB.
const MOST: usize = (4 << 20) / size_of::<Lanes<i32>>();

thread_local! {
    static MEMORY: Cell<Vec<Lanes<i32>>> = const { Cell::new(Vec::new()) };
}

/// Some vectors, of which those that a product before has left are not zero.
#[derive(Debug)]
pub(super) struct Kept(Vec<Lanes<i32>>);

impl Kept {
    pub(super) fn new(count: usize) -> Self {
        // (Nothing is kept while a thread ends.)
        let mut memory = MEMORY.try_with(Cell::take).unwrap_or_default();
        if memory.capacity() < count {
            memory = Vec::with_capacity(count);
        }
        memory.resize(count, Lanes::default());
        Kept(memory)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.0);
        if memory.capacity() <= MOST {
            // More than one may have been in use: the largest stays.
            let _ = MEMORY.try_with(|kept| {
                let other = kept.take();
                kept.set(if other.capacity() > memory.capacity() { other } else { memory });
            });
        }
    }
}

impl Deref for Kept {
    type Target = [Lanes<i32>];

    fn deref(&self) -> &[Lanes<i32>] {
        &self.0
    }
}

impl DerefMut for Kept {
    fn deref_mut(&mut self) -> &mut [Lanes<i32>] {
        &mut self.0
    }
}
