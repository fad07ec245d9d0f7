//! A matrix times several vectors of `f32` by AVX2, of which each lane has one: a number of the matrix meets eight of them at once, or
//! sixteen. Where lanes are columns as many vectors take several turns, each of which reads the laid-out vectors again for every two
//! rows; and no lanes are added up here. The matrix is read where it lies, which a general product would copy.

use std::arch::asm;
use std::arch::x86_64::*;

use ndarray::{ArrayView2, Axis, s};
use pulp::bytemuck::{Pod, cast, cast_slice, cast_slice_mut};
use pulp::x86::V3;

use super::super::cell::Cell;
use super::WIDEST;
use crate::memory::{prefetch, prefetch_early};
use crate::scalar::{DType, Real};
use crate::simd::{Aligned, take};

/// Vectors in a register.
const LANES: usize = 8;
/// Registers of vectors at a time.
const WIDE: usize = 2;
/// Rows at a time: with so many registers of vectors their sums fill all there are, beside the vectors and a number of a row.
const ROWS: usize = 6;
/// Numbers of a row between requests for what comes later: those of a cache line.
const STEP: usize = 16;
/// Bytes between what is multiplied and what is asked for.
const AHEAD: usize = 2048;
/// Bytes of the numbers of vectors that all rows meet before the next ones do: they stay in the second cache.
const HELD: usize = 256 << 10;
/// Numbers of rows of bf16 at a time, which are written out: they stay in the nearest cache.
const WRITTEN: usize = 1024;
/// Numbers of a vector that are laid out before those of the next: their places stay in the nearest cache.
const BLOCK: usize = 128;

/// The same number of some vectors.
type Numbers<const V: usize> = [__m256; V];

/// Whether so many vectors are multiplied faster so: with numbers that lie by themselves from nine on, with pairs of bf16 from thirteen.
pub(super) fn takes<T: Real, C: Cell<T>>(vectors: usize) -> bool {
    let fewest = if C::PARTS == 1 { 9 } else { 13 };
    (fewest..=WIDEST).contains(&vectors)
}

/// Y ← A·B, row by row, for A whose rows lie in order in memory. (The last number of a row may be none: a zero.)
///
/// # Panics
/// If numbers are not `f32`.
pub(super) fn product<T: Real, C: Cell<T>>(_: V3, a: ArrayView2<'_, C>, b: ArrayView2<'_, T>, y: &mut [T]) {
    assert_eq!(T::DTYPE, DType::F32, "numbers of this product");
    let y: &mut [f32] = cast_slice_mut(y);
    let (cells, n) = (a.ncols(), b.ncols());
    if cells == 0 {
        return y.fill(0.0);
    }
    let registers = n.div_ceil(LANES);
    let held = HELD / (registers * size_of::<__m256>()) / STEP * STEP;
    let most = if C::PARTS == 1 { held.max(STEP) } else { WRITTEN };
    let (mut x, mut written) = (Aligned::default(), Aligned::default());
    let written = written.numbers(if C::PARTS == 1 { 0 } else { ROWS * (WRITTEN + STEP) });
    let next = ROWS * a.strides()[0].unsigned_abs() * size_of::<C>();
    for first in (0..cells).step_by(most / C::PARTS) {
        let columns = first..cells.min(first + most / C::PARTS);
        let x = x.numbers(columns.len() * C::PARTS * registers * LANES);
        lay_out(b.slice(s![columns.start * C::PARTS..b.nrows().min(columns.end * C::PARTS), ..]), x);
        let some = Columns { x: cast_slice(x), vectors: n, first: first == 0, next };
        for (rows, y) in a.slice(s![.., columns]).axis_chunks_iter(Axis(0), ROWS).zip(y.chunks_mut(ROWS * n)) {
            // SAFETY: the machine has the instructions, or there would be no `V3`, which has more.
            #[allow(unsafe_code)]
            unsafe {
                some.meet_all(rows, written, y);
            }
        }
    }
}

/// Some numbers of vectors, [`WIDE`] registers full side by side, and after them the others; zeros for vectors that are missing, and for
/// numbers.
fn lay_out<T: Real>(b: ArrayView2<'_, T>, x: &mut [f32]) {
    let (n, mut rest) = (b.ncols(), x);
    let length = rest.len() / n.next_multiple_of(LANES);
    for first in (0..n).step_by(WIDE * LANES) {
        let vectors = first..n.min(first + WIDE * LANES);
        let width = vectors.len().next_multiple_of(LANES);
        let to = take(&mut rest, length * width);
        to.fill(0.0);
        let blocks = b.slice(s![.., vectors]);
        for (b, to) in blocks.axis_chunks_iter(Axis(0), BLOCK).zip(to.chunks_mut(BLOCK * width)) {
            for (v, column) in b.columns().into_iter().enumerate() {
                to[v..].iter_mut().step_by(width).zip(column).for_each(|(to, &number)| *to = cast(number));
            }
        }
    }
}

/// Numbers of bf16, two in each word, as `f32`; and what lies so many bytes behind them is asked for.
#[target_feature(enable = "avx2")]
fn widened<'a>(words: &[u32], behind: usize, to: &'a mut [f32]) -> &'a [f32] {
    let to = &mut to[..2 * words.len()];
    let (lines, rest) = words.as_chunks::<STEP>();
    let (whole, last) = to.as_chunks_mut::<{ 2 * STEP }>();
    for (line, to) in lines.iter().zip(whole) {
        prefetch_early(line, behind);
        let eights: [__m128i; 4] = cast(*line);
        *to = cast(eights.map(|eight| _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(eight))));
    }
    for (to, word) in last.as_chunks_mut().0.iter_mut().zip(rest) {
        *to = [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
    }
    to
}

