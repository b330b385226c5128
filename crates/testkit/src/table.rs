//! The cases that every backend runs.

use sage_core::{Alignment, Band, DType, Layout, Preset, Scheme, SmoothK, SmoothQ};

use crate::{Bias, Case, CaseBlocks, CaseMask, Extent, Sequences};

const CAUSAL: Band = Band::causal(Alignment::BottomRight);
const TOP_LEFT: Band = Band::causal(Alignment::TopLeft);
const WINDOW: Band = Band { left: Some(20), right: Some(3), alignment: Alignment::BottomRight };

/// Calls of every kind, small enough for the emulator: shapes, layouts, strides, masks, lengths, and what K and V hold,
/// mostly by the backend's own scheme; and each named scheme once.
pub fn table() -> Vec<Case> {
    let mut cases = shapes();
    cases.extend(masks());
    cases.extend(lengths());
    cases.extend(data());
    // Types in turn; single precision, which no kernel of a GPU takes, is rarer.
    let types = [DType::F16, DType::BF16, DType::F16, DType::BF16, DType::F32];
    for (number, case) in cases.iter_mut().enumerate() {
        case.dtype = types[number % types.len()];
    }
    cases.extend(schemes());
    cases.extend(block_masks());
    cases.extend(pooled_tails());
    cases.extend(dimensions());
    cases.extend(sinks());
    for (number, case) in cases.iter_mut().enumerate() {
        case.seed = 8 * number as u64;
    }
    cases
}

/// Most cases of [`table`] that kernels for a target may refuse: those in f32, more than 256 channels in fewer than 16
/// bits, the schemes that no GPU computes, pooled terms of packed sequences and of windows that hide the first keys, and
/// the operands that older tensor cores lack: FP8 before sm_89, products of bf16 before sm_80.
#[cfg(feature = "emulator")]
pub fn most_refused(target: sage_ptx::Target) -> usize {
    if target.sm() >= 89 { 31 } else { 72 }
}

fn of(q_len: usize, kv_len: usize, head_dim: usize) -> Case {
    Case { q_len, kv_len, head_dim, ..Case::default() }
}

fn int8() -> Option<Scheme> {
    Some(Preset::INT8_PER_TOKEN.scheme(64))
}

/// Sizes of nothing, of one, of one more than a tile, and strides.
fn shapes() -> Vec<Case> {
    vec![
        of(1, 1, 64),
        of(65, 1, 64),
        of(1, 65, 40),
        of(64, 0, 64),
        of(0, 64, 64),
        Case { batch: 0, ..of(5, 5, 64) },
        Case { batch: 2, q_heads: 6, kv_heads: 2, ..of(70, 130, 64) },
        Case { q_heads: 3, layout: Layout::Nhd, ..of(33, 129, 80) },
        Case { batch: 2, q_heads: 4, kv_heads: 1, layout: Layout::Nhd, gap: 8, ..of(20, 70, 128) },
        Case { gap: 3, offset: 1, ..of(70, 100, 31) },
        Case { gap: 8, ..of(65, 100, 256) },
        Case { q_heads: 2, kv_heads: 2, ..of(3, 700, 64) },
    ]
}

