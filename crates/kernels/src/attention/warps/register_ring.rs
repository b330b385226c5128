//! Tiles of K and V on their way to shared memory through registers, where no instruction copies by itself: every
//! thread loads a part of each tile and stores it.
//!
//! With two stages the next tile is loaded while this one is computed, and stored when it is that tile's turn, to the
//! stage that the tile before this one has left: a barrier a tile. The loaded parts take registers all the while. With
//! one stage they do not: a tile is loaded and stored at once, between two barriers, and what hides the time that
//! takes is other blocks.

use sage_ptx::{Code, Shared, SharedTile, Val, Var};

use super::chunks::Parts;
use super::copied_tiles::StagedTile;
use super::tile_memory::TileMemory;
use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::place::Place;
use crate::attention::queries::maxima_of_warps;

/// The stages of both operands, and the thread's parts of a tile.
pub(super) struct RegisterRing<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    memory: TileMemory<'k>,
    /// Of each operand that is copied.
    parts: Vec<Parts<'k>>,
    /// Stage of the tile that is stored next.
    stage: Var<'k, i32>,
}

impl<'k, 'c> RegisterRing<'k, 'c> {
    pub fn new(
        code: &'k Code,
        config: &'c AttentionConfig,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
    ) -> Self {
        let memory = TileMemory::new(code, config, p, place);
        let parts = memory.operands().into_iter().map(|operand| operand.parts(code, config)).collect();
        let stage = code.var(0).named("stage");
        memory.clear_unused_chunks(code, config);
        RegisterRing { code, config, memory, parts, stage }
    }

    /// Memory of the output beyond the stages, where that has room for the maxima of queries: GPUs without asynchronous
    /// copies have too little for an array of their own beside wide heads.
    pub fn scratch(&self) -> Option<Shared<'k, i32>> {
        self.memory.beyond_stages(4 * maxima_of_warps(self.config))
    }

    /// Starts loading the first tile, where tiles are loaded ahead.
    pub fn start(&self, place: &Place<'k>) {
        if self.loads_ahead() {
            self.load(place, place.key_tiles.own().start);
        }
    }

    /// Stores the tile at a position, starts loading the one after it where tiles are loaded ahead, and returns where
    /// the tile's K and V are read.
    pub fn next(&self, position: Val<'k, i32>, place: &Place<'k>) -> (StagedTile<'k>, StagedTile<'k>) {
        let stage = self.stage.get();
        if !self.loads_ahead() {
            // Every warp is done with the tile before.
            self.code.barrier();
            place.key_tiles.when_loaded(position, |tile| {
                for (operand, parts) in self.memory.operands().into_iter().zip(&self.parts) {
                    operand.load(self.code, self.config, tile, parts);
                    operand.store(self.code, self.config, stage, parts);
                }
            });
            self.code.barrier();
            return self.memory.staged(stage);
        }
        for (operand, parts) in self.memory.operands().into_iter().zip(&self.parts) {
            operand.store(self.code, self.config, stage, parts);
        }
        // Behind it every warp sees the tile, and is done with the one before, whose stage is the next to be stored to.
        self.code.barrier();
        self.load(place, position + 1);
        let after = stage + 1;
        self.stage.set(after.eq(self.config.tiling.stages() as i32).select(0, after));
        self.memory.staged(stage)
    }

    /// Waits until every warp is done with the tiles; their memory is then free for the output.
    pub fn finish(&self) -> SharedTile<'k> {
        self.code.barrier();
        self.memory.output(self.config)
    }

    fn loads_ahead(&self) -> bool {
        self.config.tiling.stages() > 1
    }

    /// Starts loading the tile at a position, where there is one.
    fn load(&self, place: &Place<'k>, position: Val<'k, i32>) {
        place.key_tiles.when_loaded(position, |tile| {
            for (operand, parts) in self.memory.operands().into_iter().zip(&self.parts) {
                operand.load(self.code, self.config, tile, parts);
            }
        });
    }
}
