//! The packed codes of a matrix, in the order in which the machine takes them.
//!
//! On disk a row is a stream of bits that ends on a whole byte, and so it is here, unless there is a kernel for panels of
//! rows side by side: then a chunk of columns of each of 32 rows follow each other, as kernels put them into the lanes of
//! vectors. There are as many bytes either way, but for rows that fill the last panel; a matrix of fewer than [`FEWEST`] rows
//! stays as it is.

use std::borrow::Cow;
use std::ops::Range;

use half::f16;

use super::super::Aligned;
use crate::scalar::Real;

/// Bytes of a row that are gathered together.
pub(super) const LINE: usize = 64;
/// Rows side by side.
pub(super) const PANEL: usize = 32;
/// Rows that take less time as part of a panel than one by one.
const FEWEST: usize = 8;

/// Codes of a row that follow each other in a panel: 32 bits where a byte holds whole codes, else half a byte for each bit
/// of a code.
pub(super) fn chunk(bits: u8) -> usize {
    match bits {
        2 => 16,
        4 => 8,
        _ => 4,
    }
}

/// Bytes of a row of n codes.
pub(crate) fn width(n: usize, bits: u8) -> usize {
    (n * usize::from(bits)).div_ceil(8)
}

/// Codes of `bits` bits of an m×n matrix.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PackedCodes {
    bits: u8,
    shape: (usize, usize),
    bytes: Aligned<u8>,
    /// Whether rows are side by side.
    panels: bool,
    /// Of the rows of each panel for each group, if rows are side by side.
    grids: Grids,
}

/// What makes numbers of the codes of a matrix, row by row, group by group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Beside<'a, T> {
    pub scales: &'a [T],
    /// Zero points; half of all levels if there are none.
    pub zeros: Option<&'a [u8]>,
    /// The numbers of the middle codes; zero if there are none.
    pub offsets: Option<&'a [T]>,
}

/// The same for the rows of panels.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Grids {
    pub scales: Floats,
    /// Empty if there are none, as are offsets.
    pub zeros: Vec<[u8; PANEL]>,
    pub offsets: Floats,
}

/// Numbers of the rows of panels, in 16 bits where that is exact.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Floats {
    Half(Vec<[f16; PANEL]>),
    Wide(Vec<[f32; PANEL]>),
}

impl Grids {
    /// Whether codes count from elsewhere than the middle. (To add nothing for each run takes as long as to add something.)
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(super) fn shifted(&self) -> bool {
        let offsets = match &self.offsets {
            Floats::Half(all) => !all.is_empty(),
            Floats::Wide(all) => !all.is_empty(),
        };
        offsets || !self.zeros.is_empty()
    }

    /// Asks for what belongs to the group that comes so many behind one.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn ask_for(&self, group: usize, ahead: usize) {
        fn ask<N>(of: &[N], group: usize, ahead: usize) {
            of.get(group).iter().for_each(|of| crate::memory::prefetch(*of, ahead * size_of::<N>()));
        }
        for numbers in [&self.scales, &self.offsets] {
            match numbers {
                Floats::Half(all) => ask(all, group, ahead),
                Floats::Wide(all) => ask(all, group, ahead),
            }
        }
        ask(&self.zeros, group, ahead);
    }
}

impl Default for Floats {
    fn default() -> Self {
        Floats::Wide(Vec::new())
    }
}

impl Floats {
    fn new<T: Real>(m: usize, groups: usize, of: &[T]) -> Self {
        let half = |v: &T| f16::from_f64(v.wide());
        if of.iter().all(|v| half(v).to_f64() == v.wide()) {
            Floats::Half(beside(m, groups, |at| half(&of[at])))
        } else {
            Floats::Wide(beside(m, groups, |at| of[at].wide() as f32))
        }
    }
}

impl PackedCodes {
    /// From m rows of ⌈n·bits/8⌉ bytes without any bits beyond the last code, for products with inputs of type T, and
    /// what each row's groups have.
    pub(crate) fn new<T: Real>(
        bits: u8,
        group: usize,
        (m, n): (usize, usize),
        rows: Vec<u8>,
        of: Beside<'_, T>,
    ) -> Self {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        let panels = m >= FEWEST && super::panels::takes::<T>(bits, group, n);
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let (panels, _) = (false, (group, T::DTYPE));
        let bytes = if panels { side_by_side(bits, (m, n), &rows) } else { rows.into() };
        let groups = n.div_ceil(group);
        let grids = match panels {
            true => Grids {
                scales: Floats::new(m, groups, of.scales),
                zeros: of.zeros.map(|zeros| beside(m, groups, |at| zeros[at])).unwrap_or_default(),
                offsets: of.offsets.map(|offsets| Floats::new(m, groups, offsets)).unwrap_or_default(),
            },
            false => Grids::default(),
        };
        PackedCodes { bits, shape: (m, n), bytes, panels, grids }
    }

