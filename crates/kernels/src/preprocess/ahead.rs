//! Statistics that run ahead of what needs them, in the same launch.
//!
//! A head of a sequence has two blocks for each tile. The first collects: it contributes its tile's columns, and the
//! last such block of the head combines them. The second quantises, once the head's statistics are written. Blocks
//! start in the order of their indices, first along x. The blocks of position `i` along y are, `lead` being a parameter:
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

use crate::sequence::KEY_TILE;

/// Most blocks along y; further positions are along z.
const MAX_Y: usize = 65535;

/// Blocks along x, y and z, with statistics `lead` heads ahead: the last heads are quantised when there is nothing left
/// to collect.
pub(super) fn grid(max_kv_len: usize, kv_heads: usize, sequences: usize, lead: usize) -> [u32; 3] {
    let tiles = max_kv_len.div_ceil(KEY_TILE).max(1);
    let positions = kv_heads * sequences + lead;
    let blocks = [2 * tiles, positions.min(MAX_Y), positions.div_ceil(MAX_Y)];
    // What no launch allows is refused there.
    blocks.map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX))
}

/// What a block does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work<'k> {
    /// Whether it collects; otherwise it quantises.
    pub collects: Val<'k, bool>,
    pub sequence: Val<'k, i32>,
    pub head: Val<'k, i32>,
    pub tile: Val<'k, i32>,
}

impl<'k> Work<'k> {
    /// The block's work in such a grid. Blocks without work end.
    #[track_caller]
    pub fn new(code: &'k Code, kv_heads: Val<'k, i32>, sequences: Val<'k, i32>, lead: Val<'k, i32>) -> Self {
        let ([x, y, z], [blocks, positions, _]) = (code.block_index(), code.grid());
        let tiles = blocks >> 1;
        let collects = x.lt(tiles).named("collects");
        let position = (z * positions + y - collects.select(0, lead)).named("position");
        code.exit_when(position.lt(0) | position.ge(kv_heads * sequences));
        let sequence = (position.reinterpret::<u32>() / kv_heads.reinterpret::<u32>()).reinterpret::<i32>();
        Work {
            collects,
            sequence: sequence.named("sequence"),
            head: (position - sequence * kv_heads).named("head"),
            tile: collects.select(x, x - tiles).named("tile"),
        }
    }

    /// A block for each tile of the grid, without statistics.
    pub fn quantise_only(code: &'k Code) -> Self {
        let [tile, head, sequence] = code.block_index();
        Work { collects: code.constant(false), sequence, head, tile }
    }
}
