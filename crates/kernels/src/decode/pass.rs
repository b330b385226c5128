//! Passes over a KV cache: appending to it, and attention over what it holds.

use sage_core::{Alignment, Band, DType, Error, Result};

use super::{
    CacheAdvanceArgs, CacheAdvanceConfig, CacheAppendArgs, CacheAppendConfig, CacheAttendArgs,
    CacheAttendConfig, MAX_SPLIT_PAGES, PoolTensors, ROWS, Storage,
};
use crate::combine::{CombineArgs, CombineConfig, PART};
use crate::machine::Machine;
use crate::pass::{Pass, PassBuilder, Slot};
use crate::sequence::NO_LIMIT;
use crate::sinks::SinkArgs;
use crate::tensor::TensorArg;

/// What an append reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AppendTensors {
    /// New keys, `[sequences, kv_heads, tokens, head_dim]`.
    pub k: TensorArg,
    /// New values, likewise.
    pub v: TensorArg,
    /// The pool, with tables and lengths of the sequences that get tokens.
    pub pool: PoolTensors,
}

/// What attention over a cache reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AttendTensors {
    /// Queries, `[sequences, q_heads, q_len, head_dim]`.
    pub q: TensorArg,
    /// Output, likewise.
    pub out: TensorArg,
    /// Log-sum-exp, row-major; 0 where it is not wanted.
    pub lse: u64,
    /// Attention sinks, where the call has some.
    pub sinks: SinkArgs,
    /// The pool.
    pub pool: PoolTensors,
}

/// New tokens for some sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AppendCall {
    /// What the pages hold.
    pub storage: Storage,
    /// Element type of K and V: f16 or bf16.
    pub dtype: DType,
    /// Key heads.
    pub num_kv_heads: usize,
    /// Sequences that get tokens.
    pub sequences: usize,
    /// New tokens of each.
    pub tokens: usize,
    /// Pages in a row of the tables.
    pub table_stride: usize,
}

impl AppendCall {
    /// The launches: the tokens are written, then counted.
    pub fn pass(&self) -> Pass<AppendTensors> {
        let call = *self;
        let mut pass = PassBuilder::new();
        let append = CacheAppendConfig { storage: call.storage, dtype: call.dtype };
        pass.launch(append, move |at, launch| {
            let AppendTensors { k, v, pool } = at.tensors;
            let args = CacheAppendArgs {
                k: *k,
                v: *v,
                pool: *pool,
                table_stride: call.table_stride as i32,
                tokens: call.tokens as i32,
                kv_heads: call.num_kv_heads as i32,
                sequences: call.sequences as i32,
            };
            launch(append.grid(call.tokens, call.num_kv_heads, call.sequences), &args.args(), &[]);
        });
        let advance = CacheAdvanceConfig;
        pass.launch(advance, move |at, launch| {
            let args = CacheAdvanceArgs {
                kv_lens: at.tensors.pool.kv_lens,
                sequences: call.sequences as i32,
                tokens: call.tokens as i32,
            };
            launch(advance.grid(call.sequences), &args.args(), &[]);
        });
        pass.finish()
    }
}

/// Queries over everything that a cache holds. The last query is that of the last cached token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttendCall {
    /// What the pages hold.
    pub storage: Storage,
    /// Element type of Q and the output: f16 or bf16.
    pub dtype: DType,
    /// Sequences.
    pub sequences: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key heads.
    pub num_kv_heads: usize,
    /// Queries of each sequence.
    pub q_len: usize,
    /// Tokens of the longest sequence, or more: one pass serves all lengths up to this.
    pub kv_len: usize,
    /// Factor on Q·Kᵀ.
    pub sm_scale: f32,
    /// Causal masks and sliding windows.
    pub band: Band,
    /// Soft cap of the scaled scores.
    pub logit_softcap: Option<f32>,
    /// Whether there are attention sinks.
    pub sinks: bool,
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
    /// Pages in a row of the tables.
    pub table_stride: usize,
}

