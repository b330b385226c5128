//! Programs of random instructions: whatever they do, the launch ends, with a report or with faults.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::iter::repeat_n;

use sage_emulator::{Emulator, EmulatorOptions, FaultKind, Fp8Accumulation, Swizzle, TensorMap};
use sage_ptx::isa::{
    AtomicOp, BlockScales, Cmp, Control, Convert, Group, HalfMma, Instruction, Lane, LoadMode, Matrix,
    Memory, Mma, MmaBlockScaled, MmaTy, Op, Redux, SharedWindow, Shuffle, Space, Special, StoreMode, Ty,
    Vote, Warp, Wgmma, Width, Word,
};
use sage_ptx::program::{Const, Operand, Reg};

mod support;
use support::{Raw, Source};

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

const MMA: [MmaTy; 10] = [
    MmaTy::F16,
    MmaTy::BF16,
    MmaTy::S8,
    MmaTy::U8,
    MmaTy::S4,
    MmaTy::E4M3,
    MmaTy::E5M2,
    MmaTy::E2M1,
    MmaTy::F32,
    MmaTy::S32,
];
const TY: [Ty; 13] = [
    Ty::Pred,
    Ty::B16,
    Ty::B32,
    Ty::B64,
    Ty::S32,
    Ty::U32,
    Ty::S64,
    Ty::U64,
    Ty::F16,
    Ty::BF16,
    Ty::F16x2,
    Ty::BF16x2,
    Ty::F32,
];

fn lane(random: &mut Random) -> Lane {
    let ty = random.pick(&TY);
    match random.below(22) {
        0 => Lane::Add(ty),
        1 => Lane::Sub(ty),
        2 => Lane::Mul(ty),
        3 => Lane::Fma(ty),
        4 => Lane::Div(ty),
        5 => Lane::Rem(ty),
        6 => Lane::Shl(ty),
        7 => Lane::Shr(ty),
        8 => Lane::Neg(ty),
        9 => Lane::Abs(ty),
        10 => Lane::MulHigh(ty),
        11 => Lane::MadWide(Ty::S32),
        12 => Lane::MulWide(Ty::U32),
        13 => Lane::Set(random.pick(&[Cmp::Eq, Cmp::Ne, Cmp::Lt, Cmp::NeU]), ty),
        14 => Lane::Permute,
        15 => Lane::Dot4,
        16 => Lane::Convert(random.pick(&[
            Convert::F32ToE4M3x2,
            Convert::F32ToE2M1x8,
            Convert::F32ToIntNearest(Ty::S32),
            Convert::F32ToBF16x2,
        ])),
        17 => Lane::Min(ty),
        18 => Lane::Max(ty),
        19 => Lane::MaxNan(ty),
        20 => Lane::Join32,
        _ => Lane::Select(ty),
    }
}

