//! Keys that a mask hides: which they are, and that they are in no mean, no scale and no tile.

#![allow(clippy::unwrap_used, reason = "the helpers of tests are tests too")]

use half::f16;
use sage_core::oracle::{
    Fp8Channels, Matrix, SeenKeys, e2m1_value, hadamard, key_mean, quantize_v, subtract, v_token_slot,
};
use sage_core::{
    Alignment, Band, Call, DType, Fp4Format, Granularity, Inputs, IntBits, Lengths, Mask, Options, PLevels,
    Pv, Rounding, ScaleRows, SmoothK, View, ZeroGroup,
};
use sage_emulator::Emulator;
use sage_kernels::attention::MaskForm;
use sage_kernels::preprocess::{
    ColumnStatistics, InputArgs, KeyMean, QuantizeFp4VConfig, QuantizeKArgs, QuantizeKConfig, RankKeysArgs,
    RankKeysConfig, SEEN_WORDS, SampleArgs, SampleConfig, SeenKeysArgs, SeenKeysConfig,
};
use sage_kernels::{KEY_TILE, Kernel, TensorArg};

use crate::fp4::{Fp4Tile, quantised_values};
use crate::inputs::{Batch, Fill, Random, Tensor, assert_mean, emulator, launch, poisoned, same};
use crate::value_passes::{QuantizedValues, ValuePasses};

/// Biases of each kind: hidden, padding, and others.
const BIASES: [f32; 4] = [f32::NEG_INFINITY, f32::MIN, 0.0, -3.0];

/// A mask of two batch entries, four query heads and two key heads, with what it says of each key.
struct Masked {
    kv_len: usize,
    q_len: usize,
    biases: Vec<f32>,
    kv_lens: Option<Vec<i32>>,
    band: Band,
}

impl Masked {
    /// Most keys are hidden or padding in every row, and some heads see none.
    fn new(q_len: usize, kv_len: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let all_rows: Vec<u64> = (0..2 * 4 * kv_len).map(|_| random.next() % 8).collect();
        let biases = (0..2 * 4 * q_len * kv_len).map(|at| {
            let (head, key) = (at / (q_len * kv_len), at % kv_len);
            match (all_rows[head / 2 * 2 * kv_len + key], head / 2) {
                (_, 3) | (0..3, _) => f32::NEG_INFINITY,
                (3..5, _) => BIASES[random.next() as usize % 2],
                _ => BIASES[random.next() as usize % 4],
            }
        });
        Masked { kv_len, q_len, biases: biases.collect(), kv_lens: None, band: Band::FULL }
    }

    /// What the oracle says, `[batch][kv_head]`, where biases are also a boolean mask's.
    fn oracle(&self, boolean: bool) -> Vec<SeenKeys> {
        let tensor = |heads, len| {
            sage_core::Tensor::new(vec![f16::ZERO; 2 * heads * len * 8], &[2, heads, len, 8]).unwrap()
        };
        let (q, k) = (tensor(4, self.q_len), tensor(2, self.kv_len));
        let shape = [2, 4, self.q_len, self.kv_len];
        let visible: Vec<bool> = self.biases.iter().map(|&x| x > f32::NEG_INFINITY).collect();
        let mask = if boolean {
            Mask::Bool(View::contiguous("mask", &visible, &shape).unwrap())
        } else {
            Mask::Additive(View::contiguous("mask", &self.biases, &shape).unwrap().into())
        };
        let lengths = self.kv_lens.as_deref().map_or(Lengths::Dense, Lengths::KvLens);
        let inputs = Inputs::new(q.view(), k.view(), k.view()).mask(mask).lengths(lengths);
        let call = Call::check(&inputs, &Options::default().band(self.band)).unwrap();
        let of = |sequence| [0, 1].map(|head| SeenKeys::of(&call, &sequence, head));
        call.sequences().flat_map(of).collect()
    }

