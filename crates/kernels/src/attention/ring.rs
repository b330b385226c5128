//! Tiles of K and V on their way from device memory: a ring of stages in shared memory, filled ahead of their use.

use sage_core::{IntBits, IntQuantizer};
use sage_ptx::{CHUNK_BYTES, Code, FragmentSource, Global, Shared, SharedTile, Val, Var};

use super::config::{AttentionConfig, AttentionParams, Scores, ValueSource, Values};
use super::place::Place;
use crate::preprocess::SeenKeys;

/// The ring of both operands.
pub(super) struct Ring<'k, 'c> {
    code: &'k Code,
    config: &'c AttentionConfig,
    keys: Tiles<'k>,
    values: Tiles<'k>,
    shared: Shared<'k, u8>,
    /// Stage of the tile in use.
    stage: Var<'k, i32>,
}

/// One operand's tiles: their stages, and where this thread's part of the next one comes from.
struct Tiles<'k> {
    stages: SharedTile<'k>,
    /// Where the lane's fragments of the first stage lie.
    fragments: FragmentSource<'k>,
    /// Rows of a tile, and 16-byte chunks of a row that hold channels.
    rows: usize,
    chunks: usize,
    source: Source<'k>,
    /// Of values as given, where a mask hides keys: rows that no query sees are zeros, as they may hold anything and
    /// products with zeros must be zeros.
    seen: Option<SeenKeys<'k>>,
}

enum Source<'k> {
    /// Tiles one after the other, laid out as in shared memory but for the swizzle; `chunk` is the thread's in the next
    /// tile. (In 32 bits, which registers are short of, chunks count 32 GiB.)
    Workspace { base: Global<'k, u8>, chunk: Var<'k, i32> },
    /// Rows of the caller's tensor, where each thread keeps to one chunk of its rows.
    Rows {
        /// The thread's chunk in its first row of the next tile.
        chunk: Var<'k, u64>,
        /// Bytes from row to row.
        stride: Val<'k, i64>,
        /// Valid rows from the thread's first row of the next tile on.
        remaining: Var<'k, i32>,
    },
    /// Rows of the caller's tensor that are not whole chunks, or whose chunks do not divide the threads.
    Irregular { base: Global<'k, u16>, stride: Val<'k, i64>, len: Val<'k, i32> },
}

impl<'k, 'c> Ring<'k, 'c> {
    pub fn new(
        code: &'k Code,
        config: &'c AttentionConfig,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
    ) -> Self {
        let (padded, tile_keys) = (config.padded_dim(), config.tiling.tile_keys);
        let (key_bytes, value_bytes) = (key_row_bytes(config), value_tile_bytes(config));
        let ring_bytes = config.tiling.stages * (tile_keys * key_bytes + value_bytes);
        // The output passes through the same memory at the end.
        let shared = code.shared::<u8>("tiles", ring_bytes.max(config.block_q() * 2 * padded));
        let first_value = (config.tiling.stages * tile_keys * key_bytes) as i32;
        let shape = |base: i32, row_bytes, rows, chunks| TileShape {
            stages: SharedTile::new(shared.plus(base), row_bytes),
            rows,
            chunks,
            depth_in_rows: false,
        };
        let used_chunks = config.head_dim.div_ceil(8);

        let keys = match config.scores {
            Scores::Full => shape(0, key_bytes, tile_keys, used_chunks).of_rows(
                config,
                place,
                p.k,
                [p.k_stride_batch, p.k_stride_head, p.k_stride_row],
            ),
            Scores::Int(_) => {
                shape(0, key_bytes, tile_keys, key_bytes / CHUNK_BYTES).of_workspace(place, p.k)
            }
        };
        let rows_of_values =
            |chunks| TileShape { depth_in_rows: true, ..shape(first_value, 2 * padded, tile_keys, chunks) };
        let mut values = match (config.values, config.value_source) {
            (Values::Fp8(_), _) => {
                shape(first_value, tile_keys, padded, tile_keys / CHUNK_BYTES).of_workspace(place, p.v)
            }
            (_, ValueSource::Workspace) => rows_of_values(2 * padded / CHUNK_BYTES).of_workspace(place, p.v),
            (_, ValueSource::Given) => rows_of_values(used_chunks).of_rows(
                config,
                place,
                p.v,
                [p.v_stride_batch, p.v_stride_head, p.v_stride_row],
            ),
        };
        if config.value_source == ValueSource::Given {
            values.seen = place.seen;
        }
        let stage = code.var(0).named("stage");
        let ring = Ring { code, config, keys, values, shared, stage };
        ring.clear_unused_chunks();
        ring
    }

    /// Starts the first copies.
    pub fn start(&self, place: &Place<'k>) {
        for stage in 0..self.config.tiling.stages - 1 {
            self.copy(place, place.first_tile + stage as i32, self.code.constant(stage as i32));
        }
    }

