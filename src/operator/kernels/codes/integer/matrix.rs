//! Sums of products by matrix instructions: AMX, of codes of 16 rows with up to 16 inputs in one instruction.
//!
//! A tile register has up to 16 rows of 64 bytes. `tdpbssd` adds up the products of the signed bytes of one, of which each row
//! is an input's, with those of another, of which each row is a lane of [`panel`](super::panel): a row of sums is an input's
//! with 16 rows of the matrix. The sums are those of `vpdpbusd`, to the last bit.

use std::marker::PhantomData;

use super::panel::Pair;
use super::tiles::{self, Registers, tiles};
use super::way::Layout;
use super::{ActivationBits, BANDS, EACH, LANES, LIMBS, Lanes};

/// Whether there are matrix instructions beside those of vectors.
pub(super) fn available() -> bool {
    super::available() && tiles::available()
}

/// How inputs meet codes: a register of them has a digit of an input in each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shape {
    pub inputs: usize,
    /// What inputs are cut into.
    pub activations: ActivationBits,
    /// Lanes of codes of a step.
    pub lanes: usize,
    /// Registers that hold all digits of the inputs, and rows of each: as few as there can be, of one size.
    pub tiles: usize,
    pub rows: usize,
}

impl Shape {
    /// For so many inputs at a time, at most sixteen.
    #[inline(always)]
    pub(super) fn of(inputs: usize, activations: ActivationBits, layout: &Layout) -> Self {
        let rows = inputs * activations.bytes();
        let tiles = rows.div_ceil(LANES);
        let lanes = (layout.run / EACH).next_multiple_of(LANES / 2).min(LANES);
        Shape { inputs, activations, lanes, tiles, rows: rows.div_ceil(tiles) }
    }

    /// Integers of a register of inputs.
    #[inline(always)]
    pub(super) fn tile(&self) -> usize {
        self.rows * self.lanes
    }

    /// Integers of a step's inputs.
    #[inline(always)]
    pub(super) fn step(&self) -> usize {
        self.tiles * self.tile()
    }

    /// Steps of so many lanes.
    #[inline(always)]
    pub(super) fn steps(&self, lanes: usize) -> usize {
        lanes.div_ceil(self.lanes)
    }

    /// Integers of a run's inputs.
    #[inline(always)]
    pub(super) fn run(&self, layout: &Layout) -> usize {
        self.steps(layout.run / EACH) * self.step()
    }
}

/// Sums of the products of each digit of some inputs with each band of rows: digit, input.
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[Lanes<i32>; LIMBS * LANES]; BANDS]);

impl Default for Sums {
    fn default() -> Self {
        Sums([[Lanes::default(); LIMBS * LANES]; BANDS])
    }
}

/// Assembly, for the registers that have the sums of a band.
macro_rules! with_sums {
    ($band:expr, $code:ident) => {
        match $band {
            0 => $code!("tmm0" "tmm1" "tmm2"),
            _ => $code!("tmm3" "tmm4" "tmm5"),
        }
    };
}

/// Registers for a shape of three: all digits of many inputs.
pub(super) struct Tiles {
    shape: Shape,
    /// In use as long as there are these.
    _registers: Registers,
}

impl Tiles {
    /// # Panics
    /// Without the instructions, and for a shape of more than a register's rows and lanes, or of other than three registers.
    pub(super) fn new(shape: Shape) -> Self {
        assert!(shape.rows <= LANES && shape.lanes <= LANES && shape.tiles == LIMBS, "registers for a shape");
        let (sums, codes) = ((shape.rows as u8, 64), (shape.lanes as u8, 64));
        let inputs = (shape.rows as u8, (shape.lanes * size_of::<i32>()) as u16);
        Tiles { shape, _registers: Registers::new([sums, sums, sums, sums, sums, sums, codes, inputs]) }
    }

    /// Them, of the shape that they have: a compiler may know more of it.
    ///
    /// # Panics
    /// If they have another one.
    #[inline(always)]
    pub(super) fn of(&self, shape: Shape) -> Shaped<'_> {
        assert!(self.shape == shape, "registers of this shape");
        Shaped { shape, registers: PhantomData }
    }
}

/// Registers of a shape.
#[derive(Clone, Copy)]
pub(super) struct Shaped<'r> {
    shape: Shape,
    registers: PhantomData<&'r Registers>,
}

impl Shaped<'_> {
    /// Begins the sums of a band.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn clear<const BAND: usize>(self) {
        const { assert!(BAND < BANDS) };
        // SAFETY: the registers are configured, as there is a `Registers`, which stays on its thread: nothing that is called
        // while there is one touches them, since compilers emit tile instructions for their own intrinsics only, and the
        // system restores them for each thread. No memory is touched.
        unsafe {
            match BAND {
                0 => tiles!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2";),
                _ => tiles!("tilezero tmm3", "tilezero tmm4", "tilezero tmm5";),
            }
        }
    }

    /// Adds the products of the codes and inputs of a step, of a band. Inputs are zero where their lanes end.
    ///
    /// # Panics
    /// If there are not the codes and inputs of a step.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn add_up<const BAND: usize>(self, codes: &[Pair], inputs: &[i32]) {
        const { assert!(BAND < BANDS) };
        let shape = self.shape;
        assert!(shape.lanes <= codes.len() && shape.step() <= inputs.len(), "codes and inputs of a step");
        let (codes, inputs) = (codes.as_ptr().cast::<Lanes<i32>>().wrapping_add(BAND), inputs.as_ptr());
        let (row, tile) = (shape.lanes * size_of::<i32>(), shape.tile() * size_of::<i32>());
        macro_rules! step {
            ($($sums:literal)+) => {
                tiles!(
                    "tileloadd tmm6, [{codes} + {line} * 2]",
                    $(
                        "tileloadd tmm7, [{inputs} + {row}]",
                        concat!("tdpbssd ", $sums, ", tmm7, tmm6"),
                        "add {inputs}, {tile}"
                    ),+;
                    codes = in(reg) codes,
                    line = in(reg) size_of::<Lanes<i32>>(),
                    inputs = inout(reg) inputs => _,
                    row = in(reg) row,
                    tile = in(reg) tile,
                )
            };
        }
        // SAFETY: the registers are configured, as above. A vector is read for each row of the register of codes, the first or
        // second of each pair, and as many inputs as all registers of inputs of a step have: there are these by the assertion.
        // No other memory is touched, nor the stack.
        unsafe {
            with_sums!(BAND, step);
        }
    }

    /// Puts the sums of a band where they belong.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub(super) fn put<const BAND: usize>(self, to: &mut Sums) {
        const { assert!(BAND < BANDS) };
        let tile = self.shape.rows * size_of::<Lanes<i32>>();
        macro_rules! put {
            ($($sums:literal)+) => {
                tiles!(
                    $(concat!("tilestored [{to} + {line}], ", $sums), "add {to}, {tile}"),+;
                    to = inout(reg) to.0[BAND].as_mut_ptr() => _,
                    line = in(reg) size_of::<Lanes<i32>>(),
                    tile = in(reg) tile,
                )
            };
        }
        // SAFETY: the registers are configured, as above. As many rows of 64 bytes are written as there are digits of inputs,
        // at most the 48 that a band has room for; no other memory is touched, nor the stack.
        unsafe {
            with_sums!(BAND, put);
        }
    }
}
