//! Predicted times: how long a call takes of the GPU, by constants that were measured on one of its architecture.

use super::call::ForwardCall;
use super::cut::{self, Cut};
use super::forms::Forms;
use crate::attention::{MaskForm, padded_dim};
use crate::operand::{Operand, OperandSource};
use crate::sequence::{KEY_TILE, Lengths, seen_key_tiles};
use crate::tiling::Engine;
use crate::tuning::{Cost, cost};

/// Microseconds from the start of a call's first launch to its first instruction, and back.
const LAUNCH: f64 = 1.6;
/// Microseconds of the launches that prepare K, and of those that prepare V, beside what they move.
const PREPARING_KEYS: f64 = 3.4;
const PREPARING_VALUES: f64 = 6.3;
/// Microseconds of ranking keys, which a mask makes preparing wait for.
const RANKING: f64 = 6.0;
/// Microseconds of the launch that merges parts of the keys, beside what it moves.
const MERGING_LAUNCH: f64 = 3.2;
/// Bytes a microsecond of device memory: an H200's.
pub(super) const BANDWIDTH: f64 = 4.2e6;
/// By how much longer than at that bandwidth the launches that prepare take, and that which merges.
const PREPARING: f64 = 1.05;
const MERGING: f64 = 2.7;
/// The part of the longest piece's time by which the last multiprocessor ends after the mean one.
const UNEVEN: f64 = 0.23;

/// Microseconds at least that a block waits for 64 keys whose values come from rows that are not whole pairs of sectors:
/// TMA is slow with them.
const RAGGED_TILE: f64 = 0.55;

/// Rows of a group that computes by itself.
const GROUP_ROWS: usize = 64;

/// Bytes of an element of the caller's tensors.
const ELEMENT: f64 = 2.0;

/// Predicted microseconds of a call, cut in such a way; none where the costs of its kernels were not measured, and none
/// for masks of keys alone in tiles of 128 keys: their lists leave fewer keys out. With a tenth of 1024 keys padded,
/// 2 × 24 heads of 128 channels take 55.5 µs in those and 50.9 in tiles of 64; a mask of each score 56.7 and 59.6.
pub(super) fn microseconds(call: &ForwardCall, forms: &Forms, cut: &Cut) -> Option<f64> {
    let cost = cost(&call.machine, &forms.key, &cut.tuned.tiling)?;
    let masks_keys = call.request.mask != MaskForm::None && !call.request.mask_extent.rows;
    if masks_keys && cut.tuned.tiling.tile_keys() > KEY_TILE {
        return None;
    }
    let attention = attention(call, forms, cut, &cost).max(tensor_bytes(call) / BANDWIDTH);
    Some(LAUNCH + prepare(call, forms) + attention + merge(call, cut.splits))
}

/// The attention kernel's time, were memory free.
fn attention(call: &ForwardCall, forms: &Forms, cut: &Cut, cost: &Cost) -> f64 {
    let (problem, tiling) = (&call.problem, &cut.tuned.tiling);
    let padded = padded_dim(problem.head_dim) as f64;
    let missing = 1.0 - problem.head_dim.next_multiple_of(16) as f64 / padded;
    let pieces = cut::blocks(call, tiling) * cut.splits;
    let is_alone = pieces <= call.machine.multiprocessors;
    let part = if is_alone { cost.alone } else { 1.0 };
    let is_ragged = tiling.engine() == Engine::Warpgroups
        && forms.operands.v.source == OperandSource::Given
        && !(ELEMENT as usize * problem.value_dim).is_multiple_of(64);
    let least = if is_ragged { RAGGED_TILE * f64::from(tiling.min_blocks()) } else { 0.0 };
    let of_tile = (cost.tile * (1.0 - cost.channels * missing)).max(least);
    let of_tiles = |tiles: f64| part * (cost.piece + of_tile * (tiles / cut.splits as f64).max(1.0));
    let slots = call.machine.resident_blocks(tiling.min_blocks()) as f64;
    let pieces = pieces as f64;
    let heads = (problem.batch * problem.num_q_heads * cut.splits) as f64;
    // Of an explicit mask's tiles nothing is known before the call: its pieces, without a band, are taken for alike.
    if problem.band.is_full() && call.request.lengths == Lengths::Dense {
        let keys = problem.kv_len.next_multiple_of(tiling.tile_keys());
        return (pieces / slots).ceil() * of_tiles(keys.div_ceil(KEY_TILE) as f64);
    }
    let rows = tiling.block_q();
    let tiles_of = |first: usize| seen_key_tiles(problem, first, GROUP_ROWS) as f64;
    let times = (0..problem.q_len).step_by(rows).map(|first| {
        // Each group passes the tiles that only the others' rows see, which leaves the multiprocessor to them.
        let groups = (first..(first + rows).min(problem.q_len)).step_by(GROUP_ROWS);
        of_tiles(groups.map(tiles_of).sum::<f64>() * GROUP_ROWS as f64 / rows as f64)
    });
    let (sum, longest) = times.fold((0.0, 0f64), |(sum, longest), time| (sum + time, longest.max(time)));
    if pieces <= slots { longest } else { heads * sum / slots + UNEVEN * longest }
}

/// The time of the launches that prepare K and V.
fn prepare(call: &ForwardCall, forms: &Forms) -> f64 {
    let problem = &call.problem;
    let rows = (problem.batch * problem.num_kv_heads * problem.kv_len) as f64;
    let of = |operand: Operand, launches: f64, channels: usize| match operand.source {
        // Read in 16 bits and written in 8.
        OperandSource::Workspace => launches + PREPARING * 3.0 * rows * channels as f64 / BANDWIDTH,
        OperandSource::Given | OperandSource::Registers => 0.0,
    };
    let prepared = of(forms.operands.k, PREPARING_KEYS, problem.head_dim)
        + of(forms.operands.v, PREPARING_VALUES, problem.value_dim);
    let waits = prepared > 0.0 && call.request.mask != MaskForm::None;
    prepared + if waits { RANKING } else { 0.0 }
}

/// The time of the launch that merges parts of the keys.
pub(super) fn merge(call: &ForwardCall, splits: usize) -> f64 {
    let problem = &call.problem;
    if splits == 1 {
        return 0.0;
    }
    let outputs = splits * problem.batch * problem.num_q_heads * problem.q_len * problem.value_dim;
    // Written in single precision, and read.
    MERGING_LAUNCH + MERGING * 8.0 * outputs as f64 / BANDWIDTH
}

/// Bytes of Q, K, V and the output.
pub(super) fn tensor_bytes(call: &ForwardCall) -> f64 {
    let problem = &call.problem;
    let rows = problem.num_q_heads * problem.q_len + problem.num_kv_heads * problem.kv_len;
    ELEMENT * (problem.batch * rows * (problem.head_dim + problem.value_dim)) as f64
}
