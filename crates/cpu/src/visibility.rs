//! Which scores of a tile are hidden, and what is added to the others.

use std::ops::Range;

use half::{bf16, f16};
use sage_core::{BlockMask, Call, Mask, Sequence, TensorView, View};

use crate::kernels::{AddBias, HideKeys, Kernels, Load};
use crate::mask_rows::with_row;
use crate::tile::TILE_KEYS;

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

/// Whether the block mask or the explicit mask hides a whole tile from all rows.
pub(crate) fn tile_is_hidden(call: &Call<'_>, batch: usize, rows: &[Row], keys: &Range<usize>) -> bool {
    block_mask_hides(call, batch, rows, keys) || mask_hides(call, batch, rows, keys)
}

fn block_mask_hides(call: &Call<'_>, batch: usize, rows: &[Row], keys: &Range<usize>) -> bool {
    let Some(mask) = &call.block_mask else { return false };
    let columns = keys.start / mask.block_k..keys.end.div_ceil(mask.block_k);
    let hidden = |row: &Row| {
        columns.clone().all(|column| !block_is_visible(mask, [batch, row.head, row.index], column))
    };
    rows.chunk_by(|a, b| a.head == b.head && a.index / mask.block_q == b.index / mask.block_q)
        .all(|rows| hidden(&rows[0]))
}

fn mask_hides(call: &Call<'_>, batch: usize, rows: &[Row], keys: &Range<usize>) -> bool {
    match &call.mask {
        None => false,
        Some(Mask::Bool(mask)) => mask_hides_by(mask, batch, rows, keys, |visible| !visible),
        Some(Mask::Additive(TensorView::F32(mask))) => {
            mask_hides_by(mask, batch, rows, keys, |bias| bias == f32::NEG_INFINITY)
        }
        Some(Mask::Additive(TensorView::F16(mask))) => {
            mask_hides_by(mask, batch, rows, keys, |bias| bias.to_bits() == f16::NEG_INFINITY.to_bits())
        }
        Some(Mask::Additive(TensorView::BF16(mask))) => {
            mask_hides_by(mask, batch, rows, keys, |bias| bias.to_bits() == bf16::NEG_INFINITY.to_bits())
        }
    }
}

/// `hidden` must be cheap and free of branches: it is asked of many elements at once.
fn mask_hides_by<T: Copy>(
    mask: &View<'_, T>,
    batch: usize,
    rows: &[Row],
    keys: &Range<usize>,
    hidden: impl Fn(T) -> bool + Copy,
) -> bool {
    /// Elements that are looked at before asking whether one was visible.
    const AT_ONCE: usize = 32;
    let one_row = mask.geometry().strides()[2] == 0;
    // Where all rows have the same biases, the first that sees the whole tile answers for the rest.
    let mut answered = None;
    rows.iter().all(|row| {
        let seen = row.keys.start.max(keys.start)..row.keys.end.min(keys.end);
        if seen.is_empty() || (one_row && answered == Some((row.head, seen.start, seen.end))) {
            return true;
        }
        answered = Some((row.head, seen.start, seen.end));
        with_row(mask, [batch, row.head, row.index, seen.start], seen.len(), |elements| {
            elements.chunks(AT_ONCE).all(|some| some.iter().fold(true, |all, &x| all & hidden(x)))
        })
    })
}

fn block_is_visible(mask: &BlockMask<View<'_, bool>>, [batch, head, row]: [usize; 3], column: usize) -> bool {
    mask.blocks.at([batch, head, row / mask.block_q, column])
}

/// Calls `each` for the runs of `keys` that the block mask lets a row see.
fn visible_blocks(call: &Call<'_>, at: [usize; 3], keys: Range<usize>, mut each: impl FnMut(Range<usize>)) {
    let Some(mask) = &call.block_mask else { return each(keys) };
    let mut key = keys.start;
    while key < keys.end {
        let column = key / mask.block_k;
        let next = ((column + 1) * mask.block_k).min(keys.end);
        if block_is_visible(mask, at, column) {
            each(key..next);
        }
        key = next;
    }
}

/// Applies masks to base-2 scores: rows of [`TILE_KEYS`], the first `columns` of which belong to keys
/// `first..first + columns`. Keys that a row does not see become −∞.
pub(crate) fn apply_masks(
    kernels: &Kernels,
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
            Some(Mask::Bool(mask)) => with_row(mask, at, visible.len(), |flags| {
                kernels.hide_keys(HideKeys { visible: flags, scores: visible });
            }),
            Some(Mask::Additive(TensorView::F32(mask))) => add_bias(kernels, mask, at, visible),
            Some(Mask::Additive(TensorView::F16(mask))) => add_bias(kernels, mask, at, visible),
            Some(Mask::Additive(TensorView::BF16(mask))) => add_bias(kernels, mask, at, visible),
        }
        if call.block_mask.is_some() {
            let mut hidden = first + start;
            visible_blocks(call, [batch, row.head, row.index], first + start..first + end, |keys| {
                scores[hidden - first..keys.start - first].fill(f32::NEG_INFINITY);
                hidden = keys.end;
            });
            scores[hidden - first..end].fill(f32::NEG_INFINITY);
        }
    }
}

fn add_bias<E: Load>(kernels: &Kernels, mask: &View<'_, E>, at: [usize; 4], scores: &mut [f32]) {
    with_row(mask, at, scores.len(), |bias| E::add_bias(kernels, AddBias { bias, scores }));
}
