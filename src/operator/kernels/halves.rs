//! Rows of bf16 times many vectors by matrix instructions: AMX.
//!
//! An input is the sum of three numbers in bf16, x = a + b + c with eight bits each, without any rounding, and `tdpbf16ps` adds up
//! the products of 32 columns of 16 rows with 16 such numbers in `f32`. Rows lie in memory as registers take them: nothing of the
//! matrix is copied. Numbers under 2⁻¹²⁶ count as zero, and inputs that are not finite make NaN.

use std::arch::x86_64::*;
use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};
use pulp::bytemuck::cast;

use super::cutting::{Cutting, DIGITS, STEP};
use super::kept::Kept;
use super::lanes::{Lanes, columns, turned};
use super::tiles::{self, Registers, tiles};
use crate::operator::sparse::each_panel;
use crate::threads::{self, Pace};

/// Rows and vectors of a register.
const TILE: usize = 16;
/// Words of a step: 32 numbers.
const WORDS: usize = STEP / 2;
/// Vectors at a time, at most.
const VECTORS: usize = 8 * TILE;
/// Rows that meet some steps before the next ones do, at most.
const ROWS: usize = 1024;
/// Bytes of the inputs of these steps: they stay in the second cache.
const HELD: usize = 768 << 10;
/// Steps that do so at least.
const FEWEST: usize = 12;

/// A step's inputs of 16 vectors: a pair of columns in each row, those of the largest digits first.
type Step = [[Lanes<i32>; TILE]; DIGITS];
/// Sums of 16 rows with 16 vectors.
type Sums = [Lanes<f32>; TILE];

/// Whether the machine has the instructions.
pub(crate) fn available() -> bool {
    tiles::available() && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq")
}

/// Y ← A·X, Y row by row, for an m×k matrix A of finite numbers, two in a word (the first in the lower half, a zero after an odd last
/// one), if the machine has the instructions; else nothing, and false.
///
/// # Panics
/// If shapes do not fit.
pub(crate) fn product(words: &[u32], (m, k): (usize, usize), x: ArrayView2<'_, f32>, y: &mut [f32]) -> bool {
    let (stride, n) = (k.div_ceil(2), x.ncols());
    assert!((x.nrows(), words.len(), y.len()) == (k, m * stride, m * n), "shapes of a product");
    if !available() {
        return false;
    }
    let Ok(mut y) = ArrayViewMut2::from_shape((m, n), y) else { return false };
    if m * n == 0 {
        return true;
    }
    let time = Pace::HALVES.time(m * k, n);
    let threads = if threads::alone(time) { 1 } else { rayon::current_num_threads() };
    let width = n.div_ceil(threads).next_multiple_of(2 * TILE).min(VECTORS);
    if n.div_ceil(width) >= threads {
        // Some vectors for each thread, which lays out its own: they wait for each other once.
        let panels = y.axis_chunks_iter_mut(Axis(1), width);
        each_panel(panels, time, |sums: &mut Vec<Sums>, (at, y): (usize, ArrayViewMut2<'_, f32>)| {
            let first = at * width;
            let inputs = Inputs::new(x.slice(s![.., first..first + y.ncols()]));
            Task { words, stride, x: &inputs }.multiply(0, sums, y);
        });
    } else {
        let (share, inputs) = (m.div_ceil(4 * threads).next_multiple_of(2 * TILE), Inputs::new(x));
        let task = Task { words, stride, x: &inputs };
        let panels = y.axis_chunks_iter_mut(Axis(0), share);
        each_panel(panels, time, |sums: &mut Vec<Sums>, (at, y): (usize, ArrayViewMut2<'_, f32>)| {
            task.multiply(at * share, sums, y);
        });
    }
    true
}

/// Vectors, cut into digits.
struct Inputs {
    /// Registers of vectors side by side.
    tiles: usize,
    steps: usize,
    /// Tile, step.
    digits: Kept,
}

impl Inputs {
    /// Of some columns. There are the instructions, as was asked.
    fn new(x: ArrayView2<'_, f32>) -> Self {
        let (tiles, steps) = (x.ncols().div_ceil(TILE), x.nrows().div_ceil(STEP));
        let mut digits = Kept::new(tiles * steps * DIGITS * TILE);
        let of = digits.as_chunks_mut().0.as_chunks_mut::<DIGITS>().0.chunks_mut(steps.max(1));
        each_panel(of, x.len(), |held: &mut Vec<f32>, (tile, to)| {
            let x = columns(&x, tile * TILE, TILE, held);
            // SAFETY: the machine has the instructions: only `product` calls this, which asks.
            #[allow(unsafe_code)]
            unsafe {
                lay_out(x, to);
            }
        });
        Inputs { tiles, steps, digits }
    }

