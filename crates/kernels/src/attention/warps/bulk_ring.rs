//! Tiles of K and V on their way through TMA, for kernels of `mma.sync`: one thread asks for each tile, in one copy for
//! an operand with the scales behind its codes, and an `mbarrier` tells all warps when it is there.
//!
//! The thread is one of the first warp, which computes like the others. A warp for nothing but copies would take its
//! registers from those that compute: of three blocks of four warps each thread has 168, and of five 136. A second
//! barrier for each stage tells the thread that every warp is done with it. It asks between a tile's two products, by
//! when the slowest warp has had half a tile's time to finish the tile before, so that nobody waits for anybody else.

use sage_ptx::{BoxedTensor, Code, Shared, SharedTile, Val};

use super::copied_tiles::{StagedTile, TileShape};
use crate::attention::config::AttentionConfig;
use crate::attention::mapped::MappedOperand;
use crate::attention::pipeline::{Cursor, Pipeline};
use crate::attention::place::Place;

/// Most rows of a box.
const MOST_ROWS: usize = 256;

/// Rows after which a swizzle repeats itself, of those that tiles have.
const SWIZZLE_ROWS: usize = 8;

/// How an operand's tiles of the workspace are boxes: rows of bytes, those of scales among them.
#[derive(Clone, Copy, Debug)]
struct Boxes {
    row_bytes: usize,
    /// Rows of a tile.
    rows: usize,
    /// Boxes of a tile.
    count: usize,
}

impl Boxes {
    fn of(config: &AttentionConfig, operand: MappedOperand) -> Self {
        let (of_k, of_v) = (config.key_columns(), config.value_columns());
        let tile_keys = config.tiling.tile_keys();
        let (operand, rows, elements) = match operand {
            MappedOperand::Values => (config.operands.v, of_v, tile_keys),
            MappedOperand::Keys | MappedOperand::Queries => (config.operands.k, tile_keys, of_k),
        };
        let rows = operand.tile_rows(rows, elements);
        Boxes { row_bytes: operand.bytes(elements), rows, count: rows.div_ceil(MOST_ROWS) }
    }

    fn tile_bytes(&self) -> usize {
        self.rows * self.row_bytes
    }

    /// Rows of a box. Those of larger tiles are halves of whole swizzles.
    fn box_rows(&self) -> usize {
        self.rows / self.count
    }
}

/// What the tensor map of an operand describes: all tiles of the workspace at `address`, one after the other.
pub(in crate::attention) fn boxed_tiles(
    config: &AttentionConfig,
    operand: MappedOperand,
    address: u64,
    workspace_tiles: usize,
) -> BoxedTensor {
    let boxes = Boxes::of(config, operand);
    let row = boxes.row_bytes as u64;
    BoxedTensor {
        name: operand.map_name(),
        address,
        element_bytes: 1,
        shape: [row, (workspace_tiles * boxes.rows) as u64, 1, 1],
        strides: [row, 16, 16],
        tile: [boxes.row_bytes as u32, boxes.box_rows() as u32, 1, 1],
        swizzle: boxes.row_bytes,
    }
}

/// One operand's stages.
struct Stages<'k> {
    boxes: Boxes,
    memory: Shared<'k, u8>,
    map: Val<'k, u64>,
    /// The tile in the first of them.
    first: StagedTile<'k>,
}

impl<'k> Stages<'k> {
    fn staged(&self, stage: Val<'k, i32>) -> StagedTile<'k> {
        self.first.at_byte(stage * self.boxes.tile_bytes() as i32)
    }
}

/// The ring of both operands, which come and go together.
pub(super) struct BulkRing<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    keys: Stages<'k>,
    values: Stages<'k>,
    memory: Shared<'k, u8>,
    pipeline: Pipeline<'k>,
    /// Where the warp's computation stands.
    cursor: Cursor<'k>,
}

