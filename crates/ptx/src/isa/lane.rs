//! Instructions that each lane executes by itself, from registers to a register.

use super::arithmetic::{
    abs, add, div, dot4, extreme, extreme_or_nan, f32_of, flush, fma, in_double, mask, mul, mul_high,
    mul_wide, neg, of_f32, permute, rem, shl, shr, sub,
};
use super::compare::Cmp;
use super::convert::Convert;
use super::row::{Group, Instruction, computed};
use super::types::{Ty, Width};
use crate::target::{Needs, Target};

computed! {
    /// Arithmetic, comparisons, conversions. Operands `a`, `b` and `c` in PTX's order.
    Lane {
        /// `d = a`.
        Mov(ty: Ty): [ty] <- [ty], Needs::BASE, bits("mov", ty), |a| a;
        /// `d = a + b`.
        Add(ty: Ty): [ty] <- [ty, ty] if ty.is_number(), bfloat_arithmetic(ty), rounded("add", ty),
            |a, b| add(ty, a, b);
        /// `d = a - b`.
        Sub(ty: Ty): [ty] <- [ty, ty] if ty.is_number(), bfloat_arithmetic(ty), rounded("sub", ty),
            |a, b| sub(ty, a, b);
        /// `d = a · b`, the low half for integers.
        Mul(ty: Ty): [ty] <- [ty, ty] if ty.is_number(), bfloat_arithmetic(ty),
            if ty.is_float() { rounded("mul", ty) } else { typed("mul.lo", ty) },
            |a, b| mul(ty, a, b);
        /// The high half of `a · b`.
        MulHigh(ty: Ty): [ty] <- [ty, ty] if ty.is_integer(), Needs::BASE, typed("mul.hi", ty),
            |a, b| mul_high(ty, a, b);
        /// `a · b` in twice the width; the type is the operands'.
        MulWide(ty: Ty): [ty.widened()] <- [ty, ty] if ty.is_int32(), Needs::BASE, typed("mul.wide", ty),
            |a, b| mul_wide(ty, a, b);
        /// `a / b`, correctly rounded for floats, towards zero for integers.
        Div(ty: Ty): [ty] <- [ty, ty] if ty.is_integer() || ty == Ty::F32, Needs::BASE, rounded("div", ty),
            |a, b| div(ty, a, b);
        /// Remainder of the integer division.
        Rem(ty: Ty): [ty] <- [ty, ty] if ty.is_integer(), Needs::BASE, typed("rem", ty), |a, b| rem(ty, a, b);
        /// The smaller; of a number and NaN, the number.
        Min(ty: Ty): [ty] <- [ty, ty] if ty.is_number(), half_extreme(ty), typed("min", ty),
            |a, b| extreme(ty, a, b, false);
        /// The larger; of a number and NaN, the number.
        Max(ty: Ty): [ty] <- [ty, ty] if ty.is_number(), half_extreme(ty), typed("max", ty),
            |a, b| extreme(ty, a, b, true);
        /// The smaller; of a number and NaN, NaN. Floats only.
        MinNan(ty: Ty): [ty] <- [ty, ty] if ty.is_float(), Needs::since(Target::SM_80, 7, 0), typed("min.NaN", ty),
            |a, b| extreme_or_nan(ty, a, b, false);
        /// The larger; of a number and NaN, NaN. Floats only.
        MaxNan(ty: Ty): [ty] <- [ty, ty] if ty.is_float(), Needs::since(Target::SM_80, 7, 0), typed("max.NaN", ty),
            |a, b| extreme_or_nan(ty, a, b, true);
        /// Bitwise and.
        And(ty: Ty): [ty] <- [ty, ty] if !ty.is_float(), Needs::BASE, bits("and", ty), |a, b| a & b;
        /// Bitwise or.
        Or(ty: Ty): [ty] <- [ty, ty] if !ty.is_float(), Needs::BASE, bits("or", ty), |a, b| a | b;
        /// Bitwise exclusive or.
        Xor(ty: Ty): [ty] <- [ty, ty] if !ty.is_float(), Needs::BASE, bits("xor", ty), |a, b| a ^ b;
        /// Bitwise not.
        Not(ty: Ty): [ty] <- [ty] if !ty.is_float(), Needs::BASE, bits("not", ty), |a| mask(ty, !a);
        /// `a << b`; 0 where `b` reaches the width.
        Shl(ty: Ty): [ty] <- [ty, Width::B32] if !ty.is_float() && ty != Ty::Pred, Needs::BASE, bits("shl", ty),
            |a, b| shl(ty, a, b);
        /// `a >> b`, with sign for signed types; all sign bits where `b` reaches the width.
        Shr(ty: Ty): [ty] <- [ty, Width::B32] if !ty.is_float() && ty != Ty::Pred, Needs::BASE, typed("shr", ty),
            |a, b| shr(ty, a, b);
        /// `-a`.
        Neg(ty: Ty): [ty] <- [ty] if ty.is_signed() || ty.is_float(), bfloat_sign(ty), typed("neg", ty),
            |a| neg(ty, a);
        /// `|a|`.
        Abs(ty: Ty): [ty] <- [ty] if ty.is_signed() || ty.is_float(), bfloat_sign(ty), typed("abs", ty),
            |a| abs(ty, a);
        /// `a · b + c`, rounded once for floats, the low half for integers.
        Fma(ty: Ty): [ty] <- [ty, ty, ty] if ty.is_number(),
            if ty.is_bfloat() { Needs::since(Target::SM_80, 7, 0) } else { Needs::BASE },
            if ty.is_float() { rounded("fma", ty) } else { typed("mad.lo", ty) },
            |a, b, c| fma(ty, a, b, c);
        /// `a · b + c` with `c` and the result in twice the width of `a` and `b`.
        MadWide(ty: Ty): [ty.widened()] <- [ty, ty, ty.widened()] if ty.is_int32(), Needs::BASE,
            typed("mad.wide", ty),
            |a, b, c| mul_wide(ty, a, b).wrapping_add(c);
        /// `1 / a`, correctly rounded.
        Reciprocal: [Ty::F32] <- [Ty::F32], Needs::BASE, "rcp.rn.f32 $*", |a| of_f32(1.0 / f32_of(a));
        /// `1 / a` within one unit in the last place, subnormals as zero.
        ReciprocalApprox: [Ty::F32] <- [Ty::F32], Needs::BASE, "rcp.approx.ftz.f32 $*",
            |a| of_f32(flush(1.0 / flush(f32_of(a))));
        /// `√a`, correctly rounded.
        SquareRoot: [Ty::F32] <- [Ty::F32], Needs::BASE, "sqrt.rn.f32 $*", |a| of_f32(f32_of(a).sqrt());
        /// `2^a` within 2⁻²² relative, subnormals as zero.
        Exp2: [Ty::F32] <- [Ty::F32], Needs::BASE, "ex2.approx.ftz.f32 $*",
            |a| of_f32(flush(in_double(flush(f32_of(a)), f64::exp2)));
        /// `log₂ a` within 2⁻²² absolute, subnormals as zero.
        Log2: [Ty::F32] <- [Ty::F32], Needs::BASE, "lg2.approx.ftz.f32 $*",
            |a| of_f32(in_double(flush(f32_of(a)), f64::log2));
        /// `tanh a` within 2⁻¹¹ relative.
        Tanh: [Ty::F32] <- [Ty::F32], Needs::since(Target::SM_75, 7, 0), "tanh.approx.f32 $*",
            |a| of_f32(in_double(f32_of(a), f64::tanh));
        /// A predicate: whether `a ⋄ b`; false where either is NaN, but for [`Cmp::NeU`].
        Set(cmp: Cmp, ty: Ty): [Width::Pred] <- [ty, ty]
            if ty == Ty::F32 || ty.is_integer() && cmp != Cmp::NeU, Needs::BASE,
            format!("setp.{}{} $*", cmp.ptx(), ty.ptx()),
            |a, b| u64::from(cmp.holds(ty, a, b));
        /// `p ? a : b`, operands `a`, `b`, `p`.
        Select(ty: Ty): [ty] <- [ty, ty, Width::Pred.times(1).registers_only()] if ty != Ty::Pred, Needs::BASE,
            bits("selp", ty),
            |a, b, p| if p & 1 == 1 { a } else { b };
        /// From one type to another.
        Convert(convert: Convert): [convert.results()] <-
            [of(convert, 0), of(convert, 1), of(convert, 2), of(convert, 3),
             of(convert, 4), of(convert, 5), of(convert, 6), of(convert, 7)]
            if convert.exists(), convert.needs(), convert.template(),
            |a, b, c, d, e, f, g, h| convert.eval([a, b, c, d, e, f, g, h]);
        /// Bytes of `a` (0–3) and `b` (4–7) picked by the nibbles of `c`.
        Permute: [Width::B32] <- [Width::B32, Width::B32, Width::B32], Needs::BASE, "prmt.b32 $*",
            |a, b, c| permute(a, b, c);
        /// Number of ones.
        PopCount: [Ty::U32] <- [Width::B32], Needs::BASE, "popc.b32 $*", |a| u64::from((a as u32).count_ones());
        /// Number of zeros above the highest one.
        LeadingZeros: [Ty::U32] <- [Width::B32], Needs::BASE, "clz.b32 $*",
            |a| u64::from((a as u32).leading_zeros());
        /// The bits in reverse.
        ReverseBits: [Width::B32] <- [Width::B32], Needs::BASE, "brev.b32 $*", |a| u64::from((a as u32).reverse_bits());
        /// Two 16-bit registers as one of 32: `a` low.
        Join16: [Width::B32] <- [Width::B16, Width::B16], Needs::BASE, "mov.b32 $d, {$0, $1}",
            |a, b| (a & 0xffff) | (b & 0xffff) << 16;
        /// The low half of `a`.
        Low16: [Width::B16] <- [Width::B32], Needs::BASE, "mov.b32 {$d, _}, $0", |a| a & 0xffff;
        /// The high half of `a`.
        High16: [Width::B16] <- [Width::B32], Needs::BASE, "mov.b32 {_, $d}, $0", |a| a >> 16 & 0xffff;
        /// Two 32-bit registers as one of 64: `a` low.
        Join32: [Width::B64] <- [Width::B32, Width::B32], Needs::BASE, "mov.b64 $d, {$0, $1}",
            |a, b| (a & 0xffff_ffff) | b << 32;
        /// Dot product of four signed bytes, plus `c`.
        Dot4: [Ty::S32] <- [Width::B32, Width::B32, Ty::S32], Needs::BASE, "dp4a.s32.s32 $*", |a, b, c| dot4(a, b, c);
    }
}

