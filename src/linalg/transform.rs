//! Fast orthonormal transforms of many vectors at once: DCT-II, DCT-III and Walsh–Hadamard.
//!
//! With c₀ = √(1/n) and c_k = √(2/n) for k > 0, the DCT-II is y_k = c_k·Σⱼ xⱼ·cos(πk(2j+1)/2n). Its matrix
//! is orthogonal, and the DCT-III is its transpose and so its inverse.
//!
//! Even lengths go by way of an FFT of half the length ([`dct`](super::dct)), odd and very short ones by rustdct.

use std::any::Any;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2, s};
use rayon::prelude::*;
use rustdct::TransformType2And3;
use rustdct::algorithm::Type2And3ConvertToFft;
use rustdct::algorithm::type2and3_butterflies::*;
use rustdct::num_complex::Complex;
use rustdct::num_traits::FloatConst;
use rustdct::rustfft::{Fft, FftDirection, FftNum};
use serde::{Deserialize, Serialize};

use super::dct::{Twist, fold, real, twist_back, twist_forward, twists, unfold};
use super::pages;
use crate::error::{Error, Result};
use crate::scalar::Real;
use crate::threads;

/// An orthogonal matrix Q of any (allowed) length n, with a fast product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Transform {
    /// Q = I.
    Identity,
    /// Row k of Q is c_k·cos(πk(2j+1)/2n).
    Dct2,
    /// The transpose of [`Dct2`](Self::Dct2).
    Dct3,
    /// Q = H/√n with Sylvester's H; n must be a power of two.
    Hadamard,
}

/// Even lengths from here on, but for 16, are faster by way of an FFT than by rustdct (measured).
const FFT_FROM: usize = 10;
/// Rows that are gathered together when the rows of the input are not contiguous: the numbers of one
/// cache line.
const STRIP: usize = 16;

impl Transform {
    /// All of them.
    pub const ALL: [Transform; 4] = [Transform::Identity, Transform::Dct2, Transform::Dct3, Transform::Hadamard];

    /// Whether Q exists for length n.
    pub fn supports(self, n: usize) -> bool {
        self != Transform::Hadamard || n.is_power_of_two()
    }

    /// Refuses lengths that have no such Q.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a Hadamard transform of a length that is no power of two.
    pub fn check(self, n: usize) -> Result<()> {
        match self.supports(n) {
            true => Ok(()),
            false => Err(Error::Unsupported(format!("a Hadamard transform of length {n}, which is no power of two"))),
        }
    }

    /// Qᵀ = Q⁻¹.
    pub fn inverse(self) -> Self {
        match self {
            Transform::Dct2 => Transform::Dct3,
            Transform::Dct3 => Transform::Dct2,
            same => same,
        }
    }

    /// Floating-point operations for one vector, an estimate: (5/2)·n·log₂n for a real FFT and 3n for its
    /// twist; n·log₂n and n for the Walsh–Hadamard transform; none for the identity.
    pub fn flops(self, n: usize) -> u64 {
        let (n, log) = (n as f64, (n.max(1) as f64).log2());
        match self {
            Transform::Identity => 0,
            Transform::Dct2 | Transform::Dct3 => (2.5 * n * log + 3.0 * n) as u64,
            Transform::Hadamard => (n * log + n) as u64,
        }
    }

    /// Q·x for every row x of X (b×n): X·Qᵀ, b×n, row-major. O(b·n·log n).
    ///
    /// # Errors
    /// [`Error::Unsupported`] as in [`check`](Self::check).
    pub fn rows<T: Real>(self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        self.check(x.ncols())?;
        Ok(self.checked_rows(x))
    }

    /// Q·X, so Q·x for every column x of X (n×b); n×b, column-major. O(b·n·log n).
    ///
    /// # Errors
    /// [`Error::Unsupported`] as in [`check`](Self::check).
    pub fn columns<T: Real>(self, x: ArrayView2<'_, T>) -> Result<Array2<T>> {
        Ok(self.rows(x.reversed_axes())?.reversed_axes())
    }

    /// [`rows`](Self::rows) in place: no fresh memory, which costs nearly as much as the transform.
    ///
    /// # Errors
    /// [`Error::Unsupported`] as in [`check`](Self::check).
    pub fn rows_in_place<T: Real>(self, x: &mut Array2<T>) -> Result<()> {
        self.check(x.ncols())?;
        self.checked_rows_in_place(x);
        Ok(())
    }

