//! The mean of a head over all tokens, from the sums of its blocks.

use sage_ptx::{Code, Program, kernel};

use super::fold::{Fold, halves, in_order, reversed};
use crate::grid::{BlockHead, grid};
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::Lengths;

/// Channels of a block: 32 bytes of each block's sums.
const CHANNELS: i32 = 8;

/// Threads that share a channel: each has every 32nd of the eights of blocks.
const SLOTS: i32 = 32;

/// Levels of the fold of a thread's eights, of which fewer than 2³¹ blocks have fewer than 2²³.
const LEVELS: usize = 23;

/// Averages each channel over all tokens that count, as [`sage_core::sparse::mean_of_blocks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MeanOfBlocksConfig {
    /// Channels of a row of sums: a multiple of 64.
    pub padded_dim: usize,
    /// Where the lengths of sequences come from.
    pub lengths: Lengths,
}

kernel_params! {
    /// What a launch of [`MeanOfBlocksConfig`] passes.
    MeanOfBlocksParams, MeanOfBlocksArgs {
        /// Sums of [`SumBlocksConfig`](super::SumBlocksConfig), `[sequences][heads][blocks][padded_dim]`.
        sums: [f32],
        /// Blocks of the tensor.
        blocks: i32,
        /// Which tokens count.
        tokens: tokens,
        /// Heads of a sequence.
        heads: i32,
        /// Heads of all sequences.
        all_heads: i32,
        /// Means, `[sequences][heads][padded_dim]`: zeros where no token counts.
        means: [f32],
    }
}

impl MeanOfBlocksConfig {
    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        (CHANNELS * SLOTS) as u32
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, heads: usize, sequences: usize) -> [u32; 3] {
        grid(self.padded_dim / CHANNELS as usize, heads * sequences)
    }

    fn write(&self, code: &Code) {
        let p = MeanOfBlocksParams::declare(code);
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.all_heads);
        let of_sequence = p.tokens.of_sequence(self.lengths, index);
        let number = (index * p.heads + head).named("head_number");
        let thread = code.thread();
        let (within, slot) = (thread & (CHANNELS - 1), thread >> CHANNELS.ilog2() as i32);
        let [x, ..] = code.block_index();
        let channel = x * CHANNELS + within;
        let sums = p.sums.at(number.mul_wide(p.blocks) * i64::from(self.padded_dim as i32)).at(channel);

        let tokens = code.var(0i32).named("tokens");
        let fold = Fold::new(code, 1, LEVELS);
        let turns = p.blocks.div_ceil(8 * SLOTS as usize);
        reversed(code, turns, |leaf, turn| {
            let first = (turn * SLOTS + slot) * 8;
            let terms: Vec<_> = (0..8)
                .map(|i| {
                    let block = first + i;
                    let there = block.lt(p.blocks);
                    let block = block.min(p.blocks - 1);
                    tokens.set(tokens.get() + there.select(of_sequence.of_block(block).1, 0));
                    let sum = sums.at(block.widen() * i64::from(self.padded_dim as i32)).load();
                    there.select(sum, 0.0)
                })
                .collect();
            fold.push(leaf, &[in_order(terms).unwrap_or(code.constant(0.0))]);
        });
        let shared = code.shared::<f32>("sums", (CHANNELS * SLOTS) as usize);
        let counts = code.shared::<i32>("counts", SLOTS as usize);
        shared.at(thread).store(fold.totals()[0]);
        code.when(within.eq(0), || counts.at(slot).store(tokens.get()));
        code.barrier();
        code.when(thread.lt(CHANNELS), || {
            let sums: Vec<_> =
                (0..SLOTS).map(|slot| shared.plus(slot * CHANNELS).at(thread).load()).collect();
            let counts = (0..SLOTS).map(|slot| counts.plus(slot).load()).reduce(|a, b| a + b);
            let count = counts.unwrap_or(code.constant(0)).max(1).to_f32();
            let mean = p.means.at(number.mul_wide(self.padded_dim as i32)).at(channel);
            mean.store(halves(&sums) / count);
        });
    }
}

impl Kernel for MeanOfBlocksConfig {
    fn name(&self) -> String {
        format!("mean_of_blocks_p{}{}", self.padded_dim, self.lengths.suffix())
    }

    fn description(&self) -> String {
        format!(
            "K: means of heads from sums of blocks; {} channels{}",
            self.padded_dim,
            self.lengths.description()
        )
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
