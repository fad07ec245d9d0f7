//! Bytes that begin with a line of the cache: vectors that are loaded from them are in one line each.

use std::ops::Deref;

use super::packed::LINE;
use crate::linalg::pages;

#[derive(Debug)]
pub(super) struct Aligned {
    bytes: Vec<u8>,
    /// What is before them.
    start: usize,
}

impl Aligned {
    /// Up to so many bytes, which are appended to the vector that `fill` is given.
    pub(super) fn new(most: usize, fill: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes: Vec<u8> = pages::with_capacity(most + LINE);
        // (An interpreter may not know.)
        let start = bytes.as_ptr().align_offset(LINE).min(LINE);
        bytes.resize(start, 0);
        fill(&mut bytes);
        Aligned { bytes, start }
    }
}

impl From<Vec<u8>> for Aligned {
    /// The bytes where they are.
    fn from(bytes: Vec<u8>) -> Self {
        Aligned { bytes, start: 0 }
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

impl Clone for Aligned {
    fn clone(&self) -> Self {
        Aligned::new(self.len(), |to| to.extend_from_slice(self))
    }
}

impl PartialEq for Aligned {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}
