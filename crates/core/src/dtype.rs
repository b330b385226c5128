//! Element types of the tensors that users hand over.

use std::fmt;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Element type of a query, key, value or output tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of a single: 8 bits of exponent, 8 of significand.
    BF16,
}

impl DType {
    /// All element types, in the order of this enum.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name used in messages, in JSON and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A Rust type that stands for a [`DType`].
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The matching [`DType`].
    const DTYPE: DType;
    /// Zero.
    const ZERO: Self;
    /// Widening conversion, exact.
    fn to_f32(self) -> f32;
    /// Narrowing conversion, to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Narrowing conversion from double precision, rounded once.
    fn from_f64(value: f64) -> Self;
    /// [`Element::to_f32`] of a whole slice; the slices have the same length.
    fn widen(from: &[Self], to: &mut [f32]) {
        from.iter().zip(to).for_each(|(from, to)| *to = from.to_f32());
    }
    /// [`Element::from_f32`] of a whole slice; the slices have the same length.
    fn narrow(from: &[f32], to: &mut [Self]) {
        from.iter().zip(to).for_each(|(from, to)| *to = Self::from_f32(*from));
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    const ZERO: Self = 0.0;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    const ZERO: Self = f16::ZERO;
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn from_f64(value: f64) -> Self {
        f16::from_f64(value)
    }
    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    const ZERO: Self = bf16::ZERO;
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn from_f64(value: f64) -> Self {
        bf16::from_f64(value)
    }
    // In both, without branches, so that they become vectors. Signalling NaNs stay what they are.
    fn widen(from: &[Self], to: &mut [f32]) {
        from.iter().zip(to).for_each(|(from, to)| *to = f32::from_bits(u32::from(from.to_bits()) << 16));
    }
    fn narrow(from: &[f32], to: &mut [Self]) {
        from.iter().zip(to).for_each(|(from, to)| *to = nearest_bf16(*from));
    }
}

/// `bf16::from_f32` without branches, for loops that are to become vectors.
#[inline(always)]
pub fn nearest_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    // Half a unit in the last place, less one where that is even, carries into what is kept.
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // Of a NaN the upper half might be that of infinity.
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { nearest } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bfloat16_is_converted_as_one_by_one() {
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut wide = vec![0f32; all.len()];
        bf16::widen(&all, &mut wide);
        for (x, wide) in all.iter().zip(&wide) {
            assert!(x.to_f32() == *wide || x.is_nan() && wide.is_nan(), "{:#x}", x.to_bits());
        }
        // Halfway between neighbours and beside that, and every NaN that a shift might lose.
        let near = (0..=u16::MAX)
            .flat_map(|x| [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|y| u32::from(x) << 16 | y));
        let near: Vec<f32> = near.map(f32::from_bits).collect();
        let mut narrow = vec![bf16::ZERO; near.len()];
        bf16::narrow(&near, &mut narrow);
        for (x, narrow) in near.iter().zip(&narrow) {
            assert!(bf16::from_f32(*x) == *narrow || x.is_nan() && narrow.is_nan(), "{:#x}", x.to_bits());
        }
    }
}
