//! The interpolation matrix of a pivoted (interpolative) low-rank form.
//!
//! Any m×n matrix of rank r equals X·R, where R holds r of its rows (the pivots) and X, m×r, is the
//! identity in those rows and a coefficient matrix T in the others. Storing R and T takes
//! r(m + n − r) numbers, against r(m + n) for two full factors (PIFA, Zhao et al., ICML 2025;
//! interpolative decomposition, Cheng et al., SIAM J. Sci. Comput. 26, 2005).

use ndarray::{Array2, ArrayView2};

use super::rows::rows_by;
use super::{IndexSet, LinearOperator, Operator};
use crate::error::{Error, Result};
use crate::linalg::rows_times_to;
use crate::scalar::Real;

/// On which side of a product the interpolation matrix stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// X is len×r: identity rows at the pivots, T of (len−r)×r in the others.
    Left,
    /// X is r×len: identity columns at the pivots, T of r×(len−r) in the others.
    Right,
}

/// A matrix with an identity in its pivot rows (or columns).
#[derive(Debug, Clone, PartialEq)]
pub struct Interpolative<T: Real> {
    side: Side,
    pivots: IndexSet,
    coefficients: Box<Operator<T>>,
    rest: Vec<usize>,
}

impl<T: Real> Interpolative<T> {
    /// Puts the parts together; the coefficients are a matrix or any other operator.
    ///
    /// # Errors
    /// [`Error::Shape`] if the coefficients are not (len−r)×r (left) or r×(len−r) (right).
    pub fn new(side: Side, pivots: IndexSet, coefficients: impl Into<Operator<T>>) -> Result<Self> {
        let coefficients = Box::new(coefficients.into());
        let (r, others) = (pivots.count(), pivots.len() - pivots.count());
        let expected = if side == Side::Left { (others, r) } else { (r, others) };
        if coefficients.shape() != expected {
            return Err(Error::shape(expected, coefficients.shape()));
        }
        let rest = pivots.rest();
        Ok(Interpolative { side, pivots, coefficients, rest })
    }

    /// The side of a product it stands on.
    pub fn side(&self) -> Side {
        self.side
    }
    /// The pivot rows (left) or columns (right).
    pub fn pivots(&self) -> &IndexSet {
        &self.pivots
    }
    /// T.
    pub fn coefficients(&self) -> &Operator<T> {
        &self.coefficients
    }

    /// [x ; T·x] with the rows put in their places, `other` being T·x.
    fn spread(&self, other: Array2<T>, x: ArrayView2<'_, T>) -> Array2<T> {
        let mut y = Array2::zeros((self.pivots.len(), x.ncols()));
        scatter(self.pivots.chosen(), x, &mut y);
        scatter(self.rest.iter().copied(), other.view(), &mut y);
        y
    }

    /// [x ; T·x] of one vector with all in its place at once, where T is a matrix.
    fn spread_one(&self, x: ArrayView2<'_, T>) -> Option<Array2<T>> {
        let (Operator::Dense(t), 1) = (self.coefficients.unshared(), x.ncols()) else { return None };
        let t = ArrayView2::from_shape(t.shape(), t.wide()).ok()?;
        let (mut y, column) = (Array2::zeros((self.pivots.len(), 1)), x.column(0));
        scatter(self.pivots.chosen(), x, &mut y);
        rows_times_to(t, column.to_slice()?, y.as_slice_mut()?, &self.rest);
        Some(y)
    }

    /// x[pivots] + T·x[rest].
    fn gather(&self, x: ArrayView2<'_, T>, t: impl Fn(ArrayView2<'_, T>) -> Array2<T>) -> Array2<T> {
        let mut y = t(self.select(x).view());
        match (y.as_slice_mut(), x.as_slice(), x.ncols()) {
            // One vector: a row is a number.
            (Some(y), Some(x), 1) => y.iter_mut().zip(self.pivots.chosen()).for_each(|(y, from)| *y += x[from]),
            _ => y.rows_mut().into_iter().zip(self.pivots.chosen()).for_each(|(mut y, from)| y += &x.row(from)),
        }
        y
    }

    /// x[rest].
    fn select(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let mut chosen = Array2::zeros((self.rest.len(), x.ncols()));
        match (chosen.as_slice_mut(), x.as_slice(), x.ncols()) {
            (Some(to), Some(x), 1) => to.iter_mut().zip(&self.rest).for_each(|(to, &from)| *to = x[from]),
            _ => chosen.rows_mut().into_iter().zip(&self.rest).for_each(|(mut to, &from)| to.assign(&x.row(from))),
        }
        chosen
    }
}

