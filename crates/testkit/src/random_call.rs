//! Random calls, the same whoever computes them: a GPU, or the emulator. A call is made from its number alone.

use std::fmt;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sage_core::{Alignment, Band, DType, Geometry, Layout, MAX_VALUE_DIM, Options, Preset, SmoothK};

use crate::random_geometry::{Strides, Use};
use crate::{MaskKind, Memory, OwnedBlocks, OwnedCall, OwnedMask, for_each_index};

/// Calls that share what kernels are specialised for, so that not every call compiles new ones.
const CALLS_OF_A_KERNEL: usize = 4;

/// Most multiplications of a call's Q·Kᵀ: the oracle takes its time.
const MOST_WORK: usize = 20_000_000;

/// A call with its tensors.
pub struct RandomCall {
    /// Which it is.
    pub number: usize,
    /// The scheme that is asked for, or none for the planner's choice.
    pub preset: Option<Preset>,
    /// The call.
    pub call: OwnedCall,
}

/// What kernels are specialised for.
struct Kind {
    dtype: DType,
    head_dim: usize,
    value_dim: usize,
    /// Whether K and V have one batch entry, which all of Q's share.
    shared: bool,
    preset: Option<Preset>,
    mask: Option<MaskKind>,
    softcap: bool,
    lengths: LengthsKind,
    lse: bool,
    /// Queries and keys of a block of a block mask.
    blocks: Option<[usize; 2]>,
}

#[derive(Clone, Copy, PartialEq)]
enum LengthsKind {
    Dense,
    KvLens,
    Packed,
}

impl Kind {
    /// That of call `number`, with one of `presets` or the planner's choice; of `any_channels`, or of those that GPUs compute in the
    /// scheme.
    fn new(number: usize, presets: &[Preset], any_channels: bool) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(1_000_000 + (number / CALLS_OF_A_KERNEL) as u64);
        let rng = &mut rng;
        let lengths = [LengthsKind::Dense, LengthsKind::Dense, LengthsKind::KvLens, LengthsKind::Packed];
        let lengths = *pick(rng, &lengths);
        let masked = lengths != LengthsKind::Packed && rng.random_bool(0.4);
        let masks = [MaskKind::Bool, MaskKind::Bias(DType::F32), MaskKind::Bias(DType::F16)];
        let masks = [masks[0], masks[1], masks[2], MaskKind::Bias(DType::BF16)];
        let mut kind = Kind {
            dtype: *pick(rng, &[DType::F16, DType::BF16]),
            value_dim: 0,
            shared: false,
            head_dim: *pick(
                rng,
                &[1, 8, 31, 40, 64, 64, 64, 64, 64, 72, 80, 96, 128, 128, 128, 128, 160, 192, 256, 100],
            ),
            preset: rng.random_bool(0.75).then(|| *pick(rng, presets)),
            mask: masked.then(|| *pick(rng, &masks)),
            softcap: rng.random_bool(0.2),
            lengths,
            lse: rng.random_bool(0.6),
            blocks: rng
                .random_bool(0.2)
                .then(|| *pick(rng, &[[128, 64], [64, 128], [64, 64], [128, 128], [48, 80], [16, 32]])),
        };
        kind.shared = lengths != LengthsKind::Packed && rng.random_bool(0.1);
        [kind.head_dim, kind.value_dim] = if any_channels {
            any_dims(rng, kind.head_dim)
        } else {
            dims_of_kernels(number, kind.head_dim, kind.preset)
        };
        kind
    }
}

/// Channels of keys and values, where keys have `head_dim` unless they have more: any.
fn any_dims(rng: &mut ChaCha8Rng, head_dim: usize) -> [usize; 2] {
    let head_dim = if rng.random_bool(0.3) { *pick(rng, &[257, 320, 512, 576]) } else { head_dim };
    let others = rng.random_bool(0.6);
    let value_dim = if others { *pick(rng, &[1, 7, 24, 64, 96, 128, 200, 512]) } else { head_dim };
    [head_dim, value_dim.min(MAX_VALUE_DIM)]
}

