//! An operand's tiles, which the threads of a block copy: where the chunks of a tile come from and go to.

use sage_ptx::{CHUNK_BYTES, Code, FragmentSource, Global, Shared, SharedTile, Val, Var};

use super::chunks::{AsyncCopies, ChunkSink, Parts, Rounds};
use super::head_channels::HeadChannels;

use crate::attention::config::AttentionConfig;
use crate::attention::key_tiles::KeyTiles;
use crate::attention::place::Place;
use crate::fp4::ScaleWords;
use crate::operand::Operand;
use crate::preprocess::SeenKeys;
use crate::sequence::KEY_TILE;
use crate::tensor::TensorParam;

/// Chunks of a line of memory.
const LINE_CHUNKS: usize = 8;

/// One operand's tiles: their stages, and where this thread's part of each comes from.
pub(super) struct CopiedTiles<'k> {
    pub stages: SharedTile<'k>,
    /// Where the lane's fragments and scales of the first stage lie.
    first: StagedTile<'k>,
    /// Rows of a tile, those of scales behind it included, and 16-byte chunks of a row that hold channels.
    pub rows: usize,
    pub chunks: usize,
    /// Chunks of a row that neighbouring threads copy at once: all, or a part that divides them.
    pub across: usize,
    source: Source<'k>,
    /// Set for values as given where a mask hides keys: rows that no query sees become zeros, as they may hold anything
    /// and products with zeros must be zeros.
    pub seen: Option<SeenKeys<'k>>,
}

enum Source<'k> {
    /// Tiles one after the other, laid out as in shared memory but for the swizzle. What is known is the thread's first
    /// chunk of a tile: of the next, or of the sequence's first. (In 32 bits, which registers are short of, chunks
    /// count 32 GiB.)
    Workspace { base: Global<'k, u8>, chunk: Known<Var<'k, i32>, Val<'k, i32>> },
    /// Rows of the caller's tensor, `stride` bytes from each other, where each thread keeps to the same chunks of its
    /// rows.
    Rows { stride: Val<'k, i64>, rows: Known<NextRows<'k>, AllRows<'k>> },
    /// Rows of the caller's tensor that are not whole chunks, or whose chunks threads do not share evenly.
    Irregular(AllRows<'k>),
}

/// What is kept in registers of where tiles lie.
enum Known<N, A> {
    /// Where the next tile lies: a band's tiles are loaded one after the other, so that an addition a tile keeps it.
    OfNext(N),
    /// What the place of any tile is computed from.
    OfAll(A),
}

/// The thread's rows of the next tile.
#[derive(Clone, Copy)]
struct NextRows<'k> {
    /// Its chunk in the first of them.
    chunk: Var<'k, u64>,
    /// Valid rows from that one on.
    remaining: Var<'k, i32>,
}

/// All rows of a sequence.
#[derive(Clone, Copy)]
struct AllRows<'k> {
    base: Global<'k, u16>,
    /// Elements from row to row.
    stride: Val<'k, i64>,
    len: Val<'k, i32>,
    channels: HeadChannels<'k>,
}

/// A tile in shared memory, as a lane reads it.
#[derive(Clone)]
pub(in crate::attention) struct StagedTile<'k> {
    pub fragments: FragmentSource<'k>,
    /// Where the lane's scales of groups lie, if elements have such: as many words at each place as are read at once.
    scales: Vec<Shared<'k, u32>>,
    vector: usize,
}

impl<'k> StagedTile<'k> {
    /// The tile `bytes` further.
    pub(super) fn at_byte(&self, bytes: Val<'k, i32>) -> Self {
        let scales =
            self.scales.iter().map(|place| Shared::at_address(place.address() + bytes.reinterpret::<u32>()));
        StagedTile { fragments: self.fragments.at_byte(bytes), scales: scales.collect(), ..*self }
    }

    /// The lane's words of the scales of groups; none where elements have no such.
    pub fn group_scales(&self) -> Vec<Val<'k, u32>> {
        let words = self.scales.iter().map(|place| match self.vector {
            2 => place.load_vector::<2>().to_vec(),
            _ => place.load_vector::<4>().to_vec(),
        });
        words.flatten().collect()
    }
}

