//! Every preset by its name: a GPU plans it, or names the nearest that it plans; and what it plans is the oracle's in
//! the emulator. Tolerances are those of the tests of whole passes: see there.

#[allow(dead_code, reason = "other tests use other parts")]
mod support;

use rand::SeedableRng;
use rand_distr::{Distribution, StandardNormal};
use sage_core::metrics::Accuracy;
use sage_core::{
    Accumulator, Band, Call, DType, Error, Granularity, Inputs, Options, Preset, Problem, Pv, Qk, Scheme,
    SmoothK, SmoothQ, Smoothing, Tensor, Tile, oracle,
};
use sage_kernels::Machine;
use sage_kernels::forward::{ForwardPlan, Request, int8_scheme, nearest_scheme};
use sage_ptx::Target;
use support::Case;

const TARGETS: [Target; 5] = [Target::SM_80, Target::SM_86, Target::SM_89, Target::SM_90A, Target::SM_120];

const F16: f64 = 1e-3;
const BF16: f64 = 6e-3;
const FP8: f64 = 4e-2;
/// Sums rounded to half precision on their way.
const F16_SUMS: f64 = 6e-3;

/// The plan of a scheme for 1024 queries and keys.
fn plan(scheme: Scheme, dtype: DType, head_dim: usize, target: Target) -> Result<ForwardPlan, Error> {
    let problem = Problem {
        dtype,
        batch: 1,
        num_q_heads: 4,
        num_kv_heads: 2,
        q_len: 1024,
        kv_len: 1024,
        head_dim,
        sm_scale: 0.1,
        band: Band::FULL,
        logit_softcap: None,
        packed: false,
        masked: false,
        block_masked: false,
    };
    let request = Request { scheme: Some(scheme), ..Request::new(&problem) };
    ForwardPlan::new(&problem, &request, &Machine { multiprocessors: 100, ..Machine::typical(target) })
}

#[test]
fn every_preset_plans_or_names_the_nearest_that_does() {
    for target in TARGETS {
        for preset in Preset::ALL {
            for (dtype, head_dim) in
                [(DType::F16, 64), (DType::BF16, 64), (DType::F16, 128), (DType::BF16, 256)]
            {
                let scheme = preset.scheme(head_dim);
                let nearest = plan(nearest_scheme(scheme, target), dtype, head_dim, target)
                    .unwrap_or_else(|error| panic!("{preset} on {target}: no nearest: {error}"));
                match plan(scheme, dtype, head_dim, target) {
                    Ok(forward) => assert_eq!(
                        forward.scheme(),
                        nearest.scheme(),
                        "{preset} on {target}: a scheme that has kernels is its own nearest"
                    ),
                    Err(error) => {
                        let error = error.to_string();
                        let wanted = format!(
                            "; the nearest that this GPU computes is {}",
                            nearest.scheme().named_or(head_dim, Preset::INT8_PER_TOKEN)
                        );
                        assert!(error.ends_with(&wanted), "{preset} on {target}: {error}\n{wanted}");
                    }
                }
            }
        }
    }
}

/// `[1, 1, rows, 64]` of N(0, 1), each channel shifted by twice an N(0, 1) of its own.
fn random(seed: u64, rows: usize) -> Tensor {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut normal = || -> f32 { StandardNormal.sample(&mut rng) };
    let shift: Vec<f32> = (0..64).map(|_| 2.0 * normal()).collect();
    let elements: Vec<f32> = (0..rows * 64).map(|i| normal() + shift[i % 64]).collect();
    Tensor::new(elements, &[1, 1, rows, 64]).expect("as many elements as the shape has").to_dtype(DType::F16)
}

#[test]
fn the_nearest_scheme_is_at_least_as_accurate() {
    // Of several draws, as in one of them chance decides between scales of 64 keys and of 128.
    let draws: Vec<[Tensor; 3]> =
        (0..6).map(|i| [140, 260, 260].map(|rows| random(10 * i + rows as u64, rows))).collect();
    let calls: Vec<_> = draws
        .iter()
        .map(|[q, k, v]| {
            Call::check(&Inputs::new(q.view(), k.view(), v.view()), &Options::default()).unwrap()
        })
        .collect();
    let exact: Vec<_> = calls.iter().map(oracle::exact).collect();
    let error = |scheme: &Scheme| {
        let of_draw = |(call, exact): (&Call<'_>, &oracle::Output)| {
            let out: Vec<f32> = oracle::scheme(call, scheme).out.iter().map(|&x| x as f32).collect();
            Accuracy::of(&out, &exact.out).relative_l1
        };
        calls.iter().zip(&exact).map(of_draw).sum::<f64>() / calls.len() as f64
    };
    for preset in Preset::ALL {
        let scheme = preset.scheme(64);
        if scheme.qk == Qk::Full {
            continue;
        }
        let given = error(&scheme);
        for target in [Target::SM_80, Target::SM_90A] {
            let plan = plan(nearest_scheme(scheme, target), DType::F16, 64, target).unwrap();
            let nearest = error(plan.scheme());
            // As on the CPU: 2 % are for P·V's errors that happen to cancel some of the scores'.
            println!("{preset} on {target}: {:.3}", nearest / given);
            assert!(nearest <= given * 1.02, "{preset} on {target}: {nearest} beside {given}");
        }
    }
}

