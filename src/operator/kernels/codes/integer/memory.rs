//! How codes come from memory fastest, in which processors differ.

use std::arch::x86_64::CpuidResult;
use std::sync::LazyLock;

use super::cpuid;

/// What is read together, and how far ahead it is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reading {
    /// Panels that meet as few inputs as let the sums of all of them stay in registers: a stream of codes each.
    pub panels: usize,
    /// Bytes of all panels between what is multiplied and what is asked for.
    pub ahead: usize,
    /// The same where tiles of inputs take turns at a run, if that has fewer.
    pub ahead_by_turns: usize,
}

impl Reading {
    /// Two streams are faster than one where memory answers late: on an Intel Xeon (Sapphire Rapids) one takes 1.4 times as long. (A third of
    /// the bytes is too little there.)
    pub(super) const TWO_STREAMS: Self = Reading { panels: 2, ahead: 6144, ahead_by_turns: 4096 };
    /// Zen 5 reads one stream, asked for farther ahead, faster than two of any distance.
    pub(super) const ONE_STREAM: Self = Reading { panels: 1, ahead: 8192, ahead_by_turns: 8192 };

    /// That of this machine. (It is asked once.)
    pub(super) fn here() -> Self {
        static HERE: LazyLock<Reading> = LazyLock::new(|| Reading::of(&cpuid(0), &cpuid(1)));
        *HERE
    }

    /// That of a processor by what the leaves 0 and 1 of `cpuid` say: its vendor and its family.
    fn of(vendor: &CpuidResult, version: &CpuidResult) -> Self {
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        let family = (version.eax >> 8 & 0xf) + (version.eax >> 20 & 0xff);
        match name.as_flattened() {
            b"AuthenticAMD" if family >= 0x1a => Self::ONE_STREAM,
            _ => Self::TWO_STREAMS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a processor of some vendor says, and its version.
    fn of(vendor: &[u8; 12], version: u32) -> Reading {
        let word = |at: usize| u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]]);
        let vendor = CpuidResult { eax: 16, ebx: word(0), edx: word(4), ecx: word(8) };
        Reading::of(&vendor, &CpuidResult { eax: version, ebx: 0, ecx: 0, edx: 0 })
    }

    #[test]
    fn processors_are_told_apart_by_vendor_and_family() {
        // EPYC of the families 1Ah (Zen 5) and 19h (Zen 4), a Xeon of family 6; what comes later, and another vendor's family 1Ah.
        assert_eq!(of(b"AuthenticAMD", 0x00b0_0f21), Reading::ONE_STREAM);
        assert_eq!(of(b"AuthenticAMD", 0x0120_0f00), Reading::ONE_STREAM);
        assert_eq!(of(b"AuthenticAMD", 0x00a1_0f11), Reading::TWO_STREAMS);
        assert_eq!(of(b"GenuineIntel", 0x000c_06f2), Reading::TWO_STREAMS);
        assert_eq!(of(b"GenuineIntel", 0x00b0_0f21), Reading::TWO_STREAMS);
    }
}