    /// [`rows`](Self::rows) for a length that was checked before.
    pub(crate) fn checked_rows<T: Real>(self, x: ArrayView2<'_, T>) -> Array2<T> {
        let mut out = pages::zeros(x.dim());
        self.by_type(Some(x), &mut out);
        out
    }

    /// [`rows_in_place`](Self::rows_in_place) for a length that was checked before.
    pub(crate) fn checked_rows_in_place<T: Real>(self, x: &mut Array2<T>) {
        if !x.is_standard_layout() {
            *x = x.as_standard_layout().into_owned();
        }
        self.by_type(None, x);
    }

    /// The two compute types are told apart here, so that FFT traits stay out of `Real`.
    fn by_type<T: Real>(self, x: Option<ArrayView2<'_, T>>, out: &mut Array2<T>) {
        let out: &mut dyn Any = out;
        if let Some(out) = out.downcast_mut() {
            transform_rows::<f32>(self, x.and_then(T::as_f32), out);
        } else if let Some(out) = out.downcast_mut() {
            transform_rows::<f64>(self, x.and_then(T::as_f64), out);
        }
    }
}

/// Transforms the rows of `out`, after filling them from x if there is one.
fn transform_rows<S: Real + FftNum + FloatConst>(kind: Transform, x: Option<ArrayView2<'_, S>>, out: &mut Array2<S>) {
    let (b, n) = out.dim();
    let Some(all) = out.as_slice_mut().filter(|all| !all.is_empty()) else { return };
    let plan = Plan::<S>::new(kind, n);
    let strip = |scratch: &mut Scratch<S>, index: usize, out: &mut [S]| {
        if let Some(x) = &x {
            gather(x.slice(s![index * STRIP.., ..]), out);
        }
        out.chunks_exact_mut(n).for_each(|row| plan.run(row, scratch));
    };
    if threads::alone(b * n) {
        let mut scratch = plan.scratch();
        all.chunks_mut(STRIP * n).enumerate().for_each(|(index, out)| strip(&mut scratch, index, out));
    } else {
        let strips = all.par_chunks_mut(STRIP * n).enumerate();
        strips.for_each_init(|| plan.scratch(), |scratch, (index, out)| strip(scratch, index, out));
    }
}

/// Copies the first rows of x, as many as `out` has room for.
fn gather<S: Real>(x: ArrayView2<'_, S>, out: &mut [S]) {
    let n = x.ncols();
    let rows = x.slice(s![..out.len() / n, ..]);
    if rows.strides()[1] == 1 {
        out.chunks_exact_mut(n).zip(rows.rows()).for_each(|(to, from)| {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = from);
        });
    } else {
        // Column by column, so that each cache line of a transposed matrix is read once.
        for (j, column) in rows.columns().into_iter().enumerate() {
            out[j..].iter_mut().step_by(n).zip(column).for_each(|(to, &from)| *to = from);
        }
    }
}

/// What the rows of one call have in common.
enum Plan<S> {
    Identity,
    Hadamard,
    /// Forward, of half the length.
    HalfDct2(Arc<dyn Fft<S>>, Vec<Twist<S>>),
    /// Inverse, of half the length.
    HalfDct3(Arc<dyn Fft<S>>, Vec<Twist<S>>),
    /// rustdct's own scale is Σⱼ xⱼ·cos(…), with half of x₀ in the DCT-III.
    Dct2(Arc<dyn TransformType2And3<S>>),
    Dct3(Arc<dyn TransformType2And3<S>>),
}

/// What a thread needs to itself.
struct Scratch<S> {
    real: Vec<S>,
    /// z, and what its FFT needs.
    half: Vec<Complex<S>>,
    complex: Vec<Complex<S>>,
}

impl<S: Real + FftNum + FloatConst> Plan<S> {
    fn new(kind: Transform, n: usize) -> Self {
        let by_half = n >= FFT_FROM && n != 16 && n.is_multiple_of(2);
        match kind {
            Transform::Dct2 | Transform::Dct3 if n <= 1 => Plan::Identity,
            Transform::Identity => Plan::Identity,
            Transform::Hadamard => Plan::Hadamard,
            Transform::Dct2 if by_half => Plan::HalfDct2(fft(n / 2, FftDirection::Forward), twists(n)),
            Transform::Dct3 if by_half => Plan::HalfDct3(fft(n / 2, FftDirection::Inverse), twists(n)),
            Transform::Dct2 => Plan::Dct2(dct(n)),
            Transform::Dct3 => Plan::Dct3(dct(n)),
        }
    }

