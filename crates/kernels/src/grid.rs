//! Grids with as many blocks along x for each head of each sequence.
//!
//! A launch allows 2³¹ − 1 blocks along x, but only 65,535 along y and along z: too few for all heads of a large batch
//! along one of them. So heads are numbered, those of a sequence one after the other, and the numbers are folded over y
//! and z. Blocks start first along x, then along y, then along z: in the order of the numbers.

use sage_ptx::{Code, Val};

/// Most blocks along y, and along z.
const MAX_BLOCKS: usize = 65_535;

/// Blocks along x, y and z: `blocks` for each of `numbers`. Up to [`MAX_BLOCKS`] numbers all lie along y; beyond, fewer
/// numbers than there are blocks along z are left over.
pub(crate) fn grid(blocks: usize, numbers: usize) -> [u32; 3] {
    let z = numbers.div_ceil(MAX_BLOCKS).max(1);
    let y = numbers.div_ceil(z).max(1);
    // What no launch allows is refused there.
    [blocks.max(1), y, z].map(|blocks| u32::try_from(blocks).unwrap_or(u32::MAX))
}

/// The block's number, which may be one that [`grid`] left over.
#[track_caller]
pub(crate) fn number(code: &Code) -> Val<'_, i32> {
    let ([_, y, z], [_, along_y, _]) = (code.block_index(), code.grid());
    (z * along_y + y).named("number")
}

/// The head of a sequence that a block works on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockHead<'k> {
    /// Index of the sequence, or of something else that has all heads.
    pub sequence: Val<'k, i32>,
    /// Index of the head in it.
    pub head: Val<'k, i32>,
}

impl<'k> BlockHead<'k> {
    /// That of the block's number, where each sequence has `heads` and all have `all_heads`. Blocks left over end.
    #[track_caller]
    pub fn new(code: &'k Code, heads: Val<'k, i32>, all_heads: Val<'k, i32>) -> Self {
        let number = number(code);
        code.exit_when(number.ge(all_heads));
        BlockHead::of(number, heads)
    }

    /// That of a number, which is not negative.
    #[track_caller]
    pub fn of(number: Val<'k, i32>, heads: Val<'k, i32>) -> Self {
        let sequence = (number.reinterpret::<u32>() / heads.reinterpret::<u32>()).reinterpret::<i32>();
        let sequence = sequence.named("sequence");
        BlockHead { sequence, head: (number - sequence * heads).named("head") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sage_core::MAX_HEADS;

    #[test]
    fn every_number_has_a_block_and_few_are_left_over() {
        for numbers in [1, 2, 140, 65_535, 65_536, 65_541, 131_070, 131_071, 1_000_003, MAX_HEADS] {
            let [x, y, z] = grid(7, numbers).map(|blocks| blocks as usize);
            assert_eq!(x, 7);
            assert!(y <= MAX_BLOCKS && z <= MAX_BLOCKS, "{numbers}: {y}, {z}");
            assert!((numbers..numbers + z).contains(&(y * z)), "{numbers}: {y}, {z}");
        }
        assert_eq!(grid(7, 65_535), [7, 65_535, 1]);
        assert_eq!(grid(0, 0), [1, 1, 1], "a launch of no blocks is an error");
    }
}
