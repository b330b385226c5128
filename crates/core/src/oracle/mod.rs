//! What everything else is compared with: exact attention in double precision, each quantiser in plain scalar Rust,
//! and a scheme's attention built from them.
//!
//! Quantisers compute in single precision, operation by operation as kernels do, so that a kernel can be compared bit
//! for bit. They work on a [`Matrix`]: the rows of one head of one sequence. A group that holds a NaN or an infinity
//! has the scale NaN, so that results are NaN where it is used and never silently wrong.

mod cached;
mod exact;
mod fixed;
mod fp4;
mod fp8;
mod integer;
mod matrix;
mod output;
mod probabilities;
mod rotation;
mod scheme;
mod smoothing;
#[cfg(test)]
pub(crate) mod testing;
mod values;
mod visibility;

pub use cached::{CachedHead, cached};
pub use exact::{Score, exact};
pub(crate) use exact::{attend, maximum, row_scores, softcap};
pub use fixed::{FIXED12_MAX, Fixed12Blocks, fixed12_scale};
pub use fp4::{E2M1_MAX, Fp4Rows, e2m1_code, e2m1_value, k_token_of_row, scale_offset};
pub use fp8::{E4M3_MAX, E4M3_P_EXPONENT, Fp8Channels, LARGEST_FACTOR, round_e4m3, v_token_slot};
pub use integer::IntRows;
pub(crate) use matrix::dot;
pub use matrix::{Matrix, absmax};
pub use output::Output;
pub use probabilities::{Weights, quantize_p, quantize_p_by_tiles, quantize_p_per_token};
pub use rotation::{hadamard, hadamard_large};
pub use scheme::{scheme, scheme_by_tiles};
pub use smoothing::{block_means, key_mean, mean, mean_of_counted, subtract, subtract_block_means};
pub use values::{Int8Channels, quantize_v};
pub use visibility::{SeenKeys, visible_keys};