fn instruction(random: &mut Random) -> Op {
    let space = random.pick(&[Space::Global, Space::Shared]);
    let word = random.pick(&[Word::U8, Word::S8, Word::U16, Word::B16, Word::B32, Word::B64]);
    let count = random.pick(&[1, 1, 2, 3, 4]);
    let offset = random.pick(&[0, 4, -4, 1 << 30, i32::MIN]);
    let mma = Mma { a: random.pick(&MMA), b: random.pick(&MMA), acc: random.pick(&MMA) };
    match random.below(40) {
        0..=7 => Op::Lane(lane(random)),
        8 => {
            let mode = random.pick(&[LoadMode::Plain, LoadMode::Streaming, LoadMode::Acquire]);
            Op::Memory(Memory::Load { space, word, count, offset, mode })
        }
        9 => {
            let mode = random.pick(&[StoreMode::Plain, StoreMode::Release]);
            Op::Memory(Memory::Store { space, word, count, offset, mode })
        }
        10 => {
            let op = random.pick(&[AtomicOp::Add, AtomicOp::Min, AtomicOp::Max, AtomicOp::Or]);
            Op::Memory(Memory::Atomic { space, op, ty: random.pick(&TY), offset })
        }
        11 => Op::Memory(Memory::Special(Special::CtaIdX)),
        12 => Op::Memory(Memory::Param { index: random.pick(&[0, 0, 0, 0, 0, 0, 1, 2]), ty: Ty::U64 }),
        13 => Op::Memory(Memory::ParamAddress { index: random.pick(&[1, 1, 1, 1, 1, 1, 0, 2]) }),
        14 => Op::Warp(Warp::Shuffle(random.pick(&[Shuffle::Xor, Shuffle::Index]))),
        15 => Op::Warp(Warp::Vote(random.pick(&[Vote::All, Vote::Ballot]))),
        16 => Op::Warp(Warp::Redux(Redux::Add, random.pick(&TY))),
        17..=19 => Op::Warp(Warp::LoadMatrix { count, transposed: true, offset }),
        20 => Op::Matrix(Matrix::Mma(mma)),
        21 => Op::Matrix(Matrix::HalfMma(HalfMma { a: mma.a, b: mma.b, acc: mma.acc })),
        22 => Op::Matrix(Matrix::MmaBlockScaled(MmaBlockScaled {
            scales: random.pick(&[BlockScales::Ue4m3, BlockScales::Ue8m0]),
            b_lane: random.pick(&[0, 3, 4]),
        })),
        23 | 24 => Op::Matrix(Matrix::Wgmma(Wgmma {
            n: random.pick(&[8, 64, 256, 0, 7]),
            a: random.pick(&MMA[..7]),
            b: random.pick(&MMA[..7]),
            acc: random.pick(&[MmaTy::F32, MmaTy::S32]),
            a_in_registers: random.below(2) == 0,
            b_transposed: random.below(3) == 0,
        })),
        25 => Op::Matrix(random.pick(&[Matrix::WgmmaFence, Matrix::WgmmaCommit, Matrix::WgmmaWait(0)])),
        26 => Op::Control(Control::Barrier {
            threads: random.pick(&[None, Some(32), Some(64), Some(0), Some(99)]),
        }),
        27 => Op::Control(Control::BarrierArrive { threads: random.pick(&[32, 128, 0, 31]) }),
        28 => Op::Control(random.pick(&[Control::FenceAsyncProxy, Control::FenceMbarrierInit])),
        29 => Op::Control(Control::MbarrierInit),
        30 => Op::Control(random.pick(&[Control::MbarrierArrive, Control::MbarrierArriveExpect])),
        31 => Op::Control(Control::MbarrierTryWait),
        32 => Op::Control(Control::CopyAsync { bytes: random.pick(&[4, 8, 16, 3]) }),
        33 => Op::Control(random.pick(&[Control::CopyAsyncCommit, Control::CopyAsyncWait(0)])),
        34 => Op::Control(Control::BulkLoad),
        35 | 36 => Op::Control(Control::BulkTensorLoad {
            dims: random.pick(&[1, 2, 3, 5]),
            window: SharedWindow::Block,
        }),
        37 => Op::Control(random.pick(&[Control::RegistersDecrease(24), Control::RegistersIncrease(256)])),
        38 => Op::Control(random.pick(&[Control::Sleep, Control::Exit])),
        _ => Op::Warp(Warp::Sync),
    }
}

/// Registers that the program has written, and some that it has not.
struct Pool(Vec<(Reg, Width)>);

impl Pool {
    fn register(&self, random: &mut Random, width: Width) -> Reg {
        let fitting: Vec<Reg> = self.0.iter().filter(|(_, of)| *of == width).map(|(reg, _)| *reg).collect();
        random.pick(&fitting)
    }

