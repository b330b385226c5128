//! Tile shapes for Turing's `mma.sync`: 64 KiB of shared memory, which threads fill through their registers.
//!
//! No GPU of it was at hand: the shapes are those of Ampere that fit its shared memory, and that leave registers for a
//! tile on its way, as the assembler says (`registers.txt`).

use super::{Key, Row, Tuned};
use crate::tiling::{Copies, Tiling, WarpTiling};

/// One block of eight warps of 16 rows, which load a tile ahead.
const SIXTEEN: WarpTiling = WarpTiling {
    warps: 8,
    rows_per_warp: 16,
    tile_keys: 64,
    step_keys: 32,
    queries_in_registers: true,
    copies: Copies::Registers,
    stages: 2,
    min_blocks: 1,
    lazy_rescale: 8,
};

/// Two blocks of four warps of 32 rows.
const THIRTY_TWO: WarpTiling = WarpTiling { rows_per_warp: 32, warps: 4, min_blocks: 2, ..SIXTEEN };

/// The table; see [`Row`].
pub(super) const ROWS: &[Row<WarpTiling>] = &[
    Row {
        fits: |key| key.is_large(),
        tiling: WarpTiling {
            warps: 2,
            tile_keys: 16,
            step_keys: 16,
            queries_in_registers: false,
            stages: 1,
            ..SIXTEEN
        },
        reason: "queries of 2 warps and a tile of 16 long keys fill 64 KiB of shared memory",
    },
    Row {
        fits: |key| key.integer && key.is_wide(),
        tiling: WarpTiling { stages: 1, ..SIXTEEN },
        reason: "one tile fills 48 of 64 KiB of shared memory, and sums half the registers",
    },
    Row {
        fits: |key| key.integer && key.max_rows_per_warp < 32,
        tiling: SIXTEEN,
        reason: "16 rows a warp, as the scheme groups them",
    },
    Row {
        fits: |key| key.integer && key.is_narrow() && !key.two_level,
        tiling: THIRTY_TWO,
        reason: "32 rows a warp halve the reads of K and V",
    },
    Row {
        fits: |key| key.integer && key.is_medium() && key.two_level && key.plain,
        tiling: WarpTiling { step_keys: 16, ..SIXTEEN },
        reason: "short steps leave registers for scales of keys and a tile's own sums",
    },
    Row {
        fits: |key| key.integer,
        tiling: SIXTEEN,
        reason: "16 rows a warp leave registers for a tile on its way",
    },
    Row {
        fits: |key| key.is_narrow(),
        tiling: SIXTEEN,
        reason: "16 rows a warp leave registers for a tile on its way",
    },
    Row {
        fits: |key| key.is_medium() && key.unaligned,
        tiling: WarpTiling { tile_keys: 32, step_keys: 16, ..SIXTEEN },
        reason: "two tiles of 32 keys fit 64 KiB of shared memory, and short steps leave registers for addresses",
    },
    Row {
        fits: |key| key.is_medium(),
        tiling: WarpTiling { tile_keys: 32, ..SIXTEEN },
        reason: "two tiles of 32 keys fit 64 KiB of shared memory",
    },
    Row {
        fits: |_| true,
        tiling: WarpTiling { warps: 4, tile_keys: 32, queries_in_registers: false, stages: 1, ..SIXTEEN },
        reason: "queries of 4 warps and a tile of 32 keys fill 64 KiB of shared memory",
    },
];

/// The tile shape for a kernel.
pub(super) fn tuned(key: &Key) -> Tuned {
    let row = key.row(ROWS);
    Tuned { tiling: Tiling::Warps(row.tiling), reason: row.reason }
}
