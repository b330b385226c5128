//! Arithmetic, control flow, and what the lanes of a warp do together.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use half::{bf16, f16};
use sage_emulator::{Emulator, FaultKind};
use sage_ptx::isa::{Cmp, Convert, Lane, Memory, Op, Redux, Shuffle, Space, Special, Ty, Vote, Warp, Width};
use sage_ptx::kernel;
use sage_ptx::program::{Program, Reg};

mod support;
use support::{Raw, Source, fault, fault_naming};

/// Runs one warp of a program whose only parameter receives a word a lane.
fn one_warp(program: &Program) -> Vec<u32> {
    let mut emulator = Emulator::new();
    let out = emulator.uninitialized("out", 128);
    emulator.launch(program, [1, 1, 1], &[out.arg()]).unwrap();
    emulator.read(out)
}

/// A program that computes a word for each lane.
fn per_lane(write: impl FnOnce(&mut Raw, Reg) -> Reg) -> Program {
    let mut raw = Raw::new(32);
    let out = raw.pointer("out");
    let thread = raw.thread();
    let place = raw.at(out, thread, 4);
    let value = write(&mut raw, thread);
    raw.store(Space::Global, place, value);
    raw.done()
}

fn lanes<T>(of: impl Fn(u32) -> T) -> Vec<T> {
    (0..32).map(of).collect()
}

