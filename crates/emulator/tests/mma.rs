//! `mma.sync` of every type against plain sums.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use half::{bf16, f16};
use sage_emulator::{Emulator, EmulatorOptions, Fp8Accumulation};
use sage_ptx::Target;
use sage_ptx::isa::{BlockScales, E2M1, E4M3, E5M2, HalfMma, Matrix, Mma, MmaBlockScaled, MmaTy, Space};
use sage_ptx::program::{Program, Reg};

mod support;
use support::{Raw, Source};

/// A program that loads its fragments from words of lanes, multiplies once, and stores the result.
fn program(op: Matrix, inputs: usize, outputs: usize) -> Program {
    let mut raw = Raw::new(32);
    let (from, to) = (raw.pointer("from"), raw.pointer("to"));
    let thread = raw.thread();
    let src: Vec<_> = (0..inputs)
        .map(|i| {
            let index = raw.add(thread, 32 * i as i32);
            let place = raw.at(from, index, 4);
            raw.load(Space::Global, place).operand()
        })
        .collect();
    let dst: Vec<Reg> = (0..outputs).map(|_| raw.b32()).collect();
    raw.matrix(op, &dst, &src);
    for (i, &reg) in dst.iter().enumerate() {
        let index = raw.add(thread, 32 * i as i32);
        let place = raw.at(to, index, 4);
        raw.store(Space::Global, place, reg);
    }
    raw.done()
}

fn run(op: Matrix, words: &[u32], outputs: usize, fp8: Fp8Accumulation) -> Vec<u32> {
    let emulator = Emulator::with_options(EmulatorOptions { fp8, ..EmulatorOptions::default() });
    run_program(&program(op, words.len() / 32, outputs), emulator, words, outputs)
}

fn run_program(program: &Program, mut emulator: Emulator, words: &[u32], outputs: usize) -> Vec<u32> {
    let (from, to) = (emulator.buffer("from", words), emulator.uninitialized("to", 128 * outputs));
    emulator.launch(program, [1, 1, 1], &[from.arg(), to.arg()]).unwrap();
    emulator.read(to)
}

fn value(ty: MmaTy, bits: u32) -> f64 {
    match ty {
        MmaTy::F16 => f16::from_bits(bits as u16).to_f64(),
        MmaTy::BF16 => bf16::from_bits(bits as u16).to_f64(),
        MmaTy::S8 => f64::from(bits as u8 as i8),
        MmaTy::U8 => f64::from(bits as u8),
        MmaTy::S4 => f64::from(((bits << 4) as u8 as i8) >> 4),
        MmaTy::E4M3 => E4M3.decode(bits as u8).into(),
        MmaTy::E5M2 => E5M2.decode(bits as u8).into(),
        MmaTy::E2M1 => E2M1.decode((bits & 15) as u8).into(),
        MmaTy::F32 => f32::from_bits(bits).into(),
        MmaTy::S32 => f64::from(bits as i32),
    }
}

/// Bits of an element that is finite and of moderate size.
fn element(ty: MmaTy, random: &mut u64) -> u32 {
    *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    let bits = (*random >> 40) as u32;
    match ty {
        MmaTy::F16 => f16::from_f64(f64::from(bits & 0xfff) / 512.0 - 4.0).to_bits().into(),
        MmaTy::BF16 => bf16::from_f64(f64::from(bits & 0xff) / 32.0 - 4.0).to_bits().into(),
        MmaTy::E4M3 => bits & 0xbf,
        MmaTy::E5M2 => bits & 0xbf,
        MmaTy::F32 => (f64::from(bits & 0xffff) as f32 / 64.0 - 512.0).to_bits(),
        MmaTy::S32 => bits.wrapping_sub(0x8000),
        _ => bits & ((1 << ty.bits()) - 1),
    }
}

struct Case {
    words: Vec<u32>,
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
}

