//! A·S·B on its way down, and the closed-form steps of the wrappers.

use std::ops::Range;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Zip, s};

use crate::coder::Coded;
use crate::error::Result;
use crate::linalg::{Backend, Kernels, matmul_into};
use crate::scalar::Real;

/// The quadratic form of the inputs.
#[derive(Debug)]
pub(super) enum Form<'a, T> {
    /// diag(d).
    Diagonal(ArrayView1<'a, T>),
    /// G, n×n, and W·G, m×n.
    Full(ArrayView2<'a, T>, Array2<T>),
}

impl<'a, T: Real> Form<'a, T> {
    /// The form G of a weight.
    pub(super) fn full(g: ArrayView2<'a, T>, weight: ArrayView2<'_, T>) -> Self {
        Form::Full(g, matmul(weight, g))
    }

    /// X·G.
    pub(super) fn times(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        match self {
            Form::Diagonal(d) => &x * d,
            Form::Full(g, _) => matmul(x, *g),
        }
    }

    /// X·G, columns `part` of it.
    pub(super) fn columns(&self, x: ArrayView2<'_, T>, part: Range<usize>) -> Array2<T> {
        match self {
            Form::Diagonal(d) => &x.slice(s![.., part.clone()]) * &d.slice(s![part]),
            Form::Full(g, _) => matmul(x, g.slice(s![.., part])),
        }
    }

    /// The block of G on the diagonal, in f64.
    pub(super) fn block(&self, part: Range<usize>) -> Array2<f64> {
        match self {
            Form::Diagonal(d) => Array2::from_diag(&d.slice(s![part]).mapv(Real::wide)),
            Form::Full(g, _) => g.slice(s![part.clone(), part]).mapv(Real::wide),
        }
    }
}

/// ⟨A, B⟩.
pub(super) fn dot<T: Real>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> f64 {
    Zip::from(a).and(b).fold(0.0, |sum, a, b| sum + a.wide() * b.wide())
}

fn matmul<T: Real>(a: ArrayView2<'_, T>, b: ArrayView2<'_, T>) -> Array2<T> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    matmul_into(T::one(), a, b, T::zero(), c.view_mut());
    c
}

/// 0..len in parts of `block`, the last one smaller.
pub(super) fn parts(len: usize, block: usize) -> Vec<Range<usize>> {
    (0..len).step_by(block.max(1)).map(|start| start..(start + block).min(len)).collect()
}

/// Ŵ = A·S·B with W, and their difference.
#[derive(Debug)]
pub(super) struct State<'a, T> {
    pub(super) weight: Array2<T>,
    pub(super) rows: Vec<Range<usize>>,
    pub(super) columns: Vec<Range<usize>>,
    /// Blocks of A.
    pub(super) left: Vec<Array2<T>>,
    pub(super) core: Coded<T>,
    /// Blocks of B.
    pub(super) right: Vec<Array2<T>>,
    /// A·S·B − W.
    pub(super) error: Array2<T>,
    pub(super) backend: &'a dyn Backend,
}

/// A proximal term, as a fraction of the mean diagonal of the normal equations: solutions of what is
/// (nearly) singular stay where they are.
const PROXIMAL: f64 = 1e-7;

impl<'a, T: Real> State<'a, T> {
    /// Identity wrappers around a first core; `rows` and `columns` are where their blocks are.
    pub(super) fn new(
        weight: Array2<T>,
        core: Coded<T>,
        rows: Vec<Range<usize>>,
        columns: Vec<Range<usize>>,
        backend: &'a dyn Backend,
    ) -> Self {
        let error = &core.values - &weight;
        let [left, right] = [&rows, &columns].map(|parts| parts.iter().map(|part| Array2::eye(part.len())).collect());
        State { weight, rows, columns, left, core, right, error, backend }
    }

    /// S·B.
    pub(super) fn right_side(&self) -> Array2<T> {
        let mut z = Array2::zeros(self.weight.dim());
        for (part, b) in self.columns.iter().zip(&self.right) {
            let s = self.core.values.slice(s![.., part.clone()]);
            matmul_into(T::one(), s, b.view(), T::zero(), z.slice_mut(s![.., part.clone()]));
        }
        z
    }

