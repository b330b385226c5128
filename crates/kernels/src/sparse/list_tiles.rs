//! Lists of the tiles of keys that each tile of queries is multiplied with.

use sage_ptx::{Code, Global, Program, Val, Var, kernel};

use super::{ALL, CLASS_ROWS, NONE};
use crate::attention::{Band, CLEARED_TILE, CUT_TILE, ENTRIES_BEHIND, MASKED_TILE};
use crate::grid::{BlockHead, grid};
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::preprocess::SeenKeys;
use crate::sequence::{KEY_TILE, Lengths, Sequence};

/// Lists that a block makes, one a warp.
const WARPS: usize = 4;

/// Tiles that a lane looks at side by side.
const IN_FLIGHT: usize = 4;

/// Lanes of a warp.
const LANES: i32 = 32;

/// Lists the tiles of [`tile_keys`](Self::tile_keys) keys that some of [`block_q`](Self::block_q) queries see, in
/// order, each with [`CUT_TILE`], [`MASKED_TILE`] and [`CLEARED_TILE`] where these are so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListTilesConfig {
    /// Queries of a tile.
    pub block_q: usize,
    /// Keys of a tile.
    pub tile_keys: usize,
    /// Whether there are classes of a mask.
    pub classes: bool,
    /// Whether there is a block mask whose blocks are made of whole tiles.
    pub blocks: bool,
    /// Where the lengths of sequences come from.
    pub lengths: Lengths,
    /// Whether there is an explicit mask, which counts keys from the tensors' first.
    pub masked: bool,
    /// Whether values are read as given, whose rows that no query sees are to be cleared.
    pub clears: bool,
}

kernel_params! {
    /// What a launch of [`ListTilesConfig`] passes. Strides are in elements.
    ListTilesParams, ListTilesArgs {
        /// Classes of [`PackMaskConfig`](super::PackMaskConfig).
        classes: [u8],
        /// Classes from one sequence to the next.
        class_stride_sequence: i64,
        /// Classes from one head to the next.
        class_stride_head: i64,
        /// Classes from one tile of rows to the next: 0 where all rows have the same mask.
        class_stride_rows: i32,
        /// Which keys of a tile some query sees, [`SeenKeysConfig`](crate::preprocess::SeenKeysConfig).
        seen: [u32],
        /// Tiles from one sequence's words of seen keys to the next.
        seen_stride_sequence: i32,
        /// Tiles from one key head's words of seen keys to the next.
        seen_stride_head: i32,
        /// Query heads that share a key head.
        group_size: i32,
        /// Bytes of a block mask, `[batch, heads, blocks of queries, blocks of keys]`.
        blocks: (tensor 4),
        /// Tiles of queries of a block of the block mask.
        blocks_q: i32,
        /// Tiles of keys of a block of the block mask.
        blocks_k: i32,
        /// Which rows are a sequence's, and which keys they see.
        lengths: lengths,
        /// Tiles of queries.
        q_tiles: i32,
        /// Heads of a sequence with a list of their own.
        heads: i32,
        /// Such heads of all sequences with lists of their own.
        all_heads: i32,
        /// Tiles of each list, `[all_heads][q_tiles]`.
        tile_counts: [i32],
        /// The lists, `[all_heads][q_tiles][list_stride]`, each with [`ENTRIES_BEHIND`] entries behind it.
        tile_lists: [u32],
        /// Entries from one list to the next.
        list_stride: i32,
    }
}

impl ListTilesConfig {
    /// Blocks along x, y and z.
    pub fn grid(&self, q_tiles: usize, all_heads: usize) -> [u32; 3] {
        grid(q_tiles.div_ceil(WARPS), all_heads)
    }

