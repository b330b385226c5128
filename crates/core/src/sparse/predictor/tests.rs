use super::*;
use crate::metrics::Accuracy;
use crate::oracle::exact;
use crate::oracle::testing::{Sample, Sizes};
use crate::{Alignment, Band, DType, Layout, Lengths, Tensor, TensorView};

const CAUSAL: Band = Band::causal(Alignment::TopLeft);

/// A map of one head as rows of `#` and `.`.
fn drawn(map: &BlockMap) -> Vec<String> {
    map.rows().map(|row| row.iter().map(|&kept| if kept { '#' } else { '.' }).collect()).collect()
}

/// One head in f32 of so many channels.
fn head(head_dim: usize, elements: &[f32]) -> Tensor {
    Tensor::new(elements.to_vec(), &[1, 1, elements.len() / head_dim, head_dim]).unwrap()
}

/// What a predictor with blocks of two tokens keeps of one head with one channel.
fn predicted(predictor: Predictor, q: &[f32], k: &[f32]) -> Vec<String> {
    within(Band::FULL, predictor, q, k)
}

/// The same of the blocks that a band shows.
fn within(band: Band, predictor: Predictor, q: &[f32], k: &[f32]) -> Vec<String> {
    let options = Options::default().band(band);
    drawn(&predictor.blocks(2, 2).predict(head(1, q).view(), head(1, k).view(), &options).unwrap())
}

/// The two best of the key blocks.
fn best() -> Predictor {
    Predictor::new(Select::Count(1))
}

#[test]
fn blocks_are_scored_by_their_means() {
    // Means of Q: 1 and −1. Means of K: 2, 3 and −1.
    let (q, k) = ([0.0, 2.0, -3.0, 1.0], [4.0, 0.0, 3.0, 3.0, -1.0, -1.0]);
    assert_eq!(predicted(best(), &q, &k), [".#.", "..#"]);
    assert_eq!(predicted(Predictor::new(Select::TopK(0.7.into())), &q, &k), ["##.", "#.#"], "⌊2.1⌋ of three");
}

#[test]
fn scores_are_scaled_by_the_root_of_head_dim() {
    // Four channels: ⟨q̄, k̄⟩ = 4, scaled 2, against 0. The first block has e² / (e² + 1) = 0.88 of the weight;
    // unscaled it would have 0.98.
    let (q, k) = (head(4, &[1.0; 4]), head(4, &[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]));
    let kept = |p: f32| {
        let predictor = Predictor::sparge_attn2(0.0, p).blocks(1, 1);
        drawn(&predictor.predict(q.view(), k.view(), &Options::default()).unwrap())
    };
    assert_eq!((kept(0.87), kept(0.89)), (vec!["#.".to_owned()], vec!["##".to_owned()]));
}

#[test]
fn smoothing_takes_the_mean_of_all_keys_away() {
    // Pooled in bf16, K's blocks of 256 and 257 are one number. Without their mean they are −0.5 and 0.5.
    let bf16 = |elements: &[f32]| head(1, elements).to_dtype(DType::BF16);
    let (q, k) = (bf16(&[1.0, 1.0]), bf16(&[256.0, 256.0, 256.0, 258.0]));
    let kept = |smooth_k| {
        let predictor = best().blocks(2, 2).smooth_k(smooth_k);
        drawn(&predictor.predict(q.view(), k.view(), &Options::default()).unwrap())
    };
    assert_eq!((kept(false), kept(true)), (vec!["#.".to_owned()], vec![".#".to_owned()]));
}

#[test]
fn a_key_block_that_is_not_similar_is_kept_and_does_not_compete() {
    // Similarities of K: 1, 0 (of 9 and −1) and 1. The mean of the second would be the best.
    let (q, k) = ([1.0, 1.0], [1.0, 1.0, 9.0, -1.0, 2.0, 2.0]);
    assert_eq!(predicted(best(), &q, &k), [".#."]);
    assert_eq!(predicted(best().similarity(0.5), &q, &k), [".##"]);
    assert_eq!(predicted(best().similarity(-0.1), &q, &k), [".#."], "0 exceeds −0.1");
    assert_eq!(predicted(best().similarity(0.0), &q, &k), [".##"], "0 does not exceed 0");
}

