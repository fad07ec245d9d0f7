//! Values for masks that are settled: conjugate gradients on all rows at once.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, Zip};
use rayon::prelude::*;

use super::{Coded, STRIP, check};
use crate::error::Result;
use crate::linalg::matmul_into;
use crate::scalar::Real;

/// Steps towards the least-squares values of the entries that are kept, for each row by itself: the error
/// tr((Ŵ−W)·H·(Ŵ−W)ᵀ) does not rise but by rounding. As many steps as a row has entries give the minimum; a
/// few go a long way, and each is one matrix product of 2mn² flops, several times as fast as a sweep.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if shapes do not fit.
pub fn conjugate<T: Real>(
    target: ArrayView2<'_, T>,
    form: ArrayView2<'_, T>,
    coded: &mut Coded<T>,
    steps: usize,
) -> Result<()> {
    check(target, form.dim(), Some(coded))?;
    let values = coded.values.axis_chunks_iter_mut(Axis(0), STRIP);
    let strips = values.zip(coded.kept.axis_chunks_iter(Axis(0), STRIP)).zip(target.axis_chunks_iter(Axis(0), STRIP));
    let strips: Vec<_> = strips.collect();
    let run = |((values, kept), target)| strip(target, form, values, kept, steps);
    match rayon::current_thread_index() {
        Some(_) => strips.into_iter().for_each(run),
        None => strips.into_par_iter().for_each(run),
    }
    Ok(())
}

fn strip<T: Real>(
    target: ArrayView2<'_, T>,
    form: ArrayView2<'_, T>,
    mut values: ArrayViewMut2<'_, T>,
    kept: ArrayView2<'_, bool>,
    steps: usize,
) {
    let inverse: Vec<T> = form.diag().iter().map(|&h| if h > T::zero() { T::one() / h } else { T::zero() }).collect();
    let inverse = ndarray::Array1::from(inverse);
    let mut image = Array2::zeros(values.dim());
    // What is left of the gradient where entries are kept.
    let error = &target - &values;
    matmul_into(T::one(), error.view(), form, T::zero(), image.view_mut());
    let masked = |a: &mut Array2<T>| Zip::from(a).and(kept).for_each(|a, &kept| *a = if kept { *a } else { T::zero() });
    masked(&mut image);
    let mut rest = image.clone();
    let mut direction = &rest * &inverse;
    let dot = |a: ndarray::ArrayView1<'_, T>, b: ndarray::ArrayView1<'_, T>| -> f64 {
        a.iter().zip(b).map(|(a, b)| a.wide() * b.wide()).sum()
    };
    let mut along: Vec<f64> = rest.rows().into_iter().zip(direction.rows()).map(|(r, p)| dot(r, p)).collect();
    for _ in 0..steps {
        matmul_into(T::one(), direction.view(), form, T::zero(), image.view_mut());
        let rows = values.rows_mut().into_iter().zip(rest.rows_mut()).zip(direction.rows_mut()).zip(image.rows());
        for ((((mut value, mut rest), mut p), image), (kept, along)) in
            rows.zip(kept.rows().into_iter().zip(&mut along))
        {
            let curvature = dot(p.view(), image);
            if curvature.is_nan() || curvature <= 0.0 || *along <= 0.0 {
                continue;
            }
            let step = T::from_f64(*along / curvature);
            value.scaled_add(step, &p);
            Zip::from(&mut rest).and(image).and(kept).for_each(|rest, &image, &kept| {
                *rest = if kept { *rest - step * image } else { T::zero() };
            });
            let after: f64 = rest.iter().zip(&inverse).map(|(r, h)| r.wide() * r.wide() * h.wide()).sum();
            let turn = T::from_f64(after / *along);
            Zip::from(&mut p).and(&rest).and(&inverse).for_each(|p, &rest, &h| *p = rest * h + turn * *p);
            *along = after;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::{Faer, Kernels};
    use crate::testing::numbers;

    #[test]
    fn reaches_least_squares_on_the_support_and_never_loses() {
        let (m, n) = (270, 12);
        let target = numbers(m, n, 31);
        let x = numbers(n, 2 * n, 104_729);
        let mut form = x.dot(&x.t());
        // A dead input: its entries stay what they are.
        form.row_mut(4).fill(0.0);
        form.column_mut(4).fill(0.0);
        let kept = Array2::from_shape_fn((m, n), |(i, j)| (i * 3 + j * 5) % 7 < 3);
        let start = Coded { values: Array2::zeros((m, n)), kept: kept.clone() };
        let error = |values: &Array2<f64>| {
            let delta = values - &target;
            (delta.dot(&form) * &delta).sum()
        };
        let mut last = f64::INFINITY;
        for steps in 0..=8 {
            let mut coded = start.clone();
            conjugate(target.view(), form.view(), &mut coded, steps).unwrap();
            let now = error(&coded.values);
            assert!(now <= last * (1.0 + 1e-12), "{now} after {last}");
            assert!(coded.values.indexed_iter().all(|(at, v)| kept[at] || *v == 0.0));
            last = now;
        }
        let mut exact = Array2::<f64>::zeros((m, n));
        for i in 0..m {
            let support: Vec<usize> = (0..n).filter(|&j| kept[(i, j)] && j != 4).collect();
            let part = form.select(Axis(0), &support).select(Axis(1), &support);
            let right = form.select(Axis(0), &support).dot(&target.row(i)).insert_axis(Axis(1));
            let solved = Kernels::<f64>::solve_spd(&Faer, part.view(), right).unwrap();
            support.iter().zip(solved.column(0)).for_each(|(&j, &v)| exact[(i, j)] = v);
        }
        assert!((last - error(&exact)).abs() < 1e-9 * last.max(1.0), "{last} {}", error(&exact));
    }
}
