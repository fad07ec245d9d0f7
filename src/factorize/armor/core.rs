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
use rayon::prelude::*;

use super::state::{Form, State};
use crate::coder::{LANES, Lanes, Pattern, Tables};
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

/// One tile of all rows, `lanes` blocks of rows side by side.
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
    kept: Vec<[bool; LANES]>,
    /// AᵀA, height × height.
    rows: Vec<[T; LANES]>,
}

impl<T: Real> Tile<'_, T> {
    /// All groups of all rows once.
    fn pass(&self, batch: &mut Batch<T>) {
        let (height, width) = (self.height, self.width);
        for i in 0..height {
            let own = batch.rows[i * height + i];
            let inverse = own.map(|v| if v > T::zero() { T::one() / v } else { T::zero() });
            let line = i * width..(i + 1) * width;
            // In units of the row's own weight, so that H's inverses serve all rows.
            let mut gradient: Vec<[T; LANES]> = batch.gradient[line.clone()].to_vec();
            gradient.iter_mut().for_each(|g| (0..LANES).for_each(|l| g[l] *= inverse[l]));
            let mut change = vec![[T::zero(); LANES]; width];
            for (start, size, masks, inverses) in self.tables.groups() {
                let mut g: Lanes<T> = [[T::zero(); LANES]; Nm::LARGEST];
                for a in 0..size {
                    g[a] = gradient[start + a];
                    for b in 0..size {
                        let (h, old) = (self.form[(start + a, start + b)], &batch.values[line.start + start + b]);
                        (0..LANES).for_each(|l| g[a][l] -= h * old[l]);
                    }
                }
                let chosen = masks.best(inverses, &g, &[T::zero(); LANES]);
                let new = masks.values(inverses, &g, &chosen);
                for a in 0..size {
                    let at = line.start + start + a;
                    for l in (0..LANES).filter(|&l| inverse[l] > T::zero()) {
                        change[start + a][l] = new[a][l] - batch.values[at][l];
                        batch.values[at][l] = new[a][l];
                        batch.kept[at][l] = masks.places[chosen[l]].contains(&a);
                    }
                    let row = self.form.row(start + a);
                    for (g, &h) in gradient[start + size..].iter_mut().zip(row.iter().skip(start + size)) {
                        (0..LANES).for_each(|l| g[l] += h * change[start + a][l]);
                    }
                }
            }
            self.spread(batch, i, &change);
        }
    }

    /// What a change of row i means for the gradient of the rows below.
    fn spread(&self, batch: &mut Batch<T>, i: usize, change: &[[T; LANES]]) {
        let (height, width) = (self.height, self.width);
        if i + 1 == height {
            return;
        }
        let mut weighed = vec![[T::zero(); LANES]; width];
        for (row, change) in self.form.rows().into_iter().zip(change) {
            for (to, &h) in weighed.iter_mut().zip(row) {
                (0..LANES).for_each(|l| to[l] += h * change[l]);
            }
        }
        for below in i + 1..height {
            let factor = batch.rows[below * height + i];
            for (to, from) in batch.gradient[below * width..(below + 1) * width].iter_mut().zip(&weighed) {
                (0..LANES).for_each(|l| to[l] += factor[l] * from[l]);
            }
        }
    }
}

impl<T: Real> State<'_, T> {
    /// S-step: all groups once, tile after tile; the loss does not rise.
    pub(super) fn step_core(&mut self, form: &Form<'_, T>, nm: Nm, block: usize) {
        let (_, n) = self.weight.dim();
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
            let blocks: Vec<usize> = (0..self.rows.len()).collect();
            let run = |blocks: &[usize]| {
                let mut batch = self.gather(blocks, &squares, &right, &range, height);
                tile.pass(&mut batch);
                batch
            };
            let batches: Vec<Batch<T>> = match rayon::current_thread_index() {
                Some(_) => blocks.chunks(LANES).map(run).collect(),
                None => blocks.par_chunks(LANES).map(run).collect(),
            };
            for (blocks, batch) in blocks.chunks(LANES).zip(&batches) {
                self.scatter(blocks, batch, &b, &range);
            }
        }
    }

    fn gather(
        &self,
        blocks: &[usize],
        squares: &[Array2<T>],
        right: &Array2<T>,
        range: &Range<usize>,
        height: usize,
    ) -> Batch<T> {
        let (width, zero) = (range.len(), [T::zero(); LANES]);
        let mut batch = Batch {
            gradient: vec![zero; height * width],
            values: vec![zero; height * width],
            start: Vec::new(),
            kept: vec![[false; LANES]; height * width],
            rows: vec![zero; height * height],
        };
        for (lane, &p) in blocks.iter().enumerate() {
            let part = &self.rows[p];
            let gradient = multiply(self.left[p].t(), right.slice(s![part.clone(), ..]));
            for ((i, j), &g) in gradient.indexed_iter() {
                let (at, column) = (i * width + j, range.start + j);
                batch.gradient[at][lane] = g;
                batch.values[at][lane] = self.core.values[(part.start + i, column)];
                batch.kept[at][lane] = self.core.kept[(part.start + i, column)];
            }
            for ((i, j), &v) in squares[p].indexed_iter() {
                batch.rows[i * height + j][lane] = v;
            }
        }
        batch.start = batch.values.clone();
        batch
    }

    fn scatter(&mut self, blocks: &[usize], batch: &Batch<T>, b: &Array2<T>, range: &Range<usize>) {
        let width = range.len();
        for (lane, &p) in blocks.iter().enumerate() {
            let part = self.rows[p].clone();
            let mut change = Array2::zeros((part.len(), width));
            for ((i, j), change) in change.indexed_iter_mut() {
                let (at, place) = (i * width + j, (part.start + i, range.start + j));
                *change = batch.values[at][lane] - batch.start[at][lane];
                self.core.values[place] = batch.values[at][lane];
                self.core.kept[place] = batch.kept[at][lane];
            }
            let moved = multiply(self.left[p].view(), change.view());
            let to = self.error.slice_mut(s![part, range.clone()]);
            matmul_into(T::one(), moved.view(), b.view(), T::one(), to);
        }
    }
}

fn multiply<T: Real>(a: ndarray::ArrayView2<'_, T>, b: ndarray::ArrayView2<'_, T>) -> Array2<T> {
    let mut c = Array2::zeros((a.len_of(Axis(0)), b.len_of(Axis(1))));
    matmul_into(T::one(), a, b, T::zero(), c.view_mut());
    c
}
