//! Every preset by its name: a GPU plans it, or names the nearest that it plans; and what it plans is the oracle's in
//! the emulator.

use sage_core::metrics::Accuracy;
use sage_core::{
    Accumulator, Call, DType, Error, Fp4Format, Granularity, IntQuantizer, PLevels, Preset, Problem, Pv, Qk,
    ScaleRows, Scheme, SmoothK, SmoothQ, Smoothing, Tile, oracle,
};
use sage_kernels::Machine;
use sage_kernels::forward::{ForwardPlan, Request, int8_scheme, nearest_scheme};
use sage_ptx::Target;
use sage_testkit::{Bias, Case, Emulated, OwnedCall, Runner, Sequences, check, check_within};

const TARGETS: [Target; 6] =
    [Target::SM_75, Target::SM_80, Target::SM_86, Target::SM_89, Target::SM_90A, Target::SM_120A];

/// The plan of a scheme for 1024 queries and keys.
fn plan(scheme: Scheme, dtype: DType, head_dim: usize, target: Target) -> Result<ForwardPlan, Error> {
    let problem = Problem::dense(dtype, [1, 4, 2], [1024, 1024], head_dim);
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
                let nearest = plan(nearest_scheme(scheme, dtype, target), dtype, head_dim, target)
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

#[test]
fn what_turing_lacks_is_refused() {
    let refused =
        |preset: Preset, dtype| plan(preset.scheme(64), dtype, 64, Target::SM_75).unwrap_err().to_string();
    assert_eq!(
        refused(Preset::FULL, DType::BF16),
        "full-precision scores of bf16 on sm_75 is not supported: products of bf16 need sm_80 or later; use INT8 \
         scores; the nearest that this GPU computes is INT8 QK per-token · smooth K · FP16 PV (f32), or by name \
         `int8-per-token`"
    );
    assert_eq!(
        refused(Preset::SAGE2_INT8_FP8_PER_THREAD, DType::F16),
        "FP8 P·V on sm_75 is not supported: FP8 needs sm_89 or later; use FP16 P·V; the nearest that this GPU \
         computes is `sage2-int8-fp16-per-thread`, INT8 QK per-thread · smooth K · FP16 PV (f32)"
    );
    let bf16 = Scheme { pv: Pv::BF16(Accumulator::F32), ..int8_scheme(DType::BF16) };
    let error = plan(bf16, DType::BF16, 64, Target::SM_75).unwrap_err().to_string();
    let start =
        "BF16 P·V on sm_75 is not supported: products of bf16 need sm_80 or later; use FP16 P·V; the nearest";
    assert!(error.starts_with(start), "{error}");
}

#[test]
fn the_nearest_scheme_is_at_least_as_accurate() {
    // Of several draws, as in one of them chance decides between scales of 64 keys and of 128.
    let case = |seed| Case {
        seed,
        q_len: 140,
        kv_len: 260,
        k_bias: Bias::Channels(2.0),
        v_bias: Bias::Channels(2.0),
        ..Case::default()
    };
    let draws: Vec<OwnedCall> = (0..6).map(|draw| case(10 * draw).build()).collect();
    let calls: Vec<_> = draws.iter().map(OwnedCall::call).collect();
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
            let plan = plan(nearest_scheme(scheme, DType::F16, target), DType::F16, 64, target).unwrap();
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
            let fp4 = target == Target::SM_120A;
            let wanted = match scheme.pv {
                Pv::Int8 => false,
                Pv::Fp4 { .. } => fp4,
                _ if matches!(scheme.qk, Qk::Fp4(_)) && !fp4 => false,
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
        Pv::Fp8 { v_max: 448.0, rows: ScaleRows::Sampled(64), accumulator: Accumulator::F32 },
        Pv::Fp8 { v_max: 2.25, rows: ScaleRows::All, accumulator: Accumulator::F16 },
        Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::Two },
        Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::One },
    ];
    use Granularity::{PerBlock, PerTensor, PerThread, PerToken, PerWarp};
    let Qk::Int(quantizer) = int8_scheme(DType::F16).qk else { unreachable!("an integer scheme") };
    let mut kinds = vec![Qk::Full, Qk::Fp4(Fp4Format::Nv), Qk::Fp4(Fp4Format::Mx)];
    for granularity in [PerTensor, PerBlock, PerWarp, PerThread, PerToken] {
        for tile in tiles {
            kinds.push(Qk::Int(IntQuantizer { granularity, tile, ..quantizer }));
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
                    let nearest = nearest_scheme(scheme, DType::BF16, target);
                    let planned = plan(nearest, DType::BF16, 96, target);
                    assert!(planned.is_ok(), "{scheme:?} on {target}: {nearest:?}: {:?}", planned.err());
                }
            }
        }
    }
}

