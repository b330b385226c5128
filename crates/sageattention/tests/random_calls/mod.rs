//! Random calls, the same whoever computes them: a GPU, or the emulator. A call is made from its number alone.

#![allow(dead_code, reason = "each test uses its own part")]

mod check;
mod memory;

use std::fmt;

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sage_core::{
    Alignment, Band, DType, Geometry, Inputs, Layout, Lengths, Mask, Options, Preset, SmoothK, TensorView,
    View,
};
use sage_kernels::Machine;
use sage_kernels::forward::{ForwardPlan, Request};

pub use check::{Computed, check};
pub use memory::{Memory, UNTOUCHED};
use memory::{Strides, Use};

/// Calls that share what kernels are specialised for, so that not every call compiles new ones.
const CALLS_OF_A_KERNEL: usize = 4;

/// Most multiplications of a call's Q·Kᵀ: the oracle takes its time.
const MOST_WORK: usize = 20_000_000;

/// A call with its tensors.
pub struct RandomCall {
    pub number: usize,
    pub preset: Option<Preset>,
    pub options: Options,
    pub lengths: RandomLengths,
    pub mask: Option<RandomMask>,
    pub lse: bool,
    pub q: Memory,
    pub k: Memory,
    pub v: Memory,
    /// Where the output goes.
    pub out: Memory,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RandomLengths {
    Dense,
    KvLens(Vec<i32>),
    Packed(Vec<i32>, Vec<i32>),
}

/// A mask: a byte for each score, or the bits of what is added.
pub enum RandomMask {
    Bool(Vec<bool>, Geometry),
    F32(Vec<f32>, Geometry),
    Halves(Memory),
}

/// What kernels are specialised for.
struct Kind {
    dtype: DType,
    head_dim: usize,
    preset: Option<Preset>,
    mask: Option<MaskKind>,
    softcap: bool,
    lengths: LengthsKind,
    lse: bool,
}

#[derive(Clone, Copy)]
enum MaskKind {
    Bool,
    Additive(DType),
}

#[derive(Clone, Copy, PartialEq)]
enum LengthsKind {
    Dense,
    KvLens,
    Packed,
}

/// The presets that a GPU computes, for heads of 64 channels.
pub fn presets(gpu: &Machine) -> Vec<Preset> {
    let problem = sage_core::Problem {
        dtype: DType::F16,
        batch: 1,
        num_q_heads: 1,
        num_kv_heads: 1,
        q_len: 100,
        kv_len: 100,
        head_dim: 64,
        sm_scale: 0.125,
        band: Band::FULL,
        logit_softcap: None,
        packed: false,
        masked: false,
        block_masked: false,
    };
    let request = |preset: &Preset| Request { scheme: Some(preset.scheme(64)), ..Request::new(&problem) };
    let computed = |preset: &&Preset| ForwardPlan::new(&problem, &request(preset), gpu).is_ok();
    Preset::ALL.iter().filter(computed).copied().collect()
}

impl Kind {
    /// That of call `number`, with one of `presets` or the planner's choice.
    fn new(number: usize, presets: &[Preset]) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(1_000_000 + (number / CALLS_OF_A_KERNEL) as u64);
        let rng = &mut rng;
        let lengths = [LengthsKind::Dense, LengthsKind::Dense, LengthsKind::KvLens, LengthsKind::Packed];
        let lengths = *pick(rng, &lengths);
        let masked = lengths != LengthsKind::Packed && rng.random_bool(0.4);
        let masks = [MaskKind::Bool, MaskKind::Additive(DType::F32), MaskKind::Additive(DType::F16)];
        let masks = [masks[0], masks[1], masks[2], MaskKind::Additive(DType::BF16)];
        Kind {
            dtype: *pick(rng, &[DType::F16, DType::BF16]),
            head_dim: *pick(
                rng,
                &[1, 8, 31, 40, 64, 64, 64, 64, 64, 72, 80, 96, 128, 128, 128, 128, 160, 192, 256, 100],
            ),
            preset: rng.random_bool(0.75).then(|| *pick(rng, presets)),
            mask: masked.then(|| *pick(rng, &masks)),
            softcap: rng.random_bool(0.2),
            lengths,
            lse: rng.random_bool(0.6),
        }
    }
}

fn pick<'a, T>(rng: &mut ChaCha8Rng, from: &'a [T]) -> &'a T {
    &from[rng.random_range(0..from.len())]
}