/// Random operands, as words of lanes and as matrices.
fn case(mma: Mma, seed: u64) -> Case {
    let mut random = seed;
    let k = mma.k();
    let matrix =
        |len: usize, ty, random: &mut u64| -> Vec<u32> { (0..len).map(|_| element(ty, random)).collect() };
    let a = matrix(16 * k, mma.a, &mut random);
    let b = matrix(8 * k, mma.b, &mut random);
    let c = matrix(128, mma.acc, &mut random);
    let per = 32 / mma.a.bits();
    let mut words = Vec::new();
    for r in 0..4 {
        for lane in 0..32 {
            words.push((0..per).fold(0, |word, i| {
                let (row, depth) = mma.a_element(lane, r, i);
                word | a[row * k + depth] << (i * mma.a.bits())
            }));
        }
    }
    for r in 0..2 {
        for lane in 0..32 {
            words.push((0..per).fold(0, |word, i| {
                let (depth, column) = mma.b_element(lane, r, i);
                word | b[depth * 8 + column] << (i * mma.b.bits())
            }));
        }
    }
    let half = mma.acc == MmaTy::F16;
    for r in 0..mma.acc_registers() {
        for lane in 0..32 {
            let at = |i: usize| {
                let (row, column) = Mma::acc_element(lane, i);
                c[row * 8 + column]
            };
            words.push(if half { at(2 * r) | at(2 * r + 1) << 16 } else { at(r) });
        }
    }
    let values = |bits: Vec<u32>, ty| bits.into_iter().map(|bits| value(ty, bits)).collect();
    Case { words, a: values(a, mma.a), b: values(b, mma.b), c: values(c, mma.acc) }
}

const TYPES: [(MmaTy, MmaTy, MmaTy); 11] = [
    (MmaTy::S8, MmaTy::S8, MmaTy::S32),
    (MmaTy::U8, MmaTy::S8, MmaTy::S32),
    (MmaTy::S4, MmaTy::S4, MmaTy::S32),
    (MmaTy::F16, MmaTy::F16, MmaTy::F32),
    (MmaTy::BF16, MmaTy::BF16, MmaTy::F32),
    (MmaTy::F16, MmaTy::F16, MmaTy::F16),
    (MmaTy::E4M3, MmaTy::E4M3, MmaTy::F32),
    (MmaTy::E5M2, MmaTy::E5M2, MmaTy::F32),
    (MmaTy::E4M3, MmaTy::E5M2, MmaTy::F32),
    (MmaTy::E4M3, MmaTy::E4M3, MmaTy::F16),
    (MmaTy::E5M2, MmaTy::E5M2, MmaTy::F16),
];

#[test]
fn products_are_sums_rounded_once() {
    for (a, b, acc) in TYPES {
        let mma = Mma { a, b, acc };
        for seed in 0..10 {
            let case = case(mma, seed);
            let found = run(Matrix::Mma(mma), &case.words, mma.acc_registers(), Fp8Accumulation::Exact);
            for lane in 0..32 {
                for i in 0..4 {
                    let (row, column) = Mma::acc_element(lane, i);
                    let products = (0..mma.k()).map(|k| case.a[row * mma.k() + k] * case.b[k * 8 + column]);
                    let sum = case.c[row * 8 + column] + products.sum::<f64>();
                    let (bits, expected) = match acc {
                        MmaTy::S32 => (found[32 * i + lane], sum as i64 as u32),
                        MmaTy::F16 => {
                            let bits = found[32 * (i / 2) + lane] >> (16 * (i % 2)) & 0xffff;
                            (bits, f16::from_f64(sum).to_bits().into())
                        }
                        _ => (found[32 * i + lane], (sum as f32).to_bits()),
                    };
                    // The order of the sum can matter in the last bit of the double, not of the result.
                    assert_eq!(bits, expected, "{mma:?}, row {row}, column {column}");
                }
            }
        }
    }
}

/// A sum rounded to the accumulator's type.
fn rounded(acc: MmaTy, sum: f64) -> f64 {
    match acc {
        MmaTy::S32 => sum,
        MmaTy::F16 => f16::from_f64(sum).to_f64(),
        _ => f64::from(sum as f32),
    }
}

/// Element `i` of a lane's results.
fn result(acc: MmaTy, found: &[u32], lane: usize, i: usize) -> f64 {
    match acc {
        MmaTy::F16 => value(acc, found[32 * (i / 2) + lane] >> (16 * (i % 2)) & 0xffff),
        _ => value(acc, found[32 * i + lane]),
    }
}

