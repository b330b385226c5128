//! A consumer: a warpgroup's part of attention on `wgmma`.
//!
//! While it computes the softmax of a tile, its product of the tile before with V is in flight; the tensor cores also
//! serve the other consumers meanwhile. That product reads its P from registers: a tile's exponentials are rounded into
//! them once it is done, which it long is by then.

use sage_ptx::{
    Code, Half, MmaAccumulator, MmaElement, OperandVars, PanelMatrix, RoundedElement, Shared, Stored, Tile,
    Val, Var,
};

use super::bias_ring::{self, BiasRing};
use super::output_in_flight::OutputInFlight;
use super::query_stage::QueryStage;
use super::tma_ring::TmaRing;
use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::epilogue::Epilogue;
use crate::attention::key_tiles::{KeyTile, Span, Walk};
use crate::attention::pipeline::Cursor;
use crate::attention::place::Place;
use crate::attention::queries::{Queries, depth_steps};
use crate::attention::scores::{KeyScales, MaskSource, Masking, Scoring};
use crate::attention::softmax::Softmax;
use crate::integer::ROUNDING_MAGIC_BITS;
use crate::operand::{Element, OperandSource};
use crate::sequence::{KEY_TILE, Lengths};
use crate::sparse::{LaneBits, LaneWords, Packing};

/// Where a warpgroup stands in the ring.
pub(super) struct Cursors<'k> {
    /// The tile of K whose scores are started next, from one piece of work to the next.
    next: Cursor<'k>,
    /// The tile whose softmax is computed.
    own: Cursor<'k>,
    /// The tile before it.
    done: Cursor<'k>,
    /// The next tile with biases, where they are packed.
    biases: Option<Cursor<'k>>,
    /// The next piece's queries, where they come through TMA.
    queries: Option<Cursor<'k>>,
}

/// What the producer fills.
pub(super) struct Rings<'k, 'c> {
    pub tiles: TmaRing<'k, 'c>,
    /// Where biases are packed.
    pub biases: Option<BiasRing<'k>>,
    /// Where queries come through TMA.
    pub queries: Option<QueryStage<'k>>,
}

impl<'k> Cursors<'k> {
    pub fn new(code: &'k Code, config: &AttentionConfig) -> Self {
        let cursor = |name| Cursor::new(code, config.tiling.stages(), name);
        let biases = bias_ring::stage_bytes(config) > 0;
        let biases = biases.then(|| cursor("biases"));
        let queries = config.queries_by_tma.then(|| QueryStage::cursor(code, "queries"));
        Cursors { next: cursor("next"), own: cursor("own"), done: cursor("done"), biases, queries }
    }

    /// The next tile's scores are there.
    fn advance(&self) {
        self.done.set(&self.own);
        self.own.set(&self.next);
        self.next.advance();
    }
}

/// What a consumer's thread holds. `E` is the element of P and V.
pub(super) struct Consumer<'k, 'c, 'r, E> {
    code: &'k Code,
    config: &'c AttentionConfig,
    ring: &'r TmaRing<'k, 'c>,
    /// The ring of biases, where the warpgroup stands in it, and where the lane's lie in its first stage.
    biases: Option<(&'r BiasRing<'k>, &'r Cursor<'k>, Shared<'k, u32>)>,
    /// The queries in shared memory that products read there, and where the warpgroup stands.
    staged: Option<(&'r QueryStage<'k>, &'r Cursor<'k>)>,
    /// Where a mask's bits lie, where it is packed as bits.
    bits: Option<LaneBits<'k>>,
    scoring: Scoring<'k, 'c>,
    key_scales: KeyScales<'k>,
    /// Scales of the next tile's keys, for each 64 of them.
    scales: Vec<Vec<Var<'k, f32>>>,
    /// Bits of a mask for each 64 keys of the next tile, where it is packed as bits.
    mask_words: Vec<Var<'k, u32>>,
    softmax: Softmax<'k>,
    output: OutputInFlight<'k, 'c>,
    /// Scores of a tile.
    scores: Tile<Var<'k, f32>>,
    /// P of a tile.
    probabilities: OperandVars<'k, E>,
    cursors: &'r Cursors<'k>,
}

