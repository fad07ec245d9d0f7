//! Exact group coordinate descent under the full quadratic form.

use ndarray::{Array2, ArrayView2, s};

use super::table::Masks;
use super::{BLOCK, Coded, LANES, STRIP, Strip, Tables, check, each, join, strips};
use crate::error::Result;
use crate::linalg::matmul_into;
use crate::operator::Nm;
use crate::scalar::Real;

/// What a sweep may change.
#[derive(Debug, Clone, Copy)]
enum Choice<'a, T> {
    /// Masks and values.
    Masks,
    /// Masks, at a price for each entry of a row, and values.
    Priced(&'a [T]),
    /// Values only.
    Values,
}

/// A solution on its way down.
#[derive(Debug)]
pub struct Descent<'a, T> {
    shape: (usize, usize),
    form: ArrayView2<'a, T>,
    tables: &'a Tables<T>,
    strips: Vec<Strip<T>>,
}

impl<'a, T: Real> Descent<'a, T> {
    /// Begins at `start`, which must have the pattern of `tables`. `form` is H as the tables were made of.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if shapes do not fit.
    pub fn new(
        target: ArrayView2<'_, T>,
        form: ArrayView2<'a, T>,
        tables: &'a Tables<T>,
        start: &Coded<T>,
    ) -> Result<Self> {
        check(target, form.dim(), Some(start))?;
        check(target, (tables.columns(), tables.columns()), None)?;
        Ok(Descent { shape: target.dim(), form, tables, strips: strips(target, Some(start)) })
    }

    /// One pass over all groups of all rows, masks and values; the error does not rise. 2mn² flops.
    pub fn sweep(&mut self) {
        self.pass(Choice::Masks);
    }

    /// The same where each stored entry of row i costs `prices[i]`: error plus price does not rise.
    /// Returns how many entries are stored now.
    ///
    /// # Panics
    /// If there is not one price for each row.
    pub fn sweep_priced(&mut self, prices: &[T]) -> usize {
        assert_eq!(prices.len(), self.shape.0, "one price for each row");
        self.pass(Choice::Priced(prices));
        let stored = |strip: &Strip<T>| strip.kept.slice(s![.., ..strip.rows]).iter().filter(|&&kept| kept).count();
        self.strips.iter().map(stored).sum()
    }

    /// One pass over all groups, masks as they are: the error does not rise.
    pub fn refit(&mut self) {
        self.pass(Choice::Values);
    }

    /// Keeps exactly the `count` entries of the whole matrix that are worth most by themselves, rows weighed
    /// against each other by `rows`: v²·H_jj for a stored entry, f²/H_jj with f = H·(Ŵ−W) for one that is not
    /// (it begins at zero). For a free pattern; [`refit`](Self::refit) afterwards. 2mn² flops.
    pub fn settle(&mut self, count: usize, rows: impl Fn(usize) -> f64 + Send + Sync) {
        let form = self.form;
        let worth = each(&mut self.strips, |strip| {
            let mut forces = Array2::zeros(strip.error.dim());
            matmul_into(T::one(), form, strip.error.view(), T::zero(), forces.view_mut());
            Array2::from_shape_fn((strip.rows, form.nrows()), |(i, j)| {
                let (h, at) = (form[(j, j)].wide().max(f64::MIN_POSITIVE), (j, i));
                let alone =
                    if strip.kept[at] { strip.coded[at].wide().powi(2) * h } else { forces[at].wide().powi(2) / h };
                alone * rows(strip.first + i)
            })
        });
        let worth: Vec<f64> = worth.into_iter().flatten().collect();
        let mut order: Vec<usize> = (0..worth.len()).collect();
        if count < order.len() {
            order.select_nth_unstable_by(count, |&a, &b| worth[b].total_cmp(&worth[a]).then(a.cmp(&b)));
        }
        self.strips.iter_mut().for_each(|strip| strip.kept.fill(false));
        let n = self.shape.1;
        for &at in order.iter().take(count) {
            let (i, j) = (at / n, at % n);
            self.strips[i / STRIP].kept[(j, i % STRIP)] = true;
        }
        for strip in &mut self.strips {
            strip.coded.zip_mut_with(&strip.kept, |v, &kept| *v = if kept { *v } else { T::zero() });
            strip.error = &strip.coded - &strip.target;
        }
    }

    /// The solution reached.
    pub fn solution(&self) -> Coded<T> {
        join(self.shape, &self.strips)
    }

    fn pass(&mut self, choice: Choice<'_, T>) {
        let (form, tables) = (self.form, self.tables);
        each(&mut self.strips, |strip| pass(strip, form, tables, choice));
    }
}

/// Several sweeps from a first solution, the usual way to use it.
///
/// # Errors
/// As [`Descent::new`].
pub fn descend<T: Real>(
    target: ArrayView2<'_, T>,
    form: ArrayView2<'_, T>,
    tables: &Tables<T>,
    start: &Coded<T>,
    sweeps: usize,
) -> Result<Coded<T>> {
    let mut descent = Descent::new(target, form, tables, start)?;
    (0..sweeps).for_each(|_| descent.sweep());
    Ok(descent.solution())
}

