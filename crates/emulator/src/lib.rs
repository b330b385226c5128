//! Runs kernels of the kernel language on the CPU, with every check that a GPU lacks.

#![forbid(unsafe_code)]

mod access;
mod arithmetic;
mod banks;
mod barrier;
mod block;
mod bulk;
mod collective;
mod copies;
mod decode;
mod descriptor;
mod diagnosis;
mod emulator;
mod execute;
mod fault;
mod layout;
mod mbarrier;
mod memory;
mod races;
mod report;
mod schedule;
mod shadow;
mod shared;
mod tensor_core;
mod tensor_map;
mod warp;
mod wgmma;

pub use emulator::{Buffer, Emulator, EmulatorOptions};
pub use fault::{Failure, Fault, FaultKind};
pub use report::{Conflicts, Report, Sectors};
pub use tensor_core::Fp8Accumulation;
pub use tensor_map::{Swizzle, TensorMap};
