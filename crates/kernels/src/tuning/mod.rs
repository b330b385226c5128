//! Tile shapes for each GPU and kind of kernel: tables of rows by architecture, each with its measured reason.

mod ampere;
mod blocks;
mod candidates;
mod hopper;

use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::tiling::Tiling;

pub(crate) use blocks::of_blocks;
pub use candidates::candidates;

/// What the tile shape of a kernel is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Whether Q·Kᵀ is of integers.
    pub integer: bool,
    /// Whether P·V is in FP8.
    pub fp8: bool,
    /// Whether P·V of a tile is summed by itself first.
    pub two_level: bool,
    /// 64, 128 or 256.
    pub padded_dim: usize,
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

    /// Bytes of an element of Q and K as they are multiplied.
    const fn key_bytes(&self) -> usize {
        if self.integer { 1 } else { 2 }
    }

    /// Bytes of an element of P and V.
    const fn value_bytes(&self) -> usize {
        if self.fp8 { 1 } else { 2 }
    }

    /// Bytes of a tile of K and one of V.
    const fn tile_bytes(&self, tile_keys: usize) -> usize {
        tile_keys * (self.key_bytes() + self.value_bytes()) * self.padded_dim
    }

    /// Bytes of the biases of so many query rows and a tile of keys.
    const fn biases_bytes(&self, rows: usize, tile_keys: usize) -> usize {
        rows * tile_keys * self.bias_bytes
    }

    /// Bytes of so many query rows in shared memory.
    const fn queries_bytes(&self, rows: usize) -> usize {
        rows * self.key_bytes() * self.padded_dim
    }
}

/// Whether shared memory holds enough tiles with their biases.
pub(crate) fn holds_biases(machine: &Machine, key: &Key) -> bool {
    !key.warpgroups || hopper::tuned(machine, key).tiling.stages() >= 2
}

/// The tile shape for a kernel.
pub fn tiling(machine: &Machine, key: &Key) -> Tuned {
    if key.warpgroups { hopper::tuned(machine, key) } else { ampere::tuned(machine, key) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sage_ptx::Target;

    /// Every key that differs in something.
    fn keys() -> impl Iterator<Item = Key> {
        let others = [64, 128, 256].into_iter().flat_map(|padded_dim| {
            let rows = [16, 32].into_iter();
            rows.flat_map(move |rows| [0, 2, 4].map(|bias_bytes| (padded_dim, rows, bias_bytes)))
        });
        (0..1 << 8).flat_map(move |bits| {
            others.clone().map(move |(padded_dim, max_rows_per_warp, bias_bytes)| Key {
                integer: bits & 1 != 0,
                fp8: bits & 2 != 0,
                two_level: bits & 4 != 0,
                padded_dim,
                plain: bits & 8 != 0,
                unaligned: bits & 16 != 0,
                max_rows_per_warp,
                warpgroups: bits & 32 != 0,
                per_block: bits & 64 != 0,
                few_rows: bits & 128 != 0,
                bias_bytes,
            })
        })
    }

    #[test]
    fn every_table_has_a_row_for_every_key() {
        for key in keys() {
            assert!(ampere::ROWS.iter().any(|row| (row.fits)(&key)), "{key:?}");
            assert!(hopper::ROWS.iter().any(|row| (row.fits)(&key)), "{key:?}");
        }
    }

    #[test]
    fn what_is_chosen_fits_the_gpu_and_is_tried_first() {
        for target in [Target::SM_80, Target::SM_86, Target::SM_89, Target::SM_90A, Target::SM_120] {
            let machine = Machine::typical(target);
            let fitting = |key: &Key| (machine.has_wgmma() || !key.warpgroups) && holds_biases(&machine, key);
            for key in keys().filter(fitting) {
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