    fn scratch(&self) -> Scratch<S> {
        let mut scratch = Scratch { real: Vec::new(), half: Vec::new(), complex: Vec::new() };
        match self {
            Plan::Identity | Plan::Hadamard => {}
            Plan::HalfDct2(fft, _) | Plan::HalfDct3(fft, _) => {
                scratch.half.resize(fft.len(), Complex::new(S::zero(), S::zero()));
                scratch.complex.resize(fft.get_inplace_scratch_len(), Complex::new(S::zero(), S::zero()));
            }
            Plan::Dct2(dct) | Plan::Dct3(dct) => scratch.real.resize(dct.get_scratch_len(), S::zero()),
        }
        scratch
    }

    /// One row, in place; it has the length of the plan.
    fn run(&self, row: &mut [S], Scratch { real: v, half: z, complex }: &mut Scratch<S>) {
        let n = row.len();
        let (head, body) = (real((1.0 / n as f64).sqrt()), real((2.0 / n as f64).sqrt()));
        match self {
            Plan::Identity => {}
            Plan::Hadamard => hadamard(row, head),
            Plan::Dct2(dct) => {
                dct.process_dct2_with_scratch(row, v);
                row[0] *= head;
                row[1..].iter_mut().for_each(|y| *y *= body);
            }
            Plan::Dct3(dct) => {
                row[0] *= head + head;
                row[1..].iter_mut().for_each(|x| *x *= body);
                dct.process_dct3_with_scratch(row, v);
            }
            Plan::HalfDct2(fft, twists) => {
                fold(row, z);
                fft.process_with_scratch(z, complex);
                twist_forward(z, row, twists, head);
            }
            Plan::HalfDct3(fft, twists) => {
                twist_back(row, z, twists, head);
                fft.process_with_scratch(z, complex);
                unfold(z, row);
            }
        }
    }
}

/// The machine's fastest FFT of a length. Not by `FftPlanner`, nor `DctPlanner`, which hold all of rustfft's kernels: those for SSE, which
/// only processors without AVX need, would be a tenth of what is compiled of this crate.
fn fft<S: FftNum>(n: usize, direction: FftDirection) -> Arc<dyn Fft<S>> {
    #[cfg(target_arch = "x86_64")]
    if let Ok(mut planner) = rustdct::rustfft::FftPlannerAvx::new() {
        return planner.plan_fft(n, direction);
    }
    fft_without_avx(n, direction)
}

/// The same on processors that have no AVX.
fn fft_without_avx<S: FftNum>(n: usize, direction: FftDirection) -> Arc<dyn Fft<S>> {
    #[cfg(not(target_arch = "x86_64"))]
    use rustdct::rustfft::FftPlanner as Planner;
    #[cfg(target_arch = "x86_64")]
    use rustdct::rustfft::FftPlannerScalar as Planner;
    Planner::new().plan_fft(n, direction)
}

/// A DCT-II and DCT-III of an odd or a short length.
fn dct<S: FftNum + FloatConst>(n: usize) -> Arc<dyn TransformType2And3<S>> {
    match n {
        2 => Arc::new(Type2And3Butterfly2::new()),
        3 => Arc::new(Type2And3Butterfly3::new()),
        4 => Arc::new(Type2And3Butterfly4::new()),
        8 => Arc::new(Type2And3Butterfly8::new()),
        16 => Arc::new(Type2And3Butterfly16::new()),
        _ => Arc::new(Type2And3ConvertToFft::new(fft(n, FftDirection::Forward))),
    }
}

