//! Tile registers: AMX. A register has up to 16 rows of 64 bytes, of which one instruction multiplies all with those of another.

use std::marker::PhantomData;
use std::sync::LazyLock;

use crate::processor::cpuid;

/// Whether the machine has the instructions and the system lets this process use them. (It is asked once, and sets memory
/// for the registers aside then for each thread that uses them.)
pub(super) fn available() -> bool {
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| present() && permitted());
    *ALLOWED
}

/// Whether there are products of bytes and of bf16 in tiles. (All processors with tiles have both.)
fn present() -> bool {
    const ALL: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    cfg!(feature = "avx512") && is_x86_feature_detected!("avx512f") && cpuid(7).edx & ALL == ALL
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

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Assembly that uses the tile registers.
macro_rules! tiles {
    ($($code:expr),+; $($operand:tt)*) => {
        std::arch::asm!(
            $($code),+,
            $($operand)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}
pub(super) use tiles;

/// The tile registers of this thread, in use from the first word to the last.
pub(super) struct Registers {
    /// They stay with their thread.
    here: PhantomData<*const ()>,
}

impl Registers {
    /// Of so many rows of so many bytes each.
    ///
    /// # Panics
    /// Without the instructions, and for more than 16 rows of 64 bytes.
    #[allow(unsafe_code)]
    pub(super) fn new(registers: [(u8, u16); 8]) -> Self {
        let fits = |&(rows, bytes): &(u8, u16)| (1..=16).contains(&rows) && (1..=64).contains(&bytes);
        assert!(available() && registers.iter().all(fits), "registers that there are");
        let mut of = Configuration { palette: 1, start: 0, reserved: [0; 14], bytes: [0; 16], rows: [0; 16] };
        for (at, (rows, bytes)) in registers.into_iter().enumerate() {
            (of.rows[at], of.bytes[at]) = (rows, bytes);
        }
        // SAFETY: the machine has the instruction and the system permits it. It reads the 64 bytes of the configuration, in
        // which no register has more than the 16 rows of 64 bytes that palette 1 allows, by the assertion. It writes tile
        // registers only, which compiled code does not use.
        unsafe {
            tiles!("ldtilecfg [{of}]"; of = in(reg) &raw const of,);
        }
        Registers { here: PhantomData }
    }
}

impl Drop for Registers {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: as there is a `Registers`, the machine has the instruction and the system permits it. It empties the tile
        // registers, which nothing else on this thread uses.
        unsafe {
            tiles!("tilerelease";);
        }
    }
}
