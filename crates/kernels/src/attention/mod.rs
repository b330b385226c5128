//! Attention forward on `mma.sync`: one kernel, specialised for every scheme that this instruction can compute.
//!
//! ```text
//! for each block of queries:                      (place, queries)
//!     quantise Q
//!     for each tile of keys that it sees:         (key_tiles, cp_async_ring)
//!         S = Q̂ · K̂ᵀ · scales                     (scores)
//!         m' = max(m, rowmax S);  α = 2^(m − m')  (softmax)
//!         P = 2^(S − m')
//!         ℓ = α ℓ + rowsum P;  O = α O + P · V    (output)
//!     O = O / ℓ · scales of V + mean of V
//! ```

mod band;
mod config;
mod consumer;
mod copied_tiles;
mod cp_async_ring;
mod epilogue;
mod kernel;
mod key_tiles;
mod output;
mod output_in_flight;
mod pipeline;
mod place;
mod queries;
mod score_tile;
mod scores;
mod softmax;
mod tma_ring;
mod warpgroups;
mod work_queue;

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, E4M3, Half, MmaElement, Program, RoundedElement, Stored, kernel};

use crate::kernel::Kernel;
use crate::tiling::Engine;

use config::AttentionParams;
pub use config::{
    AttentionArgs, AttentionConfig, MaskForm, Scores, TileSource, ValueSource, Values, padded_dim,
};
use cp_async_ring::CpAsyncRing;
use epilogue::Epilogue;
pub(crate) use epilogue::least_lse;
pub use key_tiles::{CUT_TILE, TileListArgs};
use key_tiles::{KeyTile, TileListParams};
use output::Output;
use place::Place;
use queries::Queries;
use scores::{KeyScales, Keys, Scoring};
use softmax::Softmax;
pub use tma_ring::{TENSOR_MAPS, boxed_tensors, stage_bytes};

/// The attention kernel of a configuration.
fn attention(config: &AttentionConfig) -> Program {
    match (config.dtype, config.values) {
        (DType::BF16, Values::F16(_)) => write::<bf16, f16>(config),
        (DType::BF16, Values::BF16) => write::<bf16, bf16>(config),
        (DType::BF16, Values::Fp8(_)) => write::<bf16, E4M3>(config),
        (_, Values::F16(_)) => write::<f16, f16>(config),
        (_, Values::BF16) => write::<f16, bf16>(config),
        (_, Values::Fp8(_)) => write::<f16, E4M3>(config),
    }
}

/// `H` is the caller's element type, `E` that of P and V as they are multiplied.
fn write<H, E>(config: &AttentionConfig) -> Program
where
    H: Half + MmaElement + Stored<Value = H>,
    E: RoundedElement,
{
    kernel(&config.name(), config.block_threads(), |k| {
        k.min_blocks(config.tiling.min_blocks());
        let p = AttentionParams::declare(k);
        let lists = (config.tiles == TileSource::List).then(|| TileListParams::declare(k));
        match config.tiling.engine() {
            Engine::Warps => write_warps::<H, E>(k, config, &p, lists.as_ref()),
            Engine::Warpgroups => warpgroups::write::<H, E>(k, config, &p, lists.as_ref()),
        }
    })
}

/// The kernel's code on `mma.sync`.
fn write_warps<'k, H, E>(
    k: &'k Code,
    config: &AttentionConfig,
    p: &AttentionParams<'k>,
    lists: Option<&TileListParams<'k>>,
) where
    H: Half + MmaElement + Stored<Value = H>,
    E: RoundedElement,
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
        let (fragments, values) = ring.next(tile.position, &place);
        let scales = key_scales.of_tile(tile.index);
        let keys = Keys { index: tile.index, fragments, scales, cut: tile.is_cut() };
        for step in 0..config.tiling.tile_keys() / config.tiling.step_keys() {
            let scores = scoring.scores::<H>(&keys, step);
            for p in softmax.advance(k, &[scores], |alphas| output.mul_rows(alphas)) {
                output.add::<E>(&p, &values, step);
            }
        }
    });

    let tile = ring.finish();
    let sums = softmax.finish();
    Epilogue::new(k, config, p, &place).store::<H>(&output, &sums, &scoring.queries.taken, Some(&tile));
}