/// The fast Walsh–Hadamard transform in place, for a length of 2^k, times a scale.
fn hadamard<S: Real>(x: &mut [S], scale: S) {
    let mut half = 1;
    while half < x.len() {
        for block in x.chunks_exact_mut(2 * half) {
            let (a, b) = block.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    x.iter_mut().for_each(|x| *x *= scale);
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;

    const LENGTHS: [usize; 27] =
        [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 24, 31, 32, 34, 64, 97, 100, 101, 128, 256, 300, 511, 1000, 1024];

    /// Q by its definition.
    fn matrix(kind: Transform, n: usize) -> Array2<f64> {
        let dct2 = |k: usize, j: usize| {
            let c = if k == 0 { 1.0 } else { 2.0 } / n as f64;
            // The angle is reduced in integers first, or large k lose digits.
            c.sqrt() * (PI * (k * (2 * j + 1) % (4 * n)) as f64 / (2 * n) as f64).cos()
        };
        Array2::from_shape_fn((n, n), |(k, j)| match kind {
            Transform::Identity => f64::from(u8::from(k == j)),
            Transform::Dct2 => dct2(k, j),
            Transform::Dct3 => dct2(j, k),
            Transform::Hadamard => (1.0 - 2.0 * f64::from((k & j).count_ones() % 2)) / (n as f64).sqrt(),
        })
    }

    fn numbers(rows: usize, n: usize) -> Array2<f64> {
        Array2::from_shape_fn((rows, n), |(i, j)| ((i * 37 + j * 101 + i * j * 7) % 103) as f64 / 51.0 - 1.0)
    }

    fn largest(a: &Array2<f64>) -> f64 {
        a.iter().fold(0.0, |m, v| v.abs().max(m))
    }

    #[test]
    fn every_length_equals_the_naive_sums() {
        for kind in Transform::ALL {
            for n in LENGTHS.into_iter().filter(|&n| kind.supports(n)) {
                let (q, x) = (matrix(kind, n), numbers(5, n));
                let naive = x.dot(&q.t());
                let fast = kind.rows(x.view()).unwrap();
                assert!(largest(&(&fast - &naive)) < 1e-12, "{kind:?} {n}: {}", largest(&(&fast - &naive)));
                let single = kind.rows(x.mapv(|v| v as f32).view()).unwrap().mapv(f64::from);
                assert!(largest(&(&single - &naive)) < 3e-6, "{kind:?} {n} f32: {}", largest(&(&single - &naive)));
                let mut back = fast;
                kind.inverse().rows_in_place(&mut back).unwrap();
                assert!(largest(&(&back - &x)) < 1e-12, "{kind:?} {n}");
            }
        }
    }

    #[test]
    fn processors_without_avx_find_the_same() {
        for (n, direction) in LENGTHS.into_iter().flat_map(|n| [(n, FftDirection::Forward), (n, FftDirection::Inverse)])
        {
            let mut x: Vec<_> = (0..n).map(|j| Complex::new((j * 37 % 103) as f64, (j * 101 % 51) as f64)).collect();
            let mut y = x.clone();
            fft(n, direction).process(&mut x);
            fft_without_avx(n, direction).process(&mut y);
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).norm() < 1e-9 * n as f64), "{n}, {direction}");
        }
    }

    #[test]
    fn the_matrices_are_orthogonal() {
        for kind in Transform::ALL {
            for n in LENGTHS.into_iter().filter(|&n| n <= 300 && kind.supports(n)) {
                let q = kind.rows(Array2::<f64>::eye(n).view()).unwrap();
                assert!(largest(&(q.dot(&q.t()) - Array2::<f64>::eye(n))) < 1e-12, "{kind:?} {n}");
            }
        }
    }

    #[test]
    fn strides_threads_and_sides_do_not_matter() {
        for (b, n) in [(1, 33), (37, 64), (300, 512), (40, 97)] {
            let x = numbers(b, 2 * n);
            let view = x.slice(s![.., ..;2]);
            for kind in Transform::ALL.into_iter().filter(|kind| kind.supports(n)) {
                let plain = kind.rows(view.to_owned().view()).unwrap();
                assert_eq!(kind.rows(view).unwrap(), plain);
                let columns = kind.columns(view.t().as_standard_layout().view()).unwrap();
                assert_eq!(columns.t(), plain);
                let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
                assert_eq!(pool.install(|| kind.rows(view)).unwrap(), plain);
            }
        }
    }

    #[test]
    fn empty_matrices_and_odd_hadamards() {
        for shape in [(0, 8), (3, 0)] {
            assert_eq!(Transform::Dct2.rows(Array2::<f32>::zeros(shape).view()).unwrap().dim(), shape);
        }
        for n in [0, 3, 12] {
            let refused = Transform::Hadamard.rows(Array2::<f32>::zeros((2, n)).view());
            assert!(matches!(refused, Err(Error::Unsupported(_))), "{n}");
        }
    }
}
