//! Residuals between rounds, in the bytes that a file would hold: of bf16 weights half of what they take as numbers.

use crate::error::Result;
use crate::operator::Operator;
use crate::operator::codec::{Decoder, Encoder, NamedTensor, Node};
use crate::scalar::Real;

/// An operator as the file will have it.
#[derive(Debug)]
pub(super) struct Held {
    node: Node,
    tensors: Vec<NamedTensor>,
}

impl Held {
    pub(super) fn new<T: Real>(operator: &Operator<T>) -> Result<Self> {
        let mut encoder = Encoder::new();
        let node = encoder.encode("residual", operator)?;
        Ok(Held { node, tensors: encoder.into_tensors() })
    }

    /// The same operator: what a leaf holds is what its dtype can.
    pub(super) fn operator<T: Real>(&self) -> Result<Operator<T>> {
        Decoder::new(&self.tensors).decode(&self.node)
    }
}
