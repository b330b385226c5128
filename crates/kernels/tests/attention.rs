//! Whole forward passes in the emulator, against the oracle of their scheme: every scheme that a GPU computes, every
//! option, awkward shapes.

use sage_core::{
    Accumulator, Alignment, Band, DType, Granularity, IntQuantizer, Preset, Pv, Qk, Rounding, Scheme,
    SmoothQ, ZeroGroup,
};
use sage_kernels::forward::int8_scheme;
use sage_ptx::Target;
use sage_testkit::{Bias, Case, CaseMask, Emulated, Extent, Runner, Sequences, check, check_within};

/// Kernels of 16-bit and integer operands.
fn sm_80() -> Emulated {
    Emulated::on(Target::SM_80)
}

/// Kernels of FP8 operands as well.
fn sm_89() -> Emulated {
    Emulated::on(Target::SM_89)
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
            let k_bias = Bias::Channels(3.0);
            let case = Case { dtype, head_dim, scheme, q_len: 70, kv_len: 90, k_bias, ..Case::default() };
            check(&sm_80(), &case);
        }
    }
}

#[test]
fn lengths() {
    for (q_len, kv_len) in [(1, 1), (65, 1), (1, 65), (17, 63), (129, 64), (130, 129), (200, 257)] {
        for scheme in [Some(int8_scheme(DType::F16)), Some(full())] {
            check(&sm_80(), &Case { q_len, kv_len, scheme, ..Case::default() });
        }
    }
}

#[test]
fn granularities_and_rounding() {
    let all = [Granularity::PerBlock, Granularity::PerWarp, Granularity::PerThread, Granularity::PerToken];
    for granularity in all {
        let scheme = with_quantizer(|q| q.granularity = granularity);
        let k_bias = Bias::Channels(5.0);
        check(&sm_80(), &Case { scheme: Some(scheme), k_bias, q_len: 150, ..Case::default() });
    }
    for zero_group in [ZeroGroup::Guard, ZeroGroup::AddToScale, ZeroGroup::ClampMaximum] {
        let scheme = with_quantizer(|q| {
            q.zero_group = zero_group;
            q.rounding = Rounding::HalfAwayFromZero;
            q.scale_q_first = true;
            q.granularity = Granularity::PerBlock;
        });
        check(&sm_80(), &Case { scheme: Some(scheme), ..Case::default() });
    }
    let sixteen = with_quantizer(|q| q.tile.warp_q = 16);
    check(&sm_80(), &Case { scheme: Some(sixteen), q_len: 150, ..Case::default() });
}

#[test]
fn values_of_the_other_16_bit_type() {
    let scheme = Scheme { pv: Pv::BF16(Accumulator::F32), ..int8_scheme(DType::F16) };
    check(&sm_80(), &Case { scheme: Some(scheme), ..Case::default() });
}

#[test]
fn smooth_q() {
    for smooth_q in [SmoothQ::Block(64), SmoothQ::Block(128), SmoothQ::Sequence] {
        let mut scheme = int8_scheme(DType::F16);
        scheme.smooth.q = smooth_q;
        let k_bias = Bias::Channels(3.0);
        check(&sm_80(), &Case { scheme: Some(scheme), q_heads: 2, q_len: 200, k_bias, ..Case::default() });
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
                    check(&sm_80(), &Case { q_len, kv_len, band, scheme, ..Case::default() });
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
        let bools = Some(CaseMask::bool(Extent::All));
        for (scheme, mask) in [(None, None), (Some(full()), None), (None, bools)] {
            check(&sm_80(), &Case { q_len, kv_len, band, scheme, mask, ..Case::default() });
        }
    }
    let band = Band::causal(Alignment::Offset(30));
    for (batch, sequences) in [
        (3, Sequences::KvLens(vec![100, 0, 65])),
        (4, Sequences::Packed(vec![0, 70, 70, 71, 200], vec![0, 64, 130, 130, 227])),
    ] {
        check(&sm_80(), &Case { batch, sequences, band, ..Case::default() });
    }
}

#[test]
fn masks() {
    let bias = |dtype| CaseMask::bias(dtype, Extent::All).hiding(0.0);
    for mask in [CaseMask::bool(Extent::All), bias(DType::F16), bias(DType::BF16), bias(DType::F32)] {
        for scheme in [None, Some(full())] {
            let mask = Some(mask);
            check(&sm_80(), &Case { mask, scheme, batch: 2, q_heads: 2, band: CAUSAL, ..Case::default() });
        }
    }
}

#[test]
fn soft_caps_and_scales() {
    for (softcap, sm_scale) in [(Some(5.0), None), (Some(30.0), Some(0.5)), (None, Some(1.0))] {
        for scheme in [None, Some(full())] {
            let k_bias = Bias::Channels(2.0);
            let case = Case { softcap, sm_scale, scheme, k_bias, q_len: 80, ..Case::default() };
            let computed_as = scheme.unwrap_or_else(|| int8_scheme(case.dtype));
            check_within(&sm_80(), &case, &sm_80().tolerance(case.dtype, &computed_as).times(2.0));
        }
    }
}

#[test]
fn grouped_heads_and_batches() {
    let case =
        Case { batch: 2, q_heads: 6, kv_heads: 2, q_len: 70, kv_len: 130, band: CAUSAL, ..Case::default() };
    check(&sm_80(), &case);
    check(&sm_80(), &Case { scheme: Some(full()), dtype: DType::BF16, ..case });
}

#[test]
fn ragged_lengths() {
    for scheme in [None, Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
        let base = Case { scheme, q_heads: 2, band: CAUSAL, ..Case::default() };
        let sequences = Sequences::KvLens(vec![100, 0, 65]);
        check(&sm_89(), &Case { batch: 3, sequences, ..base.clone() });
        let sequences = Sequences::Packed(vec![0, 70, 70, 71, 200], vec![0, 64, 130, 130, 227]);
        check(&sm_89(), &Case { sequences, k_bias: Bias::Channels(3.0), ..base });
    }
}

#[test]
fn unaligned_rows() {
    for (gap, offset) in [(3, 0), (0, 1), (8, 0), (5, 3)] {
        for scheme in [None, Some(full()), Some(Preset::SAGE2_INT8_FP8_PER_THREAD.scheme(64))] {
            check(&sm_89(), &Case { gap, offset, scheme, q_len: 70, ..Case::default() });
        }
    }
}

#[test]
fn split_keys() {
    for (q_len, kv_len, dtype) in [(1, 1100, DType::F16), (3, 700, DType::BF16), (20, 900, DType::F16)] {
        for band in [Band::FULL, CAUSAL] {
            let case = Case { q_len, kv_len, dtype, band, q_heads: 4, kv_heads: 2, ..Case::default() };
            let kernels = check(&sm_80().multiprocessors(40), &case).kernels;
            assert!(kernels.last().is_some_and(|name| name.starts_with("combine")), "{kernels:?}");
        }
    }
}

/// Tiles of wide heads as given and their queries take more than the 99 KiB of the GPUs that are not in data centres.
#[test]
fn wide_heads_in_full_precision_fit_little_shared_memory() {
    for head_dim in [192, 256] {
        let scheme = Some(full());
        let case = Case { head_dim, scheme, q_len: 70, kv_len: 70, ..Case::default() };
        let kernels = check(&Emulated::on(Target::SM_86), &case).kernels;
        let shape = if head_dim == 192 { "w8x16x32x32" } else { "w4x16x32x32" };
        assert!(kernels.iter().any(|name| name.contains(shape)), "{kernels:?}");
    }
}
