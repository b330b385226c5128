//! Packed FP4 against the oracle's, its products against sums in double precision.

use sage_core::oracle::{self, Fp4Rows, Matrix, SeenKeys};
use sage_core::{PLevels, Pv, SmoothQ};
use sage_testkit::normal;

use super::super::narrow::tests::numbers;
use super::super::{Fp4Softmax, PackQueries, PackTile, RowState, Softmax};
use super::*;
use crate::testing::{close, factors, tables};
use crate::tile::{PvForm, QkForm, TileLayout};

const FORMATS: [Fp4Format; 2] = [Fp4Format::Nv, Fp4Format::Mx];

#[test]
fn scales_of_groups_are_the_oracles() {
    for format in FORMATS {
        for max in numbers().filter(|x| x.is_sign_positive()) {
            assert_eq!(scale(format, max.to_bits()), format.scale_value(format.scale(max)), "{max:e}");
        }
        for bad in [f32::INFINITY, f32::NAN] {
            assert!(scale(format, bad.to_bits()).is_nan());
        }
    }
}

/// Code `at` of four words, `stride` apart.
fn code_of(words: &[u32], stride: usize, at: usize) -> f64 {
    f64::from(words[at / 4 * stride].to_le_bytes()[at % 4] as i8) / 2.0
}

/// Member `at` of a row of the first operand, whose codes are that much too large.
fn of_row(row: &[u32], at: usize, offset: i32) -> f64 {
    let block = &row[at / BLOCK * ROW_WORDS..][..ROW_WORDS];
    let scale = f64::from(f32::from_bits(block[BLOCK_WORDS]));
    scale * (code_of(block, 1, at % BLOCK) - f64::from(offset) / 2.0)
}

/// Member `at` of what stands in column `column` of a panel; scales are divided by 4.
fn of_panel(panel: &[u32], width: usize, column: usize, at: usize) -> f64 {
    let block = &panel[at / BLOCK * PANEL_WORDS * width..][..PANEL_WORDS * width];
    let scale = f64::from(f32::from_bits(block[(1 + BLOCK_WORDS) * width + column]));
    4.0 * scale * code_of(&block[width + column..], width, at % BLOCK)
}

fn same(found: f64, wanted: f64) -> bool {
    found == wanted || (found.is_nan() && wanted.is_nan())
}

