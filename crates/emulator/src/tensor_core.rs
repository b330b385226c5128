//! Products of tensor cores, and how they round.
//!
//! Integers are exact. Sums of floats are taken in double precision, over exact products and the accumulator, and are
//! rounded once an instruction to the accumulator's type: what hardware does in between is not documented and differs
//! between generations, by less than the last place of the largest term. FP8 can follow Hopper instead, see
//! [`Fp8Accumulation`].

use std::sync::LazyLock;

use half::{bf16, f16};
use sage_ptx::isa::{E2M1, E4M3, E5M2, Minifloat, Mma, MmaBlockScaled, MmaTy};

use crate::block::{Context, Flow};
use crate::decode::Lanes;
use crate::fault::{FaultKind, Outcome, Trouble};

/// How products of 8-bit floats are summed in single precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fp8Accumulation {
    /// As all other floats: exact products, one rounding.
    #[default]
    Exact,
    /// As measured on Ada and Hopper: the products of one instruction and the accumulator are aligned to the largest
    /// exponent among them, cut off 13 bits below it, added, and the sum is cut to 13 fraction bits (1 sign, 8 exponent
    /// and 13 fraction bits in all).
    ///
    /// Sources: SageAttention2 (arXiv 2411.10958, the `FP22` accumulator of `mma.f32.f8.f8.f32`) and the DeepSeek-V3
    /// report (arXiv 2412.19437, 3.3.2: about 14 bits of each product are kept). Cutting is towards zero.
    Truncated,
}

/// Numbers of an operand, in a form that multiplies fast.
#[derive(Clone, Debug)]
pub(crate) enum Numbers {
    Integers(Vec<i16>),
    Floats(Vec<f64>),
}

/// Values of all codes of a format of 8 bits.
type Table = [f64; 256];

fn table(format: Minifloat, bits: u32) -> Table {
    std::array::from_fn(|code| f64::from(format.decode((code & ((1 << bits) - 1)) as u8)))
}

static E4M3_VALUES: LazyLock<Table> = LazyLock::new(|| table(E4M3, 8));
static E5M2_VALUES: LazyLock<Table> = LazyLock::new(|| table(E5M2, 8));
static E2M1_VALUES: LazyLock<Table> = LazyLock::new(|| table(E2M1, 4));
static F16_VALUES: LazyLock<Vec<f64>> =
    LazyLock::new(|| (0..=u16::MAX).map(|x| f16::from_bits(x).to_f64()).collect());
static BF16_VALUES: LazyLock<Vec<f64>> =
    LazyLock::new(|| (0..=u16::MAX).map(|x| bf16::from_bits(x).to_f64()).collect());

pub(crate) fn is_integer(ty: MmaTy) -> bool {
    matches!(ty, MmaTy::S8 | MmaTy::U8 | MmaTy::S4 | MmaTy::S32)
}

/// Values of all codes of a type of 16, 8 or 4 bits.
fn values(ty: MmaTy) -> &'static [f64] {
    match ty {
        MmaTy::F16 => &F16_VALUES,
        MmaTy::BF16 => &BF16_VALUES,
        MmaTy::E5M2 => &*E5M2_VALUES,
        MmaTy::E2M1 => &E2M1_VALUES[..16],
        _ => &*E4M3_VALUES,
    }
}

/// The value of an element's bits, for the types that are floats.
pub(crate) fn float(ty: MmaTy, bits: u32) -> f64 {
    match ty {
        MmaTy::F32 | MmaTy::S32 => f64::from(f32::from_bits(bits)),
        _ => {
            let values = values(ty);
            values[bits as usize & (values.len() - 1)]
        }
    }
}

