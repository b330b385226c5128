//! The same attention on `wgmma`, by blocks that are persistent and whose warps are specialised: one thread, the
//! producer, asks TMA for tiles of K and V; the consumers, groups of four warps that share nothing but the tiles,
//! multiply them.

mod bias_ring;
mod consumer;
mod output_in_flight;
mod query_stage;
mod tma_ring;
mod work_queue;

use sage_ptx::{Code, Half, MmaElement, RoundedElement, Stored};

use crate::attention::config::{AttentionConfig, AttentionParams, WARPGROUP};
use crate::attention::key_tiles::TileListParams;
use crate::attention::mapped::MappedOperand;
use crate::attention::pipeline::Cursor;
use bias_ring::BiasRing;
use consumer::{Consumer, Cursors, Rings};
use query_stage::QueryStage;
pub(super) use query_stage::StagedRows;
use tma_ring::TmaRing;
pub(super) use tma_ring::boxed_tensor;
pub use tma_ring::stage_bytes;
use work_queue::WorkQueue;

/// Registers of a multiprocessor.
const REGISTERS: u32 = 64 << 10;
/// Most registers of a thread, in the steps of `setmaxnreg`.
const MOST_REGISTERS: u32 = 240;

/// Registers of a thread of the producer's warpgroup.
fn producer_registers(config: &AttentionConfig) -> u32 {
    if bias_ring::stage_bytes(config) > 0 { 32 } else { 24 }
}

/// Registers of each consumer's thread. A block shares out those that it was started with, which are as many for each
/// of its threads: asking for more waits for ever.
fn consumer_registers(config: &AttentionConfig) -> u32 {
    let threads = config.block_threads();
    let of_block = REGISTERS / config.tiling.min_blocks() / threads / 8 * 8 * threads;
    let left = of_block - WARPGROUP * producer_registers(config);
    (left / config.threads() / 8 * 8).min(MOST_REGISTERS)
}

pub(super) fn write<'k, H, E>(
    k: &'k Code,
    config: &AttentionConfig,
    p: &AttentionParams<'k>,
    lists: Option<&TileListParams<'k>>,
) where
    H: Half + MmaElement + Stored<Value = H>,
    E: RoundedElement,
{
    let map = |operand: MappedOperand| k.tensor_map(operand.map_name());
    let kv_maps = [MappedOperand::Keys, MappedOperand::Values].map(map);
    let q_map = config.queries_by_tma.then(|| map(MappedOperand::Queries));
    let tiles = TmaRing::new(k, config, kv_maps);
    let biases = BiasRing::new(k, config, tiles.memory_of_biases);
    let queries = q_map.map(|map| QueryStage::new(k, config, map));
    let rings = Rings { tiles, biases, queries };
    let work = WorkQueue::new(k, config, p, lists);
    k.barrier();
    let [warp, lane] = work.thread;
    let produces = warp.ge(config.tiling.warps() as i32);
    k.if_else(
        produces,
        || {
            k.fewer_registers(producer_registers(config));
            let first = warp.eq(config.tiling.warps() as i32) & lane.eq(0);
            k.when(first, || {
                let stages = config.tiling.stages();
                let cursor = Cursor::new(k, stages, "produced");
                let biases =
                    rings.biases.as_ref().map(|ring| (ring, Cursor::new(k, stages, "biases_produced")));
                let queries =
                    rings.queries.as_ref().map(|stage| (stage, QueryStage::cursor(k, "queries_produced")));
                work.hand_out(|place| {
                    if let Some((stage, cursor)) = &queries {
                        stage.load(place, cursor);
                    }
                    place.key_tiles.for_each_loaded(k, |tile| {
                        rings.tiles.load(place, tile.index, &cursor);
                        if let Some((ring, cursor)) = &biases {
                            ring.load(place, &tile, cursor);
                        }
                    });
                });
            });
        },
        || {
            k.more_registers(consumer_registers(config));
            let cursors = Cursors::new(k, config);
            work.take(|place| {
                Consumer::<E>::new::<H>(k, config, p, place, &rings, &cursors).compute::<H>(p);
            });
        },
    );
}
