//! How the queries and keys of a call are cut into blocks.

use std::ops::Range;

use crate::{Band, Error, Geometry, Result};

/// Queries and keys, each cut into blocks of which the last may be shorter. No size of a block is 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub(super) q_len: usize,
    pub(super) kv_len: usize,
    pub(super) block_q: usize,
    pub(super) block_k: usize,
}

impl Grid {
    /// Blocks of queries.
    pub(super) fn q_blocks(&self) -> usize {
        self.q_len.div_ceil(self.block_q)
    }

    /// Blocks of keys.
    pub(super) fn k_blocks(&self) -> usize {
        self.kv_len.div_ceil(self.block_k)
    }

    /// The key blocks in which `band` lets some query of block `q_block` see a key.
    ///
    /// With a causal band that is aligned top-left these are the blocks `j < (q_block + 1) · block_q / block_k`, which
    /// is SpargeAttn's rule.
    pub(super) fn seen(&self, band: &Band, q_block: usize) -> Range<usize> {
        let first = q_block * self.block_q;
        let last = self.q_len.min(first + self.block_q) - 1;
        let keys = |query| band.keys(query, self.q_len, self.kv_len);
        // Rows begin and end further to the right from one to the next, without a gap between them.
        let (start, end) = (keys(first).start, keys(last).end);
        if start < end { start / self.block_k..end.div_ceil(self.block_k) } else { 0..0 }
    }
}

/// That a map of `shape`, and the lists of either side's blocks, can be counted and numbered in 32 bits.
pub(super) fn check_shape(shape: [usize; 4]) -> Result<Geometry> {
    let [batch, heads, q_blocks, k_blocks] = shape;
    let numbered = |blocks: usize| {
        let heads = batch.max(1).checked_mul(heads.max(1));
        heads.and_then(|heads| heads.checked_mul(blocks)).is_some_and(|lists| i32::try_from(lists).is_ok())
    };
    if !(numbered(q_blocks) && numbered(k_blocks)) {
        let wanted = "fewer than 2³¹ blocks of queries and of keys, those of all heads together";
        return Err(Error::shape("block_map", &shape, wanted));
    }
    Geometry::contiguous("block_map", &shape)
}

/// That a block has tokens.
pub(super) fn check_block(name: &'static str, tokens: usize) -> Result<()> {
    if tokens == 0 { Err(Error::value(name, tokens, "at least 1")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Alignment;

    #[test]
    fn seen_blocks_are_those_in_which_some_query_sees_a_key() {
        for (q_len, kv_len) in [(1, 1), (5, 5), (9, 4), (4, 9), (7, 0)] {
            for (block_q, block_k) in [(1, 1), (2, 3), (3, 2), (4, 16)] {
                let grid = Grid { q_len, kv_len, block_q, block_k };
                for alignment in [Alignment::BottomRight, Alignment::TopLeft, Alignment::Offset(3)] {
                    for (left, right) in
                        [(None, None), (None, Some(0)), (Some(1), Some(0)), (Some(0), Some(2))]
                    {
                        let band = Band { left, right, alignment };
                        for q_block in 0..grid.q_blocks() {
                            let sees = |k_block: &usize| {
                                (q_block * block_q..q_len.min((q_block + 1) * block_q))
                                    .any(|i| band.keys(i, q_len, kv_len).any(|j| j / block_k == *k_block))
                            };
                            let expected: Vec<usize> = (0..grid.k_blocks()).filter(sees).collect();
                            let seen: Vec<usize> = grid.seen(&band, q_block).collect();
                            assert_eq!(seen, expected, "{grid:?} {band:?} block {q_block}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_causal_block_ends_where_the_original_says() {
        // (q_block + 1) · 128 / 64 = 2, 4; (q_block + 1) · 64 / 128 = ½, 1, 1½, 2.
        let band = Band::causal(Alignment::TopLeft);
        let ends = |block_q, block_k| {
            let grid = Grid { q_len: 256, kv_len: 256, block_q, block_k };
            (0..grid.q_blocks()).map(|block| grid.seen(&band, block).end).collect::<Vec<_>>()
        };
        assert_eq!(ends(128, 64), [2, 4]);
        assert_eq!(ends(64, 128), [1, 1, 2, 2]);
    }
}
