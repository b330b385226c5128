//! Tile shapes worth trying: all that registers and shared memory have room for.

use super::{Key, ampere, hopper, tiling};
use crate::machine::Machine;
use crate::tiling::{Tiling, WarpTiling, WarpgroupTiling};

/// Registers that a thread of a warpgroup needs beside operands and sums: addresses, masks' limits, maxima, scales.
const OTHER_REGISTERS: usize = 24;

/// Most stages of a ring: more wait for nothing.
const MAX_STAGES: usize = 8;

/// Tile shapes worth trying for such a kernel on a GPU, the table's own first.
pub fn candidates(machine: &Machine, key: &Key) -> Vec<Tiling> {
    let own = tiling(machine, key).tiling;
    let others = match own {
        Tiling::Warps(own) => of_warps(machine, key, own),
        Tiling::Warpgroups(own) => of_warpgroups(machine, key, own),
    };
    let mut all = vec![own];
    for tiling in others {
        if !all.contains(&tiling) {
            all.push(tiling);
        }
    }
    all
}

fn of_warps(machine: &Machine, key: &Key, own: WarpTiling) -> Vec<Tiling> {
    let mut all = Vec::new();
    for rows_per_warp in [16, 32].into_iter().filter(|&rows| rows <= key.max_rows_per_warp) {
        for (warps, blocks) in [(4, &[1, 2, 3][..]), (8, &[1])] {
            // The depth of a product of P in FP4 is all keys of a tile.
            let least = if key.fp4_values { own.tile_keys } else { 16 };
            for step_keys in [16, 32, 64].into_iter().filter(|keys| (least..=own.tile_keys).contains(keys)) {
                for &min_blocks in blocks {
                    let tiling = WarpTiling { rows_per_warp, warps, step_keys, min_blocks, ..own };
                    let bytes = ampere::shared_bytes(&tiling, key) * min_blocks as usize;
                    if bytes <= machine.shared_bytes && warps * rows_per_warp <= 128 {
                        all.push(Tiling::Warps(tiling));
                    }
                }
            }
        }
    }
    all
}

fn of_warpgroups(machine: &Machine, key: &Key, own: WarpgroupTiling) -> Vec<Tiling> {
    let mut all = Vec::new();
    for (groups, tile_keys) in [(2, 64), (2, 128), (3, 64), (3, 128)] {
        for queries_in_registers in [true, false] {
            for sums_by_mma in [false, true] {
                let tiling = WarpgroupTiling { groups, tile_keys, queries_in_registers, sums_by_mma, ..own };
                let most = hopper::most_stages(machine, &tiling, key);
                // Products and tiles of more have no room for the ones.
                let ones = !sums_by_mma || key.padded_value_dim <= 128 && tile_keys == 64;
                let blocks = !(key.per_block && groups == 3);
                if most >= 2 && ones && blocks && warpgroup_registers(&tiling, key) <= registers(groups) {
                    let numbers = [most.min(MAX_STAGES), own.stages, 4].map(|stages| stages.min(most));
                    let with = |stages| Tiling::Warpgroups(WarpgroupTiling { stages, ..tiling });
                    all.extend(numbers.map(with));
                }
            }
        }
    }
    all
}

/// Registers that there are for a thread of so many warpgroups.
pub(super) const fn registers(groups: usize) -> usize {
    if groups == 3 { 160 } else { 240 }
}

/// Registers of a thread of a warpgroup, about.
pub(super) fn warpgroup_registers(tiling: &WarpgroupTiling, key: &Key) -> usize {
    let sums = key.padded_value_dim / 2 * if key.two_level { 2 } else { 1 };
    let probabilities = tiling.tile_keys / if key.fp8 { 8 } else { 4 };
    let queries = key.padded_dim / if key.integer { 8 } else { 4 };
    let queries = if tiling.queries_in_registers { queries } else { 0 };
    sums + tiling.tile_keys / 2 + probabilities + queries + OTHER_REGISTERS
}
