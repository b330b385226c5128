//! Attention of a few queries over a cache (flash decoding): keys and values are read once, where they lie.
//!
//! A block has some query rows of one key head and a run of its tokens. Neighbouring lanes hold a token together,
//! sixteen channels each; each such group of lanes goes through tokens of its own with an online softmax of its own,
//! and the groups' results are merged at the end. So nothing is exchanged while tokens stream by but the sums of dot
//! products.
//!
//! Queries are 16-bit integers in two bytes: twice the dot products, which memory hides, leave no error of theirs.

mod tokens;
mod work;

use half::{bf16, f16};
use sage_core::{DType, ValueFormat};
use sage_ptx::{Code, Half, Program, Shared, Stored, Val, kernel};

use tokens::{Lanes, Queries, Tokens, Values};
use work::{Row, Work};

use super::{CHUNK, Pool, Quads, Storage, THREADS, WARPS, pack_bytes, scale_of, warp_magnitude};
use crate::combine::PART;
use crate::grid::grid;
use crate::kernel::Kernel;
use crate::params::kernel_params;

/// Largest magnitude of a query's integer: its upper byte after rounding is at most 127.
const QUERY_MAX: f32 = 32639.0;

/// Pages of a block's run of tokens: their numbers and constants' products with the queries are in shared memory.
pub const MAX_SPLIT_PAGES: usize = 64;

/// Tokens that a group of lanes has in flight: enough bytes for the latency of memory, in registers that there are.
const IN_FLIGHT: usize = 4;

/// Words of a chunk of keys.
const WORDS: usize = CHUNK / 4;

/// Attention over a cache, for parts of the tokens: [`crate::combine`] merges them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheAttendConfig {
    /// What the pages hold.
    pub storage: Storage,
    /// Element type of Q: f16 or bf16.
    pub dtype: DType,
    /// Query rows of a block: 1, 2 or 4.
    pub rows: usize,
    /// Whether scores are capped.
    pub softcap: bool,
}

kernel_params! {
    /// What a launch of [`CacheAttendConfig`] passes. Strides are in elements.
    CacheAttendParams, CacheAttendArgs {
        /// Queries.
        q: (tensor 3),
        /// The pool.
        pool: pool,
        /// Outputs of the parts, `[splits, batch · q_heads · q_len, head_dim]`.
        partial: [f32],
        /// What each part sums to, `[.., `[`PART`]`]`, as [`CombineArgs`](crate::combine::CombineArgs) has it.
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
    }
}

/// Tokens of a part, so that about two blocks come to each multiprocessor, where there are so many tokens.
pub fn split_tokens(
    storage: &Storage,
    max_kv_len: usize,
    other_blocks: usize,
    multiprocessors: usize,
) -> usize {
    let parts = (2 * multiprocessors).div_ceil(other_blocks.max(1));
    let tokens = max_kv_len.div_ceil(parts.max(1)).max(256).next_multiple_of(storage.page_size);
    tokens.min(MAX_SPLIT_PAGES * storage.page_size)
}

impl CacheAttendConfig {
    /// Rows of a block for `q_len` queries of `group` heads.
    pub fn rows_for(q_len: usize, group: usize) -> usize {
        match q_len * group {
            0 | 1 => 1,
            2 => 2,
            _ => 4,
        }
    }

    /// Blocks of query rows.
    pub fn row_blocks(&self, q_len: usize, group: usize) -> usize {
        (q_len * group).div_ceil(self.rows)
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, splits: usize, kv_heads: usize, q_len: usize, group: usize, batch: usize) -> [u32; 3] {
        grid(splits, kv_heads * self.row_blocks(q_len, group) * batch)
    }

    /// Lanes that hold a token together.
    fn lanes(&self) -> usize {
        (self.storage.pitch() / CHUNK).next_power_of_two()
    }

