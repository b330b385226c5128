//! Instructions that each lane executes by itself, from registers to a register: text, needs and meaning.

use half::{bf16, f16};

use super::minifloat::{E2M1, E4M3, E5M2};
use super::types::Ty;
use crate::target::{Needs, Target};

/// Arithmetic, comparisons, conversions. Operands in PTX's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// `d = a`.
    Mov(Ty),
    /// `d = a + b`.
    Add(Ty),
    /// `d = a - b`.
    Sub(Ty),
    /// `d = a · b`, the low half for integers.
    Mul(Ty),
    /// The high half of `a · b`.
    MulHigh(Ty),
    /// `a · b` in twice the width; the type is the operands'.
    MulWide(Ty),
    /// `a / b`, correctly rounded for floats, towards zero for integers.
    Div(Ty),
    /// Remainder of the integer division.
    Rem(Ty),
    /// The smaller; of a number and NaN, the number.
    Min(Ty),
    /// The larger; of a number and NaN, the number.
    Max(Ty),
    /// The smaller; of a number and NaN, NaN. Floats only.
    MinNan(Ty),
    /// The larger; of a number and NaN, NaN. Floats only.
    MaxNan(Ty),
    /// Bitwise and.
    And(Ty),
    /// Bitwise or.
    Or(Ty),
    /// Bitwise exclusive or.
    Xor(Ty),
    /// Bitwise not.
    Not(Ty),
    /// `a << b`; 0 where `b` reaches the width.
    Shl(Ty),
    /// `a >> b`, with sign for signed types; all sign bits where `b` reaches the width.
    Shr(Ty),
    /// `-a`.
    Neg(Ty),
    /// `|a|`.
    Abs(Ty),
    /// `a · b + c`, rounded once for floats, the low half for integers.
    Fma(Ty),
    /// `a · b + c` with `c` and the result in twice the width of `a` and `b`.
    MadWide(Ty),
    /// `1 / a`, correctly rounded.
    Reciprocal,
    /// `1 / a` within one unit in the last place, subnormals as zero.
    ReciprocalApprox,
    /// `√a`, correctly rounded.
    Sqrt,
    /// `2^a` within 2⁻²² relative, subnormals as zero.
    Exp2,
    /// `2^a` of two halves.
    Exp2F16x2,
    /// `log₂ a` within 2⁻²² absolute, subnormals as zero.
    Log2,
    /// `tanh a` within 2⁻¹¹ relative.
    Tanh,
    /// A predicate: whether `a ⋄ b`; false where either is NaN, but for [`Cmp::NeU`].
    Set(Cmp, Ty),
    /// `p ? a : b`, operands `a`, `b`, `p`.
    Select(Ty),
    /// From one type to another.
    Convert(Convert),
    /// Bytes of `a` (0–3) and `b` (4–7) picked by the nibbles of `c`.
    Permute,
    /// Bits `b.. b + c` of `a`, with sign for signed types.
    BitField(Ty),
    /// The 64 bits `b:a` shifted left by `c` modulo 32: the high word.
    FunnelLeft,
    /// Number of ones.
    PopCount,
    /// Number of leading zeros.
    LeadingZeros,
    /// Two 16-bit registers as one of 32: `a` low.
    Join16,
    /// The low half of `a`.
    Low16,
    /// The high half of `a`.
    High16,
    /// Two 32-bit registers as one of 64: `a` low.
    Join32,
    /// The low half of `a`.
    Low32,
    /// The high half of `a`.
    High32,
    /// Dot product of four signed bytes, plus `c`.
    Dot4,
}

/// Comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are PTX's own")]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Not equal, or either is NaN.
    NeU,
}

