//! How much a predictor keeps, as far as it can be told without tensors.

use std::fmt;

use super::grid::Grid;
use super::{PerHead, Predictor, Select};
use crate::Problem;

/// The share of the blocks that a problem's band shows which a predictor is expected to keep: what
/// [`BlockMap::density`](super::BlockMap::density) will be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpectedDensity {
    /// The share, 0 to 1; 0 where the band shows no block.
    pub share: f64,
    /// Whether tensors decide how much more is kept. Otherwise the share is what scores without structure give.
    pub is_least: bool,
}

/// In words: `about 0.25`, or `at least 0.05, as tensors decide`.
impl fmt::Display for ExpectedDensity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_least {
            true => write!(f, "at least {:.3}, as tensors decide", self.share),
            false => write!(f, "about {:.3}", self.share),
        }
    }
}

impl Predictor {
    /// The share of blocks that this predictor, which was checked with the problem, is expected to keep of each sequence;
    /// of sequences with lengths of their own, of the longest.
    ///
    /// Numbers of blocks are as they are chosen. Of standard deviations it is the share that normally distributed scores
    /// have, and of shares of weight, and of blocks that are not similar, the least that is kept.
    pub fn expected_density(&self, problem: &Problem) -> ExpectedDensity {
        let Problem { q_len, kv_len, band, .. } = *problem;
        let (block_q, block_k) = (self.block_q.max(1), self.block_k.max(1));
        let grid = Grid { q_len, kv_len, block_q, block_k };
        let all = band.seen(q_len, kv_len).end.div_ceil(block_k);
        let heads = self.heads_apart(problem.num_q_heads);
        let is_least =
            self.similarity.is_some() || matches!(self.select, Select::Cdf(_) | Select::TopKTopP { .. });
        let (mut kept, mut shown) = (0.0, 0.0);
        for i in 0..grid.q_blocks() {
            let seen = grid.seen(&band, i);
            let sinks =
                self.sink_k.end.min(seen.end).saturating_sub(self.sink_k.start.max(seen.start)) as f64;
            let number = seen.len() as f64;
            shown += number * heads as f64;
            for head in 0..heads {
                let chosen = self.select.expected(head, all, number).max(1.0).min(number);
                kept += match (self.sink_q.contains(&i), is_least) {
                    (true, _) => number,
                    (false, true) => chosen.max(sinks),
                    // Where sinks are chosen no more often than others, those that are not come to the rest.
                    (false, false) if number > 0.0 => chosen + sinks * (1.0 - chosen / number),
                    (false, false) => 0.0,
                };
            }
        }
        ExpectedDensity { share: if shown > 0.0 { kept / shown } else { 0.0 }, is_least }
    }

    /// Heads that differ in how much they keep: one where all have the same hyper-parameters.
    fn heads_apart(&self, heads: usize) -> usize {
        let each = |number: &PerHead| matches!(number, PerHead::Each(_));
        let differ = match &self.select {
            Select::TopK(number) | Select::Sigmas(number) => each(number),
            Select::TopKTopP { k, .. } => each(k),
            Select::Count(_) | Select::Cdf(_) => false,
        };
        if differ { heads } else { 1 }
    }
}

impl Select {
    /// How many blocks a row is expected to choose, of `all` and of those `seen` that compete, before the rule that one is
    /// at least; where a share of weight decides, what it cannot go below.
    fn expected(&self, head: usize, all: usize, seen: f64) -> f64 {
        let share = |share: &PerHead| (share.of(head) * all as f32).floor() as f64;
        match self {
            Select::TopK(k) | Select::TopKTopP { k, .. } => share(k),
            Select::Count(count) => *count as f64,
            Select::Cdf(_) => 1.0,
            Select::Sigmas(tau) => seen * above(f64::from(tau.of(head))),
        }
    }
}

/// The share of normally distributed numbers that lie more than `sigmas` standard deviations above their mean, within
/// 1e-7: by the approximation 26.2.17 of Abramowitz and Stegun.
fn above(sigmas: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * sigmas.abs());
    let series = [1.330_274_429, -1.821_255_978, 1.781_477_937, -0.356_563_782, 0.319_381_530];
    let sum = series.iter().fold(0.0, |sum, term| (sum + term) * t);
    let tail = sum * (-sigmas * sigmas / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if sigmas < 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::normal_matrix;
    use crate::{Alignment, Band, DType, Options, Tensor};

    fn problem(len: usize, band: Band) -> Problem {
        Problem::dense(DType::F32, [1, 2, 2], [len, len], 16).band(band)
    }

    fn normal(len: usize, seed: u64) -> Tensor {
        Tensor::new(normal_matrix(seed, 2 * len, 16).as_slice().to_vec(), &[1, 2, len, 16]).unwrap()
    }

    #[test]
    fn numbers_of_blocks_are_those_of_the_map() {
        let (q, k) = (normal(700, 1), normal(700, 2));
        let causal = Band::causal(Alignment::TopLeft);
        for band in [Band::FULL, causal, Band { left: Some(200), ..causal }] {
            for predictor in [
                Predictor::sla(0.3),
                Predictor::sla(vec![0.1, 0.6]),
                Predictor::vsa(3).blocks(128, 64),
                Predictor::sla(0.2).sink_q(1..3),
            ] {
                let map = predictor.predict(q.view(), k.view(), &Options::default().band(band)).unwrap();
                let found = predictor.expected_density(&problem(700, band));
                assert!(!found.is_least);
                let density = map.density(&band, 700, 700).unwrap();
                assert!((found.share - density).abs() < 1e-9, "{band:?} {predictor:?}: {found}, {density}");
            }
        }
    }

    #[test]
    fn what_tensors_decide_is_bounded_or_near() {
        let (q, k) = (normal(4096, 1), normal(4096, 2));
        let causal = Band::causal(Alignment::TopLeft);
        for band in [Band::FULL, causal] {
            let found = |predictor: &Predictor| {
                let map = predictor.predict(q.view(), k.view(), &Options::default().band(band)).unwrap();
                (predictor.expected_density(&problem(4096, band)), map.density(&band, 4096, 4096).unwrap())
            };
            for predictor in [
                Predictor::sparge_attn(Select::Cdf(0.5.into()), 0.0),
                Predictor::sparge_attn(Select::TopK(0.2.into()), 0.01).sink_k(0..1),
                Predictor::sparge_attn2(0.1, 0.4),
            ] {
                let (expected, density) = found(&predictor);
                assert!(
                    expected.is_least && expected.share <= density,
                    "{predictor:?}: {expected}, {density}"
                );
                assert!(expected.share > 0.0);
            }
            for predictor in
                [Predictor::sol_attn(1.0), Predictor::sol_attn(-0.5), Predictor::sla(0.1).sink_k(0..4)]
            {
                let (expected, density) = found(&predictor);
                assert!(
                    !expected.is_least && (expected.share - density).abs() < 0.02,
                    "{expected}, {density}"
                );
            }
        }
        assert_eq!(Predictor::sla(0.1).expected_density(&problem(0, Band::FULL)).share, 0.0);
    }

    #[test]
    fn normal_tails_are_the_tables() {
        for (sigmas, share) in [(0.0, 0.5), (1.0, 0.158_655_254), (-1.0, 0.841_344_746), (2.0, 0.022_750_132)]
        {
            assert!((above(sigmas) - share).abs() < 1e-7, "{sigmas}");
        }
    }
}
