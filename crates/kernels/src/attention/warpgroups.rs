//! The same attention on `wgmma`: groups of four warps multiply tiles that one more thread has copied.
//!
//! While a group computes the softmax of a tile, its product of the tile before with V is in flight; the tensor cores
//! also serve the other groups meanwhile. That product reads its P from registers: a tile's exponentials are rounded
//! into them once it is done, which it long is by then.

use sage_core::Accumulator as Precision;
use sage_ptx::{
    Code, Half, MatrixDescriptor, MmaAccumulator, MmaElement, OperandVars, PanelMatrix, RoundedElement,
    Stored, Tile, Val, Var, WarpgroupA, warpgroup_product,
};

use super::config::{AttentionConfig, AttentionParams, Scores, ValueSource, Values, WARPGROUP};
use super::epilogue::Epilogue;
use super::key_tiles::{KeyTile, Span, TileListParams};
use super::output::Output;
use super::pipeline::Cursor;
use super::place::Place;
use super::queries::{Queries, depth_steps};
use super::scores::{KeyScales, Scoring};
use super::softmax::Softmax;
use super::tma_ring::{TENSOR_MAPS, TmaRing};
use super::work_queue::WorkQueue;
use crate::integer::ROUNDING_MAGIC_BITS;
use crate::sequence::{KEY_TILE, Lengths};

/// Registers of a multiprocessor, and what a thread of the producer's warpgroup needs.
const REGISTERS: u32 = 64 << 10;
const PRODUCER_REGISTERS: u32 = 24;
/// Most registers of a thread, in the steps of `setmaxnreg`.
const MOST_REGISTERS: u32 = 240;

/// Registers of each consumer's thread.
fn consumer_registers(config: &AttentionConfig) -> u32 {
    let left = REGISTERS - WARPGROUP * PRODUCER_REGISTERS;
    (left / config.threads() / 8 * 8).min(MOST_REGISTERS)
}

pub(super) fn write<'k, H, E>(
    k: &'k Code,
    config: &AttentionConfig,
    p: &AttentionParams<'k>,
    lists: Option<&TileListParams<'k>>,
) where
    H: Half + MmaElement + Stored<Value = H>,
    E: RoundedElement,
{
    let maps = TENSOR_MAPS.map(|name| k.tensor_map(name));
    let ring = TmaRing::new(k, config, maps);
    let work = WorkQueue::new(k, config, p, lists);
    k.barrier();
    let [warp, lane] = work.thread;
    let produces = warp.ge(config.tiling.warps() as i32);
    k.if_else(
        produces,
        || {
            k.fewer_registers(PRODUCER_REGISTERS);
            let first = warp.eq(config.tiling.warps() as i32) & lane.eq(0);
            k.when(first, || {
                let cursor = Cursor::new(k, config.tiling.stages(), "produced");
                work.hand_out(|place| {
                    place.key_tiles.for_each_loaded(k, |tile| ring.load(place, tile, &cursor));
                });
            });
        },
        || {
            k.more_registers(consumer_registers(config));
            let cursors = Cursors::new(k, config);
            work.take(|place| {
                Consumer::<E>::new::<H>(k, config, p, place, &ring, &cursors).compute::<H>(p);
            });
        },
    );
}

/// Where a warpgroup stands in the ring.
struct Cursors<'k> {
    /// The tile of K whose scores are started next, from one piece of work to the next.
    next: Cursor<'k>,
    /// The tile whose softmax is computed.
    own: Cursor<'k>,
    /// The tile before it.
    done: Cursor<'k>,
}

impl<'k> Cursors<'k> {
    fn new(code: &'k Code, config: &AttentionConfig) -> Self {
        let cursor = |name| Cursor::new(code, config.tiling.stages(), name);
        Cursors { next: cursor("next"), own: cursor("own"), done: cursor("done") }
    }

    /// The next tile's scores are there.
    fn advance(&self) {
        self.done.set(&self.own);
        self.own.set(&self.next);
        self.next.advance();
    }
}

