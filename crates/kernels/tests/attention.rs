//! Whole forward passes in the emulator, against the oracle of their scheme.

#[allow(dead_code, reason = "other tests use other parts")]
mod support;

use sage_core::{Accumulator, DType, Preset};
use support::Case;

#[test]
fn int8_scores_with_f16_values() {
    Case { k_bias: 5.0, ..Case::default() }.check(0.002);
}

#[test]
fn full() {
    let _ = Accumulator::F32;
    Case { scheme: Some(Preset::FULL.scheme(64)), dtype: DType::BF16, ..Case::default() }.check(0.004);
}
