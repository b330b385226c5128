//! Tokens on their way from device memory to the registers of the lanes that multiply them: straight there, the next
//! tile while this one is multiplied, or through [`Stages`] of shared memory, which hold more tiles on their way.

use sage_core::ValueFormat;
use sage_ptx::{AddressSpace, Code, FragmentB, MmaElement, Pointer, Shared, Val, Var, lane_column, lane_row};

use super::codes::{channels, int8_quad};
use super::stages::Stages;
use super::work::Work;
use super::{CHUNK, CacheAttendConfig, CacheAttendParams, GROUP, MAX_SPLIT_PAGES};
use crate::decode::Storage;

/// Words of a chunk of keys, and so the steps of depth that a chunk of each of a quad's lanes is.
pub(super) const CHUNK_WORDS: usize = CHUNK / 4;

/// Lanes that hold chunks of one key, and those that hold values of one token.
const KEY_LANES: usize = 4;
const VALUE_LANES: usize = 8;

/// The tokens of a lane among [`GROUP`], as the depth of a product has them, from twice its place in the quad on.
const LANE_TOKENS: [i32; 4] = [0, 1, 8, 9];

/// Index of each page's head among the cache's, on its way to shared memory: each thread has one page.
pub(super) struct PageHeads<'k>(Var<'k, i32>);

impl<'k> PageHeads<'k> {
    pub fn load(code: &'k Code, p: &CacheAttendParams<'k>, work: &Work<'k>) -> Self {
        const { assert!(MAX_SPLIT_PAGES <= super::THREADS as usize) };
        let page = code.var(0i32).named("page");
        let table = p.pool.tables.at(work.batch * p.table_stride);
        code.when(code.thread().lt(work.pages), || {
            page.set(table.at(work.first_page + code.thread()).load())
        });
        PageHeads(page)
    }

    /// They can be read after the block's next barrier.
    pub fn store(self, code: &'k Code, work: &Work<'k>) -> Shared<'k, i32> {
        let page_heads = code.shared::<i32>("page_heads", MAX_SPLIT_PAGES);
        code.when(code.thread().lt(work.pages), || {
            page_heads.at(code.thread()).store(work.pool.head(self.0.get(), work.head));
        });
        page_heads
    }
}

/// Where [`GROUP`] tokens lie that share a page.
#[derive(Clone, Copy)]
pub(super) struct Place<'k> {
    /// The first of them.
    first: Val<'k, i32>,
    /// Page of the block's run of tokens.
    pub page: Val<'k, i32>,
    /// The row of the first of them, in the pool or in a stage.
    row: Val<'k, i32>,
    /// The first and the last of them that some row of queries sees, for which the others are read.
    ends: [Val<'k, i32>; 2],
}

impl<'k> Place<'k> {
    /// The row of a token.
    fn row(&self, token: Val<'k, i32>) -> Val<'k, i32> {
        let [first, last] = self.ends;
        self.row + token.max(first).min(last)
    }
}

/// How a lane holds values: of each of eight lanes' tokens, chunks of so many channels.
#[derive(Clone, Copy)]
pub(super) struct ValueShape {
    format: ValueFormat,
    /// Neighbouring channels of a lane.
    pub channels: usize,
    /// Such chunks of all eight lanes, and those that are on their way at once.
    chunks: usize,
    of_part: usize,
}

impl ValueShape {
    pub fn new(storage: &Storage) -> Self {
        let (format, pitch) = (storage.values, storage.pitch());
        let channels = if format.bytes() == 2 || pitch <= 64 { 8 } else { 16 };
        let chunks = pitch.div_ceil(VALUE_LANES * channels);
        // Wide heads in 16 bits would fill the registers.
        let parts = if format.bytes() == 2 && chunks > 2 { 2 } else { 1 };
        ValueShape { format, channels, chunks, of_part: chunks.div_ceil(parts) }
    }

    /// Words of a lane's chunk.
    fn words(&self) -> usize {
        self.channels * self.format.bytes() / 4
    }

    /// Blocks of eight columns that the output has: chunk by chunk, the columns of each a channel of eight lanes'.
    pub fn blocks(&self) -> usize {
        self.parts() * self.of_part * self.channels
    }

    fn parts(&self) -> usize {
        self.chunks.div_ceil(self.of_part)
    }

