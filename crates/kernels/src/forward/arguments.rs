//! What the launches of a pass are handed.

use sage_core::{Alignment, Problem};
use sage_ptx::{Arg, BoxedTensor};

use super::layout::{Layout, seen_tiles};
use super::{Launcher, Request, Step, TensorArg, Tensors, total_rows};
use crate::attention::{
    AttentionArgs, AttentionConfig, Engine, Scores, ValueSource, boxed_tensors, stage_bytes,
};
use crate::combine::CombineArgs;
use crate::grid::grid;
use crate::preprocess::{
    ConvertVArgs, DeltaSArgs, InputArgs, QuantizeKArgs, QuantizeVArgs, QueryMeansArgs, RankKeysArgs,
    SampleArgs, SeenKeysArgs,
};
use crate::sequence::{KEY_TILE, Lengths, NO_LIMIT, total_key_tiles};

/// Bytes of K or V by which their statistics run ahead of quantising. At 16 KiB a tile these are more blocks than a GPU
/// holds at once, so that none waits; and a quarter of the L2 cache of the large GPUs, which is cut in halves that may
/// both hold a line, with what is being written beside it.
const LEAD_BYTES: usize = 12 << 20;

/// Bytes of K and V that attention works on at once where pieces of work differ in length: half the L2 cache of an H100, each
/// half of which may hold a copy.
const CACHED_BYTES: usize = 25 << 20;

/// Most heads that attention works on at once: their pieces are many times a GPU's multiprocessors, and the search
/// for a divisor is short.
const MOST_TOGETHER: usize = 4096;

/// What arguments are made of.
pub(super) struct Arguments<'a> {
    pub problem: &'a Problem,
    pub request: &'a Request,
    pub splits: usize,
    pub multiprocessors: u32,
    /// Query rows that share a mean, and how many such blocks the longest sequence has.
    pub q_block: usize,
    pub q_blocks: usize,
    pub layout: &'a Layout,
    pub tensors: &'a Tensors,
    pub workspace: u64,
    pub v_max: f32,
}