/// Conversions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Convert {
    /// Between integers of different widths, extended as the source's type says.
    Integer {
        /// Operand's type.
        from: Ty,
        /// Result's type.
        to: Ty,
    },
    /// A 32-bit integer to single precision, rounded to nearest even.
    IntToF32(Ty),
    /// Single precision to a 32-bit integer, to nearest even, saturating, NaN to 0.
    F32ToIntNearest(Ty),
    /// Single precision to a 32-bit integer, towards zero, saturating, NaN to 0.
    F32ToIntTruncate(Ty),
    /// Half precision to single.
    F16ToF32,
    /// bfloat16 to single.
    BF16ToF32,
    /// Single to half, to nearest even.
    F32ToF16,
    /// Single to bfloat16, to nearest even.
    F32ToBF16,
    /// Two singles to halves, to nearest even: operand `a` in the high half, `b` in the low one.
    F32ToF16x2,
    /// Two singles to bfloat16, as [`Convert::F32ToF16x2`].
    F32ToBF16x2,
    /// Two singles to E4M3, to nearest even, saturating, in the low two bytes: `a` in the higher one.
    F32ToE4M3x2,
    /// Two singles to E5M2, as [`Convert::F32ToE4M3x2`].
    F32ToE5M2x2,
    /// Two singles to E2M1 in the low byte: `a` in the high nibble.
    F32ToE2M1x2,
    /// Two E4M3 in the low two bytes to halves, exact.
    E4M3x2ToF16x2,
    /// Two E5M2 in the low two bytes to halves, exact.
    E5M2x2ToF16x2,
}

impl Lane {
    /// The instruction's name in PTX, or `None` for those that are written otherwise.
    pub fn mnemonic(self) -> String {
        use Lane::*;
        let typed = |name: &str, ty: Ty| format!("{name}{}", ty.ptx());
        // Integers have a low half; half precision and single round to nearest even.
        let mode = |name: &str, ty: Ty, int: &str, float: &str| {
            format!("{name}{}{}", if ty.is_float() { float } else { int }, ty.ptx())
        };
        let bits = |name: &str, ty: Ty| {
            let ty = match ty.width() {
                crate::program::Width::Pred => ".pred",
                crate::program::Width::B16 => ".b16",
                crate::program::Width::B32 => ".b32",
                crate::program::Width::B64 => ".b64",
            };
            format!("{name}{ty}")
        };
        match self {
            Mov(ty) => bits("mov", ty),
            Add(ty) => mode("add", ty, "", ".rn"),
            Sub(ty) => mode("sub", ty, "", ".rn"),
            Mul(ty) => mode("mul", ty, ".lo", ".rn"),
            MulHigh(ty) => typed("mul.hi", ty),
            MulWide(ty) => typed("mul.wide", ty),
            Div(ty) => mode("div", ty, "", ".rn"),
            Rem(ty) => typed("rem", ty),
            Min(ty) => typed("min", ty),
            Max(ty) => typed("max", ty),
            MinNan(ty) => typed("min.NaN", ty),
            MaxNan(ty) => typed("max.NaN", ty),
            And(ty) => bits("and", ty),
            Or(ty) => bits("or", ty),
            Xor(ty) => bits("xor", ty),
            Not(ty) => bits("not", ty),
            Shl(ty) => bits("shl", ty),
            Shr(ty) => typed("shr", ty),
            Neg(ty) => typed("neg", ty),
            Abs(ty) => typed("abs", ty),
            Fma(ty) => {
                if ty.is_float() {
                    typed("fma.rn", ty)
                } else {
                    typed("mad.lo", ty)
                }
            }
            MadWide(ty) => typed("mad.wide", ty),
            Reciprocal => "rcp.rn.f32".into(),
            ReciprocalApprox => "rcp.approx.ftz.f32".into(),
            Sqrt => "sqrt.rn.f32".into(),
            Exp2 => "ex2.approx.ftz.f32".into(),
            Exp2F16x2 => "ex2.approx.f16x2".into(),
            Log2 => "lg2.approx.ftz.f32".into(),
            Tanh => "tanh.approx.f32".into(),
            Set(cmp, ty) => format!("setp.{}{}", cmp.ptx(), ty.ptx()),
            Select(ty) => bits("selp", ty),
            Convert(convert) => convert.mnemonic(),
            Permute => "prmt.b32".into(),
            BitField(ty) => typed("bfe", ty),
            FunnelLeft => "shf.l.wrap.b32".into(),
            PopCount => "popc.b32".into(),
            LeadingZeros => "clz.b32".into(),
            Join16 | Low16 | High16 => "mov.b32".into(),
            Join32 | Low32 | High32 => "mov.b64".into(),
            Dot4 => "dp4a.s32.s32".into(),
        }
    }

