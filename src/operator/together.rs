//! Several operators and the same vectors.
//!
//! Packed codes meet vectors in integers. What is laid out for one matrix serves all that are cut the same way, and the rows of all
//! of them are shared out among threads at the same time.

use ndarray::{Array2, ArrayView2};

use super::kernels::Inputs;
use super::sparse::each_panel;
use super::{LinearOperator, Operator, Quantized, Stacked};
use crate::error::{Error, Result};
use crate::scalar::Real;
use crate::threads::{self, Pace};

/// Rows of a part of several that are multiplied at a time: two panels of packed codes.
const TOGETHER: usize = 64;
/// Sums of such a part that are held at a time, on one thread.
const HELD: usize = 4096;

/// Ŵᵢ·X of several operators with the same vectors: of the queries, keys and values of a layer, or of a gate and what it lets
/// through. As [`apply`](LinearOperator::apply) gives them one by one: to the last bit, or, where codes of several widths meet the same
/// integers in matrix instructions, to rounding.
///
/// Faster where they are packed codes ([`Quantized`], or the parts of [`Stacked`]): vectors are turned into integers once for all
/// that are cut the same way, which saves up to a third where there are many vectors and few rows, and all rows are shared out among
/// threads at once. Other operators follow one another. Cost: that of the products; nothing is held beside them but those integers.
///
/// ```
/// use ndarray::array;
/// use weightpress::operator::{Dense, Operator, apply_all};
///
/// let keys = Operator::from(Dense::new(array![[1.0, 2.0], [0.0, 1.0]]));
/// let values = Operator::from(Dense::new(array![[3.0, -1.0]]));
/// let [k, v] = apply_all([&keys, &values], array![[1.0], [1.0]].view())?;
/// assert_eq!((k, v), (array![[3.0], [1.0]], array![[2.0]]));
/// # Ok::<(), weightpress::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] if X has not as many rows as each operator has columns.
pub fn apply_all<T: Real, const N: usize>(
    operators: [&Operator<T>; N],
    x: ArrayView2<'_, T>,
) -> Result<[Array2<T>; N]> {
    for (i, operator) in operators.iter().enumerate() {
        let columns = operator.shape().1;
        if columns != x.nrows() {
            let expected = format!("vectors of {columns} numbers, as operator {i} of {N} ({operator}) has columns");
            return Err(Error::shape(expected, x.nrows()));
        }
    }
    let mut all = products(operators, x).into_iter();
    Ok(operators.map(|_| all.next().unwrap_or_default()))
}

/// The same of any number, whose columns are the caller's business.
pub(super) fn products<'a, T: Real>(
    operators: impl IntoIterator<Item = &'a Operator<T>>,
    x: ArrayView2<'_, T>,
) -> Vec<Array2<T>> {
    let mut laid = Laid { x, inputs: Vec::new() };
    let all = operators.into_iter().map(|operator| laid.met(operator)).collect();
    laid.products(all)
}

/// The product of the rows of several operators.
pub(super) fn stacked_product<T: Real>(rows: &Stacked<T>, x: ArrayView2<'_, T>) -> Array2<T> {
    let mut laid = Laid { x, inputs: Vec::new() };
    let met = laid.met_rows(rows);
    laid.products(vec![met]).pop().unwrap_or_default()
}

/// How an operator meets vectors.
enum Met<'a, T: Real> {
    /// Codes, and the number of their inputs.
    Codes(&'a Quantized<T>, usize),
    Rows(Rows<'a, T>),
    /// As it is.
    Itself(&'a Operator<T>),
}

/// Parts, each with the rows that are its own.
struct Rows<'a, T: Real> {
    shape: (usize, usize),
    coded: Vec<(&'a [usize], &'a Quantized<T>, usize)>,
    others: Vec<(&'a [usize], &'a Operator<T>)>,
}

/// Where products go.
enum To<'y, T> {
    Block(&'y mut [T]),
    Rows(Vec<&'y mut [T]>),
}

/// Vectors, and what was laid out of them for codes.
struct Laid<'x, T: Real> {
    x: ArrayView2<'x, T>,
    inputs: Vec<Inputs<T>>,
}

impl<T: Real> Met<'_, T> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Met::Codes(codes, _) => codes.shape(),
            Met::Rows(rows) => rows.shape,
            Met::Itself(operator) => operator.shape(),
        }
    }

    /// Numbers that are shared out with those of others: those of codes.
    fn shared_out(&self) -> (usize, usize) {
        if matches!(self, Met::Itself(_)) { (0, 0) } else { self.shape() }
    }
}

