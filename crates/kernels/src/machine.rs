//! The GPU that a pass is planned for.

use sage_ptx::Target;

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
    /// A GPU of that target as it is sold most, where none is at hand: an A100, RTX 3090, RTX 4090, H100, B200 or RTX
    /// 5090, by NVIDIA's architecture whitepapers and the CUDA C++ Programming Guide, table of compute capabilities.
    pub fn typical(target: Target) -> Self {
        let (multiprocessors, shared_kib, l2_mib) = match target.sm() {
            0..=79 => (40, 64, 4),
            80..=85 => (108, 163, 40),
            86 => (82, 99, 6),
            87 => (16, 163, 4),
            88 | 89 => (128, 99, 72),
            90..=99 => (132, 227, 50),
            100..=119 => (148, 227, 126),
            _ => (170, 99, 96),
        };
        Machine { target, multiprocessors, shared_bytes: shared_kib << 10, l2_bytes: l2_mib << 20 }
    }

    /// Whether groups of four warps multiply tiles in shared memory (`wgmma`), which the copy engine fetches (TMA).
    pub fn has_wgmma(&self) -> bool {
        self.target == Target::SM_90A
    }

    /// Whether tensor cores take E4M3.
    pub fn has_fp8(&self) -> bool {
        self.target.sm() >= 89
    }
}