/// Few rows, or some up to `most`.
fn random_len(rng: &mut ChaCha8Rng, most: usize) -> usize {
    match rng.random_range(0..20) {
        0..=3 => rng.random_range(0..=3),
        4..=9 => rng.random_range(1..=70),
        _ => rng.random_range(most / 2..=most),
    }
}

impl RandomCall {
    /// Call `number`, of sequences of at most `most` rows, by one of `presets` or the planner's choice.
    pub fn new(number: usize, most: usize, presets: &[Preset]) -> Self {
        let kind = Kind::new(number, presets);
        let mut rng = ChaCha8Rng::seed_from_u64(number as u64);
        let rng = &mut rng;
        let sequences = rng.random_range(1..=4);
        let lens: Vec<[usize; 2]> = (0..sequences).map(|_| [(); 2].map(|()| random_len(rng, most))).collect();
        let longest = lens.iter().map(|[q, k]| q.max(&1) * k.max(&1)).max().unwrap_or(1);
        let (mut kv_heads, mut group) = (rng.random_range(1..=3), rng.random_range(1..=4));
        while sequences * kv_heads * group * longest * kind.head_dim > MOST_WORK && kv_heads * group > 1 {
            (kv_heads, group) = (1, group - usize::from(kv_heads == 1));
        }
        let q_heads = kv_heads * group;

        let layout = *pick(rng, &[Layout::Hnd, Layout::Nhd]);
        let packed = kind.lengths == LengthsKind::Packed;
        let rows = |of: usize| {
            if packed { lens.iter().map(|len| len[of]).sum() } else { lens[0][of] }
        };
        let (q_rows, kv_rows) = (rows(0), rows(1));
        let shape = |heads: usize, rows: usize| match (packed, layout) {
            (true, _) => vec![rows, heads, kind.head_dim],
            (false, Layout::Hnd) => vec![sequences, heads, rows, kind.head_dim],
            (false, Layout::Nhd) => vec![sequences, rows, heads, kind.head_dim],
        };
        let lengths = match kind.lengths {
            LengthsKind::Dense => RandomLengths::Dense,
            LengthsKind::KvLens => {
                let len = |rng: &mut ChaCha8Rng| match rng.random_range(0..6) {
                    0 => 0,
                    1 => kv_rows as i32,
                    _ => rng.random_range(0..=kv_rows as i32),
                };
                RandomLengths::KvLens((0..sequences).map(|_| len(rng)).collect())
            }
            LengthsKind::Packed => {
                let boundaries = |of: usize| {
                    let ends = lens.iter().scan(0, |end, len| {
                        *end += len[of] as i32;
                        Some(*end)
                    });
                    [0].into_iter().chain(ends).collect()
                };
                RandomLengths::Packed(boundaries(0), boundaries(1))
            }
        };

        let strides = Strides::new(rng);
        let mut memory =
            |heads, rows, as_what| Memory::new(rng, kind.dtype, &shape(heads, rows), strides, as_what);
        let (mut q, mut k) = (memory(q_heads, q_rows, Use::Input), memory(kv_heads, kv_rows, Use::Input));
        let (mut v, out) = (memory(kv_heads, kv_rows, Use::Input), memory(q_heads, q_rows, Use::Output));
        // Rows behind a sequence's valid ones hold what is in memory, such as NaN.
        let row = if layout == Layout::Hnd { 2 } else { 1 };
        let valid = |index: &[usize]| match &lengths {
            RandomLengths::KvLens(lens) => index[row] < lens[index[0]] as usize,
            _ => true,
        };
        q.fill(rng, 0.0, |_| true);
        let smooth = kind.preset.is_none_or(|preset| preset.scheme(kind.head_dim).smooth.k != SmoothK::Off);
        let bias = if smooth && rng.random_bool(0.5) { 2.0 } else { 0.0 };
        k.fill(rng, bias, valid);
        v.fill(rng, 0.5, valid);

        let mask = kind.mask.map(|kind| RandomMask::new(rng, kind, [sequences, q_heads, q_rows, kv_rows]));
        let side = |rng: &mut ChaCha8Rng| {
            let most = *pick(rng, &[0, 5, 100]);
            Some(rng.random_range(0..=most))
        };
        let band = match rng.random_range(0..8) {
            0..=2 => Band::FULL,
            3 | 4 => Band { right: Some(0), ..Band::FULL },
            5 => Band { left: side(rng), right: Some(0), ..Band::FULL },
            6 => Band { left: side(rng), right: side(rng), ..Band::FULL },
            _ => Band { left: None, right: side(rng), ..Band::FULL },
        };
        let alignment = *pick(rng, &[Alignment::BottomRight, Alignment::TopLeft]);
        let sm_scale = rng.random_bool(0.3).then(|| {
            let factor: f32 = rng.random_range(0.3..1.5);
            factor / (kind.head_dim as f32).sqrt()
        });
        RandomCall {
            number,
            preset: kind.preset,
            options: Options {
                layout,
                sm_scale,
                band: Band { alignment, ..band },
                logit_softcap: kind.softcap.then(|| rng.random_range(5.0..30.0)),
            },
            lengths,
            mask,
            lse: kind.lse,
            q,
            k,
            v,
            out,
        }
    }

