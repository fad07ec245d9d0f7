//! Which N of M, and how that is packed.

use crate::error::{Error, Result};

/// The pattern N:M: n of every m consecutive inputs are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nm {
    pub(super) n: usize,
    pub(super) m: usize,
}

impl Nm {
    /// 2 of 4, the pattern of sparse tensor cores.
    pub const TWO_FOUR: Nm = Nm { n: 2, m: 4 };
    /// The largest M: choices are enumerated, C(8, 4) = 70 at most.
    pub const LARGEST: usize = 8;

    /// n of every m.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless 1 ≤ n < m ≤ 8.
    pub fn new(n: usize, m: usize) -> Result<Self> {
        match n >= 1 && n < m && m <= Self::LARGEST {
            true => Ok(Nm { n, m }),
            false => Err(Error::Unsupported(format!("{n}:{m} sparsity: expected 1 ≤ n < m ≤ {}", Self::LARGEST))),
        }
    }

    /// N, the number of values in a group.
    pub fn n(self) -> usize {
        self.n
    }

    /// M, the inputs in a group.
    pub fn m(self) -> usize {
        self.m
    }

    /// All choices of N of M as bit masks (bit i: input i of the group), in lexicographic order of the
    /// chosen positions: 01, 02, 03, 12, 13, 23 for 2:4.
    pub fn masks(self) -> Vec<u8> {
        let mut all: Vec<u8> = (0..=(1u16 << self.m) - 1).map(|mask| mask as u8).collect();
        all.retain(|mask| mask.count_ones() as usize == self.n);
        // The lexicographic order of ascending positions is the falling order of the reversed bits.
        all.sort_by_key(|mask| std::cmp::Reverse(mask.reverse_bits()));
        all
    }

    /// Full groups in a row of `columns` inputs.
    pub fn groups(self, columns: usize) -> usize {
        columns / self.m
    }

    /// Stored values in a row of `columns` inputs.
    pub fn values_per_row(self, columns: usize) -> usize {
        self.groups(columns) * self.n + columns % self.m
    }

    /// (digits in a byte, bits of a digit): the first is 0 where whole bits are packed.
    fn packing(self) -> (usize, usize) {
        let choices = self.masks().len();
        let mut digits = 0;
        while choices.pow(digits as u32 + 1) <= 256 {
            digits += 1;
        }
        let bits = choices.next_power_of_two().trailing_zeros() as usize;
        if bits * digits > 8 { (digits, bits) } else { (0, bits) }
    }

    /// Bytes on disk of the positions of a row of `columns` inputs.
    pub fn position_bytes(self, columns: usize) -> usize {
        match self.packing() {
            (0, bits) => (self.groups(columns) * bits).div_ceil(8),
            (digits, _) => self.groups(columns).div_ceil(digits),
        }
    }

    /// Packs the ranks of a row.
    pub(super) fn pack(self, ranks: &[u8]) -> Vec<u8> {
        let base = self.masks().len() as u8;
        match self.packing() {
            (0, bits) => {
                let mut bytes = vec![0u8; (ranks.len() * bits).div_ceil(8)];
                for (i, bit) in (0..ranks.len()).flat_map(|i| (0..bits).map(move |bit| (i, bit))) {
                    let at = i * bits + bit;
                    bytes[at / 8] |= (ranks[i] >> bit & 1) << (at % 8);
                }
                bytes
            }
            // The first group of a byte is its lowest digit.
            (digits, _) => ranks
                .chunks(digits)
                .map(|chunk| chunk.iter().rev().fold(0u8, |byte, &rank| byte * base + rank))
                .collect(),
        }
    }

    /// The ranks of a row of `groups` groups; `None` if the bytes are no such thing.
    pub(super) fn unpack(self, bytes: &[u8], groups: usize) -> Option<Vec<u8>> {
        let base = self.masks().len() as u8;
        let ranks: Vec<u8> = match self.packing() {
            (0, bits) => {
                let bit = |at: usize| bytes.get(at / 8).map_or(0, |byte| byte >> (at % 8) & 1);
                let rank = |i: usize| (0..bits).map(|b| bit(i * bits + b) << b).sum();
                (0..groups).map(rank).collect()
            }
            (digits, _) => {
                let digit = |i: usize| bytes.get(i / digits).map(|byte| byte / base.pow((i % digits) as u32) % base);
                (0..groups).map(digit).collect::<Option<_>>()?
            }
        };
        // Packing again finds ranks out of range, wrong lengths and bits beyond the end alike.
        (ranks.iter().all(|&rank| rank < base) && self.pack(&ranks) == bytes).then_some(ranks)
    }
}
