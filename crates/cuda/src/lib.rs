//! CUDA devices, streams, memory and the kernel cache of SageAttention.
//!
//! A [`KernelSource`] is PTX text and what a launch must know about it. [`Device::load`] has the driver compile it,
//! once per process and, thanks to the [`DiskCache`], once per machine; [`Kernel::launch`] puts it on a [`Stream`].
//! The crate builds without a CUDA toolkit and finds the driver when it runs; without one, every call says so in an
//! [`Error`].
//!
//! ```no_run
//! use sage_cuda::{Buffer, Device, KernelSource, Stream};
//! use sage_ptx::{Param, ParamType, Target};
//!
//! # fn main() -> sage_cuda::Result<()> {
//! # let ptx = "";
//! let device = Device::new(0)?;
//! let kernel = device.load(&KernelSource {
//!     name: "double",
//!     ptx,
//!     target: Target::SM_80,
//!     params: &[Param { name: "x".into(), ty: ParamType::Pointer }],
//!     block: [128, 1, 1],
//!     cluster: None,
//!     dynamic_shared_bytes: 0,
//!     needs_whole_compilation: false,
//!     waits_for_launches_before: false,
//! })?;
//! let stream = Stream::new(&device)?;
//! let x = Buffer::from_slice(&stream, &[1.0_f32; 1024])?;
//! // SAFETY: the kernel doubles 8 times 128 floats at `x`, which has as many and is of the same stream.
//! unsafe { kernel.launch(&stream, [8, 1, 1], &[x.arg()]) }?;
//! let doubled: Vec<f32> = x.to_vec()?;
//! # Ok(())
//! # }
//! ```
//!
//! Calls leave the caller's current context as they found it, so other CUDA libraries in the process do not notice
//! them.

mod arguments;
mod compile;
mod context;
mod device;
mod device_info;
mod disk_cache;
mod driver;
mod driver_cache;
mod driver_version;
mod error;
mod event;
mod fork;
mod graph;
mod kernel;
mod launch;
mod library;
mod memory;
mod module;
mod source;
mod stream;
mod tensor_map;

pub use device::{Device, LoadCounts};
pub use device_info::{DeviceInfo, devices};
pub use disk_cache::{CacheKey, DEFAULT_CACHE_BYTES, DiskCache};
pub use driver::Driver;
pub use driver_cache::{arrange_driver_cache, driver_cache, driver_cache_folder};
pub use driver_version::DriverVersion;
pub use error::{Error, Result};
pub use event::Event;
pub use fork::check_not_forked;
pub use graph::{ExecutableGraph, Graph};
pub use kernel::{Kernel, KernelAttributes, Origin};
pub use memory::Buffer;
pub use source::KernelSource;
pub use stream::Stream;
pub use tensor_map::{ElementType, L2Promotion, Swizzle, TensorMap};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
