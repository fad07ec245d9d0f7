//! Exact group coordinate descent under the full quadratic form.

use ndarray::{Array2, ArrayView2, CowArray, Ix2, s};
use pulp::Arch;

use super::pass::{Choice, Forces, Pass, WIDTH, pack};
use super::table::Masks;
use super::{BLOCK, Coded, Tables, check, each};
use crate::error::{Error, Result};
use crate::scalar::Real;
use crate::simd::Aligned;

/// Parts that share what they read of H: one unit of parallel work.
const TOGETHER: usize = 8;

/// Some rows, transposed: each array is n × `WIDTH`, zero beyond the last row.
#[derive(Debug)]
pub(super) struct Part<T> {
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) target: Aligned<T>,
    /// What stands for it now.
    pub(super) coded: Aligned<T>,
    /// coded − target.
    pub(super) error: Aligned<T>,
    /// The number of each group's mask, groups × `WIDTH`.
    pub(super) chosen: Aligned<T>,
}

/// Groups that are solved one after the other between two products with H.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) groups: std::ops::Range<usize>,
    pub(super) start: usize,
    pub(super) end: usize,
    /// Where its columns of H begin in their packed form.
    pub(super) packed: usize,
}

/// A solution on its way down.
#[derive(Debug)]
pub struct Descent<'a, T: Real> {
    shape: (usize, usize),
    form: CowArray<'a, T, Ix2>,
    /// The columns of H, block by block, as the kernel reads them.
    packed: Aligned<T>,
    blocks: Vec<Block>,
    tables: &'a Tables<T>,
    parts: Vec<Part<T>>,
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
        let form = match form.is_standard_layout() {
            true => CowArray::from(form),
            false => CowArray::from(form.as_standard_layout().into_owned()),
        };
        let mut blocks: Vec<Block> = Vec::new();
        for (group, (first, size, ..)) in tables.groups().enumerate() {
            match blocks.last_mut() {
                Some(block) if first + size - block.start <= BLOCK => {
                    (block.end, block.groups.end) = (first + size, group + 1);
                }
                _ => blocks.push(Block { groups: group..group + 1, start: first, end: first + size, packed: 0 }),
            }
        }
        let packed = pack(form.view(), &mut blocks);
        let (m, n) = target.dim();
        let parts = (0..m).step_by(WIDTH).map(|first| Part::new(target, start, tables, first)).collect();
        Ok(Descent { shape: (m, n), form, packed, blocks, tables, parts })
    }

    /// One pass over all groups of all rows, masks and values; the error does not rise. 2mn² flops.
    pub fn sweep(&mut self) {
        self.pass(Choice::Masks);
    }

    /// The same where each stored entry of row i costs `prices[i]`: error plus price does not rise.
    /// Returns how many entries are stored now.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one price for each row.
    pub fn sweep_priced(&mut self, prices: &[T]) -> Result<usize> {
        if prices.len() != self.shape.0 {
            return Err(Error::shape(self.shape.0, prices.len()));
        }
        self.pass(Choice::Priced(prices));
        let stored = |part: &Part<T>| {
            let numbers = part.chosen.filled(part.chosen_len(self.tables)).chunks_exact(WIDTH);
            let each = self.tables.groups().zip(numbers).map(|((_, _, masks, _), numbers)| {
                numbers[..part.rows].iter().map(|number| masks.places[number.wide() as usize].len()).sum::<usize>()
            });
            each.sum::<usize>()
        };
        Ok(self.parts.iter().map(stored).sum())
    }

    /// One pass over all groups, masks as they are: the error does not rise.
    pub fn refit(&mut self) {
        self.pass(Choice::Values);
    }

    /// Keeps exactly the `count` entries of the whole matrix that are worth most by themselves, rows weighed
    /// against each other by `rows`: v²·H_jj for a stored entry, f²/H_jj with f = H·(Ŵ−W) for one that is not
    /// (it begins at zero). For a free pattern; [`refit`](Self::refit) afterwards. 2mn² flops.
    pub fn settle(&mut self, count: usize, rows: impl Fn(usize) -> f64 + Send + Sync) {
        let (form, packed, blocks, tables, arch) = (&self.form, &self.packed, &self.blocks, self.tables, Arch::new());
        let n = self.shape.1;
        let worth = each(&mut self.parts, |part| {
            let forces = arch.dispatch(Forces { n, packed, blocks, error: &part.error });
            let (coded, kept) = (part.coded.filled(n * WIDTH), part.kept(tables));
            Array2::from_shape_fn((part.rows, n), |(i, j)| {
                let (h, at) = (form[(j, j)].wide().max(f64::MIN_POSITIVE), j * WIDTH + i);
                let alone = if kept[at] { coded[at].wide().powi(2) * h } else { forces[at].wide().powi(2) / h };
                alone * rows(part.first + i)
            })
        });
        let worth: Vec<f64> = worth.into_iter().flatten().collect();
        let mut order: Vec<usize> = (0..worth.len()).collect();
        if count < order.len() {
            order.select_nth_unstable_by(count, |&a, &b| worth[b].total_cmp(&worth[a]).then(a.cmp(&b)));
        }
        let mut kept = Array2::default(self.shape);
        order.iter().take(count).for_each(|&at| kept[(at / n, at % n)] = true);
        for part in &mut self.parts {
            part.choose(kept.view(), tables);
            for (at, coded) in part.coded.numbers(n * WIDTH).iter_mut().enumerate() {
                let (i, j) = (part.first + at % WIDTH, at / WIDTH);
                *coded = if kept.get((i, j)).is_some_and(|&kept| kept) { *coded } else { T::zero() };
            }
            part.measure(n);
        }
    }

    /// The solution reached.
    pub fn solution(&self) -> Coded<T> {
        let n = self.shape.1;
        let (mut values, mut all) = (Array2::zeros(self.shape), Array2::default(self.shape));
        for part in &self.parts {
            let (coded, kept) = (part.coded.filled(n * WIDTH), part.kept(self.tables));
            for i in 0..part.rows {
                let coded = coded.iter().skip(i).step_by(WIDTH);
                values.row_mut(part.first + i).iter_mut().zip(coded).for_each(|(to, &from)| *to = from);
                let kept = kept.iter().skip(i).step_by(WIDTH);
                all.row_mut(part.first + i).iter_mut().zip(kept).for_each(|(to, &from)| *to = from);
            }
        }
        Coded { values, kept: all }
    }

    fn pass(&mut self, choice: Choice<'_, T>) {
        self.pass_by(Arch::new(), choice);
    }

    pub(super) fn pass_by(&mut self, arch: Arch, choice: Choice<'_, T>) {
        let (form, packed, blocks) = (self.form.view(), &self.packed, &self.blocks[..]);
        let groups: Vec<(usize, usize, &Masks, &[T])> = self.tables.groups().collect();
        let mut units: Vec<_> = self.parts.chunks_mut(TOGETHER).collect();
        each(&mut units, |parts| arch.dispatch(Pass { form, packed, blocks, groups: &groups, choice, parts }));
    }
}

