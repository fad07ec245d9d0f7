//! The Gram matrix of a layer's inputs: G = mean over tokens of x·xᵀ.

use std::sync::{Mutex, OnceLock, PoisonError};

use ndarray::{Array1, Array2, ArrayView2, Axis};

use crate::error::{Error, Result};
use crate::linalg::{Backend, Eigh, Faer, Kernels};
use crate::scalar::{Real, check_finite};

/// How far, relative to the largest entry, G may differ from Gᵀ and its eigenvalues fall below zero.
/// f32 storage stays three orders of magnitude within.
const TOLERANCE: f64 = 1e-4;

/// A symmetric positive semidefinite n×n matrix in f64, with its square root computed once.
#[derive(Debug)]
pub struct Gram {
    key: String,
    matrix: Array2<f64>,
    root: OnceLock<Array2<f64>>,
    /// Held while the root is computed, so that nobody computes it twice.
    busy: Mutex<()>,
}

impl Gram {
    /// Checks and symmetrises a matrix. `key` is what errors call it. About n³/3 flops.
    ///
    /// Singular matrices are fine, and so are eigenvalues slightly below zero, as rounding to f32
    /// leaves them.
    ///
    /// # Errors
    /// [`Error::Statistics`] unless it is square, finite, symmetric, not zero, with a diagonal that
    /// is nowhere negative and no eigenvalue below −10⁻⁴ of the largest.
    pub fn new(key: &str, mut matrix: Array2<f64>) -> Result<Self> {
        let refuse = |detail: String| Err(Error::Statistics { key: key.into(), detail });
        let (n, columns) = matrix.dim();
        if n != columns {
            return refuse(format!("is {n}x{columns}, not square"));
        }
        if let Some(((i, j), value)) = matrix.indexed_iter().find(|(_, value)| !value.is_finite()) {
            return refuse(format!("holds {value} at row {i}, column {j}"));
        }
        if let Some((i, value)) = matrix.diag().iter().enumerate().find(|(_, value)| **value < 0.0) {
            return refuse(format!("has {value} on the diagonal at row {i}, which a mean of squares cannot be"));
        }
        let largest = matrix.diag().fold(0.0, |a: f64, b| a.max(*b));
        if largest == 0.0 {
            return refuse(format!("is {n}x{n} with a zero diagonal: no input was ever seen"));
        }
        if let Some((i, j)) = symmetrise(&mut matrix, TOLERANCE * largest) {
            return refuse(format!("is not symmetric: row {i}, column {j} differs from row {j}, column {i}"));
        }
        if let Some((least, most)) = indefinite(&matrix, TOLERANCE * largest)? {
            return refuse(format!("is indefinite: eigenvalues from {least:.3e} to {most:.3e}"));
        }
        Ok(Self { key: key.into(), matrix, root: OnceLock::new(), busy: Mutex::new(()) })
    }

    /// The key it was found under.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// G itself, n×n, exactly symmetric.
    pub fn matrix(&self) -> ArrayView2<'_, f64> {
        self.matrix.view()
    }

    /// n, the number of the layer's inputs.
    pub fn dim(&self) -> usize {
        self.matrix.nrows()
    }

    /// The mean square of each input, n.
    pub fn diagonal(&self) -> Array1<f64> {
        self.matrix.diag().to_owned()
    }

    /// S = Q·max(Λ, 0)^½ from G = Q·Λ·Qᵀ: n×n with S·Sᵀ = G, columns by falling eigenvalue.
    /// Nothing is damped; a singular G gives zero columns at the end.
    ///
    /// Computed by the first caller (about 9n³ flops) and kept; others wait for it. A caller on a
    /// rayon worker computes it sequentially, so that it cannot wait for itself by stealing work.
    ///
    /// # Errors
    /// [`Error::Numerical`] if the eigendecomposition fails.
    pub fn sqrt(&self, backend: &dyn Backend) -> Result<&Array2<f64>> {
        if let Some(root) = self.root.get() {
            return Ok(root);
        }
        let _guard = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(root) = self.root.get() {
            return Ok(root);
        }
        let Eigh { values, vectors: mut root } = f64::kernels(backend).eigh(self.matrix.clone())?;
        root *= &values.mapv(|value| value.max(0.0).sqrt()).insert_axis(Axis(0));
        Ok(self.root.get_or_init(|| root))
    }

    /// Bytes it takes with its root.
    pub(super) fn memory(&self) -> usize {
        2 * size_of::<f64>() * self.matrix.len()
    }
}

/// Replaces A by (A + Aᵀ)/2; a place where the two differ by more than `tolerance`, if any. By tiles,
/// since one of the two is walked across its rows.
fn symmetrise(a: &mut Array2<f64>, tolerance: f64) -> Option<(usize, usize)> {
    const TILE: usize = 32;
    let n = a.nrows();
    for rows in (0..n).step_by(TILE) {
        for columns in (0..=rows).step_by(TILE) {
            for i in rows..n.min(rows + TILE) {
                for j in columns..i.min(columns + TILE) {
                    let (lower, upper) = (a[(i, j)], a[(j, i)]);
                    if (lower - upper).abs() > tolerance {
                        return Some((i, j));
                    }
                    let mean = 0.5 * lower + 0.5 * upper;
                    a[(i, j)] = mean;
                    a[(j, i)] = mean;
                }
            }
        }
    }
    None
}

