//! Statistics that run ahead of what needs them, in the same launch.
//!
//! A head of a sequence has two blocks for each tile. The first collects: it contributes its tile's columns, and the
//! last such block of the head combines them. The second quantises, once the head's statistics are written. Blocks
//! start in the order of their indices, first along x. The blocks of number `i` ([`crate::grid`]) are, `lead` being a
//! parameter:
//!
//! | blocks along x | collect | quantise |
//! | --- | --- | --- |
//! | first half | tiles of head `i` | |
//! | second half | | tiles of head `i − lead` |
//!
//! Blocks that collect wait for nobody, and all of a head's come before any block that waits for them: whatever the
//! device holds at once, nothing waits forever. With a lead of more blocks than the device holds hardly any block waits
//! at all, and with one that the L2 cache holds the second read of a tile costs no memory bandwidth.

use sage_ptx::{Code, Val};

use super::tile_load::Head;
use crate::grid::{self, BlockHead};
use crate::sequence::{KEY_TILE, Lengths};

/// Blocks along x, y and z, with statistics `lead` heads ahead: the last heads are quantised when there is nothing left
/// to collect.
pub(super) fn grid(max_kv_len: usize, kv_heads: usize, sequences: usize, lead: usize) -> [u32; 3] {
    let tiles = max_kv_len.div_ceil(KEY_TILE).max(1);
    grid::grid(2 * tiles, kv_heads * sequences + lead)
}

/// What a block does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work<'k> {
    /// Whether it collects; otherwise it quantises.
    pub collects: Val<'k, bool>,
    pub sequence: Val<'k, i32>,
    pub head: Val<'k, i32>,
    pub tile: Val<'k, i32>,
    /// Tiles of each head, where those that are collected have a block each.
    in_grid: Option<Val<'k, i32>>,
}

impl<'k> Work<'k> {
    /// The block's work in such a grid. Blocks without work end.
    #[track_caller]
    pub fn new(code: &'k Code, kv_heads: Val<'k, i32>, sequences: Val<'k, i32>, lead: Val<'k, i32>) -> Self {
        let ([x, ..], [blocks, ..]) = (code.block_index(), code.grid());
        let tiles = blocks >> 1;
        let collects = x.lt(tiles).named("collects");
        let position = (grid::number(code) - collects.select(0, lead)).named("position");
        code.exit_when(position.lt(0) | position.ge(kv_heads * sequences));
        let BlockHead { sequence, head } = BlockHead::of(position, kv_heads);
        let tile = collects.select(x, x - tiles).named("tile");
        Work { collects, sequence, head, tile, in_grid: Some(tiles) }
    }

    /// The head's tiles that some block collects. Lengths in device memory may exceed the longest that the grid was
    /// made for: what has no block never comes, and must not be waited for.
    #[track_caller]
    pub fn collected_tiles(&self, head: &Head<'k>) -> Val<'k, i32> {
        match (head.source.lengths, self.in_grid) {
            (Lengths::Packed, Some(in_grid)) => head.tiles().min(in_grid),
            _ => head.tiles(),
        }
    }

    /// A block for each tile of the grid, without statistics.
    #[track_caller]
    pub fn quantise_only(code: &'k Code, kv_heads: Val<'k, i32>, sequences: Val<'k, i32>) -> Self {
        let [tile, ..] = code.block_index();
        let BlockHead { sequence, head } = BlockHead::new(code, kv_heads, kv_heads * sequences);
        Work { collects: code.constant(false), sequence, head, tile, in_grid: None }
    }
}