    /// Steps of a tile.
    fn of(&self, tile: usize, steps: &Range<usize>) -> &[Step] {
        &self.digits.as_chunks().0.as_chunks().0[tile * self.steps..][steps.clone()]
    }
}

/// Cuts 16 vectors; zeros beyond their end and for those that are missing.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn lay_out(x: [&[f32]; TILE], to: &mut [Step]) {
    let cutting = Cutting::of(1);
    for (step, to) in to.iter_mut().enumerate() {
        let mut digits = [[_mm512_setzero_si512(); TILE]; DIGITS];
        for v in 0..TILE {
            let (cut, _) = cutting.cut(x[v].get(step * STEP..).unwrap_or_default());
            for d in 0..DIGITS {
                digits[d][v] = cast(cut[d].0);
            }
        }
        for (to, digits) in to.iter_mut().zip(digits) {
            for (to, pairs) in to.iter_mut().zip(turned(digits)) {
                *to = Lanes(cast(pairs));
            }
        }
    }
}

/// A matrix and inputs.
struct Task<'a> {
    /// Row by row, so many of each.
    words: &'a [u32],
    stride: usize,
    x: &'a Inputs,
}

impl Task<'_> {
    /// Y ← the products of rows from one on, as many as Y has.
    fn multiply(&self, first: usize, sums: &mut Vec<Sums>, mut y: ArrayViewMut2<'_, f32>) {
        for (at, mut y) in y.axis_chunks_iter_mut(Axis(0), ROWS).enumerate() {
            let first = first + at * ROWS;
            self.add_up(first..first + y.nrows(), sums);
            for (r, mut y) in y.rows_mut().into_iter().enumerate() {
                let mut sums = sums[r / TILE * self.x.tiles..].iter().take(self.x.tiles).map(|tile| &tile[r % TILE].0);
                let (whole, rest) = y.as_slice_mut().unwrap_or_default().as_chunks_mut();
                whole.iter_mut().zip(&mut sums).for_each(|(y, sums)| *y = *sums);
                sums.take(1).for_each(|sums| rest.copy_from_slice(&sums[..rest.len()]));
            }
        }
    }

    /// The products of some rows: of each 16 of them, with each tile of inputs.
    fn add_up(&self, rows: Range<usize>, sums: &mut Vec<Sums>) {
        let x = self.x;
        sums.clear();
        sums.resize(rows.len().div_ceil(2 * TILE) * 2 * x.tiles, [Lanes([0.0; TILE]); TILE]);
        let (registers, mut held) = (Tiles::new(), Vec::new());
        let together = (HELD / (x.tiles.max(1) * size_of::<Step>())).max(FEWEST);
        for first in (0..x.steps).step_by(together) {
            let steps = first..x.steps.min(first + together);
            for (two, sums) in sums.chunks_mut(2 * x.tiles).enumerate() {
                let from = rows.start + two * 2 * TILE;
                let a = self.block(from..rows.end.min(from + 2 * TILE), &steps, &mut held);
                let (upper, lower) = sums.split_at_mut(x.tiles);
                let whole = x.tiles / 2 * 2;
                for t in (0..whole).step_by(2) {
                    let inputs = [x.of(t, &steps), x.of(t + 1, &steps)];
                    registers.four(&a, inputs, [&mut upper[t..t + 2], &mut lower[t..t + 2]]);
                }
                if whole < x.tiles {
                    registers.one(&a, 0, x.of(whole, &steps), &mut upper[whole]);
                    registers.one(&a, TILE, x.of(whole, &steps), &mut lower[whole]);
                }
            }
        }
    }

    /// Some steps of 32 rows: where they lie, or copied, with zeros for what is missing.
    fn block<'b>(&'b self, rows: Range<usize>, steps: &Range<usize>, held: &'b mut Vec<u32>) -> Block<'b> {
        // What the last of a row's steps reads of the next row meets zeros.
        let end = (rows.end - 1) * self.stride + steps.end * WORDS;
        let whole = rows.len() == 2 * TILE && end <= self.words.len();
        if whole {
            let words = &self.words[rows.start * self.stride + steps.start * WORDS..];
            return Block { words, stride: self.stride };
        }
        let (stride, columns) = (steps.len() * WORDS, steps.start * WORDS..self.stride.min(steps.end * WORDS));
        held.clear();
        held.resize(2 * TILE * stride, 0);
        for (row, to) in rows.zip(held.chunks_mut(stride)) {
            to[..columns.len()].copy_from_slice(&self.words[row * self.stride..][columns.clone()]);
        }
        Block { words: held, stride }
    }
}

/// Some columns of 32 rows, from the first word of the first row on.
struct Block<'a> {
    words: &'a [u32],
    stride: usize,
}

