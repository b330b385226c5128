//! A finished kernel: registers, parameters, shared memory, and structured statements.

use std::fmt;
use std::panic::Location;

use crate::isa::{Op, Width};
use crate::launch::Param;

/// A kernel, ready to be printed for a GPU or run by the emulator.
#[derive(Clone, Debug)]
pub struct Program {
    /// Entry name.
    pub name: String,
    /// Threads of a block along x, y and z.
    pub block: [u32; 3],
    /// Blocks that a multiprocessor should hold at once, which bounds the registers of a thread.
    pub min_blocks: Option<u32>,
    /// Parameters, in order.
    pub params: Vec<Param>,
    /// Arrays in shared memory.
    pub shared: Vec<SharedArray>,
    /// Registers; a [`Reg`] is an index here.
    pub registers: Vec<Register>,
    /// What every thread executes.
    pub body: Vec<Stmt>,
}

/// Index of a register in [`Program::registers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reg(pub u32);

/// A virtual register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Register {
    /// Width.
    pub width: Width,
    /// Name in the kernel's source, where it has one.
    pub name: Option<String>,
}

/// An array in shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedArray {
    /// Name in the kernel's source.
    pub name: String,
    /// Size.
    pub bytes: u32,
    /// Alignment, a power of two.
    pub align: u32,
    /// Offset from the start of the block's shared memory.
    pub offset: u32,
}

/// A statement.
#[derive(Clone, Debug)]
pub enum Stmt {
    /// One instruction.
    Instr(Instr),
    /// Lanes where `cond` holds execute `then`, the others `otherwise`.
    If {
        /// A predicate register.
        cond: Reg,
        /// Where it is true.
        then: Vec<Stmt>,
        /// Where it is false.
        otherwise: Vec<Stmt>,
        /// Where the kernel's source says so.
        at: &'static Location<'static>,
    },
    /// Lanes execute `test`, and leave where `cond` is then false; the others execute `body` and start again.
    While {
        /// Computes `cond`.
        test: Vec<Stmt>,
        /// A predicate register.
        cond: Reg,
        /// Repeated.
        body: Vec<Stmt>,
        /// Where the kernel's source says so.
        at: &'static Location<'static>,
    },
    /// A comment.
    Note(String),
}

/// An instruction with its operands, in the order of [`Op`]'s description.
#[derive(Clone, Debug)]
pub struct Instr {
    /// What is done.
    pub op: Op,
    /// Registers written.
    pub dst: Vec<Reg>,
    /// Operands read.
    pub src: Vec<Operand>,
    /// Where the kernel's source says so.
    pub at: &'static Location<'static>,
}

/// An operand: a register or a constant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operand {
    /// A register.
    Reg(Reg),
    /// A constant.
    Const(Const),
}

impl Operand {
    /// The bits of a constant, extended with zeros.
    pub(crate) const fn constant_bits(&self) -> Option<u64> {
        match self {
            Operand::Const(constant) => Some(constant.bits()),
            Operand::Reg(_) => None,
        }
    }
}

/// A constant.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Const {
    /// A predicate.
    Pred(bool),
    /// 16 bits.
    B16(u16),
    /// 32-bit integer.
    I32(i32),
    /// 64-bit integer.
    I64(i64),
    /// Single precision.
    F32(f32),
}

impl Const {
    /// Width of a register that it fits.
    pub const fn width(self) -> Width {
        match self {
            Const::Pred(_) => Width::Pred,
            Const::B16(_) => Width::B16,
            Const::I32(_) | Const::F32(_) => Width::B32,
            Const::I64(_) => Width::B64,
        }
    }

    /// The bits, extended with zeros.
    pub const fn bits(self) -> u64 {
        match self {
            Const::Pred(x) => x as u64,
            Const::B16(x) => x as u64,
            Const::I32(x) => x as u32 as u64,
            Const::I64(x) => x as u64,
            Const::F32(x) => x.to_bits() as u64,
        }
    }
}

/// As PTX writes it: floats by their bits, so that nothing is rounded on the way.
impl fmt::Display for Const {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Const::Pred(x) => write!(f, "{}", *x as u8),
            Const::B16(x) => write!(f, "{x:#06x}"),
            Const::I32(x) => write!(f, "{x}"),
            Const::I64(x) => write!(f, "{x}"),
            Const::F32(x) => write!(f, "0f{:08X}", x.to_bits()),
        }
    }
}

impl Program {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    /// Bytes of shared memory of a block, all of it dynamic.
    pub fn shared_bytes(&self) -> u32 {
        self.shared.iter().map(|array| array.offset + array.bytes).max().unwrap_or(0)
    }

    /// Calls `visit` with every instruction, in the order of the source.
    pub fn for_each_instr<'a>(&'a self, mut visit: impl FnMut(&'a Instr)) {
        fn walk<'a>(stmts: &'a [Stmt], visit: &mut impl FnMut(&'a Instr)) {
            for stmt in stmts {
                match stmt {
                    Stmt::Instr(instr) => visit(instr),
                    Stmt::If { then, otherwise, .. } => {
                        walk(then, visit);
                        walk(otherwise, visit);
                    }
                    Stmt::While { test, body, .. } => {
                        walk(test, visit);
                        walk(body, visit);
                    }
                    Stmt::Note(_) => {}
                }
            }
        }
        walk(&self.body, &mut visit);
    }
}
