//! Types that values in registers can have.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::isa::{Convert, Ty};

/// A type that a value carries without holding one.
pub(crate) type Phantom<T> = PhantomData<fn() -> T>;

/// Types that fit a register.
pub trait Scalar: Copy + 'static {
    /// The type's name in instructions.
    const TY: Ty;
    /// The bits of a constant.
    fn bits(self) -> u64;
}

macro_rules! scalar {
    ($($rust:ty => $ty:ident, $bits:expr;)*) => {$(
        impl Scalar for $rust {
            const TY: Ty = Ty::$ty;
            fn bits(self) -> u64 {
                let bits: fn($rust) -> u64 = $bits;
                bits(self)
            }
        }
    )*};
}

scalar! {
    bool => Pred, u64::from;
    i32 => S32, |x| u64::from(x as u32);
    u32 => U32, u64::from;
    i64 => S64, |x| x as u64;
    u64 => U64, |x| x;
    f32 => F32, |x| u64::from(x.to_bits());
    f16 => F16, |x| u64::from(x.to_bits());
    bf16 => BF16, |x| u64::from(x.to_bits());
    F16x2 => F16x2, |x| u64::from(x.0[0].to_bits()) | u64::from(x.0[1].to_bits()) << 16;
    BF16x2 => BF16x2, |x| u64::from(x.0[0].to_bits()) | u64::from(x.0[1].to_bits()) << 16;
}

/// Two halves in one register, the first in the low bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct F16x2(pub [f16; 2]);

/// Two bfloat16 in one register, the first in the low bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BF16x2(pub [bf16; 2]);

/// Types of 16 bits: f16 and bf16.
pub trait Half: Scalar {
    /// Two in a register.
    type Pair: Scalar;
    /// From single precision.
    const FROM_F32: Convert;
    /// Two from single precision.
    const PAIR_FROM_F32: Convert;
    /// To single precision.
    const TO_F32: Convert;
}

impl Half for f16 {
    type Pair = F16x2;
    const FROM_F32: Convert = Convert::F32ToF16;
    const PAIR_FROM_F32: Convert = Convert::F32ToF16x2;
    const TO_F32: Convert = Convert::F16ToF32;
}

impl Half for bf16 {
    type Pair = BF16x2;
    const FROM_F32: Convert = Convert::F32ToBF16;
    const PAIR_FROM_F32: Convert = Convert::F32ToBF16x2;
    const TO_F32: Convert = Convert::BF16ToF32;
}