    /// A·S.
    pub(super) fn left_side(&self) -> Array2<T> {
        let mut y = Array2::zeros(self.weight.dim());
        for (part, a) in self.rows.iter().zip(&self.left) {
            let s = self.core.values.slice(s![part.clone(), ..]);
            matmul_into(T::one(), a.view(), s, T::zero(), y.slice_mut(s![part.clone(), ..]));
        }
        y
    }

    /// Computes the error from scratch, so that none is carried along.
    pub(super) fn refresh(&mut self) {
        let y = self.left_side();
        self.error.assign(&self.weight.mapv(|w| -w));
        for (part, b) in self.columns.iter().zip(&self.right) {
            let to = self.error.slice_mut(s![.., part.clone()]);
            matmul_into(T::one(), y.slice(s![.., part.clone()]), b.view(), T::one(), to);
        }
    }

    /// tr(E·G·Eᵀ).
    #[cfg(test)]
    pub(super) fn loss(&self, form: &Form<'_, T>) -> f64 {
        dot(form.times(self.error.view()).view(), self.error.view())
    }

    /// A-step: with Z = S·B each block of A is a regression, A ← A − E·G·Zᵀ·(Z·G·Zᵀ)⁻¹. Returns the loss.
    pub(super) fn step_left(&mut self, form: &Form<'_, T>) -> Result<f64> {
        let z = self.right_side();
        let zg = form.times(z.view());
        let (kernels, mut loss) = (f64::kernels(self.backend), 0.0);
        for (part, a) in self.rows.iter().zip(&mut self.left) {
            let rows = s![part.clone(), ..];
            let wide = zg.slice(rows).mapv(Real::wide);
            let normal = wide.dot_rows(z.slice(rows), kernels);
            let residual = wide.dot_rows(self.error.slice(rows), kernels);
            // N·Xᵀ = (E·G·Zᵀ)ᵀ; both N and X are b×b.
            if let Some(step) = solve(normal, residual, kernels) {
                let step = step.t().mapv(|v| T::from_f64(-v));
                matmul_into(T::one(), step.view(), z.slice(rows), T::one(), self.error.slice_mut(rows));
                *a += &step;
            }
            // E·G = A·(Z·G) − W·G spares a product with G.
            let error = self.error.slice(rows);
            loss += match form {
                Form::Diagonal(d) => dot((&error * d).view(), error),
                Form::Full(_, image) => {
                    let mut force = image.slice(rows).to_owned();
                    matmul_into(T::one(), a.view(), zg.slice(rows), -T::one(), force.view_mut());
                    dot(force.view(), error)
                }
            };
        }
        self.gauge();
        Ok(loss)
    }

    /// Columns of A at unit norm, the rows of S take the scale.
    pub(super) fn gauge(&mut self) {
        for (part, a) in self.rows.iter().zip(&mut self.left) {
            for (mut column, i) in a.columns_mut().into_iter().zip(part.clone()) {
                let norm = column.iter().map(|v| v.wide() * v.wide()).sum::<f64>().sqrt();
                if norm > 0.0 && norm.is_finite() {
                    column.mapv_inplace(|v| T::from_f64(v.wide() / norm));
                    self.core.values.row_mut(i).mapv_inplace(|v| T::from_f64(v.wide() * norm));
                }
            }
        }
    }

