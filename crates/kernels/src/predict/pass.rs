//! The pass that predicts a map.

use std::ops::Range;

use sage_core::sparse::{PerHead, Predictor, Select};
use sage_core::{DType, Error, Problem, Result, default_sm_scale};

use super::{
    Choice, ChooseBlocksArgs, ChooseBlocksConfig, LengthLists, MeanOfBlocksArgs, MeanOfBlocksConfig,
    PerHeadArg, PoolBlocksArgs, PoolBlocksConfig, ScoreBlocksArgs, ScoreBlocksConfig, SumBlocksArgs,
    SumBlocksConfig, TokenBlocks, TokensArgs,
};
use crate::pass::{Pass, PassBuilder, Slot};
use crate::preprocess::{CHUNK, Source};
use crate::sequence::Lengths;
use crate::tensor::TensorArg;

/// What a prediction reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PredictTensors {
    /// Queries, `[batch, q_heads, q_rows, head_dim]`; of packed sequences a batch of one.
    pub q: TensorArg,
    /// Keys, `[batch, kv_heads, kv_rows, head_dim]`; of packed sequences a batch of one.
    pub k: TensorArg,
    /// With [`Lengths::Packed`] boundaries of queries and of keys, i32 `[batch + 1]`; with [`Lengths::KvLens`] as those of
    /// keys the valid keys of each batch entry, i32 `[batch]`.
    pub lengths: LengthLists,
    /// How many queries of each block count, i32 `[q_blocks]`, where the predictor pads blocks of queries.
    pub q_sizes: u64,
    /// How many keys of each block count, i32 `[k_blocks]`, where the predictor pads blocks of keys.
    pub k_sizes: u64,
    /// Shares of all blocks, f32 `[q_heads]`, where heads have their own.
    pub top_share: u64,
    /// Shares of all weight or standard deviations, f32 `[q_heads]`, where heads have their own.
    pub amount: u64,
    /// Thresholds of similarity, f32 `[q_heads]`, where heads have their own.
    pub similarity: u64,
    /// The map, bytes `[batch, q_heads, q_blocks, k_blocks]`: 1 where a block is kept.
    pub map: u64,
}

impl PredictTensors {
    /// Whether all rows of queries and keys start at multiples of 16 bytes and are whole such chunks.
    pub fn aligned(&self, head_dim: usize) -> bool {
        let aligned = |tensor: &TensorArg| {
            let whole = |stride: &i64| stride % CHUNK as i64 == 0;
            tensor.address.is_multiple_of(16) && tensor.strides.iter().all(whole)
        };
        head_dim.is_multiple_of(CHUNK) && [self.q, self.k].iter().all(aligned)
    }
}

/// Queries and keys of which a map is predicted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PredictCall {
    /// The call, as [`Call::check_sparse`](sage_core::Call::check_sparse) checked it.
    pub problem: Problem,
    /// Where lengths come from.
    pub lengths: Lengths,
    /// Rows of the tensor of queries: more than a sequence has, where they are packed.
    pub q_rows: usize,
    /// Rows of the tensor of keys.
    pub kv_rows: usize,
    /// Whether all rows of both tensors start at multiples of 16 bytes and are whole such chunks.
    pub aligned: bool,
    /// Whether blocks of keys are padded, so that [`PredictTensors::k_sizes`] has their sizes.
    pub padded_keys: bool,
}

/// Most channels of a head that the kernels pool.
const MAX_HEAD_DIM: usize = 256;

/// Most bytes of scores at once: the rows of a longer map are chosen in several turns.
const SCORE_BYTES: usize = 256 << 20;

/// Rows of scores that a turn has at least, and whole multiples of.
const TURN_ROWS: usize = 32;

/// Most blocks of keys of a row, whose weights are added up in 64 bits.
const MAX_BLOCKS: usize = 1 << 29;

/// A prediction being planned.
#[derive(Clone, Copy)]
struct Planned {
    call: PredictCall,
    /// Tokens of blocks, of which none is longer than a sequence and one token.
    block_q: usize,
    block_k: usize,
    q_blocks: usize,
    k_blocks: usize,
    smooth: bool,
    similarity: Option<f32>,
    original_tails: bool,
    sink_k: [usize; 2],
    sink_q: [usize; 2],
    selection: Selection,
}

/// [`Select`] as the kernel takes it.
#[derive(Clone, Copy)]
struct Selection {
    choice: Choice,
    top_share: f32,
    top_count: usize,
    amount: f32,
}

