//! Operands of tensor cores: from the bits in registers to numbers that multiply fast.

use std::array;
use std::sync::LazyLock;

use half::{bf16, f16};
use sage_ptx::isa::{BlockScales, E2M1, E4M3, E5M2, Minifloat, Mma, MmaTy};

use crate::lanes::Lanes;

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

/// The value of a scale of a block-scaled product: what lies in the lowest byte.
pub(crate) fn scale(scales: BlockScales, bits: u64) -> f64 {
    match scales {
        // It has no sign.
        BlockScales::Ue4m3 => E4M3_VALUES[bits as usize & 0x7f],
        BlockScales::Ue8m0 => match bits as u8 {
            u8::MAX => f64::NAN,
            exponent => f64::exp2(f64::from(exponent) - 127.0),
        },
    }
}

/// Where the first element of each register of each lane lies.
struct Places {
    /// In 16 rows of k.
    a: [usize; 4 * 32],
    /// In 8 columns of k, and in k rows of 8.
    b: [(usize, usize); 2 * 32],
}

impl Places {
    fn new(ty: MmaTy) -> Places {
        let mma = Mma { a: ty, b: ty, acc: MmaTy::F32 };
        Places {
            a: array::from_fn(|i| {
                let (row, depth) = mma.a_element(i % 32, i / 32, 0);
                row * mma.k() + depth
            }),
            b: array::from_fn(|i| {
                let (depth, column) = mma.b_element(i % 32, i / 32, 0);
                (column * mma.k() + depth, depth * 8 + column)
            }),
        }
    }
}

static PLACES: LazyLock<[Places; 3]> =
    LazyLock::new(|| [Places::new(MmaTy::S4), Places::new(MmaTy::S8), Places::new(MmaTy::F16)]);

fn places(ty: MmaTy) -> &'static Places {
    let [nibbles, bytes, halves] = &*PLACES;
    match ty.bits() {
        4 => nibbles,
        8 => bytes,
        _ => halves,
    }
}

/// Place of element `i` of the accumulators of a lane in 16 rows of 8, as `[i][lane]`.
pub(crate) static ACCUMULATOR: LazyLock<[[usize; 32]; 4]> = LazyLock::new(|| {
    array::from_fn(|i| {
        array::from_fn(|lane| {
            let (row, column) = Mma::acc_element(lane, i);
            row * 8 + column
        })
    })
});

/// A's 16 rows of k elements.
pub(crate) fn fragment_a(mma: Mma, registers: [&Lanes; 4]) -> Numbers {
    let places = &places(mma.a).a;
    match empty(mma.a, 16 * mma.k()) {
        Numbers::Integers(mut numbers) => {
            scatter(mma.a, &registers, |at, i, bits| numbers[places[at] + i] = integer(mma.a, bits));
            Numbers::Integers(numbers)
        }
        Numbers::Floats(mut numbers) => {
            let values = values(mma.a);
            let mask = values.len() - 1;
            scatter(mma.a, &registers, |at, i, bits| numbers[places[at] + i] = values[bits as usize & mask]);
            Numbers::Floats(numbers)
        }
    }
}

/// B's 8 columns of k integers, or its k rows of 8 floats.
pub(crate) fn fragment_b(mma: Mma, registers: [&Lanes; 2]) -> Numbers {
    let places = &places(mma.b).b;
    match empty(mma.b, 8 * mma.k()) {
        Numbers::Integers(mut numbers) => {
            scatter(mma.b, &registers, |at, i, bits| numbers[places[at].0 + i] = integer(mma.b, bits));
            Numbers::Integers(numbers)
        }
        Numbers::Floats(mut numbers) => {
            let values = values(mma.b);
            let mask = values.len() - 1;
            scatter(mma.b, &registers, |at, i, bits| {
                numbers[places[at].1 + 8 * i] = values[bits as usize & mask];
            });
            Numbers::Floats(numbers)
        }
    }
}

/// Calls `put` for each element of each register: the register's place, the element, and the bits from there on.
#[inline]
fn scatter(ty: MmaTy, registers: &[&Lanes], put: impl FnMut(usize, usize, u32)) {
    match ty.bits() {
        4 => scatter_by::<8>(registers, put),
        8 => scatter_by::<4>(registers, put),
        _ => scatter_by::<2>(registers, put),
    }
}

#[inline]
fn scatter_by<const PER: usize>(registers: &[&Lanes], mut put: impl FnMut(usize, usize, u32)) {
    for (r, values) in registers.iter().enumerate() {
        for (lane, &value) in values.iter().enumerate() {
            for i in 0..PER {
                put(32 * r + lane, i, (value as u32) >> (32 / PER * i));
            }
        }
    }
}

/// Room for so many numbers.
pub(crate) fn empty(ty: MmaTy, len: usize) -> Numbers {
    if ty.is_integer() { Numbers::Integers(vec![0; len]) } else { Numbers::Floats(vec![0.0; len]) }
}
