//! What the tests share: a builder of raw instructions, for those that the kernel language has no words for, and checks
//! of faults.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses a part, and fails as a test does")]

use std::panic::Location;

use sage_emulator::{Emulator, EmulatorOptions, Failure, Fault, FaultKind, Report};
use sage_ptx::isa::{
    Cmp, Control, Instruction, Lane, LoadMode, Matrix, Memory, Op, Space, Special, StoreMode, Ty, Warp,
    Width, Word,
};
use sage_ptx::program::{Const, Instr, Operand, Program, Reg, Register, SharedArray, Stmt};
use sage_ptx::{Param, ParamType};

/// An operand, from whatever a test has.
pub trait Source {
    fn operand(self) -> Operand;
}

impl Source for Reg {
    fn operand(self) -> Operand {
        Operand::Reg(self)
    }
}
impl Source for u32 {
    fn operand(self) -> Operand {
        Operand::Const(Const::I32(self as i32))
    }
}
impl Source for i32 {
    fn operand(self) -> Operand {
        Operand::Const(Const::I32(self))
    }
}
impl Source for u64 {
    fn operand(self) -> Operand {
        Operand::Const(Const::I64(self as i64))
    }
}
impl Source for f32 {
    fn operand(self) -> Operand {
        Operand::Const(Const::F32(self))
    }
}
impl Source for Operand {
    fn operand(self) -> Operand {
        self
    }
}

/// A program written instruction by instruction.
pub struct Raw {
    pub program: Program,
    open: Vec<Vec<Stmt>>,
}

impl Raw {
    pub fn new(threads: u32) -> Raw {
        let program = Program {
            name: "raw".into(),
            block: [threads, 1, 1],
            min_blocks: None,
            params: Vec::new(),
            shared: Vec::new(),
            registers: Vec::new(),
            body: Vec::new(),
        };
        Raw { program, open: vec![Vec::new()] }
    }

    pub fn done(mut self) -> Program {
        self.program.body = self.open.pop().unwrap();
        self.program
    }

    pub fn reg(&mut self, width: Width) -> Reg {
        self.program.registers.push(Register { width, name: None });
        Reg(self.program.registers.len() as u32 - 1)
    }

    pub fn b32(&mut self) -> Reg {
        self.reg(Width::B32)
    }

    pub fn named(&mut self, name: &str) -> Reg {
        let reg = self.b32();
        self.program.registers[reg.0 as usize].name = Some(name.into());
        reg
    }

    pub fn shared(&mut self, name: &str, bytes: u32) -> u32 {
        let end = self.program.shared.last().map_or(0, |array| array.offset + array.bytes);
        let offset = end.next_multiple_of(1024);
        self.program.shared.push(SharedArray { name: name.into(), bytes, align: 1024, offset });
        // Where the emulator begins is no secret: descriptors must name addresses.
        1024 + offset
    }

    fn parameter(&mut self, name: &str, ty: ParamType) -> u32 {
        self.program.params.push(Param { name: name.into(), ty });
        self.program.params.len() as u32 - 1
    }

    #[track_caller]
    pub fn pointer(&mut self, name: &str) -> Reg {
        let index = self.parameter(name, ParamType::Pointer);
        let reg = self.reg(Width::B64);
        self.emit(Op::Memory(Memory::Param { index, ty: Ty::U64 }), &[reg], &[]);
        reg
    }

    #[track_caller]
    pub fn tensor_map(&mut self, name: &str) -> Reg {
        let index = self.parameter(name, ParamType::TensorMap);
        let reg = self.reg(Width::B64);
        self.emit(Op::Memory(Memory::ParamAddress { index }), &[reg], &[]);
        reg
    }

    #[track_caller]
    pub fn emit(&mut self, op: Op, dst: &[Reg], src: &[Operand]) {
        self.emit_at(op, dst, src, Location::caller());
    }

    /// Closures do not know their callers.
    fn emit_at(&mut self, op: Op, dst: &[Reg], src: &[Operand], at: &'static Location<'static>) {
        let instr = Instr { op, dst: dst.to_vec(), src: src.to_vec(), at };
        self.open.last_mut().unwrap().push(Stmt::Instr(instr));
    }

    #[track_caller]
    pub fn control(&mut self, op: Control, src: &[Operand]) {
        self.emit(Op::Control(op), &[], src);
    }

    #[track_caller]
    pub fn matrix(&mut self, op: Matrix, dst: &[Reg], src: &[Operand]) {
        self.emit(Op::Matrix(op), dst, src);
    }

    #[track_caller]
    pub fn warp(&mut self, op: Warp, dst: &[Reg], src: &[Operand]) {
        self.emit(Op::Warp(op), dst, src);
    }

    #[track_caller]
    pub fn lane(&mut self, op: Lane, src: &[Operand]) -> Reg {
        let dst = self.reg(op.results().width);
        self.emit(Op::Lane(op), &[dst], src);
        dst
    }

    #[track_caller]
    pub fn mov(&mut self, value: impl Source) -> Reg {
        self.lane(Lane::Mov(Ty::B32), &[value.operand()])
    }

    #[track_caller]
    pub fn mov_wide(&mut self, value: u64) -> Reg {
        self.lane(Lane::Mov(Ty::B64), &[value.operand()])
    }

