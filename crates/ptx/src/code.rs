//! A kernel while it is being written: parameters, shared memory, variables and control flow.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::Location;

use crate::isa::{Control, Lane, Memory, Op, Special, Vote, Warp};
use crate::launch::{Param, ParamType};
use crate::pointer::{GlobalSpace, Pointer, SharedSpace, Stored};
use crate::program::{Instr, Operand, Program, Reg, Register, SharedArray, Stmt};
use crate::value::{Scalar, Use, Val, Var};

/// Writes a kernel of `threads` threads a block: `write` is called once, with the code that it adds to.
pub fn kernel(name: &str, threads: u32, write: impl for<'k> FnOnce(&'k Code)) -> Program {
    let code = Code {
        program: RefCell::new(Program {
            name: name.to_owned(),
            block: [threads, 1, 1],
            min_blocks: None,
            params: Vec::new(),
            shared: Vec::new(),
            registers: Vec::new(),
            body: Vec::new(),
        }),
        open: RefCell::new(vec![Vec::new()]),
    };
    write(&code);
    let mut program = code.program.into_inner();
    program.body = code.open.into_inner().pop().unwrap_or_default();
    program
}

/// A kernel being written. Values of the kernel borrow it, and operators on them add instructions to it.
#[derive(Debug)]
pub struct Code {
    program: RefCell<Program>,
    /// Statements of the blocks being written, the innermost last.
    open: RefCell<Vec<Vec<Stmt>>>,
}

impl Code {
    /// Adds an instruction with its results and operands.
    #[track_caller]
    pub(crate) fn emit(&self, op: impl Into<Op>, dst: &[Reg], src: &[Operand]) {
        let at = Location::caller();
        self.push(Stmt::Instr(Instr { op: op.into(), dst: dst.to_vec(), src: src.to_vec(), at }));
    }

    fn push(&self, stmt: Stmt) {
        if let Some(block) = self.open.borrow_mut().last_mut() {
            block.push(stmt);
        }
    }

    /// A new register for values of type `T`.
    pub(crate) fn register<T: Scalar>(&self) -> Reg {
        let registers = &mut self.program.borrow_mut().registers;
        registers.push(Register { width: T::TY.width(), name: None });
        Reg(registers.len() as u32 - 1)
    }

    pub(crate) fn name_register(&self, reg: Reg, name: &str) {
        self.program.borrow_mut().registers[reg.0 as usize].name = Some(name.to_owned());
    }

