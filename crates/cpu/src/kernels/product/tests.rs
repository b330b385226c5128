//! The products against plain loops over the same packed operands.

use half::bf16;
use rand::RngExt;
use sage_testkit::normal;

use super::*;
use crate::kernels::{Bf16Kernels, Kernels};
use crate::testing::{close, dot, factors, rng, tables};
use crate::tile::Fixed12Word;

/// Sizes of a block of queries and a tile of keys that leave every kind of remainder.
const DEPTHS: [usize; 6] = [1, 2, 3, 5, 8, 65];

/// Whether scores of the first `columns` keys are sums of `terms` terms, of a row, a key and a channel, within so much of
/// the sum of their magnitudes; and whether the −7 beyond them still stand.
fn check_sums(
    scores: &[f32],
    columns: usize,
    (terms, relative): (usize, f64),
    term: impl Fn(usize, usize, usize) -> f64,
    what: &str,
) {
    for (at, &score) in scores.iter().enumerate() {
        let (row, key) = (at / TILE_KEYS, at % TILE_KEYS);
        if key >= columns {
            assert_eq!(score, -7.0, "{what} wrote beyond its panels");
            continue;
        }
        let of_channels = (0..terms).map(|c| term(row, key, c));
        let bound = relative * of_channels.clone().map(f64::abs).sum::<f64>();
        close(score, of_channels.sum(), 0.0, bound, || format!("{what}, row {row}, key {key}"));
    }
}

#[test]
fn scores_are_sums_of_products() {
    for (set, kernels) in tables() {
        let (rows, width) = (2 * kernels.rows, kernels.packing.width);
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
                let term = |row: usize, key: usize, d: usize| {
                    let word = k[key / width * depth * width + d * width + key % width];
                    f64::from(q[row * depth + d]) * f64::from(f32::from_bits(word))
                };
                let what = format!("{set}, depth {depth}");
                check_sums(&scores, panels * width, (depth, 1e-7 * depth as f64), term, &what);
            }
        }
    }
}

