//! Packed tiles and blocks of queries against the oracle's quantisers.

use sage_core::oracle::{self, Fixed12Blocks, IntRows, Matrix, SeenKeys};
use sage_core::{Preset, Qk, SmoothQ};
use sage_testkit::normal;

use super::*;
use crate::InstructionSet;
use crate::isa::{IntWord, Isa};
use crate::testing::{close, fixed12_v, int_lanes, on_each_isa, tables, words};
use crate::tile::{Packing, Rounded, Tile};

fn matrix(rows: usize, width: usize, data: &[f32]) -> Matrix<f32> {
    Matrix::from_fn(rows, width, |i, c| data[i * width + c])
}

const WORDS: [IntWord; 3] = [IntWord::Pair, IntWord::Quad, IntWord::QuadOffset];

/// A word's channels.
fn channels(word: IntWord, x: u32, unsigned: bool) -> Vec<i32> {
    match word {
        IntWord::Pair => vec![x as i16 as i32, (x >> 16) as i16 as i32],
        _ if unsigned => x.to_le_bytes().map(i32::from).to_vec(),
        _ => x.to_le_bytes().map(|x| i32::from(x as i8)).to_vec(),
    }
}

/// Quantisers of the four granularities, both roundings and two widths, on the original's tiles.
fn quantizers() -> Vec<IntQuantizer> {
    let of = |preset: Preset| match preset.scheme(64).qk {
        Qk::Int(quantizer) => quantizer,
        _ => unreachable!("an integer scheme"),
    };
    vec![
        of(Preset::INT8),
        of(Preset::INT8_PER_TOKEN),
        of(Preset::SAGE1_INT8_FP16),
        of(Preset::SAGE2_INT8_FP8_PER_WARP),
        of(Preset::SAGE2_INT8_FP8_SM90_PER_THREAD),
        of(Preset::SAGE2_INT4_FP8),
    ]
}

/// Whether integers are those of the oracle, but for a few that a tie moved by 1.
fn nearly_equal(actual: &[i32], expected: &[i32], what: &str) {
    assert_eq!(actual.len(), expected.len());
    let differing = actual.iter().zip(expected).filter(|(a, e)| a != e);
    assert!(differing.clone().all(|(a, e)| (a - e).abs() == 1), "{what}");
    assert!(differing.count() * 500 <= actual.len(), "{what}");
}

#[test]
fn packed_keys_and_values_are_the_oracles_in_every_word_layout() {
    for (set, kernels) in tables() {
        let plain = WORDS.into_iter().zip([16, 32, 16]).map(|(word, width)| Packing::plain(width, word));
        for packing in plain.chain([kernels.packing]) {
            for (keys, [head_dim, value_dim], rotate) in [
                (1, [1, 1], false),
                (128, [64, 64], false),
                (77, [40, 24], true),
                (100, [6, 130], false),
                (127, [33, 33], false),
                (40, [576, 512], true),
            ] {
                for (n, quantizer) in quantizers().into_iter().enumerate() {
                    let (qk, pv) = (QkForm::Int(quantizer), [PvForm::Fixed12, PvForm::Float][n % 2]);
                    let layout =
                        TileLayout::new(packing, [head_dim, value_dim], qk, pv, rotate, SmoothQ::Off);
                    let what = format!("{set}, {packing:?}, {keys} keys of {head_dim}, {quantizer:?}");
                    let (k, v) = (normal(1, keys * head_dim), normal(2, keys * value_dim));
                    let k = Matrix::from_fn(keys, layout.qk_dim, |j, c| {
                        if c < head_dim { k[j * head_dim + c] } else { 0.0 }
                    });
                    let mut tile = vec![0xdead_beef; layout.words()];
                    kernels.pack_tile(PackTile {
                        layout,
                        first: 256,
                        keys,
                        seen: &[],
                        k: &mut k.as_slice().to_vec(),
                        k_max: &[],
                        v: &mut v.clone(),
                        v_max: &[],
                        tile: &mut tile,
                    });
                    let parts = layout.parts(&tile);
                    // The tile begins a group of every granularity, so the oracle may count from 0.
                    let k = if rotate { oracle::hadamard(&k) } else { k };
                    let all = SeenKeys::all(keys);
                    check_keys(&layout, &parts, &quantizer.quantize_k(&k, &all), &what);
                    let v = matrix(keys, value_dim, &v);
                    match pv {
                        PvForm::Float => check_float_values(&layout, &parts, &v, &what),
                        PvForm::Fixed12 => {
                            let blocks = Fixed12Blocks::quantize(&v, TILE_KEYS, &all);
                            check_fixed12_values(&layout, &parts, &blocks, &what);
                        }
                        other => unreachable!("{other:?} is not among the forms above"),
                    }
                }
            }
        }
    }
}

