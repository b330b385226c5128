//! Predicting block maps: what [`sage_core::sparse::Predictor`] computes, bit for bit.
//!
//! ```text
//! K ──sum_blocks──> sums of blocks ──mean_of_blocks──> mean of K      (only where K is smoothed)
//! Q, K ──pool_blocks──> mean and similarity of each block ──score_blocks──> scores ──choose_blocks──> map
//! ```
//!
//! The map is bytes `[batch, num_q_heads, q_blocks, k_blocks]`, 1 for a block that is kept, which
//! [`ListTilesConfig`](crate::sparse::ListTilesConfig) reads as a block mask. Packed sequences are entries of that batch,
//! each with as many blocks as the longest has: kernels find a sequence's rows by the boundaries in device memory, so that
//! nothing waits for them, and blocks behind its own end have no tokens. With `P` = [`Source::padded_dim`], the workspace
//! holds, in single precision,
//!
//! | what | layout |
//! | --- | --- |
//! | sums of the blocks of K | `[batch][kv_heads][k_blocks][P]` |
//! | mean of K | `[batch][kv_heads][P]` |
//! | means of blocks | `[batch][heads][blocks][P]`, rounded to the tensor's element type |
//! | similarities of blocks | `[batch][heads][blocks]` |
//! | scores of some rows of blocks of all heads | `[batch][q_heads][rows][k_blocks]`, rows padded to whole vectors |
//!
//! Sums follow [`sage_core::sparse::sum()`]: eight terms by one thread, then halves upon halves (`fold.rs`).
//!
//! [`Source::padded_dim`]: crate::preprocess::Source::padded_dim

mod choose_blocks;
mod columns;
mod fold;
mod mean_of_blocks;
mod pass;
mod per_head;
mod pool_blocks;
mod row;
mod score_blocks;
mod selection;
mod sum_blocks;
mod tokens;
mod weight;

pub use choose_blocks::{Choice, ChooseBlocksArgs, ChooseBlocksConfig};
pub use columns::TokenBlocks;
pub use mean_of_blocks::{MeanOfBlocksArgs, MeanOfBlocksConfig};
pub use pass::{PredictCall, PredictTensors};
pub use per_head::PerHeadArg;
pub(crate) use per_head::PerHeadParam;
pub use pool_blocks::{PoolBlocksArgs, PoolBlocksConfig};
pub use score_blocks::{ScoreBlocksArgs, ScoreBlocksConfig};
pub use sum_blocks::{SumBlocksArgs, SumBlocksConfig};
pub(crate) use tokens::TokensParams;
pub use tokens::{LengthLists, TokensArgs};