/// What a GPU has no kernels for, and no more.
#[test]
fn presets_that_are_refused_are_those_of_other_operands() {
    for target in TARGETS {
        for preset in Preset::ALL {
            let scheme = preset.scheme(128);
            let wanted = match scheme.pv {
                Pv::Int8 | Pv::Nvfp4 => false,
                Pv::F16(_) => !scheme.smooth.v,
                Pv::Fp8 { .. } => target.sm() >= 89,
                _ => true,
            };
            let planned = plan(scheme, DType::F16, 128, target);
            assert_eq!(planned.is_ok(), wanted, "{preset} on {target}: {:?}", planned.err());
        }
    }
}

#[test]
fn scales_of_other_tiles_are_refined_and_the_plan_says_so() {
    let of = |preset: Preset| plan(preset.scheme(128), DType::F16, 128, Target::SM_90A).unwrap();
    for (preset, reason) in [
        (
            Preset::SAGE2_INT8_FP8_SM90_PER_THREAD,
            "scales per-thread of 16 queries and 64 keys, where the scheme has them of 16 and 128: ",
        ),
        (
            Preset::SAGE2_INT8_FP8_SM90_PER_WARP,
            "scales per-warp of 16 queries and 64 keys, where the scheme has them of 16 and 128: ",
        ),
        (
            Preset::SPARGE_INT8_FP8_SM90,
            "scales per-block of 64 queries and 64 keys, where the scheme has them of 64 and 128: ",
        ),
        (Preset::INT8, "P·V in f16 with f32 sums, not in 12 bits: "),
        (Preset::INT8_F32, "P·V in f16 with f32 sums, not in single precision: "),
    ] {
        let plan = of(preset);
        assert!(plan.reasons().iter().any(|text| text.starts_with(reason)), "{preset}: {:?}", plan.reasons());
    }
    assert!(of(Preset::SAGE2_INT8_FP8_PER_THREAD).reasons().iter().all(|text| !text.starts_with("scales")));
}

#[test]
fn schemes_of_ones_own_plan_or_have_a_nearest_as_well() {
    let tiles = [
        Tile { block_q: 128, warp_q: 32, block_k: 64, warp_k: 64 },
        Tile { block_q: 96, warp_q: 24, block_k: 48, warp_k: 16 },
        Tile { block_q: 256, warp_q: 64, block_k: 256, warp_k: 128 },
        Tile { block_q: 64, warp_q: 64, block_k: 64, warp_k: 32 },
        Tile { block_q: 8, warp_q: 8, block_k: 8, warp_k: 8 },
    ];
    let values = [
        Pv::F32,
        Pv::F16(Accumulator::F32ThenF32),
        Pv::BF16(Accumulator::F16),
        Pv::Fp8 { v_max: 448.0, rows: sage_core::ScaleRows::Sampled(64), accumulator: Accumulator::F32 },
        Pv::Fp8 { v_max: 2.25, rows: sage_core::ScaleRows::All, accumulator: Accumulator::F16 },
        Pv::Nvfp4,
    ];
    use Granularity::{PerBlock, PerTensor, PerThread, PerToken, PerWarp};
    let Qk::Int(quantizer) = int8_scheme(DType::F16).qk else { unreachable!("an integer scheme") };
    let mut kinds = vec![Qk::Full, Qk::Nvfp4];
    for granularity in [PerTensor, PerBlock, PerWarp, PerThread, PerToken] {
        for tile in tiles {
            kinds.push(Qk::Int(sage_core::IntQuantizer { granularity, tile, ..quantizer }));
        }
    }
    for target in TARGETS {
        for &qk in &kinds {
            for pv in values {
                for (q, v, rotate) in [
                    (SmoothQ::Off, false, false),
                    (SmoothQ::Block(100), true, true),
                    (SmoothQ::Sequence, true, false),
                ] {
                    let smooth = Smoothing { q, k: SmoothK::Mean, v };
                    let scheme = Scheme { qk, pv, smooth, rotate };
                    let nearest = nearest_scheme(scheme, target);
                    let planned = plan(nearest, DType::BF16, 96, target);
                    assert!(planned.is_ok(), "{scheme:?} on {target}: {nearest:?}: {:?}", planned.err());
                }
            }
        }
    }
}

/// The tolerance of a scheme that is computed.
fn tolerance(dtype: DType, scheme: &Scheme) -> f64 {
    let of_values = match scheme.pv {
        Pv::Fp8 { .. } => FP8,
        Pv::F16(Accumulator::F16 | Accumulator::F16ThenF32) => F16_SUMS,
        _ => F16,
    };
    of_values.max(if dtype == DType::BF16 { BF16 } else { 0.0 })
}

