//! Few vectors: each block times one after the other, while the block is in the cache.

use pulp::Simd;

use super::{Block, Job, Leaf, NONE, Output, Sources};
use crate::scalar::Real;
use crate::simd::{Aligned, Lanes};

/// Rows that share the loads of x.
const ROWS: usize = 8;
/// Vectors of sums that share the loads of x.
const SUMS: usize = 8;

#[inline(always)]
pub(super) fn run<S: Simd, T: Real, L: Leaf<T>>(s: S, job: &Job<'_, T, L>, blocks: &[Block], mut out: Output<'_, T>) {
    let (mut memory, mut sums, mut wide) = (Aligned::default(), Aligned::default(), Vec::new());
    for block in blocks {
        let &Block { value, input, output, height, width } = block;
        let values = L::wide(&job.values[value..][..height * width], &mut wide);
        let (outputs, inputs) = if job.transposed { (width, height) } else { (height, width) };
        let sources = job.sources(input, inputs);
        let lanes = T::lanes::<S>();
        let x = memory.numbers(inputs.next_multiple_of(lanes));
        let y = sums.numbers(outputs.next_multiple_of(lanes));
        for column in 0..out.columns {
            fetch(job, &sources, column, x);
            match job.transposed {
                true => transposed(s, values, width, &x[..height], y),
                false => plain(s, values, width, x, &mut y[..height]),
            }
            for (o, &number) in y[..outputs].iter().enumerate() {
                if let Some(row) = out.row(output + o) {
                    row[column] = number;
                }
            }
        }
    }
}

/// The inputs of a block, then zeros.
#[inline(always)]
fn fetch<T: Real, L>(job: &Job<'_, T, L>, sources: &Sources<'_>, column: usize, to: &mut [T]) {
    let from = job.x.column(column);
    match (sources, from.to_slice()) {
        (&Sources::Run { start, length }, Some(from)) => {
            to[..length].copy_from_slice(&from[start..start + length]);
            to[length..].fill(T::zero());
        }
        (&Sources::Run { start, length }, None) => {
            to.iter_mut().zip(start..start + length).for_each(|(to, i)| *to = from[i]);
            to[length..].fill(T::zero());
        }
        (Sources::Each(map), from_slice) => {
            for (to, &i) in to.iter_mut().zip(*map) {
                *to = match (i, from_slice) {
                    (NONE, _) => T::zero(),
                    (i, Some(slice)) => slice[i as usize],
                    (i, None) => from[i as usize],
                };
            }
            to[map.len()..].fill(T::zero());
        }
    }
}

/// y = B·x; x ends in zeros up to whole vectors.
#[inline(always)]
fn plain<S: Simd, T: Real>(s: S, values: &[T], width: usize, x: &[T], y: &mut [T]) {
    if width == 0 {
        return y.fill(T::zero());
    }
    let (x, _) = T::vectors::<S>(x);
    let mut rows = values.chunks_exact(width);
    let (eights, rest) = y.as_chunks_mut::<ROWS>();
    for eight in eights {
        let rows: [&[T]; ROWS] = std::array::from_fn(|_| rows.next().unwrap_or(&[]));
        let mut sums = [T::splat(s, T::zero()); ROWS];
        for (k, &x) in x.iter().enumerate() {
            let at = k * T::lanes::<S>();
            let end = width.min(at + T::lanes::<S>());
            for r in 0..ROWS {
                sums[r] = T::fma(s, <T as Lanes>::load(s, &rows[r][at..end]), x, sums[r]);
            }
        }
        for (y, sum) in eight.iter_mut().zip(sums) {
            *y = T::vsum(s, sum);
        }
    }
    for (y, row) in rest.iter_mut().zip(rows) {
        let mut sum = T::splat(s, T::zero());
        for (part, &x) in row.chunks(T::lanes::<S>()).zip(x) {
            sum = T::fma(s, <T as Lanes>::load(s, part), x, sum);
        }
        *y = T::vsum(s, sum);
    }
}

/// y = Bᵀ·x; y has room for whole vectors.
#[inline(always)]
fn transposed<S: Simd, T: Real>(s: S, values: &[T], width: usize, x: &[T], y: &mut [T]) {
    let lanes = T::lanes::<S>();
    let (y, _) = T::vectors_mut::<S>(y);
    let (eights, rest) = y.as_chunks_mut::<SUMS>();
    let whole = eights.len() * SUMS * lanes;
    for (k, eight) in eights.iter_mut().enumerate() {
        let at = k * SUMS * lanes;
        let end = width.min(at + SUMS * lanes);
        *eight = [T::splat(s, T::zero()); SUMS];
        for (row, &x) in values.chunks_exact(width).zip(x) {
            let (row, x) = (&row[at..end], T::splat(s, x));
            for c in 0..SUMS {
                let part = &row[(c * lanes).min(row.len())..((c + 1) * lanes).min(row.len())];
                eight[c] = T::fma(s, <T as Lanes>::load(s, part), x, eight[c]);
            }
        }
    }
    for (k, sum) in rest.iter_mut().enumerate() {
        let at = whole + k * lanes;
        let end = width.min(at + lanes);
        *sum = T::splat(s, T::zero());
        for (row, &x) in values.chunks_exact(width).zip(x) {
            *sum = T::fma(s, <T as Lanes>::load(s, &row[at..end]), T::splat(s, x), *sum);
        }
    }
}
