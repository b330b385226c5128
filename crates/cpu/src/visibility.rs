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

/// Whether the explicit mask hides a whole tile from all rows.
pub(crate) fn mask_hides(call: &Call<'_>, batch: usize, rows: &[Row], keys: &Range<usize>) -> bool {
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

/// The rows of a block mask that some queries have, each once: which keys any of them sees is asked for every tile.
pub(crate) struct BlockRows<'c> {
    mask: Option<BlockMask<View<'c, bool>>>,
    batch: usize,
    /// Query head, and the first query of the block.
    rows: Vec<[usize; 2]>,
}

/// Keys of a tile that are worth computing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    /// From the first to the last that some row sees, the start rounded down.
    pub keys: Range<usize>,
    /// Whether some of them are hidden from some row.
    pub cut: bool,
}

impl<'c> BlockRows<'c> {
    pub fn new(call: &Call<'c>, batch: usize, rows: &[Row]) -> Self {
        let mut of_rows: Vec<[usize; 2]> = Vec::new();
        if let Some(mask) = &call.block_mask {
            of_rows.extend(rows.iter().map(|row| [row.head, row.index / mask.block_q * mask.block_q]));
            of_rows.dedup();
        }
        BlockRows { mask: call.block_mask, batch, rows: of_rows }
    }

    /// Whether all rows' blocks of a tile are left out.
    pub fn hide(&self, tile: &Range<usize>) -> bool {
        self.kept(tile.clone(), 1).is_none()
    }

    /// What is to be computed of `keys`, which begin at a multiple of `width`; none where all rows' blocks are left
    /// out. The start of what is kept is a multiple of `width` too.
    pub fn kept(&self, keys: Range<usize>, width: usize) -> Option<Kept> {
        let Some(mask) = &self.mask else { return Some(Kept { keys, cut: false }) };
        let columns = keys.start / mask.block_k..keys.end.div_ceil(mask.block_k);
        let seen = |column: usize| {
            let sees = |&[head, row]: &[usize; 2]| block_is_visible(mask, [self.batch, head, row], column);
            self.rows.iter().filter(|row| sees(row)).count()
        };
        let mut kept: Option<Range<usize>> = None;
        let mut cut = false;
        for column in columns {
            let rows = seen(column);
            cut |= rows > 0 && rows < self.rows.len();
            if rows > 0 {
                // A column between two that are kept is within, and hidden.
                cut |= kept.as_ref().is_some_and(|kept| kept.end < column);
                kept = Some(kept.map_or(column, |kept| kept.start)..column + 1);
            }
        }
        let kept = kept?;
        let first = (kept.start * mask.block_k).max(keys.start);
        let start = keys.start + (first - keys.start) / width * width;
        let end = (kept.end * mask.block_k).min(keys.end);
        // Panels are whole, and so may hold keys behind the end.
        let whole = start == first && (end == keys.end || (end - start).is_multiple_of(width));
        Some(Kept { keys: start..end, cut: cut || !whole })
    }
}

/// The blocks of keys that a block mask keeps for a row; all where there is no mask.
#[derive(Clone, Copy)]
pub(crate) struct BlockColumns<'c> {
    mask: Option<BlockMask<View<'c, bool>>>,
    /// Sequence, query head, and block of queries.
    at: [usize; 3],
}

impl<'c> BlockColumns<'c> {
    pub fn of(call: &Call<'c>, batch: usize, row: &Row) -> Self {
        let block = call.block_mask.map_or(0, |mask| row.index / mask.block_q);
        BlockColumns { mask: call.block_mask, at: [batch, row.head, block] }
    }

    /// Whether a block of keys is computed.
    pub fn is_kept(&self, column: usize) -> bool {
        let [batch, head, block] = self.at;
        self.mask.is_none_or(|mask| mask.blocks.at([batch, head, block, column]))
    }

    /// Whether both are the same line of the mask.
    pub fn is(&self, other: &Self) -> bool {
        self.at == other.at
    }
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

/// Applies masks to base-2 scores: rows of [`TILE_KEYS`], the first of which belong to `keys`. Keys that a row does not
/// see become −∞.
pub(crate) fn apply_masks(
    kernels: &Kernels,
    call: &Call<'_>,
    batch: usize,
    rows: &[Row],
    keys: Range<usize>,
    scores: &mut [f32],
) {
    let (first, columns) = (keys.start, keys.len());
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

#[cfg(test)]
mod tests {
    use sage_core::sparse::BlockMap;
    use sage_core::{Inputs, Options, Tensor};

    use super::*;

    #[test]
    fn of_a_tile_what_lies_between_the_first_and_the_last_kept_block_is_computed() {
        // One head, blocks of 8 queries and 48 keys; 300 keys are 7 blocks.
        let [no, yes] = [false, true];
        let flags =
            [[no, yes, no, yes, no, no, yes], [no; 7], [yes; 7], [yes, no, no, no, no, no, no]].concat();
        let map = BlockMap::new(flags, [1, 1, 4, 7], 8, 48).unwrap();
        let (q, k) = (Tensor::zeros(sage_core::DType::F32, &[1, 1, 30, 4]), [1, 1, 300, 4]);
        let (q, k) = (q.unwrap(), Tensor::zeros(sage_core::DType::F32, &k).unwrap());
        let inputs = Inputs::new(q.view(), k.view(), k.view()).block_mask(map.mask());
        let call = Call::check(&inputs, &Options::default()).unwrap();
        let sequence = call.sequences().next().unwrap();
        let kept = |queries: Range<usize>, keys: Range<usize>| {
            let rows: Vec<Row> = queries.map(|i| Row::new(&call, &sequence, 0, i)).collect();
            BlockRows::new(&call, 0, &rows).kept(keys, 16).map(|kept| (kept.keys, kept.cut))
        };
        assert_eq!(kept(0..8, 0..128), Some((48..96, false)), "one block, whole panels");
        assert_eq!(kept(0..8, 128..256), Some((144..192, false)));
        assert_eq!(kept(0..8, 0..192), Some((48..192, true)), "a gap between two that are kept");
        assert_eq!(kept(0..8, 256..300), Some((288..300, false)), "keys end there");
        assert_eq!(kept(8..16, 0..128), None);
        assert_eq!(kept(16..24, 0..128), Some((0..128, false)));
        assert_eq!(kept(0..16, 0..128), Some((48..96, true)), "hidden from the second block of queries");
        assert_eq!(kept(24..30, 0..128), Some((0..48, false)));
        assert_eq!(kept(24..30, 128..256), None);
        // With wider panels, the start is rounded down and keys behind the end are in the last panel.
        let rows: Vec<Row> = (0..8).map(|i| Row::new(&call, &sequence, 0, i)).collect();
        let wide = BlockRows::new(&call, 0, &rows).kept(0..128, 32).unwrap();
        assert_eq!(wide, Kept { keys: 32..96, cut: true });
    }
}
