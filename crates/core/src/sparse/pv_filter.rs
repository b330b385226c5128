//! Skipping the P·V of tiles whose probabilities are too small to matter.

use std::collections::BTreeSet;
use std::f64::consts::LOG2_E;

use super::PerHead;
use super::grid::check_block;
use crate::oracle::{Matrix, Output, Score, attend, maximum, row_scores};
use crate::{Call, Result, Tile};

/// SpargeAttn's second filter (arXiv 2502.18137, §3.4): where all scores of a tile lie far below what its rows have
/// seen before, the tile's exponentials, its part of the row sum and its product with V are left out.
///
/// A block of queries visits the tiles of keys in which some of its rows sees a key, in ascending order. Some of its
/// rows decide together: those of a warp, or all. With the largest scores r of a row in a tile, to base 2, and m in all
/// tiles before it, the tile is skipped when
///
/// `max over rows (r − m) + threshold ≤ 0`.
///
/// So every probability that is left out is at most `2^−threshold` of its row's largest. The paper has natural
/// logarithms and a negative threshold λ.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PvFilter {
    /// Binary digits by which a tile must lie below the rows' maxima, at least 0. SpargeAttn's `pvthreshd`, there 50.
    pub threshold: PerHead,
    /// Queries that visit tiles together.
    pub block_q: usize,
    /// Rows that decide together.
    pub rows: usize,
    /// Keys in a tile.
    pub block_k: usize,
    /// How many of the tiles that a block visits are never skipped: its last ones.
    pub exempt: usize,
}

impl PvFilter {
    /// The filter of a kernel with such tiles: the rows of a warp decide together, and the tiles at the end with 128
    /// keys together, two of 64 or one of 128, are never skipped.
    pub fn new(threshold: impl Into<PerHead>, tile: Tile) -> Self {
        let Tile { block_q, warp_q, block_k, .. } = tile;
        let exempt = if block_k < 128 { 2 } else { 1 };
        PvFilter { threshold: threshold.into(), block_q, rows: warp_q, block_k, exempt }
    }

    /// All rows of a block decide together, rather than those of a warp.
    #[must_use]
    pub fn per_block(self) -> Self {
        PvFilter { rows: self.block_q, ..self }
    }

    /// How many of the tiles that a block visits are never skipped.
    #[must_use]
    pub fn exempt(self, tiles: usize) -> Self {
        PvFilter { exempt: tiles, ..self }
    }

    /// Which tiles are skipped by rows that decide together.
    ///
    /// `maxima[t][r]` is the largest score of row `r` in the `t`-th tile that is visited, to base 2, and −∞ where the
    /// row sees no key of it. A row without a key of a tile does not hold the others back. Differences and sums are in
    /// single precision. A tile with NaN is never skipped, nor is any after it.
    pub fn skips(threshold: f32, exempt: usize, maxima: &Matrix<f32>) -> Vec<bool> {
        let mut running = vec![f32::NEG_INFINITY; maxima.width()];
        let decide = |(tile, row): (usize, &[f32])| {
            let mut skip = tile + exempt < maxima.rows();
            for (running, &largest) in running.iter_mut().zip(row) {
                // A comparison with NaN is false.
                skip &= largest == f32::NEG_INFINITY || (largest - *running) + threshold <= 0.0;
                *running = if largest.is_nan() || largest > *running { largest } else { *running };
            }
            skip
        };
        maxima.iter().enumerate().map(decide).collect()
    }

    /// Drops the scores of tiles that are skipped from the rows of a block, and counts the tiles that rows which decide
    /// together skipped, and those that they visited.
    fn drop_skipped(&self, head: usize, block: &mut [Vec<Score>]) -> [usize; 2] {
        let tile_of = |score: &Score| score.key / self.block_k;
        let tiles: BTreeSet<usize> = block.iter().flatten().map(tile_of).collect();
        let tiles: Vec<usize> = tiles.into_iter().collect();
        let (mut skipped, mut visited) = (0, 0);
        for rows in block.chunks_mut(self.rows) {
            let maxima = Matrix::from_fn(tiles.len(), rows.len(), |t, r| {
                let of_tile = rows[r].iter().filter(|score| tile_of(score) == tiles[t]);
                (maximum(of_tile) * LOG2_E) as f32
            });
            let skips = Self::skips(self.threshold.of(head), self.exempt, &maxima);
            let skip: BTreeSet<usize> =
                tiles.iter().zip(&skips).filter_map(|(&tile, &skip)| skip.then_some(tile)).collect();
            rows.iter_mut().for_each(|row| row.retain(|score| !skip.contains(&tile_of(score))));
            skipped += skip.len();
            visited += tiles.len();
        }
        [skipped, visited]
    }
}

