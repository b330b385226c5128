//! The attention kernel itself, and what merges the parts of split keys.

use sage_core::Scheme;

use super::call::{ForwardCall, ForwardPass, slot};
use super::cut::Cut;
use super::forms::{Forms, has_words, packs_biases};
use super::lists::TileLists;
use super::tensors::Tensors;
use crate::attention::{
    AttentionArgs, AttentionConfig, MappedOperand, MaskForm, TileSource, boxed_tensor, stage_bytes,
};
use crate::combine::{CombineArgs, CombineConfig, PART};
use crate::grid::grid;
use crate::operand::{Operand, OperandSource};
use crate::pass::{Addresses, Slot};
use crate::sequence::{KEY_TILE, Lengths};
use crate::sparse::Packing;
use crate::tensor::TensorArg;
use crate::tiling::{Engine, Tiling};
use crate::tuning::{Key, Tuned};

/// Most heads that attention works on at once: their pieces are many times a GPU's multiprocessors, and the search
/// for a divisor is short.
const MOST_TOGETHER: usize = 4096;

/// What the attention kernel is chosen by.
pub(super) struct PlannedAttention {
    call: ForwardCall,
    config: AttentionConfig,
    /// What its tile shape is chosen for.
    pub key: Key,
    /// Parts that keys are split into.
    pub splits: usize,
}

impl PlannedAttention {
    /// The kernel's tile shape.
    pub fn tiling(&self) -> Tiling {
        self.config.tiling
    }

    /// The kernel for operands in such forms; says why to `reasons`.
    pub fn new(call: ForwardCall, scheme: &Scheme, forms: &Forms, reasons: &mut Vec<String>) -> Self {
        let (problem, request) = (&call.problem, &call.request);
        let Forms { operands, smooth_q, key } = *forms;
        let Cut { tuned, splits } = Cut::of(&call, forms);
        let tuned =
            if problem.kv_len == 0 { Tuned { tiling: tuned.tiling.without_keys(), ..tuned } } else { tuned };
        let whole_tiles = |[rows, keys]: [usize; 2]| {
            rows.is_multiple_of(tuned.tiling.block_q()) && keys.is_multiple_of(tuned.tiling.tile_keys())
        };
        let mut config = AttentionConfig {
            dtype: problem.dtype,
            head_dim: problem.head_dim,
            value_dim: problem.value_dim,
            operands,
            mask: request.mask,
            given_biases: matches!(request.mask, MaskForm::Bias(_))
                && !(packs_biases(&call) && has_words(&tuned.tiling, &key, &operands)),
            block_edges: !problem.blocks.is_none_or(whole_tiles),
            softcap: problem.logit_softcap.is_some(),
            sinks: problem.sinks,
            lse: request.lse,
            smooth_k: scheme.smooth.k.is_on(),
            smooth_q,
            smooth_v: scheme.smooth.v,
            rotate: scheme.rotate,
            lengths: request.lengths,
            aligned: request.aligned,
            values_in_keys: key.values_in_keys,
            split: false,
            heads_as_rows: call.heads_as_rows,
            idle_warps: tuned.tiling.engine() == Engine::Warps
                && call.heads_and_rows()[1] <= (tuned.tiling.warps() - 1) * tuned.tiling.rows_per_warp(),
            // The rows of several heads are no box of the tensor.
            queries_by_tma: tuned.tiling.engine() == Engine::Warpgroups
                && request.has_query_map
                && !call.heads_as_rows,
            tiles: if call.lists_tiles() { TileSource::List } else { TileSource::Band },
            tiling: tuned.tiling,
        };
        reasons.push(format!(
            "{} warps of {} query rows, tiles of {} keys: {}",
            config.tiling.warps(),
            config.tiling.rows_per_warp(),
            config.tiling.tile_keys(),
            tuned.reason
        ));
        if splits > 1 {
            reasons.push(format!("keys in {splits} parts: the query blocks alone would leave the GPU idle"));
            config.split = true;
        }
        PlannedAttention { call, config, key, splits }
    }

