//! Patterns, the masks that they allow in a group, and the inverses of H for each.

use ndarray::ArrayView2;

use super::search::PAIRS;
use crate::operator::Nm;
use crate::scalar::Real;

/// What may be non-zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pattern {
    /// N of every M consecutive inputs; what is left of a row at its end is all kept.
    Groups(Nm),
    /// Anything, at a price for each entry. Solved in groups of four.
    Free,
}

/// One group: consecutive columns and the masks that it may have.
#[derive(Debug, Clone)]
struct Group<T> {
    start: usize,
    size: usize,
    /// Which of `kinds` holds its masks.
    kind: usize,
    /// For each mask the upper triangle of the inverse of H on it, rows first.
    inverses: Vec<T>,
}

/// The masks of one kind of group; all inverses have room for the largest one.
#[derive(Debug, Clone)]
pub(crate) struct Masks {
    /// Inputs of the group.
    pub size: usize,
    /// Positions of each mask, ascending.
    pub places: Vec<Vec<usize>>,
    /// The number of each mask, for the bits that it is.
    numbers: Vec<u8>,
    /// Whether they are those of 2:4.
    pub pairs: bool,
    /// For each mask, which products gᵢ·gⱼ (i ≤ j, numbered rows first) its gain sums.
    pub products: Vec<Vec<usize>>,
    /// Numbers that each inverse takes.
    pub stride: usize,
}

impl Masks {
    fn new(size: usize, masks: &[u8]) -> Self {
        let places: Vec<Vec<usize>> =
            masks.iter().map(|mask| (0..size).filter(|i| mask >> i & 1 == 1).collect()).collect();
        // Row i of the upper triangle begins after the rows above it.
        let number = |i: usize, j: usize| i * size - i * (i + 1) / 2 + j;
        let products = places
            .iter()
            .map(|p: &Vec<usize>| {
                p.iter().enumerate().flat_map(|(a, &i)| p[a..].iter().map(move |&j| (i, j))).collect()
            })
            .map(|pairs: Vec<(usize, usize)>| pairs.into_iter().map(|(i, j)| number(i, j)).collect())
            .collect();
        let most = places.iter().map(Vec::len).max().unwrap_or(0);
        let mut numbers = vec![0; 1 << size];
        masks.iter().enumerate().for_each(|(number, &bits)| numbers[usize::from(bits)] = number as u8);
        let pairs = size == 4 && places == PAIRS;
        Masks { size, places, numbers, pairs, products, stride: most * (most + 1) / 2 }
    }

    /// The mask of these bits; the first if there is none.
    pub(crate) fn number(&self, bits: u8) -> usize {
        self.numbers.get(usize::from(bits)).copied().unwrap_or(0).into()
    }
}

/// Everything about H and a pattern that rows have in common.
#[derive(Debug, Clone)]
pub struct Tables<T> {
    columns: usize,
    kinds: Vec<Masks>,
    groups: Vec<Group<T>>,
    /// Groups that had a mask on which H is singular.
    singular: usize,
}

/// A pivot below this fraction of its diagonal entry counts as zero: the entry is a combination of
/// others of the group, which take its part.
const SINGULAR: f64 = 1e-10;

impl<T: Real> Tables<T> {
    /// Prepares H = `form` + `ridge`·I for a pattern. About n·C(M, N)·N³/M flops.
    pub fn new(form: ArrayView2<'_, f64>, ridge: f64, pattern: Pattern) -> Self {
        let columns = form.nrows();
        let (size, masks) = match pattern {
            Pattern::Groups(nm) => (nm.m(), nm.masks()),
            Pattern::Free => (4, (0..16).collect()),
        };
        let rest = columns % size;
        let of_rest: Vec<u8> = match pattern {
            Pattern::Groups(_) => vec![((1u16 << rest) - 1) as u8],
            Pattern::Free => (0..1 << rest).collect(),
        };
        let kinds = vec![Masks::new(size, &masks), Masks::new(rest, &of_rest)];
        let mut singular = 0;
        let groups = (0..columns).step_by(size).map(|start| {
            let size = size.min(columns - start);
            let kind = usize::from(start + size == columns && rest > 0);
            let Masks { places, stride, .. } = &kinds[kind];
            let mut inverses = vec![T::zero(); places.len() * stride];
            let mut whole = true;
            for (places, to) in places.iter().zip(inverses.chunks_mut((*stride).max(1))) {
                let entry = |a: usize, b: usize| {
                    let (i, j) = (start + places[a], start + places[b]);
                    form[(i, j)] + if i == j { ridge } else { 0.0 }
                };
                whole &= invert(places.len(), entry, to);
            }
            singular += usize::from(!whole);
            Group { start, size, kind, inverses }
        });
        let groups = groups.collect();
        Tables { columns, kinds, groups, singular }
    }

