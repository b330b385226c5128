//! New tokens into the pages of a cache.

use half::{bf16, f16};
use sage_core::{DType, ValueFormat};
use sage_ptx::{Code, Global, Half, Program, Shared, Stored, Target, Val, kernel};

use super::{Pool, Quads, Storage, THREADS, WARPS, pack_bytes, scale_of, warp_magnitude};
use crate::grid::{BlockHead, grid};
use crate::integer::magnitude_bits;
use crate::kernel::Kernel;
use crate::params::kernel_params;

/// Quantises new tokens into the pages that block tables name. A block has one head's tokens of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheAppendConfig {
    /// What the pages hold.
    pub storage: Storage,
    /// Element type of K and V: f16 or bf16.
    pub dtype: DType,
}

kernel_params! {
    /// What a launch of [`CacheAppendConfig`] passes. Strides are in elements.
    CacheAppendParams, CacheAppendArgs {
        /// New keys.
        k: (tensor 3),
        /// New values.
        v: (tensor 3),
        /// The pool, with lengths before the new tokens.
        pool: pool,
        /// Pages in a row of the tables.
        table_stride: i32,
        /// New tokens of each sequence.
        tokens: i32,
        /// Key heads.
        kv_heads: i32,
        /// Sequences that get new tokens.
        sequences: i32,
    }
}

/// New tokens of one head of one sequence.
#[derive(Clone, Copy)]
struct New<'k, H> {
    rows: Global<'k, H>,
    stride: Val<'k, i64>,
    /// First of them, counted in the sequence.
    first: Val<'k, i32>,
}

impl<'k, H: Half + Stored<Value = H>> New<'k, H> {
    #[track_caller]
    fn row(&self, token: Val<'k, i32>) -> Global<'k, H> {
        self.rows.at((token - self.first).widen() * self.stride)
    }

    /// Four neighbouring channels, zeros beyond the head.
    #[track_caller]
    fn quad(
        &self,
        code: &'k Code,
        token: Val<'k, i32>,
        quad: Val<'k, i32>,
        head_dim: usize,
    ) -> [Val<'k, f32>; 4] {
        let row = self.row(token);
        std::array::from_fn(|j| {
            let channel = quad * 4 + j as i32;
            let x = code.var(0.0);
            code.when(channel.lt(head_dim as i32), || x.set(row.at(channel).load().to_f32()));
            x.get()
        })
    }
}

impl CacheAppendConfig {
    /// Blocks along x, y and z, where no sequence has more than `tokens` new tokens.
    pub fn grid(&self, tokens: usize, kv_heads: usize, sequences: usize) -> [u32; 3] {
        // They may begin anywhere in a page.
        let pages = tokens.div_ceil(self.storage.page_size) + 1;
        grid(pages, kv_heads * sequences)
    }

    fn write<H: Half + Stored<Value = H>>(&self, code: &Code) {
        let p = CacheAppendParams::declare(code);
        let storage = self.storage;
        let (pitch, page_size) = (storage.pitch(), storage.page_size as i32);
        let [block, ..] = code.block_index();
        let BlockHead { sequence: batch, head } = BlockHead::new(code, p.kv_heads, p.kv_heads * p.sequences);
        let len = p.pool.kv_lens.at(batch).load().named("len");
        let index = (len >> storage.page_bits()) + block;
        let begin = len.max(index * page_size).named("begin");
        let end = (len + p.tokens).min((index + 1) * page_size).named("end");
        code.exit_when(begin.ge(end));

        let pool = Pool { storage, kv_heads: p.kv_heads, parts: p.pool };
        let table = p.pool.tables.at(batch * p.table_stride);
        let k = New {
            rows: p.k.start.cast::<H>().at(p.k.head(batch, head)),
            stride: p.k.row_stride(),
            first: len,
        };
        let v = New {
            rows: p.v.start.cast::<H>().at(p.v.head(batch, head)),
            stride: p.v.row_stride(),
            first: len,
        };
        let page = pool.head(table.at(index).load(), head).named("page");
        let constant = code.shared::<f32>("constant", pitch);
        let begins = begin.eq(index * page_size);
        code.if_else(
            begins,
            || self.choose_constant(code, &pool, table, head, &k, end, page, constant),
            || {
                code.range_by(code.thread(), pitch as i32, THREADS as i32, |c| {
                    constant.at(c).store(pool.constants_of(page).at(c).load());
                });
            },
        );
        code.barrier();

        code.note("quantise: a warp has a token");
        let lane = code.lane_index();
        let quads = Quads::new(pitch);
        code.range_by(begin + code.warp_index(), end, WARPS as i32, |token| {
            let row = pool.row(page, token).named("row");
            let centred: Vec<_> = (0..quads.count)
                .map(|i| {
                    let (quad, exists) = quads.quad(lane, i);
                    let x = k.quad(code, token, quad, storage.head_dim);
                    // Channels beyond the head have the constant 0.
                    let at = constant.at(exists.select(quad, 0) * 4);
                    let c = at.load_vector::<4>();
                    std::array::from_fn(|j| exists.select(x[j] - c[j], 0.0))
                })
                .collect();
            let scale = int8(code, &quads, lane, &centred, pool.keys_of(row));
            code.when(lane.eq(0), || pool.parts.key_scales.at(row).store(scale));

            let x: Vec<_> = (0..quads.count)
                .map(|i| v.quad(code, token, quads.quad(lane, i).0, storage.head_dim))
                .collect();
            let to = pool.values_of(row);
            let scale = match storage.values {
                ValueFormat::F16 => halves::<f16>(code, &quads, lane, &x, to.cast()),
                ValueFormat::BF16 => halves::<bf16>(code, &quads, lane, &x, to.cast()),
                ValueFormat::Int8 => Some(int8(code, &quads, lane, &x, to)),
                ValueFormat::Fp8E4M3 => Some(e4m3(code, &quads, lane, &x, to)),
            };
            if let Some(scale) = scale {
                code.when(lane.eq(0), || pool.parts.value_scales.at(row).store(scale));
            }
        });
    }

