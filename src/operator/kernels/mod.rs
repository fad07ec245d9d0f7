//! Products of structured leaves with many vectors.

mod blocks;

pub(crate) use self::blocks::block_product;
