//! Pooled terms for the blocks that a block mask leaves out: keys that are means of keys, in tiles of their own behind a
//! head's others, which queries pass over as they do over those. They are never quantised.

use std::ops::Range;

use rayon::prelude::*;
use sage_core::{Sequence, SmoothQ};

use super::means::Head;
use super::{Block, SCRATCH, Scratch, Unit, resized};
use crate::forward::Attention;
use crate::kernels::{Load, PackTile};
use crate::rows::HeadRows;
use crate::seen::Seen;
use crate::tile::{PvForm, QkForm, TILE_KEYS, TileLayout};
use crate::visibility::{BlockColumns, Row};

/// What one thread needs to pool keys; kept from call to call.
#[derive(Default)]
pub(super) struct TailScratch {
    k: Vec<f32>,
    v: Vec<f32>,
    sums: Sums,
    /// A packed tile of means that a block's rows have of their own.
    words: Vec<u32>,
    /// Rows of [`TILE_KEYS`] biases in base 2.
    biases: Vec<f32>,
    cut: Vec<Cut>,
}

/// The keys that a row sees of a block that is left out, where it does not see all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cut {
    /// The row's place in its block of queries.
    row: usize,
    keys: Range<usize>,
}

/// Running sums of neighbouring keys and of their values.
#[derive(Default)]
struct Sums {
    keys: Range<usize>,
    k: Vec<f64>,
    v: Vec<f64>,
    wide: Vec<f32>,
}

impl Sums {
    fn reset(&mut self, head_dim: usize, value_dim: usize) {
        self.keys = 0..0;
        resized(&mut self.wide, head_dim.max(value_dim));
        for (sums, channels) in [(&mut self.k, head_dim), (&mut self.v, value_dim)] {
            sums.clear();
            sums.resize(channels, 0.0);
        }
    }

