//! K's integers and scales, and means of columns.

use sage_core::oracle::{Matrix, SeenKeys, hadamard, subtract};
use sage_core::{DType, Granularity, IntBits, Rounding, SmoothK, ZeroGroup};
use sage_kernels::preprocess::{
    ColumnStatistics, KeyMean, QuantizeKArgs, QuantizeKConfig, SampleArgs, SampleConfig,
};
use sage_kernels::{KEY_TILE, Kernel};

use crate::inputs::{Batch, Fill, Tensor, assert_mean, emulator, folded, launch, poisoned, same};

fn config(tensor: &Tensor, mean: KeyMean) -> QuantizeKConfig {
    QuantizeKConfig {
        source: tensor.source,
        bits: IntBits::Eight,
        granularity: Granularity::PerThread,
        rounding: Rounding::NearestEven,
        zero_group: ZeroGroup::Guard,
        mean,
        rotate: false,
    }
}

/// Quantises a tensor and compares everything written with the oracle.
#[track_caller]
fn check(tensor: &Tensor, config: &QuantizeKConfig, seed: u64) {
    check_with_lead(tensor, config, seed, 1 + seed as usize % 3);
}

/// The same with statistics so many heads ahead.
#[track_caller]
fn check_with_lead(tensor: &Tensor, config: &QuantizeKConfig, seed: u64, lead: usize) {
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let (groups, sequences) = (config.groups(), tensor.batch.sequences());
    let mut emulator = emulator(seed);
    let input = tensor.input(&mut emulator);
    let out = poisoned(&mut emulator, "out", heads * tiles * config.tile_bytes());
    let scale = poisoned(&mut emulator, "scale", heads * tiles * groups * 4);
    let mean = emulator.uninitialized("mean", tensor.statistics() * 4);
    let sampled = SampleConfig {
        source: tensor.source,
        rows: 64 + 64 * (seed as usize % 2),
        statistics: ColumnStatistics::Mean,
    };
    if config.mean == KeyMean::Given {
        let args = SampleArgs {
            input,
            mean: mean.address(),
            scale: 0,
            factor: 0,
            v_max: 0.0,
            counters: 0,
            counter_count: 0,
        };
        let grid = folded(sampled.grid(heads, sequences.len()));
        launch(&emulator, &sampled.program(), grid, &args.args());
    }
    let partials = emulator.uninitialized("partials", heads * tiles * width * 4);
    let arrivals = emulator.buffer("arrivals", &vec![0u32; sequences.len() * heads]);
    let args = QuantizeKArgs {
        input,
        out: out.address(),
        scale: scale.address(),
        mean: mean.address(),
        partials: partials.address(),
        arrivals: arrivals.address(),
        key_tiles: tiles as i32,
        lead: lead as i32,
    };
    let mut grid = config.grid(tensor.batch.max_len(), heads, sequences.len(), lead);
    if seed % 2 == 1 {
        grid = folded(grid);
    }
    launch(&emulator, &config.program(), grid, &args.args());
    let smooth = match config.mean {
        KeyMean::Zero => SmoothK::Off,
        KeyMean::Collected => SmoothK::Mean,
        KeyMean::Given => SmoothK::Sampled(sampled.rows),
    };
    let means = if smooth.is_on() { mean.len() } else { 0 };
    assert_eq!(emulator.written_bytes(mean), means, "means are written of empty sequences too");

    let (out, scale): (Vec<u8>, Vec<f32>) = (emulator.read(out), emulator.read(scale));
    let mean: Vec<f32> = if smooth.is_on() { emulator.read(mean) } else { vec![0.0; tensor.statistics()] };
    for (s, sequence) in sequences.iter().enumerate() {
        for head in 0..heads {
            let k = tensor.matrix(sequence, head);
            let at = (s * heads + head) * width;
            let mean = &mean[at..at + width];
            let smoothed = if smooth.is_on() { subtract(&k, mean) } else { k.clone() };
            if smooth.is_on() {
                let rows: Vec<usize> = (0..smooth.rows(k.rows())).map(|i| smooth.row(i, k.rows())).collect();
                (0..k.width()).for_each(|c| assert_mean(mean[c], rows.iter().map(|&row| k.row(row)[c])));
                assert!(mean[k.width()..].iter().all(|&x| x == 0.0), "channels beyond the head's have means");
            }
            let rotated = if config.rotate { hadamard(&smoothed) } else { smoothed };
            let expected = config.quantizer().quantize_k(&rotated, &SeenKeys::all(rotated.rows()));
            for tile in 0..sequence.len.div_ceil(KEY_TILE) {
                let of_tile = head * tiles + sequence.first_tile + tile;
                for group in 0..groups {
                    let Some(&expected) = expected.scales.get(tile * groups + group) else { continue };
                    let scale = scale[of_tile * groups + group];
                    let name = config.name();
                    assert!(
                        same(scale, expected),
                        "{name}: scale {group} of tile {tile} is {scale}, expected {expected}"
                    );
                }
                for row in 0..KEY_TILE {
                    let bytes = config.tile_bytes() / KEY_TILE;
                    let start = of_tile * config.tile_bytes() + row * bytes;
                    let written = unpack(config.bits, &out[start..start + bytes]);
                    let expected = row_of(&expected.values, tile * KEY_TILE + row, written.len());
                    assert_eq!(written, expected, "{}: row {row} of tile {tile}, head {head}", config.name());
                }
            }
        }
    }
}

