//! Which way inputs meet the columns of rows.

pub(super) use super::super::layout::Layout;
use super::avx2::Digits;
use super::matrix::{self, Shape};
use super::{ActivationBits, LANES, TOGETHER, available, bfloat, few, four};
use crate::scalar::{DType, Real};

/// Whether there is a kernel for such rows here: not for inputs in another dtype, rows without columns, groups that end within a lane,
/// and machines without the instructions.
pub(in super::super) fn takes<T: Real>(bits: u8, group: usize, columns: usize) -> bool {
    let present = available() || Digits::all(bits, ActivationBits::default()).next().is_some();
    // (That there is a run does not depend on how long one may be.)
    let cut = || Layout::cut(bits, group, columns, ActivationBits::default().longest()).is_some();
    T::DTYPE == DType::F32 && columns > 0 && present && cut()
}

/// What inputs are laid out for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Way {
    /// Vectors, and inputs in so many bits.
    Vectors(ActivationBits),
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
    pub(super) fn new<T: Real>(
        inputs: usize,
        activations: ActivationBits,
        bits: u8,
        group: usize,
        columns: usize,
    ) -> Option<(Self, Layout)> {
        if !takes::<T>(bits, group, columns) {
            return None;
        }
        let with = |way: Way| Some((way, way.layout(bits, group, columns)?));
        if !available() {
            let digits = Digits::all(bits, activations).next().filter(|digits| inputs <= digits.most());
            return with(Way::Narrow(digits?));
        }
        let layout = Layout::cut(bits, group, columns, ActivationBits::TwentyFour.longest())?;
        if inputs <= TOGETHER || !matrix::available() {
            let four = matrix::available() && inputs >= four::FEWEST;
            let shape = if four { four::shape(&layout) } else { None };
            return with(shape.map_or(Way::Vectors(activations), Way::Bytes));
        }
        let together = if inputs <= LANES / 2 { LANES / 2 } else { LANES };
        let numbers = Way::Numbers(together);
        match numbers.layout(bits, group, columns) {
            Some(cut) if few::takes(cut.run, cut != layout, inputs) => Some((numbers, cut)),
            _ => Some((Way::Bytes(Shape::of(together, &layout)), layout)),
        }
    }

    /// How the columns of rows are cut that inputs meet this way; `None` if there is no kernel for them.
    pub(super) fn layout(self, bits: u8, group: usize, columns: usize) -> Option<Layout> {
        match self {
            Way::Numbers(_) if bits > bfloat::WIDEST => None,
            Way::Numbers(_) => Layout::cut(bits, group, columns, few::LONGEST),
            _ => Layout::cut(bits, group, columns, self.activations().longest()),
        }
    }

    /// The same of rows that ask for inputs of so many bits; `None` as well if those would not be laid out this way.
    pub(super) fn serves<T: Real>(
        self,
        activations: ActivationBits,
        bits: u8,
        group: usize,
        columns: usize,
    ) -> Option<Layout> {
        let met = match self {
            Way::Vectors(of) => of == activations,
            Way::Narrow(digits) => Digits::all(bits, activations).any(|of| of == digits),
            Way::Bytes(_) | Way::Numbers(_) => true,
        };
        if met && takes::<T>(bits, group, columns) { self.layout(bits, group, columns) } else { None }
    }

    /// Bits of inputs.
    pub(super) fn activations(self) -> ActivationBits {
        match self {
            Way::Vectors(activations) => activations,
            Way::Narrow(digits) => digits.activations(),
            Way::Bytes(_) | Way::Numbers(_) => ActivationBits::TwentyFour,
        }
    }

    /// Inputs at a time.
    pub(super) fn width(self) -> usize {
        match self {
            // As many as fill the registers with their sums.
            Way::Vectors(ActivationBits::Eight) => 2 * TOGETHER,
            Way::Vectors(_) | Way::Narrow(_) => TOGETHER,
            Way::Bytes(shape) => shape.inputs,
            Way::Numbers(inputs) => inputs,
        }
    }
}