/// Channels of keys and values where keys have `head_dim`, for call `number`: mostly as many, now and then others, and
/// more than 256 where a GPU's own choice or full precision computes them.
fn dims_of_kernels(number: usize, head_dim: usize, preset: Option<Preset>) -> [usize; 2] {
    let mut rng = ChaCha8Rng::seed_from_u64(2_000_000 + (number / CALLS_OF_A_KERNEL) as u64);
    let rng = &mut rng;
    let large = preset.is_none_or(|preset| preset == Preset::FULL);
    match rng.random_range(0..10) {
        0..=1 => [head_dim, *pick(rng, &[1, 31, 40, 64, 96, 128, 192, 256])],
        2 => [192, 128],
        3 if large => *pick(rng, &[[576, 512], [512, 512], [320, 320], [64, 300], [257, 40]]),
        _ => [head_dim; 2],
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
    /// Call `number`, of sequences of at most `most` rows, by one of `presets` or the planner's choice, of channels that
    /// GPUs compute in it.
    pub fn new(number: usize, most: usize, presets: &[Preset]) -> Self {
        Self::of_kind(number, most, Kind::new(number, presets, false))
    }

    /// The same with any number of channels of keys, and any of values.
    pub fn of_any_channels(number: usize, most: usize, presets: &[Preset]) -> Self {
        Self::of_kind(number, most, Kind::new(number, presets, true))
    }

    fn of_kind(number: usize, most: usize, kind: Kind) -> Self {
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
        let shape = |batch: usize, heads: usize, rows: usize, dim: usize| match (packed, layout) {
            (true, _) => vec![rows, heads, dim],
            (false, Layout::Hnd) => vec![batch, heads, rows, dim],
            (false, Layout::Nhd) => vec![batch, rows, heads, dim],
        };
        let kv_lens = (kind.lengths == LengthsKind::KvLens).then(|| {
            let len = |rng: &mut ChaCha8Rng| match rng.random_range(0..6) {
                0 => 0,
                1 => kv_rows as i32,
                _ => rng.random_range(0..=kv_rows as i32),
            };
            (0..sequences).map(|_| len(rng)).collect::<Vec<i32>>()
        });
        let boundaries = |of: usize| -> Vec<i32> {
            let ends = lens.iter().scan(0, |end, len| {
                *end += len[of] as i32;
                Some(*end)
            });
            [0].into_iter().chain(ends).collect()
        };

        let strides = Strides::new(rng);
        let mut place = |shape: Vec<usize>, as_what| strides.geometry(rng, &shape, as_what);
        let [q_shape, out_shape] =
            [kind.head_dim, kind.value_dim].map(|dim| shape(sequences, q_heads, q_rows, dim));
        let kv_batch = if kind.shared { 1 } else { sequences };
        let [k_shape, v_shape] =
            [kind.head_dim, kind.value_dim].map(|dim| shape(kv_batch, kv_heads, kv_rows, dim));
        let (q, k) = (place(q_shape, Use::Input), place(k_shape, Use::Input));
        let (v, out) = (place(v_shape, Use::Input), place(out_shape, Use::Output));
        // Rows behind a sequence's valid ones hold what is in memory, such as NaN.
        let row = if layout == Layout::Hnd { 2 } else { 1 };
        let valid = |index: &[usize]| {
            let inside = |len: &i32| index[row] < *len as usize;
            kv_lens.as_ref().is_none_or(|lens| match kind.shared {
                true => lens.iter().any(inside),
                false => inside(&lens[index[0]]),
            })
        };
        let q = filled(rng, kind.dtype, q, 0.0, |_| true);
        let smooth = kind.preset.is_none_or(|preset| preset.scheme(kind.head_dim).smooth.k != SmoothK::Off);
        let bias = if smooth && rng.random_bool(0.5) { 2.0 } else { 0.0 };
        let k = filled(rng, kind.dtype, k, bias, valid);
        let v = filled(rng, kind.dtype, v, 0.5, valid);

        let mask = kind.mask.map(|kind| random_mask(rng, kind, [sequences, q_heads, q_rows, kv_rows]));
        let band = random_band(rng);
        let sm_scale = rng.random_bool(0.3).then(|| {
            let factor: f32 = rng.random_range(0.3..1.5);
            factor / (kind.head_dim as f32).sqrt()
        });
        let mut options = Options::default()
            .layout(layout)
            .sm_scale(sm_scale)
            .band(band)
            .logit_softcap(kind.softcap.then(|| rng.random_range(5.0..30.0)));
        let cu_seqlens = packed.then(|| (boundaries(0), boundaries(1)));
        let blocks = kind.blocks.map(|[block_q, block_k]| {
            // No kernel counts blocks from another key than the first.
            options.band.left = None;
            let longest = |of: usize| lens.iter().map(|len| len[of]).max().unwrap_or(0);
            let [q_len, kv_len] = if packed { [longest(0), longest(1)] } else { [q_rows, kv_rows] };
            let some = |rng: &mut ChaCha8Rng, size| if rng.random_bool(0.3) { 1 } else { size };
            let (batch, heads) = (some(rng, sequences), some(rng, q_heads));
            let shape = [batch, heads, q_len.div_ceil(block_q), kv_len.div_ceil(block_k)];
            let kept = *pick(rng, &[0.0, 0.1, 0.5, 0.9, 1.0]);
            let visible = (0..shape.iter().product()).map(|_| rng.random_bool(kept)).collect();
            OwnedBlocks::new(visible, &shape, [block_q, block_k])
        });
        // What no backend has: an explicit mask; and packed sequences, which not every backend has.
        options.pooled_tail =
            blocks.is_some() && mask.is_none() && !packed && kv_rows > 0 && rng.random_bool(0.5);
        let sinks = random_sinks(number, q_heads);
        let call = OwnedCall {
            out: out.0,
            options,
            mask,
            blocks,
            kv_lens,
            cu_seqlens,
            sinks,
            lse: kind.lse,
            ..OwnedCall::dense(q, k, v)
        };
        RandomCall { number, preset: kind.preset, call }
    }
}

/// Attention sinks of call `number`, of one kind of call in five: about the log-sum-exps of scores, now and then none.
fn random_sinks(number: usize, heads: usize) -> Option<Vec<f32>> {
    let mut kind = ChaCha8Rng::seed_from_u64(3_000_000 + (number / CALLS_OF_A_KERNEL) as u64);
    let mut rng = ChaCha8Rng::seed_from_u64(4_000_000 + number as u64);
    let sink = |rng: &mut ChaCha8Rng| match rng.random_range(0..8) {
        0 => f32::NEG_INFINITY,
        _ => rng.random_range(-4.0..8.0),
    };
    kind.random_bool(0.2).then(|| (0..heads).map(|_| sink(&mut rng)).collect())
}

fn random_band(rng: &mut ChaCha8Rng) -> Band {
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
    Band { alignment: *pick(rng, &[Alignment::BottomRight, Alignment::TopLeft]), ..band }
}

/// Memory of such a size, with N(0, 1) plus `bias` times an N(0, 1) of each channel where `exists` says so of an
/// element's index, and NaN elsewhere, which must not be read.
fn filled(
    rng: &mut ChaCha8Rng,
    dtype: DType,
    (geometry, len): (Geometry, usize),
    bias: f32,
    exists: impl Fn(&[usize]) -> bool,
) -> Memory {
    let shape = geometry.shape().to_vec();
    let mut normal = || -> f32 { StandardNormal.sample(rng) };
    let channels: Vec<f32> = (0..shape[shape.len() - 1]).map(|_| bias * normal()).collect();
    let mut elements = vec![f32::NAN; len];
    for_each_index(&shape, |index| {
        if exists(index) {
            let mut at = [0; 4];
            at[4 - index.len()..].copy_from_slice(index);
            elements[geometry.index(at) as usize] = normal() + channels[index[index.len() - 1]];
        }
    });
    Memory::new(elements, dtype, geometry)
}

/// Everything but the elements.
impl fmt::Debug for RandomCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let preset = self.preset.map_or("the planner's scheme", |preset| preset.name());
        write!(f, "random call {}, {preset}: {:?}", self.number, self.call)
    }
}

/// A mask broadcastable to `shape`: some dimensions are of size 1, leading ones of those may be missing.
fn random_mask(rng: &mut ChaCha8Rng, kind: MaskKind, shape: [usize; 4]) -> OwnedMask {
    let mut shape = shape.map(|size| if rng.random_bool(0.35) { 1 } else { size }).to_vec();
    while shape.len() > 2 && shape[0] == 1 && rng.random_bool(0.5) {
        shape.remove(0);
    }
    let len = shape.iter().product();
    let geometry = Geometry::contiguous("mask", &shape).unwrap();
    match kind {
        MaskKind::Bool => OwnedMask::Bool((0..len).map(|_| rng.random_bool(0.8)).collect(), geometry),
        MaskKind::Bias(dtype) => {
            let mut bias = || -> f32 {
                let x = StandardNormal.sample(rng);
                if rng.random_bool(0.1) { f32::NEG_INFINITY } else { x }
            };
            OwnedMask::Additive(Memory::new((0..len).map(|_| bias()).collect(), dtype, geometry))
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
