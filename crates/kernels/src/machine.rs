//! The GPU that a pass is planned for.

use sage_core::DType;
use sage_ptx::Target;

use crate::gpu_model::GpuModel;

/// Bytes of shared memory that the system takes for each block.
pub(crate) const RESERVED: usize = 1024;

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

    /// Whether threads copy from device memory to shared memory without registers (`cp.async`).
    pub fn has_async_copies(&self) -> bool {
        self.target.sm() >= 80
    }

    /// Whether a thread has whole runs of bytes copied to shared memory, which an `mbarrier` counts (`cp.async.bulk`).
    pub fn has_bulk_copies(&self) -> bool {
        self.target.sm() >= 90
    }

    /// Most bytes of shared memory of each of so many blocks on a multiprocessor.
    pub(crate) fn shared_bytes_of_each(&self, blocks: u32) -> usize {
        (self.shared_bytes + RESERVED) / blocks as usize - RESERVED
    }

    /// Blocks that run at once, where a multiprocessor holds so many.
    pub(crate) fn resident_blocks(&self, of_each: u32) -> usize {
        self.multiprocessors * of_each as usize
    }

    /// The type that tensor cores multiply 16-bit tensors of type `dtype` in: their own, or f16 where they lack it.
    pub fn product_dtype(&self, dtype: DType) -> DType {
        product_dtype(dtype, self.target)
    }

    /// Whether tensor cores take E4M3.
    pub fn has_fp8(&self) -> bool {
        self.target.sm() >= 89
    }
}

/// [`Machine::product_dtype`] on a target: bfloat16 came with Ampere.
pub(crate) fn product_dtype(dtype: DType, target: Target) -> DType {
    if target.sm() >= 80 { dtype } else { DType::F16 }
}
