//! The pursuit itself, one signal at a time, vectors along the atoms.

use ndarray::{Array1, Array2};
use pulp::{Simd, WithSimd, bytemuck};

use super::{SIDE, SparseCoder, SparseCodes, Stop};
use crate::scalar::Real;
use crate::simd::Aligned;

/// The signals of a batch, one after the other.
pub(super) struct Pursuit<'a, T> {
    pub(super) coder: &'a SparseCoder<T>,
    pub(super) correlations: Array2<T>,
    pub(super) energies: Vec<f64>,
    pub(super) stop: Stop,
}

impl<T: Real> WithSimd for Pursuit<'_, T> {
    type Output = SparseCodes<T>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, s: S) -> SparseCodes<T> {
        let (k, width) = (self.coder.atoms(), self.coder.gram.ncols());
        let most = self.stop.nonzeros.min(k);
        let mut codes = SparseCodes::join(k, Vec::new());
        // F, chunk by chunk of atoms and in each column by column; then the correlations.
        let mut memory = Aligned::default();
        let mut support = Support::default();
        for (mut row, &energy) in self.correlations.rows_mut().into_iter().zip(&self.energies) {
            let Some(row) = row.as_slice_mut() else { continue };
            let (basis, correlations) = memory.numbers(width * (most + 1)).split_at_mut(width * most);
            correlations.copy_from_slice(row);
            let (basis, _) = T::vectors_mut::<S>(basis);
            let (correlations, _) = T::vectors_mut::<S>(correlations);
            let residual =
                one(s, self.coder, basis, correlations, energy, Stop { nonzeros: most, ..self.stop }, &mut support);
            codes.residuals.push(residual);
            support.finish(&self.coder.scales, &mut codes);
        }
        codes
    }
}

/// The atoms of the signal at hand.
#[derive(Debug, Default)]
struct Support<T> {
    chosen: Vec<usize>,
    /// L by rows, the diagonal inverted.
    lower: Vec<T>,
    /// L⁻¹·correlations.
    projections: Vec<T>,
}

impl<T: Real> Support<T> {
    /// Solves Lᵀ·c = projections, and adds the signal to the codes.
    fn finish(&self, scales: &Array1<T>, codes: &mut SparseCodes<T>) {
        let (start, t) = (codes.values.len(), self.chosen.len());
        codes.values.extend_from_slice(&self.projections);
        let values = &mut codes.values[start..];
        for i in (0..t).rev() {
            let row = &self.lower[i * (i + 1) / 2..][..=i];
            let value = values[i] * row[i];
            values[..i].iter_mut().zip(row).for_each(|(above, &l)| *above -= l * value);
            values[i] = value;
        }
        values.iter_mut().zip(&self.chosen).for_each(|(value, &atom)| *value *= scales[atom]);
        codes.indices.extend(self.chosen.iter().map(|&atom| atom as u32));
        codes.offsets.push(codes.values.len());
    }
}

/// The pursuit of one signal; returns what is left of its energy.
#[inline(always)]
fn one<S: Simd, T: Real>(
    s: S,
    coder: &SparseCoder<T>,
    basis: &mut [T::V<S>],
    correlations: &mut [T::V<S>],
    energy: f64,
    stop: Stop,
    support: &mut Support<T>,
) -> f64 {
    let Support { chosen, lower, projections } = support;
    chosen.clear();
    lower.clear();
    projections.clear();
    let chunk = SIDE * T::lanes::<S>();
    // What is below rounding is zero: of a signal, and of the part of an atom outside the span of the others.
    let nothing = 4.0 * T::epsilon().wide() * energy.sqrt();
    let dependent = 16.0 * T::epsilon().wide();
    let mut left = energy;
    for t in 0..stop.nonzeros {
        if left <= stop.residual {
            break;
        }
        let (atom, correlation) = largest::<S, T>(s, correlations);
        if correlation.wide().abs() <= nothing || chosen.contains(&atom) {
            break;
        }
        let start = lower.len();
        let lanes: &[T] = bytemuck::cast_slice(basis);
        let at = atom / chunk * chunk * stop.nonzeros + atom % chunk;
        lower.extend((0..t).map(|j| lanes[at + j * chunk]));
        let outside = 1.0 - lower[start..].iter().map(|w| w.wide() * w.wide()).sum::<f64>();
        if outside <= dependent {
            break;
        }
        let scale = T::from_f64(1.0 / outside.sqrt());
        let projection = correlation * scale;
        let Some(gram) = coder.gram.row(atom).to_slice() else { break };
        let step = Step { known: &lower[start..], scale, projection, room: stop.nonzeros };
        step.take(s, T::vectors::<S>(gram).0, basis, correlations);
        lower.push(scale);
        chosen.push(atom);
        projections.push(projection);
        bytemuck::cast_slice_mut::<_, T>(correlations)[atom] = T::zero();
        left = (left - projection.wide() * projection.wide()).max(0.0);
    }
    left
}

