//! Scores of a step's keys in registers, and what can be done to them between Q·Kᵀ and the softmax.

use std::f32::consts::LOG2_E;

use sage_core::DType;
use sage_ptx::{Rows, Stored, Tile, Val, Var};

use super::config::AttentionParams;
use super::place::Place;
use super::queries::Queries;
use crate::integer::{ROUNDING_MAGIC, nonzero};
use crate::key_order::KeyOrder;
use crate::least_bias::LEAST_BIAS;
use crate::sequence::KEY_TILE;
use crate::sparse::LaneWords;

/// A warp's scores of one step's keys, before the exponential: rows are queries, columns keys.
pub(super) struct ScoreTile<'k> {
    /// The key of the first column.
    pub first_key: Val<'k, i32>,
    /// Which keys the columns are.
    pub order: KeyOrder,
    pub values: Tile<Var<'k, f32>>,
    /// What makes base-2 logarithms of each row slot's values.
    pub factor: Rows<Val<'k, f32>>,
    /// Whether values are integers plus [`ROUNDING_MAGIC`].
    pub biased: bool,
}

/// A score in base 2 with a bias in natural units added. A bias of −∞ hides the key whatever its score is, and no other
/// bias does: in base 2 the least finite ones would overflow. A score of −∞ stays so whatever is added.
fn biased<'k>(score: Val<'k, f32>, bias: Val<'k, f32>) -> Val<'k, f32> {
    let biased = bias.max_nan(LEAST_BIAS).mul_add(LOG2_E, score);
    bias.eq(f32::NEG_INFINITY).select(f32::NEG_INFINITY, biased)
}

