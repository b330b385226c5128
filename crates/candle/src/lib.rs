//! SageAttention for candle: attention in 8 bits, on tensors that lie where candle has them.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use sageattention_candle::{Options, sage_attention};
//!
//! let q = Tensor::randn(0f32, 1., (2, 9, 128, 64), &Device::Cpu)?; // [batch, heads, seq, head_dim]
//! let kv = Tensor::randn(0f32, 1., (2, 3, 128, 64), &Device::Cpu)?; // three queries' heads share one
//! let out = sage_attention(&q, &kv, &kv, &Options::new().causal(true))?;
//! assert_eq!(out.dims(), q.dims());
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! - [`sage_attention`] takes f32, f16 and bf16, any strides (views into a fused QKV tensor are not copied), masks,
//!   grouped heads, padded and packed batches; [`sage_attention_with_lse`] also gives each row's log-sum-exp.
//! - [`Options::sparse`] computes only the blocks of scores that a predictor finds worth it, [`Options::block_mask`]
//!   those of a map.
//! - [`flash`] has the functions of the crate `candle-flash-attn` under the same names, so that a model switches by its
//!   import alone: `use sageattention_candle::flash::flash_attn;`
//! - [`KvCache`] keeps the keys and values of past tokens quantised, for decoding.
//!
//! On a CPU everything works without any feature. With the feature `cuda`, which needs nvcc because candle's own
//! kernels do, tensors in a GPU's memory are computed there, on candle's stream, without a copy; f16 and bf16.
//!
//! Candle 0.11 links the libraries of the driver and the toolkit, so a program with this feature does not start where
//! `libcuda.so.1` is missing: the loader says so before `main`. Where it is to run on CPUs too, put the toolkit's stub
//! (`lib64/stubs/libcuda.so`) by that name last in the library path: the program starts, and `Device::new_cuda` returns
//! an error instead of a GPU.
//!
//! Everything that can be wrong with a call is an error that names the tensor or option, the value found and the
//! value wanted; [`backend_error_kind`] tells a GPU's errors apart. Attention here is for inference: a backward pass
//! through it is an error.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
pub mod flash;
mod kv_cache;
mod op;
mod options;
mod view;

pub use error::backend_error_kind;
pub use kv_cache::KvCache;
pub use op::{sage_attention, sage_attention_with_lse};
pub use options::Options;
pub use sageattention::sparse;
pub use sageattention::{Alignment, BackendErrorKind, Choice, KvCacheOptions, Layout, Preset, ValueFormat};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
