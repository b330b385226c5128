//! Tile shapes for each GPU and kind of kernel, with the reason beside each row.

use serde::{Deserialize, Serialize};

use crate::attention::{Engine, Tiling};
use crate::machine::Machine;

/// What a row of the table is for.
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
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuned {
    /// The key.
    pub tiling: Tiling,
    /// Why this one, in a few words.
    pub reason: &'static str,
}

const BASE: Tiling = Tiling {
    engine: Engine::Warps,
    warps: 4,
    rows_per_warp: 32,
    tile_keys: 64,
    step_keys: 32,
    queries_in_registers: true,
    stages: 2,
    min_blocks: 2,
    ones: false,
    lazy_rescale: 8,
};

/// The tile shape for a kernel.
pub fn tiling(machine: &Machine, key: &Key) -> Tuned {
    if key.warpgroups { of_warpgroups(key) } else { of_warps(machine, key) }
}

/// Rows for warpgroups; figures are TFLOP/s of the attention kernel alone on an H100, 2 × 32 heads of 4096 tokens, or on an H200, 4 × 32
/// heads, where it says so: to be compared within a row.
fn of_warpgroups(key: &Key) -> Tuned {
    let base = Tiling {
        engine: Engine::Warpgroups,
        warps: 8,
        rows_per_warp: 16,
        tile_keys: 64,
        step_keys: 64,
        min_blocks: 1,
        stages: 4,
        lazy_rescale: if key.fp8 { 4 } else { 8 },
        ..BASE
    };
    let three = Tiling { warps: 12, ..base };
    let shared = |tiling: Tiling, stages| Tiling { queries_in_registers: false, stages, ..tiling };
    // Masks and scales of single rows or keys need registers, and groups of 128 rows one block.
    let two_groups = key.plain || key.per_block || key.few_rows;
    let ones = |tiling: Tiling| Tiling { ones: true, ..tiling };
    let (tiling, reason) = match (key.integer, key.fp8, key.padded_dim) {
        (_, true, 256) => {
            (Tiling { stages: 5, ..base }, "1199; the sums fill half the registers of two groups")
        }
        (_, true, 128) if key.two_level && !key.plain => (
            ones(Tiling { stages: 6, ..base }),
            "805 on an H200; 775 with tiles of 128 keys, which have no room for ones",
        ),
        (_, true, _) if key.two_level || two_groups => {
            (base, "two groups leave registers for masks and tiles' own sums")
        }
        (_, true, 128) => {
            (ones(Tiling { stages: 6, ..three }), "900; 849 by two groups with tiles of 128 keys")
        }
        (_, true, _) => {
            (ones(Tiling { stages: 8, ..three }), "546; 455 by two groups with tiles of 128 keys")
        }
        (true, false, 256) => (base, "998; 981 with queries in shared memory"),
        (true, false, _) if two_groups => (base, "two groups leave registers for masks"),
        (true, false, 128) => {
            (ones(Tiling { stages: 6, ..three }), "820; 755 by two groups with tiles of 128 keys")
        }
        (true, false, _) => (
            ones(Tiling { stages: 6, ..three }),
            "532 on an H200, 487 of 2 x 16 heads; 532 and 468 with tiles of 128 keys",
        ),
        (false, _, 256) => (shared(base, 2), "566; queries would fill the registers"),
        (false, _, 64) if !two_groups => (ones(three), "517; 469 by two groups with tiles of 128 keys"),
        (false, _, _) if two_groups => (base, "two groups leave registers for masks"),
        (false, _, _) => (ones(shared(three, 4)), "718; 704 by two groups with tiles of 128 keys"),
    };
    Tuned { tiling, reason }
}

fn of_warps(machine: &Machine, key: &Key) -> Tuned {
    let sixteen = Tiling { rows_per_warp: 16, warps: 8, min_blocks: 1, ..BASE };
    let mut tuned = match (key.integer, key.padded_dim) {
        (true, _) if key.max_rows_per_warp < BASE.rows_per_warp => {
            Tuned { tiling: sixteen, reason: "16 rows a warp, as the scheme groups them" }
        }
        (true, 64 | 128) if key.two_level || key.fp8 => Tuned {
            tiling: sixteen,
            reason: "16 rows a warp leave registers for FP8 and for a tile's own sums",
        },
        (true, 128) if key.plain || key.unaligned => {
            Tuned { tiling: sixteen, reason: "16 rows a warp leave registers for masks and addresses" }
        }
        (true, 64) => Tuned { tiling: BASE, reason: "32 rows a warp halve the reads of K and V" },
        (true, 128) => Tuned {
            tiling: BASE,
            reason: "32 rows a warp halve the reads of K and V: 1.1x of 16 on H100, though loop bounds spill",
        },
        (true, _) => Tuned { tiling: sixteen, reason: "the sums of 16 rows fill half the registers" },
        (false, 64) => Tuned {
            tiling: Tiling { rows_per_warp: 16, min_blocks: 3, ..BASE },
            reason: "three blocks hide the latency of mma.sync",
        },
        (false, 128) if key.unaligned => Tuned {
            tiling: Tiling { step_keys: 16, ..sixteen },
            reason: "short steps leave registers for addresses",
        },
        (false, 128) => Tuned {
            tiling: Tiling { rows_per_warp: 16, ..BASE },
            reason: "level with FlashAttention-2 on H100; 8 warps in one block were 0.95x of two blocks of 4",
        },
        (false, _) => Tuned {
            tiling: Tiling { queries_in_registers: false, ..sixteen },
            reason: "the sums of 16 rows fill half the registers, so Q stays in shared memory",
        },
    };
    if key.fp8 {
        tuned.tiling.lazy_rescale = 0;
    }
    while !key.integer && ring_bytes(&tuned.tiling, key) > machine.shared_bytes && tuned.tiling.tile_keys > 32
    {
        tuned.tiling.tile_keys /= 2;
        tuned.reason = "tiles of 32 keys fit this GPU's shared memory";
    }
    while tuned.tiling.min_blocks > 1
        && tuned.tiling.min_blocks as usize * (ring_bytes(&tuned.tiling, key) + 1024)
            > machine.shared_bytes + 1024
    {
        tuned.tiling.min_blocks -= 1;
    }
    tuned
}

