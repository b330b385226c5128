//! The shared memory that tiles of K and V lie in, and where a block copies them from.

use sage_ptx::{CHUNK_BYTES, Code, Shared, SharedTile, Stored, Val};

use super::copied_tiles::{CopiedTiles, StagedTile, TileShape};
use super::head_channels::HeadChannels;
use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::place::Place;
use crate::operand::{Element, OperandSource};

/// The stages of both operands.
pub(super) struct TileMemory<'k> {
    keys: CopiedTiles<'k>,
    values: Values<'k>,
    shared: Shared<'k, u8>,
    /// Bytes of the stages, and of all.
    stages_bytes: usize,
    bytes: usize,
}

/// Where tiles of values lie.
enum Values<'k> {
    Copied(Box<CopiedTiles<'k>>),
    /// In the rows of keys: those of the first stage.
    InKeys(StagedTile<'k>),
}

impl<'k> TileMemory<'k> {
    pub fn new(code: &'k Code, config: &AttentionConfig, p: &AttentionParams<'k>, place: &Place<'k>) -> Self {
        let (of_k, of_v, tile_keys) =
            (config.key_columns(), config.value_columns(), config.tiling.tile_keys());
        let operands = &config.operands;
        let key_bytes = operands.k.bytes(of_k);
        let value_bytes = if config.values_in_keys { 0 } else { operands.v.tile_bytes(of_v, tile_keys) };
        let tile_bytes = [operands.k.tile_bytes(tile_keys, of_k), value_bytes];
        let stages_bytes = config.tiling.stages() * tile_bytes.iter().sum::<usize>();
        // The output passes through the same memory at the end.
        let bytes = stages_bytes.max(config.block_q() * 2 * of_v);
        let shared = code.shared::<u8>("tiles", bytes);
        let first_value = (config.tiling.stages() * tile_bytes[0]) as i32;
        let shape = |base: i32, row_bytes, rows, chunks| TileShape {
            stages: SharedTile::new(shared.plus(base), row_bytes),
            rows,
            chunks,
            depth_in_rows: false,
            scales: None,
        };
        let keys_of_head = HeadChannels { dim: config.head_dim, first: None, left: None };
        let values_of_head = HeadChannels::of_values(config, place);
        let used_chunks = |channels: usize| channels.div_ceil(8);

        let mut keys = match operands.k.source {
            OperandSource::Given | OperandSource::Registers => {
                let shape = shape(0, key_bytes, tile_keys, used_chunks(config.head_dim));
                shape.of_rows(config, place, &p.k, keys_of_head)
            }
            OperandSource::Workspace => {
                let shape = TileShape::quantised(shared.plus(0), &operands.k, tile_keys, of_k);
                shape.of_workspace(place, p.k.start)
            }
        };
        if config.values_in_keys {
            // Rows of keys that no query sees are values that count with zero, and must be numbers.
            keys.seen = place.seen;
            let values = Values::InKeys(keys.as_depth(place.values.map(|values| values.first)));
            return TileMemory { keys, values, shared, stages_bytes, bytes };
        }
        let rows_of_values =
            |chunks| TileShape { depth_in_rows: true, ..shape(first_value, 2 * of_v, tile_keys, chunks) };
        let mut values = match (operands.v.element, operands.v.source) {
            (Element::E2M1 | Element::E4M3, _) => {
                let base = shared.plus(first_value);
                let shape = TileShape::quantised(base, &operands.v, of_v, tile_keys);
                shape.of_workspace(place, p.v.start)
            }
            (_, OperandSource::Workspace) => {
                rows_of_values(2 * of_v / CHUNK_BYTES).of_workspace(place, p.v.start)
            }
            (_, OperandSource::Given | OperandSource::Registers) => {
                let shape = rows_of_values(used_chunks(config.block_values()));
                shape.of_rows(config, place, &p.v, values_of_head)
            }
        };
        if operands.v.source == OperandSource::Given {
            values.seen = place.seen;
        }
        TileMemory { keys, values: Values::Copied(Box::new(values)), shared, stages_bytes, bytes }
    }

    /// The operands that are copied: both, but for values that lie in keys.
    pub fn operands(&self) -> Vec<&CopiedTiles<'k>> {
        match &self.values {
            Values::Copied(values) => vec![&self.keys, values],
            Values::InKeys(_) => vec![&self.keys],
        }
    }

    /// K and V of a stage, as the lane reads them.
    pub fn staged(&self, stage: Val<'k, i32>) -> (StagedTile<'k>, StagedTile<'k>) {
        let keys = self.keys.staged(stage);
        let values = match &self.values {
            Values::Copied(values) => values.staged(stage),
            Values::InKeys(first) => first.at_byte(self.keys.offset(stage)),
        };
        (keys, values)
    }

    /// Memory beyond the stages, which the output alone takes, where there are so many bytes.
    pub fn beyond_stages<T: Stored>(&self, bytes: usize) -> Option<Shared<'k, T>> {
        (self.stages_bytes + bytes <= self.bytes).then(|| self.shared.plus(self.stages_bytes as i32).cast())
    }

    /// The memory as rows of the output.
    pub fn output(&self, config: &AttentionConfig) -> SharedTile<'k> {
        SharedTile::new(self.shared, 2 * config.value_columns())
    }

    /// Writes zeros, once, to the chunks that no copy writes and products read.
    pub fn clear_unused_chunks(&self, code: &'k Code, config: &AttentionConfig) {
        for operand in self.operands() {
            let unused = operand.stages.row_bytes() / CHUNK_BYTES - operand.chunks;
            if unused == 0 {
                continue;
            }
            let total = (config.tiling.stages() * operand.rows * unused) as i32;
            let zero = code.constant(0u32);
            code.range_by(code.thread(), total, config.threads() as i32, |i| {
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
