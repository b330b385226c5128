//! Lane instructions over a whole warp. The meaning is [`Lane::eval`]; the commonest have loops of their own.

use sage_ptx::isa::{Cmp, Convert, Lane, MOST_OPERANDS, Ty};

use crate::lanes::Lanes;

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn one(a: &Lanes, op: impl Fn(u64) -> u64) -> Lanes {
    std::array::from_fn(|lane| op(a[lane]))
}

fn two(a: &Lanes, b: &Lanes, op: impl Fn(u64, u64) -> u64) -> Lanes {
    std::array::from_fn(|lane| op(a[lane], b[lane]))
}

fn three(a: &Lanes, b: &Lanes, c: &Lanes, op: impl Fn(u64, u64, u64) -> u64) -> Lanes {
    std::array::from_fn(|lane| op(a[lane], b[lane], c[lane]))
}

/// All lanes' results, or `None` for an instruction that is computed lane by lane.
pub(crate) fn fast(op: Lane, s: &[&Lanes]) -> Option<Lanes> {
    let low = |x: u64| x & 0xffff_ffff;
    let bits = |x: f32| u64::from(x.to_bits());
    Some(match (op, s) {
        (Lane::Mov(_), [a]) => **a,
        (Lane::Add(Ty::S32 | Ty::U32), [a, b]) => two(a, b, |a, b| low(a.wrapping_add(b))),
        (Lane::Add(Ty::S64 | Ty::U64), [a, b]) => two(a, b, u64::wrapping_add),
        (Lane::Add(Ty::F32), [a, b]) => two(a, b, |a, b| bits(f(a) + f(b))),
        (Lane::Sub(Ty::S32 | Ty::U32), [a, b]) => two(a, b, |a, b| low(a.wrapping_sub(b))),
        (Lane::Sub(Ty::F32), [a, b]) => two(a, b, |a, b| bits(f(a) - f(b))),
        (Lane::Mul(Ty::S32 | Ty::U32), [a, b]) => two(a, b, |a, b| low(a.wrapping_mul(b))),
        (Lane::Mul(Ty::F32), [a, b]) => two(a, b, |a, b| bits(f(a) * f(b))),
        (Lane::Fma(Ty::S32 | Ty::U32), [a, b, c]) => {
            three(a, b, c, |a, b, c| low(a.wrapping_mul(b).wrapping_add(c)))
        }
        (Lane::Fma(Ty::F32), [a, b, c]) => three(a, b, c, |a, b, c| bits(fused(f(a), f(b), f(c)))),
        (Lane::MadWide(Ty::S32), [a, b, c]) => three(a, b, c, |a, b, c| {
            (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64) as u64
        }),
        (Lane::Max(Ty::F32), [a, b]) => two(a, b, |a, b| extreme(a, b, f(a) > f(b), a & b)),
        (Lane::Min(Ty::F32), [a, b]) => two(a, b, |a, b| extreme(a, b, f(a) < f(b), a | b)),
        (Lane::Shl(Ty::S32 | Ty::U32), [a, b]) => {
            two(a, b, |a, b| if b as u32 >= 32 { 0 } else { low(a << (b as u32)) })
        }
        (Lane::Shr(Ty::S32), [a, b]) => {
            two(a, b, |a, b| u64::from(((a as i32) >> (b as u32).min(31)) as u32))
        }
        (Lane::Shr(Ty::U32), [a, b]) => two(a, b, |a, b| a.checked_shr(b as u32).unwrap_or(0)),
        (Lane::And(_), [a, b]) => two(a, b, |a, b| a & b),
        (Lane::Or(_), [a, b]) => two(a, b, |a, b| a | b),
        (Lane::Xor(_), [a, b]) => two(a, b, |a, b| a ^ b),
        (Lane::Set(cmp, Ty::S32), [a, b]) => {
            let holds: fn(i32, i32) -> bool = match cmp {
                Cmp::Eq => |a, b| a == b,
                Cmp::Ne | Cmp::NeU => |a, b| a != b,
                Cmp::Lt => |a, b| a < b,
                Cmp::Le => |a, b| a <= b,
                Cmp::Gt => |a, b| a > b,
                Cmp::Ge => |a, b| a >= b,
            };
            two(a, b, |a, b| u64::from(holds(a as i32, b as i32)))
        }
        (Lane::Select(_), [a, b, p]) => three(a, b, p, |a, b, p| if p & 1 == 1 { a } else { b }),
        (Lane::Convert(Convert::IntToF32(Ty::S32)), [a]) => one(a, |a| bits(a as i32 as f32)),
        (Lane::Join16, [a, b]) => two(a, b, |a, b| (a & 0xffff) | (b & 0xffff) << 16),
        _ => return None,
    })
}

