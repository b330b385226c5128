//! Block-sparse attention: which blocks of the score matrix are computed, and who decides it.
//!
//! - [`BlockMap`]: a flag for each block of queries and block of keys of each head; [`BlockLists`]: the same as lists
//!   of key blocks; [`PaddedBlocks`]: sequences that are padded block by block;
//! - [`Predictor`]: predicts a map from queries and keys, as SpargeAttn, SLA, VSA and Sol-Attn do; [`Select`]: how many
//!   blocks it chooses; [`ExpectedDensity`]: how many that is, without tensors; [`PooledBlocks`], [`mean_of_blocks`], [`sum()`] and [`weight()`]: its arithmetic, step by step;
//! - [`PvFilter`] and [`filtered`]: attention that skips the P·V of tiles with little weight; [`pooled_tail`]
//!   and [`with_pooled_tail`]: attention in which the blocks left out count with their means.
//!
//! Like quantisers, predictors compute in single precision, operation by operation as kernels do, so that a kernel can
//! be compared bit for bit.

mod arithmetic;
mod density;
mod grid;
mod lists;
mod map;
mod padded;
mod per_head;
mod pooled;
mod pooled_tail;
mod predictor;
mod pv_filter;
mod select;

pub use arithmetic::{EXP2, sum, weight};
pub use density::ExpectedDensity;
pub use lists::BlockLists;
pub use map::BlockMap;
pub use padded::PaddedBlocks;
pub use per_head::PerHead;
pub use pooled::{PooledBlocks, mean_of_blocks};
pub use pooled_tail::{pooled_tail, with_pooled_tail};
pub use predictor::{Predictor, stand_in_values};
pub use pv_filter::{Filtered, PvFilter, filtered};
pub use select::Select;
