//! The softmax of scores with packed biases.
//!
//! A row's maximum is one of sums, and a sum of a score and its bias costs two multiplications that add. So that the
//! softmax costs no third, the same two subtract the row's reference as it was before the tile: sums are the exponents
//! of P at once, and of the few tiles whose maximum rises far they are corrected.

use sage_core::DType;
use sage_ptx::{Rows, Val};

use super::score_tile::ScoreTile;
use super::scores::{Masking, Scoring};
use super::softmax::{Probabilities, Softmax};
use crate::integer::ROUNDING_MAGIC;

/// References down to this one are subtracted at once. Below it, and before a row's first visible key, nothing is: the
/// difference of a score of common size and such a reference would lose the score's low bits, and all of them near the
/// least finite reference, which padding by the least finite bias leaves.
const LEAST_SUBTRACTED: f32 = -16384.0;

/// Factors below this one make numbers of integers that sums of products of bytes reach.
const COMMON_FACTOR: f32 = f32::from_bits((127 + 64) << 23);

/// The biases of a step's scores.
pub(super) struct Biases<'b, 'k, 'c> {
    pub scoring: &'b Scoring<'k, 'c>,
    /// Their packed type.
    pub dtype: DType,
    /// The tile's column that the scores begin with.
    pub first_column: usize,
    pub masking: &'b Masking<'k>,
}

impl<'k> Biases<'_, 'k, '_> {
    /// Makes logarithms of scores, biased where the mask changes some, relative to `bases`, and hides what the band and
    /// the end of the keys hide.
    fn take_logarithms(&self, scores: &[ScoreTile<'k>], bases: &Rows<Val<'k, f32>>) {
        let code = self.scoring.code;
        code.note("scores: packed additive mask");
        let shifts: Vec<_> = scores.iter().map(|tile| tile.shift(bases)).collect();
        let tiles = || scores.iter().zip(&shifts).enumerate();
        code.if_else(
            self.masking.masked,
            || {
                for (part, (scores, shift)) in tiles() {
                    if let Some(words) = self.scoring.words_of(scores, part, self.first_column, self.masking)
                    {
                        scores.take_biased_logarithms(shift, &words, self.dtype, self.first_column);
                    }
                }
            },
            || tiles().for_each(|(_, (scores, shift))| scores.take_logarithms(shift)),
        );
        self.scoring.hide_outside(scores, self.masking);
    }

    /// Hides what a bias of −∞ hides, whatever the score is.
    fn hide(&self, scores: &[ScoreTile<'k>]) {
        self.scoring.code.when(self.masking.masked, || {
            for (part, scores) in scores.iter().enumerate() {
                if let Some(words) = self.scoring.words_of(scores, part, self.first_column, self.masking) {
                    scores.hide_by_biases(&words, self.dtype, self.first_column);
                }
            }
        });
    }
}

impl<'k> ScoreTile<'k> {
    /// What is added to scaled values for logarithms relative to `bases`. The bias of integers is taken back here,
    /// where it costs nothing.
    fn shift(&self, bases: &Rows<Val<'k, f32>>) -> Rows<Val<'k, f32>> {
        Rows::from_fn(bases.slots(), |slot| {
            let base = bases[slot];
            if self.biased { (-self.factor[slot]).mul_add(ROUNDING_MAGIC, -base) } else { -base }
        })
    }
}

/// The largest of the lane's values of a row slot.
fn maximum<'k>(
    scores: &[ScoreTile<'k>],
    of_tile: impl Fn(&ScoreTile<'k>) -> Val<'k, f32>,
    larger: impl Fn(Val<'k, f32>, Val<'k, f32>) -> Val<'k, f32>,
) -> Val<'k, f32> {
    scores.iter().map(of_tile).reduce(larger).expect("a step has keys")
}

impl<'k> Softmax<'k> {
    /// Takes a step's scores in with their biases, as [`advance`](Self::advance) does without.
    pub fn advance_biased<'s>(
        &'s self,
        scores: &'s [ScoreTile<'k>],
        biases: &Biases<'_, 'k, '_>,
        rescale: impl FnOnce(&Rows<Val<'k, f32>>),
    ) -> Vec<Probabilities<'s, 'k>> {
        let code = biases.scoring.code;
        let references = self.reference.map(|reference| reference.get());
        let bases = references.map(|&reference| reference.gt(LEAST_SUBTRACTED).select(reference, 0.0));
        biases.take_logarithms(scores, &bases);
        let update = || {
            code.note("softmax: new references");
            biases.hide(scores);
            let alphas = self.raise_references(scores, &bases);
            self.rescale(&alphas);
            rescale(&alphas);
        };
        let any = |of_slot: &dyn Fn(usize) -> Val<'k, bool>| {
            let some = (0..references.slots()).map(of_slot).reduce(|a, b| a | b);
            some.unwrap_or(code.constant(false))
        };
        if self.always {
            update();
        } else {
            code.note("softmax: row maxima");
            let rises = any(&|slot| self.rises(scores, slot));
            let apart = any(&|slot| bases[slot].ne(references[slot]));
            code.when(code.any(rises | apart), || {
                // A row that sees nothing yet has nothing to be relative to.
                let seen = any(&|slot| {
                    let largest = maximum(scores, |tile| tile.values.row_max(slot), Val::max);
                    bases[slot].ne(references[slot]) & largest.gt(f32::NEG_INFINITY)
                });
                code.when(code.any(rises | seen), update);
            });
        }
        scores.iter().map(|scores| Probabilities { softmax: self, scores, shift: None }).collect()
    }

    /// Whether some of a row slot's exponents rise too far, or may not be numbers where their biases are −∞.
    fn rises(&self, scores: &[ScoreTile<'k>], slot: usize) -> Val<'k, bool> {
        let limit = self.exponent + self.lazy;
        if !scores.iter().all(|tile| tile.biased) {
            // NaN is not below any limit.
            return !maximum(scores, |tile| tile.values.row_max_nan(slot), Val::max_nan).le(limit);
        }
        // Integers times a factor of common size are numbers. Of floats of either sign the largest that is positive is
        // found among their bits, where integer maxima are the faster ones; of negative ones it is some negative one.
        let largest = scores.iter().map(|tile| tile.values.reinterpret::<i32>().row_max(slot));
        let largest = largest.reduce(Val::max).expect("a step has keys").reinterpret::<f32>();
        let common = scores.iter().map(|tile| tile.factor[slot].abs().lt(COMMON_FACTOR));
        largest.gt(limit) | !common.reduce(|a, b| a & b).expect("a step has keys")
    }

    /// Raises references to the rows' maxima, and makes values that were relative to `bases` relative to them. Returns
    /// the factors of sums of exponentials that were relative to the old ones.
    fn raise_references(&self, scores: &[ScoreTile<'k>], bases: &Rows<Val<'k, f32>>) -> Rows<Val<'k, f32>> {
        Rows::from_fn(bases.slots(), |slot| {
            let old = self.reference[slot].get();
            let row = maximum(scores, |tile| tile.values.row_max(slot), Val::max).reduce_quad(Val::max);
            let new = old.max(row + bases[slot] - self.exponent).named("row_reference");
            self.reference[slot].set(new);
            let moved = bases[slot] - new;
            for scores in scores {
                scores.values.row(slot).for_each(|(_, value)| value.set(value.get() + moved));
            }
            (old - new).exp2().named("alpha")
        })
    }
}
