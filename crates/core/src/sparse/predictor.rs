//! Which blocks are worth computing, predicted from the means of blocks.

use std::ops::Range;

use super::arithmetic::products;
use super::grid::{Grid, check_block, check_shape};
use super::map::cleared;
use super::{BlockMap, PaddedBlocks, PerHead, PooledBlocks, Select, mean_of_blocks};
use crate::call::Omitted;
use crate::oracle::Matrix;
use crate::problem::default_sm_scale;
use crate::{Call, DType, Error, Inputs, MAX_VALUE_DIM, Options, Problem, Result, Strided, TensorView};

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
/// For each head of each sequence, of which tokens count that its lengths give it and padding leaves, and of keys those
/// that the [`Band`](crate::Band) lets some query see (its blocks are those up to the last that has such a key):
/// 1. the mean of K over all its tokens is subtracted from K where [`smooth_k`](Self::smooth_k) says so
///    ([`mean_of_blocks`]);
/// 2. blocks of Q and K become their means, and get their similarities ([`PooledBlocks`]);
/// 3. the score of a pair is `⟨q̄, k̄⟩ / √head_dim`: products are rounded to single precision and added in the order of
///    the channels, and the sum is multiplied by the rounded `1 / √head_dim`, whatever scale attention uses;
/// 4. each block of queries chooses among the key blocks that the band shows it, by [`Select`]. A key block that is not
///    similar does not compete;
/// 5. beside the chosen ones it keeps the key blocks that are not similar and those of [`sink_k`](Self::sink_k), or
///    all if it is itself not similar or one of [`sink_q`](Self::sink_q). A block that the band hides is never kept,
///    nor one in which no token counts.
///
/// Everything is done in single precision in a stated order, so that kernels predict the same map bit for bit. An
/// explicit mask has no part in it.
///
/// ```
/// use sage_core::sparse::{Predictor, Select};
/// use sage_core::{Alignment, Band, DType, Options, Tensor};
///
/// let q = Tensor::zeros(DType::F16, &[1, 4, 300, 64])?;
/// let k = Tensor::zeros(DType::F16, &[1, 2, 300, 64])?;
/// let predictor = Predictor::sparge_attn(Select::Cdf(0.98.into()), 0.6)
///     .sink_k(0..1);
/// let options = Options::default().band(Band::causal(Alignment::TopLeft));
/// let map = predictor.predict(q.view(), k.view(), &options)?;
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

/// What passes the checks as values of these keys where values have no part, as in a prediction: the first channels of
/// each.
pub fn stand_in_values<T: Strided>(k: T) -> T {
    let geometry = k.geometry();
    match geometry.shape() {
        &[.., channels] => {
            k.with_geometry(geometry.narrowed(geometry.rank() - 1, 0..channels.min(MAX_VALUE_DIM)))
        }
        [] => k,
    }
}