impl<T: Real> Part<T> {
    fn new(target: ArrayView2<'_, T>, start: &Coded<T>, tables: &Tables<T>, first: usize) -> Self {
        let (m, n) = target.dim();
        let empty = Aligned::default;
        let mut part = Part {
            first,
            rows: WIDTH.min(m - first),
            target: empty(),
            coded: empty(),
            error: empty(),
            chosen: empty(),
        };
        for (to, from) in [(&mut part.target, target), (&mut part.coded, start.values.view())] {
            let from = from.slice_move(s![first..first + part.rows, ..]);
            let from = from.as_standard_layout();
            let lines: Vec<&[T]> = from.rows().into_iter().map(|row| row.to_slice().unwrap_or(&[])).collect();
            for (j, to) in to.numbers(n * WIDTH).chunks_exact_mut(WIDTH).enumerate() {
                to.iter_mut().zip(&lines).for_each(|(to, line)| *to = line[j]);
            }
        }
        part.choose(start.kept.view(), tables);
        part.measure(n);
        part
    }

    fn chosen_len(&self, tables: &Tables<T>) -> usize {
        tables.groups().len() * WIDTH
    }

    /// Takes over which entries are stored.
    fn choose(&mut self, kept: ArrayView2<'_, bool>, tables: &Tables<T>) {
        let count = self.chosen_len(tables);
        let all = self.chosen.numbers(count).chunks_exact_mut(WIDTH);
        let kept = kept.slice(s![self.first..self.first + self.rows, ..]);
        let kept = kept.as_standard_layout();
        let lines: Vec<&[bool]> = kept.rows().into_iter().map(|row| row.to_slice().unwrap_or(&[])).collect();
        for ((start, size, masks, _), to) in tables.groups().zip(all) {
            for (to, line) in to.iter_mut().zip(&lines) {
                let marks = line[start..start + size].iter().enumerate();
                let bits = marks.fold(0u8, |bits, (k, &kept)| bits | u8::from(kept) << k);
                *to = T::from_f64(masks.number(bits) as f64);
            }
        }
    }

    /// Which entries are stored, n × `WIDTH`.
    fn kept(&self, tables: &Tables<T>) -> Vec<bool> {
        let mut kept = vec![false; tables.columns() * WIDTH];
        let all = self.chosen.filled(self.chosen_len(tables)).chunks_exact(WIDTH);
        for ((start, _, masks, _), numbers) in tables.groups().zip(all) {
            for (i, number) in numbers.iter().enumerate() {
                masks.places[number.wide() as usize].iter().for_each(|k| kept[(start + k) * WIDTH + i] = true);
            }
        }
        kept
    }

    /// coded − target.
    fn measure(&mut self, n: usize) {
        let (coded, target) = (self.coded.filled(n * WIDTH), self.target.filled(n * WIDTH));
        let error = self.error.numbers(n * WIDTH).iter_mut();
        error.zip(coded).zip(target).for_each(|((error, &coded), &target)| *error = coded - target);
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
