//! Which scheme the CPU computes in place of one that it has no kernels for.

use sage_core::{Granularity, IntBits, Preset, Pv, Qk, Scheme, SmoothQ};

use crate::tile::TILE_KEYS;

/// What a message offers by name where the nearest scheme is no preset: of the CPU's integer schemes the most accurate.
pub(crate) const BY_NAME: Preset = Preset::INT8_PER_TOKEN;

/// The scheme of the CPU's kernels that is nearest to `scheme` and at least as accurate; `scheme` itself where there
/// is no reason to leave it.
///
/// | in the scheme | on the CPU |
/// | --- | --- |
/// | P·V in FP8, INT8 or FP4; in 12 bits of other blocks | 12-bit P·V of 128 keys with exact sums |
/// | P·V in 16 bits | P·V in f32 |
/// | smoothed V | left out: it serves narrow sums alone |
/// | smoothed Q with INT4 scores | INT8 scores |
/// | FP4 scores | INT8 scores per token |
/// | scales per tensor | scales per block |
/// | scales of keys that are no part of a tile of 128 | scales per token |
pub fn nearest_scheme(mut scheme: Scheme) -> Scheme {
    if matches!(scheme.qk, Qk::Fp4(_)) {
        scheme.qk = Preset::INT8_PER_TOKEN.scheme(64).qk;
    }
    if let Qk::Int(quantizer) = &mut scheme.qk {
        if scheme.smooth.q != SmoothQ::Off {
            quantizer.bits = IntBits::Eight;
        }
        if quantizer.granularity == Granularity::PerTensor {
            quantizer.granularity = Granularity::PerBlock;
        }
        let tile = &mut quantizer.tile;
        if !(TILE_KEYS.is_multiple_of(tile.block_k) && TILE_KEYS.is_multiple_of(tile.warp_k)) {
            quantizer.granularity = Granularity::PerToken;
            (tile.block_k, tile.warp_k) = (TILE_KEYS, TILE_KEYS);
        }
    }
    scheme.smooth.q = SmoothQ::Off;
    scheme.smooth.v = false;
    scheme.pv = match scheme.pv {
        Pv::F32 | Pv::F16(_) | Pv::BF16(_) => Pv::F32,
        Pv::Fp8 { .. } | Pv::Int8 | Pv::Fp4 { .. } | Pv::Fixed12 { .. } => Pv::Fixed12 { block: TILE_KEYS },
    };
    scheme
}
