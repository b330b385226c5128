//! What a piece of attention's work costs a multiprocessor, as measured: the planner's choices are made by it.
//!
//! Constants are fitted to the GPU's times, under CUDA graphs, of 720 ways to compute 119 calls of more than 64 queries,
//! on an H200 that was busy with each for a tenth of a second before: products of 16 bits lower its clock the most
//! (`scripts/gpu.sh regret`; docs/performance/hopper.md#what-the-planner-predicts). With them the times of kernels of
//! warpgroups are predicted to within 6% (root mean square), those of `mma.sync` to within 8%. Those of FP8 values are of
//! an earlier fit, to a card that was cooler, but for four shapes.

use super::Key;
use crate::machine::Machine;
use crate::tiling::{Tiling, WarpTiling, WarpgroupTiling};

/// Microseconds of as many pieces of work as a multiprocessor has at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cost {
    /// Their beginnings and ends.
    pub piece: f64,
    /// A tile of 64 keys of each.
    pub tile: f64,
    /// Part of a tile's cost that falls with the channels that a head has less than it is padded to.
    pub channels: f64,
    /// Part of the costs that a piece has which is alone on its multiprocessor, though others would have room.
    pub alone: f64,
}

/// The cost in a tile shape; none where it was not measured.
pub(crate) fn cost(machine: &Machine, key: &Key, tiling: &Tiling) -> Option<Cost> {
    // Of heads whose values have other channels than their keys nothing was measured.
    if !machine.has_wgmma() || key.bias_bytes > 0 || dims(key).is_none() {
        return None;
    }
    let ((piece, tile), alone) = match *tiling {
        Tiling::Warpgroups(WarpgroupTiling { groups: 1, tile_keys: 64, .. }) => {
            (of_warpgroups(key, 1)?, 0.76)
        }
        Tiling::Warpgroups(WarpgroupTiling { groups, tile_keys: 64, .. }) => {
            (of_warpgroups(key, groups)?, 1.0)
        }
        Tiling::Warpgroups(WarpgroupTiling { groups: 2, tile_keys: 128, .. }) => (of_long_tiles(key)?, 1.0),
        Tiling::Warps(WarpTiling { warps: 4, rows_per_warp: 16, .. }) => (of_warps(key)?, 0.55),
        _ => return None,
    };
    let channels = match dims(key)? {
        64 => 0.81,
        128 => 0.31,
        192 => 0.0,
        _ => 0.81,
    };
    Some(Cost { piece, tile, channels, alone })
}

/// What heads were padded to that were measured: 64, 128 or 256 where K and V have as many channels, 192 where V has 128
/// of them.
fn dims(key: &Key) -> Option<usize> {
    let [dim, value_dim] = [key.padded_dim, key.padded_value_dim];
    if (dim, value_dim) == (192, 128) {
        return Some(192);
    }
    let [dim, value_dim] = [dim, value_dim].map(usize::next_power_of_two);
    (dim == value_dim && !key.is_large()).then_some(dim)
}

/// Pieces of so many times 64 queries. Those of one group are two at once.
fn of_warpgroups(key: &Key, groups: usize) -> Option<(f64, f64)> {
    Some(match (key.integer, key.fp8, dims(key)?, groups) {
        (false, false, 64, 1) => (1.3, 0.60),
        (false, false, 64, 2) => (1.4, 0.56),
        (false, false, 64, 3) => (1.7, 0.81),
        (false, false, 128, 1) => (2.0, 0.93),
        (false, false, 128, 2) => (2.1, 0.84),
        (false, false, 128, 3) => (2.7, 1.10),
        (false, false, 192, 1) => (4.4, 1.05),
        (false, false, 192, 2) => (3.7, 0.96),
        (false, false, 192, 3) => (5.6, 1.35),
        (false, false, 256, 2) => (2.9, 1.44),
        (true, false, 64, 1) => (2.0, 0.54),
        (true, false, 64, 2) => (2.0, 0.54),
        (true, false, 64, 3) => (2.4, 0.70),
        (true, false, 128, 1) => (2.6, 0.75),
        (true, false, 128, 2) => (2.8, 0.70),
        (true, false, 128, 3) => (3.9, 0.90),
        (true, false, 192, 1) => (8.5, 0.80),
        (true, false, 192, 2) => (5.8, 0.74),
        (true, false, 192, 3) => (5.6, 1.04),
        (true, false, 256, 2) => (3.8, 1.11),
        (true, true, 64, 1) => (2.7, 0.45),
        (true, true, 64, 2) => (2.8, 0.50),
        (true, true, 64, 3) => (3.5, 0.60),
        (true, true, 128, 1) => (3.0, 0.63),
        (true, true, 128, 2) => (3.2, 0.60),
        (true, true, 128, 3) => (4.7, 0.75),
        (true, true, 192, 1) => (6.6, 0.67),
        (true, true, 192, 2) => (6.7, 0.63),
        (true, true, 192, 3) => (9.2, 0.80),
        (true, true, 256, 2) => (3.1, 0.96),
        _ => return None,
    })
}

/// Pieces of 128 queries, by tiles of 128 keys.
fn of_long_tiles(key: &Key) -> Option<(f64, f64)> {
    match (key.integer, key.fp8, dims(key)?) {
        (false, false, 128) => Some((2.0, 0.80)),
        _ => None,
    }
}

/// Pieces of 64 queries by `mma.sync`, two or three at once.
fn of_warps(key: &Key) -> Option<(f64, f64)> {
    match (key.integer, key.fp8, dims(key)?) {
        (false, false, 64) => Some((1.7, 1.34)),
        (false, false, 128) => Some((2.3, 1.78)),
        _ => None,
    }
}
