//! Counters of a pass's launches, which its first launch sets to zero in place of a launch of its own.

use sage_ptx::{Code, Global, Val};

/// Has the first block, of so many threads, set `count` counters to zero.
#[track_caller]
pub(crate) fn clear_counters<'k>(
    code: &'k Code,
    counters: Global<'k, u32>,
    count: Val<'k, i32>,
    threads: u32,
) {
    let [x, y, z] = code.block_index().map(|index| index.eq(0));
    code.when(x & y & z, || {
        code.range_by(code.thread(), count, threads as i32, |index| counters.at(index).store(0u32));
    });
}
