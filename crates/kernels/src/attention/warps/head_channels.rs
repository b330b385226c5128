//! Which channels of a head a block's tiles have, and elements of rows that are not whole chunks.

use sage_ptx::{Global, Use, Val};

use crate::attention::config::AttentionConfig;
use crate::attention::place::Place;

/// The channels of a head that tiles have.
#[derive(Clone, Copy)]
pub(super) struct HeadChannels<'k> {
    /// How many: all of the head's, or those of each of the blocks that share them.
    pub dim: usize,
    /// The first, where several blocks share them.
    pub first: Option<Val<'k, i32>>,
    /// How many the head has from there on, where the last block has fewer than the others.
    pub left: Option<Val<'k, i32>>,
}

impl<'k> HeadChannels<'k> {
    /// The block's channels of V.
    pub fn of_values(config: &AttentionConfig, place: &Place<'k>) -> Self {
        let first = place.values.map(|values| values.first);
        let left = first.filter(|_| config.last_values_are_fewer());
        let left = left.map(|first| first.code().constant(config.value_dim as i32) - first);
        HeadChannels { dim: config.block_values(), first, left }
    }

    /// Whether the head has some of a chunk, where not every block has all chunks.
    pub fn has(&self, chunk: impl FnOnce() -> Val<'k, i32>) -> Option<Val<'k, bool>> {
        self.left.map(|left| (chunk() * 8).lt(left))
    }

    /// The elements of a chunk that a row has, loaded one by one.
    pub fn elements(
        &self,
        from: Global<'k, u16>,
        chunk: Val<'k, i32>,
        valid: Val<'k, bool>,
    ) -> [Val<'k, u32>; 4] {
        match self.left {
            Some(left) => elements(left, from, chunk, valid),
            None => elements(self.dim as i32, from, chunk, valid),
        }
    }
}

/// A chunk's eight elements, loaded one by one, zeros beyond the head and where the row is not valid.
pub(crate) fn elements<'k>(
    head_dim: impl Use<'k, i32> + Copy,
    from: Global<'k, u16>,
    chunk: Val<'k, i32>,
    valid: Val<'k, bool>,
) -> [Val<'k, u32>; 4] {
    let element = |i: i32| {
        let here = valid & (chunk * 8 + i).lt(head_dim);
        // An element that is not there is read from the chunk's start, which is, and dropped.
        let offset = here.select(i, 0);
        here.select(from.at(offset).load(), 0u32)
    };
    [0, 1, 2, 3].map(|word| element(2 * word) | (element(2 * word + 1) << 16))
}
