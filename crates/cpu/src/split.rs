//! Attention of few queries: keys and values are read where they lie, split between threads, and the parts are
//! merged by their log-sum-exp.

use rayon::prelude::*;
use sage_core::{Problem, Sequence};

use crate::forward::{Attention, totals};
use crate::kernels::{DirectScores, DirectValues, Load, RowState, Softmax};
use crate::plan::SPLIT_KEYS;
use crate::rows::HeadRows;
use crate::tile::TILE_KEYS;
use crate::visibility::{BlockRows, Row, mask_hides, union};

/// All queries of one key head, and the keys that any of them sees.
struct Unit {
    sequence_index: usize,
    sequence: Sequence,
    kv_head: usize,
    rows: Vec<Row>,
    first_part: usize,
    parts: usize,
}

/// What a run of keys adds to every row of its unit.
pub(crate) struct Part {
    /// Rows of `value_dim` numbers or more.
    pub out: Vec<f32>,
    pub state: RowState,
}

impl<E: Load> Attention<'_, '_, E> {
    /// Computes the call.
    pub fn split(&self) {
        let group_size = self.call.problem.group_size();
        let mut units = Vec::new();
        let mut parts = Vec::new();
        for (sequence_index, sequence) in self.call.sequences().enumerate() {
            for kv_head in 0..self.call.problem.num_kv_heads {
                let rows: Vec<Row> = (kv_head * group_size..(kv_head + 1) * group_size)
                    .flat_map(|head| (0..sequence.q_len).map(move |i| (head, i)))
                    .map(|(head, i)| Row::new(self.call, &sequence, head, i))
                    .collect();
                let visible = union(&rows);
                let first = visible.start / TILE_KEYS * TILE_KEYS;
                let starts = (first..visible.end).step_by(SPLIT_KEYS);
                let (first_part, count) = (parts.len(), starts.len());
                parts.extend(starts.map(|start| (units.len(), start..visible.end.min(start + SPLIT_KEYS))));
                units.push(Unit { sequence_index, sequence, kv_head, rows, first_part, parts: count });
            }
        }
        let computed: Vec<Part> = parts
            .par_iter()
            .with_max_len(1)
            .map(|(unit, keys)| self.part(&units[*unit], keys.clone()))
            .collect();
        units.par_iter().for_each(|unit| {
            self.merge(&unit.sequence, &unit.rows, &computed[unit.first_part..][..unit.parts]);
        });
    }

    fn part(&self, unit: &Unit, keys: std::ops::Range<usize>) -> Part {
        let Problem { head_dim, value_dim, .. } = self.call.problem;
        let rows = unit.rows.len();
        let mut q = vec![0f32; rows * head_dim];
        for (row, q) in unit.rows.iter().zip(q.chunks_exact_mut(head_dim)) {
            E::widen(self.queries(&unit.sequence, row.head).row(row.index), q);
            q.iter_mut().for_each(|x| *x *= self.score_scale());
        }
        let (k, v) = (self.keys(&unit.sequence, unit.kv_head), self.values(&unit.sequence, unit.kv_head));
        let mut part = Part { out: vec![0.0; rows * value_dim], state: RowState::default() };
        part.state.reset(rows);
        let mut scores = vec![0f32; rows * TILE_KEYS];
        let seen = self.seen.head(unit.sequence_index, unit.kv_head);
        let blocks = BlockRows::new(self.call, unit.sequence_index, &unit.rows);
        let mut copies = [Vec::new(), Vec::new()];
        for first in keys.clone().step_by(TILE_KEYS) {
            let tile = first..keys.end.min(first + TILE_KEYS);
            let hidden = seen.is_some_and(|seen| seen.all_hidden(tile.clone()));
            let masked = || mask_hides(self.call, unit.sequence_index, &unit.rows, &tile);
            if hidden || blocks.hide(&tile) || masked() {
                continue;
            }
            let seen = seen.map_or(&[][..], |seen| seen.range(tile.clone()));
            let [k_copy, v_copy] = &mut copies;
            let (k, k_stride) = contiguous(&k, tile.clone(), k_copy);
            let (v, v_stride) = contiguous(&v, tile.clone(), v_copy);
            let (keys, columns) = (tile.len(), tile.len().next_multiple_of(self.kernels.packing.width));
            let Part { out, state } = &mut part;
            let scores = &mut scores[..];
            E::scores(
                self.kernels,
                DirectScores { q: &q, rows, k, stride: k_stride, keys, seen, head_dim, scores },
            );
            let cut = self.call.block_mask.is_some();
            self.finish_scores(unit.sequence_index, &unit.rows, first..first + columns, cut, None, scores);
            self.kernels.softmax_float(Softmax { rows, columns, scores, pairs: &mut [], state });
            let p = &*scores;
            E::values(
                self.kernels,
                DirectValues { p, rows, v, stride: v_stride, keys, seen, value_dim, out, state },
            );
        }
        part
    }

    /// Adds up the parts of a unit and writes its rows, which must be no other unit's.
    pub fn merge(&self, sequence: &Sequence, rows: &[Row], parts: &[Part]) {
        let value_dim = self.call.problem.value_dim;
        let mut out = vec![0f32; value_dim];
        for (r, row) in rows.iter().enumerate() {
            let max = parts.iter().fold(f32::NEG_INFINITY, |max, part| max.max(part.state.max[r]));
            let shift = max.max(f32::MIN);
            let weight = |part: &Part| {
                let (part_max, part_sum) = totals(&part.state, r);
                (part_max - shift).exp2() * part_sum
            };
            let sum: f32 = parts.iter().map(weight).sum();
            out.fill(0.0);
            // A row without keys stays zero.
            for part in parts.iter().filter(|_| sum != 0.0) {
                let weight = weight(part) / sum;
                let part = &part.out[r * (part.out.len() / rows.len())..][..value_dim];
                out.iter_mut().zip(part).for_each(|(out, x)| *out += weight * x);
            }
            // SAFETY: each row belongs to one unit, and each unit to one thread.
            unsafe { self.write_row(sequence, row, (max, sum), 0.0, &mut out) }
        }
    }
}

/// Rows `keys` as memory and the distance between rows; copied where they lie in falling order.
fn contiguous<'b, E: Load>(
    rows: &HeadRows<'b, E>,
    keys: std::ops::Range<usize>,
    copy: &'b mut Vec<E>,
) -> (&'b [E], usize) {
    rows.from(keys.start).unwrap_or_else(|| {
        copy.clear();
        keys.for_each(|key| copy.extend_from_slice(rows.row(key)));
        (&copy[..], rows.row(0).len())
    })
}
