//! `wgmma`: every layout of its operands, and what must wait for what.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use half::f16;
use sage_emulator::{Emulator, EmulatorOptions, Failure, FaultKind, Report};
use sage_ptx::isa::{Cmp, Control, E4M3, Lane, Matrix, Mma, MmaTy, Op, Space, Ty, Wgmma, Width};
use sage_ptx::program::{Operand, Program, Reg};

mod support;
use support::{Raw, Source, fault_naming};

/// How an operand lies in shared memory.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    /// Chunks of 16 bytes in a swizzled row; 1 is no swizzle.
    chunks: u32,
    transposed: bool,
}

impl Place {
    /// Byte offset of an element, by the canonical layouts of PTX; and the strides of the descriptor.
    fn offset(self, rows: u32, row: u32, byte: u32, element_bytes: u32) -> u32 {
        let linear = if self.transposed {
            // Columns are contiguous; `byte / element_bytes` is the depth.
            let depth = byte / element_bytes;
            let (chunk, within) = (row / 8, row % 8 * element_bytes);
            let (leading, stride) = self.strides(rows);
            if self.chunks == 1 {
                chunk * stride + depth / 8 * leading + depth % 8 * 16 + within
            } else {
                chunk / self.chunks * leading
                    + depth / 8 * stride
                    + depth % 8 * 16 * self.chunks
                    + chunk % self.chunks * 16
                    + within
            }
        } else {
            let (leading, stride) = self.strides(rows);
            if self.chunks == 1 {
                row / 8 * stride + row % 8 * 16 + byte / 16 * leading + byte % 16
            } else {
                row / 8 * stride + row % 8 * 16 * self.chunks + byte
            }
        };
        linear ^ (linear >> 7 & (self.chunks - 1)) << 4
    }

    fn strides(self, rows: u32) -> (u32, u32) {
        match (self.transposed, self.chunks) {
            // Leading: 8 deeper. Stride: the next 8 columns.
            (true, 1) => (rows / 8 * 128, 128),
            (true, chunks) => (2 * 128 * chunks, 128 * chunks),
            (false, 1) => (128, 256),
            (false, chunks) => (16, 128 * chunks),
        }
    }

    fn descriptor(self, address: u32, rows: u32) -> u64 {
        let (leading, stride) = self.strides(rows);
        let mode: u64 = match self.chunks {
            1 => 0,
            8 => 1,
            4 => 2,
            _ => 3,
        };
        u64::from(address >> 4) | u64::from(leading >> 4) << 16 | u64::from(stride >> 4) << 32 | mode << 62
    }
}

/// What a kernel leaves out, or does wrong.
#[derive(Clone, Copy, Default)]
struct Bugs {
    no_proxy_fence: bool,
    no_fence: bool,
    no_wait: bool,
    write_accumulator: bool,
    wait_too_few: bool,
    overwrite: bool,
    one_warp_less: bool,
    divergent_warp: bool,
}