/// A conversion's operand of that place, or nothing.
fn of(convert: Convert, operand: usize) -> Group {
    convert.operands()[operand]
}

// Names with the type behind them.

fn typed(name: &str, ty: Ty) -> String {
    format!("{name}{} $*", ty.ptx())
}

/// As [`typed`], to nearest even for floats.
fn rounded(name: &str, ty: Ty) -> String {
    typed(&format!("{name}{}", if ty.is_float() { ".rn" } else { "" }), ty)
}

/// As [`typed`], where only the width matters.
fn bits(name: &str, ty: Ty) -> String {
    format!("{name}{} $*", ty.width().ptx())
}

// What depends on the type.

const fn bfloat_arithmetic(ty: Ty) -> Needs {
    if ty.is_bfloat() { Needs::since(Target::SM_90, 7, 8) } else { Needs::BASE }
}

const fn bfloat_sign(ty: Ty) -> Needs {
    if ty.is_bfloat() { Needs::since(Target::SM_80, 7, 0) } else { Needs::BASE }
}

const fn half_extreme(ty: Ty) -> Needs {
    match ty {
        Ty::F16 | Ty::F16x2 | Ty::BF16 | Ty::BF16x2 => Needs::since(Target::SM_80, 7, 0),
        _ => Needs::BASE,
    }
}