impl AttendCall {
    /// The launches (flash decoding): all tokens, or parts of them and their merging. None where there is no query.
    ///
    /// # Errors
    /// When the mask is one that the kernels do not have, or there are more rows than they number.
    pub fn pass(&self, machine: &Machine) -> Result<Pass<AttendTensors>> {
        let call = *self;
        if call.band.alignment != Alignment::BottomRight && !call.band.is_full() {
            return Err(Error::unsupported(
                "a mask that is not aligned bottom-right over a KV cache on a GPU",
                "align it bottom-right: the last query is that of the last cached token",
            ));
        }
        let rows = call.rows();
        if i32::try_from(rows).is_err() {
            let wanted = "less than 2³¹ rows of all heads together";
            return Err(Error::value("q_len", call.q_len, wanted));
        }
        if rows == 0 {
            return Ok(Pass::empty());
        }
        let (head_dim, group) = (call.storage.head_dim, call.group());
        let Parts { tokens: split, count: splits } = call.parts(machine);
        let attend = call.attend(splits, machine);

        let mut pass = PassBuilder::new();
        let (mut partial, mut partial_sums) = (Slot::NONE, Slot::NONE);
        if attend.split {
            partial = pass.slot("partial", 4 * splits * rows * head_dim);
            partial_sums = pass.slot("partial_sums", 4 * PART * splits * rows);
        }
        let log2e = std::f32::consts::LOG2_E;
        let reach = |side: Option<usize>| side.map_or(NO_LIMIT, |n| n.min(NO_LIMIT as usize) as i32);
        pass.launch(attend, move |at, launch| {
            let AttendTensors { q, out, lse, sinks, pool } = *at.tensors;
            let args = CacheAttendArgs {
                q,
                pool,
                out,
                lse,
                partial: at.of(partial),
                partial_sums: at.of(partial_sums),
                table_stride: call.table_stride as i32,
                kv_heads: call.num_kv_heads as i32,
                group: group as i32,
                q_len: call.q_len as i32,
                sequences: call.sequences as i32,
                split: split as i32,
                scale: call.sm_scale * log2e,
                cap: call.logit_softcap.map_or(0.0, |cap| (cap * log2e).min(f32::MAX)),
                left: reach(call.band.left),
                right: reach(call.band.right),
                sinks,
            };
            let grid = attend.grid(splits, call.num_kv_heads, call.q_len, group, call.sequences);
            let plain = args.args();
            let with_sinks = attend.sinks.then(|| sinks.after(&plain));
            launch(grid, with_sinks.as_deref().unwrap_or(&plain), &[]);
        });
        if !attend.split {
            return Ok(pass.finish());
        }
        let combine =
            CombineConfig { sinks: call.sinks, ..CombineConfig::new(call.dtype, head_dim, call.lse, splits) };
        pass.launch(combine, move |at, launch| {
            let AttendTensors { out, lse, sinks, .. } = *at.tensors;
            let args = CombineArgs {
                partial: at.of(partial),
                partial_sums: at.of(partial_sums),
                out,
                lse,
                total_rows: rows as i32,
                q_rows: call.q_len as i32,
                q_heads: call.num_q_heads as i32,
                splits: splits as i32,
                sinks,
            };
            let plain = args.args();
            let with_sinks = combine.sinks.then(|| sinks.after(&plain));
            launch(combine.grid(rows), with_sinks.as_deref().unwrap_or(&plain), &[]);
        });
        Ok(pass.finish())
    }

    /// Query rows of all heads and sequences.
    pub fn rows(&self) -> usize {
        self.sequences * self.num_q_heads * self.q_len
    }

    /// Parts that the tokens of a sequence are split into, where each is computed by blocks of its own.
    pub fn splits(&self, machine: &Machine) -> usize {
        self.parts(machine).count
    }

