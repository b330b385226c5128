//! Means and scales of the columns of every head, in a launch of their own.

use sage_ptx::{Code, Program, kernel};

use super::statistics::{ColumnStatistics, Meeting, Outputs, across_block, of_tiles};
use super::tile_load::{Head, Source, input};
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Reduces the columns of K, V or Q over each whole sequence. No block waits for another: the last one of a head
/// finishes.
///
/// Of queries, `cu_seqlens` are theirs; only keys have [`crate::Lengths::KvLens`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ColumnStatisticsConfig {
    /// The tensor.
    pub source: Source,
    /// What is computed.
    pub statistics: ColumnStatistics,
}

kernel_params! {
    /// What a launch of [`ColumnStatisticsConfig`] passes. Strides are in elements.
    ColumnStatisticsParams, ColumnStatisticsArgs {
        /// The tensor.
        x: [u16],
        /// Means, `[sequences][heads][padded_dim]`; zeros where there are no rows.
        mean: [f32],
        /// Scales of E4M3 channels, as the means. 0 for a channel of zeros, NaN for one with a non-finite value.
        scale: [f32],
        /// What channels are multiplied by to become E4M3, as the means. 0 where the scale is 0 or NaN.
        factor: [f32],
        /// `[sequences][heads][blocks][`[`ColumnStatistics::partials`]`][padded_dim]`, with the grid's blocks along x.
        partials: [f32],
        /// `[sequences][heads]`, zeros before every launch.
        arrivals: [u32],
        /// Boundaries of packed sequences, or the valid keys of each batch entry.
        cu_seqlens: [i32],
        /// Stride of the batch.
        stride_batch: i64,
        /// Stride of the heads.
        stride_head: i64,
        /// Stride of the rows.
        stride_row: i64,
        /// Rows of the tensor.
        rows: i32,
        /// Tiles of 64 rows that a block reads: blocks along x times these must reach the longest sequence's end.
        tiles_per_block: i32,
        /// Largest magnitude of quantised values.
        v_max: f32,
    }
}

impl ColumnStatisticsConfig {
    /// Name of the kernel, unique for the configuration.
    pub fn name(&self) -> String {
        format!("column_{}_{}", self.statistics.suffix(), self.source.suffix())
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.source.threads()
    }

    /// Blocks along x, y and z, where the longest sequence has `max_len` rows.
    pub fn grid(&self, max_len: usize, tiles_per_block: usize, heads: usize, sequences: usize) -> [u32; 3] {
        let blocks = max_len.div_ceil(KEY_TILE).div_ceil(tiles_per_block.max(1)).max(1);
        [blocks as u32, heads as u32, sequences as u32]
    }

    /// The kernel.
    pub fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }

    fn write(&self, code: &Code) {
        if self.statistics != ColumnStatistics::MeanAndScale {
            self.source.bound_registers(code, 896);
        }
        let p = ColumnStatisticsParams::declare(code);
        let head = Head::new(code, &self.source, &input!(p));
        let ([block, ..], [blocks, ..]) = (code.block_index(), code.grid());
        let parts = self.statistics.parts();
        let width = i64::from(self.source.padded_dim() as i32);

        let start = block * p.tiles_per_block;
        let end = (start + p.tiles_per_block).min(head.len().div_ceil(KEY_TILE));
        let own = of_tiles(&head, parts, start, end);
        let columns: Vec<_> =
            parts.iter().zip(own).map(|(&part, values)| across_block(&head, part, values)).collect();

        let of_head = (head.index * blocks * parts.len() as i32).widen() * width;
        let meeting =
            Meeting { partials: p.partials.at(of_head), arrivals: p.arrivals.at(head.index), blocks, block };
        let outputs = Outputs { mean: p.mean, scale: p.scale, factor: p.factor, v_max: p.v_max };
        meeting.arrive(&head, parts, &columns, |totals| outputs.write(&head, self.statistics, totals));
    }
}
