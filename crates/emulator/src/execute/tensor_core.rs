//! Products of tensor cores, and how they round.
//!
//! Integers are exact. Sums of floats are taken in double precision, over exact products and the accumulator, and are
//! rounded once an instruction to the accumulator's type: what hardware does in between is not documented and differs
//! between generations, by less than the last place of the largest term. FP8 can follow Hopper instead, see
//! [`Fp8Accumulation`].

use half::f16;
use sage_ptx::isa::{HalfMma, Mma, MmaBlockScaled, MmaTy};

use super::context::Context;
use super::fragment::{ACCUMULATOR, Numbers, float, fragment_a, fragment_b, scale};
use crate::fault::Outcome;
use crate::lanes::Lanes;
use crate::machine::Flow;
use crate::options::Fp8Accumulation;

/// `c[rows × n] += a[rows × k] · b`, with `b` as `n × k` for integers.
pub(crate) fn add_integers(a: &[i16], b: &[i16], c: &mut [i32], k: usize, n: usize) {
    for (a, c) in a.chunks_exact(k).zip(c.chunks_exact_mut(n)) {
        for (b, c) in b.chunks_exact(k).zip(c) {
            let sum = a
                .iter()
                .zip(b)
                .fold(0i32, |sum, (&a, &b)| sum.wrapping_add(i32::from(a).wrapping_mul(i32::from(b))));
            *c = c.wrapping_add(sum);
        }
    }
}

/// `c[rows × n] += a[rows × k] · b`, with `b` as `k × n` for floats.
pub(crate) fn add_floats(a: &[f64], b: &[f64], c: &mut [f64], k: usize, n: usize) {
    for (a, c) in a.chunks_exact(k).zip(c.chunks_exact_mut(n)) {
        for (&a, b) in a.iter().zip(b.chunks_exact(n)) {
            for (c, &b) in c.iter_mut().zip(b) {
                *c += a * b;
            }
        }
    }
}

/// As [`add_floats`], by [`Fp8Accumulation::Truncated`].
pub(crate) fn add_truncated(a: &[f64], b: &[f64], c: &mut [f64], k: usize, n: usize) {
    let exponent = |x: f64| (x.to_bits() >> 52 & 0x7ff) as i32;
    let mut products = vec![0.0; k];
    for (a, c) in a.chunks_exact(k).zip(c.chunks_exact_mut(n)) {
        for (column, c) in c.iter_mut().enumerate() {
            let mut largest = exponent(*c);
            for ((product, &a), b) in products.iter_mut().zip(a).zip(b.chunks_exact(n)) {
                *product = a * b[column];
                largest = largest.max(exponent(*product));
            }
            if largest == 0 || largest == 0x7ff {
                *c += products.iter().sum::<f64>();
                continue;
            }
            // A power of two that makes the last bit kept a one.
            let power = |exponent: i32| f64::from_bits((exponent as u64) << 52);
            let (up, down) = (power(2 * 1023 + 13 - largest), power(largest - 13));
            let cut = |x: f64| i64::from((x * up) as i32);
            let sum = products.iter().fold(cut(*c), |sum, &product| sum + cut(product));
            // The sum can have grown beyond 14 bits.
            let extra = (50 - (sum.unsigned_abs() | 0x2000).leading_zeros()).min(31);
            let kept = if sum < 0 { -((-sum >> extra) << extra) } else { sum >> extra << extra };
            *c = kept as f64 * down;
        }
    }
}

/// Rounds a sum to the accumulator's type, as bits.
pub(crate) fn round(ty: MmaTy, sum: f64) -> u32 {
    match ty {
        MmaTy::F16 => u32::from(f16::from_f64(sum).to_bits()),
        _ => (sum as f32).to_bits(),
    }
}

impl Context<'_, '_> {
    pub fn mma(&mut self, mma: Mma, dst: &[u32], src: &[u32]) -> Outcome<Flow> {
        self.product(mma, dst, [&src[..4], &src[4..6], &src[6..]])
    }

    /// The product of operands with zeros in place of the registers that they do not have.
    pub fn half_mma(&mut self, mma: HalfMma, dst: &[u32], src: &[u32]) -> Outcome<Flow> {
        let (a, rest) = src.split_at(mma.a_registers());
        self.product(mma.whole(), dst, [a, &rest[..1], &rest[1..]])
    }

