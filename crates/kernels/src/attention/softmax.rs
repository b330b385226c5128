//! Online softmax over tiles of scores (Milakov and Gimelshein 2018; FlashAttention-2 §3.1).

use std::ops::Range;

use sage_core::PLevels;
use sage_ptx::{Code, FragmentA, RoundedElement, Rows, SLOT_ROWS, Tile, Val, Var};

use super::config::AttentionConfig;
use super::score_tile::ScoreTile;
use crate::fp4::ScalesOfA;
use crate::integer::{ROUNDING_MAGIC, ROUNDING_MAGIC_BITS};
use crate::operand::Element;
use crate::tiling::Engine;

/// Base-2 exponent added to scores so that P fills E4M3's range; a little below log₂ 448 (spec §2.5).
const E4M3_P_EXPONENT: f32 = sage_core::oracle::E4M3_P_EXPONENT;

/// The same for two levels of 4 bits: `log₂ (448 · 6)`, which a group's scale of 448 and its largest value reach.
const FP4_P_EXPONENT: f32 = 11.392_317;

/// Sums of P as rounded, by products with ones, which leave the other units to the exponentials: tiles of eight
/// columns, which are all alike.
enum ProductSums<'k> {
    /// None.
    None,
    /// A warp's.
    Done(Tile<Var<'k, f32>>),
    /// A warpgroup's, whose products are in flight: they are rescaled with the output's.
    InFlight(Tile<Var<'k, f32>>),
}

/// Running maximum and sum of each row.
pub(super) struct Softmax<'k> {
    /// What is subtracted from scores, in base 2: `exponent` less than the largest so far, or than one up to `lazy`
    /// smaller.
    pub(super) reference: Rows<Var<'k, f32>>,
    /// Sums of P before it is rounded, of this lane's keys: where there are no products, and for log-sum-exps, which
    /// would show what rounding does to sums: bfloat16 shifts them by up to 2⁻⁹.
    pub(super) lane_sums: Option<Rows<Var<'k, f32>>>,
    /// For P in 4 bits.
    pub(super) scales_of_p: Option<ScalesOfA<'k>>,
    product_sums: ProductSums<'k>,
    /// The largest logarithm of P, but for `lazy`.
    pub(super) exponent: f32,
    pub(super) lazy: f32,
    /// Whether every step's sums are rescaled, and not those alone in which some row's maximum has risen.
    pub(super) always: bool,
}

impl<'k> Softmax<'k> {
    pub fn new(code: &'k Code, config: &AttentionConfig) -> Self {
        let warp_rows = config.tiling.rows_per_warp();
        let element = config.operands.p.element;
        let minifloat = matches!(element, Element::E4M3 | Element::E2M1);
        let lazy = config.tiling.lazy_rescale() as f32;
        let product_sums = if config.sums_by_mma() {
            ProductSums::InFlight(Tile::filled(code, warp_rows, 8, 0.0))
        } else if minifloat || config.tiling.engine() == Engine::Warpgroups {
            ProductSums::None
        } else {
            ProductSums::Done(Tile::filled(code, warp_rows, 8, 0.0))
        };
        let by_lanes = matches!(product_sums, ProductSums::None) || config.lse;
        let rows =
            |first: f32, name: &str| Rows::from_fn(warp_rows / SLOT_ROWS, |_| code.var(first).named(name));
        Softmax {
            lane_sums: by_lanes.then(|| rows(0.0, "row_sum")),
            scales_of_p: config.operands.p.fp4().map(|format| ScalesOfA::new(format, code.lane_index())),
            // Finite, so that differences with it are numbers also before the first visible key.
            reference: rows(f32::MIN, "row_reference"),
            product_sums,
            // E4M3 has no room above its largest value: what P may rise by is left free.
            exponent: match (element, config.operands.levels) {
                (Element::E4M3, _) => E4M3_P_EXPONENT - lazy,
                (Element::E2M1, Some(PLevels::Two)) => FP4_P_EXPONENT - lazy,
                _ => 0.0,
            },
            lazy,
            // Products in 4 bits take no longer than what there is to do beside them, and a branch costs less than that.
            always: lazy == 0.0 && config.operands.q.element != Element::E2M1,
        }
    }

