//! Tiles of K and V on their way from device memory: a ring of stages in shared memory, filled ahead of their use.

use sage_ptx::{CHUNK_BYTES, Code, Global, Shared, SharedTile, Val, Var};

use super::config::{AttentionConfig, AttentionParams, Scores, ValueSource, Values};
use super::place::Place;
use crate::sequence::KEY_TILE;
use sage_core::{IntBits, IntQuantizer};

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

/// One operand's tiles: where they come from, and their stages.
struct Tiles<'k> {
    stages: SharedTile<'k>,
    source: Source<'k>,
    /// Rows of a tile, and 16-byte chunks of a row that hold channels.
    rows: usize,
    chunks: usize,
}

enum Source<'k> {
    /// Tiles one after the other, laid out as in shared memory but for the swizzle.
    Workspace(Global<'k, u8>),
    /// Rows of the caller's tensor.
    Rows { base: Global<'k, u16>, stride: Val<'k, i64>, len: Val<'k, i32> },
}

impl<'k, 'c> Ring<'k, 'c> {
    pub fn new(
        code: &'k Code,
        config: &'c AttentionConfig,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
    ) -> Self {
        let padded = config.padded_dim();
        let (key_bytes, value_bytes) = (key_row_bytes(config), value_tile_bytes(config));
        let ring_bytes = config.tiling.stages * (KEY_TILE * key_bytes + value_bytes);
        // The output passes through the same memory at the end.
        let shared = code.shared::<u8>("tiles", ring_bytes.max(config.block_q() * 2 * padded));
        let key_stages = SharedTile::new(shared, key_bytes);
        let first_value = (config.tiling.stages * KEY_TILE * key_bytes) as i32;
        let value_stages = |row_bytes| SharedTile::new(shared.plus(first_value), row_bytes);
        let workspace = |base: Global<'k, u8>, bytes: usize| {
            let tile = place.kv_head.mul_wide(p.key_tiles) + place.sequence.first_tile.widen();
            Source::Workspace(base.at(tile * bytes as i64))
        };
        let given = |base: Global<'k, u8>, strides: [Val<'k, i64>; 3]| {
            let [batch, head, row] = strides;
            let start = place.sequence.batch.widen() * batch
                + place.kv_head.widen() * head
                + place.sequence.kv_start.widen() * row;
            Source::Rows { base: base.cast::<u16>().at(start), stride: row, len: place.sequence.kv_len }
        };
        let chunks_of_16_bits = config.head_dim.div_ceil(8);

        let keys = match config.scores {
            Scores::Full => Tiles {
                stages: key_stages,
                source: given(p.k, [p.k_stride_batch, p.k_stride_head, p.k_stride_row]),
                rows: KEY_TILE,
                chunks: chunks_of_16_bits,
            },
            Scores::Int(_) => Tiles {
                stages: key_stages,
                source: workspace(p.k, KEY_TILE * key_bytes),
                rows: KEY_TILE,
                chunks: key_bytes / CHUNK_BYTES,
            },
        };
        let values = match (config.values, config.value_source) {
            (Values::Fp8(_), _) => Tiles {
                stages: value_stages(KEY_TILE),
                source: workspace(p.v, value_bytes),
                rows: padded,
                chunks: KEY_TILE / CHUNK_BYTES,
            },
            (_, ValueSource::Workspace) => Tiles {
                stages: value_stages(2 * padded),
                source: workspace(p.v, value_bytes),
                rows: KEY_TILE,
                chunks: 2 * padded / CHUNK_BYTES,
            },
            (_, ValueSource::Given) => Tiles {
                stages: value_stages(2 * padded),
                source: given(p.v, [p.v_stride_batch, p.v_stride_head, p.v_stride_row]),
                rows: KEY_TILE,
                chunks: chunks_of_16_bits,
            },
        };
        let ring = Ring { code, config, keys, values, shared, stage: code.var(0).named("stage") };
        ring.clear_unused_chunks();
        ring
    }

    /// Starts the first copies.
    pub fn start(&self, place: &Place<'k>) {
        let ahead = self.config.tiling.stages - 1;
        for i in 0..ahead {
            self.copy(place.first_tile + i as i32, place.end_tile, self.code.constant(i as i32));
        }
    }

    /// Waits for a tile, starts copying the one that takes the stage freed by the tile before, and returns the tile's K
    /// and V.
    pub fn next(&self, tile: Val<'k, i32>, place: &Place<'k>) -> (SharedTile<'k>, SharedTile<'k>) {
        let stages = self.config.tiling.stages as i32;
        // Tile `tile` is the oldest of the copies in flight.
        self.code.wait_copies(stages as u32 - 2);
        self.code.barrier();
        let stage = self.stage.get();
        let before = stage.eq(0).select(stages - 1, stage - 1);
        self.copy(tile + (stages - 1), place.end_tile, before);
        let after = stage + 1;
        self.stage.set(after.eq(stages).select(0, after));
        (self.keys.stage(stage), self.values.stage(stage))
    }

    /// Waits until every copy has landed and every warp is done with the tiles; their memory is then free for the output.
    pub fn finish(&self) -> SharedTile<'k> {
        self.code.wait_copies(0);
        self.code.barrier();
        SharedTile::new(self.shared, 2 * self.config.padded_dim())
    }

    fn copy(&self, tile: Val<'k, i32>, end: Val<'k, i32>, stage: Val<'k, i32>) {
        self.code.when(tile.lt(end), || {
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
            let row_chunks = operand.stages.row_bytes() / CHUNK_BYTES;
            let unused = row_chunks - operand.chunks;
            if unused == 0 {
                continue;
            }
            let total = (self.config.tiling.stages * operand.rows * unused) as i32;
            let zero = self.code.constant(0u32);
            self.code.range_by(self.code.thread(), total, self.config.threads() as i32, |i| {
                let (row, chunk) = (i / unused as i32, i % unused as i32 + operand.chunks as i32);
                operand.stages.chunk(row, chunk).step(0, 0).cast::<u32>().store_vector([zero; 4]);
            });
        }
    }
}

