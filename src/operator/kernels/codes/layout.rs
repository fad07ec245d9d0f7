//! How the columns of rows of codes are cut into runs, and their inputs into integers.

use super::packed::chunk;

/// Codes in a lane of a vector.
pub(super) const EACH: usize = 4;

/// Columns that share a unit at most: sums of their products with 8 bits still fit with 8 bits to spare, and a large
/// input is felt no farther.
pub(super) const LONGEST: usize = 256;

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

/// The power of two in which the largest of a run of inputs has 23 bits, NaN if one is not finite. (Vectors of the caller's
/// instructions: it is part of it.)
#[inline(always)]
pub(super) fn unit(x: &[f32]) -> f32 {
    // NaN and infinity have the largest bits.
    unit_of(f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & (u32::MAX >> 1)))))
}

/// The same of the largest.
pub(super) fn unit_of(largest: f32) -> f32 {
    const LARGEST: f32 = (127 << 16) as f32;
    if !largest.is_finite() {
        return f32::NAN;
    }
    // (Any unit serves zeros, and the least one would make numbers that processors are slow to multiply.)
    if largest == 0.0 {
        return 1.0;
    }
    // The power of two at or above the quotient; the least normal number serves what is smaller still.
    let quotient = (largest / LARGEST).max(f32::MIN_POSITIVE);
    let below = f32::from_bits(quotient.to_bits() & !((1 << 23) - 1));
    if below < quotient { below * 2.0 } else { below }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_have_a_unit_like_any() {
        // (With the least one products of scales would be subnormal, which take processors hundreds of cycles.)
        assert_eq!((unit(&[0.0; 5]), unit(&[])), (1.0, 1.0));
        assert!(unit(&[0.0, f32::MIN_POSITIVE / 4.0]) == f32::MIN_POSITIVE && unit(&[1.0, f32::NAN]).is_nan());
    }
}
