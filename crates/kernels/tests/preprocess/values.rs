//! V's E4M3 codes and scales, and its 16-bit tiles.

use half::{bf16, f16};
use sage_core::oracle::{Fp8Channels, SeenKeys, subtract, v_token_slot};
use sage_core::{DType, ScaleRows};
use sage_kernels::preprocess::{ConvertVArgs, ConvertVConfig};
use sage_kernels::{KEY_TILE, Kernel};

use crate::inputs::{Batch, Fill, Tensor, assert_mean, emulator, launch, poisoned, same};
use crate::value_passes::{QuantizedValues, ValuePasses};

/// Quantises a tensor and compares everything written with the oracle.
#[track_caller]
fn check(tensor: &Tensor, smooth: bool, v_max: f32, seed: u64) {
    check_with_lead(tensor, smooth, v_max, seed, 1 + seed as usize % 3);
}

/// The same with statistics so many heads ahead.
#[track_caller]
fn check_with_lead(tensor: &Tensor, smooth: bool, v_max: f32, seed: u64, lead: usize) {
    check_scales(tensor, smooth, v_max, ScaleRows::All, seed, lead);
}

/// The same with scales from some or all rows.
#[track_caller]
fn check_scales(tensor: &Tensor, smooth: bool, v_max: f32, scale_rows: ScaleRows, seed: u64, lead: usize) {
    let passes = ValuePasses { smooth, v_max, scale_rows, lead, folded: seed % 2 == 1 };
    let config = passes.configs(tensor)[0];
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let sequences = tensor.batch.sequences();
    let mut emulator = emulator(seed);
    let input = tensor.input(&mut emulator);
    let QuantizedValues { out, mean, scale } = passes.run(&mut emulator, tensor, input);
    for (s, sequence) in sequences.iter().enumerate() {
        for head in 0..heads {
            let v = tensor.matrix(sequence, head);
            let at = (s * heads + head) * width;
            let smoothed = if smooth {
                (0..v.width()).for_each(|c| assert_mean(mean[at + c], v.column(c)));
                subtract(&v, &mean[at..at + width])
            } else {
                v.clone()
            };
            let expected =
                Fp8Channels::quantize(&smoothed, v_max, scale_rows, &SeenKeys::all(smoothed.rows()));
            for c in 0..width {
                let wanted = expected.scales.get(c).copied().unwrap_or(0.0);
                let scale = scale[at + c];
                assert!(same(scale, wanted), "{}: scale {c} is {scale}, expected {wanted}", config.name());
            }
            for tile in 0..sequence.len.div_ceil(KEY_TILE) {
                let start = (head * tiles + sequence.first_tile + tile) * config.tile_bytes();
                for c in 0..width {
                    let written = &out[start + c * KEY_TILE..][..KEY_TILE];
                    let mut wanted = [0u8; KEY_TILE];
                    for token in 0..KEY_TILE.min(sequence.len - tile * KEY_TILE) {
                        if c < v.width() {
                            wanted[token / 16 * 16 + v_token_slot(token)] =
                                expected.codes.row(tile * KEY_TILE + token)[c];
                        }
                    }
                    assert_eq!(written, wanted, "{}: channel {c} of tile {tile}, head {head}", config.name());
                }
            }
        }
    }
}

#[test]
fn every_length_and_head_dimension() {
    for (seed, (len, head_dim, aligned)) in [
        (1, 128, true),
        (63, 64, true),
        (64, 128, true),
        (65, 256, true),
        (200, 128, true),
        (130, 80, true),
        (65, 72, true),
        (65, 1, false),
        (70, 5, false),
        (64, 64, false),
    ]
    .into_iter()
    .enumerate()
    {
        for (dtype, v_max) in [(DType::F16, 448.0), (DType::BF16, 2.25)] {
            let tensor = Tensor::new(dtype, head_dim, aligned, Batch::one(len), 2, Fill::Normal);
            for smooth in [false, true] {
                check(&tensor, smooth, v_max, seed as u64);
            }
        }
    }
}

#[test]
fn every_kind_of_value() {
    for fill in [Fill::Bias, Fill::Zeros, Fill::Constant, Fill::Nan, Fill::Infinity, Fill::Tiny, Fill::Mixed]
    {
        let tensor = Tensor::new(DType::BF16, 64, true, Batch::one(130), 2, fill);
        for smooth in [false, true] {
            check(&tensor, smooth, 448.0, 0);
        }
    }
}

