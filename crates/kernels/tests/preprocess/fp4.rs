//! K and V in 4 bits: codes, scales, and where they lie.

use sage_core::oracle::{Fp4Rows, Matrix, hadamard, k_token_of_row, subtract};
use sage_core::{DType, Fp4Format};
use sage_emulator::Emulator;
use sage_kernels::preprocess::{
    ColumnStatistics, InputArgs, KeyMean, QuantizeFp4KArgs, QuantizeFp4KConfig, QuantizeFp4VArgs,
    QuantizeFp4VConfig, SampleArgs, SampleConfig,
};
use sage_kernels::{KEY_TILE, Kernel, KeyOrder};

use crate::inputs::{Batch, Fill, Tensor, assert_mean, emulator, folded, launch, poisoned};

const FORMATS: [Fp4Format; 2] = [Fp4Format::Nv, Fp4Format::Mx];

/// A tile of rows of 4-bit floats and, behind them, their scales.
pub struct Fp4Tile<'a> {
    format: Fp4Format,
    rows: usize,
    elements: usize,
    bytes: &'a [u8],
}

impl<'a> Fp4Tile<'a> {
    pub fn new(format: Fp4Format, [rows, elements]: [usize; 2], bytes: &'a [u8]) -> Self {
        assert_eq!(bytes.len(), rows * elements / 2 * 9 / 8);
        Fp4Tile { format, rows, elements, bytes }
    }

    /// A row's codes.
    pub fn codes(&self, row: usize) -> Vec<u8> {
        let bytes = self.elements / 2;
        self.bytes[row * bytes..][..bytes].iter().flat_map(|byte| [byte & 15, byte >> 4]).collect()
    }

    /// A row's scales: of each 64 elements a word, which lies where lane `4 (row mod 8) + row / 8 mod 4` reads it.
    pub fn scales(&self, row: usize) -> Vec<u8> {
        let of_lane = self.rows / 32 * (self.elements / 64);
        let vector = of_lane.min(4);
        let lane = 4 * (row % 8) + row / 8 % 4;
        let words = (0..self.elements / 64).map(|step| {
            let word = step * (self.rows / 32) + row / 32;
            (word / vector * 32 + lane) * vector + word % vector
        });
        let bytes = words.flat_map(|word| {
            let byte = self.rows * self.elements / 2 + 4 * word;
            &self.bytes[byte..byte + 64 / self.format.group()]
        });
        bytes.copied().collect()
    }
}

/// A row of the oracle's, with zeros where it has none.
fn row_of(matrix: &Matrix<u8>, row: usize, width: usize) -> Vec<u8> {
    let mut wanted = if row < matrix.rows() { matrix.row(row).to_vec() } else { Vec::new() };
    wanted.resize(width, 0);
    wanted
}

fn keys(tensor: &Tensor, format: Fp4Format, mean: KeyMean) -> QuantizeFp4KConfig {
    QuantizeFp4KConfig { source: tensor.source, format, order: KeyOrder::Octets, mean, rotate: false }
}

/// Quantises K and compares everything written with the oracle.
#[track_caller]
fn check_keys(tensor: &Tensor, config: &QuantizeFp4KConfig, seed: u64) {
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let (sequences, lead) = (tensor.batch.sequences(), 1 + seed as usize % 3);
    let mut emulator = emulator(seed);
    let input = tensor.input(&mut emulator);
    let out = poisoned(&mut emulator, "out", heads * tiles * config.tile_bytes());
    let means = emulator.uninitialized("mean", tensor.statistics() * 4);
    let sampled = SampleConfig { source: tensor.source, rows: 64, statistics: ColumnStatistics::Mean };
    if config.mean == KeyMean::Given {
        let args = SampleArgs { input, mean: means.address(), ..SampleArgs::default() };
        launch(&emulator, &sampled.program(), folded(sampled.grid(heads, sequences.len())), &args.args());
    }
    let partials = emulator.uninitialized("partials", heads * tiles * width * 4);
    let arrivals = emulator.buffer("arrivals", &vec![0u32; sequences.len() * heads]);
    let args = QuantizeFp4KArgs {
        input,
        out: out.address(),
        mean: means.address(),
        partials: partials.address(),
        arrivals: arrivals.address(),
        key_tiles: tiles as i32,
        lead: lead as i32,
    };
    let grid = config.grid(tensor.batch.max_len(), heads, sequences.len(), lead);
    launch(&emulator, &config.program(), if seed % 2 == 1 { folded(grid) } else { grid }, &args.args());
    let out: Vec<u8> = emulator.read(out);
    let smooth = config.mean != KeyMean::Zero;
    let means: Vec<f32> = if smooth { emulator.read(means) } else { vec![0.0; tensor.statistics()] };
    for (s, sequence) in sequences.iter().enumerate() {
        for head in 0..heads {
            let k = tensor.matrix(sequence, head);
            let mean = &means[(s * heads + head) * width..][..k.width()];
            if config.mean == KeyMean::Collected {
                (0..k.width()).for_each(|c| assert_mean(mean[c], k.column(c)));
            }
            let smoothed = if smooth { subtract(&k, mean) } else { k };
            let rotated = if config.rotate { hadamard(&smoothed) } else { smoothed };
            let expected = Fp4Rows::quantize(&rotated, config.format);
            for tile in 0..sequence.len.div_ceil(KEY_TILE) {
                let start = (head * tiles + sequence.first_tile + tile) * config.tile_bytes();
                let bytes = &out[start..start + config.tile_bytes()];
                let written = Fp4Tile::new(config.format, [KEY_TILE, width], bytes);
                for row in 0..KEY_TILE {
                    let key = match config.order {
                        KeyOrder::Natural => row,
                        KeyOrder::Octets => k_token_of_row(row),
                    };
                    let key = tile * KEY_TILE + key;
                    let name = config.name();
                    let scales = row_of(&expected.scales, key, width / config.format.group());
                    assert_eq!(written.scales(row), scales, "{name}: scales of key {key}, head {head}");
                    let codes = row_of(&expected.codes, key, width);
                    assert_eq!(written.codes(row), codes, "{name}: codes of key {key}, head {head}");
                }
            }
        }
    }
}

