//! Values and variables of a kernel, with the types of Rust and its operators.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Rem, Shl, Shr, Sub};

use half::{bf16, f16};

use crate::code::{Code, Phantom};
use crate::isa::{Cmp, Convert, Lane, Redux, Shuffle, Ty, Warp};
use crate::program::{Const, Operand, Reg, Width};

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

/// A value that a kernel computes: it never changes.
pub struct Val<'k, T> {
    code: &'k Code,
    operand: Operand,
    ty: Phantom<T>,
}

impl<T> Clone for Val<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Val<'_, T> {}

impl<T> fmt::Debug for Val<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.operand.fmt(f)
    }
}

/// What an operator or method takes beside a value: another value, a variable's, or a constant.
pub trait Use<'k, T> {
    /// The value.
    fn value(self, code: &'k Code) -> Val<'k, T>;
}

impl<'k, T: Scalar> Use<'k, T> for Val<'k, T> {
    fn value(self, _: &'k Code) -> Val<'k, T> {
        self
    }
}

impl<'k, T: Scalar> Use<'k, T> for Var<'k, T> {
    #[track_caller]
    fn value(self, _: &'k Code) -> Val<'k, T> {
        self.get()
    }
}

impl<'k, T: Scalar> Use<'k, T> for T {
    fn value(self, code: &'k Code) -> Val<'k, T> {
        Val::of_bits(code, self.bits())
    }
}

impl<'k, T: Scalar> Val<'k, T> {
    pub(crate) fn of_register(code: &'k Code, reg: Reg) -> Self {
        Val { code, operand: Operand::Reg(reg), ty: PhantomData }
    }

    pub(crate) fn of_bits(code: &'k Code, bits: u64) -> Self {
        let constant = match T::TY {
            Ty::F32 => Const::F32(f32::from_bits(bits as u32)),
            Ty::F64 => Const::F64(f64::from_bits(bits)),
            ty => match ty.width() {
                Width::Pred => Const::Pred(bits & 1 == 1),
                Width::B16 => Const::B16(bits as u16),
                Width::B32 => Const::I32(bits as u32 as i32),
                Width::B64 => Const::I64(bits as i64),
            },
        };
        Val { code, operand: Operand::Const(constant), ty: PhantomData }
    }

    /// The kernel that the value belongs to.
    pub fn code(self) -> &'k Code {
        self.code
    }

    /// The operand of an instruction.
    pub(crate) fn operand(self) -> Operand {
        self.operand
    }

    /// The value in a register, also where it is a constant.
    #[track_caller]
    pub(crate) fn in_register(self) -> Reg {
        match self.operand {
            Operand::Reg(reg) => reg,
            Operand::Const(_) => {
                let reg = self.code.register::<T>();
                self.code.emit(Lane::Mov(T::TY), &[reg], &[self.operand]);
                reg
            }
        }
    }

    #[track_caller]
    pub(crate) fn in_register_operand(self) -> Operand {
        Operand::Reg(self.in_register())
    }

    /// The constant, where the value is one.
    pub fn known(self) -> Option<u64> {
        self.operand.constant_bits()
    }

    /// Names the value in the printed kernel and in the emulator's reports.
    pub fn named(self, name: &str) -> Self {
        if let Operand::Reg(reg) = self.operand {
            self.code.name_register(reg, name);
        }
        self
    }