#[test]
fn scales_of_sampled_rows() {
    for fill in [
        Fill::Normal,
        Fill::Bias,
        Fill::Zeros,
        Fill::Constant,
        Fill::Nan,
        Fill::Infinity,
        Fill::Tiny,
        Fill::Speck,
        Fill::Mixed,
        Fill::Spike,
    ] {
        for (batch, head_dim, aligned) in [
            (Batch::one(300), 128, true),
            (Batch::Dense { batch: 2, len: 130 }, 5, false),
            (Batch::Packed(vec![3, 0, 64, 230, 0]), 64, true),
        ] {
            let tensor = Tensor::new(DType::F16, head_dim, aligned, batch, 2, fill);
            for (seed, rows) in [64, 128].into_iter().enumerate() {
                check_scales(&tensor, false, 56.0, ScaleRows::Sampled(rows), seed as u64, 2);
            }
        }
    }
}

#[test]
fn sequences_of_different_lengths() {
    for batch in [
        Batch::Dense { batch: 2, len: 65 },
        Batch::KvLens { rows: 140, lens: vec![0, 140, 64, 1] },
        Batch::Packed(vec![3, 0, 64, 130, 0]),
    ] {
        for (head_dim, aligned) in [(128, true), (64, false)] {
            let tensor = Tensor::new(DType::F16, head_dim, aligned, batch.clone(), 2, Fill::Normal);
            for smooth in [false, true] {
                check(&tensor, smooth, 448.0, 2);
            }
        }
    }
}

#[test]
fn statistics_run_ahead_by_any_lead() {
    for (batch, heads, leads) in
        [(Batch::one(40 * 64 - 3), 2, 1..4), (Batch::Packed(vec![130, 0, 65, 64, 0, 1]), 3, 1..20)]
    {
        let tensor = Tensor::new(DType::F16, 64, true, batch, heads, Fill::Bias);
        for lead in leads {
            for seed in 0..3 {
                let seed = seed + 3 * lead as u64;
                check_with_lead(&tensor, seed % 2 == 1, 448.0, seed, lead);
            }
        }
    }
}

#[test]
fn converted_tiles() {
    for batch in [
        Batch::one(65),
        Batch::KvLens { rows: 140, lens: vec![0, 140, 64, 1] },
        Batch::Packed(vec![3, 0, 64, 130, 0]),
    ] {
        for (from, to) in [(DType::BF16, DType::F16), (DType::F16, DType::F16), (DType::F16, DType::BF16)] {
            for (head_dim, aligned) in [(128, true), (80, true), (5, false)] {
                let tensor = Tensor::new(from, head_dim, aligned, batch.clone(), 2, Fill::Bias);
                check_converted(&tensor, to);
            }
        }
    }
}

fn check_converted(tensor: &Tensor, to: DType) {
    let config = ConvertVConfig { source: tensor.source, to };
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let sequences = tensor.batch.sequences();
    let mut emulator = emulator(1);
    let out = poisoned(&mut emulator, "out", heads * tiles * KEY_TILE * width * 2);
    let input = tensor.input(&mut emulator);
    let args = ConvertVArgs { input, out: out.address(), key_tiles: tiles as i32 };
    launch(
        &emulator,
        &config.program(),
        config.grid(tensor.batch.max_len(), heads, sequences.len()),
        &args.args(),
    );
    let out: Vec<u16> = emulator.read(out);
    for sequence in &sequences {
        for head in 0..heads {
            let v = tensor.matrix(sequence, head);
            for row in 0..sequence.len.next_multiple_of(KEY_TILE) {
                let start = ((head * tiles + sequence.first_tile) * KEY_TILE + row) * width;
                let wanted: Vec<u16> = (0..width)
                    .map(|c| match (row < v.rows() && c < v.width(), to) {
                        (false, _) => 0,
                        (true, DType::F16) => f16::from_f32(v.row(row)[c]).to_bits(),
                        (true, _) => bf16::from_f32(v.row(row)[c]).to_bits(),
                    })
                    .collect();
                assert_eq!(out[start..start + width], wanted, "{}: row {row}, head {head}", config.name());
            }
        }
    }
}