    #[track_caller]
    pub fn add(&mut self, a: impl Source, b: impl Source) -> Reg {
        self.lane(Lane::Add(Ty::S32), &[a.operand(), b.operand()])
    }

    #[track_caller]
    pub fn mul(&mut self, a: impl Source, b: impl Source) -> Reg {
        self.lane(Lane::Mul(Ty::S32), &[a.operand(), b.operand()])
    }

    #[track_caller]
    pub fn compare(&mut self, cmp: Cmp, a: impl Source, b: impl Source) -> Reg {
        self.lane(Lane::Set(cmp, Ty::S32), &[a.operand(), b.operand()])
    }

    /// Index of the thread.
    #[track_caller]
    pub fn thread(&mut self) -> Reg {
        let reg = self.b32();
        self.emit(Op::Memory(Memory::Special(Special::TidX)), &[reg], &[]);
        reg
    }

    /// `base + 4 · index`, in global memory.
    #[track_caller]
    pub fn at(&mut self, base: Reg, index: impl Source, bytes: i32) -> Reg {
        self.lane(Lane::MadWide(Ty::S32), &[index.operand(), bytes.operand(), base.operand()])
    }

    #[track_caller]
    pub fn load(&mut self, space: Space, address: impl Source) -> Reg {
        let reg = self.b32();
        let op = Memory::Load { space, word: Word::B32, count: 1, offset: 0, mode: LoadMode::Plain };
        self.emit(Op::Memory(op), &[reg], &[address.operand()]);
        reg
    }

    #[track_caller]
    pub fn store(&mut self, space: Space, address: impl Source, value: impl Source) {
        let op = Memory::Store { space, word: Word::B32, count: 1, offset: 0, mode: StoreMode::Plain };
        self.emit(Op::Memory(op), &[], &[address.operand(), value.operand()]);
    }

    #[track_caller]
    pub fn barrier(&mut self) {
        self.control(Control::Barrier { threads: None }, &[0.operand()]);
    }

    fn block(&mut self, write: impl FnOnce(&mut Raw)) -> Vec<Stmt> {
        self.open.push(Vec::new());
        write(self);
        self.open.pop().unwrap()
    }

    #[track_caller]
    pub fn when(&mut self, cond: Reg, then: impl FnOnce(&mut Raw)) {
        let at = Location::caller();
        let then = self.block(then);
        self.open.last_mut().unwrap().push(Stmt::If { cond, then, otherwise: Vec::new(), at });
    }

    #[track_caller]
    pub fn while_loop(&mut self, test: impl FnOnce(&mut Raw) -> Reg, body: impl FnOnce(&mut Raw)) {
        let at = Location::caller();
        let mut cond = None;
        let test = self.block(|raw| cond = Some(test(raw)));
        let body = self.block(body);
        self.open.last_mut().unwrap().push(Stmt::While { test, cond: cond.unwrap(), body, at });
    }

    /// Spins until the phase of `parity` is complete.
    #[track_caller]
    pub fn mbarrier_wait(&mut self, address: impl Source, parity: impl Source) {
        let (address, parity) = (address.operand(), parity.operand());
        let (again, at) = (self.reg(Width::Pred), Location::caller());
        self.while_loop(
            |raw| {
                let done = raw.reg(Width::Pred);
                raw.emit_at(Op::Control(Control::MbarrierTryWait), &[done], &[address, parity], at);
                raw.emit_at(Op::Lane(Lane::Not(Ty::Pred)), &[again], &[done.operand()], at);
                again
            },
            |_| {},
        );
    }
}

/// Launches with several interleavings; every one must end alike.
pub fn interleaved(program: &Program, data: &[i32]) -> Result<(Report, Vec<i32>), Failure> {
    let mut last = None;
    for seed in 0..6 {
        let mut emulator = Emulator::with_options(EmulatorOptions { seed, ..EmulatorOptions::default() });
        let (x, y) = (emulator.buffer("x", data), emulator.uninitialized("y", 4 * data.len()));
        let report = emulator.launch(program, [1, 1, 1], &[x.arg(), y.arg()][..program.params.len()])?;
        let result = emulator.read(y);
        if let Some((_, before)) = &last {
            assert_eq!(before, &result, "seed {seed}");
        }
        last = Some((report, result));
    }
    Ok(last.unwrap())
}

/// The one fault of a launch, which must be of this kind and lie in the calling test's file.
#[track_caller]
pub fn fault(result: Result<Report, Failure>, kind: FaultKind) -> Fault {
    let here = Location::caller().file();
    let failure = result.expect_err("the kernel is wrong, and passed");
    let fault = failure.first().expect("a failure has a fault").clone();
    assert_eq!(fault.kind, kind, "{failure}");
    assert_eq!(fault.at.map(Location::file), Some(here), "{failure}");
    assert!(failure.to_string().contains(here), "{failure}");
    fault
}

/// As [`fault`], whose text must name all of `words`.
#[track_caller]
pub fn fault_naming(result: Result<Report, Failure>, kind: FaultKind, words: &[&str]) -> Fault {
    let fault = fault(result, kind);
    for word in words {
        assert!(fault.to_string().contains(word), "`{word}` is missing in: {fault}");
    }
    fault
}
