//! Block-sparse attention: which blocks of the score matrix are computed, and who decides it.
//!
//! - [`BlockMap`]: a flag for each block of queries and block of keys of each head; [`BlockLists`]: the same as lists
//!   of key blocks; [`PaddedBlocks`]: sequences that are padded block by block.

mod grid;
mod lists;
mod map;
mod padded;

pub use lists::BlockLists;
pub use map::BlockMap;
pub use padded::PaddedBlocks;