    fn write<'k>(&self, code: &'k Code) {
        let p = ListTilesParams::declare(code);
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.all_heads);
        let lane = code.lane_index();
        let [x, ..] = code.block_index();
        let q_tile = x * WARPS as i32 + code.warp_index();
        code.exit_when(q_tile.ge(p.q_tiles));
        let sequence = Sequence::new(code, self.lengths, self.masked, &p.lengths, index);
        let band = Band::new(&p.lengths, &sequence);
        let (block_q, tile_keys) = (self.block_q as i32, self.tile_keys as i32);
        let first_row = q_tile * block_q;
        let last_row = band.last_row(first_row, block_q);
        // The keys that some row sees, and those that every row sees.
        let (some_start, some_end) = (band.start(first_row), band.end(last_row));
        let (all_start, all_end) = (band.start(last_row), band.end(first_row));
        let tiles = sequence.kv_len.div_ceil(self.tile_keys);

        let blocks = p
            .blocks
            .start
            .at(p.blocks.head(index, head) + (q_tile / p.blocks_q).widen() * p.blocks.row_stride());
        let classes =
            p.classes.at(index.widen() * p.class_stride_sequence + head.widen() * p.class_stride_head);
        let row_classes: Vec<_> = (0..self.block_q.div_ceil(CLASS_ROWS) as i32)
            .map(|part| {
                // A tile of fewer rows than a class has is one of its parts.
                let row = (first_row + part * CLASS_ROWS as i32).min(sequence.q_len - 1);
                classes.at((row / CLASS_ROWS as i32).mul_wide(p.class_stride_rows))
            })
            .collect();
        let seen_keys = self.clears.then(|| {
            let first = index * p.seen_stride_sequence + head / p.group_size * p.seen_stride_head;
            SeenKeys::new(p.seen, first)
        });
        // Whether a tile is seen at all, and whether as a whole.
        let look = |tile: Val<'k, i32>| {
            let (start, end) = (tile * tile_keys, (tile + 1) * tile_keys);
            let seen = tile.lt(tiles) & end.gt(some_start) & start.lt(some_end);
            let whole = start.ge(all_start) & end.le(all_end);
            // What is beyond the last tile is read there.
            let there = tile.min(tiles - 1).max(0);
            let in_block =
                self.blocks.then(|| blocks.at((there / p.blocks_k).widen() * p.blocks.key_stride()).load());
            let mut classes = Vec::new();
            if self.classes {
                let last = (p.lengths.kv_rows.div_ceil(KEY_TILE) - 1).max(0);
                for part in 0..self.tile_keys.div_ceil(KEY_TILE) as i32 {
                    let class = (there * tile_keys / KEY_TILE as i32 + part).min(last);
                    classes.extend(row_classes.iter().map(|row| row.at(class).load()));
                }
            }
            // Whether each of its keys is one, and some query sees it.
            let keys = seen_keys.map(|seen| {
                let last = sequence.kv_len.div_ceil(KEY_TILE) - 1;
                let parts = (0..self.tile_keys.div_ceil(KEY_TILE) as i32).map(|part| {
                    let part = there * tile_keys / KEY_TILE as i32 + part;
                    part.le(last) & seen.tile(part.min(last).max(0)).all_visible()
                });
                parts.reduce(|a, b| a & b).unwrap_or(code.constant(true))
            });
            (tile, seen, whole, in_block, classes, keys)
        };

        let list = ((index * p.heads + head) * p.q_tiles + q_tile).named("list");
        let written = List::new(lane, p.tile_lists.at(list.mul_wide(p.list_stride)));
        let (first, last) =
            (some_start.max(0) / tile_keys, some_end.max(0).div_ceil(self.tile_keys).min(tiles));
        code.range_by(first, last, LANES * IN_FLIGHT as i32, |base| {
            let looks: Vec<_> = (0..IN_FLIGHT as i32).map(|i| look(base + (lane + LANES * i))).collect();
            for (tile, seen, whole, in_block, classes, keys) in looks {
                let in_block = in_block.map_or(code.constant(true), |byte| byte.ne(0u32));
                let some = classes.iter().map(|class| class.ne(NONE)).reduce(|a, b| a | b);
                let all = classes.iter().map(|class| class.eq(ALL)).reduce(|a, b| a & b);
                let kept = seen & in_block & some.unwrap_or(code.constant(true));
                written.add(kept, || {
                    let cut = whole.select(0u32, CUT_TILE);
                    let masked = all.map_or(code.constant(0u32), |all| all.select(0u32, MASKED_TILE));
                    let cleared = keys.map_or(code.constant(0u32), |all| all.select(0u32, CLEARED_TILE));
                    tile.reinterpret::<u32>() | cut | masked | cleared
                });
            }
        });
        written.end(|| p.tile_counts.at(list));
    }
}

/// A list that a warp writes.
pub(super) struct List<'k> {
    lane: Val<'k, i32>,
    entries: Global<'k, u32>,
    count: Var<'k, i32>,
}

impl<'k> List<'k> {
    /// One without entries, which go to `entries`.
    pub fn new(lane: Val<'k, i32>, entries: Global<'k, u32>) -> Self {
        List { lane, entries, count: lane.code().var(0i32).named("count") }
    }

    /// Adds the entries of those lanes whose tile is `kept`, in the order of the lanes.
    pub fn add(&self, kept: Val<'k, bool>, entry: impl FnOnce() -> Val<'k, u32>) {
        let List { lane, entries, count } = *self;
        let code = lane.code();
        let votes = code.ballot(kept);
        let before = (votes & ((code.constant(1u32) << lane) - 1u32)).count_ones();
        let entry = entry();
        code.when(kept, || entries.at(count.get() + before).store(entry));
        count.set(count.get() + votes.count_ones());
    }

    /// Writes the entries behind the last one and, where `number` says, how many tiles there are.
    pub fn end(&self, number: impl FnOnce() -> Global<'k, i32>) {
        let List { lane, entries, count } = *self;
        let code = lane.code();
        let behind = lane.lt(ENTRIES_BEHIND as i32);
        code.when(behind, || entries.at(count.get() + lane).store(0u32));
        code.when(lane.eq(0), || number().store(count.get()));
    }
}

impl Kernel for ListTilesConfig {
    fn name(&self) -> String {
        let ListTilesConfig { block_q, tile_keys, classes, blocks, lengths, masked, clears } = *self;
        let mut name = format!("list_tiles_{block_q}x{tile_keys}");
        for (on, part) in
            [(classes, "_classes"), (blocks, "_blocks"), (masked, "_masked"), (clears, "_clears")]
        {
            if on {
                name += part;
            }
        }
        name + lengths.suffix()
    }

    fn description(&self) -> String {
        let sources = match (self.classes, self.blocks) {
            (true, true) => "classes of a mask and a block mask",
            (true, false) => "classes of a mask",
            (false, true) => "a block mask",
            (false, false) => "the band",
        };
        let (rows, keys) = (self.block_q, self.tile_keys);
        format!(
            "lists of tiles of {rows} queries and {keys} keys, by {sources}{}",
            self.lengths.description()
        )
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), (WARPS * 32) as u32, |code| self.write(code))
    }
}