    /// What the instruction needs.
    pub fn needs(self) -> Needs {
        use Lane::*;
        const BASE: Needs = Needs::since(Target::SM_75, 6, 3);
        match self {
            Exp2F16x2 | Tanh => Needs::since(Target::SM_75, 7, 0),
            Add(Ty::BF16 | Ty::BF16x2) | Sub(Ty::BF16 | Ty::BF16x2) | Mul(Ty::BF16 | Ty::BF16x2) => {
                Needs::since(Target::SM_90, 7, 8)
            }
            Fma(Ty::BF16 | Ty::BF16x2)
            | Min(Ty::F16 | Ty::F16x2 | Ty::BF16 | Ty::BF16x2)
            | Max(Ty::F16 | Ty::F16x2 | Ty::BF16 | Ty::BF16x2)
            | MinNan(_)
            | MaxNan(_) => Needs::since(Target::SM_80, 7, 0),
            Convert(convert) => convert.needs(),
            _ => BASE,
        }
    }

    /// Width of the result's register.
    pub fn result(self) -> Ty {
        use Lane::*;
        let wide = |ty| if ty == Ty::S32 { Ty::S64 } else { Ty::U64 };
        match self {
            Mov(ty) | Add(ty) | Sub(ty) | Mul(ty) | MulHigh(ty) | Div(ty) | Rem(ty) | Min(ty) | Max(ty)
            | MinNan(ty) | MaxNan(ty) | And(ty) | Or(ty) | Xor(ty) | Not(ty) | Shl(ty) | Shr(ty)
            | Neg(ty) | Abs(ty) | Fma(ty) | Select(ty) | BitField(ty) => ty,
            MulWide(ty) | MadWide(ty) => wide(ty),
            Reciprocal | ReciprocalApprox | Sqrt | Exp2 | Log2 | Tanh => Ty::F32,
            Exp2F16x2 => Ty::F16x2,
            Set(..) => Ty::Pred,
            Convert(convert) => convert.result(),
            Permute | FunnelLeft | Join16 | Low32 | High32 => Ty::B32,
            PopCount | LeadingZeros => Ty::U32,
            Low16 | High16 => Ty::B16,
            Join32 => Ty::B64,
            Dot4 => Ty::S32,
        }
    }