    fn write<'k, H: Half + Stored<Value = H>>(&self, code: &'k Code) {
        let p = CacheAttendParams::declare(code);
        let work = Work::new(self, code, &p);
        let queries = Queries::new(self, code);
        for (r, &(i, q_head)) in work.queries.iter().enumerate() {
            code.when(code.warp_index().eq((r % WARPS) as i32), || {
                let start = p.q.head(work.batch, q_head) + i.widen() * p.q.row_stride();
                let row = p.q.start.cast::<H>().at(start);
                let load = |channel: Val<'k, i32>| row.at(channel).load().to_f32() * p.scale;
                self.quantize_query(code, r, load, &queries);
            });
        }
        // Index of each page's head among the cache's.
        let page_heads = code.shared::<i32>("page_heads", MAX_SPLIT_PAGES);
        let table = p.pool.tables.at(work.batch * p.table_stride);
        code.range_by(code.thread(), work.pages, THREADS as i32, |i| {
            page_heads.at(i).store(work.pool.head(table.at(work.first_page + i).load(), work.head));
        });
        code.barrier();

        let lanes = Lanes::new(self, code);
        let biases = self.biases(code, &work, &lanes, &queries, page_heads);
        code.barrier();

        let integers: Vec<_> = (0..self.rows).map(|r| queries.integers(r, &lanes)).collect();
        code.note("tokens stream by");
        let step = lanes.groups * IN_FLIGHT as i32;
        code.range_by(work.first, work.last, step, |start| {
            let tokens = Tokens::load(self, &work, &lanes, page_heads, start);
            for (r, row) in work.rows.iter().enumerate() {
                let biases = biases.plus((r * MAX_SPLIT_PAGES) as i32);
                let cap = self.softcap.then_some(p.cap);
                tokens.add_to(row, &tokens.scores(row, &integers[r], biases, &lanes, cap));
            }
        });

        self.merge(code, &p, work.split, &work.rows, lanes.count, lanes.member);
    }

    /// Products of the pages' constants with the queries, `[rows][MAX_SPLIT_PAGES]`.
    fn biases<'k>(
        &self,
        code: &'k Code,
        work: &Work<'k>,
        lanes: &Lanes<'k>,
        queries: &Queries<'k>,
        page_heads: Shared<'k, i32>,
    ) -> Shared<'k, f32> {
        code.note("products of the pages' constants with the queries");
        let biases = code.shared::<f32>("biases", self.rows * MAX_SPLIT_PAGES);
        code.range_by(0, work.pages, lanes.groups, |start| {
            let page = (start + lanes.group).min(work.pages - 1);
            let constants = work.pool.constants_of(page_heads.at(page).load());
            let constants = constants.at(lanes.chunk * CHUNK as i32);
            let constants: Vec<_> =
                (0..WORDS).flat_map(|i| constants.plus(4 * i as i32).load_vector::<4>()).collect();
            for r in 0..self.rows {
                let row = (r * self.storage.pitch()) as i32;
                let q = queries.wide.at(lanes.chunk * CHUNK as i32).plus(row);
                let q = (0..WORDS).flat_map(|i| q.plus(4 * i as i32).load_vector::<4>());
                let zero = code.constant(0.0);
                let sum = q.zip(&constants).fold(zero, |sum, (q, c)| q.mul_add(*c, sum));
                let sum = lanes.sum(lanes.active.select(sum, 0.0));
                code.when(lanes.member.eq(0) & (start + lanes.group).lt(work.pages), || {
                    biases.at(page).plus((r * MAX_SPLIT_PAGES) as i32).store(sum);
                });
            }
        });
        biases
    }

    /// A query row into shared memory, by one warp.
    fn quantize_query<'k>(
        &self,
        code: &'k Code,
        r: usize,
        load: impl Fn(Val<'k, i32>) -> Val<'k, f32>,
        queries: &Queries<'k>,
    ) {
        let (pitch, lane) = (self.storage.pitch(), code.lane_index());
        let quads = Quads::new(pitch);
        let row: Vec<[Val<'k, f32>; 4]> = (0..quads.count)
            .map(|i| {
                let (quad, _) = quads.quad(lane, i);
                std::array::from_fn(|j| {
                    let channel = quad * 4 + j as i32;
                    let x = code.var(0.0);
                    code.when(channel.lt(self.storage.head_dim as i32), || x.set(load(channel)));
                    x.get()
                })
            })
            .collect();
        let scale = scale_of(warp_magnitude(code, &row), QUERY_MAX);
        let used = scale.gt(0.0);
        for (i, x) in row.iter().enumerate() {
            let (quad, exists) = quads.quad(lane, i);
            code.when(exists, || {
                let integers = x.map(|x| used.select((x / scale).round_to_i32(), 0));
                let upper = integers.map(|x| (x + 128) >> 8);
                let lower: [_; 4] = std::array::from_fn(|j| integers[j] - (upper[j] << 8));
                queries.wide.at(quad * 4).plus((r * pitch) as i32).store_vector(*x);
                queries.upper.at(quad).plus((r * pitch / 4) as i32).store(pack_bytes(upper));
                queries.lower.at(quad).plus((r * pitch / 4) as i32).store(pack_bytes(lower));
            });
        }
        code.when(lane.eq(0), || queries.scales.plus(r as i32).store(scale));
    }

    /// A chunk of a row's values, and its scale.
    fn values<'k>(&self, pool: &Pool<'k>, row: Val<'k, i32>, chunk: Val<'k, i32>) -> Values<'k> {
        let format = self.storage.values;
        let words_of_chunk = (CHUNK * format.bytes() / 4) as i32;
        let from = pool.values_of(row).at(chunk * words_of_chunk);
        let words: Vec<_> =
            (0..words_of_chunk / 4).flat_map(|i| from.plus(4 * i).load_vector::<4>()).collect();
        let numbers = words.into_iter().flat_map(|word| match format {
            ValueFormat::F16 => word.split::<f16>().map(|x| x.to_f32()).to_vec(),
            ValueFormat::BF16 => word.split::<bf16>().map(|x| x.to_f32()).to_vec(),
            ValueFormat::Int8 => int8_values(word).to_vec(),
            ValueFormat::Fp8E4M3 => e4m3_values(word).to_vec(),
        });
        let unit = if format == ValueFormat::Fp8E4M3 { E4M3_UNIT } else { 1.0 };
        let scale = format.is_scaled().then(|| pool.parts.value_scales.at(row).load() * unit);
        (numbers.collect(), scale)
    }

    /// The rows of all groups of lanes together, as a part's output.
    fn merge<'k>(
        &self,
        code: &'k Code,
        p: &CacheAttendParams<'k>,
        split: Val<'k, i32>,
        rows: &[Row<'k>],
        lanes: usize,
        member: Val<'k, i32>,
    ) {
        code.note("merge: the groups of a warp");
        let width = lanes * CHUNK;
        let maxima = code.shared::<f32>("maxima", self.rows * WARPS);
        let sums = code.shared::<f32>("sums", self.rows * WARPS);
        let outs = code.shared::<f32>("outs", self.rows * WARPS * width);
        let (warp, lane) = (code.warp_index(), code.lane_index());
        let others = 31 & !(lanes as i32 - 1);
        for (r, row) in rows.iter().enumerate() {
            let max = row.max.get().reduce_lanes(others, |a, b| a.max(b));
            let weight = (row.max.get() - max).exp2();
            let sum = (row.sum.get() * weight).reduce_lanes(others, |a, b| a + b);
            let out: Vec<_> =
                row.out.iter().map(|out| (out.get() * weight).reduce_lanes(others, |a, b| a + b)).collect();
            code.when(lane.lt(lanes as i32), || {
                let at = warp + (r * WARPS) as i32;
                code.when(lane.eq(0), || {
                    maxima.at(at).store(max);
                    sums.at(at).store(sum);
                });
                let to = outs.at(at * width as i32 + member * CHUNK as i32);
                for i in 0..WORDS {
                    to.plus(4 * i as i32).store_vector(std::array::from_fn::<_, 4, _>(|j| out[4 * i + j]));
                }
            });
        }
        code.barrier();

        code.note("merge: the warps");
        let total_rows = p.kv_heads * p.group * p.q_len * p.sequences;
        for (r, row) in rows.iter().enumerate() {
            let at = |warp: usize| (r * WARPS + warp) as i32;
            let warps: Vec<_> = (0..WARPS).map(|w| maxima.plus(at(w)).load()).collect();
            let Some(max) = warps.iter().copied().reduce(Val::max) else { return };
            let weights: Vec<_> = warps.iter().map(|m| (*m - max).exp2()).collect();
            let zero = code.constant(0.0);
            let sum = weights
                .iter()
                .enumerate()
                .fold(zero, |sum, (w, weight)| sums.plus(at(w)).load().mul_add(*weight, sum));
            let inverse = sum.eq(0.0).select(0.0, sum.recip());
            let line = split.mul_wide(total_rows) + row.index.widen();
            code.when(row.exists, || {
                code.range_by(code.thread(), self.storage.head_dim as i32, THREADS as i32, |c| {
                    let out = weights.iter().enumerate().fold(zero, |out, (w, weight)| {
                        outs.at(c).plus(at(w) * width as i32).load().mul_add(*weight, out)
                    });
                    let to = p.partial.at(line * self.storage.head_dim as i64).at(c);
                    to.store(out * inverse);
                });
                code.when(code.thread().eq(0), || {
                    p.partial_sums.at(line * PART as i64).store_vector([max, sum, sum, zero]);
                });
            });
        }
    }
}

