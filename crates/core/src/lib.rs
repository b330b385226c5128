//! The words that every part of SageAttention shares, and the oracle that all of it is compared with.
//!
//! - [`TensorView`] and friends: strided tensors in f32, f16 or bf16;
//! - [`Inputs`] and [`Options`]: what a caller asks for; [`Call`]: the same, checked, in one canonical order;
//! - [`Scheme`]: what is quantised, and how;
//! - [`oracle`]: exact attention in f64, every quantiser in scalar Rust, and a scheme's attention built from them;
//! - [`sparse`]: which blocks of the score matrix are computed, and who decides it;
//! - [`metrics`]: how far one result is from another.
//!
//! Nothing here knows a backend, and nothing here is `unsafe`.

#![forbid(unsafe_code)]

mod backend;
mod cache;
mod call;
mod choice;
mod dtype;
mod error;
mod geometry;
mod lengths;
mod mask;
pub mod metrics;
mod operand;
pub mod oracle;
mod preset;
mod problem;
mod recent;
mod scheme;
mod single;
pub mod sparse;
mod tensor;

pub use backend::{Backend, BackendPlan, CacheBackend, CacheSize, NewTokens, SparseBackend};
pub use cache::{BlockTables, CacheLayout, CachedInputs, MAX_CACHED_HEAD_DIM, PageCopy, ValueFormat};
pub use call::Call;
pub use choice::Choice;
pub use dtype::{DType, Element, nearest_bf16};
pub use error::{BackendErrorKind, Error, Result};
pub use geometry::{Geometry, MAX_RANK};
pub use lengths::{Lengths, Sequence};
pub use mask::{Alignment, Band, BlockMask, Mask, padding_bias};
pub use operand::{List, Operand, Strided};
pub use preset::Preset;
pub use problem::{
    Inputs, Layout, MAX_HEAD_DIM, MAX_HEADS, MAX_VALUE_DIM, Options, Problem, default_sm_scale,
};
pub use recent::Recent;
pub use scheme::{
    Accumulator, Fp4Format, Granularity, IntBits, IntQuantizer, PLevels, Pv, Qk, Rounding, ScaleRows, Scheme,
    SmoothK, SmoothQ, Smoothing, Tile, ZeroGroup,
};
pub use single::single;
pub use tensor::{Elements, Tensor, TensorView, TensorViewMut, View, ViewMut};

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
