//! The same attention on `wgmma`: groups of four warps multiply tiles that one more thread has copied.
//!
//! While a group computes the softmax of a tile, its product of the tile before with V is in flight; the tensor cores also
//! serve the other groups meanwhile. That product reads its P from registers: a tile's exponentials are rounded into them
//! once it is done, which it long is by then.

use sage_core::Accumulator as Precision;
use sage_ptx::{
    Code, E4M3, FragmentA, Half, MmaAccumulator, MmaElement, PanelMatrix, Stored, Val, Var, WarpgroupA,
    warpgroup_product,
};

use super::bulk_ring::{BULK_MAPS, BulkRing, Cursor};
use super::config::{AttentionConfig, AttentionParams, Scores, ValueSource, Values, WARPGROUP};
use super::output::Output;
use super::pieces::Pieces;
use super::place::Place;
use super::queries::{Queries, depth_steps};
use super::scores::{KeyScales, Scoring};
use super::softmax::{ScoreTile, Softmax};
use crate::integer::ROUNDING_MAGIC_BITS;
use crate::sequence::{KEY_TILE, Lengths};

/// Registers of a multiprocessor, and what a thread that only asks for copies needs.
const REGISTERS: u32 = 64 << 10;
const COPYING_REGISTERS: u32 = 24;
/// Most registers of a thread, in the steps of `setmaxnreg`.
const MOST_REGISTERS: u32 = 240;

/// Registers of each thread that computes.
fn computing_registers(config: &AttentionConfig) -> u32 {
    let left = REGISTERS - WARPGROUP * COPYING_REGISTERS;
    (left / config.threads() / 8 * 8).min(MOST_REGISTERS)
}

