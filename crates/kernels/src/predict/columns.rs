//! The columns of a block of tokens, summed up.

use sage_ptx::{Shared, Val};

use super::fold::{Fold, halves, reversed};
use crate::grid::grid;
use crate::preprocess::{CHUNK, Head, ROWS, Rows, Source};

/// Most threads that share a chunk of channels.
const MOST_SLOTS: usize = 16;

/// The blocks of a tensor's tokens, each summed up by a block of threads: a thread adds eight rows of eight channels at a
/// time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokenBlocks {
    /// The tensor as given.
    pub source: Source,
    /// Tokens of a block.
    pub tokens: usize,
}

impl TokenBlocks {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        (self.chunks() * self.slots()) as u32
    }

    /// Blocks along x, y and z.
    pub fn grid(&self, rows: usize, heads: usize, sequences: usize) -> [u32; 3] {
        grid(rows.div_ceil(self.tokens), heads * sequences)
    }

    /// Channels.
    pub(super) const fn width(&self) -> usize {
        self.source.padded_dim()
    }

    /// Chunks of channels.
    pub(super) const fn chunks(&self) -> usize {
        self.width() / CHUNK
    }

    /// Threads that share a chunk of channels: one for each eight tokens, but at least a warp of all, and no more than
    /// read a long block in turns.
    pub(super) fn slots(&self) -> usize {
        let eights = self.tokens.div_ceil(ROWS).next_power_of_two();
        eights.clamp((32 / self.chunks()).max(1), MOST_SLOTS)
    }

    /// Eights of a thread, filled up to a power of two.
    pub(super) fn turns(&self) -> usize {
        self.tokens.div_ceil(ROWS * self.slots()).next_power_of_two()
    }
}

/// Sums of a block's columns, of several quantities, in shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Columns<'k> {
    blocks: TokenBlocks,
    /// What each thread has summed up, `[quantities][slots][width]`.
    parts: Shared<'k, f32>,
}

impl<'k> Columns<'k> {
    /// Sums up the `count` tokens, at least one, from row `first` of the sequence on. `of_eight` makes of eight rows
    /// their sums in each of the thread's channels, for each of `quantities`.
    #[track_caller]
    pub fn new(
        head: &Head<'k>,
        blocks: TokenBlocks,
        [first, count]: [Val<'k, i32>; 2],
        quantities: usize,
        of_eight: impl Fn(&Rows<'k>) -> Vec<[Val<'k, f32>; CHUNK]>,
    ) -> Self {
        let code = head.code;
        let (slots, turns) = (blocks.slots(), blocks.turns());
        let sums_of = |eight: Val<'k, i32>| -> Vec<Val<'k, f32>> {
            let at = eight * ROWS as i32;
            of_eight(&head.load_eight(first + at, count - at)).concat()
        };
        let sums = if turns == 1 {
            sums_of(head.part)
        } else {
            let fold = Fold::new(code, quantities * CHUNK, turns.ilog2() as usize);
            reversed(code, code.constant(turns as i32), |leaf, turn| {
                fold.push(leaf, &sums_of(turn * slots as i32 + head.part));
            });
            fold.totals()
        };
        let parts = code.shared::<f32>("columns", quantities * slots * blocks.width());
        let own = parts.at(head.part * blocks.width() as i32 + head.chunk * CHUNK as i32);
        for (quantity, sums) in sums.chunks(CHUNK).enumerate() {
            let own = own.plus((quantity * slots * blocks.width()) as i32);
            own.store_vector::<4>(std::array::from_fn(|i| sums[i]));
            own.plus(4).store_vector::<4>(std::array::from_fn(|i| sums[4 + i]));
        }
        code.barrier();
        Columns { blocks, parts }
    }

    /// The sum of a channel, of quantity 0, 1 and so on.
    #[track_caller]
    pub fn total(&self, quantity: usize, channel: Val<'k, i32>) -> Val<'k, f32> {
        let (width, slots) = (self.blocks.width(), self.blocks.slots());
        let column = self.parts.at(channel);
        let part = |slot: usize| column.plus(((quantity * slots + slot) * width) as i32).load();
        halves(&(0..slots).map(part).collect::<Vec<_>>())
    }
}
