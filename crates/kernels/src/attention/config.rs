//! What an attention kernel is specialised for, and what a launch passes to it.

use sage_core::DType;
use sage_ptx::{Code, Val};

use crate::operand::{OperandSource, Operands};
use crate::params::kernel_params;
use crate::rotation::rotated_dim;
use crate::sequence::Lengths;
use crate::sparse::Packing;
use crate::tiling::{Engine, Tiling};

/// Threads of a warpgroup.
pub(super) const WARPGROUP: u32 = 128;

/// The named barrier where all consumers meet.
const CONSUMERS_BARRIER: i32 = 1;

/// The named barrier where the threads of the first consumer meet; the other consumers' follow.
const CONSUMER_BARRIER: i32 = 2;

/// Most channels of V whose products a block sums: with 16 rows they take 128 of a thread's registers.
const MOST_VALUES: usize = 256;

/// Everything that is known when a kernel is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionConfig {
    /// Element type of Q and of the output, and of K and V where they are read as given: f16 or bf16.
    pub dtype: DType,
    /// Channels of a head of Q and K, 1 to 576.
    pub head_dim: usize,
    /// Channels of a head of V and of the output, 1 to 576.
    pub value_dim: usize,
    /// Operands of both products.
    pub operands: Operands,
    /// Explicit mask.
    pub mask: MaskForm,
    /// Whether an additive mask is read as it was given, not packed.
    pub given_biases: bool,
    /// Whether a block mask's blocks end within tiles, and so are packed, with the explicit mask.
    pub block_edges: bool,
    /// Whether scores are capped.
    pub softcap: bool,
    /// Whether rows have attention sinks, which are added where keys are not split.
    pub sinks: bool,
    /// Whether the log-sum-exp is written.
    pub lse: bool,
    /// Whether K's mean was subtracted, which the log-sum-exp and a cap must know.
    pub smooth_k: bool,
    /// Rows of Q that share a subtracted mean, whose products with K are added from memory.
    pub smooth_q: Option<usize>,
    /// Whether V's mean was subtracted, and is added to the output.
    pub smooth_v: bool,
    /// Whether quantised K was multiplied by a Hadamard matrix, as Q then is here.
    pub rotate: bool,
    /// Where the lengths of sequences come from.
    pub lengths: Lengths,
    /// Whether rows of Q, K, V and the output start at multiples of 16 bytes and are whole such chunks.
    pub aligned: bool,
    /// Whether values are the first channels of keys, in the same memory, and so of their tiles: for large heads.
    pub values_in_keys: bool,
    /// Whether each block computes a part of the keys, to be combined afterwards (split-KV).
    pub split: bool,
    /// Whether the query heads of a key head are rows of one head, those of each query one after the other: K and V
    /// are then read once for all of them.
    pub heads_as_rows: bool,
    /// Whether heads have so few rows that a block's last warps have none, and leave products to the others.
    pub idle_warps: bool,
    /// Whether warpgroups get their queries through TMA, ahead of their piece of work; otherwise each lane reads its own.
    pub queries_by_tma: bool,
    /// Which tiles of keys are multiplied.
    pub tiles: TileSource,
    /// Tile shapes.
    pub tiling: Tiling,
}

/// Which tiles of keys a block of queries is multiplied with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TileSource {
    /// All that the band lets some row see.
    #[default]
    Band,
    /// Those of lists in device memory, [`TileListArgs`](super::TileListArgs).
    List,
}

/// Explicit masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MaskForm {
    /// None.
    None,
    /// One flag for each score: whether the key is visible.
    Bool,
    /// Added to the scaled scores.
    Bias(DType),
}

impl MaskForm {
    /// Part of a kernel's name.
    pub fn name(self) -> String {
        match self {
            MaskForm::None => "none".to_owned(),
            MaskForm::Bool => "mask".to_owned(),
            MaskForm::Bias(dtype) => format!("bias_{dtype}"),
        }
    }
}

impl AttentionConfig {
    /// How the masks that tiles read are packed, where they are.
    pub fn packing(&self) -> Option<Packing> {
        match self.mask {
            MaskForm::Bias(dtype) if !self.given_biases => Some(Packing::Biases(dtype)),
            MaskForm::Bool => Some(Packing::Bits),
            MaskForm::None | MaskForm::Bias(_) => self.block_edges.then_some(Packing::Bits),
        }
    }

    /// Whether the kernel adds the rows' attention sinks: of keys that are split, what merges the parts does.
    pub fn adds_sinks(&self) -> bool {
        self.sinks && !self.split
    }

    /// Whether rows of values that no query sees are cleared in shared memory, tile by tile: those of the workspace are
    /// zeros there, and copies by threads leave them out.
    pub fn clears_values(&self) -> bool {
        self.mask != MaskForm::None
            && self.operands.v.source == OperandSource::Given
            && self.tiling.engine() == Engine::Warpgroups
    }

