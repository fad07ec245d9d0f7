//! One matrix, one method: the smallest use of the library.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```

use weightpress::ndarray::Array2;
use weightpress::{Budget, Factorize, LinearOperator, Problem, Svd};

fn main() -> weightpress::Result<()> {
    let w = Array2::from_shape_fn((256, 384), |(i, j)| (-(i as f32 / 256.0 - j as f32 / 384.0).powi(2) * 9.0).exp());
    let problem = Problem::new("w", w.view(), Budget::Keep(0.1)); // at most 10 % of the bytes
    let smaller = Svd::default().factorize(&[problem])?.remove(0);

    let x = Array2::<f32>::ones((384, 8)); // eight vectors, one a column
    let y = smaller.apply(x.view())?; // Ŵ·x from the factors: W is never rebuilt
    let error = (&w - &smaller.to_dense()).mapv(|d| d * d).sum().sqrt() / w.mapv(|v| v * v).sum().sqrt();
    println!("{smaller}: {} -> {} bytes, relative error {error:.1e}, y is {:?}", w.len() * 4, smaller.bytes(), y.dim());
    Ok(())
}