/// Rows of `from` in order to the given rows of `y`.
fn scatter<T: Real>(rows: impl Iterator<Item = usize>, from: ArrayView2<'_, T>, y: &mut Array2<T>) {
    match (from.as_slice(), y.as_slice_mut(), from.ncols()) {
        (Some(from), Some(y), 1) => rows.zip(from).for_each(|(to, &value)| y[to] = value),
        _ => rows.zip(from.rows()).for_each(|(to, from)| y.row_mut(to).assign(&from)),
    }
}

impl<T: Real> LinearOperator<T> for Interpolative<T> {
    fn shape(&self) -> (usize, usize) {
        let (len, r) = (self.pivots.len(), self.pivots.count());
        if self.side == Side::Left { (len, r) } else { (r, len) }
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let t = &self.coefficients;
        match self.side {
            Side::Left => self.spread_one(x).unwrap_or_else(|| self.spread(t.product(x), x)),
            Side::Right => self.gather(x, |rest| t.product(rest)),
        }
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let t = |x: ArrayView2<'_, T>| self.coefficients.product_transposed(x);
        if self.side == Side::Left { self.gather(x, t) } else { self.spread(t(x), x) }
    }
    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        let (shape, t) = (self.shape(), &self.coefficients);
        if self.side == Side::Right {
            let units = rows_by((shape.0, shape.0), rows, |row, to| to[row] = T::one())?;
            return Ok(self.spread(t.select_rows(rows)?.reversed_axes(), units.t()).reversed_axes());
        }
        let places: Vec<_> = rows.iter().map(|row| self.rest.binary_search(row)).collect();
        let of: Vec<usize> = places.iter().filter_map(|place| place.ok()).collect();
        let mut chosen = rows_by(shape, rows, |_, _| {})?;
        let mut others = t.select_rows(&of)?.into_iter();
        for ((row, place), mut to) in rows.iter().zip(places).zip(chosen.rows_mut()) {
            match place {
                Ok(_) => to.iter_mut().zip(&mut others).for_each(|(to, from)| *to = from),
                // As many of the others come before it as it could be placed behind.
                Err(before) => to[row - before] = T::one(),
            }
        }
        Ok(chosen)
    }
    fn params(&self) -> usize {
        self.coefficients.params()
    }
    fn bytes(&self) -> u64 {
        self.coefficients.bytes() + IndexSet::bytes_of(self.pivots.len(), self.pivots.count())
    }
    fn flops(&self, columns: usize) -> u64 {
        let additions = if self.side == Side::Right { self.pivots.count() * columns } else { 0 };
        self.coefficients.flops(columns) + additions as u64
    }
    fn to_dense(&self) -> Array2<T> {
        let identity = Array2::eye(self.pivots.count());
        if self.side == Side::Left {
            self.product(identity.view())
        } else {
            self.product_transposed(identity.view()).reversed_axes()
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Axis, array};

    use super::*;
    use crate::operator::Dense;

    #[test]
    fn both_sides_multiply_like_their_dense_form() {
        let pivots = IndexSet::new(5, vec![4, 1]).unwrap();
        let t = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
        let left = Interpolative::new(Side::Left, pivots.clone(), Dense::new(t.clone())).unwrap();
        let dense = array![[1.0, 2.0], [1.0, 0.0], [3.0, 4.0], [5.0, 6.0], [0.0, 1.0]];
        assert_eq!(left.to_dense(), dense);
        let right = Interpolative::new(Side::Right, pivots.clone(), Dense::new(t.t().to_owned())).unwrap();
        assert_eq!(right.to_dense(), dense.t());
        let (x, y) = (array![[1.0, -1.0], [2.0, 0.5]], Array2::from_shape_fn((5, 3), |(i, j)| (i * 3 + j) as f64));
        assert_eq!(left.product(x.view()), dense.dot(&x));
        assert_eq!(left.product_transposed(y.view()), dense.t().dot(&y));
        assert_eq!(right.product(y.view()), dense.t().dot(&y));
        assert_eq!(right.product_transposed(x.view()), dense.dot(&x));
        // One vector, of one number a row, takes another way.
        for column in 0..2 {
            let one = x.column(column).insert_axis(Axis(1)).to_owned();
            assert_eq!(left.product(one.view()), dense.dot(&one));
            assert_eq!(right.product_transposed(one.view()), dense.dot(&one));
            let one = y.column(column).insert_axis(Axis(1));
            for one in [one, one.to_owned().view()] {
                assert_eq!(left.product_transposed(one), dense.t().dot(&one));
                assert_eq!(right.product(one), dense.t().dot(&one));
            }
        }
        assert!(Interpolative::new(Side::Right, pivots, Dense::new(t)).is_err());
    }
}
