//! The same attention on `wgmma`, by blocks that are persistent and whose warps are specialised: one thread, the
//! producer, asks TMA for tiles of K and V; the consumers, groups of four warps that share nothing but the tiles,
//! multiply them.

mod consumer;
mod output_in_flight;
mod pipeline;
mod tma_ring;
mod work_queue;

use sage_ptx::{Code, Half, MmaElement, RoundedElement, Stored};

use crate::attention::config::{AttentionConfig, AttentionParams, WARPGROUP};
use crate::attention::key_tiles::TileListParams;
use consumer::{Consumer, Cursors};
use pipeline::Cursor;
use tma_ring::TmaRing;
pub use tma_ring::{TENSOR_MAPS, boxed_tensors, stage_bytes};
use work_queue::WorkQueue;

/// Registers of a multiprocessor, and what a thread of the producer's warpgroup needs.
const REGISTERS: u32 = 64 << 10;
const PRODUCER_REGISTERS: u32 = 24;
/// Most registers of a thread, in the steps of `setmaxnreg`.
const MOST_REGISTERS: u32 = 240;

/// Registers of each consumer's thread.
fn consumer_registers(config: &AttentionConfig) -> u32 {
    let left = REGISTERS / config.tiling.min_blocks() - WARPGROUP * PRODUCER_REGISTERS;
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
    let maps = TENSOR_MAPS.map(|name| k.tensor_map(name));
    let ring = TmaRing::new(k, config, maps);
    let work = WorkQueue::new(k, config, p, lists);
    k.barrier();
    let [warp, lane] = work.thread;
    let produces = warp.ge(config.tiling.warps() as i32);
    k.if_else(
        produces,
        || {
            k.fewer_registers(PRODUCER_REGISTERS);
            let first = warp.eq(config.tiling.warps() as i32) & lane.eq(0);
            k.when(first, || {
                let cursor = Cursor::new(k, config.tiling.stages(), "produced");
                work.hand_out(|place| {
                    place.key_tiles.for_each_loaded(k, |tile| ring.load(place, tile, &cursor));
                });
            });
        },
        || {
            k.more_registers(consumer_registers(config));
            let cursors = Cursors::new(k, config);
            work.take(|place| {
                Consumer::<E>::new::<H>(k, config, p, place, &ring, &cursors).compute::<H>(p);
            });
        },
    );
}
