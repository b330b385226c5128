//! A tensor that a kernel reads, and which of its rows belong to a sequence.

use crate::params::kernel_params;
use crate::sequence::{LengthParams, NO_LIMIT};
use crate::tensor::TensorArg;

kernel_params! {
    /// A tensor `[batch, heads, rows, head_dim]` whose rows are those of sequences. Strides are in elements.
    InputParams, InputArgs {
        /// The tensor.
        x: (tensor 3),
        /// Rows of the tensor.
        rows: i32,
        /// Heads of a sequence.
        heads: i32,
        /// Sequences.
        sequences: i32,
        /// Boundaries of packed sequences, or the valid rows of each batch entry.
        cu_seqlens: [i32],
        /// For keys: query rows of the tensors.
        q_rows: i32,
        /// For keys: boundaries of packed queries.
        cu_seqlens_q: [i32],
        /// For keys: those visible before the diagonal; 2³⁰ for all.
        window_left: i32,
        /// For keys: those visible after the diagonal; 2³⁰ for all.
        window_right: i32,
        /// For keys: whether the last query sees the last key at the diagonal (1), or the first the first (0).
        bottom_right: i32,
        /// For masked keys: which of a tile some query sees, [`SeenKeysConfig`](super::SeenKeysConfig).
        seen: [u32],
        /// For masked keys: how many before a tile count.
        ranks: [i32],
        /// For masked keys: tiles from one sequence's to the next; 0 where all have the same mask.
        seen_stride_sequence: i32,
        /// For masked keys: tiles from one head's to the next; 0 where all have the same mask.
        seen_stride_head: i32,
    }
}

impl InputArgs {
    /// Rows of which none is hidden, in `heads` heads of each of `sequences` sequences.
    pub fn unmasked(x: TensorArg, rows: usize, [heads, sequences]: [usize; 2]) -> Self {
        InputArgs {
            x,
            rows: rows as i32,
            heads: heads as i32,
            sequences: sequences as i32,
            window_left: NO_LIMIT,
            window_right: NO_LIMIT,
            ..InputArgs::default()
        }
    }
}

impl<'k> InputParams<'k> {
    /// What says which rows are a sequence's.
    pub fn lengths(&self) -> LengthParams<'k> {
        LengthParams {
            q_rows: self.q_rows,
            kv_rows: self.rows,
            cu_seqlens_q: self.cu_seqlens_q,
            cu_seqlens_k: self.cu_seqlens,
            window_left: self.window_left,
            window_right: self.window_right,
            bottom_right: self.bottom_right,
        }
    }
}