impl Predictor {
    /// Blocks of 64 queries and 64 keys, means of K as it is, and no other rule than `select`.
    pub fn new(select: Select) -> Self {
        Predictor {
            select,
            block_q: 64,
            block_k: 64,
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
    /// or as the layout of `options` has them. Fewer key heads than query heads is grouped-query attention. Only blocks
    /// in which the band of `options` lets some query see a key take part; scale and soft cap do not change a map.
    ///
    /// # Errors
    /// Names the tensor or option that is wrong, the value found and the value wanted.
    pub fn predict(&self, q: TensorView<'_>, k: TensorView<'_>, options: &Options) -> Result<BlockMap> {
        // The map has blocks of all keys, also of those that nothing sees.
        let inputs = Inputs::new(q, k, stand_in_values(k));
        let call = Call::check_keys(&inputs, options, Omitted::None)?;
        self.check(&call.problem, call.problem.kv_len)?;
        self.map(&call)
    }

    /// The map of a call that [`Call::check_sparse`] checked.
    ///
    /// # Errors
    /// When memory does not hold it.
    pub fn map(&self, call: &Call<'_>) -> Result<BlockMap> {
        let mut flags = self.cleared_flags(&call.problem)?;
        let groups = self.groups(call, &mut flags);
        groups.for_each(|(group, flags)| self.predict_group(call, group, flags));
        self.map_of_flags(&call.problem, flags)
    }

    /// Flags of a map of a problem that keeps no block.
    ///
    /// # Errors
    /// When memory does not hold them.
    pub fn cleared_flags(&self, problem: &Problem) -> Result<Vec<bool>> {
        cleared(self.shape(problem))
    }

    /// The groups of query heads that share a key head, each with its flags among those of the map.
    pub fn groups<'f>(
        &self,
        call: &Call<'_>,
        flags: &'f mut [bool],
    ) -> impl Iterator<Item = (usize, &'f mut [bool])> + use<'f> {
        let [_, _, q_blocks, k_blocks] = self.shape(&call.problem);
        let of_group = call.problem.group_size() * q_blocks * k_blocks;
        // Without blocks there are no flags, and no group has any.
        flags.chunks_mut(of_group.max(1)).enumerate()
    }

    /// Predicts the flags of one of the [`Predictor::groups`], which keep no block so far.
    ///
    /// # Panics
    /// When there is no such group in the call.
    pub fn predict_group(&self, call: &Call<'_>, group: usize, flags: &mut [bool]) {
        let Problem { num_kv_heads, dtype, band, .. } = call.problem;
        let [_, _, q_blocks, k_blocks] = self.shape(&call.problem);
        let (index, kv_head) = (group / num_kv_heads, group % num_kv_heads);
        let sequence = call.sequences().nth(index).expect("a group is of a sequence of the call");
        let (q_len, kv_len) = (sequence.q_len, sequence.kv_len);
        let grid = Grid { q_len, kv_len, block_q: self.block_q, block_k: self.block_k };
        let q_tokens = tokens(self.q_padding.as_ref(), 0..q_len, self.block_q);
        let k_tokens = tokens(self.k_padding.as_ref(), band.seen(q_len, kv_len), self.block_k);

        let mut k = Matrix::of_head(&call.k, sequence.batch, kv_head, sequence.kv_start, kv_len);
        if self.smooth_k {
            let mean = mean_of_blocks(&k, &k_tokens);
            (0..kv_len).for_each(|j| k.row_mut(j).iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean));
        }
        let k = self.pooled(&k, &k_tokens, dtype);
        let k_means = k.means.transposed();
        let of_head = (q_blocks * k_blocks).max(1);
        for (flags, head) in flags.chunks_mut(of_head).zip(kv_head * call.problem.group_size()..) {
            let q = Matrix::of_head(&call.q, sequence.batch, head, sequence.q_start, q_len);
            let q = self.pooled(&q, &q_tokens, dtype);
            let q_similar = self.similar(head, &q, &q_tokens, self.block_q);
            let k_similar = self.similar(head, &k, &k_tokens, self.block_k);
            for i in (0..grid.q_blocks()).filter(|&i| !q_tokens[i].is_empty()) {
                let seen: Vec<usize> = grid.seen(&band, i).filter(|&j| !k_tokens[j].is_empty()).collect();
                let kept = if !q_similar[i] || self.sink_q.contains(&i) {
                    seen
                } else {
                    self.kept(head, q.means.row(i), &k_means, &k_similar, seen)
                };
                kept.into_iter().for_each(|j| flags[i * k_blocks + j] = true);
            }
        }
    }

    /// The map that has these flags.
    ///
    /// # Errors
    /// When they are not those of the problem's map.
    pub fn map_of_flags(&self, problem: &Problem, flags: Vec<bool>) -> Result<BlockMap> {
        BlockMap::new(flags, self.shape(problem), self.block_q, self.block_k)
    }

    /// `[batch, num_q_heads, q_blocks, k_blocks]` of a problem's map.
    pub fn shape(&self, problem: &Problem) -> [usize; 4] {
        let Problem { batch, num_q_heads, q_len, kv_len, .. } = *problem;
        [batch, num_q_heads, q_len.div_ceil(self.block_q), kv_len.div_ceil(self.block_k)]
    }

    /// That every option fits a problem, where the tensors have `kv_rows` keys, those among them that the problem
    /// leaves out.
    ///
    /// # Errors
    /// Names the option that does not fit, the value found and the value wanted.
    pub fn check(&self, problem: &Problem, kv_rows: usize) -> Result<()> {
        check_block("block_q", self.block_q)?;
        check_block("block_k", self.block_k)?;
        check_shape(self.shape(problem))?;
        self.select.check(problem.num_q_heads)?;
        if let Some(threshold) = &self.similarity {
            threshold.check_finite("simthreshd1", problem.num_q_heads)?;
        }
        check_padding("q_padding", self.q_padding.as_ref(), problem.q_len, self.block_q)?;
        check_padding("k_padding", self.k_padding.as_ref(), kv_rows, self.block_k)
    }

    /// The blocks of a head, with their similarities where these decide.
    fn pooled(&self, rows: &Matrix<f32>, tokens: &[Range<usize>], dtype: DType) -> PooledBlocks {
        match self.similarity {
            Some(_) => PooledBlocks::new(rows, tokens, dtype),
            None => PooledBlocks::means_alone(rows, tokens, dtype),
        }
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

    /// The key blocks among `seen` that a block of queries with the mean `q` keeps. Column `j` of `k_means` is the mean
    /// of key block `j`.
    fn kept(
        &self,
        head: usize,
        q: &[f32],
        k_means: &Matrix<f32>,
        k_similar: &[bool],
        seen: Vec<usize>,
    ) -> Vec<usize> {
        let scale = default_sm_scale(q.len());
        let products = products(q, k_means);
        let mut scores = vec![None; k_similar.len()];
        for &j in seen.iter().filter(|&&j| k_similar[j]) {
            scores[j] = Some(products[j] * scale);
        }
        let mut kept = self.select.choose(head, &scores);
        kept.extend(seen.into_iter().filter(|j| !k_similar[*j] || self.sink_k.contains(j)));
        kept
    }
}

/// The tokens of each block that count, of a sequence in which those of `seen` do: of blocks up to the last that has
/// some.
fn tokens(padding: Option<&PaddedBlocks>, seen: Range<usize>, block: usize) -> Vec<Range<usize>> {
    let of_block = |b: usize| {
        let size = padding.map_or(block, |padding| padding.sizes()[b]);
        let start = seen.start.max(b * block);
        start..seen.end.min(b * block + size).max(start)
    };
    (0..seen.end.div_ceil(block)).map(of_block).collect()
}

/// That padding is of a sequence of `len` tokens, in the predictor's blocks.
fn check_padding(name: &'static str, padding: Option<&PaddedBlocks>, len: usize, block: usize) -> Result<()> {
    if let Some(padding) = padding
        && (padding.block() != block || padding.len() != len)
    {
        let found = format!("{} tokens in blocks of {}", padding.len(), padding.block());
        return Err(Error::value(name, found, format!("{len} tokens in blocks of {block}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
