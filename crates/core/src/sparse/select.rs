//! Which blocks of keys a block of queries chooses by their scores.

use std::cmp::Ordering;

use super::PerHead;
use super::arithmetic::{sum, weight};
use crate::{Error, Result};

/// How many blocks of keys a block of queries keeps. It keeps those with the highest scores, and of equal ones those
/// that come first; at least one, where one competes.
///
/// The score of a pair of blocks is that of their means. A weight is what a block has in the softmax of its row's
/// scores, as [`weight`](super::weight()) has it. Weights and their sums are integers, and a share of them is exact: the
/// share in units of 2⁻³², what is below one dropped, times the sum. No share of at least 2⁻⁸ loses anything so.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Select {
    /// This share of all blocks of keys: `⌊share · k_blocks⌋`, where the product is rounded to single precision.
    TopK(PerHead),
    /// This many blocks.
    Count(usize),
    /// As many as have together at most this share of all weight: the largest n with `w₁ + … + wₙ ≤ share · Σw`.
    Cdf(PerHead),
    /// As many as [`Select::TopK`] with the share `k`, or as have together at least the share `p` of all weight if that
    /// is more: the smallest n with `w₁ + … + wₙ ≥ p · Σw`. As both take the highest scores, that is their union.
    TopKTopP {
        /// Share of all blocks.
        k: PerHead,
        /// Share of all weight.
        p: PerHead,
    },
    /// Those whose score exceeds `μ + τ·σ`, with the mean μ and the standard deviation σ of the scores of all blocks
    /// that compete. Where scores are about normal, a share of `1 − Φ(τ)`: 16% for 1, 7% for 1.5.
    ///
    /// `μ = Σs / n` and `σ = √(Σ(s − μ)² / n)` in single precision, where both are a [`sum`](super::sum()) over all
    /// blocks, with zeros for those that do not compete.
    Sigmas(PerHead),
}

impl Select {
    /// That hyper-parameters are within their range, for each of `heads` heads.
    pub(super) fn check(&self, heads: usize) -> Result<()> {
        match self {
            Select::TopK(k) => k.check_share("topk", heads),
            Select::Count(0) => Err(Error::value("topk", 0, "at least 1 block")),
            Select::Count(_) => Ok(()),
            Select::Cdf(threshold) => threshold.check_share("cdfthreshd", heads),
            Select::TopKTopP { k, p } => {
                k.check_share("topk", heads).and_then(|()| p.check_share("topp", heads))
            }
            Select::Sigmas(tau) => tau.check_finite("tau", heads),
        }
    }

    /// The blocks that a row chooses, highest score first. `scores` has none for blocks that do not compete.
    ///
    /// Where a score is not finite all blocks that compete are chosen: they cannot be ranked, and nothing that is no
    /// number should be left out unseen.
    pub(super) fn choose(&self, head: usize, scores: &[Option<f32>]) -> Vec<usize> {
        let mut ranked: Vec<(usize, f32)> =
            scores.iter().enumerate().filter_map(|(block, score)| Some((block, (*score)?))).collect();
        let kept = if ranked.iter().all(|(_, score)| score.is_finite()) {
            // The sort is stable, and finite scores compare.
            ranked.sort_by(|(_, a), (_, b)| b.partial_cmp(a).unwrap_or(Ordering::Equal));
            self.kept(head, scores, &ranked).max(1)
        } else {
            ranked.len()
        };
        ranked.into_iter().take(kept).map(|(block, _)| block).collect()
    }

    /// How many of the ranked blocks are kept, before the rule that one is at least.
    fn kept(&self, head: usize, scores: &[Option<f32>], ranked: &[(usize, f32)]) -> usize {
        let top_k = |share: &PerHead| (share.of(head) * scores.len() as f32) as usize;
        match self {
            Select::TopK(share) => top_k(share),
            Select::Count(count) => *count,
            Select::Cdf(threshold) => {
                let weights = Weights::of(ranked);
                let share = weights.share(threshold.of(head));
                weights.leading(|sum| sum <= share)
            }
            Select::TopKTopP { k, p } => {
                let weights = Weights::of(ranked);
                let share = weights.share(p.of(head));
                top_k(k).max(weights.leading(|sum| sum < share) + 1)
            }
            Select::Sigmas(tau) => {
                let count = ranked.len() as f32;
                let mean = sum(scores.iter().map(|score| score.unwrap_or(0.0))) / count;
                let squares = scores.iter().map(|score| score.map_or(0.0, |s| (s - mean) * (s - mean)));
                let threshold = mean + tau.of(head) * (sum(squares) / count).sqrt();
                ranked.iter().take_while(|(_, score)| *score > threshold).count()
            }
        }
    }
}

