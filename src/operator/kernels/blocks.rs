//! diag(B₀, B₁, …)·x with the rows of x gathered and the rows of the result scattered on the way.

use half::bf16;
use ndarray::{Array2, ArrayView2};

use crate::operator::permutation::NONE;
use crate::scalar::Real;

/// A stored number that a kernel widens as it reads it.
pub(crate) trait Leaf<T>: Copy + Send + Sync {
    /// The number in the compute type.
    fn widen(self) -> T;
}

impl<T: Real> Leaf<T> for T {
    fn widen(self) -> T {
        self
    }
}

impl<T: Real> Leaf<T> for bf16 {
    fn widen(self) -> T {
        T::from_f64(self.to_f64())
    }
}

/// y = S·diag(B)·G·x, or with Bᵀ for B. `values` are the blocks one after the other, each row-major with
/// its `extents`; place c of the blocks' input is row `gather[c]` of x (or zero), place o of their
/// output is row `scatter[o]` of y (or dropped); y has `rows` rows, zero where nothing is written.
pub(crate) fn block_product<T: Real, L: Leaf<T>>(
    values: &[L],
    extents: &[(usize, usize)],
    transposed: bool,
    x: ArrayView2<'_, T>,
    gather: Option<&[u32]>,
    scatter: Option<&[u32]>,
    rows: usize,
) -> Array2<T> {
    let mut y = Array2::zeros((rows, x.ncols()));
    let place = |map: Option<&[u32]>, at: usize| map.map_or(at, |map| map[at] as usize);
    let (mut at, mut first, mut from) = (0, 0, 0);
    for &(height, width) in extents {
        let block = |i: usize, j: usize| values[at + if transposed { j * width + i } else { i * width + j }].widen();
        let (outputs, inputs) = if transposed { (width, height) } else { (height, width) };
        for i in 0..outputs {
            let to = place(scatter, first + i);
            for j in 0..inputs {
                let source = place(gather, from + j);
                if to != NONE as usize && source != NONE as usize {
                    y.row_mut(to).scaled_add(block(i, j), &x.row(source));
                }
            }
        }
        at += height * width;
        (first, from) = (first + outputs, from + inputs);
    }
    y
}