    /// The result of an instruction of one result.
    #[track_caller]
    pub(crate) fn value<T: Scalar>(&self, op: impl Into<Op>, src: &[Operand]) -> Val<'_, T> {
        let reg = self.register::<T>();
        self.emit(op, &[reg], src);
        Val::of_register(self, reg)
    }

    /// The result of a lane instruction, computed at once where all its operands are constants.
    #[track_caller]
    pub(crate) fn lane<T: Scalar>(&self, op: Lane, src: &[Operand]) -> Val<'_, T> {
        let constants: Option<Vec<u64>> = src.iter().map(Operand::constant_bits).collect();
        match constants {
            Some(bits) => Val::of_bits(self, op.eval(&bits)),
            None => self.value(op, src),
        }
    }

    // Parameters and shared memory.

    fn parameter<T: Scalar>(&self, name: &str, ty: ParamType) -> Val<'_, T> {
        let index = {
            let params = &mut self.program.borrow_mut().params;
            params.push(Param { name: name.to_owned(), ty });
            params.len() as u32 - 1
        };
        self.value::<T>(Memory::Param { index, ty: T::TY }, &[]).named(name)
    }

    /// A parameter: a number.
    pub fn param<T: ParamScalar>(&self, name: &str) -> Val<'_, T> {
        self.parameter(name, T::PARAM)
    }

    /// A parameter: the address of an array in device memory.
    pub fn global<T: Stored>(&self, name: &str) -> Pointer<'_, GlobalSpace, T> {
        Pointer::new(self.parameter::<u64>(name, ParamType::Pointer))
    }

    /// A parameter: a tensor map; its address.
    pub fn tensor_map(&self, name: &str) -> Val<'_, u64> {
        let index = {
            let params = &mut self.program.borrow_mut().params;
            params.push(Param { name: name.to_owned(), ty: ParamType::TensorMap });
            params.len() as u32 - 1
        };
        self.value::<u64>(Memory::ParamAddress { index }, &[]).named(name)
    }

    /// An array of `len` elements in shared memory, aligned for every access and swizzle that fits it.
    pub fn shared<T: Stored>(&self, name: &str, len: usize) -> Pointer<'_, SharedSpace, T> {
        const MOST: u32 = 1024;
        let bytes = len as u32 * T::WORD.bytes();
        let align = bytes.next_power_of_two().clamp(16, MOST);
        let (array, offset) = {
            let shared = &mut self.program.borrow_mut().shared;
            let end = shared.last().map_or(0, |array| array.offset + array.bytes);
            let offset = end.next_multiple_of(align);
            shared.push(SharedArray { name: name.to_owned(), bytes, align, offset });
            (shared.len() as u32 - 1, offset)
        };
        Pointer::new(self.value::<u32>(Memory::SharedAddress { array, offset }, &[]).named(name))
    }

    /// Asks that a multiprocessor can hold `blocks` blocks at once, which bounds the registers of a thread.
    pub fn min_blocks(&self, blocks: u32) {
        self.program.borrow_mut().min_blocks = Some(blocks);
    }

    // Who am I.

    fn special(&self, special: Special) -> Val<'_, i32> {
        self.value(Memory::Special(special), &[])
    }

    /// Index of the thread in its block.
    pub fn thread(&self) -> Val<'_, i32> {
        self.special(Special::TidX).named("thread")
    }

    /// Index of the lane in its warp.
    pub fn lane_index(&self) -> Val<'_, i32> {
        (self.special(Special::TidX) & 31).named("lane")
    }

    /// Index of the warp in its block, known to be the same in all lanes.
    pub fn warp_index(&self) -> Val<'_, i32> {
        let warp = self.special(Special::TidX) >> 5;
        warp.shuffle(0).named("warp")
    }

    /// Index of the block in the grid, along x, y and z.
    pub fn block_index(&self) -> [Val<'_, i32>; 3] {
        [Special::CtaIdX, Special::CtaIdY, Special::CtaIdZ]
            .map(|special| self.special(special).named("block"))
    }

    /// Blocks of the grid along x, y and z.
    pub fn grid(&self) -> [Val<'_, i32>; 3] {
        [Special::NumCtaX, Special::NumCtaY, Special::NumCtaZ]
            .map(|special| self.special(special).named("grid"))
    }

    // Values.

    /// A constant.
    pub fn constant<T: Scalar>(&self, x: T) -> Val<'_, T> {
        Val::of_bits(self, x.bits())
    }

    /// A variable with a first value.
    #[track_caller]
    pub fn var<'k, T: Scalar>(&'k self, first: impl Use<'k, T>) -> Var<'k, T> {
        let var = Var::new(self);
        var.set(first);
        var
    }

    /// A comment in the printed kernel.
    pub fn note(&self, text: impl Into<String>) {
        self.push(Stmt::Note(text.into()));
    }

    // Control flow.

    fn block(&self, write: impl FnOnce()) -> Vec<Stmt> {
        self.open.borrow_mut().push(Vec::new());
        write();
        self.open.borrow_mut().pop().unwrap_or_default()
    }

    /// Executes `then` in the lanes where `cond` holds.
    #[track_caller]
    pub fn when(&self, cond: Val<'_, bool>, then: impl FnOnce()) {
        self.if_else(cond, then, || {});
    }

    /// Executes `then` in the lanes where `cond` holds, `otherwise` in the others.
    #[track_caller]
    pub fn if_else(&self, cond: Val<'_, bool>, then: impl FnOnce(), otherwise: impl FnOnce()) {
        match cond.operand() {
            Operand::Const(known) if known.bits() == 1 => then(),
            Operand::Const(_) => otherwise(),
            Operand::Reg(cond) => {
                let at = Location::caller();
                let (then, otherwise) = (self.block(then), self.block(otherwise));
                self.push(Stmt::If { cond, then, otherwise, at });
            }
        }
    }

    /// Executes `body` as long as `test` holds.
    #[track_caller]
    pub fn while_loop<'k>(&'k self, test: impl FnOnce() -> Val<'k, bool>, body: impl FnOnce()) {
        let at = Location::caller();
        let mut cond = None;
        let test = self.block(|| cond = Some(test().in_register()));
        let body = self.block(body);
        if let Some(cond) = cond {
            self.push(Stmt::While { test, cond, body, at });
        }
    }

    /// Executes `body` for each index from `start` on, below `end`.
    #[track_caller]
    pub fn range<'k>(
        &'k self,
        start: impl Use<'k, i32>,
        end: impl Use<'k, i32>,
        body: impl FnOnce(Val<'k, i32>),
    ) {
        self.range_by(start, end, 1, body);
    }

    /// Executes `body` for every `step`-th index from `start` on, below `end`.
    #[track_caller]
    pub fn range_by<'k>(
        &'k self,
        start: impl Use<'k, i32>,
        end: impl Use<'k, i32>,
        step: impl Use<'k, i32>,
        body: impl FnOnce(Val<'k, i32>),
    ) {
        let (end, step) = (end.value(self), step.value(self));
        let index = self.var(start).named("i");
        self.while_loop(
            || index.get().lt(end),
            || {
                let i = index.get();
                body(i);
                index.set(i + step);
            },
        );
    }

    /// Executes `body` with every index of a range that is known now: the code is repeated.
    pub fn unrolled(&self, range: Range<usize>, body: impl FnMut(usize)) {
        range.for_each(body);
    }

    /// The thread ends where `cond` holds.
    #[track_caller]
    pub fn exit_when(&self, cond: Val<'_, bool>) {
        self.when(cond, || self.emit(Control::Exit, &[], &[]));
    }

    // Threads together.

    /// Waits for all threads of the block, and sees what they wrote to shared memory before.
    #[track_caller]
    pub fn barrier(&self) {
        self.emit(Control::Barrier { threads: None }, &[], &[self.constant(0i32).operand()]);
    }

    /// Waits at barrier `id` (0–15) for `threads` threads.
    #[track_caller]
    pub fn named_barrier<'k>(&'k self, id: impl Use<'k, i32>, threads: u32) {
        self.emit(Control::Barrier { threads: Some(threads) }, &[], &[id.value(self).operand()]);
    }

    /// Arrives at barrier `id` (0–15) of `threads` threads without waiting.
    #[track_caller]
    pub fn arrive<'k>(&'k self, id: impl Use<'k, i32>, threads: u32) {
        self.emit(Control::BarrierArrive { threads }, &[], &[id.value(self).operand()]);
    }

    /// Waits for the other lanes of the warp, and sees what they wrote before.
    #[track_caller]
    pub fn warp_sync(&self) {
        self.emit(Warp::Sync, &[], &[]);
    }

    /// Orders this thread's accesses to global memory for the whole device.
    #[track_caller]
    pub fn fence_device(&self) {
        self.emit(Control::FenceDevice, &[], &[]);
    }

    /// Makes this thread's writes to shared memory visible to the copy engine and to `wgmma`.
    #[track_caller]
    pub fn fence_async_proxy(&self) {
        self.emit(Control::FenceAsyncProxy, &[], &[]);
    }

    /// Puts the asynchronous copies that this thread started into a group.
    #[track_caller]
    pub fn commit_copies(&self) {
        self.emit(Control::CopyAsyncCommit, &[], &[]);
    }

    /// Waits until at most `pending` of this thread's latest groups of copies are in flight.
    #[track_caller]
    pub fn wait_copies(&self, pending: u32) {
        self.emit(Control::CopyAsyncWait(pending), &[], &[]);
    }

    /// Whether `cond` holds in some lane of the warp.
    #[track_caller]
    pub fn any<'k>(&'k self, cond: Val<'k, bool>) -> Val<'k, bool> {
        self.value(Warp::Vote(Vote::Any), &[cond.in_register_operand()])
    }

    /// Whether `cond` holds in every lane of the warp.
    #[track_caller]
    pub fn all<'k>(&'k self, cond: Val<'k, bool>) -> Val<'k, bool> {
        self.value(Warp::Vote(Vote::All), &[cond.in_register_operand()])
    }

    /// In which lanes of the warp `cond` holds, a bit for each.
    #[track_caller]
    pub fn ballot<'k>(&'k self, cond: Val<'k, bool>) -> Val<'k, u32> {
        self.value(Warp::Vote(Vote::Ballot), &[cond.in_register_operand()])
    }

    /// Sleeps about `nanoseconds`.
    #[track_caller]
    pub fn sleep(&self, nanoseconds: i32) {
        self.emit(Control::Sleep, &[], &[self.constant(nanoseconds).operand()]);
    }

    /// Whether this is the one lane of the warp that is elected.
    #[track_caller]
    pub fn elect(&self) -> Val<'_, bool> {
        self.value(Warp::Elect, &[])
    }

    /// Changes the registers that each thread of this warpgroup may use: more registers, waiting until there are that many.
    #[track_caller]
    pub fn more_registers(&self, count: u32) {
        self.emit(Control::RegistersIncrease(count), &[], &[]);
    }

    /// Gives registers of this warpgroup back: fewer for each thread.
    #[track_caller]
    pub fn fewer_registers(&self, count: u32) {
        self.emit(Control::RegistersDecrease(count), &[], &[]);
    }
}

/// Numbers that a kernel takes as parameters.
pub trait ParamScalar: Scalar {
    /// The parameter's type.
    const PARAM: ParamType;
}

impl ParamScalar for i32 {
    const PARAM: ParamType = ParamType::I32;
}
impl ParamScalar for u32 {
    const PARAM: ParamType = ParamType::U32;
}
impl ParamScalar for i64 {
    const PARAM: ParamType = ParamType::I64;
}
impl ParamScalar for f32 {
    const PARAM: ParamType = ParamType::F32;
}

impl From<Lane> for Op {
    fn from(op: Lane) -> Op {
        Op::Lane(op)
    }
}
impl From<Memory> for Op {
    fn from(op: Memory) -> Op {
        Op::Memory(op)
    }
}
impl From<Warp> for Op {
    fn from(op: Warp) -> Op {
        Op::Warp(op)
    }
}
impl From<crate::isa::Matrix> for Op {
    fn from(op: crate::isa::Matrix) -> Op {
        Op::Matrix(op)
    }
}
impl From<Control> for Op {
    fn from(op: Control) -> Op {
        Op::Control(op)
    }
}

/// A type that a value carries without holding one.
pub(crate) type Phantom<T> = PhantomData<fn() -> T>;