/// Bands, masks of every kind and extent, blocks, and soft caps; what no query sees is not a number.
fn masks() -> Vec<Case> {
    // Keys from 130 on, and every key of the second tile but one.
    fn padding([_, _, _, key]: [usize; 4]) -> f32 {
        if key < 130 && (key / 64 != 1 || key == 70) { 0.0 } else { f32::NEG_INFINITY }
    }
    // The first ten rows are padding, and so are the last 50 keys: the least finite number of bf16.
    fn padded([_, _, row, key]: [usize; 4]) -> f32 {
        if row < 10 || key >= 150 { f32::from_bits(0xff7f_0000) } else { 0.0 }
    }
    let heads = Case { batch: 2, q_heads: 4, kv_heads: 2, spoil: Some(f32::NAN), ..of(70, 150, 64) };
    let mut cases = vec![
        Case { band: CAUSAL, ..heads.clone() },
        Case { band: CAUSAL, ..of(150, 70, 64) },
        Case { band: TOP_LEFT, ..heads.clone() },
        Case { band: WINDOW, scheme: int8(), ..heads.clone() },
        Case { band: Band { alignment: Alignment::TopLeft, ..WINDOW }, ..heads.clone() },
        Case { band: Band { alignment: Alignment::Offset(100), ..WINDOW }, ..heads.clone() },
        Case { band: CAUSAL, blocks: Some(CaseBlocks::new(64, 64)), ..heads.clone() },
        Case { blocks: Some(CaseBlocks::new(33, 65)), scheme: int8(), ..heads.clone() },
        Case { softcap: Some(20.0), sm_scale: Some(0.3), ..heads.clone() },
        Case { softcap: Some(5.0), band: CAUSAL, mask: Some(CaseMask::bool(Extent::Rows)), ..heads.clone() },
        Case {
            kv_len: 200,
            mask: Some(CaseMask::bool(Extent::BatchKeys).pattern(padding)),
            scheme: int8(),
            ..heads.clone()
        },
        Case {
            kv_len: 200,
            mask: Some(CaseMask::bias(DType::F32, Extent::Matrix).pattern(padded)),
            spoil: None,
            ..heads.clone()
        },
    ];
    for (number, extent) in
        [Extent::All, Extent::Rows, Extent::BatchKeys, Extent::HeadRows, Extent::Keys, Extent::Matrix]
            .into_iter()
            .enumerate()
    {
        let bias = CaseMask::bias(DType::ALL[number % 3], extent);
        let scheme = if number % 2 == 0 { int8() } else { None };
        cases.push(Case { mask: Some(CaseMask::bool(extent)), scheme, ..heads.clone() });
        cases.push(Case { mask: Some(bias), band: TOP_LEFT, ..heads.clone() });
    }
    cases
}

/// Valid keys of batch entries, and packed sequences, some of them empty.
fn lengths() -> Vec<Case> {
    let heads = Case { q_heads: 4, kv_heads: 2, spoil: Some(f32::NAN), ..of(70, 150, 64) };
    let packed = Sequences::Packed(vec![0, 70, 70, 71, 120], vec![0, 64, 130, 130, 227]);
    let without_queries = Sequences::Packed(vec![0, 0, 40, 40, 70], vec![0, 200, 260, 300, 390]);
    vec![
        Case { batch: 3, sequences: Sequences::Staggered, ..heads.clone() },
        Case { batch: 2, sequences: Sequences::KvLens(vec![150, 0]), band: CAUSAL, ..heads.clone() },
        Case {
            batch: 3,
            sequences: Sequences::Staggered,
            mask: Some(CaseMask::bool(Extent::All)),
            scheme: int8(),
            ..heads.clone()
        },
        Case { sequences: packed.clone(), ..heads.clone() },
        Case {
            sequences: packed.clone(),
            layout: Layout::Nhd,
            band: CAUSAL,
            scheme: int8(),
            ..heads.clone()
        },
        Case { sequences: packed, band: WINDOW, ..heads.clone() },
        Case { sequences: without_queries, band: CAUSAL, ..heads.clone() },
        Case { sequences: Sequences::Packed(vec![0], vec![0]), ..heads },
    ]
}

/// Channels far from zero, and one many times as large as the others.
fn data() -> Vec<Case> {
    let biased = Case { k_bias: Bias::Channels(5.0), v_bias: Bias::Channels(1.0), ..of(130, 150, 64) };
    let rotated = Scheme { rotate: true, ..Preset::INT8_PER_TOKEN.scheme(64) };
    vec![
        Case { scheme: int8(), ..biased.clone() },
        Case { k_bias: Bias::EveryFourth(10.0), scheme: int8(), lse: false, ..biased.clone() },
        Case { outlier: 12.0, scheme: Some(rotated), ..of(130, 150, 64) },
        biased,
    ]
}

