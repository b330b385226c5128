//! The same attention on `wgmma`: groups of four warps multiply tiles that one more thread has copied.
//!
//! While a group computes the softmax of a tile, its product of the tile before with V is in flight; the tensor cores also
//! serve the other groups meanwhile.

use sage_core::Accumulator as Precision;
use sage_ptx::{
    Code, E4M3, FragmentA, Half, MmaAccumulator, MmaElement, PanelMatrix, SharedTile, Stored, Val, Var,
    WarpgroupA, warpgroup_product,
};

use super::bulk_ring::{BULK_MAPS, BulkRing, Cursor};
use super::config::{AttentionConfig, AttentionParams, Scores, TURN_BARRIER, ValueSource, Values, WARPGROUP};
use super::output::Output;
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
    let place = Place::new(k, config, p);
    let ring = BulkRing::new(k, config, maps);
    k.barrier();
    let copies = place.warp.ge(config.tiling.warps as i32);
    k.if_else(
        copies,
        || {
            k.fewer_registers(COPYING_REGISTERS);
            let first = place.warp.eq(config.tiling.warps as i32) & place.lane.eq(0);
            k.when(first, || ring.produce(&place));
        },
        || {
            k.more_registers(computing_registers(config));
            Group::new::<H>(k, config, p, place, &ring).compute::<H, W>(p);
        },
    );
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
    /// Sums of the tile in flight, where they are not added to the output's at once.
    parts: Vec<Var<'k, f32>>,
    /// Scores of a tile: columns of 8 keys.
    scores: Vec<[Var<'k, f32>; 4]>,
    /// P of a tile, as operands of 32 bytes depth.
    probabilities: Vec<[Var<'k, u32>; 4]>,
    /// What the sums of each row slot must be multiplied by.
    alphas: [Var<'k, f32>; 2],
    keys: Cursor<'k>,
    values: Cursor<'k>,
    /// Index of the warpgroup.
    group: Val<'k, i32>,
}

impl<'k, 'c, 'r> Group<'k, 'c, 'r> {
    fn new<H: Half + Stored<Value = H>>(
        code: &'k Code,
        config: &'c AttentionConfig,
        p: &AttentionParams<'k>,
        place: Place<'k>,
        ring: &'r BulkRing<'k, 'c>,
    ) -> Self {
        let queries = Queries::load::<H>(code, config, p, &place);
        let key_scales = KeyScales::new(config, p, &place);
        let output = Output::new(code, config);
        let tile_keys = config.tiling.tile_keys;
        let value_bytes = if matches!(config.values, Values::Fp8(_)) { 1 } else { 2 };
        let softmax = Softmax::new(code, config);
        let columns = output.registers().len() + softmax.sums_in_flight().len();
        let two_level = config.values == Values::Fp8(Precision::F32ThenF32);
        let parts = (0..columns * usize::from(two_level)).map(|_| Var::new(code)).collect();
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
            alphas: [code.var(1.0), code.var(1.0)],
            keys: Cursor::new(code, config, "keys"),
            values: Cursor::new(code, config, "values"),
            group: (place.warp >> 2).named("group"),
        }
    }

    fn compute<H, W>(&self, p: &AttentionParams<'k>)
    where
        H: Half + MmaElement + Stored<Value = H>,
        W: Half + MmaElement,
    {
        let (k, place) = (self.code, &self.scoring.place);
        self.tiles::<H, W>();
        let rows = self.config.block_q();
        let row_bytes = 2 * self.config.padded_dim();
        let tile = SharedTile::new(k.shared::<u8>("output", rows * row_bytes), row_bytes);
        self.output.store::<H>(p, place, &self.softmax.finish(), &self.scoring.queries.taken, &tile);
    }

    /// The scores of a tile before the product of the tile before with V.
    fn tiles<H, W>(&self)
    where
        H: Half + MmaElement + Stored<Value = H>,
        W: Half + MmaElement,
    {
        let (k, place) = (self.code, &self.scoring.place);
        k.when(place.first_tile.lt(place.end_tile), || {
            self.load_scales(place.first_tile);
            self.ring.keys.wait(&self.keys);
            self.start_scores::<H>();
            k.wait_products(0, &self.score_registers::<f32>());
            self.ring.keys.release(place.lane, &self.keys);
            let p = self.softmax(place.first_tile);
            self.pack::<W>(&p);
            self.wait_for_keys(place.first_tile + 1);
            self.first_turn();
            k.range(place.first_tile + 1, place.end_tile, |tile| {
                self.await_turn();
                self.start_scores::<H>();
                self.start_output::<W>(tile - 1);
                self.pass_turn();
                k.wait_products(1, &self.score_registers::<f32>());
                self.ring.keys.release(place.lane, &self.keys);
                let p = self.softmax(tile);
                // Between the exponentials and the wait for P·V, so that ptxas does not move them behind it.
                self.wait_for_keys(tile + 1);
                self.finish_output();
                self.rescale();
                self.pack::<W>(&p);
            });
            self.last_turn();
            self.start_output::<W>(place.end_tile - 1);
            self.finish_output();
        });
    }

    /// Groups of the block.
    fn groups(&self) -> i32 {
        self.config.tiling.warps as i32 / 4
    }

    /// The last group lets the first one begin.
    fn first_turn(&self) {
        if self.config.tiling.turns {
            let last = self.group.eq(self.groups() - 1);
            self.code.when(last, || self.code.arrive(TURN_BARRIER, 2 * WARPGROUP));
        }
    }

    fn await_turn(&self) {
        if self.config.tiling.turns {
            self.code.named_barrier(self.group + TURN_BARRIER, 2 * WARPGROUP);
        }
    }

    fn pass_turn(&self) {
        if self.config.tiling.turns {
            let next = self.group + 1;
            let next = next.eq(self.groups()).select(0, next);
            self.code.arrive(next + TURN_BARRIER, 2 * WARPGROUP);
        }
    }

    /// The first group takes the turn that nobody else needs: no barrier is left half full.
    fn last_turn(&self) {
        if self.config.tiling.turns {
            self.code.when(self.group.eq(0), || self.await_turn());
        }
    }

    /// Waits for the keys of tile `tile`, if there is one.
    fn wait_for_keys(&self, tile: Val<'k, i32>) {
        self.code.when(tile.lt(self.scoring.place.end_tile), || self.ring.keys.wait(&self.keys));
    }

    /// Starts loading the scales of a tile of keys, a tile ahead of their use.
    fn load_scales(&self, tile: Val<'k, i32>) {
        let parts = (self.config.tiling.tile_keys / KEY_TILE) as i32;
        let last = self.scoring.place.sequence.kv_len.div_ceil(KEY_TILE) - 1;
        for (part, scales) in self.scales.iter().enumerate() {
            let index = (tile * parts + part as i32).min(last);
            scales.iter().zip(self.key_scales.of_tile(index)).for_each(|(var, scale)| var.set(scale));
        }
    }

    fn score_registers<T: MmaAccumulator>(&self) -> Vec<Var<'k, T>> {
        self.scores.iter().flatten().map(|var| var.reinterpret()).collect()
    }

    /// Starts the products of the queries with the next tile of keys.
    fn start_scores<H: Half + MmaElement>(&self) {
        self.code.note("scores: q * k^T");
        let keys = self.ring.keys.matrix(&self.keys);
        match self.config.scores {
            Scores::Full => self.multiply_queries::<H, f32>(&keys, false),
            Scores::Int(_) => {
                let sums = self.score_registers::<i32>();
                sums.iter().for_each(|sum| sum.set(ROUNDING_MAGIC_BITS));
                self.multiply_queries::<i8, i32>(&keys, true);
            }
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

    /// P of a tile whose scores are there: of each 64 keys, columns of 8.
    fn softmax(&self, tile: Val<'k, i32>) -> Vec<Vec<[Val<'k, f32>; 4]>> {
        let (k, place) = (self.code, &self.scoring.place);
        let parts = self.config.tiling.tile_keys / KEY_TILE;
        let scales: Vec<Vec<_>> =
            self.scales.iter().map(|scales| scales.iter().map(|scale| scale.get()).collect()).collect();
        self.load_scales(tile + 1);
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
        let cut = tile.lt(place.inner_start) | tile.ge(place.inner_end);
        k.when(cut, || {
            k.note("scores: causal mask, window, end of the keys");
            tiles.iter().for_each(|tile| tile.hide(place));
        });
        self.alphas.iter().for_each(|alpha| alpha.set(1.0));
        self.softmax.advance(k, &tiles, |factors| {
            self.alphas.iter().zip(factors).for_each(|(alpha, &factor)| alpha.set(factor));
        });
        let exponentials = |tile: &ScoreTile<'k>| {
            let shifts = self.softmax.shifts(tile);
            self.softmax.exponentials(tile, &shifts, 0..tile.columns).remove(0)
        };
        tiles.iter().map(exponentials).collect()
    }

    /// Keeps P as operands.
    fn pack<W: Half + MmaElement>(&self, p: &[Vec<[Val<'k, f32>; 4]>]) {
        let columns: Vec<_> = p.iter().flatten().copied().collect();
        let words = |step: usize| match self.config.values {
            Values::Fp8(_) => {
                let tiles = std::array::from_fn(|i| columns[4 * step + i]);
                FragmentA::<E4M3>::from_accumulators(tiles).words()
            }
            _ => FragmentA::<W>::from_accumulators([columns[2 * step], columns[2 * step + 1]]).words(),
        };
        for (step, vars) in self.probabilities.iter().enumerate() {
            vars.iter().zip(words(step)).for_each(|(var, word)| var.set(word));
        }
    }

    /// Starts the product of P, which is that of tile `tile`, with its values.
    fn start_output<W: Half + MmaElement>(&self, tile: Val<'k, i32>) {
        let (k, config) = (self.code, self.config);
        k.note("output: p * v");
        self.ring.values.wait(&self.values);
        let values = self.ring.values.matrix(&self.values);
        if config.lengths != Lengths::Dense && config.value_source == ValueSource::Given {
            let rows = self.scoring.place.sequence.kv_len - tile * config.tiling.tile_keys as i32;
            k.when(rows.lt(config.tiling.tile_keys as i32), || {
                self.ring.clear_values(rows, &self.values);
            });
        }
        match config.values {
            Values::Fp8(_) => {
                self.multiply_values::<E4M3>(|step| values.depth_in_columns(0, 32 * step), false)
            }
            _ => self.multiply_values::<W>(|step| values.depth_in_rows(16 * step), true),
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
        self.code.fence_products();
        for (step, &p) in p.iter().enumerate() {
            let p = WarpgroupA::Registers(p);
            warpgroup_product(&sums, p, values(step), transposed, self.parts.is_empty() || step > 0);
        }
        self.code.commit_products();
    }

    /// What P·V is added to.
    fn sums(&self) -> Vec<Var<'k, f32>> {
        if self.parts.is_empty() { self.final_sums() } else { self.parts.clone() }
    }

    /// Sums of P·V over all tiles, and those of P where they are products.
    fn final_sums(&self) -> Vec<Var<'k, f32>> {
        let mut sums = self.output.registers();
        sums.extend(self.softmax.sums_in_flight());
        sums
    }

    /// Waits for the product with V and frees its stage.
    fn finish_output(&self) {
        let k = self.code;
        k.wait_products(0, &self.sums());
        self.ring.values.release(self.scoring.place.lane, &self.values);
        for (part, sum) in self.parts.iter().zip(self.final_sums()) {
            sum.set(sum.get() + part.get());
        }
    }

    /// Brings the sums to the new references.
    fn rescale(&self) {
        let k = self.code;
        let alphas = self.alphas.map(|alpha| alpha.get());
        let risen = alphas[0].ne(1.0) | alphas[1].ne(1.0);
        k.when(k.any(risen), || {
            k.note("output: rescale");
            self.output.rescale(&alphas);
            for (i, sum) in self.softmax.sums_in_flight().iter().enumerate() {
                sum.set(sum.get() * alphas[i / 2]);
            }
        });
    }
}

