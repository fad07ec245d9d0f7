//! The core step: masks and values of S for given wrappers.
//!
//! For a block of rows p and a tile of columns t the change dS costs, in terms of the core alone,
//!
//! > 2·⟨dS, Aᵀ·(E·G)_t·Bᵀ⟩ + tr(AᵀA·dS·H·dSᵀ),  H = B·G_tt·Bᵀ
//!
//! that is the coder's problem with rows that interact through AᵀA. Rows of a block go one after the other,
//! and for each of them groups from left to right: all masks of a group, least-squares values, and the
//! gradient of what comes later brought up to date. Blocks of rows are independent: they are laid
//! out across lanes.

use std::ops::Range;

use ndarray::{Array2, Axis, s};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::state::{Form, State, dot};
use crate::coder::{Judge, LANES, Masks, Pattern, Tables, Vectors};
use crate::linalg::matmul_into;
use crate::operator::Nm;
use crate::scalar::Real;

/// At least this many columns are solved between two products with G.
const TILE: usize = 32;

/// Columns in tiles that cut neither a group nor a block of B.
pub(super) fn tiles(columns: usize, block: usize, nm: Nm) -> Vec<Range<usize>> {
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let step = block / gcd(block, nm.m()) * nm.m();
    super::state::parts(columns, step * TILE.div_ceil(step))
}

/// One tile of all rows, `LANES` blocks of rows side by side.
struct Tile<'a, T> {
    tables: &'a Tables<T>,
    /// H, c×c.
    form: &'a Array2<T>,
    height: usize,
    width: usize,
}

/// Some blocks of rows across lanes: number (i, j) of a block is row i·width + j here.
struct Batch<T> {
    gradient: Vec<[T; LANES]>,
    values: Vec<[T; LANES]>,
    start: Vec<[T; LANES]>,
    /// The number of each group's mask, height × groups; −1 where the row counts for nothing and keeps its own.
    chosen: Vec<[T; LANES]>,
    /// AᵀA, height × height.
    rows: Vec<[T; LANES]>,
}

/// All groups of all rows of a batch once.
struct Pass<'a, 'b, T> {
    tile: &'a Tile<'a, T>,
    batch: &'b mut Batch<T>,
}

impl<T: Real> WithSimd for Pass<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let (tile, batch) = (self.tile, self.batch);
        let across = LANES / T::lanes::<S>();
        let mut lines = Lines {
            gradient: T::vectors_mut::<S>(batch.gradient.as_flattened_mut()).0,
            values: T::vectors_mut::<S>(batch.values.as_flattened_mut()).0,
            chosen: T::vectors_mut::<S>(batch.chosen.as_flattened_mut()).0,
            rows: T::vectors::<S>(batch.rows.as_flattened()).0,
            own: vec![T::splat(s, T::zero()); tile.width],
            change: vec![T::splat(s, T::zero()); tile.width],
            across,
        };
        // Loops, not closures: those would not be compiled for these instructions.
        for v in 0..across {
            tile.pass(s, &mut lines, v);
        }
    }
}

/// What a batch holds, as vectors, `across` of them side by side, and room for one row.
struct Lines<'a, V> {
    gradient: &'a mut [V],
    values: &'a mut [V],
    chosen: &'a mut [V],
    rows: &'a [V],
    own: Vec<V>,
    change: Vec<V>,
    across: usize,
}