/// Block masks of blocks that are made of whole tiles, and of others, beside everything that hides keys as well.
fn block_masks() -> Vec<Case> {
    let blocks = |q, k, kept| Some(CaseBlocks::new(q, k).keeping(kept));
    let case = Case { q_heads: 4, kv_heads: 2, ..of(300, 400, 64) };
    let fp8 = Some(Preset::INT8_FP8.scheme(64));
    let two_level = Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64));
    vec![
        Case { blocks: blocks(128, 64, 0.5), scheme: fp8, ..case.clone() },
        Case { blocks: blocks(64, 128, 0.5), scheme: fp8, band: CAUSAL, ..case.clone() },
        Case { blocks: blocks(64, 64, 0.3), scheme: two_level, layout: Layout::Nhd, ..case.clone() },
        Case { blocks: blocks(128, 128, 0.3), scheme: int8(), dtype: DType::BF16, ..case.clone() },
        Case { blocks: blocks(128, 64, 0.02), head_dim: 128, band: TOP_LEFT, ..case.clone() },
        Case { blocks: blocks(128, 64, 0.0), ..case.clone() },
        Case { blocks: blocks(33, 64, 0.5), kv_len: 0, ..case.clone() },
        Case { mask: Some(CaseMask::bool(Extent::All)), kv_len: 0, scheme: int8(), ..case.clone() },
        Case { mask: Some(CaseMask::bias(DType::F16, Extent::Rows)), kv_len: 1, ..case.clone() },
        Case { blocks: blocks(48, 80, 0.5), mask: Some(CaseMask::bool(Extent::BatchKeys)), ..case.clone() },
        Case {
            batch: 3,
            blocks: blocks(64, 128, 0.5),
            sequences: Sequences::Staggered,
            scheme: int8(),
            ..case.clone()
        },
        Case {
            blocks: blocks(128, 64, 0.5),
            sequences: Sequences::Packed(vec![0, 300, 300, 370], vec![0, 400, 500, 510]),
            scheme: int8(),
            ..case.clone()
        },
        Case {
            blocks: blocks(48, 80, 0.5),
            sequences: Sequences::Packed(vec![0, 70, 300], vec![0, 350, 400]),
            band: TOP_LEFT,
            ..case.clone()
        },
        Case {
            blocks: blocks(64, 64, 0.5),
            mask: Some(CaseMask::bias(DType::F16, Extent::Matrix)),
            softcap: Some(20.0),
            ..case
        },
    ]
}

/// Attention sinks in every form of the softmax's end: rows and parts of them, with smoothed keys and values, beside caps,
/// masks, rows without keys, lengths, blocks that are left out, and log-sum-exps or none.
fn sinks() -> Vec<Case> {
    let case = Case { sinks: true, q_heads: 8, kv_heads: 2, ..of(70, 130, 64) };
    let preset = |preset: Preset| Some(preset.scheme(64));
    let biased = Case { k_bias: Bias::Channels(4.0), ..case.clone() };
    vec![
        case.clone(),
        Case { scheme: int8(), ..biased.clone() },
        Case { scheme: int8(), lse: false, ..biased.clone() },
        Case { scheme: int8(), softcap: Some(5.0), ..biased.clone() },
        Case { scheme: preset(Preset::INT8_FP8), dtype: DType::BF16, ..biased.clone() },
        Case {
            scheme: preset(Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD),
            v_bias: Bias::Channels(3.0),
            ..biased.clone()
        },
        Case { scheme: preset(Preset::SAGE3_NVFP4), ..biased.clone() },
        // Few queries: heads are rows.
        Case { batch: 2, q_len: 1, kv_len: 64, ..case.clone() },
        Case { q_len: 3, kv_len: 700, band: CAUSAL, lse: false, ..case.clone() },
        Case { q_len: 1, kv_len: 300, mask: Some(CaseMask::bool(Extent::Keys)), ..case.clone() },
        Case { q_len: 20, kv_len: 700, scheme: int8(), ..biased.clone() },
        // Rows that see no key.
        Case { band: TOP_LEFT, q_len: 130, kv_len: 70, ..case.clone() },
        Case { band: CAUSAL, q_len: 130, kv_len: 70, scheme: int8(), ..biased.clone() },
        Case { batch: 3, sequences: Sequences::Staggered, band: WINDOW, ..case.clone() },
        Case { mask: Some(CaseMask::bias(DType::F32, Extent::All)), batch: 2, ..case.clone() },
        Case {
            sequences: Sequences::Packed(vec![0, 30, 30, 70], vec![0, 50, 60, 130]),
            band: CAUSAL,
            ..case.clone()
        },
        Case { blocks: Some(CaseBlocks::new(64, 64).keeping(0.5)), scheme: int8(), ..biased.clone() },
        Case {
            blocks: Some(CaseBlocks::new(64, 64).keeping(0.3)),
            pooled_tail: true,
            ..Case { q_len: 150, kv_len: 400, ..case.clone() }
        },
        Case { head_dim: 128, layout: Layout::Nhd, gap: 8, ..case.clone() },
        Case { head_dim: 320, ..case.clone() },
        Case { dtype: DType::F32, ..case },
    ]
}