#[test]
fn a_query_block_that_is_not_similar_keeps_all_it_sees() {
    let (q, k) = ([1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
    assert_eq!(predicted(best().similarity(0.5), &q, &k), ["###", "..#"]);
    assert_eq!(within(CAUSAL, best().similarity(0.5), &q, &k), ["#..", ".#."]);
}

#[test]
fn only_blocks_that_the_band_shows_compete_and_are_kept() {
    let (q, k) = ([1.0; 6], [1.0, 1.0, 3.0, 3.0, 2.0, 2.0]);
    assert_eq!(within(CAUSAL, best(), &q, &k), ["#..", ".#.", ".#."]);
    let window = Band { left: Some(0), ..CAUSAL };
    assert_eq!(within(window, best().sink_k(0..1), &q, &k), ["#..", ".#.", "..#"]);
    // Two queries after four keys: the last query sees the last key.
    let late = Band::causal(Alignment::BottomRight);
    assert_eq!(within(late, best(), &[1.0; 2], &k), [".#."]);
    // Four queries before any key.
    let early = Band::causal(Alignment::Offset(-4));
    assert_eq!(within(early, best(), &q, &k), ["...", "...", "#.."]);
}

#[test]
fn sinks_are_kept_on_top_of_what_is_chosen() {
    let (q, k) = ([1.0; 4], [1.0, 1.0, 3.0, 3.0, 2.0, 2.0]);
    assert_eq!(predicted(best().sink_k(0..1), &q, &k), ["##.", "##."]);
    assert_eq!(predicted(best().sink_q(1..2), &q, &k), [".#.", "###"]);
    assert_eq!(predicted(best().sink_k(2..9).sink_q(7..9), &q, &k), [".##", ".##"]);
}

#[test]
fn a_shorter_last_block_is_pooled_over_the_tokens_it_has() {
    // The last block of K has one token, 3; filled up with a zero its mean would be 1.5.
    let (q, k) = ([1.0; 3], [2.0, 2.0, 3.0]);
    assert_eq!(predicted(best(), &q, &k), [".#", ".#"]);
    let similar = || best().similarity(0.5);
    assert_eq!(predicted(similar(), &q, &[4.0, 4.0, 3.0]), ["#.", "#."]);
    // In the original a last block that is shorter is not similar: its row is dense, its column kept.
    assert_eq!(predicted(similar().original_tails(true), &q, &[4.0, 4.0, 3.0]), ["##", "##"]);
    assert_eq!(predicted(similar().original_tails(true), &q, &[4.0; 4]), ["#.", "##"]);
    assert_eq!(predicted(best().original_tails(true), &q, &k), [".#", ".#"], "no similarity is asked for");
}

#[test]
fn padding_of_blocks_counts_nowhere() {
    let bad = f32::NAN;
    let (q, k) = ([1.0, bad, bad, bad], [1.0, bad, 2.0, 2.0, bad, bad]);
    let padded = |sizes: &[i32]| PaddedBlocks::new(sizes, 2).unwrap();
    let vsa = Predictor::vsa(1).smooth_k(true).q_padding(padded(&[1, 0])).k_padding(padded(&[1, 2, 0]));
    assert_eq!(predicted(vsa.clone(), &q, &k), [".#.", "..."], "a block of padding alone keeps none");
    assert_eq!(predicted(vsa.sink_k(0..3).sink_q(0..2), &q, &k), ["##.", "..."]);
}

#[test]
fn what_is_not_finite_is_kept() {
    let bad = f32::NAN;
    assert_eq!(predicted(best(), &[1.0, bad, 1.0, 1.0], &[1.0, 1.0, 2.0, 2.0]), ["##", ".#"]);
    assert_eq!(predicted(best(), &[1.0, 1.0], &[1.0, bad, 2.0, 2.0]), ["##"]);
    // With similarities, the block alone is kept beside the best of the others.
    let sparge = best().similarity(0.5);
    assert_eq!(predicted(sparge, &[1.0, 1.0], &[1.0, bad, 2.0, 2.0, 1.0, 1.0]), ["##."]);
}

#[test]
fn sequences_without_tokens_have_no_blocks() {
    assert_eq!(predicted(best(), &[], &[1.0]), [] as [&str; 0]);
    assert_eq!(predicted(best().smooth_k(true), &[1.0; 3], &[]), ["", ""]);
}

#[test]
fn a_shorter_sequence_is_predicted_by_itself() {
    let sizes = Sizes { batch: 3, num_q_heads: 2, num_kv_heads: 1, q_len: 30, kv_len: 50, head_dim: 8 };
    let sample = Sample::normal(5, sizes);
    for band in [Band::FULL, CAUSAL, Band::causal(Alignment::BottomRight)] {
        let (predictor, options) = (Predictor::sla(0.4).blocks(8, 16), Options::default().band(band));
        let lens = [50, 37, 0];
        let inputs = sample.inputs().lengths(Lengths::KvLens(&lens));
        let map = predictor.map(&Call::check_sparse(&inputs, &options, &predictor).unwrap()).unwrap();
        assert_eq!(map.shape(), [3, 2, 4, 4]);
        for (b, len) in lens.into_iter().enumerate() {
            let part = |tensor: &Tensor, heads: usize, len: usize| {
                let places =
                    (0..heads).flat_map(|h| (0..len).flat_map(move |i| (0..8).map(move |c| [b, h, i, c])));
                let view: TensorView<'_> = tensor.view();
                Tensor::new(places.map(|at| view.at(at)).collect::<Vec<f32>>(), &[1, heads, len, 8]).unwrap()
            };
            let (q, k) = (part(&sample.q, 2, 30), part(&sample.k, 1, len as usize));
            let alone = predictor.predict(q.view(), k.view(), &options).unwrap();
            let columns = alone.shape()[3];
            let rows = map.rows().skip(8 * b).take(8);
            for (row, alone) in rows.zip(alone.rows()) {
                assert_eq!(row[..columns], *alone, "entry {b} of {band:?}");
                assert!(row[columns..].iter().all(|&kept| !kept));
            }
        }
    }
}

#[test]
fn heads_of_a_group_share_keys_but_not_their_thresholds() {
    // Two query heads read one key head, whose second block is not similar to the first head's taste alone.
    let q = Tensor::new(vec![1.0, 1.0, -1.0, -1.0], &[1, 2, 2, 1]).unwrap();
    let k = head(1, &[1.0, 1.0, 9.0, -1.0, 2.0, 2.0]);
    let predictor = best().blocks(2, 2).similarity(vec![0.5, -0.5]);
    let map = predictor.predict(q.view(), k.view(), &Options::default()).unwrap();
    assert_eq!(map.shape(), [1, 2, 1, 3]);
    assert_eq!(drawn(&map), [".##", "#.."]);
}

#[test]
fn layouts_predict_one_map() {
    let sizes = Sizes { batch: 2, num_q_heads: 4, num_kv_heads: 2, q_len: 70, kv_len: 90, head_dim: 16 };
    let sample = Sample::normal(1, sizes).to_dtype(DType::F16);
    let nhd = |tensor: &Tensor| {
        let [b, h, n, d] = [0, 1, 2, 3].map(|at| tensor.shape()[at]);
        let view: TensorView<'_> = tensor.view();
        let places = (0..b * n * h * d).map(|at| [at / (n * h * d), at / d % h, at / (h * d) % n, at % d]);
        Tensor::new(places.map(|at| view.at(at)).collect::<Vec<f32>>(), &[b, n, h, d])
            .unwrap()
            .to_dtype(DType::F16)
    };
    let predictor = Predictor::sparge_attn(Select::Cdf(0.9.into()), 0.05).blocks(16, 8);
    let options = Options::default().band(CAUSAL);
    let map = predictor.predict(sample.q.view(), sample.k.view(), &options).unwrap();
    let options = options.layout(Layout::Nhd);
    let other = predictor.predict(nhd(&sample.q).view(), nhd(&sample.k).view(), &options).unwrap();
    assert_eq!(map, other);
    let density = map.density(&CAUSAL, 70, 90).unwrap();
    assert!((0.1..0.99).contains(&density), "a map of {density} tells nothing");
}

#[test]
fn keys_that_no_query_sees_count_in_no_block() {
    // The last key of the second block is beyond what two queries see: its mean is 4, not 0.
    let (q, k) = ([1.0, 1.0, 1.0], [3.0, 3.0, 4.0, -4.0, f32::NAN, 1.0]);
    assert_eq!(within(CAUSAL, best().smooth_k(true), &q, &k), ["#..", ".#."]);

    // The same by lengths: the first sequence has three keys, the second four, the third none.
    let q = Tensor::new(vec![1.0; 9], &[3, 1, 3, 1]).unwrap();
    let k = Tensor::new(k.repeat(3), &[3, 1, 6, 1]).unwrap();
    let inputs = Inputs::new(q.view(), k.view(), k.view()).lengths(Lengths::KvLens(&[3, 4, 0]));
    let predictor = best().blocks(4, 2).smooth_k(true);
    let call = Call::check_sparse(&inputs, &Options::default(), &predictor).unwrap();
    assert_eq!(drawn(&predictor.map(&call).unwrap()), [".#.", "#..", "..."]);
}

#[test]
fn packed_sequences_are_predicted_each_by_itself() {
    let (q, k) = ([1.0, 1.0, -1.0, 1.0, 1.0], [1.0, 1.0, 2.0, -2.0, 5.0]);
    let packed = |elements: &[f32]| Tensor::new(elements.to_vec(), &[elements.len(), 1, 1]).unwrap();
    let (q, k) = (packed(&q), packed(&k));
    // Sequences of three queries and two keys, of one and two, of one and one.
    let lengths = Lengths::Packed { cu_seqlens_q: &[0, 3, 4, 5], cu_seqlens_k: &[0, 2, 4, 5] };
    let inputs = Inputs::new(q.view(), k.view(), k.view()).lengths(lengths);
    let predictor = best().blocks(2, 1);
    let map = predictor.map(&Call::check_sparse(&inputs, &Options::default(), &predictor).unwrap()).unwrap();
    assert_eq!(map.shape(), [3, 1, 2, 2]);
    assert_eq!(drawn(&map), ["#.", "#.", "#.", "..", "#.", ".."]);
}

#[test]
fn a_call_of_a_predictor_has_no_other_map() {
    let x = Tensor::zeros(DType::F32, &[1, 1, 8, 2]).unwrap();
    let map = BlockMap::new(vec![true], [1, 1, 1, 1], 64, 64).unwrap();
    let mapped = Inputs::new(x.view(), x.view(), x.view()).block_mask(map.mask());
    let error = Call::check_sparse(&mapped, &Options::default(), &best()).unwrap_err().to_string();
    assert_eq!(error, "block_mask with a predictor is not supported: give one of them");
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let (q, k) = (
        Tensor::zeros(DType::F32, &[1, 4, 8, 2]).unwrap(),
        Tensor::zeros(DType::F32, &[1, 2, 8, 2]).unwrap(),
    );
    let error = |predictor: Predictor| {
        predictor.predict(q.view(), k.view(), &Options::default()).unwrap_err().to_string()
    };
    assert_eq!(error(best().blocks(0, 64)), "block_q: value is 0, expected at least 1");
    assert_eq!(error(best().blocks(64, 0)), "block_k: value is 0, expected at least 1");
    assert_eq!(
        error(best().similarity(vec![0.5; 3])),
        "simthreshd1: shape is [3], expected [4], one for each query head"
    );
    assert_eq!(error(Predictor::sla(2.0)), "topk: value is 2, expected 0 to 1");
    let padding = PaddedBlocks::new(&[2, 2, 2], 2).unwrap();
    assert_eq!(
        error(best().blocks(2, 2).k_padding(padding)),
        "k_padding: value is 6 tokens in blocks of 2, expected 8 tokens in blocks of 2"
    );
    let three = Tensor::zeros(DType::F32, &[1, 3, 8, 2]).unwrap();
    let error = best().predict(q.view(), three.view(), &Options::default()).unwrap_err().to_string();
    assert_eq!(error, "k: shape is [1, 3, 8, 2], expected a number of heads that divides q's 4");
}

/// SpargeAttn's causal map with an attention sink, step by step as its program defines it, in double precision: a Gram
/// matrix, a softmax, a sort and its running sum.
fn defined(q: &[Vec<f64>], k: &[Vec<f64>], [block_q, block_k]: [usize; 2], cdf: f64, sim: f64) -> Vec<bool> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let mean = |rows: &[Vec<f64>]| -> Vec<f64> {
        (0..rows[0].len()).map(|c| rows.iter().map(|row| row[c]).sum::<f64>() / rows.len() as f64).collect()
    };
    let alike = |rows: &[Vec<f64>]| {
        let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        let sum: f64 = rows.iter().flat_map(|a| rows.iter().map(move |b| cosine(a, b))).sum();
        sum / (rows.len() * rows.len()) as f64 > sim
    };
    let k_mean = mean(k);
    let k: Vec<Vec<f64>> =
        k.iter().map(|row| row.iter().zip(&k_mean).map(|(x, mean)| x - mean).collect()).collect();
    let k: Vec<(Vec<f64>, bool)> = k.chunks(block_k).map(|rows| (mean(rows), alike(rows))).collect();
    let mut map = Vec::new();
    for (i, rows) in q.chunks(block_q).enumerate() {
        let hidden = |j: usize| j * block_k >= (i + 1) * block_q;
        let q = mean(rows);
        let score = |(j, (k, alike)): (usize, &(Vec<f64>, bool))| {
            if *alike && !hidden(j) { dot(&q, k) / (q.len() as f64).sqrt() } else { f64::NEG_INFINITY }
        };
        let weights: Vec<f64> = k.iter().enumerate().map(score).map(f64::exp).collect();
        let mut order: Vec<usize> = (0..k.len()).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
        let sums = order.iter().scan(0.0, |sum, &j| {
            *sum += weights[j] / weights.iter().sum::<f64>();
            Some(*sum)
        });
        let count = sums.filter(|sum| *sum <= cdf).count().max(1);
        let kept = |j: usize| {
            let chosen = order[..count].contains(&j);
            (chosen || !k[j].1 || !alike(rows)) && !hidden(j) || j == 0
        };
        map.extend((0..k.len()).map(kept));
    }
    map
}

#[test]
fn a_map_is_that_of_the_definition() {
    let (tokens, head_dim) = (203, 12);
    // Runs of 17 tokens share a direction, from nearly all of a token to nearly nothing of it.
    let rows = |seed: u64| {
        let [noise, shared] = [seed, seed + 100].map(|seed| sage_testkit::normal(seed, tokens * head_dim));
        let element = move |at: usize| {
            let run = at / head_dim / 17;
            shared[run * head_dim + at % head_dim] + noise[at] * (run % 4) as f32 * 0.4
        };
        (0..tokens * head_dim).map(element).collect::<Vec<f32>>()
    };
    let wide = |rows: &[f32]| -> Vec<Vec<f64>> {
        rows.chunks(head_dim).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
    };
    for seed in 0..8 {
        let (q, k) = (rows(seed), rows(seed + 50));
        for (blocks, cdf, sim) in [([16, 8], 0.7, 0.4), ([8, 16], 0.9, 0.3), ([16, 16], 0.5, 0.0)] {
            let predictor = Predictor::sparge_attn(Select::Cdf(cdf.into()), sim).blocks(blocks[0], blocks[1]);
            let predictor = predictor.sink_k(0..1);
            let options = Options::default().band(CAUSAL);
            let map =
                predictor.predict(head(head_dim, &q).view(), head(head_dim, &k).view(), &options).unwrap();
            let expected = defined(&wide(&q), &wide(&k), blocks, cdf.into(), sim.into());
            assert_eq!(map.flags(), expected, "seed {seed}, blocks of {blocks:?}");
            let density = map.density(&CAUSAL, tokens, tokens).unwrap();
            assert!((0.2..0.95).contains(&density), "a map of {density} tells little");
        }
    }
}

/// Tokens whose queries and keys turn slowly, each pair of channels at a speed of its own: the nearer two tokens are,
/// the more alike. Token `i` of the sequence is at `order(i)`.
fn local(tokens: usize, head_dim: usize, order: impl Fn(usize) -> usize) -> Sample {
    let turned = |at: usize| {
        let (token, channel) = (order(at / head_dim), at % head_dim);
        let angle = token as f32 * 0.3 / (1 + channel / 2) as f32;
        1.5 * if channel.is_multiple_of(2) { angle.cos() } else { angle.sin() }
    };
    let elements = 0..tokens * head_dim;
    let noisy = elements.clone().zip(sage_testkit::normal(7, tokens * head_dim));
    Sample::one_head(
        head_dim,
        &elements.map(turned).collect::<Vec<f32>>(),
        &noisy.map(|(at, noise)| turned(at) + 0.05 * noise).collect::<Vec<f32>>(),
        &sage_testkit::normal(8, tokens * head_dim),
    )
}

/// The density of a predictor's map, and how far attention over it is from attention over all keys (relative L1).
fn density_and_error(sample: &Sample, predictor: Predictor) -> (f64, f64) {
    let predictor = predictor.blocks(16, 16);
    let map = predictor.predict(sample.q.view(), sample.k.view(), &Options::default()).unwrap();
    let options = Options::default();
    let dense = exact(&sample.call(&options));
    let inputs = Inputs { block_mask: Some(map.mask()), ..sample.inputs() };
    let sparse = exact(&Call::check(&inputs, &options).unwrap());
    let tokens = sample.q.shape()[2];
    let density = map.density(&Band::FULL, tokens, tokens).unwrap();
    (density, Accuracy::of(&sparse.out, &dense.out).relative_l1)
}

#[test]
fn what_is_near_is_found_and_little_of_it_suffices() {
    let sample = local(512, 32, |token| token);
    let sparge = |cdf: f32| Predictor::sparge_attn(Select::Cdf(cdf.into()), 0.6);
    // Measured: density 0.21, error 0.053.
    let (density, error) = density_and_error(&sample, sparge(0.95));
    assert!(density < 0.25 && error < 0.1, "density {density}, error {error}");
    // Measured: density 0.094, error 0.11. Where scores are normal, 16% exceed the mean by one standard deviation.
    let (density, error) = density_and_error(&sample, Predictor::sol_attn(1.0));
    assert!((0.05..0.2).contains(&density) && error < 0.2, "density {density}, error {error}");
    // The more is kept, the nearer it is.
    for predictors in [[0.5, 0.8, 0.95, 0.98].map(sparge), [0.1, 0.2, 0.4, 1.0].map(Predictor::sla)] {
        let found = predictors.map(|predictor| density_and_error(&sample, predictor));
        assert!(found.is_sorted_by(|less, more| less.0 < more.0 && less.1 > more.1), "{found:?}");
    }
    // Without structure there is nothing to be found: the same tenth of all blocks loses most of the result.
    let random = Sample::normal(3, Sizes::one_head(512, 512, 32));
    let (_, lost) = density_and_error(&random, Predictor::sla(0.1));
    assert!(lost > 1.0, "{lost}");
}

#[test]
fn where_neighbours_are_not_alike_means_are_not_trusted() {
    // The tokens of the test above, each far from those that it is like.
    let sample = local(512, 32, |token| token * 37 % 512);
    let select = || Select::Cdf(0.95.into());
    assert_eq!(density_and_error(&sample, Predictor::sparge_attn(select(), 0.6)), (1.0, 0.0));
    let (_, error) = density_and_error(&sample, Predictor::new(select()));
    assert!(error > 0.05, "{error}");
}
