//! Operators ⇄ named tensors and a JSON tree: the only place that knows how a node is stored.
//!
//! A weight `w` becomes tensors `w.0`, `w.1`, … and a [`Node`] tree that says how they combine; the
//! tree goes into the file's metadata. `docs/format.md` describes it for other programs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Basis, Bitmask, Dense, IndexSet, Interpolative, LinearOperator, Nm, NmSparse, Operator, Side};
use crate::error::{Error, Result};
use crate::linalg::Transform;
use crate::scalar::{DType, Real, narrow};
use crate::tensor::{Stored, Tensor};

/// The metadata key under which a factored file carries its [`Header`], as JSON.
pub const METADATA_KEY: &str = "weightpress";
/// Version of the factored format; a change of meaning raises it.
pub const FORMAT_VERSION: u32 = 1;

/// What a factored file says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`FORMAT_VERSION`].
    pub format: u32,
    /// Version of the crate that wrote it.
    pub version: String,
    /// blake3 of the recipe.
    pub recipe: String,
    /// The compressed weights of this file.
    pub weights: BTreeMap<String, Tree>,
}

/// A compressed weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tree {
    /// (m, n).
    pub shape: (usize, usize),
    /// The dtype of the original.
    pub dtype: String,
    /// The operator.
    pub operator: Node,
}

/// A tensor ready to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// Its name in the file.
    pub name: String,
    /// Stored dtype.
    pub dtype: DType,
    /// Extent of each dimension.
    pub shape: Vec<usize>,
    /// Little-endian, row-major.
    pub bytes: Vec<u8>,
}

/// The stored form of an operator; leaves name the tensors that hold them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Node {
    /// [`Operator::Dense`].
    Dense {
        /// m×n values.
        tensor: String,
    },
    /// [`Operator::Interpolative`].
    Interpolative {
        /// Left: len×r; right: r×len.
        side: Side,
        /// The long side.
        len: usize,
        /// The pivots: U16/U32 list or U8 bit mask.
        pivots: String,
        /// T.
        coefficients: String,
    },
    /// [`Operator::Basis`].
    Basis {
        /// Which transform.
        kind: Transform,
        /// Left: len×r; right: r×len.
        side: Side,
        /// Length of the transform.
        len: usize,
        /// The chosen rows of the transform: U16/U32 list or U8 bit mask.
        indices: String,
    },
    /// [`Operator::NmSparse`].
    NmSparse {
        /// N, the values in a group.
        n: usize,
        /// M, the inputs in a group.
        m: usize,
        /// The number of columns.
        columns: usize,
        /// The packed positions of the groups, U8.
        positions: String,
        /// The values, rows × values of a row.
        values: String,
    },
    /// [`Operator::Bitmask`].
    Bitmask {
        /// The number of columns.
        columns: usize,
        /// The mask, rows × ⌈columns/8⌉ U8.
        mask: String,
        /// The values, 1 × their number.
        values: String,
    },
    /// [`Operator::Product`], leftmost first.
    Product {
        /// The factors.
        factors: Vec<Node>,
    },
    /// [`Operator::Sum`].
    Sum {
        /// The terms.
        terms: Vec<Node>,
    },
    /// [`Operator::Shared`]: nodes of one id are one operator.
    Shared {
        /// What the uses have in common.
        id: String,
        /// The operator.
        node: Box<Node>,
    },
}

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
                coefficients: self.dense(name, next, leaf.coefficients())?,
            },
            Operator::Basis(leaf) => Node::Basis {
                kind: leaf.kind(),
                side: leaf.side(),
                len: leaf.atoms().len(),
                indices: self.indices(name, next, leaf.atoms()),
            },
            Operator::NmSparse(leaf) => {
                let ((m, columns), bytes) = (leaf.shape(), leaf.encode_positions());
                let shape = vec![m, leaf.pattern().position_bytes(columns)];
                Node::NmSparse {
                    n: leaf.pattern().n(),
                    m: leaf.pattern().m(),
                    columns,
                    positions: self.push(name, next, DType::U8, shape, bytes),
                    values: self.dense(name, next, leaf.values())?,
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

    fn indices(&mut self, name: &str, next: &mut usize, set: &IndexSet) -> String {
        let (dtype, count, bytes) = set.encode();
        self.push(name, next, dtype, vec![count], bytes)
    }
}

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
}

/// Deeper trees than this are refused: no method writes them, only a hostile file would.
const DEPTH: usize = 32;

impl<'s, S: Source, T: Real> Decoder<'s, S, T> {
    /// A decoder over a source of tensors.
    pub fn new(source: &'s S) -> Self {
        Decoder { source, shared: HashMap::new() }
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
                Operator::Interpolative(Interpolative::new(*side, pivots, self.dense(coefficients)?)?)
            }
            Node::Basis { kind, side, len, indices } => {
                Operator::Basis(Basis::new(*kind, *side, self.indices(indices, *len)?)?)
            }
            Node::NmSparse { n, m, columns, positions, values } => {
                let (pattern, values) = (Nm::new(*n, *m)?, self.dense(values)?);
                let (_, bytes) = self.bytes(positions)?;
                let leaf = NmSparse::decode(pattern, *columns, bytes, values);
                Operator::NmSparse(leaf.map_err(|e| e.of_tensor(positions))?)
            }
            Node::Bitmask { columns, mask, values } => {
                let (rows, bytes) = self.bytes(mask)?;
                let leaf = Bitmask::decode((rows, *columns), bytes, self.dense(values)?);
                Operator::Bitmask(leaf.map_err(|e| e.of_tensor(mask))?)
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
        let read = || {
            let stored = self.source.tensor(name)?;
            let values = stored.matrix::<T>()?.into_owned();
            // f64 factors read as f32 are rounded here; half types are exact in both.
            let dtype = if stored.dtype == DType::F64 { T::DTYPE } else { stored.dtype };
            Dense::rounded(values, dtype)
        };
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

    fn indices(&self, name: &str, len: usize) -> Result<IndexSet> {
        let read = || {
            let stored = self.source.tensor(name)?;
            IndexSet::decode(len, stored.dtype, stored.bytes)
        };
        read().map_err(|e| e.of_tensor(name))
    }
}
