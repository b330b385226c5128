//! Packed biases on their way to shared memory: the producer asks for those of each tile that a mask changes, which lie
//! side by side, so that no consumer waits for device memory between its scores and its softmax.

use sage_ptx::{Code, Shared};

use crate::attention::config::AttentionConfig;
use crate::attention::key_tiles::KeyTile;
use crate::attention::pipeline::{Cursor, Pipeline};
use crate::attention::place::Place;
use crate::sequence::KEY_TILE;
use crate::sparse::{CLASS_ROWS, Packing, STRIPS, StagedWords};

/// The stages of biases, each `[warpgroups][64 keys of the tile][strips]` of words: as many as of keys and values, but
/// only tiles with biases have one.
pub(super) struct BiasRing<'k> {
    memory: Shared<'k, u32>,
    pipeline: Pipeline<'k>,
    packing: Packing,
    groups: usize,
    parts: usize,
}

/// Bytes of shared memory of a stage: none where no biases are packed.
pub(super) fn stage_bytes(config: &AttentionConfig) -> usize {
    match config.packing() {
        Some(packing @ Packing::Biases(_)) => {
            let tiles = config.block_q() / CLASS_ROWS * (config.tiling.tile_keys() / KEY_TILE);
            4 * tiles * packing.tile_words()
        }
        Some(Packing::Bits) | None => 0,
    }
}

impl<'k> BiasRing<'k> {
    /// With stages in `memory`, ready for use after the block's next barrier; none where no biases are packed.
    pub fn new(code: &'k Code, config: &AttentionConfig, memory: Shared<'k, u8>) -> Option<Self> {
        let packing = config.packing().filter(|packing| *packing != Packing::Bits)?;
        let stages = config.tiling.stages();
        let barriers = code.mbarriers("biases_full_empty", Pipeline::barriers(stages));
        let pipeline = Pipeline::new(barriers, stages);
        code.when(code.thread().eq(0), || {
            pipeline.init(config.tiling.warps() as u32);
            code.fence_mbarriers();
        });
        Some(BiasRing {
            memory: memory.cast(),
            pipeline,
            packing,
            groups: config.block_q() / CLASS_ROWS,
            parts: config.tiling.tile_keys() / KEY_TILE,
        })
    }

    fn stage_words(&self) -> i32 {
        (self.groups * self.parts * self.packing.tile_words()) as i32
    }

    /// The producer's part: asks for the biases of a tile, where it has some, as soon as a stage is free.
    pub fn load(&self, place: &Place<'k>, tile: &KeyTile<'k>, cursor: &Cursor<'k>) {
        let code = tile.index.code();
        let Some(words) = place.mask_words else { return };
        let tile_words = self.packing.tile_words() as i32;
        code.when(tile.is_masked(), || {
            let stage = self.pipeline.wait_empty(cursor);
            let full = self.pipeline.full(stage);
            full.arrive_expecting(4 * self.stage_words());
            let to = self.memory.at(stage * self.stage_words());
            for group in 0..self.groups {
                let rows = place.first_row.split_index(CLASS_ROWS).0 + group as i32;
                for part in 0..self.parts {
                    let own = tile.index * self.parts as i32 + part as i32;
                    // Only the first of several parts always has keys: the last one stands in for what has none.
                    let last = place.sequence.kv_len.div_ceil(KEY_TILE) - 1;
                    let from = words.tile(rows, if part == 0 { own } else { own.min(last) });
                    let to = to.plus((group * self.parts + part) as i32 * tile_words);
                    to.copy_bulk(from, 4 * tile_words, &full);
                }
            }
            cursor.advance();
        });
    }

    /// A consumer's part: waits for the biases at the cursor.
    pub fn wait(&self, cursor: &Cursor<'k>) {
        self.pipeline.wait_full(cursor);
    }

    /// Where the words of the lane lie in the first stage.
    pub fn of_lane(&self, place: &Place<'k>) -> Shared<'k, u32> {
        let (group, strip) = place.warp.split_index(STRIPS);
        let (of_group, of_strip) = (self.parts * self.packing.tile_words(), self.packing.strip_words());
        let strip = self.memory.at(group * of_group as i32).at(strip * of_strip as i32);
        strip.at(self.packing.lane_start(place.lane))
    }

    /// The lane's words at the cursor.
    pub fn words(&self, of_lane: Shared<'k, u32>, cursor: &Cursor<'k>) -> StagedWords<'k> {
        StagedWords { packing: self.packing, start: of_lane.at(cursor.stage() * self.stage_words()) }
    }

    /// A consumer's part: the warp is done with the biases at the cursor, which moves on.
    pub fn release(&self, place: &Place<'k>, cursor: &Cursor<'k>) {
        let code = place.lane.code();
        code.warp_sync();
        code.when(place.lane.eq(0), || self.pipeline.release(cursor.stage()));
        cursor.advance();
    }
}