pub(super) fn write<H, W>(k: &Code, config: &AttentionConfig, p: &AttentionParams<'_>)
where
    H: Half + MmaElement + Stored<Value = H>,
    W: Half + MmaElement,
{
    let maps = BULK_MAPS.map(|name| k.tensor_map(name));
    let ring = BulkRing::new(k, config, maps);
    let pieces = Pieces::new(k, config, p);
    k.barrier();
    let [warp, lane] = pieces.thread;
    let copies = warp.ge(config.tiling.warps as i32);
    k.if_else(
        copies,
        || {
            k.fewer_registers(COPYING_REGISTERS);
            let first = warp.eq(config.tiling.warps as i32) & lane.eq(0);
            k.when(first, || {
                let cursor = Cursor::new(k, config.tiling.stages, "produced");
                pieces.hand_out(|place| ring.produce(place, &cursor));
            });
        },
        || {
            k.more_registers(computing_registers(config));
            let cursors = Cursors::new(k, config);
            pieces.take(|place| Group::new::<H>(k, config, p, place, &ring, &cursors).compute::<H, W>(p));
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
        let cursor = |name| Cursor::new(code, config.tiling.stages, name);
        Cursors { next: cursor("next"), own: cursor("own"), done: cursor("done") }
    }

    /// The next tile's scores are there.
    fn advance(&self) {
        self.done.set(&self.own);
        self.own.set(&self.next);
        self.next.advance();
    }
}

/// What a thread that computes holds.
struct Group<'k, 'c, 'r> {
    code: &'k Code,
    config: &'c AttentionConfig,
    ring: &'r BulkRing<'k, 'c>,
    scoring: Scoring<'k, 'c>,
    key_scales: KeyScales<'k>,
    /// Scales of the next tile's keys, for each 64 of them.
    scales: Vec<Vec<Var<'k, f32>>>,
    softmax: Softmax<'k>,
    output: Output<'k, 'c>,
    /// A tile's own sums, where they are not added to all tiles' at once: of the last of [`Group::all_sums`].
    parts: Vec<Var<'k, f32>>,
    /// Scores of a tile: columns of 8 keys.
    scores: Vec<[Var<'k, f32>; 4]>,
    /// P of a tile, as operands of 32 bytes depth.
    probabilities: Vec<[Var<'k, u32>; 4]>,
    cursors: &'r Cursors<'k>,
}

impl<'k, 'c, 'r> Group<'k, 'c, 'r> {
    fn new<H: Half + Stored<Value = H>>(
        code: &'k Code,
        config: &'c AttentionConfig,
        p: &AttentionParams<'k>,
        place: Place<'k>,
        ring: &'r BulkRing<'k, 'c>,
        cursors: &'r Cursors<'k>,
    ) -> Self {
        let queries = Queries::load::<H>(code, config, p, &place);
        let key_scales = KeyScales::new(config, p, &place);
        let output = Output::new(code, config);
        let tile_keys = config.tiling.tile_keys;
        let value_bytes = if matches!(config.values, Values::Fp8(_)) { 1 } else { 2 };
        let softmax = Softmax::new(code, config);
        let columns = output.registers().len() + softmax.sums_in_flight().len();
        // E4M3 products lose the low bits of sums as large as P's over many keys.
        let parts = match config.values {
            Values::Fp8(Precision::F32ThenF32) => columns,
            Values::Fp8(_) => softmax.sums_in_flight().len(),
            _ => 0,
        };
        let parts = (0..parts).map(|_| Var::new(code)).collect();
        Group {
            code,
            config,
            ring,
            scoring: Scoring { code, config, params: *p, place, queries },
            scales: (0..tile_keys / KEY_TILE)
                .map(|_| (0..key_scales.count()).map(|_| Var::new(code)).collect())
                .collect(),
            key_scales,
            softmax,
            output,
            parts,
            scores: (0..tile_keys / 8).map(|_| std::array::from_fn(|_| Var::new(code))).collect(),
            probabilities: (0..tile_keys * value_bytes / 32)
                .map(|_| std::array::from_fn(|_| Var::new(code)))
                .collect(),
            cursors,
        }
    }

    fn compute<H, W>(&self, p: &AttentionParams<'k>)
    where
        H: Half + MmaElement + Stored<Value = H>,
        W: Half + MmaElement,
    {
        self.tiles::<H, W>();
        let scoring = &self.scoring;
        self.output.store::<H>(p, &scoring.place, &self.softmax.finish(), &scoring.queries.taken, None);
    }

    fn tiles<H, W>(&self)
    where
        H: Half + MmaElement + Stored<Value = H>,
        W: Half + MmaElement,
    {
        let (k, place) = (self.code, &self.scoring.place);
        let last = place.end_tile - 1;
        self.pass(place.copied_start, place.first_tile);
        k.when(place.first_tile.le(last), || {
            self.load_scales(place.first_tile);
            self.clear_parts();
            self.start_scores::<H>();
            self.take_scores(0);
            k.range(place.first_tile, last, |tile| self.tile::<H, W>(tile, true));
            self.tile::<H, W>(last, false);
            self.drain();
            self.ring.values.release(place.lane, &self.cursors.own);
        });
        self.pass(place.end_tile, place.copied_end);
    }

    /// Lets tiles pass that only other groups' rows see.
    fn pass(&self, start: Val<'k, i32>, end: Val<'k, i32>) {
        let (place, next) = (&self.scoring.place, &self.cursors.next);
        self.code.range(start, end, |tile| {
            self.ring.keys.wait(next);
            self.ring.keys.release(place.lane, next);
            self.ring.values.wait(next);
            self.clear_values(tile, next);
            self.ring.values.release(place.lane, next);
            next.advance();
        });
    }

    /// The work of a tile whose scores are there: its softmax, then the start of the next tile's scores, where there is one,
    /// and of its own product with V, until those scores are there.
    fn tile<H, W>(&self, tile: Val<'k, i32>, has_next: bool)
    where
        H: Half + MmaElement + Stored<Value = H>,
        W: Half + MmaElement,
    {
        let (k, place) = (self.code, &self.scoring.place);
        let p = self.exponentials(tile, has_next);
        // The tile's values have mostly arrived by now. The loop around the wait keeps the compiler from moving the
        // exponentials behind the end of the product in flight, which they overlap with.
        self.ring.values.wait(&self.cursors.own);
        self.drain();
        k.when(tile.gt(place.first_tile), || self.ring.values.release(place.lane, &self.cursors.done));
        self.round::<W>(&p);
        if has_next {
            self.start_scores::<H>();
        }
        self.start_output::<W>(tile);
        if has_next {
            self.take_scores(1);
        }
    }

    /// Waits for the scores of the next tile, after which `later` products were started, and frees its keys.
    fn take_scores(&self, later: u32) {
        self.code.wait_products(later, &self.score_registers::<f32>());
        self.ring.keys.release(self.scoring.place.lane, &self.cursors.next);
        self.cursors.advance();
    }

    /// Starts loading the scales of a tile of keys, which must be one of the sequence's, a tile ahead of their use.
    fn load_scales(&self, tile: Val<'k, i32>) {
        let parts = (self.config.tiling.tile_keys / KEY_TILE) as i32;
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

    fn score_registers<T: MmaAccumulator>(&self) -> Vec<Var<'k, T>> {
        self.scores.iter().flatten().map(|var| var.reinterpret()).collect()
    }

    /// Starts the products of the queries with the next tile of keys.
    fn start_scores<H: Half + MmaElement>(&self) {
        self.code.note("scores: q * k^T");
        self.clear_scores();
        self.ring.keys.wait(&self.cursors.next);
        let keys = self.ring.keys.matrix(&self.cursors.next);
        match self.config.scores {
            Scores::Full => self.multiply_queries::<H, f32>(&keys, false),
            Scores::Int(_) => self.multiply_queries::<i8, i32>(&keys, true),
        }
    }

    /// What products of integers are added to: the bits of a float, so that sums are floats at once.
    fn clear_scores(&self) {
        if self.config.scores != Scores::Full {
            self.score_registers::<i32>().iter().for_each(|sum| sum.set(ROUNDING_MAGIC_BITS));
        }
    }

    fn multiply_queries<E: MmaElement, T: MmaAccumulator>(&self, keys: &PanelMatrix<'k>, add: bool) {
        let sums = self.score_registers::<T>();
        self.code.fence_products();
        for step in 0..depth_steps(self.config) {
            let a = self.scoring.queries.warpgroup_operand::<E>(step);
            warpgroup_product(&sums, a, keys.depth_in_columns(0, 32 * step), false, add || step > 0);
        }
        self.code.commit_products();
    }

    /// The exponentials of a tile's scores, by columns, while the product of the tile before is in flight.
    fn exponentials(&self, tile: Val<'k, i32>, has_next: bool) -> Vec<[Val<'k, f32>; 4]> {
        let (k, place) = (self.code, &self.scoring.place);
        let parts = self.config.tiling.tile_keys / KEY_TILE;
        let scales: Vec<Vec<_>> =
            self.scales.iter().map(|scales| scales.iter().map(|scale| scale.get()).collect()).collect();
        if has_next {
            self.load_scales(tile + 1);
        }
        let tiles: Vec<ScoreTile<'k>> = self
            .scores
            .chunks(KEY_TILE / 8)
            .zip(&scales)
            .enumerate()
            .map(|(part, (values, scales))| {
                let first_key = (tile * parts as i32 + part as i32) * KEY_TILE as i32;
                self.scoring.scaled(values.to_vec(), first_key, 0, scales)
            })
            .collect();
        let inner = (place.inner_end - place.inner_start).reinterpret::<u32>();
        let cut = (tile - place.inner_start).reinterpret::<u32>().ge(inner);
        k.when(cut, || {
            k.note("scores: causal mask, window, end of the keys");
            tiles.iter().for_each(|tile| tile.hide(place));
        });
        let shifts = self.softmax.advance(k, &tiles, |alphas| {
            self.drain();
            // They are in, and shall not count a second time.
            self.clear_parts();
            k.note("output: rescale");
            self.output.rescale(alphas);
            for (i, sum) in self.softmax.sums_in_flight().iter().enumerate() {
                sum.set(sum.get() * alphas[i / 2]);
            }
        });
        let of_tile = |(tile, shifts): (&ScoreTile<'k>, &Vec<_>)| {
            self.softmax.exponentials(tile, shifts, 0..tile.columns).remove(0)
        };
        tiles.iter().zip(&shifts).flat_map(of_tile).collect()
    }

    /// Rounds P, whose columns are `p`, into the operands of the product with V.
    fn round<W: Half + MmaElement>(&self, p: &[[Val<'k, f32>; 4]]) {
        let words = |step: usize| match self.config.values {
            Values::Fp8(_) => {
                FragmentA::<E4M3>::from_accumulators(std::array::from_fn(|i| p[4 * step + i])).words()
            }
            _ => FragmentA::<W>::from_accumulators([p[2 * step], p[2 * step + 1]]).words(),
        };
        for (step, vars) in self.probabilities.iter().enumerate() {
            vars.iter().zip(words(step)).for_each(|(var, word)| var.set(word));
        }
    }

    /// Starts the product of P, which is that of tile `tile`, with its values, which have arrived.
    fn start_output<W: Half + MmaElement>(&self, tile: Val<'k, i32>) {
        let (k, config) = (self.code, self.config);
        k.note("output: p * v");
        let values = self.ring.values.matrix(&self.cursors.own);
        self.clear_values(tile, &self.cursors.own);
        match config.values {
            Values::Fp8(_) => {
                self.multiply_values::<E4M3>(|step| values.depth_in_columns(0, 32 * step), false);
            }
            _ => self.multiply_values::<W>(|step| values.depth_in_rows(16 * step), true),
        }
    }

    /// Clears what no query sees in a tile of V as given, whether a mask hides it or it lies behind the end of the sequence: all
    /// groups meet there.
    fn clear_values(&self, tile: Val<'k, i32>, cursor: &Cursor<'k>) {
        let (k, config, place) = (self.code, self.config, &self.scoring.place);
        let tile_keys = config.tiling.tile_keys as i32;
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

    fn multiply_values<E: MmaElement>(
        &self,
        values: impl Fn(usize) -> sage_ptx::MatrixDescriptor<'k>,
        transposed: bool,
    ) {
        let p: Vec<_> =
            self.probabilities.iter().map(|vars| FragmentA::<E>::new(vars.map(|var| var.get()))).collect();
        let sums = self.sums();
        let add = self.parts.len() < sums.len();
        if add {
            self.clear_parts();
        }
        self.code.fence_products();
        for (step, &p) in p.iter().enumerate() {
            let p = WarpgroupA::Registers(p);
            warpgroup_product(&sums, p, values(step), transposed, add || step > 0);
        }
        self.code.commit_products();
    }

    /// What P·V is added to.
    fn sums(&self) -> Vec<Var<'k, f32>> {
        let mut sums = self.all_sums();
        sums.truncate(sums.len() - self.parts.len());
        sums.extend(&self.parts);
        sums
    }

    /// Sums of P·V over all tiles, and those of P where they are products.
    fn all_sums(&self) -> Vec<Var<'k, f32>> {
        let mut sums = self.output.registers();
        sums.extend(self.softmax.sums_in_flight());
        sums
    }

    fn clear_parts(&self) {
        self.parts.iter().for_each(|part| part.set(0.0));
    }

    /// Waits for the product with V, whose own sums go into those of all tiles.
    fn drain(&self) {
        self.code.wait_products(0, &self.sums());
        for (part, sum) in self.parts.iter().rev().zip(self.all_sums().iter().rev()) {
            sum.set(sum.get() + part.get());
        }
    }
}