/// The smallest and the largest eigenvalue, if the smallest is below −`shift` and below −10⁻⁴ of
/// the largest. A Cholesky factorization of A + shift·I tells for a thirtieth of the price.
fn indefinite(a: &Array2<f64>, shift: f64) -> Result<Option<(f64, f64)>> {
    let kernels: &dyn Kernels<f64> = &Faer;
    let mut shifted = a.clone();
    shifted.diag_mut().mapv_inplace(|value| value + shift);
    if kernels.cholesky(shifted.view()).is_ok() {
        return Ok(None);
    }
    drop(shifted);
    let values = kernels.eigh(a.clone())?.values;
    let (most, least) = (values.first().copied().unwrap_or(0.0), values.last().copied().unwrap_or(0.0));
    Ok((least < -TOLERANCE * most).then_some((least, most)))
}

/// Collects a Gram matrix from batches of activations, in f64.
#[derive(Debug, Clone)]
pub struct GramAccumulator {
    sum: Array2<f64>,
    tokens: u64,
}

impl GramAccumulator {
    /// For a layer of `n` inputs. Takes 8n² bytes.
    pub fn new(n: usize) -> Self {
        Self { sum: Array2::zeros((n, n)), tokens: 0 }
    }

    /// Adds a batch, tokens×n: the layer's inputs, one token per row. tokens·n² flops.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::NonFinite`]; nothing is added then.
    pub fn update(&mut self, x: ArrayView2<'_, f32>) -> Result<()> {
        /// Rows widened to f64 at a time.
        const BLOCK: usize = 512;
        let n = self.sum.nrows();
        if x.ncols() != n {
            return Err(Error::shape(format!("tokens x {n}"), x.dim()));
        }
        check_finite("activations", x.iter())?;
        for block in x.axis_chunks_iter(Axis(0), BLOCK) {
            let block = block.mapv(f64::from);
            self.sum += &f64::kernels(&Faer).gram(block.t());
        }
        self.tokens += x.nrows() as u64;
        Ok(())
    }

