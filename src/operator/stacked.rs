//! Operators one under the other, each row of the whole being the next row of one of them.
//!
//! What rows of different kinds need: outputs that matter in more bits than others, or some of them dense. Costs
//! beside its parts ⌈log₂ parts⌉ bits for each row.

use ndarray::{Array2, ArrayView2, Axis};

use super::kernels::{each_code, pack, width};
use super::rows::rows_by;
use super::together::stacked_product;
use super::{LinearOperator, Operator};
use crate::error::{Error, Result};
use crate::scalar::Real;

/// The rows of several operators of one width, interleaved.
#[derive(Debug, Clone, PartialEq)]
pub struct Stacked<T: Real> {
    /// For each part the rows of the whole that are its own, ascending.
    rows: Vec<Vec<usize>>,
    parts: Vec<Operator<T>>,
}

impl<T: Real> Stacked<T> {
    /// The most parts.
    pub const PARTS: usize = 256;

    /// Puts parts together: row i of the whole is the next row of part `places[i]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no part or too many, their columns differ, or a part has more or fewer rows than
    /// places.
    pub fn new(places: &[u8], parts: Vec<Operator<T>>) -> Result<Self> {
        if parts.is_empty() || parts.len() > Self::PARTS {
            return Err(Error::shape(format!("1 to {} parts", Self::PARTS), parts.len()));
        }
        let mut rows = vec![Vec::new(); parts.len()];
        for (row, &place) in places.iter().enumerate() {
            let Some(own) = rows.get_mut(usize::from(place)) else {
                return Err(Error::shape(format!("places below {}", parts.len()), place));
            };
            own.push(row);
        }
        let n = parts[0].shape().1;
        for (part, own) in parts.iter().zip(&rows) {
            if part.shape() != (own.len(), n) {
                return Err(Error::shape((own.len(), n), part.shape()));
            }
        }
        Ok(Stacked { rows, parts })
    }

    /// The parts.
    pub fn parts(&self) -> &[Operator<T>] {
        &self.parts
    }

    /// For each part the rows that are its own, ascending.
    pub fn rows(&self) -> &[Vec<usize>] {
        &self.rows
    }

    fn height(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }

    /// Bits of a place among so many parts.
    fn place_bits(parts: usize) -> u8 {
        (parts.max(2) - 1).ilog2() as u8 + 1
    }

    /// Bytes of the places of m rows among so many parts.
    pub(crate) fn place_bytes(m: usize, parts: usize) -> u64 {
        width(m, Self::place_bits(parts)) as u64
    }

    /// The part of each row.
    pub fn places(&self) -> Vec<u8> {
        let mut places = vec![0; self.height()];
        for (part, own) in self.rows.iter().enumerate() {
            own.iter().for_each(|&row| places[row] = part as u8);
        }
        places
    }

    /// The same as a stream of bits.
    pub(super) fn encode_places(&self) -> Vec<u8> {
        let mut packed = Vec::new();
        pack(Self::place_bits(self.parts.len()), &self.places(), &mut packed);
        packed
    }

    /// Reads [`encode_places`](Self::encode_places) back.
    pub(super) fn decode(packed: &[u8], parts: Vec<Operator<T>>) -> Result<Self> {
        let heights = parts.iter().map(|part| part.shape().0);
        let m = heights.fold(0usize, usize::saturating_add);
        if parts.len() > Self::PARTS || packed.len() as u64 != Self::place_bytes(m, parts.len()) {
            return Err(Error::shape(format!("places of {m} rows among {} parts", parts.len()), packed.len()));
        }
        let mut places = vec![0u8; m];
        each_code(Self::place_bits(parts.len()), packed, m, |row, place| places[row] = place);
        let read = Self::new(&places, parts)?;
        // (No bits beyond the last place.)
        if read.encode_places() != packed { Err(Error::shape("bits of places only", "others")) } else { Ok(read) }
    }
}

