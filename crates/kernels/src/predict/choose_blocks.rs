//! Rows of the map: the blocks of keys that each block of queries keeps.

use sage_ptx::{Code, Program, Val, kernel};

use super::row::{Columns, LANES, Row, Similar};
use super::selection::{Chosen, Survey};
use super::tokens::Tokens;
use super::weight::{NO_SCORE, score};
use crate::grid::{BlockHead, grid};
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::Lengths;

/// Rows of a block of threads, one a warp.
const WARPS: usize = 4;

/// Numbers of scores that a lane may hold in registers. With more, the kernel reads them again each time it counts.
const PER_LANE: [usize; 8] = [4, 8, 12, 16, 24, 32, 48, 64];

/// How a row chooses among its blocks: [`sage_core::sparse::Select`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Choice {
    /// A number of blocks, or a share of all if that is more.
    Top,
    /// As many as have together at most a share of all weight.
    WithinShare,
    /// As many as have together at least a share of all weight, or a share of all blocks if that is more.
    ReachingShare,
    /// Those that exceed the mean by so many standard deviations.
    BeyondSigmas,
}

/// Lets each block of queries choose its blocks of keys by their scores, and applies the rules of
/// [`sage_core::sparse::Predictor`]: a warp for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChooseBlocksConfig {
    /// How a row chooses.
    pub choice: Choice,
    /// Whether blocks that are not similar are kept and do not compete.
    pub similarity: bool,
    /// Whether keys of blocks are to be counted: where blocks are padded, or what is not whole is not similar.
    pub counts: bool,
    /// Scores that a lane holds in registers; none where they are too many.
    pub per_lane: Option<usize>,
    /// Where the lengths of sequences come from.
    pub lengths: Lengths,
}

kernel_params! {
    /// What a launch of [`ChooseBlocksConfig`] passes.
    ChooseBlocksParams, ChooseBlocksArgs {
        /// Scores of [`ScoreBlocksConfig`](super::ScoreBlocksConfig), `[sequences][heads][rows][stride]`.
        scores: [f32],
        /// Scores from one row to the next.
        stride: i32,
        /// Similarities of the blocks of Q, `[sequences][heads][q_blocks]`.
        q_similarities: [f32],
        /// Similarities of the blocks of K, `[sequences][heads / group][k_blocks]`.
        k_similarities: [f32],
        /// What a similarity must exceed.
        threshold: per_head,
        /// Whether a block with fewer tokens than others is not similar (1).
        whole_only: i32,
        /// Share of all blocks.
        top_share: per_head,
        /// Number of blocks.
        top_count: i32,
        /// Share of all weight, or standard deviations.
        amount: per_head,
        /// Blocks of queries.
        q_blocks: i32,
        /// Blocks of keys.
        k_blocks: i32,
        /// Queries of a block.
        block_q: i32,
        /// How many queries of each block count, `[q_blocks]`; 0 where all do.
        q_sizes: [i32],
        /// Which keys count.
        keys: tokens,
        /// First block of keys that every query attends to.
        sink_k_start: i32,
        /// One past the last.
        sink_k_end: i32,
        /// First block of queries that attends to every key.
        sink_q_start: i32,
        /// One past the last.
        sink_q_end: i32,
        /// First block of queries whose row is wanted.
        first: i32,
        /// Blocks of queries whose rows are wanted.
        rows: i32,
        /// Query heads of a sequence.
        heads: i32,
        /// Query heads of all sequences.
        all_heads: i32,
        /// Query heads that share a key head.
        group: i32,
        /// The map, bytes `[sequences][heads][q_blocks][k_blocks]`: 1 where a block is kept.
        map: [u8],
    }
}

impl ChooseBlocksConfig {
    /// How many of `k_blocks` scores a lane holds in registers; none where they are too many.
    pub fn per_lane(k_blocks: usize) -> Option<usize> {
        PER_LANE.into_iter().find(|per_lane| k_blocks <= per_lane * LANES as usize)
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        (WARPS as i32 * LANES) as u32
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, rows: usize, all_heads: usize) -> [u32; 3] {
        grid(rows.div_ceil(WARPS), all_heads)
    }

    fn write(&self, code: &Code) {
        let p = ChooseBlocksParams::declare(code);
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.all_heads);
        let [x, ..] = code.block_index();
        let wanted = (x * WARPS as i32 + code.warp_index()).named("row");
        code.exit_when(wanted.ge(p.rows));
        let q_block = (p.first + wanted).named("q_block");
        let number = (index * p.heads + head).named("head_number");
        let map = p.map.at((number.mul_wide(p.q_blocks) + q_block.widen()) * p.k_blocks.widen());
        let lane = code.lane_index();

        let keys = p.keys.of_sequence(self.lengths, index);
        let first_query = q_block * p.block_q;
        let seen = keys.seen_keys(first_query, p.block_q);
        let count = p.queries(&keys, q_block, first_query);
        code.note("a row that sees nothing, or has no queries");
        let empty = seen[0].ge(seen[1]) | count.le(0);
        code.when(empty, || {
            code.range_by(lane, p.k_blocks, LANES, |column| map.at(column).store(0u32));
        });
        code.exit_when(empty);

