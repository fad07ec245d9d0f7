//! Which way inputs meet the columns of rows.

pub(super) use super::super::layout::Layout;
use super::avx2::Digits;
use super::matrix::{self, Shape};
use super::{ActivationBits, LANES, TOGETHER, available, bfloat, few, turns};
use crate::scalar::{DType, Real};

/// Whether there is a kernel for such rows here: not for inputs in another dtype, rows without columns, groups that end within a lane,
/// and machines without the instructions.
pub(in super::super) fn takes<T: Real>(bits: u8, group: usize, columns: usize) -> bool {
    let present = available() || Digits::all(1, bits, ActivationBits::default()).next().is_some();
    // (That there is a run does not depend on how long one may be.)
    let cut = || Layout::cut(bits, group, columns, ActivationBits::default().longest()).is_some();
    T::DTYPE == DType::F32 && columns > 0 && present && cut()
}

/// What decides, beside how many inputs there are: what rows ask of them, and how they are cut.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub activations: ActivationBits,
    pub bits: u8,
    pub group: usize,
    pub columns: usize,
}

/// What inputs are laid out for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Way {
    /// Vectors, and inputs in so many bits.
    Vectors(ActivationBits),
    /// Vectors of eight rows, in such digits.
    Narrow(Digits),
    /// Matrix instructions with bytes: a unit of each panel after the other.
    Turns(Shape),
    /// The same with many inputs.
    Bytes(Shape),
    /// Matrix instructions with bf16, and so many inputs at a time.
    Numbers(usize),
}

impl Way {
    /// For so many inputs, and how columns are cut then: up to sixteen at a time by matrix instructions, where there are such, but
    /// for one, or two. `None` if there is no kernel for such rows here, or if there are so many that rows had better be written
    /// out.
    pub(super) fn new<T: Real>(inputs: usize, rows: Rows) -> Option<(Self, Layout)> {
        let Rows { activations, bits, group, columns } = rows;
        if !takes::<T>(bits, group, columns) {
            return None;
        }
        let with = |way: Way| Some((way, way.layout(bits, group, columns)?));
        if !available() {
            let digits = Digits::all(inputs, bits, activations).next();
            return with(Way::Narrow(digits.filter(|digits| inputs <= digits.most(columns))?));
        }
        if !matrix::available() || inputs < 2 {
            return with(Way::Vectors(activations));
        }
        if let Some(turns) = Self::by_turns(inputs, rows) {
            return Some(turns);
        }
        if inputs <= TOGETHER {
            return with(Way::Vectors(activations));
        }
        let layout = Layout::cut(bits, group, columns, ActivationBits::TwentyFour.longest())?;
        let numbers = with(Way::Numbers(if inputs <= LANES / 2 { LANES / 2 } else { LANES }));
        match numbers.filter(|(_, cut)| few::takes(cut.run, *cut != layout, inputs)) {
            Some(numbers) => Some(numbers),
            None => with(Way::Bytes(Shape::of(LANES, ActivationBits::TwentyFour, &layout))),
        }
    }

    /// A unit of each panel after the other, if that is a way for so many inputs.
    fn by_turns(inputs: usize, Rows { activations, bits, group, columns }: Rows) -> Option<(Self, Layout)> {
        let layout = Layout::cut(bits, group, columns, turns::COLUMNS)?;
        let shape = turns::shape(inputs, activations, bits, &layout)?;
        Some((Way::Turns(shape), layout))
    }

    /// How the columns of rows are cut that inputs meet this way; `None` if there is no kernel for them.
    pub(super) fn layout(self, bits: u8, group: usize, columns: usize) -> Option<Layout> {
        match self {
            Way::Numbers(_) if bits > bfloat::WIDEST => None,
            Way::Numbers(_) => Layout::cut(bits, group, columns, few::LONGEST),
            Way::Turns(_) => Layout::cut(bits, group, columns, turns::COLUMNS),
            Way::Narrow(digits) => Layout::cut(bits, group, columns, digits.longest()),
            _ => Layout::cut(bits, group, columns, self.activations().longest()),
        }
    }

    /// The same of rows that ask for so many inputs in so many bits; `None` as well if those would not be laid out this way.
    pub(super) fn serves<T: Real>(self, inputs: usize, rows: Rows) -> Option<Layout> {
        let Rows { activations, bits, group, columns } = rows;
        let by_turns = Self::by_turns(inputs, rows);
        let met = match self {
            Way::Vectors(of) => of == activations,
            Way::Narrow(digits) => Digits::all(inputs, bits, activations).any(|of| of == digits),
            Way::Turns(_) => by_turns.is_some_and(|(way, _)| way == self),
            // (What asks for fewer bits is to have the numbers that it has by itself.)
            Way::Bytes(_) | Way::Numbers(_) => activations == ActivationBits::TwentyFour || by_turns.is_none(),
        };
        if met && takes::<T>(bits, group, columns) { self.layout(bits, group, columns) } else { None }
    }

    /// Bits of inputs.
    pub(super) fn activations(self) -> ActivationBits {
        match self {
            Way::Vectors(activations) => activations,
            Way::Narrow(digits) => digits.activations(),
            Way::Turns(shape) => shape.activations,
            Way::Bytes(_) | Way::Numbers(_) => ActivationBits::TwentyFour,
        }
    }

    /// Inputs at a time.
    pub(super) fn width(self) -> usize {
        match self {
            // As many as fill the registers with their sums.
            Way::Vectors(ActivationBits::Eight) => 2 * TOGETHER,
            Way::Vectors(_) => TOGETHER,
            Way::Narrow(digits) => digits.inputs(),
            Way::Turns(shape) | Way::Bytes(shape) => shape.inputs,
            Way::Numbers(inputs) => inputs,
        }
    }
}