/// Heads of 64 channels in bf16 are also in the table of cases, which the newest GPU of each engine computes.
#[test]
fn every_preset_that_plans_is_the_oracles() {
    let common = [(128, DType::F16)];
    let first = [(64, DType::BF16), (128, DType::F16)];
    let every =
        [(64, DType::F16), (128, DType::F16), (128, DType::BF16), (256, DType::F16), (256, DType::BF16)];
    for (target, kinds) in
        [(Target::SM_80, &first[..]), (Target::SM_89, &every[..]), (Target::SM_90A, &common[..])]
    {
        for preset in Preset::ALL {
            for &(head_dim, dtype) in kinds {
                let scheme = preset.scheme(head_dim);
                if plan(scheme, dtype, head_dim, target).is_err() {
                    continue;
                }
                let case = Case {
                    scheme: Some(scheme),
                    head_dim,
                    dtype,
                    q_len: 140,
                    kv_len: 150,
                    k_bias: Bias::Channels(4.0),
                    v_bias: Bias::Channels(1.0),
                    ..Case::default()
                };
                check(&Emulated::on(target), &case);
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
                    dtype,
                    head_dim,
                    q_len: 150,
                    kv_len: 140,
                    k_bias: Bias::Channels(4.0),
                    ..Case::default()
                };
                let kernels = check(&Emulated::on(target), &case).kernels;
                assert!(kernels.iter().any(|name| name.contains("_rot_")), "{kernels:?}");
            }
        }
    }
}

#[test]
fn rotation_goes_with_every_other_option() {
    let base = Case { q_len: 130, kv_len: 150, k_bias: Bias::Channels(3.0), head_dim: 72, ..Case::default() };
    for target in [Target::SM_80, Target::SM_90A] {
        let gpu = Emulated::on(target);
        let with = |scheme: Scheme| Case { scheme: Some(scheme), ..base.clone() };
        let scheme = rotated(Granularity::PerThread, SmoothQ::Off, false);
        let plain = with(scheme);
        for q in [SmoothQ::Block(64), SmoothQ::Sequence] {
            check(&gpu, &with(rotated(Granularity::PerThread, q, false)));
        }
        check(&gpu, &Case { q_heads: 6, kv_heads: 2, batch: 2, ..plain.clone() });
        let capped = Case { softcap: Some(20.0), ..plain.clone() };
        check_within(&gpu, &capped, &gpu.tolerance(capped.dtype, &scheme).times(2.0));
        check(&gpu, &Case { gap: 3, offset: 1, ..plain.clone() });
        let sequences = Sequences::KvLens(vec![100, 0, 65]);
        check(&gpu, &Case { q_heads: 2, batch: 3, sequences, ..plain.clone() });
        let sequences = Sequences::Packed(vec![0, 70, 70, 71, 200], vec![0, 64, 130, 130, 227]);
        check(&gpu, &Case { sequences, ..plain.clone() });
        check(&gpu.multiprocessors(40), &Case { q_len: 3, kv_len: 1100, ..plain });
        for k in [SmoothK::Off, SmoothK::Sampled(128)] {
            check(&gpu, &with(Scheme { smooth: Smoothing { k, ..scheme.smooth }, ..scheme }));
        }
    }
    let mut int4 = Preset::SAGE2_INT4_FP8.scheme(64);
    int4.rotate = true;
    for head_dim in [40, 72, 128] {
        check(&Emulated::on(Target::SM_89), &Case { scheme: Some(int4), head_dim, ..base.clone() });
    }
}

/// A channel of Q and K that is many times the others: what rotation is for.
#[test]
fn rotation_halves_the_error_of_outlier_channels() {
    let gpu = Emulated::on(Target::SM_80);
    for head_dim in [64, 128] {
        let call = Case { head_dim, q_len: 150, kv_len: 200, outlier: 12.0, ..Case::default() }.build();
        let exact = oracle::exact(&call.call());
        let error = |rotate: bool| {
            let scheme = Scheme { rotate, ..rotated(Granularity::PerToken, SmoothQ::Off, false) };
            let computed = gpu.run(&call, Some(scheme));
            let of_scheme = oracle::scheme(&call.call(), &computed.scheme);
            println!(
                "head_dim {head_dim}, rotate {rotate}: {:.5} of the scheme's oracle, {:.5} of exact attention",
                computed.relative_l1(&of_scheme),
                computed.relative_l1(&exact)
            );
            computed.relative_l1(&exact)
        };
        let (with, without) = (error(true), error(false));
        assert!(with < 0.5 * without, "{with} with rotation, {without} without");
    }
}