/// Each instruction of the lanes, run by a warp, against its result in Rust.
#[test]
fn lane_instructions_compute() {
    type Input = fn(u32) -> u64;
    type Case = (Lane, Vec<Input>, fn(u32) -> u32);
    fn x(i: u32) -> f32 {
        i as f32 * 0.75 - 9.0
    }
    fn y(i: u32) -> f32 {
        1.5 + i as f32
    }
    let (fx, fy): (Input, Input) = (|i| x(i).to_bits().into(), |i| y(i).to_bits().into());
    let (ia, ib): (Input, Input) =
        (|i| (i.wrapping_mul(0x0123_4567) as i32 - 77) as u32 as u64, |i| u64::from(i * 3 + 1));
    fn a(i: u32) -> i32 {
        i.wrapping_mul(0x0123_4567) as i32 - 77
    }
    fn b(i: u32) -> i32 {
        (i * 3 + 1) as i32
    }
    let pair: fn(u32) -> u64 =
        |i| u64::from(f16::from_f32(x(i)).to_bits()) | u64::from(f16::from_f32(y(i)).to_bits()) << 16;
    let cases: Vec<Case> = vec![
        (Lane::Add(Ty::F32), vec![fx, fy], |i| (x(i) + y(i)).to_bits()),
        (Lane::Sub(Ty::F32), vec![fx, fy], |i| (x(i) - y(i)).to_bits()),
        (Lane::Mul(Ty::F32), vec![fx, fy], |i| (x(i) * y(i)).to_bits()),
        (Lane::Div(Ty::F32), vec![fx, fy], |i| (x(i) / y(i)).to_bits()),
        (Lane::Min(Ty::F32), vec![fx, fy], |i| x(i).min(y(i)).to_bits()),
        (Lane::Max(Ty::F32), vec![fx, fy], |i| x(i).max(y(i)).to_bits()),
        (Lane::Fma(Ty::F32), vec![fx, fy, fx], |i| x(i).mul_add(y(i), x(i)).to_bits()),
        (Lane::Abs(Ty::F32), vec![fx], |i| x(i).abs().to_bits()),
        (Lane::Neg(Ty::F32), vec![fx], |i| (-x(i)).to_bits()),
        (Lane::Reciprocal, vec![fy], |i| (1.0 / y(i)).to_bits()),
        (Lane::Exp2, vec![fx], |i| (f64::from(x(i)).exp2() as f32).to_bits()),
        (Lane::Log2, vec![fy], |i| (f64::from(y(i)).log2() as f32).to_bits()),
        (Lane::Tanh, vec![fx], |i| (f64::from(x(i)).tanh() as f32).to_bits()),
        (Lane::Add(Ty::S32), vec![ia, ib], |i| a(i).wrapping_add(b(i)) as u32),
        (Lane::Mul(Ty::S32), vec![ia, ib], |i| a(i).wrapping_mul(b(i)) as u32),
        (Lane::MulHigh(Ty::S32), vec![ia, ib], |i| ((i64::from(a(i)) * i64::from(b(i))) >> 32) as u32),
        (Lane::Fma(Ty::S32), vec![ia, ib, ib], |i| a(i).wrapping_mul(b(i)).wrapping_add(b(i)) as u32),
        (Lane::Div(Ty::S32), vec![ia, ib], |i| (a(i) / b(i)) as u32),
        (Lane::Rem(Ty::S32), vec![ia, ib], |i| (a(i) % b(i)) as u32),
        (Lane::And(Ty::B32), vec![ia, ib], |i| (a(i) & b(i)) as u32),
        (Lane::Or(Ty::B32), vec![ia, ib], |i| (a(i) | b(i)) as u32),
        (Lane::Xor(Ty::B32), vec![ia, ib], |i| (a(i) ^ b(i)) as u32),
        (Lane::Not(Ty::B32), vec![ia], |i| !a(i) as u32),
        (Lane::Shl(Ty::B32), vec![ia, |i| i.into()], |i| (a(i) as u32) << i),
        (Lane::Shr(Ty::S32), vec![ia, |i| i.into()], |i| (a(i) >> i) as u32),
        (Lane::Shr(Ty::U32), vec![ia, |i| i.into()], |i| a(i) as u32 >> i),
        (Lane::PopCount, vec![ia], |i| a(i).count_ones()),
        (Lane::Permute, vec![ia, ib, |_| 0x3210], |i| a(i) as u32),
        (Lane::Permute, vec![ia, ib, |_| 0x0123], |i| (a(i) as u32).swap_bytes()),
        (Lane::Dot4, vec![ia, ib, ib], |i| {
            let (a, b) = (a(i).to_le_bytes(), b(i).to_le_bytes());
            let dot: i32 = a.iter().zip(b).map(|(&a, b)| i32::from(a as i8) * i32::from(b as i8)).sum();
            (dot + (i * 3 + 1) as i32) as u32
        }),
        (Lane::Convert(Convert::IntToF32(Ty::S32)), vec![ia], |i| (a(i) as f32).to_bits()),
        (Lane::Convert(Convert::F32ToIntNearest(Ty::S32)), vec![fx], |i| {
            x(i).round_ties_even() as i32 as u32
        }),
        (Lane::Convert(Convert::F32ToIntTruncate(Ty::S32)), vec![fx], |i| x(i) as i32 as u32),
        (Lane::Convert(Convert::F32ToF16x2), vec![fy, fx], |i| {
            u32::from(f16::from_f32(x(i)).to_bits()) | u32::from(f16::from_f32(y(i)).to_bits()) << 16
        }),
        (Lane::Convert(Convert::F32ToBF16x2), vec![fy, fx], |i| {
            u32::from(bf16::from_f32(x(i)).to_bits()) | u32::from(bf16::from_f32(y(i)).to_bits()) << 16
        }),
        (Lane::Add(Ty::F16x2), vec![pair, pair], |i| {
            let twice = |x: f32| u32::from((f16::from_f32(x) + f16::from_f32(x)).to_bits());
            twice(x(i)) | twice(y(i)) << 16
        }),
        (Lane::Mov(Ty::B32), vec![ia], |i| a(i) as u32),
    ];
    let mut emulator = Emulator::new();
    let out = emulator.uninitialized("out", 128);
    for (op, inputs, expected) in cases {
        let tables: Vec<Vec<u64>> = inputs.iter().map(lanes).collect();
        let mut raw = Raw::new(32);
        let mut args = Vec::new();
        let thread = raw.thread();
        let mut operands = Vec::new();
        for (i, table) in tables.iter().enumerate() {
            let words: Vec<u32> = table.iter().map(|&x| x as u32).collect();
            args.push(emulator.buffer("table", &words).arg());
            let table = raw.pointer(&format!("in{i}"));
            let place = raw.at(table, thread, 4);
            operands.push(raw.load(Space::Global, place).operand());
        }
        let to = raw.pointer("out");
        let place = raw.at(to, thread, 4);
        let value = raw.lane(op, &operands);
        raw.store(Space::Global, place, value);
        args.push(out.arg());
        emulator.launch(&raw.done(), [1, 1, 1], &args).unwrap();
        assert_eq!(emulator.read::<u32>(out), lanes(expected), "{op:?}");
    }
}

#[test]
fn threads_know_themselves() {
    let mut raw = Raw::new(60);
    let out = raw.pointer("out");
    let specials = [
        Special::TidX,
        Special::CtaIdX,
        Special::CtaIdY,
        Special::CtaIdZ,
        Special::NumCtaX,
        Special::NumCtaY,
        Special::NumCtaZ,
    ];
    let all: Vec<Reg> = specials
        .iter()
        .map(|&special| {
            let reg = raw.b32();
            raw.emit(Op::Memory(Memory::Special(special)), &[reg], &[]);
            reg
        })
        .collect();
    // The thread of the linear block.
    let [thread, x, y, z, wide, high, _] = all[..] else { panic!("{all:?}") };
    let plane = raw.lane(Lane::Fma(Ty::S32), &[z.operand(), high.operand(), y.operand()]);
    let block = raw.lane(Lane::Fma(Ty::S32), &[plane.operand(), wide.operand(), x.operand()]);
    let index = raw.lane(Lane::Fma(Ty::S32), &[block.operand(), 60.operand(), thread.operand()]);
    let place = raw.at(out, index, 4);
    raw.store(Space::Global, place, index);
    let mut emulator = Emulator::new();
    let out = emulator.uninitialized("out", 4 * 60 * 2 * 3 * 4);
    emulator.launch(&raw.done(), [2, 3, 4], &[out.arg()]).unwrap();
    assert_eq!(emulator.read::<u32>(out), (0..60 * 24).collect::<Vec<u32>>());
}