/// The entry of largest absolute value, the first of them in each lane.
#[inline(always)]
fn largest<S: Simd, T: Real>(s: S, correlations: &[T::V<S>]) -> (usize, T) {
    // Places as numbers of the same vectors: whole up to 2²⁴ of them.
    let (mut best, mut place) = (T::splat(s, -T::one()), T::splat(s, T::zero()));
    let (mut at, one) = (T::splat(s, T::zero()), T::splat(s, T::one()));
    for &c in correlations {
        let c = T::vabs(s, c);
        place = T::if_less(s, best, c, at, place);
        best = T::vmax(s, best, c);
        at = T::vadd(s, at, one);
    }
    let (best, place) = ([best], [place]);
    let (best, place): (&[T], &[T]) = (bytemuck::cast_slice(&best), bytemuck::cast_slice(&place));
    let lanes = best.len();
    let number = |lane: usize| place[lane].wide() as usize * lanes + lane;
    let first = (0..lanes).reduce(|a, b| match best[a].partial_cmp(&best[b]) {
        Some(std::cmp::Ordering::Less) => b,
        Some(std::cmp::Ordering::Equal) if number(b) < number(a) => b,
        _ => a,
    });
    let atom = number(first.unwrap_or(0));
    (atom, bytemuck::cast_slice::<_, T>(correlations).get(atom).copied().unwrap_or_else(T::zero))
}

/// f = (Gram column − F·w)·scale joins F; correlations lose f·projection.
struct Step<'a, T> {
    /// w: the new atom's row of F.
    known: &'a [T],
    scale: T,
    projection: T,
    /// Columns that F has room for.
    room: usize,
}

impl<T: Real> Step<'_, T> {
    #[inline(always)]
    fn take<S: Simd>(&self, s: S, gram: &[T::V<S>], basis: &mut [T::V<S>], correlations: &mut [T::V<S>]) {
        let (scale, projection) = (T::splat(s, self.scale), T::splat(s, self.projection));
        let (gram, correlations) = (gram.as_chunks::<SIDE>().0, correlations.as_chunks_mut::<SIDE>().0);
        let (columns, _) = basis.as_chunks_mut::<SIDE>();
        for ((&gram, c), columns) in gram.iter().zip(correlations).zip(columns.chunks_exact_mut(self.room)) {
            let [mut a, mut b, mut d, mut e] = gram;
            for (&[fa, fb, fd, fe], &w) in columns.iter().zip(self.known) {
                let w = T::splat(s, w);
                a = T::fnma(s, fa, w, a);
                b = T::fnma(s, fb, w, b);
                d = T::fnma(s, fd, w, d);
                e = T::fnma(s, fe, w, e);
            }
            let new = [T::vmul(s, a, scale), T::vmul(s, b, scale), T::vmul(s, d, scale), T::vmul(s, e, scale)];
            columns[self.known.len()] = new;
            c.iter_mut().zip(new).for_each(|(c, new)| *c = T::fnma(s, new, projection, *c));
        }
    }
}
