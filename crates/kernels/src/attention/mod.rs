//! Attention forward on `mma.sync`: one kernel, specialised for every scheme that this instruction can compute.
//!
//! ```text
//! for each block of queries:                      (place, queries)
//!     quantise Q
//!     for each tile of keys that it sees:         (ring)
//!         S = Q̂ · K̂ᵀ · scales                     (scores)
//!         m' = max(m, rowmax S);  α = 2^(m − m')  (softmax)
//!         P = 2^(S − m')
//!         ℓ = α ℓ + rowsum P;  O = α O + P · V    (output)
//!     O = O / ℓ · scales of V + mean of V
//! ```

mod bulk_ring;
mod config;
mod epilogue;
mod kernel;
mod output;
mod pieces;
mod place;
mod queries;
mod ring;
mod score_tile;
mod scores;
mod softmax;
mod warpgroups;

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{E4M3, Half, MmaElement, Program, RoundedElement, Stored, kernel};

use crate::kernel::Kernel;

pub use bulk_ring::{BULK_MAPS, boxed_tensors, stage_bytes};
use config::AttentionParams;
pub use config::{
    AttentionArgs, AttentionConfig, Engine, MaskForm, Scores, Tiling, ValueSource, Values, padded_dim,
};
use epilogue::Epilogue;
pub(crate) use epilogue::least_lse;
use output::Output;
use place::Place;
use queries::Queries;
use ring::Ring;
use scores::{KeyScales, KeyTile, Scoring};
use softmax::Softmax;

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
        k.min_blocks(config.tiling.min_blocks);
        let p = AttentionParams::declare(k);
        if config.tiling.engine == Engine::Warpgroups {
            return warpgroups::write::<H, E>(k, config, &p);
        }
        let place = Place::of_block(k, config, &p);
        k.exit_when(place.empty);
        let ring = Ring::new(k, config, &p, &place);
        ring.start(&place);
        let queries = Queries::load::<H>(k, config, &p, &place);
        let key_scales = KeyScales::new(config, &p, &place);
        let softmax = Softmax::new(k, config);
        let output = Output::new(k, config);

        let scoring = Scoring { code: k, config, params: p, place, queries };

        let tile_of_keys = |index, cut: bool| {
            let (fragments, values) = ring.next(index, &place);
            let keys = KeyTile { index, fragments, scales: key_scales.of_tile(index), cut };
            for step in 0..config.tiling.tile_keys / config.tiling.step_keys {
                let scores = scoring.scores::<H>(&keys, step);
                for p in softmax.advance(k, &[scores], |alphas| output.mul_rows(alphas)) {
                    output.add::<E>(&p, &values, step);
                }
            }
        };
        // Tiles cut by a window's start, whole tiles, tiles cut by the diagonal or the end: whole ones pay for no mask.
        k.range(0, 2, |end| {
            let start = end.eq(0).select(place.first_tile, place.inner_end);
            let stop = end.eq(0).select(place.inner_start, place.end_tile);
            k.range(start, stop, |tile| tile_of_keys(tile, true));
            k.when(end.eq(0), || {
                k.range(place.inner_start, place.inner_end, |tile| tile_of_keys(tile, false));
            });
        });

        let tile = ring.finish();
        let sums = softmax.finish();
        Epilogue::new(k, config, &p, &place).store::<H>(&output, &sums, &scoring.queries.taken, Some(&tile));
    })
}