    #[track_caller]
    fn unary<R: Scalar>(self, op: Lane) -> Val<'k, R> {
        self.code.lane(op, &[self.operand])
    }

    #[track_caller]
    fn binary<U: Scalar, R: Scalar>(self, op: Lane, other: impl Use<'k, U>) -> Val<'k, R> {
        self.code.lane(op, &[self.operand, other.value(self.code).operand])
    }

    /// The smaller; of a number and NaN, the number.
    #[track_caller]
    pub fn min(self, other: impl Use<'k, T>) -> Self {
        self.binary(Lane::Min(T::TY), other)
    }

    /// The larger; of a number and NaN, the number.
    #[track_caller]
    pub fn max(self, other: impl Use<'k, T>) -> Self {
        self.binary(Lane::Max(T::TY), other)
    }

    /// The smaller; of a number and NaN, NaN (floats; sm_80).
    #[track_caller]
    pub fn min_nan(self, other: impl Use<'k, T>) -> Self {
        self.binary(Lane::MinNan(T::TY), other)
    }

    /// The larger; of a number and NaN, NaN (floats; sm_80).
    #[track_caller]
    pub fn max_nan(self, other: impl Use<'k, T>) -> Self {
        self.binary(Lane::MaxNan(T::TY), other)
    }

    /// The magnitude.
    #[track_caller]
    pub fn abs(self) -> Self {
        self.unary(Lane::Abs(T::TY))
    }

    /// `self · factor + addend`: rounded once for floats.
    #[track_caller]
    pub fn mul_add(self, factor: impl Use<'k, T>, addend: impl Use<'k, T>) -> Self {
        let src = [self.operand, factor.value(self.code).operand, addend.value(self.code).operand];
        self.code.lane(Lane::Fma(T::TY), &src)
    }

    #[track_caller]
    fn compare(self, cmp: Cmp, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.binary(Lane::Set(cmp, T::TY), other)
    }

    /// Whether equal.
    #[track_caller]
    pub fn eq(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Eq, other)
    }

    /// Whether different; true for NaN.
    #[track_caller]
    pub fn ne(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        let cmp = if T::TY.is_float() { Cmp::NeU } else { Cmp::Ne };
        self.compare(cmp, other)
    }

    /// Whether smaller.
    #[track_caller]
    pub fn lt(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Lt, other)
    }

    /// Whether smaller or equal.
    #[track_caller]
    pub fn le(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Le, other)
    }

    /// Whether larger.
    #[track_caller]
    pub fn gt(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Gt, other)
    }

    /// Whether larger or equal.
    #[track_caller]
    pub fn ge(self, other: impl Use<'k, T>) -> Val<'k, bool> {
        self.compare(Cmp::Ge, other)
    }

    /// The same bits as another type of the same width.
    ///
    /// # Panics
    /// When the widths differ: the kernel cannot be written.
    #[track_caller]
    pub fn reinterpret<R: Scalar>(self) -> Val<'k, R> {
        assert_eq!(T::TY.width(), R::TY.width(), "reinterpreting {:?} as {:?}", T::TY, R::TY);
        match self.operand {
            Operand::Reg(reg) => Val::of_register(self.code, reg),
            Operand::Const(constant) => Val::of_bits(self.code, constant.bits()),
        }
    }

    // Other lanes' values.

    #[track_caller]
    fn exchange(self, mode: Shuffle, with: impl Use<'k, i32>) -> Self {
        let src = [self.in_register_operand(), with.value(self.code).operand];
        self.code.value(Warp::Shuffle(mode), &src)
    }

    /// The value of lane `lane`.
    #[track_caller]
    pub fn shuffle(self, lane: impl Use<'k, i32>) -> Self {
        self.exchange(Shuffle::Index, lane)
    }

    /// The value of the lane whose index differs in the bits of `mask`.
    #[track_caller]
    pub fn shuffle_xor(self, mask: i32) -> Self {
        self.exchange(Shuffle::Xor, mask)
    }

    /// Combines the values of the lanes whose indices differ in the bits of `mask` only, so that each has the result.
    #[track_caller]
    pub fn reduce_lanes(self, mask: i32, mut combine: impl FnMut(Self, Self) -> Self) -> Self {
        let bits = (0..5).map(|bit| 1 << bit).filter(|bit| mask & bit != 0);
        bits.fold(self, |value, bit| combine(value, value.shuffle_xor(bit)))
    }
}

impl<'k, T: Scalar> Val<'k, T>
where
    Val<'k, T>: Add<Output = Val<'k, T>>,
{
    /// The sum over the warp's lanes.
    #[track_caller]
    pub fn warp_sum(self) -> Self {
        self.reduce_lanes(31, |a, b| a + b)
    }
}

impl<'k> Val<'k, bool> {
    /// `a` where the predicate holds, else `b`.
    #[track_caller]
    pub fn select<T: Scalar>(self, a: impl Use<'k, T>, b: impl Use<'k, T>) -> Val<'k, T> {
        let (a, b) = (a.value(self.code), b.value(self.code));
        match self.known() {
            Some(1) => a,
            Some(_) => b,
            None => self.code.lane(Lane::Select(T::TY), &[a.operand, b.operand, self.operand]),
        }
    }
}

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

    /// Largest value over the warp's lanes, in one instruction (sm_80).
    #[track_caller]
    pub fn warp_max(self) -> Self {
        self.code.value(Warp::Redux(Redux::Max, Ty::S32), &[self.in_register_operand()])
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
    /// `self` and, in the upper half, `high`.
    #[track_caller]
    pub fn join(self, high: impl Use<'k, u32>) -> Val<'k, u64> {
        let src = [self.in_register_operand(), high.value(self.code).in_register_operand()];
        self.code.lane(Lane::Join32, &src)
    }

    /// Bytes of `self` (0–3) and `other` (4–7), picked by the nibbles of `selector`.
    #[track_caller]
    pub fn permute_bytes(self, other: impl Use<'k, u32>, selector: u32) -> Self {
        let src = [self.operand, other.value(self.code).operand, self.code.constant(selector).operand];
        self.code.lane(Lane::Permute, &src)
    }

    /// Number of ones.
    #[track_caller]
    pub fn count_ones(self) -> Val<'k, i32> {
        self.unary::<u32>(Lane::PopCount).reinterpret()
    }

    /// `addend` plus the products of the four signed bytes of both.
    #[track_caller]
    pub fn dot_bytes(self, other: impl Use<'k, u32>, addend: impl Use<'k, i32>) -> Val<'k, i32> {
        let src = [self.operand, other.value(self.code).operand, addend.value(self.code).operand];
        self.code.lane(Lane::Dot4, &src)
    }

    /// Two halves of a register.
    #[track_caller]
    pub fn split<T: Half>(self) -> [Val<'k, T>; 2] {
        [self.unary(Lane::Low16), self.unary(Lane::High16)]
    }
}