impl<T: Real> LinearOperator<T> for Stacked<T> {
    fn shape(&self) -> (usize, usize) {
        (self.height(), self.parts.first().map_or(0, |part| part.shape().1))
    }
    fn product(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        stacked_product(self, x)
    }
    fn product_transposed(&self, x: ArrayView2<'_, T>) -> Array2<T> {
        let mut y = Array2::zeros((self.shape().1, x.ncols()));
        for (part, own) in self.parts.iter().zip(&self.rows) {
            y += &part.product_transposed(x.select(Axis(0), own).view());
        }
        y
    }
    fn select_rows(&self, rows: &[usize]) -> Result<Array2<T>> {
        let mut chosen = rows_by(self.shape(), rows, |_, _| {})?;
        for (part, own) in self.parts.iter().zip(&self.rows) {
            let found = rows.iter().enumerate().filter_map(|(at, row)| Some((at, own.binary_search(row).ok()?)));
            let (to, of): (Vec<_>, Vec<_>) = found.unzip();
            to.iter().zip(part.select_rows(&of)?.rows()).for_each(|(&to, from)| chosen.row_mut(to).assign(&from));
        }
        Ok(chosen)
    }
    fn params(&self) -> usize {
        self.parts.iter().map(LinearOperator::params).sum()
    }
    fn bytes(&self) -> u64 {
        let parts = self.parts.iter().map(LinearOperator::bytes).sum::<u64>();
        parts + Self::place_bytes(self.height(), self.parts.len())
    }
    fn flops(&self, columns: usize) -> u64 {
        self.parts.iter().map(|part| part.flops(columns)).sum()
    }
    fn to_dense(&self) -> Array2<T> {
        let mut dense = Array2::zeros(self.shape());
        for (part, own) in self.parts.iter().zip(&self.rows) {
            own.iter().zip(part.to_dense().rows()).for_each(|(&to, from)| dense.row_mut(to).assign(&from));
        }
        dense
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::operator::codec::{Decoder, Encoder, NamedTensor};
    use crate::operator::quantized::{Grid, ZeroPoints};
    use crate::operator::{Dense, Quantized};

    fn parts() -> Vec<Operator<f64>> {
        let leaf = |values: Array2<f64>| Operator::from(Dense::new(values));
        let thin = Operator::product_of(vec![leaf(array![[2.0]]), leaf(array![[1.0, 0.0, 3.0]])]).unwrap();
        vec![leaf(array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), thin, leaf(array![[7.0, 8.0, 9.0], [-1.0, -2.0, -3.0]])]
    }

    #[test]
    fn rows_are_where_they_belong() {
        let whole = Stacked::new(&[2, 0, 1, 0, 2], parts()).unwrap();
        let dense = array![[7.0, 8.0, 9.0], [1.0, 2.0, 3.0], [2.0, 0.0, 6.0], [4.0, 5.0, 6.0], [-1.0, -2.0, -3.0]];
        assert_eq!(whole.to_dense(), dense);
        let (x, y) =
            (array![[1.0, 0.5], [2.0, -1.0], [0.0, 3.0]], Array2::from_shape_fn((5, 2), |(i, j)| (i + 3 * j) as f64));
        assert_eq!(whole.product(x.view()), dense.dot(&x));
        assert_eq!(whole.product(x.slice(ndarray::s![.., ..1])), dense.dot(&x.slice(ndarray::s![.., ..1])));
        assert_eq!(whole.product_transposed(y.view()), dense.t().dot(&y));
        // Values, and 5 places of 2 bits.
        assert_eq!(whole.bytes(), 8 * 16 + 2);
        assert_eq!(whole.rows(), [vec![1, 3], vec![2], vec![0, 4]]);
    }

    #[test]
    fn codes_of_all_widths_share_inputs() {
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let m = 1100;
        let places: Vec<u8> = (0..m).map(|i| (i * 7 % 8) as u8).collect();
        // Runs, groups that are none, and rows of one group; the last part has groups of its own.
        for (n, group) in [(80, 16), (70, 7), (70, 70), (600, 600)] {
            let w = Array2::from_shape_fn((m, n), |(i, j)| ((i * 31 + j * 17 + i * j) % 101) as f32 / 50.0 - 1.0);
            let part = |place: u8| {
                let rows: Vec<usize> = (0..m).filter(|&i| places[i] == place).collect();
                let (bits, group) = if place == 7 { (4, 8) } else { (2 + place, group) };
                let scale = |(i, g)| 0.1 + (i + g) as f32 / 512.0;
                let scales = Dense::new(Array2::from_shape_fn((rows.len(), n.div_ceil(group)), scale));
                let grid = Grid::new(bits, group, scales, ZeroPoints::None).unwrap();
                Operator::Quantized(Quantized::nearest(w.select(Axis(0), &rows).view(), grid).unwrap())
            };
            let whole = Stacked::new(&places, (0..8).map(part).collect()).unwrap();
            let dense = whole.to_dense().map(|&v| f64::from(v));
            for b in [1, 3, 37] {
                let x = Array2::from_shape_fn((n, b), |(j, v)| ((j * 13 + v * 5) % 23) as f32 / 11.0 - 1.0);
                let expected = dense.dot(&x.map(|&v| f64::from(v)));
                // However the inputs lie.
                let columns = x.t().as_standard_layout().into_owned();
                let wide =
                    Array2::from_shape_fn((n, 2 * b), |(j, v)| if v % 2 == 0 { x[(j, v / 2)] } else { f32::NAN });
                for x in [x.view(), columns.t(), wide.slice(ndarray::s![.., ..;2])] {
                    // On all threads where there is enough to do, and on one.
                    let y = whole.product(x);
                    let close = expected.iter().zip(&y).all(|(&a, &b)| (a - f64::from(b)).abs() < 1e-4);
                    assert!(close, "{n} columns in groups of {group}, {b} vectors");
                    assert_eq!(alone.install(|| whole.product(x)), y, "{n} columns, {b} vectors on one thread");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for places in [&[0, 0, 1, 2][..], &[0, 0, 1, 2, 3], &[0, 0, 0, 1, 2], &[0, 0, 1, 2, 2, 2], &[]] {
            assert!(matches!(Stacked::new(places, parts()), Err(Error::Shape { .. })), "{places:?}");
        }
        assert!(Stacked::<f64>::new(&[], Vec::new()).is_err());
        let odd = vec![Operator::from(Dense::new(array![[1.0]])), Operator::from(Dense::new(array![[1.0, 2.0]]))];
        assert!(Stacked::new(&[0, 1], odd).is_err());
    }

    #[test]
    fn the_file_says_the_same() {
        let whole = Operator::Stacked(Stacked::new(&[2, 0, 1, 0, 2], parts()).unwrap());
        let mut encoder = Encoder::new();
        let node = encoder.encode("w", &whole).unwrap();
        let tensors = encoder.into_tensors();
        assert_eq!(tensors.iter().map(|t| t.bytes.len() as u64).sum::<u64>(), whole.bytes());
        let node = serde_json::from_str(&serde_json::to_string(&node).unwrap()).unwrap();
        let read = |tensors: &Vec<NamedTensor>| Decoder::<_, f64>::new(tensors).decode(&node);
        assert_eq!(read(&tensors).unwrap(), whole);
        // A place too few or too many, one of no part, of another part, a bit beyond.
        for bytes in [vec![0x12], vec![0x12, 2, 0], vec![0x13, 2], vec![0x11, 2], vec![0x12, 0x82]] {
            let mut other = tensors.clone();
            let places = other.iter_mut().find(|t| t.dtype == crate::scalar::DType::U8).unwrap();
            (places.shape, places.bytes) = (vec![bytes.len()], bytes);
            assert!(read(&other).is_err(), "{other:?}");
        }
    }
}
