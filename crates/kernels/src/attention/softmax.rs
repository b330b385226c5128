//! Online softmax over tiles of scores (Milakov and Gimelshein 2018; FlashAttention-2 §3.1).

use sage_ptx::{Code, Val, Var};

use super::config::{AttentionConfig, Values};
use super::place::Place;
use crate::integer::{ROUNDING_MAGIC, ROUNDING_MAGIC_BITS};

/// Base-2 exponent added to scores so that P fills E4M3's range; a little below log₂ 448 (spec §2.5).
const E4M3_P_EXPONENT: f32 = sage_core::oracle::E4M3_P_EXPONENT;

/// A warp's scores of one step's keys, before the exponential.
pub(super) struct ScoreTile<'k> {
    /// First key.
    pub first_key: Val<'k, i32>,
    /// Columns of 8 keys.
    pub columns: usize,
    /// `[m][column][i]`, element `i` of the 16×8 accumulators at `(m, column)`.
    pub values: Vec<[Var<'k, f32>; 4]>,
    /// What makes base-2 logarithms of each row slot's values.
    pub factor: Vec<Val<'k, f32>>,
    /// Whether values are integers plus [`ROUNDING_MAGIC`].
    pub biased: bool,
}

impl<'k> ScoreTile<'k> {
    /// Calls `visit` with each value, its row slot, and its key's offset from the lane's first key.
    pub fn for_each(&self, mut visit: impl FnMut(Var<'k, f32>, usize, usize)) {
        for (index, values) in self.values.iter().enumerate() {
            let (m, column) = (index / self.columns, index % self.columns);
            for (i, &value) in values.iter().enumerate() {
                visit(value, 2 * m + i / 2, 8 * column + i % 2);
            }
        }
    }

    /// Hides keys that the band or the sequence's end hides.
    pub fn hide(&self, place: &Place<'k>) {
        let first_key = self.lane_key(place);
        let limits: Vec<_> = (0..self.factor.len())
            .map(|slot| {
                let (start, end) = place.visible(place.row(slot));
                (start - first_key, end - first_key)
            })
            .collect();
        self.for_each(|value, slot, key| {
            let (start, end) = limits[slot];
            let key = first_key.code().constant(key as i32);
            let visible = key.lt(end) & key.ge(start);
            value.set(visible.select(value, f32::NEG_INFINITY));
        });
    }

    /// First key of the lane.
    pub fn lane_key(&self, place: &Place<'k>) -> Val<'k, i32> {
        self.first_key + 2 * (place.lane & 3)
    }

    /// A row slot's values.
    fn row(&self, slot: usize) -> Vec<Val<'k, f32>> {
        let mut row = Vec::new();
        self.for_each(|value, s, _| {
            if s == slot {
                row.push(value.get());
            }
        });
        row
    }

    /// The largest base-2 score of a row slot, over the quad of lanes that share the row.
    fn maximum(&self, slot: usize) -> Val<'k, f32> {
        let row = self.row(slot);
        let largest = if self.biased {
            // Biased values are positive or −∞, and so are ordered like their bits; integer maxima are the faster ones.
            let bits = row.iter().map(|x| x.reinterpret::<i32>());
            bits.reduce(Val::max).map(|bits| bits.reinterpret::<f32>() - ROUNDING_MAGIC)
        } else {
            row.into_iter().reduce(Val::max)
        };
        let code = self.factor[slot].code();
        let largest = largest.unwrap_or(code.constant(f32::NEG_INFINITY));
        (largest * self.factor[slot]).reduce_lanes(3, Val::max)
    }
}

/// Running maximum and sum of each row slot.
pub(super) struct Softmax<'k> {
    /// What scores are relative to, in base 2: the largest so far, or one up to `lazy` smaller.
    reference: Vec<Var<'k, f32>>,
    /// This lane's part of the sums.
    sum: Vec<Var<'k, f32>>,
    /// Added to scores relative to the reference.
    exponent: f32,
    lazy: f32,
}

