//! The cases that every backend runs, in the emulator: on the newest GPU of each engine, and on the oldest.

use sage_ptx::Target;
use sage_testkit::{Emulated, check_table, most_refused, table};

fn check_on(target: Target) {
    check_table(&Emulated::on(target).multiprocessors(7), &table(), most_refused(target));
}

#[test]
fn cases_of_every_kind_are_the_oracles() {
    check_on(Target::SM_89);
}

#[test]
fn cases_of_every_kind_are_the_oracles_by_warpgroups() {
    check_on(Target::SM_90A);
}

#[test]
fn cases_of_every_kind_are_the_oracles_on_turing() {
    check_on(Target::SM_75);
}
