//! Products of structured leaves with many vectors.

mod blocks;
mod turn;
mod two_four;

pub(crate) use self::blocks::{Job, block_product};
pub(crate) use self::two_four::TwoFour;