    /// The channel of a column of a block.
    pub fn channel<'k>(&self, block: Val<'k, i32>, column: Val<'k, i32>) -> Val<'k, i32> {
        let (chunk, within) = block.split_index(self.channels);
        (column + chunk * VALUE_LANES as i32) * self.channels as i32 + within
    }
}

/// The chunks of rows in the pool or in a stage, which lanes take in turns.
#[derive(Clone, Copy)]
struct Chunks<'k, S: AddressSpace> {
    /// The first row, and where the lane's first chunk of it lies.
    start: Pointer<'k, S, u8>,
    of_lane: Pointer<'k, S, u8>,
    /// The lane's place among so many.
    member: Val<'k, i32>,
    lanes: usize,
    /// Bytes of a chunk, and chunks of a row.
    bytes: usize,
    count: usize,
}

impl<'k, S: AddressSpace> Chunks<'k, S> {
    /// Of keys.
    fn of_keys(storage: &Storage, start: Pointer<'k, S, u32>, lane: Val<'k, i32>) -> Self {
        Chunks::new(start, lane & 3, [KEY_LANES, CHUNK, storage.pitch() / CHUNK])
    }

    /// Of values.
    fn of_values(storage: &Storage, start: Pointer<'k, S, u32>, lane: Val<'k, i32>) -> Self {
        let shape = ValueShape::new(storage);
        let sizes = [VALUE_LANES, 4 * shape.words(), storage.pitch() / shape.channels];
        Chunks::new(start, lane_row(lane), sizes)
    }

    fn new(start: Pointer<'k, S, u32>, member: Val<'k, i32>, [lanes, bytes, count]: [usize; 3]) -> Self {
        let start = start.cast::<u8>();
        Chunks { start, of_lane: start.at(member * bytes as i32), member, lanes, bytes, count }
    }

    /// The lane's chunk of a row in turn `turn`, or the row's first where it has none there.
    fn of_row(&self, row: Val<'k, i32>, turn: usize) -> Pointer<'k, S, u32> {
        let row = row.mul_wide((self.count * self.bytes) as i32);
        let first = (self.lanes * turn) as i32;
        if self.lanes * (turn + 1) <= self.count {
            return self.of_lane.at(row).plus(first * self.bytes as i32).cast();
        }
        let index = self.member + first;
        self.start.at(row).at(index.lt(self.count as i32).select(index, 0) * self.bytes as i32).cast()
    }
}

/// The tile of tokens that a warp multiplies, or multiplies next, in registers.
pub(super) struct Tokens<'k, 'w> {
    code: &'k Code,
    work: &'w Work<'k>,
    storage: Storage,
    page_heads: Shared<'k, i32>,
    groups: usize,
    lane: Val<'k, i32>,
    /// Where tokens pass through shared memory.
    stages: Option<Stages<'k, 'w>>,
    /// Chunks of a key that a lane has.
    key_chunks: usize,
    /// For each eight tokens and chunk, the lane's words of its token's key.
    keys: Vec<[Var<'k, u32>; CHUNK_WORDS]>,
    /// Scales of the token that has the lane's number.
    key_scale: Var<'k, f32>,
    value_scale: Option<Var<'k, f32>>,
    pub shape: ValueShape,
    /// For each of the lane's tokens and chunk of a part, the words of its values.
    values: Vec<Vec<Var<'k, u32>>>,
}

impl<'k, 'w> Tokens<'k, 'w> {
    pub fn new(
        config: &CacheAttendConfig,
        code: &'k Code,
        work: &'w Work<'k>,
        page_heads: Shared<'k, i32>,
        stages: Option<Stages<'k, 'w>>,
    ) -> Self {
        let storage = config.storage;
        let groups = config.tile() / GROUP;
        let shape = ValueShape::new(&storage);
        let key_chunks = key_chunks(&storage);
        Tokens {
            code,
            work,
            storage,
            page_heads,
            groups,
            lane: code.lane_index(),
            stages,
            key_chunks,
            keys: (0..2 * groups * key_chunks).map(|_| [(); CHUNK_WORDS].map(|()| Var::new(code))).collect(),
            key_scale: Var::new(code).named("key_scale"),
            value_scale: storage.values.is_scaled().then(|| Var::new(code).named("value_scale")),
            shape,
            values: (0..groups * LANE_TOKENS.len() * shape.of_part)
                .map(|_| (0..shape.words()).map(|_| Var::new(code)).collect())
                .collect(),
        }
    }

