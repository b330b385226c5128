//! Integers with a scale for each group: the arithmetic of core's `IntQuantizer`, inside a kernel.

use sage_core::{IntBits, IntQuantizer, Rounding, ZeroGroup};
use sage_ptx::Val;

/// Added to a float below 2²² in magnitude, leaves its nearest integer (ties to even) in the low bits.
pub(crate) const ROUNDING_MAGIC: f32 = 12_582_912.0;

/// `1.5 · 2²³` as bits: an integer below 2²² in magnitude added to these is the float `ROUNDING_MAGIC + integer`.
pub(crate) const ROUNDING_MAGIC_BITS: i32 = 0x4B40_0000;

/// What the original adds to, or puts under, a scale to keep it above zero.
const EPSILON: f32 = 1e-7;

/// Bits of a magnitude: ordered like the magnitudes themselves, infinities and NaN above all numbers, so that an
/// integer maximum does not lose them as a maximum of floats would.
#[track_caller]
pub(crate) fn magnitude_bits<'k>(x: Val<'k, f32>) -> Val<'k, i32> {
    x.abs().reinterpret()
}

/// A scale of zero stands for zeros; a tiny one does as well, and hidden keys stay at minus infinity times it.
#[track_caller]
pub(crate) fn nonzero<'k>(scale: Val<'k, f32>) -> Val<'k, f32> {
    scale.eq(0.0).select(1e-30, scale)
}

/// The step of a group of values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step<'k> {
    /// `value ≈ scale · integer`; NaN where the group holds a value that is not finite.
    pub scale: Val<'k, f32>,
    /// `1 / scale` correctly rounded, or for [`ZeroGroup::ClampMaximum`] `levels / max`; 0 where the scale is 0 or NaN.
    inverse: Val<'k, f32>,
    /// The largest integer, and how quotients become integers.
    quantizer: IntQuantizer,
    /// Bits of the group's largest magnitude.
    max_bits: Val<'k, i32>,
    /// What a careful step multiplies values by first.
    lift: Option<Val<'k, f32>>,
}

/// Groups whose largest magnitude is below have scales so small that corrections of quotients would not be exact, or
/// quotients above the largest integer.
const SMALLEST_ORDINARY: f32 = f32::from_bits((127 - 90) << 23);

/// Brings any subnormal scale into the range where corrections are exact: `2⁶⁴`.
const LIFT: f32 = f32::from_bits((127 + 64) << 23);

impl<'k> Step<'k> {
    /// The step of a group whose largest magnitude has these bits.
    #[track_caller]
    pub fn of_group(quantizer: &IntQuantizer, max_bits: Val<'k, i32>) -> Self {
        let levels = quantizer.bits.max() as f32;
        let max = max_bits.reinterpret::<f32>();
        let scale = match quantizer.zero_group {
            ZeroGroup::Guard => max / levels,
            ZeroGroup::AddToScale => max / levels + EPSILON,
            ZeroGroup::ClampMaximum => max.max(EPSILON) / levels,
        };
        let finite = max_bits.lt(f32::INFINITY.to_bits() as i32);
        let inverse = match quantizer.zero_group {
            ZeroGroup::ClampMaximum => levels / max.max(EPSILON),
            ZeroGroup::Guard | ZeroGroup::AddToScale => scale.recip(),
        };
        let inverse = (finite & scale.ne(0.0)).select(inverse, 0.0);
        let scale = finite.select(scale, f32::NAN).named("scale");
        Step { scale, inverse, quantizer: *quantizer, max_bits, lift: None }
    }

    /// Whether [`Step::round`] gives exactly the oracle's integers: the group holds no value that is not finite, and
    /// not only tiny ones.
    #[track_caller]
    pub fn is_ordinary(&self) -> Val<'k, bool> {
        let finite = self.max_bits.lt(f32::INFINITY.to_bits() as i32);
        match self.quantizer.zero_group {
            ZeroGroup::Guard => finite & self.max_bits.ge(SMALLEST_ORDINARY.to_bits() as i32),
            ZeroGroup::AddToScale | ZeroGroup::ClampMaximum => finite,
        }
    }

    /// The same step with exactly the oracle's integers for every group, in a few instructions more for each value.
    #[track_caller]
    pub fn careful(&self) -> Self {
        if self.quantizer.zero_group != ZeroGroup::Guard {
            return Step { lift: Some(self.scale.code().constant(1.0)), ..*self };
        }
        let tiny = self.max_bits.lt(SMALLEST_ORDINARY.to_bits() as i32);
        let lift = tiny.select(LIFT, 1.0);
        let scale = self.scale * lift;
        let inverse = self.inverse.eq(0.0).select(0.0, scale.recip());
        Step { scale, inverse, lift: Some(lift), ..*self }
    }

    /// The integer of `x`, in the low bits; the bits above are not its sign.
    #[track_caller]
    pub fn round(&self, x: Val<'k, f32>) -> Val<'k, u32> {
        let levels = self.quantizer.bits.max() as f32;
        let x = self.lift.map_or(x, |lift| x * lift);
        let quotient = match self.quantizer.zero_group {
            ZeroGroup::ClampMaximum => x * self.inverse,
            // With a correctly rounded reciprocal one correction gives the correctly rounded quotient (Markstein).
            ZeroGroup::Guard | ZeroGroup::AddToScale => {
                let near = x * self.inverse;
                let rest = (-near).mul_add(self.scale, x);
                rest.mul_add(self.inverse, near)
            }
        };
        let quotient = match self.lift {
            Some(_) => quotient.max(-levels).min(levels),
            None => quotient,
        };
        match self.quantizer.rounding {
            Rounding::NearestEven => (quotient + ROUNDING_MAGIC).reinterpret(),
            Rounding::HalfAwayFromZero => {
                let sign = quotient.reinterpret::<u32>() & (1 << 31);
                let half = (sign | 0.5f32.to_bits()).reinterpret::<f32>();
                (quotient + half).truncate_to_i32().reinterpret()
            }
        }
    }

    /// The integers of neighbouring channels in one register, the first in the lowest bits: four of 8 bits or eight of
    /// 4.
    #[track_caller]
    pub fn round_word(&self, x: &[Val<'k, f32>]) -> Val<'k, u32> {
        let integers: Vec<_> = x.iter().map(|&x| self.round(x)).collect();
        let bytes = |four: &[Val<'k, u32>]| {
            let low = four[0].permute_bytes(four[1], 0x0040);
            let high = four[2].permute_bytes(four[3], 0x0040);
            low.permute_bytes(high, 0x5410)
        };
        let word = match self.quantizer.bits {
            IntBits::Eight => bytes(&integers),
            IntBits::Four => {
                // Nibbles of even channels from the low bits of one word of bytes, of odd ones from another's.
                let even = bytes(&[integers[0], integers[2], integers[4], integers[6]]);
                let odd = bytes(&[integers[1], integers[3], integers[5], integers[7]]);
                (even & 0x0f0f_0f0f) | ((odd & 0x0f0f_0f0f) << 4)
            }
        };
        match self.lift {
            // What is not finite times zero is NaN: such a group's integers are zeros all the same.
            Some(_) => self.inverse.eq(0.0).select(0u32, word),
            None => word,
        }
    }
}