/// What [`filtered`] returns.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Filtered {
    /// Attention, and the log-sum-exp of what was not skipped.
    pub output: Output,
    /// Tiles that rows which decide together skipped: a warp's tile counts as one.
    pub skipped: usize,
    /// Tiles that they visited, skipped or not.
    pub visited: usize,
}

/// Attention in double precision, over the blocks of `call`'s block mask, without the tiles that `filter` skips.
///
/// # Errors
/// When the filter has no row or no key in a tile, or a threshold that is no finite number of at least 0.
pub fn filtered(call: &Call<'_>, filter: &PvFilter) -> Result<Filtered> {
    let problem = &call.problem;
    check_block("block_q", filter.block_q)?;
    check_block("rows", filter.rows)?;
    check_block("block_k", filter.block_k)?;
    filter.threshold.check_not_negative("pvthreshd", problem.num_q_heads)?;

    let mut found = Filtered { output: Output::without_keys(call), skipped: 0, visited: 0 };
    for sequence in call.sequences() {
        for kv_head in 0..problem.num_kv_heads {
            let read = |tensor, head| {
                Matrix::of_head(tensor, sequence.batch, head, sequence.kv_start, sequence.kv_len)
                    .map(f64::from)
            };
            let (k, v) = (read(&call.k, kv_head), read(&call.v, kv_head));
            for head in kv_head * problem.group_size()..(kv_head + 1) * problem.group_size() {
                let q = Matrix::of_head(&call.q, sequence.batch, head, sequence.q_start, sequence.q_len);
                let q = q.map(f64::from);
                let scores = q.iter().enumerate().map(|(i, q)| row_scores(call, &sequence, head, i, q, &k));
                let mut rows: Vec<Vec<Score>> = scores.collect();
                for block in rows.chunks_mut(filter.block_q) {
                    let [skipped, visited] = filter.drop_skipped(head, block);
                    found.skipped += skipped;
                    found.visited += visited;
                }
                for (i, row) in rows.iter().enumerate() {
                    let (out, lse) = attend(row, &v);
                    found.output.set(call.lse_index(&sequence, head, i), &out, lse);
                }
            }
        }
    }
    Ok(Filtered { output: found.output.with_sinks(call), ..found })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Accuracy;
    use crate::oracle::exact;
    use crate::oracle::testing::{Sample, Sizes, matrix};
    use crate::sparse::BlockMap;
    use crate::{Alignment, Band, Inputs, Options};

    const TILE: Tile = Tile { block_q: 2, warp_q: 1, block_k: 2, warp_k: 2 };
    /// A score whose exponential is 8, three binary digits above that of 0.
    const LN_8: f32 = 2.079_441_5;

    /// What rows skip with a threshold of 2, where `maxima` has a row for each tile.
    fn skips<const ROWS: usize>(exempt: usize, maxima: &[[f32; ROWS]]) -> Vec<bool> {
        PvFilter::skips(2.0, exempt, &matrix(ROWS, &maxima.concat()))
    }

    #[test]
    fn a_tile_is_skipped_when_it_lies_far_enough_below_what_came_before() {
        let [no, yes] = [false, true];
        // The first; 2.9 below it; 1.9 below; exactly 2 below; a new maximum; 7 below that.
        let maxima = [[5.0], [2.1], [3.1], [3.0], [8.0], [1.0]];
        assert_eq!(skips(0, &maxima), [no, yes, no, yes, no, yes]);
        // The last tiles are exempt, but count for the maximum.
        assert_eq!(skips(1, &maxima), [no, yes, no, yes, no, no]);
        assert_eq!(skips(3, &maxima), [no, yes, no, no, no, no]);
        assert_eq!(skips(9, &maxima), [no; 6]);
    }

    #[test]
    fn rows_that_decide_together_skip_what_all_of_them_would() {
        let maxima = [[5.0, 0.0], [1.0, 1.0], [1.0, -3.0]];
        assert_eq!(skips(0, &maxima), [false, false, true]);
    }

    #[test]
    fn a_row_without_a_key_of_a_tile_holds_no_other_back() {
        let none = f32::NEG_INFINITY;
        assert_eq!(
            skips(0, &[[5.0, none], [1.0, none], [none, 7.0], [none, none]]),
            [false, true, false, true]
        );
    }

    #[test]
    fn what_is_no_number_is_never_skipped() {
        assert_eq!(skips(0, &[[5.0], [f32::NAN], [1.0]]), [false; 3]);
        assert_eq!(skips(0, &[[f32::NAN, 5.0], [1.0, 1.0]]), [false; 2]);
    }

    #[test]
    fn attention_without_a_skipped_tile_worked_out_by_hand() {
        // Tiles of exponentials 8, 8 and 1, 1 and 1, 1: with all of them, ℓ = 20.
        let (q, k) = ([1.0; 2], [LN_8, LN_8, 0.0, 0.0, 0.0, 0.0]);
        let sample = Sample::one_head(1, &q, &k, &[1.0, 3.0, 40.0, 40.0, 6.0, 6.0]);
        let options = Options { sm_scale: Some(1.0), ..Options::default() };
        let run = |filter: PvFilter| filtered(&sample.call(&options), &filter).unwrap();
        let close = |found: &Filtered, out: f64, sum: f64| {
            let near = |a: &[f64], b: f64| a.iter().all(|a| (a - b).abs() < 1e-6);
            assert!(near(&found.output.out, out) && near(&found.output.lse, sum.ln()), "{found:?}");
        };
        // The last tile is exempt, the second is three digits below the first.
        let skipping = run(PvFilter::new(2.9, TILE).exempt(1));
        close(&skipping, (8.0 + 24.0 + 12.0) / 18.0, 18.0);
        assert_eq!(
            (skipping.skipped, skipping.visited),
            (2, 6),
            "each of two warps skips one of three tiles"
        );
        let together = run(PvFilter::new(2.9, TILE).exempt(1).per_block());
        assert_eq!((&together.output, together.skipped, together.visited), (&skipping.output, 1, 3));
        let keeping = run(PvFilter::new(3.1, TILE));
        close(&keeping, (8.0 + 24.0 + 80.0 + 12.0) / 20.0, 20.0);
        assert_eq!(keeping.output, exact(&sample.call(&options)));
        assert_eq!(run(PvFilter::new(0.0, TILE)).skipped, 0, "the last two of three tiles are exempt");
    }

    #[test]
    fn the_map_and_the_band_say_which_tiles_are_visited() {
        let sample = Sample::normal(1, Sizes::one_head(4, 8, 4));
        let flags = [true, true, false, true, true, true, false, true];
        let map = BlockMap::new(flags.to_vec(), [1, 1, 2, 4], 2, 2).unwrap();
        let inputs = Inputs { block_mask: Some(map.mask()), ..sample.inputs() };
        let visited = |band| {
            let call = Call::check(&inputs, &Options { band, ..Options::default() }).unwrap();
            let found = filtered(&call, &PvFilter::new(50.0, TILE).per_block()).unwrap();
            assert_eq!(found.output, exact(&call));
            found.visited
        };
        // Three tiles of each block of queries. Causal from the corner, the first block sees tile 0, the second 0 and
        // 1.
        assert_eq!((visited(Band::FULL), visited(Band::causal(Alignment::TopLeft))), (6, 3));
    }

    #[test]
    fn what_is_skipped_is_as_small_as_the_threshold_says() {
        let sizes = Sizes { batch: 2, num_q_heads: 4, num_kv_heads: 2, q_len: 70, kv_len: 250, head_dim: 16 };
        let sample = Sample::normal(2, sizes);
        let options = Options { sm_scale: Some(2.0), ..Options::default() };
        let call = sample.call(&options);
        let tile = Tile { block_q: 32, warp_q: 2, block_k: 16, warp_k: 16 };
        let expected = exact(&call);
        let mut before = usize::MAX;
        for threshold in [2.0, 5.0, 10.0, 15.0f32] {
            let found = filtered(&call, &PvFilter::new(vec![threshold; 4], tile)).unwrap();
            assert!(found.skipped < before && found.visited == 2 * 4 * 35 * 16, "{found:?}");
            before = found.skipped;
            // At most 250 terms of 2^−threshold of the largest are missing from a sum of at least that.
            let missing = 250.0 * (-f64::from(threshold)).exp2();
            for (lse, expected) in found.output.lse.iter().zip(&expected.lse) {
                assert!(*lse <= expected + 1e-12 && expected - lse <= missing.ln_1p() + 1e-12);
            }
            let error = Accuracy::of(&found.output.out, &expected.out).relative_l1;
            assert!(error <= 2.0 * missing, "{error} with {threshold}");
        }
        assert!(before > 0, "nothing is skipped");
    }

    #[test]
    fn filters_that_make_no_sense_are_refused() {
        let sample = Sample::normal(3, Sizes::one_head(2, 2, 1));
        let error =
            |filter: PvFilter| filtered(&sample.call(&Options::default()), &filter).unwrap_err().to_string();
        assert_eq!(
            error(PvFilter::new(-1.0, TILE)),
            "pvthreshd: value is -1, expected a finite number of at least 0"
        );
        assert!(error(PvFilter::new(f32::NAN, TILE)).starts_with("pvthreshd: value is NaN"));
        assert_eq!(
            error(PvFilter::new(1.0, Tile { warp_q: 0, ..TILE })),
            "rows: value is 0, expected at least 1"
        );
    }
}
