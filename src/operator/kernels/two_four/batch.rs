//! Many vectors, side by side in the lanes.

use ndarray::{ArrayView2, s};
use pulp::{Simd, WithSimd};

use super::super::turn;
use super::vector::prefetch;
use super::{BLOCK, Chunk, Kept, Places, ROWS, TwoFour, WIDTH};
use crate::simd::{Aligned, Lanes};

/// Vectors of a panel, given how many are left.
fn vectors(left: usize) -> usize {
    match left {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Rows whose sums are kept, for as many vectors.
pub(super) fn rows_at_once(all: usize) -> usize {
    // One vector: turns of the stream cost more than sums in the second cache.
    if all == 1 { 8 * BLOCK } else { BLOCK }
}

/// The panels of a batch: the first vector of each, and how many it has.
pub(super) fn panels(all: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let count = vectors(all - from);
        let panel = (from < all).then_some((from, count));
        from += count;
        panel
    })
}

/// Panels of x one after the other; a row of one is its vectors.
pub(super) struct Pack<'a, L> {
    pub(super) of: &'a TwoFour<L>,
    pub(super) x: ArrayView2<'a, f32>,
}

impl<L: Kept> WithSimd for Pack<'_, L> {
    type Output = Aligned<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Aligned<f32> {
        let Pack { of, x } = self;
        let (lanes, length, full) = (f32::lanes::<S>(), of.blocks() * WIDTH, of.columns / 4 * 4);
        let (all, mut packed) = (x.ncols().div_ceil(lanes), Aligned::default());
        let to = packed.numbers(length * all * lanes);
        for (from, vectors) in panels(all) {
            let to = &mut to[from * length * lanes..][..vectors * length * lanes];
            let x = x.slice(s![.., from * lanes..x.ncols().min((from + vectors) * lanes)]);
            fill(s, x.slice(s![..full, ..]), vectors, to);
            for (i, to) in to.chunks_exact_mut(vectors * lanes).enumerate().skip(full) {
                if let Some(i) = of.column(i) {
                    to.iter_mut().zip(x.row(i)).for_each(|(to, from)| *to = *from);
                }
            }
        }
        packed
    }
}

/// The same for the transposed product: all of x, in panels of 4 vectors or 1.
fn narrow_panels(all: usize) -> impl Iterator<Item = (usize, usize)> {
    let whole = all / 4 * 4;
    (0..whole).step_by(4).map(|from| (from, 4)).chain((whole..all).map(|from| (from, 1)))
}

/// All of x as panels that [`Transposed`] reads.
pub(super) struct PackRows<'a> {
    pub(super) x: ArrayView2<'a, f32>,
}

impl WithSimd for PackRows<'_> {
    type Output = Aligned<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Aligned<f32> {
        let (x, lanes, mut packed) = (self.x, f32::lanes::<S>(), Aligned::default());
        let (all, length) = (x.ncols().div_ceil(lanes), x.nrows() * lanes);
        let to = packed.numbers(length * all);
        for (from, vectors) in narrow_panels(all) {
            let x = x.slice(s![.., from * lanes..x.ncols().min((from + vectors) * lanes)]);
            fill(s, x, vectors, &mut to[from * length..][..vectors * length]);
        }
        packed
    }
}

/// x, in the first numbers of rows of whole vectors.
#[inline(always)]
fn fill<S: Simd>(s: S, x: ArrayView2<'_, f32>, vectors: usize, to: &mut [f32]) {
    if x.strides()[0] == 1 && x.strides()[1] != 1 {
        return turn::columns(s, x, vectors, to);
    }
    for (to, from) in to.chunks_exact_mut(vectors * f32::lanes::<S>()).zip(x.rows()) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }
}

/// Rows `first..` of W·x, as many as y holds, for x as [`Pack`] packs it.
pub(super) struct Product<'a, L> {
    pub(super) of: &'a TwoFour<L>,
    pub(super) x: &'a Aligned<f32>,
    pub(super) first: usize,
    pub(super) b: usize,
    pub(super) y: &'a mut [f32],
}

impl<L: Kept> WithSimd for Product<'_, L> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Product { of, x, first, b, y } = self;
        let (lanes, length, mut sums) = (f32::lanes::<S>(), of.blocks() * WIDTH, Aligned::default());
        let all = b.div_ceil(lanes);
        let x = x.filled(length * all * lanes);
        let block = rows_at_once(all);
        for (i, y) in y.chunks_mut(block * b).enumerate() {
            let rows = first + i * block..first + i * block + (y.len() / b).next_multiple_of(ROWS);
            for (from, vectors) in panels(all) {
                let sums = sums.numbers(rows.len() * vectors * lanes);
                sums.fill(0.0);
                let x = &x[from * length * lanes..][..vectors * length * lanes];
                Sums { of, x, rows: rows.clone(), vectors, sums }.with_simd(s);
                for (y, sums) in y.chunks_exact_mut(b).zip(sums.chunks_exact(vectors * lanes)) {
                    let y = &mut y[from * lanes..];
                    let count = y.len().min(sums.len());
                    y[..count].copy_from_slice(&sums[..count]);
                }
            }
        }
    }
}