    /// Query rows of a block.
    pub fn block_q(&self) -> usize {
        self.tiling.block_q()
    }

    /// Threads of a block that compute: with warpgroups its consumers'.
    pub fn threads(&self) -> u32 {
        self.tiling.warps() as u32 * 32
    }

    /// Threads of a block: those that compute, and with warpgroups the producer's.
    pub fn block_threads(&self) -> u32 {
        match self.tiling.engine() {
            Engine::Warps => self.threads(),
            Engine::Warpgroups => self.threads() + WARPGROUP,
        }
    }

    /// Waits for all threads that compute.
    pub(super) fn barrier(&self, code: &Code) {
        match self.tiling.engine() {
            Engine::Warps => code.barrier(),
            Engine::Warpgroups => code.named_barrier(CONSUMERS_BARRIER, self.threads()),
        }
    }

    /// Waits for the threads of the warp's consumer, or without warpgroups for the block's.
    pub(super) fn group_barrier<'k>(&self, code: &'k Code, warp: Val<'k, i32>) {
        match self.tiling.engine() {
            Engine::Warps => code.barrier(),
            Engine::Warpgroups => code.named_barrier((warp >> 2) + CONSUMER_BARRIER, WARPGROUP),
        }
    }

    /// Whether P is summed by products with ones beside V, which leaves the other units to the exponentials: where
    /// asked for, and heads fill their panels, and products and tiles have room for 8 columns more.
    pub(super) fn sums_by_mma(&self) -> bool {
        let tiling = &self.tiling;
        let whole = self.value_dim == self.value_columns();
        let room = whole && self.value_dim <= 128 && tiling.tile_keys() == 64;
        tiling.sums_by_mma() && room
    }

    /// Whether products read queries in shared memory as TMA has put them there.
    pub(super) fn multiplies_staged_queries(&self) -> bool {
        let as_given = self.operands.quantizer.is_none() && self.smooth_q.is_none() && !self.rotate;
        self.queries_by_tma && as_given && !self.smooth_k && !self.tiling.queries_in_registers()
    }

    /// Channels of a row of queries and keys in tiles, padded as those are.
    pub fn key_columns(&self) -> usize {
        key_columns(&self.operands, self.head_dim, self.rotate)
    }

    /// Channels of V in tiles, and of the block's output where that passes through their memory.
    pub fn value_columns(&self) -> usize {
        value_columns(&self.operands, self.value_dim)
    }

    /// Blocks that share the channels of V: sums of more than 256 would fill all registers.
    pub fn value_blocks(&self) -> usize {
        value_blocks(self.value_dim)
    }

    /// Channels of V whose products a block sums: of the last block, those up to the head's end.
    pub fn block_values(&self) -> usize {
        block_values(self.value_dim)
    }

    /// Channels of Q and K as they are multiplied.
    pub(super) fn depth(&self) -> usize {
        depth(self.head_dim, self.rotate)
    }

    /// Whether the last of the blocks that share the channels of V has fewer than the others.
    pub(super) fn last_values_are_fewer(&self) -> bool {
        !self.value_dim.is_multiple_of(self.block_values())
    }

    /// Tiles of a head of so many rows.
    pub fn q_tiles(&self, rows: usize) -> usize {
        rows.div_ceil(self.block_q())
    }

    /// Tiles of queries, each as often as blocks share the channels of V, and heads of all sequences and `splits` parts
    /// of the keys: each tile of each head is a block, or with warpgroups a piece of work that blocks share out among
    /// themselves. The heads have so many rows.
    pub fn pieces(&self, sequences: usize, heads: usize, rows: usize, splits: usize) -> [usize; 2] {
        [self.q_tiles(rows) * self.value_blocks(), heads * sequences * splits]
    }

    /// Heads of a sequence that blocks work on.
    pub(super) fn heads<'k>(&self, p: &AttentionParams<'k>) -> Val<'k, i32> {
        if self.heads_as_rows { p.kv_heads } else { p.group_size * p.kv_heads }
    }

    /// The key head of one of them.
    pub(super) fn kv_head<'k>(&self, p: &AttentionParams<'k>, head: Val<'k, i32>) -> Val<'k, i32> {
        if self.heads_as_rows { head } else { head / p.group_size }
    }
}

/// Part of the name of a kernel for heads of so many channels, and V's of so many.
pub(crate) fn dims_suffix(head_dim: usize, value_dim: usize) -> String {
    if head_dim == value_dim { format!("d{head_dim}") } else { format!("d{head_dim}v{value_dim}") }
}

/// The same in its description.
pub(crate) fn dims_description(head_dim: usize, value_dim: usize) -> String {
    let dims = format!("head_dim {head_dim}");
    if head_dim == value_dim { dims } else { format!("{dims}, value_dim {value_dim}") }
}

/// Channels of Q and K as they are multiplied.
fn depth(head_dim: usize, rotate: bool) -> usize {
    if rotate { rotated_dim(head_dim) } else { head_dim }
}