/// Copies A and B as they are to shared memory, multiplies twice (the second time adding), and stores D.
fn program(op: Wgmma, a: Place, b: Place, bugs: Bugs) -> Program {
    let n = u32::from(op.n);
    let (a_bytes, b_bytes) = (8192, 8 * 128 * n.max(64) / 8);
    let mut raw = Raw::new(if bugs.one_warp_less { 96 } else { 128 });
    let (from_a, from_b, out) = (raw.pointer("a"), raw.pointer("b"), raw.pointer("out"));
    let (tile_a, tile_b) = (raw.shared("tile_a", a_bytes), raw.shared("tile_b", b_bytes));
    let thread = raw.thread();
    let threads = raw.program.block[0] as i32;
    for (from, to, bytes) in [(from_a, tile_a, a_bytes), (from_b, tile_b, b_bytes)] {
        let i = raw.add(thread, 0);
        raw.while_loop(
            |raw| raw.compare(Cmp::Lt, i, bytes as i32 / 4),
            |raw| {
                let place = raw.at(from, i, 4);
                let value = raw.load(Space::Global, place);
                let offset = raw.mul(i, 4);
                let place = raw.add(offset, to);
                raw.store(Space::Shared, place, value);
                raw.emit(Op::Lane(Lane::Add(Ty::S32)), &[i], &[i.operand(), threads.operand()]);
            },
        );
    }
    if !bugs.no_proxy_fence {
        raw.control(Control::FenceAsyncProxy, &[]);
    }
    raw.barrier();
    let d: Vec<Reg> = (0..op.acc_registers()).map(|_| raw.named("score")).collect();
    for &reg in &d {
        raw.emit(Op::Lane(Lane::Mov(Ty::B32)), &[reg], &[7.operand()]);
    }
    let a_operands: Vec<Operand> = if op.a_in_registers {
        // Warp w's rows, in the layout of `mma`, unswizzled in global memory by `Place { chunks: 1 }`'s rows.
        (0..4)
            .map(|r| {
                let index = raw.add(thread, 128 * r);
                let place = raw.at(from_a, index, 4);
                raw.load(Space::Global, place).operand()
            })
            .collect()
    } else {
        vec![raw.mov_wide(a.descriptor(tile_a, 64)).operand()]
    };
    let descriptor_b = raw.mov_wide(b.descriptor(tile_b, n));
    if !bugs.no_fence {
        raw.matrix(Matrix::WgmmaFence, &[], &[]);
    }
    let pred = raw.reg(Width::Pred);
    let pred2 = raw.reg(Width::Pred);
    raw.emit(
        Op::Lane(Lane::Mov(Ty::Pred)),
        &[pred],
        &[Operand::Const(sage_ptx::program::Const::Pred(false))],
    );
    raw.emit(
        Op::Lane(Lane::Mov(Ty::Pred)),
        &[pred2],
        &[Operand::Const(sage_ptx::program::Const::Pred(true))],
    );
    let issue = |raw: &mut Raw, add: Reg| {
        let mut src = a_operands.clone();
        src.extend([descriptor_b.operand(), add.operand()]);
        raw.matrix(Matrix::Wgmma(op), &d, &src);
    };
    if bugs.divergent_warp {
        let most = raw.compare(Cmp::Lt, thread, 127);
        raw.when(most, |raw| issue(raw, pred));
    } else {
        issue(&mut raw, pred);
    }
    raw.matrix(Matrix::WgmmaCommit, &[], &[]);
    issue(&mut raw, pred2);
    raw.matrix(Matrix::WgmmaCommit, &[], &[]);
    if bugs.write_accumulator {
        raw.emit(Op::Lane(Lane::Mov(Ty::B32)), &[d[3]], &[0.operand()]);
    }
    if bugs.overwrite {
        let offset = raw.mul(thread, 4);
        let place = raw.add(offset, tile_b);
        raw.store(Space::Shared, place, 0);
    }
    if bugs.wait_too_few {
        raw.matrix(Matrix::WgmmaWait(1), &[], &[]);
    } else if !bugs.no_wait {
        raw.matrix(Matrix::WgmmaWait(0), &d, &[]);
    }
    for (r, &reg) in d.iter().enumerate() {
        let index = raw.add(thread, 128 * r as i32);
        let place = raw.at(out, index, 4);
        raw.store(Space::Global, place, reg);
    }
    // After the wait, operands may be overwritten.
    let offset = raw.mul(thread, 4);
    let place = raw.add(offset, tile_b);
    raw.barrier();
    raw.store(Space::Shared, place, 0);
    raw.done()
}

fn bits(ty: MmaTy, i: usize) -> u32 {
    let x = (i * 7 + i / 13) % 19;
    match ty {
        MmaTy::F16 => f16::from_f32(x as f32 * 0.25 - 2.0).to_bits().into(),
        MmaTy::BF16 => half::bf16::from_f32(x as f32 * 0.5 - 4.0).to_bits().into(),
        MmaTy::E4M3 => (0x30 + x as u32) | ((i as u32 & 1) << 7),
        MmaTy::U8 => (x * 11) as u32,
        _ => (x as i32 * 9 - 80) as u8 as u32,
    }
}

fn value(ty: MmaTy, bits: u32) -> f64 {
    match ty {
        MmaTy::F16 => f16::from_bits(bits as u16).to_f64(),
        MmaTy::BF16 => half::bf16::from_bits(bits as u16).to_f64(),
        MmaTy::E4M3 => E4M3.decode(bits as u8).into(),
        MmaTy::U8 => f64::from(bits as u8),
        _ => f64::from(bits as u8 as i8),
    }
}