    /// The parts that take the least time.
    fn parts(&self, machine: &Machine) -> Parts {
        let row_blocks = CacheAttendConfig::row_blocks(self.q_len, self.group());
        let resident = machine.resident_blocks(self.attend(1, machine).min_blocks());
        Parts::new(
            &self.storage,
            self.seen_by_block(),
            [self.num_kv_heads * row_blocks * self.sequences, resident],
        )
    }

    /// Most tokens of the pages that the rows of a block see.
    fn seen_by_block(&self) -> usize {
        let Band { left: Some(left), right: Some(right), .. } = self.band else { return self.kv_len };
        let queries = self.q_len.min(ROWS);
        let window = left.saturating_add(right).saturating_add(queries + self.storage.page_size);
        self.kv_len.min(window)
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    /// The kernel, where tokens are in so many parts.
    fn attend(&self, splits: usize, machine: &Machine) -> CacheAttendConfig {
        CacheAttendConfig {
            storage: self.storage,
            dtype: self.dtype,
            softcap: self.logit_softcap.is_some(),
            split: splits > 1,
            sinks: self.sinks && splits == 1,
            lse: self.lse && splits == 1,
            stages: 0,
        }
        .with_stages(machine)
    }
}

/// What tokens of a sequence are split into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parts {
    /// Tokens of a part: whole pages.
    tokens: usize,
    count: usize,
}

/// What a block's beginning and end cost, and merging parts, beside that of reading a token: on an H200 a block of two on
/// each multiprocessor reads a token of 128 channels in some 16 ns, begins and ends in some 3 µs, and another launch
/// takes as long.
const BLOCK_TOKENS: usize = 180;
const MERGE_TOKENS: usize = 200;

/// There is at most one part for each so many tokens.
const LEAST_TOKENS: usize = 256;

impl Parts {
    /// For sequences of `len` tokens and so many blocks beside the parts, of which `resident` run at once: as many parts
    /// as make the fewest waves of the shortest blocks.
    fn new(storage: &Storage, len: usize, [blocks, resident]: [usize; 2]) -> Self {
        let most_tokens = MAX_SPLIT_PAGES * storage.page_size;
        let fewest = len.div_ceil(most_tokens).max(1);
        let most = fewest.max(len.div_ceil(LEAST_TOKENS));
        let of = |count: usize| {
            let tokens = len.div_ceil(count).max(1).next_multiple_of(storage.page_size);
            Parts { tokens, count: len.div_ceil(tokens).max(1) }
        };
        let time = |parts: &Parts| {
            let waves = (blocks * parts.count).div_ceil(resident.max(1));
            // A row's lines of a few parts are on their way together.
            let merging = if parts.count == 1 { 0 } else { MERGE_TOKENS + parts.count };
            waves * (parts.tokens + BLOCK_TOKENS) + merging
        };
        // More parts than four waves of blocks only add beginnings.
        let most = most.min(fewest.max((4 * resident).div_ceil(blocks.max(1))));
        (fewest..=most).map(of).min_by_key(time).unwrap_or_else(|| of(fewest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sage_core::ValueFormat;

    #[test]
    fn parts_fill_an_h200_and_no_more() {
        let storage = Storage { head_dim: 128, page_size: 64, values: ValueFormat::Int8 };
        let parts = |len, blocks| {
            let Parts { tokens, count } = Parts::new(&storage, len, [blocks, 264]);
            assert!(tokens.is_multiple_of(64) && tokens * count >= len && tokens <= 64 * MAX_SPLIT_PAGES);
            count
        };
        assert_eq!(parts(4096, 128), 2, "batch 16, 8 heads: one wave");
        assert_eq!(parts(2048, 512), 1, "batch 64: two waves");
        assert_eq!(parts(16384, 8), 32, "batch 1: all multiprocessors");
        assert_eq!(parts(65536, 1024), 8, "a block has so many pages");
        assert_eq!((parts(0, 8), parts(100, 8)), (1, 1));
    }
}