/// [`AttentionConfig::key_columns`] of such heads.
pub(crate) fn key_columns(operands: &Operands, head_dim: usize, rotate: bool) -> usize {
    operands.k.columns(depth(head_dim, rotate))
}

/// [`AttentionConfig::value_columns`] of such heads.
pub(crate) fn value_columns(operands: &Operands, value_dim: usize) -> usize {
    operands.v.columns(block_values(value_dim))
}

/// [`AttentionConfig::value_blocks`] of such heads.
pub(crate) fn value_blocks(value_dim: usize) -> usize {
    value_dim.div_ceil(MOST_VALUES)
}

/// Channels of V whose products a block sums.
fn block_values(value_dim: usize) -> usize {
    match value_blocks(value_dim) {
        0 | 1 => value_dim,
        blocks => value_dim.div_ceil(blocks).next_multiple_of(16),
    }
}

/// Bytes of a row of the panels that `wgmma` reads rows of so many bytes in.
pub(super) const fn panel_row_bytes(bytes: usize) -> usize {
    if bytes.is_multiple_of(128) { 128 } else { 64 }
}

/// Smallest of 64, 128 and 256 that holds `head_dim`: channels of a head in arrays of statistics, and columns of the
/// blocks of threads that compute them.
pub fn padded_dim(head_dim: usize) -> usize {
    head_dim.next_power_of_two().max(64)
}

kernel_params! {
    /// What a launch of an attention kernel passes. Strides are in elements.
    AttentionParams, AttentionArgs {
        /// Queries as given.
        q: (tensor 3),
        /// Keys: as given, or quantised tiles, whose strides mean nothing.
        k: (tensor 3),
        /// Values: as given, or tiles of the workspace, whose strides mean nothing.
        v: (tensor 3),
        /// Output.
        out: (tensor 3),
        /// Log-sum-exp, `[sequences, q_heads, q_rows]`, or `[q_heads, total]` when packed. Of a split: pairs for
        /// [`CombineConfig`](crate::combine::CombineConfig), `[splits]` such.
        lse: [f32],
        /// For a split: unrounded outputs `[splits, sequences, q_heads, q_rows, value_dim]`.
        partial: [f32],
        /// Scales of quantised K.
        k_scale: [f32],
        /// Mean of K, `[sequences, kv_heads, padded_dim]`.
        k_mean: [f32],
        /// Scale of each channel of V, `[sequences, kv_heads, padded_dim]`.
        v_scale: [f32],
        /// Mean of V, `[sequences, kv_heads, padded_dim]`.
        v_mean: [f32],
        /// Means of query blocks, `[sequences, q_heads, blocks, padded_dim]`.
        q_mean: [f32],
        /// Their products with K, `[sequences, q_heads, blocks, key tiles · 64]`.
        delta_s: [f32],
        /// Explicit mask.
        mask: (tensor 4),
        /// For a mask: which keys of a tile some query sees, [`SeenKeysConfig`](crate::preprocess::SeenKeysConfig).
        seen: [u32],
        /// For a mask: tiles from one sequence's words to the next.
        seen_stride_sequence: i32,
        /// For a mask: tiles from one key head's words to the next.
        seen_stride_head: i32,
        /// Boundaries of packed queries.
        cu_seqlens_q: [i32],
        /// Boundaries of packed keys, or valid keys of each batch entry.
        cu_seqlens_k: [i32],
        /// Query rows of the tensors.
        q_rows: i32,
        /// Key rows of the tensors.
        kv_rows: i32,
        /// Query heads that share a key head.
        group_size: i32,
        /// Key heads.
        kv_heads: i32,
        /// Key tiles of the workspace, all sequences together.
        key_tiles: i32,
        /// Blocks of query means of a sequence.
        q_blocks: i32,
        /// Key tiles of the longest sequence.
        max_tiles: i32,
        /// Keys visible before the diagonal; 2³⁰ for all.
        window_left: i32,
        /// Keys visible after the diagonal; 2³⁰ for all.
        window_right: i32,
        /// Whether the last query sees the last key at the diagonal (1), or the first the first (0).
        bottom_right: i32,
        /// Parts of the keys.
        splits: i32,
        /// For warpgroups: pieces of work that were taken, zero before every launch; null where pieces are all alike.
        taken: [u32],
        /// For warpgroups: tiles of queries of the longest sequence.
        q_tiles: i32,
        /// Heads of all sequences and parts of the keys.
        all_heads: i32,
        /// For warpgroups: heads whose pieces are handed out together, a divisor of `all_heads`.
        heads_together: i32,
        /// Query rows of all heads and batch entries: rows of the log-sum-exp.
        total_rows: i64,
        /// Factor on Q·Kᵀ.
        sm_scale: f32,
        /// Cap of the scaled scores.
        softcap: f32,
        /// Attention sinks.
        sinks: sinks,
    }
}
