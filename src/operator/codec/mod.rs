//! Operators ⇄ named tensors and a JSON tree: the only place that knows how a node is stored.
//!
//! A weight `w` becomes tensors `w.0`, `w.1`, … and a [`Node`] tree that says how they combine; the
//! tree goes into the file's metadata. `docs/format.md` describes it for other programs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

#[cfg(doc)]
use super::Operator;
use super::Side;
use crate::linalg::Transform;
use crate::scalar::DType;

mod decode;
mod encode;

pub use self::decode::{Decoder, Source};
pub use self::encode::Encoder;

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
        /// T: the name of a matrix, or a node.
        coefficients: Coefficients,
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
    /// [`Operator::BlockDiagonal`].
    BlockDiagonal {
        /// The blocks: blocks × rows × columns if they are alike, else their values one after the other; or codes.
        tensor: Values,
        /// If they are not alike, or codes, their rows and columns.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        extents: Option<Extents>,
    },
    /// [`Operator::Permutation`] by its list.
    Permutation {
        /// n.
        columns: usize,
        /// For each row the column of its 1, or n: U16 or U32.
        list: String,
    },
    /// [`Operator::Permutation`] as the transpose of a grid of runs.
    Grid {
        /// (m, n): padded or cropped to this.
        shape: (usize, usize),
        /// Rows of the grid that is read.
        rows: usize,
        /// Columns of the grid that is read.
        columns: usize,
        /// Length of all runs, or the tensor of their lengths: U16, rows × columns.
        run: Run,
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
        /// The values, rows × values of a row; or codes.
        values: Values,
    },
    /// [`Operator::Bitmask`].
    Bitmask {
        /// The number of columns.
        columns: usize,
        /// The mask, rows × ⌈columns/8⌉ U8.
        mask: String,
        /// The values, 1 × their number; or codes.
        values: Values,
    },
    /// [`Operator::Mixture`].
    Mixture {
        /// 1 × atoms.
        coefficients: String,
        /// As many nodes.
        atoms: Vec<Node>,
    },
    /// [`Operator::Quantized`].
    Quantized {
        /// Bits of a code, 2 to 8.
        bits: u8,
        /// Columns that share a scale.
        group: usize,
        /// The number of columns.
        columns: usize,
        /// The packed codes, rows × ⌈columns·bits/8⌉ U8.
        codes: String,
        /// The scales, rows × groups.
        scales: String,
        /// The packed zero points, rows × ⌈groups·bits/8⌉ U8, or as floats, rows × groups, the numbers of the
        /// middle code; without them 2^(bits−1) everywhere.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        zeros: Option<String>,
    },
    /// [`Operator::Stacked`].
    Stacked {
        /// The part of each row, a stream of ⌈log₂ parts⌉ bits for each: U8.
        places: String,
        /// The parts.
        parts: Vec<Node>,
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

/// What a sparse node stores.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Values {
    /// The tensor that holds the values.
    Tensor(String),
    /// Their codes.
    Codes(Codes),
}

/// Codes of what rows store, on a grid of all columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Codes {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Columns that share a scale.
    pub group: usize,
    /// The packed codes of all rows, each row ended on a whole byte: U8.
    pub codes: String,
    /// The scales, rows × groups.
    pub scales: String,
    /// The zero points, as in [`Node::Quantized`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zeros: Option<String>,
}

/// The rows and columns of the blocks of a [`Node::BlockDiagonal`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Extents {
    /// The tensor that holds them: U32, blocks × 2.
    Table(String),
    /// (blocks, rows, columns), all alike.
    Alike([usize; 3]),
}

/// The length of the runs of a [`Node::Grid`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Run {
    /// One for all.
    Uniform(usize),
    /// The name of a table.
    Table(String),
}

/// The coefficients of a [`Node::Interpolative`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Coefficients {
    /// The tensor that holds them.
    Tensor(String),
    /// The operator that they are.
    Node(Box<Node>),
}
