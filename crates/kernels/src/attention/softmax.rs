//! Online softmax over tiles of scores (Milakov and Gimelshein 2018; FlashAttention-2 §3.1).

use sage_ptx::{Accumulator, Code, FragmentA, FragmentB, Half, MmaElement, Scalar, Val, Var};

use super::config::{AttentionConfig, Engine, Values};
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

    /// The largest value of a row slot that this lane holds.
    fn lane_maximum(&self, slot: usize) -> Val<'k, f32> {
        let row = self.row(slot);
        let largest = if self.biased {
            // Biased values are positive or −∞, and so are ordered like their bits; integer maxima are the faster ones.
            let bits: Vec<_> = row.iter().map(|x| x.reinterpret::<i32>()).collect();
            maximum(&bits).map(|bits| bits.reinterpret::<f32>())
        } else {
            maximum(&row)
        };
        largest.unwrap_or(self.first_key.code().constant(f32::NEG_INFINITY))
    }

    /// A value of a row slot, as its base-2 logarithm.
    fn logarithm(&self, value: Val<'k, f32>, slot: usize) -> Val<'k, f32> {
        let value = if self.biased { value - ROUNDING_MAGIC } else { value };
        value * self.factor[slot]
    }
}

/// The largest of values, by chains short enough not to wait for each other.
fn maximum<'k, T: Scalar>(values: &[Val<'k, T>]) -> Option<Val<'k, T>> {
    let chains = values.chunks(8).filter_map(|chain| chain.iter().copied().reduce(Val::max));
    chains.reduce(Val::max)
}

/// Sums of P as rounded, by products with ones, which leave the other units to the exponentials.
enum ProductSums<'k> {
    /// None.
    None,
    /// A warp's, `[m]`.
    Done(Vec<Accumulator<'k, f32>>),
    /// A warpgroup's, whose products are in flight: they are rescaled with the output's.
    InFlight(Accumulator<'k, f32>),
}

/// Running maximum and sum of each row slot.
pub(super) struct Softmax<'k> {
    /// What is subtracted from scores, in base 2: `exponent` less than the largest so far, or than one up to `lazy` smaller.
    reference: Vec<Var<'k, f32>>,
    /// Sums of P before it is rounded, of this lane's keys, for each row slot: where there are no products, and for
    /// log-sum-exps, which would show what rounding does to sums: bfloat16 shifts them by up to 2⁻⁹.
    lane_sums: Vec<Var<'k, f32>>,
    product_sums: ProductSums<'k>,
    /// The largest logarithm of P, but for `lazy`.
    exponent: f32,
    lazy: f32,
}

impl<'k> Softmax<'k> {
    pub fn new(code: &'k Code, config: &AttentionConfig) -> Self {
        let slots = config.tiling.rows_per_warp / 8;
        let fp8 = matches!(config.values, Values::Fp8(_));
        let lazy = config.tiling.lazy_rescale as f32;
        let product_sums = if config.sums_by_ones() {
            ProductSums::InFlight(Accumulator::filled(code, 0.0))
        } else if fp8 || config.tiling.engine == Engine::Warpgroups {
            ProductSums::None
        } else {
            ProductSums::Done((0..slots / 2).map(|_| Accumulator::filled(code, 0.0)).collect())
        };
        let by_lanes = matches!(product_sums, ProductSums::None) || config.lse;
        let lane_sums = (0..slots * usize::from(by_lanes)).map(|_| code.var(0.0).named("row_sum")).collect();
        Softmax {
            // Finite, so that differences with it are numbers also before the first visible key.
            reference: (0..slots).map(|_| code.var(f32::MIN).named("row_reference")).collect(),
            lane_sums,
            product_sums,
            // E4M3 has no room above its largest value: what P may rise by is left free.
            exponent: if fp8 { E4M3_P_EXPONENT - lazy } else { 0.0 },
            lazy,
        }
    }