/// What a thread that computes holds. `E` is the element of P and V.
struct Consumer<'k, 'c, 'r, E> {
    code: &'k Code,
    config: &'c AttentionConfig,
    ring: &'r TmaRing<'k, 'c>,
    scoring: Scoring<'k, 'c>,
    key_scales: KeyScales<'k>,
    /// Scales of the next tile's keys, for each 64 of them.
    scales: Vec<Vec<Var<'k, f32>>>,
    softmax: Softmax<'k>,
    /// Sums of P·V over all tiles, and beside them those of P where they are products.
    sums: Tile<Var<'k, f32>>,
    /// A tile's own sums, where they are not added to all tiles' at once: of the last columns of `sums`.
    parts: Tile<Var<'k, f32>>,
    /// Scores of a tile.
    scores: Tile<Var<'k, f32>>,
    /// P of a tile.
    probabilities: OperandVars<'k, E>,
    cursors: &'r Cursors<'k>,
}

impl<'k, 'c, 'r, E: RoundedElement> Consumer<'k, 'c, 'r, E> {
    fn new<H: Half + Stored<Value = H>>(
        code: &'k Code,
        config: &'c AttentionConfig,
        p: &AttentionParams<'k>,
        place: Place<'k>,
        ring: &'r TmaRing<'k, 'c>,
        cursors: &'r Cursors<'k>,
    ) -> Self {
        let queries = Queries::load::<H>(code, config, p, &place);
        let key_scales = KeyScales::new(config, p, &place);
        let tile_keys = config.tiling.tile_keys();
        let output = Tile::filled(code, 1, Output::blocks(config), 0.0);
        let softmax = Softmax::new(code, config);
        let sums = match softmax.sums_in_flight() {
            Some(of_p) => output.beside(of_p),
            None => output,
        };
        // E4M3 products lose the low bits of sums as large as P's over many keys.
        let parts = match config.values {
            Values::Fp8(Precision::F32ThenF32) => sums.blocks(),
            Values::Fp8(_) => sums.blocks() - Output::blocks(config),
            _ => 0,
        };
        Consumer {
            code,
            config,
            ring,
            scoring: Scoring { code, config, params: *p, place, queries },
            softmax,
            sums,
            parts: Tile::new(code, 1, parts),
            scales: (0..tile_keys / KEY_TILE)
                .map(|_| (0..key_scales.count()).map(|_| Var::new(code)).collect())
                .collect(),
            key_scales,
            scores: Tile::new(code, 1, tile_keys / 8),
            probabilities: OperandVars::new(code, tile_keys),
            cursors,
        }
    }

    fn compute<H: Half + MmaElement + Stored<Value = H>>(&self, p: &AttentionParams<'k>) {
        self.tiles::<H>();
        let Scoring { place, queries, .. } = &self.scoring;
        let output =
            Output::of_sums(self.code, self.config, self.sums.columns(0..Output::blocks(self.config)));
        let sums = self.softmax.finish();
        Epilogue::new(self.code, self.config, p, place).store::<H>(&output, &sums, &queries.taken, None);
    }

    fn tiles<H: Half + MmaElement>(&self) {
        let (k, place) = (self.code, &self.scoring.place);
        let tiles = &place.key_tiles;
        let Span { start, end } = tiles.own();
        let last = end - 1;
        tiles.for_each_before(k, |tile| self.pass(tile));
        k.when(start.le(last), || {
            self.load_scales(tiles.at(start).index);
            self.parts.fill(0.0);
            self.start_scores::<H>();
            self.take_scores(0);
            k.range(start, last, |position| self.tile::<H>(&tiles.at(position), true));
            self.tile::<H>(&tiles.at(last), false);
            self.drain();
            self.ring.values.release(place.lane, &self.cursors.own);
        });
        tiles.for_each_behind(k, |tile| self.pass(tile));
    }

    /// Lets a tile pass that only other groups' rows see.
    fn pass(&self, tile: Val<'k, i32>) {
        let (place, next) = (&self.scoring.place, &self.cursors.next);
        self.ring.keys.wait(next);
        self.ring.keys.release(place.lane, next);
        self.ring.values.wait(next);
        self.clear_values(tile, next);
        self.ring.values.release(place.lane, next);
        next.advance();
    }