#[test]
fn packed_operands_are_the_oracles() {
    for (set, kernels) in tables() {
        for format in FORMATS {
            for (keys, [head_dim, value_dim], size) in [
                (1, [1, 1], 1.0),
                (128, [64, 64], 20.0),
                (77, [40, 24], 1e-3),
                (100, [6, 6], 1e-39),
                (127, [33, 70], 3e37),
                (60, [100, 100], 1e4),
                (20, [576, 512], 1.0),
            ] {
                let what = format!("{set}, {format:?}, {keys} keys of {head_dim} times {size:e}");
                let draw = |seed: u64, dim: usize| -> Vec<f32> {
                    let mut x: Vec<f32> = normal(seed, keys * dim).iter().map(|x| x * size).collect();
                    x[keys / 2 * dim] = f32::NAN;
                    x
                };
                let (k, v) = (draw(1, head_dim), draw(2, value_dim));
                let matrix =
                    |x: &[f32]| Matrix::from_fn(keys, x.len() / keys, |i, c| x[i * (x.len() / keys) + c]);
                let form = PvForm::Fp4(format, PLevels::One);
                let layout = TileLayout::new(
                    kernels.packing,
                    [head_dim, value_dim],
                    QkForm::Fp4(format),
                    form,
                    false,
                    SmoothQ::Off,
                );
                let mut tile = vec![0xdead_beef; layout.words()];
                kernels.pack_tile(PackTile {
                    layout,
                    first: 0,
                    keys,
                    seen: &[],
                    k: &mut k.clone(),
                    k_max: &[],
                    v: &mut v.clone(),
                    v_max: &[],
                    tile: &mut tile,
                });
                let parts = layout.parts(&tile);
                let [k_later, v_later] =
                    [parts.k_scale, parts.v_scale].map(|scale| f64::from(f32::from_bits(scale[0])));
                let expected = Fp4Rows::quantize(&matrix(&k), format).dequantize();
                for (j, row) in expected.iter().enumerate() {
                    let panel = &parts.k[j / layout.width * layout.k_panel..];
                    for (c, wanted) in row.iter().enumerate() {
                        let found = k_later * of_panel(panel, layout.width, j % layout.width, c);
                        assert!(same(found, *wanted), "{what}: K {j}, {c}: {found}, expected {wanted}");
                    }
                    for block in 0..head_dim.div_ceil(BLOCK) {
                        let at = block * BLOCK..(block + 1) * BLOCK;
                        let words = &panel[block * PANEL_WORDS * layout.width + j % layout.width..];
                        let sum: f64 = at
                            .map(|at| 2.0 * code_of(&words[layout.width..], layout.width, at % BLOCK))
                            .sum();
                        assert_eq!(f64::from(words[0] as i32), -12.0 * sum, "{what}: start of key {j}");
                    }
                }
                let pv = Pv::Fp4 { format, levels: PLevels::One };
                let expected = oracle::quantize_v(&matrix(&v), &pv, &SeenKeys::all(keys));
                for (j, row) in expected.iter().enumerate() {
                    for (c, wanted) in row.iter().enumerate() {
                        let panel = &parts.v[c / layout.width * layout.v_panel..];
                        let found = v_later * of_panel(panel, layout.width, c % layout.width, j);
                        assert!(same(found, *wanted), "{what}: V {j}, {c}: {found}, expected {wanted}");
                    }
                }
                let (mut words, mut factor) = (vec![7; (keys + 1) * layout.depth], vec![0.0; keys + 1]);
                kernels.pack_queries(PackQueries {
                    layout,
                    first: 0,
                    rows: keys,
                    score_scale: 0.5,
                    q: &mut k.clone(),
                    group_max: &[],
                    first_group: 0,
                    words: &mut words,
                    scale: &mut factor,
                });
                let expected = Fp4Rows::quantize(&matrix(&k), format).dequantize();
                for (i, row) in expected.iter().enumerate() {
                    for (c, wanted) in row.iter().enumerate() {
                        let found = of_row(&words[i * layout.depth..], c, OFFSET);
                        assert!(same(found, 0.5 * wanted), "{what}: Q {i}, {c}: {found}, expected {wanted}");
                    }
                }
                assert!(words[keys * layout.depth..].iter().all(|x| *x == 0), "{what}: a row too many");
            }
        }
    }
}

/// A block of the first operand for each row, of codes 0 to 24 and random scales.
fn operand(seed: u64, words: usize, of: usize, limits: [i32; 2]) -> Vec<u32> {
    let byte = |x: f32| (x * 8.0).round().clamp(limits[0] as f32, limits[1] as f32) as i8 as u8;
    let random = normal(seed, 4 * words * of);
    random
        .chunks_exact(4)
        .map(|x| u32::from_le_bytes([byte(x[0]), byte(x[1]), byte(x[2]), byte(x[3])]))
        .collect()
}

