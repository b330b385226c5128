//! The mean of a few rows of K.

use sage_core::SmoothK;
use sage_ptx::{Code, Program, kernel};

use super::statistics::{Collector, Part, across_block};
use super::tile_load::{CHUNK, Head, Source, input};
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Averages rows that lie evenly in each sequence ([`SmoothK::Sampled`]): a block for each head of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SampleMeanConfig {
    /// K as given.
    pub source: Source,
    /// Rows that are averaged; all of a sequence that has no more.
    pub rows: usize,
}

kernel_params! {
    /// What a launch of [`SampleMeanConfig`] passes. Strides are in elements.
    SampleMeanParams, SampleMeanArgs {
        /// K as given.
        x: [u16],
        /// Means, `[sequences][kv_heads][padded_dim]`; zeros of a sequence without rows.
        mean: [f32],
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
    }
}

impl SampleMeanConfig {
    /// Name of the kernel, unique for the configuration.
    pub fn name(&self) -> String {
        format!("sample_mean_{}_{}", self.rows, self.source.suffix())
    }

    /// What the kernel computes, in core's words.
    pub const fn smooth(&self) -> SmoothK {
        SmoothK::Sampled(self.rows)
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.source.threads()
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, kv_heads: usize, sequences: usize) -> [u32; 3] {
        [1, kv_heads as u32, sequences as u32]
    }

    /// The kernel.
    pub fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }

    fn write(&self, code: &Code) {
        self.source.bound_registers(code, 512);
        let p = SampleMeanParams::declare(code);
        let head = Head::new(code, &self.source, &input!(p));
        let sums = [(); CHUNK].map(|()| Collector::new(code, Part::Sum));
        for first in (0..self.rows).step_by(KEY_TILE) {
            let rows = head.load_sample(first, self.rows);
            sums.iter().zip(Part::Sum.of_rows(&rows)).for_each(|(sum, x)| sum.add(x));
        }
        let sum = across_block(&head, Part::Sum, sums.map(|sum| sum.get()));
        let count = head.len().min(self.rows as i32).max(1);
        let of_head = head.index.widen() * i64::from(self.source.padded_dim() as i32);
        p.mean.at(of_head).at(head.thread).store(sum / count.to_f32());
    }
}
