//! The instruction set: a row for each instruction, with its PTX text, its operands, who has it, and what it means.
//!
//! [`Lane`] instructions carry their whole meaning as [`Lane::eval`]. Those that touch memory or other threads say in
//! words and in the layouts beside them what an interpreter must do.

mod arithmetic;
mod compare;
mod control;
mod convert;
mod lane;
mod matrix;
mod memory;
mod minifloat;
mod op;
mod row;
mod types;
mod warp;

pub use compare::Cmp;
pub use control::{Control, SharedWindow};
pub use convert::Convert;
pub use lane::Lane;
pub use matrix::{BlockScales, HalfMma, Matrix, Mma, MmaBlockScaled, Wgmma};
pub(crate) use memory::SHARED_SYMBOL;
pub use memory::{AtomicOp, LoadMode, Memory, Space, Special, StoreMode, Word};
pub use minifloat::{E2M1, E4M3, E5M2, Minifloat};
pub use op::Op;
pub use row::{Group, Groups, Instruction, MOST_OPERANDS};
pub use types::{MmaTy, Ty, Width};
pub use warp::{Redux, Shuffle, Vote, Warp};
