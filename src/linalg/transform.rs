//! Fast orthonormal transforms of many vectors at once: DCT-II, DCT-III and Walsh–Hadamard.
//!
//! With c₀ = √(1/n) and c_k = √(2/n) for k > 0, the DCT-II is y_k = c_k·Σⱼ xⱼ·cos(πk(2j+1)/2n). Its matrix
//! is orthogonal, and the DCT-III is its transpose and so its inverse.
//!
//! Two routes: one real FFT of the same length between a permutation and a twist (Makhoul, IEEE Trans.
//! ASSP 28, 1980), and, where it was measured to be faster, rustdct: short lengths and odd ones (in which
//! a real FFT saves nothing).

use std::any::Any;
use std::f64::consts::PI;
use std::sync::Arc;

use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;
use realfft::{ComplexToReal, FftNum, RealFftPlanner, RealToComplex, num_complex::Complex, num_traits::FloatConst};
use rustdct::{DctPlanner, TransformType2And3};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::scalar::Real;

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

/// Even lengths from here on go by way of the real FFT, other ones by rustdct.
const REAL_FFT_FROM: usize = 32;
/// Below this many numbers one thread does it all.
const PARALLEL_FROM: usize = 1 << 16;
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

    /// [`rows`](Self::rows) for a length that was checked before.
    pub(crate) fn checked_rows<T: Real>(self, x: ArrayView2<'_, T>) -> Array2<T> {
        let mut out = Array2::<T>::zeros(x.dim());
        // The two compute types are told apart here, so that FFT traits stay out of `Real`.
        let same: &mut dyn Any = &mut out;
        if let Some(x) = T::as_f32(x)
            && let Some(out) = same.downcast_mut()
        {
            transform_rows::<f32>(self, x, out);
        } else if let Some(x) = T::as_f64(x)
            && let Some(out) = same.downcast_mut()
        {
            transform_rows::<f64>(self, x, out);
        }
        out
    }
}

fn transform_rows<S: Real + FftNum + FloatConst>(kind: Transform, x: ArrayView2<'_, S>, out: &mut Array2<S>) {
    let (b, n) = x.dim();
    let Some(all) = out.as_slice_mut().filter(|all| !all.is_empty()) else { return };
    let plan = Plan::<S>::new(kind, n);
    let strip = |scratch: &mut Scratch<S>, index: usize, out: &mut [S]| {
        let first = index * STRIP;
        let rows = out.len() / n;
        let contiguous = x.strides()[1] == 1 || n == 1;
        if !contiguous {
            scratch.strip.resize(rows * n, S::zero());
            for j in 0..n {
                for i in 0..rows {
                    scratch.strip[i * n + j] = x[(first + i, j)];
                }
            }
        }
        let gathered = std::mem::take(&mut scratch.strip);
        for (i, out) in out.chunks_exact_mut(n).enumerate() {
            match x.row(first + i).to_slice() {
                Some(row) if contiguous => plan.run(row, out, scratch),
                _ => plan.run(&gathered[i * n..][..n], out, scratch),
            }
        }
        scratch.strip = gathered;
    };
    if b * n < PARALLEL_FROM || rayon::current_thread_index().is_some() {
        let mut scratch = plan.scratch();
        all.chunks_mut(STRIP * n).enumerate().for_each(|(index, out)| strip(&mut scratch, index, out));
    } else {
        let strips = all.par_chunks_mut(STRIP * n).enumerate();
        strips.for_each_init(|| plan.scratch(), |scratch, (index, out)| strip(scratch, index, out));
    }
}

/// What the rows of one call have in common.
enum Plan<S> {
    Copy,
    /// Forward real FFT; √(2/n)·e^{−iπk/2n}.
    RealDct2(Arc<dyn RealToComplex<S>>, Vec<Complex<S>>),
    /// Inverse real FFT; √(1/2n)·e^{iπk/2n}.
    RealDct3(Arc<dyn ComplexToReal<S>>, Vec<Complex<S>>),
    /// rustdct's own scale is Σⱼ xⱼ·cos(…), with half of x₀ in the DCT-III.
    Dct2(Arc<dyn TransformType2And3<S>>),
    Dct3(Arc<dyn TransformType2And3<S>>),
    Hadamard,
}

/// What a thread needs to itself.
struct Scratch<S> {
    strip: Vec<S>,
    real: Vec<S>,
    spectrum: Vec<Complex<S>>,
    complex: Vec<Complex<S>>,
}

fn real<S: Real>(value: f64) -> S {
    S::from_f64(value)
}

