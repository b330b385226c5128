//! Attention on `mma.sync`: every warp multiplies its own rows with the tiles that the block's threads have copied.

mod copied_tiles;
mod cp_async_ring;

use sage_ptx::{Code, Half, MmaElement, Rows, Stored};

use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::epilogue::Epilogue;
use crate::attention::key_tiles::{KeyTile, TileListParams};
use crate::attention::output::Output;
use crate::attention::place::Place;
use crate::attention::queries::Queries;
use crate::attention::scores::{KeyScales, Keys, MaskSource, Masking, Scoring};
use crate::attention::softmax::{Probabilities, Softmax};
pub(super) use copied_tiles::StagedTile;
pub(crate) use copied_tiles::copy_elements;
use cp_async_ring::CpAsyncRing;

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
    let ring = CpAsyncRing::new(k, config, p, &place);
    ring.start(&place);
    let queries = Queries::load::<H>(k, config, p, &place);
    let key_scales = KeyScales::new(config, p, &place);
    let softmax = Softmax::new(k, config);
    let output = Output::new(k, config);
    let scoring = Scoring { code: k, config, params: *p, place, queries };

    place.key_tiles.for_each(k, |tile: KeyTile<'k>| {
        // On their way while the tile is waited for.
        let deltas = scoring.deltas(tile.index);
        let (keys, values) = ring.next(tile.position, &place);
        let scales = key_scales.of_tile(tile.index);
        let masking = Masking { cut: tile.is_cut(), masked: tile.is_masked(), words: MaskSource::Memory };
        let group_scales = keys.group_scales();
        let fragments = keys.fragments;
        let keys = Keys { index: tile.index, fragments, scales, group_scales, deltas, masking };
        for step in 0..config.tiling.tile_keys() / config.tiling.step_keys() {
            let scores = [scoring.scores::<H>(&keys, step)];
            let first_column = step * config.tiling.step_keys();
            let rescale = |alphas: &Rows<_>| output.mul_rows(alphas);
            for p in scoring.probabilities(&softmax, &scores, first_column, &keys.masking, rescale) {
                add(&output, &p, &values, step);
            }
        }
    });

    let tile = ring.finish();
    let sums = softmax.finish();
    Epilogue::new(k, config, p, &place).store::<H>(&output, &sums, &scoring.queries.taken, Some(&tile));
}
