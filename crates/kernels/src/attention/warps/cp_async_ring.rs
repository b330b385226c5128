//! Tiles of K and V on their way through shared memory by `cp.async`: every thread copies a part of each tile, ahead of
//! its use, into the stages of a ring.

use sage_ptx::{Code, SharedTile, Val, Var};

use super::copied_tiles::StagedTile;
use super::tile_memory::TileMemory;
use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::place::Place;

/// The ring of both operands.
pub(super) struct CpAsyncRing<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    memory: TileMemory<'k>,
    /// Stage of the tile in use.
    stage: Var<'k, i32>,
}

impl<'k, 'c> CpAsyncRing<'k, 'c> {
    pub fn new(
        code: &'k Code,
        config: &'c AttentionConfig,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
    ) -> Self {
        let memory = TileMemory::new(code, config, p, place);
        let stage = code.var(0).named("stage");
        memory.clear_unused_chunks(code, config);
        CpAsyncRing { code, config, memory, stage }
    }

    /// Starts the first copies.
    pub fn start(&self, place: &Place<'k>) {
        for stage in 0..self.config.tiling.stages() - 1 {
            let position = place.key_tiles.own().start + stage as i32;
            self.copy(place, position, self.code.constant(stage as i32));
        }
    }

    /// Waits for the tile at a position, whose copy is the oldest in flight, starts copying the one that takes the
    /// stage freed by the tile before, and returns where the tile's K and V are read.
    pub fn next(&self, position: Val<'k, i32>, place: &Place<'k>) -> (StagedTile<'k>, StagedTile<'k>) {
        let stages = self.config.tiling.stages() as i32;
        self.code.wait_copies(stages as u32 - 2);
        self.code.barrier();
        let stage = self.stage.get();
        let before = stage.eq(0).select(stages - 1, stage - 1);
        self.copy(place, position + (stages - 1), before);
        let after = stage + 1;
        self.stage.set(after.eq(stages).select(0, after));
        self.memory.staged(stage)
    }

    /// Waits until every copy has landed and every warp is done with the tiles; their memory is then free for the
    /// output.
    pub fn finish(&self) -> SharedTile<'k> {
        self.code.wait_copies(0);
        self.code.barrier();
        self.memory.output(self.config)
    }

    /// Starts copying the tile at a position, where there is one.
    fn copy(&self, place: &Place<'k>, position: Val<'k, i32>, stage: Val<'k, i32>) {
        place.key_tiles.when_loaded(position, |tile| {
            for operand in self.memory.operands() {
                operand.copy(self.code, self.config, tile, stage);
            }
        });
        // Also an empty group is one, so that counting groups is counting tiles.
        self.code.commit_copies();
    }
}
