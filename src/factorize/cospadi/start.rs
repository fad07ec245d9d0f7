//! From a budget to a model: how many atoms, a first dictionary, and the solver.

use rand_chacha::rand_core::{Rng, SeedableRng};

use super::*;
use crate::coder::Coded;
use crate::factorize::pivot::interpolate;
use crate::factorize::svd::{Joint, Spectrum, Svd, spectrum};

/// Where between full codes and the most atoms a search looks first, and how far from the best of these then.
const LOOK: [f64; 3] = [0.3, 0.65, 0.95];
const CLOSER: f64 = 0.15;
/// Rounds of a candidate.
const TRIAL: usize = 3;

/// Squared singular values below this fraction of the first are rounding.
const SEEN: f64 = 1e-10;

/// What all candidates have in common.
struct Start<'a, T: Real> {
    signals: Signals<'a, T>,
    joint: Joint<'a, T>,
    found: Spectrum<T>,
    /// The signals in the plain norm, where they are needed.
    whitened: Option<Array2<T>>,
    seed: u64,
}

impl Cospadi {
    /// The best model within the limit.
    pub(super) fn solve<T: Real>(&self, group: &[Problem<'_, T>], sizes: &Sizes) -> Result<Model<T>> {
        let signals = Signals::new(group)?;
        let svd = Svd { share: (group.len() > 1).then_some(super::super::Share::Input), ..Svd::default() };
        let joint = Joint::new(&svd, group)?;
        let found = spectrum(&joint, signals.backend)?;
        let whitened = (self.form == Form::Factors).then(|| signals.whitened()).transpose()?;
        let start = Start { signals, joint, found, whitened, seed: group[0].seed };
        let least = || Error::shape("a budget for at least one atom", 0);
        let (first, mut last) = sizes.range().ok_or_else(least)?;
        // Free atoms are directions of the signals: of no use where the metric sees nothing.
        let floor =
            if self.form == Form::Factors { SEEN * start.found.values.first().copied().unwrap_or(0.0) } else { -1.0 };
        let rank = start.found.values.iter().take_while(|v| **v > floor).count();
        if rank == 0 {
            return Ok(start.nothing(self.form, self.pattern.is_some()));
        }
        last = last.min(rank);
        let first = first.min(last);
        if self.pattern.is_some() || first == last {
            return self.at(&start, sizes, last, self.rounds());
        }
        if let Some(ratio) = self.ratio {
            let k = sizes.at_ratio(ratio).ok_or_else(least)?.min(last);
            return self.at(&start, sizes, k, self.rounds());
        }
        let place = |f: f64| first + (f.clamp(0.0, 1.0) * (last - first) as f64).round() as usize;
        let mut tried: Vec<(usize, Model<T>)> = Vec::new();
        let attempt = |k: usize, tried: &mut Vec<(usize, Model<T>)>| -> Result<()> {
            if tried.iter().all(|(other, _)| *other != k) {
                tried.push((k, self.at(&start, sizes, k, self.rounds().min(TRIAL))?));
                tried.sort_by(|a, b| a.1.error.total_cmp(&b.1.error).then(a.0.cmp(&b.0)));
                tried.truncate(2);
            }
            Ok(())
        };
        attempt(first, &mut tried)?;
        for f in LOOK {
            attempt(place(f), &mut tried)?;
        }
        let best = (tried[0].0 - first) as f64 / (last - first) as f64;
        for f in [best - CLOSER, best + CLOSER] {
            attempt(place(f), &mut tried)?;
        }
        let (k, model) = tried.swap_remove(0);
        let Some(entries) = sizes.entries(k).filter(|entries| *entries != Entries::All) else { return Ok(model) };
        start.signals.refine(model, entries, self.rounds().saturating_sub(TRIAL), self.sweeps())
    }

    /// The model of k atoms.
    fn at<T: Real>(&self, start: &Start<'_, T>, sizes: &Sizes, k: usize, rounds: usize) -> Result<Model<T>> {
        let entries = sizes.entries(k).ok_or_else(|| Error::shape("a number of atoms within the budget", k))?;
        let signals = &start.signals;
        let mut model = match (self.form, self.init) {
            (Form::Pivot, _) => {
                let mut model = start.pivots(k, self.init)?;
                signals.fit_codes(&mut model, entries, 2 * self.sweeps())?;
                model
            }
            (Form::Factors, _) => self.factors(start, k, entries)?,
        };
        signals.fit_atoms(&mut model)?;
        match (entries, rounds) {
            (Entries::All, _) | (_, 0) => signals.measure(&mut model),
            _ => {
                signals.fit_codes(&mut model, entries, self.sweeps())?;
                model = signals.refine(model, entries, rounds - 1, self.sweeps())?;
            }
        }
        Ok(model)
    }

    /// Codes over k free atoms, by the solver; the dictionary is left to the next step.
    fn factors<T: Real>(&self, start: &Start<'_, T>, k: usize, entries: Entries) -> Result<Model<T>> {
        let Some(y) = start.whitened.as_ref().map(|y| y.view()) else {
            return Err(Error::shape("signals in the plain norm", 0));
        };
        let (m, n) = y.dim();
        let backend = start.signals.backend;
        let kernels = T::kernels(backend);
        let mut atoms = match self.init {
            Init::Svd => {
                let scale = |v: &f64| T::from_f64(1.0 / v.sqrt());
                let scales: ndarray::Array1<T> = start.found.values[..k].iter().map(scale).collect();
                let directions = kernels.matmul(y.t(), start.found.vectors.slice(s![.., ..k]));
                kernels.orthonormalize((directions * &scales).view())
            }
            Init::Rows => {
                let rows = y.select(Axis(0), &start.drawn(m, k)).reversed_axes();
                if self.solver == Coding::Ksvd { rows } else { kernels.orthonormalize(rows.view()) }
            }
        };
        if self.pattern.is_some() {
            atoms = atoms.select(Axis(1), &dealt(k, self.pattern.map_or(1, |[_, m]| m)));
        }
        let mut codes = match self.solver {
            Coding::Ksvd => {
                let nonzeros = match entries {
                    Entries::Free(count) => count / m.max(1),
                    _ => k,
                };
                ksvd::ksvd(y, atoms.reversed_axes(), nonzeros, self.iterations.unwrap_or(8))?
            }
            Coding::Alternating => orthonormal::alternate(y, atoms, entries, self.iterations.unwrap_or(20), backend)?,
            Coding::OneShot => orthonormal::alternate(y, atoms, entries, 0, backend)?,
        };
        let inverse = |b: &f64| if *b > 0.0 { T::from_f64(1.0 / b.sqrt()) } else { T::zero() };
        codes.values *= &start.signals.rows.map(inverse).insert_axis(Axis(1));
        Ok(Model::new(Array2::zeros((k, n)), codes, None))
    }
}

/// Atoms by falling energy, dealt to groups of m like cards, back and forth, so that groups are worth alike.
fn dealt(k: usize, m: usize) -> Vec<usize> {
    let groups = k.div_ceil(m.max(1)).max(1);
    let place = |t: usize| {
        let (round, at) = (t / groups, t % groups);
        if round % 2 == 0 { at } else { groups - 1 - at }
    };
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by_key(|&t| (place(t), t));
    order
}

impl<T: Real> Start<'_, T> {
    /// k of m rows, drawn without putting back.
    fn drawn(&self, m: usize, k: usize) -> Vec<usize> {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(self.seed);
        let mut rows: Vec<usize> = (0..m).collect();
        for i in 0..k.min(m) {
            let j = i + (random.next_u64() % (m - i) as u64) as usize;
            rows.swap(i, j);
        }
        rows.truncate(k);
        rows.sort_unstable();
        rows
    }