    /// Writes words and ranks in the emulator: their addresses, and the tiles from a head's to the next.
    fn seen(&self, emulator: &mut Emulator, boolean: bool) -> (InputArgs, [Vec<u32>; 2]) {
        let tiles = self.kv_len.div_ceil(KEY_TILE);
        let mask = if boolean {
            let bytes: Vec<u8> = self.biases.iter().map(|&x| u8::from(x > f32::NEG_INFINITY) * 3).collect();
            emulator.buffer("mask", &bytes).address()
        } else {
            emulator.buffer("mask", &self.biases).address()
        };
        let lens = self.kv_lens.clone().unwrap_or_default();
        let lens = emulator.buffer("kv_lens", &lens).address();
        let words = emulator.uninitialized("seen", 4 * (tiles + 1) * 4 * SEEN_WORDS);
        let ranks = emulator.uninitialized("ranks", 4 * (tiles + 1) * 4);
        let config = SeenKeysConfig {
            mask: if boolean { MaskForm::Bool } else { MaskForm::Bias(DType::F32) },
            lengths: if self.kv_lens.is_some() {
                sage_kernels::Lengths::KvLens
            } else {
                sage_kernels::Lengths::Dense
            },
        };
        let limit = |side: Option<usize>| side.map_or(1 << 30, |reach| reach as i32);
        let rows = (self.q_len * self.kv_len) as i64;
        let args = SeenKeysArgs {
            mask: TensorArg { address: mask, strides: [4 * rows, rows, self.kv_len as i64, 1] },
            group: 2,
            heads: 2,
            sequences: 2,
            rows: self.q_len as i32,
            q_rows: self.q_len as i32,
            kv_rows: self.kv_len as i32,
            cu_seqlens: lens,
            window_left: limit(self.band.left),
            window_right: limit(self.band.right),
            bottom_right: i32::from(self.band.alignment == Alignment::BottomRight),
            seen: words.address(),
            stride_sequence: 2 * (tiles as i32 + 1),
            stride_head: tiles as i32 + 1,
            ..SeenKeysArgs::default()
        };
        launch(emulator, &config.program(), config.grid(self.kv_len, 2, 2), &args.args());
        let rank = RankKeysConfig;
        let args = RankKeysArgs {
            seen: words.address(),
            ranks: ranks.address(),
            tiles: tiles as i32,
            heads: 2,
            sequences: 2,
            stride_sequence: 2 * (tiles as i32 + 1),
            stride_head: tiles as i32 + 1,
        };
        launch(emulator, &rank.program(), rank.grid(2, 2), &args.args());
        let input = InputArgs {
            cu_seqlens: lens,
            seen: words.address(),
            ranks: ranks.address(),
            seen_stride_sequence: 2 * (tiles as i32 + 1),
            seen_stride_head: tiles as i32 + 1,
            ..InputArgs::default()
        };
        (input, [emulator.read(words), emulator.read(ranks)])
    }

    /// K or V in the emulator, with what its rows' mask says.
    fn input(&self, emulator: &mut Emulator, tensor: &Tensor) -> InputArgs {
        let (words, _) = self.seen(emulator, false);
        let rows = tensor.input(emulator);
        InputArgs {
            seen: words.seen,
            ranks: words.ranks,
            seen_stride_sequence: words.seen_stride_sequence,
            seen_stride_head: words.seen_stride_head,
            ..rows
        }
    }

    /// Whether words and ranks are what the oracle says.
    #[track_caller]
    fn check(&self, boolean: bool) {
        let (_, [words, ranks]) = self.seen(&mut emulator(self.kv_len as u64), boolean);
        let tiles = self.kv_len.div_ceil(KEY_TILE);
        for (head, wanted) in self.oracle(boolean).iter().enumerate() {
            let mut counted = 0;
            for tile in 0..tiles {
                let at = head * (tiles + 1) + tile;
                assert_eq!(ranks[at], counted, "rank of tile {tile} of head {head}");
                for index in 0..KEY_TILE {
                    let key = tile * KEY_TILE + index;
                    let bit =
                        |part: usize| words[at * SEEN_WORDS + 2 * part + index / 32] >> (index % 32) & 1 == 1;
                    let there = key < wanted.len();
                    assert_eq!(
                        bit(0),
                        there && wanted.counts(key),
                        "whether key {key} of head {head} counts"
                    );
                    assert_eq!(
                        bit(1),
                        there && wanted.is_visible(key),
                        "whether key {key} of head {head} is visible"
                    );
                    counted += u32::from(bit(0));
                }
            }
            assert_eq!(ranks[head * (tiles + 1) + tiles], counted, "keys of head {head} that count");
        }
    }
}