#[test]
fn lanes_take_their_own_ways() {
    // Collatz: every lane loops its own number of times, with a branch inside.
    let program = kernel("collatz", 32, |k| {
        let out = k.global::<i32>("out");
        let n = k.var(k.thread() + 1);
        let steps = k.var(0);
        k.while_loop(
            || n.get().ne(1),
            || {
                k.if_else((n.get() & 1).eq(0), || n.set(n.get() >> 1), || n.set(n.get() * 3 + 1));
                steps.set(steps.get() + 1);
            },
        );
        out.at(k.thread()).store(steps.get());
    });
    let expected = lanes(|i| {
        let (mut n, mut steps) = (i + 1, 0);
        while n != 1 {
            n = if n % 2 == 0 { n / 2 } else { 3 * n + 1 };
            steps += 1;
        }
        steps
    });
    assert_eq!(one_warp(&program), expected);
}

#[test]
fn lanes_that_exit_are_gone() {
    let program = kernel("exit", 64, |k| {
        let out = k.global::<i32>("out");
        out.at(k.thread()).store(0);
        let i = k.var(0);
        k.while_loop(
            || i.get().lt(10),
            || {
                k.exit_when((i.get().eq(5)) & (k.thread() & 1).eq(1));
                i.set(i.get() + 1);
                out.at(k.thread()).store(i.get());
            },
        );
        k.exit_when(k.thread().lt(32));
        // Only the second warp is left, and the barrier knows.
        k.barrier();
        out.at(k.thread()).store(99);
    });
    let mut emulator = Emulator::new();
    let out = emulator.uninitialized("out", 256);
    emulator.launch(&program, [1, 1, 1], &[out.arg()]).unwrap();
    let expected: Vec<i32> = (0..64)
        .map(|i| {
            if i % 2 == 1 {
                5
            } else if i < 32 {
                10
            } else {
                99
            }
        })
        .collect();
    assert_eq!(emulator.read::<i32>(out), expected);
}

#[test]
fn shuffles_move_values() {
    for (mode, by) in [(Shuffle::Xor, 5u32), (Shuffle::Index, 7)] {
        let program = per_lane(|raw, thread| {
            let value = raw.mul(thread, 10);
            let dst = raw.b32();
            raw.warp(Warp::Shuffle(mode), &[dst], &[value.operand(), by.operand()]);
            dst
        });
        let expected = lanes(|lane| {
            10 * match mode {
                Shuffle::Xor => lane ^ by,
                Shuffle::Index => by,
            }
        });
        assert_eq!(one_warp(&program), expected, "{mode:?}");
    }
}

#[test]
fn votes_and_reductions() {
    let vote = |vote: Vote, limit: i32| {
        per_lane(|raw, thread| {
            let p = raw.compare(Cmp::Lt, thread, limit);
            if vote == Vote::Ballot {
                let dst = raw.b32();
                raw.warp(Warp::Vote(vote), &[dst], &[p.operand()]);
                dst
            } else {
                let dst = raw.reg(Width::Pred);
                raw.warp(Warp::Vote(vote), &[dst], &[p.operand()]);
                raw.lane(Lane::Select(Ty::B32), &[1.operand(), 0.operand(), dst.operand()])
            }
        })
    };
    assert_eq!(one_warp(&vote(Vote::Ballot, 5)), [0x1f; 32]);
    assert_eq!(one_warp(&vote(Vote::Any, 5)), [1; 32]);
    assert_eq!(one_warp(&vote(Vote::Any, 0)), [0; 32]);
    assert_eq!(one_warp(&vote(Vote::All, 31)), [0; 32]);
    assert_eq!(one_warp(&vote(Vote::All, 32)), [1; 32]);
    for (op, expected) in [(Redux::Add, 31 * 16 - 64), (Redux::Min, -2), (Redux::Max, 29i32)] {
        let program = per_lane(|raw, thread| {
            let value = raw.add(thread, -2);
            let dst = raw.b32();
            raw.warp(Warp::Redux(op, Ty::S32), &[dst], &[value.operand()]);
            dst
        });
        assert_eq!(one_warp(&program), [expected as u32; 32]);
    }
}