/// Whether packed keys are those of the oracle, and nothing stands beyond them.
fn check_keys(layout: &TileLayout, tile: &Tile<'_>, oracle: &IntRows, what: &str) {
    let TileLayout { word, width, qk_dim, .. } = *layout;
    let mut ints = Vec::new();
    for key in 0..TILE_KEYS {
        let panel = &tile.k[key / width * layout.k_panel..][..layout.k_panel];
        let (start, words) = panel.split_at(width);
        let row: Vec<i32> =
            (0..layout.depth).flat_map(|d| channels(word, words[d * width + key % width], false)).collect();
        assert_eq!(start[key % width] as i32, -word.q_offset() * row.iter().sum::<i32>(), "{what}");
        assert!(row[qk_dim..].iter().all(|x| *x == 0), "{what}: padding");
        if key < oracle.values.rows() {
            let scale = f64::from(oracle.scales[oracle.groups[key]]);
            close(f32::from_bits(tile.k_scale[key]), scale, 1e-6, 0.0, || what.into());
            ints.extend_from_slice(&row[..qk_dim]);
        } else {
            assert!(tile.k_scale[key] == 0 && row.iter().all(|x| *x == 0), "{what}: keys beyond the end");
        }
    }
    let expected: Vec<i32> = oracle.values.as_slice().iter().map(|x| i32::from(*x)).collect();
    nearly_equal(&ints, &expected, what);
}

/// Whether packed values are `v`, with zeros beyond it.
fn check_float_values(layout: &TileLayout, tile: &Tile<'_>, v: &Matrix<f32>, what: &str) {
    for c in 0..layout.padded_dim() {
        let panel = &tile.v[c / layout.width * layout.v_panel..][..layout.v_panel];
        for j in 0..TILE_KEYS {
            let wanted = if c < layout.value_dim && j < v.rows() { v.row(j)[c] } else { 0.0 };
            assert_eq!(f32::from_bits(panel[j * layout.width + c % layout.width]), wanted, "{what}");
        }
    }
}

/// Whether packed values are the oracle's, with zeros beyond them.
fn check_fixed12_values(layout: &TileLayout, tile: &Tile<'_>, oracle: &Fixed12Blocks, what: &str) {
    for c in 0..layout.padded_dim() {
        let panel = &tile.v[c / layout.width * layout.v_panel..][..layout.v_panel];
        let inside = c < layout.value_dim;
        let scale = if inside { oracle.scales.row(0)[c] } else { 0.0 };
        assert_eq!(f32::from_bits(tile.v_scale[c]), scale, "{what}");
        for j in 0..TILE_KEYS {
            let wanted =
                if inside && j < oracle.values.rows() { i32::from(oracle.values.row(j)[c]) } else { 0 };
            assert_eq!(
                fixed12_v((layout.fixed12, layout.width), panel, j, c % layout.width),
                wanted,
                "{what}"
            );
        }
    }
}

