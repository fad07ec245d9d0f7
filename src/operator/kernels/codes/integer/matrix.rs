//! Sums of products by matrix instructions: AMX, of codes of 16 rows with up to 16 inputs in one instruction.
//!
//! A tile register has up to 16 rows of 64 bytes. `tdpbssd` adds up the products of the signed bytes of one, of which each row
//! is an input's, with those of another, of which each row is a lane of [`panel`](super::panel): a row of sums is an input's
//! with 16 rows of the matrix. The sums are those of `vpdpbusd`, to the last bit.

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::LazyLock;

use super::panel::Lanes;
use super::{BANDS, LANES, LIMBS};

/// Whether the machine has the instructions and the system lets this process use them. (It is asked once, and sets memory
/// for the registers aside then for each thread that uses them.)
pub(super) fn available() -> bool {
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| has_bytes() && permitted());
    *ALLOWED
}

/// Whether there are products of bytes in tiles.
#[allow(unsafe_code, unused_unsafe)]
fn has_bytes() -> bool {
    const TILES: u32 = 1 << 24;
    const BYTES: u32 = 1 << 25;
    if !super::available() {
        return false;
    }
    // SAFETY: machines with AVX-512, as was asked, have the instruction and this leaf.
    let features = unsafe { std::arch::x86_64::__cpuid_count(7, 0) }.edx;
    features & TILES != 0 && features & BYTES != 0
}

/// Asks for the registers, which Linux gives to those who ask.
#[cfg(all(target_os = "linux", not(miri)))]
#[allow(unsafe_code)]
fn permitted() -> bool {
    /// `ARCH_REQ_XCOMP_PERM`.
    const REQUEST: libc::c_long = 0x1023;
    /// `XFEATURE_XTILEDATA`.
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and reads or writes no memory of this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn permitted() -> bool {
    false
}

/// Inputs that meet codes together, and lanes of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Shape {
    inputs: usize,
    lanes: usize,
}

impl Shape {
    /// For so many inputs and runs of so many lanes; `None` without the instructions.
    pub(super) fn new(inputs: usize, lanes: usize) -> Option<Self> {
        if inputs == 0 || lanes == 0 || !available() {
            return None;
        }
        // As few tiles as there can be, of one size.
        let inputs = inputs.div_ceil(inputs.div_ceil(LANES));
        Some(Shape { inputs, lanes: lanes.next_multiple_of(4).min(LANES) })
    }

    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(super) fn lanes(&self) -> usize {
        self.lanes
    }
}

/// Sums of the products of each limb of some inputs with each band of rows.
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[[Lanes<i32>; LANES]; BANDS]; LIMBS]);

impl Default for Sums {
    fn default() -> Self {
        Sums([[[Lanes::default(); LANES]; BANDS]; LIMBS])
    }
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// The tile registers of this thread, in use from the first word to the last.
pub(super) struct Registers {
    shape: Shape,
    /// They stay with their thread.
    here: PhantomData<*const ()>,
}

impl Registers {
    #[allow(unsafe_code)]
    pub(super) fn new(shape: Shape) -> Self {
        let (inputs, lanes) = (shape.inputs as u8, shape.lanes as u8);
        let mut of = Configuration { palette: 1, start: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        // Six of sums, one of codes, one of inputs.
        of.bytes[..7].fill(64);
        of.rows[..6].fill(inputs);
        (of.rows[6], of.rows[7], of.bytes[7]) = (lanes, inputs, 4 * u16::from(lanes));
        // SAFETY: a shape is there only if the machine has the instruction and the system permits it. It reads the 64 bytes
        // of the configuration, in which no register has more than the 16 rows of 64 bytes that palette 1 allows: a shape
        // has 1 to 16 inputs and 4 to 16 lanes. It writes tile registers only, which compiled code does not use.
        unsafe {
            asm!(
                "ldtilecfg [{of}]",
                of = in(reg) &raw const of,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, readonly),
            );
        }
        Registers { shape, here: PhantomData }
    }

    /// Lanes of a step.
    pub(super) fn lanes(&self) -> usize {
        self.shape.lanes
    }

