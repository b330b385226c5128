//! Online softmax and the soft cap in double precision.

use sage_testkit::normal;

use super::*;
use crate::testing::{close, fixed12_p, tables};
use crate::tile::Rounded;

/// Rows of scores: plain ones, one that falls steeply, hidden keys, only hidden keys, a NaN, +∞.
fn score_rows(seed: u64, columns: usize) -> Vec<f32> {
    let mut scores: Vec<f32> = normal(seed, 7 * TILE_KEYS).iter().map(|x| 4.0 * x).collect();
    for c in 0..columns {
        scores[TILE_KEYS + c] = 30.0 - 3.0 * c as f32;
        scores[2 * TILE_KEYS + c] *=
            if c % 3 == 0 { f32::INFINITY.copysign(-scores[2 * TILE_KEYS + c]) } else { 1.0 };
        scores[3 * TILE_KEYS + c] = f32::NEG_INFINITY;
        scores[6 * TILE_KEYS + c] -= 1e4;
    }
    scores[4 * TILE_KEYS + columns / 2] = f32::NAN;
    scores[5 * TILE_KEYS + columns - 1] = f32::INFINITY;
    scores
}

#[test]
fn softmax_keeps_maximum_sum_and_factors() {
    for (set, kernels) in tables() {
        for fixed12 in [false, true] {
            let mut state = RowState::default();
            state.reset(7);
            let mut totals = [(f64::NEG_INFINITY, 0f64); 7];
            for (tile, columns) in
                [kernels.packing.width, TILE_KEYS, TILE_KEYS - kernels.packing.width].into_iter().enumerate()
            {
                let given = score_rows(10 + tile as u64, columns.max(kernels.packing.width));
                let columns = columns.max(kernels.packing.width);
                let (mut scores, mut pairs) = (given.clone(), vec![0xdead_beef; 7 * TILE_KEYS / 2]);
                let old_sum = state.sum.clone();
                let args =
                    Softmax { rows: 7, columns, scores: &mut scores, pairs: &mut pairs, state: &mut state };
                if fixed12 {
                    kernels.softmax_fixed12(args)
                } else {
                    kernels.softmax_float(args)
                }
                for r in 0..7 {
                    let what = || format!("{set}, 12 bits {fixed12}, tile {tile}, row {r}");
                    let row = &given[r * TILE_KEYS..][..columns];
                    let (total_max, total_sum) = &mut totals[r];
                    if r == 4 || r == 5 {
                        assert!(state.sum[r].is_nan(), "{}", what());
                        continue;
                    }
                    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    let new = total_max.max(f64::from(max));
                    let relative =
                        |x: f64, to: f64| if x == f64::NEG_INFINITY { 0.0 } else { (x - to).exp2() };
                    let (alpha, beta) = (relative(*total_max, new), relative(f64::from(max), new));
                    let unit = if fixed12 { 1.0 / f64::from(FIXED12_MAX) } else { 1.0 };
                    assert_eq!(f64::from(state.max[r]), new, "{}", what());
                    let mut tile_sum = 0.0;
                    for (c, &score) in row.iter().enumerate() {
                        let p = relative(f64::from(score), f64::from(max));
                        if fixed12 {
                            let words = &pairs[r * TILE_KEYS / 2..][..TILE_KEYS / 2];
                            let level = fixed12_p(kernels.packing.fixed12, words, c);
                            let wanted = 4095.0 * p;
                            // The nearest integer; 0.02 more for the polynomial of degree 4 and a rounded difference.
                            let near = (f64::from(level) - wanted).abs() <= 0.52;
                            assert!(near, "{}, column {c}: {level}, expected {wanted}", what());
                            tile_sum += f64::from(level);
                        } else {
                            let p_kernel = scores[r * TILE_KEYS + c];
                            close(p_kernel, p, 3e-6, 1e-37, || format!("{}, column {c}", what()));
                            tile_sum += f64::from(p_kernel);
                        }
                    }
                    // In 12 bits the tile's sum is exact, and one product and one sum of singles follow.
                    let (kept, added) = (f64::from(old_sum[r]) * alpha, tile_sum * beta * unit);
                    let rounding = if fixed12 { 4e-7 } else { 1.3e-6 };
                    close(state.sum[r], kept + added, rounding, 1e-30, || format!("sum of {}", what()));
                    // The factors are shares of the new sum; a row without keys has none.
                    let share = |x: f64| if kept + added == 0.0 { 0.0 } else { x / (kept + added) };
                    let bound = rounding + 6e-7;
                    close(state.alpha[r], share(kept), bound, 1e-35, || format!("alpha of {}", what()));
                    close(state.beta[r], share(beta * unit), bound, 1e-35, || format!("beta of {}", what()));
                    *total_sum = *total_sum * alpha
                        + beta * row.iter().map(|x| relative(f64::from(*x), f64::from(max))).sum::<f64>();
                    *total_max = new;
                    close(state.sum[r], *total_sum, if fixed12 { 5e-3 } else { 3e-6 }, 1e-30, || {
                        format!("total of {}", what())
                    });
                }
            }
        }
    }
}

