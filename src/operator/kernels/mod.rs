//! Products of structured leaves with many vectors.

mod aligned;
mod bit_mask;
mod blocks;
mod codes;
#[cfg(target_arch = "x86_64")]
mod cutting;
#[cfg(target_arch = "x86_64")]
mod halves;
#[cfg(target_arch = "x86_64")]
mod kept;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod turn;
mod two_four;

pub(crate) use self::aligned::Aligned;
pub(crate) use self::bit_mask::MaskedRow;
pub(crate) use self::blocks::{Job, Output, Stretch, block_product, stretch_product, stretches};
pub use self::codes::ActivationBits;
pub(crate) use self::codes::{Beside, CodedRow, CodedRows, Inputs, PackedCodes, each_code, pack, width};
#[cfg(target_arch = "x86_64")]
pub(crate) use self::halves::product as by_tiles;
pub(crate) use self::two_four::TwoFour;
