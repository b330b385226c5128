//! Statistics of the columns of a head: each block contributes its rows', and the last block to arrive combines them.
//! [`super::ahead`] says which blocks.
//!
//! Contributions are combined in the order of the rows, whichever block is last, so that results have the same bits in
//! every run.

use sage_core::oracle::LARGEST_FACTOR;
use sage_ptx::{Code, Global, Shared, Val, Var};

use super::ahead::Work;
use super::tile_load::{CHUNK, Head, ROWS, RowOrder, Rows};
use crate::sequence::KEY_TILE;

/// Contributions that a thread of the last block has in flight.
const IN_FLIGHT: i32 = 8;

/// Threads of the last block that share four columns.
const SLICES: i32 = 4;

/// What the columns of a head are reduced to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ColumnStatistics {
    /// Means.
    Mean,
    /// Scales of E4M3 channels.
    Scale,
    /// Means, and scales of the channels minus their means.
    MeanAndScale,
}

impl ColumnStatistics {
    /// What is collected.
    pub(super) const fn parts(self) -> &'static [Part] {
        match self {
            ColumnStatistics::Mean => &[Part::Sum],
            ColumnStatistics::Scale => &[Part::Magnitude],
            ColumnStatistics::MeanAndScale => &[Part::Sum, Part::Least, Part::Largest],
        }
    }

    /// Floats of a contribution for each column of the padded head.
    pub const fn partials(self) -> usize {
        self.parts().len()
    }
}

/// Something collected of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Sum,
    Least,
    Largest,
    /// The largest magnitude; NaN where a value is.
    Magnitude,
}

impl Part {
    /// The part of no rows.
    const fn identity(self) -> f32 {
        match self {
            Part::Sum | Part::Magnitude => 0.0,
            Part::Least => f32::INFINITY,
            Part::Largest => f32::NEG_INFINITY,
        }
    }

    #[track_caller]
    fn combine<'k>(self, a: Val<'k, f32>, b: Val<'k, f32>) -> Val<'k, f32> {
        match self {
            Part::Sum => a + b,
            // A NaN that these drop is in the sum.
            Part::Least => a.min(b),
            Part::Largest => a.max(b),
            Part::Magnitude => a.max_nan(b),
        }
    }

    /// Pairs, pairs of pairs, and so on: a sum's error grows with the depth of the tree, not with its leaves.
    #[track_caller]
    fn tree<'k>(self, values: &[Val<'k, f32>]) -> Val<'k, f32> {
        match values {
            [one] => *one,
            many => {
                let (low, high) = many.split_at(many.len() / 2);
                self.combine(self.tree(low), self.tree(high))
            }
        }
    }

    /// The part of the thread's rows, for each of its channels.
    #[track_caller]
    pub fn of_rows<'k>(self, rows: &Rows<'k>) -> [Val<'k, f32>; CHUNK] {
        let extremes = |largest, zeros| rows.source.widen_chunk(rows.extremes(largest, zeros));
        match self {
            Part::Sum => std::array::from_fn(|channel| self.tree(&rows.column(channel))),
            Part::Least => extremes(false, false),
            Part::Largest => extremes(true, false),
            Part::Magnitude => {
                let (least, largest) = (extremes(false, true), extremes(true, true));
                std::array::from_fn(|channel| largest[channel].abs().max_nan(least[channel].abs()))
            }
        }
    }
}

/// Something collected over many steps: sums keep what each addition rounds away (Knuth's two-sum).
#[derive(Clone, Copy, Debug)]
pub(super) struct Collector<'k> {
    part: Part,
    value: Var<'k, f32>,
    rounded: Option<Var<'k, f32>>,
}

impl<'k> Collector<'k> {
    pub fn new(code: &'k Code, part: Part) -> Self {
        let rounded = (part == Part::Sum).then(|| code.var(0.0));
        Collector { part, value: code.var(part.identity()), rounded }
    }

    #[track_caller]
    pub fn add(&self, x: Val<'k, f32>) {
        let before = self.value.get();
        let after = self.part.combine(before, x);
        if let Some(rounded) = self.rounded {
            let of_x = after - before;
            let lost = (before - (after - of_x)) + (x - of_x);
            rounded.set(rounded.get() + lost);
        }
        self.value.set(after);
    }

    #[track_caller]
    pub fn get(&self) -> Val<'k, f32> {
        match self.rounded {
            Some(rounded) => self.value.get() + rounded.get(),
            None => self.value.get(),
        }
    }
}