/// Tile registers of 16 rows of 64 bytes.
struct Tiles {
    /// In use as long as there are these.
    _registers: Registers,
}

impl Tiles {
    fn new() -> Self {
        Tiles { _registers: Registers::new([(TILE as u8, 64); 8]) }
    }

    /// Adds the products of 32 rows with 32 vectors, of each 16 rows with each 16.
    ///
    /// # Panics
    /// If there are fewer of them than inputs have steps.
    #[allow(unsafe_code)]
    fn four(&self, a: &Block<'_>, x: [&[Step]; 2], [upper, lower]: [&mut [Sums]; 2]) {
        let steps = x[0].len();
        assert!(x[1].len() == steps && upper.len() == 2 && lower.len() == 2, "inputs and sums of four registers");
        assert!(a.words.len() >= (2 * TILE - 1) * a.stride + steps * WORDS, "rows of two registers");
        let line = size_of::<Lanes<i32>>();
        // SAFETY: the registers are configured, as there is a `Registers`, which stays on its thread: nothing that is called
        // while there is one touches them, since compilers emit tile instructions for their own intrinsics only, and the
        // system restores them for each thread. 16 rows of 64 bytes are read of each of the sums, which have these: two and two,
        // side by side, by the first assertion. No other memory is touched, nor the stack.
        unsafe {
            tiles!(
                "tileloadd tmm0, [{upper} + {line}]",
                "tileloadd tmm1, [{upper} + {line} + 1024]",
                "tileloadd tmm2, [{lower} + {line}]",
                "tileloadd tmm3, [{lower} + {line} + 1024]";
                upper = in(reg) upper.as_ptr(),
                lower = in(reg) lower.as_ptr(),
                line = in(reg) line,
            );
        }
        for (step, (x, z)) in x[0].iter().zip(x[1]).enumerate() {
            let first = &a.words[step * WORDS];
            macro_rules! digit {
                ($offset:literal) => {
                    concat!(
                        "tileloadd tmm6, [{x} + {line} + ",
                        $offset,
                        "]\n",
                        "tdpbf16ps tmm0, tmm4, tmm6\n",
                        "tdpbf16ps tmm2, tmm5, tmm6\n",
                        "tileloadd tmm7, [{z} + {line} + ",
                        $offset,
                        "]\n",
                        "tdpbf16ps tmm1, tmm4, tmm7\n",
                        "tdpbf16ps tmm3, tmm5, tmm7\n",
                    )
                };
            }
            // SAFETY: the registers are configured, as above. Of each of 32 rows 64 bytes are read that are the step's: the last
            // of these are there by the second assertion. Of the inputs of a step all are read. No other memory is touched, nor
            // the stack.
            unsafe {
                tiles!(
                    "tileloadd tmm4, [{a} + {stride}]",
                    "tileloadd tmm5, [{b} + {stride}]",
                    digit!("0"),
                    digit!("1024"),
                    digit!("2048");
                    a = in(reg) &raw const *first,
                    b = in(reg) (&raw const *first).wrapping_add(TILE * a.stride),
                    stride = in(reg) a.stride * size_of::<u32>(),
                    x = in(reg) &raw const *x,
                    z = in(reg) &raw const *z,
                    line = in(reg) line,
                );
            }
        }
        // SAFETY: as of the first, but that rows are written to sums.
        unsafe {
            tiles!(
                "tilestored [{upper} + {line}], tmm0",
                "tilestored [{upper} + {line} + 1024], tmm1",
                "tilestored [{lower} + {line}], tmm2",
                "tilestored [{lower} + {line} + 1024], tmm3";
                upper = in(reg) upper.as_mut_ptr(),
                lower = in(reg) lower.as_mut_ptr(),
                line = in(reg) line,
            );
        }
    }

