//! Attention of a few queries over a cache (flash decoding): keys and values are read once, where they lie.
//!
//! A block has some query rows of one key head and a run of its tokens. Neighbouring lanes hold a token together, sixteen
//! channels each; each such group of lanes goes through tokens of its own with an online softmax of its own, and the
//! groups' results are merged at the end. So nothing is exchanged while tokens stream by but the sums of dot products.
//!
//! Queries are 16-bit integers in two bytes: twice the dot products, which memory hides, leave no error of theirs.

use half::{bf16, f16};
use sage_core::{DType, ValueFormat};
use sage_ptx::{Code, Half, Program, Shared, Stored, Val, Var, kernel};

use super::{CHUNK, Pool, Quads, Storage, THREADS, WARPS, pack_bytes};
use crate::combine::PART;
use crate::grid::{BlockHead, grid};
use crate::integer::magnitude_bits;
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
        /// Pages of each sequence, `[batch, table_stride]`.
        tables: [i32],
        /// Tokens of each sequence.
        kv_lens: [i32],
        /// The pool's keys.
        keys: [u32],
        /// The pool's scales of keys.
        key_scales: [f32],
        /// The pool's constants.
        constants: [f32],
        /// The pool's values.
        values: [u32],
        /// The pool's scales of values.
        value_scales: [f32],
        /// Outputs of the parts, `[splits, batch · q_heads · q_len, head_dim]`.
        partial: [f32],
        /// Of each, `[.., `[`PART`]`]`, as [`CombineArgs`](crate::combine::CombineArgs) has them.
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

/// One query row.
struct Row<'k> {
    /// Largest score so far, in base 2.
    max: Var<'k, f32>,
    /// Sum of probabilities relative to it.
    sum: Var<'k, f32>,
    /// This lane's channels of the output.
    out: Vec<Var<'k, f32>>,
    /// Tokens that it sees.
    start: Val<'k, i32>,
    end: Val<'k, i32>,
    /// Index among all rows, and whether it exists.
    index: Val<'k, i32>,
    exists: Val<'k, bool>,
}

