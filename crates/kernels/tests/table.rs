//! The cases that every backend runs, in the emulator: on the newest GPU of each engine.

use sage_ptx::Target;
use sage_testkit::{Emulated, check_table, table};

/// Those in f32, the schemes that no GPU computes, and pooled terms of packed sequences and of windows that hide the first keys.
const MOST_SKIPPED: usize = 23;

#[test]
fn cases_of_every_kind_are_the_oracles() {
    check_table(&Emulated::on(Target::SM_89).multiprocessors(7), &table(), MOST_SKIPPED);
}

#[test]
fn cases_of_every_kind_are_the_oracles_by_warpgroups() {
    check_table(&Emulated::on(Target::SM_90A).multiprocessors(7), &table(), MOST_SKIPPED);
}
