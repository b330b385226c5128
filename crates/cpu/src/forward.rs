//! Attention of one call: what both strategies share.

use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

use sage_core::{Call, Sequence, View};

use crate::kernels::{Kernels, Load, RowState, SoftCap};
use crate::rows::{HeadRows, OutputRows};
use crate::seen::SeenHeads;
use crate::tile::TILE_KEYS;
use crate::visibility::{Row, apply_masks};

/// A call with its element type known.
pub(crate) struct Attention<'a, 'c, E> {
    pub kernels: &'static Kernels,
    pub call: &'a Call<'c>,
    pub seen: SeenHeads,
    pub q: View<'a, E>,
    pub k: View<'a, E>,
    pub v: View<'a, E>,
    pub out: OutputRows<'a, E>,
    pub lse: Option<OutputRows<'a, f32>>,
}

impl<E: Load> Attention<'_, '_, E> {
    /// `sm_scale · log₂e`: all scores are in base 2.
    pub fn score_scale(&self) -> f32 {
        self.call.problem.sm_scale * LOG2_E
    }

    pub fn queries(&self, sequence: &Sequence, head: usize) -> HeadRows<'_, E> {
        HeadRows::new(&self.q, sequence.batch, head, sequence.q_start)
    }

    pub fn keys(&self, sequence: &Sequence, kv_head: usize) -> HeadRows<'_, E> {
        HeadRows::new(&self.k, sequence.batch, kv_head, sequence.kv_start)
    }

    pub fn values(&self, sequence: &Sequence, kv_head: usize) -> HeadRows<'_, E> {
        HeadRows::new(&self.v, sequence.batch, kv_head, sequence.kv_start)
    }

    /// Caps and masks the scores of `keys` of sequence `index`, whole panels of which some may lie behind its end.
    /// `blocks_cut`: whether the block mask hides some of them from some row.
    ///
    /// `mean_score` is what smoothing K took from each row's scores: it moves no probability, but the cap needs it.
    pub fn finish_scores(
        &self,
        index: usize,
        rows: &[Row],
        keys: Range<usize>,
        blocks_cut: bool,
        mean_score: Option<&[f32]>,
        scores: &mut [f32],
    ) {
        self.cap(rows.len(), keys.len(), mean_score, scores);
        let sees_all = |row: &Row| row.keys.start <= keys.start && keys.end <= row.keys.end;
        if self.call.mask.is_some() || blocks_cut || !rows.iter().all(sees_all) {
            apply_masks(self.kernels, self.call, index, rows, keys, scores);
        }
    }

    /// Caps `rows` rows of `columns` scores; `mean_score` as in [`Attention::finish_scores`].
    pub fn cap(&self, rows: usize, columns: usize, mean_score: Option<&[f32]>, scores: &mut [f32]) {
        let Some(cap) = self.call.problem.logit_softcap else { return };
        for (r, row) in scores.chunks_exact_mut(TILE_KEYS).enumerate().take(rows) {
            let row = &mut row[..columns];
            if let Some(mean_score) = mean_score {
                row.iter_mut().for_each(|score| *score += mean_score[r]);
            }
            self.kernels.soft_cap(SoftCap { scores: row, cap: (cap * LOG2_E).min(f32::MAX) });
        }
    }

    /// Writes one row of the output, and its log-sum-exp from the maximum and sum of its probabilities; both with the
    /// head's sink, where there is one: `out` is scaled by the share that it leaves.
    ///
    /// `mean_score` is what smoothing K took from the row's scores, in base 2.
    ///
    /// # Safety
    /// No other thread may write the same row.
    pub unsafe fn write_row(
        &self,
        sequence: &Sequence,
        row: &Row,
        (max, sum): (f32, f32),
        mean_score: f32,
        out: &mut [f32],
    ) {
        let out = &mut out[..self.call.problem.value_dim];
        let lse = log_sum_exp((max, sum), mean_score);
        let lse = self.call.sink(row.head).map_or(lse, |sink| with_sink(lse, sink, out));
        let index = sequence.q_start + row.index;
        // SAFETY: the caller's promise.
        unsafe {
            E::narrow(out, self.out.row_mut(sequence.batch, row.head, index));
            if let Some(to) = &self.lse {
                to.row_mut(sequence.batch, row.head, index)[0] = lse;
            }
        }
    }
}

/// The log-sum-exp of a row in natural units, from the maximum and sum of its probabilities and what smoothing K took from
/// its scores in base 2.
fn log_sum_exp((max, sum): (f32, f32), mean_score: f32) -> f32 {
    match sum {
        // No visible key.
        0.0 => f32::NEG_INFINITY,
        // A bias of the least finite numbers on all of them does not fit base 2.
        _ if sum > 0.0 && max <= f32::MIN / 2.0 => f32::MIN,
        _ => (max + sum.log2() + mean_score) * LN_2,
    }
}

/// Takes a sink's share from a row of the output, and returns the log-sum-exp that it is part of.
fn with_sink(lse: f32, sink: f32, out: &mut [f32]) -> f32 {
    let max = lse.max(sink);
    if max == f32::NEG_INFINITY {
        return lse;
    }
    let (of_keys, of_sink) = ((lse - max).exp(), (sink - max).exp());
    let share = of_keys / (of_keys + of_sink);
    out.iter_mut().for_each(|x| *x *= share);
    max + (of_keys + of_sink).ln()
}

/// Maximum of a row that has been through online softmax, and the sum of its probabilities before they were rounded.
pub(crate) fn totals(state: &RowState, row: usize) -> (f32, f32) {
    (state.max[row], state.lse_sum[row])
}