impl<'k> Tiles<'k> {
    fn stage(&self, stage: Val<'k, i32>) -> SharedTile<'k> {
        self.stages.at_byte(stage * (self.rows * self.stages.row_bytes()) as i32)
    }

    /// Starts copying a tile; each thread takes every `threads`-th chunk.
    fn copy(&self, code: &'k Code, config: &AttentionConfig, tile: Val<'k, i32>, stage: Val<'k, i32>) {
        let to = self.stage(stage);
        let threads = config.threads() as usize;
        let total = self.rows * self.chunks;
        let thread = code.thread();
        // Where a round of all threads is whole rows, and eight of them, each thread keeps to one chunk of its rows.
        let rows_a_round = threads / self.chunks;
        let regular = threads.is_multiple_of(self.chunks)
            && rows_a_round.is_multiple_of(8)
            && self.rows.is_multiple_of(rows_a_round);
        let (first_row, first_chunk) = (thread / self.chunks as i32, thread % self.chunks as i32);
        for round in 0..total.div_ceil(threads) {
            let (row, chunk, target) = if regular {
                let target = to.chunk(first_row, first_chunk).step(round * rows_a_round, 0);
                (first_row + (round * rows_a_round) as i32, first_chunk, target)
            } else {
                let index = thread + (round * threads) as i32;
                let (row, chunk) = (index / self.chunks as i32, index % self.chunks as i32);
                (row, chunk, to.chunk(row, chunk).step(0, 0))
            };
            let start = || match &self.source {
                Source::Workspace(base) => {
                    let tile_bytes = (self.rows * self.stages.row_bytes()) as i32;
                    let index = (row * self.chunks as i32 + chunk) * CHUNK_BYTES as i32;
                    target.copy_async(base.at(tile.mul_wide(tile_bytes)).at(index), 16, 16);
                }
                Source::Rows { base, stride, len } => {
                    let key = tile * KEY_TILE as i32 + row;
                    let valid = key.lt(*len);
                    let from = base.at(valid.select(key, 0).widen() * *stride).at(chunk * 8);
                    if config.aligned {
                        target.copy_async(from, 16, valid.select(16, 0));
                    } else {
                        copy_elements(config, from, chunk, valid, target);
                    }
                }
            };
            let partial = !total.is_multiple_of(threads) && round + 1 == total.div_ceil(threads);
            if partial {
                code.when(row.lt(self.rows as i32), start);
            } else {
                start();
            }
        }
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
    element * KEY_TILE * config.padded_dim()
}
