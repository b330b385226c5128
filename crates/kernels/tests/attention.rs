//! Whole forward passes in the emulator, against the oracle of their scheme: every scheme that a GPU computes, every
//! option, awkward shapes.
//!
//! Tolerances are relative L1 errors against the oracle *of the same scheme*, which sums exactly. What remains is the
//! rounding of the output (2⁻¹¹ relative for f16, 2⁻⁸ for bf16, a quarter of it on average), probabilities rounded relative to a
//! running maximum instead of the final one, and of the accumulators. Each constant is about twice the worst seen.

#[allow(dead_code, reason = "other tests use other parts")]
mod support;

use sage_core::{
    Accumulator, Alignment, Band, DType, Granularity, IntQuantizer, Preset, Pv, Qk, Rounding, Scheme,
    SmoothQ, ZeroGroup,
};
use sage_kernels::forward::int8_scheme;
use sage_ptx::Target;
use support::{Case, MaskKind};

const F16: f64 = 1e-3;
const BF16: f64 = 6e-3;
/// P in E4M3 relative to a running maximum: as exact as before, but other values fall on its coarse grid.
const FP8: f64 = 2e-2;
/// Sums rounded to half precision on their way.
const F16_SUMS: f64 = 6e-3;

fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::BF16 { BF16 } else { F16 }
}

fn full() -> Scheme {
    Preset::FULL.scheme(64)
}

fn with_quantizer(change: impl Fn(&mut IntQuantizer)) -> Scheme {
    let mut scheme = int8_scheme(DType::F16);
    if let Qk::Int(quantizer) = &mut scheme.qk {
        change(quantizer);
    }
    scheme
}

const CAUSAL: Band = Band { left: None, right: Some(0), alignment: Alignment::BottomRight };

#[test]
fn head_dims() {
    for (i, head_dim) in [1, 8, 31, 40, 64, 72, 80, 96, 128, 160, 256].into_iter().enumerate() {
        let dtype = if i % 2 == 0 { DType::F16 } else { DType::BF16 };
        for scheme in [None, Some(full())] {
            let case =
                Case { dtype, head_dim, scheme, q_len: 70, kv_len: 90, k_bias: 3.0, ..Case::default() };
            case.check(tolerance(dtype));
        }
    }
}

#[test]
fn lengths() {
    for (q_len, kv_len) in [(1, 1), (65, 1), (1, 65), (17, 63), (129, 64), (130, 129), (200, 257)] {
        for scheme in [Some(int8_scheme(DType::F16)), Some(full())] {
            Case { q_len, kv_len, scheme, ..Case::default() }.check(F16);
        }
    }
}

#[test]
fn granularities_and_rounding() {
    let all = [Granularity::PerBlock, Granularity::PerWarp, Granularity::PerThread, Granularity::PerToken];
    for granularity in all {
        let scheme = with_quantizer(|q| q.granularity = granularity);
        Case { scheme: Some(scheme), k_bias: 5.0, q_len: 150, ..Case::default() }.check(F16);
    }
    for zero_group in [ZeroGroup::Guard, ZeroGroup::AddToScale, ZeroGroup::ClampMaximum] {
        let scheme = with_quantizer(|q| {
            q.zero_group = zero_group;
            q.rounding = Rounding::HalfAwayFromZero;
            q.scale_q_first = true;
            q.granularity = Granularity::PerBlock;
        });
        Case { scheme: Some(scheme), ..Case::default() }.check(F16);
    }
    let sixteen = with_quantizer(|q| q.tile.warp_q = 16);
    Case { scheme: Some(sixteen), q_len: 150, ..Case::default() }.check(F16);
}

#[test]
fn named_schemes() {
    let f16 = [
        (Preset::SAGE1_INT8_FP16, F16),
        (Preset::SAGE2_INT8_FP16_PER_THREAD, F16),
        (Preset::SAGE2_INT8_FP16_PER_WARP, F16),
        (Preset::SAGE2_INT8_FP16_F16_PER_THREAD, F16_SUMS),
        (Preset::SAGE2_INT8_FP16_F16F32_PER_WARP, F16_SUMS),
        (Preset::SAGE2_INT8_FP8_PER_THREAD, FP8),
        (Preset::SAGE2_INT8_FP8_F32_PER_WARP, FP8),
        (Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD, FP8),
        (Preset::SAGE2PP_INT8_FP8_PER_THREAD, FP8),
        (Preset::SAGE2_INT4_FP8, FP8),
        (Preset::SAGE2PP_INT4_FP8, FP8),
        (Preset::SPARGE_INT8_FP16, F16),
    ];
    for (preset, tolerance) in f16 {
        for head_dim in [64, 128, 256] {
            for dtype in [DType::F16, DType::BF16] {
                let case = Case {
                    scheme: Some(preset.scheme(head_dim)),
                    target: Target::SM_89,
                    head_dim,
                    dtype,
                    q_len: 140,
                    kv_len: 150,
                    k_bias: 4.0,
                    v_bias: 1.0,
                    ..Case::default()
                };
                case.check(tolerance.max(if dtype == DType::BF16 { BF16 } else { 0.0 }));
            }
        }
    }
    // A V of the other 16-bit type.
    let scheme = Scheme { pv: Pv::BF16(Accumulator::F32), ..int8_scheme(DType::F16) };
    Case { scheme: Some(scheme), ..Case::default() }.check(BF16);
}