pub(super) fn load<T: Real>(a: &Array2<T>, row: usize, lane: usize) -> [T; LANES] {
    let row = a.row(row);
    let lanes = row.as_slice().and_then(|row| row[lane..].first_chunk());
    lanes.copied().unwrap_or([T::zero(); LANES])
}

pub(super) fn store<T: Real>(a: &mut Array2<T>, row: usize, lane: usize, values: [T; LANES]) {
    if let Some(row) = a.row_mut(row).as_slice_mut() {
        row[lane..lane + LANES].copy_from_slice(&values);
    }
}

fn pass<T: Real>(strip: &mut Strip<T>, form: ArrayView2<'_, T>, tables: &Tables<T>, choice: Choice<'_, T>) {
    let groups: Vec<(usize, usize, &Masks, &[T])> = tables.groups().collect();
    let mut forces = Array2::zeros((BLOCK, strip.width()));
    let mut at = 0;
    while at < groups.len() {
        let start = groups[at].0;
        let many = groups[at..].iter().take_while(|(first, size, ..)| first + size - start <= BLOCK).count();
        let block = &groups[at..at + many];
        at += many;
        let end = block.last().map_or(start, |(first, size, ..)| first + size);
        // H·error for the columns of the block, as of now.
        let mut forces = forces.slice_mut(s![..end - start, ..]);
        let rows = form.slice(s![start..end, ..]);
        matmul_into(T::one(), rows, strip.error.view(), T::zero(), forces.view_mut());
        let diagonal = form.slice(s![start..end, start..end]);
        for lane in (0..strip.width()).step_by(LANES) {
            let mut tile = [[T::zero(); LANES]; BLOCK];
            for (to, from) in tile.iter_mut().zip(forces.rows()) {
                from.iter().skip(lane).zip(to).for_each(|(&from, to)| *to = from);
            }
            let mut price = [T::zero(); LANES];
            if let Choice::Priced(prices) = choice {
                prices.iter().skip(strip.first + lane).zip(&mut price).for_each(|(&from, to)| *to = from);
            }
            for &(first, size, masks, inverses) in block {
                let step = Step { first, size, masks, inverses, lane, offset: first - start };
                step.take(strip, &mut tile[..end - start], diagonal, &price, matches!(choice, Choice::Values));
            }
        }
    }
}

/// One group of the rows of one set of lanes.
struct Step<'a, T> {
    first: usize,
    size: usize,
    masks: &'a Masks,
    inverses: &'a [T],
    lane: usize,
    /// The group's first column within its block.
    offset: usize,
}

impl<T: Real> Step<'_, T> {
    /// Solves the group, and brings the forces of the later columns of the block up to date.
    fn take(
        &self,
        strip: &mut Strip<T>,
        forces: &mut [[T; LANES]],
        form: ArrayView2<'_, T>,
        price: &[T; LANES],
        fixed: bool,
    ) {
        let mut old = [[T::zero(); LANES]; Nm::LARGEST];
        for (i, old) in old.iter_mut().enumerate().take(self.size) {
            *old = load(&strip.coded, self.first + i, self.lane);
        }
        // The forces without the group's own part.
        let mut g = [[T::zero(); LANES]; Nm::LARGEST];
        for i in 0..self.size {
            g[i] = forces[self.offset + i];
            let row = form.row(self.offset + i);
            for (j, old) in old.iter().enumerate().take(self.size) {
                let h = row[self.offset + j];
                for l in 0..LANES {
                    g[i][l] -= h * old[l];
                }
            }
            // The target is not in `old`: H·(coded − target) loses the coded part only.
        }
        let chosen = if fixed { self.current(strip) } else { self.masks.best(self.inverses, &g, price) };
        let new = self.masks.values(self.inverses, &g, &chosen);
        for i in 0..self.size {
            let target: [T; LANES] = load(&strip.target, self.first + i, self.lane);
            let (mut delta, mut error) = ([T::zero(); LANES], [T::zero(); LANES]);
            for l in 0..LANES {
                delta[l] = new[i][l] - old[i][l];
                error[l] = new[i][l] - target[l];
            }
            store(&mut strip.coded, self.first + i, self.lane, new[i]);
            store(&mut strip.error, self.first + i, self.lane, error);
            let row = form.row(self.offset + i);
            let later = self.offset + self.size;
            for (force, &h) in forces[later..].iter_mut().zip(row.iter().skip(later)) {
                for l in 0..LANES {
                    force[l] += h * delta[l];
                }
            }
        }
        if !fixed {
            for (l, &mask) in chosen.iter().enumerate() {
                (0..self.size).for_each(|i| strip.kept[(self.first + i, self.lane + l)] = false);
                self.masks.places[mask].iter().for_each(|&i| strip.kept[(self.first + i, self.lane + l)] = true);
            }
        }
    }

    /// The mask that each lane has.
    fn current(&self, strip: &Strip<T>) -> [usize; LANES] {
        std::array::from_fn(|l| {
            let kept = |i: &usize| strip.kept[(self.first + i, self.lane + l)];
            let places: Vec<usize> = (0..self.size).filter(kept).collect();
            self.masks.places.iter().position(|known| *known == places).unwrap_or(0)
        })
    }
}
