//! Conversions from one type to another.

use half::{bf16, f16};

use super::arithmetic::{f32_of, mask, of_f32};
use super::minifloat::{E2M1, E4M3, Minifloat};
use super::row::computed;
use super::types::Ty;
use crate::target::{Needs, Target};

computed! {
    /// Conversions.
    Convert {
        /// Between integers of different widths, extended as the source's type says.
        Integer {
            /// Operand's type.
            from: Ty,
            /// Result's type.
            to: Ty,
        }: [to] <- [from] if from.is_integer() && to.is_integer() && from.width() != to.width(), Needs::BASE,
            format!("cvt{}{} $*", to.ptx(), from.ptx()),
            |a| mask(to, if from == Ty::S32 { i64::from(a as i32) as u64 } else { mask(from, a) });
        /// A 32-bit integer to single precision, rounded to nearest even.
        IntToF32(from: Ty): [Ty::F32] <- [from] if from.is_int32(), Needs::BASE,
            format!("cvt.rn.f32{} $*", from.ptx()),
            |a| of_f32(if from == Ty::S32 { a as i32 as f32 } else { a as u32 as f32 });
        /// Single precision to a 32-bit integer, to nearest even, saturating, NaN to 0.
        F32ToIntNearest(to: Ty): [to] <- [Ty::F32] if to.is_int32(), Needs::BASE,
            format!("cvt.rni{}.f32 $*", to.ptx()),
            |a| saturated(to, f32_of(a).round_ties_even());
        /// Single precision to a 32-bit integer, towards zero, saturating, NaN to 0.
        F32ToIntTruncate(to: Ty): [to] <- [Ty::F32] if to.is_int32(), Needs::BASE,
            format!("cvt.rzi{}.f32 $*", to.ptx()),
            |a| saturated(to, f32_of(a));
        /// Half precision to single.
        F16ToF32: [Ty::F32] <- [Ty::F16], Needs::BASE, "cvt.f32.f16 $*",
            |a| of_f32(f16::from_bits(a as u16).to_f32());
        /// bfloat16 to single.
        BF16ToF32: [Ty::F32] <- [Ty::BF16], Needs::since(Target::SM_80, 7, 1), "cvt.f32.bf16 $*",
            |a| of_f32(bf16::from_bits(a as u16).to_f32());
        /// Single to half, to nearest even.
        F32ToF16: [Ty::F16] <- [Ty::F32], Needs::BASE, "cvt.rn.f16.f32 $*", |a| to_f16(a);
        /// Single to bfloat16, to nearest even.
        F32ToBF16: [Ty::BF16] <- [Ty::F32], Needs::since(Target::SM_80, 7, 0), "cvt.rn.bf16.f32 $*", |a| to_bf16(a);
        /// Two singles to halves, to nearest even: operand `a` in the high half, `b` in the low one.
        F32ToF16x2: [Ty::F16x2] <- [Ty::F32, Ty::F32], Needs::since(Target::SM_80, 7, 0),
            "cvt.rn.f16x2.f32 $*",
            |a, b| to_f16(a) << 16 | to_f16(b);
        /// Two singles to bfloat16, as [`Convert::F32ToF16x2`].
        F32ToBF16x2: [Ty::BF16x2] <- [Ty::F32, Ty::F32], Needs::since(Target::SM_80, 7, 0),
            "cvt.rn.bf16x2.f32 $*",
            |a, b| to_bf16(a) << 16 | to_bf16(b);
        /// Two singles to E4M3, to nearest even, saturating, in the low two bytes: `a` in the higher one.
        F32ToE4M3x2: [Ty::B16] <- [Ty::F32, Ty::F32], Needs::since(Target::SM_89, 8, 1),
            "cvt.rn.satfinite.e4m3x2.f32 $*",
            |a, b| encoded(E4M3, a) << 8 | encoded(E4M3, b);
        /// Eight singles to E2M1, to nearest even, saturating, the first in the lowest nibble; NaN to the largest.
        // PTX has pairs, in registers of 8 bits, which no other instruction here has: they live in a scope of their
        // own. The assembler makes four instructions of all, each of which joins its pair to those before.
        F32ToE2M1x8: [Ty::B32] <-
            [Ty::F32, Ty::F32, Ty::F32, Ty::F32, Ty::F32, Ty::F32, Ty::F32, Ty::F32],
            Needs::since(Target::SM_120A, 8, 6),
            "{ .reg .b8 p<4>; cvt.rn.satfinite.e2m1x2.f32 p0, $1, $0; cvt.rn.satfinite.e2m1x2.f32 p1, $3, $2; \
             cvt.rn.satfinite.e2m1x2.f32 p2, $5, $4; cvt.rn.satfinite.e2m1x2.f32 p3, $7, $6; \
             mov.b32 $d, {p0, p1, p2, p3}; } mov.b32 $d, $d",
            |a, b, c, d, e, f, g, h| {
                let codes = [a, b, c, d, e, f, g, h].into_iter().enumerate();
                codes.fold(0, |word, (i, x)| word | encoded(E2M1, x) << (4 * i))
            };
        /// Two E4M3 codes, in the low two bytes, to half precision; exact.
        E4M3x2ToF16x2: [Ty::F16x2] <- [Ty::B16], Needs::since(Target::SM_89, 8, 1), "cvt.rn.f16x2.e4m3x2 $*",
            |a| to_f16(of_f32(E4M3.decode(a as u8))) | to_f16(of_f32(E4M3.decode((a >> 8) as u8))) << 16;
    }
}

fn saturated(to: Ty, x: f32) -> u64 {
    if to == Ty::S32 { x as i32 as u32 as u64 } else { u64::from(x as u32) }
}

fn to_f16(bits: u64) -> u64 {
    u64::from(f16::from_f32(f32_of(bits)).to_bits())
}

fn to_bf16(bits: u64) -> u64 {
    u64::from(bf16::from_f32(f32_of(bits)).to_bits())
}

fn encoded(format: Minifloat, bits: u64) -> u64 {
    u64::from(format.encode(f32_of(bits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_singles_become_a_word_of_nibbles() {
        let singles = [0.0, -0.25, 0.75, 1.5, -2.4, 2.5, 5.1, f32::NEG_INFINITY];
        // 0, −0 (a tie), 1 (a tie), 1.5, −2, 2 (a tie), 6, −6.
        let word = Convert::F32ToE2M1x8.eval(singles.map(of_f32));
        assert_eq!(word, 0xf74c_3280);
        assert_eq!(Convert::F32ToE2M1x8.eval([f32::NAN; 8].map(of_f32)), 0x7777_7777);
    }

    #[test]
    fn two_codes_become_two_halves() {
        // 448 and 2⁻⁹; NaN and −1.
        let halves = |codes: u64| {
            let word = Convert::E4M3x2ToF16x2.eval([codes]);
            [word as u16, (word >> 16) as u16].map(|bits| f16::from_bits(bits).to_f32())
        };
        assert_eq!(halves(0x017e), [448.0, 1.0 / 512.0]);
        assert!(halves(0xb87f)[0].is_nan() && halves(0xb87f)[1] == -1.0);
    }
}