impl Arguments<'_> {
    /// Hands launch `index` over.
    pub fn launch<L: Launcher>(
        &self,
        step: &Step,
        index: usize,
        launcher: &mut L,
    ) -> std::result::Result<(), L::Error> {
        let mut launch = |grid, args: &[Arg]| launcher.launch(index, grid, args);
        let (problem, request, t) = (self.problem, self.request, self.tensors);
        let (batch, heads, kv_len) = (problem.batch, problem.num_kv_heads, problem.kv_len);
        let at = |offset: u64| self.workspace + offset;
        let layout = self.layout;
        let key_tiles = total_key_tiles(request.lengths, batch, request.kv_rows) as i32;
        let lead = lead(problem);
        match step {
            Step::SeenKeys(config) => {
                let (heads, sequences) = self.seen_heads();
                launch(config.grid(kv_len, heads, sequences), &self.seen_keys().args())
            }
            Step::RankKeys(config) => {
                let [stride_sequence, stride_head] = self.seen_strides();
                let (heads, sequences) = self.seen_heads();
                let args = RankKeysArgs {
                    seen: at(layout.seen),
                    ranks: at(layout.ranks),
                    tiles: kv_len.div_ceil(KEY_TILE) as i32,
                    heads: heads as i32,
                    sequences: sequences as i32,
                    stride_sequence,
                    stride_head,
                };
                launch(config.grid(heads, sequences), &args.args())
            }
            Step::QueryMeans(config) => {
                let of = [problem.num_q_heads, batch];
                let queries = InputArgs::unmasked(t.q.address, t.q.strides, request.q_rows, of);
                let args = QueryMeansArgs {
                    input: InputArgs {
                        cu_seqlens: t.cu_seqlens_q,
                        cu_seqlens_q: t.cu_seqlens_q,
                        q_rows: request.q_rows as i32,
                        ..queries
                    },
                    mean: at(layout.q_mean),
                };
                launch(config.grid(problem.q_len, problem.num_q_heads, batch), &args.args())
            }
            Step::SampleK(config) | Step::SampleV(config) => {
                let of_keys = matches!(step, Step::SampleK(_));
                let args = SampleArgs {
                    input: self.keys(if of_keys { &t.k } else { &t.v }),
                    mean: at(layout.k_mean),
                    scale: at(layout.v_scale),
                    factor: at(layout.v_factor),
                    v_max: self.v_max,
                    counters: self.workspace,
                    counter_count: if of_keys { (layout.counters / 4) as i32 } else { 0 },
                };
                launch(config.grid(heads, batch), &args.args())
            }
            Step::QuantizeK(config) => {
                let args = QuantizeKArgs {
                    input: self.keys(&t.k),
                    out: at(layout.k),
                    scale: at(layout.k_scale),
                    mean: at(layout.k_mean),
                    partials: at(layout.k_partials),
                    arrivals: at(layout.k_arrivals),
                    key_tiles,
                    lead: lead as i32,
                };
                launch(config.grid(kv_len, heads, batch, lead), &args.args())
            }
            Step::DeltaS(config) => {
                let args = DeltaSArgs {
                    input: self.keys(&t.k),
                    k_mean: at(layout.k_mean),
                    q_mean: at(layout.q_mean),
                    delta_s: at(layout.delta_s),
                    group_size: problem.group_size() as i32,
                    q_blocks: self.q_blocks as i32,
                    block_rows: self.q_block as i32,
                };
                launch(config.grid(kv_len, heads, batch), &args.args())
            }
            Step::QuantizeV(config) => {
                let args = QuantizeVArgs {
                    input: self.keys(&t.v),
                    out: at(layout.v),
                    mean: at(layout.v_mean),
                    scale: at(layout.v_scale),
                    factor: at(layout.v_factor),
                    partials: at(layout.v_partials),
                    arrivals: at(layout.v_arrivals),
                    marked: at(layout.v_marked),
                    key_tiles,
                    v_max: self.v_max,
                    lead: lead as i32,
                };
                launch(config.grid(kv_len, heads, batch, lead), &args.args())
            }
            Step::ConvertV(config) => {
                let args = ConvertVArgs { input: self.keys(&t.v), out: at(layout.v), key_tiles };
                launch(config.grid(kv_len, heads, batch), &args.args())
            }
            Step::Attention(config) => {
                let args = self.attention(config, key_tiles);
                let pieces = self.pieces(config);
                if config.tiling.engine == Engine::Warps {
                    return launch(grid(pieces[0], pieces[1]), &args.args());
                }
                let [k_map, v_map] = self.boxed_tensors(config, &args, key_tiles);
                let maps = [launcher.tensor_map(&k_map)?, launcher.tensor_map(&v_map)?];
                let mut all = [maps[0]; AttentionArgs::COUNT + 2];
                all[..AttentionArgs::COUNT].copy_from_slice(&args.args());
                all[AttentionArgs::COUNT..].copy_from_slice(&maps);
                let blocks = pieces.iter().product::<usize>().min(self.multiprocessors as usize);
                launcher.launch(index, [blocks as u32, 1, 1], &all)
            }
            Step::Combine(config) => {
                let [out_stride_batch, out_stride_head, out_stride_row] = t.out.strides;
                let total_rows = total_rows(problem, request);
                let args = CombineArgs {
                    partial: at(layout.partial),
                    partial_sums: at(layout.partial_sums),
                    out: t.out.address,
                    lse: t.lse,
                    out_stride_batch,
                    out_stride_head,
                    out_stride_row,
                    total_rows: total_rows as i32,
                    q_rows: request.q_rows as i32,
                    q_heads: problem.num_q_heads as i32,
                    splits: self.splits as i32,
                };
                launch(config.grid(total_rows), &args.args())
            }
        }
    }

    /// K or V, with what says which of its rows count.
    fn keys(&self, tensor: &TensorArg) -> InputArgs {
        let (problem, request, t) = (self.problem, self.request, self.tensors);
        let of = [problem.num_kv_heads, problem.batch];
        let [window_left, window_right] = self.window();
        let [seen_stride_sequence, seen_stride_head] = self.seen_strides();
        InputArgs {
            cu_seqlens: t.cu_seqlens_k,
            q_rows: request.q_rows as i32,
            cu_seqlens_q: t.cu_seqlens_q,
            window_left,
            window_right,
            bottom_right: self.bottom_right(),
            seen: self.workspace + self.layout.seen,
            ranks: self.workspace + self.layout.ranks,
            seen_stride_sequence,
            seen_stride_head,
            ..InputArgs::unmasked(tensor.address, tensor.strides, request.kv_rows, of)
        }
    }

    fn seen_keys(&self) -> SeenKeysArgs {
        let (problem, request, t) = (self.problem, self.request, self.tensors);
        let (mask, [batch, head, row, key]) = t.mask;
        let [window_left, window_right] = self.window();
        let [stride_sequence, stride_head] = self.seen_strides();
        let (heads, sequences) = self.seen_heads();
        let alike = row == 0 && problem.band.is_full();
        SeenKeysArgs {
            mask,
            mask_stride_batch: batch,
            mask_stride_head: head,
            mask_stride_row: row,
            mask_stride_key: key,
            group: if head == 0 { 1 } else { problem.group_size() as i32 },
            heads: heads as i32,
            sequences: sequences as i32,
            rows: if alike { 1 } else { request.q_rows as i32 },
            q_rows: request.q_rows as i32,
            kv_rows: request.kv_rows as i32,
            cu_seqlens: t.cu_seqlens_k,
            window_left,
            window_right,
            bottom_right: self.bottom_right(),
            seen: self.workspace + self.layout.seen,
            stride_sequence,
            stride_head,
        }
    }

    /// Key heads and sequences with a mask of their own.
    fn seen_heads(&self) -> (usize, usize) {
        let [stride_sequence, stride_head] = self.seen_strides();
        let of = |stride: i32, all: usize| if stride == 0 { 1 } else { all };
        (of(stride_head, self.problem.num_kv_heads), of(stride_sequence, self.problem.batch))
    }

    /// Tiles from one sequence's words of keys that are seen to the next, and from one head's: 0 where the mask is the same.
    fn seen_strides(&self) -> [i32; 2] {
        let (_, [batch, head, ..]) = self.tensors.mask;
        let tiles = seen_tiles(self.problem);
        let of_head = if head == 0 { 0 } else { tiles };
        let heads = if head == 0 { 1 } else { self.problem.num_kv_heads };
        let alike = batch == 0 && self.request.lengths == Lengths::Dense;
        [if alike { 0 } else { heads * tiles }, of_head].map(|stride| stride as i32)
    }

    /// Keys visible before and after the diagonal.
    fn window(&self) -> [i32; 2] {
        let band = self.problem.band;
        [band.left, band.right].map(|side| side.map_or(NO_LIMIT, |reach| reach.min(NO_LIMIT as usize) as i32))
    }

    fn bottom_right(&self) -> i32 {
        i32::from(self.problem.band.alignment == Alignment::BottomRight)
    }

    /// Tiles of queries and heads of the attention kernel.
    fn pieces(&self, config: &AttentionConfig) -> [usize; 2] {
        let problem = self.problem;
        config.pieces(problem.batch, problem.num_q_heads, problem.q_len, self.splits)
    }

    /// Heads whose pieces of work are handed out together. Where pieces differ in length there must be many to even out, but
    /// their keys and values must stay in cache.
    fn heads_together(&self, config: &AttentionConfig, all_heads: usize) -> i32 {
        let problem = self.problem;
        if self.request.pieces_alike(problem) {
            return 1;
        }
        let bytes = stage_bytes(config) / config.tiling.tile_keys * problem.kv_len;
        let most = CACHED_BYTES * problem.group_size() / bytes.max(1);
        let most = most.clamp(1, all_heads.min(MOST_TOGETHER));
        let divisor = (1..=most).rev().find(|&heads| all_heads.is_multiple_of(heads));
        divisor.unwrap_or(1) as i32
    }

    /// K and V for the kernels whose tiles are copied in bulk.
    fn boxed_tensors(
        &self,
        config: &AttentionConfig,
        args: &AttentionArgs,
        key_tiles: i32,
    ) -> [BoxedTensor; 2] {
        let (problem, t) = (self.problem, self.tensors);
        let batches = if self.request.lengths == Lengths::Packed { 1 } else { problem.batch };
        let shape =
            [problem.head_dim, self.request.kv_rows, problem.num_kv_heads, batches].map(|size| size as u64);
        let tiles = problem.num_kv_heads * key_tiles as usize;
        boxed_tensors(config, [(shape, t.k.strides), (shape, t.v.strides)], [args.k, args.v], tiles)
    }

    fn attention(&self, config: &AttentionConfig, key_tiles: i32) -> AttentionArgs {
        let (problem, request, t, layout) = (self.problem, self.request, self.tensors, self.layout);
        let at = |offset: u64| self.workspace + offset;
        let [window_left, window_right] = self.window();
        let [seen_stride_sequence, seen_stride_head] = self.seen_strides();
        let quantised = matches!(config.scores, Scores::Int(_));
        let workspace_v = config.value_source == ValueSource::Workspace;
        let [q_tiles, all_heads] = self.pieces(config);
        AttentionArgs {
            q: t.q.address,
            k: if quantised { at(layout.k) } else { t.k.address },
            v: if workspace_v { at(layout.v) } else { t.v.address },
            out: t.out.address,
            lse: if config.split { at(layout.partial_sums) } else { t.lse },
            partial: at(layout.partial),
            k_scale: at(layout.k_scale),
            k_mean: at(layout.k_mean),
            v_scale: at(layout.v_scale),
            v_mean: at(layout.v_mean),
            q_mean: at(layout.q_mean),
            delta_s: at(layout.delta_s),
            mask: t.mask.0,
            seen: at(layout.seen),
            seen_stride_sequence,
            seen_stride_head,
            cu_seqlens_q: t.cu_seqlens_q,
            cu_seqlens_k: t.cu_seqlens_k,
            q_stride_batch: t.q.strides[0],
            q_stride_head: t.q.strides[1],
            q_stride_row: t.q.strides[2],
            k_stride_batch: t.k.strides[0],
            k_stride_head: t.k.strides[1],
            k_stride_row: t.k.strides[2],
            v_stride_batch: t.v.strides[0],
            v_stride_head: t.v.strides[1],
            v_stride_row: t.v.strides[2],
            out_stride_batch: t.out.strides[0],
            out_stride_head: t.out.strides[1],
            out_stride_row: t.out.strides[2],
            mask_stride_batch: t.mask.1[0],
            mask_stride_head: t.mask.1[1],
            mask_stride_row: t.mask.1[2],
            mask_stride_key: t.mask.1[3],
            q_rows: request.q_rows as i32,
            kv_rows: request.kv_rows as i32,
            group_size: problem.group_size() as i32,
            kv_heads: problem.num_kv_heads as i32,
            key_tiles,
            q_blocks: self.q_blocks as i32,
            max_tiles: problem.kv_len.div_ceil(KEY_TILE).max(1) as i32,
            window_left,
            window_right,
            bottom_right: self.bottom_right(),
            splits: self.splits as i32,
            taken: layout.pieces_taken.map_or(0, at),
            q_tiles: q_tiles as i32,
            all_heads: all_heads as i32,
            heads_together: self.heads_together(config, all_heads),
            total_rows: total_rows(problem, request) as i64,
            sm_scale: problem.sm_scale,
            softcap: problem.logit_softcap.unwrap_or(0.0),
        }
    }
}

/// By how many heads statistics run ahead: as many as [`LEAD_BYTES`] hold.
fn lead(problem: &Problem) -> usize {
    let of_head = (2 * problem.kv_len * problem.head_dim).max(1);
    let all = problem.batch * problem.num_kv_heads;
    (LEAD_BYTES / of_head).min(all).max(1)
}