/// What the block's rows look like in shared memory.
#[derive(Clone, Copy)]
struct Queries<'k> {
    wide: Shared<'k, f32>,
    upper: Shared<'k, u32>,
    lower: Shared<'k, u32>,
    scales: Shared<'k, f32>,
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
        let storage = self.storage;
        let (pitch, bits) = (storage.pitch(), storage.page_bits());
        let [split, ..] = code.block_index();
        let row_blocks = (p.q_len * p.group).div_ceil(self.rows);
        let heads_and_blocks = p.kv_heads * row_blocks;
        let number = BlockHead::new(code, heads_and_blocks, heads_and_blocks * p.sequences);
        let batch = number.sequence;
        let (head, block) = (number.head / row_blocks, number.head % row_blocks);
        let len = p.kv_lens.at(batch).load().named("len");
        let pool = Pool {
            storage,
            kv_heads: p.kv_heads,
            keys: p.keys,
            key_scales: p.key_scales,
            constants: p.constants,
            values: p.values,
            value_scales: p.value_scales,
        };

        code.note("which rows, which tokens");
        let of_head = p.q_len * p.group;
        let heads = p.kv_heads * p.group;
        let places: Vec<_> = (0..self.rows)
            .map(|r| {
                let row = block * self.rows as i32 + r as i32;
                let exists = row.lt(of_head);
                let row = row.min(of_head - 1);
                // Neighbouring rows are heads of one query, which see the same tokens.
                let (i, q_head) = (row / p.group, head * p.group + row % p.group);
                (i, q_head, exists)
            })
            .collect();
        let rows: Vec<Row<'k>> = places
            .iter()
            .map(|&(i, q_head, exists)| {
                let diagonal = i + (len - p.q_len);
                Row {
                    // Finite, so that differences with it are numbers also before the first visible token.
                    max: code.var(f32::MIN).named("max"),
                    sum: code.var(0.0).named("sum"),
                    out: (0..CHUNK).map(|_| code.var(0.0).named("out")).collect(),
                    start: (diagonal - p.left).max(0),
                    end: (diagonal + p.right + 1).min(len),
                    index: (batch * heads + q_head) * p.q_len + i,
                    exists,
                }
            })
            .collect();
        let bound = |of: fn(&Row<'k>) -> Val<'k, i32>,
                     pick: fn(Val<'k, i32>, Val<'k, i32>) -> Val<'k, i32>| {
            rows.iter().map(of).reduce(pick).unwrap_or(len)
        };
        let first = (split * p.split).max(bound(|row| row.start, Val::min)).named("first");
        let last = ((split + 1) * p.split).min(bound(|row| row.end, Val::max)).named("last");
        let first_page = first >> bits;
        let pages = last.gt(first).select(((last - 1) >> bits) - first_page + 1, 0).named("pages");

        let queries = Queries {
            wide: code.shared("q_wide", self.rows * pitch),
            upper: code.shared("q_upper", self.rows * pitch / 4),
            lower: code.shared("q_lower", self.rows * pitch / 4),
            scales: code.shared("q_scales", self.rows),
        };
        for (r, &(i, q_head, _)) in places.iter().enumerate() {
            code.when(code.warp_index().eq((r % WARPS) as i32), || {
                let row = p.q.start.cast::<H>().at(p.q.head(batch, q_head) + i.widen() * p.q.row_stride());
                let load = |channel: Val<'k, i32>| row.at(channel).load().to_f32() * p.scale;
                self.quantize_query(code, r, load, &queries);
            });
        }
        // A page's index among the cache's heads.
        let page_heads = code.shared::<i32>("page_heads", MAX_SPLIT_PAGES);
        let table = p.tables.at(batch * p.table_stride);
        code.range_by(code.thread(), pages, THREADS as i32, |i| {
            page_heads.at(i).store(pool.head(table.at(first_page + i).load(), head));
        });
        code.barrier();

        let lanes = self.lanes();
        let groups = (THREADS as usize / lanes) as i32;
        let group = code.thread() >> lanes.ilog2() as i32;
        let member = code.thread() & (lanes as i32 - 1);
        let active = member.lt((pitch / CHUNK) as i32);
        // Lanes without channels read those of the first, and multiply them by queries of zeros.
        let chunk = active.select(member, 0).named("chunk");

        code.note("products of the pages' constants with the queries");
        let biases = code.shared::<f32>("biases", self.rows * MAX_SPLIT_PAGES);
        code.range_by(0, pages, groups, |start| {
            let page = (start + group).min(pages - 1);
            let constants = pool.constants_of(page_heads.at(page).load()).at(chunk * CHUNK as i32);
            let constants: Vec<_> =
                (0..WORDS).flat_map(|i| constants.plus(4 * i as i32).load_vector::<4>()).collect();
            for r in 0..self.rows {
                let q = queries.wide.at(chunk * CHUNK as i32).plus((r * pitch) as i32);
                let q = (0..WORDS).flat_map(|i| q.plus(4 * i as i32).load_vector::<4>());
                let zero = code.constant(0.0);
                let sum = q.zip(&constants).fold(zero, |sum, (q, c)| q.mul_add(*c, sum));
                let sum = active.select(sum, 0.0).reduce_lanes(lanes as i32 - 1, |a, b| a + b);
                code.when(member.eq(0) & (start + group).lt(pages), || {
                    biases.at(page).plus((r * MAX_SPLIT_PAGES) as i32).store(sum);
                });
            }
        });
        code.barrier();

        let integers: Vec<_> = (0..self.rows)
            .map(|r| {
                let words = |of: Shared<'k, u32>| {
                    let words = of.at(chunk * WORDS as i32).plus((r * pitch / 4) as i32).load_vector::<4>();
                    words.map(|word| active.select(word, 0))
                };
                (words(queries.upper), words(queries.lower), queries.scales.plus(r as i32).load())
            })
            .collect();

        code.note("tokens stream by");
        code.range_by(first, last, groups * IN_FLIGHT as i32, |start| {
            let tokens: Vec<_> = (0..IN_FLIGHT as i32)
                .map(|u| {
                    let token = start + group + u * groups;
                    let exists = token.lt(last);
                    let read = token.min(last - 1);
                    let page = (read >> bits) - first_page;
                    let row = pool.row(page_heads.at(page).load(), read);
                    let keys = pool.keys_of(row).at(chunk * WORDS as i32).load_vector::<4>();
                    (token, exists, page, row, keys)
                })
                .collect();
            let values: Vec<_> = tokens.iter().map(|token| self.values(&pool, token.3, chunk)).collect();
            let scales: Vec<_> = tokens.iter().map(|token| pool.key_scales.at(token.3).load()).collect();
            for (r, row) in rows.iter().enumerate() {
                let (upper, lower, q_scale) = &integers[r];
                let scores: Vec<_> = tokens
                    .iter()
                    .zip(&scales)
                    .map(|((token, exists, page, _, keys), k_scale)| {
                        let dot = |q: &[Val<'k, u32>; 4]| {
                            let zero = code.constant(0i32);
                            q.iter().zip(keys).fold(zero, |sum, (q, k)| q.dot_bytes(*k, sum))
                        };
                        let sum = (dot(upper) << 8) + dot(lower);
                        let sum = sum.reduce_lanes(lanes as i32 - 1, |a, b| a + b);
                        let bias = biases.at(*page).plus((r * MAX_SPLIT_PAGES) as i32).load();
                        let score = sum.to_f32().mul_add(*q_scale * *k_scale, bias);
                        let score = if self.softcap { cap(score, p.cap) } else { score };
                        let visible = *exists & token.ge(row.start) & token.lt(row.end);
                        (visible.select(score, f32::NEG_INFINITY), visible)
                    })
                    .collect();
                let max = scores.iter().fold(row.max.get(), |max, (score, _)| max.max(*score));
                let rescale = (row.max.get() - max).exp2();
                row.max.set(max);
                let p: Vec<_> = scores.iter().map(|(score, _)| (*score - max).exp2()).collect();
                let sum = p.iter().fold(row.sum.get() * rescale, |sum, p| sum + *p);
                row.sum.set(sum);
                row.out.iter().for_each(|out| out.set(out.get() * rescale));
                for ((p, (_, visible)), (v, scale)) in p.iter().zip(&scores).zip(&values) {
                    // A hidden row's scale may be NaN.
                    let weight = scale.map_or(*p, |scale| visible.select(*p * scale, 0.0));
                    for (out, v) in row.out.iter().zip(v) {
                        out.set(v.mul_add(weight, out.get()));
                    }
                }
            }
        });

        self.merge(code, &p, split, &rows, lanes, member);
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
        let zero = code.constant(0i32);
        let max = row.iter().flatten().fold(zero, |max, x| max.max(magnitude_bits(*x))).warp_max();
        let finite = max.lt(f32::INFINITY.to_bits() as i32);
        let scale = finite.select(max.reinterpret::<f32>() / QUERY_MAX, f32::NAN);
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
    fn values<'k>(
        &self,
        pool: &Pool<'k>,
        row: Val<'k, i32>,
        chunk: Val<'k, i32>,
    ) -> (Vec<Val<'k, f32>>, Option<Val<'k, f32>>) {
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
        let scale = format.is_scaled().then(|| pool.value_scales.at(row).load() * unit);
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
