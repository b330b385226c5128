//! Tile shapes for `mma.sync`, on Ampere and every GPU since whose own instructions no kernel uses.

use super::{Key, Row, Tuned};
use crate::machine::{Machine, RESERVED};
use crate::tiling::{Copies, Tiling, WarpTiling};

/// Two blocks of four warps of 32 rows.
const THIRTY_TWO: WarpTiling = WarpTiling {
    warps: 4,
    rows_per_warp: 32,
    tile_keys: 64,
    step_keys: 32,
    queries_in_registers: true,
    copies: Copies::Async,
    stages: 2,
    min_blocks: 2,
    lazy_rescale: 8,
};

/// One block of eight warps of 16 rows.
const SIXTEEN: WarpTiling = WarpTiling { rows_per_warp: 16, warps: 8, min_blocks: 1, ..THIRTY_TWO };

/// One block, whose long queries stay in shared memory.
const LARGE: WarpTiling = WarpTiling { queries_in_registers: false, tile_keys: 32, ..SIXTEEN };

/// Warps, and keys of a tile, for [`LARGE`] heads, the best first: more warps hide each other's latency, and longer tiles
/// have fewer barriers.
const LARGE_SHAPES: [(usize, usize); 5] = [(8, 32), (8, 16), (4, 32), (4, 16), (2, 16)];

/// The table; see [`Row`].
pub(super) const ROWS: &[Row<WarpTiling>] = &[
    Row {
        fits: |key| key.is_large(),
        tiling: LARGE,
        reason: "as many warps as shared memory holds long queries of, and tiles as long as fit beside",
    },
    Row {
        fits: |key| key.integer && key.max_rows_per_warp < 32,
        tiling: SIXTEEN,
        reason: "16 rows a warp, as the scheme groups them",
    },
    Row {
        fits: |key| key.integer && !key.is_wide() && (key.two_level || key.fp8),
        tiling: SIXTEEN,
        reason: "16 rows a warp leave registers for FP8 and for a tile's own sums",
    },
    Row {
        fits: |key| key.integer && key.is_medium() && key.padded_dim > 128,
        tiling: SIXTEEN,
        reason: "16 rows a warp leave registers for queries of 192 channels",
    },
    Row {
        fits: |key| key.integer && key.is_medium() && (key.plain || key.unaligned),
        tiling: SIXTEEN,
        reason: "16 rows a warp leave registers for masks and addresses",
    },
    Row {
        fits: |key| key.integer && key.is_narrow(),
        tiling: THIRTY_TWO,
        reason: "32 rows a warp halve the reads of K and V",
    },
    Row {
        fits: |key| key.integer && key.is_medium(),
        tiling: THIRTY_TWO,
        reason: "32 rows a warp halve the reads of K and V: 1.1x of 16 on H100, though loop bounds spill",
    },
    Row { fits: |key| key.integer, tiling: SIXTEEN, reason: "the sums of 16 rows fill half the registers" },
    Row {
        fits: |key| key.is_narrow(),
        tiling: WarpTiling { rows_per_warp: 16, min_blocks: 3, ..THIRTY_TWO },
        reason: "three blocks hide the latency of mma.sync",
    },
    Row {
        fits: |key| key.is_medium() && key.unaligned,
        tiling: WarpTiling { step_keys: 16, ..SIXTEEN },
        reason: "short steps leave registers for addresses",
    },
    Row {
        fits: |key| key.is_medium() && key.padded_dim > 128,
        tiling: SIXTEEN,
        reason: "shared memory holds keys of 192 channels and their values once",
    },
    Row {
        fits: |key| key.is_medium(),
        tiling: WarpTiling { rows_per_warp: 16, ..THIRTY_TWO },
        reason: "level with FlashAttention-2 on H100; 8 warps in one block were 0.95x of two blocks of 4",
    },
    Row {
        fits: |_| true,
        tiling: WarpTiling { queries_in_registers: false, ..SIXTEEN },
        reason: "the sums of 16 rows fill half the registers, so Q stays in shared memory",
    },
];

/// Two blocks for few query rows of wide heads: one warp of a block multiplies all of a tile's keys with up to 16 rows,
/// which takes longer than memory takes to bring them.
const FEW_WIDE: WarpTiling =
    WarpTiling { warps: 4, tile_keys: 32, min_blocks: 2, queries_in_registers: false, ..SIXTEEN };

/// The tile shape for a kernel: the table's, in as much shared memory as the GPU has.
pub(super) fn tuned(machine: &Machine, key: &Key) -> Tuned {
    let is_few_and_wide = key.few_rows && key.is_wide() && !key.is_large() && key.is_given();
    if is_few_and_wide && blocks_fit(machine, key, &FEW_WIDE) {
        let reason = "two blocks multiply few rows of wide heads while one waits";
        return Tuned { tiling: Tiling::Warps(FEW_WIDE), reason };
    }
    let row = key.row(ROWS);
    let mut tiling = row.tiling;
    if key.fp8 {
        tiling.lazy_rescale = 0;
    }
    fitted(machine, key, tiling, row.reason)
}

/// A tile shape, or a smaller one where shared memory has no room for it.
pub(super) fn fitted(machine: &Machine, key: &Key, tiling: WarpTiling, reason: &'static str) -> Tuned {
    let (mut tiling, mut reason) = (tiling, reason);
    let too_large = |tiling: &WarpTiling| shared_bytes(tiling, key) + RESERVED > machine.shared_bytes;
    if key.is_large() {
        let shape = |(warps, tile_keys)| WarpTiling { warps, tile_keys, step_keys: tile_keys, ..tiling };
        let [.., least] = LARGE_SHAPES;
        let fitting = LARGE_SHAPES.map(shape).into_iter().find(|tiling| !too_large(tiling));
        return Tuned { tiling: Tiling::Warps(fitting.unwrap_or(shape(least))), reason };
    }
    let given = key.is_given();
    while given && too_large(&tiling) && tiling.tile_keys > 32 {
        tiling.tile_keys /= 2;
        reason = "tiles of 32 keys fit this GPU's shared memory";
    }
    while too_large(&tiling) && tiling.warps > 4 {
        tiling.warps /= 2;
        reason = match given {
            true => "queries of 4 warps and tiles of 32 keys fit this GPU's shared memory",
            false => "queries of 4 warps fit this GPU's shared memory",
        };
    }
    if too_large(&tiling) {
        tiling.queries_in_registers = true;
        reason = "shared memory has no room for queries beside tiles of 64 keys";
    }
    while tiling.min_blocks > 1 && !blocks_fit(machine, key, &tiling) {
        tiling.min_blocks -= 1;
    }
    Tuned { tiling: Tiling::Warps(tiling), reason }
}

/// Whether shared memory holds as many blocks as a tile shape asks for.
fn blocks_fit(machine: &Machine, key: &Key, tiling: &WarpTiling) -> bool {
    let block = shared_bytes(tiling, key) + RESERVED;
    tiling.min_blocks as usize * block <= machine.shared_bytes + RESERVED
}

/// Bytes of the tiles of K and V, or of the output that takes their place, and of the queries that stay in shared
/// memory.
pub(super) fn shared_bytes(tiling: &WarpTiling, key: &Key) -> usize {
    let rows = tiling.warps * tiling.rows_per_warp;
    let tiles = tiling.stages * key.tile_bytes(tiling.tile_keys);
    let queries = if tiling.queries_in_registers { 0 } else { key.queries_bytes(rows) };
    tiles.max(rows * 2 * key.padded_value_dim) + queries
}
