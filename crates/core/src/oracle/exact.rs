//! Attention without quantisation.

use super::matrix::dot;
use super::{Matrix, Output, visible_keys};
use crate::sparse::pooled_tail;
use crate::{Call, Sequence};

/// A visible key's score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// The key, counted from the start of its sequence.
    pub key: usize,
    /// Scaled, capped and masked score, for the natural exponential.
    pub value: f64,
}

/// Exact attention in double precision: `O_i = Σ_j exp(s_ij − M_i)·V_j / ℓ_i` with `s_ij = softcap(τ⟨Q_i, K_j⟩) +
/// bias_ij`, `M_i = max_j s_ij`, `ℓ_i = Σ_j exp(s_ij − M_i)` and `LSE_i = M_i + ln ℓ_i`, sums over visible keys.
///
/// - A hidden key has no influence at all, whatever K and V hold there.
/// - A row that sees no key, or none with a score above −∞, is zero and its log-sum-exp −∞.
/// - A head's sink ([`Inputs::sinks`](crate::Inputs)) is one more score of each of its rows, of no value: it is in ℓ and in
///   the log-sum-exp, so that parts of which one has the sinks merge like parts of keys. A row that sees no key is zero
///   and has the sink as its log-sum-exp.
/// - With [`Options::pooled_tail`](crate::Options::pooled_tail) it is [`pooled_tail`].
/// - A row that sees a score of NaN or +∞ is NaN, and so is its log-sum-exp, as in PyTorch.
pub fn exact(call: &Call<'_>) -> Output {
    if call.sinks.is_some() {
        return exact(&call.without_sinks()).with_sinks(call);
    }
    if call.problem.pooled_tail {
        return pooled_tail(call);
    }
    let problem = &call.problem;
    let mut output = Output::without_keys(call);
    for sequence in call.sequences() {
        for kv_head in 0..problem.num_kv_heads {
            let read = |tensor, head| {
                Matrix::of_head(tensor, sequence.batch, head, sequence.kv_start, sequence.kv_len)
            };
            let (k, v) = (read(&call.k, kv_head).map(f64::from), read(&call.v, kv_head).map(f64::from));
            for head in kv_head * problem.group_size()..(kv_head + 1) * problem.group_size() {
                let q = Matrix::of_head(&call.q, sequence.batch, head, sequence.q_start, sequence.q_len);
                for (i, q) in q.map(f64::from).iter().enumerate() {
                    let scores = row_scores(call, &sequence, head, i, q, &k);
                    let (out, lse) = attend(&scores, &v);
                    output.set(call.lse_index(&sequence, head, i), &out, lse);
                }
            }
        }
    }
    output
}

/// The scores of the keys that query `i` of `head`, which is `q`, sees among `k`.
pub(crate) fn row_scores(
    call: &Call<'_>,
    sequence: &Sequence,
    head: usize,
    i: usize,
    q: &[f64],
    k: &Matrix<f64>,
) -> Vec<Score> {
    let score = |(key, bias)| {
        let score = f64::from(call.problem.sm_scale) * dot(q, k.row(key));
        Score { key, value: softcap(score, call.problem.logit_softcap) + bias }
    };
    visible_keys(call, sequence, head, i).map(score).collect()
}

/// One row: softmax of its scores times V, and its log-sum-exp.
pub(crate) fn attend(scores: &[Score], v: &Matrix<f64>) -> (Vec<f64>, f64) {
    let max = maximum(scores);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; v.width()], max);
    }
    let p: Vec<f64> = scores.iter().map(|s| (s.value - max).exp()).collect();
    let sum: f64 = p.iter().sum();
    let mut out = weighted_sum(scores, &p, v);
    out.iter_mut().for_each(|o| *o /= sum);
    (out, max + sum.ln())
}

/// `Σ_j P_j·V_j` over a row's visible keys.
pub(super) fn weighted_sum(scores: &[Score], p: &[f64], v: &Matrix<f64>) -> Vec<f64> {
    let mut out = vec![0.0; v.width()];
    for (score, p) in scores.iter().zip(p) {
        for (out, v) in out.iter_mut().zip(v.row(score.key)) {
            *out += p * v;
        }
    }
    out
}

/// The largest score; −∞ when there is none, NaN when one is NaN.
pub(crate) fn maximum<'a>(scores: impl IntoIterator<Item = &'a Score>) -> f64 {
    let max = |a: f64, s: &Score| if s.value.is_nan() || a.is_nan() { f64::NAN } else { a.max(s.value) };
    scores.into_iter().fold(f64::NEG_INFINITY, max)
}

