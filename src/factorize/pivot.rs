//! Stable pivots of a basis: which of its columns determine the others with bounded coefficients.

use ndarray::{Array2, ArrayView2, Axis, s};

use crate::error::{Error, Result};
use crate::linalg::Backend;
use crate::operator::IndexSet;
use crate::scalar::Real;

/// Coefficients are kept at or below this by swapping pivots (strong rank-revealing QR, Gu and
/// Eisenstat, SIAM J. Sci. Comput. 17, 1996, with f = 2): it bounds what rounding them can cost.
const LARGEST: f64 = 2.0;

/// For a basis Q of r×len with independent rows, the pivots p (r columns) and the coefficients
/// T = Q[:,p]⁻¹·Q[:,rest], r×(len−r), both in ascending order of columns; |T| ≤ 2.
///
/// # Errors
/// [`Error::Numerical`] if the rows are dependent.
pub(super) fn interpolate<T: Real>(basis: ArrayView2<'_, T>, backend: &dyn Backend) -> Result<(IndexSet, Array2<T>)> {
    let (r, len) = basis.dim();
    if r == 0 {
        return Ok((IndexSet::new(len, Vec::new())?, Array2::zeros((0, len))));
    }
    let pivoted = T::kernels(backend).pivoted_r(basis);
    let (first, last) = (pivoted.r[(0, 0)].abs(), pivoted.r[(r - 1, r - 1)].abs());
    if last.is_nan() || last.wide() <= 1e-12 * first.wide() {
        return Err(Error::Numerical { kernel: "pivots", detail: format!("a basis of {r} rows has a lower rank") });
    }
    let mut order = pivoted.order;
    let mut t = pivoted.r.slice(s![.., r..]).to_owned();
    T::kernels(backend).solve_triangular(pivoted.r.slice(s![.., ..r]), true, &mut t);
    swap_large(&mut t, &mut order);

    let sorted = |slice: &[usize]| {
        let mut by: Vec<usize> = (0..slice.len()).collect();
        by.sort_by_key(|&i| slice[i]);
        by
    };
    let (rows, columns) = (sorted(&order[..r]), sorted(&order[r..]));
    let pivots = IndexSet::new(len, order[..r].iter().map(|&i| i as u32).collect())?;
    Ok((pivots, t.select(Axis(0), &rows).select(Axis(1), &columns)))
}

/// Exchanges pivots with the columns that have large coefficients; each exchange multiplies the
/// determinant of the pivot block by more than [`LARGEST`], so that it ends.
fn swap_large<T: Real>(t: &mut Array2<T>, order: &mut [usize]) {
    let (r, others) = t.dim();
    // Rounding cannot make it cycle: more exchanges than entries mean that something is not a number.
    for _ in 0..r * others {
        let worst = t.indexed_iter().max_by(|a, b| a.1.abs().wide().total_cmp(&b.1.abs().wide()));
        let Some(((i, j), &value)) = worst else { return };
        if value.is_nan() || value.abs().wide() <= LARGEST {
            return;
        }
        let (row, column) = (t.row(i).to_owned(), t.column(j).to_owned());
        for (k, &c) in column.iter().enumerate() {
            if k != i {
                t.row_mut(k).scaled_add(-c / value, &row);
                t[(k, j)] = -c / value;
            }
        }
        t.row_mut(i).mapv_inplace(|v| v / value);
        t[(i, j)] = T::one() / value;
        order.swap(i, r + j);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Faer;

    #[test]
    fn the_pivots_reproduce_the_basis_with_small_coefficients() {
        // A Kahan-like matrix, the classical trap of plain column pivoting.
        for (r, len) in [(1, 4), (5, 5), (12, 30), (30, 37)] {
            let basis = Array2::from_shape_fn((r, len), |(i, j)| {
                let (s, c): (f64, f64) = (0.9f64.powi(i as i32), 0.43);
                if i == j {
                    s
                } else if i < j {
                    -s * c + 1e-3 * ((i * 7 + j * 13) % 11) as f64
                } else {
                    0.0
                }
            });
            let (pivots, t) = interpolate(basis.view(), &Faer).unwrap();
            assert!(t.iter().all(|v: &f64| v.abs() <= LARGEST + 1e-9));
            let chosen: Vec<usize> = pivots.chosen().collect();
            let again = basis.select(Axis(1), &chosen).dot(&t);
            let rest = basis.select(Axis(1), &pivots.rest());
            assert!((&again - &rest).iter().all(|v| v.abs() < 1e-9), "{r}x{len}");
        }
    }

    #[test]
    fn exchanges_keep_the_relation() {
        // Deliberately bad pivots: the first two columns are nearly parallel.
        let basis = ndarray::array![[1.0, 1.0, 0.0, 3.0], [0.0, 1e-3, 1.0, -2.0]];
        let mut t: Array2<f64> = basis.slice(s![.., 2..]).to_owned();
        Faer_solve(&basis, &mut t);
        let mut order = vec![0, 1, 2, 3];
        swap_large(&mut t, &mut order);
        assert!(t.iter().all(|v| v.abs() <= LARGEST));
        let pivots = basis.select(Axis(1), &order[..2]);
        assert!((pivots.dot(&t) - basis.select(Axis(1), &order[2..])).iter().all(|v: &f64| v.abs() < 1e-9));
    }

    #[allow(non_snake_case)]
    fn Faer_solve(basis: &Array2<f64>, t: &mut Array2<f64>) {
        f64::kernels(&Faer).solve_triangular(basis.slice(s![.., ..2]), true, t);
    }

    #[test]
    fn dependent_rows_are_refused() {
        let basis = ndarray::array![[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]];
        assert!(matches!(interpolate(basis.view(), &Faer), Err(Error::Numerical { .. })));
    }
}
