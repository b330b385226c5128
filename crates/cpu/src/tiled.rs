//! Attention with packed keys and values: each block of queries passes over all tiles of its head.

mod means;
mod queries;
mod tail;

use std::cell::RefCell;
use std::ops::Range;

use aligned_vec::AVec;
use rayon::prelude::*;
use sage_core::{Sequence, Smoothing};

use crate::forward::{Attention, totals};
use crate::kernels::fp4::{BLOCK, PANEL_WORDS};
use crate::kernels::{
    AddMeans, Bf16Kernels, Fp4Softmax, Load, PackTile, RoundedSoftmax, RowState, Scores, Softmax, Values,
};
use crate::plan::PACKED_BYTES_MAX;
use crate::seen::{Seen, SeenKeys};
use crate::tile::{PvForm, QkForm, TILE_KEYS, Tile, TileLayout};
use crate::tiled::tail::TailScratch;
use crate::visibility::{BlockRows, Kept, Row, mask_hides, union};
use means::Head;

/// One key head of one sequence, and where its tiles lie among those packed together.
#[derive(Clone, Copy)]
struct Unit<'s> {
    sequence_index: usize,
    sequence: Sequence,
    kv_head: usize,
    /// None where every key counts.
    seen: Option<&'s SeenKeys>,
    first_tile: usize,
    tiles: usize,
    /// The same of pooled keys.
    first_tail_tile: usize,
    tail_tiles: usize,
}

/// A block of query rows of one head.
#[derive(Clone, Copy)]
struct Block {
    unit: usize,
    head: usize,
    first: usize,
    rows: usize,
}

/// What one thread needs for a block; kept from call to call.
#[derive(Default)]
struct Scratch {
    rows: Vec<Row>,
    wide: Vec<f32>,
    group_max: Vec<u32>,
    q: Vec<f32>,
    q_words: Lines<u32>,
    q_scale: Vec<f32>,
    mean_score: Vec<f32>,
    /// The means of the queries, and each query's.
    q_means: Vec<f32>,
    mean_of: Vec<u32>,
    delta: Vec<f32>,
    scores: Lines<f32>,
    pairs: Lines<u32>,
    out: Lines<f32>,
    state: RowState,
    tail: TailScratch,
}

/// Memory that starts on a cache line, so that no vector of 64 bytes and no row of AMX's tiles lies across two.
struct Lines<T>(AVec<T>);

impl<T> Default for Lines<T> {
    fn default() -> Self {
        Lines(AVec::new(64))
    }
}

impl<T: Copy + Default> Lines<T> {
    /// As the function [`resized`].
    fn resized(&mut self, len: usize) -> &mut [T] {
        if self.0.len() < len {
            self.0.resize(len, T::default());
        }
        &mut self.0[..len]
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Unit<'_> {
    /// How many keys enter means and scales.
    fn counted(&self) -> usize {
        self.seen.map_or(self.sequence.kv_len, |seen| seen.counted.len())
    }

    /// One of them.
    fn counted_key(&self, index: usize) -> usize {
        self.seen.map_or(index, |seen| seen.counted[index] as usize)
    }

    /// The keys of a tile.
    fn keys(&self, tile: usize) -> Range<usize> {
        tile * TILE_KEYS..self.sequence.kv_len.min((tile + 1) * TILE_KEYS)
    }

    /// Whether no query sees any key of a tile.
    fn hides(&self, tile: usize) -> bool {
        self.seen.is_some_and(|seen| seen.all_hidden(self.keys(tile)))
    }
}

impl<E: Load> Attention<'_, '_, E> {
    /// Computes the call with blocks of `block_q` queries. `smooth` says which means are subtracted.
    pub fn tiled(&self, layout: &TileLayout, block_q: usize, smooth: &Smoothing, packed: &mut AVec<u32>) {
        let max_tiles = PACKED_BYTES_MAX / 4 / layout.words();
        let mut wave: Vec<Unit<'_>> = Vec::new();
        let (mut tiles, mut tail_tiles) = (0, 0);
        for (sequence_index, sequence) in self.call.sequences().enumerate() {
            let count = sequence.kv_len.div_ceil(TILE_KEYS);
            for kv_head in 0..self.call.problem.num_kv_heads {
                if tiles + count > max_tiles && !wave.is_empty() {
                    self.wave(layout, block_q, smooth, &wave, tiles, packed);
                    wave.clear();
                    (tiles, tail_tiles) = (0, 0);
                }
                let tail_count = self.tail_tiles(&sequence);
                wave.push(Unit {
                    sequence_index,
                    sequence,
                    kv_head,
                    seen: self.seen.head(sequence_index, kv_head),
                    first_tile: tiles,
                    tiles: count,
                    first_tail_tile: tail_tiles,
                    tail_tiles: tail_count,
                });
                tiles += count;
                tail_tiles += tail_count;
            }
        }
        self.wave(layout, block_q, smooth, &wave, tiles, packed);
    }

