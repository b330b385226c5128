//! The kernels of a KV cache.

use sage_core::{DType, ValueFormat};
use sage_ptx::{Program, Target};

use crate::cache::{CacheAdvanceConfig, CacheAppendConfig, CacheAttendConfig, Storage};

/// Tokens of a page where the caller leaves it open.
const PAGE_SIZE: usize = 64;

/// A kernel of a KV cache.
#[derive(Clone, Copy, Debug)]
pub(super) enum CacheKernel {
    Append(CacheAppendConfig),
    Advance(CacheAdvanceConfig),
    Attend(CacheAttendConfig),
}

/// Every form of values for every size of heads, and each other choice once with each form.
pub(super) fn kernels() -> Vec<CacheKernel> {
    let mut kernels = vec![CacheKernel::Advance(CacheAdvanceConfig)];
    let mut add = |storage, dtype, rows: &[usize], softcap| {
        kernels.push(CacheKernel::Append(CacheAppendConfig { storage, dtype }));
        let attend = rows.iter().map(|&rows| CacheAttendConfig { storage, dtype, rows, softcap });
        kernels.extend(attend.map(CacheKernel::Attend));
    };
    for values in ValueFormat::ALL {
        for head_dim in [64, 128, 256] {
            let rows = if head_dim == 64 { &[1, 2, 4][..] } else { &[4] };
            add(Storage { head_dim, page_size: PAGE_SIZE, values }, DType::F16, rows, false);
        }
        add(Storage { head_dim: 128, page_size: PAGE_SIZE, values }, DType::BF16, &[4], false);
    }
    add(Storage { head_dim: 80, page_size: 16, values: ValueFormat::Int8 }, DType::F16, &[4], true);
    kernels
}

impl CacheKernel {
    pub fn name(&self) -> String {
        match self {
            CacheKernel::Append(config) => config.name(),
            CacheKernel::Advance(config) => config.name(),
            CacheKernel::Attend(config) => config.name(),
        }
    }

    pub fn description(&self) -> String {
        let of = |storage: &Storage, dtype: DType| {
            let Storage { head_dim, page_size, values } = *storage;
            format!("{dtype}, head_dim {head_dim}, values in {values}, pages of {page_size} tokens")
        };
        match self {
            CacheKernel::Append(config) => {
                format!("KV cache: appends tokens; {}", of(&config.storage, config.dtype))
            }
            CacheKernel::Advance(_) => "KV cache: counts appended tokens".to_owned(),
            CacheKernel::Attend(config) => {
                let cap = if config.softcap { ", softcap" } else { "" };
                let of = of(&config.storage, config.dtype);
                format!("KV cache: attention of {} query rows a block; {of}{cap}", config.rows)
            }
        }
    }

    pub fn minimum_target(&self) -> Target {
        match self {
            CacheKernel::Append(config) if config.storage.values == ValueFormat::Fp8E4M3 => Target::SM_89,
            _ => Target::SM_80,
        }
    }

    /// Channels of the heads that it is for; of a kernel for any, the fewest.
    pub fn head_dim(&self) -> usize {
        match self {
            CacheKernel::Append(config) => config.storage.head_dim,
            CacheKernel::Advance(_) => 64,
            CacheKernel::Attend(config) => config.storage.head_dim,
        }
    }

    /// Whether a cache with default options uses it.
    pub fn is_default(&self) -> bool {
        match self {
            CacheKernel::Append(config) => config.storage.values == ValueFormat::F16,
            CacheKernel::Advance(_) => true,
            CacheKernel::Attend(config) => config.storage.values == ValueFormat::F16 && !config.softcap,
        }
    }

    pub fn program(&self) -> Program {
        match self {
            CacheKernel::Append(config) => config.program(),
            CacheKernel::Advance(config) => config.program(),
            CacheKernel::Attend(config) => config.program(),
        }
    }
}