impl<T: Real> Laid<'_, T> {
    fn met<'a>(&mut self, operator: &'a Operator<T>) -> Met<'a, T> {
        match (self.coded(operator), operator.unshared()) {
            (Some((codes, at)), _) => Met::Codes(codes, at),
            (None, Operator::Stacked(rows)) => self.met_rows(rows),
            _ => Met::Itself(operator),
        }
    }

    fn met_rows<'a>(&mut self, stacked: &'a Stacked<T>) -> Met<'a, T> {
        let mut rows = Rows { shape: stacked.shape(), coded: Vec::new(), others: Vec::new() };
        for (part, own) in stacked.parts().iter().zip(stacked.rows()) {
            match self.coded(part) {
                Some((codes, at)) => rows.coded.push((own, codes, at)),
                None => rows.others.push((own, part)),
            }
        }
        Met::Rows(rows)
    }

    /// Codes, and the number of what is laid out for them; `None` for others, and where rows had better be written out.
    fn coded<'a>(&mut self, operator: &'a Operator<T>) -> Option<(&'a Quantized<T>, usize)> {
        let Operator::Quantized(codes) = operator.unshared() else { return None };
        let at = self.inputs.iter().position(|inputs| codes.meets(inputs)).unwrap_or(self.inputs.len());
        if at == self.inputs.len() {
            self.inputs.push(codes.inputs(self.x)?);
        }
        Some((codes, at))
    }

    fn products(&self, all: Vec<Met<'_, T>>) -> Vec<Array2<T>> {
        let b = self.x.ncols();
        if b == 0 {
            return all.iter().map(|met| Array2::zeros((met.shape().0, 0))).collect();
        }
        let time = |met: &Met<'_, T>| Pace::CODES.time(met.shared_out().0 * met.shared_out().1, b);
        let nanoseconds = all.iter().map(time).fold(0, usize::saturating_add);
        match threads::alone(nanoseconds) {
            true => all.iter().map(|met| self.product_alone(met, b)).collect(),
            false => self.products_by_threads(&all, b, nanoseconds),
        }
    }

    /// A product with b vectors on this thread, part by part.
    fn product_alone(&self, met: &Met<'_, T>, b: usize) -> Array2<T> {
        let rows = match met {
            Met::Codes(codes, at) => return codes.products(&self.inputs[*at], b),
            Met::Itself(operator) => return operator.product(self.x),
            Met::Rows(rows) => rows,
        };
        let (mut y, mut held) = (self.of_others(rows, b), Vec::new());
        let to = y.as_slice_mut().unwrap_or_default();
        // Sums that stay in the nearest cache until they are where they belong.
        let together = (HELD / b).next_multiple_of(TOGETHER);
        for (own, codes, at) in &rows.coded {
            for (i, own) in own.chunks(together).enumerate() {
                held.resize(own.len() * b, T::zero());
                codes.some_products(&self.inputs[*at], i * together, b, &mut held);
                scatter(own, &held, b, to);
            }
        }
        y
    }

    /// All on all threads at the same time: rows that are not side by side land where they belong while they are still in the cache.
    fn products_by_threads(&self, all: &[Met<'_, T>], b: usize, nanoseconds: usize) -> Vec<Array2<T>> {
        let begun = |met: &Met<'_, T>| match met {
            Met::Codes(codes, _) => Array2::zeros((codes.shape().0, b)),
            Met::Rows(rows) => self.of_others(rows, b),
            Met::Itself(operator) => operator.product(self.x),
        };
        let mut results: Vec<_> = all.iter().map(begun).collect();
        let together = Quantized::<T>::together(all.iter().map(|met| met.shared_out().0).sum());
        let mut tasks = Vec::new();
        for (met, y) in all.iter().zip(&mut results) {
            let y = y.as_slice_mut().unwrap_or_default();
            match met {
                Met::Itself(_) => {}
                Met::Codes(codes, at) => {
                    let some = y.chunks_mut(together * b).enumerate();
                    tasks.extend(some.map(|(i, y)| (*codes, *at, i * together, To::Block(y))));
                }
                Met::Rows(rows) => {
                    let mut places: Vec<_> = y.chunks_mut(b).map(Some).collect();
                    for (own, codes, at) in &rows.coded {
                        for (i, own) in own.chunks(TOGETHER).enumerate() {
                            let to = own.iter().filter_map(|&row| places[row].take()).collect();
                            tasks.push((*codes, *at, i * TOGETHER, To::Rows(to)));
                        }
                    }
                }
            }
        }
        each_panel(tasks.into_iter(), nanoseconds, |held: &mut Vec<T>, (_, (codes, at, first, to))| match to {
            To::Block(y) => codes.some_products(&self.inputs[at], first, b, y),
            To::Rows(to) => {
                held.resize(to.len() * b, T::zero());
                codes.some_products(&self.inputs[at], first, b, held);
                to.into_iter().zip(held.chunks(b)).for_each(|(to, from)| to.copy_from_slice(from));
            }
        });
        results
    }

    /// The products of parts that are no codes, where they belong; zeros elsewhere.
    fn of_others(&self, rows: &Rows<'_, T>, b: usize) -> Array2<T> {
        let mut y = Array2::zeros((rows.shape.0, b));
        let to = y.as_slice_mut().unwrap_or_default();
        for (own, part) in &rows.others {
            scatter(own, part.product(self.x).as_standard_layout().as_slice().unwrap_or_default(), b, to);
        }
        y
    }
}

