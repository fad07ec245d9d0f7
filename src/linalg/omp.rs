//! Sparse coding over a dictionary: orthogonal matching pursuit of many signals at once (Batch-OMP).
//!
//! > find cᵢ with at most s non-zeros such that ‖xᵢ − cᵢ·D‖² is small, for each signal xᵢ
//!
//! Greedy: the atom that correlates most with what is left of a signal joins its support, and the signal is
//! projected on the support anew. With the Gram matrix D·Dᵀ of the atoms, nothing of a signal but its
//! correlations with the atoms is needed (Rubinstein, Zibulevsky and Elad, *Efficient implementation of the
//! K-SVD algorithm using batch orthogonal matching pursuit*, CS-2008-08). Here the chosen columns of the Gram
//! matrix are kept orthogonalised, F = (D·Dᵀ)[:, I]·L⁻ᵀ with L·Lᵀ = (D·Dᵀ)[I, I]: rows of F are rows of L, so
//! that a step is one pass over F and no triangular system is solved before the end.

use ndarray::{Array1, Array2, ArrayView2, Axis};
use pulp::Arch;
use rayon::prelude::*;

use super::{Faer, matmul_into};
use crate::error::{Error, Result};
use crate::scalar::{Real, check_finite};

mod pursuit;
#[cfg(test)]
mod tests;

use self::pursuit::Pursuit;

/// When the pursuit of a signal ends: at the first of the two.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stop {
    /// Most atoms for a signal.
    pub nonzeros: usize,
    /// Squared norm of what may be left of a signal.
    pub residual: f64,
}

impl Stop {
    /// At so many atoms.
    pub fn nonzeros(nonzeros: usize) -> Self {
        Stop { nonzeros, residual: 0.0 }
    }

    /// As soon as the squared norm of what is left is at most `residual`.
    pub fn residual(residual: f64) -> Self {
        Stop { nonzeros: usize::MAX, residual }
    }
}

/// What signals are made of: a few atoms each, with their coefficients.
#[derive(Debug, Clone, PartialEq)]
pub struct SparseCodes<T> {
    atoms: usize,
    /// Where each signal's entries begin, and their number at the end.
    offsets: Vec<usize>,
    indices: Vec<u32>,
    values: Vec<T>,
    residuals: Vec<f64>,
}

impl<T: Real> SparseCodes<T> {
    /// (signals, atoms).
    pub fn shape(&self) -> (usize, usize) {
        (self.residuals.len(), self.atoms)
    }

    /// Entries of all signals together.
    pub fn stored(&self) -> usize {
        self.values.len()
    }

    /// (atom, coefficient) of one signal, in the order in which they were chosen.
    ///
    /// # Panics
    /// If there is no such signal.
    pub fn signal(&self, i: usize) -> impl Iterator<Item = (usize, T)> + '_ {
        let range = self.offsets[i]..self.offsets[i + 1];
        self.indices[range.clone()].iter().map(|&atom| atom as usize).zip(self.values[range].iter().copied())
    }

    /// ‖x − c·D‖² of each signal, as the pursuit kept count of it.
    pub fn residuals(&self) -> &[f64] {
        &self.residuals
    }

    /// Signals × atoms, zero where an atom is not used.
    pub fn to_dense(&self) -> Array2<T> {
        let mut dense = Array2::zeros(self.shape());
        for (i, mut row) in dense.rows_mut().into_iter().enumerate() {
            self.signal(i).for_each(|(atom, value)| row[atom] = value);
        }
        dense
    }

    fn join(atoms: usize, parts: Vec<Self>) -> Self {
        let mut all =
            SparseCodes { atoms, offsets: vec![0], indices: Vec::new(), values: Vec::new(), residuals: Vec::new() };
        for part in parts {
            let start = all.values.len();
            all.offsets.extend(part.offsets.iter().skip(1).map(|end| start + end));
            all.indices.extend(part.indices);
            all.values.extend(part.values);
            all.residuals.extend(part.residuals);
        }
        all
    }
}

/// Vectors that are updated side by side: as many as hide the latency of a multiply-add.
const SIDE: usize = 4;
/// Signals whose correlations are computed together.
const BATCH: usize = 128;

/// A dictionary, ready to code any number of signals.
///
/// ```
/// use ndarray::array;
/// use weightpress::linalg::{SparseCoder, Stop};
///
/// let atoms = array![[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.6, 0.0, 0.8]]; // one a row, of any length
/// let coder = SparseCoder::new(atoms.view())?;
/// let codes = coder.encode(array![[3.0, 4.0, 0.0]].view(), Stop::nonzeros(2))?;
/// assert_eq!(codes.to_dense(), array![[3.0, 2.0, 0.0]]);
/// # Ok::<(), weightpress::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SparseCoder<T> {
    /// Atoms of unit length, k×d, if they are known.
    atoms: Option<Array2<T>>,
    /// Their Gram matrix, k × k padded to whole chunks.
    gram: Array2<T>,
    /// 1/length of each atom as it was given; 0 for a zero atom, which is never chosen.
    scales: Array1<T>,
}

impl<T: Real> SparseCoder<T> {
    /// For a dictionary of k atoms of length d, one a row. k²d flops.
    ///
    /// # Errors
    /// [`Error::NonFinite`].
    pub fn new(atoms: ArrayView2<'_, T>) -> Result<Self> {
        check_finite("atoms", atoms.iter())?;
        let scales: Array1<T> =
            atoms.rows().into_iter().map(|row| inverse(row.iter().map(|v| v.wide() * v.wide()).sum())).collect();
        let atoms = &atoms * &scales.view().insert_axis(Axis(1));
        let gram = padded(T::kernels(&Faer).gram(atoms.view()));
        Ok(SparseCoder { atoms: Some(atoms), gram, scales })
    }