impl<'k, 'c, 'r, E: RoundedElement> Consumer<'k, 'c, 'r, E> {
    pub fn new<H: Half + Stored<Value = H>>(
        code: &'k Code,
        config: &'c AttentionConfig,
        p: &AttentionParams<'k>,
        place: Place<'k>,
        rings: &'r Rings<'k, 'c>,
        cursors: &'r Cursors<'k>,
    ) -> Self {
        let staged = rings.queries.as_ref().zip(cursors.queries.as_ref());
        let rows = staged.map(|(stage, cursor)| stage.wait(cursor));
        let queries = Queries::load::<H>(code, config, p, &place, None, rows);
        // What was read into registers is not needed any more.
        let staged = staged.filter(|(stage, cursor)| {
            let in_place = config.multiplies_staged_queries();
            if !in_place {
                stage.release(place.lane, cursor);
            }
            in_place
        });
        let key_scales = KeyScales::new(config, p, &place);
        let tile_keys = config.tiling.tile_keys();
        let output = OutputInFlight::new(code, config);
        let softmax = Softmax::new(code, config);
        let parts = if config.packing() == Some(Packing::Bits) { tile_keys / KEY_TILE } else { 0 };
        let mask_words = (0..parts).map(|_| code.var(0u32)).collect();
        let output = output.beside(softmax.sums_in_flight());
        let biases = rings.biases.as_ref().zip(cursors.biases.as_ref());
        let biases = biases.map(|(ring, cursor)| (ring, cursor, ring.of_lane(&place)));
        let bits = place.mask_words.filter(|words| words.packing == Packing::Bits);
        let bits = bits.map(|words| words.bits(place.strip(0)));
        Consumer {
            code,
            config,
            ring: &rings.tiles,
            staged,
            biases,
            bits,
            scoring: Scoring { code, config, params: *p, place, queries },
            softmax,
            output,
            mask_words,
            scales: (0..tile_keys / KEY_TILE)
                .map(|_| (0..key_scales.count()).map(|_| Var::new(code)).collect())
                .collect(),
            key_scales,
            scores: Tile::new(code, config.tiling.rows_per_warp(), tile_keys),
            probabilities: OperandVars::new(code, tile_keys),
            cursors,
        }
    }

    /// The whole of a piece of work.
    pub fn compute<H: Half + MmaElement + Stored<Value = H>>(&self, p: &AttentionParams<'k>) {
        self.tiles::<H>();
        let Scoring { place, queries, .. } = &self.scoring;
        let (output, sums) = (self.output.finish(), self.softmax.finish());
        Epilogue::new(self.code, self.config, p, place).store::<H>(&output, &sums, &queries.taken, None);
    }

    fn tiles<H: Half + MmaElement>(&self) {
        let (k, place) = (self.code, &self.scoring.place);
        let tiles = &place.key_tiles;
        let Span { start, end } = tiles.own();
        let last = end - 1;
        tiles.for_each_before(k, |tile| self.pass(tile));
        let computed = || {
            let walk = Walk::start(k, *tiles);
            let first = walk.this(start);
            self.load_ahead(&first);
            self.output.clear_parts();
            self.start_scores::<H>();
            self.take_scores(0);
            k.range(start, last, |position| {
                self.tile::<H>(&walk, position, true);
                walk.advance();
            });
            self.release_queries();
            self.tile::<H>(&walk, last, false);
            self.output.drain();
            self.ring.values.release(place.lane, &self.cursors.own);
        };
        match self.staged {
            None => k.when(start.le(last), computed),
            Some(_) => k.if_else(start.le(last), computed, || self.release_queries()),
        }
        tiles.for_each_after(k, |tile| self.pass(tile));
    }

    /// The scores of all tiles are there, so that the next piece's queries may come.
    fn release_queries(&self) {
        if let Some((stage, cursor)) = self.staged {
            stage.release(self.scoring.place.lane, cursor);
        }
    }

