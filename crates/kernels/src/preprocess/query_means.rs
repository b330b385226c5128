//! The mean of each block of query rows.

use sage_ptx::{Code, Program, kernel};

use super::statistics::{Part, across_block, of_tiles};
use super::tile_load::{Head, Source};
use crate::grid::grid;
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Averages the query rows that share a subtracted mean: one block for all where the mean is over whole sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueryMeansConfig {
    /// Q as given; its lengths are dense or packed.
    pub source: Source,
    /// Rows of a block, a multiple of 64.
    pub block: usize,
}

kernel_params! {
    /// What a launch of [`QueryMeansConfig`] passes. Strides are in elements.
    QueryMeansParams, QueryMeansArgs {
        /// Q as given.
        input: input,
        /// Means, `[sequences][q_heads][q_blocks][padded_dim]`, with the grid's blocks along x. Those of blocks without
        /// rows are not written.
        mean: [f32],
    }
}

impl QueryMeansConfig {
    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.source.threads()
    }

    /// Blocks along x, y and z, where the longest sequence has `max_q_len` queries.
    pub fn grid(&self, max_q_len: usize, q_heads: usize, sequences: usize) -> [u32; 3] {
        grid(max_q_len.div_ceil(self.block), q_heads * sequences)
    }

    fn write(&self, code: &Code) {
        self.source.bound_registers(code, 896);
        let p = QueryMeansParams::declare(code);
        let head = Head::new(code, &self.source, &p.input);
        let ([block, ..], [blocks, ..]) = (code.block_index(), code.grid());
        let rows = (head.len() - block * self.block as i32).min(self.block as i32);
        code.exit_when(rows.le(0));

        let first = block * (self.block / KEY_TILE) as i32;
        let sums = of_tiles(&head, &[Part::Sum], first, first + rows.div_ceil(KEY_TILE));
        let sum = across_block(&head, Part::Sum, sums[0]);
        let of_block = (head.index * blocks + block).widen() * i64::from(self.source.padded_dim() as i32);
        p.mean.at(of_block).at(head.thread).store(sum / rows.to_f32());
    }
}

impl Kernel for QueryMeansConfig {
    fn name(&self) -> String {
        format!("query_means_{}_{}", self.block, self.source.suffix())
    }

    fn description(&self) -> String {
        format!("Q: means of {} rows; {}", self.block, self.source.description())
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
