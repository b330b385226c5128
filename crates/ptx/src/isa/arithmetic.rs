//! What lane instructions compute, on the bits of their operands: a value of fewer than 64 bits has zeros above it.

use half::{bf16, f16};

use super::types::Ty;

pub(super) fn f32_of(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

pub(super) fn of_f32(x: f32) -> u64 {
    u64::from(x.to_bits())
}

/// Subnormals to zero, with their sign.
pub(super) fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// The low bits, as many as the type has.
pub(super) const fn mask(ty: Ty, x: u64) -> u64 {
    match ty.width().bits() {
        64 => x,
        bits => x & ((1 << bits) - 1),
    }
}

/// The 16-bit float types, alone or in pairs.
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

/// An operation on integers modulo their width, or on floats rounded once: halves are computed in double precision.
pub(super) fn arithmetic(
    ty: Ty,
    operands: [u64; 3],
    int: impl Fn([u64; 3]) -> u64,
    single: impl Fn([f32; 3]) -> f32,
    double: impl Fn([f64; 3]) -> f64,
) -> u64 {
    match ty {
        Ty::F32 => of_f32(single(operands.map(f32_of))),
        Ty::F16 | Ty::F16x2 => mask(ty, halves(operands, double, Half::F16)),
        Ty::BF16 | Ty::BF16x2 => mask(ty, halves(operands, double, Half::BF16)),
        _ => mask(ty, int(operands)),
    }
}

pub(super) fn add(ty: Ty, a: u64, b: u64) -> u64 {
    arithmetic(ty, [a, b, 0], |[x, y, _]| x.wrapping_add(y), |[x, y, _]| x + y, |[x, y, _]| x + y)
}

pub(super) fn sub(ty: Ty, a: u64, b: u64) -> u64 {
    arithmetic(ty, [a, b, 0], |[x, y, _]| x.wrapping_sub(y), |[x, y, _]| x - y, |[x, y, _]| x - y)
}

pub(super) fn mul(ty: Ty, a: u64, b: u64) -> u64 {
    arithmetic(ty, [a, b, 0], |[x, y, _]| x.wrapping_mul(y), |[x, y, _]| x * y, |[x, y, _]| x * y)
}

pub(super) fn fma(ty: Ty, a: u64, b: u64, c: u64) -> u64 {
    arithmetic(
        ty,
        [a, b, c],
        |[x, y, z]| x.wrapping_mul(y).wrapping_add(z),
        |[x, y, z]| x.mul_add(y, z),
        |[x, y, z]| x.mul_add(y, z),
    )
}

pub(super) fn mul_high(ty: Ty, a: u64, b: u64) -> u64 {
    match ty {
        Ty::S32 => ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32 as u64,
        Ty::U32 => ((u64::from(a as u32) * u64::from(b as u32)) >> 32) & 0xffff_ffff,
        Ty::S64 => ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64,
        _ => ((u128::from(a) * u128::from(b)) >> 64) as u64,
    }
}

pub(super) fn mul_wide(ty: Ty, a: u64, b: u64) -> u64 {
    if ty == Ty::S32 {
        (i64::from(a as i32) * i64::from(b as i32)) as u64
    } else {
        u64::from(a as u32) * u64::from(b as u32)
    }
}

/// Division of integers by zero gives all ones on every GPU so far; PTX leaves it open.
pub(super) fn div(ty: Ty, a: u64, b: u64) -> u64 {
    match ty {
        Ty::S32 if b as i32 == 0 => 0xffff_ffff,
        Ty::S32 => (a as i32).wrapping_div(b as i32) as u32 as u64,
        Ty::U32 => u64::from((a as u32).checked_div(b as u32).unwrap_or(u32::MAX)),
        Ty::S64 if b == 0 => u64::MAX,
        Ty::S64 => (a as i64).wrapping_div(b as i64) as u64,
        Ty::U64 => a.checked_div(b).unwrap_or(u64::MAX),
        _ => of_f32(f32_of(a) / f32_of(b)),
    }
}

/// As [`div`], of which an integer divided by zero is the remainder.
pub(super) fn rem(ty: Ty, a: u64, b: u64) -> u64 {
    match ty {
        Ty::S32 if b as i32 == 0 => a,
        Ty::S32 => (a as i32).wrapping_rem(b as i32) as u32 as u64,
        Ty::U32 => u64::from((a as u32).checked_rem(b as u32).unwrap_or(a as u32)),
        Ty::S64 if b == 0 => a,
        Ty::S64 => (a as i64).wrapping_rem(b as i64) as u64,
        _ => a.checked_rem(b).unwrap_or(a),
    }
}

pub(super) fn shl(ty: Ty, a: u64, b: u64) -> u64 {
    let amount = b as u32;
    if amount >= ty.width().bits() { 0 } else { mask(ty, a << amount) }
}

pub(super) fn shr(ty: Ty, a: u64, b: u64) -> u64 {
    let amount = (b as u32).min(ty.width().bits());
    match ty {
        Ty::S32 => (i64::from(a as i32) >> amount) as u32 as u64,
        Ty::S64 => ((a as i64) >> amount.min(63)) as u64,
        _ => a.checked_shr(amount).unwrap_or(0),
    }
}

/// The sign bits of a float type.
const fn sign_bits(ty: Ty) -> u64 {
    match ty {
        Ty::F32 => 0x8000_0000,
        Ty::F16x2 | Ty::BF16x2 => 0x8000_8000,
        _ => 0x8000,
    }
}

pub(super) fn neg(ty: Ty, a: u64) -> u64 {
    if ty.is_float() { a ^ sign_bits(ty) } else { mask(ty, a.wrapping_neg()) }
}

pub(super) fn abs(ty: Ty, a: u64) -> u64 {
    match ty {
        _ if ty.is_float() => a & !sign_bits(ty),
        Ty::S64 => (a as i64).wrapping_abs() as u64,
        _ => (a as i32).wrapping_abs() as u32 as u64,
    }
}

/// The larger of two values, or the smaller; of a number and NaN, the number.
pub(super) fn extreme(ty: Ty, a: u64, b: u64, largest: bool) -> u64 {
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
    let in_halves =
        |half| mask(ty, halves([a, b, 0], |[x, y, _]| f64::from(float(x as f32, y as f32, largest)), half));
    match ty {
        Ty::S32 => pick(a as i32, b as i32, largest) as u32 as u64,
        Ty::S64 => pick(a as i64, b as i64, largest) as u64,
        Ty::F32 => of_f32(float(f32_of(a), f32_of(b), largest)),
        Ty::F16 | Ty::F16x2 => in_halves(Half::F16),
        Ty::BF16 | Ty::BF16x2 => in_halves(Half::BF16),
        _ => pick(a, b, largest),
    }
}

/// As [`extreme`], but the type's canonical NaN where either is a NaN.
pub(super) fn extreme_or_nan(ty: Ty, a: u64, b: u64, largest: bool) -> u64 {
    let number = extreme(ty, a, b, largest);
    let infinity = match ty {
        Ty::F16 | Ty::F16x2 => 0x7c00,
        Ty::BF16 | Ty::BF16x2 => 0x7f80,
        _ if f32_of(a).is_nan() || f32_of(b).is_nan() => return 0x7fff_ffff,
        _ => return number,
    };
    (0..ty.width().bits()).step_by(16).fold(0, |halves, shift| {
        let is_nan = |x: u64| x >> shift & 0x7fff > infinity;
        let half = if is_nan(a) || is_nan(b) { 0x7fff } else { number >> shift & 0xffff };
        halves | half << shift
    })
}

/// A function of a single that is computed in double precision and rounded once.
pub(super) fn in_double(x: f32, function: impl Fn(f64) -> f64) -> f32 {
    function(f64::from(x)) as f32
}

/// Bytes of `a` (0–3) and `b` (4–7), picked by the nibbles of `selector`, whose highest bit asks for the byte's sign.
pub(super) fn permute(a: u64, b: u64, selector: u64) -> u64 {
    let bytes = (b << 32) | (a & 0xffff_ffff);
    (0..4).fold(0, |word, i| {
        let nibble = selector >> (4 * i);
        let byte = (bytes >> (8 * (nibble & 7))) & 0xff;
        let byte = if nibble & 8 == 0 { byte } else { (byte >> 7) * 0xff };
        word | byte << (8 * i)
    })
}

/// The dot product of four signed bytes, plus `c`.
pub(super) fn dot4(a: u64, b: u64, c: u64) -> u64 {
    let products = (0..4).map(|i| {
        let byte = |x: u64| i32::from((x >> (8 * i)) as u8 as i8);
        byte(a) * byte(b)
    });
    (c as i32).wrapping_add(products.sum()) as u32 as u64
}