    /// Adds the products of 16 rows from one on with 16 vectors, those with each digit by themselves: sums wait for no others.
    ///
    /// # Panics
    /// If there are fewer of them than inputs have steps.
    #[allow(unsafe_code)]
    fn one(&self, a: &Block<'_>, row: usize, x: &[Step], sums: &mut Sums) {
        assert!(a.words.len() >= (row + TILE - 1) * a.stride + x.len() * WORDS, "rows of a register");
        let (line, mut parts) = (size_of::<Lanes<i32>>(), [[Lanes([0f32; TILE]); TILE]; DIGITS]);
        // SAFETY: the registers are configured, as above. No memory is touched.
        unsafe {
            tiles!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2";);
        }
        for (step, x) in x.iter().enumerate() {
            // SAFETY: the registers are configured, as above. Of each of 16 rows 64 bytes are read that are the step's: the last of
            // these are there by the assertion. Of the inputs of a step all are read. No other memory is touched, nor the
            // stack.
            unsafe {
                tiles!(
                    "tileloadd tmm4, [{a} + {stride}]",
                    "tileloadd tmm5, [{x} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm5",
                    "tileloadd tmm6, [{x} + {line} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm6",
                    "tileloadd tmm7, [{x} + {line} + 2048]",
                    "tdpbf16ps tmm2, tmm4, tmm7";
                    a = in(reg) &raw const a.words[row * a.stride + step * WORDS],
                    stride = in(reg) a.stride * size_of::<u32>(),
                    x = in(reg) &raw const *x,
                    line = in(reg) line,
                );
            }
        }
        // SAFETY: the registers are configured, as above. 16 rows of 64 bytes are written to each of the parts, which have
        // these. No other memory is touched, nor the stack.
        unsafe {
            tiles!(
                "tilestored [{parts} + {line}], tmm0",
                "tilestored [{parts} + {line} + 1024], tmm1",
                "tilestored [{parts} + {line} + 2048], tmm2";
                parts = in(reg) &raw mut parts,
                line = in(reg) line,
            );
        }
        let [first, second, third] = &parts;
        for (to, ((a, b), c)) in sums.iter_mut().zip(first.iter().zip(second).zip(third)) {
            to.0.iter_mut().enumerate().for_each(|(v, to)| *to += a.0[v] + (b.0[v] + c.0[v]));
        }
    }
}

// (Miri has none of these instructions.)
#[cfg(all(test, not(miri)))]
mod tests {
    use half::bf16;
    use ndarray::Array2;

    use super::*;

    /// Rows and columns that fill registers and that do not, some calls, columns by turns, and more vectors than are laid out at a
    /// time; in either order of memory.
    #[test]
    fn equals_the_exact_product() {
        for (m, k) in [(1, 1), (5, 31), (16, 32), (33, 63), (32, 64), (64, 1024), (70, 1029), (600, 96), (40, 5000)] {
            let number = |i: usize, j: usize| bf16::from_f32(((i * 31 + j * 17 + i * j) % 211) as f32 / 64.0 - 1.5);
            let half = |i: usize, j: usize| if j < k { u32::from(number(i, j).to_bits()) } else { 0 };
            let words = Array2::from_shape_fn((m, k.div_ceil(2)), |(i, j)| half(i, 2 * j) | half(i, 2 * j + 1) << 16);
            let a = Array2::from_shape_fn((m, k), |(i, j)| number(i, j).to_f64());
            for n in [1, 5, 16, 17, 40, 64, 131] {
                let x = Array2::from_shape_fn((k, n), |(j, v)| ((j * 7919 + v * 104_729) % 1009) as f32 / 997.0 - 0.4);
                let (exact, sizes) = (a.dot(&x.mapv(f64::from)), a.mapv(f64::abs).dot(&x.mapv(|x| f64::from(x.abs()))));
                let columns = x.t().as_standard_layout().into_owned();
                for x in [x.view(), columns.t()] {
                    let mut y = vec![f32::NAN; m * n];
                    if !product(words.as_slice().unwrap(), (m, k), x, &mut y) {
                        assert!(!available());
                        return;
                    }
                    let off = |((y, exact), size): ((&f32, &f64), &f64)| (f64::from(*y) - exact).abs() / size;
                    let worst = y.iter().zip(&exact).zip(&sizes).map(off).fold(0.0, f64::max);
                    assert!(worst < 1e-6, "{m}x{k}, {n} vectors: off by {worst:e} of what is added up");
                }
            }
        }
    }

    #[test]
    fn threads_change_no_bit_and_no_vector_another() {
        let words = Array2::from_shape_fn((1100, 530), |(i, j)| {
            let half = |at: usize| u32::from(bf16::from_f32(((i * 29 + at * 13) % 103) as f32 / 50.0 - 1.0).to_bits());
            half(2 * j) | half(2 * j + 1) << 16
        });
        let mut x = Array2::from_shape_fn((1060, 40), |(j, v)| ((j * 31 + v * 7) % 17) as f32 / 7.0 - 1.0);
        let run = |x: &Array2<f32>| {
            let mut y = vec![0.0; 1100 * 40];
            product(words.as_slice().unwrap(), (1100, 1060), x.view(), &mut y).then_some(y)
        };
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let (several, one) = (run(&x), alone.install(|| run(&x)));
        assert_eq!(several, one);
        (x[[3, 7]], x[[1000, 39]]) = (f32::NAN, f32::INFINITY);
        let (Some(before), Some(after)) = (one, run(&x)) else { return };
        for (at, (before, after)) in before.iter().zip(&after).enumerate() {
            assert!(if [7, 39].contains(&(at % 40)) { after.is_nan() } else { before == after });
        }
    }
}
