//! Q·Kᵀ of a tile, and what comes between it and the softmax: scales, caps, biases, masks.

use half::{bf16, f16};
use sage_core::{DType, Granularity, IntBits, IntQuantizer, ZeroGroup};
use sage_ptx::{
    Accumulator, Code, FragmentSource, Global, Half, MmaAccumulator, MmaElement, S4, Stored, Val, Var,
};

use super::config::{AttentionConfig, AttentionParams, MaskForm, Scores, Tiling};
use super::place::Place;
use super::queries::{Queries, depth_steps};
use super::softmax::ScoreTile;
use crate::integer::{ROUNDING_MAGIC, ROUNDING_MAGIC_BITS};
use crate::preprocess::groups_of_tile;
use crate::sequence::KEY_TILE;

use std::f32::consts::LOG2_E;

/// The least bias that is finite in base 2, where the least finite reference still lies below it: `-2¹²⁷`, in natural units.
const LEAST_BIAS: f32 = -LEAST_REFERENCE / LOG2_E;

/// `2¹²⁷`: rows whose scores are all biased by less have this reference, negative.
pub(super) const LEAST_REFERENCE: f32 = f32::from_bits(254 << 23);

/// How a warp's scores are computed.
pub(super) struct Scoring<'k, 'c> {
    pub code: &'k Code,
    pub config: &'c AttentionConfig,
    pub params: AttentionParams<'k>,
    pub place: Place<'k>,
    pub queries: Queries<'k>,
}

/// A tile of keys.
pub(super) struct KeyTile<'k> {
    pub index: Val<'k, i32>,
    pub fragments: FragmentSource<'k>,
    /// The lane's scales: see [`KeyScales`].
    pub scales: Vec<Val<'k, f32>>,
    /// Whether some key is hidden from some row of the block.
    pub cut: bool,
}