#[test]
fn packed_queries_are_the_oracles_and_their_products_with_keys_exact() {
    fn check<I: Isa>() {
        let word = I::WORD;
        let kernels = crate::kernels(InstructionSet::detected()[0]);
        for (rows, head_dim, first, q_len) in
            [(1, 1, 0, 1), (13, 40, 256, 300), (40, 7, 96, 200), (33, 64, 120, 160), (5, 576, 0, 5)]
        {
            for quantizer in quantizers() {
                let width = 2 * I::LANES;
                let layout = TileLayout::new(
                    Packing::plain(width, word),
                    [head_dim; 2],
                    QkForm::Int(quantizer),
                    PvForm::Float,
                    false,
                    SmoothQ::Off,
                );
                let score_scale = 0.3;
                let all = normal(1, q_len * head_dim);
                let oracle = quantizer
                    .quantize_q(&matrix(q_len, head_dim, &all), score_scale / std::f32::consts::LOG2_E);
                let first_group = quantizer.q_group(first / 128 * 128);
                let mut group_max = vec![0; quantizer.q_group(q_len - 1) + 8];
                for i in first / 128 * 128..q_len {
                    let max = &mut group_max[quantizer.q_group(i) - first_group];
                    *max = absmax_bits(&all[i * head_dim..][..head_dim]).max(*max);
                }
                let mut packed = vec![0xdead_beef; (rows + 3) * layout.depth];
                let mut scale = vec![f32::NAN; rows + 3];
                kernels.pack_queries(PackQueries {
                    layout,
                    first,
                    rows,
                    score_scale,
                    q: &mut all[first * head_dim..][..rows * head_dim].to_vec(),
                    group_max: &group_max,
                    first_group,
                    words: &mut packed,
                    scale: &mut scale,
                });
                let what = format!("{word:?}, {rows} rows of {head_dim} from {first}, {quantizer:?}");
                let after = if quantizer.scale_q_first { 1.0 } else { f64::from(score_scale) };
                let (mut ints, mut expected) = (Vec::new(), Vec::new());
                for i in 0..rows {
                    let wanted = f64::from(oracle.scales[oracle.groups[first + i]]) * after;
                    close(scale[i], wanted, 1e-6, 0.0, || what.clone());
                    let row = &packed[i * layout.depth..][..layout.depth];
                    let row = row.iter().flat_map(|x| channels(word, *x, word == IntWord::QuadOffset));
                    ints.extend(row.take(head_dim).map(|x| x - word.q_offset()));
                    expected.extend(oracle.values.row(first + i).iter().map(|x| i32::from(*x)));
                }
                nearly_equal(&ints, &expected, &what);
                assert!(
                    packed[rows * layout.depth..].iter().all(|x| *x == 0)
                        && scale[rows..].iter().all(|x| *x == 0.0)
                );

                // A panel of keys: what the words multiply to is what the integers multiply to.
                let keys = width.min(TILE_KEYS);
                let k = normal(2, keys * head_dim);
                let mut tile = vec![0; layout.words()];
                kernels.pack_tile(PackTile {
                    layout,
                    first: 0,
                    keys,
                    seen: &[],
                    k: &mut k.clone(),
                    k_max: &[],
                    v: &mut vec![0.0; keys * head_dim],
                    v_max: &[],
                    tile: &mut tile,
                });
                let k_ints = quantizer.quantize_k(&matrix(keys, head_dim, &k), &SeenKeys::all(keys)).values;
                let panel = layout.parts(&tile).k;
                for i in 0..rows {
                    for lane in [0, I::LANES] {
                        // SAFETY: `on_each_isa` names detected sets only.
                        let sums = unsafe {
                            let start = words::<I>(&panel[lane..]);
                            (0..layout.depth).fold(start, |acc, d| {
                                let q = I::splat_int(packed[i * layout.depth + d]);
                                I::dot_int(acc, q, words::<I>(&panel[(d + 1) * width + lane..]))
                            })
                        };
                        for (key, sum) in int_lanes::<I>(sums).into_iter().enumerate() {
                            let k = k_ints.row(lane + key);
                            let wanted: i32 = ints[i * head_dim..][..head_dim]
                                .iter()
                                .zip(k)
                                .map(|(q, k)| q * i32::from(*k))
                                .sum();
                            // A tie in one key channel is worth one query channel.
                            assert!((sum - wanted).abs() <= 127, "{what}: {sum}, expected {wanted}");
                        }
                    }
                }
            }
        }
    }
    on_each_isa!(check);
}

