//! Q·Kᵀ of a tile, and what comes between it and the softmax: scales, caps, biases, masks.

use std::ops::Range;

use half::{bf16, f16};
use sage_core::{DType, Fp4Format, Granularity, ZeroGroup};
use sage_ptx::{
    Code, FragmentSource, Global, Half, MmaAccumulator, MmaElement, S4, Tile, Val, Var, lane_column,
};

use super::config::{AttentionConfig, AttentionParams, MaskForm};
use super::place::Place;
use super::queries::{Queries, depth_steps};
use super::score_tile::ScoreTile;
use crate::fp4::{ScaleWords, block_scales};
use crate::integer::{ROUNDING_MAGIC_BITS, nonzero};
use crate::key_order::KeyOrder;
use crate::operand::Element;
use crate::preprocess::groups_of_tile;
use crate::sequence::KEY_TILE;
use crate::sparse::{LaneWords, STRIP_ROWS, StagedWords};

/// How a warp's scores are computed.
pub(super) struct Scoring<'k, 'c> {
    pub code: &'k Code,
    pub config: &'c AttentionConfig,
    pub params: AttentionParams<'k>,
    pub place: Place<'k>,
    pub queries: Queries<'k>,
}

/// A tile of keys in shared memory.
pub(super) struct Keys<'k> {
    /// Which of the sequence's tiles it is.
    pub index: Val<'k, i32>,
    pub fragments: FragmentSource<'k>,
    /// The lane's scales: see [`KeyScales`].
    pub scales: Vec<Val<'k, f32>>,
    /// For 4-bit elements, the lane's words of their groups' scales.
    pub group_scales: Vec<Val<'k, u32>>,
    /// What products with the lane's keys start from: see [`Deltas`].
    pub deltas: Vec<Val<'k, f32>>,
    /// What is hidden of it.
    pub masking: Masking<'k>,
}

/// What is hidden of a tile's scores, and added to them.
pub(super) struct Masking<'k> {
    /// Whether the band or the end of the keys hides some.
    pub cut: Val<'k, bool>,
    /// Whether a mask hides or changes some.
    pub masked: Val<'k, bool>,
    /// Where the words of a mask are.
    pub words: MaskSource<'k>,
}

