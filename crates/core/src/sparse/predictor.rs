//! Which blocks are worth computing, predicted from the means of blocks.

use std::ops::Range;

use super::arithmetic::dot;
use super::grid::{Grid, check_block};
use super::map::cleared;
use super::{BlockMap, PaddedBlocks, PerHead, PooledBlocks, Select, mean_of_blocks};
use crate::oracle::{Matrix, subtract};
use crate::problem::default_sm_scale;
use crate::{Band, Call, Error, Inputs, Layout, Lengths, Options, Problem, Result, Sequence, TensorView};

/// A predictor of block maps: it scores pairs of blocks by their means, and lets each block of queries choose.
///
/// | system | constructor | source |
/// | --- | --- | --- |
/// | SpargeAttn | [`Predictor::sparge_attn`] | arXiv 2502.18137, §3.2, §3.3 |
/// | SLA, SageSLA | [`Predictor::sla`] | arXiv 2509.24006 |
/// | SpargeAttention2 | [`Predictor::sparge_attn2`] | arXiv 2602.13515 |
/// | VSA | [`Predictor::vsa`] | arXiv 2505.13389 |
/// | Sol-Attn | [`Predictor::sol_attn`] | arXiv 2607.24027, §3.1 |
///
/// For each head:
/// 1. the mean of K over all its tokens is subtracted from K where [`smooth_k`](Self::smooth_k) says so
///    ([`mean_of_blocks`]);
/// 2. blocks of Q and K become their means, and get their similarities ([`PooledBlocks`]);
/// 3. the score of a pair is `⟨q̄, k̄⟩ / √head_dim`: products are rounded to single precision and added in the order of
///    the channels, and the sum is multiplied by the rounded `1 / √head_dim`, whatever scale attention uses;
/// 4. each block of queries chooses among the key blocks that the [`band`](Self::band) shows it, by [`Select`]. A key
///    block that is not similar does not compete;
/// 5. beside the chosen ones it keeps the key blocks that are not similar and those of [`sink_k`](Self::sink_k), or
///    all if it is itself not similar or one of [`sink_q`](Self::sink_q). A block that the band hides is never kept,
///    nor one in which no token counts.
///
/// Everything is done in single precision in a stated order, so that kernels predict the same map bit for bit.
///
/// ```
/// use sage_core::sparse::{Predictor, Select};
/// use sage_core::{Alignment, Band, DType, Layout, Tensor};
///
/// let q = Tensor::zeros(DType::F16, &[1, 4, 300, 64])?;
/// let k = Tensor::zeros(DType::F16, &[1, 2, 300, 64])?;
/// let predictor = Predictor::sparge_attn(Select::Cdf(0.98.into()), 0.6)
///     .band(Band::causal(Alignment::TopLeft))
///     .sink_k(0..1);
/// let map = predictor.predict(q.view(), k.view(), Layout::Hnd)?;
/// assert_eq!(map.shape(), [1, 4, 3, 5]);
/// # Ok::<(), sage_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
#[must_use = "a predictor computes nothing until `predict` is called"]
pub struct Predictor {
    /// How many key blocks each block of queries chooses.
    pub select: Select,
    /// Queries in a block.
    pub block_q: usize,
    /// Keys in a block.
    pub block_k: usize,
    /// What queries see: only blocks in which some query sees a key take part.
    pub band: Band,
    /// Whether the mean of K over all tokens is subtracted first.
    pub smooth_k: bool,
    /// The similarity that a block must exceed for its mean to stand for it. Where it is given, a block that is not
    /// similar is computed with all others, and so is one whose similarity is NaN.
    pub similarity: Option<PerHead>,
    /// Key blocks that every query attends to.
    pub sink_k: Range<usize>,
    /// Query blocks that attend to every key.
    pub sink_q: Range<usize>,
    /// Whether a block with fewer tokens than the others counts as not similar, where similarity is asked for. In
    /// SpargeAttn the last one does: the rows that fill it up are zeros, and their cosines 0 / 0.
    pub original_tails: bool,
    /// Which queries count, where blocks are padded.
    pub q_padding: Option<PaddedBlocks>,
    /// Which keys count, where blocks are padded.
    pub k_padding: Option<PaddedBlocks>,
}

impl Predictor {
    /// Blocks of 64 queries and 64 keys, means of K as it is, and no other rule than `select`.
    pub fn new(select: Select) -> Self {
        Predictor {
            select,
            block_q: 64,
            block_k: 64,
            band: Band::FULL,
            smooth_k: false,
            similarity: None,
            sink_k: 0..0,
            sink_q: 0..0,
            original_tails: false,
            q_padding: None,
            k_padding: None,
        }
    }

