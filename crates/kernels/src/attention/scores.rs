//! Q·Kᵀ of a tile, and what comes between it and the softmax: scales, caps, biases, masks.

use half::{bf16, f16};
use sage_core::{DType, Granularity, IntBits};
use sage_ptx::{Accumulator, Code, Half, MmaAccumulator, MmaElement, S4, SharedTile, Stored, Val, Var};

use super::config::{AttentionConfig, AttentionParams, MaskForm, Scores};
use super::place::Place;
use super::queries::{Queries, depth_steps};
use super::softmax::{COLUMNS, ScoreTile};
use crate::integer::ROUNDING_MAGIC_BITS;
use crate::sequence::KEY_TILE;

use std::f32::consts::LOG2_E;

/// Scores of the warp's rows and a tile of keys.
pub(super) fn scores<'k, H: Half + MmaElement>(
    code: &'k Code,
    config: &AttentionConfig,
    p: &AttentionParams<'k>,
    place: &Place<'k>,
    queries: &Queries<'k>,
    keys: &SharedTile<'k>,
    tile: Val<'k, i32>,
) -> ScoreTile<'k> {
    code.note("scores: q * k^T");
    let slots = queries.scale.len();
    let product = match config.scores {
        Scores::Full => ScoreTile {
            values: product::<H, f32>(code, config, queries, keys, 0.0),
            factor: queries.scale.clone(),
            biased: false,
        },
        Scores::Int(quantizer) => {
            // Sums start at a float's bits, and so end as the float of their value plus a constant.
            let values = match quantizer.bits {
                IntBits::Eight => product::<i8, i32>(code, config, queries, keys, ROUNDING_MAGIC_BITS),
                IntBits::Four => product::<S4, i32>(code, config, queries, keys, ROUNDING_MAGIC_BITS),
            };
            let tile_index = place.kv_head * p.key_tiles + place.sequence.first_tile + tile;
            let quad = place.lane & 3;
            // A scale of zero stands for zeros; a tiny one does as well, and hidden keys stay at −∞ times it.
            let nonzero = |scale: Val<'k, f32>| scale.eq(0.0).select(1e-30, scale);
            let scale = match quantizer.granularity {
                Granularity::PerToken => {
                    let scales = p.k_scale.at(tile_index * KEY_TILE as i32).at(2 * quad);
                    return scaled_by_key(code, queries, &values, scales, nonzero)
                        .finished(config, p, place, queries, tile);
                }
                Granularity::PerThread => p.k_scale.at(tile_index * 4 + quad).load(),
                _ => p.k_scale.at(tile_index).load(),
            };
            let scale = nonzero(scale);
            let factor = queries.scale.iter().map(|&q| nonzero(q * scale)).collect();
            ScoreTile { values, factor, biased: true }
        }
    };
    debug_assert_eq!(product.factor.len(), slots);
    product.finished(config, p, place, queries, tile)
}

/// The product itself: sums of a warp's rows and 64 keys.
fn product<'k, E: MmaElement, T: MmaAccumulator>(
    code: &'k Code,
    config: &AttentionConfig,
    queries: &Queries<'k>,
    keys: &SharedTile<'k>,
    start: T,
) -> Vec<[Var<'k, f32>; 4]> {
    let blocks = config.tiling.rows_per_warp / 16;
    let sums: Vec<Accumulator<'k, T>> = (0..blocks * COLUMNS).map(|_| Accumulator::new(code)).collect();
    let columns = keys.columns_of_b(0);
    for step in 0..depth_steps(config) {
        let a: Vec<_> = (0..blocks).map(|m| queries.fragment::<E>(m, step)).collect();
        for pair in 0..COLUMNS / 2 {
            let b = columns.b_pair::<E>(16 * pair, 32 * step);
            for (m, &a) in a.iter().enumerate() {
                for (column, b) in b.into_iter().enumerate() {
                    let sum = &sums[m * COLUMNS + 2 * pair + column];
                    if step == 0 { sum.set_product(a, b, start) } else { sum.add_product(a, b) }
                }
            }
        }
    }
    sums.iter().map(|sum| std::array::from_fn(|i| sum.register(i).reinterpret::<f32>())).collect()
}