    /// Lets a tile pass that only other groups' rows see.
    fn pass(&self, tile: Val<'k, i32>) {
        let (place, next) = (&self.scoring.place, &self.cursors.next);
        self.ring.keys.wait(next);
        self.ring.keys.release(place.lane, next);
        self.ring.values.wait(next);
        self.clear_outside(tile, next);
        self.ring.values.release(place.lane, next);
        next.advance();
    }

    /// The work of a tile whose scores are there: its softmax, then the start of the next tile's scores, where there is
    /// one, and of its own product with V, until those scores are there.
    fn tile<H: Half + MmaElement>(&self, walk: &Walk<'k>, position: Val<'k, i32>, has_next: bool) {
        let (k, place) = (self.code, &self.scoring.place);
        let tile = walk.this(position);
        let p = self.exponentials(&tile, has_next.then(|| walk.next(position)));
        // The tile's values have mostly arrived by now. The loop around the wait keeps the compiler from moving the
        // exponentials behind the end of the product in flight, which they overlap with.
        self.ring.values.wait(&self.cursors.own);
        self.output.drain();
        let first = place.key_tiles.own().start;
        k.when(tile.position.gt(first), || self.ring.values.release(place.lane, &self.cursors.done));
        self.probabilities.set(&p);
        if has_next {
            self.start_scores::<H>();
        }
        self.start_output(&tile);
        if has_next {
            self.take_scores(1);
        }
    }

    /// Waits for the scores of the next tile, after which `later` products were started, and frees its keys.
    fn take_scores(&self, later: u32) {
        self.scores.wait_products(self.code, later);
        self.ring.keys.release(self.scoring.place.lane, &self.cursors.next);
        self.cursors.advance();
    }

    /// Starts loading what is read of a tile a tile ahead of its use: scales of its keys, and bits of a mask.
    fn load_ahead(&self, tile: &KeyTile<'k>) {
        self.load_scales(tile.index);
        let Some(bits) = self.bits else { return };
        for (part, word) in self.mask_words.iter().enumerate() {
            word.set(bits.load(self.key_tile(tile.index, part)));
        }
    }

