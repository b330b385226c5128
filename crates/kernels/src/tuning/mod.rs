//! Tile shapes for each GPU and kind of kernel: tables of rows by architecture, each with its measured reason.

mod ampere;
mod blackwell;
mod blocks;
mod candidates;
mod costs;
mod hopper;
mod turing;

use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::tiling::Tiling;

pub(crate) use blocks::of_blocks;
pub use candidates::candidates;
pub(crate) use costs::{Cost, cost};

/// Sixteenths of a byte of a 4-bit element and its part of the scale of 16.
const FP4_SIXTEENTHS: usize = 9;

/// What the tile shape of a kernel is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Whether Q·Kᵀ is of integers.
    pub integer: bool,
    /// Whether Q·Kᵀ is in FP4.
    #[serde(default)]
    pub fp4_scores: bool,
    /// Whether P·V is in FP8.
    pub fp8: bool,
    /// Whether P·V is in FP4, as Q·Kᵀ is then.
    #[serde(default)]
    pub fp4_values: bool,
    /// Whether P·V of a tile is summed by itself first.
    pub two_level: bool,
    /// Channels of queries and keys in tiles: [`AttentionConfig::key_columns`](crate::attention::AttentionConfig).
    pub padded_dim: usize,
    /// Channels of V and of the output in tiles of a block: `AttentionConfig::value_columns`.
    #[serde(default)]
    pub padded_value_dim: usize,
    /// Whether values lie in the tiles of keys.
    #[serde(default)]
    pub values_in_keys: bool,
    /// Whether scores are plain floats before the softmax: masks, caps, scales of keys.
    pub plain: bool,
    /// Whether rows are copied element by element.
    pub unaligned: bool,
    /// Most query rows of a warp that the scheme's groups allow.
    pub max_rows_per_warp: usize,
    /// Whether warpgroups can compute it.
    pub warpgroups: bool,
    /// Whether 128 query rows share a scale, and so must be in one block.
    pub per_block: bool,
    /// Whether sequences have no more query rows than two warpgroups.
    pub few_rows: bool,
    /// Bytes of the bias of a score that warpgroups read in shared memory; 0 where there is none.
    #[serde(default)]
    pub bias_bytes: usize,
}

/// A tile shape, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuned {
    /// The shape.
    pub tiling: Tiling,
    /// Why this one, in a few words.
    pub reason: &'static str,
}

/// A row of a table: the first one that fits a key is its.
struct Row<T> {
    fits: fn(&Key) -> bool,
    tiling: T,
    reason: &'static str,
}

impl Key {
    /// The first row of a table that fits.
    fn row<'t, T>(&self, table: &'t [Row<T>]) -> &'t Row<T> {
        let found = table.iter().find(|row| (row.fits)(self));
        // The last row of every table fits all keys, as a test sees to.
        found.unwrap_or(&table[table.len() - 1])
    }

    /// Whether Q and K have more channels than registers hold of queries, or than products of integers may sum.
    const fn is_large(&self) -> bool {
        self.padded_dim > 256
    }

    /// Whether the sums of 16 rows, or their queries, fill half the registers.
    const fn is_wide(&self) -> bool {
        self.padded_value_dim > 128 || self.padded_dim > 192
    }

    /// Whether K and V are read as given. Tiles of FP8 values are of 64 keys in the workspace, as those of quantised keys
    /// are.
    const fn is_given(&self) -> bool {
        !self.integer && !self.fp4_scores && !self.fp8
    }

    /// Whether both kinds of heads have few channels.
    const fn is_narrow(&self) -> bool {
        self.padded_dim <= 64 && self.padded_value_dim <= 64
    }

    /// Whether heads are neither.
    const fn is_medium(&self) -> bool {
        !self.is_wide() && !self.is_narrow()
    }

    /// Sixteenths of a byte of an element of Q and K as they are multiplied, with its part of a scale where groups have
    /// one.
    const fn key_sixteenths(&self) -> usize {
        match (self.fp4_scores, self.integer) {
            (true, _) => FP4_SIXTEENTHS,
            (false, true) => 16,
            (false, false) => 32,
        }
    }

    /// The same of an element of P and V.
    const fn value_sixteenths(&self) -> usize {
        match (self.fp4_values, self.fp8) {
            (true, _) => FP4_SIXTEENTHS,
            (false, true) => 16,
            (false, false) => 32,
        }
    }

    /// Bytes of a tile of K and one of V.
    const fn tile_bytes(&self, tile_keys: usize) -> usize {
        let of_value = if self.values_in_keys { 0 } else { self.value_sixteenths() * self.padded_value_dim };
        tile_keys * (self.key_sixteenths() * self.padded_dim + of_value) / 16
    }

    /// Bytes of the biases of so many query rows and a tile of keys.
    const fn biases_bytes(&self, rows: usize, tile_keys: usize) -> usize {
        rows * tile_keys * self.bias_bytes
    }

    /// Bytes of so many query rows in shared memory.
    const fn queries_bytes(&self, rows: usize) -> usize {
        rows * self.key_sixteenths() * self.padded_dim / 16
    }
}

