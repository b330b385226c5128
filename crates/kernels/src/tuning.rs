//! Tile shapes for each GPU and kind of kernel, with the reason beside each row.

use sage_ptx::Target;

use crate::attention::{Engine, Tiling};

/// What a row of the table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
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
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuned {
    /// The shape.
    pub tiling: Tiling,
    /// Why this one, in a few words.
    pub reason: &'static str,
}

/// Bytes of shared memory that a block can have.
pub const fn shared_bytes(target: Target) -> usize {
    match target.sm() {
        0..=79 => 64 << 10,
        80 | 87 => 163 << 10,
        81..=89 | 120.. => 99 << 10,
        _ => 227 << 10,
    }
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
    turns: false,
    polynomials: 0,
    lazy_rescale: 8,
};

/// The tile shape for a kernel.
pub fn tiling(target: Target, shape: &Shape) -> Tuned {
    if shape.warpgroups { of_warpgroups(shape) } else { of_warps(target, shape) }
}

/// Two or three warpgroups, and as many stages as fit.
fn of_warpgroups(shape: &Shape) -> Tuned {
    let groups = |groups: usize, tile_keys: usize, stages: usize, lazy_rescale: u32| Tiling {
        engine: Engine::Warpgroups,
        warps: 4 * groups,
        rows_per_warp: 16,
        tile_keys,
        step_keys: tile_keys,
        queries_in_registers: true,
        stages,
        min_blocks: 1,
        turns: false,
        polynomials: 0,
        lazy_rescale,
    };
    match (shape.integer, shape.fp8, shape.padded_dim) {
        (true, true, 64) => Tuned { tiling: groups(2, 128, 4, 4), reason: "untuned" },
        (true, true, 128) => Tuned { tiling: groups(2, 128, 4, 4), reason: "untuned" },
        (_, true, _) => Tuned { tiling: groups(2, 64, 3, 4), reason: "untuned" },
        (true, false, 64 | 128) if !shape.plain && !shape.per_block => {
            Tuned { tiling: groups(3, 64, 4, 8), reason: "untuned" }
        }
        (true, false, 64 | 128) => Tuned { tiling: groups(2, 64, 4, 8), reason: "untuned" },
        (true, false, _) => Tuned { tiling: groups(2, 64, 3, 8), reason: "untuned" },
        (false, _, _) => Tuned { tiling: groups(2, 128, 2, 8), reason: "untuned" },
    }
}

fn of_warps(target: Target, shape: &Shape) -> Tuned {
    let sixteen = Tiling { rows_per_warp: 16, warps: 8, min_blocks: 1, ..BASE };
    let mut tuned = match (shape.integer, shape.padded_dim) {
        (true, _) if shape.max_rows_per_warp < BASE.rows_per_warp => {
            Tuned { tiling: sixteen, reason: "16 rows a warp, as the scheme groups them" }
        }
        (true, 64 | 128) if shape.two_level || shape.fp8 => Tuned {
            tiling: sixteen,
            reason: "16 rows a warp leave registers for FP8 and for a tile's own sums",
        },
        (true, 128) if shape.plain || shape.unaligned => {
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
        (false, 128) if shape.unaligned => Tuned {
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
    if shape.fp8 {
        tuned.tiling.lazy_rescale = 0;
    }
    while !shape.integer
        && ring_bytes(&tuned.tiling, shape) > shared_bytes(target)
        && tuned.tiling.tile_keys > 32
    {
        tuned.tiling.tile_keys /= 2;
        tuned.reason = "tiles of 32 keys fit this GPU's shared memory";
    }
    while tuned.tiling.min_blocks > 1
        && tuned.tiling.min_blocks as usize * (ring_bytes(&tuned.tiling, shape) + 1024)
            > shared_bytes(target) + 1024
    {
        tuned.tiling.min_blocks -= 1;
    }
    tuned
}

/// Bytes of the tiles of K and V, and of the queries that stay in shared memory.
fn ring_bytes(tiling: &Tiling, shape: &Shape) -> usize {
    let keys = if shape.integer { 1 } else { 2 };
    let values = if shape.fp8 { 1 } else { 2 };
    let queries = if tiling.queries_in_registers { 0 } else { tiling.warps * tiling.rows_per_warp * keys };
    (tiling.stages * tiling.tile_keys * (keys + values) + queries) * shape.padded_dim
}