    /// Waits for the next tile, starts copying the one that takes the stage freed by the tile before, and returns where
    /// the tile's K and V are read.
    pub fn next(&self, tile: Val<'k, i32>, place: &Place<'k>) -> (FragmentSource<'k>, FragmentSource<'k>) {
        let stages = self.config.tiling.stages as i32;
        // The next tile is the oldest of the copies in flight.
        self.code.wait_copies(stages as u32 - 2);
        self.code.barrier();
        let stage = self.stage.get();
        let before = stage.eq(0).select(stages - 1, stage - 1);
        self.copy(place, tile + (stages - 1), before);
        let after = stage + 1;
        self.stage.set(after.eq(stages).select(0, after));
        (
            self.keys.fragments.at_byte(self.keys.offset(stage)),
            self.values.fragments.at_byte(self.values.offset(stage)),
        )
    }

    /// Waits until every copy has landed and every warp is done with the tiles; their memory is then free for the
    /// output.
    pub fn finish(&self) -> SharedTile<'k> {
        self.code.wait_copies(0);
        self.code.barrier();
        SharedTile::new(self.shared, 2 * self.config.padded_dim())
    }

    /// Starts copying a tile, where there is one.
    fn copy(&self, place: &Place<'k>, tile: Val<'k, i32>, stage: Val<'k, i32>) {
        self.code.when(tile.lt(place.end_tile), || {
            for operand in [&self.keys, &self.values] {
                operand.copy(self.code, self.config, tile, stage);
            }
        });
        // Also an empty group is one, so that counting groups is counting tiles.
        self.code.commit_copies();
    }

    /// Zeros, once, in chunks that no copy writes and products read.
    fn clear_unused_chunks(&self) {
        for operand in [&self.keys, &self.values] {
            let unused = operand.stages.row_bytes() / CHUNK_BYTES - operand.chunks;
            if unused == 0 {
                continue;
            }
            let total = (self.config.tiling.stages * operand.rows * unused) as i32;
            let zero = self.code.constant(0u32);
            self.code.range_by(self.code.thread(), total, self.config.threads() as i32, |i| {
                let (row, chunk) = i.split_index(unused);
                operand
                    .stages
                    .chunk(row, chunk + operand.chunks as i32)
                    .step(0, 0)
                    .cast::<u32>()
                    .store_vector([zero; 4]);
            });
        }
    }
}

/// The shape of a tile, before its source is known.
#[derive(Clone, Copy)]
struct TileShape<'k> {
    stages: SharedTile<'k>,
    rows: usize,
    chunks: usize,
    /// Whether rows are the depth of the product, or its columns.
    depth_in_rows: bool,
}

impl<'k> Tiles<'k> {
    /// Bytes from the first stage to another.
    fn offset(&self, stage: Val<'k, i32>) -> Val<'k, i32> {
        stage * (self.rows * self.stages.row_bytes()) as i32
    }

    /// Starts copying a tile: each thread takes every `threads`-th chunk.
    fn copy(&self, code: &'k Code, config: &AttentionConfig, tile: Val<'k, i32>, stage: Val<'k, i32>) {
        let to = self.stages.at_byte(self.offset(stage));
        let (threads, thread) = (config.threads() as usize, code.thread());
        let total = self.rows * self.chunks;
        let rows_a_round = (threads / self.chunks) as i32;
        let rounds = total.div_ceil(threads);
        // Where a round is a multiple of 8 rows, a thread's chunks are at fixed distances.
        let (first_row, first_chunk) = thread.split_index(self.chunks);
        let first = to.chunk(first_row, first_chunk);
        let fixed = threads.is_multiple_of(8 * self.chunks);
        let target = |round: usize| {
            if fixed {
                return first.step(round * rows_a_round as usize, 0);
            }
            let (row, chunk) = (thread + (round * threads) as i32).split_index(self.chunks);
            to.chunk(row, chunk).step(0, 0)
        };
        let whole = |round: usize, start: &dyn Fn()| {
            if (round + 1) * threads <= total {
                start();
            } else {
                code.when((thread + (round * threads) as i32).lt(total as i32), start);
            }
        };
        match &self.source {
            Source::Workspace { base, chunk } => {
                let from = base.at(chunk.get().mul_wide(CHUNK_BYTES as i32));
                for round in 0..rounds {
                    let from = from.plus((round * threads * CHUNK_BYTES) as i32);
                    whole(round, &|| target(round).copy_async(from, 16, 16));
                }
                chunk.set(chunk.get() + total as i32);
            }
            Source::Rows { chunk, stride, remaining } => {
                let rows = remaining.get();
                let round_bytes = *stride * i64::from(rows_a_round);
                let mut from = chunk.get();
                // Words of a mask are all asked for before the first of them is waited for.
                let visible = self.seen.map(|seen| {
                    let key = tile * self.rows as i32 + first_row;
                    let of_round = |round: i32| {
                        let there = rows.gt(round * rows_a_round);
                        there & seen.is_visible(there.select(key + round * rows_a_round, 0))
                    };
                    (0..rounds as i32).map(of_round).collect::<Vec<_>>()
                });
                for round in 0..rounds {
                    // A copy of no bytes reads nothing, so that its address may lie anywhere.
                    let valid = match &visible {
                        Some(visible) => visible[round],
                        None => rows.gt(round as i32 * rows_a_round),
                    };
                    let valid = valid.select(16, 0);
                    target(round).copy_async(Global::<u8>::at_address(from), 16, valid);
                    from = from + round_bytes.reinterpret::<u64>();
                }
                chunk.set(from);
                remaining.set(rows - self.rows as i32);
            }
            Source::Irregular { base, stride, len } => {
                for round in 0..rounds {
                    whole(round, &|| {
                        let (row, chunk) = (thread + (round * threads) as i32).split_index(self.chunks);
                        let key = tile * self.rows as i32 + row;
                        let there = key.lt(*len);
                        let valid =
                            self.seen.map_or(there, |seen| there & seen.is_visible(there.select(key, 0)));
                        let from = base.at(valid.select(key, 0).widen() * *stride).at(chunk * 8);
                        if config.aligned {
                            target(round).copy_async(from, 16, valid.select(16, 0));
                        } else {
                            copy_elements(config, from, chunk, valid, target(round));
                        }
                    });
                }
            }
        }
    }
}

impl<'k> TileShape<'k> {
    fn from(self, source: Source<'k>) -> Tiles<'k> {
        let TileShape { stages, rows, chunks, depth_in_rows } = self;
        let fragments = if depth_in_rows { stages.rows_of_b(0) } else { stages.columns_of_b(0) };
        Tiles { stages, fragments, rows, chunks, source, seen: None }
    }

    /// Tiles of the workspace.
    fn of_workspace(self, place: &Place<'k>, base: Global<'k, u8>) -> Tiles<'k> {
        let code = base.code();
        let tile = place.first_key_tile + place.first_tile;
        let tile_chunks = (self.rows * self.chunks) as i32;
        let chunk = code.var(tile * tile_chunks + code.thread()).named("workspace_chunk");
        self.from(Source::Workspace { base, chunk })
    }

