//! What values of one type alone have: widths of integers, functions of floats, packing.

use half::f16;

use crate::isa::{Convert, Lane, Ty};
use crate::scalar::Half;
use crate::value::{Use, Val};

impl<'k> Val<'k, i32> {
    /// In 64 bits.
    #[track_caller]
    pub fn widen(self) -> Val<'k, i64> {
        self.unary(Lane::Convert(Convert::Integer { from: Ty::S32, to: Ty::S64 }))
    }

    /// The product in 64 bits.
    #[track_caller]
    pub fn mul_wide(self, other: impl Use<'k, i32>) -> Val<'k, i64> {
        self.binary(Lane::MulWide(Ty::S32), other)
    }

    /// The nearest single.
    #[track_caller]
    pub fn to_f32(self) -> Val<'k, f32> {
        self.unary(Lane::Convert(Convert::IntToF32(Ty::S32)))
    }

    /// Quotient and remainder of an index, not negative and below 2²⁴, by a divisor that is known now. (The driver's
    /// compiler would divide by it as by any number, in some thirty instructions.)
    #[track_caller]
    pub fn split_index(self, divisor: usize) -> (Self, Self) {
        if divisor.is_power_of_two() {
            let bits = divisor.ilog2() as i32;
            return (self >> bits, self & (divisor as i32 - 1));
        }
        // ⌈2³² / d⌉ exceeds 2³² / d by less than one, which an index below 2³² / d cannot see.
        let inverse = (1u64 << 32).div_ceil(divisor as u64) as u32;
        let quotient: Val<'k, u32> = self.reinterpret::<u32>().binary(Lane::MulHigh(Ty::U32), inverse);
        let quotient = quotient.reinterpret::<i32>();
        (quotient, self - quotient * divisor as i32)
    }

    /// `⌈self / divisor⌉` for a value that is not negative and a power of two.
    #[track_caller]
    pub fn div_ceil(self, divisor: usize) -> Self {
        (self + (divisor as i32 - 1)).split_index(divisor).0
    }
}

impl<'k> Val<'k, i64> {
    /// The low 32 bits.
    #[track_caller]
    pub fn narrow(self) -> Val<'k, i32> {
        self.unary(Lane::Convert(Convert::Integer { from: Ty::S64, to: Ty::S32 }))
    }
}

impl<'k> Val<'k, u32> {
    /// In 64 bits.
    #[track_caller]
    pub fn widen(self) -> Val<'k, u64> {
        self.unary(Lane::Convert(Convert::Integer { from: Ty::U32, to: Ty::U64 }))
    }

    /// `self` and, in the upper half, `high`.
    #[track_caller]
    pub fn join(self, high: impl Use<'k, u32>) -> Val<'k, u64> {
        let src = [self.in_register_operand(), high.value(self.code()).in_register_operand()];
        self.code().lane(Lane::Join32, &src)
    }

    /// Bytes of `self` (0–3) and `other` (4–7), picked by the nibbles of `selector`.
    #[track_caller]
    pub fn permute_bytes(self, other: impl Use<'k, u32>, selector: impl Use<'k, u32>) -> Self {
        let code = self.code();
        let src = [self.operand(), other.value(code).operand(), selector.value(code).operand()];
        self.code().lane(Lane::Permute, &src)
    }

    /// Number of ones.
    #[track_caller]
    pub fn count_ones(self) -> Val<'k, i32> {
        self.unary::<u32>(Lane::PopCount).reinterpret()
    }

    /// Number of zeros above the highest one.
    #[track_caller]
    pub fn leading_zeros(self) -> Val<'k, i32> {
        self.unary::<u32>(Lane::LeadingZeros).reinterpret()
    }

    /// The bits in reverse.
    #[track_caller]
    pub fn reverse_bits(self) -> Self {
        self.unary(Lane::ReverseBits)
    }

    /// `addend` plus the products of the four signed bytes of both.
    #[track_caller]
    pub fn dot_bytes(self, other: impl Use<'k, u32>, addend: impl Use<'k, i32>) -> Val<'k, i32> {
        let src = [self.operand(), other.value(self.code()).operand(), addend.value(self.code()).operand()];
        self.code().lane(Lane::Dot4, &src)
    }

    /// Two halves of a register.
    #[track_caller]
    pub fn split<T: Half>(self) -> [Val<'k, T>; 2] {
        [self.unary(Lane::Low16), self.unary(Lane::High16)]
    }
}

