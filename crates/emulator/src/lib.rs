//! Runs kernels of the kernel language on the CPU, with every check that a GPU lacks.
//!
//! ```
//! use sage_emulator::{Emulator, FaultKind};
//! use sage_ptx::kernel;
//!
//! // Each thread adds its neighbour's number to its own.
//! let program = kernel("neighbours", 64, |k| {
//!     let (x, y) = (k.global::<f32>("x"), k.global::<f32>("y"));
//!     let thread = k.thread();
//!     y.at(thread).store(x.at(thread).load() + x.at(thread + 1).load());
//! });
//! let mut emulator = Emulator::new();
//! let x = emulator.buffer("x", &[1.0f32; 65]);
//! let y = emulator.uninitialized("y", 4 * 64);
//! let report = emulator.launch(&program, [1, 1, 1], &[x.arg(), y.arg()])?;
//! assert_eq!(emulator.read::<f32>(y), [2.0; 64]);
//! assert_eq!(report.count("ld.global"), 4);
//!
//! let short = emulator.buffer("short", &[1.0f32; 64]);
//! let failure = emulator.launch(&program, [1, 1, 1], &[short.arg(), y.arg()]).unwrap_err();
//! assert_eq!(failure.kind(), Some(FaultKind::OutOfBounds));
//! assert!(failure.to_string().contains("offset 256 of `short`, which has 256 bytes"));
//! # Ok::<(), sage_emulator::Failure>(())
//! ```
//!
//! # What is computed
//!
//! Lane instructions mean what [`sage_ptx::isa::Lane::eval`] says. Tensor cores sum integers exactly (modulo 2³²), and
//! floats in double precision with one rounding an instruction: hardware's order and width are not documented, and
//! differ by less than the last place of the largest term. For 8-bit floats, [`Fp8Accumulation`] offers Hopper's
//! narrower sums.
//!
//! # Time
//!
//! The lanes of a warp execute in lock step, one side of a branch after the other. The warps of a block take turns,
//! switching where they wait, or after some steps; [`EmulatorOptions::seed`] gives other interleavings. Blocks start in
//! the order of their linear index; further blocks become resident when those that are stall. Asynchronous work becomes
//! visible as late as it may: `cp.async` lands when its thread waits for it, bulk loads some turns after their issue,
//! and products of `wgmma` may be touched only after the wait that covers them.
//!
//! # What is not modelled
//!
//! Races between blocks in global memory, and between lanes of one warp; the cache hierarchy; the order in which writes
//! to global memory become visible without fences (every write is seen at once); clusters; a warp whose lanes must make
//! progress on both sides of a branch to end (reported as a deadlock).

#![forbid(unsafe_code)]

mod banks;
mod block;
mod decode;
mod diagnosis;
mod emulator;
mod execute;
mod fault;
mod lanes;
mod machine;
mod options;
mod report;
mod schedule;
mod stats;
mod tensor_map;

pub use emulator::{Buffer, Emulator};
pub use fault::{Failure, Fault, FaultKind};
pub use options::{EmulatorOptions, Fp8Accumulation};
pub use report::{Conflicts, Report, Sectors};
pub use tensor_map::{Swizzle, TensorMap};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