    /// Adds what another accumulator has seen.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is of another size.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.sum.dim() != other.sum.dim() {
            return Err(Error::shape(self.sum.dim(), other.sum.dim()));
        }
        self.sum += &other.sum;
        self.tokens += other.tokens;
        Ok(())
    }

    /// How many tokens were seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// The mean of x·xᵀ, n×n, exactly symmetric; zero if there were no tokens.
    pub fn finish(mut self) -> Array2<f64> {
        symmetrise(&mut self.sum, f64::INFINITY);
        self.sum / self.tokens.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use ndarray::{ArrayViewMut2, array, s};

    use super::*;
    use crate::linalg::{PivotedR, Svd};

    fn numbers(rows: usize, columns: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| (((i * 31 + j * 17 + i * i * j) % 23) as f32 - 11.0) / 7.0)
    }

    /// An n×n Gram matrix of rank `rank`.
    fn of_rank(n: usize, rank: usize) -> Array2<f64> {
        let x = numbers(rank, n).mapv(f64::from);
        x.t().dot(&x)
    }

    #[track_caller]
    fn refused(matrix: Array2<f64>, part: &str) {
        match Gram::new("layer.gram", matrix) {
            Err(Error::Statistics { key, detail }) => {
                assert!(key == "layer.gram" && detail.contains(part), "{key}: {detail}");
            }
            other => panic!("expected a refusal for `{part}`, got {other:?}"),
        }
    }

    #[test]
    fn the_root_times_its_transpose_is_the_matrix_at_any_rank() {
        for (n, rank) in [(1, 1), (5, 5), (40, 3), (40, 39), (40, 80), (7, 1)] {
            let gram = Gram::new("g", of_rank(n, rank)).unwrap();
            let root = gram.sqrt(&Faer).unwrap();
            let largest = gram.diagonal().fold(0.0, |a: f64, b| a.max(*b));
            let error = (root.dot(&root.t()) - gram.matrix()).fold(0.0, |a: f64, b| a.max(b.abs()));
            assert!(error < 1e-10 * largest, "n {n}, rank {rank}: {error}");
            let null = root.slice(s![.., rank.min(n)..]).fold(0.0, |a: f64, b| a.max(b.abs()));
            assert!(null < 1e-6 * largest.sqrt(), "n {n}, rank {rank}: {null}");
        }
    }

    #[test]
    fn slightly_indefinite_is_fine_and_clearly_indefinite_is_not() {
        // The worst seen in a real file: smallest -2e-8, largest 14.
        for (least, fine) in [(0.0, true), (-2e-8, true), (-1e-3, true), (-1e-2, false), (-13.0, false)] {
            let mut matrix = Array2::from_diag(&array![14.0, 1.0, least]);
            // A rotation, so that it does not show on the diagonal.
            let (c, s) = (0.6, 0.8);
            let q = array![[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]];
            matrix = q.dot(&matrix).dot(&q.t());
            if fine {
                let gram = Gram::new("g", matrix.clone()).unwrap();
                let root = gram.sqrt(&Faer).unwrap();
                assert!((root.dot(&root.t()) - matrix).iter().all(|v| v.abs() <= 1e-12 - least));
            } else if least > -5.0 {
                refused(matrix, &format!("eigenvalues from {least:.3e} to 1.400e1"));
            } else {
                refused(matrix, "on the diagonal");
            }
        }
        refused(array![[1.0, 2.0], [2.0, 1.0]], "eigenvalues from -1.000e0 to 3.000e0");
    }

    #[test]
    fn what_is_no_gram_matrix_is_refused() {
        refused(Array2::zeros((2, 3)), "is 2x3, not square");
        refused(Array2::zeros((3, 3)), "zero diagonal");
        refused(Array2::zeros((0, 0)), "zero diagonal");
        refused(array![[1.0, f64::NAN], [0.0, 1.0]], "NaN at row 0, column 1");
        refused(array![[1.0, 0.0], [f64::NEG_INFINITY, 1.0]], "-inf at row 1, column 0");
        refused(array![[1.0, 0.0], [0.0, -1e-9]], "at row 1");
        refused(array![[1.0, 0.5], [0.4, 1.0]], "not symmetric: row 1, column 0");
        let gram = Gram::new("g", array![[1.0, 0.5], [0.5 + 2e-5, 2.0]]).unwrap();
        assert_eq!(gram.matrix()[(0, 1)], gram.matrix()[(1, 0)]);
        assert!((gram.matrix()[(0, 1)] - 0.500_01).abs() < 1e-12);
        assert_eq!(gram.diagonal(), array![1.0, 2.0]);
    }

    /// Counts the decompositions; everything else is out of use.
    #[derive(Debug, Default)]
    struct Counting(AtomicUsize);

    macro_rules! counting {
        ($t:ty) => {
            impl Kernels<$t> for Counting {
                fn eigh(&self, a: Array2<$t>) -> Result<Eigh<$t>> {
                    self.0.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    Faer.eigh(a)
                }
                fn gemm(&self, _: $t, _: ArrayView2<'_, $t>, _: ArrayView2<'_, $t>, _: $t, _: ArrayViewMut2<'_, $t>) {
                    unreachable!()
                }
                fn gram(&self, _: ArrayView2<'_, $t>) -> Array2<$t> {
                    unreachable!()
                }
                fn svd(&self, _: ArrayView2<'_, $t>) -> Result<Svd<$t>> {
                    unreachable!()
                }
                fn orthonormalize(&self, _: ArrayView2<'_, $t>) -> Array2<$t> {
                    unreachable!()
                }
                fn pivoted_r(&self, _: ArrayView2<'_, $t>) -> PivotedR<$t> {
                    unreachable!()
                }
                fn cholesky(&self, _: ArrayView2<'_, $t>) -> Result<Array2<$t>> {
                    unreachable!()
                }
                fn solve_triangular(&self, _: ArrayView2<'_, $t>, _: bool, _: &mut Array2<$t>) {
                    unreachable!()
                }
            }
        };
    }
    counting!(f32);
    counting!(f64);

    #[test]
    fn threads_share_one_root() {
        let (gram, counter) = (Gram::new("g", of_rank(6, 6)).unwrap(), Counting::default());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| gram.sqrt(&counter).unwrap());
            }
        });
        assert_eq!(counter.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn two_halves_merged_equal_the_whole() {
        let x = numbers(1200, 9);
        let (mut whole, mut first, mut second) =
            (GramAccumulator::new(9), GramAccumulator::new(9), GramAccumulator::new(9));
        whole.update(x.view()).unwrap();
        first.update(x.slice(s![..701, ..])).unwrap();
        second.update(x.slice(s![701.., ..])).unwrap();
        first.merge(&second).unwrap();
        assert_eq!((whole.tokens(), first.tokens()), (1200, 1200));
        let (whole, merged) = (whole.finish(), first.finish());
        let wide = x.mapv(f64::from);
        let naive = wide.t().dot(&wide) / 1200.0;
        assert!((&whole - &merged).iter().all(|v| v.abs() < 1e-12));
        assert!((&whole - &naive).iter().all(|v| v.abs() < 1e-12));
        assert_eq!(whole, whole.t());
    }

    #[test]
    fn a_bad_batch_is_refused_and_adds_nothing() {
        let mut sum = GramAccumulator::new(2);
        assert!(matches!(sum.update(array![[1.0f32, 2.0, 3.0]].view()), Err(Error::Shape { .. })));
        assert!(matches!(sum.update(array![[1.0f32, f32::NAN]].view()), Err(Error::NonFinite { index: 1, .. })));
        assert!(matches!(sum.merge(&GramAccumulator::new(3)), Err(Error::Shape { .. })));
        assert_eq!((sum.tokens(), sum.finish()), (0, Array2::zeros((2, 2))));
    }
}
