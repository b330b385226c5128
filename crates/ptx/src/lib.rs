//! A kernel language in Rust: kernels are functions that build a [`Program`], which prints as PTX for a GPU's driver
//! and runs in the emulator.

#![forbid(unsafe_code)]

mod arrays;
#[cfg(test)]
mod assembled;
mod block_scaled;
mod bulk;
mod code;
mod flow;
mod fragment;
pub mod isa;
mod launch;
mod lower;
mod numbers;
mod operand;
mod operators;
mod pointer;
mod printer;
pub mod program;
mod requirements;
mod rows;
mod scalar;
mod target;
mod threads;
mod tile;
mod validate;
mod value;
mod var;
mod warp;
mod warpgroup;

pub use arrays::ParamScalar;
pub use block_scaled::{SCALED_DEPTH, ScaledA, ScaledB};
pub use bulk::{Mbarrier, Mbarriers};
pub use code::{Code, kernel};
pub use fragment::{
    Accumulator, CHUNK_BYTES, ChunkAddress, E2M1, E4M3, E5M2, FragmentA, FragmentB, FragmentSource,
    MmaAccumulator, MmaElement, RoundedElement, S4, SharedTile,
};
pub use launch::{Arg, BoxedTensor, Param, ParamType, TensorMapBytes};
pub use operand::{OperandTile, OperandVars};
pub use pointer::{AddressSpace, Global, GlobalSpace, Index, Pointer, Shared, SharedSpace, Stored};
pub use printer::PtxError;
pub use program::Program;
pub use requirements::Unsupported;
pub use rows::{Rows, SLOT_ROWS, lane_column, lane_row};
pub use scalar::{BF16x2, F16x2, Half, Scalar};
pub use target::{Needs, Target, Version};
pub use tile::{FloatAccumulator, Tile};
pub use validate::Invalid;
pub use value::{Use, Val};
pub use var::Var;
pub use warpgroup::{MatrixDescriptor, PanelMatrix, WarpgroupA, warpgroup_product};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
