//! SageAttention on NVIDIA GPUs, from sm_80 on. Needs the driver and nothing else: `sage_kernels` builds kernels, which
//! the driver compiles.
//!
//! - [`Cuda`] computes calls whose tensors lie in the GPU's memory, on the caller's stream, and does not wait for it;
//! - [`HostTensors`] copies host tensors there, and the result back;
//! - [`CachePool`] is a quantised KV cache in the GPU's memory;
//! - [`WarmUp`] takes calls without tensors, and compiles and loads their kernels before they are made;
//! - [`TuningTable`] holds tile shapes that were measured on the GPU at hand.
//!
//! Both backends are [`sage_core::Backend`]s: they plan and run calls that [`sage_core::Call::check`] has checked.

mod backend;
mod cache_shape;
mod cuda;
mod host;
mod kept_numbers;
mod kv_cache;
mod launches;
mod lists;
mod loading;
mod plan;
mod predict;
mod shape;
mod sparse;
mod tensor;
mod timing;
mod tuning;
mod warm_up;

use sage_core::{Call, Error, Inputs};
pub use sage_cuda::{
    Buffer, Device, DeviceInfo, DiskCache, Event, ExecutableGraph, Graph, Origin, Stream,
    arrange_driver_cache, devices, driver_cache, driver_cache_folder,
};
pub use sage_kernels::forward::Alternative;
pub use sage_kernels::{Engine, Tiling, WarpTiling, WarpgroupTiling};

pub use backend::nearest_on_hopper;
pub use cache_shape::CacheShape;
pub use cuda::Cuda;
pub use host::HostTensors;
pub use kv_cache::CachePool;
pub use loading::LoadedKernel;
pub use plan::CudaPlan;
pub use predict::CudaMap;
pub use shape::{FlagsShape, MaskShape, TensorShape};
pub use tensor::{CudaTensor, DeviceBytes, DeviceInts, DeviceLse, DeviceMask, DeviceTensor};
pub use tuning::{Trial, TunedShape, TuningTable};
pub use warm_up::WarmUp;

/// Queries, keys and values in a GPU's memory.
pub type DeviceInputs<'a> = Inputs<'a, DeviceTensor<'a>>;

/// A checked call of queries, keys and values in a GPU's memory.
pub type DeviceCall<'a> = Call<'a, DeviceTensor<'a>>;

/// The driver's words and kind as an error of a call.
pub(crate) fn driver(error: sage_cuda::Error) -> Error {
    Error::Backend { kind: error.kind(), message: error.to_string() }
}

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

#[cfg(test)]
mod tests {
    use sage_core::BackendErrorKind;

    use super::*;

    #[test]
    fn an_error_of_the_driver_keeps_kind_and_words() {
        let of_code = |code: &str| sage_cuda::Error::Driver {
            call: "cuMemAllocAsync",
            code: code.into(),
            description: "words".into(),
        };
        for (error, kind) in [
            (of_code("CUDA_ERROR_OUT_OF_MEMORY"), BackendErrorKind::OutOfMemory),
            (of_code("CUDA_ERROR_ILLEGAL_ADDRESS"), BackendErrorKind::Lost),
            (of_code("CUDA_ERROR_UNKNOWN"), BackendErrorKind::Other),
            (sage_cuda::Error::NoDevice { ordinal: 3, count: 1 }, BackendErrorKind::NoDevice),
            (sage_cuda::Error::Forked, BackendErrorKind::Forked),
        ] {
            let (found, words) = (driver(error.clone()), error.to_string());
            assert_eq!((found.backend_kind(), found.to_string()), (Some(kind), words));
        }
    }
}
