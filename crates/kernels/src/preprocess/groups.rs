//! Largest magnitudes of groups of rows, from what threads hold of a tile in the order [`RowOrder::Modulo8`].
//!
//! [`RowOrder::Modulo8`]: super::tile_load::RowOrder::Modulo8

use sage_core::Granularity;
use sage_ptx::Val;

use super::tile_load::{CHUNK, Head, ROWS};
use crate::sequence::KEY_TILE;

/// Scales of a tile of K.
pub(super) const fn groups_of_tile(granularity: Granularity) -> usize {
    match granularity {
        Granularity::PerThread => 4,
        Granularity::PerToken => KEY_TILE,
        Granularity::PerTensor | Granularity::PerBlock | Granularity::PerWarp => 1,
    }
}

/// The largest magnitude of each row's group, and the group's index in the tile.
///
/// `rows` are the largest magnitudes of the thread's rows as floats, NaN where a value is. All results are the same but
/// per token.
#[track_caller]
pub(super) fn group_maxima<'k>(
    head: &Head<'k>,
    granularity: Granularity,
    rows: &[Val<'k, f32>],
) -> Vec<(Val<'k, i32>, Val<'k, i32>)> {
    let code = head.code;
    // Threads of a row, and of the groups of rows that are neighbours modulo 8.
    let of_row = head.source.padded_dim() / CHUNK;
    // Magnitudes are ordered like their bits, NaN above all: from here on they are integers.
    let bits = |max: Val<'k, f32>| max.reinterpret::<i32>();
    if granularity == Granularity::PerToken {
        let of_row = |max| among_neighbours(head, bits(max), of_row);
        let row = |i: usize| head.part + (ROWS * i) as i32;
        return rows.iter().enumerate().map(|(i, &max)| (of_row(max), row(i))).collect();
    }
    let all = rows.iter().copied().reduce(|a, b| a.max_nan(b)).unwrap_or(code.constant(0.0));
    let (threads, group) = match granularity {
        Granularity::PerThread => (2 * of_row, head.part >> 1),
        _ => (ROWS * of_row, code.constant(0)),
    };
    vec![(among_neighbours(head, bits(all), threads), group); rows.len()]
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