    /// B-step, one block after the other: with Y = A·S, B ← B − (YᵀY)⁻¹·Yᵀ·(E·G)_q·G_qq⁻¹. A diagonal G
    /// cancels. Returns what the loss changes by.
    pub(super) fn step_right(&mut self, form: &Form<'_, T>) -> Result<f64> {
        let y = self.left_side();
        let (kernels, mut change) = (f64::kernels(self.backend), 0.0);
        for (part, b) in self.columns.iter().zip(&mut self.right) {
            let columns = s![.., part.clone()];
            let own = y.slice(columns);
            let wide = own.t().mapv(Real::wide);
            let normal = wide.dot_rows(own.t(), kernels);
            let square = form.block(part.clone());
            // R with N·X = R, and Yᵀ·(E·G)_q.
            let (residual, gradient) = match form {
                Form::Diagonal(_) => {
                    let residual = kernels.matmul(wide.view(), self.error.slice(columns).mapv(Real::wide).view());
                    let gradient = kernels.matmul(residual.view(), square.view());
                    (residual, gradient)
                }
                Form::Full(g, _) => {
                    let projected = matmul(own.t(), self.error.view());
                    let gradient = matmul(projected.view(), g.slice(columns)).mapv(Real::wide);
                    // R·G_qq = gradient, solved as G_qq·Rᵀ = gradientᵀ.
                    let turned = gradient.t().as_standard_layout().into_owned();
                    let Some(x) = solve(square.clone(), turned, kernels) else { continue };
                    (x.reversed_axes(), gradient)
                }
            };
            let Some(step) = solve(normal.clone(), residual, kernels) else { continue };
            // tr(Xᵀ·N·X·G_qq) − 2·⟨X, gradient⟩ for B − X.
            let bent = kernels.matmul(kernels.matmul(normal.view(), step.view()).view(), square.view());
            change += dot((bent - gradient * 2.0).view(), step.view());
            let step = step.mapv(|v| T::from_f64(-v));
            matmul_into(T::one(), own, step.view(), T::one(), self.error.slice_mut(columns));
            *b += &step;
        }
        Ok(change)
    }

    /// Multiplies A by a diagonal from the left.
    pub(super) fn scale_rows(&mut self, rows: impl Fn(usize) -> f64) {
        for (part, a) in self.rows.iter().zip(&mut self.left) {
            for (mut row, i) in a.rows_mut().into_iter().zip(part.clone()) {
                row.mapv_inplace(|v| T::from_f64(v.wide() * rows(i)));
            }
        }
    }

    /// Multiplies B by a diagonal from the right.
    pub(super) fn scale_columns(&mut self, columns: &Array1<f64>) {
        for (part, b) in self.columns.iter().zip(&mut self.right) {
            for (mut column, j) in b.columns_mut().into_iter().zip(part.clone()) {
                column.mapv_inplace(|v| T::from_f64(v.wide() * columns[j]));
            }
        }
    }

    /// B on a range of columns that cuts no block, as one matrix, f64.
    pub(super) fn right_on(&self, range: &Range<usize>) -> Array2<f64> {
        let mut whole = Array2::zeros((range.len(), range.len()));
        for (part, b) in self.columns.iter().zip(&self.right).filter(|(part, _)| range.contains(&part.start)) {
            let at = part.start - range.start..part.end - range.start;
            whole.slice_mut(s![at.clone(), at]).assign(&b.mapv(Real::wide));
        }
        whole
    }
}

/// A·Bᵀ with B widened.
trait DotRows {
    fn dot_rows<T: Real>(&self, other: ArrayView2<'_, T>, kernels: &dyn Kernels<f64>) -> Array2<f64>;
}

impl DotRows for Array2<f64> {
    fn dot_rows<T: Real>(&self, other: ArrayView2<'_, T>, kernels: &dyn Kernels<f64>) -> Array2<f64> {
        kernels.matmul(self.view(), f64::from_view(other).t())
    }
}

/// (N + λI)⁻¹·R for a symmetric positive semidefinite N, λ raised until that can be factorized; `None` if
/// N vanishes or holds no numbers, and nothing should move.
fn solve(mut normal: Array2<f64>, right: Array2<f64>, kernels: &dyn Kernels<f64>) -> Option<Array2<f64>> {
    let mean = normal.diag().sum() / normal.nrows().max(1) as f64;
    if !(mean > 0.0 && mean.is_finite()) {
        return None;
    }
    let mut ridge = PROXIMAL;
    while ridge < 1.0 {
        normal.diag_mut().mapv_inplace(|d| d + ridge * mean);
        if let Ok(x) = kernels.solve_spd(normal.view(), right.clone()) {
            return Some(x).filter(|x| x.iter().all(|v| v.is_finite()));
        }
        ridge *= 10.0;
    }
    None
}