/// `cap · tanh(score / cap)`.
pub(crate) fn softcap(score: f64, cap: Option<f32>) -> f64 {
    cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::testing::{Sample, Sizes};
    use crate::{
        Alignment, Band, BlockMask, Inputs, Layout, Lengths, Mask, Options, Tensor, TensorView, View,
        metrics::Accuracy,
    };

    const LN_3: f32 = 1.098_612_3;

    fn unscaled() -> Options {
        Options { sm_scale: Some(1.0), ..Options::default() }
    }

    fn close(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            // Inputs such as ln 3 are rounded to single precision.
            assert!(a == e || (a - e).abs() <= 1e-6 * e.abs().max(1.0), "{actual:?} is not {expected:?}");
        }
    }

    /// One channel, one query 1, keys 0 and ln 3: probabilities ¼ and ¾.
    fn quarters() -> Sample {
        Sample::one_head(1, &[1.0], &[0.0, LN_3], &[4.0, 8.0])
    }

    #[test]
    fn a_softmax_worked_out_by_hand() {
        let output = exact(&quarters().call(&unscaled()));
        close(&output.out, &[7.0]);
        close(&output.lse, &[4f64.ln()]);
    }

    /// The call of a sample with these sinks.
    fn with_sinks(sample: &Sample, sinks: &[f32], options: Options) -> Output {
        let sinks = TensorView::F32(View::contiguous("sinks", sinks, &[sinks.len()]).unwrap());
        exact(&Call::check(&sample.inputs().sinks(sinks), &options).unwrap())
    }

    #[test]
    fn a_sink_is_a_score_without_a_value_that_no_scale_and_no_cap_touches() {
        // Exponentials 1 and 3 beside 4: (1·4 + 3·8) / 8.
        let sink = 4f32.ln();
        let output = with_sinks(&quarters(), &[sink], unscaled());
        close(&output.out, &[3.5]);
        close(&output.lse, &[8f64.ln()]);
        // Half the scale of twice the query, and a cap that is so high that it leaves scores as they are.
        let twice = Sample::one_head(1, &[2.0], &[0.0, LN_3], &[4.0, 8.0]);
        let options = Options { sm_scale: Some(0.5), logit_softcap: Some(1e4), ..Options::default() };
        close(&with_sinks(&twice, &[sink], options).out, &[3.5]);
        // None, and one that takes all.
        close(&with_sinks(&quarters(), &[f32::NEG_INFINITY], unscaled()).out, &[7.0]);
        close(&with_sinks(&quarters(), &[200.0], unscaled()).out, &[0.0]);
        // A row that sees no key has its sink as its log-sum-exp, and the sum of parts counts it.
        let unseen = Options { band: Band::causal(Alignment::Offset(-1)), ..unscaled() };
        let output = with_sinks(&quarters(), &[sink], unseen);
        assert_eq!((output.out[0], output.lse[0]), (0.0, f64::from(sink)));
    }

    #[test]
    fn parts_of_the_keys_merge_where_one_of_them_has_the_sinks() {
        let sizes = Sizes { batch: 2, num_q_heads: 4, num_kv_heads: 2, q_len: 3, kv_len: 8, head_dim: 4 };
        let sample = Sample::normal(7, sizes);
        let sinks = [0.5, -1.0, f32::NEG_INFINITY, 3.0];
        let whole = with_sinks(&sample, &sinks, Options::default());
        let half = |of: std::ops::Range<usize>| {
            let [k, v] = [&sample.k, &sample.v].map(|tensor| {
                let rows: Vec<f32> = tensor
                    .to_f32_vec()
                    .chunks(8 * 4)
                    .flat_map(|head| head[4 * of.start..4 * of.end].to_vec())
                    .collect();
                Tensor::new(rows, &[2, 2, of.len(), 4]).unwrap()
            });
            Sample { q: sample.q.clone(), k, v }
        };
        let parts = [
            with_sinks(&half(0..5), &sinks, Options::default()),
            exact(&half(5..8).call(&Options::default())),
        ];
        for row in 0..whole.lse.len() {
            let lse = parts.iter().map(|part| part.lse[row].exp()).sum::<f64>().ln();
            let share = |part: &Output| (part.lse[row] - lse).exp();
            let merged: Vec<f64> =
                (0..4).map(|c| parts.iter().map(|part| share(part) * part.row(row).0[c]).sum()).collect();
            close(&merged, whole.row(row).0);
            close(&[lse], &[whole.lse[row]]);
        }
    }

    #[test]
    fn what_is_wrong_with_sinks_is_named() {
        let sample = quarters();
        let text = |sinks: TensorView<'_>| {
            Call::check(&sample.inputs().sinks(sinks), &unscaled()).map(|_| ()).unwrap_err().to_string()
        };
        let of = |data: &'static [f32], shape: &[usize]| {
            TensorView::F32(View::contiguous("sinks", data, shape).unwrap())
        };
        assert_eq!(text(of(&[0.0; 2], &[2])), "sinks: shape is [2], expected [1], one for each query head");
        assert_eq!(
            text(of(&[0.0], &[1, 1])),
            "sinks: shape is [1, 1], expected [1], one for each query head"
        );
        let half = Tensor::new(vec![0.0f32], &[1]).unwrap().to_dtype(crate::DType::F16);
        assert_eq!(text(half.view()), "sinks: dtype is f16, expected f32");
    }

    #[test]
    fn scores_are_scaled_by_the_root_of_head_dim() {
        // ⟨q, k⟩ = 4·(½·½) = 1, head_dim 4: score ½.
        let sample = Sample::one_head(4, &[0.5; 4], &[0.5; 4], &[1.0, 2.0, 3.0, 4.0]);
        let output = exact(&sample.call(&Options::default()));
        close(&output.out, &[1.0, 2.0, 3.0, 4.0]);
        close(&output.lse, &[0.5]);
    }

    #[test]
    fn a_cap_comes_before_the_mask_and_a_bias_is_in_natural_units() {
        // Scores 0 and ln 3 become 0 and ½·tanh(2·ln 3) = ½·(9 − 1/9)/(9 + 1/9) = 20/41; a bias takes that back.
        let sample = quarters();
        let bias = [0.0, -20.0 / 41.0 + LN_3];
        let mask = View::contiguous("mask", &bias, &[2]).unwrap();
        let inputs = Inputs { mask: Some(Mask::Additive(mask.into())), ..sample.inputs() };
        let options = Options { logit_softcap: Some(0.5), ..unscaled() };
        close(&exact(&Call::check(&inputs, &options).unwrap()).out, &[7.0]);
    }

    #[test]
    fn a_row_without_keys_is_zero() {
        let sample = Sample::one_head(1, &[1.0; 3], &[0.0, LN_3], &[4.0, 8.0]);
        let output =
            exact(&sample.call(&Options { band: Band::causal(Alignment::BottomRight), ..unscaled() }));
        close(&output.out, &[0.0, 4.0, 7.0]);
        close(&output.lse, &[f64::NEG_INFINITY, 0.0, 4f64.ln()]);

        let empty = Sample::one_head(1, &[1.0], &[], &[]);
        let output = exact(&empty.call(&unscaled()));
        assert_eq!((output.out[0], output.lse[0]), (0.0, f64::NEG_INFINITY));
    }

    #[test]
    fn a_band_is_the_mask_that_it_stands_for() {
        let sizes = Sizes { batch: 2, num_q_heads: 2, num_kv_heads: 1, q_len: 5, kv_len: 9, head_dim: 2 };
        let sample = Sample::normal(5, sizes);
        for alignment in [
            Alignment::BottomRight,
            Alignment::TopLeft,
            Alignment::Offset(3),
            Alignment::Offset(40),
            Alignment::Offset(-2),
        ] {
            for (left, right) in [(None, Some(0)), (Some(1), Some(1)), (Some(2), None)] {
                let band = Band { left, right, alignment };
                for lengths in [Lengths::Dense, Lengths::KvLens(&[9, 6])] {
                    let kv_lens = if lengths == Lengths::Dense { [9, 9] } else { [9, 6] };
                    let seen = |b: usize, i, j| band.keys(i, 5, kv_lens[b]).contains(&j);
                    let visible: Vec<bool> = (0..90).map(|at| seen(at / 45, at / 9 % 5, at % 9)).collect();
                    let mask = View::contiguous("mask", &visible, &[2, 1, 5, 9]).unwrap();
                    let inputs = Inputs { lengths, ..sample.inputs() };
                    let masked = Inputs { mask: Some(Mask::Bool(mask)), ..inputs };
                    let output = |inputs, options| exact(&Call::check(&inputs, &options).unwrap());
                    let expected = output(masked, Options::default());
                    assert_eq!(output(inputs, Options { band, ..Options::default() }), expected, "{band:?}");
                }
            }
        }
    }

    #[test]
    fn a_hidden_key_has_no_influence() {
        let bad = f32::NAN;
        let sample = Sample::one_head(1, &[1.0], &[0.0, LN_3, bad], &[4.0, 8.0, bad]);
        let visible = [true, true, false];
        let additive = [0.0, 0.0, f32::NEG_INFINITY];
        let blocks = [true, true, false];
        let left = Band { right: Some(1), alignment: Alignment::TopLeft, ..Band::FULL };
        let inputs = sample.inputs();
        let options = unscaled();
        for (what, inputs, options) in [
            ("band", inputs, Options { band: left, ..options }),
            ("kv_lens", Inputs { lengths: Lengths::KvLens(&[2]), ..inputs }, options),
            (
                "bool mask",
                Inputs {
                    mask: Some(Mask::Bool(View::contiguous("mask", &visible, &[3]).unwrap())),
                    ..inputs
                },
                options,
            ),
            (
                "additive mask",
                Inputs {
                    mask: Some(Mask::Additive(View::contiguous("mask", &additive, &[3]).unwrap().into())),
                    ..inputs
                },
                options,
            ),
            (
                "block mask",
                Inputs {
                    block_mask: Some(BlockMask {
                        blocks: View::contiguous("block_mask", &blocks, &[1, 3]).unwrap(),
                        block_q: 64,
                        block_k: 1,
                    }),
                    ..inputs
                },
                options,
            ),
        ] {
            let output = exact(&Call::check(&inputs, &options).unwrap());
            assert!((output.out[0] - 7.0).abs() < 1e-6, "{what}: {output:?}");
        }
    }

    #[test]
    fn a_visible_nan_or_infinity_is_not_hidden() {
        for bad in [f32::NAN, f32::INFINITY] {
            let output = exact(&Sample::one_head(1, &[1.0], &[0.0, bad], &[4.0, 8.0]).call(&unscaled()));
            assert!(output.out[0].is_nan() && output.lse[0].is_nan(), "{bad}");
        }
        let output = exact(&Sample::one_head(1, &[1.0], &[f32::NEG_INFINITY], &[4.0]).call(&unscaled()));
        assert_eq!((output.out[0], output.lse[0]), (0.0, f64::NEG_INFINITY));
        let output =
            exact(&Sample::one_head(1, &[1.0], &[0.0, f32::NEG_INFINITY], &[4.0, 8.0]).call(&unscaled()));
        assert_eq!((output.out[0], output.lse[0]), (4.0, 0.0));
    }

    #[test]
    fn query_heads_of_a_group_read_one_kv_head() {
        let sizes = Sizes { batch: 2, num_q_heads: 4, num_kv_heads: 2, q_len: 3, kv_len: 5, head_dim: 8 };
        let sample = Sample::normal(1, sizes);
        // K and V with each head written out for every query head that reads it.
        let repeated = |tensor: &Tensor| {
            let data: Vec<f32> =
                tensor.to_f32_vec().chunks(5 * 8).flat_map(|head| [head, head].concat()).collect();
            Tensor::new(data, &[2, 4, 5, 8]).unwrap()
        };
        let wide = Sample { q: sample.q.clone(), k: repeated(&sample.k), v: repeated(&sample.v) };
        let options = Options::default();
        assert_eq!(exact(&sample.call(&options)), exact(&wide.call(&options)));
    }

    #[test]
    fn channels_of_values_are_computed_each_by_itself() {
        let sizes = Sizes { batch: 2, num_q_heads: 4, num_kv_heads: 2, q_len: 3, kv_len: 5, head_dim: 8 };
        let wide = Sample::normal(1, sizes).value_dim(9, 20);
        let options = Options { band: Band::causal(Alignment::BottomRight), ..Options::default() };
        let output = exact(&wide.call(&options));
        // Of the first 8 channels: values of as many channels as keys.
        let first = |row: &[f32]| row[..8].to_vec();
        let v: Vec<f32> = wide.v.to_f32_vec().chunks(20).flat_map(first).collect();
        let square =
            Sample { v: Tensor::new(v, &[2, 2, 5, 8]).unwrap(), q: wide.q.clone(), k: wide.k.clone() };
        let expected = exact(&square.call(&options));
        assert_eq!((output.out.len(), &output.lse), (2 * 4 * 3 * 20, &expected.lse));
        for (row, expected) in output.out.chunks(20).zip(expected.out.chunks(8)) {
            assert_eq!(&row[..8], expected);
        }
    }

    #[test]
    fn one_batch_of_keys_is_for_every_batch_of_queries() {
        let sizes = Sizes { batch: 3, num_q_heads: 4, num_kv_heads: 2, q_len: 3, kv_len: 5, head_dim: 8 };
        let sample = Sample::normal(1, sizes);
        let one = |tensor: &Tensor| Tensor::new(tensor.to_f32_vec()[..80].to_vec(), &[1, 2, 5, 8]).unwrap();
        let three = |tensor: &Tensor| Tensor::new(tensor.to_f32_vec().repeat(3), &[3, 2, 5, 8]).unwrap();
        let (k, v) = (one(&sample.k), one(&sample.v));
        let (k_of_each, v_of_each) = (three(&k), three(&v));
        let kv_lens = [5, 2, 0];
        let output = |k: &Tensor, v: &Tensor| {
            let inputs = Inputs::new(sample.q.view(), k.view(), v.view()).lengths(Lengths::KvLens(&kv_lens));
            exact(&Call::check(&inputs, &Options::default()).unwrap())
        };
        let expected = output(&k_of_each, &v_of_each);
        assert_eq!(output(&k, &v), expected);
        assert_eq!(output(&k, &v_of_each), expected);
    }

    #[test]
    fn packed_sequences_do_not_see_each_other() {
        let head_dim = 4;
        let parts = [
            Sample::normal(1, Sizes::one_head(3, 5, head_dim)),
            Sample::normal(2, Sizes::one_head(2, 1, head_dim)),
        ];
        // One head: [total, 1, head_dim] has the elements of both sequences one after another.
        let packed = |of: fn(&Sample) -> &Tensor| {
            let data: Vec<f32> = parts.iter().flat_map(|part| of(part).to_f32_vec()).collect();
            let total = data.len() / head_dim;
            Tensor::new(data, &[total, 1, head_dim]).unwrap()
        };
        let (q, k, v) = (packed(|s| &s.q), packed(|s| &s.k), packed(|s| &s.v));
        let lengths = Lengths::Packed { cu_seqlens_q: &[0, 3, 5], cu_seqlens_k: &[0, 5, 6] };
        let inputs = Inputs { lengths, ..Inputs::new(q.view(), k.view(), v.view()) };
        let options = Options { band: Band::causal(Alignment::BottomRight), ..Options::default() };
        let output = exact(&Call::check(&inputs, &options).unwrap());
        let expected = parts.map(|part| exact(&part.call(&options)));
        assert_eq!(output.out, [&expected[0].out[..], &expected[1].out[..]].concat());
        assert_eq!(output.lse, [&expected[0].lse[..], &expected[1].lse[..]].concat());
    }

    #[test]
    fn layouts_give_one_result() {
        let sizes = Sizes { batch: 2, num_q_heads: 2, num_kv_heads: 1, q_len: 3, kv_len: 4, head_dim: 8 };
        let sample = Sample::normal(3, sizes);
        let nhd = |tensor: &Tensor| {
            let view: TensorView<'_> = tensor.view();
            let [b, h, n, d] = [0, 1, 2, 3].map(|at| view.shape()[at]);
            let mut data = Vec::new();
            for (b, i, h) in (0..b).flat_map(|b| (0..n).flat_map(move |i| (0..h).map(move |h| (b, i, h)))) {
                data.extend((0..d).map(|c| view.at([b, h, i, c])));
            }
            Tensor::new(data, &[b, n, h, d]).unwrap()
        };
        let other = Sample { q: nhd(&sample.q), k: nhd(&sample.k), v: nhd(&sample.v) };
        let options = Options::default();
        assert_eq!(
            exact(&sample.call(&options)),
            exact(&other.call(&Options { layout: Layout::Nhd, ..options }))
        );
    }

    #[test]
    fn it_is_close_to_attention_in_single_precision() {
        let sizes = Sizes::one_head(16, 32, 8);
        let sample = Sample::normal(4, sizes);
        let [q, k, v] = [&sample.q, &sample.k, &sample.v].map(|tensor| tensor.to_f32_vec());
        let mut expected = Vec::new();
        for q in q.chunks(8) {
            let dot = |k: &[f32]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
            let p: Vec<f32> = k.chunks(8).map(|k| (dot(k) / 8f32.sqrt()).exp()).collect();
            let sum: f32 = p.iter().sum();
            expected
                .extend((0..8).map(|c| p.iter().zip(v.chunks(8)).map(|(p, v)| p * v[c]).sum::<f32>() / sum));
        }
        // Single precision rounds each of 32 terms by 6e-8.
        let accuracy = Accuracy::of(&exact(&sample.call(&Options::default())).out, &expected);
        assert!(accuracy.relative_l1 < 1e-6, "{accuracy}");
    }
}