/// Blocks that are left out and count with their means: of sizes that divide tiles and such that do not, with bands that
/// show parts of them, for every density.
fn pooled_tails() -> Vec<Case> {
    let blocks = |q, k, kept| Some(CaseBlocks::new(q, k).keeping(kept));
    let case = Case { pooled_tail: true, q_heads: 4, kv_heads: 2, ..of(150, 400, 64) };
    let fp8 = Some(Preset::INT8_FP8.scheme(64));
    vec![
        Case { blocks: blocks(64, 64, 0.5), scheme: int8(), ..case.clone() },
        Case { blocks: blocks(128, 64, 0.2), scheme: fp8, k_bias: Bias::Channels(4.0), ..case.clone() },
        Case { blocks: blocks(64, 128, 0.0), dtype: DType::BF16, ..case.clone() },
        Case { blocks: blocks(33, 7, 0.3), lse: false, ..case.clone() },
        Case { blocks: blocks(16, 1, 0.3), kv_len: 150, head_dim: 40, gap: 3, offset: 1, ..case.clone() },
        Case { blocks: blocks(64, 64, 1.0), ..case.clone() },
        Case { blocks: blocks(64, 500, 0.5), ..case.clone() },
        Case { blocks: blocks(64, 64, 0.5), band: CAUSAL, scheme: int8(), ..case.clone() },
        Case { blocks: blocks(33, 48, 0.2), band: CAUSAL, dtype: DType::BF16, q_len: 400, ..case.clone() },
        Case {
            blocks: blocks(64, 100, 0.2),
            band: TOP_LEFT,
            softcap: Some(5.0),
            head_dim: 128,
            ..case.clone()
        },
        Case { blocks: blocks(48, 16, 0.3), band: Band { left: None, ..WINDOW }, ..case.clone() },
        Case { blocks: blocks(64, 64, 0.4), softcap: Some(8.0), k_bias: Bias::Channels(4.0), ..case.clone() },
        Case {
            blocks: blocks(64, 64, 0.4),
            batch: 3,
            sequences: Sequences::Staggered,
            spoil: Some(f32::NAN),
            scheme: int8(),
            layout: Layout::Nhd,
            ..case.clone()
        },
        Case {
            blocks: blocks(64, 32, 0.4),
            batch: 2,
            sequences: Sequences::KvLens(vec![333, 100]),
            band: CAUSAL,
            spoil: Some(f32::NAN),
            ..case.clone()
        },
        // Windows that hide the first keys, which GPUs refuse with any block mask.
        Case { blocks: blocks(32, 20, 0.3), band: WINDOW, q_len: 390, ..case.clone() },
        Case { blocks: blocks(64, 200, 0.3), band: WINDOW, ..case.clone() },
        Case {
            blocks: blocks(48, 80, 0.4),
            sequences: Sequences::Packed(vec![0, 70, 300], vec![0, 350, 400]),
            band: TOP_LEFT,
            spoil: Some(f32::NAN),
            ..case
        },
    ]
}

