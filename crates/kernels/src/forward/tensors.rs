//! What a forward pass reads and writes.

use crate::tensor::TensorArg;

/// Elements of the 16 bytes that aligned rows start at multiples of, and are whole chunks of.
pub(super) const CHUNK: usize = 8;

/// What a forward pass reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
}

impl Tensors {
    /// Whether every row of Q, K, V and the output starts at a multiple of 16 bytes and is whole such chunks.
    pub fn aligned(&self, head_dim: usize) -> bool {
        let aligned = |tensor: &TensorArg| {
            let whole = |stride: &i64| stride % CHUNK as i64 == 0;
            tensor.address.is_multiple_of(16) && tensor.strides.iter().all(whole)
        };
        head_dim.is_multiple_of(CHUNK) && [self.q, self.k, self.v, self.out].iter().all(aligned)
    }
}