/// Bytes of the tiles of K and V, and of the queries that stay in shared memory.
fn ring_bytes(tiling: &Tiling, key: &Key) -> usize {
    let keys = if key.integer { 1 } else { 2 };
    let values = if key.fp8 { 1 } else { 2 };
    let queries = if tiling.queries_in_registers { 0 } else { tiling.warps * tiling.rows_per_warp * keys };
    (tiling.stages * tiling.tile_keys * (keys + values) + queries) * key.padded_dim
}

/// Registers that a thread of a warpgroup needs beside operands and sums: addresses, masks' limits, maxima, scales.
const OTHER_REGISTERS: usize = 24;

/// Tile shapes worth trying for such a kernel on a GPU, the table's own first: all that shared memory and registers have room
/// for.
pub fn candidates(machine: &Machine, key: &Key) -> Vec<Tiling> {
    let own = tiling(machine, key).tiling;
    let mut all = vec![own];
    let mut add = |tiling: Tiling| {
        if !all.contains(&tiling) {
            all.push(tiling);
        }
    };
    if key.warpgroups {
        for (groups, tile_keys) in [(2, 64), (2, 128), (3, 64), (3, 128)] {
            for queries_in_registers in [true, false] {
                let base = Tiling {
                    warps: 4 * groups,
                    tile_keys,
                    step_keys: tile_keys,
                    queries_in_registers,
                    stages: 1,
                    ..own
                };
                let stages = MAX_STAGES.min(
                    (machine.shared_bytes - SMALL_ARRAYS - queries_bytes(&base, key))
                        / stage_bytes(&base, key),
                );
                let registers = if groups == 2 { 240 } else { 160 };
                let blocks = !(key.per_block && groups == 3);
                if stages >= 2 && blocks && warpgroup_registers(&base, key) <= registers {
                    add(Tiling { stages, ones: false, ..base });
                    if key.padded_dim <= 128 && tile_keys == 64 {
                        add(Tiling { stages, ones: true, ..base });
                    }
                }
            }
        }
        return all;
    }
    for rows_per_warp in [16, 32].into_iter().filter(|&rows| rows <= key.max_rows_per_warp) {
        for warps in [4, 8] {
            for step_keys in [16, 32, 64] {
                let tiling = Tiling { rows_per_warp, warps, step_keys, min_blocks: 8 / warps as u32, ..own };
                let fits = ring_bytes(&tiling, key) * tiling.min_blocks as usize <= machine.shared_bytes;
                if fits && warps * rows_per_warp <= 128 {
                    add(tiling);
                }
            }
        }
    }
    all
}

/// Most stages of a ring: more wait for nothing.
const MAX_STAGES: usize = 6;

/// Barriers, maxima, and the gaps that alignment leaves.
const SMALL_ARRAYS: usize = 3 << 10;

/// Bytes of a stage of a warpgroups' ring, with the ones that may stand beside V.
fn stage_bytes(tiling: &Tiling, key: &Key) -> usize {
    let (keys, values) = (if key.integer { 1 } else { 2 }, if key.fp8 { 1 } else { 2 });
    tiling.tile_keys * ((keys + values) * key.padded_dim + if key.fp8 { 16 } else { 128 })
}

fn queries_bytes(tiling: &Tiling, key: &Key) -> usize {
    let bytes = if key.integer { 1 } else { 2 };
    if tiling.queries_in_registers { 0 } else { tiling.warps * 16 * key.padded_dim * bytes }
}

/// Registers of a thread of a warpgroup, about.
fn warpgroup_registers(tiling: &Tiling, key: &Key) -> usize {
    let sums = key.padded_dim / 2 * if key.two_level { 2 } else { 1 };
    let probabilities = tiling.tile_keys / if key.fp8 { 8 } else { 4 };
    let queries = key.padded_dim / if key.integer { 8 } else { 4 };
    let queries = if tiling.queries_in_registers { queries } else { 0 };
    sums + tiling.tile_keys / 2 + probabilities + queries + OTHER_REGISTERS
}