impl<'k> Val<'k, f32> {
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

    /// The nearest value of a type of 16 bits.
    #[track_caller]
    pub fn narrow<T: Half>(self) -> Val<'k, T> {
        self.unary(Lane::Convert(T::FROM_F32))
    }

    /// `self` (low) and `high` as two values of 16 bits in a register.
    #[track_caller]
    pub fn pack<T: Half>(self, high: Val<'k, f32>) -> Val<'k, T::Pair> {
        self.code.lane(Lane::Convert(T::PAIR_FROM_F32), &[high.operand, self.operand])
    }

    /// Four singles as E4M3 in a register, the first in the lowest byte: nearest even, saturating.
    #[track_caller]
    pub fn pack_e4m3(values: [Self; 4]) -> Val<'k, u32> {
        Self::pack_bytes(values, Convert::F32ToE4M3x2)
    }

    /// Four singles as E5M2 in a register, as [`Val::pack_e4m3`].
    #[track_caller]
    pub fn pack_e5m2(values: [Self; 4]) -> Val<'k, u32> {
        Self::pack_bytes(values, Convert::F32ToE5M2x2)
    }

    #[track_caller]
    fn pack_bytes([a, b, c, d]: [Self; 4], convert: Convert) -> Val<'k, u32> {
        let pair = |low: Self, high: Self| -> Val<'k, f16> {
            low.code.lane(Lane::Convert(convert), &[high.operand, low.operand])
        };
        let (low, high) = (pair(a, b), pair(c, d));
        a.code.lane(Lane::Join16, &[low.operand, high.operand])
    }
}

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

impl<'k, T: Half> Val<'k, T> {
    /// In single precision; exact.
    #[track_caller]
    pub fn to_f32(self) -> Val<'k, f32> {
        self.unary(Lane::Convert(T::TO_F32))
    }
}

// Operators, on values and constants of one type.