    /// For atoms of which only the Gram matrix is known, k×k: to be used with
    /// [`encode_correlations`](Self::encode_correlations).
    ///
    /// # Errors
    /// [`Error::NonFinite`]; [`Error::Shape`] if it is not square.
    pub fn from_gram(gram: ArrayView2<'_, T>) -> Result<Self> {
        check_finite("Gram matrix of the atoms", gram.iter())?;
        if gram.nrows() != gram.ncols() {
            return Err(Error::shape("a square Gram matrix", gram.dim()));
        }
        let scales: Array1<T> = gram.diag().iter().map(|v| inverse(v.wide())).collect();
        let scaled = &gram * &scales.view().insert_axis(Axis(1)) * &scales;
        Ok(SparseCoder { atoms: None, gram: padded(scaled), scales })
    }

    /// k.
    pub fn atoms(&self) -> usize {
        self.scales.len()
    }

    /// Codes signals, N×d, one a row. Each signal costs 2kd flops for the correlations and ks² for s atoms.
    /// The pursuit of a signal also ends where nothing is left of it, or where the next atom is a combination
    /// of those it has. Runs on the global pool unless called on a rayon worker; the result depends on
    /// neither the number of threads nor the other signals.
    ///
    /// # Errors
    /// [`Error::Shape`] if signals and atoms have different lengths; [`Error::NonFinite`];
    /// [`Error::Unsupported`] for a coder that knows no atoms.
    pub fn encode(&self, signals: ArrayView2<'_, T>, stop: Stop) -> Result<SparseCodes<T>> {
        let Some(atoms) = &self.atoms else {
            return Err(Error::Unsupported("a coder made from a Gram matrix codes correlations, not signals".into()));
        };
        if signals.ncols() != atoms.ncols() {
            return Err(Error::shape(format!("signals of length {}", atoms.ncols()), signals.dim()));
        }
        check_finite("signals", signals.iter())?;
        // More atoms than dimensions are never independent.
        let stop = Stop { nonzeros: stop.nonzeros.min(atoms.ncols()), ..stop };
        Ok(self.batches(signals, |batch| {
            let mut correlations = Array2::zeros((batch.nrows(), self.gram.ncols()));
            let known = correlations.slice_mut(ndarray::s![.., ..self.atoms()]);
            matmul_into(T::one(), batch, atoms.t(), T::zero(), known);
            let energy = |row: ndarray::ArrayView1<'_, T>| row.iter().map(|v| v.wide() * v.wide()).sum();
            self.pursue(correlations, batch.rows().into_iter().map(energy).collect(), stop)
        }))
    }

    /// The same from what is needed of the signals: their correlations with the atoms, X·Dᵀ (N×k), and their
    /// squared norms (N), which only the error-driven stop and the residuals depend on.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`].
    pub fn encode_correlations(
        &self,
        correlations: ArrayView2<'_, T>,
        energies: &[f64],
        stop: Stop,
    ) -> Result<SparseCodes<T>> {
        if correlations.dim() != (energies.len(), self.atoms()) {
            return Err(Error::shape((energies.len(), self.atoms()), correlations.dim()));
        }
        check_finite("correlations", correlations.iter())?;
        if let Some(&energy) = energies.iter().find(|energy| !energy.is_finite() || **energy < 0.0) {
            return Err(Error::shape("squared norms of signals", energy));
        }
        let numbered = Array2::from_shape_fn((energies.len(), 1), |(i, _)| i);
        Ok(self.batches(numbered.view(), |batch| {
            let rows: Vec<usize> = batch.iter().copied().collect();
            let mut padded = Array2::zeros((rows.len(), self.gram.ncols()));
            for (mut to, &i) in padded.rows_mut().into_iter().zip(&rows) {
                to.iter_mut().zip(correlations.row(i)).zip(&self.scales).for_each(|((to, &c), &scale)| *to = c * scale);
            }
            self.pursue(padded, rows.iter().map(|&i| energies[i]).collect(), stop)
        }))
    }

    /// Batches of rows, in parallel unless on a worker, put together in order.
    fn batches<A: Sync>(
        &self,
        rows: ArrayView2<'_, A>,
        code: impl Fn(ArrayView2<'_, A>) -> SparseCodes<T> + Sync + Send,
    ) -> SparseCodes<T> {
        let batches: Vec<_> = rows.axis_chunks_iter(Axis(0), BATCH).collect();
        let parts = match rayon::current_thread_index() {
            Some(_) => batches.into_iter().map(code).collect(),
            None => batches.into_par_iter().map(code).collect(),
        };
        SparseCodes::join(self.atoms(), parts)
    }

    fn pursue(&self, correlations: Array2<T>, energies: Vec<f64>, stop: Stop) -> SparseCodes<T> {
        Arch::new().dispatch(Pursuit { coder: self, correlations, energies, stop })
    }
}

/// 1/√x, or 0.
fn inverse<T: Real>(square: f64) -> T {
    if square > 0.0 { T::from_f64(1.0 / square.sqrt()) } else { T::zero() }
}

/// Columns of zeros up to whole chunks of the widest vectors.
fn padded<T: Real>(gram: Array2<T>) -> Array2<T> {
    let k = gram.nrows();
    let mut wide = Array2::zeros((k, k.next_multiple_of(SIDE * crate::simd::LANES)));
    wide.slice_mut(ndarray::s![.., ..k]).assign(&gram);
    wide
}
