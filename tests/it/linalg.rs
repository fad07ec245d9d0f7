use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use weightpress::Result;
use weightpress::linalg::{Eigh, Faer, Kernels, PivotedR, Svd, conformance};

#[test]
fn faer_conforms() {
    conformance::check(&Faer).unwrap();
    // On a worker thread the kernels run sequentially.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| conformance::check(&Faer)).unwrap();
}

#[cfg(feature = "lapack-openblas")]
#[test]
fn lapack_conforms() {
    conformance::check(&weightpress::linalg::Lapack).unwrap();
}

/// A backend with one mistake in it.
#[derive(Debug)]
struct Flawed(&'static str);

macro_rules! flawed {
    ($t:ty) => {
        impl Kernels<$t> for Flawed {
            fn gemm(
                &self,
                alpha: $t,
                a: ArrayView2<'_, $t>,
                b: ArrayView2<'_, $t>,
                beta: $t,
                c: ArrayViewMut2<'_, $t>,
            ) {
                let alpha = if self.0 == "gemm" && a.nrows() == 7 { -alpha } else { alpha };
                Faer.gemm(alpha, a, b, beta, c);
            }
            fn gram(&self, a: ArrayView2<'_, $t>) -> Array2<$t> {
                let mut c = Faer.gram(a);
                if self.0 == "gram" && c.nrows() == 31 {
                    c[(3, 4)] += 1e-6;
                }
                c
            }
            fn eigh(&self, a: Array2<$t>) -> Result<Eigh<$t>> {
                let mut found = Faer.eigh(a)?;
                if self.0 == "eigh" {
                    found.values.invert_axis(ndarray::Axis(0));
                }
                Ok(found)
            }
            fn svd(&self, a: ArrayView2<'_, $t>) -> Result<Svd<$t>> {
                let mut found = Faer.svd(a)?;
                if self.0 == "svd" && found.values.len() == 13 {
                    found.u.column_mut(12).fill(0.0);
                }
                Ok(found)
            }
            fn orthonormalize(&self, a: ArrayView2<'_, $t>) -> Array2<$t> {
                // Not orthonormal: the matrix itself.
                if self.0 == "orthonormalize" { a.to_owned() } else { Faer.orthonormalize(a) }
            }
            fn pivoted_r(&self, a: ArrayView2<'_, $t>) -> PivotedR<$t> {
                let mut found = Faer.pivoted_r(a);
                if self.0 == "pivoted_r" {
                    found.order.reverse();
                }
                found
            }
            fn cholesky(&self, a: ArrayView2<'_, $t>) -> Result<Array2<$t>> {
                if self.0 == "cholesky" { Ok(Array2::eye(a.nrows())) } else { Faer.cholesky(a) }
            }
            fn solve_triangular(&self, l: ArrayView2<'_, $t>, upper: bool, b: &mut Array2<$t>) {
                Faer.solve_triangular(l, upper && self.0 != "solve_triangular", b);
            }
        }
    };
}

flawed!(f32);
flawed!(f64);

#[test]
fn every_mistake_is_found() {
    conformance::check(&Flawed("none")).unwrap();
    for kernel in ["gemm", "gram", "eigh", "svd", "orthonormalize", "pivoted_r", "cholesky", "solve_triangular"] {
        let error = conformance::check(&Flawed(kernel)).unwrap_err().to_string();
        assert!(error.starts_with(kernel), "{kernel}: {error}");
    }
}
