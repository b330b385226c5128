//! Tile shapes for block masks: those that a mask's blocks are made of, so that each tile is computed or left out
//! whole.

use super::candidates::{registers, warpgroup_registers};
use super::{Key, Tuned, ampere, hopper};
use crate::machine::Machine;
use crate::tiling::{Tiling, WarpTiling, WarpgroupTiling};

/// The tile shape nearest to the table's for blocks of `rows` queries and `keys` keys; the table's own where there is
/// none.
pub(crate) fn of_blocks(machine: &Machine, key: &Key, tuned: Tuned, [rows, keys]: [usize; 2]) -> Tuned {
    let fits =
        |tiling: &Tiling| rows.is_multiple_of(tiling.block_q()) && keys.is_multiple_of(tiling.tile_keys());
    if fits(&tuned.tiling) {
        return tuned;
    }
    let candidates = match tuned.tiling {
        Tiling::Warps(tiling) => of_warps(machine, key, tiling),
        Tiling::Warpgroups(tiling) => of_warpgroups(machine, key, tiling),
    };
    match candidates.into_iter().find(fits) {
        Some(tiling) => Tuned { tiling, reason: "the blocks of the mask are made of whole tiles" },
        None => tuned,
    }
}

/// Blocks of fewer rows, the most first.
fn of_warps(machine: &Machine, key: &Key, tiling: WarpTiling) -> Vec<Tiling> {
    let mut all = Vec::new();
    for (warps, rows_per_warp) in [(4, 32), (8, 16), (4, 16)] {
        let tiling = WarpTiling { warps, rows_per_warp, ..tiling };
        let fits = rows_per_warp <= key.max_rows_per_warp && !(key.per_block && warps * rows_per_warp < 128);
        if fits && ampere::shared_bytes(&tiling, key) <= machine.shared_bytes {
            all.push(Tiling::Warps(tiling));
        }
    }
    all
}

/// Fewer groups, and the longer tiles where three of them are in flight: on an H200, of FP8 with blocks of 64 × 128,
/// half of which are computed, tiles of 128 keys take 0.95 of the time of 64, and of 128 × 128 blocks 0.99.
fn of_warpgroups(machine: &Machine, key: &Key, tiling: WarpgroupTiling) -> Vec<Tiling> {
    let mut all = Vec::new();
    for groups in [3, 2, 1] {
        for least_stages in [3, 2] {
            // Longer tiles have no room for ones.
            for (tile_keys, sums_by_mma) in [(128, false), (64, tiling.sums_by_mma), (64, false)] {
                let tiling = WarpgroupTiling { groups, tile_keys, sums_by_mma, ..tiling };
                let stages = hopper::most_stages(machine, &tiling, key).min(tiling.stages);
                let fits = stages >= least_stages && warpgroup_registers(&tiling, key) <= registers(groups);
                // Half of the registers, which two blocks have each, do not hold the sums of wider heads.
                let fits = fits && !(groups == 1 && key.is_wide());
                if fits && !(key.per_block && groups != 2) {
                    all.push(Tiling::Warpgroups(WarpgroupTiling { stages, ..tiling }));
                }
            }
        }
    }
    all
}