/// Some columns of all vectors, laid out.
struct Columns<'a> {
    x: &'a [__m256],
    vectors: usize,
    /// Whether there are no sums of others.
    first: bool,
    /// Bytes to the rows that come next, where they lie.
    next: usize,
}

impl Columns<'_> {
    /// The products of some rows, which are written out if they are of bf16.
    #[target_feature(enable = "avx2,fma")]
    fn meet_all<C: Pod>(&self, rows: ArrayView2<'_, C>, written: &mut [f32], y: &mut [f32]) {
        let (mut of, mut written) = ([&[][..]; ROWS], written.chunks_mut(WRITTEN + STEP));
        for (r, of) in of.iter_mut().enumerate().take(rows.nrows()) {
            let row = rows.row(r).to_slice().unwrap_or_default();
            *of = match written.next() {
                None => cast_slice(row),
                Some(to) => widened(cast_slice(row), self.next, to),
            };
        }
        if rows.nrows() == ROWS {
            return self.meet(of, y);
        }
        for (row, y) in of.iter().zip(y.chunks_exact_mut(self.vectors)) {
            self.meet([*row], y);
        }
    }

    /// The products of R rows with all vectors.
    #[target_feature(enable = "avx2,fma")]
    fn meet<const R: usize>(&self, rows: [&[f32]; R], y: &mut [f32]) {
        let registers = self.vectors.div_ceil(LANES);
        let length = self.x.len() / registers;
        for at in (0..registers).step_by(WIDE) {
            let x = &self.x[at * length..registers.min(at + WIDE) * length];
            match registers - at {
                1 => self.put(sums::<R, 1>(rows, x.as_chunks().0, self.next), at, y),
                _ => self.put(sums::<R, WIDE>(rows, x.as_chunks().0, self.next), at, y),
            }
        }
    }

    /// Puts sums with the vectors of a register and the next in their places.
    #[target_feature(enable = "avx2")]
    fn put<const R: usize, const V: usize>(&self, sums: [Numbers<V>; R], at: usize, y: &mut [f32]) {
        for (y, sums) in y.chunks_exact_mut(self.vectors).zip(sums) {
            for (y, sums) in y[at * LANES..].chunks_mut(LANES).zip(sums) {
                let sums: [f32; LANES] = cast(sums);
                y.iter_mut().zip(sums).for_each(|(y, sum)| *y = if self.first { sum } else { *y + sum });
            }
        }
    }
}

/// Rows times vectors that lie across lanes. (The next rows lie so many bytes behind.)
#[target_feature(enable = "avx2,fma")]
fn sums<const R: usize, const V: usize>(rows: [&[f32]; R], x: &[Numbers<V>], next: usize) -> [Numbers<V>; R] {
    let (length, steps) = (rows[0].len(), rows[0].len() / STEP);
    let (mut whole, mut rest) = ([&[][..]; R], [&[][..]; R]);
    for r in 0..R {
        (whole[r], rest[r]) = (&rows[r].as_chunks::<STEP>().0[..steps], &rows[r][steps * STEP..length]);
    }
    let mut sums = [[_mm256_setzero_ps(); V]; R];
    let (x, last) = x.split_at(steps * STEP);
    // What is asked for lies in the same rows at first, and then in the next.
    let within = steps.saturating_sub(AHEAD / (STEP * size_of::<f32>()));
    let beyond = (next + AHEAD).saturating_sub(length * size_of::<f32>());
    for (part, ahead) in [(0..within, AHEAD), (within..steps, beyond)] {
        for (j, x) in part.clone().zip(x[part.start * STEP..].as_chunks::<STEP>().0) {
            for row in &whole {
                prefetch(&row[j], ahead);
            }
            for c in 0..STEP {
                let mut numbers = [&0.0; R];
                for r in 0..R {
                    numbers[r] = &whole[r][j][c];
                }
                add(numbers, &x[c], &mut sums);
            }
        }
    }
    for (c, x) in last.iter().enumerate() {
        let mut numbers = [&0.0; R];
        for r in 0..R {
            numbers[r] = rest[r].get(c).unwrap_or(&0.0);
        }
        add(numbers, x, &mut sums);
    }
    sums
}

/// Adds the products of a number of each row.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add<const R: usize, const V: usize>(numbers: [&f32; R], x: &Numbers<V>, sums: &mut [Numbers<V>; R]) {
    let mut of = [_mm256_setzero_ps(); V];
    for v in 0..V {
        of[v] = settled(x[v]);
    }
    for r in 0..R {
        let number = settled(_mm256_set1_ps(*numbers[r]));
        for v in 0..V {
            sums[r][v] = _mm256_fmadd_ps(number, of[v], sums[r][v]);
        }
    }
}

/// A number that is read when its turn comes: the compiler would read some beforehand, for which there are no registers (twice the
/// time). (Not `pure`, as that may change places.)
#[inline]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
fn settled(mut number: __m256) -> __m256 {
    // SAFETY: there are no instructions.
    unsafe { asm!("/* {0} */", inout(ymm_reg) number, options(nomem, nostack, preserves_flags)) };
    number
}