    /// The result's bits, from the operands'.
    pub fn eval(self, s: &[u64]) -> u64 {
        use Lane::*;
        let at = |i: usize| s.get(i).copied().unwrap_or(0);
        let (a, b, c) = (at(0), at(1), at(2));
        match self {
            Mov(_) => a,
            Add(ty) => {
                arithmetic(ty, [a, b, c], |[x, y, _]| x.wrapping_add(y), |[x, y, _]| x + y, |[x, y, _]| x + y)
            }
            Sub(ty) => {
                arithmetic(ty, [a, b, c], |[x, y, _]| x.wrapping_sub(y), |[x, y, _]| x - y, |[x, y, _]| x - y)
            }
            Mul(ty) => {
                arithmetic(ty, [a, b, c], |[x, y, _]| x.wrapping_mul(y), |[x, y, _]| x * y, |[x, y, _]| x * y)
            }
            Fma(ty) => arithmetic(
                ty,
                [a, b, c],
                |[x, y, z]| x.wrapping_mul(y).wrapping_add(z),
                |[x, y, z]| x.mul_add(y, z),
                |[x, y, z]| x.mul_add(y, z),
            ),
            MulHigh(ty) => match ty {
                Ty::S32 => ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32 as u64,
                Ty::U32 => ((u64::from(a as u32) * u64::from(b as u32)) >> 32) & 0xffff_ffff,
                Ty::S64 => ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64,
                _ => ((u128::from(a) * u128::from(b)) >> 64) as u64,
            },
            MulWide(ty) => wide_product(ty, a, b),
            MadWide(ty) => wide_product(ty, a, b).wrapping_add(c),
            Div(ty) => match ty {
                // Division by zero gives all ones on every GPU so far; PTX leaves it open.
                Ty::S32 if b as i32 == 0 => 0xffff_ffff,
                Ty::S32 => (a as i32).wrapping_div(b as i32) as u32 as u64,
                Ty::U32 => u64::from((a as u32).checked_div(b as u32).unwrap_or(u32::MAX)),
                Ty::S64 if b == 0 => u64::MAX,
                Ty::S64 => (a as i64).wrapping_div(b as i64) as u64,
                Ty::U64 | Ty::B64 => a.checked_div(b).unwrap_or(u64::MAX),
                _ => arithmetic(ty, [a, b, c], |[x, ..]| x, |[x, y, _]| x / y, |[x, y, _]| x / y),
            },
            Rem(ty) => match ty {
                Ty::S32 if b as i32 == 0 => a,
                Ty::S32 => (a as i32).wrapping_rem(b as i32) as u32 as u64,
                Ty::U32 => u64::from((a as u32).checked_rem(b as u32).unwrap_or(a as u32)),
                Ty::S64 if b == 0 => a,
                Ty::S64 => (a as i64).wrapping_rem(b as i64) as u64,
                _ => a.checked_rem(b).unwrap_or(a),
            },
            Min(ty) => extreme(ty, a, b, false),
            Max(ty) => extreme(ty, a, b, true),
            MinNan(ty) => extreme_or_nan(ty, a, b, false),
            MaxNan(ty) => extreme_or_nan(ty, a, b, true),
            And(_) => a & b,
            Or(_) => a | b,
            Xor(_) => a ^ b,
            Not(ty) => mask(ty, !a),
            Shl(ty) => {
                let bits = bits_of(ty);
                if b as u32 >= bits { 0 } else { mask(ty, a << (b as u32)) }
            }
            Shr(ty) => {
                let amount = (b as u32).min(bits_of(ty));
                match ty {
                    Ty::S32 => (i64::from(a as i32) >> amount) as u32 as u64,
                    Ty::S64 => ((a as i64) >> amount.min(63)) as u64,
                    _ => a.checked_shr(amount).unwrap_or(0),
                }
            }
            Neg(ty) => match ty {
                Ty::F32 => a ^ 0x8000_0000,
                Ty::F64 => a ^ (1 << 63),
                Ty::F16 | Ty::BF16 => a ^ 0x8000,
                Ty::F16x2 | Ty::BF16x2 => a ^ 0x8000_8000,
                _ => mask(ty, a.wrapping_neg()),
            },
            Abs(ty) => match ty {
                Ty::F32 => a & 0x7fff_ffff,
                Ty::F64 => a & !(1 << 63),
                Ty::F16 | Ty::BF16 => a & 0x7fff,
                Ty::F16x2 | Ty::BF16x2 => a & 0x7fff_7fff,
                Ty::S64 => (a as i64).wrapping_abs() as u64,
                _ => (a as i32).wrapping_abs() as u32 as u64,
            },
            Reciprocal | ReciprocalApprox => {
                let x = f32_of(a);
                let flushed = if self == ReciprocalApprox { flush(x) } else { x };
                let inverse = 1.0 / flushed;
                of_f32(if self == ReciprocalApprox { flush(inverse) } else { inverse })
            }
            Sqrt => of_f32(f32_of(a).sqrt()),
            Exp2 => of_f32(flush(f64::exp2(f64::from(flush(f32_of(a)))) as f32)),
            Exp2F16x2 => halves([a, b, c], |[x, ..]| x.exp2(), Half::F16),
            Log2 => of_f32(f64::log2(f64::from(flush(f32_of(a)))) as f32),
            Tanh => of_f32(f64::tanh(f64::from(f32_of(a))) as f32),
            Set(cmp, ty) => u64::from(cmp.holds(ty, a, b)),
            Select(_) => {
                if c & 1 == 1 {
                    a
                } else {
                    b
                }
            }
            Convert(convert) => convert.eval(a, b),
            Permute => {
                let bytes = (b << 32) | (a & 0xffff_ffff);
                (0..4).fold(0, |word, i| {
                    let selector = c >> (4 * i);
                    let byte = (bytes >> (8 * (selector & 7))) & 0xff;
                    let byte = if selector & 8 == 0 { byte } else { (byte >> 7) * 0xff };
                    word | byte << (8 * i)
                })
            }
            BitField(ty) => {
                let (start, length) = ((b & 0xff).min(32), (c & 0xff).min(32));
                let length = length.min(32 - start);
                let field = ((a & 0xffff_ffff) >> start) & ((1 << length) - 1);
                let negative = ty == Ty::S32 && length > 0 && field >> (length - 1) & 1 == 1;
                if negative { (field | !((1u64 << length) - 1)) & 0xffff_ffff } else { field }
            }
            FunnelLeft => {
                let both = (b << 32) | (a & 0xffff_ffff);
                ((both << (c & 31)) >> 32) & 0xffff_ffff
            }
            PopCount => u64::from((a as u32).count_ones()),
            LeadingZeros => u64::from((a as u32).leading_zeros()),
            Join16 => (a & 0xffff) | (b & 0xffff) << 16,
            Low16 => a & 0xffff,
            High16 => a >> 16 & 0xffff,
            Join32 => (a & 0xffff_ffff) | b << 32,
            Low32 => a & 0xffff_ffff,
            High32 => a >> 32,
            Dot4 => {
                let products = (0..4).map(|i| {
                    let byte = |x: u64| i32::from((x >> (8 * i)) as u8 as i8);
                    byte(a) * byte(b)
                });
                (c as i32).wrapping_add(products.sum()) as u32 as u64
            }
        }
    }
}

