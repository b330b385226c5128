//! Quantised schemes against the oracle of the same scheme, and against exact attention.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use sage_core::oracle::{self, Output};
use sage_core::{
    Accumulator, Alignment, Band, DType, Granularity, IntBits, IntQuantizer, Layout, Preset, Pv, Qk, Scheme,
    SmoothK, SmoothQ, Smoothing, Tensor,
};
use sage_cpu::Cpu;
use sage_testkit::{
    Bias, Case, CaseBlocks, CaseMask, Extent, Memory, OwnedCall, OwnedMask, Runner, Sequences, every_cpu,
    normal,
};

/// The distance from exact attention that is claimed for INT8. Measured worst: 1.34e-2 on N(0, 1) per block, 9.3e-3
/// per token; 9.9e-3 per block on the model's data.
const INT8_RELATIVE_L1: f64 = 0.015;

fn quantizer(scheme: Scheme) -> IntQuantizer {
    match scheme.qk {
        Qk::Int(quantizer) => quantizer,
        _ => panic!("{scheme} has no integers"),
    }
}

/// Our presets, and every other combination that the kernels claim: the original's granularities on its tiles with
/// its roundings, 4 bits, rotation, and each half of the scheme alone.
fn schemes(head_dim: usize) -> Vec<Scheme> {
    let int8 = Preset::INT8.scheme(head_dim);
    let of = |preset: Preset| Scheme { qk: preset.scheme(head_dim).qk, ..int8 };
    let per_thread = of(Preset::SAGE2_INT8_FP8_PER_THREAD);
    let no_smoothing = Smoothing { k: SmoothK::Off, ..int8.smooth };
    vec![
        int8,
        Preset::INT8_PER_TOKEN.scheme(head_dim),
        Preset::INT8_F32.scheme(head_dim),
        of(Preset::SAGE1_INT8_FP16),
        of(Preset::SAGE2_INT8_FP8_PER_WARP),
        per_thread,
        of(Preset::SAGE2_INT8_FP8_SM90_PER_WARP),
        of(Preset::SAGE2_INT8_FP8_SM90_PER_THREAD),
        Scheme { qk: Qk::Int(IntQuantizer { bits: IntBits::Four, ..quantizer(per_thread) }), ..int8 },
        Scheme { rotate: true, ..int8 },
        Scheme { rotate: true, ..per_thread },
        Scheme { smooth: no_smoothing, ..int8 },
        Scheme { pv: int8.pv, ..Preset::FULL.scheme(head_dim) },
        Scheme { pv: Pv::F32, smooth: int8.smooth, rotate: true, ..Preset::FULL.scheme(head_dim) },
        Preset::SAGE2_INT4_FP8.scheme(head_dim),
        Preset::SAGE2_INT8_FP16_F16_SMOOTH_V_PER_WARP.scheme(head_dim),
        Preset::SAGE1_INT8_INT8.scheme(head_dim),
        Preset::INT8_FP8.scheme(head_dim),
        Preset::SAGE3_NVFP4.scheme(head_dim),
        Preset::SAGE3_MXFP4.scheme(head_dim),
        Preset::ATTN_QAT_NVFP4.scheme(head_dim),
        Scheme { rotate: true, ..Preset::NVFP4_FP16.scheme(head_dim) },
        Scheme { pv: Pv::BF16(Accumulator::F32), smooth: SMOOTH_ALL, ..Preset::SAGE3_MXFP4.scheme(head_dim) },
    ]
}

/// Each head's Q, K and V minus its mean.
const SMOOTH_ALL: Smoothing = Smoothing { q: SmoothQ::Sequence, k: SmoothK::Mean, v: true };

/// Our presets in integers.
const INT8_PRESETS: [Preset; 3] = [Preset::INT8, Preset::INT8_PER_TOKEN, Preset::INT8_F32];

/// Presets with Q and V smoothed, and P in 4 and 8 bits.
const NARROW_PRESETS: [Preset; 4] = [
    Preset::SAGE2_INT4_FP8,
    Preset::SAGE2_INT8_FP8_F32_SMOOTH_V_PER_THREAD,
    Preset::SAGE3_NVFP4,
    Preset::SAGE3_MXFP4,
];