    /// The stages, where tokens pass through some.
    pub fn stages(&self) -> Option<&Stages<'k, 'w>> {
        self.stages.as_ref()
    }

    /// Where the tile's tokens lie in the pool from `start` on. Tokens that no row sees have the place of one that some
    /// row sees.
    pub fn places(&self, start: Val<'k, i32>) -> Vec<Place<'k>> {
        let work = self.work;
        let bits = self.storage.page_bits();
        let last = work.last - 1;
        let last_group = last & !(GROUP as i32 - 1);
        let place = |group: usize| {
            let first = (start + (GROUP * group) as i32).min(last_group);
            let page = (first >> bits) - work.first_page;
            let row = work.pool.row(self.page_heads.at(page).load(), first);
            Place { first, page, row, ends: [work.first - first, last - first] }
        };
        (0..self.groups).map(place).collect()
    }

    /// Starts loading the warp's first tile, from `start` on.
    pub fn start(&self, start: Val<'k, i32>) {
        let places = self.places(start);
        match &self.stages {
            Some(stages) => {
                stages.start(start);
                self.load_scales(&places);
            }
            None => {
                self.load_keys(&places);
                self.load_scales(&places);
                self.load_values(&places, 0);
            }
        }
    }

    /// Has the keys of the tile from `start` on, which lies at `places`, in registers.
    pub fn take_keys(&self, start: Val<'k, i32>, places: &[Place<'k>]) {
        let Some(stages) = &self.stages else { return };
        self.code.note("keys from the stage");
        stages.wait();
        let chunks = Chunks::of_keys(&self.storage, stages.keys(), self.lane);
        self.each_key(&in_stage(start, places), |row, turn, words| {
            words.iter().zip(chunks.of_row(row, turn).load_vector::<4>()).for_each(|(to, x)| to.set(x));
        });
    }

    /// Starts loading what registers have room for once the scores are there: scales and keys of the next tile, which
    /// lies at `next` if it `exists`.
    pub fn load_after_scores(&self, next: &[Place<'k>], exists: Val<'k, bool>) {
        self.code.when(exists, || {
            if self.stages.is_none() {
                self.load_keys(next);
            }
            self.load_scales(next);
        });
    }

    /// Has a part of the channels of the values of the tile from `start` on, which lies at `places`, in registers.
    pub fn take_values(&self, start: Val<'k, i32>, places: &[Place<'k>], part: usize) {
        let Some(stages) = &self.stages else { return };
        self.code.note("values from the stage");
        let chunks = Chunks::of_values(&self.storage, stages.values(), self.lane);
        self.each_value(&in_stage(start, places), part, |row, turn, words| {
            let from = chunks.of_row(row, turn);
            match words {
                [a, b] => [a, b].into_iter().zip(from.load_vector::<2>()).for_each(|(to, x)| to.set(x)),
                _ => words.iter().zip(from.load_vector::<4>()).for_each(|(to, x)| to.set(x)),
            }
        });
        if part + 1 == self.shape.parts() {
            stages.release(start);
        }
    }