    /// Adds the launches, whose operands are those of the launches before.
    pub fn launch(&self, pass: &mut ForwardPass) {
        let lists = self.call.lists_tiles().then(|| TileLists::make(&self.call, &self.config, pass));
        let slots = AttentionSlots::of(self, pass);
        let (call, config, splits) = (self.call, self.config, self.splits);
        let [q_tiles, all_heads] = self.pieces();
        let boxed = move |operand: MappedOperand, at: &Addresses<'_, Tensors>, args: &AttentionArgs| {
            let (problem, t) = (&call.problem, at.tensors);
            let batches = if call.request.lengths == Lengths::Packed { 1 } else { problem.batch };
            let shape = |channels: usize, rows: usize, heads: usize| {
                [channels, rows, heads, batches].map(|size| size as u64)
            };
            let of_keys = |channels: usize| shape(channels, call.request.kv_rows, problem.num_kv_heads);
            let of_queries = shape(problem.head_dim, call.request.q_rows, problem.num_q_heads);
            let (given, address) = match operand {
                MappedOperand::Keys => ((of_keys(problem.head_dim), t.k.strides), args.k.address),
                MappedOperand::Values => ((of_keys(problem.value_dim), t.v.strides), args.v.address),
                MappedOperand::Queries => ((of_queries, t.q.strides), args.q.address),
            };
            boxed_tensor(&config, operand, given, address, problem.num_kv_heads * call.key_tiles())
        };
        let together = heads_together(&call, &config, all_heads);
        pass.launch(config, move |at, launch| {
            let args = AttentionArgs {
                q_tiles: q_tiles as i32,
                all_heads: all_heads as i32,
                heads_together: together as i32,
                splits: splits as i32,
                ..slots.args(&call, &config, at)
            };
            let (plain, listed) = (args.args(), lists.map(|lists| lists.args(&args, at)));
            let values = listed.as_ref().map_or(&plain[..], |listed| &listed[..]);
            let with_sinks = config.adds_sinks().then(|| args.sinks.after(values));
            let values = with_sinks.as_deref().unwrap_or(values);
            let grid = match config.tiling.engine() {
                Engine::Warps => grid(q_tiles, all_heads),
                Engine::Warpgroups => {
                    let resident = call.machine.resident_blocks(config.tiling.min_blocks());
                    [(q_tiles * all_heads).min(resident) as u32, 1, 1]
                }
            };
            // A launch allocates nothing.
            let boxed = |&operand: &MappedOperand| boxed(operand, at, &args);
            match config.mapped() {
                [k, v, q] => launch(grid, values, &[k, v, q].map(boxed)),
                [k, v] => launch(grid, values, &[k, v].map(boxed)),
                _ => launch(grid, values, &[]),
            }
        });
        if splits > 1 {
            self.combine(pass);
        }
    }

    /// Tiles of queries, and heads of all sequences and parts of the keys.
    fn pieces(&self) -> [usize; 2] {
        let [heads, rows] = self.call.heads_and_rows();
        self.config.pieces(self.call.problem.batch, heads, rows, self.splits)
    }

    fn combine(&self, pass: &mut ForwardPass) {
        let (problem, request, splits) = (self.call.problem, self.call.request, self.splits);
        let total_rows = self.call.total_rows();
        let (partial, partial_sums) = (pass.find(slot::PARTIAL), pass.find(slot::PARTIAL_SUMS));
        let lse = pass.find(slot::LSE);
        let config = CombineConfig {
            sinks: problem.sinks,
            ..CombineConfig::new(problem.dtype, problem.value_dim, request.lse, splits)
        };
        pass.launch(config, move |at, launch| {
            let args = CombineArgs {
                partial: at.of(partial),
                partial_sums: at.of(partial_sums),
                out: at.tensors.out,
                lse: lse_address(lse, at),
                total_rows: total_rows as i32,
                q_rows: request.q_rows as i32,
                q_heads: problem.num_q_heads as i32,
                splits: splits as i32,
                sinks: at.tensors.sinks,
            };
            let plain = args.args();
            let with_sinks = config.sinks.then(|| args.sinks.after(&plain));
            launch(config.grid(total_rows), with_sinks.as_deref().unwrap_or(&plain), &[]);
        });
    }
}

/// What the attention kernel reads in the workspace, and writes there.
#[derive(Clone, Copy)]
struct AttentionSlots {
    seen: Slot,
    q_mean: Slot,
    k: Slot,
    k_scale: Slot,
    k_mean: Slot,
    delta_s: Slot,
    v: Slot,
    v_scale: Slot,
    v_mean: Slot,
    lse: Slot,
    partial: Slot,
    partial_sums: Slot,
    pieces_taken: Slot,
}

