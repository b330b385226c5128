//! Attention of a few queries over a cache (flash decoding): keys and values are read once, where they lie, for all
//! query heads of a key head.
//!
//! A block has up to [`ROWS`] query rows of one key head and a run of its tokens; each of its warps multiplies all rows
//! with tiles of tokens of its own, by an online softmax of its own, and at the end the warps' results are merged. So
//! nothing is exchanged while tokens stream by. Codes go from device memory to the registers of the lanes that multiply
//! them, sixteen bytes at a time, the next tile's while this one is multiplied: the order of a product's depth and of
//! the output's columns is free, and chosen so that each lane's neighbouring bytes are its own operands.
//!
//! INT8 codes are exact in f16, so that scores are products of the queries as given (of bfloat16, scaled by a power of
//! two) with codes, times the token's scale, plus the product of the query with the page's constant. Codes are multiplied
//! as a permutation of bytes leaves them in f16, 1152 too high, and the sums start as much below. Scales of values are
//! part of the probabilities, relative to the largest power of two among them, as f16 has no range for both.

mod codes;
mod merge;
mod queries;
mod softmax;
mod stages;
mod tokens;
mod work;

use half::{bf16, f16};
use sage_core::{DType, ValueFormat};
use sage_ptx::{Code, Half, Program, RoundedElement, Stored, Target, kernel};

use merge::Merge;
use queries::Queries;
use softmax::Softmax;
use stages::Stages;
use tokens::{PageHeads, Tokens};
use work::Work;

use super::{CHUNK, Storage, THREADS, WARPS};
use crate::grid::grid;
use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::params::kernel_params;
use crate::sinks::SinkParams;

/// Query rows of a block: those of a tensor core's product.
pub const ROWS: usize = 16;

/// Pages of a block's run of tokens: their numbers and constants' products with the queries are in shared memory.
pub const MAX_SPLIT_PAGES: usize = 128;

/// Tokens that are one step of the product of probabilities and values; they lie in one page.
const GROUP: usize = 16;

/// Stages of a warp beyond which no more bytes need be on their way.
const MOST_STAGES: usize = 4;

/// Attention over a cache, for all tokens or, of many, for parts of them: [`crate::combine`] merges those.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheAttendConfig {
    /// What the pages hold.
    pub storage: Storage,
    /// Element type of Q and the output: f16 or bf16.
    pub dtype: DType,
    /// Whether scores are capped.
    pub softcap: bool,
    /// Whether a block's tokens are a part of the sequence's.
    pub split: bool,
    /// Whether rows have attention sinks, where tokens are not split.
    pub sinks: bool,
    /// Whether the log-sum-exp is written, where tokens are not split.
    pub lse: bool,
    /// Stages of shared memory that a warp's tiles pass through by bulk copies; 0 where they go straight to registers.
    pub stages: usize,
}

kernel_params! {
    /// What a launch of [`CacheAttendConfig`] passes. Strides are in elements.
    CacheAttendParams, CacheAttendArgs {
        /// Queries.
        q: (tensor 3),
        /// The pool.
        pool: pool,
        /// Output, where tokens are not split.
        out: (tensor 3),
        /// Log-sum-exp, `[batch · q_heads · q_len]`, likewise.
        lse: [f32],
        /// Outputs of the parts, `[splits, batch · q_heads · q_len, head_dim]`.
        partial: [f32],
        /// What each part sums to, `[.., `[`PART`](crate::combine::PART)`]`, as
        /// [`CombineArgs`](crate::combine::CombineArgs) has it.
        partial_sums: [f32],
        /// Pages in a row of the tables.
        table_stride: i32,
        /// Key heads.
        kv_heads: i32,
        /// Query heads of a key head.
        group: i32,
        /// Queries of each sequence.
        q_len: i32,
        /// Sequences.
        sequences: i32,
        /// Tokens of a part: whole pages, at most [`MAX_SPLIT_PAGES`].
        split: i32,
        /// `sm_scale · log₂e`.
        scale: f32,
        /// `softcap · log₂e`.
        cap: f32,
        /// Tokens visible before the diagonal, at most 2³⁰.
        left: i32,
        /// Tokens visible after the diagonal, at most 2³⁰.
        right: i32,
        /// Attention sinks.
        sinks: sinks,
    }
}

impl CacheAttendConfig {
    /// Blocks of query rows for `q_len` queries of `group` heads.
    pub fn row_blocks(q_len: usize, group: usize) -> usize {
        (q_len * group).div_ceil(ROWS)
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, splits: usize, kv_heads: usize, q_len: usize, group: usize, batch: usize) -> [u32; 3] {
        grid(splits, kv_heads * Self::row_blocks(q_len, group) * batch)
    }

    /// Blocks that a multiprocessor should hold: as many as leave registers for sums and tokens on their way.
    pub fn min_blocks(&self) -> u32 {
        if self.storage.pitch() <= 64 { 4 } else { 2 }
    }