fn check(cpu: &Cpu, built: &OwnedCall, scheme: Scheme, what: &str) {
    let run = cpu.run(built, Some(scheme));
    let expected = oracle::scheme(&built.call(), &scheme);
    if let Err(error) = run.check(&expected, &cpu.tolerance(built.q.dtype(), &scheme)) {
        panic!("{error}\non {} with {scheme}: {what}", cpu.instruction_set());
    }
}

const CAUSAL: Band = Band::causal(Alignment::BottomRight);

#[test]
fn every_scheme_is_its_oracle_at_every_length() {
    for (n, (q_len, kv_len)) in
        [(1, 1), (3, 130), (40, 129), (130, 65), (257, 127), (100, 400), (64, 1)].into_iter().enumerate()
    {
        for head_dim in [1, 5, 32, 64, 72, 128] {
            for (s, scheme) in schemes(head_dim).into_iter().enumerate() {
                // So few channels have so few different scores that roundings of P add up instead of cancelling.
                if head_dim < 8 && kv_len > 128 && matches!(scheme.pv, Pv::Fp4 { .. }) {
                    continue;
                }
                let (dtype, band) = (DType::ALL[(n + s) % 3], [Band::FULL, CAUSAL][s % 2]);
                let case =
                    Case { seed: 8 * (1 + n as u64), dtype, q_len, kv_len, head_dim, band, ..Case::f32() };
                check(&Cpu::detect(), &case.build(), scheme, &format!("{case:?}"));
            }
        }
    }
}

#[test]
fn every_instruction_set_is_the_oracle() {
    for cpu in every_cpu() {
        for (q_len, kv_len, head_dim) in
            [(9, 1, 64), (70, 300, 40), (133, 129, 64), (20, 64, 256), (33, 150, 1)]
        {
            for scheme in schemes(head_dim) {
                let case = Case {
                    seed: 40,
                    q_len,
                    kv_len,
                    head_dim,
                    q_heads: 2,
                    kv_heads: 1,
                    band: CAUSAL,
                    ..Case::f32()
                };
                check(&cpu, &case.build(), scheme, &format!("{case:?}"));
            }
        }
    }
}

#[test]
fn masks_groups_of_heads_and_caps() {
    use Alignment::{BottomRight, Offset, TopLeft};
    let none = Case::f32();
    let window = |left, right, alignment| Band { left: Some(left), right: Some(right), alignment };
    let mask = |mask| Case { mask: Some(mask), ..Case::f32() };
    let staggered = Case { sequences: Sequences::Staggered, ..Case::f32() };
    let maskings = [
        none.clone(),
        Case { band: CAUSAL, ..none.clone() },
        Case { band: Band::causal(TopLeft), ..none.clone() },
        Case { band: window(40, 3, BottomRight), ..none.clone() },
        Case { band: window(0, 0, TopLeft), ..none.clone() },
        Case { band: window(40, 0, Offset(90)), ..none.clone() },
        Case { band: window(20, 0, Offset(-30)), ..staggered.clone() },
        Case { band: window(10, 5, Offset(30)), ..staggered.clone() },
        staggered.clone(),
        mask(CaseMask::bool(Extent::All)),
        mask(CaseMask::bool(Extent::BatchKeys)),
        Case { mask: Some(CaseMask::bias(DType::F32, Extent::Rows)), band: CAUSAL, ..staggered.clone() },
        mask(CaseMask::bias(DType::BF16, Extent::Keys)),
        mask(CaseMask::bias(DType::F16, Extent::HeadRows)),
        Case { blocks: Some(CaseBlocks::new(33, 65)), ..none },
        Case { blocks: Some(CaseBlocks::new(1, 128)), band: CAUSAL, ..staggered },
    ];
    for (n, masking) in maskings.into_iter().enumerate() {
        for (q_heads, kv_heads) in [(1, 1), (4, 2), (8, 1)] {
            for softcap in [None, Some(3.0), Some(50.0)] {
                let layout = [Layout::Hnd, Layout::Nhd][n % 2];
                let (q_len, kv_len) = [(37, 150), (150, 37), (70, 257)][n % 3];
                let case = Case {
                    seed: 8 * n as u64,
                    layout,
                    batch: 3,
                    q_heads,
                    kv_heads,
                    q_len,
                    kv_len,
                    head_dim: 40,
                    softcap,
                    // A mean that the cap and the log-sum-exp must not lose.
                    k_bias: Bias::EveryFourth(1.5),
                    ..masking.clone()
                };
                let built = case.build();
                for preset in INT8_PRESETS.into_iter().chain(NARROW_PRESETS) {
                    check(&Cpu::detect(), &built, preset.scheme(40), &format!("{case:?}"));
                }
            }
        }
    }
}

