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

/// Every form of values for both element types and the usual heads, and each option once.
pub(super) fn kernels() -> Vec<CacheKernel> {
    let mut kernels = vec![CacheKernel::Advance(CacheAdvanceConfig)];
    for head_dim in [64, 128, 256] {
        for values in ValueFormat::ALL {
            let storage = Storage { head_dim, page_size: PAGE_SIZE, values };
            for dtype in [DType::F16, DType::BF16] {
                kernels.push(CacheKernel::Append(CacheAppendConfig { storage, dtype }));
                let attend = CacheAttendConfig { storage, dtype, rows: 4, softcap: false };
                kernels.push(CacheKernel::Attend(attend));
            }
            let few =
                [1, 2].map(|rows| CacheAttendConfig { storage, dtype: DType::F16, rows, softcap: false });
            kernels.extend(few.map(CacheKernel::Attend));
        }
    }
    let storage = Storage { head_dim: 80, page_size: 16, values: ValueFormat::Int8 };
    kernels.push(CacheKernel::Append(CacheAppendConfig { storage, dtype: DType::F16 }));
    let capped = CacheAttendConfig { storage, dtype: DType::F16, rows: 4, softcap: true };
    kernels.push(CacheKernel::Attend(capped));
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