    /// Tokens of a warp's tile.
    fn tile(&self) -> usize {
        if self.storage.pitch() <= 128 { 2 * GROUP } else { GROUP }
    }

    /// With as many stages as there is shared memory for, where a GPU has bulk copies and there is room for two.
    pub fn with_stages(self, machine: &Machine) -> Self {
        let of_block = machine.shared_bytes_of_each(self.min_blocks());
        let staged = (2..=MOST_STAGES).rev().map(|stages| CacheAttendConfig { stages, ..self });
        let fits = |config: &Self| machine.has_bulk_copies() && config.shared_bytes() <= of_block;
        staged.into_iter().find(fits).unwrap_or(CacheAttendConfig { stages: 0, ..self })
    }

    /// Bytes of shared memory of a block.
    fn shared_bytes(&self) -> usize {
        let stages = WARPS * self.stages * stages::stage_bytes(&self.storage, self.tile());
        stages + 4 * (queries::memory(self) + MAX_SPLIT_PAGES * (1 + ROWS) + 3 * WARPS * ROWS)
    }

    /// Tokens of a tile that lie side by side in a page.
    fn run(&self) -> usize {
        self.tile().min(self.storage.page_size)
    }

    fn write<H: Half + Stored<Value = H>>(&self, code: &Code) {
        match self.storage.values {
            ValueFormat::BF16 => self.write_with::<H, bf16>(code),
            _ => self.write_with::<H, f16>(code),
        }
    }

    /// `E` is the element of probabilities and values as they are multiplied.
    fn write_with<H: Half + Stored<Value = H>, E: RoundedElement>(&self, code: &Code) {
        code.min_blocks(self.min_blocks());
        let mut p = CacheAttendParams::declare(code);
        p.sinks = self.sinks.then(|| SinkParams::declare(code));
        let work = Work::new(self, code, &p);
        let pages = PageHeads::load(code, &p, &work);
        let queries = Queries::load::<H>(self, code, &p, &work);
        let page_heads = pages.store(code, &work);
        let stages = Stages::new(self, code, &work, page_heads);
        code.barrier();

        let step = (WARPS * self.tile()) as i32;
        let start = work.first_tile(self.run()) + code.warp_index() * self.tile() as i32;
        let tokens = Tokens::new(self, code, &work, page_heads, stages);
        code.note("the first tokens on their way");
        code.when(start.lt(work.last), || tokens.start(start));
        let biases = queries.biases(code, &work, page_heads);
        code.barrier();

        let below = queries.below();
        let softmax = Softmax::new(self, code);
        code.note("tokens stream by");
        code.range_by(start, work.last, step, |start| {
            let places = tokens.places(start);
            let next = start + step;
            let next_places = tokens.places(next);
            let exists = next.lt(work.last);
            tokens.take_keys(start, &places);
            let scores = queries.scores(&tokens, &places, (&below, &biases), &work);
            let value_scale = tokens.value_scale();
            tokens.load_after_scores(&next_places, exists);
            if self.softcap {
                softmax.cap(&scores, p.cap);
            }
            let cut = work.is_cut(start, self.tile());
            code.when(cut, || work.hide(&scores, start));
            let weights = softmax.step(&scores, value_scale, cut, &tokens);
            for part in 0..tokens.value_parts() {
                tokens.take_values(start, &places, part);
                softmax.add_values::<E>(&weights, &tokens, part);
                tokens.load_after_values(part, &places, &next_places, exists);
            }
        });
        let outputs = tokens.stages().map_or(queries.scratch, Stages::memory);
        Merge::new(self, code, &p, &work, outputs).store::<H>(&softmax);
    }
}

impl Kernel for CacheAttendConfig {
    fn name(&self) -> String {
        let mut name = format!("cache_attend_{}_{}", self.dtype, self.storage.suffix());
        for (on, part) in
            [(self.softcap, "_softcap"), (self.sinks, "_sinks"), (self.split, "_split"), (self.lse, "_lse")]
        {
            if on {
                name += part;
            }
        }
        if self.stages > 0 {
            name += &format!("_stages{}", self.stages);
        }
        name
    }

    fn description(&self) -> String {
        let cap = if self.softcap { ", softcap" } else { "" };
        let sinks = if self.sinks { ", sinks" } else { "" };
        let of = self.storage.description();
        let tokens = if self.split { " over parts of the tokens" } else { "" };
        let lse = if self.lse { ", with LSE" } else { "" };
        format!("KV cache: attention{tokens}; {}, {of}{cap}{sinks}{lse}", self.dtype)
    }

    fn oldest_target(&self) -> Target {
        match self.storage.values {
            _ if self.stages > 0 => Target::SM_90,
            // Before Ampere, tensor cores have no bfloat16.
            ValueFormat::BF16 => Target::SM_80,
            _ => Target::SM_75,
        }
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.storage.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), THREADS, |code| match self.dtype {
            DType::BF16 => self.write::<bf16>(code),
            _ => self.write::<f16>(code),
        })
    }
}
