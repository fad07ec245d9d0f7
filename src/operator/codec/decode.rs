//! Tensors and trees → operators. Nothing of a file is trusted.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Codes, Coefficients, Extents, NamedTensor, Node, Run, Values};
use crate::error::{Error, Result};
use crate::operator::permutation::LONGEST;
use crate::operator::{
    ActivationBits, Basis, Bitmask, BlockDiagonal, Dense, Grid, IndexSet, Interpolative, LinearOperator, Mixture, Nm,
    NmSparse, Operator, Permutation, Quantized, Runs, Stacked, ZeroPoints,
};
use crate::scalar::{DType, Real, widen};
use crate::tensor::Stored;

/// Where a decoder finds tensors by name.
pub trait Source {
    /// The tensor's bytes, shape and dtype.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] and whatever reading can meet.
    fn tensor(&self, name: &str) -> Result<Stored<'_>>;
}

impl Source for Vec<NamedTensor> {
    fn tensor(&self, name: &str) -> Result<Stored<'_>> {
        let found = self.iter().find(|t| t.name == name);
        let found = found.ok_or_else(|| Error::MissingTensor { name: name.into(), path: "memory".into() })?;
        Ok(Stored { shape: &found.shape, dtype: found.dtype, bytes: &found.bytes })
    }
}

/// Rebuilds operators; shared parts are read once and shared again.
#[derive(Debug)]
pub struct Decoder<'s, S, T: Real> {
    source: &'s S,
    shared: HashMap<String, Arc<Operator<T>>>,
    activations: ActivationBits,
}

/// Deeper trees than this are refused: no method writes them, only a hostile file would.
const DEPTH: usize = 32;

impl<'s, S: Source, T: Real> Decoder<'s, S, T> {
    /// A decoder over a source of tensors.
    pub fn new(source: &'s S) -> Self {
        Decoder { source, shared: HashMap::new(), activations: ActivationBits::default() }
    }

    /// The same, for packed codes that meet their inputs in so many bits, or more: see [`ActivationBits`].
    pub fn with_activation_bits(self, activations: ActivationBits) -> Self {
        Decoder { activations, ..self }
    }

    /// Rebuilds one operator.
    ///
    /// # Errors
    /// Missing tensors, shapes that do not fit, values that are not finite.
    pub fn decode(&mut self, node: &Node) -> Result<Operator<T>> {
        self.visit(node, DEPTH)
    }

