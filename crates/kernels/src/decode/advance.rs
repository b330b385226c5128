//! The lengths of a cache's sequences, which only the device's own work may change between launches.

use sage_ptx::{Program, kernel};

use super::THREADS;
use crate::kernel::Kernel;
use crate::params::kernel_params;

/// Adds new tokens to the lengths of sequences, after [`super::CacheAppendConfig`] wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheAdvanceConfig;

kernel_params! {
    /// What a launch of [`CacheAdvanceConfig`] passes.
    CacheAdvanceParams, CacheAdvanceArgs {
        /// Tokens of each sequence.
        kv_lens: [i32],
        /// Sequences.
        sequences: i32,
        /// New tokens of each.
        tokens: i32,
    }
}

impl CacheAdvanceConfig {
    /// Blocks along x, y and z.
    pub fn grid(&self, sequences: usize) -> [u32; 3] {
        [sequences.div_ceil(THREADS as usize) as u32, 1, 1]
    }
}

impl Kernel for CacheAdvanceConfig {
    fn name(&self) -> String {
        "cache_advance".to_owned()
    }

    fn description(&self) -> String {
        "KV cache: counts appended tokens".to_owned()
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), THREADS, |code| {
            let p = CacheAdvanceParams::declare(code);
            let sequence = code.block_index()[0] * THREADS as i32 + code.thread();
            code.exit_when(sequence.ge(p.sequences));
            let len = p.kv_lens.at(sequence);
            len.store(len.load() + p.tokens);
        })
    }
}
