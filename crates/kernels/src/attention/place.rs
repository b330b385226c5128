//! Which part of the problem a block computes.

use sage_ptx::{Code, SLOT_ROWS, Val, lane_row};

use super::config::{AttentionConfig, AttentionParams, Engine, MaskForm};
use crate::grid::BlockHead;
use crate::preprocess::SeenKeys;
use crate::sequence::{KEY_TILE, LengthParams, Lengths, Sequence};

/// A block's queries, and the tiles of keys that they see. Warpgroups share tiles, of which each computes those that
/// its own rows see: "group" is a warpgroup, or the whole block where there are none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'k> {
    pub sequence: Sequence<'k>,
    /// Index of the sequence, where packed ones differ from the batch.
    pub sequence_index: Val<'k, i32>,
    pub head: Val<'k, i32>,
    pub kv_head: Val<'k, i32>,
    /// The sequence's first key tile of this head in the workspace.
    pub first_key_tile: Val<'k, i32>,
    /// First query row of the warp.
    pub warp_row: Val<'k, i32>,
    pub warp: Val<'k, i32>,
    pub lane: Val<'k, i32>,
    /// What a key's index is compared with: `key ≤ row + diagonal + window_right`.
    diagonal: Val<'k, i32>,
    /// First and one past the last tile of keys that the block copies.
    pub copied_start: Val<'k, i32>,
    pub copied_end: Val<'k, i32>,
    /// First and one past the last tile of keys that the group computes.
    pub first_tile: Val<'k, i32>,
    pub end_tile: Val<'k, i32>,
    /// Tiles from `inner_start` to `inner_end` are wholly visible to every row of the group.
    pub inner_start: Val<'k, i32>,
    pub inner_end: Val<'k, i32>,
    /// Where a mask hides keys: those that some query sees.
    pub seen: Option<SeenKeys<'k>>,
    /// Index of the part of the keys, where they are split.
    pub split: Val<'k, i32>,
    /// Whether the sequence has no such queries.
    pub empty: Val<'k, bool>,
    window_left: Val<'k, i32>,
    window_right: Val<'k, i32>,
}

impl<'k> Place<'k> {
    /// Of the block, in the grid of [`AttentionConfig::pieces`]. The longest rows of a causal mask come first, so that
    /// the last blocks to start are short.
    pub fn of_block(code: &'k Code, config: &AttentionConfig, p: &AttentionParams<'k>) -> Self {
        let ([x, ..], [tiles, ..]) = (code.block_index(), code.grid());
        let heads = p.group_size * p.kv_heads;
        let BlockHead { sequence, head } = BlockHead::new(code, heads, p.all_heads);
        let thread = [code.warp_index(), code.lane_index()];
        let indices = [tiles - 1 - x, head, sequence, head / p.group_size];
        Place::new(config, p, thread, indices, || p.all_heads / heads)
    }

