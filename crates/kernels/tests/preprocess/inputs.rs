//! Tensors that the tests read, laid out as callers lay them out.

use half::{bf16, f16};
use sage_core::DType;
use sage_core::oracle::Matrix;
use sage_emulator::{Buffer, Emulator, EmulatorOptions, Report};
use sage_kernels::preprocess::{InputArgs, Source};
use sage_kernels::{KEY_TILE, Lengths, TensorArg, total_key_tiles};
use sage_ptx::{Arg, Program};

/// What the rows hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fill {
    Normal,
    /// Channels far from zero, each elsewhere.
    Bias,
    Zeros,
    /// The same in all rows.
    Constant,
    /// A NaN in one row.
    Nan,
    /// An infinity in one row.
    Infinity,
    /// So small that scales are subnormal.
    Tiny,
    /// Zeros but for tiny elements in the first row: means so small that scales are a unit of the last place and the
    /// quotients of the zeros too large.
    Speck,
    /// Channels of very different magnitudes, with negative zeros.
    Mixed,
    /// A few rows that are a hundred times the others.
    Spike,
}

/// A sequence's place in a tensor and the workspace.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    pub batch: usize,
    pub start: usize,
    pub len: usize,
    pub first_tile: usize,
}

/// Lengths of sequences.
#[derive(Clone, Debug)]
pub enum Batch {
    Dense { batch: usize, len: usize },
    KvLens { rows: usize, lens: Vec<usize> },
    Packed(Vec<usize>),
}

impl Batch {
    pub fn one(len: usize) -> Batch {
        Batch::Dense { batch: 1, len }
    }

    pub fn lengths(&self) -> Lengths {
        match self {
            Batch::Dense { .. } => Lengths::Dense,
            Batch::KvLens { .. } => Lengths::KvLens,
            Batch::Packed(_) => Lengths::Packed,
        }
    }

    /// Rows of the tensor.
    pub fn rows(&self) -> usize {
        match self {
            Batch::Dense { len, .. } => *len,
            Batch::KvLens { rows, .. } => *rows,
            Batch::Packed(lens) => lens.iter().sum(),
        }
    }

    fn batch(&self) -> usize {
        match self {
            Batch::Dense { batch, .. } => *batch,
            Batch::KvLens { lens, .. } => lens.len(),
            Batch::Packed(_) => 1,
        }
    }

    pub fn max_len(&self) -> usize {
        self.sequences().iter().map(|sequence| sequence.len).max().unwrap_or(0)
    }

    pub fn sequences(&self) -> Vec<Sequence> {
        let dense = |batch: usize, len: usize| Sequence {
            batch,
            start: 0,
            len,
            first_tile: batch * self.rows().div_ceil(KEY_TILE),
        };
        match self {
            Batch::Dense { batch, len } => (0..*batch).map(|batch| dense(batch, *len)).collect(),
            Batch::KvLens { lens, .. } => lens.iter().enumerate().map(|(i, &len)| dense(i, len)).collect(),
            Batch::Packed(lens) => {
                let mut start = 0;
                let of = |(index, &len): (usize, &usize)| {
                    let sequence = Sequence { batch: 0, start, len, first_tile: start / KEY_TILE + index };
                    start += len;
                    sequence
                };
                lens.iter().enumerate().map(of).collect()
            }
        }
    }

    pub fn tiles(&self) -> usize {
        let batch = match self {
            Batch::Packed(lens) => lens.len(),
            _ => self.batch(),
        };
        total_key_tiles(self.lengths(), batch, self.rows())
    }

    /// `cu_seqlens`, or the valid rows of each batch entry.
    pub fn cu_seqlens(&self) -> Vec<i32> {
        match self {
            Batch::Dense { .. } => Vec::new(),
            Batch::KvLens { lens, .. } => lens.iter().map(|&len| len as i32).collect(),
            Batch::Packed(_) => {
                let ends =
                    self.sequences().into_iter().map(|sequence| (sequence.start + sequence.len) as i32);
                [0].into_iter().chain(ends).collect()
            }
        }
    }
}

/// A tensor whose heads are neighbours in a row (NHD), with gaps of NaN between rows.
pub struct Tensor {
    pub source: Source,
    pub batch: Batch,
    pub heads: usize,
    pub strides: [i64; 3],
    data: Vec<u16>,
}

impl Tensor {
    pub fn new(dtype: DType, head_dim: usize, aligned: bool, batch: Batch, heads: usize, fill: Fill) -> Self {
        let source = Source { dtype, head_dim, aligned, lengths: batch.lengths(), masked: false };
        let gap = if aligned { 8 } else { 3 };
        let row = heads * head_dim + gap;
        let rows = batch.rows();
        let strides = [(rows * row) as i64, head_dim as i64, row as i64];
        let mut data = vec![0x7fff; (batch.batch() * rows * row).max(1)];
        let mut random = Random(head_dim as u64 * 1000 + rows as u64 + heads as u64);
        for b in 0..batch.batch() {
            for i in 0..rows {
                for c in 0..heads * head_dim {
                    let channel = c % head_dim;
                    let x = match fill {
                        Fill::Normal | Fill::Nan | Fill::Infinity => random.normal(),
                        Fill::Bias => random.normal() + 10.0 * ((channel * 7 % 13) as f32 - 6.0),
                        Fill::Zeros => 0.0,
                        Fill::Constant => channel as f32 * 0.37 - 3.0,
                        Fill::Spike if i % 37 == 36 => 100.0 * random.normal(),
                        Fill::Spike => random.normal(),
                        Fill::Tiny => (random.next() % 400) as f32 * f32::from_bits(1 << 16),
                        Fill::Speck if i == 0 => (channel % 4) as f32 * f32::from_bits(1 << 16),
                        Fill::Speck => 0.0,
                        Fill::Mixed if random.next().is_multiple_of(9) => -0.0,
                        Fill::Mixed if channel % 5 == 4 => 0.0,
                        Fill::Mixed => random.normal() * ((channel % 11) as f32 - 6.0).exp2(),
                    };
                    let spoiled = i == rows * 2 / 3 && c == (heads * head_dim) / 2;
                    let x = match fill {
                        Fill::Nan if spoiled => f32::NAN,
                        Fill::Infinity if spoiled => f32::NEG_INFINITY,
                        _ => x,
                    };
                    data[(b * rows + i) * row + c] = match dtype {
                        DType::F16 => f16::from_f32(x).to_bits(),
                        _ => bf16::from_f32(x).to_bits(),
                    };
                }
            }
        }
        Tensor { source, batch, heads, strides, data }
    }