/// Adds some rows, a multiple of [`ROWS`], times one panel to the sums.
pub(super) struct Sums<'a, L> {
    pub(super) of: &'a TwoFour<L>,
    pub(super) x: &'a [f32],
    pub(super) rows: std::ops::Range<usize>,
    pub(super) vectors: usize,
    pub(super) sums: &'a mut [f32],
}

impl<L: Kept> WithSimd for Sums<'_, L> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Sums { of, x, rows, vectors, sums } = self;
        match vectors {
            8 => s.vectorize(Panel::<L, 8, 1> { of, x, rows, sums }),
            4 => s.vectorize(Panel::<L, 4, 1> { of, x, rows, sums }),
            2 => s.vectorize(Panel::<L, 2, 2> { of, x, rows, sums }),
            _ => s.vectorize(Panel::<L, 1, 4> { of, x, rows, sums }),
        }
    }
}

/// Some rows times a panel of V vectors, R rows at a time.
struct Panel<'a, L, const V: usize, const R: usize> {
    of: &'a TwoFour<L>,
    x: &'a [f32],
    rows: std::ops::Range<usize>,
    sums: &'a mut [f32],
}

impl<L: Kept, const V: usize, const R: usize> WithSimd for Panel<'_, L, V, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Panel { of, x, rows, sums } = self;
        let (x, _) = S::as_simd_f32s(x);
        let (sums, _) = S::as_mut_simd_f32s(sums);
        let (x, _) = x.as_chunks::<V>().0.as_chunks::<WIDTH>();
        let (sums, _) = sums.as_chunks_mut::<V>().0.as_chunks_mut::<R>();
        // Hidden from the compiler, which would make four loads of a load and four permutations.
        let which = std::hint::black_box([0, 1, 2, 3]).map(|k| s.splat_u32s(k));
        for (block, x) in x.iter().enumerate() {
            let at = block * of.padded() + rows.start;
            let (chunks, places) = (&of.chunks[at..at + rows.len()], &of.places[at..at + rows.len()]);
            let (chunks, places) = (chunks.as_chunks::<R>().0, places.as_chunks::<R>().0);
            for ((sums, chunks), places) in sums.iter_mut().zip(chunks).zip(places) {
                *sums = match V == 1 && L::WIDE {
                    true => in_turn(s, x, chunks, places, *sums),
                    false => tile(s, x, chunks, places, &which, *sums),
                };
            }
        }
    }
}

/// sums + chunks · x.
#[inline(always)]
fn tile<S: Simd, L: Kept, const V: usize, const R: usize>(
    s: S,
    x: &[[S::f32s; V]; WIDTH],
    chunks: &[Chunk<L>; R],
    places: &[Places; R],
    which: &[S::u32s; 4],
    mut sums: [[S::f32s; V]; R],
) -> [[S::f32s; V]; R] {
    for ((sums, chunk), places) in sums.iter_mut().zip(chunks).zip(places) {
        prefetch(chunk);
        // Few sums would wait for each other: each value of a quad has its own.
        let mut others = [[s.splat_f32s(0.0); V]; 3];
        let mut words = u64::from(places[0]) | u64::from(places[1]) << 32;
        for (four, pair) in chunk.0.as_chunks::<4>().0.iter().zip(x.as_chunks::<4>().0.as_chunks::<2>().0) {
            let pairs = four.as_chunks::<2>().0;
            let values = match V < 8 {
                true => L::splats(s, four, which),
                // Eight products hide what their value costs.
                false => std::array::from_fn(|k| L::splat(s, &pairs[k / 2], k % 2 == 1)),
            };
            for (k, value) in values.into_iter().enumerate() {
                let line = &pair[k / 2][(words >> (2 * k) & 3) as usize];
                let to = match k {
                    1.. if V < 8 => &mut others[k - 1],
                    _ => &mut *sums,
                };
                for (sum, &x) in to.iter_mut().zip(line) {
                    *sum = s.mul_add_e_f32s(value, x, *sum);
                }
            }
            words >>= 8;
        }
        if V < 8 {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = s.add_f32s(s.add_f32s(*sum, others[0][i]), s.add_f32s(others[1][i], others[2][i]));
            }
        }
    }
    sums
}