        let threshold = self.similarity.then(|| p.threshold.of(head));
        let similar = |similarities| Similar {
            similarities,
            threshold: threshold.unwrap_or(code.constant(0.0)),
            whole_only: p.whole_only,
        };
        let kv_number = index * (p.heads / p.group) + head / p.group;
        let of_k = p.k_similarities.at(kv_number.mul_wide(p.k_blocks));
        let row = Row {
            code,
            keys,
            seen: keys.blocks_of(seen),
            scores: p.scores.at((number.mul_wide(p.rows) + wanted.widen()) * p.stride.widen()),
            similar: self.similarity.then(|| similar(of_k)),
            counts: self.counts,
            sink: [p.sink_k_start, p.sink_k_end],
        };
        let columns = Columns::new(row, p.k_blocks, self.per_lane);
        let (competing, max, finite) = columns.survey();
        let mut ranks = finite & competing.gt(0) & !(q_block.ge(p.sink_q_start) & q_block.lt(p.sink_q_end));
        if self.similarity {
            let of_q = p.q_similarities.at(number.mul_wide(p.q_blocks));
            ranks = ranks & similar(of_q).holds(q_block, count.eq(p.block_q));
        }
        let chosen = Chosen::all(code);
        let columns =
            self.choose(&p, &row, columns, (Survey { code, count: competing, max }, ranks), head, &chosen);

        code.note("the row of the map");
        let ties = code.var(0i32).named("ties");
        let (above, level, most) = (chosen.above.get(), chosen.level.get(), chosen.ties.get());
        columns.each(|item| {
            let tie = item.image.ge(level) & item.image.lt(above);
            let votes = code.ballot(tie);
            let before = ties.get() + (votes & ((code.constant(1u32) << lane) - 1u32)).count_ones();
            let is_chosen = item.image.ge(above) | (tie & before.lt(most));
            let kept = (item.image.ne(NO_SCORE) & is_chosen) | columns.is_kept(&item);
            ties.set(ties.get() + votes.count_ones());
            code.when(item.index.lt(p.k_blocks), || map.at(item.index).store(kept.select(1u32, 0u32)));
        });
    }

    /// Sets what is chosen where blocks are ranked; all that compete are chosen before.
    fn choose<'k>(
        &self,
        p: &ChooseBlocksParams<'k>,
        row: &Row<'k>,
        mut columns: Columns<'k>,
        (survey, ranks): (Survey<'k>, Val<'k, bool>),
        head: Val<'k, i32>,
        chosen: &Chosen<'k>,
    ) -> Columns<'k> {
        if matches!(self.choice, Choice::WithinShare | Choice::ReachingShare) {
            columns.weigh(score(survey.max));
        }
        let blocks = row.keys.blocks();
        let top = || p.top_count.max((p.top_share.of(head) * blocks.to_f32()).truncate_to_i32());
        survey.code.when(ranks, || match self.choice {
            Choice::Top => survey.top(&columns, top(), chosen),
            Choice::WithinShare => survey.within_share(&columns, p.amount.of(head), chosen),
            Choice::ReachingShare => survey.reaching_share(&columns, p.amount.of(head), top(), chosen),
            Choice::BeyondSigmas => survey.beyond_sigmas(row, &columns, blocks, p.amount.of(head), chosen),
        });
        columns
    }
}

impl<'k> ChooseBlocksParams<'k> {
    /// How many queries of a block, which begins with `first`, count.
    #[track_caller]
    fn queries(&self, keys: &Tokens<'k>, q_block: Val<'k, i32>, first: Val<'k, i32>) -> Val<'k, i32> {
        let code = first.code();
        let count = code.var((keys.queries() - first).min(self.block_q));
        code.when(self.q_sizes.address().ne(0u64), || {
            count.set(count.get().min(self.q_sizes.at(q_block).load()));
        });
        count.get()
    }
}

impl Choice {
    /// Part of a kernel's name.
    const fn name(self) -> &'static str {
        match self {
            Choice::Top => "top",
            Choice::WithinShare => "within_share",
            Choice::ReachingShare => "reaching_share",
            Choice::BeyondSigmas => "beyond_sigmas",
        }
    }

    const fn description(self) -> &'static str {
        match self {
            Choice::Top => "the highest scores",
            Choice::WithinShare => "the highest scores within a share of all weight",
            Choice::ReachingShare => "the highest scores that reach a share of all weight",
            Choice::BeyondSigmas => "scores so many standard deviations above the mean",
        }
    }
}

impl Kernel for ChooseBlocksConfig {
    fn name(&self) -> String {
        let similarity = if self.similarity { "_similarity" } else { "" };
        let counts = if self.counts { "_counts" } else { "" };
        let per_lane = self.per_lane.map_or(String::new(), |per_lane| format!("_{per_lane}"));
        format!("choose_blocks_{}{similarity}{counts}{per_lane}{}", self.choice.name(), self.lengths.suffix())
    }

    fn description(&self) -> String {
        let similarity = if self.similarity { ", and those that are not similar" } else { "" };
        let counts = if self.counts { ", by the keys that count" } else { "" };
        let held = match self.per_lane {
            Some(per_lane) => format!(", of at most {} blocks", per_lane * LANES as usize),
            None => String::new(),
        };
        let (choice, lengths) = (self.choice.description(), self.lengths.description());
        format!("blocks of keys of each block of queries: {choice}{similarity}{counts}{held}{lengths}")
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
