//! Scores as integers that are ordered alike, and what they weigh: [`sage_core::sparse::weight()`] inside a kernel.

use std::f32::consts::LOG2_E;

use sage_core::sparse::EXP2;
use sage_ptx::Val;

/// What stands for a block that does not compete: below the image of every score.
pub(super) const NO_SCORE: u32 = 0;

/// The integer of a score, ordered as scores are, with both zeros the same; of what is no finite number some integer
/// above [`NO_SCORE`].
#[track_caller]
pub(super) fn image<'k>(score: Val<'k, f32>) -> Val<'k, u32> {
    // −0 + 0 is +0.
    let bits = (score + 0.0).reinterpret::<i32>();
    // A negative score's bits are all turned, of another the sign alone.
    let turned = (bits >> 31) | i32::MIN;
    (bits ^ turned).reinterpret::<u32>().max(NO_SCORE + 1)
}

/// The score of an image.
#[track_caller]
pub(super) fn score<'k>(image: Val<'k, u32>) -> Val<'k, f32> {
    let bits = image.reinterpret::<i32>();
    (bits ^ (!(bits >> 31) | i32::MIN)).reinterpret()
}

/// What a score weighs in a row whose largest is `max`. Both are finite.
#[track_caller]
pub(super) fn weight<'k>(score: Val<'k, f32>, max: Val<'k, f32>) -> Val<'k, u32> {
    let x = (score - max) * LOG2_E;
    // The floor of what is not above 0. A difference beyond all numbers is the least integer, and weighs nothing.
    let truncated = x.truncate_to_i32();
    let n = truncated - truncated.to_f32().gt(x).select(1, 0);
    let f = x - n.to_f32();
    let p = EXP2.iter().fold(x.code().constant(0.0), |p, &c| p * f + c) * f + 1.0;
    (p * (1 << 30) as f32).truncate_to_u32() >> -n
}