/// Where the words of a mask for a tile's scores are read.
pub(super) enum MaskSource<'k> {
    /// In device memory.
    Memory,
    /// In registers, for each 64 keys of the tile.
    Registers(Vec<LaneWords<'k>>),
    /// In shared memory.
    Staged(StagedWords<'k>),
}

impl<'k> Scoring<'k, '_> {
    /// Scores of the warp's rows and a step's keys, before anything is hidden.
    pub fn scores<H: Half + MmaElement>(&self, keys: &Keys<'k>, step: usize) -> ScoreTile<'k> {
        self.code.note("scores: q * k^T");
        let config = self.config;
        let (tile_keys, step_keys) = (config.tiling.tile_keys(), config.tiling.step_keys());
        let first_column = step * step_keys;
        // Sums of integers start at a float's bits, and so end as the float of their value plus a constant.
        let values = match config.operands.k.element {
            Element::I8 => self.product::<i8, i32>(&keys.fragments, first_column, ROUNDING_MAGIC_BITS),
            Element::I4 => self.product::<S4, i32>(&keys.fragments, first_column, ROUNDING_MAGIC_BITS),
            Element::E2M1 => self.scaled_product(keys, first_column),
            _ => self.product::<H, f32>(&keys.fragments, first_column, 0.0),
        };
        let first_key = keys.index * tile_keys as i32 + first_column as i32;
        self.scaled(values, first_key, first_column, &keys.scales)
    }

    /// Hides what a mask, the band and the end of the keys hide, and adds biases as given, where they say that they do.
    pub fn hide(&self, scores: &[ScoreTile<'k>], first_column: usize, masking: &Masking<'k>) {
        let (config, p, place) = (self.config, &self.params, &self.place);
        self.code.when(masking.masked, || {
            for (part, scores) in scores.iter().enumerate() {
                match config.mask {
                    MaskForm::Bias(DType::F16) if config.given_biases => {
                        scores.add_bias::<f16>(p, place, |x| x.to_f32());
                    }
                    MaskForm::Bias(DType::BF16) if config.given_biases => {
                        scores.add_bias::<bf16>(p, place, |x| x.to_f32());
                    }
                    MaskForm::Bias(DType::F32) if config.given_biases => {
                        scores.add_bias::<f32>(p, place, |x| x)
                    }
                    _ => {}
                }
                if let Some(words) = self.words_of(scores, part, first_column, masking) {
                    scores.hide_by_bits(&words, first_column);
                }
            }
        });
        self.hide_outside(scores, masking);
    }

    /// Hides what the band and the end of the keys hide, where they say that they do.
    pub fn hide_outside(&self, scores: &[ScoreTile<'k>], masking: &Masking<'k>) {
        self.code.when(masking.cut, || scores.iter().for_each(|scores| scores.hide(&self.place)));
    }

    /// The words of a mask for part `part` of a tile's scores, where it is packed.
    pub fn words_of(
        &self,
        scores: &ScoreTile<'k>,
        part: usize,
        first_column: usize,
        masking: &Masking<'k>,
    ) -> Option<LaneWords<'k>> {
        match &masking.words {
            MaskSource::Registers(words) => words.get(part).cloned(),
            MaskSource::Staged(words) => Some(words.load(part)),
            MaskSource::Memory => {
                let columns = first_column..first_column + scores.values.columns();
                self.mask_words(scores.first_key - first_column as i32, columns)
            }
        }
    }

    /// The words of a mask in device memory for some columns of the keys from `first_key` on, where it is packed.
    pub fn mask_words(&self, first_key: Val<'k, i32>, columns: Range<usize>) -> Option<LaneWords<'k>> {
        let tiling = &self.config.tiling;
        let (tile, column) = first_key.split_index(KEY_TILE);
        let strips: Vec<_> =
            (0..tiling.rows_per_warp() / STRIP_ROWS).map(|strip| self.place.strip(strip)).collect();
        let words = self.place.mask_words?.load(&strips, tile, columns);
        // Of a tile with some of the 64 keys the bits are moved to the first.
        Some(if tiling.tile_keys() < KEY_TILE { words.map(|word| word >> (column >> 2)) } else { words })
    }

    /// Scores of products with the keys from `first_key` on, which is column `first_column` of those that `key_scales`
    /// are for: with their scales, smooth-Q's correction and cap.
    pub fn scaled(
        &self,
        values: Tile<Var<'k, f32>>,
        first_key: Val<'k, i32>,
        first_column: usize,
        key_scales: &[Val<'k, f32>],
    ) -> ScoreTile<'k> {
        let rows = &self.queries.scale;
        // The lane has two of every eight keys.
        let lane_keys = values.columns() / 4;
        let order = self.config.operands.key_order();
        let tile = ScoreTile { first_key, order, values, factor: rows.clone(), biased: true };
        let product = match self.config.operands.quantizer {
            None => ScoreTile { biased: false, ..tile },
            Some(quantizer) if quantizer.granularity == Granularity::PerToken => {
                let first = first_column / 4;
                tile.scaled_by_key(&key_scales[first..first + lane_keys])
            }
            // Without a scale for each row, all rows of a lane have the same.
            Some(quantizer) => {
                let factor = rows[0] * key_scales[0];
                // Only this quantiser's scales can be zero: see `Queries::scale`.
                let factor = if quantizer.zero_group == ZeroGroup::Guard { nonzero(factor) } else { factor };
                ScoreTile { factor: rows.map(|_| factor), ..tile }
            }
        };
        self.finish(product)
    }

    /// The product itself, of a warp's rows and a step's keys.
    fn product<E: MmaElement, T: MmaAccumulator>(
        &self,
        keys: &FragmentSource<'k>,
        first_column: usize,
        start: T,
    ) -> Tile<Var<'k, f32>> {
        let tiling = &self.config.tiling;
        let (rows_per_warp, step_keys) = (tiling.rows_per_warp(), tiling.step_keys());
        let sums = Tile::new(self.code, rows_per_warp, step_keys);
        sums.set_product(
            start,
            depth_steps(self.config),
            |step| self.queries.fragments::<E>(step),
            |step, column| keys.b_pair::<E>(first_column + column, 32 * step),
        );
        sums.reinterpret()
    }

    /// The same of 4-bit elements with a scale for each group.
    fn scaled_product(&self, keys: &Keys<'k>, first_column: usize) -> Tile<Var<'k, f32>> {
        let (config, tiling) = (self.config, &self.config.tiling);
        let format = config.operands.k.fp4().unwrap_or(Fp4Format::Nv);
        let sums = Tile::new(self.code, tiling.rows_per_warp(), tiling.step_keys());
        let words = ScaleWords::new(tiling.tile_keys(), config.key_columns());
        let (scales, steps) = (block_scales(format), depth_steps(config));
        let a = |step: usize| self.queries.scaled_fragments(step);
        let b = |step: usize, column: usize| {
            let first = first_column + column;
            words.operands(keys.fragments.b_pair(first, 32 * step), &keys.group_scales, first, step)
        };
        if keys.deltas.is_empty() {
            sums.set_scaled_product(scales, steps, a, b);
        } else {
            sums.for_each(|_, column, sum| {
                let column = first_column + column;
                sum.set(keys.deltas[column / 8 * 2 + column % 2]);
            });
            sums.add_scaled_product(scales, steps, a, b);
        }
        sums
    }

    /// Applies smooth-Q's correction and cap.
    fn finish(&self, mut scores: ScoreTile<'k>) -> ScoreTile<'k> {
        let (config, p, place) = (self.config, &self.params, &self.place);
        // Products in 4 bits start from them.
        let smooth_q = config.smooth_q.filter(|_| config.operands.k.element != Element::E2M1);
        if smooth_q.is_some() || config.softcap || config.given_biases {
            scores = scores.unbiased();
        }
        if let Some(block) = smooth_q {
            self.code.note("scores: products of the means of query blocks");
            scores.add_delta(block, p, place);
        }
        if config.softcap {
            self.code.note("scores: soft cap");
            scores.cap(p, &self.queries);
        }
        scores
    }
}

/// For 4-bit elements, the products of the lane's keys with the means that smoothing took from the warp's queries, which
/// are of one block: scores start from them, as both lack the same factor.
pub(super) struct Deltas<'k> {
    order: KeyOrder,
    tile_keys: usize,
    /// Where those of the sequence's first tile lie; none without smoothing. The address is found before the loop over
    /// tiles: inside of it ptxas leaves 20 instructions of its arithmetic to each of them.
    first: Option<Global<'k, f32>>,
}

impl<'k> Deltas<'k> {
    pub fn new(config: &AttentionConfig, p: &AttentionParams<'k>, place: &Place<'k>) -> Self {
        let (order, tile_keys) = (config.operands.key_order(), config.tiling.tile_keys());
        let smoothed = config.smooth_q.filter(|_| config.operands.k.element == Element::E2M1);
        let first = smoothed.map(|block| {
            let line = place.query_block(place.warp_row, block, p);
            let line = p.delta_s.at(line.mul_wide(p.max_tiles * KEY_TILE as i32));
            let code = place.lane.code();
            let first = code.var(line.at(order.lane_key(place.lane)).address()).named("deltas");
            Global::at_address(first.get())
        });
        Deltas { order, tile_keys, first }
    }

    /// Those of a tile: two of every eight columns.
    pub fn of_tile(&self, tile: Val<'k, i32>) -> Vec<Val<'k, f32>> {
        let Some(first) = self.first else { return Vec::new() };
        tile.code().note("scores: products of the means of query blocks");
        let keys = self.tile_keys;
        let line = first.at(tile * keys as i32);
        match self.order {
            KeyOrder::Natural => {
                (0..keys).step_by(8).flat_map(|key| line.plus(key as i32).load_vector::<2>()).collect()
            }
            // Eight neighbours are two of each of four columns' blocks.
            KeyOrder::Octets => {
                let four = (0..keys).step_by(32).flat_map(|key| [key, key + 4]);
                four.flat_map(|key| line.plus(key as i32).load_vector::<4>()).collect()
            }
        }
    }
}

/// Scales of quantised K.
pub(super) struct KeyScales<'k> {
    /// The lane's of the sequence's first tile, and how scales are grouped; none where K is as given.
    first: Option<(Global<'k, f32>, Granularity)>,
}

impl<'k> KeyScales<'k> {
    pub fn new(config: &AttentionConfig, p: &AttentionParams<'k>, place: &Place<'k>) -> Self {
        let first = match config.operands.quantizer {
            None => None,
            Some(quantizer) => {
                let granularity = quantizer.granularity;
                let lane = match granularity {
                    Granularity::PerToken => lane_column(place.lane),
                    Granularity::PerThread => place.lane & 3,
                    _ => place.lane.code().constant(0),
                };
                let first = place.first_key_tile * groups_of_tile(granularity) as i32 + lane;
                Some((p.k_scale.at(first), granularity))
            }
        };
        KeyScales { first }
    }

    /// How many scales the lane has of a tile.
    pub fn count(&self) -> usize {
        match self.first {
            None => 0,
            Some((_, Granularity::PerToken)) => KEY_TILE / 4,
            Some(_) => 1,
        }
    }

    /// The lane's scales of a tile: one, or with a scale for each key those of its keys.
    pub fn of_tile(&self, tile: Val<'k, i32>) -> Vec<Val<'k, f32>> {
        let Some((first, granularity)) = self.first else { return Vec::new() };
        let scales = first.at(tile * groups_of_tile(granularity) as i32);
        if granularity == Granularity::PerToken {
            let columns = 0..KEY_TILE as i32 / 8;
            columns.flat_map(|column| scales.plus(8 * column).load_vector::<2>()).collect()
        } else {
            vec![scales.load()]
        }
    }
}