#[test]
fn every_key_that_some_query_sees_is_found() {
    for (q_len, kv_len) in [(1, 1), (3, 64), (70, 65), (40, 200), (2, 2300)] {
        let mask = Masked::new(q_len, kv_len, (q_len * kv_len) as u64);
        for boolean in [false, true] {
            mask.check(boolean);
        }
    }
}

#[test]
fn bands_and_lengths_hide_keys_as_well() {
    for (left, right) in [(None, Some(0)), (Some(5), Some(2)), (Some(0), None)] {
        for alignment in [Alignment::BottomRight, Alignment::TopLeft] {
            let band = Band { left, right, alignment };
            for boolean in [false, true] {
                Masked { band, ..Masked::new(30, 130, 5) }.check(boolean);
                let kv_lens = Some(vec![70, 0]);
                Masked { band, kv_lens, ..Masked::new(30, 130, 6) }.check(boolean);
            }
        }
    }
}

/// K and V of such a mask, in which keys that no query sees hold something else.
fn spoiled(mask: &Masked, aligned: bool, with: f32) -> (Tensor, Vec<SeenKeys>) {
    let batch = Batch::Dense { batch: 2, len: mask.kv_len };
    let mut tensor = Tensor::new(DType::F16, 64, aligned, batch, 2, Fill::Bias);
    tensor.source.masked = true;
    let seen = mask.oracle(false);
    for (s, sequence) in tensor.batch.sequences().iter().enumerate() {
        for head in 0..2 {
            let hidden = |j: &usize| !seen[2 * s + head].is_visible(*j);
            (0..mask.kv_len).filter(hidden).for_each(|j| tensor.fill_row(sequence, head, j, with));
        }
    }
    (tensor, seen)
}

/// The rows, zeros where no query sees them.
fn visible(rows: &Matrix<f32>, seen: &SeenKeys) -> Matrix<f32> {
    Matrix::from_fn(rows.rows(), rows.width(), |j, c| if seen.is_visible(j) { rows.row(j)[c] } else { 0.0 })
}

#[test]
fn hidden_keys_are_in_no_mean_and_no_scale_of_k() {
    for (seed, (with, aligned)) in
        [(f32::NAN, true), (6e4, true), (f32::INFINITY, false)].into_iter().enumerate()
    {
        let mask = Masked::new(3, 200, 7 + seed as u64);
        let (tensor, seen) = spoiled(&mask, aligned, with);
        for mean in [KeyMean::Zero, KeyMean::Collected, KeyMean::Given] {
            for granularity in [Granularity::PerThread, Granularity::PerBlock, Granularity::PerToken] {
                check_keys(&mask, &tensor, &seen, mean, granularity, seed as u64);
            }
        }
    }
}

