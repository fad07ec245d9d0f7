//! Operators → tensors and trees.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use super::{Codes, Coefficients, Extents, NamedTensor, Node, Run, Values};
use crate::error::Result;
use crate::operator::coded::Coded;
use crate::operator::{
    BlockDiagonal, Dense, Grid, IndexSet, LinearOperator, Operator, Order, Permutation, Quantized, Runs, ZeroPoints,
};
use crate::scalar::{DType, Real, narrow};

/// Collects the tensors of one weight or of one group of weights.
#[derive(Debug, Default)]
pub struct Encoder {
    tensors: Vec<NamedTensor>,
    /// By address; the part is kept, so that no other takes its place.
    shared: HashMap<usize, (Arc<dyn Any + Send + Sync>, Node)>,
}

impl Encoder {
    /// An encoder that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Encodes an operator under a weight's name: adds its tensors, returns its tree. Shared parts
    /// that an earlier call of this encoder wrote are referred to, not written again.
    ///
    /// # Errors
    /// As [`narrow`].
    pub fn encode<T: Real>(&mut self, name: &str, operator: &Operator<T>) -> Result<Node> {
        self.visit(name, &mut 0, operator)
    }

    /// The tensors collected.
    pub fn into_tensors(self) -> Vec<NamedTensor> {
        self.tensors
    }

    fn visit<T: Real>(&mut self, name: &str, next: &mut usize, operator: &Operator<T>) -> Result<Node> {
        Ok(match operator {
            Operator::Dense(leaf) => Node::Dense { tensor: self.dense(name, next, leaf)? },
            Operator::Interpolative(leaf) => Node::Interpolative {
                side: leaf.side(),
                len: leaf.pivots().len(),
                pivots: self.indices(name, next, leaf.pivots()),
                coefficients: match leaf.coefficients() {
                    Operator::Dense(matrix) => Coefficients::Tensor(self.dense(name, next, matrix)?),
                    other => Coefficients::Node(Box::new(self.visit(name, next, other)?)),
                },
            },
            Operator::Basis(leaf) => Node::Basis {
                kind: leaf.kind(),
                side: leaf.side(),
                len: leaf.atoms().len(),
                indices: self.indices(name, next, leaf.atoms()),
            },
            Operator::BlockDiagonal(leaf) => self.blocks(name, next, leaf)?,
            Operator::Permutation(leaf) => self.permutation(name, next, leaf),
            Operator::NmSparse(leaf) => {
                let ((m, columns), bytes) = (leaf.shape(), leaf.encode_positions());
                let shape = vec![m, leaf.pattern().position_bytes(columns)];
                Node::NmSparse {
                    n: leaf.pattern().n(),
                    m: leaf.pattern().m(),
                    columns,
                    positions: self.push(name, next, DType::U8, shape, bytes),
                    values: self.values(name, next, leaf.codes(), || leaf.values())?,
                }
            }
            Operator::Bitmask(leaf) => {
                let ((m, columns), bytes) = (leaf.shape(), leaf.encode_mask());
                Node::Bitmask {
                    columns,
                    mask: self.push(name, next, DType::U8, vec![m, columns.div_ceil(8)], bytes),
                    values: self.values(name, next, leaf.coded(), || leaf.values())?,
                }
            }
            Operator::Mixture(leaf) => Node::Mixture {
                coefficients: self.dense(name, next, leaf.coefficients())?,
                atoms: self.all(name, next, leaf.atoms())?,
            },
            Operator::Quantized(leaf) => self.quantized(name, next, leaf)?,
            Operator::Stacked(leaf) => {
                let bytes = leaf.encode_places();
                Node::Stacked {
                    places: self.push(name, next, DType::U8, vec![bytes.len()], bytes),
                    parts: self.all(name, next, leaf.parts())?,
                }
            }
            Operator::Product(factors) => Node::Product { factors: self.all(name, next, factors)? },
            Operator::Sum(terms) => Node::Sum { terms: self.all(name, next, terms)? },
            Operator::Shared(inner) => {
                let key = Arc::as_ptr(inner) as *const () as usize;
                if let Some((_, node)) = self.shared.get(&key) {
                    return Ok(node.clone());
                }
                let id = format!("{name}.{next}");
                let node = Node::Shared { id, node: Box::new(self.visit(name, next, inner)?) };
                self.shared.insert(key, (inner.clone(), node.clone()));
                node
            }
        })
    }

    fn all<T: Real>(&mut self, name: &str, next: &mut usize, parts: &[Operator<T>]) -> Result<Vec<Node>> {
        parts.iter().map(|part| self.visit(name, next, part)).collect()
    }

