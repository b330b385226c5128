//! Attention forward: one kernel, specialised for every scheme that a GPU's tensor cores can compute.
//!
//! ```text
//! for each block of queries:                      (place, queries)
//!     quantise Q
//!     for each tile of keys that it sees:         (key_tiles)
//!         S = Q̂ · K̂ᵀ · scales                     (scores, score_tile)
//!         m' = max(m, rowmax S);  α = 2^(m − m')  (softmax)
//!         P = 2^(S − m')
//!         ℓ = α ℓ + rowsum P;  O = α O + P · V    (output)
//!     O = O / ℓ · scales of V + mean of V         (epilogue)
//! ```
//!
//! Who loads tiles, and which instruction multiplies them, is an engine's business: of `warps` by `cp.async`
//! or TMA and `mma.sync`, of `warpgroups` by TMA and `wgmma`.

mod band;
mod biased_softmax;
mod config;
mod epilogue;
mod kernel;
mod key_tiles;
mod mapped;
mod output;
mod pipeline;
mod place;
mod probabilities;
mod queries;
mod scaled_probabilities;
mod score_tile;
mod scores;
mod softmax;
mod warpgroups;
mod warps;

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, E4M3, Half, MmaElement, Program, RoundedElement, Stored, kernel};

use crate::kernel::Kernel;
use crate::operand::Element;
use crate::sinks::SinkParams;
use crate::tiling::Engine;

pub(crate) use band::Band;
use config::AttentionParams;
pub use config::{AttentionArgs, AttentionConfig, MaskForm, TileSource, padded_dim};
pub(crate) use config::{dims_description, dims_suffix, key_columns, value_blocks, value_columns};
use key_tiles::TileListParams;
pub use key_tiles::{CLEARED_TILE, CUT_TILE, ENTRIES_BEHIND, MASKED_TILE, TileListArgs};
pub use mapped::{MappedOperand, boxed_tensor};
pub(crate) use pipeline::Cursor;
pub(crate) use queries::load_channels;
pub(crate) use score_tile::capped;
pub use warpgroups::stage_bytes;
pub(crate) use warps::elements;

/// The attention kernel of a configuration.
fn attention(config: &AttentionConfig) -> Program {
    match (config.dtype, config.operands.v.element) {
        (DType::BF16, Element::E2M1) => write_scaled::<bf16>(config),
        (_, Element::E2M1) => write_scaled::<f16>(config),
        (DType::BF16, Element::BF16) => write::<bf16, bf16>(config),
        (DType::BF16, Element::E4M3) => write::<bf16, E4M3>(config),
        (DType::BF16, _) => write::<bf16, f16>(config),
        (_, Element::BF16) => write::<f16, bf16>(config),
        (_, Element::E4M3) => write::<f16, E4M3>(config),
        (_, _) => write::<f16, f16>(config),
    }
}

/// `H` is the caller's element type, `E` that of P and V as they are multiplied.
fn write<H, E>(config: &AttentionConfig) -> Program
where
    H: Half + MmaElement + Stored<Value = H>,
    E: RoundedElement,
{
    declared(config, |k, p, lists| match config.tiling.engine() {
        Engine::Warps => warps::write::<H>(k, config, p, lists, |output, p, values, step| {
            output.add::<E>(p, &values.fragments, step);
        }),
        Engine::Warpgroups => warpgroups::write::<H, E>(k, config, p, lists),
    })
}

/// The same where P and V are of 4 bits, with scales for groups of keys.
fn write_scaled<H>(config: &AttentionConfig) -> Program
where
    H: Half + MmaElement + Stored<Value = H>,
{
    declared(config, |k, p, lists| {
        warps::write::<H>(k, config, p, lists, |output, p, values, _| output.add_scaled(p, values));
    })
}

/// A kernel with its parameters, those of lists where it reads them.
fn declared(
    config: &AttentionConfig,
    write: impl for<'k> FnOnce(&'k Code, &AttentionParams<'k>, Option<&TileListParams<'k>>),
) -> Program {
    kernel(&config.name(), config.block_threads(), |k| {
        k.min_blocks(config.tiling.min_blocks());
        let mut p = AttentionParams::declare(k);
        let lists = (config.tiles == TileSource::List).then(|| TileListParams::declare(k));
        p.sinks = config.adds_sinks().then(|| SinkParams::declare(k));
        write(k, &p, lists.as_ref());
    })
}