impl Kernel for CacheAttendConfig {
    fn name(&self) -> String {
        let cap = if self.softcap { "_softcap" } else { "" };
        format!("cache_attend_{}_{}_r{}{cap}", self.dtype, self.storage.suffix(), self.rows)
    }

    fn description(&self) -> String {
        let cap = if self.softcap { ", softcap" } else { "" };
        let of = self.storage.description();
        format!("KV cache: attention of {} query rows a block; {}, {of}{cap}", self.rows, self.dtype)
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

/// `cap · tanh(score / cap)` in base 2, from the exponential: the unit's own tanh is too coarse for scores.
#[track_caller]
fn cap<'k>(score: Val<'k, f32>, cap: Val<'k, f32>) -> Val<'k, f32> {
    let exponential = (score / cap * (2.0 * std::f32::consts::LOG2_E)).exp2();
    (exponential + 1.0).recip().mul_add(-2.0, 1.0) * cap
}

/// What the numbers of [`e4m3_values`] must be multiplied by.
const E4M3_UNIT: f32 = 256.0;

/// Four E4M3 values, times 2⁻⁸: their bits are those of halves, moved. (Targets before sm_89 have no conversion.)
#[track_caller]
fn e4m3_values(word: Val<'_, u32>) -> [Val<'_, f32>; 4] {
    let pair = |j: u32| {
        // Each code in the upper byte of a half.
        let high = word.permute_bytes(0, (j + 1) << 12 | 4 << 8 | j << 4 | 4);
        ((high & 0x8000_8000) | ((high & 0x7f00_7f00) >> 1)).split::<f16>().map(|x| x.to_f32())
    };
    let ([a, b], [c, d]) = (pair(0), pair(2));
    [a, b, c, d]
}

/// Four INT8 values: a byte above 2²³ is a single that needs no conversion.
#[track_caller]
fn int8_values(word: Val<'_, u32>) -> [Val<'_, f32>; 4] {
    let unsigned = word ^ 0x8080_8080;
    std::array::from_fn(|j| {
        let bits = unsigned.permute_bytes(0x4b00_0000, 0x7440 | j as u32);
        bits.reinterpret::<f32>() - 8_388_736.0
    })
}