/// Runs V's quantiser on a tensor that lies at `input`.
#[track_caller]
pub fn quantised_values(
    emulator: &mut Emulator,
    tensor: &Tensor,
    input: InputArgs,
    config: &QuantizeFp4VConfig,
    fold: bool,
) -> Vec<u8> {
    let (heads, tiles) = (tensor.heads, tensor.batch.tiles());
    let out = poisoned(emulator, "out", heads * tiles * config.tile_bytes());
    let args = QuantizeFp4VArgs { input, out: out.address(), key_tiles: tiles as i32 };
    let grid = config.grid(tensor.batch.max_len(), heads, tensor.batch.sequences().len());
    launch(emulator, &config.program(), if fold { folded(grid) } else { grid }, &args.args());
    emulator.read(out)
}

/// Quantises V and compares everything written with the oracle.
#[track_caller]
fn check_values(tensor: &Tensor, format: Fp4Format, seed: u64) {
    let config = QuantizeFp4VConfig { source: tensor.source, format };
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let mut emulator = emulator(seed);
    let input = tensor.input(&mut emulator);
    let out = quantised_values(&mut emulator, tensor, input, &config, seed % 2 == 1);
    for sequence in &tensor.batch.sequences() {
        for head in 0..heads {
            let expected = Fp4Rows::quantize(&tensor.matrix(sequence, head).transposed(), format);
            for tile in 0..sequence.len.div_ceil(KEY_TILE) {
                let start = (head * tiles + sequence.first_tile + tile) * config.tile_bytes();
                let bytes = &out[start..start + config.tile_bytes()];
                let written = Fp4Tile::new(format, [width, KEY_TILE], bytes);
                // The tile's part of a channel, with zeros beyond the sequence and the head.
                let part = |matrix: &Matrix<u8>, channel: usize, of_tile: usize| {
                    let mut row = row_of(matrix, channel, matrix.width().max((tile + 1) * of_tile));
                    row.drain(tile * of_tile..(tile + 1) * of_tile).collect::<Vec<_>>()
                };
                for channel in 0..width {
                    let name = config.name();
                    let scales = part(&expected.scales, channel, KEY_TILE / format.group());
                    assert_eq!(written.scales(channel), scales, "{name}: scales of channel {channel}");
                    let codes = part(&expected.codes, channel, KEY_TILE);
                    assert_eq!(written.codes(channel), codes, "{name}: channel {channel}, tile {tile}");
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
        (64, 256, true),
        (65, 80, true),
        (130, 72, true),
        (64, 8, true),
        (70, 5, false),
        (65, 129, false),
    ]
    .into_iter()
    .enumerate()
    {
        for (dtype, format) in [DType::F16, DType::BF16].into_iter().zip(FORMATS) {
            let tensor = Tensor::new(dtype, head_dim, aligned, Batch::one(len), 2, Fill::Normal);
            check_keys(&tensor, &keys(&tensor, format, KeyMean::Collected), seed as u64);
            check_values(&tensor, format, seed as u64);
        }
    }
}

#[test]
fn every_kind_of_value() {
    let fills = [
        Fill::Bias,
        Fill::Zeros,
        Fill::Constant,
        Fill::Nan,
        Fill::Infinity,
        Fill::Tiny,
        Fill::Speck,
        Fill::Mixed,
        Fill::Spike,
    ];
    for fill in fills {
        for format in FORMATS {
            let tensor = Tensor::new(DType::BF16, 64, true, Batch::one(130), 2, fill);
            for mean in [KeyMean::Zero, KeyMean::Collected, KeyMean::Given] {
                check_keys(&tensor, &keys(&tensor, format, mean), 0);
            }
            check_values(&tensor, format, 0);
        }
    }
}

#[test]
fn every_order_and_rotation() {
    for head_dim in [64, 128, 256, 40] {
        let tensor = Tensor::new(DType::F16, head_dim, true, Batch::one(70), 2, Fill::Bias);
        for order in [KeyOrder::Natural, KeyOrder::Octets] {
            for (rotate, format) in [(true, Fp4Format::Nv), (false, Fp4Format::Nv), (true, Fp4Format::Mx)] {
                let config = keys(&tensor, format, KeyMean::Collected);
                check_keys(&tensor, &QuantizeFp4KConfig { order, rotate, ..config }, 1);
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
            for mean in [KeyMean::Zero, KeyMean::Collected] {
                check_keys(&tensor, &keys(&tensor, Fp4Format::Nv, mean), 2);
            }
            check_values(&tensor, Fp4Format::Nv, 2);
        }
    }
}