    fn push(&mut self, name: &str, next: &mut usize, dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> String {
        let name = format!("{name}.{next}");
        *next += 1;
        self.tensors.push(NamedTensor { name: name.clone(), dtype, shape, bytes });
        name
    }

    fn dense<T: Real>(&mut self, name: &str, next: &mut usize, leaf: &Dense<T>) -> Result<String> {
        let (m, n) = leaf.shape();
        let bytes = narrow(leaf.dtype(), leaf.values().iter())?;
        Ok(self.push(name, next, leaf.dtype(), vec![m, n], bytes))
    }

    fn quantized<T: Real>(&mut self, name: &str, next: &mut usize, leaf: &Quantized<T>) -> Result<Node> {
        let (grid, (m, columns)) = (leaf.grid(), leaf.shape());
        let shape = vec![m, leaf.codes().len() / m.max(1)];
        let codes = self.push(name, next, DType::U8, shape, leaf.codes().to_vec());
        let (scales, zeros) = self.grid(name, next, grid)?;
        Ok(Node::Quantized { bits: grid.bits(), group: grid.group(), columns, codes, scales, zeros })
    }

    /// Scales and zero points.
    fn grid<T: Real>(&mut self, name: &str, next: &mut usize, grid: &Grid<T>) -> Result<(String, Option<String>)> {
        let (scales, m) = (self.dense(name, next, grid.scales())?, grid.scales().shape().0);
        let zeros = match (grid.zeros(), grid.packed_zeros()) {
            (ZeroPoints::Float(zeros), _) => Some(self.dense(name, next, zeros)?),
            (_, packed) => packed.map(|zeros| self.push(name, next, DType::U8, vec![m, zeros.len() / m.max(1)], zeros)),
        };
        Ok((scales, zeros))
    }

    fn codes<T: Real>(&mut self, name: &str, next: &mut usize, coded: &Coded<T>) -> Result<Values> {
        let (grid, bytes) = (coded.grid(), coded.codes().to_vec());
        let codes = self.push(name, next, DType::U8, vec![bytes.len()], bytes);
        let (scales, zeros) = self.grid(name, next, grid)?;
        Ok(Values::Codes(Codes { bits: grid.bits(), group: grid.group(), codes, scales, zeros }))
    }

    fn values<'v, T: Real>(
        &mut self,
        name: &str,
        next: &mut usize,
        coded: Option<&Coded<T>>,
        values: impl FnOnce() -> Cow<'v, Dense<T>>,
    ) -> Result<Values> {
        match coded {
            Some(coded) => self.codes(name, next, coded),
            None => Ok(Values::Tensor(self.dense(name, next, &values())?)),
        }
    }

    fn indices(&mut self, name: &str, next: &mut usize, set: &IndexSet) -> String {
        let (dtype, count, bytes) = set.encode();
        self.push(name, next, dtype, vec![count], bytes)
    }

    fn blocks<T: Real>(&mut self, name: &str, next: &mut usize, leaf: &BlockDiagonal<T>) -> Result<Node> {
        let (count, alike) = (leaf.extents().len(), leaf.uniform().filter(|(rows, columns)| rows * columns > 0));
        let tensor = match leaf.codes() {
            Some(coded) => self.codes(name, next, coded)?,
            None => {
                let values = leaf.to_values();
                let shape = alike.map_or(vec![values.len()], |(rows, columns)| vec![count, rows, columns]);
                let bytes = narrow(leaf.dtype(), &values)?;
                Values::Tensor(self.push(name, next, leaf.dtype(), shape, bytes))
            }
        };
        let extents = match (alike, leaf.codes()) {
            (Some(_), None) => None,
            (Some((rows, columns)), Some(_)) => Some(Extents::Alike([count, rows, columns])),
            (None, _) => {
                let numbers = leaf.extents().iter().flat_map(|&(rows, columns)| [rows as u32, columns as u32]);
                let bytes = numbers.flat_map(u32::to_le_bytes).collect();
                Some(Extents::Table(self.push(name, next, DType::U32, vec![count, 2], bytes)))
            }
        };
        Ok(Node::BlockDiagonal { tensor, extents })
    }

    fn permutation(&mut self, name: &str, next: &mut usize, leaf: &Permutation) -> Node {
        let shape = (leaf.rows(), leaf.columns());
        match leaf.order() {
            Order::Grid { rows, columns, runs } => {
                let (&rows, &columns) = (rows, columns);
                let run = match runs {
                    Runs::Uniform(run) => Run::Uniform(*run),
                    Runs::Table(table) => {
                        let bytes = table.iter().flat_map(|run| run.to_le_bytes()).collect();
                        Run::Table(self.push(name, next, DType::U16, vec![rows, columns], bytes))
                    }
                };
                Node::Grid { shape, rows, columns, run }
            }
            Order::List(list) => {
                let (dtype, bytes) = match Permutation::list_width(shape.1) {
                    2 => (DType::U16, list.iter().flat_map(|&from| (from as u16).to_le_bytes()).collect()),
                    _ => (DType::U32, list.iter().flat_map(|from| from.to_le_bytes()).collect()),
                };
                Node::Permutation { columns: shape.1, list: self.push(name, next, dtype, vec![list.len()], bytes) }
            }
        }
    }
}