    /// Of a tile of queries, a head, one of `sequences`, which are those of all parts of the keys, and a key head.
    pub fn new(
        config: &AttentionConfig,
        p: &AttentionParams<'k>,
        [warp, lane]: [Val<'k, i32>; 2],
        [q_tile, head, z, kv_head]: [Val<'k, i32>; 4],
        sequences: impl FnOnce() -> Val<'k, i32>,
    ) -> Self {
        let code = lane.code();
        let (sequence_index, split) = if config.split {
            let sequences = sequences() / p.splits;
            (z % sequences, z / sequences)
        } else {
            (z, code.constant(0))
        };
        let lengths = LengthParams {
            q_rows: p.q_rows,
            kv_rows: p.kv_rows,
            cu_seqlens_q: p.cu_seqlens_q,
            cu_seqlens_k: p.cu_seqlens_k,
            window_left: p.window_left,
            window_right: p.window_right,
            bottom_right: p.bottom_right,
        };
        let masked = config.mask != MaskForm::None;
        let mut sequence = Sequence::new(code, config.lengths, masked, &lengths, sequence_index);
        if config.lengths == Lengths::Packed {
            // Lengths in device memory may exceed the longest that the caller spoke of: nobody has prepared such tiles.
            sequence.kv_len = sequence.kv_len.min(p.max_tiles * KEY_TILE as i32).named("kv_len");
        }

        let (block_q, tile_keys) = (config.block_q() as i32, config.tiling.tile_keys);
        let first_row = (q_tile * block_q).named("first_row");

        let aligned = p.bottom_right.ne(0).select(sequence.kv_len - sequence.q_len, 0);
        let diagonal = aligned.named("diagonal");
        let end_of = |row: Val<'k, i32>| (row + diagonal + p.window_right + 1).min(sequence.kv_len);
        let start_of = |row: Val<'k, i32>| (row + diagonal - p.window_left).max(0);
        let last_of = |first: Val<'k, i32>, rows: i32| (first + (rows - 1)).min(sequence.q_len - 1);
        let tile_of_start = |row: Val<'k, i32>| start_of(row).split_index(tile_keys).0;
        let tile_of_end = |row: Val<'k, i32>| end_of(row).max(0).div_ceil(tile_keys);

        let (start, end) = (tile_of_start(first_row), tile_of_end(last_of(first_row, block_q)));
        let (copied_start, copied_end) = if config.split {
            let each = (end - start).max(0);
            let each = (each + p.splits - 1) / p.splits;
            let start = start + each * split;
            (start, (start + each).min(end))
        } else {
            (start, end)
        };
        let (group_row, group_rows, first_tile, end_tile) = match config.tiling.engine {
            Engine::Warps => (first_row, block_q, copied_start, copied_end),
            Engine::Warpgroups => {
                let (row, rows) = (first_row + ((warp >> 2) << 6), 64);
                let end = tile_of_end(last_of(row, rows)).min(copied_end).max(copied_start);
                let start = tile_of_start(row).max(copied_start).min(end);
                (row, rows, start, row.lt(sequence.q_len).select(end, start))
            }
        };
        let last_row = last_of(group_row, group_rows);
        // The first row sees the least at the end, the last row at the start.
        let inner_start = start_of(last_row).div_ceil(tile_keys).max(first_tile).min(end_tile);
        let inner_end = (end_of(group_row) >> tile_keys.ilog2() as i32).min(end_tile).max(inner_start);
        let seen = masked.then(|| {
            let first = sequence_index * p.seen_stride_sequence + kv_head * p.seen_stride_head;
            SeenKeys::new(p.seen, first)
        });
        Place {
            seen,
            sequence,
            sequence_index,
            head,
            kv_head,
            first_key_tile: kv_head * p.key_tiles + sequence.first_tile,
            warp_row: first_row + warp * (config.tiling.rows_per_warp as i32),
            warp,
            lane,
            diagonal,
            copied_start: copied_start.named("copied_start"),
            copied_end: copied_end.named("copied_end"),
            first_tile: first_tile.named("first_tile"),
            end_tile: end_tile.named("end_tile"),
            inner_start: inner_start.named("inner_start"),
            inner_end: inner_end.named("inner_end"),
            split,
            empty: first_row.ge(sequence.q_len),
            window_left: p.window_left,
            window_right: p.window_right,
        }
    }

    /// The row of the sequence that the lane holds in slot `slot`.
    pub fn row(&self, slot: usize) -> Val<'k, i32> {
        self.warp_row + lane_row(self.lane) + (SLOT_ROWS * slot) as i32
    }

    /// Index of the row's block of `rows` queries among those of all heads: of the last one that has a mean, where
    /// lengths in device memory exceed the longest that the caller spoke of.
    pub fn query_block(&self, row: Val<'k, i32>, rows: usize, p: &AttentionParams<'k>) -> Val<'k, i32> {
        let head = self.sequence_index * p.group_size * p.kv_heads + self.head;
        let block = row.min(self.sequence.q_len - 1).split_index(rows).0;
        head * p.q_blocks + block.min(p.q_blocks - 1)
    }

    /// First and one past the last key that a row sees.
    pub fn visible(&self, row: Val<'k, i32>) -> (Val<'k, i32>, Val<'k, i32>) {
        let start = row + self.diagonal - self.window_left;
        (start, (row + self.diagonal + self.window_right + 1).min(self.sequence.kv_len))
    }

    /// Index of the (sequence, key head) in statistics of the workspace.
    pub fn kv_index(&self, p: &AttentionParams<'k>) -> Val<'k, i32> {
        self.sequence_index * p.kv_heads + self.kv_head
    }
}
