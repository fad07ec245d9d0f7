//! Products of structured leaves with many vectors.

mod bit_mask;
mod blocks;
mod codes;
mod turn;
mod two_four;

pub(crate) use self::bit_mask::MaskedRow;
pub(crate) use self::blocks::{Job, Output, Stretch, block_product, stretch_product, stretches};
pub(crate) use self::codes::{Beside, CodedRow, CodedRows, Inputs, PackedCodes, each_code, pack, width};
pub(crate) use self::two_four::TwoFour;
