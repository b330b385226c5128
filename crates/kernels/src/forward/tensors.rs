//! What a forward pass reads and writes.

use sage_core::Problem;

use crate::preprocess::MOST_CHANNELS;
use crate::sinks::SinkArgs;
use crate::tensor::TensorArg;

/// Elements of the 16 bytes that aligned rows start at multiples of, and are whole chunks of.
const CHUNK: usize = 8;

/// Whether heads are whole chunks.
pub(super) fn whole_chunks(problem: &Problem) -> bool {
    [problem.head_dim, problem.value_dim].iter().all(|dim| dim.is_multiple_of(CHUNK))
}

/// What a forward pass reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tensors {
    /// Queries.
    pub q: TensorArg,
    /// Keys.
    pub k: TensorArg,
    /// Values.
    pub v: TensorArg,
    /// Output.
    pub out: TensorArg,
    /// Log-sum-exp, row-major; 0 where it is not wanted.
    pub lse: u64,
    /// Explicit mask, `[batch, heads, queries, keys]`.
    pub mask: TensorArg<4>,
    /// Flags of a block mask, a byte each, `[batch, heads, blocks of queries, blocks of keys]`.
    pub blocks: TensorArg<4>,
    /// Boundaries of packed queries.
    pub cu_seqlens_q: u64,
    /// Boundaries of packed keys, or valid keys of each batch entry.
    pub cu_seqlens_k: u64,
    /// Attention sinks, where the problem has some.
    pub sinks: SinkArgs,
}

impl Tensors {
    /// Whether V is the first channels of K, in the same memory, where a plan asks: of heads whose tiles fill shared
    /// memory.
    pub fn values_in_keys(&self, problem: &Problem) -> bool {
        let is_large = problem.head_dim > MOST_CHANNELS && problem.value_dim <= problem.head_dim;
        is_large && self.k.address != 0 && self.k == self.v
    }

    /// Whether every row of Q, K, V and the output starts at a multiple of 16 bytes and, for such a problem, is whole such
    /// chunks.
    pub fn aligned(&self, problem: &Problem) -> bool {
        let aligned = |tensor: &TensorArg| {
            let whole = |stride: &i64| stride % CHUNK as i64 == 0;
            tensor.address.is_multiple_of(16) && tensor.strides.iter().all(whole)
        };
        whole_chunks(problem) && [self.q, self.k, self.v, self.out].iter().all(aligned)
    }
}