macro_rules! operator {
    ($trait:ident, $method:ident, $op:ident, $mod:ident: $($ty:ty),*) => {
        impl<'k, T: $mod::Supports> $trait for Val<'k, T> {
            type Output = Val<'k, T>;
            #[track_caller]
            fn $method(self, other: Self) -> Self {
                if let Some(same) = $mod::identity(self, other) {
                    return same;
                }
                self.binary(Lane::$op(T::TY), other)
            }
        }
        impl<'k, T: $mod::Supports> $trait<T> for Val<'k, T> {
            type Output = Val<'k, T>;
            #[track_caller]
            fn $method(self, other: T) -> Self {
                self.$method(other.value(self.code))
            }
        }
        $(impl<'k> $trait<Val<'k, $ty>> for $ty {
            type Output = Val<'k, $ty>;
            #[track_caller]
            fn $method(self, other: Val<'k, $ty>) -> Val<'k, $ty> {
                self.value(other.code).$method(other)
            }
        })*
        mod $mod {
            use super::*;
            /// Types with the operator.
            pub trait Supports: Scalar {}
            $(impl Supports for $ty {})*
            /// The result where one operand leaves the other as it is.
            pub(super) fn identity<'k, T: Scalar>(a: Val<'k, T>, b: Val<'k, T>) -> Option<Val<'k, T>> {
                if T::TY.is_float() {
                    return None;
                }
                neutral(Lane::$op(T::TY), a, b)
            }
        }
    };
}

/// `a` or `b` where the other is an integer operation's neutral element.
fn neutral<'k, T: Scalar>(op: Lane, a: Val<'k, T>, b: Val<'k, T>) -> Option<Val<'k, T>> {
    let pred = T::TY == Ty::Pred;
    match (op, a.known(), b.known()) {
        (Lane::And(_), Some(1), None) if pred => Some(b),
        (Lane::And(_), None, Some(1)) if pred => Some(a),
        (Lane::And(_), Some(0), None) | (Lane::Or(_), Some(1), None) if pred => Some(a),
        (Lane::And(_), None, Some(0)) | (Lane::Or(_), None, Some(1)) if pred => Some(b),
        (Lane::Add(_) | Lane::Or(_) | Lane::Xor(_), Some(0), None) | (Lane::Mul(_), Some(1), None) => Some(b),
        (Lane::Add(_) | Lane::Sub(_) | Lane::Or(_) | Lane::Xor(_), None, Some(0))
        | (Lane::Mul(_) | Lane::Div(_), None, Some(1)) => Some(a),
        _ => None,
    }
}

operator!(Add, add, Add, addition: i32, u32, i64, u64, f32, f16, bf16, F16x2, BF16x2);
operator!(Sub, sub, Sub, subtraction: i32, u32, i64, u64, f32, f16, bf16, F16x2, BF16x2);
operator!(Mul, mul, Mul, multiplication: i32, u32, i64, u64, f32, f16, bf16, F16x2, BF16x2);
operator!(Div, div, Div, division: i32, u32, i64, u64, f32);
operator!(Rem, rem, Rem, remainder: i32, u32, i64, u64);
operator!(BitAnd, bitand, And, conjunction: bool, i32, u32, i64, u64);
operator!(BitOr, bitor, Or, disjunction: bool, i32, u32, i64, u64);
operator!(BitXor, bitxor, Xor, exclusion: bool, i32, u32, i64, u64);

macro_rules! shift {
    ($trait:ident, $method:ident, $op:ident) => {
        impl<'k, T: Scalar> $trait<i32> for Val<'k, T> {
            type Output = Val<'k, T>;
            #[track_caller]
            fn $method(self, bits: i32) -> Self {
                if bits == 0 { self } else { self.binary::<i32, T>(Lane::$op(T::TY), bits) }
            }
        }
        impl<'k, T: Scalar> $trait<Val<'k, i32>> for Val<'k, T> {
            type Output = Val<'k, T>;
            #[track_caller]
            fn $method(self, bits: Val<'k, i32>) -> Self {
                self.binary::<i32, T>(Lane::$op(T::TY), bits)
            }
        }
    };
}

shift!(Shl, shl, Shl);
shift!(Shr, shr, Shr);

impl<'k, T: Scalar> Neg for Val<'k, T> {
    type Output = Val<'k, T>;
    #[track_caller]
    fn neg(self) -> Self {
        self.unary(Lane::Neg(T::TY))
    }
}

impl<'k, T: Scalar> Not for Val<'k, T> {
    type Output = Val<'k, T>;
    #[track_caller]
    fn not(self) -> Self {
        self.unary(Lane::Not(T::TY))
    }
}

/// A variable: a register that is read and written.
pub struct Var<'k, T> {
    code: &'k Code,
    reg: Reg,
    ty: Phantom<T>,
}

impl<T> Clone for Var<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Var<'_, T> {}

impl<T> fmt::Debug for Var<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reg.fmt(f)
    }
}

impl<'k, T: Scalar> Var<'k, T> {
    /// Without a value as yet.
    pub fn new(code: &'k Code) -> Self {
        Var { code, reg: code.register::<T>(), ty: PhantomData }
    }

    pub(crate) fn register(self) -> Reg {
        self.reg
    }

    /// The value at this point; later changes leave it as it is.
    #[track_caller]
    pub fn get(self) -> Val<'k, T> {
        self.code.value(Lane::Mov(T::TY), &[Operand::Reg(self.reg)])
    }

    /// Changes the value.
    #[track_caller]
    pub fn set(self, value: impl Use<'k, T>) {
        let value = value.value(self.code).operand();
        self.code.emit(Lane::Mov(T::TY), &[self.reg], &[value]);
    }

    /// The same register as a variable of another type of the same width.
    ///
    /// # Panics
    /// When the widths differ: the kernel cannot be written.
    pub fn reinterpret<R: Scalar>(self) -> Var<'k, R> {
        assert_eq!(T::TY.width(), R::TY.width(), "reinterpreting {:?} as {:?}", T::TY, R::TY);
        Var { code: self.code, reg: self.reg, ty: PhantomData }
    }

    /// Names the variable in the printed kernel and in the emulator's reports.
    pub fn named(self, name: &str) -> Self {
        self.code.name_register(self.reg, name);
        self
    }
}

impl Operand {
    pub(crate) fn constant_bits(&self) -> Option<u64> {
        match self {
            Operand::Const(constant) => Some(constant.bits()),
            Operand::Reg(_) => None,
        }
    }
}
