//! What the tests of all crates share: one way to describe a call, to make its data and to compare what came out, and
//! one [`Runner`] for each backend, so that one [`table()`] of cases runs everywhere.
//!
//! - [`Case`] describes a call; [`Case::build`] makes an [`OwnedCall`] of it, with tensors of its own;
//! - [`RandomCall`] is such a call made from a number alone, with strides that nobody would write down;
//! - a [`Runner`] computes an [`OwnedCall`]: the oracle, the processor, the emulator, or a GPU;
//! - [`Computed::check`] compares what was [`Computed`] with an oracle within a [`Tolerance`], and names the place;
//! - [`check()`] does all of that for one case, and [`check_table`] for all of them.
//!
//! Each backend is behind a feature: `cpu`, `emulator`, `gpu`.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

mod call;
mod case;
mod computed;
#[cfg(feature = "cpu")]
mod cpu;
#[cfg(feature = "emulator")]
mod emulated_prediction;
#[cfg(feature = "emulator")]
mod emulator;
#[cfg(unix)]
mod fork;
#[cfg(feature = "gpu")]
pub mod gpu;
mod memory;
mod oracle;
#[cfg(any(feature = "cpu", feature = "emulator"))]
mod poison;
mod prediction;
mod random;
mod random_call;
mod random_geometry;
mod required;
mod runner;
mod table;

pub use call::{OwnedBlocks, OwnedCall, OwnedMask};
pub use case::{Bias, Case, CaseBlocks, CaseMask, Extent, Hidden, MaskKind, Sequences};
pub use computed::{Computed, Tolerance, unit_roundoff};
#[cfg(feature = "cpu")]
pub use cpu::{CPU_FULL, CPU_QUANTISED, CPU_TIES, cpu_narrow_schemes, cpu_schemes, every_cpu, run_on_cpu};
#[cfg(feature = "emulator")]
pub use emulator::{Emulated, presets};
#[cfg(unix)]
pub use fork::in_child;
pub use memory::{Memory, for_each_index};
pub use oracle::Oracle;
pub use prediction::{Prediction, Spoil, Tokens, predictions};
pub use random::{normal, normal_tensor, uniform, uniform_tensor};
pub use random_call::{RandomCall, count};
pub use required::skip;
pub use runner::{Runner, check, check_table, check_within};
#[cfg(feature = "emulator")]
pub use table::most_refused;
pub use table::table;