    /// Takes a step's scores in, calling `rescale` with the factor of each row's sums where they change. Returns P of
    /// each tile of scores.
    pub fn advance<'s>(
        &'s self,
        code: &'k Code,
        scores: &'s [ScoreTile<'k>],
        rescale: impl FnOnce(&Rows<Val<'k, f32>>),
    ) -> Vec<Probabilities<'s, 'k>> {
        code.note("softmax: row maxima");
        let slots = self.reference.slots();
        let maxima: Vec<_> =
            scores.iter().map(|tile| Rows::from_fn(slots, |slot| tile.lane_maximum(slot))).collect();
        let shifts: Vec<_> = scores.iter().map(|_| Rows::from_fn(slots, |_| Var::new(code))).collect();
        let update = || {
            code.note("softmax: new references");
            let alphas = self.new_references(scores, &maxima);
            self.rescale(&alphas);
            rescale(&alphas);
            self.set_shifts(scores, &shifts);
        };
        if self.always {
            update();
        } else {
            // As long as no row has risen far, references may stay, and rows need no maximum over their lanes.
            self.set_shifts(scores, &shifts);
            let limit = self.exponent + self.lazy;
            let rises = scores.iter().zip(&maxima).zip(&shifts).flat_map(|((tile, maxima), shifts)| {
                (0..slots).map(|slot| maxima[slot].mul_add(tile.factor[slot], shifts[slot].get()).gt(limit))
            });
            let some = rises.reduce(|a, b| a | b).unwrap_or(code.constant(false));
            code.when(code.any(some), update);
        }
        let of_tile = |(scores, shift): (&'s ScoreTile<'k>, &Rows<Var<'k, f32>>)| Probabilities {
            softmax: self,
            scores,
            shift: Some(shift.map(|shift| shift.get())),
        };
        scores.iter().zip(&shifts).map(of_tile).collect()
    }

    /// Raises references to the rows' maxima; `maxima` has the lane's own for each tile. Returns the factors of
    /// sums of exponentials that were relative to the old ones.
    fn new_references(&self, scores: &[ScoreTile<'k>], maxima: &[Rows<Val<'k, f32>>]) -> Rows<Val<'k, f32>> {
        Rows::from_fn(self.reference.slots(), |slot| {
            let old = self.reference[slot].get();
            let of_tiles = scores.iter().zip(maxima).map(|(tile, maxima)| tile.logarithm(maxima[slot], slot));
            let row = of_tiles.reduce(Val::max).map(|maximum| maximum.reduce_quad(Val::max));
            let row = row.unwrap_or(old.code().constant(f32::NEG_INFINITY));
            let row = if self.exponent == 0.0 { row } else { row - self.exponent };
            let new = old.max(row).named("row_reference");
            self.reference[slot].set(new);
            (old - new).exp2().named("alpha")
        })
    }

    /// Multiplies the sums, but for those in flight.
    pub(super) fn rescale(&self, alphas: &Rows<Val<'k, f32>>) {
        if let Some(sums) = &self.lane_sums {
            sums.zip(alphas).for_each(|(sum, &alpha)| sum.set(sum.get() * alpha));
        }
        if let ProductSums::Done(sums) = &self.product_sums {
            sums.mul_rows(alphas);
        }
    }

    /// Sets what is to be added to each tile's scaled values before the exponential.
    fn set_shifts(&self, scores: &[ScoreTile<'k>], shifts: &[Rows<Var<'k, f32>>]) {
        for (tile, shifts) in scores.iter().zip(shifts) {
            for (slot, shift) in shifts.iter().enumerate() {
                let reference = self.reference[slot].get();
                // The bias of the values is taken back here, where it costs nothing.
                shift.set(if tile.biased {
                    (-tile.factor[slot]).mul_add(ROUNDING_MAGIC, -reference)
                } else {
                    -reference
                });
            }
        }
    }

    /// Sums that products with V's ones are added to.
    pub fn sums_in_flight(&self) -> Option<&Tile<Var<'k, f32>>> {
        match &self.product_sums {
            ProductSums::InFlight(sums) => Some(sums),
            _ => None,
        }
    }

    /// Each row's sum over all keys.
    pub fn finish(&self) -> Rows<RowSum<'k>> {
        Rows::from_fn(self.reference.slots(), |slot| {
            let lanes = self.lane_sums.as_ref().map(|sums| sums[slot].get().reduce_quad(|a, b| a + b));
            let products = match &self.product_sums {
                ProductSums::None => None,
                ProductSums::Done(sums) | ProductSums::InFlight(sums) => Some(sums.at(slot, 0).get()),
            };
            // What multiplied V is divided by its own sum; the log-sum-exp is of what was not rounded.
            let (divisor, sum) = (products.or(lanes), lanes.or(products));
            let [divisor, sum] = [divisor, sum].map(|sum| sum.expect("P is summed somehow"));
            RowSum {
                inverse: divisor.eq(0.0).select(0.0, divisor.recip()).named("inverse_sum"),
                divisor,
                reference: self.reference[slot].get(),
                sum,
            }
        })
    }
}

