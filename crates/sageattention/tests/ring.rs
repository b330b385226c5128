//! Ring attention: queries and keys of one sequence in parts that meet each other one by one, merged by their
//! log-sum-exps.

#![allow(clippy::unwrap_used, reason = "tests")]

use sage_testkit::normal;
use sageattention::{Alignment, Attention, Preset, Tensor};

const HEAD_DIM: usize = 16;

/// Rows `from..to` as a tensor.
fn part(x: &[f32], from: usize, to: usize) -> Tensor {
    Tensor::new(x[from * HEAD_DIM..to * HEAD_DIM].to_vec(), &[1, 1, to - from, HEAD_DIM]).unwrap()
}

#[test]
fn parts_that_meet_at_their_offsets_are_the_whole() {
    let bounds = [0, 7, 40, 90, 101];
    let len = bounds[4];
    let [q, k, v] = [1, 2, 3].map(|seed| normal(seed, len * HEAD_DIM));
    for window in [None, Some(30)] {
        let attention = Attention::new().scheme(Preset::FULL).window(window, None).return_lse(true);
        let whole = attention
            .clone()
            .causal(true)
            .forward(&part(&q, 0, len), &part(&k, 0, len), &part(&v, 0, len))
            .unwrap();
        let (mut out, mut sums) = (vec![0f64; len * HEAD_DIM], vec![0f64; len]);
        for queries in bounds.windows(2) {
            for keys in bounds.windows(2) {
                let offset = queries[0] as i64 - keys[0] as i64;
                let met = attention
                    .clone()
                    .causal_alignment(Alignment::Offset(offset))
                    .forward(
                        &part(&q, queries[0], queries[1]),
                        &part(&k, keys[0], keys[1]),
                        &part(&v, keys[0], keys[1]),
                    )
                    .unwrap();
                let (rows, lse) = (met.out.to_f32_vec(), met.lse.unwrap().to_f32_vec());
                for (i, (row, lse)) in rows.chunks(HEAD_DIM).zip(lse).enumerate() {
                    let weight = f64::from(lse).exp();
                    let at = queries[0] + i;
                    sums[at] += weight;
                    for (out, x) in out[at * HEAD_DIM..].iter_mut().zip(row) {
                        *out += weight * f64::from(*x);
                    }
                }
            }
        }
        for (at, expected) in whole.out.to_f32_vec().into_iter().enumerate() {
            let found = out[at] / sums[at / HEAD_DIM];
            // Both are sums of at most 101 products in single precision.
            assert!((found - f64::from(expected)).abs() < 1e-5, "element {at}: {found}, expected {expected}");
        }
    }
}