impl Cmp {
    const fn ptx(self) -> &'static str {
        match self {
            Cmp::Eq => "eq",
            Cmp::Ne => "ne",
            Cmp::Lt => "lt",
            Cmp::Le => "le",
            Cmp::Gt => "gt",
            Cmp::Ge => "ge",
            Cmp::NeU => "neu",
        }
    }

    fn holds(self, ty: Ty, a: u64, b: u64) -> bool {
        fn compare<T: PartialOrd>(cmp: Cmp, a: T, b: T) -> bool {
            match cmp {
                Cmp::Eq => a == b,
                // PTX's `ne` of floats is false for NaN.
                Cmp::Ne => a.partial_cmp(&b).is_some_and(|order| order.is_ne()),
                Cmp::Lt => a < b,
                Cmp::Le => a <= b,
                Cmp::Gt => a > b,
                Cmp::Ge => a >= b,
                Cmp::NeU => a != b,
            }
        }
        match ty {
            Ty::S32 => compare(self, a as i32, b as i32),
            Ty::S64 => compare(self, a as i64, b as i64),
            Ty::F32 => compare(self, f32_of(a), f32_of(b)),
            Ty::F64 => compare(self, f64::from_bits(a), f64::from_bits(b)),
            Ty::F16 => compare(self, f16::from_bits(a as u16), f16::from_bits(b as u16)),
            Ty::BF16 => compare(self, bf16::from_bits(a as u16), bf16::from_bits(b as u16)),
            _ => compare(self, a, b),
        }
    }
}

impl Convert {
    fn mnemonic(self) -> String {
        use Convert::*;
        match self {
            Integer { from, to } => format!("cvt{}{}", to.ptx(), from.ptx()),
            IntToF32(from) => format!("cvt.rn.f32{}", from.ptx()),
            F32ToIntNearest(to) => format!("cvt.rni{}.f32", to.ptx()),
            F32ToIntTruncate(to) => format!("cvt.rzi{}.f32", to.ptx()),
            F16ToF32 => "cvt.f32.f16".into(),
            BF16ToF32 => "cvt.f32.bf16".into(),
            F32ToF16 => "cvt.rn.f16.f32".into(),
            F32ToBF16 => "cvt.rn.bf16.f32".into(),
            F32ToF16x2 => "cvt.rn.f16x2.f32".into(),
            F32ToBF16x2 => "cvt.rn.bf16x2.f32".into(),
            F32ToE4M3x2 => "cvt.rn.satfinite.e4m3x2.f32".into(),
            F32ToE5M2x2 => "cvt.rn.satfinite.e5m2x2.f32".into(),
            F32ToE2M1x2 => "cvt.rn.satfinite.e2m1x2.f32".into(),
            E4M3x2ToF16x2 => "cvt.rn.f16x2.e4m3x2".into(),
            E5M2x2ToF16x2 => "cvt.rn.f16x2.e5m2x2".into(),
        }
    }