/// The one of two singles that wins, `equal` where they are equal, the number of a number and NaN.
fn extreme(a: u64, b: u64, a_wins: bool, equal: u64) -> u64 {
    let (x, y) = (f(a), f(b));
    if x == y {
        equal
    } else if a_wins || y.is_nan() && !x.is_nan() {
        a
    } else if !y.is_nan() {
        b
    } else {
        u64::from(f32::NAN.to_bits())
    }
}

/// `a · b + c` rounded once. The product of two singles is exact in double precision; the sum is then rounded twice,
/// which differs from once only where the first rounding ends exactly halfway between two singles.
fn fused(a: f32, b: f32, c: f32) -> f32 {
    let product = f64::from(a) * f64::from(b);
    let sum = product + f64::from(c);
    if sum.to_bits() & 0x1fff_ffff == 0x1000_0000 || sum.abs() < 1e-37 { a.mul_add(b, c) } else { sum as f32 }
}

/// All lanes' results; what inactive lanes get is of no account.
pub(crate) fn apply(op: Lane, s: &[&Lanes], lanes: u32) -> Lanes {
    if let Some(result) = fast(op, s) {
        return result;
    }
    let mut result = [0; 32];
    let mut operands = [0; MOST_OPERANDS];
    for (lane, result) in result.iter_mut().enumerate() {
        if lanes >> lane & 1 == 1 {
            for (to, from) in operands.iter_mut().zip(s) {
                *to = from[lane];
            }
            *result = op.eval(operands);
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use sage_ptx::isa::Instruction;

    use super::*;

    /// Bits that look like numbers of all sizes, and the odd ones.
    fn samples(mut seed: u64) -> Lanes {
        const ODD: [u64; 8] =
            [0, 1, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x0000_0001, 0x7fff_ffff];
        std::array::from_fn(|_| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let bits = seed >> 32;
            match seed >> 28 & 7 {
                0 => ODD[(bits & 7) as usize],
                1..=4 => u64::from((1.0 + (bits as f32) / 4e9).to_bits() ^ (bits as u32 & 0x8180_0000)),
                _ => bits,
            }
        })
    }

    #[test]
    fn loops_agree_with_eval() {
        let mut ops = vec![
            Lane::Add(Ty::F32),
            Lane::Sub(Ty::F32),
            Lane::Mul(Ty::F32),
            Lane::Fma(Ty::F32),
            Lane::Max(Ty::F32),
            Lane::Min(Ty::F32),
            Lane::MadWide(Ty::S32),
            Lane::Select(Ty::B32),
            Lane::Join16,
            Lane::Convert(Convert::IntToF32(Ty::S32)),
            Lane::Mov(Ty::B32),
            Lane::Add(Ty::S64),
        ];
        for ty in [Ty::S32, Ty::U32] {
            ops.extend([Lane::Add(ty), Lane::Sub(ty), Lane::Mul(ty), Lane::Fma(ty)]);
            ops.extend([Lane::Shl(ty), Lane::Shr(ty)]);
            ops.extend([Lane::And(ty), Lane::Or(ty), Lane::Xor(ty)]);
        }
        ops.extend(
            [Cmp::Eq, Cmp::Ne, Cmp::NeU, Cmp::Lt, Cmp::Le, Cmp::Gt, Cmp::Ge]
                .map(|cmp| Lane::Set(cmp, Ty::S32)),
        );
        for op in ops {
            for seed in 0..500 {
                let [a, b, c] = [1, 2, 3].map(|i| samples(seed * 7 + i));
                let operands = [&a, &b, &c];
                let count = op.operands().iter().filter_map(|group| group.count).sum();
                let found = fast(op, &operands[..count]).unwrap();
                for lane in 0..32 {
                    let inputs = operands.map(|operand| operand[lane]);
                    let expected = op.eval(inputs);
                    let float = matches!(
                        op,
                        Lane::Add(Ty::F32) | Lane::Sub(Ty::F32) | Lane::Mul(Ty::F32) | Lane::Fma(Ty::F32)
                    );
                    let nan = float && f(expected).is_nan() && f(found[lane]).is_nan();
                    assert!(
                        nan || found[lane] == expected,
                        "{op:?} of {inputs:x?}: {:x} {expected:x}",
                        found[lane]
                    );
                }
            }
        }
    }
}
