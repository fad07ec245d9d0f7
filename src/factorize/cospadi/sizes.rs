//! What a budget pays for: how many atoms, and how many entries of the codes.

use super::super::Outline;
use super::refine::Entries;
use crate::operator::{Bitmask, IndexSet, Nm};
use crate::scalar::DType;

/// A group's outline under a limit.
#[derive(Debug, Clone)]
pub(super) struct Sizes {
    /// Outputs of each weight.
    heights: Vec<usize>,
    inputs: usize,
    dtype: DType,
    limit: u64,
    /// Atoms are rows of the weights.
    pivots: bool,
    pattern: Option<Nm>,
}

impl Sizes {
    pub(super) fn new(group: &[Outline], limit: u64, pivots: bool, pattern: Option<Nm>) -> Self {
        let heights = group.iter().map(|outline| outline.shape.0).collect();
        let (inputs, dtype) = group.first().map_or((0, DType::F32), |first| (first.shape.1, first.dtype));
        Sizes { heights, inputs, dtype, limit, pivots, pattern }
    }

    pub(super) fn rows(&self) -> usize {
        self.heights.iter().sum()
    }

    /// Whether pivots are a list; in a group they have unit codes among the others.
    fn listed(&self) -> bool {
        self.pivots && self.heights.len() == 1
    }

    /// Rows that have codes of their own with k atoms.
    pub(super) fn coded(&self, k: usize) -> usize {
        self.rows().saturating_sub(if self.pivots { k } else { 0 })
    }

    /// Bytes of everything for k atoms with these entries.
    pub(super) fn bytes(&self, k: usize, entries: Entries) -> u64 {
        let atoms = self.dtype.bytes(k * self.inputs) as u64;
        let (list, rows) = match self.listed() {
            true => (IndexSet::bytes_of(self.rows(), k), self.coded(k)),
            false => (0, self.rows()),
        };
        let units = rows - self.coded(k);
        atoms
            + list
            + match entries {
                Entries::All => self.dtype.bytes(rows * k) as u64,
                Entries::Free(count) => Bitmask::<f32>::bytes_of((rows, k), count + units, self.dtype),
                Entries::Groups(nm) => {
                    (self.dtype.bytes(rows * nm.values_per_row(k)) + rows * nm.position_bytes(k)) as u64
                }
            }
    }

    /// What the limit allows the codes of k atoms: all entries, or the pattern, or so many; `None` if not even
    /// one for each coded row.
    pub(super) fn entries(&self, k: usize) -> Option<Entries> {
        let fits = |entries: Entries| Some(entries).filter(|&entries| self.bytes(k, entries) <= self.limit);
        if let Some(nm) = self.pattern {
            return fits(Entries::Groups(nm));
        }
        fits(Entries::All).or_else(|| {
            let left = self.limit.checked_sub(self.bytes(k, Entries::Free(0)))?;
            let count = (left as usize / self.dtype.bytes(1)).min(self.coded(k) * k);
            Some(Entries::Free(count)).filter(|_| count >= self.coded(k))
        })
    }

    /// The range of k worth a look: from the most atoms that may have full codes (at least 1) to the most there
    /// may be at all; `None` if the limit is too low for one.
    pub(super) fn range(&self) -> Option<(usize, usize)> {
        let most = self.rows().min(self.inputs);
        let last = (1..=most).rev().find(|&k| self.entries(k).is_some())?;
        let full = (1..=last).rev().find(|&k| self.entries(k) == Some(Entries::All));
        Some((full.unwrap_or(1), last))
    }

    /// The fewest atoms with at least `ratio` atoms for each entry of a code.
    pub(super) fn at_ratio(&self, ratio: f64) -> Option<usize> {
        let (first, last) = self.range()?;
        let enough = |k: usize| match self.entries(k) {
            Some(Entries::Free(count)) => (k * self.coded(k)) as f64 >= ratio * count as f64,
            _ => false,
        };
        Some((first..=last).find(|&k| enough(k)).unwrap_or(last))
    }

    /// The least that any choice takes.
    pub(super) fn least(&self) -> u64 {
        let entries = self.pattern.map_or(Entries::Free(self.coded(1)), Entries::Groups);
        if self.rows().min(self.inputs) == 0 { 0 } else { self.bytes(1, entries).min(self.bytes(1, Entries::All)) }
    }

    /// Fraction of the weights' numbers that atoms and entries are, masks left out: the papers' own count.
    pub(super) fn paper(&self, k: usize, count: usize) -> f64 {
        (k * self.inputs + count) as f64 / (self.rows() * self.inputs).max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(heights: &[usize], inputs: usize, keep: f64, pivots: bool, pattern: Option<Nm>) -> Sizes {
        let outlines: Vec<Outline> =
            heights.iter().map(|&m| Outline { shape: (m, inputs), dtype: DType::BF16 }).collect();
        let before: u64 = outlines.iter().map(Outline::bytes).sum();
        Sizes::new(&outlines, (before as f64 * keep) as u64, pivots, pattern)
    }

    #[test]
    fn budgets_are_used_to_the_last_entry() {
        // The papers' example, 4096 inputs and 12288 outputs at 0.8, two atoms for each entry: 3657 atoms by
        // their formula with the mask, (0.8·16·d₁·d₂)/(16·d₁ + (16/2 + 1)·d₂).
        let found = sizes(&[12288], 4096, 0.8, false, None);
        let k = found.at_ratio(2.0).unwrap();
        assert!(k.abs_diff(3657) <= 1, "{k}");
        for (heights, inputs) in [(&[64][..], 48), (&[30, 50], 24), (&[9], 40)] {
            for pivots in [false, true] {
                for keep in [0.3, 0.5, 0.8] {
                    let found = sizes(heights, inputs, keep, pivots, None);
                    let Some((first, last)) = found.range() else { continue };
                    for k in first..=last {
                        let Some(entries) = found.entries(k) else { continue };
                        let bytes = found.bytes(k, entries);
                        assert!(bytes <= found.limit);
                        if let Entries::Free(count) = entries {
                            assert!(count == k * found.coded(k) || bytes + 2 > found.limit, "{k}: {bytes}");
                        }
                    }
                    assert!(found.entries(last + 1).is_none() || last == inputs.min(found.rows()));
                    assert!(found.least() <= found.limit);
                }
            }
        }
        assert!(sizes(&[64], 48, 0.001, true, None).range().is_none());
        assert!(matches!(sizes(&[64], 48, 0.7, false, Some(Nm::TWO_FOUR)).entries(20), Some(Entries::Groups(_))));
    }
}