/// Collects parts of the tiles `start..end` of a head: for each part, the thread's channels of its rows.
#[track_caller]
pub(super) fn of_tiles<'k>(
    head: &Head<'k>,
    parts: &[Part],
    start: Val<'k, i32>,
    end: Val<'k, i32>,
) -> Vec<[Val<'k, f32>; CHUNK]> {
    let collectors: Vec<[Collector<'k>; CHUNK]> =
        parts.iter().map(|&part| [(); CHUNK].map(|()| Collector::new(head.code, part))).collect();
    head.code.range(start, end, |tile| {
        let rows = head.load(tile, RowOrder::Modulo8);
        for (&part, collectors) in parts.iter().zip(&collectors) {
            collectors.iter().zip(part.of_rows(&rows)).for_each(|(collector, x)| collector.add(x));
        }
    });
    collectors.iter().map(|collectors| collectors.map(|collector| collector.get())).collect()
}

/// Combines what the eight threads of each chunk hold: the result of column `thread`.
#[track_caller]
pub(super) fn across_block<'k>(head: &Head<'k>, part: Part, values: [Val<'k, f32>; CHUNK]) -> Val<'k, f32> {
    let width = head.source.padded_dim() as i32;
    let shared = head.code.shared::<f32>("columns", ROWS * width as usize);
    let own = shared.at(head.part * width + head.chunk * CHUNK as i32);
    let [a, b, c, d, e, f, g, h] = values;
    own.store_vector([a, b, c, d]);
    own.plus(4).store_vector([e, f, g, h]);
    head.code.barrier();
    let column = shared.at(head.thread);
    let parts: Vec<_> = (0..ROWS as i32).map(|part| column.plus(part * width).load()).collect();
    part.tree(&parts)
}

/// Where the blocks of a head leave their contributions, which the last one to arrive adds up.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastBlock<'k> {
    /// Contributions of the head's blocks, `[blocks][parts][padded_dim]`.
    partials: Global<'k, f32>,
    /// Counts the blocks that have contributed, and one more when their statistics are written.
    arrivals: Global<'k, u32>,
    /// Blocks that contribute: one for each tile.
    blocks: Val<'k, i32>,
    /// The block's index among them.
    block: Val<'k, i32>,
}

impl<'k> LastBlock<'k> {
    /// For the blocks of a head whose first tile of the workspace is `first_tile`; this one's tile is `tile`.
    /// `partials` are `[kv_heads][key_tiles][parts][padded_dim]`, `arrivals` are `[sequences][kv_heads]`.
    #[track_caller]
    pub fn new(
        head: &Head<'k>,
        statistics: ColumnStatistics,
        first_tile: Val<'k, i32>,
        tile: Val<'k, i32>,
        work: &Work<'k>,
        partials: Global<'k, f32>,
        arrivals: Global<'k, u32>,
    ) -> Self {
        let of_tile = i64::from((statistics.partials() * head.source.padded_dim()) as i32);
        LastBlock {
            partials: partials.at(first_tile.widen() * of_tile),
            arrivals: arrivals.at(head.index),
            blocks: work.collected_tiles(head),
            block: tile,
        }
    }

    /// Contributes the value of column `thread` of each part. The last block then calls `finish` with the totals of
    /// column `thread`, all of its threads together.
    #[track_caller]
    pub fn arrive(
        &self,
        head: &Head<'k>,
        parts: &[Part],
        values: &[Val<'k, f32>],
        finish: impl FnOnce(&[Val<'k, f32>]),
    ) {
        let code = head.code;
        let width = head.source.padded_dim() as i32;
        code.note("contribute");
        let own =
            self.partials.at((self.block * parts.len() as i32).widen() * i64::from(width)).at(head.thread);
        for (i, &value) in values.iter().enumerate() {
            own.plus(i as i32 * width).store(value);
        }
        // The barrier orders all threads' contributions before the arrival, which releases them to the device.
        let arrived = code.shared::<u32>("arrived", 1);
        code.barrier();
        code.when(head.thread.eq(0), || {
            arrived.store(self.arrivals.atomic(sage_ptx::isa::AtomicOp::Add, 1u32));
        });
        code.barrier();
        let last = arrived.load().reinterpret::<i32>().eq(self.blocks - 1).named("last");
        code.when(last, || {
            code.note("the last block combines all contributions");
            let totals: Vec<_> =
                parts.iter().enumerate().map(|(i, &part)| self.total(head, part, i, parts.len())).collect();
            finish(&totals);
            code.barrier();
            code.when(head.thread.eq(0), || self.arrivals.store_release(self.ready()));
        });
    }

    /// What the counter holds once the statistics are written.
    fn ready(&self) -> Val<'k, u32> {
        (self.blocks + 1).reinterpret()
    }

    /// Waits until the head's statistics are written: hardly ever, see [`super::ahead`].
    #[track_caller]
    pub fn wait(&self, head: &Head<'k>) {
        let code = head.code;
        code.note("wait for the statistics");
        code.when(head.thread.eq(0), || {
            code.while_loop(|| self.arrivals.load_acquire().ne(self.ready()), || code.sleep(40));
        });
        code.barrier();
    }

    /// Combines part `index` of `count` of all contributions, for column `thread`.
    #[track_caller]
    fn total(&self, head: &Head<'k>, part: Part, index: usize, count: usize) -> Val<'k, f32> {
        let (code, width) = (head.code, head.source.padded_dim() as i32);
        let quads = width / 4;
        let quad = head.thread & (quads - 1);
        let slice = head.thread >> quads.ilog2() as i32;
        let columns = self.partials.plus(index as i32 * width).at(quad * 4);
        let collectors: [Collector<'k>; 4] = std::array::from_fn(|_| Collector::new(code, part));
        code.range_by(slice, self.blocks, SLICES * IN_FLIGHT, |first| {
            let contributions: Vec<[Val<'k, f32>; 4]> = (0..IN_FLIGHT)
                .map(|i| {
                    let block = first + i * SLICES;
                    let at = block.min(self.blocks - 1) * count as i32;
                    let values = columns.at(at.widen() * i64::from(width)).load_vector();
                    let valid = block.lt(self.blocks);
                    values.map(|value: Val<'k, f32>| valid.select(value, part.identity()))
                })
                .collect();
            for (column, collector) in collectors.iter().enumerate() {
                let column: Vec<_> = contributions.iter().map(|values| values[column]).collect();
                collector.add(part.tree(&column));
            }
        });
        let slices: Shared<'k, f32> = code.shared("slices", (SLICES * width) as usize);
        slices.at(slice * width + quad * 4).store_vector(collectors.map(|collector| collector.get()));
        code.barrier();
        let column = slices.at(head.thread);
        let parts: Vec<_> = (0..SLICES).map(|slice| column.plus(slice * width).load()).collect();
        part.tree(&parts)
    }
}

/// Where the statistics of all heads are written, `[sequences][heads][padded_dim]` each.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outputs<'k> {
    pub mean: Global<'k, f32>,
    pub scale: Global<'k, f32>,
    /// What values are multiplied by before they become E4M3: 0 where the scale is 0 or NaN.
    pub factor: Global<'k, f32>,
    /// The largest magnitude that E4M3 values shall have.
    pub v_max: Val<'k, f32>,
}

impl<'k> Outputs<'k> {
    /// Contributes tile `tile` to the head's statistics, and writes them where this is its last contribution. The first
    /// block of a head without rows writes zeros.
    #[track_caller]
    pub fn collect(
        &self,
        head: &Head<'k>,
        tile: Val<'k, i32>,
        statistics: ColumnStatistics,
        order: RowOrder,
        last_block: &LastBlock<'k>,
    ) {
        let code = head.code;
        code.when(tile.eq(0) & head.len().le(0), || self.write_empty(head, statistics));
        code.exit_when((tile * KEY_TILE as i32).ge(head.len()));
        let rows = head.load(tile, order).only_counted();
        let parts = statistics.parts();
        let columns: Vec<_> =
            parts.iter().map(|&part| across_block(head, part, part.of_rows(&rows))).collect();
        last_block.arrive(head, parts, &columns, |totals| {
            self.write(head, statistics, totals, head.counted_len());
        });
    }

    /// Writes the statistics of column `thread` from what was collected of its `rows` rows.
    #[track_caller]
    pub fn write(
        &self,
        head: &Head<'k>,
        statistics: ColumnStatistics,
        totals: &[Val<'k, f32>],
        rows: Val<'k, i32>,
    ) {
        let column = head.index.widen() * i64::from(head.source.padded_dim() as i32) + head.thread.widen();
        let mean = || {
            let mean = totals[0] / rows.max(1).to_f32();
            self.mean.at(column).store(mean);
            mean
        };
        let magnitude = match statistics {
            ColumnStatistics::Mean => {
                mean();
                return;
            }
            ColumnStatistics::Scale => totals[0],
            ColumnStatistics::MeanAndScale => {
                let mean = mean();
                // Rounding is monotonic: the largest rounded difference is that of the largest or least value.
                let largest = (totals[2] - mean).abs().max_nan((mean - totals[1]).abs());
                rows.gt(0).select(largest, 0.0)
            }
        };
        let factor = (self.v_max / magnitude).min(LARGEST_FACTOR);
        let bad = magnitude.reinterpret::<i32>().ge(f32::INFINITY.to_bits() as i32);
        let good = magnitude.ne(0.0) & !bad;
        let scale = factor.eq(LARGEST_FACTOR).select(1.0 / LARGEST_FACTOR, magnitude / self.v_max);
        let scale = good.select(scale, 0.0);
        self.scale.at(column).store(bad.select(f32::NAN, scale));
        self.factor.at(column).store(good.select(factor, 0.0));
    }

    /// Writes the statistics of a head without rows: zeros.
    #[track_caller]
    pub fn write_empty(&self, head: &Head<'k>, statistics: ColumnStatistics) {
        let column = head.index.widen() * i64::from(head.source.padded_dim() as i32) + head.thread.widen();
        let (means, scales): (&[_], &[_]) = match statistics {
            ColumnStatistics::Mean => (&[self.mean], &[]),
            ColumnStatistics::Scale => (&[], &[self.scale, self.factor]),
            ColumnStatistics::MeanAndScale => (&[self.mean], &[self.scale, self.factor]),
        };
        means.iter().chain(scales).for_each(|array| array.at(column).store(0.0));
    }
}