impl<'k> Val<'k, u64> {
    /// The low 32 bits.
    #[track_caller]
    pub fn narrow(self) -> Val<'k, u32> {
        self.unary(Lane::Convert(Convert::Integer { from: Ty::U64, to: Ty::U32 }))
    }

    /// The high half of the product in 128 bits.
    #[track_caller]
    pub fn mul_high(self, other: impl Use<'k, u64>) -> Self {
        self.binary(Lane::MulHigh(Ty::U64), other)
    }
}

impl<'k> Val<'k, f32> {
    /// `√self`, correctly rounded.
    #[track_caller]
    pub fn sqrt(self) -> Self {
        self.unary(Lane::SquareRoot)
    }

    /// `2^self` within 2⁻²² relative; subnormals are zeros.
    #[track_caller]
    pub fn exp2(self) -> Self {
        self.unary(Lane::Exp2)
    }

    /// `log₂ self`.
    #[track_caller]
    pub fn log2(self) -> Self {
        self.unary(Lane::Log2)
    }

    /// `tanh self` within 2⁻¹¹ relative.
    #[track_caller]
    pub fn tanh(self) -> Self {
        self.unary(Lane::Tanh)
    }

    /// `1 / self`, correctly rounded.
    #[track_caller]
    pub fn recip(self) -> Self {
        self.unary(Lane::Reciprocal)
    }

    /// `1 / self` within a unit in the last place; subnormals are zeros.
    #[track_caller]
    pub fn recip_approx(self) -> Self {
        self.unary(Lane::ReciprocalApprox)
    }

    /// The nearest integer, ties to even, saturating.
    #[track_caller]
    pub fn round_to_i32(self) -> Val<'k, i32> {
        self.unary(Lane::Convert(Convert::F32ToIntNearest(Ty::S32)))
    }

    /// Towards zero, saturating.
    #[track_caller]
    pub fn truncate_to_i32(self) -> Val<'k, i32> {
        self.unary(Lane::Convert(Convert::F32ToIntTruncate(Ty::S32)))
    }

    /// Towards zero, saturating; NaN and what is negative to 0.
    #[track_caller]
    pub fn truncate_to_u32(self) -> Val<'k, u32> {
        self.unary(Lane::Convert(Convert::F32ToIntTruncate(Ty::U32)))
    }

    /// The nearest value of a type of 16 bits.
    #[track_caller]
    pub fn narrow<T: Half>(self) -> Val<'k, T> {
        self.unary(Lane::Convert(T::FROM_F32))
    }

    /// `self` (low) and `high` as two values of 16 bits in a register.
    #[track_caller]
    pub fn pack<T: Half>(self, high: Val<'k, f32>) -> Val<'k, T::Pair> {
        self.code().lane(Lane::Convert(T::PAIR_FROM_F32), &[high.operand(), self.operand()])
    }

    /// Four singles as E4M3 in a register, the first in the lowest byte: nearest even, saturating.
    #[track_caller]
    pub fn pack_e4m3([a, b, c, d]: [Self; 4]) -> Val<'k, u32> {
        let code = a.code();
        let pair = |low: Self, high: Self| -> Val<'k, f16> {
            code.lane(Lane::Convert(Convert::F32ToE4M3x2), &[high.operand(), low.operand()])
        };
        let (low, high) = (pair(a, b), pair(c, d));
        code.lane(Lane::Join16, &[low.operand(), high.operand()])
    }
}

impl<'k, T: Half> Val<'k, T> {
    /// In single precision; exact.
    #[track_caller]
    pub fn to_f32(self) -> Val<'k, f32> {
        self.unary(Lane::Convert(T::TO_F32))
    }
}
