//! Tile shapes for warpgroups. Figures are TFLOP/s of the attention kernel alone on an H100, 2 × 32 heads of 4096
//! tokens, or on an H200, 4 × 32 heads, where it says so: to be compared within a row.

use super::candidates::{registers, warpgroup_registers};
use super::{Key, Row, Tuned, ampere};
use crate::machine::Machine;
use crate::tiling::{Tiling, WarpgroupTiling};

/// Two groups and four stages, which leave registers for everything.
const TWO: WarpgroupTiling = WarpgroupTiling {
    groups: 2,
    tile_keys: 64,
    queries_in_registers: true,
    stages: 4,
    sums_by_mma: false,
    lazy_rescale: 8,
};

/// Two groups for E4M3, whose range leaves less to lazy rescaling.
const TWO_FP8: WarpgroupTiling = WarpgroupTiling { lazy_rescale: 4, ..TWO };

/// Three groups, and P summed by products.
const THREE: WarpgroupTiling = WarpgroupTiling { groups: 3, sums_by_mma: true, ..TWO };

const THREE_FP8: WarpgroupTiling = WarpgroupTiling { lazy_rescale: 4, ..THREE };

/// Biases as given and scales of single rows or keys need registers, groups of 128 rows need one block, few rows no
/// third group, and of long biases, or beside long keys, shared memory holds too few tiles for three.
const fn two_groups(key: &Key) -> bool {
    let long = key.bias_bytes == 4 || key.bias_bytes > 0 && !key.integer;
    key.plain || key.per_block || key.few_rows || long
}

/// The table; see [`Row`].
pub(super) const ROWS: &[Row<WarpgroupTiling>] = &[
    Row {
        fits: |key| key.fp8 && key.is_wide() && key.bias_bytes > 0,
        tiling: WarpgroupTiling { queries_in_registers: false, ..TWO_FP8 },
        reason: "the sums fill half the registers of two groups, and biases need those of queries",
    },
    Row {
        fits: |key| key.integer && key.is_wide() && key.bias_bytes > 0,
        tiling: WarpgroupTiling { queries_in_registers: false, ..TWO },
        reason: "the sums fill half the registers of two groups, and biases need those of queries",
    },
    Row {
        fits: |key| key.fp8 && key.is_wide(),
        tiling: WarpgroupTiling { stages: 5, ..TWO_FP8 },
        reason: "1199; the sums fill half the registers of two groups",
    },
    Row {
        fits: |key| key.fp8 && key.is_medium() && key.two_level && !key.plain,
        tiling: WarpgroupTiling { stages: 6, sums_by_mma: true, ..TWO_FP8 },
        reason: "805 on an H200; 775 with tiles of 128 keys, which have no room for ones",
    },
    Row {
        fits: |key| key.fp8 && (key.two_level || two_groups(key)),
        tiling: TWO_FP8,
        reason: "two groups leave registers for masks and tiles' own sums",
    },
    Row {
        fits: |key| key.fp8 && key.is_medium(),
        tiling: WarpgroupTiling { stages: 6, ..THREE_FP8 },
        reason: "900; 849 by two groups with tiles of 128 keys",
    },
    Row {
        fits: |key| key.fp8,
        tiling: WarpgroupTiling { stages: 8, ..THREE_FP8 },
        reason: "546; 455 by two groups with tiles of 128 keys",
    },
    Row {
        fits: |key| key.integer && key.is_wide(),
        tiling: TWO,
        reason: "998; 981 with queries in shared memory",
    },
    Row {
        fits: |key| !key.integer && key.is_wide(),
        tiling: WarpgroupTiling { queries_in_registers: false, ..TWO },
        reason: "566; queries would fill the registers",
    },
    Row { fits: two_groups, tiling: TWO, reason: "two groups leave registers for masks" },
    Row {
        fits: |key| key.padded_dim == 192,
        tiling: WarpgroupTiling { queries_in_registers: false, stages: 6, ..THREE },
        reason: "queries of 192 channels, even integers, are more than the registers that three groups leave",
    },
    Row {
        fits: |key| key.integer && key.is_medium(),
        tiling: WarpgroupTiling { stages: 6, ..THREE },
        reason: "820; 755 by two groups with tiles of 128 keys",
    },
    Row {
        fits: |key| key.integer,
        tiling: WarpgroupTiling { stages: 6, ..THREE },
        reason: "532 on an H200, 487 of 2 x 16 heads; 532 and 468 with tiles of 128 keys",
    },
    Row {
        fits: |key| key.is_narrow(),
        tiling: THREE,
        reason: "517; 469 by two groups with tiles of 128 keys",
    },
    Row {
        fits: |_| true,
        tiling: WarpgroupTiling { queries_in_registers: false, ..THREE },
        reason: "718; 704 by two groups with tiles of 128 keys",
    },
];