#[test]
fn products_are_sums_of_blocks_times_both_scales() {
    for (set, kernels) in tables() {
        let (rows, width, panels) = (2 * kernels.rows, kernels.packing.width, 2);
        for blocks in [1, 2, 3, 5, 8] {
            let mut a = operand(1, rows, blocks * ROW_WORDS, [0, 24]);
            let scales = normal(2, rows * blocks);
            for (block, scale) in a.chunks_exact_mut(ROW_WORDS).zip(&scales) {
                block[BLOCK_WORDS] = scale.to_bits();
            }
            let mut b = operand(3, panels * width, blocks * PANEL_WORDS, [-12, 12]);
            let scales = normal(4, panels * blocks * width);
            for (block, scales) in b.chunks_exact_mut(PANEL_WORDS * width).zip(scales.chunks_exact(width)) {
                block[..width]
                    .iter_mut()
                    .enumerate()
                    .for_each(|(c, start)| *start = (c as u32).wrapping_sub(9));
                for (to, scale) in block[(1 + BLOCK_WORDS) * width..].iter_mut().zip(scales) {
                    *to = scale.to_bits();
                }
            }
            let product = |row: usize, column: usize| -> (f64, f64) {
                let (mut sum, mut size) = (0.0, 0.0);
                for block in 0..blocks {
                    let a = &a[(row * blocks + block) * ROW_WORDS..];
                    let panel = column / width * blocks + block;
                    let b = &b[panel * PANEL_WORDS * width + column % width..];
                    let dot: f64 = (0..BLOCK)
                        .map(|at| 4.0 * code_of(a, 1, at) * code_of(&b[width..], width, at))
                        .sum::<f64>()
                        + f64::from(b[0] as i32);
                    let scale = |word: u32| f64::from(f32::from_bits(word));
                    let term = dot * scale(a[BLOCK_WORDS]) * scale(b[(1 + BLOCK_WORDS) * width]);
                    (sum, size) = (sum + term, size + term.abs());
                }
                (sum, size)
            };
            let mut scores = vec![-7.0; rows * TILE_KEYS];
            kernels.scores_fp4(Scores {
                q: &a,
                k: &b,
                depth: blocks * ROW_WORDS,
                row_groups: 2,
                panels,
                q_scale: &[],
                k_scale: &[2f32.to_bits()],
                scores: &mut scores,
            });
            let before = normal(5, rows * panels * width);
            let (mut out, state) = (before.clone(), factors(rows));
            kernels.values_fp4(Values {
                p: &a,
                p_stride: blocks * ROW_WORDS,
                v: &b,
                panel_words: blocks * PANEL_WORDS * width,
                depth: blocks,
                row_groups: 2,
                panels,
                v_scale: &[2f32.to_bits()],
                out: &mut out,
                state: &state,
            });
            for row in 0..rows {
                for column in 0..panels * width {
                    let what = || format!("{set}, {blocks} blocks, row {row}, column {column}");
                    let (sum, size) = product(row, column);
                    // Three roundings of each term, and one of each sum.
                    let rounding = 6e-8 * (3 + blocks) as f64;
                    close(scores[row * TILE_KEYS + column], 2.0 * sum, 0.0, 2.0 * rounding * size, what);
                    let [alpha, beta] = [&state.alpha, &state.beta].map(|factor| f64::from(factor[row]));
                    let kept = alpha * f64::from(before[row * panels * width + column]);
                    let bound = (rounding + 2e-7) * (2.0 * beta * size + kept.abs());
                    close(out[row * panels * width + column], kept + 2.0 * beta * sum, 0.0, bound, what);
                }
                assert!(
                    scores[row * TILE_KEYS + panels * width..][..TILE_KEYS - panels * width]
                        .iter()
                        .all(|x| *x == -7.0)
                );
            }
        }
    }
}

#[test]
fn probabilities_are_rounded_relative_to_the_largest_score_so_far() {
    for (set, kernels) in tables() {
        for (format, levels) in
            [(Fp4Format::Nv, PLevels::One), (Fp4Format::Nv, PLevels::Two), (Fp4Format::Mx, PLevels::One)]
        {
            let rows = kernels.rows + 1;
            let mut state = RowState::default();
            state.reset(rows);
            let mut largest = vec![f32::NEG_INFINITY; rows];
            for (tile, columns) in [(0u64, TILE_KEYS), (1, kernels.packing.width), (2, TILE_KEYS)] {
                let mut scores: Vec<f32> =
                    normal(20 + tile, rows * TILE_KEYS).iter().map(|x| 4.0 * x - tile as f32).collect();
                scores.iter_mut().step_by(7).for_each(|x| *x = f32::NEG_INFINITY);
                let given = scores.clone();
                let mut pairs = vec![0xdead_beef; rows * TILE_KEYS / 2];
                let softmax =
                    Softmax { rows, columns, scores: &mut scores, pairs: &mut pairs, state: &mut state };
                kernels.softmax_fp4(Fp4Softmax { softmax, format, levels });
                for (r, largest) in largest.iter_mut().enumerate() {
                    let row = &given[r * TILE_KEYS..][..columns];
                    *largest = row.iter().fold(*largest, |max, x| max.max(*x));
                    assert_eq!(state.max[r], *largest);
                    let scores: Vec<oracle::Score> = row
                        .iter()
                        .enumerate()
                        .map(|(key, x)| oracle::Score { key, value: f64::from(*x) * std::f64::consts::LN_2 })
                        .collect();
                    let max = f64::from(*largest) * std::f64::consts::LN_2;
                    let wanted = oracle::quantize_p(&scores, max, &Pv::Fp4 { format, levels }).p;
                    let words = &pairs[r * Fp4Softmax::STRIDE..];
                    // The exponential is another one, so that a tie may fall to the other side: few of them do.
                    let differing = wanted
                        .iter()
                        .enumerate()
                        .filter(|&(at, wanted)| (of_row(words, at, 0) - wanted).abs() > 1e-6 * wanted)
                        .count();
                    assert!(
                        differing * 50 <= columns,
                        "{set}, {format:?}, {levels:?}: {differing} of {columns}"
                    );
                }
            }
        }
    }
}
