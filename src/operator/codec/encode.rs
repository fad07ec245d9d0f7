//! Operators → tensors and trees.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Coefficients, NamedTensor, Node, Run};
use crate::error::Result;
use crate::operator::{BlockDiagonal, Dense, IndexSet, LinearOperator, Operator, Order, Permutation, Quantized, Runs};
use crate::scalar::{DType, Real, narrow};

/// Collects the tensors of one weight or of one group of weights.
#[derive(Debug, Default)]
pub struct Encoder {
    tensors: Vec<NamedTensor>,
    shared: HashMap<usize, Node>,
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
                    values: self.dense(name, next, &leaf.values())?,
                }
            }
            Operator::Bitmask(leaf) => {
                let ((m, columns), bytes) = (leaf.shape(), leaf.encode_mask());
                Node::Bitmask {
                    columns,
                    mask: self.push(name, next, DType::U8, vec![m, columns.div_ceil(8)], bytes),
                    values: self.dense(name, next, leaf.values())?,
                }
            }
            Operator::Mixture(leaf) => Node::Mixture {
                coefficients: self.dense(name, next, leaf.coefficients())?,
                atoms: self.all(name, next, leaf.atoms())?,
            },
            Operator::Quantized(leaf) => self.quantized(name, next, leaf)?,
            Operator::Product(factors) => Node::Product { factors: self.all(name, next, factors)? },
            Operator::Sum(terms) => Node::Sum { terms: self.all(name, next, terms)? },
            Operator::Shared(inner) => {
                let key = Arc::as_ptr(inner) as *const () as usize;
                if let Some(node) = self.shared.get(&key) {
                    return Ok(node.clone());
                }
                let id = format!("{name}.{next}");
                let node = Node::Shared { id, node: Box::new(self.visit(name, next, inner)?) };
                self.shared.insert(key, node.clone());
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
        let bytes = |packed: &[u8]| vec![m, packed.len() / m.max(1)];
        let codes = self.push(name, next, DType::U8, bytes(leaf.codes()), leaf.codes().to_vec());
        let scales = self.dense(name, next, grid.scales())?;
        let zeros = grid.packed_zeros().map(|zeros| self.push(name, next, DType::U8, bytes(&zeros), zeros));
        Ok(Node::Quantized { bits: grid.bits(), group: grid.group(), columns, codes, scales, zeros })
    }

    fn indices(&mut self, name: &str, next: &mut usize, set: &IndexSet) -> String {
        let (dtype, count, bytes) = set.encode();
        self.push(name, next, dtype, vec![count], bytes)
    }

    fn blocks<T: Real>(&mut self, name: &str, next: &mut usize, leaf: &BlockDiagonal<T>) -> Result<Node> {
        let (count, values) = (leaf.extents().len(), leaf.to_values());
        let bytes = narrow(leaf.dtype(), &values)?;
        Ok(match leaf.uniform() {
            Some((rows, columns)) if rows * columns > 0 => {
                let tensor = self.push(name, next, leaf.dtype(), vec![count, rows, columns], bytes);
                Node::BlockDiagonal { tensor, extents: None }
            }
            _ => {
                let tensor = self.push(name, next, leaf.dtype(), vec![values.len()], bytes);
                let numbers = leaf.extents().iter().flat_map(|&(rows, columns)| [rows as u32, columns as u32]);
                let bytes = numbers.flat_map(u32::to_le_bytes).collect();
                Node::BlockDiagonal { tensor, extents: Some(self.push(name, next, DType::U32, vec![count, 2], bytes)) }
            }
        })
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
