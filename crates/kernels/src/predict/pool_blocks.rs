//! Means and similarities of the blocks of a tensor.

use half::{bf16, f16};
use sage_core::DType;
use sage_ptx::{Code, Global, Program, Val, Var, kernel};

use super::columns::{Columns, TokenBlocks};
use super::fold::{across_lanes, in_order};
use super::tokens;
use crate::grid::BlockHead;
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::preprocess::{CHUNK, Head, ROWS, Rows};

/// Lanes of a warp.
const LANES: i32 = 32;

/// Threads that shall fit a multiprocessor: with 80 registers each, which hold a thread's rows without spills. Left to
/// itself the assembler takes 96, and of blocks of 256 threads two fit instead of three.
const RESIDENT: u32 = 768;

/// Pools the tokens of each block that count, as [`sage_core::sparse::PooledBlocks`]: a block of threads for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolBlocksConfig {
    /// Those of Q or K.
    pub blocks: TokenBlocks,
    /// Whether the mean of all tokens is subtracted first.
    pub smooth: bool,
    /// Whether similarities are wanted.
    pub similarity: bool,
    /// Whether means are written in the tensor's element type instead of single precision.
    pub narrow: bool,
}

kernel_params! {
    /// What a launch of [`PoolBlocksConfig`] passes. Strides are in elements.
    PoolBlocksParams, PoolBlocksArgs {
        /// Q or K as given.
        x: (tensor 3),
        /// Which tokens count.
        tokens: tokens,
        /// Heads of a sequence.
        heads: i32,
        /// Heads of all sequences.
        all_heads: i32,
        /// What is subtracted, `[sequences][heads][padded_dim]`.
        subtracted: [f32],
        /// Means, `[sequences][heads][blocks][padded_dim]`, with the grid's blocks along x; in 16 bits where they are narrow.
        means: [f32],
        /// Similarities, `[sequences][heads][blocks]`.
        similarities: [f32],
    }
}

impl PoolBlocksConfig {
    fn write<'k>(&self, code: &'k Code) {
        let blocks = self.blocks;
        if self.similarity && self.blocks.source.aligned && blocks.turns() == 1 {
            code.min_blocks((RESIDENT / blocks.threads()).max(1));
        }
        let p = PoolBlocksParams::declare(code);
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.all_heads);
        let head = tokens::head(code, &self.blocks.source, &p.x, &p.tokens, [index, head], p.heads);
        let ([block, ..], [number, ..]) = (code.block_index(), code.grid());
        let (width, threads) = (blocks.width() as i32, blocks.threads() as i32);
        let place = head.index.mul_wide(number) + block.widen();
        let first = place * i64::from(width);
        let means = if self.narrow { p.means.cast::<u16>().at(first).cast() } else { p.means.at(first) };
        let similarity = p.similarities.at(place);
        let (first, count) = p.tokens.of_sequence(self.blocks.source.lengths, index).of_block(block);
        code.when(count.eq(0), || {
            code.note("a block without tokens");
            code.range_by(head.thread, width, threads, |channel| {
                self.store(means, channel, || code.constant(0.0));
            });
            if self.similarity {
                code.when(head.thread.eq(0), || similarity.store(0.0));
            }
        });
        code.exit_when(count.eq(0));

        let subtracted = self.smooth.then(|| head.channels(p.subtracted));
        let of_eight = |rows: &Rows<'k>| {
            let x = smoothed(rows, subtracted);
            let sums = column_sums(&x);
            if !self.similarity {
                return vec![sums];
            }
            let inverses = inverse_norms(&head, blocks, &x);
            let directions: [_; ROWS] = std::array::from_fn(|i| x[i].map(|x| x * inverses[i]));
            vec![sums, column_sums(&directions)]
        };
        let quantities = if self.similarity { 2 } else { 1 };
        let columns = Columns::new(&head, blocks, [first, count], quantities, of_eight);
        let tokens = count.to_f32();
        let squares = self.similarity.then(|| code.shared::<f32>("squares", blocks.width()));
        // Where there are more threads than channels, some take the means and others the directions.
        code.range_by(head.thread, width * quantities as i32, threads, |item| {
            code.if_else(
                item.lt(width),
                || self.store(means, item, || columns.total(0, item) / tokens),
                || {
                    if let Some(squares) = squares {
                        let channel = item - width;
                        let sum = columns.total(1, channel);
                        squares.at(channel).store(sum * sum);
                    }
                },
            );
        });
        if let Some(squares) = squares {
            code.barrier();
            code.when(head.thread.lt(LANES), || {
                let chunks = blocks.chunks();
                let own = squares.at((head.thread & (chunks as i32 - 1)) * CHUNK as i32);
                let squares = [own.load_vector::<4>(), own.plus(4).load_vector::<4>()].concat();
                let sum = in_order(squares).unwrap_or(code.constant(0.0));
                let sum = across_lanes(sum, chunks);
                code.when(head.thread.eq(0), || similarity.store(sum / (tokens * tokens)));
            });
        }
    }

    /// Writes the mean of a channel, rounded to the tensor's element type.
    fn store<'k>(&self, means: Global<'k, f32>, channel: Val<'k, i32>, mean: impl FnOnce() -> Val<'k, f32>) {
        match (self.narrow, self.blocks.source.dtype) {
            (false, _) => means.at(channel).store(self.rounded(mean())),
            (true, DType::F16) => means.cast::<f16>().at(channel).store(mean().narrow::<f16>()),
            (true, _) => means.cast::<bf16>().at(channel).store(mean().narrow::<bf16>()),
        }
    }

    /// The nearest value of the tensor's element type.
    fn rounded<'k>(&self, x: Val<'k, f32>) -> Val<'k, f32> {
        match self.blocks.source.dtype {
            DType::F16 => x.narrow::<f16>().to_f32(),
            _ => x.narrow::<bf16>().to_f32(),
        }
    }
}

