//! The products against plain loops over the same packed operands.

use rand::RngExt;
use sage_testkit::normal;

use super::*;
use crate::isa::IntWord;
use crate::testing::{close, dot, factors, rng, tables};

/// Sizes of a block of queries and a tile of keys that leave every kind of remainder.
const DEPTHS: [usize; 6] = [1, 2, 3, 5, 8, 65];

#[test]
fn scores_are_sums_of_products() {
    for (set, kernels) in tables() {
        let (rows, width) = (2 * kernels.rows, kernels.width);
        for depth in DEPTHS {
            for panels in [1, TILE_KEYS / width] {
                let q = normal(1, rows * depth);
                let k: Vec<u32> = normal(2, panels * depth * width).iter().map(|x| x.to_bits()).collect();
                let mut scores = vec![-7.0; rows * TILE_KEYS];
                kernels.scores_float(Scores {
                    q: bytemuck::cast_slice(&q),
                    k: &k,
                    depth,
                    row_groups: 2,
                    panels,
                    q_scale: &[],
                    k_scale: &[],
                    scores: &mut scores,
                });
                for (at, &score) in scores.iter().enumerate() {
                    let (row, key) = (at / TILE_KEYS, at % TILE_KEYS);
                    if key >= panels * width {
                        assert_eq!(score, -7.0, "{set} wrote beyond its panels");
                        continue;
                    }
                    let term = |d: usize| {
                        let word = k[key / width * depth * width + d * width + key % width];
                        f64::from(q[row * depth + d]) * f64::from(f32::from_bits(word))
                    };
                    let bound = 1e-7 * (0..depth).map(|d| term(d).abs()).sum::<f64>() * depth as f64;
                    close(score, (0..depth).map(term).sum(), 0.0, bound, || format!("{set}, depth {depth}"));
                }
            }
        }
    }
}

#[test]
fn integer_scores_are_exact() {
    for (set, kernels) in tables() {
        let (rows, width, mut rng) = (2 * kernels.rows, kernels.width, rng(3));
        for depth in DEPTHS {
            for extreme in [false, true] {
                let panels = TILE_KEYS / width;
                // Channels of −127..=127 in K, with the offset in Q.
                let mut draw = |offset: i32, of: usize| {
                    let channel =
                        if extreme { 127 - 254 * (of % 2) as i32 } else { rng.random_range(-127..=127) };
                    channel + offset
                };
                let mut pack = |offset: i32, len: usize| -> Vec<u32> {
                    let word = |at: usize| {
                        let channels: Vec<i32> =
                            (0..kernels.word.channels()).map(|_| draw(offset, at)).collect();
                        let mut word = 0;
                        kernels.word.pack_row(&channels, [&mut word].into_iter());
                        word
                    };
                    (0..len).map(word).collect()
                };
                let q = pack(kernels.word.q_offset(), rows * depth);
                let mut k = pack(0, panels * (depth + 1) * width);
                for panel in k.chunks_exact_mut((depth + 1) * width) {
                    panel[..width]
                        .iter_mut()
                        .enumerate()
                        .for_each(|(key, x)| *x = (key as i32 * 1000 - 9) as u32);
                }
                let q_scale: Vec<f32> = normal(4, rows);
                let k_scale: Vec<u32> = normal(5, TILE_KEYS).iter().map(|x| x.to_bits()).collect();
                let mut scores = vec![-7.0; rows * TILE_KEYS];
                kernels.scores_int(Scores {
                    q: &q,
                    k: &k,
                    depth,
                    row_groups: 2,
                    panels,
                    q_scale: &q_scale,
                    k_scale: &k_scale,
                    scores: &mut scores,
                });
                for (at, &score) in scores.iter().enumerate() {
                    let (row, key) = (at / TILE_KEYS, at % TILE_KEYS);
                    let panel = &k[key / width * (depth + 1) * width..][..(depth + 1) * width];
                    let sum = (0..depth).fold(panel[key % width] as i32, |sum, d| {
                        sum + dot(kernels.word, q[row * depth + d], panel[(d + 1) * width + key % width])
                    });
                    let wanted = sum as f32 * (q_scale[row] * f32::from_bits(k_scale[key]));
                    assert_eq!(score, wanted, "{set}, depth {depth}, row {row}, key {key}");
                }
            }
        }
    }
}

