//! Largest magnitudes of groups of rows, from what threads hold of a tile in the order [`RowOrder::Modulo8`].
//!
//! [`RowOrder::Modulo8`]: super::tile_load::RowOrder::Modulo8

use sage_core::Granularity;
use sage_ptx::Val;

use super::tile_load::{CHUNK, Head, ROWS};
use crate::sequence::KEY_TILE;

/// Scales of a tile of K.
pub(crate) const fn groups_of_tile(granularity: Granularity) -> usize {
    match granularity {
        Granularity::PerThread => 4,
        Granularity::PerToken => KEY_TILE,
        Granularity::PerTensor | Granularity::PerBlock | Granularity::PerWarp => 1,
    }
}

/// The largest magnitude of a group as bits, which are ordered as magnitudes are, NaN above all; and the group's index
/// in the tile.
pub(super) type Group<'k> = (Val<'k, i32>, Val<'k, i32>);

/// The group that all the thread's rows belong to; `max` is their largest magnitude, as bits.
#[track_caller]
pub(super) fn group_maximum<'k>(head: &Head<'k>, granularity: Granularity, max: Val<'k, i32>) -> Group<'k> {
    let of_row = head.source.padded_dim() / CHUNK;
    let (threads, group) = match granularity {
        // Two rows of every eight: neighbouring threads.
        Granularity::PerThread => (2 * of_row, head.part >> 1),
        _ => (ROWS * of_row, head.code.constant(0)),
    };
    (among_neighbours(head, max, threads), group)
}

/// Each of the thread's rows by itself.
#[track_caller]
pub(super) fn group_maxima_per_token<'k>(head: &Head<'k>, rows: &[Val<'k, f32>; ROWS]) -> Vec<Group<'k>> {
    let of_row = head.source.padded_dim() / CHUNK;
    let group = |(i, max): (usize, &Val<'k, f32>)| {
        (among_neighbours(head, max.reinterpret(), of_row), head.part + (ROWS * i) as i32)
    };
    rows.iter().enumerate().map(group).collect()
}

/// The largest value of each `threads` neighbouring threads, a power of two.
#[track_caller]
fn among_neighbours<'k>(head: &Head<'k>, value: Val<'k, i32>, threads: usize) -> Val<'k, i32> {
    let code = head.code;
    if threads < 32 {
        return value.reduce_lanes(threads as i32 - 1, |a, b| a.max(b));
    }
    let of_warp = value.warp_max();
    if threads == 32 {
        return of_warp;
    }
    let warps = head.source.threads() as usize / 32;
    let maxima = code.shared::<i32>("maxima", warps);
    let warp = head.thread >> 5;
    code.when((head.thread & 31).eq(0), || maxima.at(warp).store(of_warp));
    code.barrier();
    let together = (threads / 32) as i32;
    let first = maxima.at(warp & -together);
    let others = (0..together).map(|i| first.plus(i).load());
    others.reduce(|a, b| a.max(b)).unwrap_or(of_warp)
}
