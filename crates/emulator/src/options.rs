//! How programs are run.

/// How an [`Emulator`](crate::Emulator) runs programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmulatorOptions {
    /// Faults that a [`Failure`](crate::Failure) tells of. A block ends at its first; blocks after enough faulty ones
    /// do not run.
    pub max_faults: usize,
    /// How products of 8-bit floats are summed.
    pub fp8: Fp8Accumulation,
    /// Threads that run blocks; 0 takes as many as the machine has.
    pub workers: usize,
    /// Steps of one warp after which its loop is taken to be endless.
    pub step_limit: u64,
    /// Another seed is another interleaving of a block's warps; 0 lets them take turns in order.
    pub seed: u64,
    /// Blocks that can be resident at once, and so wait for each other: what the GPU at hand would hold.
    pub resident_blocks: u64,
}

impl Default for EmulatorOptions {
    fn default() -> Self {
        EmulatorOptions {
            max_faults: 1,
            fp8: Fp8Accumulation::Exact,
            workers: 0,
            step_limit: 100_000_000,
            seed: 0,
            resident_blocks: 132,
        }
    }
}

/// How products of 8-bit floats are summed in single precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Fp8Accumulation {
    /// As all other floats: exact products, one rounding.
    #[default]
    Exact,
    /// As measured on Ada and Hopper: the products of one instruction and the accumulator are aligned to the largest
    /// exponent among them, cut off 13 bits below it, added, and the sum is cut to 13 fraction bits (1 sign, 8 exponent
    /// and 13 fraction bits in all).
    ///
    /// Sources: SageAttention2 (arXiv 2411.10958, the `FP22` accumulator of `mma.f32.f8.f8.f32`) and the DeepSeek-V3
    /// report (arXiv 2412.19437, 3.3.2: about 14 bits of each product are kept). Cutting is towards zero.
    Truncated,
}
