//! K's integers and scales, and means of columns.

use sage_core::oracle::{Matrix, subtract};
use sage_core::{DType, Granularity, IntBits, Rounding, ZeroGroup};
use sage_kernels::KEY_TILE;
use sage_kernels::preprocess::{
    ColumnStatistics, ColumnStatisticsArgs, ColumnStatisticsConfig, KMean, QuantizeKArgs, QuantizeKConfig,
    fits_fused,
};

use crate::inputs::{Batch, Fill, Tensor, assert_mean, emulator, launch, poisoned, same};

fn config(tensor: &Tensor, mean: KMean) -> QuantizeKConfig {
    QuantizeKConfig {
        source: tensor.source,
        bits: IntBits::Eight,
        granularity: Granularity::PerThread,
        rounding: Rounding::NearestEven,
        zero_group: ZeroGroup::Guard,
        mean,
    }
}

/// Quantises a tensor and compares everything written with the oracle.
#[track_caller]
fn check(tensor: &Tensor, config: &QuantizeKConfig, seed: u64) {
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let (groups, sequences) = (config.groups(), tensor.batch.sequences());
    let mut emulator = emulator(seed);
    let (x, cu_seqlens) = (tensor.upload(&mut emulator), tensor.upload_lengths(&mut emulator));
    let out = poisoned(&mut emulator, "out", heads * tiles * config.tile_bytes());
    let scale = poisoned(&mut emulator, "scale", heads * tiles * groups * 4);
    let mean = match config.mean {
        KMean::Given => {
            // Of zeros, means so small that a scale is a unit of the last place and the quotients too large.
            let zeros = tensor.fill == Fill::Zeros;
            let mean = |i: usize| if zeros { f32::from_bits(i as u32 * 37 % 191) } else { i as f32 * 0.01 };
            let inside = |i: usize| i % width < tensor.source.head_dim;
            let given: Vec<f32> =
                (0..tensor.statistics()).map(|i| if inside(i) { mean(i) } else { 0.0 }).collect();
            emulator.buffer("mean", &given)
        }
        _ => emulator.uninitialized("mean", tensor.statistics() * 4),
    };
    let partials = emulator.uninitialized("partials", heads * tiles * width * 4);
    let arrivals = emulator.buffer("arrivals", &vec![0u32; sequences.len() * heads]);
    let [stride_batch, stride_head, stride_row] = tensor.strides;
    let args = QuantizeKArgs {
        x,
        out: out.address(),
        scale: scale.address(),
        mean: mean.address(),
        partials: partials.address(),
        arrivals: arrivals.address(),
        cu_seqlens,
        stride_batch,
        stride_head,
        stride_row,
        rows: tensor.batch.rows() as i32,
        key_tiles: tiles as i32,
    };
    let grid = config.grid(tensor.batch.max_len(), heads, sequences.len());
    launch(&emulator, &config.program(), grid, &args.args());

    let (out, scale): (Vec<u8>, Vec<f32>) = (emulator.read(out), emulator.read(scale));
    let mean: Vec<f32> = emulator.read(mean);
    for (s, sequence) in sequences.iter().enumerate() {
        for head in 0..heads {
            let k = tensor.matrix(sequence, head);
            let at = (s * heads + head) * width;
            let mean = &mean[at..at + width];
            let smoothed = if config.mean == KMean::None { k.clone() } else { subtract(&k, mean) };
            if config.mean == KMean::Fused {
                (0..k.width()).for_each(|c| assert_mean(mean[c], k.column(c)));
                assert!(mean[k.width()..].iter().all(|&x| x == 0.0), "channels beyond the head's have means");
            }
            let expected = config.quantizer().quantize_k(&smoothed);
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
                    let expected = row_of(&expected.values, tile * KEY_TILE + row, width);
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
            check(&tensor, &config(&tensor, KMean::Fused), seed as u64);
        }
    }
}