/// P of a tile of scores: the exponentials are computed where they are asked for, close to the products that need them.
pub(super) struct Probabilities<'s, 'k> {
    pub(super) softmax: &'s Softmax<'k>,
    pub(super) scores: &'s ScoreTile<'k>,
    /// What is added to scaled values before the exponential; none where they are its arguments already.
    pub(super) shift: Option<Rows<Val<'k, f32>>>,
}

impl<'k> Probabilities<'_, 'k> {
    /// P of all keys.
    pub fn exponentials(&self) -> Tile<Val<'k, f32>> {
        self.columns(0..self.scores.values.columns())
    }

    /// P of the keys of a step of the product's depth, as its operand.
    pub fn operand<E: RoundedElement>(&self, step: usize) -> Vec<FragmentA<'k, E>> {
        let p = self.columns(E::DEPTH * step..E::DEPTH * (step + 1)).operand::<E>(0);
        if let ProductSums::Done(sums) = &self.softmax.product_sums {
            sums.add_row_sums(&p);
        }
        p
    }

    /// P of some of the keys, which goes into the sums.
    fn columns(&self, columns: Range<usize>) -> Tile<Val<'k, f32>> {
        let scores = self.scores.values.slice(columns);
        // Exponentials of a strip's rows are summed before those of the next.
        scores.map_strips(|strip, scores| {
            let p = match &self.shift {
                Some(shift) => {
                    let (factor, shift) = (self.scores.factor.strip(strip), shift.strip(strip));
                    scores.map_at(|slot, _, score| score.get().mul_add(factor[slot], shift[slot]).exp2())
                }
                None => scores.map_at(|_, _, score| score.get().exp2()),
            };
            if let Some(sums) = &self.softmax.lane_sums {
                for (slot, sum) in sums.strip(strip).iter().enumerate() {
                    let of_tile = p.row_sum(slot);
                    sum.set(sum.get() + of_tile);
                }
            }
            p
        })
    }
}

/// What a row's output and log-sum-exp are made of.
#[derive(Clone, Copy)]
pub(super) struct RowSum<'k> {
    /// Sum of the exponentials that V was multiplied with; 0 where no key is visible.
    pub divisor: Val<'k, f32>,
    /// `1 / divisor`, or 0 where no key is visible.
    pub inverse: Val<'k, f32>,
    /// What exponentials are relative to, in base 2.
    pub reference: Val<'k, f32>,
    /// Sum of the exponentials before they were rounded, where the log-sum-exp is asked for.
    pub sum: Val<'k, f32>,
}

impl<'k> RowSum<'k> {
    /// The log-sum-exp in base 2; −∞ where no key is visible.
    #[track_caller]
    pub fn lse2(&self) -> Val<'k, f32> {
        self.sum.eq(0.0).select(f32::NEG_INFINITY, self.sum.log2() + self.reference)
    }
}

/// The bits that integer scores start from are those of the float that is taken back.
const _: () = assert!(ROUNDING_MAGIC.to_bits() as i32 == ROUNDING_MAGIC_BITS);