fn unpack(bits: IntBits, bytes: &[u8]) -> Vec<i8> {
    match bits {
        IntBits::Eight => bytes.iter().map(|&byte| byte as i8).collect(),
        IntBits::Four => bytes.iter().flat_map(|&byte| [(byte << 4) as i8 >> 4, byte as i8 >> 4]).collect(),
    }
}

/// A row of the oracle's, with zeros where it has none.
fn row_of(values: &Matrix<i8>, row: usize, width: usize) -> Vec<i8> {
    let mut wanted = if row < values.rows() { values.row(row).to_vec() } else { Vec::new() };
    wanted.resize(width, 0);
    wanted
}

#[test]
fn every_length_and_head_dimension() {
    for (seed, (len, head_dim)) in
        [(1, 128), (63, 64), (64, 128), (65, 256), (200, 128), (200, 64), (130, 80), (65, 72), (64, 8)]
            .into_iter()
            .enumerate()
    {
        for (dtype, heads) in [(DType::F16, 2), (DType::BF16, 1)] {
            let tensor = Tensor::new(dtype, head_dim, true, Batch::one(len), heads, Fill::Normal);
            check(&tensor, &config(&tensor, KeyMean::Collected), seed as u64);
        }
    }
}

#[test]
fn rows_at_odd_addresses() {
    for (len, head_dim) in [(65, 1), (70, 5), (64, 64), (63, 80), (3, 129)] {
        for dtype in [DType::F16, DType::BF16] {
            let tensor = Tensor::new(dtype, head_dim, false, Batch::one(len), 2, Fill::Normal);
            check(&tensor, &config(&tensor, KeyMean::Collected), 1);
        }
    }
}

#[test]
fn means_of_a_few_rows() {
    for (seed, (len, head_dim)) in
        [(1, 128), (64, 64), (65, 256), (127, 128), (129, 80), (1000, 64)].into_iter().enumerate()
    {
        for aligned in [true, false] {
            let tensor = Tensor::new(DType::F16, head_dim, aligned, Batch::one(len), 2, Fill::Normal);
            check(&tensor, &config(&tensor, KeyMean::Given), seed as u64);
        }
    }
}

#[test]
fn every_quantiser() {
    for head_dim in [64, 128, 256] {
        let tensor = Tensor::new(DType::BF16, head_dim, true, Batch::one(70), 1, Fill::Bias);
        for bits in [IntBits::Eight, IntBits::Four] {
            for granularity in
                [Granularity::PerBlock, Granularity::PerWarp, Granularity::PerThread, Granularity::PerToken]
            {
                check(
                    &tensor,
                    &QuantizeKConfig { bits, granularity, ..config(&tensor, KeyMean::Collected) },
                    0,
                );
            }
        }
    }
    let tensor = Tensor::new(DType::F16, 64, true, Batch::one(70), 1, Fill::Normal);
    for rounding in [Rounding::NearestEven, Rounding::HalfAwayFromZero] {
        for zero_group in [ZeroGroup::Guard, ZeroGroup::AddToScale, ZeroGroup::ClampMaximum] {
            for mean in [KeyMean::Zero, KeyMean::Collected, KeyMean::Given] {
                check(&tensor, &QuantizeKConfig { rounding, zero_group, ..config(&tensor, mean) }, 0);
            }
        }
    }
}