impl PredictCall {
    /// A prediction for dense tensors without gaps, none of whose blocks are padded.
    pub fn new(problem: &Problem) -> Self {
        PredictCall {
            problem: *problem,
            lengths: Lengths::Dense,
            q_rows: problem.q_len,
            kv_rows: problem.kv_len,
            aligned: problem.head_dim.is_multiple_of(CHUNK),
            padded_keys: false,
        }
    }

    /// The launches that predict a map by `predictor`, which was checked with the call. Of hyper-parameters that heads
    /// have of their own, and of padded blocks, the kernels read the values that [`PredictTensors`] point to.
    ///
    /// # Errors
    /// When tensors are not of 16 bits, or blocks are without tokens or too many.
    pub fn pass(&self, predictor: &Predictor) -> Result<Pass<PredictTensors>> {
        let planned = self.planned(predictor)?;
        let heads = self.problem.batch * self.problem.num_q_heads;
        if heads * planned.q_blocks * planned.k_blocks == 0 {
            return Ok(Pass::empty());
        }
        let mut pass = PassBuilder::new();
        let mean = planned.smooth.then(|| planned.mean_of_keys(&mut pass));
        let keys = planned.pool(Side::Keys, mean, &mut pass);
        let queries = planned.pool(Side::Queries, None, &mut pass);
        planned.choose(queries, keys, &mut pass);
        Ok(pass.finish())
    }

    fn planned(&self, predictor: &Predictor) -> Result<Planned> {
        let Problem { dtype, q_len, kv_len, head_dim, .. } = self.problem;
        for (name, block) in [("block_q", predictor.block_q), ("block_k", predictor.block_k)] {
            if block == 0 {
                return Err(Error::value(name, block, "at least 1"));
            }
        }
        if head_dim > MAX_HEAD_DIM {
            let wanted = format!("1 to {MAX_HEAD_DIM} for predictions on a GPU");
            return Err(Error::value("head_dim", head_dim, wanted));
        }
        if dtype == DType::F32 {
            return Err(Error::unsupported("a prediction from f32 on a GPU", "use f16 or bf16"));
        }
        // A longer block has the same tokens; with one more than there are it is not whole, as before.
        let block = |block: usize, len: usize| block.min(len + 1);
        let (block_q, block_k) = (block(predictor.block_q, q_len), block(predictor.block_k, kv_len));
        let (q_blocks, k_blocks) = (q_len.div_ceil(block_q), kv_len.div_ceil(block_k));
        if k_blocks >= MAX_BLOCKS {
            let shape = predictor.shape(&self.problem);
            return Err(Error::shape("block_map", &shape, "fewer than 2²⁹ blocks of keys"));
        }
        let range = |blocks: &Range<usize>, all: usize| [blocks.start.min(all), blocks.end.min(all)];
        Ok(Planned {
            call: *self,
            block_q,
            block_k,
            q_blocks,
            k_blocks,
            smooth: predictor.smooth_k,
            similarity: predictor.similarity.as_ref().map(of_all),
            original_tails: predictor.original_tails,
            sink_k: range(&predictor.sink_k, k_blocks),
            sink_q: range(&predictor.sink_q, q_blocks),
            selection: Selection::of(&predictor.select)?,
        })
    }
}

impl Selection {
    fn of(select: &Select) -> Result<Self> {
        let of = |choice| Selection { choice, top_share: 0.0, top_count: 0, amount: 0.0 };
        Ok(match select {
            Select::TopK(share) => Selection { top_share: of_all(share), ..of(Choice::Top) },
            Select::Count(count) => Selection { top_count: *count, ..of(Choice::Top) },
            Select::Cdf(share) => Selection { amount: of_all(share), ..of(Choice::WithinShare) },
            Select::TopKTopP { k, p } => {
                Selection { top_share: of_all(k), amount: of_all(p), ..of(Choice::ReachingShare) }
            }
            Select::Sigmas(tau) => Selection { amount: of_all(tau), ..of(Choice::BeyondSigmas) },
            other => {
                let nearest = "choose by a share of blocks or of weight, a number, or standard deviations";
                return Err(Error::unsupported(format!("{other:?} on a GPU"), nearest));
            }
        })
    }
}