#[test]
fn rows_at_odd_addresses() {
    for (len, head_dim) in [(65, 1), (70, 5), (64, 64), (63, 80), (3, 129)] {
        for dtype in [DType::F16, DType::BF16] {
            let tensor = Tensor::new(dtype, head_dim, false, Batch::one(len), 2, Fill::Normal);
            check(&tensor, &config(&tensor, KMean::Fused), 1);
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
                check(&tensor, &QuantizeKConfig { bits, granularity, ..config(&tensor, KMean::Fused) }, 0);
            }
        }
    }
    let tensor = Tensor::new(DType::F16, 64, true, Batch::one(70), 1, Fill::Normal);
    for rounding in [Rounding::NearestEven, Rounding::HalfAwayFromZero] {
        for zero_group in [ZeroGroup::Guard, ZeroGroup::AddToScale, ZeroGroup::ClampMaximum] {
            for mean in [KMean::None, KMean::Given, KMean::Fused] {
                check(&tensor, &QuantizeKConfig { rounding, zero_group, ..config(&tensor, mean) }, 0);
            }
        }
    }
}

#[test]
fn every_kind_of_value() {
    for fill in [Fill::Bias, Fill::Zeros, Fill::Constant, Fill::Nan, Fill::Infinity, Fill::Tiny, Fill::Mixed]
    {
        let tensor = Tensor::new(DType::BF16, 64, true, Batch::one(130), 2, fill);
        for zero_group in [ZeroGroup::Guard, ZeroGroup::AddToScale, ZeroGroup::ClampMaximum] {
            for mean in [KMean::None, KMean::Given, KMean::Fused] {
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
            for mean in [KMean::None, KMean::Fused] {
                check(&tensor, &config(&tensor, mean), 2);
            }
        }
    }
}

#[test]
fn blocks_wait_for_each_other_in_any_order() {
    let tensor =
        Tensor::new(DType::F16, 64, true, Batch::Dense { batch: 1, len: 40 * 64 - 3 }, 2, Fill::Bias);
    for seed in 0..6 {
        check(&tensor, &config(&tensor, KMean::Fused), seed);
    }
    assert!(fits_fused(33, 132) && !fits_fused(34, 132) && !fits_fused(usize::MAX, 132));
}

#[test]
fn means_of_columns_in_a_launch_of_their_own() {
    for (batch, tiles_per_block, aligned) in [
        (Batch::Dense { batch: 2, len: 1100 }, 3, true),
        (Batch::KvLens { rows: 300, lens: vec![0, 300, 64, 1] }, 2, true),
        (Batch::Packed(vec![3, 0, 64, 130, 0]), 1, false),
        (Batch::one(1), 4, true),
    ] {
        for (dtype, head_dim, fill) in
            [(DType::F16, 64, Fill::Bias), (DType::BF16, 128, Fill::Normal), (DType::BF16, 64, Fill::Nan)]
        {
            let tensor = Tensor::new(dtype, head_dim, aligned, batch.clone(), 2, fill);
            check_means(&tensor, tiles_per_block);
        }
    }
}

fn check_means(tensor: &Tensor, tiles_per_block: usize) {
    let config = ColumnStatisticsConfig { source: tensor.source, statistics: ColumnStatistics::Mean };
    let (sequences, width) = (tensor.batch.sequences(), tensor.source.padded_dim());
    let grid = config.grid(tensor.batch.max_len(), tiles_per_block, tensor.heads, sequences.len());
    let mut emulator = emulator(tiles_per_block as u64);
    let mean = emulator.uninitialized("mean", tensor.statistics() * 4);
    let partials = emulator.uninitialized("partials", grid[0] as usize * tensor.statistics() * 4);
    let arrivals = emulator.buffer("arrivals", &vec![0u32; sequences.len() * tensor.heads]);
    let [stride_batch, stride_head, stride_row] = tensor.strides;
    let args = ColumnStatisticsArgs {
        x: tensor.upload(&mut emulator),
        mean: mean.address(),
        partials: partials.address(),
        arrivals: arrivals.address(),
        cu_seqlens: tensor.upload_lengths(&mut emulator),
        stride_batch,
        stride_head,
        stride_row,
        rows: tensor.batch.rows() as i32,
        tiles_per_block: tiles_per_block as i32,
        ..Default::default()
    };
    launch(&emulator, &config.program(), grid, &args.args());
    assert_eq!(emulator.written_bytes(mean), mean.len());
    let mean: Vec<f32> = emulator.read(mean);
    for (s, sequence) in sequences.iter().enumerate() {
        for head in 0..tensor.heads {
            let x = tensor.matrix(sequence, head);
            let mean = &mean[(s * tensor.heads + head) * width..][..width];
            (0..x.width()).for_each(|c| assert_mean(mean[c], x.column(c)));
            assert!(mean[x.width()..].iter().all(|&x| x == 0.0));
        }
    }
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