#[test]
fn values_are_rescaled_sums_of_products() {
    for (set, kernels) in tables() {
        let (rows, width, panels) = (2 * kernels.rows, kernels.width, 2);
        for depth in [1, 2, 3, 7, TILE_KEYS] {
            let p = normal(1, rows * TILE_KEYS);
            let v: Vec<u32> = normal(2, panels * TILE_KEYS * width).iter().map(|x| x.to_bits()).collect();
            let before = normal(3, rows * panels * width);
            let (mut out, state) = (before.clone(), factors(rows));
            kernels.values_float(Values {
                p: bytemuck::cast_slice(&p),
                p_stride: TILE_KEYS,
                v: &v,
                panel_words: TILE_KEYS * width,
                depth,
                row_groups: 2,
                panels,
                v_scale: &[4f32.to_bits()],
                out: &mut out,
                state: &state,
            });
            for (at, &x) in out.iter().enumerate() {
                let (row, channel) = (at / (panels * width), at % (panels * width));
                let term = |t: usize| {
                    let word = v[channel / width * TILE_KEYS * width + t * width + channel % width];
                    f64::from(p[row * TILE_KEYS + t])
                        * f64::from(f32::from_bits(word))
                        * f64::from(4.0 * state.beta[row])
                };
                let kept = f64::from(before[at]) * f64::from(state.alpha[row]);
                let size = (0..depth).map(|t| term(t).abs()).sum::<f64>() * depth as f64 + kept.abs();
                let what = || format!("{set}, depth {depth}, row {row}, channel {channel}");
                close(x, kept + (0..depth).map(term).sum::<f64>(), 0.0, 2e-7 * size, what);
            }
        }
    }
}

#[test]
fn twelve_bit_values_are_exact() {
    for (set, kernels) in tables() {
        let (rows, width, panels, mut rng) = (2 * kernels.rows, kernels.width, 2, rng(6));
        for (depth, extreme) in [(1, false), (2, false), (5, false), (64, false), (64, true)] {
            let mut word = |low: i32| {
                let mut draw = || if extreme { 4095 } else { rng.random_range(low..=4095) };
                draw() as u32 & 0xffff | (draw() as u32) << 16
            };
            let p: Vec<u32> = (0..rows * 64).map(|_| word(0)).collect();
            let v: Vec<u32> = (0..panels * 64 * width).map(|_| word(-4095)).collect();
            let v_scale: Vec<u32> = normal(7, panels * width).iter().map(|x| x.to_bits()).collect();
            let before = normal(3, rows * panels * width);
            let (mut out, state) = (before.clone(), factors(rows));
            kernels.values_fixed12(Values {
                p: &p,
                p_stride: 64,
                v: &v,
                panel_words: 64 * width,
                depth,
                row_groups: 2,
                panels,
                v_scale: &v_scale,
                out: &mut out,
                state: &state,
            });
            for (at, &x) in out.iter().enumerate() {
                let (row, channel) = (at / (panels * width), at % (panels * width));
                let sum = (0..depth).fold(0, |sum, t| {
                    let word = v[channel / width * 64 * width + t * width + channel % width];
                    sum + dot(IntWord::Pair, p[row * 64 + t], word)
                });
                let product = sum as f32 * state.beta[row] * f32::from_bits(v_scale[channel]);
                let what = || format!("{set}, depth {depth}, row {row}, channel {channel}");
                if state.alpha[row] == 0.0 {
                    assert_eq!(x, product, "{}", what());
                }
                let kept = f64::from(before[at]) * f64::from(state.alpha[row]);
                close(
                    x,
                    f64::from(product) + kept,
                    2e-7,
                    2e-7 * kept.abs() + 2e-7 * f64::from(product.abs()),
                    what,
                );
            }
        }
    }
}