#[test]
fn int8_is_close_to_exact_on_normal_data_with_and_without_channel_bias() {
    for (k_bias, q_len, kv_len, head_dim) in
        [(0.0, 512, 512, 64), (0.0, 256, 1024, 128), (10.0, 256, 1024, 64), (10.0, 512, 512, 128)]
    {
        for band in [Band::FULL, CAUSAL] {
            let case = Case {
                seed: 24,
                q_len,
                kv_len,
                head_dim,
                k_bias: Bias::EveryFourth(k_bias),
                band,
                ..Case::f32()
            };
            let built = case.build();
            let expected = oracle::exact(&built.call());
            for preset in INT8_PRESETS {
                near_exact(&built, preset, &expected, &format!("{case:?}"));
                // A row that sees few keys has the error of single scores: measured worst 3.2e-2.
                let lse = Cpu::detect().run_preset(&built, preset).lse_error(&expected);
                assert!(lse <= 0.05, "{preset}: log-sum-exp off by {lse}\n{case:?}");
            }
        }
    }
}

fn near_exact(built: &OwnedCall, preset: Preset, expected: &Output, what: &str) {
    let run = Cpu::detect().run_preset(built, preset);
    let accuracy = run.accuracy(expected);
    assert!(accuracy.relative_l1 <= INT8_RELATIVE_L1, "{preset}: {accuracy}\n{what}");
}

#[test]
fn int8_is_close_to_exact_on_a_models_data() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../cli/data/minilm_qkv.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for layer in [0, 2] {
        let tensor = |part| {
            let tensor = file.tensor(&format!("layer{layer}.{part}")).unwrap();
            let numbers = tensor.data().as_chunks::<2>().0.iter().map(|x| half::f16::from_le_bytes(*x));
            Tensor::new(numbers.collect::<Vec<_>>(), tensor.shape()).unwrap()
        };
        let mut built = OwnedCall::dense(tensor("q"), tensor("k"), tensor("v"));
        for band in [Band::FULL, CAUSAL] {
            built.options.band = band;
            let expected = oracle::exact(&built.call());
            for preset in INT8_PRESETS {
                let what = format!("layer {layer}, {band:?}");
                near_exact(&built, preset, &expected, &what);
                check(&Cpu::detect(), &built, preset.scheme(32), &what);
            }
        }
    }
}

#[test]
fn smoothing_and_rotation_earn_their_keep() {
    // Without either, a channel of N(10, 1) costs most of the 8 bits.
    let case = Case { seed: 32, q_len: 256, kv_len: 512, k_bias: Bias::EveryFourth(10.0), ..Case::f32() };
    let built = case.build();
    let expected = oracle::exact(&built.call());
    let error = |scheme: Scheme| Cpu::detect().run(&built, Some(scheme)).accuracy(&expected).relative_l1;
    let int8 = Preset::INT8.scheme(64);
    let plain = Scheme { smooth: Smoothing { k: SmoothK::Off, ..int8.smooth }, ..int8 };
    let (smoothed, plain) = (error(int8), error(plain));
    assert!(2.0 * smoothed < plain, "{smoothed} with, {plain} without smoothing");
}

