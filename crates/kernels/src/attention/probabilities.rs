//! From scores to P: what is hidden of them, their biases, and the softmax.

use sage_ptx::{Rows, Val};

use super::biased_softmax::Biases;
use super::score_tile::ScoreTile;
use super::scores::{Masking, Scoring};
use super::softmax::{Probabilities, Softmax};
use crate::sparse::Packing;

impl<'k> Scoring<'k, '_> {
    /// P of scores, which are those of each 64 keys of a tile, or of its columns from `first_column` on: takes them
    /// into the softmax without what masks, the band and the end of the keys hide, and with biases. Calls `rescale` with
    /// the factor of each row's sums where they change.
    pub fn probabilities<'s>(
        &self,
        softmax: &'s Softmax<'k>,
        scores: &'s [ScoreTile<'k>],
        first_column: usize,
        masking: &Masking<'k>,
        rescale: impl FnOnce(&Rows<Val<'k, f32>>),
    ) -> Vec<Probabilities<'s, 'k>> {
        if let Some(Packing::Biases(dtype)) = self.config.packing() {
            let biases = Biases { scoring: self, dtype, first_column, masking };
            return softmax.advance_biased(scores, &biases, rescale);
        }
        self.hide(scores, first_column, masking);
        softmax.advance(self.code, scores, rescale)
    }
}
