//! Attention with a scheme's quantised operands.

use std::f64::consts::LN_2;

use super::exact::{maximum, softcap, weighted_sum};
use super::matrix::dot;
use super::{
    Fp4Rows, Matrix, Output, Score, SeenKeys, Weights, block_means, hadamard, key_mean, mean_of_counted,
    quantize_p, quantize_p_by_tiles, quantize_v, subtract, subtract_block_means, visible_keys,
};
use crate::sparse::with_pooled_tail;
use crate::{Call, Qk, Scheme, SmoothQ};

/// Attention in which Q, K, V and P are quantised as `scheme` says, and all else is exact (double precision).
///
/// What is left out on purpose, because kernels may differ in it:
/// - [`crate::Accumulator`]: sums are exact, in whatever precision a kernel sums;
/// - the running maximum: P is quantised relative to the row's final maximum (see [`quantize_p`]).
///
/// Pooled terms of the blocks left out ([`Options::pooled_tail`](crate::Options::pooled_tail)) are not quantised.
///
/// Visibility, capping and rows without keys are as in [`super::exact()`]. A non-finite value of a key that counts (see
/// [`SeenKeys`]) makes its whole quantisation group NaN, with smoothing everything that its mean is subtracted from,
/// and so every row that uses the group.
///
/// # Panics
/// When a block or tile of the scheme has no rows; [`Scheme::check`] finds that.
pub fn scheme(call: &Call<'_>, scheme: &Scheme) -> Output {
    attention(call, scheme, |scores, max| quantize_p(scores, max, &scheme.pv))
}

/// The same with P as [`quantize_p_by_tiles`] has it, `tile` keys at a time: what a kernel computes that goes through the
/// keys in their order. For formats so coarse that it makes a difference what P is relative to.
///
/// # Panics
/// As [`scheme`], and when `tile` is 0.
pub fn scheme_by_tiles(call: &Call<'_>, scheme: &Scheme, tile: usize) -> Output {
    attention(call, scheme, |scores, _| quantize_p_by_tiles(scores, tile, &scheme.pv))
}

/// Attention with a scheme's operands, of which `quantize` makes P of a row's scores and the largest of them.
fn attention(call: &Call<'_>, scheme: &Scheme, quantize: impl Fn(&[Score], f64) -> Weights) -> Output {
    if call.sinks.is_some() {
        return attention(&call.without_sinks(), scheme, quantize).with_sinks(call);
    }
    if call.problem.pooled_tail {
        return with_pooled_tail(call, attention(&call.without_tail(), scheme, quantize));
    }
    let problem = &call.problem;
    let mut output = Output::without_keys(call);
    for sequence in call.sequences() {
        for kv_head in 0..problem.num_kv_heads {
            let read = |tensor, head| {
                Matrix::of_head(tensor, sequence.batch, head, sequence.kv_start, sequence.kv_len)
            };
            let seen = SeenKeys::of(call, &sequence, kv_head);
            let keys = Keys::new(&read(&call.k, kv_head), &seen, scheme);
            let values = Values::new(&read(&call.v, kv_head), &seen, scheme);
            for head in kv_head * problem.group_size()..(kv_head + 1) * problem.group_size() {
                let q = Matrix::of_head(&call.q, sequence.batch, head, sequence.q_start, sequence.q_len);
                let queries = Queries::new(&q, &keys, problem.sm_scale, scheme);
                for i in 0..sequence.q_len {
                    // What smoothing K takes from every score of the row.
                    let taken = f64::from(problem.sm_scale) * dot(queries.given.row(i), &keys.mean);
                    // A cap is not linear: what was taken must be back before it. Without one it changes only the
                    // log-sum-exp, to which it is added at the end.
                    let (before_cap, after) =
                        if problem.logit_softcap.is_some() { (taken, 0.0) } else { (0.0, taken) };
                    let scores: Vec<Score> = visible_keys(call, &sequence, head, i)
                        .map(|(key, bias)| {
                            let score = queries.score(i, &keys, key) + before_cap;
                            Score { key, value: softcap(score, problem.logit_softcap) + bias }
                        })
                        .collect();
                    let max = maximum(&scores);
                    if max == f64::NEG_INFINITY {
                        continue;
                    }
                    let weights = quantize(&scores, max);
                    let sum = weighted_sum(&scores, &weights.p, &values.quantised);
                    let out: Vec<f64> =
                        sum.iter().zip(&values.mean).map(|(o, mean)| o / weights.sum + mean).collect();
                    output.set(call.lse_index(&sequence, head, i), &out, max + weights.lse_sum.ln() + after);
                }
            }
        }
    }
    output
}

/// K of one head of one sequence.
struct Keys {
    /// k̄, or zeros.
    mean: Vec<f64>,
    /// K' = K − k̄.
    smoothed: Matrix<f64>,
    /// K', rotated and quantised.
    quantised: Matrix<f64>,
}

