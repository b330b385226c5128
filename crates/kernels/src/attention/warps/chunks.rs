//! Chunks of a tile: how the threads of a block share them out, and what becomes of a thread's.

use sage_ptx::{ChunkAddress, Code, Global, Shared, SharedTile, Val, Var};

use super::copied_tiles::CopiedTiles;
use crate::attention::config::AttentionConfig;

/// What becomes of the thread's chunks of a tile.
pub(super) trait ChunkSink<'k> {
    /// Takes the 16 bytes at `from`, those of a round.
    fn take(&self, round: usize, from: Global<'k, u8>);

    /// The same where it is `valid`; zeros elsewhere, where the address may lie anywhere.
    fn take_where(&self, round: usize, from: Global<'k, u8>, valid: Val<'k, bool>);

    /// Takes 16 bytes that `words` makes.
    fn take_words(&self, round: usize, words: impl FnOnce() -> [Val<'k, u32>; 4]);
}

/// Copies by `cp.async` to a stage.
pub(super) struct AsyncCopies<'k>(pub Targets<'k>);

impl<'k> ChunkSink<'k> for AsyncCopies<'k> {
    fn take(&self, round: usize, from: Global<'k, u8>) {
        self.0.of_round(round).copy_async(from, 16, 16);
    }

    fn take_where(&self, round: usize, from: Global<'k, u8>, valid: Val<'k, bool>) {
        // A copy of no bytes reads nothing.
        let valid = valid.select(16, 0);
        self.0.of_round(round).copy_async(from, 16, valid);
    }

    fn take_words(&self, round: usize, words: impl FnOnce() -> [Val<'k, u32>; 4]) {
        let target = self.0.of_round(round);
        target.cast::<u32>().store_vector(words());
    }
}

/// The thread's chunks of a tile in registers, of each round.
pub(super) struct Parts<'k>(pub Vec<[Var<'k, u32>; 4]>);

impl<'k> ChunkSink<'k> for Parts<'k> {
    fn take(&self, round: usize, from: Global<'k, u8>) {
        from.cast::<u32>().load_streaming_into(self.0[round]);
    }

    fn take_where(&self, round: usize, from: Global<'k, u8>, valid: Val<'k, bool>) {
        let words = self.0[round];
        words.iter().for_each(|word| word.set(0u32));
        valid.code().when(valid, || from.cast::<u32>().load_streaming_into(words));
    }

    fn take_words(&self, round: usize, words: impl FnOnce() -> [Val<'k, u32>; 4]) {
        self.0[round].iter().zip(words()).for_each(|(word, value)| word.set(value));
    }
}

/// How the threads of a block share out the chunks of a tile: each takes every `threads`-th.
#[derive(Clone, Copy)]
pub(super) struct Rounds<'k> {
    code: &'k Code,
    thread: Val<'k, i32>,
    pub threads: usize,
    /// Chunks of a row, and those that neighbouring threads take at once.
    chunks: usize,
    across: usize,
    /// Chunks of the tile.
    pub total: usize,
    /// Row of the thread's first.
    pub first_row: Val<'k, i32>,
    /// Its chunk in that row.
    pub first_chunk: Val<'k, i32>,
}

impl<'k> Rounds<'k> {
    pub fn new(code: &'k Code, config: &AttentionConfig, tiles: &CopiedTiles<'k>) -> Self {
        let (threads, thread) = (config.threads() as usize, code.thread());
        let (chunks, total) = (tiles.chunks, tiles.rows * tiles.chunks);
        let across = tiles.across;
        let (first_row, first_chunk) = thread.split_index(across);
        Rounds { code, thread, threads, chunks, across, total, first_row, first_chunk }
    }

    pub fn count(&self) -> usize {
        self.total.div_ceil(self.threads)
    }

    /// Rows of a round.
    pub fn rows(&self) -> i32 {
        (self.threads / self.across) as i32
    }

    /// Rounds of each row.
    pub fn columns(&self) -> usize {
        self.chunks / self.across
    }

    /// Rounds of all rows.
    pub fn rounds_of_rows(&self) -> usize {
        self.count() / self.columns()
    }

    /// Row and chunk of the thread in a round.
    pub fn place(&self, round: usize) -> (Val<'k, i32>, Val<'k, i32>) {
        (self.thread + (round * self.threads) as i32).split_index(self.chunks)
    }

    /// Where the thread's chunks go in a stage.
    pub fn targets(&self, to: SharedTile<'k>) -> Targets<'k> {
        Targets { rounds: *self, to, first: to.chunk(self.first_row, self.first_chunk) }
    }

    /// Executes `start` where the tile has a chunk for the thread in a round.
    pub fn when_there(&self, round: usize, start: impl FnOnce()) {
        if (round + 1) * self.threads <= self.total {
            start();
        } else {
            self.code.when((self.thread + (round * self.threads) as i32).lt(self.total as i32), start);
        }
    }
}

/// Where the thread's chunks of a tile go in a stage.
pub(super) struct Targets<'k> {
    rounds: Rounds<'k>,
    to: SharedTile<'k>,
    first: ChunkAddress<'k>,
}

impl<'k> Targets<'k> {
    /// Where that of a round goes.
    pub fn of_round(&self, round: usize) -> Shared<'k, u8> {
        let rounds = &self.rounds;
        // Where a round is a multiple of 8 rows, a thread's chunks are at fixed distances.
        if rounds.threads.is_multiple_of(8 * rounds.across) {
            let (row, column) = (round / rounds.columns(), round % rounds.columns());
            return self.first.step(row * rounds.rows() as usize, column * rounds.across);
        }
        let (row, chunk) = rounds.place(round);
        self.to.chunk(row, chunk).step(0, 0)
    }
}