    /// The rows of a head of a sequence.
    pub fn matrix(&self, sequence: &Sequence, head: usize) -> Matrix<f32> {
        let [batch, heads, rows] = self.strides.map(|stride| stride as usize);
        Matrix::from_fn(sequence.len, self.source.head_dim, |i, c| {
            let at = sequence.batch * batch + head * heads + (sequence.start + i) * rows + c;
            match self.source.dtype {
                DType::F16 => f16::from_bits(self.data[at]).to_f32(),
                _ => bf16::from_bits(self.data[at]).to_f32(),
            }
        })
    }

    /// Fills row `row` of a head of a sequence.
    pub fn fill_row(&mut self, sequence: &Sequence, head: usize, row: usize, with: f32) {
        let [batch, heads, rows] = self.strides.map(|stride| stride as usize);
        let first = sequence.batch * batch + head * heads + (sequence.start + row) * rows;
        let bits = match self.source.dtype {
            DType::F16 => f16::from_f32(with).to_bits(),
            _ => bf16::from_f32(with).to_bits(),
        };
        self.data[first..first + self.source.head_dim].fill(bits);
    }

    /// In the emulator, with its lengths: begins at an odd place where it is not aligned.
    pub fn input(&self, emulator: &mut Emulator) -> InputArgs {
        let x = emulator.buffer_at("x", &self.data, if self.source.aligned { 16 } else { 2 }).address();
        let cu_seqlens = emulator.buffer("cu_seqlens", &self.batch.cu_seqlens()).address();
        let of = [self.heads, self.batch.sequences().len()];
        let x = TensorArg { address: x, strides: self.strides };
        let rows = InputArgs::unmasked(x, self.batch.rows(), of);
        // As many queries as keys.
        InputArgs { cu_seqlens, cu_seqlens_q: cu_seqlens, q_rows: rows.rows, ..rows }
    }

    /// Floats of `[sequences][heads][padded_dim]`.
    pub fn statistics(&self) -> usize {
        self.batch.sequences().len() * self.heads * self.source.padded_dim()
    }
}

/// An emulator with a given interleaving of warps, and workers for blocks that wait for each other. Few blocks are
/// resident, sometimes only one.
pub fn emulator(seed: u64) -> Emulator {
    Emulator::with_options(EmulatorOptions {
        seed,
        workers: 1 + seed as usize % 3,
        resident_blocks: [1, 3, 40][seed as usize % 3],
        ..EmulatorOptions::default()
    })
}

#[track_caller]
pub fn launch(emulator: &Emulator, program: &Program, grid: [u32; 3], args: &[Arg]) -> Report {
    match emulator.launch(program, grid, args) {
        Ok(report) => report,
        Err(failure) => panic!("{failure}"),
    }
}

/// A grid with fewer rows than it has positions, as one of very many heads.
pub fn folded([x, y, z]: [u32; 3]) -> [u32; 3] {
    [x, 3, (y * z).div_ceil(3)]
}

/// A buffer of bytes that no kernel writes by chance.
pub fn poisoned(emulator: &mut Emulator, name: &str, bytes: usize) -> Buffer {
    emulator.buffer(name, &vec![0xA5u8; bytes])
}

/// Whether two floats are the same bits, or both NaN.
pub fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Asserts that a mean is the exact one within what single precision sums may lose.
#[track_caller]
pub fn assert_mean(mean: f32, column: impl Iterator<Item = f32>) {
    let (mut rows, mut exact, mut magnitude) = (0.0, 0.0, 0.0);
    for x in column.map(f64::from) {
        (rows, exact, magnitude) = (rows + 1.0, exact + x, magnitude + x.abs());
    }
    let rows = f64::max(rows, 1.0);
    let (exact, magnitude) = (exact / rows, magnitude / rows);
    if exact.is_finite() {
        let error = (f64::from(mean) - exact).abs();
        // Half a unit of a single in the sum and in the quotient, and fewer than 2⁴ roundings before.
        assert!(error <= magnitude * f64::exp2(-20.0) + 1e-40, "mean is {mean}, expected {exact}");
    } else {
        assert!(!mean.is_finite(), "mean is {mean}, expected {exact}");
    }
}

/// Pseudo-random numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 31
    }

    fn uniform(&mut self) -> f32 {
        ((self.next() >> 40) as f32 + 0.5) / (1u32 << 24) as f32
    }

    /// A number of the normal distribution (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f32::consts::TAU * self.uniform()).cos()
    }
}
