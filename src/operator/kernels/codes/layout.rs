//! How the columns of rows of codes are cut into runs, and their inputs into integers.

use super::packed::chunk;

/// Codes in a lane of a vector.
pub(super) const EACH: usize = 4;

/// How the columns of a row are cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Layout {
    columns: usize,
    /// Codes that begin in the same byte of a vector, or 1: a lane of it has every such column of a chunk.
    pub parts: usize,
    /// Consecutive columns that share scales and units.
    pub run: usize,
    /// Runs of a group.
    each: usize,
    /// Runs of a row, and lanes of the last.
    runs: usize,
    last: usize,
}

impl Layout {
    /// With runs of so many columns at most; `None` if groups end within a chunk of codes.
    pub(super) fn cut(bits: u8, group: usize, columns: usize, longest: usize) -> Option<Self> {
        let chunk = chunk(bits);
        let run = match group {
            group if group >= columns => columns.next_multiple_of(chunk).min(longest),
            group => (1..=longest / chunk).rev().map(|k| k * chunk).find(|run| group.is_multiple_of(*run))?,
        };
        let (each, runs) = (if group >= columns { usize::MAX } else { group / run }, columns.div_ceil(run));
        let last = columns.saturating_sub(runs.saturating_sub(1) * run).next_multiple_of(chunk) / EACH;
        Some(Layout { columns, parts: chunk / EACH, run, each, runs, last })
    }

    #[inline(always)]
    pub(super) fn runs(&self) -> usize {
        self.runs
    }

    /// The group of a run.
    #[inline(always)]
    pub(super) fn group_of(&self, run: usize) -> usize {
        if self.each == 1 { run } else { run / self.each }
    }

    /// The groups of all runs, one after the other. (To divide for each takes two percent of a product with inputs of 8 bits.)
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn groups(&self) -> impl Iterator<Item = usize> + use<> {
        let (each, mut group, mut left) = (self.each, 0, self.each);
        (0..self.runs).map(move |_| {
            if left == 0 {
                (group, left) = (group + 1, each);
            }
            left -= 1;
            group
        })
    }

    /// Lanes of a run.
    #[inline(always)]
    pub(super) fn lanes(&self, run: usize) -> usize {
        if run + 1 < self.runs { self.run / EACH } else { self.last }
    }

    /// The columns of a run of an input.
    #[inline(always)]
    pub(super) fn of_run<'x>(&self, run: usize, x: &'x [f32]) -> &'x [f32] {
        let from = run * self.run;
        x.get(from..x.len().min(from + self.run)).unwrap_or_default()
    }
}

/// What inputs of some unit come to, from what their digits of so many bits come to, the largest first.
pub(super) fn sum(digits: &[i32], bits: u32, unit: f32) -> f32 {
    let whole = digits.iter().fold(0, |whole, &digit| (whole << bits) + i64::from(digit));
    (whole as f64 * f64::from(unit)) as f32
}

/// The largest of a run of inputs without its sign, which is not a number or infinite if one is. (Vectors of the caller's
/// instructions: it is part of it.)
#[inline(always)]
pub(super) fn largest(x: &[f32]) -> f32 {
    // NaN and infinity have the largest bits.
    f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & (u32::MAX >> 1))))
}