    /// SpargeAttn: [`Select::Cdf`] or [`Select::TopK`] among blocks whose similarity exceeds `simthreshd1`, in blocks
    /// of 128 queries and 64 keys, with a smoothed K. Its attention sink is [`Predictor::sink_k`]`(0..1)`.
    pub fn sparge_attn(select: Select, simthreshd1: impl Into<PerHead>) -> Self {
        Predictor { smooth_k: true, ..Self::new(select) }.blocks(128, 64).similarity(simthreshd1)
    }

    /// SLA and SageSLA: the top share of blocks of 64 queries and 64 keys, with a smoothed K.
    pub fn sla(topk: impl Into<PerHead>) -> Self {
        Predictor { smooth_k: true, ..Self::new(Select::TopK(topk.into())) }
    }

    /// SpargeAttention2: the union of top-k and top-p, in blocks of 128 queries and 64 keys.
    pub fn sparge_attn2(topk: impl Into<PerHead>, topp: impl Into<PerHead>) -> Self {
        Self::new(Select::TopKTopP { k: topk.into(), p: topp.into() }).blocks(128, 64)
    }

    /// VSA: the top blocks by number, in blocks of 64 queries and 64 keys. Blocks of varying size are
    /// [`Predictor::q_padding`] and [`Predictor::k_padding`].
    pub fn vsa(topk: usize) -> Self {
        Self::new(Select::Count(topk))
    }

    /// Sol-Attn: the blocks whose score exceeds the mean of their row by `tau` standard deviations, of 64 queries and
    /// 64 keys.
    pub fn sol_attn(tau: impl Into<PerHead>) -> Self {
        Self::new(Select::Sigmas(tau.into()))
    }

    /// Tokens in a block of queries and in one of keys.
    pub fn blocks(self, block_q: usize, block_k: usize) -> Self {
        Predictor { block_q, block_k, ..self }
    }

    /// What queries see at all.
    pub fn band(self, band: Band) -> Self {
        Predictor { band, ..self }
    }

    /// Whether the mean of K over all tokens is subtracted first.
    pub fn smooth_k(self, smooth_k: bool) -> Self {
        Predictor { smooth_k, ..self }
    }

    /// The similarity that a block must exceed for its mean to stand for it.
    pub fn similarity(self, threshold: impl Into<PerHead>) -> Self {
        Predictor { similarity: Some(threshold.into()), ..self }
    }

    /// Key blocks that every query attends to.
    pub fn sink_k(self, blocks: Range<usize>) -> Self {
        Predictor { sink_k: blocks, ..self }
    }

    /// Query blocks that attend to every key.
    pub fn sink_q(self, blocks: Range<usize>) -> Self {
        Predictor { sink_q: blocks, ..self }
    }

    /// Whether a block with fewer tokens than the others counts as not similar, as in the original SpargeAttn.
    pub fn original_tails(self, original_tails: bool) -> Self {
        Predictor { original_tails, ..self }
    }

    /// Which queries count, where blocks are padded.
    pub fn q_padding(self, padding: PaddedBlocks) -> Self {
        Predictor { q_padding: Some(padding), ..self }
    }

    /// Which keys count, where blocks are padded.
    pub fn k_padding(self, padding: PaddedBlocks) -> Self {
        Predictor { k_padding: Some(padding), ..self }
    }

    /// The map of queries `[batch, num_q_heads, q_len, head_dim]` and keys `[batch, num_kv_heads, kv_len, head_dim]`,
    /// or as `layout` has them. Fewer key heads than query heads is grouped-query attention.
    ///
    /// # Errors
    /// Names the tensor or option that is wrong, the value found and the value wanted.
    pub fn predict(&self, q: TensorView<'_>, k: TensorView<'_>, layout: Layout) -> Result<BlockMap> {
        self.predict_lengths(q, k, layout, Lengths::Dense)
    }

