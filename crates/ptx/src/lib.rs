//! A kernel language in Rust: kernels are functions that build a [`Program`], which prints as PTX for a GPU's driver and
//! runs in the emulator.

#![forbid(unsafe_code)]

#[cfg(test)]
mod assembled;
mod bulk;
mod code;
mod fragment;
pub mod isa;
mod launch;
mod operand;
mod pointer;
mod printer;
pub mod program;
mod rows;
mod target;
mod tile;
mod value;
mod warpgroup;

pub use bulk::{Mbarrier, Mbarriers};
pub use code::{Code, ParamScalar, kernel};
pub use fragment::{
    Accumulator, CHUNK_BYTES, ChunkAddress, E4M3, E5M2, FragmentA, FragmentB, FragmentSource, MmaAccumulator,
    MmaElement, RoundedElement, S4, SharedTile,
};
pub use launch::{Arg, BoxedTensor, Param, ParamType, TensorMapBytes};
pub use operand::{OperandTile, OperandVars};
pub use pointer::{AddressSpace, Global, GlobalSpace, Index, Pointer, Shared, SharedSpace, Stored};
pub use printer::Unsupported;
pub use program::Program;
pub use rows::{Rows, SLOT_ROWS, lane_column, lane_row};
pub use target::{Needs, Target, Version};
pub use tile::{FloatAccumulator, Tile};
pub use value::{BF16x2, F16x2, Half, Scalar, Use, Val, Var};
pub use warpgroup::{MatrixDescriptor, PanelMatrix, WarpgroupA, warpgroup_product};