impl AttentionSlots {
    fn of(attention: &PlannedAttention, pass: &mut ForwardPass) -> Self {
        let PlannedAttention { call, config, splits, .. } = attention;
        let rows = splits * call.total_rows();
        let (mut partial, mut partial_sums, mut pieces_taken) = (Slot::NONE, Slot::NONE, Slot::NONE);
        if config.split {
            partial = pass.slot(slot::PARTIAL, 4 * rows * call.problem.value_dim);
            partial_sums = pass.slot(slot::PARTIAL_SUMS, 4 * PART * rows);
        }
        if config.tiling.engine() == Engine::Warpgroups && !call.pieces_alike() {
            pieces_taken = pass.counters("pieces_taken", 1);
        }
        AttentionSlots {
            seen: pass.find(slot::SEEN),
            q_mean: pass.find(slot::Q_MEAN),
            k: pass.find(slot::K),
            k_scale: pass.find(slot::K_SCALE),
            k_mean: pass.find(slot::K_MEAN),
            delta_s: pass.find(slot::DELTA_S),
            v: pass.find(slot::V),
            v_scale: pass.find(slot::V_SCALE),
            v_mean: pass.find(slot::V_MEAN),
            lse: pass.find(slot::LSE),
            partial,
            partial_sums,
            pieces_taken,
        }
    }

    /// The arguments but for those that say how the work is shared out.
    fn args(
        &self,
        call: &ForwardCall,
        config: &AttentionConfig,
        at: &Addresses<'_, Tensors>,
    ) -> AttentionArgs {
        let (problem, request, t) = (&call.problem, &call.request, at.tensors);
        let [window_left, window_right] = call.window();
        let [seen_stride_sequence, seen_stride_head] = call.seen_strides(t);
        let tensor = |operand: Operand, slot: Slot, given: TensorArg| match operand.source {
            OperandSource::Workspace => TensorArg { address: at.of(slot), ..given },
            OperandSource::Given | OperandSource::Registers => given,
        };
        AttentionArgs {
            q: t.q,
            k: tensor(config.operands.k, self.k, t.k),
            v: tensor(config.operands.v, self.v, t.v),
            out: t.out,
            lse: if config.split { at.of(self.partial_sums) } else { lse_address(self.lse, at) },
            partial: at.of(self.partial),
            k_scale: at.of(self.k_scale),
            k_mean: at.of(self.k_mean),
            v_scale: at.of(self.v_scale),
            v_mean: at.of(self.v_mean),
            q_mean: at.of(self.q_mean),
            delta_s: at.of(self.delta_s),
            mask: t.mask,
            seen: at.of(self.seen),
            seen_stride_sequence,
            seen_stride_head,
            cu_seqlens_q: t.cu_seqlens_q,
            cu_seqlens_k: t.cu_seqlens_k,
            q_rows: request.q_rows as i32,
            kv_rows: request.kv_rows as i32,
            group_size: problem.group_size() as i32,
            kv_heads: problem.num_kv_heads as i32,
            key_tiles: call.key_tiles() as i32,
            q_blocks: config.smooth_q.map_or(0, |rows| call.query_blocks(rows)) as i32,
            max_tiles: problem.kv_len.div_ceil(KEY_TILE).max(1) as i32,
            window_left,
            window_right,
            bottom_right: call.bottom_right(),
            taken: at.of(self.pieces_taken),
            total_rows: call.total_rows() as i64,
            sm_scale: problem.sm_scale,
            softcap: problem.logit_softcap.unwrap_or(0.0),
            sinks: t.sinks,
            ..AttentionArgs::default()
        }
    }
}

/// Where log-sum-exps are written: in a slot of the workspace where the caller wants none.
pub(super) fn lse_address(slot: Slot, at: &Addresses<'_, Tensors>) -> u64 {
    if slot == Slot::NONE { at.tensors.lse } else { at.of(slot) }
}

/// Heads whose pieces of work are handed out together. Where pieces differ in length there must be many to even out,
/// but their keys and values must stay in cache: in half of it, as each half of a large GPU's may hold a copy. Where
/// heads share long biases, cached or not, pieces that run at the same time should read little of both: `n` heads at
/// once read `n` heads' keys and the biases of `1 / n` as many rows.
fn heads_together(call: &ForwardCall, config: &AttentionConfig, all_heads: usize) -> usize {
    if call.pieces_alike() {
        return 1;
    }
    let of_key = stage_bytes(config) / config.tiling.tile_keys();
    let bytes = of_key * call.problem.kv_len;
    let group = if config.heads_as_rows { 1 } else { call.problem.group_size() };
    let mut most = call.machine.l2_bytes / 2 * group / bytes.max(1);
    if let Some(Packing::Biases(dtype)) = config.packing() {
        let biases = call.machine.multiprocessors * config.block_q() * dtype.bytes();
        most = most.max((biases * group / of_key.max(1)).isqrt());
    }
    let most = most.clamp(1, all_heads.clamp(1, MOST_TOGETHER));
    let divisor = (1..=most).rev().find(|&heads| all_heads.is_multiple_of(heads));
    divisor.unwrap_or(1)
}
