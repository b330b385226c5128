//! Tiles of K and V on their way through shared memory by `cp.async`: every thread copies a part of each tile, ahead of
//! its use, into the stages of a ring.

use sage_ptx::{CHUNK_BYTES, Code, Shared, SharedTile, Val, Var};

use super::copied_tiles::{CopiedTiles, StagedTile, TileShape};
use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::place::Place;
use crate::fp4::ScaleWords;
use crate::operand::{Element, OperandSource};

/// The ring of both operands.
pub(super) struct CpAsyncRing<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    keys: CopiedTiles<'k>,
    values: CopiedTiles<'k>,
    shared: Shared<'k, u8>,
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
        let (padded, tile_keys) = (config.padded_dim(), config.tiling.tile_keys());
        let operands = &config.operands;
        let key_bytes = operands.k.bytes(padded);
        let tile_bytes = [operands.k.tile_bytes(tile_keys, padded), operands.v.tile_bytes(padded, tile_keys)];
        let ring_bytes = config.tiling.stages() * tile_bytes.iter().sum::<usize>();
        // The output passes through the same memory at the end.
        let shared = code.shared::<u8>("tiles", ring_bytes.max(config.block_q() * 2 * padded));
        let first_value = (config.tiling.stages() * tile_bytes[0]) as i32;
        let shape = |base: i32, row_bytes, rows, chunks| TileShape {
            stages: SharedTile::new(shared.plus(base), row_bytes),
            rows,
            chunks,
            depth_in_rows: false,
            scales: None,
        };
        let whole_rows = |base: i32, row_bytes, rows| shape(base, row_bytes, rows, row_bytes / CHUNK_BYTES);
        // Scales are as the rows behind those of the codes.
        let scaled = |base: i32, rows: usize, elements: usize| {
            let (scales, row_bytes) = (ScaleWords::new(rows, elements), elements / 2);
            let shape = whole_rows(base, row_bytes, rows + scales.bytes() / row_bytes);
            TileShape { scales: Some(scales), ..shape }
        };
        let used_chunks = config.head_dim.div_ceil(8);

        let keys = match (operands.k.element, operands.k.source) {
            (_, OperandSource::Given | OperandSource::Registers) => {
                shape(0, key_bytes, tile_keys, used_chunks).of_rows(config, place, &p.k)
            }
            (Element::E2M1, OperandSource::Workspace) => {
                scaled(0, tile_keys, padded).of_workspace(place, p.k.start)
            }
            (_, OperandSource::Workspace) => {
                whole_rows(0, key_bytes, tile_keys).of_workspace(place, p.k.start)
            }
        };
        let rows_of_values =
            |chunks| TileShape { depth_in_rows: true, ..shape(first_value, 2 * padded, tile_keys, chunks) };
        let mut values = match (operands.v.element, operands.v.source) {
            (Element::E2M1, _) => scaled(first_value, padded, tile_keys).of_workspace(place, p.v.start),
            (Element::E4M3, _) => whole_rows(first_value, tile_keys, padded).of_workspace(place, p.v.start),
            (_, OperandSource::Workspace) => {
                rows_of_values(2 * padded / CHUNK_BYTES).of_workspace(place, p.v.start)
            }
            (_, OperandSource::Given | OperandSource::Registers) => {
                rows_of_values(used_chunks).of_rows(config, place, &p.v)
            }
        };
        if operands.v.source == OperandSource::Given {
            values.seen = place.seen;
        }
        let stage = code.var(0).named("stage");
        let ring = CpAsyncRing { code, config, keys, values, shared, stage };
        ring.clear_unused_chunks();
        ring
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
        (self.keys.staged(stage), self.values.staged(stage))
    }

    /// Waits until every copy has landed and every warp is done with the tiles; their memory is then free for the
    /// output.
    pub fn finish(&self) -> SharedTile<'k> {
        self.code.wait_copies(0);
        self.code.barrier();
        SharedTile::new(self.shared, 2 * self.config.padded_dim())
    }

    /// Starts copying the tile at a position, where there is one.
    fn copy(&self, place: &Place<'k>, position: Val<'k, i32>, stage: Val<'k, i32>) {
        place.key_tiles.when_loaded(position, |tile| {
            for operand in [&self.keys, &self.values] {
                operand.copy(self.code, self.config, tile, stage);
            }
        });
        // Also an empty group is one, so that counting groups is counting tiles.
        self.code.commit_copies();
    }

    /// Writes zeros, once, to the chunks that no copy writes and products read.
    fn clear_unused_chunks(&self) {
        for operand in [&self.keys, &self.values] {
            let unused = operand.stages.row_bytes() / CHUNK_BYTES - operand.chunks;
            if unused == 0 {
                continue;
            }
            let total = (self.config.tiling.stages() * operand.rows * unused) as i32;
            let zero = self.code.constant(0u32);
            self.code.range_by(self.code.thread(), total, self.config.threads() as i32, |i| {
                let (row, chunk) = i.split_index(unused);
                operand
                    .stages
                    .chunk(row, chunk + operand.chunks as i32)
                    .step(0, 0)
                    .cast::<u32>()
                    .store_vector([zero; 4]);
            });
        }
    }
}
