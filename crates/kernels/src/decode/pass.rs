//! Passes over a KV cache: appending to it, and attention over what it holds.

use sage_core::{Alignment, Band, DType, Error, Result};

use super::{
    CacheAdvanceArgs, CacheAdvanceConfig, CacheAppendArgs, CacheAppendConfig, CacheAttendArgs,
    CacheAttendConfig, PoolTensors, Storage, split_tokens,
};
use crate::combine::{CombineArgs, CombineConfig, PART};
use crate::machine::Machine;
use crate::pass::{Pass, PassBuilder};
use crate::sequence::NO_LIMIT;
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
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
    /// Pages in a row of the tables.
    pub table_stride: usize,
}

impl AttendCall {
    /// The launches (flash decoding): parts of the tokens, then their merging. None where there is no query.
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
        let group = call.group();
        let attend = call.attend();
        let (split, splits) = (call.split(machine), call.splits(machine));
        let head_dim = call.storage.head_dim;

        let mut pass = PassBuilder::new();
        let partial = pass.slot("partial", 4 * splits * rows * head_dim);
        let partial_sums = pass.slot("partial_sums", 4 * PART * splits * rows);
        let log2e = std::f32::consts::LOG2_E;
        let reach = |side: Option<usize>| side.map_or(NO_LIMIT, |n| n.min(NO_LIMIT as usize) as i32);
        pass.launch(attend, move |at, launch| {
            let AttendTensors { q, pool, .. } = at.tensors;
            let args = CacheAttendArgs {
                q: *q,
                pool: *pool,
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
            };
            let grid = attend.grid(splits, call.num_kv_heads, call.q_len, group, call.sequences);
            launch(grid, &args.args(), &[]);
        });
        let combine = CombineConfig { dtype: call.dtype, head_dim, lse: call.lse };
        pass.launch(combine, move |at, launch| {
            let AttendTensors { out, lse, .. } = *at.tensors;
            let args = CombineArgs {
                partial: at.of(partial),
                partial_sums: at.of(partial_sums),
                out,
                lse,
                total_rows: rows as i32,
                q_rows: call.q_len as i32,
                q_heads: call.num_q_heads as i32,
                splits: splits as i32,
            };
            launch(combine.grid(rows), &args.args(), &[]);
        });
        Ok(pass.finish())
    }

    /// Query rows of all heads and sequences.
    pub fn rows(&self) -> usize {
        self.sequences * self.num_q_heads * self.q_len
    }

    /// Parts that the tokens of a sequence are split into, where each is computed by blocks of its own.
    pub fn splits(&self, machine: &Machine) -> usize {
        self.kv_len.div_ceil(self.split(machine)).max(1)
    }

    /// Tokens of a part.
    fn split(&self, machine: &Machine) -> usize {
        let blocks = self.num_kv_heads * self.attend().row_blocks(self.q_len, self.group()) * self.sequences;
        split_tokens(&self.storage, self.kv_len, blocks, machine.multiprocessors)
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    /// The kernel that computes a part.
    fn attend(&self) -> CacheAttendConfig {
        CacheAttendConfig {
            storage: self.storage,
            dtype: self.dtype,
            rows: CacheAttendConfig::rows_for(self.q_len, self.group()),
            softcap: self.logit_softcap.is_some(),
        }
    }
}