/// Units of a share in the whole.
const UNIT: u128 = 1 << 32;

/// Sums of the weights of the first blocks, one block more from one to the next.
struct Weights(Vec<u64>);

impl Weights {
    /// The weights of blocks with finite scores, the highest first.
    fn of(ranked: &[(usize, f32)]) -> Self {
        let mut sum = 0;
        let add = |&(_, score): &(usize, f32)| {
            sum += u64::from(weight(score, ranked[0].1));
            sum
        };
        Weights(ranked.iter().map(add).collect())
    }

    /// The share of all weight, in units of 2⁻³².
    fn share(&self, share: f32) -> u128 {
        // Exact, as the exponent alone changes; then what is below a unit is dropped.
        let units = (f64::from(share) * UNIT as f64) as u128;
        units * self.0.last().map_or(0, |&all| u128::from(all))
    }

    /// How many sums meet `holds`, which is handed each in units of 2⁻³², up to the first that does not.
    fn leading(&self, holds: impl Fn(u128) -> bool) -> usize {
        self.0.iter().take_while(|&&sum| holds(u128::from(sum) * UNIT)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen among blocks with these scores, in the order of the blocks.
    fn chosen(select: Select, scores: &[f32]) -> Vec<usize> {
        let scores: Vec<Option<f32>> = scores.iter().map(|&score| Some(score)).collect();
        let mut blocks = select.choose(0, &scores);
        blocks.sort_unstable();
        blocks
    }

    #[test]
    fn top_k_is_a_share_rounded_down_and_at_least_one() {
        let scores = [1.0, 4.0, 2.0, 5.0, 3.0];
        let top_k = |share: f32| chosen(Select::TopK(share.into()), &scores);
        assert_eq!(top_k(0.59), [1, 3], "⌊2.95⌋");
        assert_eq!(top_k(0.6), [1, 3, 4], "⌊3.0⌋, though 0.6 in single precision is a little more");
        assert_eq!(top_k(0.1), [3], "⌊0.5⌋ would be none");
        assert_eq!(top_k(1.0), [0, 1, 2, 3, 4]);
        let ten: Vec<f32> = (0..10).map(|score| score as f32).collect();
        // 0.7 in single precision is a little less, but its product with 10 rounds to 7.
        assert_eq!(chosen(Select::TopK(0.7.into()), &ten).len(), 7);
        assert_eq!(chosen(Select::Count(2), &scores), [1, 3]);
        assert_eq!(chosen(Select::Count(9), &scores), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn of_equal_scores_the_first_are_chosen() {
        assert_eq!(chosen(Select::Count(2), &[1.0, 2.0, 2.0, 2.0]), [1, 2]);
        assert_eq!(chosen(Select::Count(3), &[1.0, 1.0, 2.0, 1.0]), [0, 1, 2]);
        assert_eq!(chosen(Select::Count(1), &[-0.0, 0.0]), [0], "zeros are equal");
    }

    #[test]
    fn cdf_counts_the_sums_of_weight_up_to_the_threshold() {
        // Weights of ½, ¼, ⅛, ⅛: sums .5, .75, .875, 1.
        let ln = f32::ln;
        let scores = [ln(2.0), 0.0, ln(4.0), 0.0];
        let cdf = |share: f32| chosen(Select::Cdf(share.into()), &scores);
        assert_eq!(cdf(0.74), [2]);
        assert_eq!(cdf(0.76), [0, 2]);
        assert_eq!(cdf(0.88), [0, 1, 2]);
        assert_eq!(cdf(1.0), [0, 1, 2, 3]);
        assert_eq!(cdf(0.4), [2], "at least one");
        // Equal weights have exact sums: a sum at the threshold counts.
        let equal = |share: f32| chosen(Select::Cdf(share.into()), &[3.0; 4]).len();
        assert_eq!((equal(0.5), equal(0.499), equal(0.0)), (2, 1, 1));
        // The next below ½ is half a unit of 2⁻²⁴ less, and so not enough for two.
        assert_eq!(equal(0.5f32.next_down()), 1);
    }

    #[test]
    fn top_p_reaches_its_share_and_is_united_with_top_k() {
        let both = |k: f32, p: f32| {
            chosen(Select::TopKTopP { k: k.into(), p: p.into() }, &[1.0, 1.0, 1.0, 1.0]).len()
        };
        assert_eq!(both(0.0, 0.5), 2, "two have exactly half");
        assert_eq!(both(0.0, 0.51), 3);
        assert_eq!(both(0.0, 0.0), 1);
        assert_eq!(both(0.75, 0.5), 3, "top-k is more");
        assert_eq!(both(0.5, 1.0), 4, "top-p is more");
        // One block with ⅞ of the weight has any smaller share: the rest is top-k's.
        let peak = [0.0, 21f32.ln(), 0.0, 0.0];
        let peaked = |k: f32, p: f32| chosen(Select::TopKTopP { k: k.into(), p: p.into() }, &peak);
        assert_eq!((peaked(0.0, 0.8), peaked(0.5, 0.8)), (vec![1], vec![0, 1]));
    }

    #[test]
    fn sigmas_count_from_the_mean_of_the_row() {
        // μ = 1, σ = √((9 + 1 + 1 + 1) / 4) = 1.73.
        let scores = [0.0, 4.0, 0.0, 0.0];
        let sigmas = |tau: f32| chosen(Select::Sigmas(tau.into()), &scores);
        assert_eq!(sigmas(1.0), [1], "above 2.73");
        assert_eq!(sigmas(-1.0), [0, 1, 2, 3], "above −0.73");
        assert_eq!(sigmas(1.8), [1], "none is above 4.1, and one is kept at least");
        // Blocks that do not compete enter neither: μ = 2, σ = 2.
        let select = Select::Sigmas(0.5.into());
        assert_eq!(select.choose(0, &[None, Some(4.0), Some(0.0), None]), [1], "above 3");
        assert_eq!(
            Select::Sigmas((-1.5).into()).choose(0, &[None, Some(4.0), Some(0.0)]),
            [1, 2],
            "above −1"
        );
    }

    #[test]
    fn blocks_that_do_not_compete_are_never_chosen_but_count_for_the_share() {
        let scores = [Some(1.0), None, Some(2.0), None];
        assert_eq!(Select::TopK(0.25.into()).choose(0, &scores), [2]);
        assert_eq!(Select::TopK(1.0.into()).choose(0, &scores), [2, 0]);
        for select in [
            Select::TopK(1.0.into()),
            Select::Cdf(1.0.into()),
            Select::Sigmas(0.0.into()),
            Select::TopKTopP { k: 0.0.into(), p: 1.0.into() },
        ] {
            assert_eq!(select.choose(0, &[None; 3]), [] as [usize; 0], "{select:?}");
        }
    }

    #[test]
    fn a_row_that_cannot_be_ranked_keeps_all_that_compete() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for select in [Select::Count(1), Select::Cdf(0.1.into()), Select::Sigmas(9.0.into())] {
                assert_eq!(select.choose(0, &[Some(1.0), Some(bad), None]), [0, 1], "{select:?} with {bad}");
            }
        }
    }

    #[test]
    fn a_head_may_have_its_own_share() {
        let select = Select::TopK(vec![0.5, 1.0].into());
        let scores = [Some(2.0), Some(1.0)];
        assert_eq!((select.choose(0, &scores), select.choose(1, &scores)), (vec![0], vec![0, 1]));
        let error = |select: Select| select.check(2).unwrap_err().to_string();
        assert_eq!(error(Select::Count(0)), "topk: value is 0, expected at least 1 block");
        assert_eq!(error(Select::Cdf(1.5.into())), "cdfthreshd: value is 1.5, expected 0 to 1");
        assert!(error(Select::Sigmas(f32::NAN.into())).starts_with("tau: value is NaN"));
        let both = Select::TopKTopP { k: 0.1.into(), p: vec![0.5].into() };
        assert_eq!(error(both), "topp: shape is [1], expected [2], one for each query head");
    }
}
