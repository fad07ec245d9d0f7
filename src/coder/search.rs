//! One group of some rows: which mask, and with which values.

use pulp::{Simd, bytemuck};

use super::table::Masks;
use crate::operator::Nm;
use crate::scalar::Real;

/// A number for each lane and each input of a group.
pub(crate) type Vectors<V> = [V; Nm::LARGEST];

/// The masks of 2:4 in their order.
pub(super) const PAIRS: [[usize; 2]; 6] = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];

/// By what a mask is chosen; a vector of numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Judge<V> {
    /// Its gain less the price of its entries.
    Gain(V),
    /// Its number is given.
    Number(V),
}

impl Masks {
    /// For each lane the number of the mask of the largest gain, of equal ones the first, and −H_PP⁻¹·g_P for that mask
    /// P, zero elsewhere.
    #[inline(always)]
    pub(crate) fn solve<S: Simd, T: Real>(
        &self,
        s: S,
        inverses: &[T],
        g: &Vectors<T::V<S>>,
        judge: Judge<T::V<S>>,
    ) -> (T::V<S>, Vectors<T::V<S>>) {
        match inverses.as_chunks::<3>().0.first_chunk() {
            Some(inverses) if self.pairs => pairs::<S, T>(s, inverses, g, judge),
            _ => self.any::<S, T>(s, inverses, g, judge),
        }
    }

    /// Masks of any kind.
    #[inline(always)]
    fn any<S: Simd, T: Real>(
        &self,
        s: S,
        inverses: &[T],
        g: &Vectors<T::V<S>>,
        judge: Judge<T::V<S>>,
    ) -> (T::V<S>, Vectors<T::V<S>>) {
        const PRODUCTS: usize = Nm::LARGEST * (Nm::LARGEST + 1) / 2;
        let zero = T::splat(s, T::zero());
        let chosen = match judge {
            Judge::Number(chosen) => chosen,
            Judge::Gain(price) => {
                let mut products = [zero; PRODUCTS];
                let mut at = 0;
                for i in 0..self.size {
                    for j in i..self.size {
                        let product = T::vmul(s, g[i], g[j]);
                        products[at] = if i == j { product } else { T::vadd(s, product, product) };
                        at += 1;
                    }
                }
                let (mut best, mut chosen) = (T::splat(s, T::neg_infinity()), zero);
                let mut number = T::zero();
                for (mask, which) in self.products.iter().enumerate() {
                    let count = T::splat(s, T::from_f64(self.places[mask].len() as f64));
                    let mut gain = T::fnma(s, count, price, zero);
                    for (&which, &c) in which.iter().zip(&inverses[mask * self.stride..]) {
                        gain = T::fma(s, T::splat(s, c), products[which], gain);
                    }
                    chosen = T::if_less(s, best, gain, T::splat(s, number), chosen);
                    best = T::if_less(s, best, gain, gain, best);
                    number += T::one();
                }
                chosen
            }
        };
        // Values lane by lane: of many masks each lane needs one.
        let (lanes, mut new) = (T::lanes::<S>(), [zero; Nm::LARGEST]);
        let (numbers, from): (&[T], &[T]) =
            (bytemuck::cast_slice(std::slice::from_ref(&chosen)), bytemuck::cast_slice(g));
        let to: &mut [T] = bytemuck::cast_slice_mut(&mut new);
        for (l, number) in numbers.iter().enumerate() {
            let mask = number.wide() as usize;
            let mut inverse = inverses[mask * self.stride..].iter();
            let places = &self.places[mask];
            for (a, &i) in places.iter().enumerate() {
                for (&j, &c) in places[a..].iter().zip(inverse.by_ref()) {
                    to[i * lanes + l] -= c * from[j * lanes + l];
                    if i != j {
                        to[j * lanes + l] -= c * from[i * lanes + l];
                    }
                }
            }
        }
        (chosen, new)
    }
}

/// All pairs of four: everything stays in registers.
#[inline(always)]
fn pairs<S: Simd, T: Real>(
    s: S,
    inverses: &[[T; 3]; PAIRS.len()],
    g: &Vectors<T::V<S>>,
    judge: Judge<T::V<S>>,
) -> (T::V<S>, Vectors<T::V<S>>) {
    let zero = T::splat(s, T::zero());
    let mut best = Best { gain: T::splat(s, T::neg_infinity()), chosen: zero, values: [zero; 4], number: T::zero() };
    // Places as constants.
    best.offer::<0, 1, S>(s, inverses[0], g, judge);
    best.offer::<0, 2, S>(s, inverses[1], g, judge);
    best.offer::<0, 3, S>(s, inverses[2], g, judge);
    best.offer::<1, 2, S>(s, inverses[3], g, judge);
    best.offer::<1, 3, S>(s, inverses[4], g, judge);
    best.offer::<2, 3, S>(s, inverses[5], g, judge);
    let mut all = [zero; Nm::LARGEST];
    all.iter_mut().zip(best.values).for_each(|(all, value)| *all = T::vsub(s, zero, value));
    (best.chosen, all)
}

/// The best pair so far, with the negative of its values.
struct Best<T, V> {
    gain: V,
    chosen: V,
    values: [V; 4],
    /// Of the next pair.
    number: T,
}

impl<T: Real, V: Copy> Best<T, V> {
    /// Tries the pair (A, B) of the inverse `c`.
    #[inline(always)]
    fn offer<const A: usize, const B: usize, S: Simd>(&mut self, s: S, c: [T; 3], g: &Vectors<V>, judge: Judge<V>)
    where
        T: crate::simd::Lanes<V<S> = V>,
    {
        let [aa, ab, bb] = c.map(|c| T::splat(s, c));
        let first = T::fma(s, aa, g[A], T::vmul(s, ab, g[B]));
        let second = T::fma(s, ab, g[A], T::vmul(s, bb, g[B]));
        let gain = match judge {
            // All pairs are of the same price.
            Judge::Gain(_) => T::fma(s, first, g[A], T::vmul(s, second, g[B])),
            Judge::Number(own) => {
                let distance = T::vabs(s, T::vsub(s, own, T::splat(s, self.number)));
                T::vsub(s, T::splat(s, T::zero()), distance)
            }
        };
        for (i, kept) in self.values.iter_mut().enumerate() {
            let value = match i {
                i if i == A => first,
                i if i == B => second,
                _ => T::splat(s, T::zero()),
            };
            *kept = T::if_less(s, self.gain, gain, value, *kept);
        }
        self.chosen = T::if_less(s, self.gain, gain, T::splat(s, self.number), self.chosen);
        self.gain = T::if_less(s, self.gain, gain, gain, self.gain);
        self.number += T::one();
    }
}