    const fn needs(self) -> Needs {
        use Convert::*;
        match self {
            F32ToF16x2 | F32ToBF16x2 | F32ToBF16 => Needs::since(Target::SM_80, 7, 0),
            BF16ToF32 => Needs::since(Target::SM_75, 7, 1),
            F32ToE4M3x2 | F32ToE5M2x2 | E4M3x2ToF16x2 | E5M2x2ToF16x2 => Needs::since(Target::SM_89, 8, 1),
            F32ToE2M1x2 => Needs::since(Target::SM_120A, 8, 6),
            _ => Needs::since(Target::SM_75, 6, 3),
        }
    }

    const fn result(self) -> Ty {
        use Convert::*;
        match self {
            Integer { to, .. } | F32ToIntNearest(to) | F32ToIntTruncate(to) => to,
            IntToF32(_) | F16ToF32 | BF16ToF32 => Ty::F32,
            F32ToF16 => Ty::F16,
            F32ToBF16 => Ty::BF16,
            F32ToF16x2 | E4M3x2ToF16x2 | E5M2x2ToF16x2 => Ty::F16x2,
            F32ToBF16x2 => Ty::BF16x2,
            F32ToE4M3x2 | F32ToE5M2x2 | F32ToE2M1x2 => Ty::B16,
        }
    }

    fn eval(self, a: u64, b: u64) -> u64 {
        use Convert::*;
        let pair = |high: u64, low: u64, bits: u32| high << bits | low;
        let (high, low) = (f32_of(a), f32_of(b));
        match self {
            Integer { from, to } => mask(
                to,
                match from {
                    Ty::S32 => i64::from(a as i32) as u64,
                    _ => mask(from, a),
                },
            ),
            IntToF32(Ty::S32) => of_f32(a as i32 as f32),
            IntToF32(_) => of_f32(a as u32 as f32),
            F32ToIntNearest(Ty::S32) => high.round_ties_even() as i32 as u32 as u64,
            F32ToIntNearest(_) => u64::from(high.round_ties_even() as u32),
            F32ToIntTruncate(Ty::S32) => high as i32 as u32 as u64,
            F32ToIntTruncate(_) => u64::from(high as u32),
            F16ToF32 => of_f32(f16::from_bits(a as u16).to_f32()),
            BF16ToF32 => of_f32(bf16::from_bits(a as u16).to_f32()),
            F32ToF16 => u64::from(f16::from_f32(high).to_bits()),
            F32ToBF16 => u64::from(bf16::from_f32(high).to_bits()),
            F32ToF16x2 => {
                pair(u64::from(f16::from_f32(high).to_bits()), u64::from(f16::from_f32(low).to_bits()), 16)
            }
            F32ToBF16x2 => {
                pair(u64::from(bf16::from_f32(high).to_bits()), u64::from(bf16::from_f32(low).to_bits()), 16)
            }
            F32ToE4M3x2 => pair(u64::from(E4M3.encode(high)), u64::from(E4M3.encode(low)), 8),
            F32ToE5M2x2 => pair(u64::from(E5M2.encode(high)), u64::from(E5M2.encode(low)), 8),
            F32ToE2M1x2 => pair(u64::from(E2M1.encode(high)), u64::from(E2M1.encode(low)), 4),
            E4M3x2ToF16x2 | E5M2x2ToF16x2 => {
                let format = if self == E4M3x2ToF16x2 { E4M3 } else { E5M2 };
                let half = |code: u64| u64::from(f16::from_f32(format.decode(code as u8)).to_bits());
                pair(half(a >> 8), half(a), 16)
            }
        }
    }
}

