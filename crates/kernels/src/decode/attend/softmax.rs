//! The online softmax of a warp's rows, and their sums of probabilities times values.

use sage_ptx::{Code, FragmentA, MmaElement, RoundedElement, Rows, Tile, Val, Var};

use super::tokens::Tokens;
use super::{CacheAttendConfig, GROUP, ROWS};
use crate::attention::capped;
use crate::integer::magnitude_bits;

/// What weights are multiplied by beside scales of values: f16 then has twice as many powers of two below them.
pub(super) const HEADROOM: f32 = 8192.0;

/// Bits of a single's exponent, those of the least normal number, and what inverts a power of two by subtraction.
const EXPONENT: i32 = 0x7f80_0000;
const LEAST: i32 = 1 << 23;
const INVERTING: i32 = 254 << 23;

/// A warp's rows, slot by slot as a lane holds them.
pub(super) struct Softmax<'k> {
    code: &'k Code,
    /// Largest score so far, in base 2, and the lane's sum of probabilities relative to it.
    max: Rows<Var<'k, f32>>,
    sum: Rows<Var<'k, f32>>,
    /// The power of two, as bits, that scales of values are relative to in the output.
    unit: Var<'k, i32>,
    output: Tile<Var<'k, f32>>,
}

/// What the probabilities of a tile's tokens become the operand of.
pub(super) struct Weights<'k>(Tile<Val<'k, f32>>);

impl<'k> Softmax<'k> {
    pub fn new(config: &CacheAttendConfig, code: &'k Code) -> Self {
        let shape = super::tokens::ValueShape::new(&config.storage);
        Softmax {
            code,
            // Finite, so that differences with it are numbers also before the first visible token.
            max: Rows::from_fn(2, |_| code.var(f32::MIN).named("max")),
            sum: Rows::from_fn(2, |_| code.var(0.0).named("sum")),
            unit: code.var(LEAST).named("unit"),
            output: Tile::filled(code, ROWS, 8 * shape.blocks(), 0.0),
        }
    }

    /// Caps scores in base 2, where `cap` is in base 2 too.
    pub fn cap(&self, scores: &Tile<Var<'k, f32>>, cap: Val<'k, f32>) {
        let twice = cap.recip() * (2.0 * std::f32::consts::LOG2_E);
        scores.update(|_, _, score| capped(score, [cap, twice]));
    }

    /// Adds a tile's probabilities to the sums. Where values have scales, each lane has that of a token; where the tile
    /// is cut, that of a hidden token may be NaN.
    pub fn step(
        &self,
        scores: &Tile<Var<'k, f32>>,
        value_scale: Option<Val<'k, f32>>,
        cut: Val<'k, bool>,
        tokens: &Tokens<'k, '_>,
    ) -> Weights<'k> {
        self.code.note("softmax");
        let old = self.max.map(|max| max.get());
        let max = Rows::from_fn(2, |slot| {
            let of_tile = scores.row_max(slot).reduce_lanes(3, |a, b| a.max(b));
            old[slot].max(of_tile)
        });
        let old_unit = self.unit.get();
        let unit = value_scale.map_or(old_unit, |scale| {
            let bits = magnitude_bits(scale);
            let finite = bits.lt(EXPONENT).select(bits, 0).warp_max();
            old_unit.max(finite & EXPONENT)
        });
        let rises =
            (0..2).map(|slot| max[slot].gt(old[slot])).fold(unit.gt(old_unit), |any, rise| any | rise);
        self.code.when(self.code.any(rises), || {
            let of_unit = old_unit.reinterpret::<f32>() * inverse(unit);
            let alphas = Rows::from_fn(2, |slot| (old[slot] - max[slot]).exp2());
            for slot in 0..2 {
                self.sum[slot].set(self.sum[slot].get() * alphas[slot]);
                self.max[slot].set(max[slot]);
            }
            self.output.mul_rows(&alphas.map(|alpha| *alpha * of_unit));
            self.unit.set(unit);
        });
        let p = scores.map_at(|slot, _, score| (score.get() - max[slot]).exp2());
        for slot in 0..2 {
            self.sum[slot].set(self.sum[slot].get() + p.row_sum(slot));
        }
        let Some(scale) = value_scale else { return Weights(p) };
        let scales = tokens.of_columns(scale * inverse(unit) * HEADROOM);
        let weights = p.map_at(|_, column, p| self.code.var(p * scales[column / 8 * 2 + column % 2]));
        self.code.when(cut, || {
            weights.for_each(|slot, column, weight| {
                let hidden = scores.at(slot, column).get().eq(f32::NEG_INFINITY);
                weight.set(hidden.select(0.0, weight.get()));
            });
        });
        Weights(weights.map_at(|_, _, weight| weight.get()))
    }

    /// Adds the products of a tile's weights with a part of the values' channels.
    pub fn add_values<E: RoundedElement>(&self, weights: &Weights<'k>, tokens: &Tokens<'k, '_>, part: usize) {
        self.code.note("output: probabilities * values");
        let of_part = self.output.columns() / tokens.value_parts();
        let output = self.output.slice(part * of_part..(part + 1) * of_part);
        let groups = weights.0.columns() / GROUP;
        let a = |group: usize| weights.operand::<E>(group);
        output.add_product(groups, a, |group, column| tokens.values::<E>(group, column / 8));
    }

    /// The largest scores, and the sums of whole rows.
    pub fn rows(&self) -> [Rows<Val<'k, f32>>; 2] {
        let sum = |sum: &Var<'k, f32>| sum.get().reduce_lanes(3, |a, b| a + b);
        [self.max.map(|max| max.get()), self.sum.map(sum)]
    }

    /// The output, in units of [`Softmax::unit`] where values have scales.
    pub fn output(&self) -> &Tile<Var<'k, f32>> {
        &self.output
    }

    /// What scales of values were made relative to.
    pub fn unit(&self) -> Val<'k, f32> {
        self.unit.get().reinterpret::<f32>()
    }
}

impl<'k> Weights<'k> {
    fn operand<E: RoundedElement + MmaElement>(&self, group: usize) -> Vec<FragmentA<'k, E>> {
        self.0.operand::<E>(group)
    }
}

/// One over a power of two that is given by its bits.
fn inverse(power: Val<'_, i32>) -> Val<'_, f32> {
    let bits = power.min(INVERTING - LEAST);
    (power.code().constant(INVERTING) - bits).reinterpret::<f32>()
}
