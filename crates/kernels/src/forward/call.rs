//! What the kernels of a forward pass are told of the call.

use sage_core::Problem;

use super::groups::HeadsAsRows;
use super::request::Request;
use super::tensors::Tensors;
use crate::attention::MaskForm;
use crate::machine::Machine;
use crate::pass::{Addresses, PassBuilder, Slot};
use crate::preprocess::{InputArgs, Source};
use crate::sequence::{KEY_TILE, LengthArgs, Lengths, bottom_right, total_key_tiles, window};
use crate::tensor::TensorArg;

/// A forward pass in the making.
pub(crate) type ForwardPass = PassBuilder<Tensors>;

/// A call of which a pass is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForwardCall {
    pub problem: Problem,
    pub request: Request,
    pub machine: Machine,
    /// Whether the attention kernel takes the query heads of a key head as rows of one head.
    pub heads_as_rows: bool,
}

/// Names of the workspace's slots that several kernels use.
pub(crate) mod slot {
    /// Which keys of a tile some query sees, where a mask hides keys.
    pub const SEEN: &str = "seen";
    /// How many keys before each tile count, where a mask hides keys.
    pub const RANKS: &str = "ranks";
    /// Classes of the tiles of a mask, and its packed elements.
    pub const MASK_CLASSES: &str = "mask_classes";
    pub const MASK_WORDS: &str = "mask_words";
    /// Lists of tiles of keys, and how many tiles each has.
    pub const TILE_COUNTS: &str = "tile_counts";
    pub const TILE_LISTS: &str = "tile_lists";
    /// Means of query blocks.
    pub const Q_MEAN: &str = "q_mean";
    /// Quantised tiles of K, their scales and the means of its channels.
    pub const K: &str = "k";
    pub const K_SCALE: &str = "k_scale";
    pub const K_MEAN: &str = "k_mean";
    /// Products of the query blocks' means with K.
    pub const DELTA_S: &str = "delta_s";
    /// Tiles of V, and scales, factors and means of its channels.
    pub const V: &str = "v";
    pub const V_SCALE: &str = "v_scale";
    pub const V_FACTOR: &str = "v_factor";
    pub const V_MEAN: &str = "v_mean";
    /// Heads of V that scales of sampled rows do not fit.
    pub const V_MARKED: &str = "v_marked";
    /// Log-sum-exps of the blocks that are kept, where the caller wants none.
    pub const LSE: &str = "lse";
    /// Means of the blocks of K and of V.
    pub const K_BLOCK_MEANS: &str = "k_block_means";
    pub const V_BLOCK_MEANS: &str = "v_block_means";
    /// Outputs of the parts of split keys, and the sums that they are merged by.
    pub const PARTIAL: &str = "partial";
    pub const PARTIAL_SUMS: &str = "partial_sums";
}

impl ForwardCall {
    /// The call for a problem, some of whose query heads become rows.
    pub fn new(
        problem: &Problem,
        request: &Request,
        machine: &Machine,
        heads_as_rows: Option<HeadsAsRows>,
    ) -> Self {
        let problem_of = |heads: HeadsAsRows| (heads.problem(problem), heads.request(request));
        let (problem, request) = heads_as_rows.map_or((*problem, *request), problem_of);
        let in_kernel = heads_as_rows == Some(HeadsAsRows::InKernel);
        ForwardCall {
            problem,
            request: request.within(&problem),
            machine: *machine,
            heads_as_rows: in_kernel,
        }
    }

    /// Key tiles of the workspace, all sequences together.
    pub fn key_tiles(&self) -> usize {
        total_key_tiles(self.request.lengths, self.problem.batch, self.request.kv_rows)
    }

    /// Heads of K and V, all sequences together.
    pub fn all_kv_heads(&self) -> usize {
        self.problem.batch * self.problem.num_kv_heads
    }

    /// Bytes of a single for each channel of each head of a tensor of keys or values.
    pub fn channel_bytes(&self, source: &Source) -> usize {
        4 * self.all_kv_heads() * source.padded_dim()
    }

    /// Bytes of so many singles for each channel of each tile of a tensor of keys or values.
    pub fn tile_channel_bytes(&self, source: &Source, singles: usize) -> usize {
        4 * singles * source.padded_dim() * self.problem.num_kv_heads * self.key_tiles()
    }

    /// Heads of a sequence that the attention kernel works on, and most rows of each.
    pub fn heads_and_rows(&self) -> [usize; 2] {
        let Problem { num_q_heads, num_kv_heads, q_len, .. } = self.problem;
        if self.heads_as_rows {
            [num_kv_heads, q_len * self.problem.group_size()]
        } else {
            [num_q_heads, q_len]
        }
    }

    /// Query rows of all heads: rows of the log-sum-exp.
    pub fn total_rows(&self) -> usize {
        let batches = if self.request.lengths == Lengths::Packed { 1 } else { self.problem.batch };
        batches * self.problem.num_q_heads * self.request.q_rows
    }

    /// Blocks of `rows` query rows of the longest sequence.
    pub fn query_blocks(&self, rows: usize) -> usize {
        self.problem.q_len.div_ceil(rows).max(1)
    }