#[test]
fn every_preset_that_plans_is_the_oracles() {
    for target in [Target::SM_80, Target::SM_89, Target::SM_90A] {
        for preset in Preset::ALL {
            for (head_dim, dtype) in [(64, DType::BF16), (128, DType::F16)] {
                let Ok(forward) = plan(preset.scheme(head_dim), dtype, head_dim, target) else { continue };
                let case = Case {
                    scheme: Some(preset.scheme(head_dim)),
                    target,
                    head_dim,
                    dtype,
                    q_len: 140,
                    kv_len: 150,
                    k_bias: 4.0,
                    v_bias: 1.0,
                    ..Case::default()
                };
                case.check(tolerance(dtype, forward.scheme()));
            }
        }
    }
}

/// Scores rotated, with the change that `change` makes.
fn rotated(granularity: Granularity, q: SmoothQ, scale_q_first: bool) -> Scheme {
    let mut scheme = int8_scheme(DType::F16);
    scheme.smooth = Smoothing { q, k: SmoothK::Mean, v: false };
    scheme.rotate = true;
    if let Qk::Int(quantizer) = &mut scheme.qk {
        quantizer.granularity = granularity;
        quantizer.scale_q_first = scale_q_first;
    }
    scheme
}

#[test]
fn rotated_queries_and_keys_are_the_oracles() {
    use Granularity::{PerBlock, PerThread, PerToken, PerWarp};
    for (i, head_dim) in [40, 64, 96, 128, 256, 8, 31].into_iter().enumerate() {
        for granularity in [PerBlock, PerWarp, PerThread, PerToken] {
            let dtype = if i % 2 == 0 { DType::F16 } else { DType::BF16 };
            for target in [Target::SM_80, Target::SM_90A] {
                let scheme = rotated(granularity, SmoothQ::Off, i % 3 == 0);
                let case = Case {
                    scheme: Some(scheme),
                    target,
                    dtype,
                    head_dim,
                    q_len: 150,
                    kv_len: 140,
                    k_bias: 4.0,
                    ..Case::default()
                };
                let kernels = case.check(tolerance(dtype, &scheme));
                assert!(kernels.iter().any(|name| name.contains("_rot_")), "{kernels:?}");
            }
        }
    }
}

#[test]
fn rotation_goes_with_every_other_option() {
    let base = Case { q_len: 130, kv_len: 150, k_bias: 3.0, head_dim: 72, ..Case::default() };
    for target in [Target::SM_80, Target::SM_90A] {
        let base = Case { target, ..base.clone() };
        let with = |scheme: Scheme| Case { scheme: Some(scheme), ..base.clone() };
        let plain = rotated(Granularity::PerThread, SmoothQ::Off, false);
        for q in [SmoothQ::Block(64), SmoothQ::Sequence] {
            with(rotated(Granularity::PerThread, q, false)).check(F16);
        }
        Case { q_heads: 6, kv_heads: 2, batch: 2, ..with(plain) }.check(F16);
        Case { softcap: Some(20.0), ..with(plain) }.check(2.0 * F16);
        Case { gap: 3, misaligned: 2, ..with(plain) }.check(F16);
        Case { q_heads: 2, batch: 3, kv_lens: Some(vec![100, 0, 65]), ..with(plain) }.check(F16);
        let packed = Some((vec![0, 70, 70, 71, 200], vec![0, 64, 130, 130, 227]));
        Case { batch: 4, packed, ..with(plain) }.check(F16);
        Case { q_len: 3, kv_len: 1100, multiprocessors: 40, ..with(plain) }.check(F16);
        let rough = Scheme { smooth: Smoothing { k: SmoothK::Off, ..plain.smooth }, ..plain };
        with(rough).check(F16);
        let sampled = Scheme { smooth: Smoothing { k: SmoothK::Sampled(128), ..plain.smooth }, ..plain };
        with(sampled).check(F16);
    }
    let mut int4 = Preset::SAGE2_INT4_FP8.scheme(64);
    int4.rotate = true;
    for head_dim in [40, 72, 128] {
        Case { scheme: Some(int4), target: Target::SM_89, head_dim, ..base.clone() }.check(FP8);
    }
}

/// A channel of Q and K that is many times the others: what rotation is for.
#[test]
fn rotation_halves_the_error_of_outlier_channels() {
    for head_dim in [64, 128] {
        let error = |rotate: bool| {
            let scheme = Scheme { rotate, ..rotated(Granularity::PerToken, SmoothQ::Off, false) };
            let case = Case {
                scheme: Some(scheme),
                head_dim,
                q_len: 150,
                kv_len: 200,
                outlier: 12.0,
                ..Case::default()
            };
            let (computed, of_scheme, exact) = case.run_beside_exact();
            let relative = |wanted: &[f64]| Accuracy::of(&computed.out, wanted).relative_l1;
            println!(
                "head_dim {head_dim}, rotate {rotate}: {:.5} of the scheme's oracle, {:.5} of exact attention",
                relative(&of_scheme.out),
                relative(&exact.out)
            );
            relative(&exact.out)
        };
        let (with, without) = (error(true), error(false));
        assert!(with < 0.5 * without, "{with} with rotation, {without} without");
    }
}
