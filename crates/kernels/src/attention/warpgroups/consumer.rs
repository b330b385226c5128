//! A consumer: a warpgroup's part of attention on `wgmma`.
//!
//! While it computes the softmax of a tile, its product of the tile before with V is in flight; the tensor cores also
//! serve the other consumers meanwhile. That product reads its P from registers: a tile's exponentials are rounded into
//! them once it is done, which it long is by then.

use sage_ptx::{
    Code, Half, MmaAccumulator, MmaElement, OperandVars, PanelMatrix, RoundedElement, Stored, Tile, Val, Var,
};

use super::output_in_flight::OutputInFlight;
use super::pipeline::Cursor;
use super::tma_ring::TmaRing;
use crate::attention::config::{AttentionConfig, AttentionParams};
use crate::attention::epilogue::Epilogue;
use crate::attention::key_tiles::{KeyTile, Span, Walk};
use crate::attention::place::Place;
use crate::attention::queries::{Queries, depth_steps};
use crate::attention::scores::{KeyScales, Masking, Scoring};
use crate::attention::softmax::Softmax;
use crate::integer::ROUNDING_MAGIC_BITS;
use crate::operand::{Element, OperandSource};
use crate::sequence::{KEY_TILE, Lengths};
use crate::sparse::{LaneWords, Packing};

/// Where a warpgroup stands in the ring.
pub(super) struct Cursors<'k> {
    /// The tile of K whose scores are started next, from one piece of work to the next.
    next: Cursor<'k>,
    /// The tile whose softmax is computed.
    own: Cursor<'k>,
    /// The tile before it.
    done: Cursor<'k>,
}