/// The thread's rows with `mean` subtracted; zeros in place of rows that do not count.
fn smoothed<'k>(rows: &Rows<'k>, mean: Option<[Val<'k, f32>; CHUNK]>) -> [[Val<'k, f32>; CHUNK]; ROWS] {
    let Some(mean) = mean else { return std::array::from_fn(|i| rows.row(i)) };
    let code = rows.left.code();
    let x = [(); ROWS].map(|()| [(); CHUNK].map(|()| Var::new(code)));
    let set = |of: &dyn Fn(usize, Val<'k, f32>) -> Val<'k, f32>| {
        for (i, x) in x.iter().enumerate() {
            let row = rows.row(i);
            (0..CHUNK).for_each(|c| x[c].set(of(i, row[c] - mean[c])));
        }
    };
    code.if_else(rows.whole(), || set(&|_, x| x), || set(&|i, x| rows.valid(i).select(x, 0.0)));
    x.map(|row| row.map(Var::get))
}

/// The sum of each channel over the thread's rows.
fn column_sums<'k>(rows: &[[Val<'k, f32>; CHUNK]; ROWS]) -> [Val<'k, f32>; CHUNK] {
    std::array::from_fn(|c| rows[1..].iter().fold(rows[0][c], |sum, row| sum + row[c]))
}

/// One over the norm of each of the thread's rows, whose channels lie in neighbouring lanes; 0 of a row of zeros.
///
/// Each of the first folds across lanes halves the rows that a lane goes on with, so that a lane takes the root of one
/// row for all.
fn inverse_norms<'k>(
    head: &Head<'k>,
    blocks: TokenBlocks,
    rows: &[[Val<'k, f32>; CHUNK]; ROWS],
) -> [Val<'k, f32>; ROWS] {
    let chunks = blocks.chunks();
    let square = |row: &[Val<'k, f32>; CHUNK]| row[1..].iter().fold(row[0] * row[0], |sum, &x| sum + x * x);
    let mut sums: Vec<_> = rows.iter().map(square).collect();
    let mut lanes = chunks;
    while sums.len() > 1 {
        lanes /= 2;
        let upper = (head.chunk & lanes as i32).ne(0);
        let (low, high) = sums.split_at(sums.len() / 2);
        sums = low
            .iter()
            .zip(high)
            .map(|(&low, &high)| {
                let (kept, sent) = (upper.select(high, low), upper.select(low, high));
                kept + sent.shuffle_xor(lanes as i32)
            })
            .collect();
    }
    let norm = across_lanes(sums[0], lanes).sqrt();
    let inverse = norm.eq(0.0).select(0.0, norm.recip());
    // Row i was left to the lanes of the i-th eighth of the chunks.
    let first = head.thread & (LANES - 1) & -(chunks as i32);
    std::array::from_fn(|i| inverse.shuffle(first + (i * chunks / ROWS) as i32))
}

impl Kernel for PoolBlocksConfig {
    fn name(&self) -> String {
        let smooth = if self.smooth { "_smooth" } else { "" };
        let similarity = if self.similarity { "_similarity" } else { "" };
        let narrow = if self.narrow { "_narrow" } else { "" };
        format!(
            "pool_blocks_{}{smooth}{similarity}{narrow}_{}",
            self.blocks.tokens,
            self.blocks.source.suffix()
        )
    }

    fn description(&self) -> String {
        let smooth = if self.smooth { ", smoothed" } else { "" };
        let what = if self.similarity { "means and similarities" } else { "means" };
        format!(
            "{what} of blocks of {} tokens{smooth}; {}",
            self.blocks.tokens,
            self.blocks.source.description()
        )
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.blocks.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.blocks.threads(), |code| self.write(code))
    }
}
