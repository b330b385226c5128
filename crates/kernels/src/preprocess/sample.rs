//! Statistics of a few rows of K or V.

use sage_ptx::{Code, Program, kernel};

use super::statistics::{Collector, ColumnStatistics, Outputs, across_block};
use super::tile_load::{CHUNK, Head, Source};
use crate::counters::clear_counters;
use crate::grid::grid;
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Reduces rows that lie evenly in each sequence, for [`SmoothK::Sampled`](sage_core::SmoothK) and
/// [`ScaleRows::Sampled`](sage_core::ScaleRows): a block for each head of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleConfig {
    /// K or V as given.
    pub source: Source,
    /// Rows that are reduced, of those that count; all where there are no more.
    pub rows: usize,
    /// What of them: means or scales.
    pub statistics: ColumnStatistics,
}

kernel_params! {
    /// What a launch of [`SampleConfig`] passes. Strides are in elements.
    SampleParams, SampleArgs {
        /// K or V as given.
        input: input,
        /// Means, `[sequences][kv_heads][padded_dim]`; zeros of a sequence without rows.
        mean: [f32],
        /// Scales, likewise.
        scale: [f32],
        /// What channels are multiplied by, likewise.
        factor: [f32],
        /// Largest magnitude of a sampled value once quantised.
        v_max: f32,
        /// Counters of the launches that follow, which the first block sets to zero.
        counters: [u32],
        /// How many.
        counter_count: i32,
    }
}

impl SampleConfig {
    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.source.threads()
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, kv_heads: usize, sequences: usize) -> [u32; 3] {
        grid(1, kv_heads * sequences)
    }

    fn write(&self, code: &Code) {
        self.source.bound_registers(code, 512);
        let p = SampleParams::declare(code);
        let head = Head::new(code, &self.source, &p.input);
        clear_counters(code, p.counters, p.counter_count, self.threads());
        let parts = self.statistics.parts();
        let collectors: Vec<_> =
            parts.iter().map(|&part| [(); CHUNK].map(|()| Collector::new(code, part))).collect();
        for first in (0..self.rows).step_by(KEY_TILE) {
            let rows = head.load_sample(first, self.rows);
            for (part, collectors) in parts.iter().zip(&collectors) {
                collectors.iter().zip(part.of_rows(&rows)).for_each(|(collector, x)| collector.add(x));
            }
        }
        let totals: Vec<_> = parts
            .iter()
            .zip(collectors)
            .map(|(&part, collectors)| across_block(&head, part, collectors.map(|collector| collector.get())))
            .collect();
        let outputs = Outputs { mean: p.mean, scale: p.scale, factor: p.factor, v_max: p.v_max };
        outputs.write(&head, self.statistics, &totals, head.counted_len().min(self.rows as i32));
    }
}

impl Kernel for SampleConfig {
    fn name(&self) -> String {
        let statistics = match self.statistics {
            ColumnStatistics::Mean => "mean",
            ColumnStatistics::Scale => "scale",
            ColumnStatistics::MeanAndScale => "mean_scale",
        };
        format!("sample_{statistics}_{}_{}", self.rows, self.source.suffix())
    }

    fn description(&self) -> String {
        let what = match self.statistics {
            ColumnStatistics::Mean => "K: mean",
            ColumnStatistics::Scale => "V: scales",
            ColumnStatistics::MeanAndScale => "V: mean and scales",
        };
        format!("{what} of {} rows of the sequence; {}", self.rows, self.source.description())
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
