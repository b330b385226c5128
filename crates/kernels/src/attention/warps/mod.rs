//! Attention on `mma.sync`: every warp multiplies its own rows with the tiles that the block's threads, or
//! TMA, have copied.

mod bulk_ring;
mod chunks;
mod copied_tiles;
mod cp_async_ring;
mod head_channels;
mod register_ring;
mod tile_memory;

use sage_ptx::{Code, Half, MmaElement, Rows, Shared, SharedTile, Stored, Val};

use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::epilogue::Epilogue;
use crate::attention::key_tiles::{KeyTile, TileListParams};
use crate::attention::output::Output;
use crate::attention::place::Place;
use crate::attention::queries::Queries;
use crate::attention::scores::{Deltas, KeyScales, Keys, MaskSource, Masking, Scoring};
use crate::attention::softmax::{Probabilities, Softmax};
use crate::tiling::Copies;
use bulk_ring::BulkRing;
pub(super) use bulk_ring::boxed_tiles;
pub(super) use copied_tiles::StagedTile;
use cp_async_ring::CpAsyncRing;
pub(crate) use head_channels::elements;
use register_ring::RegisterRing;

/// The kernel's code. `add` adds P·V of a step's keys to the output.
pub(super) fn write<'k, H>(
    k: &'k Code,
    config: &AttentionConfig,
    p: &AttentionParams<'k>,
    lists: Option<&TileListParams<'k>>,
    add: impl Fn(&Output<'k, '_>, &Probabilities<'_, 'k>, &StagedTile<'k>, usize),
) where
    H: Half + MmaElement + Stored<Value = H>,
{
    let place = Place::of_block(k, config, p, lists);
    k.exit_when(place.empty);
    let ring = Ring::new(k, config, p, &place);
    ring.start(&place);
    let queries = Queries::load::<H>(k, config, p, &place, ring.scratch(), None);
    let key_scales = KeyScales::new(config, p, &place);
    let deltas = Deltas::new(config, p, &place);
    let softmax = Softmax::new(k, config);
    let output = Output::new(k, config);
    let scoring = Scoring { code: k, config, params: *p, place, queries };
    let has_rows = place.warp_row.lt(place.rows);

    // Before the loop, which keeps one index in place of the numbers that make it up.
    let epilogue = Epilogue::new(k, config, p, &place);

    place.key_tiles.for_each(k, |tile: KeyTile<'k>| {
        // On their way while the tile is waited for.
        let deltas = deltas.of_tile(tile.index);
        let (keys, values) = ring.next(tile.position, &place);
        let scales = key_scales.of_tile(tile.index);
        let masking = Masking { cut: tile.is_cut(), masked: tile.is_masked(), words: MaskSource::Memory };
        let group_scales = keys.group_scales();
        let fragments = keys.fragments;
        let keys = Keys { index: tile.index, fragments, scales, group_scales, deltas, masking };
        let multiply = || {
            for step in 0..config.tiling.tile_keys() / config.tiling.step_keys() {
                let scores = [scoring.scores::<H>(&keys, step)];
                if step == 0 {
                    // The first warp, which has rows wherever a block has some, does it for all.
                    ring.refill(tile.position, &place);
                }
                let first_column = step * config.tiling.step_keys();
                let rescale = |alphas: &Rows<_>| output.mul_rows(alphas);
                for p in scoring.probabilities(&softmax, &scores, first_column, &keys.masking, rescale) {
                    add(&output, &p, &values, step);
                }
            }
        };
        if config.idle_warps {
            k.when(has_rows, multiply)
        } else {
            multiply()
        }
        ring.release(&place);
    });

    let tile = ring.finish();
    let sums = softmax.finish();
    epilogue.store::<H>(&output, &sums, &scoring.queries.taken, Some(&tile));
}

/// How tiles come to shared memory.
enum Ring<'k, 'c> {
    Async(CpAsyncRing<'k, 'c>),
    Registers(RegisterRing<'k, 'c>),
    Bulk(BulkRing<'k, 'c>),
}

impl<'k, 'c> Ring<'k, 'c> {
    fn new(code: &'k Code, config: &'c AttentionConfig, p: &AttentionParams<'k>, place: &Place<'k>) -> Self {
        match config.tiling.copies() {
            Copies::Registers => Ring::Registers(RegisterRing::new(code, config, p, place)),
            Copies::Async => Ring::Async(CpAsyncRing::new(code, config, p, place)),
            Copies::Tma => Ring::Bulk(BulkRing::new(code, config)),
        }
    }

    /// Memory that nothing else needs before the first tile is there, where there is some.
    fn scratch(&self) -> Option<Shared<'k, i32>> {
        match self {
            Ring::Async(_) | Ring::Bulk(_) => None,
            Ring::Registers(ring) => ring.scratch(),
        }
    }

    fn start(&self, place: &Place<'k>) {
        match self {
            Ring::Async(ring) => ring.start(place),
            Ring::Registers(ring) => ring.start(place),
            Ring::Bulk(ring) => ring.start(place),
        }
    }

    /// Where K and V of the tile at a position, the next one, are read.
    fn next(&self, position: Val<'k, i32>, place: &Place<'k>) -> (StagedTile<'k>, StagedTile<'k>) {
        match self {
            Ring::Async(ring) => ring.next(position, place),
            Ring::Registers(ring) => ring.next(position, place),
            Ring::Bulk(ring) => ring.next(),
        }
    }

    /// While the tile at a position is computed: asks for what takes the stage of the tile before, where that waits for
    /// every warp to be done with it.
    fn refill(&self, position: Val<'k, i32>, place: &Place<'k>) {
        if let Ring::Bulk(ring) = self {
            ring.refill(position, place);
        }
    }

    /// The warp is done with the tile, where warps say so.
    fn release(&self, place: &Place<'k>) {
        if let Ring::Bulk(ring) = self {
            ring.release(place);
        }
    }

    /// The tiles' memory for the output, when every warp is done with them.
    fn finish(&self) -> SharedTile<'k> {
        match self {
            Ring::Async(ring) => ring.finish(),
            Ring::Registers(ring) => ring.finish(),
            Ring::Bulk(ring) => ring.finish(),
        }
    }
}