#[test]
fn a_soft_cap_is_a_scaled_tanh() {
    for (set, kernels) in tables() {
        for cap in [0.5f32, 20.0, 70.0] {
            let mut given: Vec<f32> = normal(1, 64).iter().map(|x| x * 1.5 * cap).collect();
            given.extend([0.0, -0.0, 1e-6, -1e-3, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30]);
            given.resize(96, 0.25);
            let mut capped = given.clone();
            kernels.soft_cap(SoftCap { scores: &mut capped, cap });
            for (s, x) in given.iter().zip(capped) {
                if s.is_nan() {
                    assert!(x.is_nan(), "{set}");
                    continue;
                }
                let wanted = f64::from(cap) * (f64::from(*s) / f64::from(cap)).tanh();
                close(x, wanted, 0.0, 3e-7 * f64::from(cap), || format!("{set}, cap {cap}, score {s}"));
            }
        }
    }
}

#[test]
fn probabilities_as_words_are_bfloat16_of_exact_ones() {
    for (set, kernels) in tables() {
        let Some(bf16) = &kernels.bf16 else { continue };
        let mut pairs = vec![0; 7 * TILE_KEYS / 2];
        let [mut state, mut wanted] = [(), ()].map(|()| {
            let mut state = RowState::default();
            state.reset(7);
            state
        });
        for (tile, columns) in [TILE_KEYS, 32, 96].into_iter().enumerate() {
            let given = score_rows(20 + tile as u64, columns);
            let (mut scores, mut numbers) = (given.clone(), given.clone());
            bf16.softmax(Softmax {
                rows: 7,
                columns,
                scores: &mut scores,
                pairs: &mut pairs,
                state: &mut state,
            });
            let softmax =
                Softmax { rows: 7, columns, scores: &mut numbers, pairs: &mut [], state: &mut wanted };
            kernels.softmax_rounded(RoundedSoftmax { softmax, to: Rounded::BF16 });
            for r in 0..7 {
                let what = || format!("{set}, tile {tile}, row {r}");
                let (sum, lse_sum) = (state.sum[r], state.lse_sum[r]);
                if wanted.sum[r].is_nan() {
                    assert!(sum.is_nan() && lse_sum.is_nan(), "{}", what());
                    continue;
                }
                let mut of_words = 0.0;
                for c in 0..columns {
                    let word = pairs[(r * TILE_KEYS + c) / 2];
                    let p = f32::from_bits(if c % 2 == 0 { word << 16 } else { word & 0xffff_0000 });
                    let score = given[r * TILE_KEYS + c];
                    let exact = if score == f32::NEG_INFINITY {
                        0.0
                    } else {
                        (f64::from(score) - f64::from(state.max[r])).exp2()
                    };
                    // Half a unit in the last of 8 places, and what the polynomial leaves; nothing below the normal range.
                    close(p, exact, 0.5f64.powi(8) + 4e-6, 1.2e-38, || format!("{}, column {c}", what()));
                    of_words += f64::from(p);
                }
                if tile == 0 {
                    close(sum, of_words, 1e-6, 0.0, || format!("sum of {}", what()));
                }
                close(lse_sum, f64::from(wanted.lse_sum[r]), 1e-5, 0.0, || format!("lse of {}", what()));
                // A few are rounded the other way.
                close(sum, f64::from(wanted.sum[r]), 1e-3, 0.0, || format!("sum of {}", what()));
                assert_eq!(state.max[r], wanted.max[r], "{}", what());
            }
        }
    }
}