fn run(op: Wgmma, a: Place, b: Place, bugs: Bugs, seed: u64) -> Result<(Report, Vec<u32>), Failure> {
    let (n, k) = (u32::from(op.n), op.k());
    let size = op.a.bits() as u32 / 8;
    let mut a_data = vec![0u8; 8192];
    let mut b_data = vec![0u8; 8 * 128 * n.max(64) as usize / 8];
    let put = |data: &mut [u8], at: u32, bits: u32| {
        data[at as usize..(at + size) as usize].copy_from_slice(&bits.to_le_bytes()[..size as usize]);
    };
    for row in 0..64u32 {
        for depth in 0..k as u32 {
            let element = bits(op.a, row as usize * k + depth as usize);
            if op.a_in_registers {
                let mma = Mma { a: op.a, b: op.b, acc: op.acc };
                let (warp, row) = (row / 16, row % 16);
                for lane in 0..32 {
                    for r in 0..4 {
                        for i in 0..32 / op.a.bits() {
                            if mma.a_element(lane, r, i) == (row as usize, depth as usize) {
                                let word = 128 * r as u32 + 32 * warp + lane as u32;
                                put(&mut a_data, 4 * word + i as u32 * size, element);
                            }
                        }
                    }
                }
            } else {
                put(&mut a_data, a.offset(64, row, depth * size, size), element);
            }
        }
    }
    for column in 0..n {
        for depth in 0..k as u32 {
            let element = bits(op.b, column as usize * 31 + depth as usize * 3);
            put(&mut b_data, b.offset(n, column, depth * size, size), element);
        }
    }
    let mut emulator = Emulator::with_options(EmulatorOptions { seed, ..EmulatorOptions::default() });
    let (a_buffer, b_buffer) = (emulator.buffer("a", &a_data), emulator.buffer("b", &b_data));
    let out = emulator.uninitialized("out", 4 * 64 * n as usize);
    let program = program(op, a, b, bugs);
    let args = [a_buffer.arg(), b_buffer.arg(), out.arg()];
    emulator.launch(&program, [1, 1, 1], &args).map(|report| (report, emulator.read(out)))
}

const PLAIN: Place = Place { chunks: 1, transposed: false };

fn check(op: Wgmma, a: Place, b: Place) {
    let (report, found) =
        run(op, a, b, Bugs::default(), 0).unwrap_or_else(|failure| panic!("{op:?} {a:?} {b:?}: {failure}"));
    assert_eq!(report.count("wgmma.m64"), 8, "two by each of four warps");
    let k = op.k();
    for thread in 0..128 {
        for r in 0..op.acc_registers() {
            let (row, column) = Mma::acc_element(thread % 32, r % 4);
            let (row, column) = (row + 16 * (thread / 32), column + 8 * (r / 4));
            let sum: f64 = (0..k)
                .map(|i| value(op.a, bits(op.a, row * k + i)) * value(op.b, bits(op.b, column * 31 + i * 3)))
                .sum();
            let bits = found[128 * r + thread];
            let result =
                if op.acc == MmaTy::S32 { f64::from(bits as i32) } else { f32::from_bits(bits).into() };
            assert_eq!(result, 2.0 * sum, "{op:?} {a:?} {b:?} row {row} column {column}");
        }
    }
}

#[test]
fn every_layout_of_every_type_multiplies() {
    let types = [
        (MmaTy::S8, MmaTy::S8, MmaTy::S32),
        (MmaTy::U8, MmaTy::S8, MmaTy::S32),
        (MmaTy::E4M3, MmaTy::E4M3, MmaTy::F32),
        (MmaTy::F16, MmaTy::F16, MmaTy::F32),
        (MmaTy::BF16, MmaTy::BF16, MmaTy::F32),
    ];
    for (a, b, acc) in types {
        for n in [8, 64, 128] {
            for chunks in [1, 2, 4, 8] {
                for a_in_registers in [false, true] {
                    let op = Wgmma { n, a, b, acc, a_in_registers, b_transposed: false };
                    let place = Place { chunks, transposed: false };
                    check(op, place, place);
                    if a.bits() == 16 && u32::from(n) >= 8 * chunks {
                        let op = Wgmma { b_transposed: true, ..op };
                        check(op, PLAIN, Place { chunks, transposed: true });
                    }
                }
            }
        }
    }
}

const OP: Wgmma = Wgmma {
    n: 64,
    a: MmaTy::F16,
    b: MmaTy::F16,
    acc: MmaTy::F32,
    a_in_registers: false,
    b_transposed: false,
};

