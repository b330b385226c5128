//! The cases that every backend runs, on the processor.

use sage_testkit::{check_table, every_cpu, table};

#[test]
fn cases_of_every_kind_are_the_oracles() {
    for cpu in every_cpu() {
        check_table(&cpu, &table(), 0);
    }
}
