//! Which scores of a tile are hidden, and what is added to the others.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use sage_core::{BlockMask, Call, Element, Geometry, Mask, Sequence, TensorView, View};

use crate::kernels::TILE_KEYS;

/// A query row of a block.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Query head.
    pub head: usize,
    /// Index in its sequence.
    pub index: usize,
    /// Keys that the band lets it see.
    pub keys: Range<usize>,
}

impl Row {
    pub fn new(call: &Call<'_>, sequence: &Sequence, head: usize, index: usize) -> Self {
        Row { head, index, keys: call.problem.band.keys(index, sequence.q_len, sequence.kv_len) }
    }
}

/// The smallest range that holds every row's keys.
pub(crate) fn union(rows: &[Row]) -> Range<usize> {
    let seeing = || rows.iter().filter(|row| !row.keys.is_empty());
    match (seeing().map(|row| row.keys.start).min(), seeing().map(|row| row.keys.end).max()) {
        (Some(start), Some(end)) => start..end,
        _ => 0..0,
    }
}

/// Whether the block mask hides a whole tile from all rows.
pub(crate) fn tile_is_hidden(call: &Call<'_>, batch: usize, rows: &[Row], keys: &Range<usize>) -> bool {
    let Some(mask) = &call.block_mask else { return false };
    let columns = keys.start / mask.block_k..keys.end.div_ceil(mask.block_k);
    let hidden = |row: &Row| columns.clone().all(|column| !block_is_visible(mask, batch, row, column));
    rows.chunk_by(|a, b| a.head == b.head && a.index / mask.block_q == b.index / mask.block_q)
        .all(|rows| hidden(&rows[0]))
}

fn block_is_visible(mask: &BlockMask<'_>, batch: usize, row: &Row, column: usize) -> bool {
    mask.blocks.at([batch, row.head, row.index / mask.block_q, column])
}

/// Applies masks to base-2 scores: rows of [`TILE_KEYS`], the first `columns` of which belong to keys
/// `first..first + columns`. Keys that a row does not see become −∞.
pub(crate) fn apply_masks(
    call: &Call<'_>,
    batch: usize,
    rows: &[Row],
    first: usize,
    columns: usize,
    scores: &mut [f32],
) {
    for (row, scores) in rows.iter().zip(scores.chunks_exact_mut(TILE_KEYS)) {
        let scores = &mut scores[..columns];
        let start = row.keys.start.saturating_sub(first).min(columns);
        let end = row.keys.end.saturating_sub(first).clamp(start, columns);
        scores[..start].fill(f32::NEG_INFINITY);
        scores[end..].fill(f32::NEG_INFINITY);
        let at = [batch, row.head, row.index, first + start];
        let visible = &mut scores[start..end];
        if visible.is_empty() {
            continue;
        }
        match &call.mask {
            None => {}
            Some(Mask::Bool(mask)) => {
                for_each_key(mask, at, visible, |score, &keep| {
                    *score = if keep { *score } else { f32::NEG_INFINITY }
                });
            }
            Some(Mask::Additive(TensorView::F32(mask))) => add_bias(mask, at, visible),
            Some(Mask::Additive(TensorView::F16(mask))) => add_bias(mask, at, visible),
            Some(Mask::Additive(TensorView::BF16(mask))) => add_bias(mask, at, visible),
        }
        if let Some(mask) = &call.block_mask {
            let mut key = first + start;
            while key < first + end {
                let column = key / mask.block_k;
                let next = ((column + 1) * mask.block_k).min(first + end);
                if !block_is_visible(mask, batch, row, column) {
                    scores[key - first..next - first].fill(f32::NEG_INFINITY);
                }
                key = next;
            }
        }
    }
}

fn add_bias<E: Element>(mask: &View<'_, E>, at: [usize; 4], scores: &mut [f32]) {
    for_each_key(mask, at, scores, |score, bias| {
        let bias = bias.to_f32();
        // −∞ hides the key, whatever its score. A finite bias stays finite in base 2: padding with the lowest number hides
        // keys from rows that see others, and is no bias in rows that see none.
        *score = match bias {
            f32::NEG_INFINITY => bias,
            _ if bias.is_finite() => *score + (bias * LOG2_E).clamp(f32::MIN, f32::MAX),
            _ => *score + bias,
        };
    });
}

/// Calls `change` for each score with the mask's element, from the one at `at` on along the last dimension.
fn for_each_key<T: Copy>(
    mask: &View<'_, T>,
    at: [usize; 4],
    scores: &mut [f32],
    change: impl Fn(&mut f32, &T),
) {
    let geometry: &Geometry = mask.geometry();
    let start = geometry.index(at);
    match geometry.strides()[3] {
        1 => {
            let row = &mask.data()[start as usize..][..scores.len()];
            scores.iter_mut().zip(row).for_each(|(score, x)| change(score, x));
        }
        stride => {
            for (score, j) in scores.iter_mut().zip(0i64..) {
                change(score, &mask.data()[(start + j * stride) as usize]);
            }
        }
    }
}