    fn visit(&mut self, node: &Node, depth: usize) -> Result<Operator<T>> {
        let Some(depth) = depth.checked_sub(1) else {
            return Err(Error::Unsupported(format!("an operator tree deeper than {DEPTH}")));
        };
        Ok(match node {
            Node::Dense { tensor } => Operator::Dense(self.dense(tensor)?),
            Node::Interpolative { side, len, pivots, coefficients } => {
                let pivots = self.indices(pivots, *len)?;
                let coefficients = match coefficients {
                    Coefficients::Tensor(name) => Operator::Dense(self.dense(name)?),
                    Coefficients::Node(node) => self.visit(node, depth)?,
                };
                Operator::Interpolative(Interpolative::new(*side, pivots, coefficients)?)
            }
            Node::Basis { kind, side, len, indices } => {
                Operator::Basis(Basis::new(*kind, *side, self.indices(indices, *len)?)?)
            }
            Node::BlockDiagonal { tensor, extents } => Operator::BlockDiagonal(self.blocks(tensor, extents.as_ref())?),
            Node::Permutation { columns, list } => {
                let list = self.integers(list)?.1;
                Operator::Permutation(Permutation::list(*columns, list)?)
            }
            Node::Grid { shape, rows, columns, run } => {
                Operator::Permutation(Permutation::grid(*shape, *rows, *columns, self.runs((*rows, *columns), run)?)?)
            }
            Node::NmSparse { n, m, columns, positions, values } => {
                let (pattern, (_, bytes)) = (Nm::new(*n, *m)?, self.bytes(positions)?);
                let leaf = match values {
                    Values::Tensor(values) => NmSparse::decode(pattern, *columns, bytes, self.dense(values)?),
                    Values::Codes(codes) => {
                        let (grid, codes) = self.codes(codes)?;
                        NmSparse::decode_codes(pattern, *columns, bytes, grid, codes)
                    }
                };
                Operator::NmSparse(leaf.map_err(|e| e.of_tensor(positions))?)
            }
            Node::Bitmask { columns, mask, values } => {
                let (rows, bytes) = self.bytes(mask)?;
                let leaf = match values {
                    Values::Tensor(values) => Bitmask::decode((rows, *columns), bytes, self.dense(values)?),
                    Values::Codes(codes) => {
                        let (grid, codes) = self.codes(codes)?;
                        Bitmask::decode_codes((rows, *columns), bytes, grid, codes)
                    }
                };
                Operator::Bitmask(leaf.map_err(|e| e.of_tensor(mask))?)
            }
            Node::Mixture { coefficients, atoms } => {
                Operator::Mixture(Mixture::new(self.dense(coefficients)?, self.all(atoms, depth)?)?)
            }
            Node::Quantized { bits, group, columns, codes, scales, zeros } => {
                let read = || {
                    let grid = self.grid(*bits, *group, scales, zeros.as_deref())?;
                    let codes = self.bytes_of(codes, grid.scales().shape().0)?;
                    Quantized::new(*columns, grid, codes.to_vec())
                };
                let leaf = read().map_err(|e| e.of_tensor(codes))?;
                Operator::Quantized(leaf.with_activation_bits(self.activations))
            }
            Node::Stacked { places, parts } => {
                let parts = self.all(parts, depth)?;
                let read = || Stacked::decode(self.list_of_bytes(places)?, parts);
                Operator::Stacked(read().map_err(|e| e.of_tensor(places))?)
            }
            Node::Product { factors } => Operator::product_of(self.all(factors, depth)?)?,
            Node::Sum { terms } => Operator::sum_of(self.all(terms, depth)?)?,
            Node::Shared { id, node } => match self.shared.get(id) {
                Some(known) => Operator::Shared(known.clone()),
                None => {
                    let inner = Arc::new(self.visit(node, depth)?);
                    self.shared.insert(id.clone(), inner.clone());
                    Operator::Shared(inner)
                }
            },
        })
    }

    fn all(&mut self, nodes: &[Node], depth: usize) -> Result<Vec<Operator<T>>> {
        nodes.iter().map(|node| self.visit(node, depth)).collect()
    }

    fn dense(&self, name: &str) -> Result<Dense<T>> {
        let read = || Dense::stored(&self.source.tensor(name)?, "factor");
        read().map_err(|e| e.of_tensor(name))
    }

    /// A matrix of bytes: its rows and content.
    fn bytes(&self, name: &str) -> Result<(usize, &'s [u8])> {
        let stored = self.source.tensor(name)?;
        match (stored.dtype, stored.shape) {
            (DType::U8, &[rows, _]) => Ok((rows, stored.bytes)),
            (dtype, _) if dtype != DType::U8 => Err(Error::UnsupportedDType { dtype }.of_tensor(name)),
            (_, shape) => Err(Error::shape("a matrix of bytes", shape).of_tensor(name)),
        }
    }