#[test]
fn halves_of_products_are_sums_rounded_once() {
    for (a, b, acc) in TYPES {
        let half = HalfMma { a, b, acc };
        let op = Matrix::HalfMma(half);
        if !sage_ptx::isa::Instruction::exists(&op) {
            continue;
        }
        let mma = half.whole();
        for seed in 20..25 {
            let case = case(mma, seed);
            // The first registers of each operand are a product of half the depth, and of integers half the rows.
            let first = |from: usize, count: usize| &case.words[32 * from..32 * (from + count)];
            let words = [first(0, half.a_registers()), first(4, 1), first(6, half.acc_registers())].concat();
            let found = run(op, &words, half.acc_registers(), Fp8Accumulation::Exact);
            for lane in 0..32 {
                for i in 0..half.rows() / 4 {
                    let (row, column) = Mma::acc_element(lane, i);
                    assert!(row < half.rows());
                    let products = (0..half.k()).map(|k| case.a[row * mma.k() + k] * case.b[k * 8 + column]);
                    let sum = rounded(acc, case.c[row * 8 + column] + products.sum::<f64>());
                    assert_eq!(result(acc, &found, lane, i), sum, "{half:?}, row {row}, column {column}");
                }
            }
        }
    }
}

#[test]
fn products_on_turing_are_rounded_after_each_half() {
    for (a, b, acc) in TYPES {
        let mma = Mma { a, b, acc };
        for seed in 10..15 {
            let case = case(mma, seed);
            let program = program(Matrix::Mma(mma), case.words.len() / 32, mma.acc_registers());
            if program.missing_on(Target::SM_75).is_some() {
                assert!(matches!(a, MmaTy::BF16 | MmaTy::E4M3 | MmaTy::E5M2), "{mma:?}");
                continue;
            }
            let lowered = program.lowered(Target::SM_75);
            let found = run_program(&lowered, Emulator::new(), &case.words, mma.acc_registers());
            for lane in 0..32 {
                for i in 0..4 {
                    let (row, column) = Mma::acc_element(lane, i);
                    let product = |k: usize| case.a[row * mma.k() + k] * case.b[k * 8 + column];
                    let middle = mma.k() / 2;
                    let low = case.c[row * 8 + column] + (0..middle).map(product).sum::<f64>();
                    let sum = rounded(acc, low) + (middle..mma.k()).map(product).sum::<f64>();
                    let found = result(acc, &found, lane, i);
                    assert_eq!(found, rounded(acc, sum), "{mma:?}, row {row}, column {column}");
                }
            }
        }
    }
}

#[test]
fn integer_sums_wrap() {
    let mma = Mma { a: MmaTy::S8, b: MmaTy::S8, acc: MmaTy::S32 };
    let mut words = vec![0x7f7f_7f7f; 6 * 32];
    words.extend([i32::MAX as u32; 128]);
    let found = run(Matrix::Mma(mma), &words, 4, Fp8Accumulation::Exact);
    assert_eq!(found, [i32::MAX.wrapping_add(32 * 127 * 127) as u32; 128]);
}

/// The rule of [`Fp8Accumulation::Truncated`], worked out in other words.
fn truncated(terms: &[f64]) -> f64 {
    let exponent = |x: f64| if x == 0.0 { i32::MIN } else { x.abs().log2().floor() as i32 };
    let largest = terms.iter().map(|&x| exponent(x)).max().unwrap();
    if largest == i32::MIN {
        return 0.0;
    }
    let unit = f64::exp2(f64::from(largest - 13));
    let sum: f64 = terms.iter().map(|x| (x / unit).trunc() * unit).sum();
    if sum == 0.0 {
        return 0.0;
    }
    let unit = f64::exp2(f64::from(exponent(sum) - 13)).max(unit);
    (sum / unit).trunc() * unit
}

#[test]
fn fp8_can_be_cut_off_as_on_hopper() {
    let mma = Mma { a: MmaTy::E4M3, b: MmaTy::E4M3, acc: MmaTy::F32 };
    let mut differs = 0;
    for seed in 0..20 {
        let mut case = case(mma, seed);
        if seed == 7 {
            case.words[..].fill(0);
            case.a.fill(0.0);
            case.c.fill(0.0);
        }
        let found = run(Matrix::Mma(mma), &case.words, 4, Fp8Accumulation::Truncated);
        for lane in 0..32 {
            for i in 0..4 {
                let (row, column) = Mma::acc_element(lane, i);
                let mut terms = vec![case.c[row * 8 + column]];
                terms.extend((0..32).map(|k| case.a[row * 32 + k] * case.b[k * 8 + column]));
                let result = f32::from_bits(found[32 * i + lane]);
                assert_eq!(f64::from(result), truncated(&terms), "{terms:?}");
                assert_eq!(result.to_bits() & 0x3ff, 0, "13 fraction bits");
                differs += u32::from(f64::from(result) != terms.iter().sum::<f64>());
            }
        }
    }
    assert!(differs > 1000, "{differs}");
}