impl<'k, 'c> BulkRing<'k, 'c> {
    pub fn new(code: &'k Code, config: &'c AttentionConfig) -> Self {
        let stages = config.tiling.stages();
        let [of_keys, of_values] = [MappedOperand::Keys, MappedOperand::Values].map(|o| Boxes::of(config, o));
        let first_value =
            (stages * of_keys.tile_bytes()).next_multiple_of(SWIZZLE_ROWS * of_values.row_bytes);
        let stages_bytes = first_value + stages * of_values.tile_bytes();
        // The output passes through the same memory at the end.
        let bytes = stages_bytes.max(config.block_q() * 2 * config.value_columns());
        let memory = code.shared::<u8>("tiles", bytes);
        let barriers = code.mbarriers("tiles_full_empty", Pipeline::barriers(stages));
        let (of_k, of_v, tile_keys) =
            (config.key_columns(), config.value_columns(), config.tiling.tile_keys());
        let of = |operand: MappedOperand, boxes, memory, shape: TileShape<'k>| Stages {
            boxes,
            memory,
            map: code.tensor_map(operand.map_name()),
            first: shape.staged(),
        };
        let shape = TileShape::quantised(memory, &config.operands.k, tile_keys, of_k);
        let keys = of(MappedOperand::Keys, of_keys, memory, shape);
        let memory_of_values = memory.plus(first_value as i32);
        let shape = TileShape::quantised(memory_of_values, &config.operands.v, of_v, tile_keys);
        let values = of(MappedOperand::Values, of_values, memory_of_values, shape);
        let pipeline = Pipeline::new(barriers, stages);
        let cursor = Cursor::new(code, stages, "tile");
        BulkRing { code, config, keys, values, memory, pipeline, cursor }
    }

    /// Whether the thread is the one that asks for tiles.
    fn produces(&self) -> Val<'k, bool> {
        self.code.thread().eq(0)
    }

    /// Asks for the first tiles.
    pub fn start(&self, place: &Place<'k>) {
        let code = self.code;
        code.when(self.produces(), || {
            self.pipeline.init(self.config.tiling.warps() as u32);
            code.fence_mbarriers();
            for stage in 0..self.config.tiling.stages() as i32 - 1 {
                place.key_tiles.when_loaded(place.key_tiles.own().start + stage, |tile| {
                    self.copy(place, tile, code.constant(stage));
                });
            }
        });
        // Nobody waits at a barrier that is not initialised.
        code.barrier();
    }

    /// Waits for the next tile, and returns where its K and V are read.
    pub fn next(&self) -> (StagedTile<'k>, StagedTile<'k>) {
        let stage = self.pipeline.wait_full(&self.cursor);
        (self.keys.staged(stage), self.values.staged(stage))
    }

    /// While the tile at a position is computed: asks for the one that takes the stage of the tile before, which the
    /// warp itself is done with.
    pub fn refill(&self, position: Val<'k, i32>, place: &Place<'k>) {
        let ahead = self.config.tiling.stages() as i32 - 1;
        self.code.when(self.produces(), || {
            place.key_tiles.when_loaded(position + ahead, |tile| {
                let stage = self.pipeline.wait_empty_before(&self.cursor);
                self.copy(place, tile, stage);
            });
        });
    }

    /// The warp is done with the tile.
    pub fn release(&self, place: &Place<'k>) {
        // Every lane has read what it reads of the tile before one of them says so.
        self.code.warp_sync();
        self.code.when(place.lane.eq(0), || self.pipeline.release(self.cursor.stage()));
        self.cursor.advance();
    }

    /// Waits until every warp is done with the tiles; their memory is then free for the output. Every copy has landed,
    /// as every tile that was asked for has been waited for.
    pub fn finish(&self) -> SharedTile<'k> {
        self.code.barrier();
        SharedTile::new(self.memory, 2 * self.config.value_columns())
    }

    /// Starts copying a tile to a stage, which is free.
    fn copy(&self, place: &Place<'k>, tile: Val<'k, i32>, stage: Val<'k, i32>) {
        let full = self.pipeline.full(stage);
        let operands = [&self.keys, &self.values];
        full.arrive_expecting(operands.map(|operand| operand.boxes.tile_bytes() as i32).iter().sum::<i32>());
        let tile = place.first_key_tile + tile;
        let zero = self.code.constant(0);
        for Stages { boxes, memory, map, .. } in operands {
            let to = memory.at(stage * boxes.tile_bytes() as i32);
            for index in 0..boxes.count {
                let first = index * boxes.box_rows();
                let row = tile * boxes.rows as i32 + first as i32;
                let to = to.plus((first * boxes.row_bytes) as i32);
                to.copy_tensor_to_block(*map, &[zero, row, zero, zero], &full);
            }
        }
    }
}