    /// Takes a step's maxima in, calling `rescale` with the factor of each row slot's sums where they change. Returns what is to
    /// be added to each row slot's scaled values before the exponential, for each tile of scores.
    pub fn advance(
        &self,
        code: &'k Code,
        scores: &[ScoreTile<'k>],
        rescale: impl FnOnce(&[Val<'k, f32>]),
    ) -> Vec<Vec<Val<'k, f32>>> {
        code.note("softmax: row maxima");
        let slots = self.reference.len();
        let maxima: Vec<Vec<_>> =
            scores.iter().map(|tile| (0..slots).map(|slot| tile.lane_maximum(slot)).collect()).collect();
        let shifts: Vec<Vec<Var<'k, f32>>> =
            scores.iter().map(|_| (0..slots).map(|_| Var::new(code)).collect()).collect();
        let set_shifts = || {
            for (tile, shifts) in scores.iter().zip(&shifts) {
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
        };
        let row_maximum = |slot: usize| {
            let of_tiles =
                scores.iter().zip(&maxima).map(|(tile, maxima)| tile.logarithm(maxima[slot], slot));
            // The lanes of a quad share the row.
            of_tiles.reduce(Val::max).map(|maximum| maximum.reduce_lanes(3, Val::max))
        };
        let update = || {
            code.note("softmax: new references");
            let alphas: Vec<_> = (0..slots)
                .map(|slot| {
                    let old = self.reference[slot].get();
                    let row = row_maximum(slot).unwrap_or(code.constant(f32::NEG_INFINITY));
                    let row = if self.exponent == 0.0 { row } else { row - self.exponent };
                    let new = old.max(row).named("row_reference");
                    self.reference[slot].set(new);
                    (old - new).exp2().named("alpha")
                })
                .collect();
            self.lane_sums.iter().zip(&alphas).for_each(|(sum, &alpha)| sum.set(sum.get() * alpha));
            if let ProductSums::Done(sums) = &self.product_sums {
                for (m, sum) in sums.iter().enumerate() {
                    for (i, var) in sum.registers().iter().enumerate() {
                        var.set(var.get() * alphas[2 * m + i / 2]);
                    }
                }
            }
            rescale(&alphas);
        };
        if self.lazy == 0.0 {
            update();
            set_shifts();
        } else {
            // As long as no row has risen far, references may stay, and rows need no maximum over their lanes.
            set_shifts();
            let limit = self.exponent + self.lazy;
            let rises = scores.iter().zip(&maxima).zip(&shifts).flat_map(|((tile, maxima), shifts)| {
                (0..slots).map(|slot| maxima[slot].mul_add(tile.factor[slot], shifts[slot].get()).gt(limit))
            });
            let some = rises.reduce(|a, b| a | b).unwrap_or(code.constant(false));
            code.when(code.any(some), || {
                update();
                set_shifts();
            });
        }
        shifts.iter().map(|shifts| shifts.iter().map(|shift| shift.get()).collect()).collect()
    }

    /// Row slots' exponentials in columns `columns`: P of the tile, `[m][column][i]`.
    pub fn exponentials(
        &self,
        scores: &ScoreTile<'k>,
        shifts: &[Val<'k, f32>],
        columns: std::ops::Range<usize>,
    ) -> Vec<Vec<[Val<'k, f32>; 4]>> {
        let rows = scores.values.chunks(scores.columns).enumerate().map(|(m, tiles)| {
            let exponential = |tile: &[Var<'k, f32>; 4]| {
                std::array::from_fn(|i| {
                    let slot = 2 * m + i / 2;
                    tile[i].get().mul_add(scores.factor[slot], shifts[slot]).exp2()
                })
            };
            let p: Vec<[Val<'k, f32>; 4]> = tiles[columns.clone()].iter().map(exponential).collect();
            for (half, sum) in self.lane_sums.iter().skip(2 * m).take(2).enumerate() {
                let pairs = p.iter().map(|tile| tile[2 * half] + tile[2 * half + 1]);
                if let Some(of_tile) = pairs.reduce(|a, b| a + b) {
                    sum.set(sum.get() + of_tile);
                }
            }
            p
        });
        rows.collect()
    }

    /// Sums that products with V's ones are added to.
    pub fn sums_in_flight(&self) -> &[Var<'k, f32>] {
        match &self.product_sums {
            ProductSums::InFlight(sum) => sum.registers(),
            _ => &[],
        }
    }

    /// Takes rounded P's sums in, where they are those of rounded P.
    pub fn add_sums<W: Half + MmaElement>(&self, p: &[FragmentA<'k, W>]) {
        if let (ProductSums::Done(sums), Some(first)) = (&self.product_sums, p.first()) {
            let one = first.code().constant(1.0).pack::<W>(first.code().constant(1.0)).reinterpret();
            for (sum, &p) in sums.iter().zip(p) {
                sum.add_product(p, FragmentB::new([one, one]));
            }
        }
    }

    /// Each row slot's sum over all keys.
    pub fn finish(&self) -> Vec<RowSum<'k>> {
        let rows = self.reference.iter().enumerate().map(|(slot, reference)| {
            let lanes = self.lane_sums.get(slot).map(|sum| sum.get().reduce_lanes(3, |a, b| a + b));
            let products = match &self.product_sums {
                ProductSums::None => None,
                ProductSums::Done(sums) => Some(sums[slot / 2].register(2 * (slot % 2)).get()),
                ProductSums::InFlight(sum) => Some(sum.register(2 * slot).get()),
            };
            // What multiplied V is divided by its own sum; the log-sum-exp is of what was not rounded.
            let (divisor, sum) = (products.or(lanes), lanes.or(products));
            let [divisor, sum] = [divisor, sum].map(|sum| sum.expect("P is summed somehow"));
            RowSum {
                inverse: divisor.eq(0.0).select(0.0, divisor.recip()).named("inverse_sum"),
                divisor,
                reference: reference.get(),
                sum,
            }
        });
        rows.collect()
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
