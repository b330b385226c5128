//! Explicit masks: which keys some query sees.

use super::call::{ForwardCall, ForwardPass, slot};
use super::tensors::Tensors;
use crate::pass::Addresses;
use crate::preprocess::{RankKeysArgs, RankKeysConfig, SEEN_WORDS, SeenKeysArgs, SeenKeysConfig};
use crate::sequence::KEY_TILE;

/// Adds the launch that reduces the mask to bits for each tile of keys.
pub(super) fn see_keys(call: ForwardCall, pass: &mut ForwardPass) {
    let words = SEEN_WORDS * call.all_kv_heads() * call.seen_tiles();
    let seen = pass.slot(slot::SEEN, 4 * words);
    let config = SeenKeysConfig { mask: call.request.mask, lengths: call.request.lengths };
    pass.launch(config, move |at, launch| {
        let (heads, sequences) = call.seen_heads(at.tensors);
        let grid = config.grid(call.problem.kv_len, heads, sequences);
        launch(grid, &seen_keys(&call, at, at.of(seen)).args(), &[]);
    });
}

/// Adds the launch that says how many keys before each tile count, which only means and scales ask.
pub(super) fn rank_keys(call: ForwardCall, pass: &mut ForwardPass) {
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

fn seen_keys(call: &ForwardCall, at: &Addresses<'_, Tensors>, seen: u64) -> SeenKeysArgs {
    let (problem, request) = (&call.problem, &call.request);
    let mask = at.tensors.mask;
    let [_, head, row, _] = mask.strides;
    let [window_left, window_right] = call.window();
    let [stride_sequence, stride_head] = call.seen_strides(at.tensors);
    let (heads, sequences) = call.seen_heads(at.tensors);
    let alike = row == 0 && problem.band.is_full();
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
    }
}