    /// An operand of an instruction, most often a register, and now and then a constant that is an address.
    fn operand(&self, random: &mut Random, group: Group, tile: u32) -> Operand {
        if group.registers_only || random.below(2) == 0 {
            return self.register(random, group.width).operand();
        }
        match group.width {
            Width::Pred => Operand::Const(Const::Pred(random.below(2) == 0)),
            Width::B16 => Operand::Const(Const::B16(random.pick(&[0, 0x3c00, 0x7fff]))),
            Width::B32 => match random.below(7) {
                0 => 1.5f32.operand(),
                1 => tile.operand(),
                2 => (tile + 4088).operand(),
                _ => random.pick(&[i32::MIN, -1, 0, 1, 16, 1 << 20]).operand(),
            },
            Width::B64 => random.pick(&[u64::MAX, 1 << 62, 0x6000_0000_0080, 0x7000_0000_0000]).operand(),
        }
    }
}

#[test]
fn no_program_brings_the_emulator_down() {
    let mut kinds = std::collections::HashMap::<Option<FaultKind>, usize>::new();
    for seed in 0..6000 {
        let mut random = Random(seed);
        let mut raw = Raw::new(random.pick(&[1, 31, 32, 64, 128, 160]));
        let (x, map) = (raw.pointer("x"), raw.tensor_map("map"));
        let tile = raw.shared("tile", 4096);
        let thread = raw.thread();
        let place = raw.at(x, thread, 16);
        let own = raw.mul(thread, 16);
        let shared = raw.add(own, tile);
        let p = raw.compare(Cmp::Lt, thread, 17);
        let mut pool: Vec<_> = [x, map, place].map(|reg| (reg, Width::B64)).into();
        pool.extend([thread, own, shared].map(|reg| (reg, Width::B32)));
        pool.push((p, Width::Pred));
        pool.extend([Width::B16, Width::B64].map(|width| (raw.reg(width), width)));
        let mut pool = Pool(pool);
        if random.below(2) == 0 {
            raw.control(Control::MbarrierInit, &[(tile + 4088).operand(), 1.operand()]);
        }
        for _ in 0..1 + random.below(12) {
            let mut op = instruction(&mut random);
            // Few programs are to be refused for an instruction that there is not.
            while !op.exists() && random.below(64) != 0 {
                op = instruction(&mut random);
            }
            let each = op.operands().into_iter().flat_map(|group| repeat_n(group, group.count.unwrap_or(0)));
            let src: Vec<Operand> = each.map(|group| pool.operand(&mut random, group, tile)).collect();
            // Many different results, so that few instructions overwrite the useful registers.
            let results = op.results();
            let dst: Vec<Reg> = (0..results.count.unwrap_or(0)).map(|_| raw.reg(results.width)).collect();
            pool.0.extend(dst.iter().take(3).map(|&reg| (reg, results.width)));
            match random.below(8) {
                0 => raw.when(p, |raw| raw.emit(op, &dst, &src)),
                _ => raw.emit(op, &dst, &src),
            }
        }
        let fp8 = random.pick(&[Fp8Accumulation::Exact, Fp8Accumulation::Truncated]);
        let options = EmulatorOptions { seed: seed % 3, workers: 1, fp8, ..EmulatorOptions::default() };
        let mut emulator = Emulator::with_options(options);
        let x = emulator.buffer("x", &[1u32; 1024]);
        let map = TensorMap {
            address: x.address(),
            element_bytes: 4,
            shape: vec![16, 16],
            strides: vec![64],
            box_shape: vec![8, 8],
            swizzle: random.pick(&[Swizzle::None, Swizzle::Bytes32]),
        };
        let result = emulator.launch(&raw.done(), [1, 1, 1], &[x.arg(), map.arg()]);
        *kinds.entry(result.as_ref().err().and_then(|failure| failure.kind())).or_default() += 1;
        if let Err(failure) = result {
            assert!(!failure.to_string().is_empty());
        }
    }
    // The programs reach far: some pass, and the faults are of many kinds.
    assert!(kinds.len() > 10 && kinds.contains_key(&None), "{kinds:?}");
    println!("{kinds:?}");
}