impl<T: Real> Tile<'_, T> {
    /// All groups of all rows of one vector of blocks.
    #[inline(always)]
    fn pass<S: Simd>(&self, s: S, lines: &mut Lines<'_, T::V<S>>, v: usize) {
        let (height, width, across) = (self.height, self.width, lines.across);
        let zero = T::splat(s, T::zero());
        for i in 0..height {
            let weight = lines.rows[(i * height + i) * across + v];
            let inverse = T::if_less(s, zero, weight, T::vdiv(s, T::splat(s, T::one()), weight), zero);
            // In units of the row's own weight, so that H's inverses serve all rows.
            for (j, own) in lines.own.iter_mut().enumerate() {
                *own = T::vmul(s, lines.gradient[(i * width + j) * across + v], inverse);
            }
            for (group, (start, size, masks, inverses)) in self.tables.groups().enumerate() {
                let step = Step { i, v, group, start, size, masks, inverses, inverse };
                match size {
                    4 => step.take::<4, S>(s, self, lines),
                    _ => step.take::<{ Nm::LARGEST }, S>(s, self, lines),
                }
            }
            self.spread(s, lines, i, v);
        }
    }

    /// Row i of H from a column on.
    #[inline(always)]
    fn row(&self, i: usize, from: usize) -> &[T] {
        self.form.as_slice().unwrap_or(&[]).get(i * self.width + from..(i + 1) * self.width).unwrap_or(&[])
    }

    /// What a change of row i means for the gradient of the rows below.
    #[inline(always)]
    fn spread<S: Simd>(&self, s: S, lines: &mut Lines<'_, T::V<S>>, i: usize, v: usize) {
        let (height, width, across) = (self.height, self.width, lines.across);
        if i + 1 == height {
            return;
        }
        // H·change, in the memory of what is done.
        lines.own.fill(T::splat(s, T::zero()));
        for (k, &change) in lines.change.iter().enumerate() {
            for (to, &h) in lines.own.iter_mut().zip(self.row(k, 0)) {
                *to = T::fma(s, T::splat(s, h), change, *to);
            }
        }
        for below in i + 1..height {
            let factor = lines.rows[(below * height + i) * across + v];
            let to = lines.gradient[below * width * across..].iter_mut().skip(v).step_by(across);
            for (to, &from) in to.zip(&lines.own) {
                *to = T::fma(s, factor, from, *to);
            }
        }
    }
}

/// One group of row i of one vector of blocks.
struct Step<'a, T, V> {
    i: usize,
    v: usize,
    group: usize,
    start: usize,
    size: usize,
    masks: &'a Masks,
    inverses: &'a [T],
    /// Of the row's own weight; zero where it has none.
    inverse: V,
}

impl<T: Real, V: Copy> Step<'_, T, V> {
    /// Solves a group of at most M inputs and brings the row's gradient up to date.
    #[inline(always)]
    fn take<const M: usize, S: Simd>(&self, s: S, tile: &Tile<'_, T>, lines: &mut Lines<'_, V>)
    where
        T: crate::simd::Lanes<V<S> = V>,
    {
        let &Step { i, v, group, start, size, masks, inverses, inverse } = self;
        // A known size lets the compiler write everything out.
        let size = if M == 4 { 4 } else { size.min(M) };
        let (zero, across) = (T::splat(s, T::zero()), lines.across);
        let mut rows: [&[T]; M] = [&[]; M];
        for (a, row) in rows.iter_mut().enumerate().take(size) {
            *row = tile.row(start + a, start);
        }
        let mut g: Vectors<V> = [zero; Nm::LARGEST];
        for a in 0..size {
            g[a] = lines.own[start + a];
            for (b, &h) in rows[a].iter().enumerate().take(size) {
                let old = lines.values[(i * tile.width + start + b) * across + v];
                g[a] = T::fnma(s, T::splat(s, h), old, g[a]);
            }
        }
        let (number, new) = masks.solve::<S, T>(s, inverses, &g, Judge::Gain(zero));
        let at = (i * tile.tables.groups().len() + group) * across + v;
        lines.chosen[at] = T::if_less(s, zero, inverse, number, T::splat(s, -T::one()));
        let mut change = [zero; M];
        for a in 0..size {
            let value = &mut lines.values[(i * tile.width + start + a) * across + v];
            let new = T::if_less(s, zero, inverse, new[a], *value);
            change[a] = T::vsub(s, new, *value);
            *value = new;
            lines.change[start + a] = change[a];
        }
        for (j, own) in lines.own[start + size..].iter_mut().enumerate() {
            let mut sum = *own;
            for a in 0..size {
                sum = T::fma(s, T::splat(s, rows[a][size + j]), change[a], sum);
            }
            *own = sum;
        }
    }
}

