//! What smoothing Q takes from the scores: the products of the means of query blocks with the smoothed keys.

use sage_ptx::{Code, Global, Program, Shared, Val, Var, kernel};

use super::tile_load::{CHUNK, Head, ROWS, RowOrder, Rows, Source, tile_grid};
use crate::kernel::Kernel;
use crate::params::kernel_params;
use crate::sequence::KEY_TILE;

/// Computes `ΔS = ⟨q̄, K − k̄⟩` for each block of queries and each key, in single precision and not scaled: a block for
/// each tile of K, which it reads once for all query heads that share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeltaSConfig {
    /// K as given.
    pub source: Source,
    /// Whether K's mean is subtracted.
    pub smooth_k: bool,
    /// Keys of a tile that are in shared memory at once: all of them, or half, as [`DeltaSConfig::new`] says.
    keys_at_once: usize,
}

kernel_params! {
    /// What a launch of [`DeltaSConfig`] passes. Strides are in elements.
    DeltaSParams, DeltaSArgs {
        /// K as given.
        input: input,
        /// Means of K, `[sequences][kv_heads][padded_dim]`.
        k_mean: [f32],
        /// Means of query blocks, `[sequences][q_heads][q_blocks][padded_dim]`.
        q_mean: [f32],
        /// ΔS, `[sequences][q_heads][q_blocks][max_tiles · 64]`, with the grid's blocks along x. Keys beyond the end of
        /// a tile's sequence have zeros; tiles beyond it are not written.
        delta_s: [f32],
        /// Query heads that share a key head.
        group_size: i32,
        /// Blocks of query means of a sequence.
        q_blocks: i32,
        /// Query rows of a block: those of the longest sequence where one mean is for all rows.
        block_rows: i32,
    }
}

/// Query blocks that are multiplied with a tile at once.
const QUERIES: usize = 16;

/// Threads along the keys, each of which has every so-many-th.
const KEY_THREADS: usize = 16;

/// Channels of a step: 16 bytes of each operand.
const STEP: usize = 4;

impl DeltaSConfig {
    /// For a GPU whose blocks have so much shared memory: of the widest heads Turing's have room for half a tile.
    pub fn new(source: Source, smooth_k: bool, shared_bytes: usize) -> Self {
        let whole = DeltaSConfig { source, smooth_k, keys_at_once: KEY_TILE };
        let bytes = (KEY_TILE + QUERIES) * whole.pitch() as usize * size_of::<f32>();
        if bytes <= shared_bytes { whole } else { DeltaSConfig { keys_at_once: KEY_TILE / 2, ..whole } }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        self.source.threads()
    }

    /// Blocks along x, y and z, where the longest sequence has `max_kv_len` keys.
    pub fn grid(&self, max_kv_len: usize, kv_heads: usize, sequences: usize) -> [u32; 3] {
        tile_grid(max_kv_len, kv_heads, sequences)
    }

    /// Floats between rows in shared memory: 16 bytes more than a row, so that neighbouring rows lie in other banks.
    const fn pitch(&self) -> i32 {
        (self.source.padded_dim() + STEP) as i32
    }

    fn write(&self, code: &Code) {
        let p = DeltaSParams::declare(code);
        let head = Head::new(code, &self.source, &p.input);
        let ([tile, ..], [tiles, ..]) = (code.block_index(), code.grid());
        let q_len = head.sequence.q_len;
        code.exit_when((tile * KEY_TILE as i32).ge(head.len()) | q_len.le(0));

        let keys = code.shared::<f32>("keys", self.keys_at_once * self.pitch() as usize);
        let loaded = head.load(tile, RowOrder::Modulo8);
        self.store_keys(&head, &p, &loaded, keys, 0);

        // The query heads that share a key head are neighbours, so all their blocks are rows of one matrix.
        let rows = p.group_size * p.q_blocks;
        let first_row = head.index.mul_wide(rows);
        let width = self.source.padded_dim() as i32;
        let means = p.q_mean.at(first_row * i64::from(width));
        let row_len = tiles * KEY_TILE as i32;
        let out = p.delta_s.at(first_row * row_len.widen()).at(tile * KEY_TILE as i32);
        let queries = code.shared::<f32>("queries", QUERIES * self.pitch() as usize);
        let quads = width / STEP as i32;
        let (quad, quad_row) = (head.thread & (quads - 1), head.thread >> quads.ilog2() as i32);
        let (key, query) =
            (head.thread & (KEY_THREADS as i32 - 1), head.thread >> KEY_THREADS.ilog2() as i32);
        let query_threads = width / KEY_THREADS as i32;
        let thread_queries = QUERIES / query_threads as usize;
        for part in 0..KEY_TILE / self.keys_at_once {
            if part > 0 {
                code.barrier();
                self.store_keys(&head, &p, &loaded, keys, part);
            }
            let first_key = part * self.keys_at_once;
            code.range_by(0, rows, QUERIES as i32, |first| {
                code.note("means of the next query blocks");
                code.barrier();
                for i in 0..QUERIES as i32 / STEP as i32 {
                    let row = quad_row + i * STEP as i32;
                    let from = first + row;
                    // Packed sequences may have fewer blocks; another mean serves as well where a block has none.
                    let has_mean = from.lt(rows) & ((from % p.q_blocks) * p.block_rows).lt(q_len);
                    let from = has_mean.select(from, 0);
                    let mean =
                        means.at(from.widen() * i64::from(width)).at(quad * STEP as i32).load_vector::<4>();
                    queries.at(row * self.pitch() + quad * STEP as i32).store_vector(mean);
                }
                code.barrier();

                let (of_keys, of_queries) = (keys.at(key * self.pitch()), queries.at(query * self.pitch()));
                let sums = self.products(code, of_keys, of_queries, thread_queries);
                for (j, sums) in sums.iter().enumerate() {
                    let row = first + query + j as i32 * query_threads;
                    code.when(row.lt(rows), || {
                        let out: Global<'_, f32> = out.at(row.widen() * row_len.widen()).at(key);
                        for (i, sum) in sums.iter().enumerate() {
                            out.plus((first_key + i * KEY_THREADS) as i32).store(*sum);
                        }
                    });
                }
            });
        }
    }