    /// Packs the keys and values of some heads, then computes all queries that read them.
    fn wave(
        &self,
        layout: &TileLayout,
        block_q: usize,
        smooth: &Smoothing,
        units: &[Unit<'_>],
        tiles: usize,
        packed: &mut AVec<u32>,
    ) {
        let heads = self.heads(smooth, layout, units);
        if packed.len() < tiles * layout.words() {
            packed.resize(tiles * layout.words(), 0);
        }
        let packed = &mut packed[..tiles * layout.words()];
        packed.par_chunks_exact_mut(layout.words()).enumerate().for_each(|(tile, words)| {
            let unit = units.partition_point(|unit| unit.first_tile + unit.tiles <= tile);
            let (unit, head) = (&units[unit], &heads[unit]);
            let tile = tile - unit.first_tile;
            if !unit.hides(tile) {
                self.pack(layout, unit, tile, head, words);
            }
        });

        let tail_layout = self.tail_layout();
        let tail = tail_layout.map_or(Vec::new(), |layout| self.pack_tails(&layout, units, &heads));

        let packed = &*packed;
        let group_size = self.call.problem.group_size();
        let mut blocks = Vec::new();
        for (unit, Unit { sequence, kv_head, .. }) in units.iter().enumerate() {
            for head in kv_head * group_size..(kv_head + 1) * group_size {
                for first in (0..sequence.q_len).step_by(block_q) {
                    blocks.push(Block { unit, head, first, rows: block_q.min(sequence.q_len - first) });
                }
            }
        }
        blocks.par_iter().with_max_len(1).for_each(|block| {
            let unit = &units[block.unit];
            let tiles = &packed[unit.first_tile * layout.words()..][..unit.tiles * layout.words()];
            SCRATCH.with_borrow_mut(|scratch| {
                let of_head = &heads[block.unit];
                self.block(layout, unit, block, tiles, of_head, scratch);
                if let Some(layout) = &tail_layout {
                    let words = layout.words();
                    let tiles = &tail[unit.first_tail_tile * words..][..unit.tail_tiles * words];
                    self.add_tail(layout, unit, block, tiles, of_head, scratch);
                }
                self.write_block(layout, unit, of_head, scratch);
            });
        });
    }

    /// Packs one tile of a unit.
    fn pack(&self, layout: &TileLayout, unit: &Unit<'_>, tile: usize, head: &Head, words: &mut [u32]) {
        let Range { start: first, end } = unit.keys(tile);
        let keys = end - first;
        let seen = unit.seen.map_or(&[][..], |seen| seen.range(first..end));
        let hidden = |j: usize| seen.get(j) == Some(&Seen::Hidden);
        let (k, v) = (self.keys(&unit.sequence, unit.kv_head), self.values(&unit.sequence, unit.kv_head));
        SCRATCH.with_borrow_mut(|scratch| {
            let k_rows = resized(&mut scratch.q, keys * layout.qk_dim);
            for (j, row) in k_rows.chunks_exact_mut(layout.qk_dim).enumerate() {
                if hidden(j) {
                    row.fill(0.0);
                    continue;
                }
                let (row, padding) = row.split_at_mut(layout.head_dim);
                E::widen(k.row(first + j), row);
                row.iter_mut().zip(&head.k_mean).for_each(|(x, mean)| *x -= mean);
                padding.fill(0.0);
            }
            let v_rows = resized(&mut scratch.wide, keys * layout.value_dim);
            for (j, row) in v_rows.chunks_exact_mut(layout.value_dim).enumerate() {
                if hidden(j) {
                    row.fill(0.0);
                    continue;
                }
                E::widen(v.row(first + j), row);
                row.iter_mut().zip(&head.v_mean).for_each(|(x, mean)| *x -= mean);
            }
            self.kernels.pack_tile(PackTile {
                layout: *layout,
                first,
                keys,
                seen,
                k: k_rows,
                k_max: &head.k_max,
                v: v_rows,
                v_max: &head.v_max,
                tile: words,
            });
        });
    }

    /// Passes a block of queries over the tiles that it sees.
    fn block(
        &self,
        layout: &TileLayout,
        unit: &Unit<'_>,
        block: &Block,
        tiles: &[u32],
        of_head: &Head,
        scratch: &mut Scratch,
    ) {
        let Block { head, first, rows, .. } = *block;
        let sequence = &unit.sequence;
        let padded_rows = rows.next_multiple_of(self.kernels.rows);
        let padded_dim = layout.padded_dim();

        self.pack_queries(layout, sequence, block, padded_rows, of_head, scratch);
        scratch.rows.clear();
        scratch.rows.extend((first..first + rows).map(|i| Row::new(self.call, sequence, head, i)));
        scratch.scores.resized(padded_rows * TILE_KEYS);
        scratch.pairs.resized(padded_rows * TILE_KEYS / 2);
        scratch.out.resized(padded_rows * padded_dim).fill(0.0);
        scratch.state.reset(padded_rows);

        let visible = union(&scratch.rows);
        let blocks = BlockRows::new(self.call, unit.sequence_index, &scratch.rows);
        for tile in visible.start / TILE_KEYS..visible.end.div_ceil(TILE_KEYS) {
            let keys = tile * TILE_KEYS..visible.end.min((tile + 1) * TILE_KEYS);
            let kept = if unit.hides(tile) {
                None
            } else {
                blocks.kept(keys, self.kernels.packing.width.max(layout.p_group()))
            };
            let Some(kept) = kept else { continue };
            if mask_hides(self.call, unit.sequence_index, &scratch.rows, &kept.keys) {
                continue;
            }
            let packed = layout.parts(&tiles[tile * layout.words()..][..layout.words()]);
            self.attend_tile(layout, unit, &packed, kept, !of_head.k_mean.is_empty(), scratch);
        }
    }

    /// Writes a block's output.
    fn write_block(&self, layout: &TileLayout, unit: &Unit<'_>, of_head: &Head, scratch: &mut Scratch) {
        // The cap acted on whole scores; without one, the log-sum-exp lacks the mean's part.
        let capped = self.call.problem.logit_softcap.is_some();
        let rows = scratch.rows.iter().zip(scratch.out.0.chunks_exact_mut(layout.padded_dim()));
        for (r, (row, out)) in rows.enumerate() {
            // A row without keys stays zero.
            if totals(&scratch.state, r).1 != 0.0 {
                out.iter_mut().zip(&of_head.v_mean).for_each(|(x, mean)| *x += mean);
            }
            let mean_score = if capped { 0.0 } else { scratch.mean_score[r] };
            // SAFETY: each row belongs to one block, and each block to one thread.
            unsafe { self.write_row(&unit.sequence, row, totals(&scratch.state, r), mean_score, out) }
        }
    }

    fn bf16(&self) -> &Bf16Kernels {
        self.kernels.bf16.as_ref().expect("bfloat16 is planned where there are kernels for it")
    }

    /// One step of a block of queries: scores with those keys of a tile that are kept, softmax, and what their values
    /// add to the output.
    fn attend_tile(
        &self,
        layout: &TileLayout,
        unit: &Unit<'_>,
        tile: &Tile<'_>,
        Kept { keys, cut }: Kept,
        smoothed: bool,
        scratch: &mut Scratch,
    ) {
        let first = keys.start;
        self.step(layout, tile, keys, scratch, |rows, columns, mean_score, scores| {
            let mean_score = smoothed.then_some(mean_score);
            self.finish_scores(unit.sequence_index, rows, first..first + columns, cut, mean_score, scores);
        });
    }

    /// The same, where `finish` is given the rows, the number of columns, what smoothing K took from each row's scores,
    /// and the scores, and caps and masks them.
    fn step(
        &self,
        layout: &TileLayout,
        tile: &Tile<'_>,
        keys: Range<usize>,
        scratch: &mut Scratch,
        finish: impl FnOnce(&[Row], usize, &[f32], &mut [f32]),
    ) {
        let width = self.kernels.packing.width;
        // Of the tile's keys, those before the first that is kept; whole panels of K.
        let before = keys.start % TILE_KEYS;
        let Scratch { rows, q_words, q_scale, mean_score, q_means, mean_of, delta, .. } = scratch;
        let Scratch { scores, pairs, out, state, .. } = scratch;
        let (scores, pairs, out) = (&mut scores.0[..], &mut pairs.0[..], &mut out.0[..]);
        let row_groups = rows.len().div_ceil(self.kernels.rows);
        let panels = keys.len().div_ceil(width);
        let columns = panels * width;
        let args = Scores {
            q: &q_words.0,
            k: &tile.k[before / width * layout.k_panel..],
            depth: layout.depth,
            row_groups,
            panels,
            q_scale,
            k_scale: match layout.qk {
                QkForm::Int(_) => &tile.k_scale[before..],
                QkForm::Float | QkForm::Bf16 | QkForm::Fp4(_) => tile.k_scale,
            },
            scores,
        };
        match layout.qk {
            QkForm::Float => self.kernels.scores_float(args),
            QkForm::Bf16 => self.bf16().scores(args),
            QkForm::Fp4(_) => self.kernels.scores_fp4(args),
            QkForm::Int(_) => self.kernels.scores_int(args),
        }
        if layout.smooths_q() {
            let row_groups = q_means.len() / layout.head_dim / self.kernels.rows;
            self.kernels.scores_float(Scores {
                q: bytemuck::cast_slice(q_means),
                k: &tile.k_given[before / width * layout.given_panel()..],
                depth: layout.head_dim,
                row_groups,
                panels,
                q_scale: &[],
                k_scale: &[],
                scores: resized(delta, row_groups * self.kernels.rows * TILE_KEYS),
            });
            self.kernels.add_means(AddMeans { means: delta, mean_of, columns, scores });
        }
        finish(rows, columns, mean_score, scores);

        let softmax = Softmax { rows: row_groups * self.kernels.rows, columns, scores, pairs, state };
        // Single probabilities take the places of the scores, others have words of their own.
        let (p, p_stride, depth, skipped): (&[u32], usize, usize, usize) = match layout.pv {
            PvForm::Float => {
                self.kernels.softmax_float(softmax);
                (bytemuck::cast_slice(scores), TILE_KEYS, keys.len(), before)
            }
            PvForm::Rounded(to) => {
                self.kernels.softmax_rounded(RoundedSoftmax { softmax, to });
                (bytemuck::cast_slice(scores), TILE_KEYS, keys.len(), before)
            }
            PvForm::Fp4(format, levels) => {
                self.kernels.softmax_fp4(Fp4Softmax { softmax, format, levels });
                (pairs, Fp4Softmax::STRIDE, keys.len().div_ceil(BLOCK), before / BLOCK * PANEL_WORDS)
            }
            PvForm::Bf16 => {
                self.bf16().softmax(softmax);
                (pairs, TILE_KEYS / 2, keys.len().div_ceil(2), before / 2)
            }
            PvForm::Fixed12 => {
                self.kernels.softmax_fixed12(softmax);
                let of_word = layout.fixed12.keys();
                (pairs, TILE_KEYS / 2, keys.len().div_ceil(of_word), before / of_word)
            }
        };
        let args = Values {
            p,
            p_stride,
            v: &tile.v[skipped * width..],
            panel_words: layout.v_panel,
            depth,
            row_groups,
            panels: layout.channel_panels,
            v_scale: tile.v_scale,
            out,
            state,
        };
        match layout.pv {
            PvForm::Float | PvForm::Rounded(_) => self.kernels.values_float(args),
            PvForm::Fp4(..) => self.kernels.values_fp4(args),
            PvForm::Bf16 => self.bf16().values(args),
            PvForm::Fixed12 => self.kernels.values_fixed12(args),
        }
    }
}

/// The first `len` elements, after growing where needed; what they hold is left over from before.
fn resized<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}