    /// The work of a tile whose scores are there: its softmax, then the start of the next tile's scores, where there is
    /// one, and of its own product with V, until those scores are there.
    fn tile<H: Half + MmaElement>(&self, tile: &KeyTile<'k>, has_next: bool) {
        let (k, place) = (self.code, &self.scoring.place);
        let p = self.exponentials(tile, has_next);
        // The tile's values have mostly arrived by now. The loop around the wait keeps the compiler from moving the
        // exponentials behind the end of the product in flight, which they overlap with.
        self.ring.values.wait(&self.cursors.own);
        self.drain();
        let first = place.key_tiles.own().start;
        k.when(tile.position.gt(first), || self.ring.values.release(place.lane, &self.cursors.done));
        self.probabilities.set(&p);
        if has_next {
            self.start_scores::<H>();
        }
        self.start_output(tile.index);
        if has_next {
            self.take_scores(1);
        }
    }

    /// Waits for the scores of the next tile, after which `later` products were started, and frees its keys.
    fn take_scores(&self, later: u32) {
        self.code.wait_products(later, self.scores.registers());
        self.ring.keys.release(self.scoring.place.lane, &self.cursors.next);
        self.cursors.advance();
    }

    /// Starts loading the scales of a tile of keys, which must be one of the sequence's, a tile ahead of their use.
    fn load_scales(&self, tile: Val<'k, i32>) {
        let parts = (self.config.tiling.tile_keys() / KEY_TILE) as i32;
        for (part, scales) in self.scales.iter().enumerate() {
            let index = tile * parts + part as i32;
            // Only the first of several parts always has keys.
            let index = if part == 0 {
                index
            } else {
                index.min(self.scoring.place.sequence.kv_len.div_ceil(KEY_TILE) - 1)
            };
            scales.iter().zip(self.key_scales.of_tile(index)).for_each(|(var, scale)| var.set(scale));
        }
    }

    /// Starts the products of the queries with the next tile of keys.
    fn start_scores<H: Half + MmaElement>(&self) {
        self.code.note("scores: q * k^T");
        if self.config.scores != Scores::Full {
            // Products of integers are added to the bits of a float, so that sums are floats at once.
            self.scores.reinterpret::<i32>().fill(ROUNDING_MAGIC_BITS);
        }
        self.ring.keys.wait(&self.cursors.next);
        let keys = self.ring.keys.matrix(&self.cursors.next);
        match self.config.scores {
            Scores::Full => self.multiply_queries::<H, f32>(&keys, false),
            Scores::Int(_) => self.multiply_queries::<i8, i32>(&keys, true),
        }
    }

    fn multiply_queries<Q: MmaElement, T: MmaAccumulator>(&self, keys: &PanelMatrix<'k>, add: bool) {
        let sums = self.scores.reinterpret::<T>();
        self.code.fence_products();
        for step in 0..depth_steps(self.config) {
            let a = self.scoring.queries.warpgroup_operand::<Q>(step);
            warpgroup_product(
                sums.registers(),
                a,
                keys.depth_in_columns(0, 32 * step),
                false,
                add || step > 0,
            );
        }
        self.code.commit_products();
    }

