//! A DCT of even length n by a complex FFT of length h = n/2 (Makhoul, IEEE Trans. ASSP 28, 1980).
//!
//! v is x with its even places ascending, then its odd places descending, and zⱼ = v_{2j} + i·v_{2j+1}. With
//! w_k = e^{−iπk/2n} and Z = FFT(z), for every pair k, h−k at once,
//!
//! > V_k, conj V_{h−k} = ½(Z_k + conj Z_{h−k}) ± ½(−i·w_k⁴)·(Z_k − conj Z_{h−k}),
//! > y_k − i·y_{n−k} = √(2/n)·w_k·V_k
//!
//! gives the orthonormal DCT-II; the DCT-III runs the same steps backwards. Both lines in one pass are twice
//! as fast as a real FFT followed by a twist.

use std::f64::consts::PI;

use rustdct::num_complex::Complex;
use rustdct::rustfft::FftNum;

use crate::scalar::Real;

/// √(1/2n)·w_k and −i·w_k⁴.
pub(super) type Twist<S> = (Complex<S>, Complex<S>);

/// The nearest number of this type; `from_f64` alone would be ambiguous where FFT traits are in scope.
pub(super) fn real<S: Real>(value: f64) -> S {
    S::from_f64(value)
}

/// The factors of k = 0..=n/4, computed in f64.
pub(super) fn twists<S: Real>(n: usize) -> Vec<Twist<S>> {
    let scale = (0.5 / n as f64).sqrt();
    let at = |k: usize| {
        let ((s, c), (s4, c4)) =
            ((PI * k as f64 / (2 * n) as f64).sin_cos(), (2.0 * PI * k as f64 / n as f64).sin_cos());
        (Complex::new(real(scale * c), real(-scale * s)), Complex::new(real(-s4), real(-c4)))
    };
    (0..=n / 4).map(at).collect()
}

/// x → z. Here and below all slices of a loop have one length, which is what lets it be vectorised.
pub(super) fn fold<S: Real>(x: &[S], z: &mut [Complex<S>]) {
    let (quarter, h) = (x.len() / 4, z.len());
    let (fours, rest) = x.split_at(quarter * 4);
    for (z, x) in z[..quarter].iter_mut().zip(fours.chunks_exact(4)) {
        *z = Complex::new(x[0], x[2]);
    }
    for (z, x) in z[h - quarter..].iter_mut().rev().zip(fours.chunks_exact(4)) {
        *z = Complex::new(x[3], x[1]);
    }
    if let [even, odd] = *rest {
        z[quarter] = Complex::new(even, odd);
    }
}

/// z → x.
pub(super) fn unfold<S: Real>(z: &[Complex<S>], x: &mut [S]) {
    let (quarter, h) = (x.len() / 4, z.len());
    let (fours, rest) = x.split_at_mut(quarter * 4);
    let ends = z[..quarter].iter().zip(z[h - quarter..].iter().rev());
    for (x, (first, last)) in fours.chunks_exact_mut(4).zip(ends) {
        (x[0], x[1], x[2], x[3]) = (first.re, last.im, first.im, last.re);
    }
    if let [even, odd] = rest {
        (*even, *odd) = (z[quarter].re, z[quarter].im);
    }
}

/// Z → y.
pub(super) fn twist_forward<S: Real + FftNum>(z: &[Complex<S>], y: &mut [S], twists: &[Twist<S>], head: S) {
    let h = z.len();
    // Pairs k, h−k with k < h−k.
    let count = (h - 1) / 2;
    let turn: Complex<S> = Complex::new(real(0.5f64.sqrt()), real(-(0.5f64.sqrt())));
    let (low, high) = y.split_at_mut(h);
    (low[0], high[0]) = ((z[0].re + z[0].im) * head, (z[0].re - z[0].im) * head);
    if h.is_multiple_of(2) {
        // k = h−k: V = conj Z.
        let middle = twists[h / 2].0 * z[h / 2].conj();
        (low[h / 2], high[h / 2]) = (middle.re + middle.re, -middle.im - middle.im);
    }
    let (low, low_end) = low.split_at_mut(h - count);
    let (high, high_end) = high.split_at_mut(h - count);
    let pairs = z[1..=count].iter().zip(z[h - count..].iter().rev()).zip(&twists[1..=count]);
    let lows = low[1..=count].iter_mut().zip(low_end.iter_mut().rev());
    let highs = high[1..=count].iter_mut().zip(high_end.iter_mut().rev());
    for (((&a, b), &(w, w4)), ((y_k, y_h_minus_k), (y_h_plus_k, y_n_minus_k))) in pairs.zip(lows.zip(highs)) {
        let (sum, difference) = (a + b.conj(), w4 * (a - b.conj()));
        let first = w * (sum + difference);
        // w_{h−k} = e^{−iπ/4}·conj w_k
        let second = turn * w.conj() * (sum - difference).conj();
        (*y_k, *y_n_minus_k) = (first.re, -first.im);
        (*y_h_minus_k, *y_h_plus_k) = (second.re, -second.im);
    }
}

/// y → Z ÷ h.
pub(super) fn twist_back<S: Real + FftNum>(y: &[S], z: &mut [Complex<S>], twists: &[Twist<S>], head: S) {
    let h = z.len();
    let count = (h - 1) / 2;
    let turn: Complex<S> = Complex::new(real(0.5f64.sqrt()), real(0.5f64.sqrt()));
    let (low, high) = y.split_at(h);
    z[0] = Complex::new((low[0] + high[0]) * head, (low[0] - high[0]) * head);
    if h.is_multiple_of(2) {
        let middle = twists[h / 2].0 * Complex::new(low[h / 2], high[h / 2]);
        z[h / 2] = middle + middle;
    }
    let (front, back) = z.split_at_mut(h - count);
    let lows = low[1..=count].iter().zip(low[h - count..].iter().rev());
    let highs = high[1..=count].iter().zip(high[h - count..].iter().rev());
    let places = front[1..=count].iter_mut().zip(back.iter_mut().rev()).zip(&twists[1..=count]);
    for (((place, mirror), &(w, w4)), ((&y_k, &y_h_minus_k), (&y_h_plus_k, &y_n_minus_k))) in
        places.zip(lows.zip(highs))
    {
        let first = w.conj() * Complex::new(y_k, -y_n_minus_k);
        let second = (turn * w * Complex::new(y_h_minus_k, -y_h_plus_k)).conj();
        let (sum, difference) = (first + second, w4.conj() * (first - second));
        *place = sum + difference;
        *mirror = (sum - difference).conj();
    }
}
