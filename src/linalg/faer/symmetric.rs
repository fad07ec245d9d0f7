//! The symmetric eigenproblem in faer's steps, with memory given back between them: at its highest 3½ matrices,
//! the given one among them, where the whole call takes 6.

use ::faer::dyn_stack::{MemBuffer, MemStack};
use ::faer::linalg::{evd, householder, qr};
use ::faer::prelude::*;
use ::faer::traits::RealField;
use ::faer::{Conj, diag::Diag};
use ndarray::{Array1, Array2};

use super::super::Eigh;
use super::{par, square};
use crate::error::{Error, Result};
use crate::scalar::Real;

/// Rows and columns that are exchanged together.
const TILE: usize = 32;

/// A = Q·T·Qᵀ, T = U·Λ·Uᵀ by divide and conquer, V = Q·U.
pub(super) fn eigh<T: Real + RealField>(a: Array2<T>) -> Result<Eigh<T>> {
    let (n, columns) = a.dim();
    let mut a = storage(a);
    square("eigh", MatRef::from_row_major_slice(&a, n, columns))?;
    if n == 0 {
        return Ok(Eigh { values: Array1::zeros(0), vectors: Array2::zeros((0, 0)) });
    }
    transpose(&mut a, n);
    let block = qr::no_pivoting::factor::recommended_block_size::<T>(n, n);
    let mut coefficients = Mat::<T>::zeros(block, n - 1);
    let (diagonal, below) = {
        let mut a = MatMut::from_column_major_slice_mut(&mut a, n, n);
        let mut memory = MemBuffer::new(evd::tridiag::tridiag_in_place_scratch::<T>(n, par(), default()));
        evd::tridiag::tridiag_in_place(a.rb_mut(), coefficients.as_mut(), par(), MemStack::new(&mut memory), default());
        let diagonal: Vec<T> = (0..n).map(|i| a[(i, i)]).collect();
        // faer's own call leaves the last one zero.
        let below: Vec<T> = (0..n).map(|i| if i + 1 < n { a[(i + 1, i)] } else { T::from_f64(0.0) }).collect();
        (diagonal, below)
    };
    pack(&mut a, n);

    let (mut vectors, mut values) = (vec![T::from_f64(0.0); n * n], Diag::<T>::zeros(n));
    let mut u = MatMut::from_column_major_slice_mut(&mut vectors, n, n);
    let (diagonal, below) = (ColRef::from_slice(&diagonal).as_diagonal(), ColRef::from_slice(&below).as_diagonal());
    {
        // More than it needs, of which what is not touched costs nothing.
        let scratch = evd::self_adjoint_evd_scratch::<T>(n, evd::ComputeEigenvectors::Yes, par(), default());
        let mut memory = MemBuffer::new(scratch);
        let stack = MemStack::new(&mut memory);
        evd::tridiagonal_self_adjoint_evd(diagonal, below, values.as_mut(), Some(u.rb_mut()), par(), stack, default())
            .map_err(|e| Error::Numerical { kernel: "eigh", detail: format!("{e:?} on {n}x{n}") })?;
    }
    apply(a, coefficients.as_ref(), u);

    // faer sorts ascending and stores columns; we want the largest first, in rows.
    for j in 0..n / 2 {
        let (left, right) = vectors.split_at_mut((n - 1 - j) * n);
        left[j * n..(j + 1) * n].swap_with_slice(&mut right[..n]);
    }
    transpose(&mut vectors, n);
    let values = values.column_vector();
    Ok(Eigh {
        values: Array1::from_shape_fn(n, |i| values[n - 1 - i]),
        vectors: Array2::from_shape_vec((n, n), vectors).map_err(|e| Error::shape("n×n vectors", e.to_string()))?,
    })
}

/// The numbers by rows, without a copy where they lie so.
fn storage<T: Real>(a: Array2<T>) -> Vec<T> {
    let length = a.len();
    if !a.is_standard_layout() {
        return a.iter().copied().collect();
    }
    let (mut all, offset) = a.into_raw_vec_and_offset();
    all.drain(..offset.unwrap_or(0));
    all.truncate(length);
    all
}

/// Keeps what lies below the subdiagonal, column by column, and gives the rest of the memory back.
fn pack<T: Copy>(a: &mut Vec<T>, n: usize) {
    let mut length = 0;
    for j in 0..n.saturating_sub(2) {
        a.copy_within(j * n + j + 2..(j + 1) * n, length);
        length += n - j - 2;
    }
    a.truncate(length);
    a.shrink_to_fit();
}

/// U ← Q·U for the reflectors of Q, [packed](pack).
fn apply<T: Real + RealField>(reflectors: Vec<T>, coefficients: MatRef<'_, T>, u: MatMut<'_, T>) {
    let n = u.nrows();
    let mut below = Mat::<T>::zeros(n - 1, n - 1);
    let mut rest = reflectors.as_slice();
    for j in 0..n - 1 {
        let (column, others) = rest.split_at(n.saturating_sub(j + 2));
        column.iter().enumerate().for_each(|(i, &v)| below[(j + 1 + i, j)] = v);
        rest = others;
    }
    drop(reflectors);
    let scratch =
        householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<T>(n - 1, coefficients.nrows(), n);
    householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
        below.as_ref(),
        coefficients,
        Conj::No,
        u.subrows_mut(1, n - 1),
        par(),
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
}

/// A square matrix turned over in its place, by tiles that fit the cache.
fn transpose<T: Copy>(a: &mut [T], n: usize) {
    for rows in (0..n).step_by(TILE) {
        for columns in (rows..n).step_by(TILE) {
            for i in rows..n.min(rows + TILE) {
                for j in columns.max(i + 1)..n.min(columns + TILE) {
                    a.swap(i * n + j, j * n + i);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;

    #[test]
    fn a_matrix_turned_over_twice_is_itself() {
        for n in [0, 1, 31, 32, 33, 70] {
            let a: Vec<usize> = (0..n * n).collect();
            let mut b = a.clone();
            transpose(&mut b, n);
            assert!((0..n * n).all(|at| b[at] == (at % n) * n + at / n), "{n}");
            transpose(&mut b, n);
            assert_eq!(a, b);
        }
    }

    #[test]
    fn the_lower_triangle_counts_in_any_storage() {
        let below = |i: usize, j: usize| ((i * 37 + j * 11) % 17) as f64 - 8.0;
        for n in [1, 2, 3, 31, 150] {
            let whole = Array2::from_shape_fn((n, n), |(i, j)| below(i.max(j), i.min(j)));
            // Two rows are cut off, and what lies above the diagonal must not be read.
            let given = |(i, j): (usize, usize)| if i >= j + 2 { below(i - 2, j) } else { f64::NAN };
            let by_rows = Array2::from_shape_fn((n + 2, n), given).slice_move(s![2.., ..]);
            let by_columns = by_rows.t().as_standard_layout().into_owned().reversed_axes();
            assert!(by_rows.is_standard_layout() && (n == 1 || !by_columns.is_standard_layout()));
            let (first, second) = (eigh(by_rows).unwrap(), eigh(by_columns).unwrap());
            assert_eq!(first.values, second.values, "{n}");
            let again = (&first.vectors * &first.values).dot(&first.vectors.t());
            assert!((&again - &whole).iter().all(|v| v.abs() < 1e-11), "{n}");
        }
    }
}
