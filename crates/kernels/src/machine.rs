//! The GPU that a pass is planned for.

use sage_ptx::Target;

use crate::gpu_model::GpuModel;

/// What plans and tile shapes ask of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    /// What its code is compiled for.
    pub target: Target,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Most bytes of shared memory of a block.
    pub shared_bytes: usize,
    /// Bytes of the L2 cache.
    pub l2_bytes: usize,
}

impl Machine {
    /// A GPU of that target as it is sold most, where none is at hand: the first [`GpuModel`] of its compute capability.
    pub fn typical(target: Target) -> Self {
        Machine { target, ..GpuModel::typical(target).machine }
    }

    /// Whether groups of four warps multiply tiles in shared memory (`wgmma`), which the copy engine fetches (TMA).
    pub fn has_wgmma(&self) -> bool {
        self.target == Target::SM_90A
    }

    /// Whether `mma.sync` takes 4-bit floats whose blocks have scales: on Blackwell's GPUs that are not in data centres.
    pub fn has_fp4(&self) -> bool {
        self.target.is_specific() && (120..130).contains(&self.target.sm())
    }

    /// Whether tensor cores take E4M3.
    pub fn has_fp8(&self) -> bool {
        self.target.sm() >= 89
    }
}
