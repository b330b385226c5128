//! Explicit masks: which keys some query sees.

use super::call::{ForwardCall, ForwardPass, slot};
use super::tensors::Tensors;
use crate::attention::MaskForm;
use crate::operand::{Operand, OperandSource};
use crate::pass::{Addresses, Slot};
use crate::preprocess::{RankKeysArgs, RankKeysConfig, SEEN_WORDS, SeenKeysArgs, SeenKeysConfig};
use crate::sequence::{KEY_TILE, Lengths};
use crate::sparse::MOST_KEYS;

/// Adds the launches that say which keys some query sees, ahead of what reads K and V; none where attention's lists are
/// made by a launch that says it too, as nothing before attention asks.
pub(super) fn prepare(call: ForwardCall, [k, v]: [Operand; 2], pass: &mut ForwardPass) {
    let given = ![k, v].iter().any(|operand| operand.source == OperandSource::Workspace);
    if call.request.mask == MaskForm::None || given && is_of_keys(&call) {
        return;
    }
    see_keys(call, pass);
    if !given {
        rank_keys(call, pass);
    }
}

/// Whether the mask is the same for all queries and heads, and nothing else hides keys.
fn is_of_keys(call: &ForwardCall) -> bool {
    let (problem, extent) = (&call.problem, call.request.mask_extent);
    let alone = problem.band.is_full() && problem.blocks.is_none() && call.request.lengths == Lengths::Dense;
    alone && !extent.rows && !extent.heads && problem.kv_len <= MOST_KEYS
}

/// Where the words of keys that are seen go.
pub(super) fn seen_slot(call: &ForwardCall, pass: &mut ForwardPass) -> Slot {
    pass.slot(slot::SEEN, 4 * SEEN_WORDS * call.all_kv_heads() * call.seen_tiles())
}

/// Adds the launch that reduces the mask to bits for each tile of keys.
fn see_keys(call: ForwardCall, pass: &mut ForwardPass) {
    let seen = seen_slot(&call, pass);
    let clears = pass.clears_counters();
    let config = SeenKeysConfig { mask: call.request.mask, lengths: call.request.lengths };
    pass.launch(config, move |at, launch| {
        let (heads, sequences) = call.seen_heads(at.tensors);
        let grid = config.grid(call.problem.kv_len, heads, sequences);
        launch(grid, &seen_keys(&call, at, (at.of(seen), clears)).args(), &[]);
    });
}

/// Adds the launch that says how many keys before each tile count, which only means and scales ask.
fn rank_keys(call: ForwardCall, pass: &mut ForwardPass) {
    let seen = pass.find(slot::SEEN);
    let ranks = pass.slot(slot::RANKS, 4 * call.all_kv_heads() * call.seen_tiles());
    let config = RankKeysConfig;
    pass.launch(config, move |at, launch| {
        let [stride_sequence, stride_head] = call.seen_strides(at.tensors);
        let (heads, sequences) = call.seen_heads(at.tensors);
        let args = RankKeysArgs {
            seen: at.of(seen),
            ranks: at.of(ranks),
            tiles: call.problem.kv_len.div_ceil(KEY_TILE) as i32,
            heads: heads as i32,
            sequences: sequences as i32,
            stride_sequence,
            stride_head,
        };
        launch(config.grid(heads, sequences), &args.args(), &[]);
    });
}

fn seen_keys(call: &ForwardCall, at: &Addresses<'_, Tensors>, (seen, clears): (u64, bool)) -> SeenKeysArgs {
    let (problem, request) = (&call.problem, &call.request);
    let mask = at.tensors.mask;
    let [_, head, row, _] = mask.strides;
    let [window_left, window_right] = call.window();
    let [stride_sequence, stride_head] = call.seen_strides(at.tensors);
    let (heads, sequences) = call.seen_heads(at.tensors);
    let alike = row == 0 && problem.band.is_full();
    let (counters, counter_count) = at.counters(clears);
    SeenKeysArgs {
        mask,
        group: if head == 0 { 1 } else { problem.group_size() as i32 },
        heads: heads as i32,
        sequences: sequences as i32,
        rows: if alike { 1 } else { request.q_rows as i32 },
        q_rows: request.q_rows as i32,
        kv_rows: request.kv_rows as i32,
        cu_seqlens: at.tensors.cu_seqlens_k,
        window_left,
        window_right,
        bottom_right: call.bottom_right(),
        seen,
        stride_sequence,
        stride_head,
        counters,
        counter_count,
    }
}
