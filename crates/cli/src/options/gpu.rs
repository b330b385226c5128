//! Options about a GPU that need not be there, and about the KV cache that it would hold.

use clap::Args;
use sage_core::CacheLayout;
use sage_kernels::Machine;
use sage_ptx::Target;

use super::names::ValueFormatName;

/// A GPU that is spoken of: none has to be there.
#[derive(Clone, Copy, Debug, Args)]
pub struct GpuOptions {
    /// GPU architecture, such as sm_75, sm_89 or sm_90a
    // Where the GPU is one option of several it can be left out.
    #[arg(long, value_name = "SM", required = false)]
    pub target: Target,
    /// Multiprocessors of the GPU: with many and few queries, keys are split between them [default: as many as a common
    /// GPU of the architecture has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub multiprocessors: Option<u16>,
}

impl GpuOptions {
    /// The GPU.
    pub fn machine(&self) -> Machine {
        let typical = Machine::typical(self.target);
        let multiprocessors = self.multiprocessors.map_or(typical.multiprocessors, usize::from);
        Machine { multiprocessors, ..typical }
    }
}

/// A quantised KV cache that holds the keys and values.
#[derive(Clone, Copy, Debug, Args)]
pub struct CacheOptions {
    /// Decode: keys and values lie in a quantised KV cache, values in f16, bf16, fp8-e4m3 or int8; the queries are
    /// those of the last cached tokens
    #[arg(long, value_name = "VALUES", required = false)]
    pub kv_cache: ValueFormatName,
    /// Tokens of a page of the KV cache: a power of two from 16 to 1024
    #[arg(long, value_name = "N", default_value_t = 64, requires = "kv_cache")]
    pub page_size: usize,
}

impl CacheOptions {
    /// What a page holds.
    pub fn layout(&self, num_kv_heads: usize, head_dim: usize) -> CacheLayout {
        CacheLayout { num_kv_heads, head_dim, page_size: self.page_size, values: self.kv_cache.0 }
    }
}