#[test]
fn halves_of_the_keys_merge_by_log_sum_exp_to_the_whole() {
    for (preset, bound) in
        [(Preset::FULL, 5e-6), (Preset::INT8, INT8_RELATIVE_L1), (Preset::INT8_F32, INT8_RELATIVE_L1)]
    {
        for (q_len, kv_len, at) in [(4, 700, 300), (150, 513, 200), (64, 256, 128)] {
            let case = Case {
                seed: 48,
                q_heads: 2,
                kv_heads: 1,
                q_len,
                kv_len,
                head_dim: 64,
                k_bias: Bias::EveryFourth(4.0),
                ..Case::f32()
            };
            let whole = case.build();
            let expected = oracle::exact(&whole.call());
            let rows = |tensor: &Memory, range: std::ops::Range<usize>| {
                let values = tensor.to_f32_vec();
                let shape = [1, 1, range.len(), 64];
                Tensor::new(values[range.start * 64..range.end * 64].to_vec(), &shape).unwrap()
            };
            let run = |range: std::ops::Range<usize>| {
                let part =
                    OwnedCall::dense(whole.q.clone(), rows(&whole.k, range.clone()), rows(&whole.v, range));
                Cpu::detect().run_preset(&part, preset)
            };
            let (left, right) = (run(0..at), run(at..kv_len));
            let mut merged = Vec::new();
            for (row, (a, b)) in left.lse.iter().zip(&right.lse).enumerate() {
                let (a, b) = (f64::from(*a), f64::from(*b));
                let lse = a.max(b) + (a.min(b) - a.max(b)).exp().ln_1p();
                assert!(
                    (lse - expected.lse[row]).abs() < 0.02,
                    "{preset} row {row}: {lse} of {}",
                    expected.lse[row]
                );
                let (a, b) = ((a - lse).exp(), (b - lse).exp());
                let both = left.out[row * 64..][..64].iter().zip(&right.out[row * 64..][..64]);
                merged.extend(both.map(|(x, y)| a * f64::from(*x) + b * f64::from(*y)));
            }
            let accuracy = sage_core::metrics::Accuracy::of(&merged, &expected.out);
            assert!(accuracy.relative_l1 <= bound, "{preset} {q_len}×{kv_len}: {accuracy}");
        }
    }
}

/// Data on which quantisers divide by zero, overflow or lose everything.
fn degenerate(name: &str, kv_len: usize) -> OwnedCall {
    let (q_len, head_dim) = (40, 32);
    let late = kv_len * 3 / 4;
    let (mut q, mut k, mut v) =
        (normal(1, q_len * head_dim), normal(2, kv_len * head_dim), normal(3, kv_len * head_dim));
    match name {
        "zero K" => k.fill(0.0),
        "zero Q" => q.fill(0.0),
        "constant K" => k.fill(0.7),
        "constant channels of K" => (0..k.len()).for_each(|at| k[at] = (at % head_dim) as f32 - 9.5),
        "zero V" => v.fill(0.0),
        "zero channels of V" => (0..v.len()).filter(|at| at % head_dim % 3 == 0).for_each(|at| v[at] = 0.0),
        "outlier in Q" => q[5 * head_dim + 3] = 300.0,
        "outlier in K" => k[late * head_dim + 3] = 300.0,
        "outlier in V" => v[late * head_dim + 3] = 6e4,
        "one key alone not zero" => {
            k.fill(0.0);
            k[(kv_len - 10) * head_dim] = 1.0;
        }
        "subnormal Q" => q.iter_mut().for_each(|x| *x *= 1e-40),
        "subnormal K" => k.iter_mut().for_each(|x| *x *= 1e-40),
        "subnormal V" => v.iter_mut().for_each(|x| *x *= 1e-40),
        "small V" => v.iter_mut().for_each(|x| *x *= 1e-30),
        "huge V" => v.iter_mut().for_each(|x| *x *= 1e37),
        "small Q, large K" => {
            q.iter_mut().for_each(|x| *x *= 1e-30);
            k.iter_mut().for_each(|x| *x *= 1e30);
        }
        _ => panic!("no data called {name}"),
    }
    let tensor = |values: Vec<f32>, rows| Tensor::new(values, &[1, 1, rows, head_dim]).unwrap();
    OwnedCall::dense(tensor(q, q_len), tensor(k, kv_len), tensor(v, kv_len))
}

#[test]
fn degenerate_data_is_finite_and_right() {
    for name in [
        "zero K",
        "zero Q",
        "constant K",
        "constant channels of K",
        "zero V",
        "zero channels of V",
        "outlier in Q",
        "outlier in K",
        "outlier in V",
        "one key alone not zero",
        "subnormal Q",
        "subnormal K",
        "subnormal V",
        "small V",
        "huge V",
        "small Q, large K",
    ] {
        // Of more than one tile, P of few bits is relative to other maxima than the oracle's: where all scores are near
        // each other, its roundings add up.
        let [one_tile, two_tiles] = [128, 200].map(|kv_len| degenerate(name, kv_len));
        for cpu in every_cpu() {
            for scheme in schemes(32) {
                let exact_p = matches!(scheme.pv, Pv::F32 | Pv::Fixed12 { .. });
                let built = if exact_p { &two_tiles } else { &one_tile };
                if name == "huge V" && matches!(scheme.pv, Pv::F16(_)) {
                    // Half precision has no such numbers.
                    continue;
                }
                let run = cpu.run(built, Some(scheme));
                assert!(run.out.iter().chain(&run.lse).all(|x| x.is_finite()), "{name}: {scheme}");
                check(&cpu, built, scheme, name);
            }
        }
    }
}