impl<'k> Scoring<'k, '_> {
    /// Scores of the warp's rows and a step's keys.
    pub fn scores<H: Half + MmaElement>(&self, keys: &KeyTile<'k>, step: usize) -> ScoreTile<'k> {
        self.code.note("scores: q * k^T");
        let config = self.config;
        let Tiling { tile_keys, step_keys, .. } = config.tiling;
        let first_column = step * step_keys;
        // Sums of integers start at a float's bits, and so end as the float of their value plus a constant.
        let values = match config.scores {
            Scores::Full => self.product::<H, f32>(&keys.fragments, first_column, 0.0),
            Scores::Int(IntQuantizer { bits: IntBits::Eight, .. }) => {
                self.product::<i8, i32>(&keys.fragments, first_column, ROUNDING_MAGIC_BITS)
            }
            Scores::Int(IntQuantizer { bits: IntBits::Four, .. }) => {
                self.product::<S4, i32>(&keys.fragments, first_column, ROUNDING_MAGIC_BITS)
            }
        };
        let first_key = keys.index * tile_keys as i32 + first_column as i32;
        let scores = self.scaled(values, first_key, first_column, &keys.scales);
        if keys.cut {
            self.code.note("scores: causal mask, window, end of the keys");
            scores.hide(&self.place);
        }
        scores
    }

    /// Scores of products with the keys from `first_key` on, which is column `first_column` of those that `key_scales` are
    /// for: with their scales, smooth-Q's correction, cap and explicit mask.
    pub fn scaled(
        &self,
        values: Vec<[Var<'k, f32>; 4]>,
        first_key: Val<'k, i32>,
        first_column: usize,
        key_scales: &[Val<'k, f32>],
    ) -> ScoreTile<'k> {
        let rows = &self.queries.scale;
        let columns = values.len() / (rows.len() / 2);
        let tile = ScoreTile { first_key, columns, values, factor: rows.clone(), biased: true };
        let product = match self.config.scores {
            Scores::Full => ScoreTile { biased: false, ..tile },
            Scores::Int(quantizer) if quantizer.granularity == Granularity::PerToken => {
                let first = first_column / 4;
                tile.scaled_by_key(&key_scales[first..first + 2 * columns])
            }
            // Without a scale for each row, all rows of a lane have the same.
            Scores::Int(quantizer) => {
                let factor = rows[0] * key_scales[0];
                // Only this quantiser's scales can be zero: see `Queries::scale`.
                let factor = if quantizer.zero_group == ZeroGroup::Guard { nonzero(factor) } else { factor };
                ScoreTile { factor: vec![factor; rows.len()], ..tile }
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
    ) -> Vec<[Var<'k, f32>; 4]> {
        let (blocks, columns) = (self.config.tiling.rows_per_warp / 16, self.config.tiling.step_keys / 8);
        let sums: Vec<Accumulator<'k, T>> =
            (0..blocks * columns).map(|_| Accumulator::new(self.code)).collect();
        for step in 0..depth_steps(self.config) {
            let a: Vec<_> = (0..blocks).map(|m| self.queries.fragment::<E>(m, step)).collect();
            for pair in 0..columns / 2 {
                let b = keys.b_pair::<E>(first_column + 16 * pair, 32 * step);
                for (m, &a) in a.iter().enumerate() {
                    for (column, b) in b.into_iter().enumerate() {
                        let sum = &sums[m * columns + 2 * pair + column];
                        if step == 0 { sum.set_product(a, b, start) } else { sum.add_product(a, b) }
                    }
                }
            }
        }
        sums.iter().map(|sum| std::array::from_fn(|i| sum.register(i).reinterpret::<f32>())).collect()
    }

    /// With smooth-Q's correction, cap and explicit mask.
    fn finish(&self, mut scores: ScoreTile<'k>) -> ScoreTile<'k> {
        let (config, p, place) = (self.config, &self.params, &self.place);
        if config.smooth_q.is_some() || config.softcap || config.mask != MaskForm::None {
            scores = scores.unbiased();
        }
        if let Some(block) = config.smooth_q {
            self.code.note("scores: products of the means of query blocks");
            scores.add_delta(block, p, place);
        }
        if config.softcap {
            self.code.note("scores: soft cap");
            scores.cap(p, &self.queries);
        }
        match config.mask {
            MaskForm::None => {}
            MaskForm::Bool => scores.mask(p, place),
            MaskForm::Bias(DType::F16) => scores.add_bias::<f16>(p, place, |x| x.to_f32()),
            MaskForm::Bias(DType::BF16) => scores.add_bias::<bf16>(p, place, |x| x.to_f32()),
            MaskForm::Bias(DType::F32) => scores.add_bias::<f32>(p, place, |x| x),
        }
        scores
    }
}

/// Scales of quantised K.
pub(super) struct KeyScales<'k> {
    /// The lane's of the sequence's first tile, and how scales are grouped; none where K is as given.
    first: Option<(Global<'k, f32>, Granularity)>,
}

impl<'k> KeyScales<'k> {
    pub fn new(config: &AttentionConfig, p: &AttentionParams<'k>, place: &Place<'k>) -> Self {
        let first = match config.scores {
            Scores::Full => None,
            Scores::Int(quantizer) => {
                let granularity = quantizer.granularity;
                let lane = match granularity {
                    Granularity::PerToken => 2 * (place.lane & 3),
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

/// A scale of zero stands for zeros; a tiny one does as well, and hidden keys stay at minus infinity times it.
pub(super) fn nonzero<'k>(scale: Val<'k, f32>) -> Val<'k, f32> {
    scale.eq(0.0).select(1e-30, scale)
}

impl<'k> ScoreTile<'k> {
    /// Integers times a scale for each key, and the rows' own: plain floats in base 2.
    fn scaled_by_key(self, scales: &[Val<'k, f32>]) -> ScoreTile<'k> {
        self.for_each(|value, slot, key| {
            let integer = value.get() - ROUNDING_MAGIC;
            value.set(integer * nonzero(scales[key / 8 * 2 + key % 2] * self.factor[slot]));
        });
        self.plain()
    }

    /// The same values, which are plain floats in base 2 now.
    fn plain(self) -> Self {
        let one = self.first_key.code().constant(1.0);
        ScoreTile { factor: vec![one; self.factor.len()], biased: false, ..self }
    }

    /// Plain floats in base 2.
    fn unbiased(self) -> Self {
        let bias = if self.biased { ROUNDING_MAGIC } else { 0.0 };
        self.for_each(|value, slot, _| value.set((value.get() - bias) * self.factor[slot]));
        self.plain()
    }

    fn add_delta(&self, block: usize, p: &AttentionParams<'k>, place: &Place<'k>) {
        let first_key = self.lane_key(place);
        let factor = p.sm_scale * LOG2_E;
        for slot in 0..self.factor.len() {
            let line = place.query_block(place.row(slot), block, p);
            let line = p.delta_s.at(line.mul_wide(p.max_tiles * KEY_TILE as i32)).at(first_key);
            self.for_each(|value, s, key| {
                if s == slot {
                    value.set(line.plus(key as i32).load().mul_add(factor, value.get()));
                }
            });
        }
    }

    /// `cap · tanh(s / cap)`, from the exponential: the unit's own tanh is too coarse for scores.
    fn cap(&self, p: &AttentionParams<'k>, queries: &Queries<'k>) {
        let cap2 = p.softcap * LOG2_E;
        let twice = 2.0 / p.softcap;
        self.for_each(|value, slot, _| {
            // What smoothing K took must be back before a function that is not linear.
            let score = queries.taken[slot].mul_add(LOG2_E, value.get());
            // tanh y = 1 − 2 / (1 + e^2y), with y in base 2 already.
            let exponential = (score * twice).exp2();
            let tanh = (exponential + 1.0).recip_approx().mul_add(-2.0, 1.0);
            value.set(tanh * cap2);
        });
    }

    fn mask(&self, p: &AttentionParams<'k>, place: &Place<'k>) {
        self.first_key.code().note("scores: boolean mask");
        self.for_each_of_mask::<u8>(p, place, |value, mask| {
            value.set(mask.ne(0u32).select(value, f32::NEG_INFINITY));
        });
    }

    fn add_bias<B: Stored>(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        to_f32: impl Fn(Val<'k, B::Value>) -> Val<'k, f32>,
    ) {
        self.first_key.code().note("scores: additive mask");
        self.for_each_of_mask::<B>(p, place, |value, bias| {
            let bias = to_f32(bias);
            // A bias of −∞ hides the key whatever its score is, and no other bias does: in base 2 the least finite ones would
            // overflow. A score of −∞ stays so whatever is added.
            let biased = bias.max_nan(LEAST_BIAS).mul_add(LOG2_E, value.get());
            value.set(bias.eq(f32::NEG_INFINITY).select(f32::NEG_INFINITY, biased));
        });
    }

    /// Calls `visit` with each value and its element of the mask; hidden rows and keys read the last valid one.
    fn for_each_of_mask<B: Stored>(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        visit: impl Fn(Var<'k, f32>, Val<'k, B::Value>),
    ) {
        let first_key = self.lane_key(place);
        let base =
            place.sequence.batch.widen() * p.mask_stride_batch + place.head.widen() * p.mask_stride_head;
        let rows: Vec<_> = (0..self.factor.len())
            .map(|slot| {
                let row = place.row(slot).min(place.sequence.q_len - 1);
                p.mask.cast::<B>().at(base + row.widen() * p.mask_stride_row)
            })
            .collect();
        self.for_each(|value, slot, key| {
            let key = (first_key + key as i32).min(place.sequence.kv_len - 1);
            visit(value, rows[slot].at(key.widen() * p.mask_stride_key).load());
        });
    }
}