impl<T: Real> State<'_, T> {
    /// S-step: all groups once, tile after tile; the loss does not rise. Returns what it changes by.
    pub(super) fn step_core(&mut self, form: &Form<'_, T>, nm: Nm, block: usize) -> f64 {
        let ((_, n), mut change) = (self.weight.dim(), 0.0);
        let height = self.rows.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
        let squares: Vec<Array2<T>> = self.left.iter().map(|a| multiply(a.t(), a.view())).collect();
        for range in tiles(n, block, nm) {
            let b = self.right_on(&range);
            let gb = f64::kernels(self.backend).matmul(b.view(), form.block(range.clone()).view());
            let h = f64::kernels(self.backend).symmetric_product(gb.view(), b.view());
            let tables = Tables::new(h.view(), 0.0, Pattern::Groups(nm));
            let (narrow, b) = (h.mapv(T::from_f64), b.mapv(T::from_f64));
            let tile = Tile { tables: &tables, form: &narrow, height, width: range.len() };
            let forces = form.columns(self.error.view(), range.clone());
            // Aᵀ·(E·G)·Bᵀ.
            let right = multiply(forces.view(), b.t());
            let (blocks, arch): (Vec<usize>, _) = ((0..self.rows.len()).collect(), Arch::new());
            let run = |blocks: &[usize]| {
                let mut batch = self.gather(blocks, &squares, &right, &range, (height, tables.groups().len()));
                arch.dispatch(Pass { tile: &tile, batch: &mut batch });
                batch
            };
            let batches: Vec<Batch<T>> = match rayon::current_thread_index() {
                Some(_) => blocks.chunks(LANES).map(run).collect(),
                None => blocks.par_chunks(LANES).map(run).collect(),
            };
            for (blocks, batch) in blocks.chunks(LANES).zip(&batches) {
                change += self.scatter(blocks, batch, (&tile, &b), &right, &range);
            }
        }
        change
    }

    fn gather(
        &self,
        blocks: &[usize],
        squares: &[Array2<T>],
        right: &Array2<T>,
        range: &Range<usize>,
        (height, groups): (usize, usize),
    ) -> Batch<T> {
        let (width, zero) = (range.len(), [T::zero(); LANES]);
        let mut batch = Batch {
            gradient: vec![zero; height * width],
            values: vec![zero; height * width],
            start: Vec::new(),
            chosen: vec![zero; height * groups],
            rows: vec![zero; height * height],
        };
        for (lane, &p) in blocks.iter().enumerate() {
            let part = &self.rows[p];
            let gradient = multiply(self.left[p].t(), right.slice(s![part.clone(), ..]));
            for ((i, j), &g) in gradient.indexed_iter() {
                let (at, column) = (i * width + j, range.start + j);
                batch.gradient[at][lane] = g;
                batch.values[at][lane] = self.core.values[(part.start + i, column)];
            }
            for ((i, j), &v) in squares[p].indexed_iter() {
                batch.rows[i * height + j][lane] = v;
            }
        }
        batch.start = batch.values.clone();
        batch
    }

    /// Takes over what a batch found; `right` is E·G·Bᵀ before. Returns what the loss changes by.
    fn scatter(
        &mut self,
        blocks: &[usize],
        batch: &Batch<T>,
        (tile, b): (&Tile<'_, T>, &Array2<T>),
        right: &Array2<T>,
        range: &Range<usize>,
    ) -> f64 {
        let (width, tables, mut loss) = (range.len(), tile.tables, 0.0);
        for (lane, &p) in blocks.iter().enumerate() {
            let part = self.rows[p].clone();
            let mut change = Array2::zeros((part.len(), width));
            for ((i, j), change) in change.indexed_iter_mut() {
                let (at, place) = (i * width + j, (part.start + i, range.start + j));
                *change = batch.values[at][lane] - batch.start[at][lane];
                self.core.values[place] = batch.values[at][lane];
            }
            let groups = tables.groups().len();
            for (at, (start, size, masks, _)) in (0..part.len()).flat_map(|_| tables.groups()).enumerate() {
                let number = batch.chosen[at][lane];
                if number < T::zero() {
                    continue;
                }
                let places = &masks.places[number.wide() as usize];
                for a in 0..size {
                    let place = (part.start + at / groups, range.start + start + a);
                    self.core.kept[place] = places.contains(&a);
                }
            }
            let moved = multiply(self.left[p].view(), change.view());
            // 2·⟨D, E·G·Bᵀ⟩ + tr(D·H·Dᵀ) for D = A·dS.
            let both = multiply(moved.view(), tile.form.view()) + &right.slice(s![part.clone(), ..]) * T::from_f64(2.0);
            loss += dot(both.view(), moved.view());
            let to = self.error.slice_mut(s![part, range.clone()]);
            matmul_into(T::one(), moved.view(), b.view(), T::one(), to);
        }
        loss
    }
}

fn multiply<T: Real>(a: ndarray::ArrayView2<'_, T>, b: ndarray::ArrayView2<'_, T>) -> Array2<T> {
    let mut c = Array2::zeros((a.len_of(Axis(0)), b.len_of(Axis(1))));
    matmul_into(T::one(), a, b, T::zero(), c.view_mut());
    c
}