    /// The sums of the products of inputs, step by step, limb by limb, input by input, with the lanes that begin some codes.
    /// In the last step inputs are zero where their lanes end. Ahead of what comes next, so many lines are asked for in each
    /// step.
    ///
    /// # Panics
    /// If there are lanes for fewer steps than inputs have.
    #[allow(unsafe_code)]
    pub(super) fn add_up(
        &self,
        inputs: &[i32],
        codes: &[[Lanes<i32>; BANDS]],
        ahead: (*const u8, usize),
        to: &mut Sums,
    ) {
        let Shape { inputs: count, lanes } = self.shape;
        let limb = count * lanes;
        let steps = inputs.len() / (LIMBS * limb);
        assert!(steps > 0 && steps * lanes <= codes.len(), "lanes for all inputs");
        let bytes = size_of::<i32>();
        // SAFETY: the registers are configured, as there is a `Registers`, which stays on its thread: nothing that is called
        // while there is one touches them, since compilers emit tile instructions for their own intrinsics only, and the
        // system restores them for each thread. Each pass reads three times `limb` integers of the inputs and `lanes` pairs
        // of vectors of the codes, and there are `steps` of both by the assertion. Sums are written to as many rows of 64
        // bytes as there are inputs, at most the 16 of each band of each limb, of which `to` has six in a row. No other
        // memory is touched, nor the stack: a prefetch reads nothing and may be given any address.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2",
                "tilezero tmm3", "tilezero tmm4", "tilezero tmm5",
                "2:",
                // The first band with all limbs.
                "tileloadd tmm6, [{codes} + {line} * 2]",
                "tileloadd tmm7, [{inputs} + {row}]",
                "tdpbssd tmm0, tmm7, tmm6",
                "add {inputs}, {limb}",
                "tileloadd tmm7, [{inputs} + {row}]",
                "tdpbssd tmm2, tmm7, tmm6",
                "add {inputs}, {limb}",
                "tileloadd tmm7, [{inputs} + {row}]",
                "tdpbssd tmm4, tmm7, tmm6",
                // The second band, the other way round.
                "tileloadd tmm6, [{codes} + {line} * 2 + 64]",
                "tdpbssd tmm5, tmm7, tmm6",
                "sub {inputs}, {limb}",
                "tileloadd tmm7, [{inputs} + {row}]",
                "tdpbssd tmm3, tmm7, tmm6",
                "sub {inputs}, {limb}",
                "tileloadd tmm7, [{inputs} + {row}]",
                "tdpbssd tmm1, tmm7, tmm6",
                "mov {left}, {lines}",
                "test {left}, {left}",
                "jz 4f",
                "3:",
                "prefetcht0 [{ahead}]",
                "add {ahead}, {line}",
                "dec {left}",
                "jnz 3b",
                "4:",
                "add {inputs}, {limb}",
                "lea {inputs}, [{inputs} + {limb} * 2]",
                "add {codes}, {lanes}",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{to} + {line}], tmm0",
                "tilestored [{to} + {line} + 1024], tmm1",
                "tilestored [{to} + {line} + 2048], tmm2",
                "tilestored [{to} + {line} + 3072], tmm3",
                "tilestored [{to} + {line} + 4096], tmm4",
                "tilestored [{to} + {line} + 5120], tmm5",
                inputs = inout(reg) inputs.as_ptr() => _,
                codes = inout(reg) codes.as_ptr() => _,
                steps = inout(reg) steps => _,
                ahead = inout(reg) ahead.0 => _,
                left = out(reg) _,
                lines = in(reg) ahead.1,
                to = in(reg) &raw mut *to,
                line = in(reg) 64usize,
                row = in(reg) lanes * bytes,
                limb = in(reg) limb * bytes,
                lanes = in(reg) lanes * size_of::<[Lanes<i32>; BANDS]>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Registers {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: as there is a `Registers`, the machine has the instruction and the system permits it. It empties the tile
        // registers, which nothing else on this thread uses.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, nomem),
            );
        }
    }
}
