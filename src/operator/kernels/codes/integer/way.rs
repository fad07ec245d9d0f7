//! Which way inputs meet the columns of rows.

use super::super::layout::LONGEST;
pub(super) use super::super::layout::Layout;
use super::avx2::Digits;
use super::matrix::{self, Shape};
use super::{LANES, TOGETHER, available, bfloat, few, four};
use crate::scalar::{DType, Real};

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
    /// For so many inputs, and how columns are cut then: four, eight or sixteen at a time by matrix instructions, where there are
    /// such, but for one or two, and for four where groups do not end with tiles. `None` if there is no kernel for such rows here,
    /// or if there are so many that rows had better be written out.
    pub(super) fn new<T: Real>(inputs: usize, bits: u8, group: usize, columns: usize) -> Option<(Self, Layout)> {
        let layout = Layout::new::<T>(bits, group, columns)?;
        if !available() {
            let digits = Digits::all(bits).next().filter(|digits| inputs <= digits.most());
            return digits.map(|digits| (Way::Narrow(digits), layout));
        }
        if inputs <= TOGETHER || !matrix::available() {
            let four = matrix::available() && inputs >= four::FEWEST;
            let shape = if four { four::shape(&layout) } else { None };
            return Some((shape.map_or(Way::Vectors, Way::Bytes), layout));
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
