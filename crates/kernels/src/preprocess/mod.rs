//! Kernels that prepare K and V for attention: means, scales, quantised tiles.
//!
//! Tiles are of 64 rows ([`crate::KEY_TILE`]). With `T` = [`crate::total_key_tiles`], `P` = [`Source::padded_dim`], and
//! `C` = P or, of more than 128 channels, the next multiple of 64, the workspace holds
//!
//! | what | layout |
//! | --- | --- |
//! | INT8 K | `[kv_heads][T][64][C]` |
//! | INT4 K | `[kv_heads][T][64][C/2]`, even channels in the low nibbles |
//! | FP4 K | `[kv_heads][T][64][P/2]`, even channels in the low nibbles, keys in their [`KeyOrder`](crate::KeyOrder); behind a tile its scales, 4P bytes |
//! | scales of K | f32 `[kv_heads][T][groups]`, [`QuantizeKConfig::groups`] |
//! | E4M3 V | `[kv_heads][T][C][64]`, tokens in the order of `sage_core::oracle::v_token_slot` |
//! | FP4 V | `[kv_heads][T][P][32]`, even tokens in the low nibbles; behind a tile its scales, 4P bytes |
//! | 16-bit V | `[kv_heads][T][64][C]` |
//! | means, scales and factors of channels | f32 `[sequences][heads][P]` |
//! | keys that count and keys that are visible | u32 `[sequences][kv_heads][tiles + 1][4]`, [`SeenKeysConfig`] |
//! | how many keys before a tile count | i32 `[sequences][kv_heads][tiles + 1]`, [`RankKeysConfig`] |
//!
//! Every byte of a tile that belongs to a sequence is written: zeros where the sequence has no row or the head no
//! channel, and in rows that an explicit mask hides from every query.
//!
//! A kernel that needs statistics of whole columns computes them itself: in its launch they run a few heads ahead of
//! the blocks that need them, so that hardly any block waits, and tiles are read again from the L2 cache. Statistics of
//! a few rows take a launch of their own.

mod ahead;
mod convert_v;
mod delta_s;
mod groups;
mod input;
mod quantize_fp4_k;
mod quantize_fp4_v;
mod quantize_k;
mod quantize_v;
mod query_means;
mod sample;
mod seen;
mod smoothed_keys;
mod statistics;
mod tile_load;

pub use convert_v::{ConvertVArgs, ConvertVConfig};
pub use delta_s::{DeltaSArgs, DeltaSConfig};
pub(crate) use groups::groups_of_tile;
pub use input::InputArgs;
pub(crate) use input::InputParams;
pub use quantize_fp4_k::{QuantizeFp4KArgs, QuantizeFp4KConfig};
pub use quantize_fp4_v::{QuantizeFp4VArgs, QuantizeFp4VConfig};
pub use quantize_k::{QuantizeKArgs, QuantizeKConfig};
pub use quantize_v::{QuantizeVArgs, QuantizeVConfig, ValueScales};
pub use query_means::{QueryMeansArgs, QueryMeansConfig};
pub use sample::{SampleArgs, SampleConfig};
pub(crate) use seen::SeenKeys;
pub(crate) use seen::counts_and_is_visible;
pub use seen::{RankKeysArgs, RankKeysConfig, SEEN_WORDS, SeenKeysArgs, SeenKeysConfig};
pub use smoothed_keys::KeyMean;
pub use statistics::ColumnStatistics;
pub use tile_load::Source;
pub(crate) use tile_load::{CHUNK, Head, MOST_CHANNELS, ROWS, Rows};
