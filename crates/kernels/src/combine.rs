//! Merges the outputs of parts of the keys (flash decoding): `O = Σ wₛ Oₛ / Σ wₛ` with `wₛ = ℓₛ · 2^(mₛ − max m)`,
//! where a part's exponentials are relative to `2^mₛ` and sum to `ℓₛ`.

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, Global, Half, Program, Shared, Stored, Val, Var, kernel};

use crate::kernel::Kernel;
use crate::least_bias::least_lse;
use crate::params::kernel_params;
use crate::sinks::{SinkParams, inverse_with_sink, sum_with_sink};

/// Floats that a part of the keys hands over for each row, beside its output.
pub const PART: usize = 4;

/// Warps of a block.
const WARPS: usize = 4;

/// Lanes of a warp.
const LANES: usize = 32;

/// Parts whose lines are on their way from memory at once, by a warp.
const TOGETHER: usize = 8;

/// Merges the parts of split keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CombineConfig {
    /// Element type of the output: f16 or bf16.
    pub dtype: DType,
    /// Channels of a head.
    pub head_dim: usize,
    /// Whether the log-sum-exp is written.
    pub lse: bool,
    /// Whether the warps of a block share the parts of one row, and do not have rows of their own: where parts are many,
    /// rows are few, and what counts is how long one takes.
    pub shares_rows: bool,
    /// Whether rows have attention sinks, which come in here.
    pub sinks: bool,
}

kernel_params! {
    /// What a launch of [`CombineConfig`] passes. Strides are in elements.
    CombineParams, CombineArgs {
        /// Outputs of the parts, `[splits, rows, head_dim]`.
        partial: [f32],
        /// For each part and row, `[splits, rows, `[`PART`]`]`: the base-2 score that exponentials are relative to;
        /// their sum as they were multiplied with V, 0 where the row sees no key of the part; where the log-sum-exp is
        /// wanted their sum before they were rounded, and what smoothing K took from the row's scores in natural units.
        partial_sums: [f32],
        /// Output.
        out: (tensor 3),
        /// Log-sum-exp, `[rows]`.
        lse: [f32],
        /// Rows of all heads and batch entries.
        total_rows: i32,
        /// Rows of a head.
        q_rows: i32,
        /// Query heads.
        q_heads: i32,
        /// Parts of the keys.
        splits: i32,
        /// Attention sinks.
        sinks: sinks,
    }
}

impl CombineConfig {
    /// For so many parts of the keys, without attention sinks.
    pub fn new(dtype: DType, head_dim: usize, lse: bool, splits: usize) -> Self {
        CombineConfig { dtype, head_dim, lse, shares_rows: splits > TOGETHER, sinks: false }
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, total_rows: usize) -> [u32; 3] {
        [total_rows.div_ceil(WARPS / self.warps_of_row()) as u32, 1, 1]
    }

    fn warps_of_row(&self) -> usize {
        if self.shares_rows { WARPS } else { 1 }
    }

