//! The calls of KV caches whose kernels are shipped.

use sage_core::{Band, DType, ValueFormat};

use crate::decode::{AppendCall, AttendCall, Storage};

/// Tokens of a page where the caller leaves it open.
const PAGE_SIZE: usize = 64;

/// What is asked of a KV cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheCall {
    storage: Storage,
    dtype: DType,
    /// Whether so many blocks are there that tokens are not split.
    whole: bool,
    softcap: bool,
    sinks: bool,
}

/// Every form of values for every size of heads, and each other choice once, all with tokens whole and in parts.
pub(super) fn calls() -> Vec<CacheCall> {
    let mut calls = Vec::new();
    let mut add = |head_dim, page_size, values, dtype, [softcap, sinks]: [bool; 2]| {
        let storage = Storage { head_dim, page_size, values };
        let calls_of = |whole| CacheCall { storage, dtype, whole, softcap, sinks };
        calls.extend([false, true].map(calls_of));
    };
    for values in ValueFormat::ALL {
        for head_dim in [64, 128, 256] {
            add(head_dim, PAGE_SIZE, values, DType::F16, [false; 2]);
        }
        add(128, PAGE_SIZE, values, DType::BF16, [false; 2]);
    }
    add(80, 16, ValueFormat::Int8, DType::F16, [true, false]);
    add(64, PAGE_SIZE, ValueFormat::Int8, DType::BF16, [false, true]);
    add(200, 16, ValueFormat::F16, DType::BF16, [false; 2]);
    calls
}

impl CacheCall {
    /// Whether a cache with default options is asked so.
    pub fn is_default(&self) -> bool {
        self.storage.values == ValueFormat::F16 && !self.softcap && !self.sinks
    }

    /// A new token of each of eight sequences.
    pub fn append(&self) -> AppendCall {
        AppendCall {
            storage: self.storage,
            dtype: self.dtype,
            num_kv_heads: 8,
            sequences: 8,
            tokens: 1,
            table_stride: 64,
        }
    }

    /// Its query.
    pub fn attend(&self) -> AttendCall {
        AttendCall {
            storage: self.storage,
            dtype: self.dtype,
            sequences: if self.whole { 256 } else { 8 },
            num_q_heads: 32,
            num_kv_heads: 8,
            q_len: 1,
            kv_len: 2048,
            sm_scale: 1.0,
            band: Band::FULL,
            logit_softcap: self.softcap.then_some(1.0),
            sinks: self.sinks,
            lse: self.whole,
            table_stride: 64,
        }
    }
}
