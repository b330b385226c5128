//! Numbers rounded to floating-point formats of few bits.
//!
//! All is plain arithmetic without branches, which the compiler turns into the vectors of the set that it is inlined for.

use sage_core::nearest_bf16;
use sage_core::oracle::{E2M1_MAX, E4M3_MAX};

use super::pack::magnitude_bits;

/// Bits of +∞: as integers, those of NaN lie above, those of all other magnitudes below.
pub(super) const INFINITY: u32 = f32::INFINITY.to_bits();

/// The nearest number with `MANTISSA` bits of fraction, ties to even, whose least normal one is `2^LEAST`; NaN for NaN.
/// Nothing is done about the format's largest number, and magnitudes are below 2¹⁰⁰.
#[inline(always)]
pub(super) fn narrow<const MANTISSA: u32, const LEAST: i32>(x: f32) -> f32 {
    let least = const { ((LEAST + 127) as u32) << 23 };
    let units = const { 1.5 * f32::from_bits((127 + f32::MANTISSA_DIGITS - 1 - MANTISSA) << 23) };
    // The power of two below the magnitude: its last place is `MANTISSA` bits on, and that of `shift` is the same.
    let power = f32::from_bits(magnitude_bits(x).max(least) & INFINITY);
    let shift = power * units;
    (x + shift) - shift
}

/// `x`, of a magnitude up to `limit`; NaN for NaN.
#[inline(always)]
fn limited(x: f32, limit: f32) -> f32 {
    // A comparison with NaN is false.
    let x = if x > limit { limit } else { x };
    if x < -limit { -limit } else { x }
}

/// The nearest E4M3 value, of a magnitude at most the largest; NaN for NaN.
#[inline(always)]
pub(super) fn e4m3(x: f32) -> f32 {
    narrow::<3, -6>(limited(x, E4M3_MAX))
}

/// The nearest half; an infinity beyond the largest.
#[inline(always)]
pub(super) fn half(x: f32) -> f32 {
    /// What the largest half would be followed by.
    const BEYOND: f32 = 65_536.0;
    let rounded = narrow::<10, -14>(limited(x, BEYOND));
    if rounded.abs() == BEYOND { f32::INFINITY.copysign(x) } else { rounded }
}

/// The nearest bfloat16.
#[inline(always)]
pub(super) fn bfloat(x: f32) -> f32 {
    f32::from_bits(u32::from(nearest_bf16(x).to_bits()) << 16)
}

/// The nearest E2M1 value, of a magnitude at most the largest; NaN for NaN.
#[inline(always)]
pub(super) fn e2m1(x: f32) -> f32 {
    narrow::<1, 0>(limited(x, E2M1_MAX))
}

#[cfg(test)]
pub(super) mod tests {
    use half::{bf16, f16};
    use sage_core::oracle::{e2m1_code, e2m1_value, round_e4m3};

    use super::*;

    /// Numbers of every exponent: halfway between neighbours of each format, and beside that.
    pub(in super::super) fn numbers() -> impl Iterator<Item = f32> {
        let significands = (0..4096u32).map(|fraction| fraction << 11);
        let beside = |bits: u32| [bits.wrapping_sub(1), bits, bits + 1];
        (0..255u32)
            .flat_map(move |exponent| significands.clone().map(move |fraction| exponent << 23 | fraction))
            .flat_map(beside)
            .map(f32::from_bits)
            .filter(|x| x.is_finite())
            .flat_map(|x| [x, -x])
    }

    #[test]
    fn the_nearest_of_every_format_is_found() {
        for x in numbers() {
            assert_eq!(half(x), f16::from_f32(x).to_f32(), "{x:e}");
            assert_eq!(bfloat(x), bf16::from_f32(x).to_f32(), "{x:e}");
            assert_eq!(e4m3(x), round_e4m3(x), "{x:e}");
            assert_eq!(e2m1(x), e2m1_value(e2m1_code(x)), "{x:e}");
        }
        // Of the last, the upper half is that of infinity.
        for bad in [0x7fc0_0000, 0x7fff_ffff, 0xffff_ffff, 0x7f80_0001].map(f32::from_bits) {
            assert_eq!(bfloat(bad).to_bits() & 0xffff, 0);
            assert!(half(bad).is_nan() && bfloat(bad).is_nan() && e4m3(bad).is_nan());
        }
        assert_eq!((half(f32::INFINITY), e4m3(f32::INFINITY)), (f32::INFINITY, 448.0));
    }
}