    fn write<'k, H: Half + Stored<Value = H>>(&self, k: &'k Code) {
        let mut p = CombineParams::declare(k);
        p.sinks = self.sinks.then(|| SinkParams::declare(k));
        let [block, ..] = k.block_index();
        let row = if self.shares_rows { block } else { block * WARPS as i32 + k.warp_index() };
        k.exit_when(row.ge(p.total_rows));
        let (head, row_of_head) = (row / p.q_rows, row % p.q_rows);
        let line = (head / p.q_heads).widen() * p.out.batch_stride()
            + (head % p.q_heads).widen() * p.out.head_stride()
            + row_of_head.widen() * p.out.row_stride();
        let store = |channel: Val<'k, i32>, value: Val<'k, f32>| {
            p.out.start.cast::<H>().at(line).at(channel).store(value.narrow::<H>());
        };
        let sink_of = |totals: &Totals<'k>| {
            p.sinks.map(|sinks| sinks.of_row(head % p.q_heads, row_of_head, totals.taken))
        };
        let sums = self.sums(k, &p, row);
        let (totals, sink, writer) = if self.shares_rows {
            let shares = Shares::new(k, self.head_dim);
            self.for_each_channel(k, |index, channel| shares.hand_in(channel, sums.channels[index].get()));
            k.when(k.lane_index().eq(0), || shares.hand_in_totals(&sums.totals));
            k.barrier();
            let (totals, rises) = shares.totals();
            let sink = sink_of(&totals);
            let inverse = totals.inverse(sink);
            k.range_by(k.thread(), self.head_dim as i32, (WARPS * LANES) as i32, |channel| {
                store(channel, shares.sum(channel, &rises) * inverse);
            });
            (totals, sink, k.thread())
        } else {
            let sink = sink_of(&sums.totals);
            let inverse = sums.totals.inverse(sink);
            self.for_each_channel(k, |index, channel| store(channel, sums.channels[index].get() * inverse));
            (sums.totals, sink, k.lane_index())
        };
        if self.lse {
            k.when(writer.eq(0), || p.lse.at(row).store(totals.log_sum_exp(sink)));
        }
    }

    /// The warp's share of a row's parts, which groups that are on their way from memory together are dealt out in.
    fn sums<'k>(&self, k: &'k Code, p: &CombineParams<'k>, row: Val<'k, i32>) -> Sums<'k> {
        let line = |split: Val<'k, i32>| split.mul_wide(p.total_rows) + row.widen();
        let part = |split: Val<'k, i32>| p.partial_sums.at(line(split) * PART as i64).load_vector::<PART>();
        let round = (TOGETHER * self.warps_of_row()) as i32;
        let first = if self.shares_rows { k.warp_index() * TOGETHER as i32 } else { k.constant(0) };
        let (group, of_group) = k.lane_index().split_index(TOGETHER);

        // Each lane looks at parts of its own.
        let max = k.var(f32::NEG_INFINITY).named("max");
        let groups = (LANES / TOGETHER) as i32;
        k.range_by(first + group * round + of_group, p.splits, groups * round, |split| {
            let [reference, divisor, ..] = part(split);
            max.set(divisor.eq(0.0).select(max.get(), max.get().max(reference)));
        });
        let max = max.get().reduce_lanes(LANES as i32 - 1, |a, b| a.max(b));

        let channels: Vec<_> = (0..self.channels_of_lane()).map(|_| k.var(0.0)).collect();
        let [weights, unrounded, taken] =
            ["weights", "unrounded", "taken"].map(|name| k.var(0.0).named(name));
        k.range_by(first, p.splits, round, |first| {
            // The last part stands in for those beyond it, whose weight is 0.
            let last = p.splits - 1;
            let lines: Vec<_> = (0..TOGETHER as i32)
                .map(|i| p.partial.at(line((first + i).min(last)) * self.head_dim as i64))
                .collect();
            let own = first + of_group;
            let [reference, divisor, sum, of_part] = part(own.min(last));
            let counts = own.le(last) & divisor.ne(0.0);
            let rise = counts.select((reference - max).exp2(), 0.0);
            let weight = divisor * rise;
            weights.set(weights.get() + weight);
            unrounded.set(sum.mul_add(rise, unrounded.get()));
            taken.set(of_part);
            let of_lines: Vec<_> = (0..TOGETHER as i32).map(|i| weight.shuffle(i)).collect();
            self.for_each_chunk(k, |chunk, channel| {
                let loaded: Vec<_> = lines.iter().map(|line| self.load_chunk(line.at(channel))).collect();
                for (values, &weight) in loaded.iter().zip(&of_lines) {
                    let sums = &channels[chunk * self.width()..];
                    for (&value, sum) in values.iter().zip(sums) {
                        sum.set(value.mul_add(weight, sum.get()));
                    }
                }
            });
        });
        // The lanes of all groups have the same.
        let [weights, unrounded] =
            [weights, unrounded].map(|sum| sum.get().reduce_lanes(TOGETHER as i32 - 1, |a, b| a + b));
        Sums { channels, totals: Totals { max, weights, unrounded, taken: taken.get() } }
    }

    /// Neighbouring channels that a lane loads at once: a chunk.
    fn width(&self) -> usize {
        if self.head_dim.is_multiple_of(4) { 4 } else { 1 }
    }

    fn channels_of_lane(&self) -> usize {
        self.head_dim.div_ceil(LANES * self.width()) * self.width()
    }

    fn load_chunk<'k>(&self, from: Global<'k, f32>) -> Vec<Val<'k, f32>> {
        match self.width() {
            4 => from.load_vector::<4>().to_vec(),
            _ => vec![from.load()],
        }
    }

    /// Calls `visit` with the index of each of the lane's chunks, and its first channel.
    fn for_each_chunk<'k>(&self, k: &'k Code, visit: impl Fn(usize, Val<'k, i32>)) {
        for chunk in 0..self.channels_of_lane() / self.width() {
            let channel = (k.lane_index() + (LANES * chunk) as i32) * self.width() as i32;
            k.when(channel.lt(self.head_dim as i32), || visit(chunk, channel));
        }
    }

    /// Calls `visit` with the index of each of the lane's channels, and which one it is.
    fn for_each_channel<'k>(&self, k: &'k Code, visit: impl Fn(usize, Val<'k, i32>)) {
        self.for_each_chunk(k, |chunk, first| {
            (0..self.width()).for_each(|i| visit(chunk * self.width() + i, first + i as i32));
        });
    }
}

/// Sums of some parts of a row.
struct Sums<'k> {
    /// Of the lane's channels.
    channels: Vec<Var<'k, f32>>,
    totals: Totals<'k>,
}