fn f32_of(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn of_f32(x: f32) -> u64 {
    u64::from(x.to_bits())
}

/// Subnormals to zero, with their sign.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

const fn bits_of(ty: Ty) -> u32 {
    match ty.width() {
        crate::program::Width::Pred => 1,
        crate::program::Width::B16 => 16,
        crate::program::Width::B32 => 32,
        crate::program::Width::B64 => 64,
    }
}

const fn mask(ty: Ty, x: u64) -> u64 {
    match bits_of(ty) {
        64 => x,
        bits => x & ((1 << bits) - 1),
    }
}

fn wide_product(ty: Ty, a: u64, b: u64) -> u64 {
    if ty == Ty::S32 {
        (i64::from(a as i32) * i64::from(b as i32)) as u64
    } else {
        u64::from(a as u32) * u64::from(b as u32)
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Half {
    F16,
    BF16,
}

/// Both halves of packed operands, each computed in double precision, which holds every product, and rounded once.
fn halves(operands: [u64; 3], op: impl Fn([f64; 3]) -> f64, half: Half) -> u64 {
    let lane = |shift: u32| {
        let read = |x: u64| match half {
            Half::F16 => f16::from_bits((x >> shift) as u16).to_f64(),
            Half::BF16 => bf16::from_bits((x >> shift) as u16).to_f64(),
        };
        let result = op(operands.map(read));
        let bits = match half {
            Half::F16 => f16::from_f64(result).to_bits(),
            Half::BF16 => bf16::from_f64(result).to_bits(),
        };
        u64::from(bits) << shift
    };
    lane(0) | lane(16)
}

/// An operation on integers modulo their width, or on floats rounded once.
fn arithmetic(
    ty: Ty,
    operands: [u64; 3],
    int: impl Fn([u64; 3]) -> u64,
    single: impl Fn([f32; 3]) -> f32,
    double: impl Fn([f64; 3]) -> f64,
) -> u64 {
    match ty {
        Ty::F32 => of_f32(single(operands.map(f32_of))),
        Ty::F64 => double(operands.map(f64::from_bits)).to_bits(),
        Ty::F16 | Ty::F16x2 => mask(ty, halves(operands, double, Half::F16)),
        Ty::BF16 | Ty::BF16x2 => mask(ty, halves(operands, double, Half::BF16)),
        _ => mask(ty, int(operands)),
    }
}

/// As [`extreme`], but the type's canonical NaN where either is a NaN.
fn extreme_or_nan(ty: Ty, a: u64, b: u64, largest: bool) -> u64 {
    let number = extreme(ty, a, b, largest);
    let infinity = match ty {
        Ty::F16 | Ty::F16x2 => 0x7c00,
        Ty::BF16 | Ty::BF16x2 => 0x7f80,
        _ if f32_of(a).is_nan() || f32_of(b).is_nan() => return 0x7fff_ffff,
        _ => return number,
    };
    (0..bits_of(ty)).step_by(16).fold(0, |halves, shift| {
        let is_nan = |x: u64| x >> shift & 0x7fff > infinity;
        let half = if is_nan(a) || is_nan(b) { 0x7fff } else { number >> shift & 0xffff };
        halves | half << shift
    })
}

fn extreme(ty: Ty, a: u64, b: u64, largest: bool) -> u64 {
    fn pick<T: PartialOrd + Copy>(a: T, b: T, largest: bool) -> T {
        if (b > a) == largest && a != b { b } else { a }
    }
    fn float(a: f32, b: f32, largest: bool) -> f32 {
        match (a.is_nan(), b.is_nan()) {
            (true, true) => f32::NAN,
            (true, false) => b,
            (false, true) => a,
            // +0 is larger than −0.
            _ if a == 0.0 && b == 0.0 => {
                if a.is_sign_negative() == largest {
                    b
                } else {
                    a
                }
            }
            _ => pick(a, b, largest),
        }
    }
    match ty {
        Ty::S32 => pick(a as i32, b as i32, largest) as u32 as u64,
        Ty::S64 => pick(a as i64, b as i64, largest) as u64,
        Ty::F32 => of_f32(float(f32_of(a), f32_of(b), largest)),
        Ty::F16 | Ty::F16x2 => {
            mask(ty, halves([a, b, 0], |[x, y, _]| f64::from(float(x as f32, y as f32, largest)), Half::F16))
        }
        Ty::BF16 | Ty::BF16x2 => {
            mask(ty, halves([a, b, 0], |[x, y, _]| f64::from(float(x as f32, y as f32, largest)), Half::BF16))
        }
        _ => pick(a, b, largest),
    }
}
