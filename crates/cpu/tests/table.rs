//! The cases that every backend runs, on the processor.

use sage_testkit::{check_table, every_cpu, table};

#[test]
fn cases_of_every_kind_are_the_oracles() {
    for cpu in every_cpu() {
        // Schemes with P·V in the 16 or 8 bits of a GPU.
        check_table(&cpu, &table(), 45);
    }
}