    /// Which of the sequence's tiles of 64 keys part `part` of a tile is. Only the first of several parts always has
    /// keys: the last one that has some stands in for those that have none.
    fn key_tile(&self, tile: Val<'k, i32>, part: usize) -> Val<'k, i32> {
        let parts = (self.config.tiling.tile_keys() / KEY_TILE) as i32;
        let own = tile * parts + part as i32;
        let last = || self.scoring.place.sequence.kv_len.div_ceil(KEY_TILE) - 1;
        if part == 0 { own } else { own.min(last()) }
    }

    /// Starts loading the scales of a tile of keys, which must be one of the sequence's, a tile ahead of their use.
    fn load_scales(&self, tile: Val<'k, i32>) {
        for (part, scales) in self.scales.iter().enumerate() {
            let loaded = self.key_scales.of_tile(self.key_tile(tile, part));
            scales.iter().zip(loaded).for_each(|(var, scale)| var.set(scale));
        }
    }

    /// Starts the products of the queries with the next tile of keys.
    fn start_scores<H: Half + MmaElement>(&self) {
        self.code.note("scores: q * k^T");
        if self.config.operands.quantizer.is_some() {
            // Products of integers are added to the bits of a float, so that sums are floats at once.
            self.scores.reinterpret::<i32>().fill(ROUNDING_MAGIC_BITS);
        }
        self.ring.keys.wait(&self.cursors.next);
        let keys = self.ring.keys.matrix(&self.cursors.next);
        match self.config.operands.k.element {
            Element::I8 => self.multiply_queries::<i8, i32>(&keys, true),
            _ => self.multiply_queries::<H, f32>(&keys, false),
        }
    }

    fn multiply_queries<Q: MmaElement, T: MmaAccumulator>(&self, keys: &PanelMatrix<'k>, add: bool) {
        self.scores.reinterpret::<T>().start_product(
            self.code,
            depth_steps(self.config),
            |step| self.scoring.queries.warpgroup_operand::<Q>(step),
            |step| keys.depth_in_columns(0, 32 * step),
            false,
            add,
        );
    }

    /// The exponentials of a tile's scores, while the product of the tile before is in flight.
    fn exponentials(&self, tile: &KeyTile<'k>, next: Option<KeyTile<'k>>) -> Tile<Val<'k, f32>> {
        let (k, place) = (self.code, &self.scoring.place);
        let parts = self.config.tiling.tile_keys() / KEY_TILE;
        let scales: Vec<Vec<_>> =
            self.scales.iter().map(|scales| scales.iter().map(|scale| scale.get()).collect()).collect();
        let bits: Vec<_> = self.mask_words.iter().map(|bits| LaneWords::of_strip_bits(bits.get())).collect();
        if let Some(next) = next {
            self.load_ahead(&next);
        }
        let of_part = |(part, scales): (usize, &Vec<_>)| {
            let first_key = (tile.index * parts as i32 + part as i32) * KEY_TILE as i32;
            let scores = self.scores.slice(KEY_TILE * part..KEY_TILE * (part + 1));
            self.scoring.scaled(scores, first_key, 0, scales)
        };
        let tiles: Vec<_> = scales.iter().enumerate().map(of_part).collect();
        let (cut, masked) = (tile.is_cut(), tile.is_masked());
        let words = match self.biases {
            None => MaskSource::Registers(bits),
            Some((ring, cursor, of_lane)) => MaskSource::Staged(ring.words(of_lane, cursor)),
        };
        if let Some((ring, cursor, _)) = self.biases {
            k.when(masked, || ring.wait(cursor));
        }
        let masking = Masking { cut, masked, words };
        let p = self.scoring.probabilities(&self.softmax, &tiles, 0, &masking, |alphas| {
            self.output.drain();
            // They are in, and shall not count a second time.
            self.output.clear_parts();
            self.output.mul_rows(alphas);
        });
        if let Some((ring, cursor, _)) = self.biases {
            k.when(masked, || ring.release(place, cursor));
        }
        let p = p.iter().map(|p| p.exponentials()).reduce(|tile, part| tile.beside(&part));
        p.expect("a tile has keys")
    }

    /// Starts the product of P, which is that of tile `tile`, with its values, which have arrived.
    fn start_output(&self, tile: &KeyTile<'k>) {
        self.code.note("output: p * v");
        let values = self.ring.values.matrix(&self.cursors.own);
        self.clear_values(tile, &self.cursors.own);
        self.output.start_product(&self.probabilities, &values);
    }

    /// Clears what no query sees in a tile of V as given, whether a mask hides it or it lies behind the end of the
    /// sequence: all groups meet there.
    fn clear_values(&self, tile: &KeyTile<'k>, cursor: &Cursor<'k>) {
        let (k, config, place) = (self.code, self.config, &self.scoring.place);
        let Some(seen) = place.seen.filter(|_| config.clears_values()) else {
            return self.clear_outside(tile.index, cursor);
        };
        let first_key = tile.index * config.tiling.tile_keys() as i32;
        k.when(tile.is_cleared(), || {
            let hides = |row: Val<'k, i32>| {
                let key = first_key + row;
                let there = key.lt(place.sequence.kv_len);
                !(there & seen.is_visible(there.select(key, 0)))
            };
            self.ring.clear_values(hides, cursor);
        });
    }

    /// Clears what lies behind the end of the sequence in a tile of V as given, where no mask is.
    fn clear_outside(&self, tile: Val<'k, i32>, cursor: &Cursor<'k>) {
        let (k, config, place) = (self.code, self.config, &self.scoring.place);
        let tile_keys = config.tiling.tile_keys() as i32;
        let given = config.operands.v.source == OperandSource::Given;
        if given && place.seen.is_none() && config.lengths != Lengths::Dense {
            let rows = place.sequence.kv_len - tile * tile_keys;
            k.when(rows.lt(tile_keys), || self.ring.clear_values(|row| row.ge(rows), cursor));
        }
    }
}
