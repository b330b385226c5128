//! A warp's query rows: which keys and blocks they see, and the queries as an operand.

use std::ops::Range;

use sage_ptx::{Code, Global, Half, Rows, SLOT_ROWS, Stored, Val, lane_row};

use super::kernel::{PooledTailConfig, PooledTailParams, WARP_ROWS};
use crate::attention::{Band, load_channels};
use crate::grid::BlockHead;
use crate::sequence::Sequence;

/// A block of keys.
pub(super) struct KeyBlock<'k> {
    /// Its keys, none where there is no such block.
    pub keys: Range<Val<'k, i32>>,
    /// log₂ of their number.
    pub log2_keys: Val<'k, f32>,
}

/// The lane's rows, of which it has two.
pub(super) struct TailRows<'k> {
    pub lane: Val<'k, i32>,
    pub sequence: Sequence<'k>,
    pub band: Band<'k>,
    /// Index of the sequence, and of the key head.
    pub index: Val<'k, i32>,
    pub head: Val<'k, i32>,
    pub kv_head: Val<'k, i32>,
    /// First row of the block of threads, and the last that the sequence has.
    pub first_row: Val<'k, i32>,
    pub last_row: Val<'k, i32>,
    /// The rows in their sequence, which may lack the last ones.
    pub row: Rows<Val<'k, i32>>,
    /// The keys that each sees.
    seen: Rows<Range<Val<'k, i32>>>,
    /// The line of the block mask for each.
    flags: Rows<Global<'k, u8>>,
    /// The block mask of the head.
    map: Global<'k, u8>,
}

impl<'k> TailRows<'k> {
    pub fn of_warp(config: &PooledTailConfig, code: &'k Code, p: &PooledTailParams<'k>) -> Self {
        let BlockHead { sequence: index, head } = BlockHead::new(code, p.heads, p.all_heads);
        let sequence = Sequence::new(code, config.lengths, false, &p.lengths, index);
        let band = Band::new(&p.lengths, &sequence);
        let lane = code.lane_index();
        let first_row = code.block_index()[0] * config.block_q() as i32;
        let warp_row = first_row + code.warp_index() * WARP_ROWS as i32;
        let row = Rows::from_fn(2, |slot| warp_row + lane_row(lane) + (SLOT_ROWS * slot) as i32);
        let seen = row.map(|&row| {
            if config.band { band.start(row)..band.end(row) } else { code.constant(0)..sequence.kv_len }
        });
        let map = p.blocks.start.at(p.blocks.head(index, head));
        let flags = row.map(|&row| {
            let block = row.min(sequence.q_len - 1) / p.block_q;
            map.at(block.widen() * p.blocks.row_stride())
        });
        let last_row = band.last_row(first_row, config.block_q() as i32);
        let kv_head = head / p.group;
        TailRows { lane, sequence, band, index, head, kv_head, first_row, last_row, row, seen, flags, map }
    }

    /// Neighbouring channels of the rows' queries, two to a word, as operands have them. The last row stands in for rows
    /// that the sequence does not have.
    pub fn words<H: Half + Stored<Value = H>>(
        &self,
        config: &PooledTailConfig,
        p: &PooledTailParams<'k>,
    ) -> Rows<Vec<Val<'k, u32>>> {
        let head = p.q.head(self.sequence.batch, self.head);
        self.row.map(|&row| {
            let row = row.min(self.sequence.q_len - 1) + self.sequence.q_start;
            let base = p.q.start.cast::<H>().at(head + row.widen() * p.q.row_stride());
            let channels = 2 * (self.lane & 3);
            let word = |word: usize| {
                load_channels::<H>((config.head_dim, config.aligned), base, channels, 8 * word as i32, 2)[0]
            };
            (0..2 * config.steps()).map(word).collect()
        })
    }

    /// The products of the rows' queries with the mean of K.
    pub fn products<H: Half>(
        &self,
        config: &PooledTailConfig,
        words: &Rows<Vec<Val<'k, u32>>>,
        p: &PooledTailParams<'k>,
    ) -> Rows<Val<'k, f32>> {
        let mean = p.k_mean.at(self.kv_number(p) * config.padded_dim() as i32).at(2 * (self.lane & 3));
        words.map(|words| {
            let mut sum = self.lane.code().constant(0.0);
            for (at, word) in words.iter().enumerate() {
                let mean = mean.plus(8 * at as i32).load_vector::<2>();
                for (q, mean) in word.split::<H>().into_iter().zip(mean) {
                    sum = q.to_f32().mul_add(mean, sum);
                }
            }
            sum.reduce_quad(|a, b| a + b)
        })
    }

    /// The number of the key head among those of all sequences.
    pub fn kv_number(&self, p: &PooledTailParams<'k>) -> Val<'k, i32> {
        self.index * (p.heads / p.group) + self.kv_head
    }

    /// Block `index` of the keys.
    pub fn block(&self, index: Val<'k, i32>, p: &PooledTailParams<'k>) -> KeyBlock<'k> {
        let there = index.lt(p.k_blocks);
        let start = there.select(index, 0) * p.block_k;
        let end = there.select((start + p.block_k).min(self.sequence.kv_len), 0);
        KeyBlock { keys: start..end, log2_keys: (end - start).to_f32().log2() }
    }

    /// Whether a row sees all keys of a block, which has some.
    pub fn sees_all(&self, slot: usize, block: &KeyBlock<'k>) -> Val<'k, bool> {
        let (seen, keys) = (&self.seen[slot], &block.keys);
        keys.start.lt(keys.end) & keys.start.ge(seen.start) & keys.end.le(seen.end)
    }

    /// What makes a product with a block's mean its pooled term for a row, in base 2: log₂ of the block's keys, or −∞
    /// where the row has no such term.
    pub fn bias(&self, slot: usize, index: Val<'k, i32>, p: &PooledTailParams<'k>) -> Val<'k, f32> {
        let block = self.block(index, p);
        let pooled = self.sees_all(slot, &block) & self.leaves_out(slot, index, p);
        pooled.select(block.log2_keys, f32::NEG_INFINITY)
    }

    /// Whether the map leaves a block out for a row; blocks that there are not may be either.
    pub fn leaves_out(&self, slot: usize, block: Val<'k, i32>, p: &PooledTailParams<'k>) -> Val<'k, bool> {
        let block = block.min(p.k_blocks - 1);
        self.flags[slot].at(block.widen() * p.blocks.key_stride()).load().eq(0)
    }

    /// The keys of a block that a row sees; none where the end is not above the start.
    pub fn seen_of(&self, slot: usize, block: &KeyBlock<'k>) -> Range<Val<'k, i32>> {
        let (seen, keys) = (&self.seen[slot], &block.keys);
        keys.start.max(seen.start)..keys.end.min(seen.end)
    }

    /// Whether the map leaves a block out for some row of the block of threads.
    pub fn some_leave_out(&self, block: Val<'k, i32>, p: &PooledTailParams<'k>) -> Val<'k, bool> {
        let code = block.code();
        let left_out = code.var(0).named("rows_that_leave_out");
        let lines = self.first_row / p.block_q;
        code.range(lines, self.last_row / p.block_q + 1, |line| {
            let flag = self.map.at(line.widen() * p.blocks.row_stride());
            let kept = flag.at(block.widen() * p.blocks.key_stride()).load().ne(0);
            left_out.set(kept.select(left_out.get(), 1));
        });
        left_out.get().ne(0)
    }
}