/// Rows of b numbers, one at least, to where they belong.
fn scatter<T: Real>(rows: &[usize], from: &[T], b: usize, y: &mut [T]) {
    match b {
        // A row is a number.
        1 => rows.iter().zip(from).for_each(|(&to, &value)| y[to] = value),
        _ => rows.iter().zip(from.chunks_exact(b)).for_each(|(&to, from)| y[to * b..][..b].copy_from_slice(from)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ndarray::{array, s};

    use super::*;
    use crate::operator::{ActivationBits, Dense, Grid, ZeroPoints};

    fn codes(m: usize, n: usize, bits: u8, group: usize) -> Operator<f32> {
        Operator::Quantized(quantized(m, n, bits, group))
    }

    fn quantized(m: usize, n: usize, bits: u8, group: usize) -> Quantized<f32> {
        let scales = Array2::from_shape_fn((m, n.div_ceil(group)), |(i, g)| 0.1 + (i + g) as f32 / 512.0);
        let grid = Grid::new(bits, group, Dense::new(scales), ZeroPoints::None).unwrap();
        let w = Array2::from_shape_fn((m, n), |(i, j)| ((i * 31 + j * 17 + i * j) % 101) as f32 / 50.0 - 1.0);
        Quantized::nearest(w.view(), grid).unwrap()
    }

    #[test]
    fn all_at_once_are_each_by_itself() {
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let n = 256;
        // Widths that are cut the same way and not, other bits of inputs, rows of several, a sum, no rows, and what is no codes, alone or among rows.
        let (q, k, shared) = (codes(1100, n, 4, 64), codes(96, n, 4, 64), codes(64, n, 8, n));
        let places: Vec<u8> = (0..300).map(|i| u8::from(i % 3 == 0)).collect();
        let rows = Operator::Stacked(Stacked::new(&places, vec![codes(200, n, 3, 64), codes(100, n, 6, 64)]).unwrap());
        let plain = Operator::from(Dense::new(Array2::from_shape_fn((100, n), |(i, j)| (3 * i + j) as f32 / 300.0)));
        let partly = Operator::Stacked(Stacked::new(&places, vec![codes(200, n, 4, 64), plain]).unwrap());
        let dense = Operator::from(Dense::new(Array2::from_shape_fn((40, n), |(i, j)| (i + 2 * j) as f32 / 300.0)));
        let sum = Operator::sum_of(vec![codes(300, n, 8, n), rows.clone(), codes(300, n, 2, 64)]).unwrap();
        let (odd, none) = (codes(33, n, 5, 7), codes(0, n, 4, 64));
        let fewer = Operator::Quantized(quantized(64, n, 4, 64).with_activation_bits(ActivationBits::Eight));
        let shared = Operator::Shared(Arc::new(shared));
        let all = [&q, &k, &shared, &rows, &dense, &sum, &odd, &none, &fewer, &partly];
        for b in [0, 1, 2, 5, 40] {
            let x = Array2::from_shape_fn((n, b), |(j, v)| ((j * 13 + v * 5) % 23) as f32 / 11.0 - 1.0);
            let columns = x.t().as_standard_layout().into_owned();
            for x in [x.view(), columns.t()] {
                let together = apply_all(all, x).unwrap();
                let Operator::Sum(terms) = &sum else { unreachable!() };
                let terms = terms.iter().map(|term| term.product(x));
                assert_eq!(together[5], terms.reduce(|total, term| total + term).unwrap(), "{b} vectors");
                for (operator, product) in all.iter().zip(&together) {
                    assert_eq!(product.dim(), (operator.shape().0, b));
                    assert_eq!(*product, operator.product(x), "{operator}, {b} vectors");
                }
                assert_eq!(one_thread.install(|| apply_all(all, x).unwrap()), together, "{b} vectors on one thread");
            }
        }
    }

    #[test]
    fn what_is_cut_the_same_way_is_laid_out_once() {
        let x = Array2::zeros((256, 2));
        let mut laid = Laid { x: x.view(), inputs: Vec::new() };
        let part = || codes(96, 256, 4, 64);
        let rows = Operator::Stacked(Stacked::new(&[0; 96], vec![part()]).unwrap());
        for (operator, inputs) in [(part(), 1), (part(), 1), (rows, 1), (codes(32, 256, 4, 32), 2), (part(), 2)] {
            laid.met(&operator);
            assert_eq!(laid.inputs.len(), inputs, "{operator}");
        }
    }

    #[test]
    fn vectors_of_another_length_are_refused() {
        let (first, second) = (codes(32, 64, 4, 64), Operator::from(Dense::new(array![[1.0f32, 2.0]])));
        let x = Array2::zeros((64, 1));
        let refused = apply_all([&first, &second], x.view()).unwrap_err();
        assert!(matches!(refused, Error::Shape { .. }));
        assert!(refused.to_string().contains("vectors of 2 numbers, as operator 1 of 2 (dense 1x2)"), "{refused}");
        assert!(matches!(apply_all([&first], x.slice(s![1.., ..])), Err(Error::Shape { .. })));
        assert!(apply_all::<f32, 0>([], x.view()).unwrap().is_empty());
    }
}
