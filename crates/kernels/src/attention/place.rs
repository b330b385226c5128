//! Which part of the problem a block computes.

use sage_ptx::{Code, SLOT_ROWS, Val, lane_row};

use super::band::Band;
use super::config::{AttentionConfig, AttentionParams, MaskForm};
use super::key_tiles::{KeyTiles, TileListParams};
use crate::grid::BlockHead;
use crate::preprocess::SeenKeys;
use crate::sequence::{KEY_TILE, LengthParams, Lengths, Sequence};
use crate::sinks::SinkParams;
use crate::sparse::{MaskWords, STRIP_ROWS};
use crate::tensor::TensorParam;

/// A block's queries, and the tiles of keys that they see.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'k> {
    pub sequence: Sequence<'k>,
    /// Rows of the head: the sequence's queries, or those of all its query heads.
    pub rows: Val<'k, i32>,
    /// Query heads that are rows of the head, where they are.
    heads_as_rows: Option<Val<'k, i32>>,
    /// Index of the sequence, where packed ones differ from the batch.
    pub sequence_index: Val<'k, i32>,
    pub head: Val<'k, i32>,
    pub kv_head: Val<'k, i32>,
    /// The sequence's first key tile of this head in the workspace.
    pub first_key_tile: Val<'k, i32>,
    /// First query row of the block.
    pub first_row: Val<'k, i32>,
    /// First query row of the warp.
    pub warp_row: Val<'k, i32>,
    pub warp: Val<'k, i32>,
    pub lane: Val<'k, i32>,
    band: Band<'k>,
    pub key_tiles: KeyTiles<'k>,
    /// Where a mask hides keys: those that some query sees.
    pub seen: Option<SeenKeys<'k>>,
    /// The words of a mask, where it is packed.
    pub mask_words: Option<MaskWords<'k>>,
    /// Index of the part of the keys, where they are split.
    pub split: Val<'k, i32>,
    /// Which channels of V the block has, where several share them.
    pub values: Option<ValueBlock<'k>>,
    /// Whether the sequence has no such queries.
    pub empty: Val<'k, bool>,
}

/// A block's part of the channels of V.
#[derive(Clone, Copy, Debug)]
pub(super) struct ValueBlock<'k> {
    /// Its index among the blocks that share the channels.
    pub block: Val<'k, i32>,
    /// The first of its channels.
    pub first: Val<'k, i32>,
}

/// What tells one piece of work from another.
#[derive(Clone, Copy)]
pub(super) struct Piece<'k> {
    /// Tile of queries.
    pub q_tile: Val<'k, i32>,
    pub head: Val<'k, i32>,
    /// Index of the sequence, those of all parts of the keys one after the other.
    pub sequence: Val<'k, i32>,
    pub kv_head: Val<'k, i32>,
}

impl<'k> Place<'k> {
    /// The place of the block in the grid of [`AttentionConfig::pieces`]. The longest rows of a causal mask come first,
    /// so that the last blocks to start are short. Blocks that share the channels of V follow each other, so that the
    /// tiles of one are in cache for the others.
    pub fn of_block(
        code: &'k Code,
        config: &AttentionConfig,
        p: &AttentionParams<'k>,
        lists: Option<&TileListParams<'k>>,
    ) -> Self {
        let ([x, ..], [tiles, ..]) = (code.block_index(), code.grid());
        let heads = config.heads(p);
        let BlockHead { sequence, head } = BlockHead::new(code, heads, p.all_heads);
        let thread = [code.warp_index(), code.lane_index()];
        let blocks = config.value_blocks();
        let piece = |q_tile| Piece { q_tile, head, sequence, kv_head: config.kv_head(p, head) };
        let place = |q_tile| Place::new(config, p, lists, thread, piece(q_tile), || p.all_heads / heads);
        if blocks == 1 {
            return place(tiles - 1 - x);
        }
        let (from_last, block) = x.split_index(blocks);
        let first = (block * config.block_values() as i32).named("first_value");
        let values = Some(ValueBlock { block: block.named("value_block"), first });
        Place { values, ..place(tiles.split_index(blocks).0 - 1 - from_last) }
    }

    /// The place of a piece of work, for a thread's warp and lane. `sequences` counts those of all parts of the keys.
    pub fn new(
        config: &AttentionConfig,
        p: &AttentionParams<'k>,
        lists: Option<&TileListParams<'k>>,
        [warp, lane]: [Val<'k, i32>; 2],
        Piece { q_tile, head, sequence, kv_head }: Piece<'k>,
        sequences: impl FnOnce() -> Val<'k, i32>,
    ) -> Self {
        let (sequence_index, split) = if config.split {
            let sequences = sequences() / p.splits;
            (sequence % sequences, sequence / sequences)
        } else {
            (sequence, lane.code().constant(0))
        };
        let lengths = lengths(p);
        let sequence = sequence_of(config, p, &lengths, sequence_index);
        let first_row = (q_tile * config.block_q() as i32).named("first_row");
        let band = Band::new(&lengths, &sequence);
        let heads_as_rows = config.heads_as_rows.then_some(p.group_size);
        let (rows, band) = match heads_as_rows {
            None => (sequence.q_len, band),
            Some(heads) => (sequence.q_len * heads, band.with_rows_of_queries(heads)),
        };
        let key_tiles = match lists {
            Some(lists) => KeyTiles::of_list(config, p, &lists.list(sequence_index, head, q_tile), split),
            None => KeyTiles::of_band(config, p, &band, [first_row, warp, split]),
        };
        let seen = (config.mask != MaskForm::None).then(|| {
            let first = sequence_index * p.seen_stride_sequence + kv_head * p.seen_stride_head;
            SeenKeys::new(p.seen, first)
        });
        let order = config.operands.key_order();
        let words_of = |(lists, packing): (&TileListParams<'k>, _)| {
            lists.mask_words(packing, order, sequence_index, head, lane, sequence.q_len)
        };
        let mask_words = lists.zip(config.packing()).map(words_of);
        Place {
            sequence,
            rows,
            heads_as_rows,
            sequence_index,
            head,
            kv_head,
            first_key_tile: kv_head * p.key_tiles + sequence.first_tile,
            first_row,
            warp_row: first_row + warp * (config.tiling.rows_per_warp() as i32),
            warp,
            lane,
            band,
            key_tiles,
            seen,
            mask_words,
            split,
            values: None,
            empty: first_row.ge(rows),
        }
    }

    /// The row of the sequence that the lane holds in slot `slot`.
    pub fn row(&self, slot: usize) -> Val<'k, i32> {
        self.warp_row + lane_row(self.lane) + (SLOT_ROWS * slot) as i32
    }