    pub(crate) fn bits(&self) -> u8 {
        self.bits
    }
    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }
    /// Bytes on disk.
    pub(crate) fn len(&self) -> usize {
        self.shape.0 * self.width()
    }

    /// Some rows as they are on disk; without panels perhaps followed by others. Whole panels cost the least.
    pub(crate) fn rows(&self, range: Range<usize>) -> Cow<'_, [u8]> {
        let width = self.width();
        if !self.panels {
            return Cow::Borrowed(&self.bytes[range.start * width..]);
        }
        let mut rows = vec![0; range.len() * width];
        let mut first = range.start;
        while first < range.end {
            let (panel, from) = (&self.bytes[first / PANEL * self.panel_bytes()..], first % PANEL);
            let count = (PANEL - from).min(range.end - first);
            let to = &mut rows[(first - range.start) * width..][..count * width];
            if self.chunk_bits() != 32 || !gather(panel, from, width, to) {
                self.copy(panel, from, to);
            }
            first += count;
        }
        Cow::Owned(rows)
    }

    /// Some rows of a panel, from one on, a cache line of each at a time: a panel is read in its order, and long rows
    /// would evict each other.
    fn copy(&self, panel: &[u8], from: usize, to: &mut [u8]) {
        // Codes that end on a whole byte: a chunk or two.
        let (width, size) = (self.width(), self.chunk_bits());
        let together = if size == 32 { 1 } else { 2 };
        let unit = together * size / 8;
        let line = LINE / unit * unit;
        for first in (0..width).step_by(line) {
            for (r, row) in to.chunks_exact_mut(width).enumerate() {
                for start in (first..width.min(first + line)).step_by(unit) {
                    let at = start / unit * together;
                    let chunks = (at..self.chunks().min(at + together)).rev();
                    let bits =
                        chunks.fold(0, |bits, at| bits << size | bits_at(panel, (at * PANEL + from + r) * size, size));
                    let to = &mut row[start..];
                    match to.first_chunk_mut() {
                        // What is too much, the next unit writes over.
                        Some(eight) => *eight = bits.to_le_bytes(),
                        None => to.iter_mut().zip(bits.to_le_bytes()).for_each(|(to, bits)| *to = bits),
                    }
                }
            }
        }
    }

    /// Bytes of a row.
    pub(super) fn width(&self) -> usize {
        width(self.shape.1, self.bits)
    }

    /// The panels, if rows are side by side.
    pub(super) fn panels(&self) -> Option<std::slice::ChunksExact<'_, u8>> {
        self.panels.then(|| self.bytes.chunks_exact(self.panel_bytes()))
    }

    /// What the rows of panels have for each group, panel by panel.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(super) fn grids(&self) -> &Grids {
        &self.grids
    }

    fn chunk_bits(&self) -> usize {
        chunk(self.bits) * usize::from(self.bits)
    }
    fn chunks(&self) -> usize {
        self.shape.1.div_ceil(chunk(self.bits))
    }
    fn panel_bytes(&self) -> usize {
        self.chunks() * PANEL * self.chunk_bits() / 8
    }
}

/// What each row has for each of its groups, for the rows of each panel; those that are missing have what the last one has.
fn beside<N>(m: usize, groups: usize, of: impl Fn(usize) -> N) -> Vec<[N; PANEL]> {
    let panel = |first| (0..groups).map(move |g| (first, g));
    let all = (0..m).step_by(PANEL).flat_map(panel);
    all.map(|(first, g)| std::array::from_fn(|r| of((first + r).min(m - 1) * groups + g))).collect()
}