    /// `D = A · B + C`, given the registers of A, B and C; what is missing of any is zero, and of D is not written.
    fn product(&mut self, mma: Mma, dst: &[u32], [a, b, c]: [&[u32]; 3]) -> Outcome<Flow> {
        self.all_lanes("mma")?;
        let code = &self.cx.code;
        let read = |registers: &[u32], i: usize| {
            registers.get(i).map_or(Ok(&[0; 32]), |&register| self.warp.read(code, register, u32::MAX))
        };
        let half = mma.acc == MmaTy::F16;
        let k = mma.k();
        let a = fragment_a(mma, [read(a, 0)?, read(a, 1)?, read(a, 2)?, read(a, 3)?]);
        let b = fragment_b(mma, [read(b, 0)?, read(b, 1)?]);
        // Register and bits of element `i` of the accumulator.
        let place = |i: usize| if half { (i / 2, 16 * (i % 2)) } else { (i, 0) };
        let mut old = [0u32; 128];
        for (i, places) in ACCUMULATOR.iter().enumerate() {
            let (register, shift) = place(i);
            let values = read(c, register)?;
            for (&value, &at) in values.iter().zip(places) {
                old[at] = (value >> shift) as u32;
            }
        }
        let new = match (&a, &b) {
            (Numbers::Integers(a), Numbers::Integers(b)) => {
                let mut c = old.map(|x| x as i32);
                add_integers(a, b, &mut c, k, 8);
                c.map(|x| x as u32)
            }
            (Numbers::Floats(a), Numbers::Floats(b)) => {
                let mut c = old.map(|x| float(mma.acc, x));
                let fp8 = mma.a.bits() == 8 && !half;
                if fp8 && self.cx.options.fp8 == Fp8Accumulation::Truncated {
                    add_truncated(a, b, &mut c, k, 8);
                } else {
                    add_floats(a, b, &mut c, k, 8);
                }
                c.map(|x| round(mma.acc, x))
            }
            _ => old,
        };
        let mut result = [[0; 32]; 4];
        for (i, places) in ACCUMULATOR.iter().enumerate() {
            let (register, shift) = place(i);
            for (value, &at) in result[register].iter_mut().zip(places) {
                *value |= u64::from(new[at]) << shift;
            }
        }
        for (&register, values) in dst.iter().zip(&result) {
            self.warp.write(code, register, u32::MAX, values)?;
        }
        Ok(Flow::Next)
    }

    pub fn mma_block_scaled(&mut self, scaled: MmaBlockScaled, dst: &[u32], src: &[u32]) -> Outcome<Flow> {
        self.all_lanes("mma")?;
        let code = &self.cx.code;
        let read = |register: u32| self.warp.read(code, register, u32::MAX);
        let mma = MmaBlockScaled::PRODUCT;
        let a = fragment_a(mma, [read(src[0])?, read(src[1])?, read(src[2])?, read(src[3])?]);
        let b = fragment_b(mma, [read(src[4])?, read(src[5])?]);
        let (a_scales, b_scales) = (read(src[10])?, read(src[11])?);
        let block = scaled.scales.block();
        let scale =
            |scales: &Lanes, lane: usize, i: usize| scale(scaled.scales, scales[lane] >> (8 * (i / block)));
        let (Numbers::Floats(mut a), Numbers::Floats(mut b)) = (a, b) else { return Ok(Flow::Next) };
        // Scaled elements have few bits, so their products stay exact.
        for (row, a) in a.chunks_exact_mut(64).enumerate() {
            for (i, a) in a.iter_mut().enumerate() {
                *a *= scale(a_scales, MmaBlockScaled::a_scale_lane(row), i);
            }
        }
        for (i, b) in b.chunks_exact_mut(8).enumerate() {
            for (column, b) in b.iter_mut().enumerate() {
                *b *= scale(b_scales, scaled.b_scale_lane(column), i);
            }
        }
        let mut c = [0.0; 128];
        for (i, places) in ACCUMULATOR.iter().enumerate() {
            for (&value, &at) in read(src[6 + i])?.iter().zip(places) {
                c[at] = f64::from(f32::from_bits(value as u32));
            }
        }
        add_floats(&a, &b, &mut c, 64, 8);
        for (&register, places) in dst.iter().zip(ACCUMULATOR.iter()) {
            let values = places.map(|at| u64::from((c[at] as f32).to_bits()));
            self.warp.write(code, register, u32::MAX, &values)?;
        }
        Ok(Flow::Next)
    }
}