    /// Where a row of the head lies in a tensor of queries, in elements; `head` is where the head begins that
    /// [`Place::head_start`] gives.
    pub fn row_start(
        &self,
        tensor: &TensorParam<'k, 3>,
        head: Val<'k, i64>,
        row: Val<'k, i32>,
    ) -> Val<'k, i64> {
        let (query, of_heads) = match self.heads_as_rows {
            None => (row, None),
            Some(heads) => (row / heads, Some((row % heads).widen() * tensor.head_stride())),
        };
        let start = head + (self.sequence.q_start + query).widen() * tensor.row_stride();
        of_heads.map_or(start, |of_heads| start + of_heads)
    }

    /// Where the head begins, or the first of those that are its rows.
    pub fn head_start(&self, tensor: &TensorParam<'k, 3>) -> Val<'k, i64> {
        tensor.head(self.sequence.batch, self.first_head())
    }

    /// The head, or the first of those that are its rows.
    fn first_head(&self) -> Val<'k, i32> {
        self.heads_as_rows.map_or(self.head, |heads| self.head * heads)
    }

    /// Index of a row of the head among the rows of all heads and sequences, as log-sum-exps are numbered. `first` is
    /// what [`Place::first_index`] gives.
    pub fn row_index(&self, p: &AttentionParams<'k>, first: Val<'k, i64>, row: Val<'k, i32>) -> Val<'k, i64> {
        match self.heads_as_rows {
            None => first + row.widen(),
            Some(heads) => first + (row / heads).widen() + (row % heads).mul_wide(p.q_rows),
        }
    }

    /// The attention sink of a row of the head, as [`SinkParams::of_row`] has it.
    pub fn sink(&self, sinks: &SinkParams<'k>, row: Val<'k, i32>, taken: Val<'k, f32>) -> Val<'k, f32> {
        // Rows that the head does not have have no sink either, and a sequence may have none.
        let row = row.min(self.rows - 1).max(0);
        match self.heads_as_rows {
            None => sinks.of_row(self.head, row, taken),
            Some(heads) => sinks.of_row(self.first_head() + row % heads, row, taken),
        }
    }

    /// Index of the head's first row, or that of the first of those that are its rows, in its part of the keys.
    pub fn first_index(&self, p: &AttentionParams<'k>) -> Val<'k, i64> {
        let heads = p.group_size * p.kv_heads;
        (self.sequence.batch * heads + self.first_head()).mul_wide(p.q_rows)
            + self.sequence.q_start.widen()
            + self.split.widen() * p.total_rows
    }

    /// Which channel of V one of the block's is.
    pub fn channel(&self, of_block: Val<'k, i32>) -> Val<'k, i32> {
        self.values.map_or(of_block, |values| values.first + of_block)
    }

    /// Which strip of 16 rows the warp's strip `index` is of the sequence's.
    pub fn strip(&self, index: usize) -> Val<'k, i32> {
        (self.warp_row >> STRIP_ROWS.ilog2() as i32) + index as i32
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
        (self.band.start(row), self.band.end(row))
    }

    /// Index of the (sequence, key head) in statistics of the workspace.
    pub fn kv_index(&self, p: &AttentionParams<'k>) -> Val<'k, i32> {
        self.sequence_index * p.kv_heads + self.kv_head
    }
}

/// What the kernel is told about lengths.
fn lengths<'k>(p: &AttentionParams<'k>) -> LengthParams<'k> {
    LengthParams {
        q_rows: p.q_rows,
        kv_rows: p.kv_rows,
        cu_seqlens_q: p.cu_seqlens_q,
        cu_seqlens_k: p.cu_seqlens_k,
        window_left: p.window_left,
        window_right: p.window_right,
        bottom_right: p.bottom_right,
    }
}

/// Sequence `index` of the call.
fn sequence_of<'k>(
    config: &AttentionConfig,
    p: &AttentionParams<'k>,
    lengths: &LengthParams<'k>,
    index: Val<'k, i32>,
) -> Sequence<'k> {
    let masked = config.mask != MaskForm::None;
    let mut sequence = Sequence::new(index.code(), config.lengths, masked, lengths, index);
    if config.lengths == Lengths::Packed {
        // Lengths in device memory may exceed the longest that the caller spoke of: nobody has prepared such tiles.
        sequence.kv_len = sequence.kv_len.min(p.max_tiles * KEY_TILE as i32).named("kv_len");
    }
    sequence
}
