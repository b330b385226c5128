//! The instruction set: for each instruction its PTX text, what it needs, and what it means.
//!
//! [`Lane`] instructions carry their whole meaning as [`Lane::eval`]. Those that touch memory or other threads say in
//! words and in the layouts beside them what an interpreter must do.

mod control;
mod lane;
mod matrix;
mod memory;
mod minifloat;

mod types;
mod warp;

pub use control::Control;
pub use lane::{Cmp, Convert, Lane};
pub use matrix::{Matrix, Mma, MmaBlockScaled, Wgmma};
pub(crate) use memory::SHARED_SYMBOL;
pub use memory::{Access, AtomicOp, Memory, Space, Special, Word};
pub use minifloat::{E2M1, E4M3, E5M2, Minifloat};
pub use types::{MmaTy, Ty};
pub use warp::{Redux, Shuffle, Vote, Warp};

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

impl Op {
    /// What the instruction needs.
    pub fn needs(self) -> Needs {
        match self {
            Op::Lane(op) => op.needs(),
            Op::Memory(op) => op.needs(),
            Op::Warp(op) => op.needs(),
            Op::Matrix(op) => op.needs(),
            Op::Control(op) => op.needs(),
        }
    }

    /// The instruction's line of PTX with its operands, without the semicolon; `param` names parameters.
    pub(crate) fn text(self, d: &[String], s: &[String], param: impl Fn(u32) -> String) -> String {
        match self {
            Op::Lane(op) => lane_text(op, d, s),
            Op::Memory(op) => op.text(d, s, param),
            Op::Warp(op) => op.text(d, s),
            Op::Matrix(op) => op.text(d, s),
            Op::Control(op) => op.text(d, s),
        }
    }
}

/// Lane instructions print alike, but for those that take registers apart or put them together.
fn lane_text(op: Lane, d: &[String], s: &[String]) -> String {
    let name = op.mnemonic();
    match op {
        // Its result is a register of 8 bits, which no other instruction here has; it lives in a scope of its own.
        Lane::Convert(Convert::F32ToE2M1x2) => {
            let scope =
                format!("{{ .reg .b8 pair; {name} pair, {}; cvt.u16.u8 {}, pair; }}", s.join(", "), d[0]);
            format!("{scope} mov.b16 {0}, {0}", d[0])
        }
        Lane::Join16 | Lane::Join32 => format!("{name} {}, {{{}, {}}}", d[0], s[0], s[1]),
        Lane::Low16 | Lane::Low32 => format!("{name} {{{}, _}}, {}", d[0], s[0]),
        Lane::High16 | Lane::High32 => format!("{name} {{_, {}}}, {}", d[0], s[0]),
        _ => format!("{name} {}, {}", d[0], s.join(", ")),
    }
}
