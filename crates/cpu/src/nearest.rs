//! Which scheme the CPU computes in place of one that it has no kernels for.

use sage_core::{Preset, Pv, Scheme};

use crate::tile::TILE_KEYS;

/// What a message offers by name where the nearest scheme is no preset: of the CPU's integer schemes the most accurate.
pub(crate) const BY_NAME: Preset = Preset::INT8_PER_TOKEN;

/// The scheme of the CPU's kernels that is nearest to `scheme`: `scheme` itself, but that 12-bit P·V has scales of 128
/// keys, whatever its blocks are. All presets have kernels.
pub fn nearest_scheme(mut scheme: Scheme) -> Scheme {
    if let Pv::Fixed12 { block } = &mut scheme.pv {
        *block = TILE_KEYS;
    }
    scheme
}