#[test]
fn rotated_rows() {
    for (len, head_dim) in
        [(65, 64), (130, 128), (64, 256), (70, 40), (63, 96), (3, 8), (65, 31), (66, 1), (64, 160)]
    {
        let aligned = head_dim % 8 == 0;
        let tensor = Tensor::new(DType::BF16, head_dim, aligned, Batch::one(len), 2, Fill::Bias);
        for granularity in [Granularity::PerBlock, Granularity::PerThread, Granularity::PerToken] {
            for mean in [KeyMean::Zero, KeyMean::Collected, KeyMean::Given] {
                check(&tensor, &QuantizeKConfig { rotate: true, granularity, ..config(&tensor, mean) }, 1);
            }
        }
        let four =
            QuantizeKConfig { rotate: true, bits: IntBits::Four, ..config(&tensor, KeyMean::Collected) };
        check(&tensor, &four, 0);
    }
    for fill in [Fill::Zeros, Fill::Constant, Fill::Nan, Fill::Infinity, Fill::Tiny, Fill::Mixed] {
        let tensor =
            Tensor::new(DType::F16, 64, true, Batch::KvLens { rows: 140, lens: vec![0, 140, 65] }, 1, fill);
        for granularity in [Granularity::PerThread, Granularity::PerToken] {
            let config = config(&tensor, KeyMean::Collected);
            check(&tensor, &QuantizeKConfig { rotate: true, granularity, ..config }, 2);
        }
    }
}

#[test]
fn every_kind_of_value() {
    for fill in [Fill::Bias, Fill::Zeros, Fill::Constant, Fill::Nan, Fill::Infinity, Fill::Tiny, Fill::Mixed]
    {
        let tensor = Tensor::new(DType::BF16, 64, true, Batch::one(130), 2, fill);
        for zero_group in [ZeroGroup::Guard, ZeroGroup::AddToScale, ZeroGroup::ClampMaximum] {
            for mean in [KeyMean::Zero, KeyMean::Collected, KeyMean::Given] {
                for granularity in [Granularity::PerThread, Granularity::PerToken] {
                    check(&tensor, &QuantizeKConfig { zero_group, granularity, ..config(&tensor, mean) }, 0);
                }
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
        Batch::Packed(vec![0, 65]),
    ] {
        for (head_dim, aligned) in [(128, true), (64, false)] {
            let tensor = Tensor::new(DType::F16, head_dim, aligned, batch.clone(), 2, Fill::Normal);
            for mean in [KeyMean::Zero, KeyMean::Collected, KeyMean::Given] {
                check(&tensor, &config(&tensor, mean), 2);
            }
        }
    }
}

#[test]
fn statistics_run_ahead_by_any_lead() {
    let long = Batch::Dense { batch: 1, len: 40 * 64 - 3 };
    let packed = Batch::Packed(vec![130, 0, 65, 64, 0, 1]);
    for (batch, heads, leads) in [(long, 2, 1..4), (packed, 3, 1..20)] {
        let tensor = Tensor::new(DType::F16, 64, true, batch, heads, Fill::Bias);
        for lead in leads {
            for seed in 0..3 {
                check_with_lead(&tensor, &config(&tensor, KeyMean::Collected), seed + 3 * lead as u64, lead);
            }
        }
    }
}

#[test]
fn differences_of_a_unit_of_the_last_place() {
    let tensor = Tensor::new(DType::BF16, 64, true, Batch::one(1000), 1, Fill::Speck);
    for zero_group in [ZeroGroup::Guard, ZeroGroup::AddToScale, ZeroGroup::ClampMaximum] {
        for granularity in [Granularity::PerThread, Granularity::PerToken] {
            check(
                &tensor,
                &QuantizeKConfig { zero_group, granularity, ..config(&tensor, KeyMean::Collected) },
                0,
            );
        }
    }
}

#[test]
fn a_grid_has_no_more_positions_than_heads_and_lead() {
    let tensor = Tensor::new(DType::F16, 64, true, Batch::one(1), 1, Fill::Zeros);
    let grid = |mean, sequences, lead| config(&tensor, mean).grid(4096, 32, sequences, lead);
    assert_eq!(grid(KeyMean::Given, 4, 12), [64, 128, 1]);
    assert_eq!(grid(KeyMean::Collected, 4, 12), [128, 140, 1]);
    assert_eq!(grid(KeyMean::Collected, 2048, 1), [128, 32769, 2]);
}

/// What [`crate::keys`] relies on: with a correctly rounded reciprocal, one correction gives the rounded quotient.
#[test]
fn corrected_quotients_are_correctly_rounded() {
    let mut random = crate::inputs::Random(7);
    for _ in 0..4_000_000 {
        let scale = f32::from_bits((random.next() as u32 & 0x007f_ffff) | 0x3f80_0000);
        let quotient = f32::from_bits(
            (random.next() as u32 & 0x007f_ffff) | ((124 + (random.next() % 10) as u32) << 23),
        );
        for x in [scale * quotient, (scale * quotient).next_up(), scale * (quotient.floor() + 0.5)] {
            let inverse = 1.0 / scale;
            let near = x * inverse;
            let corrected = (-near).mul_add(scale, x).mul_add(inverse, near);
            assert_eq!(corrected, x / scale, "{x} / {scale}");
        }
    }
}