    /// Rows of the caller's tensor.
    fn of_rows(
        self,
        config: &AttentionConfig,
        place: &Place<'k>,
        base: Global<'k, u8>,
        [batch, head, row]: [Val<'k, i64>; 3],
    ) -> Tiles<'k> {
        let code = base.code();
        let start = place.sequence.batch.widen() * batch
            + place.kv_head.widen() * head
            + place.sequence.kv_start.widen() * row;
        let base = base.cast::<u16>().at(start);
        let len = place.sequence.kv_len;
        let threads = config.threads() as usize;
        if !config.aligned
            || !threads.is_multiple_of(self.chunks)
            || !self.rows.is_multiple_of(threads / self.chunks)
        {
            return self.from(Source::Irregular { base, stride: row, len });
        }
        let (first_row, first_chunk) = code.thread().split_index(self.chunks);
        let key = place.first_tile * self.rows as i32 + first_row;
        let chunk = base.at(key.widen() * row).at(first_chunk * 8);
        self.from(Source::Rows {
            chunk: code.var(chunk.address()).named("row_chunk"),
            stride: row * 2,
            remaining: code.var(len - key).named("remaining_rows"),
        })
    }
}

/// Copies a chunk's eight elements one by one, zeros beyond the head and where the row is not valid.
fn copy_elements<'k>(
    config: &AttentionConfig,
    from: Global<'k, u16>,
    chunk: Val<'k, i32>,
    valid: Val<'k, bool>,
    target: Shared<'k, u8>,
) {
    let element = |i: i32| {
        let here = valid & (chunk * 8 + i).lt(config.head_dim as i32);
        // An element that is not there is read from the chunk's start, which is, and dropped.
        let offset = here.select(i, 0);
        here.select(from.at(offset).load(), 0u32)
    };
    let words: Vec<Val<'k, u32>> =
        (0..4).map(|word| element(2 * word) | (element(2 * word + 1) << 16)).collect();
    target.cast::<u32>().store_vector([words[0], words[1], words[2], words[3]]);
}

/// Bytes of a key's row in a tile.
fn key_row_bytes(config: &AttentionConfig) -> usize {
    match config.scores {
        Scores::Full => 2 * config.padded_dim(),
        Scores::Int(IntQuantizer { bits: IntBits::Eight, .. }) => config.padded_dim(),
        Scores::Int(IntQuantizer { bits: IntBits::Four, .. }) => config.padded_dim() / 2,
    }
}

/// Bytes of a tile of V.
fn value_tile_bytes(config: &AttentionConfig) -> usize {
    let element = if matches!(config.values, Values::Fp8(_)) { 1 } else { 2 };
    element * config.tiling.tile_keys * config.padded_dim()
}