    /// As the oracle takes it.
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            mask: self.mask.as_ref().map(RandomMask::view),
            lengths: match &self.lengths {
                RandomLengths::Dense => Lengths::Dense,
                RandomLengths::KvLens(lens) => Lengths::KvLens(lens),
                RandomLengths::Packed(q, k) => Lengths::Packed { cu_seqlens_q: q, cu_seqlens_k: k },
            },
            ..Inputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }
}

/// Everything but the elements.
impl fmt::Debug for RandomCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let preset = self.preset.map_or("the planner's scheme", |preset| preset.name());
        write!(f, "random call {}, {}, {preset}, lse {}: ", self.number, self.q.dtype, self.lse)?;
        for (name, tensor) in [("q", &self.q), ("k", &self.k), ("v", &self.v), ("out", &self.out)] {
            write!(f, "{name} {:?}, ", tensor.geometry)?;
        }
        if let Some(mask) = &self.mask {
            write!(f, "mask {mask:?}, ")?;
        }
        write!(f, "{:?}, {:?}", self.lengths, self.options)
    }
}

impl RandomMask {
    /// Broadcastable to `shape`: some dimensions are of size 1, leading ones of those may be missing.
    fn new(rng: &mut ChaCha8Rng, kind: MaskKind, shape: [usize; 4]) -> Self {
        let mut shape = shape.map(|size| if rng.random_bool(0.35) { 1 } else { size }).to_vec();
        while shape.len() > 2 && shape[0] == 1 && rng.random_bool(0.5) {
            shape.remove(0);
        }
        let len = shape.iter().product();
        let geometry = Geometry::contiguous("mask", &shape).unwrap();
        let mut bias = || -> f32 {
            let x = StandardNormal.sample(rng);
            if rng.random_bool(0.1) { f32::NEG_INFINITY } else { x }
        };
        match kind {
            MaskKind::Bool => RandomMask::Bool((0..len).map(|_| rng.random_bool(0.8)).collect(), geometry),
            MaskKind::Additive(DType::F32) => RandomMask::F32((0..len).map(|_| bias()).collect(), geometry),
            MaskKind::Additive(dtype) => {
                let bits = |x: f32| match dtype {
                    DType::BF16 => bf16::from_f32(x).to_bits(),
                    _ => f16::from_f32(x).to_bits(),
                };
                RandomMask::Halves(Memory { dtype, bits: (0..len).map(|_| bits(bias())).collect(), geometry })
            }
        }
    }

    pub fn view(&self) -> Mask<'_> {
        match self {
            RandomMask::Bool(visible, geometry) => {
                Mask::Bool(View::strided("mask", visible, *geometry).unwrap())
            }
            RandomMask::F32(bias, geometry) => {
                Mask::Additive(TensorView::F32(View::strided("mask", bias, *geometry).unwrap()))
            }
            RandomMask::Halves(memory) => Mask::Additive(memory.view()),
        }
    }
}

impl fmt::Debug for RandomMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RandomMask::Bool(_, geometry) => write!(f, "bool {geometry:?}"),
            RandomMask::F32(_, geometry) => write!(f, "f32 {geometry:?}"),
            RandomMask::Halves(memory) => write!(f, "{} {:?}", memory.dtype, memory.geometry),
        }
    }
}

/// The numbers of the calls: `SAGE_RANDOM_CALLS` many, or `usual`.
pub fn count(usual: usize) -> usize {
    match std::env::var("SAGE_RANDOM_CALLS") {
        Ok(text) => {
            text.parse().unwrap_or_else(|_| panic!("SAGE_RANDOM_CALLS: value is {text}, expected a number"))
        }
        Err(_) => usual,
    }
}

/// Elements of memory in single precision.
pub fn widened(dtype: DType, bits: &[u16]) -> Vec<f32> {
    match dtype {
        DType::BF16 => bits.reinterpret_cast::<bf16>().iter().map(|x| x.to_f32()).collect(),
        _ => bits.reinterpret_cast::<f16>().iter().map(|x| x.to_f32()).collect(),
    }
}