fn check_keys(
    mask: &Masked,
    tensor: &Tensor,
    seen: &[SeenKeys],
    mean: KeyMean,
    granularity: Granularity,
    seed: u64,
) {
    let config = QuantizeKConfig {
        source: tensor.source,
        bits: IntBits::Eight,
        granularity,
        rounding: Rounding::NearestEven,
        zero_group: ZeroGroup::Guard,
        mean,
        rotate: granularity == Granularity::PerToken,
    };
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let mut emulator = emulator(seed);
    let input = mask.input(&mut emulator, tensor);
    let out = poisoned(&mut emulator, "out", heads * tiles * config.tile_bytes());
    let scale = poisoned(&mut emulator, "scale", heads * tiles * config.groups() * 4);
    let means = emulator.uninitialized("mean", tensor.statistics() * 4);
    let sampled = SampleConfig { source: tensor.source, rows: 64, statistics: ColumnStatistics::Mean };
    if mean == KeyMean::Given {
        let args = SampleArgs { input, mean: means.address(), ..SampleArgs::default() };
        launch(&emulator, &sampled.program(), sampled.grid(heads, 2), &args.args());
    }
    let partials = emulator.uninitialized("partials", heads * tiles * width * 4);
    let arrivals = emulator.buffer("arrivals", &vec![0u32; 2 * heads]);
    let args = QuantizeKArgs {
        input,
        out: out.address(),
        scale: scale.address(),
        mean: means.address(),
        partials: partials.address(),
        arrivals: arrivals.address(),
        key_tiles: tiles as i32,
        lead: 1,
    };
    launch(&emulator, &config.program(), config.grid(mask.kv_len, heads, 2, 1), &args.args());
    let smooth = match mean {
        KeyMean::Zero => SmoothK::Off,
        KeyMean::Collected => SmoothK::Mean,
        KeyMean::Given => SmoothK::Sampled(64),
    };
    let (out, scale): (Vec<u8>, Vec<f32>) = (emulator.read(out), emulator.read(scale));
    let means: Vec<f32> = if smooth.is_on() { emulator.read(means) } else { vec![0.0; tensor.statistics()] };
    for (s, sequence) in tensor.batch.sequences().iter().enumerate() {
        for head in 0..heads {
            let (k, seen) = (tensor.matrix(sequence, head), &seen[s * heads + head]);
            let mean = &means[(s * heads + head) * width..][..k.width()];
            let counted = seen.counted();
            let rows: Vec<usize> =
                (0..smooth.rows(counted.len())).map(|i| counted[smooth.row(i, counted.len())]).collect();
            (0..k.width()).for_each(|c| assert_mean(mean[c], rows.iter().map(|&row| k.row(row)[c])));
            assert!(key_mean(&k, smooth, seen).iter().all(|x| x.is_finite()));
            let smoothed = visible(&subtract(&k, mean), seen);
            let rotated = if config.rotate { hadamard(&smoothed) } else { smoothed };
            let expected = config.quantizer().quantize_k(&rotated, seen);
            for j in 0..mask.kv_len {
                let tile = head * tiles + sequence.first_tile + j / KEY_TILE;
                let written = &out[tile * config.tile_bytes() + j % KEY_TILE * width..][..k.width()];
                let written: Vec<i8> = written.iter().map(|&x| x as i8).collect();
                assert_eq!(written, expected.values.row(j), "{}: key {j} of head {head}", config.name());
                let group = expected.groups[j] % config.groups();
                let (found, wanted) =
                    (scale[tile * config.groups() + group], expected.scales[expected.groups[j]]);
                assert!(
                    same(found, wanted),
                    "{}: scale of key {j} is {found}, expected {wanted}",
                    config.name()
                );
            }
        }
    }
}

#[test]
fn hidden_keys_are_in_no_scale_and_no_tile_of_v() {
    for (seed, (with, aligned)) in [(f32::NAN, true), (6e4, false)].into_iter().enumerate() {
        let mask = Masked::new(3, 200, 17 + seed as u64);
        let (tensor, seen) = spoiled(&mask, aligned, with);
        for (smooth, rows) in
            [(false, ScaleRows::All), (true, ScaleRows::All), (false, ScaleRows::Sampled(64))]
        {
            check_values(&mask, &tensor, &seen, smooth, rows, seed as u64);
        }
    }
}