/// Scores with a scale for each key: plain floats in base 2.
fn scaled_by_key<'k>(
    code: &'k Code,
    queries: &Queries<'k>,
    values: &[[Var<'k, f32>; 4]],
    scales: sage_ptx::Global<'k, f32>,
    nonzero: impl Fn(Val<'k, f32>) -> Val<'k, f32>,
) -> ScoreTile<'k> {
    let biased = ScoreTile { values: values.to_vec(), factor: queries.scale.clone(), biased: true };
    let scales: Vec<[Val<'k, f32>; 2]> = (0..COLUMNS)
        .map(|column| scales.plus(8 * column as i32).load_vector::<2>().map(&nonzero))
        .collect();
    biased.for_each(|value, slot, key| {
        let integer = value.get() - crate::integer::ROUNDING_MAGIC;
        value.set(integer * (scales[key / 8][key % 2] * queries.scale[slot]));
    });
    let one = code.constant(1.0);
    ScoreTile { values: biased.values, factor: vec![one; queries.scale.len()], biased: false }
}

impl<'k> ScoreTile<'k> {
    /// With smooth-Q's correction, cap, explicit mask and band.
    fn finished(
        mut self,
        config: &AttentionConfig,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        queries: &Queries<'k>,
        tile: Val<'k, i32>,
    ) -> Self {
        let code = tile.code();
        if config.smooth_q.is_some() || config.softcap || config.mask != MaskForm::None {
            self = self.unbiased();
        }
        if let Some(block) = config.smooth_q {
            code.note("scores: products of the means of query blocks");
            self.add_delta(block, p, place, tile);
        }
        if config.softcap {
            code.note("scores: soft cap");
            self.cap(p, queries);
        }
        match config.mask {
            MaskForm::None => {}
            MaskForm::Bool => self.mask(p, place, tile),
            MaskForm::Bias(DType::F16) => self.add_bias::<f16>(p, place, tile, |x| x.to_f32()),
            MaskForm::Bias(DType::BF16) => self.add_bias::<bf16>(p, place, tile, |x| x.to_f32()),
            MaskForm::Bias(DType::F32) => self.add_bias::<f32>(p, place, tile, |x| x),
        }
        code.when(place.cuts(tile), || {
            code.note("scores: causal mask, window, end of the keys");
            self.hide(place, tile);
        });
        self
    }

    /// Plain floats in base 2.
    fn unbiased(self) -> Self {
        let code = self.factor[0].code();
        let bias = if self.biased { crate::integer::ROUNDING_MAGIC } else { 0.0 };
        self.for_each(|value, slot, _| value.set((value.get() - bias) * self.factor[slot]));
        ScoreTile { factor: vec![code.constant(1.0); self.factor.len()], biased: false, ..self }
    }

    fn add_delta(&self, block: usize, p: &AttentionParams<'k>, place: &Place<'k>, tile: Val<'k, i32>) {
        let heads = p.group_size * p.kv_heads;
        let first_key = tile * KEY_TILE as i32 + 2 * (place.lane & 3);
        let factor = p.sm_scale * LOG2_E;
        for slot in 0..self.factor.len() {
            let row = place.row(slot).min(place.sequence.q_len - 1);
            let line = (place.sequence_index * heads + place.head) * p.q_blocks + row / block as i32;
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

    fn mask(&self, p: &AttentionParams<'k>, place: &Place<'k>, tile: Val<'k, i32>) {
        tile.code().note("scores: boolean mask");
        self.for_each_of_mask::<u8>(p, place, tile, |value, mask| {
            value.set(mask.ne(0u32).select(value, f32::NEG_INFINITY));
        });
    }

    fn add_bias<B: Stored>(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        tile: Val<'k, i32>,
        to_f32: impl Fn(Val<'k, B::Value>) -> Val<'k, f32>,
    ) {
        tile.code().note("scores: additive mask");
        self.for_each_of_mask::<B>(p, place, tile, |value, bias| {
            // A score of −∞ stays so whatever is added.
            value.set(to_f32(bias).mul_add(LOG2_E, value.get()));
        });
    }

    /// Calls `visit` with each value and its element of the mask; hidden rows and keys read the last valid one.
    fn for_each_of_mask<B: Stored>(
        &self,
        p: &AttentionParams<'k>,
        place: &Place<'k>,
        tile: Val<'k, i32>,
        visit: impl Fn(Var<'k, f32>, Val<'k, B::Value>),
    ) {
        let first_key = tile * KEY_TILE as i32 + 2 * (place.lane & 3);
        let base = place.sequence.batch.widen() * p.mask_stride_batch
            + place.head.widen() * p.mask_stride_head;
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
