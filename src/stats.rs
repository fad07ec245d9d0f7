//! temporary
use crate::error::Result;
use crate::linalg::Backend;
use ndarray::{Array1, Array2, ArrayView2};
use std::sync::{Arc, OnceLock};
/// temporary
#[derive(Debug)]
pub struct Gram {
    matrix: Array2<f64>,
    sqrt: OnceLock<Array2<f64>>,
}
impl Gram {
    /// temporary
    pub fn new(_key: &str, matrix: Array2<f64>) -> Result<Self> {
        Ok(Gram { matrix, sqrt: OnceLock::new() })
    }
    /// temporary
    pub fn matrix(&self) -> ArrayView2<'_, f64> {
        self.matrix.view()
    }
    /// temporary
    pub fn dim(&self) -> usize {
        self.matrix.nrows()
    }
    /// temporary
    pub fn diagonal(&self) -> Array1<f64> {
        self.matrix.diag().to_owned()
    }
    /// temporary
    pub fn sqrt(&self, backend: &dyn Backend) -> Result<&Array2<f64>> {
        if self.sqrt.get().is_none() {
            let e = <f64 as crate::scalar::Real>::kernels(backend).eigh(self.matrix.view())?;
            let s = &e.vectors * &e.values.mapv(|v: f64| v.max(0.0).sqrt());
            let _ = self.sqrt.set(s);
        }
        Ok(self.sqrt.get().unwrap())
    }
}
/// temporary
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// g
    Gram,
    /// r
    FisherRow,
    /// c
    FisherCol,
}
/// temporary
#[derive(Debug)]
pub struct Stats;
impl Stats {
    /// temporary
    pub fn gram(&self, _w: &str) -> Result<Arc<Gram>> {
        todo!()
    }
    /// temporary
    pub fn fisher_row(&self, _w: &str) -> Result<Array1<f64>> {
        todo!()
    }
    /// temporary
    pub fn fisher_col(&self, _w: &str) -> Result<Array1<f64>> {
        todo!()
    }
}
