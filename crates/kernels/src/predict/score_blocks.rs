//! Scores of blocks of queries and keys: products of their means.

use sage_ptx::{Code, Program, kernel};

use crate::grid::{BlockHead, grid};
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::Lengths;

/// Blocks of queries, and of keys, of a tile of scores.
const TILE: [usize; 2] = [32, 64];

/// Scores of a thread: so many blocks of queries and of keys, each row of which is stored at once. With 4 × 4 it would
/// read shared memory for as long as it computes.
const OWN: [usize; 2] = [8, 4];

/// Threads of a block.
const THREADS: usize = TILE[0] * TILE[1] / (OWN[0] * OWN[1]);

/// Channels that are multiplied from one load into shared memory to the next.
const SLAB: usize = 32;

/// Channels of a turn of the loop over a slab: some 270 instructions, which stay in the cache next to the schedulers.
const UNROLLED: usize = 4;

/// Multiplies means of blocks, each score in the order of the channels: a block of threads for each tile of 32 blocks
/// of queries and 64 of keys. Tiles of which the band shows nothing are not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScoreBlocksConfig {
    /// Channels of a mean: a multiple of 64.
    pub padded_dim: usize,
    /// Where the lengths of sequences come from.
    pub lengths: Lengths,
}

kernel_params! {
    /// What a launch of [`ScoreBlocksConfig`] passes.
    ScoreBlocksParams, ScoreBlocksArgs {
        /// Means of the blocks of Q, `[sequences][heads][q_blocks][padded_dim]`.
        q_means: [f32],
        /// Means of the blocks of K, `[sequences][heads / group][k_blocks][padded_dim]`.
        k_means: [f32],
        /// Blocks of queries.
        q_blocks: i32,
        /// Blocks of keys.
        k_blocks: i32,
        /// Queries of a block.
        block_q: i32,
        /// Which keys count.
        keys: tokens,
        /// First block of queries whose scores are wanted.
        first: i32,
        /// Blocks of queries whose scores are wanted.
        rows: i32,
        /// Factor on the products.
        scale: f32,
        /// Query heads of a sequence.
        heads: i32,
        /// Query heads of all sequences.
        all_heads: i32,
        /// Query heads that share a key head.
        group: i32,
        /// Scores, `[sequences][heads][rows][stride]`.
        scores: [f32],
        /// Scores from one row to the next: a multiple of 4.
        stride: i32,
    }
}

impl ScoreBlocksConfig {
    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        THREADS as u32
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, rows: usize, k_blocks: usize, all_heads: usize) -> [u32; 3] {
        grid(rows.div_ceil(TILE[0]) * k_blocks.div_ceil(TILE[1]), all_heads)
    }

    fn write(&self, code: &Code) {
        let p = ScoreBlocksParams::declare(code);
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.all_heads);
        let [x, ..] = code.block_index();
        let tiles = p.k_blocks.div_ceil(TILE[1]);
        // The first row of the tile among those wanted, and its first column.
        let (row, column) = (x / tiles * TILE[0] as i32, x % tiles * TILE[1] as i32);
        let of_sequence = p.keys.of_sequence(self.lengths, index);
        let first_query = (p.first + row) * p.block_q;
        let queries = (p.rows - row).min(TILE[0] as i32) * p.block_q;
        let [start, end] = of_sequence.seen_keys(first_query, queries);
        let last = (column + (TILE[1] as i32 - 1)).min(p.k_blocks - 1);
        code.exit_when(
            of_sequence.first_of(column).ge(end) | of_sequence.first_of(last + 1).le(start) | start.ge(end),
        );

        let number = index * p.heads + head;
        let kv_number = index * (p.heads / p.group) + head / p.group;
        let width = i64::from(self.padded_dim as i32);
        let queries = p.q_means.at(number.mul_wide(p.q_blocks) * width);
        let keys = p.k_means.at(kv_number.mul_wide(p.k_blocks) * width);
        let thread = code.thread();
        let [q_slab, k_slab] = TILE.map(|rows| code.shared::<f32>("slab", SLAB * rows));
        let across = TILE[1] / OWN[1];
        let own_row = (thread >> across.ilog2() as i32) * OWN[0] as i32;
        let own_column = (thread & (across - 1) as i32) * OWN[1] as i32;
        let sums = [(); OWN[0]].map(|()| [(); OWN[1]].map(|()| code.var(0.0f32)));
        code.range_by(0, self.padded_dim as i32, SLAB as i32, |channel| {
            // Means are rows in memory; in shared memory each channel of all of them lies together. Neighbouring lanes
            // load neighbouring means, so that their stores meet in no bank.
            let fetch = |side: usize| -> Vec<_> {
                let (means, first, blocks) =
                    [(queries, p.first + row, p.q_blocks), (keys, column, p.k_blocks)][side];
                (0..TILE[side] * SLAB / (4 * THREADS))
                    .map(|i| {
                        let vector = thread + (i * THREADS) as i32;
                        let (quad, mean) = vector.split_index(TILE[side]);
                        let block = (first + mean).min(blocks - 1);
                        let of_block = means.at(block.widen() * width).at(channel + quad * 4);
                        (quad * (4 * TILE[side]) as i32 + mean, of_block.load_vector::<4>())
                    })
                    .collect()
            };
            let fetched = [fetch(0), fetch(1)];
            // The slab before this one has been read.
            code.barrier();
            for ((slab, rows), vectors) in [q_slab, k_slab].into_iter().zip(TILE).zip(&fetched) {
                for (place, vector) in vectors {
                    let to = slab.at(*place);
                    vector.iter().enumerate().for_each(|(i, &x)| to.plus((i * rows) as i32).store(x));
                }
            }
            code.barrier();
            let [own_q, own_k] = [q_slab.at(own_row), k_slab.at(own_column)];
            code.range_by(0, SLAB as i32, UNROLLED as i32, |first| {
                let [of_q, of_k] = TILE.map(|rows| first * rows as i32);
                for channel in 0..UNROLLED {
                    let q = own_q.at(of_q).plus((channel * TILE[0]) as i32);
                    let q = [q.load_vector::<4>(), q.plus(4).load_vector::<4>()].concat();
                    let k = own_k.at(of_k).plus((channel * TILE[1]) as i32).load_vector::<4>();
                    for (sums, q) in sums.iter().zip(q) {
                        // The product is rounded, and then the sum.
                        sums.iter().zip(k).for_each(|(sum, k)| sum.set(sum.get() + q * k));
                    }
                }
            });
        });
        let (row, column) = (row + own_row, column + own_column);
        for (i, sums) in sums.iter().enumerate() {
            let row = row + i as i32;
            let of_row = p.scores.at((number.mul_wide(p.rows) + row.widen()) * p.stride.widen());
            code.when(row.lt(p.rows) & column.lt(p.stride), || {
                of_row.at(column).store_vector(sums.map(|sum| sum.get() * p.scale));
            });
        }
    }
}

impl Kernel for ScoreBlocksConfig {
    fn name(&self) -> String {
        format!("score_blocks_p{}{}", self.padded_dim, self.lengths.suffix())
    }

    fn description(&self) -> String {
        let lengths = self.lengths.description();
        format!("scores of pairs of blocks by their means; {} channels{lengths}", self.padded_dim)
    }

    fn head_dim(&self) -> Option<usize> {
        None
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