fn with(bugs: Bugs) -> Result<Report, Failure> {
    run(OP, PLAIN, PLAIN, bugs, 3).map(|(report, _)| report)
}

#[test]
fn what_a_product_lacks_is_told() {
    with(Bugs::default()).unwrap();
    let fence = with(Bugs { no_proxy_fence: true, ..Bugs::default() });
    fault_naming(fence, FaultKind::MissingProxyFence, &["`tile_b` + 0", "no fence.proxy.async"]);
    let fence = with(Bugs { no_fence: true, ..Bugs::default() });
    fault_naming(fence, FaultKind::MissingWgmmaFence, &["`score`", "wgmma.fence"]);
    let read = with(Bugs { no_wait: true, ..Bugs::default() });
    fault_naming(read, FaultKind::WgmmaInFlight, &["reads `score`", "the accumulator of a wgmma"]);
    let read = with(Bugs { wait_too_few: true, ..Bugs::default() });
    fault_naming(read, FaultKind::WgmmaInFlight, &["reads `score`"]);
    let write = with(Bugs { write_accumulator: true, ..Bugs::default() });
    fault_naming(write, FaultKind::WgmmaInFlight, &["writes `score`"]);
    let overwrite = with(Bugs { overwrite: true, ..Bugs::default() });
    fault_naming(overwrite, FaultKind::WgmmaInFlight, &["writes `tile_b`", "a wgmma of warpgroup 0 reads"]);
    let group = with(Bugs { one_warp_less: true, ..Bugs::default() });
    fault_naming(group, FaultKind::Divergent, &["3 warps"]);
    let lane = with(Bugs { divergent_warp: true, ..Bugs::default() });
    fault_naming(lane, FaultKind::Divergent, &["wgmma without lanes 0x80000000"]);
}

#[test]
fn operands_in_registers_are_out_of_reach() {
    let op = Wgmma { a_in_registers: true, ..OP };
    run(op, PLAIN, PLAIN, Bugs::default(), 1).unwrap();
    // A register of A is overwritten while the product is in flight.
    let mut raw = Raw::new(128);
    let tile = raw.shared("tile", 4096);
    let thread = raw.thread();
    let i = raw.add(thread, 0);
    raw.while_loop(
        |raw| raw.compare(Cmp::Lt, i, 1024),
        |raw| {
            let offset = raw.mul(i, 4);
            let place = raw.add(offset, tile);
            raw.store(Space::Shared, place, 0);
            raw.emit(Op::Lane(Lane::Add(Ty::S32)), &[i], &[i.operand(), 128.operand()]);
        },
    );
    raw.control(Control::FenceAsyncProxy, &[]);
    raw.barrier();
    let a: Vec<Reg> = (0..4).map(|_| raw.mov(0)).collect();
    let d: Vec<Reg> = (0..op.acc_registers()).map(|_| raw.mov(0)).collect();
    let no = raw.compare(Cmp::Ne, thread, thread);
    raw.matrix(Matrix::WgmmaFence, &[], &[]);
    let mut src: Vec<Operand> = a.iter().map(|reg| reg.operand()).collect();
    src.extend([raw.mov_wide(PLAIN.descriptor(tile, 64)).operand(), no.operand()]);
    raw.matrix(Matrix::Wgmma(op), &d, &src);
    raw.matrix(Matrix::WgmmaCommit, &[], &[]);
    raw.emit(Op::Lane(Lane::Mov(Ty::B32)), &[a[2]], &[1.operand()]);
    let result = Emulator::new().launch(&raw.done(), [1, 1, 1], &[]);
    fault_naming(result, FaultKind::WgmmaInFlight, &["an operand of a wgmma"]);
}

#[test]
fn descriptors_are_checked() {
    let mut raw = Raw::new(128);
    let d: Vec<Reg> = (0..OP.acc_registers()).map(|_| raw.mov(0)).collect();
    let thread = raw.thread();
    let yes = raw.compare(Cmp::Eq, thread, thread);
    raw.matrix(Matrix::WgmmaFence, &[], &[]);
    let (a, b) = (raw.mov_wide(PLAIN.descriptor(1024, 64)), raw.mov_wide(1 << 55));
    raw.matrix(Matrix::Wgmma(OP), &d, &[a.operand(), b.operand(), yes.operand()]);
    let result = Emulator::new().launch(&raw.done(), [1, 1, 1], &[]);
    fault_naming(result, FaultKind::Descriptor, &["bits set that mean nothing"]);
}
