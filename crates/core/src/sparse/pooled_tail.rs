//! Attention in which the blocks that a map leaves out count with their means.

use std::borrow::Cow;

use crate::oracle::{Matrix, Output, Score, attend, dot, exact, softcap, visible_keys};
use crate::{Call, Problem};

/// Attention in double precision where each block that `call`'s block mask leaves out contributes one pooled term, as
/// in Sol-Attn (arXiv 2607.24027, §3.2):
///
/// `O_i = (Σ_j exp(s_ij)·V_j + Σ_U exp(s_iU)·Σ_{j∈U} V_j) / (Σ_j exp(s_ij) + Σ_U n_U·exp(s_iU))`,
///
/// with j over the keys of the blocks that are kept and U over those left out, of `n_U` keys. The score `s_iU` is that
/// of the mean of their keys, `softcap(τ⟨Q_i, K̄_U⟩)`, and the mean of their biases is added to it. The log-sum-exp
/// holds the pooled terms as well.
///
/// Only keys that query i sees by the band and the mask are pooled, so the mean of a block on the diagonal tells
/// nothing of later keys. Without a block mask this is [`oracle::exact`](crate::oracle::exact()), and so it is where
/// the keys of a block are all alike.
pub fn pooled_tail(call: &Call<'_>) -> Output {
    if call.sinks.is_some() {
        return pooled_tail(&call.without_sinks()).with_sinks(call);
    }
    with_pooled_tail(call, exact(&call.without_tail()))
}

/// Attention over the blocks that `call`'s block mask keeps, by whatever scheme, with the pooled terms of those left out
/// in double precision: [`pooled_tail`]. Of a row with the log-sum-exp `L`, what is kept is `exp(L)` of its output.
///
/// # Panics
/// When `kept` is of another call.
pub fn with_pooled_tail(call: &Call<'_>, kept: Output) -> Output {
    let problem = &call.problem;
    // Without its block mask, the call shows the keys that are left out too.
    let mut open = *call;
    let Some(mask) = open.block_mask.take() else { return kept };

    let mut output = kept;
    for sequence in call.sequences() {
        for kv_head in 0..problem.num_kv_heads {
            let read = |tensor, head| {
                Matrix::of_head(tensor, sequence.batch, head, sequence.kv_start, sequence.kv_len)
                    .map(f64::from)
            };
            let block_k = mask.block_k;
            let k = Rows::new(read(&call.k, kv_head), block_k);
            let v = Rows::new(read(&call.v, kv_head), block_k);
            for head in kv_head * problem.group_size()..(kv_head + 1) * problem.group_size() {
                let q = Matrix::of_head(&call.q, sequence.batch, head, sequence.q_start, sequence.q_len);
                for (i, q) in q.map(f64::from).iter().enumerate() {
                    let block = |key: usize| key / block_k;
                    let left_out =
                        |key| !mask.blocks.at([sequence.index, head, i / mask.block_q, block(key)]);
                    let keys: Vec<(usize, f64)> =
                        visible_keys(&open, &sequence, head, i).filter(|&(key, _)| left_out(key)).collect();
                    let groups: Vec<Group<'_>> =
                        keys.chunk_by(|a, b| block(a.0) == block(b.0)).map(Group).collect();
                    if !groups.is_empty() {
                        let row = call.lse_index(&sequence, head, i);
                        let (out, lse) = attend_groups(problem, q, &k, &v, &groups, output.row(row));
                        output.set(row, &out, lse);
                    }
                }
            }
        }
    }
    output
}