/// As [`float`], for integers.
pub(crate) fn integer(ty: MmaTy, bits: u32) -> i16 {
    match ty {
        MmaTy::S8 => i16::from(bits as u8 as i8),
        MmaTy::U8 => i16::from(bits as u8),
        _ => i16::from(((bits as u8) << 4) as i8 >> 4),
    }
}

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
        self.all_lanes("mma")?;
        let code = &self.cx.code;
        let read = |register: u32| self.warp.read(code, register, u32::MAX);
        let half = mma.acc == MmaTy::F16;
        use MmaTy::*;
        let exists = matches!(
            (mma.a, mma.b, mma.acc),
            (S8 | U8, S8 | U8, S32)
                | (S4, S4, S32)
                | (F16, F16, F16 | F32)
                | (BF16, BF16, F32)
                | (E4M3 | E5M2, E4M3 | E5M2, F16 | F32)
        );
        if !exists {
            return Err(Trouble::new(FaultKind::InvalidProgram, format!("no such mma: {mma:?}")));
        }
        let k = mma.k();
        let (a, b) = (
            fragment_a(mma, [read(src[0])?, read(src[1])?, read(src[2])?, read(src[3])?]),
            [read(src[4])?, read(src[5])?],
        );
        let b = fragment_b(mma, b);
        // Register and bits of element `i` of the accumulator.
        let place = |i: usize| if half { (i / 2, 16 * (i % 2)) } else { (i, 0) };
        let mut result = [[0u64; 32]; 4];
        let c = [0, 1, 2, 3].map(|i| src.get(6 + place(i).0).copied());
        let mut old = [[0u32; 8]; 16];
        for (i, register) in c.into_iter().enumerate() {
            let Some(register) = register else { continue };
            let values = read(register)?;
            for (lane, &value) in values.iter().enumerate() {
                let (row, column) = Mma::acc_element(lane, i);
                old[row][column] = (value >> place(i).1) as u32;
            }
        }
        let mut new = [[0u32; 8]; 16];
        match (&a, &b) {
            (Numbers::Integers(a), Numbers::Integers(b)) => {
                let mut c = old.map(|row| row.map(|x| x as i32));
                add_integers(a, b, c.as_flattened_mut(), k, 8);
                new = c.map(|row| row.map(|x| x as u32));
            }
            (Numbers::Floats(a), Numbers::Floats(b)) => {
                let mut c = old.map(|row| row.map(|x| float(mma.acc, x)));
                let fp8 = mma.a.bits() == 8 && !half;
                if fp8 && self.cx.options.fp8 == Fp8Accumulation::Truncated {
                    add_truncated(a, b, c.as_flattened_mut(), k, 8);
                } else {
                    add_floats(a, b, c.as_flattened_mut(), k, 8);
                }
                new = c.map(|row| row.map(|x| round(mma.acc, x)));
            }
            _ => {}
        }
        for i in 0..4 {
            let (register, shift) = place(i);
            for (lane, value) in result[register].iter_mut().enumerate() {
                let (row, column) = Mma::acc_element(lane, i);
                *value |= u64::from(new[row][column]) << shift;
            }
        }
        for (&register, values) in dst.iter().zip(&result) {
            self.warp.write(code, register, u32::MAX, values)?;
        }
        Ok(Flow::Next)
    }

    pub fn mma_block_scaled(&mut self, dst: &[u32], src: &[u32]) -> Outcome<Flow> {
        self.all_lanes("mma")?;
        let code = &self.cx.code;
        let read = |register: u32| self.warp.read(code, register, u32::MAX);
        let mma = MmaBlockScaled::PRODUCT;
        let a = fragment_a(mma, [read(src[0])?, read(src[1])?, read(src[2])?, read(src[3])?]);
        let b = fragment_b(mma, [read(src[4])?, read(src[5])?]);
        let (a_scales, b_scales) = (read(src[10])?, read(src[11])?);
        // The sign of a `ue4m3` does not exist.
        let scale = |scales: &Lanes, lane: usize, block: usize| {
            E4M3_VALUES[(scales[lane] >> (8 * block)) as usize & 0x7f]
        };
        let (Numbers::Floats(mut a), Numbers::Floats(mut b)) = (a, b) else { return Ok(Flow::Next) };
        // Scaled elements have few bits, so their products stay exact.
        for (row, a) in a.chunks_exact_mut(64).enumerate() {
            for (i, a) in a.iter_mut().enumerate() {
                *a *= scale(a_scales, MmaBlockScaled::a_scale_lane(row), i / 16);
            }
        }
        for (i, b) in b.chunks_exact_mut(8).enumerate() {
            for (column, b) in b.iter_mut().enumerate() {
                *b *= scale(b_scales, MmaBlockScaled::b_scale_lane(column), i / 16);
            }
        }
        let mut c = [[0.0; 8]; 16];
        for i in 0..4 {
            for (lane, &value) in read(src[6 + i])?.iter().enumerate() {
                let (row, column) = Mma::acc_element(lane, i);
                c[row][column] = f64::from(f32::from_bits(value as u32));
            }
        }
        add_floats(&a, &b, c.as_flattened_mut(), 64, 8);
        for (i, &register) in dst.iter().enumerate() {
            let values = std::array::from_fn(|lane| {
                let (row, column) = Mma::acc_element(lane, i);
                u64::from((c[row][column] as f32).to_bits())
            });
            self.warp.write(code, register, u32::MAX, &values)?;
        }
        Ok(Flow::Next)
    }
}

/// A's 16 rows of k elements.
pub(crate) fn fragment_a(mma: Mma, registers: [&Lanes; 4]) -> Numbers {
    gather(mma.a, 16 * mma.k(), &registers, |lane, r| {
        let (row, depth) = mma.a_element(lane, r, 0);
        (row * mma.k() + depth, 1)
    })
}

/// B's 8 columns of k integers, or its k rows of 8 floats.
fn fragment_b(mma: Mma, registers: [&Lanes; 2]) -> Numbers {
    let integers = is_integer(mma.b);
    gather(mma.b, 8 * mma.k(), &registers, |lane, r| {
        let (depth, column) = mma.b_element(lane, r, 0);
        if integers { (column * mma.k() + depth, 1) } else { (depth * 8 + column, 8) }
    })
}

/// Numbers from registers: `place` says where the first of a register's elements goes, and how far apart they lie.
fn gather(
    ty: MmaTy,
    len: usize,
    registers: &[&Lanes],
    place: impl Fn(usize, usize) -> (usize, usize),
) -> Numbers {
    let bits = ty.bits();
    let per = 32 / bits;
    let words = || {
        registers.iter().enumerate().flat_map(|(r, values)| {
            values.iter().enumerate().map(move |(lane, &value)| (r, lane, value as u32))
        })
    };
    if is_integer(ty) {
        let mut numbers = vec![0; len];
        for (r, lane, word) in words() {
            let (first, step) = place(lane, r);
            for (i, number) in numbers[first..].iter_mut().step_by(step).take(per).enumerate() {
                *number = integer(ty, word >> (bits * i));
            }
        }
        Numbers::Integers(numbers)
    } else {
        let values = values(ty);
        let mask = values.len() - 1;
        let mut numbers = vec![0.0; len];
        for (r, lane, word) in words() {
            let (first, step) = place(lane, r);
            for (i, number) in numbers[first..].iter_mut().step_by(step).take(per).enumerate() {
                *number = values[(word >> (bits * i)) as usize & mask];
            }
        }
        Numbers::Floats(numbers)
    }
}