/// Values of other channels than keys, heads of more than 256 channels, and one batch of keys and values for many of
/// queries; in each, the schemes whose packing or sums depend on channels.
fn dimensions() -> Vec<Case> {
    let of = |head_dim: usize, value_dim| Case {
        value_dim: Some(value_dim),
        q_heads: 4,
        kv_heads: 2,
        k_bias: Bias::Channels(4.0),
        ..of(70, 150, head_dim)
    };
    let with = |preset: Preset, case: Case| Case { scheme: Some(preset.scheme(case.head_dim)), ..case };
    let fixed12 = Scheme { rotate: true, ..Preset::INT8.scheme(576) };
    let smooth_v = Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD;
    let blocks = |q, k, kept| Some(CaseBlocks::new(q, k).keeping(kept));
    vec![
        of(192, 128),
        Case { batch: 2, layout: Layout::Nhd, gap: 8, band: CAUSAL, spoil: Some(f32::NAN), ..of(48, 32) },
        Case { gap: 3, offset: 1, dtype: DType::BF16, ..of(31, 77) },
        Case { q_len: 1, q_heads: 8, kv_heads: 1, kv_len: 300, ..of(576, 512) },
        Case { q_len: 3, kv_len: 300, softcap: Some(20.0), ..of(24, 130) },
        Case { k_bias: Bias::None, ..with(Preset::FULL, of(512, 512)) },
        with(Preset::INT8, of(192, 128)),
        with(Preset::INT8_PER_TOKEN, Case { band: CAUSAL, ..of(576, 512) }),
        with(Preset::INT8_FP8, of(192, 128)),
        with(Preset::SAGE2_INT8_FP16_PER_THREAD, Case { dtype: DType::BF16, ..of(576, 40) }),
        with(smooth_v, Case { v_bias: Bias::Channels(1.0), ..of(40, 512) }),
        with(Preset::SAGE3_NVFP4, of(512, 48)),
        with(Preset::SAGE3_MXFP4, of(64, 288)),
        Case { scheme: Some(fixed12), q_len: 20, ..of(576, 64) },
        with(Preset::INT8, Case { mask: Some(CaseMask::bias(DType::F32, Extent::All)), ..of(64, 24) }),
        Case { blocks: blocks(64, 64, 0.5), ..of(72, 192) },
        // Where scores are of 16 bits, nothing makes a bias small before means of blocks are rounded to as many.
        Case { blocks: blocks(64, 64, 0.4), pooled_tail: true, k_bias: Bias::None, ..of(128, 40) },
        with(Preset::INT8, Case { blocks: blocks(32, 20, 0.4), pooled_tail: true, ..of(40, 128) }),
        Case {
            sequences: Sequences::Packed(vec![0, 30, 70], vec![0, 100, 150]),
            spoil: Some(f32::NAN),
            ..with(Preset::INT8_PER_TOKEN, of(80, 112))
        },
        Case { batch: 3, shared: true, value_dim: None, ..with(Preset::INT8, of(64, 64)) },
        Case { batch: 3, shared: true, layout: Layout::Nhd, band: CAUSAL, ..of(96, 64) },
        Case { batch: 2, shared: true, q_len: 1, value_dim: None, ..of(128, 128) },
        Case {
            batch: 3,
            shared: true,
            sequences: Sequences::Staggered,
            spoil: Some(f32::NAN),
            ..with(Preset::INT8_PER_TOKEN, of(64, 80))
        },
        Case {
            batch: 2,
            shared: true,
            mask: Some(CaseMask::bool(Extent::All)),
            value_dim: None,
            ..with(Preset::SAGE2_INT8_FP8_PER_THREAD, of(64, 64))
        },
    ]
}

/// Each named scheme in bf16, and parts of them that no name has.
fn schemes() -> Vec<Case> {
    let (k_bias, v_bias) = (Bias::Channels(4.0), Bias::Channels(1.0));
    let case = Case { dtype: DType::BF16, k_bias, v_bias, ..of(140, 150, 64) };
    let with = |scheme| Case { scheme: Some(scheme), ..case.clone() };
    let int8 = Preset::INT8_PER_TOKEN.scheme(64);
    let smooth = |q, k| Scheme { smooth: sage_core::Smoothing { q, k, v: false }, ..int8 };
    let mut cases: Vec<Case> = Preset::ALL.iter().map(|preset| with(preset.scheme(64))).collect();
    cases.push(with(smooth(SmoothQ::Block(64), SmoothK::Mean)));
    cases.push(with(smooth(SmoothQ::Sequence, SmoothK::Mean)));
    cases.push(with(smooth(SmoothQ::Off, SmoothK::Sampled(128))));
    cases
}