/// One row: softmax of the groups' scores and of what is `kept`, a term with its log-sum-exp as its score, times V; and
/// its log-sum-exp.
fn attend_groups(
    problem: &Problem,
    q: &[f64],
    k: &Rows,
    v: &Rows,
    groups: &[Group<'_>],
    kept: (&[f64], f64),
) -> (Vec<f64>, f64) {
    let score = |(key, group): (usize, &Group<'_>)| {
        let score = f64::from(problem.sm_scale) * dot(q, &k.mean(group));
        let score = softcap(score, problem.logit_softcap) + group.bias();
        Score { key, value: score + group.count().ln() }
    };
    let mut scores: Vec<Score> = groups.iter().enumerate().map(score).collect();
    scores.push(Score { key: groups.len(), value: kept.1 });
    let mut means: Vec<Cow<'_, [f64]>> = groups.iter().map(|group| v.mean(group)).collect();
    means.push(Cow::Borrowed(kept.0));
    let values = Matrix::from_fn(means.len(), v.rows.width(), |g, c| means[g][c]);
    attend(&scores, &values)
}

/// The keys or values of a head, and the mean of each block of them: most queries see whole blocks.
struct Rows {
    rows: Matrix<f64>,
    block: usize,
    means: Matrix<f64>,
}

impl Rows {
    fn new(rows: Matrix<f64>, block: usize) -> Self {
        let of_block = |b: usize| b * block..rows.rows().min((b + 1) * block);
        let mean =
            |b: usize, c: usize| of_block(b).map(|i| rows.row(i)[c]).sum::<f64>() / of_block(b).len() as f64;
        let means = Matrix::from_fn(rows.rows().div_ceil(block), rows.width(), mean);
        Rows { rows, block, means }
    }

    /// The mean of a group's rows.
    fn mean(&self, group: &Group<'_>) -> Cow<'_, [f64]> {
        let first = group.0[0].0;
        let b = first / self.block;
        match group.0.len() {
            1 => Cow::Borrowed(self.rows.row(first)),
            n if n == self.block.min(self.rows.rows() - b * self.block) => Cow::Borrowed(self.means.row(b)),
            n => {
                let mean =
                    |c: usize| group.0.iter().map(|&(key, _)| self.rows.row(key)[c]).sum::<f64>() / n as f64;
                (0..self.rows.width()).map(mean).collect()
            }
        }
    }
}

/// Keys of one block with their biases that a query takes for one key, which has their mean score and mean value and n
/// times their weight: `n · exp(s) = exp(s + ln n)`, and `exp(s + ln n) · ΣV / n = exp(s) · ΣV`. At least one.
struct Group<'a>(&'a [(usize, f64)]);

impl Group<'_> {
    fn count(&self) -> f64 {
        self.0.len() as f64
    }

    /// The mean of the biases.
    fn bias(&self) -> f64 {
        self.0.iter().map(|&(_, bias)| bias).sum::<f64>() / self.count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Accuracy;
    use crate::oracle::testing::{Sample, Sizes};
    use crate::sparse::{BlockMap, Predictor, Select};
    use crate::{Alignment, Band, Inputs, Lengths, Mask, Options, Tensor};

    const LN_2: f32 = std::f32::consts::LN_2;

    /// Blocks of two keys with the exponentials 1, 1 and 2, 8; the second is left out.
    fn halves() -> (Sample, BlockMap) {
        let sample = Sample::one_head(1, &[1.0], &[0.0, 0.0, LN_2, 3.0 * LN_2], &[3.0, 5.0, 4.0, 8.0]);
        (sample, BlockMap::new(vec![true, false], [1, 1, 1, 2], 1, 2).unwrap())
    }

    fn run(inputs: &Inputs<'_>, options: Options) -> Output {
        pooled_tail(&Call::check(inputs, &Options { sm_scale: Some(1.0), ..options }).unwrap())
    }

    /// Whether a result of one row is the quotient of such sums.
    fn is(output: &Output, numerator: f64, sum: f64) -> bool {
        (output.out[0] - numerator / sum).abs() < 1e-6 && (output.lse[0] - sum.ln()).abs() < 1e-6
    }

    #[test]
    fn a_block_left_out_is_one_term_worked_out_by_hand() {
        // Its mean key has the exponential √(2·8) = 4: two keys of weight 4, whose values are 12 together.
        let (sample, map) = halves();
        let inputs = Inputs { block_mask: Some(map.mask()), ..sample.inputs() };
        assert!(is(&run(&inputs, Options::default()), 3.0 + 5.0 + 4.0 * 12.0, 2.0 + 2.0 * 4.0));
    }

    #[test]
    fn only_keys_that_the_query_sees_are_pooled() {
        let (sample, map) = halves();
        let inputs = Inputs { block_mask: Some(map.mask()), ..sample.inputs() };
        // Key 3 is hidden three times: what is left of the block is key 2, of weight 2.
        let band = Band::causal(Alignment::Offset(2));
        assert!(is(&run(&inputs, Options { band, ..Options::default() }), 8.0 + 2.0 * 4.0, 4.0));
        let lengths = Inputs { lengths: Lengths::KvLens(&[3]), ..inputs };
        assert!(is(&run(&lengths, Options::default()), 8.0 + 2.0 * 4.0, 4.0));
        // A bias of 2 ln 2 for key 2 makes the mean of both larger by the factor 2.
        let bias = Tensor::new(vec![0.0, 0.0, 2.0 * LN_2, 0.0], &[4]).unwrap();
        let masked = Inputs { mask: Some(Mask::Additive(bias.view())), ..inputs };
        assert!(is(&run(&masked, Options::default()), 8.0 + 8.0 * 12.0, 2.0 + 16.0));
        let hidden = Tensor::new(vec![0.0, 0.0, 0.0, f32::NEG_INFINITY], &[4]).unwrap();
        let masked = Inputs { mask: Some(Mask::Additive(hidden.view())), ..inputs };
        assert!(is(&run(&masked, Options::default()), 8.0 + 2.0 * 4.0, 4.0));
    }

    #[test]
    fn what_is_kept_is_exact_and_a_row_without_keys_is_zero() {
        let sizes = Sizes { batch: 2, num_q_heads: 4, num_kv_heads: 2, q_len: 7, kv_len: 9, head_dim: 4 };
        let sample = Sample::normal(1, sizes);
        let map = |kept| BlockMap::new(vec![kept; 2 * 4 * 4 * 3], [2, 4, 4, 3], 2, 3).unwrap();
        let band = Band::causal(Alignment::Offset(-2));
        let options = Options { band, logit_softcap: Some(2.0), ..Options::default() };
        let (all, none) = (map(true), map(false));
        let call = |map| {
            let inputs = Inputs { block_mask: Some(BlockMap::mask(map)), ..sample.inputs() };
            pooled_tail(&Call::check(&inputs, &options).unwrap())
        };
        let expected = exact(&sample.call(&options));
        assert_eq!(call(&all), expected);
        assert_eq!(pooled_tail(&sample.call(&options)), expected, "without a map");
        // The first two rows see nothing, and no block of theirs is pooled.
        let pooled = call(&none);
        assert_eq!((&pooled.out[..8], &pooled.lse[..2]), (&[0.0; 8][..], &[f64::NEG_INFINITY; 2][..]));
        assert!(pooled.lse.iter().zip(&expected.lse).all(|(a, b)| a.is_finite() == b.is_finite()));
    }

    #[test]
    fn blocks_of_like_keys_lose_nothing() {
        let sizes = Sizes::one_head(5, 12, 4);
        let mut sample = Sample::normal(2, sizes);
        let k = sample.k.to_f32_vec();
        let alike = (0..12 * 4).map(|at| k[at / 16 * 16 + at % 4]).collect::<Vec<f32>>();
        sample.k = Tensor::new(alike, &[1, 1, 12, 4]).unwrap();
        let map = BlockMap::new(vec![false, true, false], [1, 1, 1, 3], 8, 4).unwrap();
        let inputs = Inputs { block_mask: Some(map.mask()), ..sample.inputs() };
        let options = Options::default();
        let pooled = pooled_tail(&Call::check(&inputs, &options).unwrap());
        let expected = exact(&sample.call(&options));
        let close = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(close(&pooled.out, &expected.out) && close(&pooled.lse, &expected.lse));
    }

    #[test]
    fn a_tail_is_nearer_than_none() {
        // Keys that drift slowly and noise around them: means say much about a block, and nothing of it is negligible.
        let (tokens, head_dim) = (256, 16);
        let noise = sage_testkit::normal(4, tokens * head_dim);
        let drifting = noise.iter().enumerate().map(|(at, noise)| {
            let angle = (at / head_dim) as f32 * 0.05 + (at % head_dim) as f32;
            2.0 * angle.sin() + 0.5 * noise
        });
        let mut sample = Sample::normal(5, Sizes::one_head(tokens, tokens, head_dim));
        sample.k = Tensor::new(drifting.collect::<Vec<f32>>(), &[1, 1, tokens, head_dim]).unwrap();
        let predictor = Predictor::new(Select::TopK(0.25.into())).blocks(16, 16);
        let map = predictor.predict(sample.q.view(), sample.k.view(), &Options::default()).unwrap();
        let options = Options::default();
        let inputs = Inputs { block_mask: Some(map.mask()), ..sample.inputs() };
        let sparse = Call::check(&inputs, &options).unwrap();
        let dense = exact(&sample.call(&options));
        let error = |output: Output| Accuracy::of(&output.out, &dense.out).relative_l1;
        let (with, without) = (error(pooled_tail(&sparse)), error(exact(&sparse)));
        assert!(with < 0.5 * without, "{with} against {without}");
    }
}
