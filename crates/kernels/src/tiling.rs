//! Tile shapes of the attention kernels: what a row of the tuning table holds.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which instructions multiply, and who copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Engine {
    /// `mma.sync`, warp by warp; every thread copies a part of each tile. Every GPU.
    Warps,
    /// `wgmma`, by groups of four warps that share nothing but the tiles, which one more warp has copied. Hopper.
    Warpgroups,
}

/// The tile shape of an attention kernel.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tiling {
    /// For `mma.sync`.
    Warps(WarpTiling),
    /// For `wgmma`.
    Warpgroups(WarpgroupTiling),
}

/// How the threads of a block bring tiles of K and V to shared memory.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Copies {
    /// By `cp.async`, a tile ahead of its use for each stage but one. Ampere, and every GPU since.
    #[default]
    Async,
    /// One of them by TMA, as many tiles ahead of their use: tiles of the workspace whose rows have at most 128 bytes.
    /// Of kernels for Blackwell's `mma.sync` alone.
    Tma,
    /// Through their registers: with two stages a tile ahead of its use, with one between two barriers. Every GPU.
    Registers,
}

/// A tile shape for [`Engine::Warps`].
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WarpTiling {
    /// Warps of a block.
    pub warps: usize,
    /// Query rows of a warp: 16 or 32.
    pub rows_per_warp: usize,
    /// Keys of a tile in shared memory: 64, or 32 where K and V are read as given.
    pub tile_keys: usize,
    /// Keys whose scores are in registers at once: 16, 32 or 64.
    pub step_keys: usize,
    /// Whether quantised queries stay in registers, or are read from shared memory for each step.
    pub queries_in_registers: bool,
    /// How tiles come to shared memory.
    #[serde(default)]
    pub copies: Copies,
    /// Tiles of K and V in shared memory at once.
    pub stages: usize,
    /// Blocks that a multiprocessor should hold, which bounds the registers of a thread.
    pub min_blocks: u32,
    /// Rise of a row's maximum, in powers of two, up to which sums are not rescaled; 0 rescales always.
    pub lazy_rescale: u32,
}

/// A tile shape for [`Engine::Warpgroups`], each of which has 64 query rows.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WarpgroupTiling {
    /// Warpgroups of a block that compute: 2 or 3, or 1 where a multiprocessor holds two blocks, whose tiles of keys
    /// differ.
    pub groups: usize,
    /// Keys of a tile: 64 or 128.
    pub tile_keys: usize,
    /// Whether queries stay in registers, or are read from shared memory.
    pub queries_in_registers: bool,
    /// Tiles of K and V in shared memory at once.
    pub stages: usize,
    /// Whether P is summed by products with ones beside V, where heads and tiles have room for 8 columns more.
    pub sums_by_mma: bool,
    /// Rise of a row's maximum, in powers of two, up to which sums are not rescaled; 0 rescales always.
    pub lazy_rescale: u32,
}

impl Tiling {
    /// Instructions.
    pub const fn engine(&self) -> Engine {
        match self {
            Tiling::Warps(_) => Engine::Warps,
            Tiling::Warpgroups(_) => Engine::Warpgroups,
        }
    }

    /// Warps of a block that compute.
    pub const fn warps(&self) -> usize {
        match self {
            Tiling::Warps(tiling) => tiling.warps,
            Tiling::Warpgroups(tiling) => 4 * tiling.groups,
        }
    }

    /// Query rows of a warp.
    pub const fn rows_per_warp(&self) -> usize {
        match self {
            Tiling::Warps(tiling) => tiling.rows_per_warp,
            Tiling::Warpgroups(_) => 16,
        }
    }

    /// Query rows of a block.
    pub const fn block_q(&self) -> usize {
        self.warps() * self.rows_per_warp()
    }

    /// Keys of a tile in shared memory.
    pub const fn tile_keys(&self) -> usize {
        match self {
            Tiling::Warps(tiling) => tiling.tile_keys,
            Tiling::Warpgroups(tiling) => tiling.tile_keys,
        }
    }

    /// Keys whose scores are in registers at once.
    pub const fn step_keys(&self) -> usize {
        match self {
            Tiling::Warps(tiling) => tiling.step_keys,
            Tiling::Warpgroups(tiling) => tiling.tile_keys,
        }
    }

    /// Whether quantised queries stay in registers.
    pub const fn queries_in_registers(&self) -> bool {
        match self {
            Tiling::Warps(tiling) => tiling.queries_in_registers,
            Tiling::Warpgroups(tiling) => tiling.queries_in_registers,
        }
    }

    /// How tiles come to shared memory.
    pub const fn copies(&self) -> Copies {
        match self {
            Tiling::Warps(tiling) => tiling.copies,
            Tiling::Warpgroups(_) => Copies::Tma,
        }
    }

    /// The same shape for a call without keys, as there is no tensor map of nothing.
    pub(crate) fn without_keys(self) -> Self {
        match self {
            Tiling::Warps(tiling @ WarpTiling { copies: Copies::Tma, .. }) => {
                Tiling::Warps(WarpTiling { copies: Copies::Async, ..tiling })
            }
            other => other,
        }
    }

    /// Tiles of K and V in shared memory at once.
    pub const fn stages(&self) -> usize {
        match self {
            Tiling::Warps(tiling) => tiling.stages,
            Tiling::Warpgroups(tiling) => tiling.stages,
        }
    }

    /// Blocks that a multiprocessor should hold.
    pub const fn min_blocks(&self) -> u32 {
        match self {
            Tiling::Warps(tiling) => tiling.min_blocks,
            Tiling::Warpgroups(WarpgroupTiling { groups: 1, .. }) => 2,
            Tiling::Warpgroups(_) => 1,
        }
    }

    /// Whether P is asked to be summed by products with ones.
    pub const fn sums_by_mma(&self) -> bool {
        matches!(self, Tiling::Warpgroups(WarpgroupTiling { sums_by_mma: true, .. }))
    }

    /// Rise of a row's maximum, in powers of two, up to which sums are not rescaled.
    pub const fn lazy_rescale(&self) -> u32 {
        match self {
            Tiling::Warps(tiling) => tiling.lazy_rescale,
            Tiling::Warpgroups(tiling) => tiling.lazy_rescale,
        }
    }
}

/// As in the names of kernels: engine, warps × rows × keys × keys of a step, `r` for queries in registers, `o` for
/// sums by ones, `t` for tiles through registers and `m` for tiles by tensor maps, stages, blocks, and the exponent of lazy rescaling.
impl fmt::Display for Tiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let engine = match self.engine() {
            Engine::Warps => "w",
            Engine::Warpgroups => "wg",
        };
        let (warps, rows, keys, step) =
            (self.warps(), self.rows_per_warp(), self.tile_keys(), self.step_keys());
        let queries = if self.queries_in_registers() { "r" } else { "" };
        let ones = if self.sums_by_mma() { "o" } else { "" };
        let through = match (self.engine(), self.copies()) {
            (Engine::Warps, Copies::Registers) => "t",
            (Engine::Warps, Copies::Tma) => "m",
            _ => "",
        };
        let (stages, blocks, lazy) = (self.stages(), self.min_blocks(), self.lazy_rescale());
        write!(f, "{engine}{warps}x{rows}x{keys}x{step}{queries}{ones}{through}_s{stages}_b{blocks}_l{lazy}")
    }
}