#[test]
fn constant_keys_average_the_values_exactly_and_keep_the_log_sum_exp() {
    let built = degenerate("constant channels of K", 200);
    let expected = oracle::exact(&built.call());
    for preset in INT8_PRESETS {
        let run = Cpu::detect().run_preset(&built, preset);
        // K' is zero, so all probabilities are equal; V's 12 bits remain: half a step of 1/4095 of 4 at most.
        assert!(run.accuracy(&expected).max_abs_error < 5e-4, "{preset}: {}", run.accuracy(&expected));
        assert!(run.lse_error(&expected) < 1e-5, "{preset}: {}", run.lse_error(&expected));
    }
}

#[test]
fn zero_channels_of_v_stay_zero() {
    let built = degenerate("zero channels of V", 200);
    for scheme in schemes(32) {
        let run = Cpu::detect().run(&built, Some(scheme));
        let zero = |(at, x): (usize, &f32)| at % 32 % 3 != 0 || *x == 0.0;
        assert!(run.out.iter().enumerate().all(zero), "{scheme}");
    }
}

#[test]
fn equal_scores_far_from_zero_do_not_overflow() {
    // 128 products of the largest P and V are just below 2³¹: P must not be a level too large, whatever the scores.
    for far in [0.0, -1e4, -65_504.0, 1e6, -5e7, -1e8, -1e9, 1e9] {
        let (q_len, kv_len) = (20, 256);
        let ones = |rows, value: f32| Tensor::new(vec![value; rows * 16], &[1, 1, rows, 16]).unwrap();
        let mut built = OwnedCall::dense(ones(q_len, 1.0), ones(kv_len, 0.0), ones(kv_len, 1.0));
        for bias in [0.0, 0.3, 0.7] {
            let biases = Tensor::new(vec![far * 1.000_03 + bias; kv_len], &[kv_len]).unwrap();
            built.mask = Some(OwnedMask::biases(biases));
            for cpu in every_cpu() {
                let run = cpu.run_preset(&built, Preset::INT8);
                assert!(run.out.iter().all(|x| (x - 1.0).abs() < 1e-5), "{far} + {bias}: {}", run.out[0]);
            }
        }
    }
}

#[test]
fn a_group_of_queries_reaches_over_blocks_of_work() {
    // 128 queries share a scale, but a unit of work has at most 96: the largest query is in the second.
    let case = Case { seed: 56, q_len: 256, kv_len: 256, ..Case::f32() };
    let mut built = case.build();
    built.q = built.q.map(|at, x| if at == 120 * 64 { 40.0 } else { x });
    for granularity in
        [Granularity::PerBlock, Granularity::PerWarp, Granularity::PerThread, Granularity::PerToken]
    {
        let int8 = Preset::INT8.scheme(64);
        let scheme = Scheme { qk: Qk::Int(IntQuantizer { granularity, ..quantizer(int8) }), ..int8 };
        check(&Cpu::detect(), &built, scheme, granularity.name());
    }
}

/// What `.accuracy(..)` goes by: the processor's own choice on N(0, 1).
#[test]
fn what_is_left_open_is_as_accurate_as_is_said() {
    for cpu in every_cpu() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for head_dim in [32, 64, 128] {
                let case = Case { dtype, q_len: 200, kv_len: 2048, head_dim, ..Case::f32() };
                let built = case.build();
                let run = cpu.run(&built, None);
                let accuracy = run.accuracy(&oracle::exact(&built.call()));
                // Not quantised: bfloat16 where the processor multiplies that, all else in single precision.
                let bound = if run.scheme.qk == Qk::Full { 0.004 } else { 0.01 };
                assert!(accuracy.relative_l1 <= bound, "{}, {case:?}: {accuracy}", cpu.name());
            }
        }
    }
}