    /// The content of a matrix of bytes that has as many rows as there are scales for.
    fn bytes_of(&self, name: &str, rows: usize) -> Result<&'s [u8]> {
        match self.bytes(name)? {
            (found, bytes) if found == rows => Ok(bytes),
            (found, bytes) => {
                let columns = |rows: usize| bytes.len() / rows.max(1);
                Err(Error::shape((rows, columns(rows)), (found, columns(found))).of_tensor(name))
            }
        }
    }

    fn grid(&self, bits: u8, group: usize, scales: &str, zeros: Option<&str>) -> Result<Grid<T>> {
        let scales = self.dense(scales)?;
        let zeros = match zeros {
            None => ZeroPoints::None,
            Some(name) if self.source.tensor(name)?.dtype.is_float() => ZeroPoints::Float(self.dense(name)?),
            Some(name) => ZeroPoints::Integer(Grid::<T>::unpack_zeros(
                bits,
                scales.shape(),
                self.bytes_of(name, scales.shape().0)?,
            )?),
        };
        Grid::new(bits, group, scales, zeros)
    }

    /// The grid and the packed codes of what a node stores.
    fn codes(&self, codes: &Codes) -> Result<(Grid<T>, Vec<u8>)> {
        let read = || -> Result<_> {
            let bytes = self.list_of_bytes(&codes.codes)?.to_vec();
            Ok((self.grid(codes.bits, codes.group, &codes.scales, codes.zeros.as_deref())?, bytes))
        };
        read().map_err(|e| e.of_tensor(&codes.codes))
    }

    fn list_of_bytes(&self, name: &str) -> Result<&'s [u8]> {
        let stored = self.source.tensor(name)?;
        match (stored.dtype, stored.shape) {
            (DType::U8, &[_]) => Ok(stored.bytes),
            (DType::U8, shape) => Err(Error::shape("a list of bytes", shape)),
            (dtype, _) => Err(Error::UnsupportedDType { dtype }),
        }
    }

    fn indices(&self, name: &str, len: usize) -> Result<IndexSet> {
        let read = || {
            let stored = self.source.tensor(name)?;
            IndexSet::decode(len, stored.dtype, stored.bytes)
        };
        read().map_err(|e| e.of_tensor(name))
    }

    fn blocks(&self, tensor: &Values, extents: Option<&Extents>) -> Result<BlockDiagonal<T>> {
        let table = match extents {
            Some(Extents::Table(name)) => match self.integers(name)? {
                (shape, table) if matches!(shape[..], [_, 2]) => {
                    let pairs = table.as_chunks::<2>().0.iter();
                    Some(pairs.map(|&[rows, columns]| (rows as usize, columns as usize)).collect())
                }
                (shape, _) => return Err(Error::shape("blocks x 2", shape).of_tensor(name)),
            },
            Some(&Extents::Alike(extents)) => Some(alike(extents)?),
            None => None,
        };
        let name = match tensor {
            Values::Tensor(name) => name,
            Values::Codes(codes) => {
                let extents = table.ok_or_else(|| Error::shape("extents", "none").of_tensor(&codes.codes))?;
                let (grid, bytes) = self.codes(codes)?;
                return BlockDiagonal::decode_codes(extents, grid, bytes).map_err(|e| e.of_tensor(&codes.codes));
            }
        };
        let read = || {
            let stored = self.source.tensor(name)?;
            let extents = match (table, stored.shape) {
                (None, &[count, rows, columns]) => alike([count, rows, columns])?,
                (Some(table), [_]) => table,
                _ => return Err(Error::shape("blocks of one extent, or values and a table of extents", stored.shape)),
            };
            let dtype = if stored.dtype == DType::F64 { T::DTYPE } else { stored.dtype };
            BlockDiagonal::rounded(widen(stored.dtype, stored.bytes)?, extents, dtype)
        };
        read().map_err(|e| e.of_tensor(name))
    }

    fn runs(&self, grid: (usize, usize), run: &Run) -> Result<Runs> {
        let name = match run {
            Run::Uniform(run) => return Ok(Runs::Uniform(*run)),
            Run::Table(name) => name,
        };
        match self.integers(name)? {
            (shape, table) if shape == [grid.0, grid.1] => {
                let narrow = table.into_iter().map(u16::try_from).collect::<std::result::Result<_, _>>();
                narrow.map(Runs::Table).map_err(|_| Error::shape("runs below 2^16", "longer ones").of_tensor(name))
            }
            (shape, _) => Err(Error::shape([grid.0, grid.1], shape).of_tensor(name)),
        }
    }

    /// A tensor of U16 or U32: its shape and its numbers.
    fn integers(&self, name: &str) -> Result<(Vec<usize>, Vec<u32>)> {
        let read = || {
            let stored = self.source.tensor(name)?;
            let numbers: Vec<u32> = match stored.dtype {
                DType::U16 => stored.bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b).into()).collect(),
                DType::U32 => stored.bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect(),
                dtype => return Err(Error::UnsupportedDType { dtype }),
            };
            Ok((stored.shape.to_vec(), numbers))
        };
        read().map_err(|e| e.of_tensor(name))
    }
}

/// Extents of blocks of one kind. Blocks of no size would cost a file nothing, and there is a limit to all sizes.
fn alike([count, rows, columns]: [usize; 3]) -> Result<Vec<(usize, usize)>> {
    let sound = rows > 0 && columns > 0 && count <= LONGEST || count <= 1;
    if sound {
        Ok(vec![(rows, columns); count])
    } else {
        Err(Error::shape("blocks of some size", [count, rows, columns]))
    }
}