#[test]
fn matrices_load() {
    for transposed in [false, true] {
        for count in [1u8, 2, 4] {
            let mut raw = Raw::new(32);
            let out = raw.pointer("out");
            let tile = raw.shared("tile", 1024);
            let thread = raw.thread();
            // Word `w` of the tile holds elements 2w and 2w + 1.
            for i in 0..8 {
                let word = raw.add(thread, 32 * i);
                let low = raw.mul(word, 2);
                let value =
                    raw.lane(Lane::Fma(Ty::S32), &[low.operand(), 0x10001.operand(), 0x10000.operand()]);
                let place = raw.lane(Lane::Fma(Ty::S32), &[word.operand(), 4.operand(), tile.operand()]);
                raw.store(Space::Shared, place, value);
            }
            let row = raw.lane(Lane::Fma(Ty::S32), &[thread.operand(), 16.operand(), tile.operand()]);
            let regs: Vec<Reg> = (0..count).map(|_| raw.b32()).collect();
            raw.warp(Warp::LoadMatrix { count, transposed, offset: 0 }, &regs, &[row.operand()]);
            for (i, reg) in regs.iter().enumerate() {
                let index = raw.add(thread, 32 * i as i32);
                let place = raw.at(out, index, 4);
                raw.store(Space::Global, place, *reg);
            }
            let mut emulator = Emulator::new();
            let out = emulator.uninitialized("out", 128 * usize::from(count));
            emulator.launch(&raw.done(), [1, 1, 1], &[out.arg()]).unwrap();
            let found = emulator.read::<u32>(out);
            for (i, &word) in found.iter().enumerate() {
                let (matrix, lane) = (i as u32 / 32, i as u32 % 32);
                let element = |row: u32, column: u32| 64 * matrix + 8 * row + column;
                let (row, column) = (lane / 4, 2 * (lane % 4));
                let (low, high) = if transposed {
                    (element(column, row), element(column + 1, row))
                } else {
                    (element(row, column), element(row, column + 1))
                };
                assert_eq!(word, low | high << 16, "{count} {transposed} {i}");
            }
        }
    }
}

#[test]
fn a_shuffle_of_some_lanes_is_divergent() {
    let program = |inside: bool| {
        kernel("shuffle", 32, |k| {
            let x = k.thread();
            if inside {
                k.when(x.lt(16), || {
                    x.shuffle_xor(1);
                });
            } else {
                x.shuffle_xor(1);
            }
        })
    };
    let emulator = Emulator::new();
    emulator.launch(&program(false), [1, 1, 1], &[]).unwrap();
    let result = emulator.launch(&program(true), [1, 1, 1], &[]);
    let fault = fault_naming(result, FaultKind::Divergent, &["a shuffle", "0xffff0000", "shfl"]);
    assert_eq!(fault.lanes, 0xffff);
}

#[test]
fn barriers_and_matrix_loads_of_some_lanes_are_divergent() {
    let emulator = Emulator::new();
    let program = kernel("barrier", 64, |k| k.when(k.thread().lt(16), || k.barrier()));
    fault_naming(emulator.launch(&program, [1, 1, 1], &[]), FaultKind::Divergent, &["a barrier", "bar.sync"]);
    let program = kernel("sync", 32, |k| k.when(k.thread().lt(16), || k.warp_sync()));
    fault(emulator.launch(&program, [1, 1, 1], &[]), FaultKind::Divergent);
    // Half a warp can shuffle among itself when there is no other half, but it cannot load matrices.
    let mut raw = Raw::new(16);
    let tile = raw.shared("tile", 512);
    let value = raw.mov(1);
    raw.warp(Warp::Shuffle(Shuffle::Xor), &[value], &[value.operand(), 1.operand()]);
    raw.warp(Warp::LoadMatrix { count: 1, transposed: false, offset: 0 }, &[value], &[tile.operand()]);
    fault_naming(emulator.launch(&raw.done(), [1, 1, 1], &[]), FaultKind::Divergent, &["ldmatrix"]);
}

#[test]
fn a_malformed_program_is_a_fault() {
    let mut raw = Raw::new(32);
    raw.emit(Op::Lane(Lane::Add(Ty::S32)), &[Reg(7)], &[1.operand(), 2.operand()]);
    let failure = Emulator::new().launch(&raw.done(), [1, 1, 1], &[]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::InvalidProgram));
    let mut raw = Raw::new(32);
    let a = raw.b32();
    raw.emit(Op::Lane(Lane::Add(Ty::S32)), &[a], &[1.operand()]);
    let failure = Emulator::new().launch(&raw.done(), [1, 1, 1], &[]).unwrap_err();
    assert_eq!(failure.kind(), Some(FaultKind::InvalidProgram));
}