/// The same of chunks of 32 bits, by vectors of rows; false, and nothing done, where there are none.
#[cfg(target_arch = "x86_64")]
fn gather(panel: &[u8], first: usize, width: usize, to: &mut [u8]) -> bool {
    for (line, chunks) in panel[..width.div_ceil(4) * 4 * PANEL].chunks(LINE * PANEL).enumerate() {
        let mut block = [0; LINE * PANEL];
        block[..chunks.len()].copy_from_slice(chunks);
        let Some(lines) = super::integer::lines(&block) else { return false };
        let start = line * LINE;
        let end = width.min(start + LINE);
        for (row, line) in to.chunks_exact_mut(width).zip(&lines[first..]) {
            row[start..end].copy_from_slice(&line[..end - start]);
        }
    }
    true
}

#[cfg(not(target_arch = "x86_64"))]
fn gather(_: &[u8], _: usize, _: usize, _: &mut [u8]) -> bool {
    false
}

/// Rows of codes as panels: chunk by chunk, row by row; zeros where there are no rows or columns.
fn side_by_side(bits: u8, (m, n): (usize, usize), rows: &[u8]) -> Aligned<u8> {
    let (width, chunk) = (width(n, bits), chunk(bits));
    let size = chunk * usize::from(bits);
    let bytes = m.div_ceil(PANEL) * n.div_ceil(chunk) * PANEL * size / 8;
    Aligned::new(bytes + size_of::<u64>(), |to| {
        let mut to = Writer { bytes: to, held: 0, count: 0 };
        for panel in rows.chunks(width.max(1) * PANEL) {
            for at in 0..n.div_ceil(chunk) {
                for r in 0..PANEL {
                    // What follows the row is not its own.
                    let row = panel.get(r * width..(r + 1) * width).unwrap_or_default();
                    to.push(bits_at(row, at * size, size), size);
                }
            }
        }
        to.finish();
    })
}

/// Up to 56 bits from one on; zeros beyond the end.
#[inline]
fn bits_at(bytes: &[u8], bit: usize, count: usize) -> u64 {
    let rest = bytes.get(bit / 8..).unwrap_or_default();
    let word = match rest.first_chunk() {
        Some(&eight) => u64::from_le_bytes(eight),
        None => rest.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)),
    };
    word >> (bit % 8) & ((1 << count) - 1)
}

/// Appends bits, lowest first.
struct Writer<'a> {
    bytes: &'a mut Vec<u8>,
    held: u64,
    count: usize,
}

impl Writer<'_> {
    /// Up to 32 bits.
    #[inline]
    fn push(&mut self, bits: u64, count: usize) {
        self.held |= bits << self.count;
        self.count += count;
        if self.count >= 32 {
            self.bytes.extend_from_slice(&(self.held as u32).to_le_bytes());
            (self.held, self.count) = (self.held >> 32, self.count - 32);
        }
    }
    fn finish(self) {
        self.bytes.extend_from_slice(&self.held.to_le_bytes()[..self.count.div_ceil(8)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::sizes;

    #[test]
    fn panels_have_the_same_rows() {
        let dims = sizes(&[(1, 1), (33, 17), (64, 48), (70, 130)], &[(1, 1), (33, 17)]);
        for (bits, &(m, n)) in (2..=8).flat_map(|bits| dims.iter().map(move |dim| (bits, dim))) {
            let mut rows = Vec::new();
            for i in 0..m {
                let codes: Vec<u8> = (0..n).map(|j| ((i * 31 + j * 17 + i * j) % (1 << bits)) as u8).collect();
                super::super::pack(bits, &codes, &mut rows);
            }
            let bytes = side_by_side(bits, (m, n), &rows);
            let panels = PackedCodes { bits, shape: (m, n), bytes, panels: true, grids: Grids::default() };
            assert_eq!(panels.panels().unwrap().len(), m.div_ceil(PANEL));
            assert_eq!(panels.bytes.len(), panels.panel_bytes() * m.div_ceil(PANEL));
            assert_eq!((&panels.rows(0..m)[..], panels.len()), (&rows[..], rows.len()), "{bits} bits, {m}x{n}");
            let (width, end) = (panels.width(), m.min(47));
            // Without vectors as well, whatever the machine has.
            for (first, rows) in rows.chunks(PANEL * width).enumerate() {
                let mut copied = vec![0xff; rows.len()];
                panels.copy(&panels.bytes[first * panels.panel_bytes()..], 0, &mut copied);
                assert_eq!(copied, rows, "{bits} bits, {m}x{n}");
            }
            assert_eq!(panels.rows(end / 3..end)[..], rows[end / 3 * width..end * width]);
        }
    }
}