/// The shape of a tile, before its source is known.
#[derive(Clone, Copy)]
pub(super) struct TileShape<'k> {
    pub stages: SharedTile<'k>,
    pub rows: usize,
    pub chunks: usize,
    /// Whether rows are the depth of the product, or its columns.
    pub depth_in_rows: bool,
    /// The scales behind the rows, where elements have some.
    pub scales: Option<ScaleWords>,
}

impl<'k> CopiedTiles<'k> {
    /// Bytes from the first stage to another.
    pub fn offset(&self, stage: Val<'k, i32>) -> Val<'k, i32> {
        stage * (self.rows * self.stages.row_bytes()) as i32
    }

    /// The rows of the first stage as the depth of a product, whose columns are channels from `first` on.
    pub fn as_depth(&self, first: Option<Val<'k, i32>>) -> StagedTile<'k> {
        let rows = self.stages.rows_of_b(0);
        // Channels of 16 bits. Blocks start where the swizzle of rows does.
        let fragments = first.map_or(rows, |first| rows.at_byte(first * 2));
        StagedTile { fragments, scales: Vec::new(), vector: 0 }
    }

    /// The tile in a stage, as the lane reads it.
    pub fn staged(&self, stage: Val<'k, i32>) -> StagedTile<'k> {
        self.first.at_byte(self.offset(stage))
    }

    /// Starts copying a tile into a stage by `cp.async`.
    pub fn copy(&self, code: &'k Code, config: &AttentionConfig, tile: Val<'k, i32>, stage: Val<'k, i32>) {
        let to = self.stages.at_byte(self.offset(stage));
        let rounds = Rounds::new(code, config, self);
        self.for_each_chunk(config, &rounds, tile, &AsyncCopies(rounds.targets(to)));
    }

    /// Room for the thread's chunks of a tile.
    pub fn parts(&self, code: &'k Code, config: &AttentionConfig) -> Parts<'k> {
        let rounds = (self.rows * self.chunks).div_ceil(config.threads() as usize);
        Parts((0..rounds).map(|_| [(); 4].map(|()| Var::new(code))).collect())
    }

    /// Starts loading the thread's chunks of a tile.
    pub fn load(&self, code: &'k Code, config: &AttentionConfig, tile: Val<'k, i32>, parts: &Parts<'k>) {
        self.for_each_chunk(config, &Rounds::new(code, config, self), tile, parts);
    }

    /// Stores the thread's chunks of a tile, which were loaded, into a stage.
    pub fn store(&self, code: &'k Code, config: &AttentionConfig, stage: Val<'k, i32>, parts: &Parts<'k>) {
        let to = self.stages.at_byte(self.offset(stage));
        let rounds = Rounds::new(code, config, self);
        let targets = rounds.targets(to);
        for (round, words) in parts.0.iter().enumerate() {
            rounds.when_there(round, || {
                targets.of_round(round).cast::<u32>().store_vector(words.map(Var::get));
            });
        }
    }

    /// Hands the thread's chunks of a tile to `sink`.
    fn for_each_chunk(
        &self,
        config: &AttentionConfig,
        rounds: &Rounds<'k>,
        tile: Val<'k, i32>,
        sink: &impl ChunkSink<'k>,
    ) {
        match &self.source {
            Source::Workspace { base, chunk } => self.chunks_of_workspace(rounds, *base, chunk, tile, sink),
            Source::Rows { stride, rows } => self.chunks_of_rows(rounds, *stride, rows, tile, sink),
            Source::Irregular(rows) => self.irregular_chunks(config, rounds, rows, tile, sink),
        }
    }

    fn chunks_of_workspace(
        &self,
        rounds: &Rounds<'k>,
        base: Global<'k, u8>,
        chunk: &Known<Var<'k, i32>, Val<'k, i32>>,
        tile: Val<'k, i32>,
        sink: &impl ChunkSink<'k>,
    ) {
        let first = match chunk {
            Known::OfNext(chunk) => chunk.get(),
            Known::OfAll(first) => tile * rounds.total as i32 + *first,
        };
        let from = base.at(first.mul_wide(CHUNK_BYTES as i32));
        for round in 0..rounds.count() {
            let from = from.plus((round * rounds.threads * CHUNK_BYTES) as i32);
            rounds.when_there(round, || sink.take(round, from));
        }
        if let Known::OfNext(chunk) = chunk {
            chunk.set(chunk.get() + rounds.total as i32);
        }
    }

    fn chunks_of_rows(
        &self,
        rounds: &Rounds<'k>,
        stride: Val<'k, i64>,
        rows: &Known<NextRows<'k>, AllRows<'k>>,
        tile: Val<'k, i32>,
        sink: &impl ChunkSink<'k>,
    ) {
        let round_rows = rounds.rows();
        let (remaining, round_bytes, mut from) = match rows {
            Known::OfNext(next) => {
                let remaining = next.remaining.get();
                (remaining, stride * i64::from(round_rows), next.chunk.get())
            }
            Known::OfAll(all) => {
                let key = tile * self.rows as i32 + rounds.first_row;
                let chunk = all.base.at(key.widen() * all.stride).at(rounds.first_chunk * 8);
                (all.len - key, stride * i64::from(round_rows), chunk.address())
            }
        };
        // Words of a mask are all asked for before the first of them is waited for.
        let visible = self.seen.map(|seen| {
            let key = tile * self.rows as i32 + rounds.first_row;
            let of_round = |round: i32| {
                let there = remaining.gt(round * round_rows);
                there & seen.is_visible(there.select(key + round * round_rows, 0))
            };
            (0..rounds.rounds_of_rows() as i32).map(of_round).collect::<Vec<_>>()
        });
        for row in 0..rounds.rounds_of_rows() {
            let valid = match &visible {
                Some(visible) => visible[row],
                None => remaining.gt(row as i32 * round_rows),
            };
            for column in 0..rounds.columns() {
                let from = Global::at_address(from).plus((column * self.across * CHUNK_BYTES) as i32);
                sink.take_where(row * rounds.columns() + column, from, valid);
            }
            from = from + round_bytes.reinterpret::<u64>();
        }
        if let Known::OfNext(next) = rows {
            next.chunk.set(from);
            next.remaining.set(remaining - self.rows as i32);
        }
    }

    fn irregular_chunks(
        &self,
        config: &AttentionConfig,
        rounds: &Rounds<'k>,
        rows: &AllRows<'k>,
        tile: Val<'k, i32>,
        sink: &impl ChunkSink<'k>,
    ) {
        for round in 0..rounds.count() {
            rounds.when_there(round, || {
                let (row, chunk) = rounds.place(round);
                let key = tile * self.rows as i32 + row;
                let there = key.lt(rows.len);
                let mut valid = self.seen.map_or(there, |seen| there & seen.is_visible(there.select(key, 0)));
                let mut chunk = chunk;
                if let Some(there) = rows.channels.has(|| chunk) {
                    (valid, chunk) = (valid & there, there.select(chunk, 0));
                }
                let from = rows.base.at(valid.select(key, 0).widen() * rows.stride).at(chunk * 8);
                if config.aligned {
                    sink.take_where(round, from.cast(), valid);
                } else {
                    sink.take_words(round, || rows.channels.elements(from, chunk, valid));
                }
            });
        }
    }
}

impl<'k> TileShape<'k> {
    /// Of rows of the workspace at `base` that another launch has quantised; those of the scales of groups lie behind them.
    pub fn quantised(base: Shared<'k, u8>, operand: &Operand, rows: usize, elements: usize) -> Self {
        let row_bytes = operand.bytes(elements);
        TileShape {
            stages: SharedTile::new(base, row_bytes),
            rows: operand.tile_rows(rows, elements),
            chunks: row_bytes / CHUNK_BYTES,
            depth_in_rows: false,
            scales: operand.fp4().map(|_| ScaleWords::new(rows, elements)),
        }
    }

    /// The tile in the first stage, as the lane reads it.
    pub fn staged(&self) -> StagedTile<'k> {
        let stages = &self.stages;
        let fragments = if self.depth_in_rows { stages.rows_of_b(0) } else { stages.columns_of_b(0) };
        let vector = self.scales.map_or(0, |scales| scales.vector());
        let scales = self.scales.map_or(Vec::new(), |scales| self.places_of_scales(&scales));
        StagedTile { fragments, scales, vector }
    }

    fn from(self, source: Source<'k>) -> CopiedTiles<'k> {
        let first = self.staged();
        let TileShape { stages, rows, chunks, .. } = self;
        CopiedTiles { stages, first, rows, chunks, across: chunks, source, seen: None }
    }

    /// Where the lane's words of scales lie in the first stage, which are chunks like those of codes.
    fn places_of_scales(&self, scales: &ScaleWords) -> Vec<Shared<'k, u32>> {
        let code_rows = self.rows - scales.bytes() / self.stages.row_bytes();
        let lane_bytes = 4 * scales.vector();
        let of_vector = |vector: usize| {
            let lane = self.stages.code().lane_index();
            let first = (vector * 32 * lane_bytes) as i32 + lane * lane_bytes as i32;
            let (row, within) = first.split_index(self.stages.row_bytes());
            let (chunk, byte) = within.split_index(CHUNK_BYTES);
            self.stages.chunk(row + code_rows as i32, chunk).step(0, 0).at(byte).cast()
        };
        (0..scales.of_lane() / scales.vector()).map(of_vector).collect()
    }

    /// Chunks of a row that neighbouring threads copy at once, where as many threads share rows evenly: all of them, or
    /// as many as are whole lines of memory, of every eight rows at least.
    fn chunks_across(&self, threads: usize) -> Option<usize> {
        let evenly =
            |across: &usize| threads.is_multiple_of(*across) && self.rows.is_multiple_of(threads / *across);
        let part = 1 << self.chunks.trailing_zeros();
        let lines = |across: &usize| *across >= LINE_CHUNKS && (threads / *across).is_multiple_of(8);
        Some(self.chunks).filter(evenly).or(Some(part).filter(evenly).filter(lines))
    }

    /// Tiles of the workspace.
    pub fn of_workspace(self, place: &Place<'k>, base: Global<'k, u8>) -> CopiedTiles<'k> {
        let code = base.code();
        let tile_chunks = (self.rows * self.chunks) as i32;
        let first_chunk = |tile: Val<'k, i32>| tile * tile_chunks + code.thread();
        // Rows of shorter tiles are parts of the workspace's, one after the other.
        let parts = if self.depth_in_rows { KEY_TILE / self.rows } else { 1 };
        let first_tile = match parts {
            1 => place.first_key_tile,
            parts => place.first_key_tile * parts as i32,
        };
        let chunk = match place.key_tiles {
            KeyTiles::Band { own, .. } => {
                let first = first_chunk(first_tile + own.start);
                Known::OfNext(code.var(first).named("workspace_chunk"))
            }
            KeyTiles::List { .. } => Known::OfAll(first_chunk(first_tile)),
        };
        self.from(Source::Workspace { base, chunk })
    }

    /// Rows of the caller's tensor.
    pub fn of_rows(
        self,
        config: &AttentionConfig,
        place: &Place<'k>,
        tensor: &TensorParam<'k, 3>,
        channels: HeadChannels<'k>,
    ) -> CopiedTiles<'k> {
        let (code, row) = (tensor.start.code(), tensor.row_stride());
        let start = tensor.head(place.sequence.batch, place.kv_head) + place.sequence.kv_start.widen() * row;
        let base = tensor.start.cast::<u16>().at(start);
        let base = channels.first.map_or(base, |first| base.at(first));
        let mut all = AllRows { base, stride: row, len: place.sequence.kv_len, channels };
        let threads = config.threads() as usize;
        let Some(across) = self.chunks_across(threads).filter(|&across| {
            // Where a thread has several chunks of a row, all of them are there or none.
            config.aligned && (across == self.chunks || channels.left.is_none())
        }) else {
            return self.from(Source::Irregular(all));
        };
        let from = |source| CopiedTiles { across, ..self.from(source) };
        // The thread keeps to a chunk, of which rows have none where the head ends before it.
        if let Some(there) = channels.has(|| code.thread().split_index(across).1) {
            all.len = there.select(all.len, 0);
        }
        let KeyTiles::Band { own, .. } = place.key_tiles else {
            return from(Source::Rows { stride: row * 2, rows: Known::OfAll(all) });
        };
        let (first_row, first_chunk) = code.thread().split_index(across);
        let key = own.start * self.rows as i32 + first_row;
        let chunk = all.base.at(key.widen() * row).at(first_chunk * 8);
        let chunk = code.var(chunk.address()).named("row_chunk");
        let stride = row * 2;
        let remaining = code.var(all.len - key).named("remaining_rows");
        from(Source::Rows { stride, rows: Known::OfNext(NextRows { chunk, remaining }) })
    }
}
