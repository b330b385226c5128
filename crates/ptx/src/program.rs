//! A finished kernel: registers, parameters, shared memory, and structured statements.

use std::fmt;
use std::panic::Location;

use crate::isa::{Control, Matrix, Op};
use crate::launch::Param;
use crate::target::{Needs, Target, Version};

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

/// Width of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Width {
    /// A predicate.
    Pred,
    /// 16 bits.
    B16,
    /// 32 bits.
    B32,
    /// 64 bits.
    B64,
}

impl Width {
    /// Declaration in PTX.
    pub const fn ptx(self) -> &'static str {
        match self {
            Width::Pred => ".pred",
            Width::B16 => ".b16",
            Width::B32 => ".b32",
            Width::B64 => ".b64",
        }
    }
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
    /// A constant's bits, extended with zeros, and whether it prints as a float.
    Const(Const),
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
    /// Double precision.
    F64(f64),
}

impl Const {
    /// The bits, extended with zeros.
    pub const fn bits(self) -> u64 {
        match self {
            Const::Pred(x) => x as u64,
            Const::B16(x) => x as u64,
            Const::I32(x) => x as u32 as u64,
            Const::I64(x) => x as u64,
            Const::F32(x) => x.to_bits() as u64,
            Const::F64(x) => x.to_bits(),
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
            Const::F64(x) => write!(f, "0d{:016X}", x.to_bits()),
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

    /// Whether the program needs a compiler that sees the whole of it, for its products of warpgroups or because it moves
    /// registers between warpgroups. A linker, which compiles for programs of several parts, ignores the latter, so that
    /// registers spill, and waits for each of the former at once (ptxas C7504, C7509): a third of the speed.
    pub fn needs_whole_compilation(&self) -> bool {
        let mut needs = false;
        self.for_each_instr(|instr| {
            needs |= matches!(
                instr.op,
                Op::Matrix(
                    Matrix::Wgmma(_) | Matrix::WgmmaFence | Matrix::WgmmaCommit | Matrix::WgmmaWait(_)
                ) | Op::Control(Control::RegistersIncrease(_) | Control::RegistersDecrease(_))
            );
        });
        needs
    }

    /// The first instruction that `target` does not have, with what it needs.
    pub fn missing_on(&self, target: Target) -> Option<(&Instr, Needs)> {
        let mut missing = None;
        self.for_each_instr(|instr| {
            let needs = instr.op.needs();
            if missing.is_none() && !needs.met_by(target) {
                missing = Some((instr, needs));
            }
        });
        missing
    }

    /// Lowest PTX version that knows every instruction used, and `target`.
    pub fn version(&self, target: Target) -> Version {
        let mut version = target.version();
        self.for_each_instr(|instr| version = version.max(instr.op.needs().version));
        version
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::{Code, kernel};
    use crate::isa::{MmaTy, Wgmma};

    #[test]
    fn a_program_with_any_instruction_of_warpgroups_is_compiled_as_a_whole() {
        let wgmma = Wgmma {
            n: 8,
            a: MmaTy::F16,
            b: MmaTy::F16,
            acc: MmaTy::F32,
            a_in_registers: false,
            b_transposed: false,
        };
        let product = |code: &Code| {
            let registers: Vec<Reg> = (0..wgmma.acc_registers()).map(|_| code.register::<f32>()).collect();
            let matrix = || code.thread().widen().operand();
            code.emit(Matrix::Wgmma(wgmma), &registers, &[matrix(), matrix(), code.thread().eq(0).operand()]);
        };
        let write: [&dyn Fn(&Code); 6] = [
            &product,
            &|code| code.emit(Matrix::WgmmaFence, &[], &[]),
            &|code| code.emit(Matrix::WgmmaCommit, &[], &[]),
            &|code| code.emit(Matrix::WgmmaWait(1), &[], &[]),
            &|code| code.more_registers(200),
            &|code| code.fewer_registers(40),
        ];
        for write in write {
            // An instruction counts wherever it stands.
            let nested = kernel("nested", 128, |code| {
                code.if_else(
                    code.thread().eq(0),
                    || code.barrier(),
                    || code.while_loop(|| code.thread().eq(1), || write(code)),
                );
            });
            for program in [kernel("flat", 128, |code| write(code)), nested] {
                let ptx = program.ptx(Target::SM_90A).unwrap();
                assert!(program.needs_whole_compilation(), "{ptx}");
                assert!(ptx.contains("wgmma.") || ptx.contains("setmaxnreg"), "{ptx}");
            }
        }
        let other = kernel("other", 128, |code| {
            code.barrier();
            code.commit_copies();
            code.fence_async_proxy();
        });
        assert!(!other.needs_whole_compilation());
    }
}
