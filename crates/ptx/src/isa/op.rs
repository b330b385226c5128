//! Any instruction.

use super::control::Control;
use super::lane::Lane;
use super::matrix::Matrix;
use super::memory::Memory;
use super::row::{Group, Groups, Instruction, fill};
use super::warp::Warp;
use crate::target::Needs;

/// An instruction without its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Each lane by itself: `dst[0]` = its function of `src`.
    Lane(Lane),
    /// Memory and special registers.
    Memory(Memory),
    /// The lanes of a warp together.
    Warp(Warp),
    /// Tensor cores.
    Matrix(Matrix),
    /// Barriers and asynchronous copies.
    Control(Control),
}

macro_rules! op_of {
    ($($family:ident),+) => {$(
        impl From<$family> for Op {
            fn from(op: $family) -> Op {
                Op::$family(op)
            }
        }
    )+};
}

op_of! { Lane, Memory, Warp, Matrix, Control }

impl Op {
    fn instruction(&self) -> &dyn Instruction {
        match self {
            Op::Lane(op) => op,
            Op::Memory(op) => op,
            Op::Warp(op) => op,
            Op::Matrix(op) => op,
            Op::Control(op) => op,
        }
    }

    /// Index of the parameter that the instruction reads.
    pub(crate) fn param(&self) -> Option<u32> {
        match *self {
            Op::Memory(Memory::Param { index, .. } | Memory::ParamAddress { index }) => Some(index),
            _ => None,
        }
    }

    /// The instruction's line of PTX with its operands, without the semicolon; `param` is the name of the parameter
    /// that it reads.
    pub(crate) fn text(&self, results: &[String], operands: &[String], param: &str) -> String {
        fill(&self.template(), results, operands, self.operands(), param)
    }
}

impl Instruction for Op {
    fn exists(&self) -> bool {
        self.instruction().exists()
    }

    fn results(&self) -> Group {
        self.instruction().results()
    }

    fn operands(&self) -> Groups {
        self.instruction().operands()
    }

    fn needs(&self) -> Needs {
        self.instruction().needs()
    }

    fn template(&self) -> String {
        self.instruction().template()
    }
}
