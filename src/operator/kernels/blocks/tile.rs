//! Many vectors: tiles of rows × lanes, summed in registers.

use ndarray::{ArrayView2, ArrayViewMut2};
use pulp::{Simd, WithSimd};

use super::{Block, Job, Leaf, Output, panel};
use crate::linalg::matmul_into;
use crate::scalar::Real;
use crate::simd::Aligned;

/// Vectors of a panel at most.
const VECTORS: usize = 4;
/// Vectors of a row of x at most if panels are read where they are: rows further apart compete for few cache lines.
const LONGEST: usize = 2 * VECTORS;
/// From this many numbers on, and for this many vectors, a block goes through the `gemm` crate.
const LARGE: usize = 1 << 16;
const WIDE: usize = 32;

#[inline(always)]
pub(super) fn run<S: Simd, T: Real, L: Leaf<T>>(s: S, job: &Job<'_, T, L>, blocks: &[Block], mut out: Output<'_, T>) {
    let (mut memory, mut results, mut turned, mut wide) =
        (Aligned::default(), Aligned::default(), Aligned::default(), Vec::new());
    let (columns, lanes) = (out.columns, T::lanes::<S>());
    let (x, origin) = panel::upright(s, job, blocks, &mut turned);
    for block in blocks {
        let &Block { value, input, output, height, width } = block;
        let values = L::wide(&job.values[value..][..height * width], &mut wide);
        let (outputs, inputs) = if job.transposed { (width, height) } else { (height, width) };
        let sources = job.sources(input, inputs).from(origin);
        if values.len() >= LARGE && columns >= WIDE {
            let vectors = columns.div_ceil(lanes);
            let to = memory.numbers(inputs * vectors * lanes);
            panel::fill::<S, T>(x, &sources, 0, vectors, to);
            let y = results.numbers(outputs * columns);
            by_gemm(values, (height, width), job.transposed, to, y, columns);
            for (o, numbers) in (output..).zip(y.chunks_exact(columns)) {
                if let Some(row) = out.row(o) {
                    row.copy_from_slice(numbers);
                }
            }
            continue;
        }
        let mut from = 0;
        while from < columns {
            let vectors = match (columns - from).div_ceil(lanes) {
                left if left >= VECTORS => VECTORS,
                left => left.min(2),
            };
            let count = (columns - from).min(vectors * lanes);
            let stride = x.ncols();
            let (x, stride) = match panel::in_place::<S, T>(&x, &sources, inputs, from, vectors * lanes) {
                Some(there) if stride <= LONGEST * lanes => (there, stride / lanes),
                _ => {
                    let to = memory.numbers(inputs * vectors * lanes);
                    panel::fill::<S, T>(x, &sources, from, vectors, to);
                    (&*to, vectors)
                }
            };
            // A function of its own, so that all kinds of leaves share it.
            s.vectorize(Tiles {
                block,
                values,
                transposed: job.transposed,
                vectors,
                x,
                stride,
                from,
                count,
                out: &mut out,
            });
            from += count;
        }
    }
}

fn by_gemm<T: Real>(
    values: &[T],
    (height, width): (usize, usize),
    transposed: bool,
    x: &[T],
    y: &mut [T],
    columns: usize,
) {
    let (outputs, inputs) = if transposed { (width, height) } else { (height, width) };
    let padded = x.len() / inputs.max(1);
    let (Ok(block), Ok(x), Ok(y)) = (
        ArrayView2::from_shape((height, width), values),
        ArrayView2::from_shape((inputs, padded), x),
        ArrayViewMut2::from_shape((outputs, columns), y),
    ) else {
        return;
    };
    let block = if transposed { block.reversed_axes() } else { block };
    matmul_into(T::one(), block, x.slice(ndarray::s![.., ..columns]), T::zero(), y);
}

/// A block times a panel of `vectors` vectors.
struct Tiles<'a, 'b, T> {
    block: &'a Block,
    values: &'a [T],
    transposed: bool,
    vectors: usize,
    x: &'a [T],
    /// Vectors between the rows of x.
    stride: usize,
    /// The columns of the result that the panel stands for.
    from: usize,
    count: usize,
    out: &'a mut Output<'b, T>,
}

impl<T: Real> WithSimd for Tiles<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, s: S) {
        match self.vectors {
            1 => self.all::<16, 1, S>(s),
            2 => self.all::<8, 2, S>(s),
            _ => self.all::<6, VECTORS, S>(s),
        }
    }
}

impl<T: Real> Tiles<'_, '_, T> {
    #[inline(always)]
    fn all<const R: usize, const V: usize, S: Simd>(&mut self, s: S) {
        let outputs = if self.transposed { self.block.width } else { self.block.height };
        let mut o = 0;
        while o + R <= outputs {
            self.one::<R, V, S>(s, o);
            o += R;
        }
        while o + 4 <= outputs {
            self.one::<4, V, S>(s, o);
            o += 4;
        }
        while o < outputs {
            self.one::<1, V, S>(s, o);
            o += 1;
        }
    }

    /// R rows of the result from row o.
    #[inline(always)]
    fn one<const R: usize, const V: usize, S: Simd>(&mut self, s: S, o: usize) {
        let (x, _) = T::vectors::<S>(self.x);
        let &mut Tiles { stride, block: &Block { output, height, width, .. }, values, .. } = self;
        let (first, along, across, inputs) = match self.transposed {
            true => (o, width, 1, height),
            false => (o * width, 1, width, width),
        };
        assert!(inputs == 0 || first + (R - 1) * across + (inputs - 1) * along < values.len());
        let mut sums = [[T::splat(s, T::zero()); V]; R];
        let rows = x.chunks(stride.max(1)).filter_map(|row| row.first_chunk::<V>());
        for (j, x) in rows.take(inputs).enumerate() {
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: r ≤ R − 1 and j ≤ inputs − 1, so the index is at most the one that was asserted to be within
                // the values. (A check here would end the loop in R places, and so keep the sums in memory.)
                #[allow(unsafe_code)]
                let weight = unsafe { *values.get_unchecked(first + r * across + j * along) };
                let weight = T::splat(s, weight);
                for (sum, &x) in sums.iter_mut().zip(x) {
                    *sum = T::fma(s, weight, x, *sum);
                }
            }
        }
        let lanes = T::lanes::<S>();
        for (r, sums) in sums.iter().enumerate() {
            if let Some(row) = self.out.row(output + o + r) {
                for (to, &sum) in row[self.from..][..self.count].chunks_mut(lanes).zip(sums) {
                    T::store(s, to, sum);
                }
            }
        }
    }
}
