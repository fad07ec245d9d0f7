//! How columns of rows are cut, and which way inputs meet them.

use super::super::packed::chunk;
use super::avx2::Digits;
use super::matrix::{self, Shape};
use super::{EACH, LANES, TOGETHER, available, bfloat, few};
use crate::scalar::{DType, Real};

/// Columns that share a unit at most: sums of their products with 8 bits still fit with 8 bits to spare, and a large
/// input is felt no farther.
const LONGEST: usize = 256;

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
    /// `None` if there is no kernel for such rows here: for inputs in another dtype, rows without columns, groups that end within
    /// a lane, and machines without the instructions.
    pub(super) fn new<T: Real>(bits: u8, group: usize, columns: usize) -> Option<Self> {
        let present = available() || Digits::all(bits).next().is_some();
        if T::DTYPE != DType::F32 || columns == 0 || !present {
            return None;
        }
        Layout::cut(bits, group, columns, LONGEST)
    }

    /// With runs of so many columns at most.
    fn cut(bits: u8, group: usize, columns: usize, longest: usize) -> Option<Self> {
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
}

/// What inputs are laid out for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Way {
    /// Vectors.
    Vectors,
    /// Vectors of eight rows, in such digits.
    Narrow(Digits),
    /// Matrix instructions with bytes.
    Bytes(Shape),
    /// Matrix instructions with bf16, and so many inputs at a time.
    Numbers(usize),
}

impl Way {
    /// For so many inputs, and how columns are cut then: eight or sixteen at a time by matrix instructions, where there are such,
    /// but for a few. `None` if there is no kernel for such rows here, or if there are so many that rows had better be written out.
    pub(super) fn new<T: Real>(inputs: usize, bits: u8, group: usize, columns: usize) -> Option<(Self, Layout)> {
        let layout = Layout::new::<T>(bits, group, columns)?;
        if !available() {
            let digits = Digits::all(bits).next().filter(|digits| inputs <= digits.most());
            return digits.map(|digits| (Way::Narrow(digits), layout));
        }
        if inputs <= TOGETHER || !matrix::available() {
            return Some((Way::Vectors, layout));
        }
        let together = if inputs <= LANES / 2 { LANES / 2 } else { LANES };
        let numbers = Way::Numbers(together);
        match numbers.layout::<T>(bits, group, columns) {
            Some(cut) if few::takes(cut.run, cut != layout, inputs) => Some((numbers, cut)),
            _ => Some((Way::Bytes(Shape::of(together, &layout)), layout)),
        }
    }

    /// How the columns of rows are cut that inputs meet this way; `None` if there is no kernel for them.
    pub(super) fn layout<T: Real>(self, bits: u8, group: usize, columns: usize) -> Option<Layout> {
        let layout = Layout::new::<T>(bits, group, columns)?;
        match self {
            Way::Numbers(_) if bits > bfloat::WIDEST => None,
            Way::Narrow(digits) if !Digits::all(bits).any(|of| of == digits) => None,
            Way::Numbers(_) => Layout::cut(bits, group, columns, few::LONGEST),
            _ => Some(layout),
        }
    }

    /// Inputs at a time.
    pub(super) fn width(self) -> usize {
        match self {
            Way::Vectors | Way::Narrow(_) => TOGETHER,
            Way::Bytes(shape) => shape.inputs,
            Way::Numbers(inputs) => inputs,
        }
    }
}
