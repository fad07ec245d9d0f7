//! Numbers that begin with a line of the cache: vectors that are loaded from them are in one line each.

use std::ops::Deref;

use crate::linalg::pages;

/// Bytes of a line.
const LINE: usize = 64;

#[derive(Debug)]
pub(crate) struct Aligned<N> {
    numbers: Vec<N>,
    /// What is before them.
    start: usize,
}

impl<N: Copy + Default> Aligned<N> {
    /// Up to so many numbers, which are appended to the vector that `fill` is given.
    pub(crate) fn new(most: usize, fill: impl FnOnce(&mut Vec<N>)) -> Self {
        let slack = LINE / size_of::<N>();
        let mut numbers: Vec<N> = pages::with_capacity(most + slack);
        // (An interpreter may not know.)
        let start = numbers.as_ptr().align_offset(LINE).min(slack);
        numbers.resize(start, N::default());
        fill(&mut numbers);
        Aligned { numbers, start }
    }
}

impl<N> From<Vec<N>> for Aligned<N> {
    /// The numbers where they are.
    fn from(numbers: Vec<N>) -> Self {
        Aligned { numbers, start: 0 }
    }
}

impl<N> Deref for Aligned<N> {
    type Target = [N];

    fn deref(&self) -> &[N] {
        &self.numbers[self.start..]
    }
}

impl<N: Copy + Default> Clone for Aligned<N> {
    fn clone(&self) -> Self {
        Aligned::new(self.len(), |to| to.extend_from_slice(self))
    }
}

impl<N: PartialEq> PartialEq for Aligned<N> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}
