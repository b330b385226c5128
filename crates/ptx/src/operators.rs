//! Rust's operators, on values and constants of one type.

use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Rem, Shl, Shr, Sub};

use half::{bf16, f16};

use crate::isa::{Lane, Ty};
use crate::scalar::{BF16x2, F16x2, Scalar};
use crate::value::{Use, Val};

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
                self.$method(other.value(self.code()))
            }
        }
        $(impl<'k> $trait<Val<'k, $ty>> for $ty {
            type Output = Val<'k, $ty>;
            #[track_caller]
            fn $method(self, other: Val<'k, $ty>) -> Val<'k, $ty> {
                self.value(other.code()).$method(other)
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

impl<'k> Val<'k, bool> {
    /// `a` where the predicate holds, else `b`.
    #[track_caller]
    pub fn select<T: Scalar>(self, a: impl Use<'k, T>, b: impl Use<'k, T>) -> Val<'k, T> {
        let (a, b) = (a.value(self.code()), b.value(self.code()));
        match self.known() {
            Some(1) => a,
            Some(_) => b,
            None => self.code().lane(Lane::Select(T::TY), &[a.operand(), b.operand(), self.operand()]),
        }
    }
}