impl Keys {
    fn new(k: &Matrix<f32>, seen: &SeenKeys, scheme: &Scheme) -> Self {
        let mean = key_mean(k, scheme.smooth.k, seen);
        let smoothed = visible(subtract(k, &mean), seen);
        let rotated = if scheme.rotate { hadamard(&smoothed) } else { smoothed.clone() };
        let quantised = match &scheme.qk {
            Qk::Full => rotated.map(f64::from),
            Qk::Int(quantizer) => quantizer.quantize_k(&rotated, seen).dequantize(),
            Qk::Fp4(format) => Fp4Rows::quantize(&rotated, *format).dequantize(),
        };
        Keys { mean: mean.into_iter().map(f64::from).collect(), smoothed: smoothed.map(f64::from), quantised }
    }
}

/// Q of one head of one sequence.
///
/// With Q = Q' + q̄ and K = K' + k̄, a score is
///
/// `⟨Q, K⟩ = ⟨Q', K'⟩ + ⟨q̄, K'⟩ + ⟨Q, k̄⟩`.
///
/// The first term is of quantised operands. The second, ΔS, differs from key to key, and so is added to each score.
/// The third, which the caller adds where it matters, is the same for all keys of a row; it holds all of Q, so
/// smoothing Q does not change it.
struct Queries {
    /// Q.
    given: Matrix<f64>,
    /// Q' = Q − q̄, rotated and quantised.
    quantised: Matrix<f64>,
    /// What makes a natural-base score of a product of quantised operands: τ, or ln 2 where Q holds τ·log₂e.
    factor: f64,
    /// τ·⟨q̄, K'⟩ for each block of queries and each key, and the rows of a block.
    delta_s: Option<(Matrix<f64>, usize)>,
}

impl Queries {
    fn new(q: &Matrix<f32>, keys: &Keys, sm_scale: f32, scheme: &Scheme) -> Self {
        let tau = f64::from(sm_scale);
        let block = match scheme.smooth.q {
            SmoothQ::Off => None,
            SmoothQ::Block(block) => Some(block),
            SmoothQ::Sequence => Some(q.rows().max(1)),
        };
        let (smoothed, delta_s) = match block {
            None => (q.clone(), None),
            Some(block) => {
                let means = block_means(q, block);
                let smoothed = subtract_block_means(q, &means, block);
                let means = means.map(f64::from);
                let delta_s = Matrix::from_fn(means.rows(), keys.smoothed.rows(), |b, j| {
                    tau * dot(means.row(b), keys.smoothed.row(j))
                });
                (smoothed, Some((delta_s, block)))
            }
        };
        let rotated = if scheme.rotate { hadamard(&smoothed) } else { smoothed };
        let (quantised, factor) = match &scheme.qk {
            Qk::Full => (rotated.map(f64::from), tau),
            Qk::Int(quantizer) => (
                quantizer.quantize_q(&rotated, sm_scale).dequantize(),
                if quantizer.scale_q_first { LN_2 } else { tau },
            ),
            Qk::Fp4(format) => (Fp4Rows::quantize(&rotated, *format).dequantize(), tau),
        };
        Queries { given: q.map(f64::from), quantised, factor, delta_s }
    }

    /// τ(⟨Q', K'⟩ + ⟨q̄, K'⟩).
    fn score(&self, i: usize, keys: &Keys, key: usize) -> f64 {
        let delta_s = self.delta_s.as_ref().map_or(0.0, |(delta_s, block)| delta_s.row(i / block)[key]);
        self.factor * dot(self.quantised.row(i), keys.quantised.row(key)) + delta_s
    }
}

/// V of one head of one sequence.
struct Values {
    /// v̄, or zeros. Because a row's probabilities sum to 1, it returns with weight 1.
    mean: Vec<f64>,
    /// V − v̄, quantised.
    quantised: Matrix<f64>,
}

impl Values {
    fn new(v: &Matrix<f32>, seen: &SeenKeys, scheme: &Scheme) -> Self {
        let mean = if scheme.smooth.v { mean_of_counted(v, seen) } else { vec![0.0; v.width()] };
        let quantised = quantize_v(&visible(subtract(v, &mean), seen), &scheme.pv, seen);
        Values { mean: mean.into_iter().map(f64::from).collect(), quantised }
    }
}

/// The rows of keys that some query sees, and zeros.
fn visible(rows: Matrix<f32>, seen: &SeenKeys) -> Matrix<f32> {
    Matrix::from_fn(rows.rows(), rows.width(), |j, c| if seen.is_visible(j) { rows.row(j)[c] } else { 0.0 })
}

#[cfg(test)]
mod tests;
