//! Attention in 8 and 4 bits: a drop-in for scaled dot-product attention.
//!
//! Queries, keys and values come in as f32, f16 or bf16 with any strides; they are smoothed, quantised and multiplied
//! in low precision inside, and the output has the caller's layout and element type again.
//!
//! ```
//! use sageattention::{Attention, Tensor};
//!
//! let x = Tensor::new(vec![0.5f32; 2 * 4 * 16 * 64], &[2, 4, 16, 64])?; // [batch, heads, seq, head_dim]
//! let result = Attention::new().causal(true).return_lse(true).forward(&x, &x, &x)?;
//! assert_eq!(result.out.shape(), [2, 4, 16, 64]);
//! # assert_eq!(result.lse.expect("asked for").shape(), [2, 4, 16]);
//! # Ok::<(), sageattention::Error>(())
//! ```
//!
//! [`KvCache`] keeps the keys and values of past tokens quantised, for decoding.
//!
//! [`Attention`] collects the options; [`Attention::forward`] computes, [`Attention::forward_into`] does so into the
//! caller's memory, [`Attention::forward_on`] does so with tensors in a GPU's memory, and [`Attention::plan`] says what
//! would be computed, how and why. Everything that can be wrong with
//! a call is an [`Error`] that names the tensor or option, the value found and the value wanted.

#![forbid(unsafe_code)]

mod attention;
mod backend;
/// Attention on NVIDIA GPUs: tensors that lie in their memory, streams, measured tile shapes.
#[cfg(feature = "cuda")]
pub use sage_gpu as cuda;

mod kv_cache;
mod nearest;
mod place;
mod plan;
mod schedule;
#[cfg(feature = "cuda")]
mod warm_up;

pub use attention::{Attention, Output};
pub use backend::{Device, backend_description};
pub use kv_cache::{KvCache, KvCacheOptions};
pub use nearest::nearest_scheme;
pub use place::{AnyBlockMask, AnyLengths, AnyMask, AnySinks, Place};
pub use plan::Plan;
pub use schedule::HybridSchedule;

pub use sage_core::sparse;
pub use sage_core::{
    Alignment, Backend, BackendErrorKind, BackendPlan, Band, BlockMask, CacheBackend, CacheLayout, Call,
    Choice, DType, Element, Error, Geometry, Inputs, Layout, Lengths, MAX_HEAD_DIM, MAX_RANK, MAX_VALUE_DIM,
    Mask, Options, Preset, Problem, Result, Scheme, SmoothK, SparseBackend, Tensor, TensorView,
    TensorViewMut, ValueFormat, View, ViewMut, single,
};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