#[test]
fn a_group_that_is_not_finite_has_a_scale_of_nan() {
    for (set, kernels) in tables() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for quantizer in quantizers() {
                for head_dim in [1, 64] {
                    let layout = TileLayout::new(
                        kernels.packing,
                        [head_dim; 2],
                        QkForm::Int(quantizer),
                        PvForm::Fixed12,
                        false,
                        SmoothQ::Off,
                    );
                    let mut k = normal(1, TILE_KEYS * head_dim);
                    k[70 * head_dim..71 * head_dim].fill(bad);
                    let mut v = normal(2, TILE_KEYS * head_dim);
                    v[70 * head_dim] = bad;
                    let mut tile = vec![0; layout.words()];
                    kernels.pack_tile(PackTile {
                        layout,
                        first: 0,
                        keys: TILE_KEYS,
                        seen: &[],
                        k: &mut k,
                        k_max: &[],
                        v: &mut v.clone(),
                        v_max: &[],
                        tile: &mut tile,
                    });
                    let parts = layout.parts(&tile);
                    for key in 0..TILE_KEYS {
                        let wanted = quantizer.k_group(key) == quantizer.k_group(70);
                        assert_eq!(
                            f32::from_bits(parts.k_scale[key]).is_nan(),
                            wanted,
                            "{set}, {bad}, key {key}, {quantizer:?}"
                        );
                    }
                    let nan: Vec<bool> = parts.v_scale.iter().map(|x| f32::from_bits(*x).is_nan()).collect();
                    assert!(nan[0] && nan[1..].iter().all(|x| !x), "{set}, {bad}");
                }
            }
        }
    }
}

#[test]
fn values_of_8_and_16_bits_are_the_oracles() {
    use sage_core::{Accumulator, Pv, ScaleRows};
    let (keys, head_dim) = (100, 24);
    let accumulator = Accumulator::F32;
    for (pv, to) in [
        (Pv::F16(accumulator), Rounded::F16),
        (Pv::BF16(accumulator), Rounded::BF16),
        (Pv::Int8, Rounded::Int8),
        (
            Pv::Fp8 { v_max: 2.25, rows: ScaleRows::All, accumulator },
            Rounded::Fp8 { v_max: 2.25, rows: ScaleRows::All },
        ),
        (
            Pv::Fp8 { v_max: 448.0, rows: ScaleRows::All, accumulator },
            Rounded::Fp8 { v_max: 448.0, rows: ScaleRows::All },
        ),
    ] {
        for (set, kernels) in tables() {
            for size in [1.0, 1e-30, 1e-37, 3e4, 1e30] {
                let mut v: Vec<f32> = normal(5, keys * head_dim).iter().map(|x| x * size).collect();
                // A channel of zeros, and one that holds a NaN.
                (0..keys).for_each(|j| v[j * head_dim] = 0.0);
                v[70 * head_dim + 1] = f32::NAN;
                let rows = matrix(keys, head_dim, &v);
                let expected = oracle::quantize_v(&rows, &pv, &SeenKeys::all(keys));
                let v_max: Vec<f32> = (0..head_dim).map(|c| oracle::absmax(rows.column(c))).collect();
                let (lanes, form) = (kernels.packing, PvForm::Rounded(to));
                let layout = TileLayout::new(lanes, [head_dim; 2], QkForm::Float, form, false, SmoothQ::Off);
                let mut tile = vec![0xdead_beef; layout.words()];
                kernels.pack_tile(PackTile {
                    layout,
                    first: 0,
                    keys,
                    seen: &[],
                    k: &mut vec![0.0; keys * head_dim],
                    k_max: &[],
                    v: &mut v,
                    v_max: &v_max,
                    tile: &mut tile,
                });
                let parts = layout.parts(&tile);
                let later = f64::from(f32::from_bits(parts.v_scale[0]));
                for (j, wanted) in expected.iter().enumerate() {
                    for (c, wanted) in wanted.iter().enumerate() {
                        let word =
                            parts.v[c / layout.width * layout.v_panel + j * layout.width + c % layout.width];
                        let found = f64::from(f32::from_bits(word)) * later;
                        let what = || format!("{set}, {to:?} of {size:e}: key {j}, channel {c}");
                        if !wanted.is_finite() {
                            assert!(!found.is_finite(), "{}: {found}, expected {wanted}", what());
                            continue;
                        }
                        // One rounding of a product by a scale, which below the normal range is a whole step.
                        close(found as f32, *wanted, 2e-7, 1.5e-45, what);
                    }
                }
            }
        }
    }
}
