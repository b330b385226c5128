//! Sums of the blocks of a tensor, channel by channel: what the mean of K is made of.

use sage_ptx::{Code, Program, Val, kernel};

use super::columns::{Columns, TokenBlocks};
use super::fold::in_order;
use super::tokens;
use crate::grid::BlockHead;
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::preprocess::Rows;

/// Sums each channel over the tokens of each block that count: a block of threads for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SumBlocksConfig {
    /// Those of K.
    pub blocks: TokenBlocks,
}

kernel_params! {
    /// What a launch of [`SumBlocksConfig`] passes. Strides are in elements.
    SumBlocksParams, SumBlocksArgs {
        /// K as given.
        k: (tensor 3),
        /// Which tokens count.
        tokens: tokens,
        /// Heads of a sequence.
        heads: i32,
        /// Heads of all sequences.
        all_heads: i32,
        /// Sums, `[sequences][heads][blocks][padded_dim]`, with the grid's blocks along x: zeros where no token counts.
        sums: [f32],
    }
}

impl SumBlocksConfig {
    fn write<'k>(&self, code: &'k Code) {
        let p = SumBlocksParams::declare(code);
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.all_heads);
        let head = tokens::head(code, &self.blocks.source, &p.k, &p.tokens, [index, head], p.heads);
        let ([block, ..], [number, ..]) = (code.block_index(), code.grid());
        let blocks = self.blocks;
        let width = blocks.width() as i32;
        let sums = p.sums.at((head.index.mul_wide(number) + block.widen()) * i64::from(width));
        let each_channel = |store: &dyn Fn(Val<'_, i32>)| {
            code.range_by(head.thread, width, blocks.threads() as i32, store);
        };
        let (first, count) = p.tokens.of_sequence(self.blocks.source.lengths, index).of_block(block);
        code.when(count.eq(0), || each_channel(&|channel| sums.at(channel).store(0.0)));
        code.exit_when(count.eq(0));

        let of_eight = |rows: &Rows<'k>| {
            let sum = |channel| in_order(rows.column(channel)).unwrap_or(code.constant(0.0));
            vec![std::array::from_fn(sum)]
        };
        let columns = Columns::new(&head, blocks, [first, count], 1, of_eight);
        each_channel(&|channel| sums.at(channel).store(columns.total(0, channel)));
    }
}

impl Kernel for SumBlocksConfig {
    fn name(&self) -> String {
        format!("sum_blocks_{}_{}", self.blocks.tokens, self.blocks.source.suffix())
    }

    fn description(&self) -> String {
        format!("K: sums of blocks of {} tokens; {}", self.blocks.tokens, self.blocks.source.description())
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.blocks.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.blocks.threads(), |code| self.write(code))
    }
}
