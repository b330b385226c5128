//! How the work of a launch grows with a call.

use sage_core::Problem;
use sage_kernels::{KEY_TILE, seen_key_tiles};

use super::work::Work;
use crate::failure::Result;

/// Blocks of queries and tiles of keys of the small calls: enough of them that beginnings and ends are no part of what
/// each costs more.
const BLOCKS: [usize; 2] = [2, 3];
const TILES: [usize; 2] = [2, 4];

/// The work of a launch: a constant, and what each block of queries, each tile of keys and each pair of them adds.
#[derive(Clone, Copy, Debug)]
pub struct Growth {
    constant: Work,
    of_block: Work,
    of_tile: Work,
    of_pair: Work,
}

/// How many blocks, tiles and pairs a call has, all heads and sequences together.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Blocks of queries of query heads.
    pub blocks: f64,
    /// Tiles of keys of key heads.
    pub tiles: f64,
    /// Pairs of which some score is seen.
    pub pairs: f64,
}

impl Extent {
    /// That of a call, for blocks of `block_q` queries.
    pub fn of(problem: &Problem, block_q: usize) -> Self {
        let Problem { batch, num_q_heads, num_kv_heads, q_len, kv_len, .. } = *problem;
        let heads = (batch * num_q_heads) as f64;
        let pairs_of_head: usize =
            (0..q_len).step_by(block_q).map(|first| seen_key_tiles(problem, first, block_q)).sum();
        Extent {
            blocks: heads * q_len.div_ceil(block_q) as f64,
            tiles: (batch * num_kv_heads * kv_len.div_ceil(KEY_TILE)) as f64,
            pairs: heads * pairs_of_head as f64,
        }
    }
}

impl Growth {
    /// That of each launch of a pass, whose work for so many blocks and tiles `work` tells.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn of_launches(mut work: impl FnMut(usize, usize) -> Result<Vec<Work>>) -> Result<Vec<Growth>> {
        let small = [work(BLOCKS[0], TILES[0])?, work(BLOCKS[0], TILES[1])?];
        let large = [work(BLOCKS[1], TILES[0])?, work(BLOCKS[1], TILES[1])?];
        let launches = 0..small[0].len();
        Ok(launches
            .map(|i| Growth::through([small[0][i], small[1][i]], [large[0][i], large[1][i]]))
            .collect())
    }

    /// The one whose work is this at the small calls: by blocks, and among them by tiles.
    fn through(small: [Work; 2], large: [Work; 2]) -> Self {
        let steps = [BLOCKS, TILES].map(|sizes| 1.0 / (sizes[1] - sizes[0]) as f64);
        let of_tile_at = |[few, many]: [Work; 2]| many.plus(few.times(-1.0)).times(steps[1]);
        let (at_small, at_large) = (of_tile_at(small), of_tile_at(large));
        let of_pair = at_large.plus(at_small.times(-1.0)).times(steps[0]);
        let of_tile = at_small.plus(of_pair.times(-(BLOCKS[0] as f64)));
        let of_block_at = large[0].plus(small[0].times(-1.0)).times(steps[0]);
        let of_block = of_block_at.plus(of_pair.times(-(TILES[0] as f64)));
        let others = of_block.times(BLOCKS[0] as f64).plus(at_small.times(TILES[0] as f64));
        Growth { constant: small[0].plus(others.times(-1.0)), of_block, of_tile, of_pair }
    }

    /// The work for a call; `idle` is how much longer blocks take as they do not divide evenly among multiprocessors.
    pub fn at(&self, extent: &Extent, idle: f64) -> Work {
        // All blocks of a head read the same tiles at about the same time: from memory once, and then from the cache.
        let pairs = self.of_pair.times(extent.pairs);
        let once = extent.tiles.min(extent.pairs) / extent.pairs.max(1.0);
        let pairs = Work { memory: pairs.memory * once, ..pairs };
        let of_blocks = self.of_block.times(extent.blocks).plus(pairs).times(idle);
        self.constant.plus(self.of_tile.times(extent.tiles)).plus(of_blocks).at_least_nothing()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sage_core::{Alignment, Band, Call, Inputs, Options, Tensor};

    fn work(amount: f64) -> Work {
        Work { issue: amount, memory: 2.0 * amount, ..Work::default() }
    }

    #[test]
    fn four_calls_say_what_each_part_costs() {
        let launch = |blocks: usize, tiles: usize| {
            let (blocks, tiles) = (blocks as f64, tiles as f64);
            Ok(vec![work(7.0 + 5.0 * blocks + 3.0 * tiles + 2.0 * blocks * tiles)])
        };
        let growth = Growth::of_launches(launch).unwrap()[0];
        let parts = [growth.constant, growth.of_block, growth.of_tile, growth.of_pair];
        assert_eq!(parts.map(|part| part.issue), [7.0, 5.0, 3.0, 2.0]);
        let extent = Extent { blocks: 10.0, tiles: 20.0, pairs: 200.0 };
        let found = growth.at(&extent, 1.0);
        assert_eq!(found.issue, 7.0 + 50.0 + 60.0 + 400.0);
        // Each of the 20 tiles is read from memory once, not for each of 200 pairs.
        assert_eq!(found.memory, 2.0 * (7.0 + 50.0 + 60.0 + 40.0));
    }

    #[test]
    fn a_causal_call_has_half_of_the_pairs() {
        let x = Tensor::new(vec![0f32; 4 * 1024 * 8], &[1, 4, 1024, 8]).unwrap();
        let extent = |band: Band| {
            let inputs = Inputs::new(x.view(), x.view(), x.view());
            let call = Call::check(&inputs, &Options::default().band(band)).unwrap();
            Extent::of(&call.problem, 128)
        };
        let full = extent(Band::FULL);
        assert_eq!([full.blocks, full.tiles, full.pairs], [32.0, 64.0, 512.0]);
        // Blocks 1 to 8 of each head see twice as many tiles as their number.
        assert_eq!(extent(Band::causal(Alignment::TopLeft)).pairs, 4.0 * 72.0);
    }
}