/// What the sums of channels are divided by, and the log-sum-exp is made of.
#[derive(Clone, Copy)]
struct Totals<'k> {
    /// What all of them are relative to.
    max: Val<'k, f32>,
    weights: Val<'k, f32>,
    unrounded: Val<'k, f32>,
    /// What smoothing has taken from the row's scores, of all parts alike.
    taken: Val<'k, f32>,
}

impl<'k> Totals<'k> {
    /// Whether the row has no part that sums to anything: it sees no key.
    fn is_empty(&self) -> Val<'k, bool> {
        self.max.eq(f32::NEG_INFINITY)
    }

    fn inverse(&self, sink: Option<Val<'k, f32>>) -> Val<'k, f32> {
        match sink {
            None => self.is_empty().select(0.0, self.weights.recip()),
            Some(sink) => inverse_with_sink(sink, self.max, self.weights),
        }
    }

    fn log_sum_exp(&self, sink: Option<Val<'k, f32>>) -> Val<'k, f32> {
        if let Some(sink) = sink {
            // Of a row without keys it is the sink.
            let (sum, reference) = sum_with_sink(sink, self.max, self.unrounded);
            let lse = (sum.log2() + reference).mul_add(std::f32::consts::LN_2, self.taken);
            return least_lse(reference, lse);
        }
        let lse = (self.unrounded.log2() + self.max).mul_add(std::f32::consts::LN_2, self.taken);
        self.is_empty().select(f32::NEG_INFINITY, least_lse(self.max, lse))
    }
}

/// The shares of a row's warps in shared memory: the channels' sums of each, then totals.
struct Shares<'k> {
    sums: Shared<'k, f32>,
    totals: Shared<'k, f32>,
    head_dim: i32,
    warp: Val<'k, i32>,
}

impl<'k> Shares<'k> {
    fn new(k: &'k Code, head_dim: usize) -> Self {
        Shares {
            sums: k.shared("sums", WARPS * head_dim),
            totals: k.shared("totals", WARPS * 4),
            head_dim: head_dim as i32,
            warp: k.warp_index(),
        }
    }

    fn hand_in(&self, channel: Val<'k, i32>, sum: Val<'k, f32>) {
        self.sums.at(self.warp * self.head_dim + channel).store(sum);
    }

    fn hand_in_totals(&self, totals: &Totals<'k>) {
        let Totals { max, weights, unrounded, taken } = *totals;
        self.totals.at(self.warp * 4).store_vector([max, weights, unrounded, taken]);
    }

    /// The totals of the row, and what each warp's sums are multiplied by.
    fn totals(&self) -> (Totals<'k>, Vec<Val<'k, f32>>) {
        let of_warps: Vec<[_; 4]> =
            (0..WARPS as i32).map(|warp| self.totals.plus(4 * warp).load_vector()).collect();
        let max = of_warps.iter().map(|&[max, ..]| max).reduce(|a, b| a.max(b)).expect("a block has warps");
        // A warp that sees no key has nothing, and of a row that sees none nothing is kept.
        let rise = |&[own, weights, ..]: &[Val<'k, f32>; 4]| weights.eq(0.0).select(0.0, (own - max).exp2());
        let rises: Vec<_> = of_warps.iter().map(rise).collect();
        let sum = |index: usize| {
            let shares = of_warps.iter().zip(&rises).map(|(warp, &rise)| warp[index] * rise);
            shares.reduce(|a, b| a + b).expect("a block has warps")
        };
        // The first warp always has parts.
        let totals = Totals { max, weights: sum(1), unrounded: sum(2), taken: of_warps[0][3] };
        (totals, rises)
    }

    fn sum(&self, channel: Val<'k, i32>, rises: &[Val<'k, f32>]) -> Val<'k, f32> {
        let share =
            |(warp, &rise): (usize, _)| self.sums.at(channel + warp as i32 * self.head_dim).load() * rise;
        rises.iter().enumerate().map(share).reduce(|a, b| a + b).expect("a block has warps")
    }
}

impl Kernel for CombineConfig {
    fn name(&self) -> String {
        let lse = if self.lse { "_lse" } else { "" };
        let shares = if self.shares_rows { "_shared" } else { "" };
        let sinks = if self.sinks { "_sinks" } else { "" };
        format!("combine_{}_d{}{sinks}{lse}{shares}", self.dtype, self.head_dim)
    }

    fn description(&self) -> String {
        let lse = if self.lse { ", with LSE" } else { "" };
        let parts = if self.shares_rows { "many parts" } else { "parts" };
        let sinks = if self.sinks { ", sinks" } else { "" };
        format!("merges {parts} of split keys; {}, head_dim {}{sinks}{lse}", self.dtype, self.head_dim)
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), (WARPS * LANES) as u32, |k| match self.dtype {
            DType::BF16 => self.write::<bf16>(k),
            _ => self.write::<f16>(k),
        })
    }
}