/// The same for one vector, the rows' groups in turn: wide values come in faster when several rows are read at a time.
#[inline(always)]
fn in_turn<S: Simd, L: Kept, const V: usize, const R: usize>(
    s: S,
    x: &[[S::f32s; V]; WIDTH],
    chunks: &[Chunk<L>; R],
    places: &[Places; R],
    mut sums: [[S::f32s; V]; R],
) -> [[S::f32s; V]; R] {
    // Few sums would wait for each other: those of the second value of each group are summed apart.
    let mut others = [[s.splat_f32s(0.0); V]; R];
    chunks.iter().for_each(prefetch);
    for (h, groups) in x.as_chunks::<4>().0.as_chunks::<8>().0.iter().enumerate() {
        let mut words = places.map(|places| places[h]);
        for (g, group) in groups.iter().enumerate() {
            for (r, word) in words.iter_mut().enumerate() {
                let pair = &chunks[r].0.as_chunks().0[8 * h + g];
                for (k, sums) in [&mut sums, &mut others].into_iter().enumerate() {
                    let value = L::splat(s, pair, k == 1);
                    for (sum, &x) in sums[r].iter_mut().zip(&group[(*word >> (2 * k) & 3) as usize]) {
                        *sum = s.mul_add_e_f32s(value, x, *sum);
                    }
                }
                *word >>= 4;
            }
        }
    }
    for (sum, other) in sums.as_flattened_mut().iter_mut().zip(others.as_flattened()) {
        *sum = s.add_f32s(*sum, *other);
    }
    sums
}

/// Wᵀ·x in one block of columns, 64×b, for x as [`PackRows`] packs it.
pub(super) struct Transposed<'a, L> {
    pub(super) of: &'a TwoFour<L>,
    pub(super) x: &'a Aligned<f32>,
    pub(super) block: usize,
    pub(super) b: usize,
}

impl<L: Kept> WithSimd for Transposed<'_, L> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<f32> {
        let Transposed { of, x, block, b } = self;
        let (lanes, m) = (f32::lanes::<S>(), of.rows);
        let all = b.div_ceil(lanes);
        let (x, mut memory) = (x.filled(m * lanes * all), Aligned::default());
        let (sums, at) = (memory.numbers(WIDTH * lanes * all), block * of.padded());
        for start in (0..m).step_by(BLOCK) {
            let rows = start..m.min(start + BLOCK);
            let (chunks, places) = (&of.chunks[at..][rows.clone()], &of.places[at..][rows.clone()]);
            for (from, vectors) in narrow_panels(all) {
                let width = vectors * lanes;
                let x = &x[from * lanes * m + start * width..][..rows.len() * width];
                let sums = &mut sums[from * lanes * WIDTH..][..width * WIDTH];
                match vectors {
                    4 => s.vectorize(Spread::<L, 4> { chunks, places, x, sums }),
                    _ => s.vectorize(Spread::<L, 1> { chunks, places, x, sums }),
                }
            }
        }
        let mut y = vec![0.0; WIDTH * b];
        for (from, vectors) in narrow_panels(all).map(|(from, vectors)| (from * lanes, vectors * lanes)) {
            let sums = sums[from * WIDTH..][..vectors * WIDTH].chunks_exact(vectors);
            for (y, sums) in y.chunks_exact_mut(b).zip(sums) {
                y[from..].iter_mut().zip(sums).for_each(|(y, sum)| *y = *sum);
            }
        }
        y
    }
}

/// Some chunks, each value times its row of V vectors, added to the rows of sums that the places say.
struct Spread<'a, L, const V: usize> {
    chunks: &'a [Chunk<L>],
    places: &'a [Places],
    x: &'a [f32],
    sums: &'a mut [f32],
}

impl<L: Kept, const V: usize> WithSimd for Spread<'_, L, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Spread { chunks, places, x, sums } = self;
        let (x, _) = S::as_simd_f32s(x).0.as_chunks::<V>();
        let (sums, _) = S::as_mut_simd_f32s(sums).0.as_chunks_mut::<V>();
        let (groups, _) = sums.as_chunks_mut::<4>();
        for ((chunk, places), x) in chunks.iter().zip(places).zip(x) {
            let values = chunk.0.as_chunks::<2>().0;
            let mut words = u64::from(places[0]) | u64::from(places[1]) << 32;
            for (group, pair) in groups.iter_mut().zip(values) {
                for second in [false, true] {
                    let value = L::splat(s, pair, second);
                    for (sum, &x) in group[words as usize & 3].iter_mut().zip(x) {
                        *sum = s.mul_add_e_f32s(value, x, *sum);
                    }
                    words >>= 2;
                }
            }
        }
    }
}
