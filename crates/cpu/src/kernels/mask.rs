//! One row of an explicit mask, applied to base-2 scores.

use std::f32::consts::LOG2_E;

use super::Load;
use crate::isa::Isa;
use crate::tile::TILE_KEYS;

/// Hides keys: their scores become −∞, whatever they are.
pub(crate) struct HideKeys<'a> {
    /// Which keys stay visible.
    pub visible: &'a [bool],
    /// As many scores.
    pub scores: &'a mut [f32],
}

/// Adds biases, which are for the natural exponential, to scores.
///
/// −∞ hides the key, whatever its score. A finite bias stays finite in base 2: padding with the lowest number hides
/// keys from rows that see others, and is no bias in rows that see none.
pub(crate) struct AddBias<'a, E> {
    pub bias: &'a [E],
    /// As many scores.
    pub scores: &'a mut [f32],
}

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Asks for what the next tile will read of the same row of a mask: rows of a large one lie a page or more apart, and
/// the processor does not guess that far.
#[inline(always)]
unsafe fn ask_for_next<I: Isa, T>(row: &[T]) {
    for line in (0..TILE_KEYS * size_of::<T>()).step_by(LINE_BYTES) {
        let next = row.as_ptr().cast::<u8>().wrapping_add(TILE_KEYS * size_of::<T>() + line);
        // SAFETY: any address will do; the caller vouches for the instruction set.
        unsafe { I::prefetch(next) }
    }
}

#[inline(always)]
pub(super) unsafe fn hide_keys<I: Isa>(args: &mut HideKeys<'_>) {
    let HideKeys { visible, scores } = args;
    assert_eq!(visible.len(), scores.len());
    // SAFETY: the caller vouches for the instruction set.
    unsafe { ask_for_next::<I, bool>(visible) }
    let vectors = scores.len() / I::LANES * I::LANES;
    for at in (0..vectors).step_by(I::LANES) {
        // SAFETY: the assertion bounds every index; a `bool` is a byte of 0 or 1; the caller vouches for the set.
        unsafe {
            let visible = I::load_i8(visible.as_ptr().add(at).cast());
            let score = scores.as_mut_ptr().add(at);
            let zero = I::splat(0.0);
            let kept = I::zero_below(visible, I::splat(0.5), I::load(score));
            I::store(score, I::sub(kept, infinite_where::<I>(I::sub(zero, visible), -0.5)));
        }
    }
    for (score, &visible) in scores[vectors..].iter_mut().zip(&visible[vectors..]) {
        *score = if visible { *score } else { f32::NEG_INFINITY };
    }
}

#[inline(always)]
pub(super) unsafe fn add_bias<I: Isa, E: Load>(args: &mut AddBias<'_, E>) {
    let AddBias { bias, scores } = args;
    assert_eq!(bias.len(), scores.len());
    // SAFETY: the caller vouches for the instruction set.
    unsafe { ask_for_next::<I, E>(bias) }
    let vectors = scores.len() / I::LANES * I::LANES;
    for at in (0..vectors).step_by(I::LANES) {
        // SAFETY: the assertion bounds every index; the caller vouches for the instruction set.
        unsafe {
            let bias = E::vector::<I>(bias.as_ptr().add(at));
            let score = scores.as_mut_ptr().add(at);
            let scaled = finite::<I>(I::mul(bias, I::splat(LOG2_E)));
            // What `finite` took away: nothing but an infinity.
            let infinity = I::sub(bias, finite::<I>(bias));
            let sum = I::add(I::add(I::load(score), scaled), infinity);
            let kept = I::zero_below(bias, I::splat(f32::MIN), sum);
            I::store(score, I::sub(kept, infinite_where::<I>(I::sub(I::splat(0.0), bias), f32::INFINITY)));
        }
    }
    for (score, bias) in scores[vectors..].iter_mut().zip(&bias[vectors..]) {
        let bias = bias.to_f32();
        *score = match bias {
            f32::NEG_INFINITY => bias,
            _ if bias.is_finite() => *score + (bias * LOG2_E).clamp(f32::MIN, f32::MAX),
            _ => *score + bias,
        };
    }
}

/// The nearest finite number; NaN for NaN.
#[inline(always)]
unsafe fn finite<I: Isa>(x: I::F) -> I::F {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let (zero, lowest) = (I::splat(0.0), I::splat(f32::MIN));
        // The maximum is its second operand where either is NaN.
        let negated = I::sub(zero, I::max(lowest, x));
        I::sub(zero, I::max(lowest, negated))
    }
}

/// +∞ where `x` is at least `limit` or NaN, zero elsewhere.
#[inline(always)]
unsafe fn infinite_where<I: Isa>(x: I::F, limit: f32) -> I::F {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { I::zero_below(x, I::splat(limit), I::splat(f32::INFINITY)) }
}

#[cfg(test)]
mod tests;