impl<S: Real + FftNum + FloatConst> Plan<S> {
    fn new(kind: Transform, n: usize) -> Self {
        let long = n >= REAL_FFT_FROM && n.is_multiple_of(2);
        let twist = |scale: f64, sign: f64| {
            let angle = |k: usize| sign * PI * k as f64 / (2 * n) as f64;
            let at = |k: usize| Complex::new(real(scale * angle(k).cos()), real(scale * angle(k).sin()));
            (0..=n / 2).map(at).collect()
        };
        match kind {
            Transform::Dct2 | Transform::Dct3 if n <= 1 => Plan::Copy,
            Transform::Identity => Plan::Copy,
            Transform::Hadamard => Plan::Hadamard,
            Transform::Dct2 if long => {
                Plan::RealDct2(RealFftPlanner::new().plan_fft_forward(n), twist((2.0 / n as f64).sqrt(), -1.0))
            }
            Transform::Dct3 if long => {
                Plan::RealDct3(RealFftPlanner::new().plan_fft_inverse(n), twist((0.5 / n as f64).sqrt(), 1.0))
            }
            Transform::Dct2 => Plan::Dct2(DctPlanner::new().plan_dct2(n)),
            Transform::Dct3 => Plan::Dct3(DctPlanner::new().plan_dct3(n)),
        }
    }

    fn scratch(&self) -> Scratch<S> {
        let (mut real, mut spectrum, mut complex) = (Vec::new(), Vec::new(), Vec::new());
        match self {
            Plan::Copy | Plan::Hadamard => {}
            Plan::RealDct2(fft, _) => {
                (real, spectrum, complex) = (fft.make_input_vec(), fft.make_output_vec(), fft.make_scratch_vec());
            }
            Plan::RealDct3(fft, _) => {
                (real, spectrum, complex) = (fft.make_output_vec(), fft.make_input_vec(), fft.make_scratch_vec());
            }
            Plan::Dct2(dct) | Plan::Dct3(dct) => real = vec![S::zero(); dct.get_scratch_len()],
        }
        Scratch { strip: Vec::new(), real, spectrum, complex }
    }

    /// One row; x and out have the length of the plan.
    fn run(&self, x: &[S], out: &mut [S], scratch: &mut Scratch<S>) {
        let n = x.len();
        let Scratch { real: v, spectrum, complex, .. } = scratch;
        let (head, body) = ((1.0 / n as f64).sqrt(), (2.0 / n as f64).sqrt());
        match self {
            Plan::Copy => out.copy_from_slice(x),
            Plan::Hadamard => {
                out.copy_from_slice(x);
                hadamard(out, real(head));
            }
            Plan::Dct2(dct) => {
                out.copy_from_slice(x);
                dct.process_dct2_with_scratch(out, v);
                out[0] *= real(head);
                out[1..].iter_mut().for_each(|y| *y *= real(body));
            }
            Plan::Dct3(dct) => {
                out[0] = x[0] * real(2.0 * head);
                out[1..].iter_mut().zip(&x[1..]).for_each(|(y, &x)| *y = x * real(body));
                dct.process_dct3_with_scratch(out, v);
            }
            Plan::RealDct2(fft, twist) => {
                // Even places ascending, then odd places descending.
                let (even, odd) = v.split_at_mut(n / 2);
                for ((pair, even), odd) in x.chunks_exact(2).zip(even).zip(odd.iter_mut().rev()) {
                    (*even, *odd) = (pair[0], pair[1]);
                }
                // It fails for buffers of a wrong length only, and these are its own.
                let _ = fft.process_with_scratch(v, spectrum, complex);
                let (low, high) = out.split_at_mut(n / 2);
                low[0] = spectrum[0].re * real(head);
                // c_k·e^{−iπk/2n}·V_k = y_k − i·y_{n−k}
                let turned = spectrum[1..].iter().zip(&twist[1..]).map(|(v, t)| v * t);
                for ((turned, low), high) in turned.zip(&mut low[1..]).zip(high[1..].iter_mut().rev()) {
                    (*low, *high) = (turned.re, -turned.im);
                }
                high[0] = spectrum[n / 2].re * real(head);
            }
            Plan::RealDct3(fft, twist) => {
                let (low, high) = x.split_at(n / 2);
                // The first and the middle value are real, and must be so exactly.
                spectrum[0] = Complex::new(low[0] * real(head), S::zero());
                spectrum[n / 2] = Complex::new(high[0] * real(head), S::zero());
                let pairs = low[1..].iter().zip(high[1..].iter().rev()).map(|(&low, &high)| Complex::new(low, -high));
                for ((pair, twist), to) in pairs.zip(&twist[1..]).zip(&mut spectrum[1..]) {
                    *to = pair * twist;
                }
                let _ = fft.process_with_scratch(spectrum, v, complex);
                let (even, odd) = v.split_at(n / 2);
                for ((pair, &even), &odd) in out.chunks_exact_mut(2).zip(even).zip(odd.iter().rev()) {
                    (pair[0], pair[1]) = (even, odd);
                }
            }
        }
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
    use ndarray::s;

    use super::*;

    const LENGTHS: [usize; 22] =
        [1, 2, 3, 4, 5, 7, 8, 12, 16, 31, 32, 34, 64, 97, 100, 101, 128, 256, 300, 511, 1000, 1024];

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
                let back = kind.inverse().rows(fast.view()).unwrap();
                assert!(largest(&(&back - &x)) < 1e-12, "{kind:?} {n}");
            }
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