    /// n.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How many groups had a mask on which H is singular (dead or duplicate inputs).
    pub fn singular(&self) -> usize {
        self.singular
    }

    /// (first column, columns, masks, inverses) of each group, from left to right.
    pub(crate) fn groups(&self) -> impl ExactSizeIterator<Item = (usize, usize, &Masks, &[T])> {
        self.groups.iter().map(|group| (group.start, group.size, &self.kinds[group.kind], group.inverses.as_slice()))
    }
}

/// The upper triangle of the inverse of a small symmetric matrix, by sweeps with the largest pivot first.
/// Rows and columns of pivots that vanish are zero in it: the inverse of an independent part. Returns
/// whether all of it was inverted.
fn invert<T: Real>(k: usize, entry: impl Fn(usize, usize) -> f64, to: &mut [T]) -> bool {
    const MOST: usize = Nm::LARGEST;
    let mut a = [[0.0f64; MOST]; MOST];
    for (i, row) in a.iter_mut().enumerate().take(k) {
        for (j, value) in row.iter_mut().enumerate().take(k) {
            *value = entry(i, j);
        }
    }
    let diagonal: [f64; MOST] = std::array::from_fn(|i| a[i][i]);
    let mut done = [false; MOST];
    for _ in 0..k {
        let open = (0..k).filter(|&i| !done[i] && a[i][i] > SINGULAR * diagonal[i].max(f64::MIN_POSITIVE));
        // The first of the largest relative pivots.
        let Some(p) = open.fold(None, |best: Option<usize>, i| match best {
            Some(b) if a[b][b] * diagonal[i] >= a[i][i] * diagonal[b] => Some(b),
            _ => Some(i),
        }) else {
            break;
        };
        done[p] = true;
        let pivot = a[p][p];
        for i in (0..k).filter(|&i| i != p) {
            for j in (0..k).filter(|&j| j != p) {
                a[i][j] -= a[i][p] * a[p][j] / pivot;
            }
        }
        for i in (0..k).filter(|&i| i != p) {
            a[i][p] /= pivot;
            a[p][i] /= pivot;
        }
        a[p][p] = -1.0 / pivot;
    }
    let pairs = (0..k).flat_map(|i| (i..k).map(move |j| (i, j)));
    for ((i, j), to) in pairs.zip(to) {
        *to = if done[i] && done[j] { T::from_f64(-a[i][j]) } else { T::zero() };
    }
    done[..k].iter().all(|&done| done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inverts_and_leaves_out_what_is_dependent() {
        let a = [[4.0, 1.0, 0.5], [1.0, 3.0, -1.0], [0.5, -1.0, 2.0]];
        let mut upper = [0.0f64; 6];
        assert!(invert(3, |i, j| a[i][j], &mut upper));
        let inverse = |i: usize, j: usize| upper[[[0, 1, 2], [1, 3, 4], [2, 4, 5]][i][j]];
        for (i, row) in a.iter().enumerate() {
            for j in 0..3 {
                let product: f64 = row.iter().enumerate().map(|(k, v)| v * inverse(k, j)).sum();
                assert!((product - f64::from(u8::from(i == j))).abs() < 1e-12);
            }
        }
        // Two equal inputs: one of them carries both. A dead one: nothing.
        let mut upper = [9.0f64; 3];
        assert!(!invert(2, |_, _| 4.0, &mut upper));
        assert_eq!(upper, [0.25, 0.0, 0.0]);
        let mut upper = [9.0f64; 3];
        assert!(!invert(2, |i, j| if (i, j) == (1, 1) { 2.0 } else { 0.0 }, &mut upper));
        assert_eq!(upper, [0.0, 0.0, 0.5]);
    }

    #[test]
    fn groups_cover_all_columns_and_the_rest_is_kept() {
        let form = ndarray::Array2::<f64>::eye(11);
        let tables = Tables::<f64>::new(form.view(), 0.0, Pattern::Groups(Nm::TWO_FOUR));
        let groups: Vec<_> = tables.groups().map(|(start, size, masks, _)| (start, size, masks.places.len())).collect();
        assert_eq!(groups, [(0, 4, 6), (4, 4, 6), (8, 3, 1)]);
        let tables = Tables::<f64>::new(form.view(), 0.0, Pattern::Free);
        let groups: Vec<_> = tables.groups().map(|(start, size, masks, _)| (start, size, masks.places.len())).collect();
        assert_eq!(groups, [(0, 4, 16), (4, 4, 16), (8, 3, 8)]);
        assert_eq!(tables.singular(), 0);
    }
}
