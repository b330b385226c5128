//! The direct kernels against plain loops over tensors with gaps, in every element type.

use half::{bf16, f16};
use sage_testkit::normal;

use super::*;
use crate::InstructionSet;
use crate::testing::{close, factors, tables};

/// Rows of queries, keys, `head_dim`, and elements between rows.
const SIZES: [(usize, usize, usize, usize); 7] = [
    (1, 1, 1, 0),
    (3, 5, 7, 2),
    (8, 128, 64, 0),
    (2, 127, 40, 64),
    (5, 6, 33, 1),
    (1, 0, 8, 0),
    (4, 4, 17, 3),
];

/// Every table of this machine with each of [`SIZES`].
fn each_size() -> impl Iterator<Item = ((InstructionSet, &'static Kernels), (usize, usize, usize, usize))> {
    tables().flat_map(|table| SIZES.into_iter().map(move |sizes| (table, sizes)))
}

/// Memory that ends with the last of `keys` rows.
fn memory<E: Load>(keys: usize, head_dim: usize, stride: usize) -> Vec<E> {
    let len = if keys == 0 { 0 } else { (keys - 1) * stride + head_dim };
    normal(1, len).into_iter().map(E::from_f32).collect()
}

#[test]
fn scores_are_products_with_keys_of_every_element_type() {
    fn check<E: Load>() {
        for ((set, kernels), (rows, keys, head_dim, gap)) in each_size() {
            let stride = head_dim + gap;
            let k: Vec<E> = memory(keys, head_dim, stride);
            let q = normal(2, rows * head_dim);
            let mut scores = vec![-7.0; rows * TILE_KEYS];
            let args =
                DirectScores { q: &q, rows, k: &k, stride, keys, seen: &[], head_dim, scores: &mut scores };
            E::scores(kernels, args);
            for (n, &x) in scores.iter().enumerate() {
                let (row, key) = (n / TILE_KEYS, n % TILE_KEYS);
                if key >= keys {
                    assert_eq!(x, -7.0, "{set} wrote beyond its {keys} keys");
                    continue;
                }
                let term =
                    |d: usize| f64::from(q[row * head_dim + d]) * f64::from(k[key * stride + d].to_f32());
                let size: f64 = (0..head_dim).map(|d| term(d).abs()).sum();
                let what = || format!("{set}, {}, key {key}", E::DTYPE);
                close(x, (0..head_dim).map(term).sum(), 0.0, 2e-6 * size, what);
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn outputs_are_rescaled_products_with_values_of_every_element_type() {
    fn check<E: Load>() {
        for ((set, kernels), (rows, keys, value_dim, gap)) in each_size() {
            let stride = value_dim + gap;
            let v: Vec<E> = memory(keys, value_dim, stride);
            let p = normal(3, rows * TILE_KEYS);
            let before = normal(4, rows * value_dim);
            let (mut out, state) = (before.clone(), factors(rows));
            let args = DirectValues {
                p: &p,
                rows,
                v: &v,
                stride,
                keys,
                seen: &[],
                value_dim,
                out: &mut out,
                state: &state,
            };
            E::values(kernels, args);
            for (n, &x) in out.iter().enumerate() {
                let (row, d) = (n / value_dim, n % value_dim);
                let beta = f64::from(state.beta[row]);
                let term = |key: usize| {
                    beta * f64::from(p[row * TILE_KEYS + key]) * f64::from(v[key * stride + d].to_f32())
                };
                let kept = f64::from(before[n]) * f64::from(state.alpha[row]);
                let size = kept.abs() + (0..keys).map(|key| term(key).abs()).sum::<f64>();
                let wanted = kept + (0..keys).map(term).sum::<f64>();
                let what = || format!("{set}, {}, row {row}, channel {d}", E::DTYPE);
                close(x, wanted, 0.0, 4e-6 * size, what);
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}
