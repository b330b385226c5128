//! Kernels that prepare K and V for attention: means, scales, quantised tiles.
//!
//! Tiles are of 64 rows ([`crate::KEY_TILE`]). With `T` = [`crate::total_key_tiles`] and `P` = [`Source::padded_dim`],
//! the workspace holds
//!
//! | what | layout |
//! | --- | --- |
//! | INT8 K | `[kv_heads][T][64][P]` |
//! | INT4 K | `[kv_heads][T][64][P/2]`, even channels in the low nibbles |
//! | scales of K | f32 `[kv_heads][T][groups]`, [`QuantizeKConfig::groups`] |
//! | E4M3 V | `[kv_heads][T][P][64]`, tokens in the order of `sage_core::oracle::v_token_slot` |
//! | 16-bit V | `[kv_heads][T][64][P]` |
//! | means, scales and factors of channels | f32 `[sequences][heads][P]` |
//!
//! Every byte of a tile that belongs to a sequence is written: zeros where the sequence has no row or the head no
//! channel.
//!
//! A kernel that needs statistics of whole columns can compute them itself (`Fused`): its blocks keep their tiles on
//! chip and wait for the last block of their head to combine the columns, so that the tensor is read once. That needs
//! the blocks of a head to be resident together ([`fits_fused`]); where they may not be, a launch of
//! [`ColumnStatisticsConfig`] comes first.

mod column_statistics;
mod convert_v;
mod delta_s;
mod groups;
mod quantize_k;
mod quantize_v;
mod query_means;
mod statistics;
mod tile_load;

pub use column_statistics::{ColumnStatisticsArgs, ColumnStatisticsConfig};
pub use convert_v::{ConvertVArgs, ConvertVConfig};
pub use delta_s::{DeltaSArgs, DeltaSConfig};
pub use quantize_k::{KMean, QuantizeKArgs, QuantizeKConfig};
pub use quantize_v::{QuantizeVArgs, QuantizeVConfig};
pub use query_means::{QueryMeansArgs, QueryMeansConfig};
pub use statistics::ColumnStatistics;
pub use tile_load::Source;

/// Whether the blocks of a head may wait for each other: the hardware starts blocks in the order of their indices, so
/// they do not wait forever when all of them fit the device at once. A quarter leaves room for heads that overlap and
/// for other work on the device.
pub const fn fits_fused(blocks_per_head: usize, resident_blocks: usize) -> bool {
    blocks_per_head.saturating_mul(4) <= resident_blocks
}