impl<'k> Softmax<'k> {
    pub fn new(code: &'k Code, config: &AttentionConfig) -> Self {
        let slots = config.tiling.rows_per_warp / 8;
        let fp8 = matches!(config.values, Values::Fp8(_));
        Softmax {
            // Finite, so that differences with it are numbers also before the first visible key.
            reference: (0..slots).map(|_| code.var(f32::MIN).named("row_reference")).collect(),
            sum: (0..slots).map(|_| code.var(0.0).named("row_sum")).collect(),
            exponent: if fp8 { E4M3_P_EXPONENT } else { 0.0 },
            // E4M3 has no room above the maximum.
            lazy: if fp8 { 0.0 } else { config.tiling.lazy_rescale as f32 },
        }
    }

    /// Takes a tile's maxima in, calling `rescale` with the factor of each row slot's sums where they change.
    pub fn advance(&self, code: &'k Code, scores: &ScoreTile<'k>, rescale: impl FnOnce(&[Val<'k, f32>])) {
        let slots = self.reference.len();
        let old: Vec<_> = self.reference.iter().map(|var| var.get()).collect();
        let new: Vec<_> = (0..slots).map(|slot| old[slot].max(scores.maximum(slot)).named("row_max")).collect();
        let update = || {
            let alphas: Vec<_> = (0..slots).map(|slot| (old[slot] - new[slot]).exp2().named("alpha")).collect();
            for slot in 0..slots {
                self.reference[slot].set(new[slot]);
                self.sum[slot].set(self.sum[slot].get() * alphas[slot]);
            }
            rescale(&alphas);
        };
        if self.lazy == 0.0 {
            update();
        } else {
            let rises = (0..slots).map(|slot| new[slot].gt(old[slot] + self.lazy));
            let some = rises.reduce(|a, b| a | b).unwrap_or(code.constant(false));
            code.when(code.any(some), update);
        }
    }

    /// Row slots' exponentials in columns `columns`: P of the tile, `[m][column][i]`, whose sums are taken in.
    pub fn exponentials(
        &self,
        scores: &ScoreTile<'k>,
        columns: std::ops::Range<usize>,
    ) -> Vec<Vec<[Val<'k, f32>; 4]>> {
        let shifts: Vec<_> = (0..self.reference.len())
            .map(|slot| {
                let reference = self.reference[slot].get() - self.exponent;
                if scores.biased {
                    // The bias of the values is taken back here, where it costs nothing.
                    -scores.factor[slot].mul_add(ROUNDING_MAGIC, reference)
                } else {
                    -reference
                }
            })
            .collect();
        let rows = scores.values.chunks(scores.columns).enumerate().map(|(m, tiles)| {
            let exponential = |tile: &[Var<'k, f32>; 4]| {
                std::array::from_fn(|i| {
                    let slot = 2 * m + i / 2;
                    tile[i].get().mul_add(scores.factor[slot], shifts[slot]).exp2()
                })
            };
            let p: Vec<[Val<'k, f32>; 4]> = tiles[columns.clone()].iter().map(exponential).collect();
            for half in 0..2 {
                let slot = 2 * m + half;
                let pairs = p.iter().map(|tile| tile[2 * half] + tile[2 * half + 1]);
                if let Some(sum) = pairs.reduce(|a, b| a + b) {
                    self.sum[slot].set(self.sum[slot].get() + sum);
                }
            }
            p
        });
        rows.collect()
    }

    /// Each row slot's sum over all keys, and its log-sum-exp in base 2; −∞ for a row that sees no key.
    pub fn finish(&self) -> Vec<RowSum<'k>> {
        let rows = self.reference.iter().zip(&self.sum).map(|(reference, sum)| {
            let sum = sum.get().reduce_lanes(3, |a, b| a + b);
            let empty = sum.eq(0.0);
            RowSum {
                inverse: empty.select(0.0, sum.recip()).named("inverse_sum"),
                lse2: empty.select(f32::NEG_INFINITY, sum.log2() + (reference.get() - self.exponent)),
            }
        });
        rows.collect()
    }
}

/// What a row's output and log-sum-exp are made of.
#[derive(Clone, Copy)]
pub(super) struct RowSum<'k> {
    /// `1 / Σ P`, or 0 where no key is visible.
    pub inverse: Val<'k, f32>,
    /// Logarithm of the sum of exponentials, base 2.
    pub lse2: Val<'k, f32>,
}

/// The bits that integer scores start from are those of the float that is taken back.
const _: () = assert!(ROUNDING_MAGIC.to_bits() as i32 == ROUNDING_MAGIC_BITS);
