//! The cases that every backend runs, on a real GPU. Without a driver the test prints that it is skipped.

#![cfg(feature = "cuda")]

use sage_testkit::{check_table, gpu, most_refused, table};

#[test]
fn cases_of_every_kind_are_the_oracles() {
    let Some(cuda) = gpu::first("cases_of_every_kind_are_the_oracles") else { return };
    check_table(&cuda, &table(), most_refused(cuda.machine().target));
}
