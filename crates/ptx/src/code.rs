//! A kernel while it is being written: what its values, variables and statements add to.

use std::cell::RefCell;
use std::panic::Location;

use crate::isa::{Op, Width};
use crate::launch::Param;
use crate::program::{Instr, Operand, Program, Reg, Register, SharedArray, Stmt};

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

    pub(crate) fn push(&self, stmt: Stmt) {
        if let Some(block) = self.open.borrow_mut().last_mut() {
            block.push(stmt);
        }
    }

    /// A new register.
    pub(crate) fn register(&self, width: Width) -> Reg {
        let registers = &mut self.program.borrow_mut().registers;
        registers.push(Register { width, name: None });
        Reg(registers.len() as u32 - 1)
    }

    pub(crate) fn name_register(&self, reg: Reg, name: &str) {
        self.program.borrow_mut().registers[reg.0 as usize].name = Some(name.to_owned());
    }

    /// Adds a parameter; its index.
    pub(crate) fn add_param(&self, param: Param) -> u32 {
        let params = &mut self.program.borrow_mut().params;
        params.push(param);
        params.len() as u32 - 1
    }

    /// Adds an array in shared memory behind the others; its index and offset.
    pub(crate) fn add_shared(&self, name: &str, bytes: u32, align: u32) -> (u32, u32) {
        let shared = &mut self.program.borrow_mut().shared;
        let end = shared.last().map_or(0, |array| array.offset + array.bytes);
        let offset = end.next_multiple_of(align);
        shared.push(SharedArray { name: name.to_owned(), bytes, align, offset });
        (shared.len() as u32 - 1, offset)
    }

    /// The statements that `write` adds, as a block of their own.
    pub(crate) fn block(&self, write: impl FnOnce()) -> Vec<Stmt> {
        self.open.borrow_mut().push(Vec::new());
        write();
        self.open.borrow_mut().pop().unwrap_or_default()
    }

    /// A comment in the printed kernel.
    pub fn note(&self, text: impl Into<String>) {
        self.push(Stmt::Note(text.into()));
    }

    /// Asks that a multiprocessor can hold `blocks` blocks at once, which bounds the registers of a thread.
    pub fn min_blocks(&self, blocks: u32) {
        self.program.borrow_mut().min_blocks = Some(blocks);
    }
}
