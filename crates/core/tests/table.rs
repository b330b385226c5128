//! The oracle of schemes on the cases that every backend runs, beside exact attention.

use sage_testkit::{Oracle, check_table, table};

#[test]
fn every_scheme_is_near_exact_attention() {
    check_table(&Oracle, &table(), 0);
}