fn check_values(
    mask: &Masked,
    tensor: &Tensor,
    seen: &[SeenKeys],
    smooth: bool,
    scale_rows: ScaleRows,
    seed: u64,
) {
    let v_max = if scale_rows == ScaleRows::All { 448.0 } else { 56.0 };
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let mut emulator = emulator(seed);
    let input = mask.input(&mut emulator, tensor);
    let passes = ValuePasses { smooth, v_max, scale_rows, lead: 1, folded: false };
    let QuantizedValues { out, mean, scale } = passes.run(&mut emulator, tensor, input);
    let means = if smooth { mean } else { vec![0.0; tensor.statistics()] };
    for (s, sequence) in tensor.batch.sequences().iter().enumerate() {
        for head in 0..heads {
            let (v, seen) = (tensor.matrix(sequence, head), &seen[s * heads + head]);
            let at = (s * heads + head) * width;
            if smooth {
                let counted = seen.counted();
                let column = |c: usize| counted.iter().map(|&j| v.row(j)[c]).collect::<Vec<_>>();
                (0..v.width()).for_each(|c| assert_mean(means[at + c], column(c).into_iter()));
            }
            let smoothed = visible(&subtract(&v, &means[at..at + v.width()]), seen);
            let expected = Fp8Channels::quantize(&smoothed, v_max, scale_rows, seen);
            for c in 0..v.width() {
                let (found, wanted) = (scale[at + c], expected.scales[c]);
                assert!(same(found, wanted), "scale of channel {c} is {found}, expected {wanted}");
                for j in 0..mask.kv_len {
                    let tile = head * tiles + sequence.first_tile + j / KEY_TILE;
                    let slot = j % KEY_TILE / 16 * 16 + v_token_slot(j % KEY_TILE);
                    let found = out[(tile * width + c) * KEY_TILE + slot];
                    assert_eq!(
                        found,
                        expected.codes.row(j)[c],
                        "key {j} of channel {c}, head {head}, {scale_rows:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn hidden_keys_are_in_no_scale_and_no_tile_of_4_bits() {
    for (seed, (with, aligned)) in [(f32::NAN, true), (6e4, false)].into_iter().enumerate() {
        let mask = Masked::new(3, 200, 27 + seed as u64);
        let (mut tensor, seen) = spoiled(&mask, aligned, with);
        if seed == 1 {
            // Padding, which queries see but no scale: it is cut to what counts.
            for (s, sequence) in tensor.batch.sequences().iter().enumerate() {
                let of_head = &seen[2 * s];
                let padding = |j: &usize| of_head.is_visible(*j) && !of_head.counts(*j);
                let rows: Vec<usize> = (0..mask.kv_len).filter(padding).collect();
                assert!(!rows.is_empty());
                rows.into_iter().for_each(|j| tensor.fill_row(sequence, 0, j, 1e3));
            }
        }
        for format in [Fp4Format::Nv, Fp4Format::Mx] {
            check_fp4_values(&mask, &tensor, &seen, format, seed as u64);
        }
    }
}

fn check_fp4_values(mask: &Masked, tensor: &Tensor, seen: &[SeenKeys], format: Fp4Format, seed: u64) {
    let (heads, tiles, width) = (tensor.heads, tensor.batch.tiles(), tensor.source.padded_dim());
    let config = QuantizeFp4VConfig { source: tensor.source, format };
    let mut emulator = emulator(seed);
    let input = mask.input(&mut emulator, tensor);
    let out = quantised_values(&mut emulator, tensor, input, &config, false);
    let pv = Pv::Fp4 { format, levels: PLevels::One };
    for (s, sequence) in tensor.batch.sequences().iter().enumerate() {
        for head in 0..heads {
            let (v, seen) = (tensor.matrix(sequence, head), &seen[s * heads + head]);
            let expected = quantize_v(&visible(&v, seen), &pv, seen);
            for j in 0..mask.kv_len {
                let start = (head * tiles + sequence.first_tile + j / KEY_TILE) * config.tile_bytes();
                let bytes = &out[start..start + config.tile_bytes()];
                let tile = Fp4Tile::new(format, [width, KEY_TILE], bytes);
                let token = j % KEY_TILE;
                for c in 0..v.width() {
                    let scale = f64::from(format.scale_value(tile.scales(c)[token / format.group()]));
                    let found = scale * f64::from(e2m1_value(tile.codes(c)[token]));
                    let wanted = expected.row(j)[c];
                    let alike = found == wanted || found.is_nan() && wanted.is_nan();
                    assert!(alike, "{format:?}: key {j} of channel {c} is {found}, expected {wanted}");
                }
            }
        }
    }
}
