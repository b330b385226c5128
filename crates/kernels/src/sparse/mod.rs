//! Which tiles of keys are multiplied at all: lists of them for each tile of queries, made on the GPU from block masks
//! and explicit masks.
//!
//! ```text
//! explicit mask ──pack_mask──> words of a lane's scores, and the class of each 64 × 64: none, some, all ─┐
//! block mask, band, lengths ─────────────────────────────────────────────────────────────────────────────┴─> lists
//! ```
//!
//! A mask of keys alone, such as padding, takes one launch for all of that: [`KeyMaskConfig`].
//!
//! A list has the tiles that some row sees, in order. Those that every row sees wholly pay for no mask in the attention
//! kernel; the others are marked: those that the band or the end of the keys cuts, where it compares with both, and
//! those that a mask hides or changes some scores of, where it reads the mask. Nothing returns to the host in between.

mod key_mask;
mod list_tiles;
mod mask_strip;
mod mask_words;
mod pack_mask;

pub(crate) use key_mask::MOST_KEYS;
pub use key_mask::{KeyMaskArgs, KeyMaskConfig};
pub use list_tiles::{ListTilesArgs, ListTilesConfig};
pub use mask_words::Packing;
pub(crate) use mask_words::{
    LaneBits, LaneWords, MaskWords, STRIP_ROWS, STRIPS, StagedWords, VECTOR, element,
};
pub use pack_mask::{MaskAccess, PackMaskArgs, PackMaskConfig};

/// Query rows, and keys, of the scores that have a class of their own.
pub const CLASS_ROWS: usize = 64;

/// Class of scores that a mask hides all.
pub(crate) const NONE: u32 = 0;
/// Class of scores of which a mask hides some, or adds to some.
pub(crate) const SOME: u32 = 1;
/// Class of scores that a mask leaves as they are.
pub(crate) const ALL: u32 = 2;
