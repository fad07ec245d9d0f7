//! A subset of 0..len, stored as an index list or a bit mask, whichever is smaller.

use crate::error::{Error, Result};
use crate::scalar::DType;

/// Strictly ascending indices below `len`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexSet {
    len: usize,
    indices: Vec<u32>,
}

impl IndexSet {
    /// Sorts the indices.
    ///
    /// # Errors
    /// [`Error::Shape`] if one is out of range or occurs twice.
    pub fn new(len: usize, mut indices: Vec<u32>) -> Result<Self> {
        indices.sort_unstable();
        if indices.windows(2).any(|pair| pair[0] == pair[1]) || indices.last().is_some_and(|&i| i as usize >= len) {
            return Err(Error::shape(format!("distinct indices below {len}"), indices));
        }
        Ok(IndexSet { len, indices })
    }

    /// The size of the set that is chosen from.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many are chosen.
    pub fn count(&self) -> usize {
        self.indices.len()
    }

    /// Whether nothing is chosen.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// The chosen indices, ascending.
    pub fn chosen(&self) -> impl Iterator<Item = usize> + '_ {
        self.indices.iter().map(|&i| i as usize)
    }

    /// The others, ascending.
    pub fn rest(&self) -> Vec<usize> {
        let mut chosen = self.indices.iter().peekable();
        (0..self.len).filter(|&i| chosen.next_if(|&&c| c as usize == i).is_none()).collect()
    }

    /// Bytes on disk of a set of `count` out of `len`.
    pub fn bytes_of(len: usize, count: usize) -> u64 {
        let width = if len <= 1 << 16 { 2 } else { 4 };
        (count * width).min(len.div_ceil(8)) as u64
    }

    /// The stored form: dtype, element count and little-endian bytes. U16 or U32 is a list; U8 is a
    /// mask whose bit i%8 of byte i/8 says whether i is chosen.
    pub fn encode(&self) -> (DType, usize, Vec<u8>) {
        let mask = self.len.div_ceil(8);
        let list = self.indices.len() * if self.len <= 1 << 16 { 2 } else { 4 };
        if mask < list {
            let mut bytes = vec![0u8; mask];
            self.chosen().for_each(|i| bytes[i / 8] |= 1 << (i % 8));
            (DType::U8, mask, bytes)
        } else if self.len <= 1 << 16 {
            (DType::U16, self.count(), self.indices.iter().flat_map(|&i| (i as u16).to_le_bytes()).collect())
        } else {
            (DType::U32, self.count(), self.indices.iter().flat_map(|i| i.to_le_bytes()).collect())
        }
    }

    /// Reads the stored form back.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::UnsupportedDType`] if the bytes do not describe such a set.
    pub fn decode(len: usize, dtype: DType, bytes: &[u8]) -> Result<Self> {
        let indices: Vec<u32> = match dtype {
            DType::U8 => {
                if bytes.len() != len.div_ceil(8) {
                    return Err(Error::shape(format!("a mask of {} bytes", len.div_ceil(8)), bytes.len()));
                }
                let set = |i: &usize| bytes[i / 8] >> (i % 8) & 1 == 1;
                if (len..bytes.len() * 8).any(|i| set(&i)) {
                    return Err(Error::shape(format!("a mask of {len} bits"), "bits set beyond them"));
                }
                (0..len).filter(set).map(|i| i as u32).collect()
            }
            DType::U16 => bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b).into()).collect(),
            DType::U32 => bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect(),
            dtype => return Err(Error::UnsupportedDType { dtype }),
        };
        let sorted = indices.is_sorted();
        let set = IndexSet::new(len, indices)?;
        if sorted { Ok(set) } else { Err(Error::shape("ascending indices", "unsorted ones")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_in_the_smaller_form() {
        for (len, chosen, dtype) in [
            (10, vec![], DType::U16),
            (100, vec![3, 99], DType::U16),
            (100, (0..90).collect::<Vec<u32>>(), DType::U8),
            (17, vec![16, 0, 8], DType::U8),
            (70_000, vec![69_999, 1], DType::U32),
        ] {
            let set = IndexSet::new(len, chosen.clone()).unwrap();
            let (stored, _, bytes) = set.encode();
            assert_eq!(stored, dtype, "{len} {chosen:?}");
            assert_eq!(bytes.len() as u64, IndexSet::bytes_of(len, chosen.len()));
            assert_eq!(IndexSet::decode(len, stored, &bytes).unwrap(), set);
            assert_eq!(set.count() + set.rest().len(), len);
        }
    }

    #[test]
    fn refuses_what_is_no_set() {
        assert!(IndexSet::new(4, vec![4]).is_err());
        assert!(IndexSet::new(4, vec![1, 1]).is_err());
        assert!(IndexSet::decode(4, DType::U8, &[0b1_0000]).is_err());
        assert!(IndexSet::decode(4, DType::U8, &[0, 0]).is_err());
        assert!(IndexSet::decode(9, DType::U16, &[2, 0, 1, 0]).is_err());
        assert!(IndexSet::decode(9, DType::F32, &[]).is_err());
    }
}
