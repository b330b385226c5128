//! What the launches of a pass are handed.

use sage_core::{Alignment, Problem};
use sage_ptx::{Arg, BoxedTensor};

use super::layout::Layout;
use super::{Launcher, Request, Step, Tensors, total_rows};
use crate::attention::{
    AttentionArgs, AttentionConfig, Engine, Scores, ValueSource, boxed_tensors, stage_bytes,
};
use crate::combine::CombineArgs;
use crate::grid::grid;
use crate::preprocess::{ConvertVArgs, DeltaSArgs, QuantizeKArgs, QuantizeVArgs, QueryMeansArgs, SampleArgs};
use crate::sequence::{KEY_TILE, Lengths, total_key_tiles};

/// "No limit" of a window: far beyond any key, and far from overflow.
const NO_LIMIT: i32 = 1 << 30;

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
        let rows = request.kv_rows as i32;
        let lead = lead(problem);
        match step {
            Step::QueryMeans(config) => {
                let [stride_batch, stride_head, stride_row] = t.q.strides;
                let args = QueryMeansArgs {
                    x: t.q.address,
                    mean: at(layout.q_mean),
                    cu_seqlens: t.cu_seqlens_q,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows: request.q_rows as i32,
                    q_heads: problem.num_q_heads as i32,
                    sequences: batch as i32,
                };
                launch(config.grid(problem.q_len, problem.num_q_heads, batch), &args.args())
            }
            Step::SampleK(config) | Step::SampleV(config) => {
                let of_keys = matches!(step, Step::SampleK(_));
                let tensor = if of_keys { &t.k } else { &t.v };
                let [stride_batch, stride_head, stride_row] = tensor.strides;
                let args = SampleArgs {
                    x: tensor.address,
                    mean: at(layout.k_mean),
                    scale: at(layout.v_scale),
                    factor: at(layout.v_factor),
                    cu_seqlens: t.cu_seqlens_k,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    kv_heads: heads as i32,
                    sequences: batch as i32,
                    v_max: self.v_max,
                    counters: self.workspace,
                    counter_count: if of_keys { (layout.counters / 4) as i32 } else { 0 },
                };
                launch(config.grid(heads, batch), &args.args())
            }
            Step::QuantizeK(config) => {
                let [stride_batch, stride_head, stride_row] = t.k.strides;
                let args = QuantizeKArgs {
                    x: t.k.address,
                    out: at(layout.k),
                    scale: at(layout.k_scale),
                    mean: at(layout.k_mean),
                    partials: at(layout.k_partials),
                    arrivals: at(layout.k_arrivals),
                    cu_seqlens: t.cu_seqlens_k,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    key_tiles,
                    kv_heads: heads as i32,
                    sequences: batch as i32,
                    lead: lead as i32,
                };
                launch(config.grid(kv_len, heads, batch, lead), &args.args())
            }
            Step::DeltaS(config) => {
                let [stride_batch, stride_head, stride_row] = t.k.strides;
                let args = DeltaSArgs {
                    x: t.k.address,
                    k_mean: at(layout.k_mean),
                    q_mean: at(layout.q_mean),
                    delta_s: at(layout.delta_s),
                    cu_seqlens: t.cu_seqlens_k,
                    cu_seqlens_q: t.cu_seqlens_q,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    q_rows: request.q_rows as i32,
                    kv_heads: heads as i32,
                    sequences: batch as i32,
                    group_size: problem.group_size() as i32,
                    q_blocks: self.q_blocks as i32,
                    block_rows: self.q_block as i32,
                };
                launch(config.grid(kv_len, heads, batch), &args.args())
            }
            Step::QuantizeV(config) => {
                let [stride_batch, stride_head, stride_row] = t.v.strides;
                let args = QuantizeVArgs {
                    x: t.v.address,
                    out: at(layout.v),
                    mean: at(layout.v_mean),
                    scale: at(layout.v_scale),
                    factor: at(layout.v_factor),
                    partials: at(layout.v_partials),
                    arrivals: at(layout.v_arrivals),
                    marked: at(layout.v_marked),
                    cu_seqlens: t.cu_seqlens_k,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    key_tiles,
                    v_max: self.v_max,
                    kv_heads: heads as i32,
                    sequences: batch as i32,
                    lead: lead as i32,
                };
                launch(config.grid(kv_len, heads, batch, lead), &args.args())
            }
            Step::ConvertV(config) => {
                let [stride_batch, stride_head, stride_row] = t.v.strides;
                let args = ConvertVArgs {
                    x: t.v.address,
                    out: at(layout.v),
                    cu_seqlens: t.cu_seqlens_k,
                    stride_batch,
                    stride_head,
                    stride_row,
                    rows,
                    key_tiles,
                    kv_heads: heads as i32,
                    sequences: batch as i32,
                };
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
                    partial_lse: at(layout.partial_lse),
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
        let limit = |side: Option<usize>| side.map_or(NO_LIMIT, |n| n.min(NO_LIMIT as usize) as i32);
        let quantised = matches!(config.scores, Scores::Int(_));
        let workspace_v = config.value_source == ValueSource::Workspace;
        let [q_tiles, all_heads] = self.pieces(config);
        AttentionArgs {
            q: t.q.address,
            k: if quantised { at(layout.k) } else { t.k.address },
            v: if workspace_v { at(layout.v) } else { t.v.address },
            out: t.out.address,
            lse: if config.split { at(layout.partial_lse) } else { t.lse },
            partial: at(layout.partial),
            k_scale: at(layout.k_scale),
            k_mean: at(layout.k_mean),
            v_scale: at(layout.v_scale),
            v_mean: at(layout.v_mean),
            q_mean: at(layout.q_mean),
            delta_s: at(layout.delta_s),
            mask: t.mask.0,
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
            window_left: limit(problem.band.left),
            window_right: limit(problem.band.right),
            bottom_right: i32::from(problem.band.alignment == Alignment::BottomRight),
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