#[test]
fn smooth_q() {
    for smooth_q in [SmoothQ::Block(64), SmoothQ::Block(128), SmoothQ::Sequence] {
        let mut scheme = int8_scheme(DType::F16);
        scheme.smooth.q = smooth_q;
        let case = Case { scheme: Some(scheme), q_heads: 2, q_len: 200, k_bias: 3.0, ..Case::default() };
        case.check(F16);
    }
}

#[test]
fn bands() {
    for (q_len, kv_len) in [(150, 150), (70, 200), (200, 70)] {
        for alignment in [Alignment::BottomRight, Alignment::TopLeft] {
            for (left, right) in
                [(None, Some(0)), (Some(40), Some(0)), (Some(10), Some(70)), (Some(0), Some(0))]
            {
                let band = Band { left, right, alignment };
                for scheme in [None, Some(full())] {
                    Case { q_len, kv_len, band, scheme, ..Case::default() }.check(F16);
                }
            }
        }
    }
}

#[test]
fn offsets_of_the_diagonal() {
    let cases = [
        (150, 150, None, 64),
        (150, 150, None, -40),
        (70, 200, Some(40), 100),
        (200, 70, Some(10), -90),
        (70, 200, Some(0), 300),
    ];
    for (q_len, kv_len, left, offset) in cases {
        let band = Band { left, right: Some(0), alignment: Alignment::Offset(offset) };
        for (scheme, mask) in [(None, MaskKind::None), (Some(full()), MaskKind::None), (None, MaskKind::Bool)]
        {
            Case { q_len, kv_len, band, scheme, mask, ..Case::default() }.check(F16);
        }
    }
    let band = Band::causal(Alignment::Offset(30));
    Case { batch: 3, kv_lens: Some(vec![100, 0, 65]), band, ..Case::default() }.check(F16);
    let packed = Some((vec![0, 70, 70, 71, 200], vec![0, 64, 130, 130, 227]));
    Case { batch: 4, packed, band, ..Case::default() }.check(F16);
}

#[test]
fn masks() {
    for mask in
        [MaskKind::Bool, MaskKind::Bias(DType::F16), MaskKind::Bias(DType::BF16), MaskKind::Bias(DType::F32)]
    {
        for scheme in [None, Some(full())] {
            let case =
                Case { mask, scheme, batch: 2, q_heads: 2, kv_heads: 1, band: CAUSAL, ..Case::default() };
            case.check(F16);
        }
    }
}

#[test]
fn soft_caps_and_scales() {
    for (softcap, sm_scale) in [(Some(5.0), None), (Some(30.0), Some(0.5)), (None, Some(1.0))] {
        for scheme in [None, Some(full())] {
            let case = Case { softcap, sm_scale, scheme, k_bias: 2.0, q_len: 80, ..Case::default() };
            case.check(2.0 * F16);
        }
    }
}

#[test]
fn grouped_heads_and_batches() {
    let case =
        Case { batch: 2, q_heads: 6, kv_heads: 2, q_len: 70, kv_len: 130, band: CAUSAL, ..Case::default() };
    case.check(F16);
    Case { scheme: Some(full()), dtype: DType::BF16, ..case }.check(BF16);
}

#[test]
fn ragged_lengths() {
    for scheme in [None, Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
        let tolerance = if scheme.is_some_and(|s| matches!(s.pv, Pv::Fp8 { .. })) { FP8 } else { F16 };
        let base = Case { scheme, target: Target::SM_89, q_heads: 2, ..Case::default() };
        let kv_lens = Some(vec![100, 0, 65]);
        Case { batch: 3, kv_lens, band: CAUSAL, ..base.clone() }.check(tolerance);
        let packed = Some((vec![0, 70, 70, 71, 200], vec![0, 64, 130, 130, 227]));
        Case { batch: 4, packed, band: CAUSAL, k_bias: 3.0, ..base }.check(tolerance);
    }
}

#[test]
fn unaligned_rows() {
    for (gap, misaligned) in [(3, 0), (0, 2), (8, 0), (5, 6)] {
        for scheme in [None, Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
            let tolerance = if scheme.is_some_and(|s| matches!(s.pv, Pv::Fp8 { .. })) { FP8 } else { F16 };
            Case { gap, misaligned, scheme, target: Target::SM_89, q_len: 70, ..Case::default() }
                .check(tolerance);
        }
    }
}

#[test]
fn split_keys() {
    for (q_len, kv_len, dtype) in [(1, 1100, DType::F16), (3, 700, DType::BF16), (20, 900, DType::F16)] {
        for band in [Band::FULL, CAUSAL] {
            let case = Case {
                q_len,
                kv_len,
                dtype,
                band,
                q_heads: 4,
                kv_heads: 2,
                multiprocessors: 40,
                ..Case::default()
            };
            let (computed, _) = case.run();
            assert!(
                computed.kernels.last().is_some_and(|name| name.starts_with("combine")),
                "{:?}",
                computed.kernels
            );
            case.check(tolerance(dtype));
        }
    }
}

/// Tiles of wide heads as given and their queries take more than the 99 KiB of the GPUs that are not in data centres.
#[test]
fn wide_heads_in_full_precision_fit_little_shared_memory() {
    for head_dim in [192, 256] {
        let scheme = Some(full());
        let case = Case { head_dim, scheme, target: Target::SM_86, q_len: 70, kv_len: 70, ..Case::default() };
        let kernels = case.check(F16);
        assert!(kernels.iter().any(|name| name.contains("w4x16x32")), "{kernels:?}");
    }
}
