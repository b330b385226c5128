//! Pooled terms for the blocks that a block mask leaves out, [`sage_core::sparse::pooled_tail`]: a last step after
//! attention over the blocks that are kept, whatever kernels and scheme computed that.
//!
//! ```text
//! K, V ──pool_blocks──> means of blocks ─┐
//! Q, map ────────────────────────────────┴─pooled_tail──> output and log-sum-exp, in place of those without
//! ```
//!
//! The means of a head are some hundred keys, which are multiplied in 16 bits; the score of a block that is kept is −∞,
//! and that of another has the logarithm of its number of keys added. Nothing of the size of scores is written.

mod cut_blocks;
mod kernel;
mod merge;
mod rows;
mod tiles;

pub use kernel::{PooledTailArgs, PooledTailConfig};