    /// The mean of the tokens, up to a page of them, that end before `end`.
    #[allow(clippy::too_many_arguments)] // where everything lies
    fn choose_constant<'k, H: Half + Stored<Value = H>>(
        &self,
        code: &'k Code,
        pool: &Pool<'k>,
        table: Global<'k, i32>,
        head: Val<'k, i32>,
        k: &New<'k, H>,
        end: Val<'k, i32>,
        page: Val<'k, i32>,
        constant: Shared<'k, f32>,
    ) {
        code.note("constant: which rows are finite");
        let storage = self.storage;
        let first = (end - storage.page_size as i32).max(0).named("first");
        let count = end - first;
        let finite = code.shared::<i32>("finite", storage.page_size);
        let infinity = f32::INFINITY.to_bits() as i32;
        let stored_row = |token: Val<'k, i32>| {
            let page = pool.head(table.at(token >> storage.page_bits()).load(), head);
            (page, pool.row(page, token))
        };
        code.range_by(code.warp_index(), count, WARPS as i32, |i| {
            let token = first + i;
            let largest = code.var(0i32);
            code.if_else(
                token.ge(k.first),
                || {
                    code.range_by(code.lane_index(), storage.head_dim as i32, 32, |c| {
                        let x = k.row(token).at(c).load().to_f32();
                        largest.set(largest.get().max(magnitude_bits(x)));
                    });
                },
                || largest.set(magnitude_bits(pool.parts.key_scales.at(stored_row(token).1).load())),
            );
            let largest = largest.get().warp_max();
            code.when(code.lane_index().eq(0), || {
                finite.at(i).store(largest.lt(infinity).select(1, 0));
            });
        });
        code.barrier();

        code.note("constant: means");
        code.range_by(code.thread(), storage.pitch() as i32, THREADS as i32, |c| {
            let (sum, counted) = (code.var(0.0).named("sum"), code.var(0i32).named("counted"));
            code.when(c.lt(storage.head_dim as i32), || {
                code.range(0, count, |i| {
                    let token = first + i;
                    code.when(finite.at(i).load().ne(0), || {
                        counted.set(counted.get() + 1);
                        code.if_else(
                            token.ge(k.first),
                            || sum.set(sum.get() + k.row(token).at(c).load().to_f32()),
                            || {
                                let (page, row) = stored_row(token);
                                let key = pool.keys_of(row).cast::<i8>().at(c).load().to_f32();
                                let scale = pool.parts.key_scales.at(row).load();
                                let constant = pool.constants_of(page).at(c).load();
                                sum.set(sum.get() + key.mul_add(scale, constant));
                            },
                        );
                    });
                });
            });
            let mean = sum.get() / counted.get().max(1).to_f32();
            constant.at(c).store(mean);
            pool.constants_of(page).at(c).store(mean);
        });
    }
}

impl Kernel for CacheAppendConfig {
    fn name(&self) -> String {
        format!("cache_append_{}_{}", self.dtype, self.storage.suffix())
    }

    fn description(&self) -> String {
        format!("KV cache: appends tokens; {}, {}", self.dtype, self.storage.description())
    }

    fn oldest_target(&self) -> Target {
        if self.storage.values == ValueFormat::Fp8E4M3 { Target::SM_89 } else { Target::SM_75 }
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

/// Stores a row as INT8; its scale.
#[track_caller]
fn int8<'k>(
    code: &'k Code,
    quads: &Quads,
    lane: Val<'k, i32>,
    row: &[[Val<'k, f32>; 4]],
    to: Global<'k, u32>,
) -> Val<'k, f32> {
    let scale = scale_of(warp_magnitude(code, row), 127.0);
    let used = scale.gt(0.0);
    for (i, x) in row.iter().enumerate() {
        let (quad, exists) = quads.quad(lane, i);
        let codes = x.map(|x| used.select((x / scale).round_to_i32().max(-127).min(127), 0));
        code.when(exists, || to.at(quad).store(pack_bytes(codes)));
    }
    scale
}

/// Stores a row as E4M3; its scale.
#[track_caller]
fn e4m3<'k>(
    code: &'k Code,
    quads: &Quads,
    lane: Val<'k, i32>,
    row: &[[Val<'k, f32>; 4]],
    to: Global<'k, u32>,
) -> Val<'k, f32> {
    let scale = scale_of(warp_magnitude(code, row), sage_core::oracle::E4M3_MAX);
    let used = scale.gt(0.0);
    for (i, x) in row.iter().enumerate() {
        let (quad, exists) = quads.quad(lane, i);
        let codes = Val::pack_e4m3(x.map(|x| used.select(x / scale, 0.0)));
        code.when(exists, || to.at(quad).store(codes));
    }
    scale
}

/// Stores a row in 16 bits; there is no scale.
#[track_caller]
fn halves<'k, H: Half + Stored<Value = H>>(
    code: &'k Code,
    quads: &Quads,
    lane: Val<'k, i32>,
    row: &[[Val<'k, f32>; 4]],
    to: Global<'k, H>,
) -> Option<Val<'k, f32>> {
    for (i, x) in row.iter().enumerate() {
        let (quad, exists) = quads.quad(lane, i);
        code.when(exists, || {
            x.iter().enumerate().for_each(|(j, x)| to.at(quad * 4).plus(j as i32).store(x.narrow::<H>()));
        });
    }
    None
}
