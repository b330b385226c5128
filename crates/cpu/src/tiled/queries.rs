//! A block of queries, smoothed, rotated and packed.

use sage_core::{Granularity, IntQuantizer, Sequence};

use super::means::{Head, mean_block};
use super::{Block, Scratch, resized};
use crate::forward::Attention;
use crate::kernels::{Load, PackQueries, absmax_bits, hadamard};
use crate::rows::HeadRows;
use crate::tile::{QkForm, TileLayout};

/// The queries of one head, as they are before they are quantised.
struct Queries<'a, E> {
    rows: HeadRows<'a, E>,
    /// The mean of each block of this many; none where nothing is subtracted.
    means: Option<(&'a [f32], usize)>,
    layout: &'a TileLayout,
}

impl<E: Load> Queries<'_, E> {
    /// Row `i`, smoothed and rotated. `given` sees it as it was.
    fn read(&self, i: usize, row: &mut [f32], given: impl FnOnce(&[f32])) {
        let head_dim = self.layout.head_dim;
        let (channels, padding) = row.split_at_mut(head_dim);
        E::widen(self.rows.row(i), channels);
        given(channels);
        if let Some((means, block)) = self.means {
            let mean = &means[i / block * head_dim..][..head_dim];
            channels.iter_mut().zip(mean).for_each(|(x, mean)| *x -= mean);
        }
        padding.fill(0.0);
        if self.layout.rotate {
            hadamard(row);
        }
    }
}

impl<E: Load> Attention<'_, '_, E> {
    /// Packs a block's queries and the means that were subtracted from them, and computes what smoothing K takes from
    /// each row's scores, in base 2.
    pub(super) fn pack_queries(
        &self,
        layout: &TileLayout,
        sequence: &Sequence,
        block: &Block,
        padded_rows: usize,
        of_head: &Head,
        scratch: &mut Scratch,
    ) {
        let Block { head, first, rows, .. } = *block;
        let block_of_means = mean_block(layout.smooth_q, sequence.q_len);
        let means = block_of_means.map(|block| {
            let means = &of_head.q_means[head % self.call.problem.group_size()];
            (&means[..], block)
        });
        let queries = Queries { rows: self.queries(sequence, head), means, layout };
        let Scratch { wide, group_max, q, q_words, q_scale, mean_score, q_means, mean_of, .. } = scratch;
        let q = resized(q, rows * layout.qk_dim);
        mean_score.clear();
        mean_score.resize(rows, 0.0);
        let wants_mean_score =
            self.lse.is_some() || self.call.problem.logit_softcap.is_some() || self.call.problem.sinks;
        for (i, row) in q.chunks_exact_mut(layout.qk_dim).enumerate() {
            queries.read(first + i, row, |given| {
                if wants_mean_score {
                    let products = given.iter().zip(&of_head.k_mean);
                    let sum: f64 = products.map(|(q, mean)| f64::from(*q) * f64::from(*mean)).sum();
                    mean_score[i] = (sum * f64::from(self.score_scale())) as f32;
                }
            });
        }
        if let Some((means, block)) = means {
            let of_rows = first / block..(first + rows).div_ceil(block);
            let means = &means[of_rows.start * layout.head_dim..of_rows.end * layout.head_dim];
            q_means.clear();
            q_means.extend(means.iter().map(|mean| mean * self.score_scale()));
            q_means.resize(of_rows.len().next_multiple_of(self.kernels.rows) * layout.head_dim, 0.0);
            mean_of.clear();
            mean_of.extend((first..first + rows).map(|i| (i / block - of_rows.start) as u32));
        }

        // A group's scale depends on all of its rows, also those of other blocks.
        let mut first_group = 0;
        group_max.clear();
        if let QkForm::Int(quantizer) = layout.qk {
            let span = q_group_span(&quantizer);
            let start = first / span * span;
            let end = (first + rows).div_ceil(span).saturating_mul(span).min(sequence.q_len);
            first_group = quantizer.q_group(start);
            let wide = resized(wide, layout.qk_dim);
            for i in start..end {
                let max = if (first..first + rows).contains(&i) {
                    absmax_bits(&q[(i - first) * layout.qk_dim..][..layout.qk_dim])
                } else {
                    queries.read(i, wide, |_| ());
                    absmax_bits(wide)
                };
                let group = quantizer.q_group(i) - first_group;
                if group_max.len() <= group {
                    group_max.resize(group + 1, 0);
                }
                group_max[group] = group_max[group].max(max);
            }
        }
        self.kernels.pack_queries(PackQueries {
            layout: *layout,
            first,
            rows,
            score_scale: self.score_scale(),
            q,
            group_max,
            first_group,
            words: q_words.resized(padded_rows * layout.depth),
            scale: resized(q_scale, padded_rows),
        });
    }
}

/// Rows within which the groups of queries lie.
fn q_group_span(quantizer: &IntQuantizer) -> usize {
    match quantizer.granularity {
        Granularity::PerTensor => usize::MAX,
        Granularity::PerBlock => quantizer.tile.block_q,
        Granularity::PerWarp | Granularity::PerThread => quantizer.tile.warp_q,
        Granularity::PerToken => 1,
    }
}