    /// A part of the tile minus the mean, in single precision, into shared memory.
    fn store_keys<'k>(
        &self,
        head: &Head<'k>,
        p: &DeltaSParams<'k>,
        rows: &Rows<'k>,
        keys: Shared<'k, f32>,
        part: usize,
    ) {
        let channel = head.chunk * CHUNK as i32;
        let mean = if self.smooth_k { head.channels(p.k_mean) } else { [head.code.constant(0.0); CHUNK] };
        // A thread's rows lie evenly in the tile.
        let of_part = ROWS * self.keys_at_once / KEY_TILE;
        for i in part * of_part..(part + 1) * of_part {
            let row = rows.row(i);
            let to = keys.at(rows.index(i - part * of_part) * self.pitch() + channel);
            let valid = rows.valid(i);
            let smoothed: [Val<'k, f32>; CHUNK] =
                std::array::from_fn(|c| valid.select(row[c] - mean[c], 0.0));
            let [a, b, c, d, e, f, g, h] = smoothed;
            to.store_vector([a, b, c, d]);
            to.plus(4).store_vector([e, f, g, h]);
        }
    }

    /// The thread's products: for each of its queries, those with each of its keys.
    fn products<'k>(
        &self,
        code: &'k Code,
        keys: Shared<'k, f32>,
        queries: Shared<'k, f32>,
        thread_queries: usize,
    ) -> Vec<Vec<Var<'k, f32>>> {
        let query_threads = (QUERIES / thread_queries) as i32;
        let thread_keys = self.keys_at_once / KEY_THREADS;
        let sums: Vec<Vec<Var<'k, f32>>> =
            (0..thread_queries).map(|_| (0..thread_keys).map(|_| code.var(0.0)).collect()).collect();
        code.range_by(0, self.source.padded_dim() as i32, 4 * STEP as i32, |channel| {
            let (keys, queries) = (keys.at(channel), queries.at(channel));
            for step in 0..4 {
                let offset = (step * STEP) as i32;
                let key =
                    |i: usize| keys.plus((i * KEY_THREADS) as i32 * self.pitch() + offset).load_vector::<4>();
                let query = |j: usize| {
                    queries.plus(j as i32 * query_threads * self.pitch() + offset).load_vector::<4>()
                };
                let keys: Vec<[Val<'k, f32>; 4]> = (0..thread_keys).map(key).collect();
                for (j, sums) in sums.iter().enumerate() {
                    let query: [Val<'k, f32>; 4] = query(j);
                    for (sum, key) in sums.iter().zip(&keys) {
                        let products = key.iter().zip(query);
                        sum.set(products.fold(sum.get(), |sum, (&key, query)| key.mul_add(query, sum)));
                    }
                }
            }
        });
        sums
    }
}

impl Kernel for DeltaSConfig {
    fn name(&self) -> String {
        let smooth = if self.smooth_k { "_smooth" } else { "" };
        let halves = if self.keys_at_once < KEY_TILE { "_halves" } else { "" };
        format!("delta_s{smooth}{halves}_{}", self.source.suffix())
    }

    fn description(&self) -> String {
        format!("products of Q's means with K; {}", self.source.description())
    }

    fn head_dim(&self) -> Option<usize> {
        Some(self.source.head_dim)
    }

    fn program(&self) -> Program {
        kernel(&self.name(), self.threads(), |code| self.write(code))
    }
}
