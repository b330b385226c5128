//! Every GPU kernel of SageAttention, as functions from a configuration to a program.

#![forbid(unsafe_code)]

pub mod attention;
pub mod catalog;
pub mod combine;
mod counters;
pub mod decode;
pub mod forward;
mod fp4;
mod gpu_model;
mod grid;
mod integer;
mod kernel;
mod key_order;
mod least_bias;
mod machine;
mod operand;
mod params;
pub mod pass;
pub mod predict;
pub mod preprocess;
mod rotation;
mod sequence;
mod sinks;
pub mod sparse;
pub mod tail;
mod tensor;
mod tiling;
pub mod tuning;

pub use gpu_model::{GpuModel, Rates};
pub use kernel::Kernel;
pub use key_order::KeyOrder;
pub use machine::Machine;
pub use operand::{Element, Operand, OperandSource, Operands, Scales, ValueForm};
pub use sequence::{KEY_TILE, LengthArgs, Lengths, seen_key_tiles, total_key_tiles};
pub use sinks::SinkArgs;
pub use tensor::TensorArg;
pub use tiling::{Copies, Engine, Tiling, WarpTiling, WarpgroupTiling};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