    /// k rows as atoms: of the projection on the leading singular vectors, where these determine the others
    /// best; or any.
    fn pivots(&self, k: usize, init: Init) -> Result<Model<T>> {
        let kernels = T::kernels(self.signals.backend);
        let m = self.signals.weight.nrows();
        let codes = Coded { values: Array2::zeros((m, k)), kept: Array2::default((m, k)) };
        let (atoms, pivots) = match init {
            Init::Svd => {
                let u = self.found.vectors.slice(s![.., ..k]);
                let right = kernels.matmul(u.t(), self.joint.weight().view());
                let mut left = u.to_owned();
                let mut basis = left.clone();
                if let Some(d) = &self.joint.scale {
                    left /= &d.mapv(|d| T::from_f64(d)).insert_axis(Axis(1));
                    basis = kernels.orthonormalize(left.view());
                }
                let (pivots, _) = interpolate(basis.t(), self.signals.backend)?;
                let chosen: Vec<usize> = pivots.chosen().collect();
                (kernels.matmul(left.select(Axis(0), &chosen).view(), right.view()), pivots)
            }
            Init::Rows => {
                let drawn = self.drawn(m, k);
                let atoms = self.signals.weight.select(Axis(0), &drawn);
                (atoms, crate::operator::IndexSet::new(m, drawn.iter().map(|&i| i as u32).collect())?)
            }
        };
        Ok(Model::new(atoms.mapv(|v| v.wide()), codes, Some(pivots)).with_units())
    }

    /// The model of a weight that the metric does not see: one atom of zeros.
    fn nothing(&self, form: Form, pattern: bool) -> Model<T> {
        let (m, n) = self.signals.weight.dim();
        // Of less than a whole group of atoms a pattern keeps all.
        let codes = Coded { values: Array2::zeros((m, 1)), kept: Array2::from_elem((m, 1), pattern) };
        let pivots = (form == Form::Pivot).then(|| crate::operator::IndexSet::new(m, vec![0]).ok()).flatten();
        Model { error: 0.0, ..Model::new(Array2::zeros((1, n)), codes, pivots).with_units() }
    }
}
