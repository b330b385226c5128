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
    /// Query heads that share a key head.
    group: usize,
    softcap: bool,
}

/// Every form of values for every size of heads, and each other choice once with each form.
pub(super) fn calls() -> Vec<CacheCall> {
    let mut calls = Vec::new();
    let mut add = |storage, dtype, groups: &[usize], softcap| {
        calls.extend(groups.iter().map(|&group| CacheCall { storage, dtype, group, softcap }));
    };
    for values in ValueFormat::ALL {
        for head_dim in [64, 128, 256] {
            let groups = if head_dim == 64 { &[1, 2, 4][..] } else { &[4] };
            add(Storage { head_dim, page_size: PAGE_SIZE, values }, DType::F16, groups, false);
        }
        add(Storage { head_dim: 128, page_size: PAGE_SIZE, values }, DType::BF16, &[4], false);
    }
    add(Storage { head_dim: 80, page_size: 16, values: ValueFormat::Int8 }, DType::F16, &[4], true);
    calls
}

impl CacheCall {
    /// Whether a cache with default options is asked so.
    pub fn is_default(&self) -> bool {
        self.storage.values == ValueFormat::F16 && !self.softcap
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
            sequences: 8,
            num_q_heads: 8 * self.group,
            num_kv_heads: 8,
            q_len: 1,
            kv_len: 4096,
            sm_scale: 1.0,
            band: Band::FULL,
            logit_softcap: self.softcap.then_some(1.0),
            lse: false,
            table_stride: 64,
        }
    }
}
