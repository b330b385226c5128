//! A kernel that is loaded on a GPU.

use std::fmt;
use std::sync::Arc;

use sage_ptx::Param;

use crate::module::Function;

/// Where a kernel's code came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// The driver compiled it.
    Compiled,
    /// The driver compiled it as a whole program, or an earlier process had it do so and it found the code in its own
    /// cache: it does not say which.
    Driver,
    /// An earlier process compiled it.
    Disk,
}

impl Origin {
    /// The origin in a word.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Compiled => "compiled",
            Origin::Driver => "driver",
            Origin::Disk => "disk",
        }
    }
}

/// What the driver says of a compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelAttributes {
    /// Registers of a thread.
    pub registers: u32,
    /// Local memory of a thread in bytes: spilled registers and the stack.
    pub local_bytes: u32,
    /// Shared memory that the text declares.
    pub static_shared_bytes: u32,
    /// Blocks that a multiprocessor can hold at once, in the shape that the source asks for.
    pub max_blocks_per_multiprocessor: u32,
}

/// A kernel's function and all that a launch needs. The function is unloaded when the last clone of the kernel goes.
pub(crate) struct Loaded {
    pub(crate) name: String,
    pub(crate) params: Box<[Param]>,
    pub(crate) block: [u32; 3],
    pub(crate) cluster: Option<[u32; 3]>,
    /// Whether it can start while the launch before it ends.
    pub(crate) starts_early: bool,
    pub(crate) dynamic_shared_bytes: u32,
    pub(crate) attributes: KernelAttributes,
    pub(crate) origin: Origin,
    pub(crate) function: Function,
}

/// A kernel loaded on a [`Device`](crate::Device). Clones are the same kernel.
#[derive(Clone)]
pub struct Kernel(Arc<Loaded>);

impl Kernel {
    pub(crate) fn new(loaded: Loaded) -> Kernel {
        Kernel(Arc::new(loaded))
    }

    /// What a launch needs.
    pub(crate) fn loaded(&self) -> &Loaded {
        &self.0
    }

    /// Name of the entry.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What a launch passes.
    pub fn params(&self) -> &[Param] {
        &self.0.params
    }

    /// Threads of a block, in each dimension.
    pub fn block(&self) -> [u32; 3] {
        self.0.block
    }

    /// What the driver says of the compiled code.
    pub fn attributes(&self) -> KernelAttributes {
        self.0.attributes
    }

    /// Where the code came from.
    pub fn origin(&self) -> Origin {
        self.0.origin
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Kernel");
        shown.field("name", &self.name()).field("attributes", &self.attributes()).finish_non_exhaustive()
    }
}
