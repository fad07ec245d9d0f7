//! One group of one set of lanes: which mask, and with which values.

use super::LANES;
use super::table::Masks;
use crate::operator::Nm;
use crate::scalar::Real;

/// A number for each lane and each input of a group.
pub(crate) type Lanes<T> = [[T; LANES]; Nm::LARGEST];

impl Masks {
    /// The mask of the largest gain for each lane; of equal ones the first.
    pub(crate) fn best<T: Real>(&self, inverses: &[T], g: &Lanes<T>, price: &[T; LANES]) -> [usize; LANES] {
        const PRODUCTS: usize = Nm::LARGEST * (Nm::LARGEST + 1) / 2;
        let mut products = [[T::zero(); LANES]; PRODUCTS];
        let mut at = 0;
        for i in 0..self.size {
            for j in i..self.size {
                for l in 0..LANES {
                    let product = g[i][l] * g[j][l];
                    products[at][l] = if i == j { product } else { product + product };
                }
                at += 1;
            }
        }
        let mut best = [T::neg_infinity(); LANES];
        // As numbers of the compute type, so that both selections are of one width.
        let mut chosen = [T::zero(); LANES];
        let mut number = T::zero();
        for (mask, which) in self.products.iter().enumerate() {
            let inverse = &inverses[mask * self.stride..];
            let mut gain = [T::zero(); LANES];
            for (&which, &c) in which.iter().zip(inverse) {
                let product = &products[which];
                for l in 0..LANES {
                    gain[l] += c * product[l];
                }
            }
            let count = T::from_f64(self.places[mask].len() as f64);
            for l in 0..LANES {
                let gain = gain[l] - count * price[l];
                let better = gain > best[l];
                best[l] = if better { gain } else { best[l] };
                chosen[l] = if better { number } else { chosen[l] };
            }
            number += T::one();
        }
        chosen.map(|number| number.wide() as usize)
    }

    /// −H_PP⁻¹·g_P for each lane's mask P, zero elsewhere.
    pub(crate) fn values<T: Real>(&self, inverses: &[T], g: &Lanes<T>, chosen: &[usize; LANES]) -> Lanes<T> {
        let mut new = [[T::zero(); LANES]; Nm::LARGEST];
        for (l, &mask) in chosen.iter().enumerate() {
            let mut inverse = inverses[mask * self.stride..].iter();
            let places = &self.places[mask];
            for (a, &i) in places.iter().enumerate() {
                for (&j, &c) in places[a..].iter().zip(inverse.by_ref()) {
                    new[i][l] -= c * g[j][l];
                    if i != j {
                        new[j][l] -= c * g[i][l];
                    }
                }
            }
        }
        new
    }
}