/// `cap · tanh(s / cap)` of a score in base 2, given `cap · log₂e` and `2 / cap`.
pub(crate) fn capped<'k>(score: Val<'k, f32>, [cap2, twice]: [Val<'k, f32>; 2]) -> Val<'k, f32> {
    // tanh y = 1 − 2 / (1 + e^2y), with y in base 2 already.
    let exponential = (score * twice).exp2();
    let tanh = (exponential + 1.0).recip_approx().mul_add(-2.0, 1.0);
    tanh * cap2
}

impl<'k> ScoreTile<'k> {
    /// The key of the lane's first column.
    fn lane_key(&self, place: &Place<'k>) -> Val<'k, i32> {
        self.first_key + self.order.lane_key(place.lane)
    }

    /// Integers times a scale for each of the lane's keys, and the rows' own: plain floats in base 2.
    pub fn scaled_by_key(self, scales: &[Val<'k, f32>]) -> Self {
        // The lane has two of every eight keys.
        let of_key = |key: usize| scales[key / 8 * 2 + key % 2];
        self.values
            .update(|slot, key, value| (value - ROUNDING_MAGIC) * nonzero(of_key(key) * self.factor[slot]));
        self.plain()
    }

    /// The same values, which are plain floats in base 2 now.
    fn plain(self) -> Self {
        let one = self.first_key.code().constant(1.0);
        ScoreTile { factor: self.factor.map(|_| one), biased: false, ..self }
    }

    /// Plain floats in base 2.
    pub fn unbiased(self) -> Self {
        let bias = if self.biased { ROUNDING_MAGIC } else { 0.0 };
        self.values.update(|slot, _, value| (value - bias) * self.factor[slot]);
        self.plain()
    }

    /// Adds the products of the keys with the means that smoothing took from blocks of `block` queries.
    pub fn add_delta(&self, block: usize, p: &AttentionParams<'k>, place: &Place<'k>) {
        let first_key = self.lane_key(place);
        let factor = p.sm_scale * LOG2_E;
        for slot in 0..self.values.slots() {
            let line = place.query_block(place.row(slot), block, p);
            let line = p.delta_s.at(line.mul_wide(p.max_tiles * KEY_TILE as i32)).at(first_key);
            for (key, value) in self.values.row(slot) {
                value.set(line.plus(key as i32).load().mul_add(factor, value.get()));
            }
        }
    }

    /// `cap · tanh(s / cap)`, from the exponential: the unit's own tanh is too coarse for scores.
    pub fn cap(&self, p: &AttentionParams<'k>, queries: &Queries<'k>) {
        let cap2 = p.softcap * LOG2_E;
        let twice = 2.0 / p.softcap;
        self.values.for_each(|slot, _, value| {
            // What smoothing K took must be back before a function that is not linear.
            let score = queries.taken[slot].mul_add(LOG2_E, value.get());
            value.set(capped(score, [cap2, twice]));
        });
    }

    /// Hides the keys that the bits of a mask hide, whose columns are counted from `first_column` on.
    pub fn hide_by_bits(&self, words: &LaneWords<'k>, first_column: usize) {
        self.first_key.code().note("scores: bits of a mask");
        self.values.for_each(|slot, column, value| {
            let visible = words.is_visible(slot, first_column + column);
            value.set(visible.select(value, f32::NEG_INFINITY));
        });
    }

    /// Makes logarithms of values, plus `shift` of their rows.
    pub fn take_logarithms(&self, shift: &Rows<Val<'k, f32>>) {
        self.values.update(|slot, _, value| value.mul_add(self.factor[slot], shift[slot]));
    }

    /// The same, and adds packed biases, whose columns are counted from `first_column` on: but for −∞ they were made
    /// finite in base 2 when they were packed.
    pub fn take_biased_logarithms(
        &self,
        shift: &Rows<Val<'k, f32>>,
        words: &LaneWords<'k>,
        dtype: DType,
        first_column: usize,
    ) {
        self.values.update(|slot, column, value| {
            let bias = words.bias(dtype, slot, first_column + column).mul_add(LOG2_E, shift[slot]);
            value.mul_add(self.factor[slot], bias)
        });
    }

    /// Hides the keys whose packed bias is −∞, whatever their scores are: the sum with a score that is no number is
    /// none.
    pub fn hide_by_biases(&self, words: &LaneWords<'k>, dtype: DType, first_column: usize) {
        self.values.update(|slot, column, value| {
            let bias = words.bias(dtype, slot, first_column + column);
            bias.eq(f32::NEG_INFINITY).select(f32::NEG_INFINITY, value)
        });
    }

    /// Adds a mask of biases, in natural units.
    pub fn add_bias<B: Stored>(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        to_f32: impl Fn(Val<'k, B::Value>) -> Val<'k, f32>,
    ) {
        self.first_key.code().note("scores: additive mask");
        let first_key = self.lane_key(place);
        let base = p.mask.head(place.sequence.batch, place.head);
        // Hidden rows and keys read the last valid one.
        let rows = Rows::from_fn(self.values.slots(), |slot| {
            let row = place.row(slot).min(place.sequence.q_len - 1);
            p.mask.start.cast::<B>().at(base + row.widen() * p.mask.row_stride())
        });
        self.values.for_each(|slot, key, value| {
            let key = (first_key + self.order.offset(key) as i32).min(place.sequence.kv_len - 1);
            let bias = to_f32(rows[slot].at(key.widen() * p.mask.key_stride()).load());
            value.set(biased(value.get(), bias));
        });
    }

    /// Hides keys that the band or the sequence's end hides.
    pub fn hide(&self, place: &Place<'k>) {
        self.first_key.code().note("scores: causal mask, window, end of the keys");
        let first_key = self.lane_key(place);
        let visible = Rows::from_fn(self.values.slots(), |slot| {
            let (start, end) = place.visible(place.row(slot));
            start - first_key..end - first_key
        });
        self.values.fill_outside(&visible, |column| self.order.offset(column), f32::NEG_INFINITY);
    }

    /// The largest value of a row slot that this lane holds.
    pub fn lane_maximum(&self, slot: usize) -> Val<'k, f32> {
        if self.biased {
            // Biased values are positive or −∞, and so are ordered like their bits; integer maxima are the faster ones.
            self.values.reinterpret::<i32>().row_max(slot).reinterpret()
        } else {
            self.values.row_max(slot)
        }
    }

    /// A value of a row slot, as its base-2 logarithm.
    pub fn logarithm(&self, value: Val<'k, f32>, slot: usize) -> Val<'k, f32> {
        let value = if self.biased { value - ROUNDING_MAGIC } else { value };
        value * self.factor[slot]
    }
}