#[test]
fn integer_scores_are_exact() {
    for (set, kernels) in tables() {
        let (rows, width, mut rng) = (2 * kernels.rows, kernels.packing.width, rng(3));
        for depth in DEPTHS.map(|depth| depth.next_multiple_of(kernels.packing.depth_step)) {
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
                            (0..kernels.packing.word.channels()).map(|_| draw(offset, at)).collect();
                        let mut word = 0;
                        kernels.packing.word.pack_row(&channels, [&mut word].into_iter());
                        word
                    };
                    (0..len).map(word).collect()
                };
                let q = pack(kernels.packing.word.q_offset(), rows * depth);
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
                        sum + dot(
                            kernels.packing.word,
                            q[row * depth + d],
                            panel[(d + 1) * width + key % width],
                        )
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
        let (rows, width, panels) = (2 * kernels.rows, kernels.packing.width, 2);
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

/// 12-bit numbers as the kernels want them: panels of `width` values of each key of a tile, or, of width 1, rows of
/// probabilities.
fn pack_fixed12(form: Fixed12Word, numbers: &[i32], width: usize) -> Vec<u32> {
    let mut words = vec![0u32; numbers.len() / 2];
    for (at, &x) in numbers.iter().enumerate() {
        let (panel, key, column) = (at / (TILE_KEYS * width), at / width % TILE_KEYS, at % width);
        let mut put = |word: usize, bits: u32| words[(panel * TILE_KEYS / 2 + word) * width + column] |= bits;
        match form {
            Fixed12Word::Pair => put(key / 2, (x as u32 & 0xffff) << (16 * (key % 2))),
            Fixed12Word::Digits => {
                // Values have lower digits around zero, probabilities none below it.
                let upper = if width == 1 { x >> 6 } else { (x + 32) >> 6 };
                put(key / 4, u32::from(upper as u8) << (8 * (key % 4)));
                put((TILE_KEYS + key) / 4, u32::from((x - 64 * upper) as u8) << (8 * (key % 4)));
            }
        }
    }
    words
}

#[test]
fn twelve_bit_values_are_exact() {
    for (set, kernels) in tables() {
        let (rows, width, panels, mut rng) = (2 * kernels.rows, kernels.packing.width, 2, rng(6));
        let form = kernels.packing.fixed12;
        for (keys, extreme) in [(2, false), (5, false), (10, false), (96, false), (128, false), (128, true)] {
            let mut draw = |low: i32| if extreme { 4095 } else { rng.random_range(low..=4095) };
            // Softmax leaves zeros beyond the keys.
            let p: Vec<i32> =
                (0..rows * TILE_KEYS).map(|at| if at % TILE_KEYS < keys { draw(0) } else { 0 }).collect();
            let v: Vec<i32> = (0..panels * TILE_KEYS * width).map(|_| draw(-4095)).collect();
            let v_scale: Vec<u32> = normal(7, panels * width).iter().map(|x| x.to_bits()).collect();
            let before = normal(3, rows * panels * width);
            let (mut out, state) = (before.clone(), factors(rows));
            kernels.values_fixed12(Values {
                p: &pack_fixed12(form, &p, 1),
                p_stride: TILE_KEYS / 2,
                v: &pack_fixed12(form, &v, width),
                panel_words: TILE_KEYS / 2 * width,
                depth: keys.div_ceil(form.keys()),
                row_groups: 2,
                panels,
                v_scale: &v_scale,
                out: &mut out,
                state: &state,
            });
            for (at, &x) in out.iter().enumerate() {
                let (row, channel) = (at / (panels * width), at % (panels * width));
                let panel = &v[channel / width * TILE_KEYS * width..];
                let sum: i32 =
                    (0..keys).map(|j| p[row * TILE_KEYS + j] * panel[j * width + channel % width]).sum();
                let product = sum as f32 * state.beta[row] * f32::from_bits(v_scale[channel]);
                let what = || format!("{set}, {keys} keys, row {row}, channel {channel}");
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

/// Numbers that are bfloat16, two to a word.
fn bf16_numbers(seed: u64, words: usize) -> (Vec<u32>, Vec<f64>) {
    let numbers: Vec<bf16> = normal(seed, 2 * words).into_iter().map(bf16::from_f32).collect();
    let words = numbers.chunks(2).map(|x| u32::from(x[0].to_bits()) | u32::from(x[1].to_bits()) << 16);
    (words.collect(), numbers.iter().map(|x| x.to_f64()).collect())
}

/// A machine without such kernels has nothing to test here.
fn bf16_tables() -> impl Iterator<Item = (crate::InstructionSet, &'static Kernels, &'static Bf16Kernels)> {
    let found: Vec<_> =
        tables().filter_map(|(set, table)| table.bf16.as_ref().map(|bf16| (set, table, bf16))).collect();
    if found.is_empty() {
        eprintln!("skipped: this processor does not multiply bfloat16");
    }
    found.into_iter()
}

#[test]
fn scores_of_bfloat16_are_scaled_sums_of_products() {
    for (set, kernels, bf16) in bf16_tables() {
        let width = kernels.packing.width;
        for groups in [1, 2, 3, 16] {
            for depth in [16, 32, 48, 288] {
                for panels in [1, TILE_KEYS / width] {
                    let rows = groups * kernels.rows;
                    let (q, q_numbers) = bf16_numbers(1, rows * depth);
                    let (k, k_numbers) = bf16_numbers(2, panels * depth * width);
                    let q_scale = normal(3, rows);
                    let mut scores = vec![-7.0; rows * TILE_KEYS];
                    bf16.scores(Scores {
                        q: &q,
                        k: &k,
                        depth,
                        row_groups: groups,
                        panels,
                        q_scale: &q_scale,
                        k_scale: &[],
                        scores: &mut scores,
                    });
                    let term = |row: usize, key: usize, c: usize| {
                        let word = (key / width * depth + c / 2) * width + key % width;
                        q_numbers[2 * row * depth + c] * k_numbers[2 * word + c % 2] * f64::from(q_scale[row])
                    };
                    let what = format!("{set}, {rows} rows, depth {depth}");
                    check_sums(&scores, panels * width, (2 * depth, 1e-7 * depth as f64), term, &what);
                }
            }
        }
    }
}

#[test]
fn bfloat16_values_are_rescaled_sums_of_products() {
    for (set, kernels, bf16) in bf16_tables() {
        let (width, panels, words) = (kernels.packing.width, 3, TILE_KEYS / 2);
        for groups in [1, 2, 3, 16] {
            for depth in [1, 16, 17, 64] {
                let rows = groups * kernels.rows;
                let (mut p, _) = bf16_numbers(1, rows * words);
                // Softmax leaves zeros beyond the keys.
                p.iter_mut().enumerate().filter(|(at, _)| at % words >= depth).for_each(|(_, x)| *x = 0);
                let (v, v_numbers) = bf16_numbers(2, panels * words * width);
                let before = normal(3, rows * panels * width);
                let (mut out, state) = (before.clone(), factors(rows));
                bf16.values(Values {
                    p: &p,
                    p_stride: words,
                    v: &v,
                    panel_words: words * width,
                    depth,
                    row_groups: groups,
                    panels,
                    v_scale: &[4f32.to_bits()],
                    out: &mut out,
                    state: &state,
                });
                for (at, &x) in out.iter().enumerate() {
                    let (row, channel) = (at / (panels * width), at % (panels * width));
                    let term = |j: usize| {
                        let p = f32::from_bits(p[row * words + j / 2] << (16 * (1 - j % 2)) & 0xffff_0000);
                        let word = (channel / width * words + j / 2) * width + channel % width;
                        f64::from(p) * v_numbers[2 * word + j % 2] * f64::from(4.0 * state.beta[row])
                    };
                    let kept = f64::from(before[at]) * f64::from(state.alpha[row]);
                    let size = (0..2 * depth).map(|j| term(j).abs()).sum::<f64>() * depth as f64 + kept.abs();
                    let what = || format!("{set}, {rows} rows, depth {depth}, row {row}, channel {channel}");
                    close(x, kept + (0..2 * depth).map(term).sum::<f64>(), 0.0, 2e-7 * size, what);
                }
            }
        }
    }
}