    /// Moves on to `keys`, which mostly are those before and some more: a diagonal's rows see one key more each.
    fn move_to<E: Load>(&mut self, keys: Range<usize>, k: &HeadRows<'_, E>, v: &HeadRows<'_, E>) {
        if keys.start != self.keys.start || keys.end < self.keys.end {
            self.k.fill(0.0);
            self.v.fill(0.0);
            self.keys = keys.start..keys.start;
        }
        for j in self.keys.end..keys.end {
            for (rows, sums) in [(k, &mut self.k), (v, &mut self.v)] {
                let row = rows.row(j);
                let wide = &mut self.wide[..row.len()];
                E::widen(row, wide);
                sums.iter_mut().zip(&*wide).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
        self.keys = keys;
    }
}

impl<E: Load> Attention<'_, '_, E> {
    /// The tiles of pooled keys; none where blocks that are left out count for nothing.
    pub(super) fn tail_layout(&self) -> Option<TileLayout> {
        let packing = self.kernels.packing;
        let dims = [self.call.problem.head_dim, self.call.problem.value_dim];
        let layout = || TileLayout::new(packing, dims, QkForm::Float, PvForm::Float, false, SmoothQ::Off);
        self.block_k().map(|_| layout())
    }

    /// Keys of a block, where those that are left out are pooled.
    fn block_k(&self) -> Option<usize> {
        self.call.block_mask.filter(|_| self.call.problem.pooled_tail).map(|mask| mask.block_k)
    }

    /// Tiles of pooled keys of a sequence.
    pub(super) fn tail_tiles(&self, sequence: &Sequence) -> usize {
        self.block_k().map_or(0, |block_k| sequence.kv_len.div_ceil(block_k).div_ceil(TILE_KEYS))
    }

    /// The blocks that are the keys of a tile of pooled keys, each as its keys.
    fn blocks(
        &self,
        sequence: &Sequence,
        tile: usize,
    ) -> impl ExactSizeIterator<Item = Range<usize>> + use<E> {
        let (block_k, len) = (self.block_k().unwrap_or(1), sequence.kv_len);
        let blocks = tile * TILE_KEYS..len.div_ceil(block_k).min((tile + 1) * TILE_KEYS);
        blocks.map(move |block| block * block_k..len.min((block + 1) * block_k))
    }

    /// Packs the tiles of all units' pooled keys.
    pub(super) fn pack_tails(&self, layout: &TileLayout, units: &[Unit<'_>], heads: &[Head]) -> Vec<u32> {
        let tiles = units.iter().map(|unit| unit.tail_tiles).sum::<usize>();
        let mut packed = vec![0; tiles * layout.words()];
        packed.par_chunks_exact_mut(layout.words()).enumerate().for_each(|(tile, words)| {
            let unit = units.partition_point(|unit| unit.first_tail_tile + unit.tail_tiles <= tile);
            let (unit, head) = (&units[unit], &heads[unit]);
            let blocks = self.blocks(&unit.sequence, tile - unit.first_tail_tile);
            SCRATCH.with_borrow_mut(|scratch| {
                self.pack_means(layout, unit, blocks, head, &mut scratch.tail, words);
            });
        });
        packed
    }

    /// Packs a tile whose keys and values are means.
    fn pack_means(
        &self,
        layout: &TileLayout,
        unit: &Unit<'_>,
        groups: impl ExactSizeIterator<Item = Range<usize>>,
        head: &Head,
        TailScratch { k, v, sums, .. }: &mut TailScratch,
        words: &mut [u32],
    ) {
        let (keys, TileLayout { head_dim, value_dim, .. }) = (groups.len(), *layout);
        let (k, v) = (resized(k, keys * head_dim), resized(v, keys * value_dim));
        let (k_rows, v_rows) =
            (self.keys(&unit.sequence, unit.kv_head), self.values(&unit.sequence, unit.kv_head));
        sums.reset(head_dim, value_dim);
        let rows = k.chunks_exact_mut(head_dim).zip(v.chunks_exact_mut(value_dim));
        for (group, (k, v)) in groups.zip(rows) {
            let hidden = |seen: &[Seen]| seen.contains(&Seen::Hidden);
            if unit.seen.is_some_and(|seen| hidden(seen.range(group.clone()))) {
                // No row sees the whole block, and what none sees may be anything.
                k.fill(0.0);
                v.fill(0.0);
                continue;
            }
            let count = group.len() as f64;
            sums.move_to(group, &k_rows, &v_rows);
            k.iter_mut().zip(&sums.k).for_each(|(x, sum)| *x = (sum / count) as f32);
            k.iter_mut().zip(&head.k_mean).for_each(|(x, mean)| *x -= mean);
            v.iter_mut().zip(&sums.v).for_each(|(x, sum)| *x = (sum / count) as f32);
            v.iter_mut().zip(&head.v_mean).for_each(|(x, mean)| *x -= mean);
        }
        self.kernels.pack_tile(PackTile {
            layout: *layout,
            first: 0,
            keys,
            seen: &[],
            k,
            k_max: &[],
            v,
            v_max: &[],
            tile: words,
        });
    }

    /// Adds the pooled terms of the blocks that are left out for a block of queries, whose other tiles it has passed over.
    pub(super) fn add_tail(
        &self,
        layout: &TileLayout,
        unit: &Unit<'_>,
        block: &Block,
        tiles: &[u32],
        head: &Head,
        scratch: &mut Scratch,
    ) {
        let padded_rows = block.rows.next_multiple_of(self.kernels.rows);
        self.pack_queries(layout, &unit.sequence, block, padded_rows, head, scratch);
        let mut tail = std::mem::take(&mut scratch.tail);
        let smoothed = !head.k_mean.is_empty();
        for (tile, words) in tiles.chunks_exact(layout.words()).enumerate() {
            let keys = self.blocks(&unit.sequence, tile).len();
            if self.whole_blocks(unit, tile, &scratch.rows, &mut tail.biases) {
                self.add_means(layout, words, keys, &tail.biases, smoothed, scratch);
            }
        }

        self.cut_blocks(unit, &scratch.rows, &mut tail.cut);
        let mut words = std::mem::take(&mut tail.words);
        let cut = std::mem::take(&mut tail.cut);
        for cut in cut.chunks(TILE_KEYS) {
            let words = resized(&mut words, layout.words());
            self.pack_means(layout, unit, cut.iter().map(|cut| cut.keys.clone()), head, &mut tail, words);
            resized(&mut tail.biases, block.rows * TILE_KEYS).fill(f32::NEG_INFINITY);
            for (column, cut) in cut.iter().enumerate() {
                tail.biases[cut.row * TILE_KEYS + column] = (cut.keys.len() as f32).log2();
            }
            self.add_means(layout, words, cut.len(), &tail.biases, smoothed, scratch);
        }
        (tail.words, tail.cut) = (words, cut);
        scratch.tail = tail;
    }

    /// One step over a tile of `keys` means: scores, `biases` of each row, softmax, and what the means' values add.
    fn add_means(
        &self,
        layout: &TileLayout,
        words: &[u32],
        keys: usize,
        biases: &[f32],
        smoothed: bool,
        scratch: &mut Scratch,
    ) {
        self.step(layout, &layout.parts(words), 0..keys, scratch, |rows, columns, mean_score, scores| {
            self.cap(rows.len(), columns, smoothed.then_some(mean_score), scores);
            let scores = scores.chunks_exact_mut(TILE_KEYS);
            for (scores, biases) in scores.zip(biases.chunks_exact(TILE_KEYS)).take(rows.len()) {
                let (seen, behind) = scores[..columns].split_at_mut(keys);
                for (score, &bias) in seen.iter_mut().zip(biases) {
                    // What a row does not see may have any score.
                    *score = if bias == f32::NEG_INFINITY { bias } else { *score + bias };
                }
                behind.fill(f32::NEG_INFINITY);
            }
        });
    }

    /// The bias of each block of a tile for each row: log₂ of its keys where it is left out and the row sees all of it,
    /// −∞ elsewhere. Returns whether there is such a block at all.
    fn whole_blocks(&self, unit: &Unit<'_>, tile: usize, rows: &[Row], biases: &mut Vec<f32>) -> bool {
        let biases = resized(biases, rows.len() * TILE_KEYS);
        let mut some = false;
        for (r, row) in rows.iter().enumerate() {
            let columns = BlockColumns::of(self.call, unit.sequence_index, row);
            let (before, own) = biases.split_at_mut(r * TILE_KEYS);
            let own = &mut own[..TILE_KEYS];
            let alike = |above: &Row| {
                above.keys == row.keys && BlockColumns::of(self.call, unit.sequence_index, above).is(&columns)
            };
            if r > 0 && alike(&rows[r - 1]) {
                own.copy_from_slice(&before[before.len() - TILE_KEYS..]);
                continue;
            }
            own.fill(f32::NEG_INFINITY);
            for (column, (keys, bias)) in self.blocks(&unit.sequence, tile).zip(own).enumerate() {
                let whole = row.keys.start <= keys.start && keys.end <= row.keys.end;
                if whole && !columns.is_kept(tile * TILE_KEYS + column) {
                    *bias = (keys.len() as f32).log2();
                    some = true;
                }
            }
        }
        some
    }

    /// The parts that rows see of blocks that are left out, at either end of their keys.
    fn cut_blocks(&self, unit: &Unit<'_>, rows: &[Row], cut: &mut Vec<Cut>) {
        cut.clear();
        let (block_k, len) = (self.block_k().unwrap_or(1), unit.sequence.kv_len);
        let end_of = |column: usize| len.min((column + 1) * block_k);
        // First those of all rows at one end, then at the other, so that sums go on from row to row.
        for at_end in [true, false] {
            for (r, row) in rows.iter().enumerate().filter(|(_, row)| !row.keys.is_empty()) {
                let [first, last] = [row.keys.start, row.keys.end - 1].map(|key| key / block_k);
                let column = if at_end { last } else { first };
                let keys = row.keys.start.max(column * block_k)..row.keys.end.min(end_of(column));
                let whole = keys == (column * block_k..end_of(column));
                let twice = !at_end && first == last;
                let columns = BlockColumns::of(self.call, unit.sequence_index, row);
                if !whole && !twice && !columns.is_kept(column) {
                    cut.push(Cut { row: r, keys });
                }
            }
        }
    }
}