    /// Bytes that a number for each query block and each of `columns` takes, where `rows` queries are a block.
    pub fn query_block_bytes(&self, rows: usize, columns: usize) -> usize {
        4 * self.problem.batch * self.problem.num_q_heads * self.query_blocks(rows) * columns
    }

    /// By how many heads statistics run ahead of what needs them: of as many heads a quarter of the L2 cache holds K or
    /// V. On large GPUs these are more blocks than run at once, so that none waits; and their cache is cut in halves
    /// that may both hold a line, with what is being written beside it.
    pub fn lead(&self, source: &Source) -> usize {
        let of_head = (2 * self.problem.kv_len * source.head_dim).max(1);
        (self.machine.l2_bytes / 4 / of_head).min(self.all_kv_heads()).max(1)
    }

    /// Keys visible before and after the diagonal, which an offset moves.
    pub fn window(&self) -> [i32; 2] {
        window(&self.problem.band)
    }

    /// Whether the last query sees the last key at the diagonal (1), or the first the first (0).
    pub fn bottom_right(&self) -> i32 {
        bottom_right(&self.problem.band)
    }

    /// What kernels are told about lengths.
    pub fn lengths(&self, tensors: &Tensors) -> LengthArgs {
        let [window_left, window_right] = self.window();
        LengthArgs {
            q_rows: self.request.q_rows as i32,
            kv_rows: self.request.kv_rows as i32,
            cu_seqlens_q: tensors.cu_seqlens_q,
            cu_seqlens_k: tensors.cu_seqlens_k,
            window_left,
            window_right,
            bottom_right: self.bottom_right(),
        }
    }

    /// Whether every query sees as many keys.
    pub fn pieces_alike(&self) -> bool {
        self.problem.band.is_full() && self.request.lengths == Lengths::Dense && !self.lists_tiles()
    }

    /// Whether an explicit mask or a block mask says which tiles of keys are multiplied.
    pub fn lists_tiles(&self) -> bool {
        self.request.mask != MaskForm::None || self.problem.blocks.is_some()
    }

    /// Key heads and sequences with a mask of their own.
    pub fn seen_heads(&self, tensors: &Tensors) -> (usize, usize) {
        let [sequence, head] = self.seen_strides(tensors);
        let number = |stride: i32, all: usize| if stride == 0 { 1 } else { all };
        (number(head, self.problem.num_kv_heads), number(sequence, self.problem.batch))
    }

    /// Tiles from one sequence's words of keys that are seen to the next, and from one head's: 0 where the mask is the
    /// same.
    pub fn seen_strides(&self, tensors: &Tensors) -> [i32; 2] {
        let [batch, head, ..] = tensors.mask.strides;
        let tiles = self.seen_tiles();
        let of_head = if head == 0 { 0 } else { tiles };
        let heads = if head == 0 { 1 } else { self.problem.num_kv_heads };
        let alike = batch == 0 && self.request.lengths == Lengths::Dense;
        [if alike { 0 } else { heads * tiles }, of_head].map(|stride| stride as i32)
    }

    /// Tiles of a head's words of keys that are seen, and one more for the number of all that count.
    pub fn seen_tiles(&self) -> usize {
        self.problem.kv_len.div_ceil(KEY_TILE).max(1) + 1
    }

    /// Q and K as the kernels that prepare them read them.
    pub fn source(&self) -> Source {
        self.source_of(self.problem.head_dim)
    }

    /// V as the kernels that prepare it read it.
    pub fn value_source(&self) -> Source {
        self.source_of(self.problem.value_dim)
    }

    fn source_of(&self, head_dim: usize) -> Source {
        Source {
            dtype: self.problem.dtype,
            head_dim,
            aligned: self.request.aligned,
            lengths: self.request.lengths,
            masked: self.request.mask != MaskForm::None,
        }
    }

    /// What a kernel that reads K or V finds in the workspace of an explicit mask.
    pub fn keys(&self, pass: &ForwardPass) -> Keys {
        Keys { call: *self, seen: pass.find(slot::SEEN), ranks: pass.find(slot::RANKS) }
    }
}

/// K or V, with what says which of its rows count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keys {
    call: ForwardCall,
    seen: Slot,
    ranks: Slot,
}

impl Keys {
    /// The arguments for `tensor`, which is K or V.
    pub fn of(&self, tensor: &TensorArg, at: &Addresses<'_, Tensors>) -> InputArgs {
        let call = &self.call;
        let heads = [call.problem.num_kv_heads, call.problem.batch];
        let [window_left, window_right] = call.window();
        let [seen_stride_sequence, seen_stride_head] = call.seen_strides(at.tensors);
        InputArgs {
            cu_seqlens: at.tensors.cu_seqlens_k,
            q_rows: call.request.q_rows as i32,
            cu_seqlens_q: at.tensors.cu_seqlens_q,
            window_left,
            window_right,
            bottom_right: call.bottom_right(),
            seen: at.of(self.seen),
            ranks: at.of(self.ranks),
            seen_stride_sequence,
            seen_stride_head,
            ..InputArgs::unmasked(*tensor, call.request.kv_rows, heads)
        }
    }
}