impl<'k> Cursors<'k> {
    pub fn new(code: &'k Code, config: &AttentionConfig) -> Self {
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

/// What a consumer's thread holds. `E` is the element of P and V.
pub(super) struct Consumer<'k, 'c, 'r, E> {
    code: &'k Code,
    config: &'c AttentionConfig,
    ring: &'r TmaRing<'k, 'c>,
    scoring: Scoring<'k, 'c>,
    key_scales: KeyScales<'k>,
    /// Scales of the next tile's keys, for each 64 of them.
    scales: Vec<Vec<Var<'k, f32>>>,
    /// Words of a mask for each 64 keys of the next tile.
    mask_words: Vec<Vec<Var<'k, u32>>>,
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
        ring: &'r TmaRing<'k, 'c>,
        cursors: &'r Cursors<'k>,
    ) -> Self {
        let queries = Queries::load::<H>(code, config, p, &place);
        let key_scales = KeyScales::new(config, p, &place);
        let tile_keys = config.tiling.tile_keys();
        let output = OutputInFlight::new(code, config);
        let softmax = Softmax::new(code, config);
        let words = place.mask_words.map_or(0, |words| words.packing.lane_words());
        let parts = if words > 0 { tile_keys / KEY_TILE } else { 0 };
        let mask_words = (0..parts).map(|_| (0..words).map(|_| code.var(0u32)).collect()).collect();
        let output = output.beside(softmax.sums_in_flight());
        Consumer {
            code,
            config,
            ring,
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
        k.when(start.le(last), || {
            let walk = Walk::start(k, *tiles);
            let first = walk.this(start);
            self.load_ahead(&first);
            self.output.clear_parts();
            self.start_scores::<H>();
            self.load_biases(&first);
            self.take_scores(0);
            k.range(start, last, |position| {
                self.tile::<H>(&walk, position, true);
                walk.advance();
            });
            self.tile::<H>(&walk, last, false);
            self.output.drain();
            self.ring.values.release(place.lane, &self.cursors.own);
        });
        tiles.for_each_after(k, |tile| self.pass(tile));
    }

    /// Lets a tile pass that only other groups' rows see.
    fn pass(&self, tile: Val<'k, i32>) {
        let (place, next) = (&self.scoring.place, &self.cursors.next);
        self.ring.keys.wait(next);
        self.ring.keys.release(place.lane, next);
        self.ring.values.wait(next);
        self.clear_values(tile, self.code.constant(true), next);
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
        if self.packing() == Some(Packing::Bits) {
            self.load_mask(tile.index);
        }
    }

    /// Starts loading the biases of the next tile once those of this one are added, as registers are few.
    fn load_biases(&self, tile: &KeyTile<'k>) {
        if let Some(Packing::Biases(_)) = self.packing() {
            self.code.when(tile.is_masked(), || self.load_mask(tile.index));
        }
    }

    fn packing(&self) -> Option<Packing> {
        self.scoring.place.mask_words.map(|words| words.packing)
    }

    fn load_mask(&self, tile: Val<'k, i32>) {
        let first_key = tile * self.config.tiling.tile_keys() as i32;
        for (part, words) in self.mask_words.iter().enumerate() {
            let first_key = first_key + (part * KEY_TILE) as i32;
            // Only the first of several parts always has keys.
            let first_key =
                if part == 0 { first_key } else { first_key.min(self.scoring.place.sequence.kv_len - 1) };
            let loaded = self.scoring.mask_words(first_key, 0..KEY_TILE);
            let loaded = loaded.iter().flat_map(LaneWords::words);
            words.iter().zip(loaded).for_each(|(var, word)| var.set(word));
        }
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
        let k = self.code;
        let parts = self.config.tiling.tile_keys() / KEY_TILE;
        let scales: Vec<Vec<_>> =
            self.scales.iter().map(|scales| scales.iter().map(|scale| scale.get()).collect()).collect();
        let loaded = |words: &Vec<Var<'k, u32>>| {
            let packing = self.packing()?;
            Some(LaneWords::of_strip(packing, words.iter().map(|word| word.get())))
        };
        let words = self.mask_words.iter().filter_map(loaded).collect();
        if let Some(next) = next {
            self.load_ahead(&next);
        }
        let of_part = |(part, scales): (usize, &Vec<_>)| {
            let first_key = (tile.index * parts as i32 + part as i32) * KEY_TILE as i32;
            let scores = self.scores.slice(KEY_TILE * part..KEY_TILE * (part + 1));
            self.scoring.scaled(scores, first_key, 0, scales)
        };
        let tiles: Vec<_> = scales.iter().enumerate().map(of_part).collect();
        let masking = Masking { cut: tile.is_cut(), masked: tile.is_masked(), words };
        self.scoring.hide(&tiles, 0, &masking);
        if let Some(next) = next {
            self.load_biases(&next);
        }
        let p = self.softmax.advance(k, &tiles, |alphas| {
            self.output.drain();
            // They are in, and shall not count a second time.
            self.output.clear_parts();
            self.output.mul_rows(alphas);
        });
        let p = p.iter().map(|p| p.exponentials()).reduce(|tile, part| tile.beside(&part));
        p.expect("a tile has keys")
    }

    /// Starts the product of P, which is that of tile `tile`, with its values, which have arrived.
    fn start_output(&self, tile: &KeyTile<'k>) {
        self.code.note("output: p * v");
        let values = self.ring.values.matrix(&self.cursors.own);
        self.clear_values(tile.index, tile.is_cut() | tile.is_masked(), &self.cursors.own);
        self.output.start_product(&self.probabilities, &values);
    }

    /// Clears what no query sees in a tile of V as given, whether a mask hides it or it lies behind the end of the
    /// sequence: all groups meet there. Nothing is hidden of a tile that is not cut.
    fn clear_values(&self, tile: Val<'k, i32>, cut: Val<'k, bool>, cursor: &Cursor<'k>) {
        let (k, config, place) = (self.code, self.config, &self.scoring.place);
        let tile_keys = config.tiling.tile_keys() as i32;
        if config.operands.v.source != OperandSource::Given {
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
            k.when(cut, || {
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
            });
        } else if config.lengths != Lengths::Dense {
            let rows = place.sequence.kv_len - tile * tile_keys;
            k.when(rows.lt(tile_keys), || self.ring.clear_values(|row| row.ge(rows), cursor));
        }
    }
}
