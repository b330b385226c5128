//! Biases near the least finite number, which programs write for padding: scores are in base 2, where such a bias would
//! overflow.

use std::f32::consts::LOG2_E;

use sage_ptx::Val;

/// The least bias that is finite in base 2, where the least finite reference still lies below it: `-2¹²⁷`, in natural
/// units.
pub(crate) const LEAST_BIAS: f32 = -LEAST_REFERENCE / LOG2_E;

/// `2¹²⁷`: rows whose scores are all biased by less have this reference, negative.
pub(crate) const LEAST_REFERENCE: f32 = f32::from_bits(254 << 23);

/// `lse`, or the least finite number where a bias of about that much was on every key of the row: in base 2, where
/// `reference` is, it did not fit.
#[track_caller]
pub(crate) fn least_lse<'k>(reference: Val<'k, f32>, lse: Val<'k, f32>) -> Val<'k, f32> {
    (reference.le(-LEAST_REFERENCE / 2.0) & lse.gt(f32::NEG_INFINITY)).select(f32::MIN, lse)
}