/// Barriers, maxima, and the gaps that alignment leaves, in bytes of shared memory.
const SMALL_ARRAYS: usize = 3 << 10;

/// The tile shape for a kernel: the table's, in as much shared memory as the GPU has.
pub(super) fn tuned(machine: &Machine, key: &Key) -> Tuned {
    let row = key.row(ROWS);
    let stages = row.tiling.stages.min(most_stages(machine, &row.tiling, key));
    Tuned { tiling: Tiling::Warpgroups(WarpgroupTiling { stages, ..row.tiling }), reason: row.reason }
}

/// The table's tile shape with other numbers of warpgroups, where registers and shared memory have room for it, that of
/// two groups with longer tiles, and that of `mma.sync` for short calls.
pub(super) fn other_groups(machine: &Machine, key: &Key, own: WarpgroupTiling) -> Vec<Tuned> {
    let of_groups = |groups: usize, tile_keys: usize| {
        let sums_by_mma = groups == 3 && key.padded_value_dim <= 128 && !key.plain;
        let tiling = WarpgroupTiling { groups, sums_by_mma, tile_keys, ..own };
        let stages = most_stages(machine, &tiling, key).min(own.stages.max(4));
        let fits = stages >= 2
            && warpgroup_registers(&tiling, key) <= registers(groups)
            && !(groups == 1 && key.is_wide())
            && !(key.per_block && groups != 2)
            && !(groups == 3 && two_groups(key));
        let tiling = Tiling::Warpgroups(WarpgroupTiling { stages, ..tiling });
        fits.then_some(Tuned {
            tiling,
            reason: "fewer query rows in a block leave fewer multiprocessors idle",
        })
    };
    let of_warps = || {
        // Integers repay the pass over K in longer calls alone, and wider heads spill.
        let short = !key.integer && key.padded_dim <= 128 && key.bias_bytes == 0;
        short.then(|| ampere::tuned(machine, &Key { warpgroups: false, ..*key }))
    };
    let groups = (1..=3).filter(|&groups| groups != own.groups).filter_map(|groups| of_groups(groups, 64));
    // Of 16-bit scores two groups wait less often for tiles of 128 keys.
    let long =
        (!key.integer && !key.fp8 && !key.plain && key.is_medium()).then(|| of_groups(2, 128)).flatten();
    groups.chain(long).chain(of_warps()).collect()
}

/// Bytes of the queries that come through TMA, and of those that they become where products read these there as well.
fn queries_bytes(tiling: &WarpgroupTiling, key: &Key) -> usize {
    let rows = 64 * tiling.groups;
    let staged = Key { integer: false, padded_dim: key.padded_dim.next_multiple_of(64), ..*key };
    let converted = key.integer && !tiling.queries_in_registers;
    staged.queries_bytes(rows) + if converted { key.queries_bytes(rows) } else { 0 }
}

/// Most stages that a block has shared memory for.
pub(super) fn most_stages(machine: &Machine, tiling: &WarpgroupTiling, key: &Key) -> usize {
    let ones = match (tiling.sums_by_mma, key.fp8) {
        (false, _) => 0,
        (true, true) => 16,
        (true, false) => 128,
    };
    let biases = key.biases_bytes(64 * tiling.groups, tiling.tile_keys);
    let stage = key.tile_bytes(tiling.tile_keys) + ones * tiling.tile_keys + biases;
    // Of one group there is a second block, which has as much.
    let bytes = machine.shared_bytes_of_each(if tiling.groups == 1 { 2 } else { 1 });
    bytes.saturating_sub(SMALL_ARRAYS + queries_bytes(tiling, key)) / stage
}