/// Whether shared memory holds enough tiles with their biases.
pub(crate) fn holds_biases(machine: &Machine, key: &Key) -> bool {
    !key.warpgroups || hopper::tuned(machine, key).tiling.stages() >= 2
}

/// The tile shape for a kernel.
pub fn tiling(machine: &Machine, key: &Key) -> Tuned {
    match key {
        Key { warpgroups: true, .. } => hopper::tuned(machine, key),
        Key { fp4_scores: true, .. } => blackwell::tuned(machine, key),
        _ if machine.has_async_copies() => ampere::tuned(machine, key),
        _ => turing::tuned(key),
    }
}

/// Tile shapes that calls of some sizes are faster in than in [`tiling`]'s: with fewer query rows in a block, and of the
/// other engine.
pub(crate) fn alternatives(machine: &Machine, key: &Key) -> Vec<Tuned> {
    let own = tiling(machine, key);
    let others = match own.tiling {
        Tiling::Warpgroups(tiling) => hopper::other_groups(machine, key, tiling),
        Tiling::Warps(_) => Vec::new(),
    };
    std::iter::once(own).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sage_ptx::Target;

    /// Every key that differs in something.
    fn keys() -> impl Iterator<Item = Key> {
        let dims = [64, 128, 192, 256, 320, 512, 576]
            .into_iter()
            .flat_map(|dim| [dim.min(256), 64, 128, 192, 256].map(|value_dim| [dim, value_dim]));
        let others = dims.flat_map(|dims| {
            let rows = [16, 32].into_iter();
            rows.flat_map(move |rows| [0, 2, 4].map(|bias_bytes| (dims, rows, bias_bytes)))
        });
        (0..1 << 11).flat_map(move |bits| {
            others.clone().map(move |([padded_dim, padded_value_dim], max_rows_per_warp, bias_bytes)| Key {
                integer: bits & 1 != 0,
                fp8: bits & 2 != 0,
                two_level: bits & 4 != 0,
                padded_dim,
                padded_value_dim,
                values_in_keys: bits & 1024 != 0,
                plain: bits & 8 != 0,
                unaligned: bits & 16 != 0,
                max_rows_per_warp,
                warpgroups: bits & 32 != 0,
                per_block: bits & 64 != 0,
                few_rows: bits & 128 != 0,
                fp4_scores: bits & 256 != 0,
                fp4_values: bits & 512 != 0,
                bias_bytes,
            })
        })
    }

    /// Whether some operands have the key: FP4 is not of integers, and values in it go with scores in it; products of more
    /// than 256 channels are of 16 bits.
    fn possible(key: &Key) -> bool {
        let sixteen = !(key.integer || key.fp4_scores || key.fp8 || key.warpgroups);
        let scores = !(key.fp4_scores && (key.integer || key.warpgroups)) && (sixteen || !key.is_large());
        let scores = scores && (key.is_large() || !key.values_in_keys);
        scores && !(key.fp4_values && (key.fp8 || key.two_level || !key.fp4_scores))
    }

    #[test]
    fn every_table_has_a_row_for_every_key() {
        for key in keys() {
            assert!(turing::ROWS.iter().any(|row| (row.fits)(&key)), "{key:?}");
            assert!(ampere::ROWS.iter().any(|row| (row.fits)(&key)), "{key:?}");
            assert!(hopper::ROWS.iter().any(|row| (row.fits)(&key)), "{key:?}");
            assert!(blackwell::ROWS.iter().any(|row| (row.fits)(&key)), "{key:?}");
        }
    }

    #[test]
    fn what_is_chosen_fits_the_gpu_and_is_tried_first() {
        for target in
            [Target::SM_75, Target::SM_80, Target::SM_86, Target::SM_89, Target::SM_90A, Target::SM_120A]
        {
            let machine = Machine::typical(target);
            let fitting = |key: &Key| {
                (machine.has_wgmma() || !key.warpgroups)
                    && (machine.has_fp8() || !key.fp8)
                    && (machine.has_fp4() || !key.fp4_scores || machine.has_async_copies())
                    && holds_biases(&machine, key)
            };
            for key in keys().filter(possible).filter(fitting) {
                let Tuned { tiling, .. } = tiling(&machine, &key);
                let fits = match &tiling {
                    Tiling::Warps(tiling) => ampere::shared_bytes(tiling, &key) <= machine.shared_bytes,
                    Tiling::Warpgroups(tiling) => {
                        (2..=hopper::most_stages(&machine, tiling, &key)).contains(&tiling.stages)
                    }
                };
                assert!(fits, "{key:?} on {target}: {tiling}");
                let tried = candidates(&machine, &key);
                assert_eq!(tried.first(), Some(&tiling), "{key:?} on {target}");
                let twice = tried.iter().enumerate().find(|(index, tiling)| tried[..*index].contains(tiling));
                assert_eq!(twice, None, "{key:?} on {target}");
            }
        }
    }
}
