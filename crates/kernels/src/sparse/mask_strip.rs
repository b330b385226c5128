//! Which part of a mask a warp packs: a strip of a tile of rows, and a few tiles of keys.

use sage_ptx::{Code, Global, SLOT_ROWS, Shared, Stored, Val, lane_column, lane_row};

use super::mask_words::LANES;
use super::{ALL, CLASS_ROWS, NONE, Packing, SOME, STRIP_ROWS, STRIPS};
use crate::grid::BlockHead;
use crate::sequence::KEY_TILE;
use crate::tensor::TensorParam;

/// A warp's rows of a tile of rows, and its block's tiles of keys.
pub(super) struct Strip<'k> {
    pub sequence: Val<'k, i32>,
    pub head: Val<'k, i32>,
    pub lane: Val<'k, i32>,
    warp: Val<'k, i32>,
    /// The lane's first row.
    pub first_row: Val<'k, i32>,
    /// The block's first tile of keys.
    pub first_tile: Val<'k, i32>,
    /// Tiles of all keys.
    pub tiles: Val<'k, i32>,
    /// Number of the block's first tile among those of all heads.
    number: Val<'k, i64>,
    size: MaskSize<'k>,
}

/// Rows, keys and heads of a mask, as far as they are not broadcast.
#[derive(Clone, Copy)]
pub(super) struct MaskSize<'k> {
    pub rows: Val<'k, i32>,
    pub keys: Val<'k, i32>,
    /// Heads of a sequence, and of all sequences.
    pub heads: Val<'k, i32>,
    pub all_heads: Val<'k, i32>,
}

impl<'k> Strip<'k> {
    /// The strip of a warp, of whose block `block_tiles` tiles of keys are.
    pub fn new(code: &'k Code, size: MaskSize<'k>, block_tiles: usize) -> Self {
        // A launch has a block even where there are no keys, and so no classes.
        code.exit_when(size.keys.le(0));
        let BlockHead { sequence, head } = BlockHead::new(code, size.heads, size.all_heads);
        let tiles = size.keys.div_ceil(KEY_TILE);
        let blocks = tiles.div_ceil(block_tiles);
        let [block, ..] = code.block_index();
        let (row_tile, first_tile) = (block / blocks, block % blocks * block_tiles as i32);
        let [warp, lane] = [code.warp_index(), code.lane_index()];
        let strip = row_tile * STRIPS as i32 + warp;
        let row_tiles = size.rows.div_ceil(CLASS_ROWS);
        let first = ((sequence * size.heads + head).mul_wide(row_tiles) + row_tile.widen()) * tiles.widen();
        Strip {
            sequence,
            head,
            lane,
            warp,
            first_row: strip * STRIP_ROWS as i32 + lane_row(lane),
            first_tile,
            tiles,
            number: first + first_tile.widen(),
            size,
        }
    }

    /// Copies the strip's part of the first tile of keys of a mask to shared memory, in chunks of 16 bytes, which its
    /// rows, of elements of `size` bytes, are made of.
    pub fn stage<B: Stored>(
        &self,
        code: &'k Code,
        mask: &TensorParam<'k, 4>,
        size: usize,
    ) -> StagedStrip<'k, B> {
        let (row_bytes, elements) = (KEY_TILE * size, (16 / size) as i32);
        let pitch = StagedStrip::<B>::pitch(row_bytes);
        let memory = code.shared::<u8>("rows", STRIPS * STRIP_ROWS * pitch);
        let pitch = pitch as i32;
        let memory = memory.at(self.warp * STRIP_ROWS as i32 * pitch);
        let start = mask.start.cast::<B>().at(mask.head(self.sequence, self.head));
        let strip_row = self.first_row - lane_row(self.lane);
        let chunks: Vec<_> = (0..STRIP_ROWS * row_bytes / 16 / LANES)
            .map(|round| {
                let chunk = self.lane + (round * LANES) as i32;
                let (row, column) = chunk.split_index(row_bytes / 16);
                let key = self.first_tile * KEY_TILE as i32 + column * elements;
                let of_row = start.at((strip_row + row).min(self.size.rows - 1).widen() * mask.row_stride());
                // What is behind the last key is read nowhere, or counts nowhere.
                let words = of_row.at(key.min(self.size.keys - elements)).cast::<u32>().load_streaming::<4>();
                (memory.at(row * pitch + column * 16), words)
            })
            .collect();
        chunks.into_iter().for_each(|(to, words)| to.cast::<u32>().store_vector(words));
        code.warp_sync();
        let lane = lane_row(self.lane) * pitch + lane_column(self.lane) * size as i32;
        StagedStrip { lane: memory.at(lane).cast(), row_bytes }
    }

    /// Where the strip's words of the block's tile `tile` go, among those of all heads.
    pub fn words(&self, words: Global<'k, u32>, packing: Packing, tile: usize) -> Global<'k, u32> {
        let words = words.at(self.number * packing.tile_words() as i64);
        words.plus((tile * packing.tile_words()) as i32).at(self.warp * packing.strip_words() as i32)
    }

    /// Writes the classes of the block's tiles among those of all heads: `lanes` says of each whether the lane sees
    /// something of it, and whether nothing that it sees is changed.
    pub fn classify(
        &self,
        code: &'k Code,
        classes: Global<'k, u8>,
        lanes: &[(Val<'k, bool>, Val<'k, bool>)],
    ) {
        // Each warp's word of a tile: bit 0 where it sees something, bit 1 where something is not left as it is.
        let votes = code.shared::<u32>("votes", lanes.len() * STRIPS);
        let of_tiles: Vec<_> = lanes.iter().map(|&(sees, whole)| [code.any(sees), code.all(whole)]).collect();
        code.when(self.lane.eq(0), || {
            for (tile, [some_there, all_there]) in of_tiles.into_iter().enumerate() {
                let word = some_there.select(1u32, 0u32) | all_there.select(0u32, 2u32);
                votes.plus((tile * STRIPS) as i32).at(self.warp).store(word);
            }
        });
        code.barrier();
        let tile = code.thread();
        let exists = tile.lt(lanes.len() as i32) & (self.first_tile + tile).lt(self.tiles);
        code.when(exists, || {
            let votes = votes.at(tile * STRIPS as i32).load_vector::<STRIPS>();
            let together = votes.into_iter().reduce(|a, b| a | b).expect("a block has warps");
            let partial = (together & 2u32).ne(0u32).select(SOME, ALL);
            let class = (together & 1u32).ne(0u32).select(partial, NONE);
            classes.at(self.number + tile.widen()).store(class);
        });
    }
}

/// A strip's part of a tile of keys in shared memory.
#[derive(Clone, Copy)]
pub(super) struct StagedStrip<'k, B> {
    /// The lane's first element.
    lane: Shared<'k, B>,
    row_bytes: usize,
}

impl<'k, B: Stored> StagedStrip<'k, B> {
    /// Bytes from row to row: a chunk more than a row has, so that the lanes' pairs lie in different banks.
    const fn pitch(row_bytes: usize) -> usize {
        row_bytes + 16
    }

    /// The lane's pair of elements in its row `slot` and the columns from `column` on.
    pub fn pair(&self, slot: usize, column: usize) -> [Val<'k, B::Value>; 2] {
        let row = self.lane.cast::<u8>().plus((slot * SLOT_ROWS * Self::pitch(self.row_bytes)) as i32);
        row.cast::<B>().plus(column as i32).load_vector()
    }
}