    /// Starts loading what registers have room for once a part of the values is multiplied: the next part, or the first
    /// of the next tile, which lies at `next` if it `exists`.
    pub fn load_after_values(
        &self,
        part: usize,
        places: &[Place<'k>],
        next: &[Place<'k>],
        exists: Val<'k, bool>,
    ) {
        match part + 1 {
            _ if self.stages.is_some() => {}
            following if following < self.shape.parts() => self.load_values(places, following),
            _ => self.code.when(exists, || self.load_values(next, 0)),
        }
    }

    fn load_scales(&self, places: &[Place<'k>]) {
        let parts = self.work.pool.parts;
        let token = self.lane & (GROUP as i32 - 1);
        let rows = places.iter().map(|place| place.row(token));
        let second = self.lane.ge(GROUP as i32);
        let Some(row) = rows.reduce(|first, other| second.select(other, first)) else { return };
        parts.key_scales.at(row).load_streaming_into([self.key_scale]);
        if let Some(scale) = self.value_scale {
            parts.value_scales.at(row).load_streaming_into([scale]);
        }
    }

    fn load_keys(&self, places: &[Place<'k>]) {
        let chunks = Chunks::of_keys(&self.storage, self.work.pool.parts.keys, self.lane);
        self.each_key(places, |row, turn, words| chunks.of_row(row, turn).load_streaming_into(*words));
    }

    fn load_values(&self, places: &[Place<'k>], part: usize) {
        let chunks = Chunks::of_values(&self.storage, self.work.pool.parts.values, self.lane);
        self.each_value(places, part, |row, turn, words| {
            let from = chunks.of_row(row, turn);
            match *words {
                [a, b] => from.load_streaming_into([a, b]),
                [a, b, c, d] => from.load_streaming_into([a, b, c, d]),
                _ => unreachable!("chunks are of 8 or 16 bytes"),
            }
        });
    }

    /// Visits each of the lane's keys: its row, the turn of the chunk, and what its words are kept in.
    fn each_key(
        &self,
        places: &[Place<'k>],
        visit: impl Fn(Val<'k, i32>, usize, &[Var<'k, u32>; CHUNK_WORDS]),
    ) {
        let of_key = lane_row(self.lane);
        let mut vars = self.keys.iter();
        for place in places {
            for block in 0..2 {
                let row = place.row(of_key + 8 * block);
                (0..self.key_chunks).zip(&mut vars).for_each(|(turn, words)| visit(row, turn, words));
            }
        }
    }

    /// The same of its values, in a part of their channels.
    fn each_value(
        &self,
        places: &[Place<'k>],
        part: usize,
        visit: impl Fn(Val<'k, i32>, usize, &[Var<'k, u32>]),
    ) {
        let of_part = self.shape.of_part;
        let mut vars = self.values.iter();
        for place in places {
            for token in LANE_TOKENS {
                let row = place.row(lane_column(self.lane) + token);
                let turns = part * of_part..(part + 1) * of_part;
                turns.zip(&mut vars).for_each(|(turn, words)| visit(row, turn, words));
            }
        }
    }

    /// Keys of sixteen tokens from `token` on, as columns, at a step of the depth.
    pub fn keys<E: MmaElement>(&self, step: usize, token: usize) -> [FragmentB<'k, E>; 2] {
        let (chunk, word) = (step / CHUNK_WORDS, step % CHUNK_WORDS);
        [0, 1].map(|block| {
            let words = self.keys[(token / 8 + block) * self.key_chunks + chunk];
            FragmentB::new(int8_quad(words[word].get()))
        })
    }

    /// The scale of the token that has the lane's number.
    pub fn key_scale(&self) -> Val<'k, f32> {
        self.key_scale.get()
    }

    /// The same of its value, where values have scales.
    pub fn value_scale(&self) -> Option<Val<'k, f32>> {
        self.value_scale.map(Var::get)
    }

    /// Parts that values' channels are loaded in.
    pub fn value_parts(&self) -> usize {
        self.shape.parts()
    }

    /// Values of a group of tokens, as the depth, in two blocks of columns from block `block` of a part on.
    pub fn values<E: MmaElement>(&self, group: usize, block: usize) -> [FragmentB<'k, E>; 2] {
        let (chunk, channel) = (block / self.shape.channels, block % self.shape.channels);
        let of_word = 4 / self.shape.format.bytes();
        let (word, half) = (channel / of_word, channel % of_word / 2);
        let token = |token: usize| {
            let index = (group * LANE_TOKENS.len() + token) * self.shape.of_part + chunk;
            self.values[index][word].get()
        };
        let [low, high] =
            [0, 2].map(|first| channels(self.shape.format, [token(first), token(first + 1)], half));
        [0, 1].map(|i| FragmentB::new([low[i], high[i]]))
    }

    /// What the tokens of a tile's columns have of a number that each lane holds for the token of its own.
    pub fn of_columns(&self, of_lane: Val<'k, f32>) -> Vec<Val<'k, f32>> {
        let first = lane_column(self.lane);
        let pair = |block: i32| [0, 1].map(|within| of_lane.shuffle(first + (8 * block + within)));
        (0..2 * self.groups as i32).flat_map(pair).collect()
    }
}

/// Where the tokens of a tile from token `start` on lie in its stage.
fn in_stage<'k>(start: Val<'k, i32>, places: &[Place<'k>]) -> Vec<Place<'k>> {
    places.iter().map(|place| Place { row: place.first - start, ..*place }).collect()
}

/// Chunks of a key that each lane of a quad has.
pub(super) fn key_chunks(storage: &Storage) -> usize {
    storage.pitch().div_ceil(KEY_LANES * CHUNK)
}
