//! Tile shapes for FP4 by `mma.sync`, on Blackwell's GPUs that are not in data centres. None of them was at hand: the
//! reasons are registers by `ptxas` and counts of what a tile takes (docs/performance/blackwell.md), not times.

use super::{Key, Row, Tuned, ampere};
use crate::machine::Machine;
use crate::tiling::{Copies, WarpTiling};

/// Three blocks of four warps.
const THREE_BLOCKS: WarpTiling = WarpTiling {
    warps: 4,
    rows_per_warp: 16,
    tile_keys: 64,
    step_keys: 64,
    queries_in_registers: true,
    copies: Copies::Tma,
    stages: 3,
    min_blocks: 3,
    lazy_rescale: 0,
};

/// The same for values as given, which threads copy.
const GIVEN_VALUES: WarpTiling =
    WarpTiling { step_keys: 32, copies: Copies::Async, lazy_rescale: 8, ..THREE_BLOCKS };

/// One block of eight warps.
const EIGHT_WARPS: WarpTiling = WarpTiling { warps: 8, min_blocks: 1, ..THREE_BLOCKS };

/// The table; see [`Row`].
pub(super) const ROWS: &[Row<WarpTiling>] = &[
    Row {
        fits: |key| key.fp4_values && key.is_narrow() && !key.plain && !key.unaligned,
        tiling: WarpTiling { min_blocks: 4, ..THREE_BLOCKS },
        reason: "sixteen warps: sums of 64 channels and scores of 64 keys fit 128 registers",
    },
    Row {
        fits: |key| key.fp4_values && key.is_narrow(),
        tiling: THREE_BLOCKS,
        reason: "twelve warps hide the latency of products, and leave registers for masks and addresses",
    },
    Row {
        fits: |key| key.fp4_values && key.is_medium(),
        tiling: THREE_BLOCKS,
        reason: "twelve warps: sums of 128 channels, scores of 64 keys and queries fit 168 registers",
    },
    Row {
        fits: |key| key.fp4_values,
        tiling: EIGHT_WARPS,
        reason: "the sums of 16 rows fill half the registers",
    },
    Row {
        fits: |key| key.fp8 && key.is_narrow(),
        tiling: WarpTiling { step_keys: 32, ..THREE_BLOCKS },
        reason: "twelve warps hide the latency of products",
    },
    Row {
        fits: |key| key.fp8 && key.is_medium(),
        tiling: WarpTiling { step_keys: 32, min_blocks: 2, ..THREE_BLOCKS },
        reason: "two blocks leave registers for a tile's own sums",
    },
    Row {
        fits: |key| key.fp8,
        tiling: WarpTiling { step_keys: 32, stages: 2, ..EIGHT_WARPS },
        reason: "the sums of 16 rows fill half the registers",
    },
    Row {
        fits: |key| key.is_narrow(),
        tiling: GIVEN_VALUES,
        reason: "twelve warps hide the latency of products",
    },
    Row {
        fits: |key| key.is_medium(),
        tiling: WarpTiling { stages: 2, min_blocks: 2, ..GIVEN_VALUES },
        reason: "two blocks of two stages: tiles of 16-bit values fill shared memory",
    },
    Row {
        fits: |_| true,
        tiling: WarpTiling { stages: 2, warps: 8, min_blocks: 1, ..GIVEN_VALUES },
        reason: "the sums of 16 rows fill half the registers",
    },
];

/// The tile shape for a kernel: the table's, in as much shared memory as the GPU has.
pub(super) fn tuned(machine: &Machine, key: &Key) -> Tuned {
    let row = key.row(ROWS);
    ampere::fitted(machine, key, row.tiling, row.reason)
}
