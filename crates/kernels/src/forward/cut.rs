//! How attention's work is cut: its tile shape, and the parts of the keys.

use super::call::ForwardCall;
use super::choice::FEW_QUERIES;
use super::forms::Forms;
use super::predicted;
use crate::attention::value_blocks;
use crate::tiling::Tiling;
use crate::tuning::{Tuned, alternatives, of_blocks, tiling};

/// Fewest tiles of keys of a part: fewer cost more to merge than they save.
const LEAST_TILES: usize = 4;

/// How the work is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// The attention kernel's tile shape, and why.
    pub tuned: Tuned,
    /// Parts of the keys.
    pub splits: usize,
}

impl Cut {
    /// The cut for a call: as asked for, or the one of the shortest predicted time, or where none is predicted that of
    /// the tuning table.
    pub fn of(call: &ForwardCall, forms: &Forms) -> Self {
        let of_table = Cut::of_table(call, forms);
        let asked_for = call.request.tiling.is_some() || call.problem.blocks.is_some();
        // Calls of few queries are bound by memory, which the table's cut keeps busy.
        if asked_for || call.problem.q_len <= FEW_QUERIES {
            return of_table;
        }
        let predicted = |cut: &Cut| predicted::microseconds(call, forms, cut);
        let timed = Cut::all(call, forms).into_iter().filter_map(|cut| Some((predicted(&cut)?, cut)));
        timed.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or(of_table, |(_, cut)| cut)
    }

    /// The cut as asked for, or the tuning table's.
    fn of_table(call: &ForwardCall, forms: &Forms) -> Self {
        let (machine, key) = (&call.machine, &forms.key);
        let tuned = match call.request.tiling {
            Some(tiling) => Tuned { tiling, reason: "as asked for, or as `sageattn tune` measured" },
            None => tiling(machine, key),
        };
        let tuned = call.problem.blocks.map_or(tuned, |blocks| of_blocks(machine, key, tuned, blocks));
        Cut { tuned, splits: call.request.splits.unwrap_or_else(|| splits(call, &tuned.tiling)) }
    }

    /// All cuts that are worth a thought, the tuning table's first.
    pub fn all(call: &ForwardCall, forms: &Forms) -> Vec<Self> {
        let own = Cut::of_table(call, forms);
        let mut all = vec![own];
        if call.request.tiling.is_some() || call.problem.blocks.is_some() {
            return all;
        }
        for tuned in alternatives(&call.machine, &forms.key) {
            let blocks = blocks(call, &tuned.tiling);
            let slots = call.machine.resident_blocks(tuned.tiling.min_blocks());
            let most = most_splits(call, &tuned.tiling);
            let parts = [1, slots / blocks.max(1), 2 * slots / blocks.max(1), splits(call, &tuned.tiling)];
            for splits in parts.map(|parts| parts.clamp(1, most)) {
                let is_new = |cut: &Cut| cut.tuned.tiling != tuned.tiling || cut.splits != splits;
                if call.request.splits.is_none_or(|wanted| wanted == splits) && all.iter().all(is_new) {
                    all.push(Cut { tuned, splits });
                }
            }
        }
        all
    }
}

/// Blocks of a launch, or pieces of its work, where keys are not split.
pub(super) fn blocks(call: &ForwardCall, tiling: &Tiling) -> usize {
    let [heads, rows] = call.heads_and_rows();
    rows.div_ceil(tiling.block_q()) * value_blocks(call.problem.value_dim) * heads * call.problem.batch
}

/// Most parts of the keys that are worth merging.
fn most_splits(call: &ForwardCall, tiling: &Tiling) -> usize {
    (call.problem.kv_len.div_ceil(tiling.tile_keys()) / LEAST_TILES).max(1)
}

/// Parts of the keys of a call whose time is not predicted: those that give every multiprocessor a block, where the
/// queries alone do not. Calls of few queries take as long as memory does, which is busy while all places of blocks are.
fn splits(call: &ForwardCall, tiling: &Tiling) -> usize {
    let blocks = blocks(call, tiling);
    let wanted = 2 * call.machine.multiprocessors;
    let most = most_splits(call, tiling);
    let slots = call.machine.resident_blocks(tiling.min_blocks());
    if blocks == 0 {
        1
    } else if blocks * 2 <= wanted {
        (wanted / blocks).min(most)
    } else if blocks > slots && call.problem.q_len <= FEW_QUERIES {
        evened_out(call, blocks, slots).min(most)
    } else {
        1
    }
}

/// Most parts that are looked at to even out the last round of blocks.
const MOST_EVENED: usize = 8;

/// Parts of the keys that leave the fewest of so many places of blocks empty in their last round, if that saves more than
/// merging costs.
fn evened_out(call: &ForwardCall, blocks: usize, slots: usize) -> usize {
    let time = predicted::tensor_bytes(call) / predicted::BANDWIDTH;
    let rounds = |parts: usize| (blocks * parts).div_ceil(slots) as f64 / parts as f64;
    let even = blocks as f64 / slots as f64;
    let cost = |parts: usize| time * rounds(parts) / even + predicted::merge(call, parts);
    let compared = |a: &usize, b: &usize| cost(*a).total_cmp(&cost(*b));
    (1..=MOST_EVENED).min_by(compared).unwrap_or(1)
}