/// The value of a scale, worked out in other words than the emulator's.
fn scale(scales: BlockScales, byte: u8) -> f64 {
    match scales {
        BlockScales::Ue4m3 => f64::from(E4M3.decode(byte)),
        BlockScales::Ue8m0 => (f64::from(byte) - 127.0).exp2(),
    }
}

#[test]
fn block_scaled_products_follow_their_scales() {
    let mma = MmaBlockScaled::PRODUCT;
    for seed in 0..16 {
        let mut case = case(mma, seed);
        // Scales of which the sums of all products are exact in double precision.
        let (kind, mask, least) = match seed % 2 {
            0 => (BlockScales::Ue4m3, 0x6f6f_6f6f, 0),
            _ => (BlockScales::Ue8m0, 0x0f0f_0f0f, 0x7878_7878),
        };
        let scaled = MmaBlockScaled { scales: kind, b_lane: (seed / 2 % 4) as u8 };
        let mut random = seed + 99;
        let mut scales = || -> Vec<u32> {
            (0..32)
                .map(|_| {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    ((random >> 32) as u32 & mask) + least
                })
                .collect()
        };
        let (a_scales, b_scales) = (scales(), scales());
        case.words.extend(&a_scales);
        case.words.extend(&b_scales);
        let found = run(Matrix::MmaBlockScaled(scaled), &case.words, 4, Fp8Accumulation::Exact);
        let scale = |word: u32, k: usize| scale(kind, (word >> (8 * (k / kind.block()))) as u8);
        for lane in 0..32 {
            for i in 0..4 {
                let (row, column) = Mma::acc_element(lane, i);
                let products = (0..64).map(|k| {
                    case.a[row * 64 + k]
                        * case.b[k * 8 + column]
                        * scale(a_scales[4 * (row % 8) + row / 8], k)
                        * scale(b_scales[4 * column + usize::from(scaled.b_lane)], k)
                });
                let sum = case.c[row * 8 + column] + products.sum::<f64>();
                assert_eq!(found[32 * i + lane], (sum as f32).to_bits());
            }
        }
    }
}

/// Ones and powers of two: 64 products of 1.5 · 2 are 192; halved for each half of A's row, doubled for B's second.
#[test]
fn a_block_scaled_product_worked_out_by_hand() {
    // 1.5 has the code 3, 2 the code 4.
    let mut words = vec![0x3333_3333; 4 * 32];
    words.extend([0x4444_4444; 2 * 32]);
    words.extend([1f32.to_bits(); 4 * 32]);
    // 2⁻¹ and 2⁻¹; 1 and 2. Bytes behind the second are of no account.
    words.extend([0xffff_7e7e; 32]);
    words.extend([0xffff_807f; 32]);
    let mma = MmaBlockScaled { scales: BlockScales::Ue8m0, b_lane: 2 };
    let found = run(Matrix::MmaBlockScaled(mma), &words, 4, Fp8Accumulation::Exact);
    assert_eq!(found, [(1.0f32 + 96.0 * 0.5 + 96.0 * 0.5 * 2.0).to_bits(); 128]);
    // E4M3: 1.5 (0x3c), 0.5 (0x30), 0 and 2⁻⁹ (1) for 16 elements each, beside ones (0x38).
    let count = words.len();
    words[count - 64..count - 32].fill(0x0100_303c);
    words[count - 32..].fill(0x3838_3838);
    let mma = MmaBlockScaled { scales: BlockScales::Ue4m3, b_lane: 0 };
    let found = run(Matrix::MmaBlockScaled(mma), &words, 4, Fp8Accumulation::Exact);
    assert_eq!(found, [(1.0f32 + 48.0 * (1.5 + 0.5 + 1.0 / 512.0)).to_bits(); 128]);
}

#[test]
fn a_divergent_product_is_a_fault() {
    use sage_emulator::FaultKind;
    use sage_ptx::isa::Cmp;
    let mut raw = Raw::new(32);
    let thread = raw.thread();
    let x = raw.mov(0);
    let p = raw.compare(Cmp::Lt, thread, 31);
    let mma = Mma { a: MmaTy::F16, b: MmaTy::F16, acc: MmaTy::F32 };
    raw.when(p, |raw| raw.matrix(Matrix::Mma(mma), &[x; 4], &[x.operand(); 10]));
    let result = Emulator::new().launch(&raw.done(), [1, 1, 1], &[]);
    support::fault_naming(result, FaultKind::Divergent, &["mma", "0x80000000"]);
}