    /// The exponentials of a tile's scores, while the product of the tile before is in flight.
    fn exponentials(&self, tile: &KeyTile<'k>, has_next: bool) -> Tile<Val<'k, f32>> {
        let (k, place) = (self.code, &self.scoring.place);
        let parts = self.config.tiling.tile_keys() / KEY_TILE;
        let scales: Vec<Vec<_>> =
            self.scales.iter().map(|scales| scales.iter().map(|scale| scale.get()).collect()).collect();
        if has_next {
            self.load_scales(place.key_tiles.at(tile.position + 1).index);
        }
        let of_part = |(part, scales): (usize, &Vec<_>)| {
            let first_key = (tile.index * parts as i32 + part as i32) * KEY_TILE as i32;
            let blocks = KEY_TILE / 8;
            let scores = self.scores.columns(blocks * part..blocks * (part + 1));
            self.scoring.scaled(scores, first_key, 0, scales)
        };
        let tiles: Vec<_> = scales.iter().enumerate().map(of_part).collect();
        k.when(tile.is_cut(), || tiles.iter().for_each(|scores| scores.hide(place)));
        let p = self.softmax.advance(k, &tiles, |alphas| {
            self.drain();
            // They are in, and shall not count a second time.
            self.parts.fill(0.0);
            k.note("output: rescale");
            self.sums.mul_rows(alphas);
        });
        let p = p.iter().map(|p| p.exponentials()).reduce(|tile, part| tile.beside(&part));
        p.expect("a tile has keys")
    }

    /// Starts the product of P, which is that of tile `tile`, with its values, which have arrived.
    fn start_output(&self, tile: Val<'k, i32>) {
        self.code.note("output: p * v");
        let values = self.ring.values.matrix(&self.cursors.own);
        self.clear_values(tile, &self.cursors.own);
        match self.config.values {
            Values::Fp8(_) => self.multiply_values(|step| values.depth_in_columns(0, 32 * step), false),
            _ => self.multiply_values(|step| values.depth_in_rows(16 * step), true),
        }
    }

    /// Clears what no query sees in a tile of V as given, whether a mask hides it or it lies behind the end of the
    /// sequence: all groups meet there.
    fn clear_values(&self, tile: Val<'k, i32>, cursor: &Cursor<'k>) {
        let (k, config, place) = (self.code, self.config, &self.scoring.place);
        let tile_keys = config.tiling.tile_keys() as i32;
        if config.value_source != ValueSource::Given {
            return;
        }
        if let Some(seen) = place.seen {
            let parts = tile_keys / KEY_TILE as i32;
            let first = tile * parts;
            // Only the first of several parts always has keys, and words.
            let words = |part: i32| {
                let last = place.sequence.kv_len.div_ceil(KEY_TILE) - 1;
                seen.tile(if part == 0 { first } else { (first + part).min(last) })
            };
            let all = (0..parts).map(|part| words(part).all_visible());
            let all = all.reduce(|a, b| a & b).unwrap_or(k.constant(true));
            k.when(!all, || {
                let hides = |row: Val<'k, i32>| {
                    let key = tile * tile_keys + row;
                    let there = key.lt(place.sequence.kv_len);
                    !(there & seen.is_visible(there.select(key, 0)))
                };
                self.ring.clear_values(hides, cursor);
            });
        } else if config.lengths != Lengths::Dense {
            let rows = place.sequence.kv_len - tile * tile_keys;
            k.when(rows.lt(tile_keys), || self.ring.clear_values(|row| row.ge(rows), cursor));
        }
    }

    fn multiply_values(&self, values: impl Fn(usize) -> MatrixDescriptor<'k>, transposed: bool) {
        let p = self.probabilities.fragments();
        let sums = self.sums_of_tile();
        let add = self.parts.blocks() < sums.blocks();
        if add {
            self.parts.fill(0.0);
        }
        self.code.fence_products();
        for (step, p) in p.into_iter().enumerate() {
            let p = WarpgroupA::Registers(p);
            warpgroup_product(sums.registers(), p, values(step), transposed, add || step > 0);
        }
        self.code.commit_products();
    }

    /// The columns of the sums that have no part of a tile's own, and those that have.
    fn columns(&self) -> [Tile<Var<'k, f32>>; 2] {
        let (all, parts) = (self.sums.blocks(), self.parts.blocks());
        [0..all - parts, all - parts..all].map(|blocks| self.sums.columns(blocks))
    }

    /// What P·V of a tile is added to.
    fn sums_of_tile(&self) -> Tile<Var<'k, f32>> {
        let [at_once, _] = self.columns();
        at_once.beside(&self.parts)
    }

    /// Waits for the product with V, whose own sums go into those of all tiles.
    fn drain(&self) {
        self.code.wait_products(0, self.sums_of_tile().registers());
        let [_, of_parts] = self.columns();
        let pairs = of_parts.registers().iter().zip(self.parts.registers());
        pairs.rev().for_each(|(sum, part)| sum.set(sum.get() + part.get()));
    }
}