/// The number of all heads; any where each has its own, which kernels read from memory.
fn of_all(number: &PerHead) -> f32 {
    match number {
        PerHead::All(number) => *number,
        PerHead::Each(_) => 0.0,
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Side {
    Queries,
    Keys,
}

/// Where means and similarities of blocks lie.
#[derive(Clone, Copy)]
struct Pooled {
    means: Slot,
    similarities: Slot,
}

impl Planned {
    fn source(&self, side: Side) -> Source {
        let PredictCall { problem: Problem { dtype, head_dim, .. }, aligned, lengths, .. } = self.call;
        // Valid lengths are of keys alone.
        let lengths = match (side, lengths) {
            (Side::Queries, Lengths::KvLens) => Lengths::Dense,
            _ => lengths,
        };
        Source { dtype, head_dim, aligned, lengths, masked: false }
    }

    fn blocks(&self, side: Side) -> TokenBlocks {
        let tokens = if side == Side::Keys { self.block_k } else { self.block_q };
        TokenBlocks { source: self.source(side), tokens }
    }

    fn width(&self) -> usize {
        self.source(Side::Keys).padded_dim()
    }

    /// Which keys count.
    fn keys(&self, tensors: &PredictTensors) -> TokensArgs {
        let PredictCall { problem, q_rows, kv_rows, .. } = self.call;
        let keys = TokensArgs::of_keys(&problem, self.block_k, tensors.lengths);
        keys.rows(kv_rows, q_rows).sizes(tensors.k_sizes)
    }

    /// Which queries count.
    fn queries(&self, tensors: &PredictTensors) -> TokensArgs {
        let PredictCall { problem, q_rows, .. } = self.call;
        let queries = TokensArgs::of_queries(&problem, self.block_q, tensors.lengths);
        queries.rows(q_rows, q_rows).sizes(tensors.q_sizes)
    }

    /// Heads of Q, of a sequence and of all.
    fn q_heads(&self) -> [i32; 2] {
        let Problem { batch, num_q_heads, .. } = self.call.problem;
        [num_q_heads as i32, (batch * num_q_heads) as i32]
    }

    /// Adds the launches that average K, and the slot of its means.
    fn mean_of_keys(&self, pass: &mut PassBuilder<PredictTensors>) -> Slot {
        let planned = *self;
        let Problem { batch, num_kv_heads: heads, kv_len, .. } = self.call.problem;
        let width = self.width();
        let sums = pass.slot("k_sums", 4 * batch * heads * self.k_blocks * width);
        let means = pass.slot("k_mean", 4 * batch * heads * width);
        let sum = SumBlocksConfig { blocks: self.blocks(Side::Keys) };
        pass.launch(sum, move |at, launch| {
            let args = SumBlocksArgs {
                k: at.tensors.k,
                tokens: planned.keys(at.tensors),
                heads: heads as i32,
                all_heads: (batch * heads) as i32,
                sums: at.of(sums),
            };
            launch(sum.blocks.grid(kv_len, heads, batch), &args.args(), &[]);
        });
        let mean = MeanOfBlocksConfig { padded_dim: width, lengths: self.call.lengths };
        pass.launch(mean, move |at, launch| {
            let args = MeanOfBlocksArgs {
                sums: at.of(sums),
                blocks: planned.k_blocks as i32,
                tokens: planned.keys(at.tensors),
                heads: heads as i32,
                all_heads: (batch * heads) as i32,
                means: at.of(means),
            };
            launch(mean.grid(heads, batch), &args.args(), &[]);
        });
        means
    }

    /// Adds the launch that pools the blocks of Q or K.
    fn pool(&self, side: Side, mean: Option<Slot>, pass: &mut PassBuilder<PredictTensors>) -> Pooled {
        let planned = *self;
        let Problem { batch, num_q_heads, num_kv_heads, q_len, kv_len, .. } = self.call.problem;
        let (heads, rows, blocks, names) = match side {
            Side::Queries => (num_q_heads, q_len, self.q_blocks, ["q_block_means", "q_similarities"]),
            Side::Keys => (num_kv_heads, kv_len, self.k_blocks, ["k_block_means", "k_similarities"]),
        };
        let number = batch * heads * blocks;
        let similarity = self.similarity.is_some();
        let pooled = Pooled {
            means: pass.slot(names[0], 4 * number * self.width()),
            similarities: if similarity { pass.slot(names[1], 4 * number) } else { Slot::NONE },
        };
        let pool =
            PoolBlocksConfig { blocks: self.blocks(side), smooth: mean.is_some(), similarity, narrow: false };
        pass.launch(pool, move |at, launch| {
            let (x, tokens) = match side {
                Side::Queries => (at.tensors.q, planned.queries(at.tensors)),
                Side::Keys => (at.tensors.k, planned.keys(at.tensors)),
            };
            let args = PoolBlocksArgs {
                x,
                tokens,
                heads: heads as i32,
                all_heads: (batch * heads) as i32,
                subtracted: mean.map_or(0, |mean| at.of(mean)),
                means: at.of(pooled.means),
                similarities: at.of(pooled.similarities),
            };
            launch(pool.blocks.grid(rows, heads, batch), &args.args(), &[]);
        });
        pooled
    }

    /// Adds the launches that score blocks and choose among them, some rows of all heads at a time.
    fn choose(&self, queries: Pooled, keys: Pooled, pass: &mut PassBuilder<PredictTensors>) {
        let heads = self.call.problem.batch * self.call.problem.num_q_heads;
        // Threads store four scores at once.
        let stride = self.k_blocks.next_multiple_of(4);
        let most = SCORE_BYTES / (4 * heads * stride) / TURN_ROWS * TURN_ROWS;
        let rows = self.q_blocks.min(most.max(TURN_ROWS));
        let scores = pass.slot("scores", 4 * heads * rows * stride);
        for first in (0..self.q_blocks).step_by(rows) {
            let turn = Turn { first, rows: rows.min(self.q_blocks - first), stride, scores };
            self.score_turn(turn, queries, keys, pass);
            self.choose_turn(turn, queries, keys, pass);
        }
    }

    fn score_turn(&self, turn: Turn, queries: Pooled, keys: Pooled, pass: &mut PassBuilder<PredictTensors>) {
        let planned = *self;
        let score = ScoreBlocksConfig { padded_dim: self.width(), lengths: self.call.lengths };
        let [heads, all_heads] = self.q_heads();
        pass.launch(score, move |at, launch| {
            let args = ScoreBlocksArgs {
                q_means: at.of(queries.means),
                k_means: at.of(keys.means),
                q_blocks: planned.q_blocks as i32,
                k_blocks: planned.k_blocks as i32,
                block_q: planned.block_q as i32,
                keys: planned.keys(at.tensors),
                first: turn.first as i32,
                rows: turn.rows as i32,
                scale: default_sm_scale(planned.call.problem.head_dim),
                heads,
                all_heads,
                group: planned.call.problem.group_size() as i32,
                scores: at.of(turn.scores),
                stride: turn.stride as i32,
            };
            launch(score.grid(turn.rows, planned.k_blocks, all_heads as usize), &args.args(), &[]);
        });
    }

    fn choose_turn(&self, turn: Turn, queries: Pooled, keys: Pooled, pass: &mut PassBuilder<PredictTensors>) {
        let planned = *self;
        let [heads, all_heads] = self.q_heads();
        let choose = ChooseBlocksConfig {
            choice: self.selection.choice,
            similarity: self.similarity.is_some(),
            counts: self.call.padded_keys || (self.similarity.is_some() && self.original_tails),
            per_lane: ChooseBlocksConfig::per_lane(self.k_blocks),
            lengths: self.call.lengths,
        };
        let [sink_k, sink_q] = [self.sink_k, self.sink_q].map(|sink| sink.map(|block| block as i32));
        pass.launch(choose, move |at, launch| {
            let tensors = at.tensors;
            let selection = &planned.selection;
            let args = ChooseBlocksArgs {
                scores: at.of(turn.scores),
                stride: turn.stride as i32,
                q_similarities: at.of(queries.similarities),
                k_similarities: at.of(keys.similarities),
                threshold: PerHeadArg { each: tensors.similarity, all: planned.similarity.unwrap_or(0.0) },
                whole_only: i32::from(planned.original_tails),
                top_share: PerHeadArg { each: tensors.top_share, all: selection.top_share },
                top_count: selection.top_count.min(planned.k_blocks) as i32,
                amount: PerHeadArg { each: tensors.amount, all: selection.amount },
                q_blocks: planned.q_blocks as i32,
                k_blocks: planned.k_blocks as i32,
                block_q: planned.block_q as i32,
                q_sizes: tensors.q_sizes,
                keys: planned.keys(tensors),
                sink_k_start: sink_k[0],
                sink_k_end: sink_k[1],
                sink_q_start: sink_q[0],
                sink_q_end: sink_q[1],
                first: turn.first as i32,
                rows: turn.rows as i32,
                heads,
                all_heads,
                group: planned.call.problem.group_size() as i32,
                map: tensors.map,
            };
            launch(choose.grid(turn.rows, all_heads as usize), &args.args(), &[]);
        });
    }
}

/// Some rows of blocks of all heads, whose scores are in memory at once.
#[derive(Clone, Copy)]
struct Turn {
    first: usize,
    rows: usize,
    stride: usize,
    scores: Slot,
}