    /// [`Predictor::predict`] where only the first `kv_lens[b]` keys of batch entry `b` are valid. Each entry's map is
    /// that of these keys by themselves, and keeps none of the blocks behind them: means, shares of blocks and the band
    /// know no other keys, and the block that they end in is a shorter last one.
    ///
    /// # Errors
    /// As [`Predictor::predict`], and when sequences are packed.
    pub fn predict_lengths(
        &self,
        q: TensorView<'_>,
        k: TensorView<'_>,
        layout: Layout,
        lengths: Lengths<'_>,
    ) -> Result<BlockMap> {
        if lengths.packed() {
            return Err(Error::unsupported(
                "a predictor with cu_seqlens",
                "a block map needs dense tensors: predict each sequence by itself",
            ));
        }
        // Values have no part in a prediction, and any that fit the keys pass the checks.
        let options = Options { layout, ..Options::default() };
        let call = Call::check(&Inputs { lengths, ..Inputs::new(q, k, k) }, &options)?;
        let Problem { batch, num_q_heads, num_kv_heads, q_len, kv_len, .. } = call.problem;
        self.check(num_q_heads, q_len, kv_len)?;
        let grid = Grid { q_len, kv_len, block_q: self.block_q, block_k: self.block_k };
        let q_tokens = tokens(self.q_padding.as_ref(), q_len, self.block_q);
        let (shape, columns) = ([batch, num_q_heads, grid.q_blocks(), grid.k_blocks()], grid.k_blocks());
        let mut flags = cleared(shape)?;

        let heads = call.sequences().flat_map(|sequence| (0..num_kv_heads).map(move |head| (sequence, head)));
        for (Sequence { batch: b, kv_len, .. }, kv_head) in heads {
            let grid = Grid { kv_len, ..grid };
            let k_tokens = tokens(self.k_padding.as_ref(), kv_len, self.block_k);
            let mut k = Matrix::of_head(&call.k, b, kv_head, 0, kv_len);
            if self.smooth_k {
                k = subtract(&k, &mean_of_blocks(&k, &k_tokens));
            }
            let k = PooledBlocks::new(&k, &k_tokens, call.problem.dtype);
            let group_size = call.problem.group_size();
            for head in kv_head * group_size..(kv_head + 1) * group_size {
                let q = Matrix::of_head(&call.q, b, head, 0, q_len);
                let q = PooledBlocks::new(&q, &q_tokens, call.problem.dtype);
                let q_similar = self.similar(head, &q, &q_tokens, self.block_q);
                let k_similar = self.similar(head, &k, &k_tokens, self.block_k);
                for i in (0..grid.q_blocks()).filter(|&i| !q_tokens[i].is_empty()) {
                    let seen: Vec<usize> =
                        grid.seen(&self.band, i).filter(|&j| !k_tokens[j].is_empty()).collect();
                    let kept = if !q_similar[i] || self.sink_q.contains(&i) {
                        seen
                    } else {
                        self.kept(head, q.means.row(i), &k, &k_similar, seen)
                    };
                    let row = ((b * num_q_heads + head) * grid.q_blocks() + i) * columns;
                    kept.into_iter().for_each(|j| flags[row + j] = true);
                }
            }
        }
        BlockMap::new(flags, shape, self.block_q, self.block_k)
    }

    /// That the options fit each other, and queries and keys of these sizes.
    ///
    /// # Errors
    /// Names the option that is wrong, the value found and the value wanted.
    pub fn check(&self, num_q_heads: usize, q_len: usize, kv_len: usize) -> Result<()> {
        check_block("block_q", self.block_q)?;
        check_block("block_k", self.block_k)?;
        self.select.check(num_q_heads)?;
        if let Some(threshold) = &self.similarity {
            threshold.check_finite("simthreshd1", num_q_heads)?;
        }
        check_padding("q_padding", self.q_padding.as_ref(), q_len, self.block_q)?;
        check_padding("k_padding", self.k_padding.as_ref(), kv_len, self.block_k)
    }

    /// Whether the mean of each block stands for its tokens.
    fn similar(
        &self,
        head: usize,
        pooled: &PooledBlocks,
        tokens: &[Range<usize>],
        block: usize,
    ) -> Vec<bool> {
        let Some(threshold) = &self.similarity else { return vec![true; tokens.len()] };
        let whole = |tokens: &Range<usize>| !self.original_tails || tokens.len() == block;
        let similar = |(similarity, tokens): (&f32, _)| *similarity > threshold.of(head) && whole(tokens);
        pooled.similarities.iter().zip(tokens).map(similar).collect()
    }

    /// The key blocks among `seen` that a block of queries with the mean `q` keeps.
    fn kept(
        &self,
        head: usize,
        q: &[f32],
        k: &PooledBlocks,
        k_similar: &[bool],
        seen: Vec<usize>,
    ) -> Vec<usize> {
        let scale = default_sm_scale(q.len());
        let mut scores = vec![None; k_similar.len()];
        for &j in seen.iter().filter(|&&j| k_similar[j]) {
            scores[j] = Some(dot(q, k.means.row(j)) * scale);
        }
        let mut kept = self.select.choose(head, &scores);
        kept.extend(seen.into_iter().filter(|j| !k_similar[*j] || self.sink_k.contains(j)));
        kept
    }
}

/// That blocks which are padded are those of a sequence that has `len` tokens with all padding.
fn check_padding(name: &'static str, padding: Option<&PaddedBlocks>, len: usize, block: usize) -> Result<()> {
    match padding {
        Some(padding) if padding.block() != block || padding.len() != len => {
            let found = format!("{} tokens in blocks of {}", padding.len(), padding.block());
            Err(Error::value(name, found, format!("{len} tokens in blocks of {block}")))
        }
        _ => Ok(()),
    }
}

/// The tokens of each block that count, where the sequence ends after `len` with all padding.
fn tokens(padding: Option<&PaddedBlocks>, len: usize, block: usize) -> Vec<Range<usize>> {
    let size = |b: usize| padding.map_or(block, |padding| padding.sizes()[b]);
    (0..len.div_ceil(block)).map(|b| b * block..len.min(b * block + size(b))).collect()
}

#[cfg(test)]
mod tests;
