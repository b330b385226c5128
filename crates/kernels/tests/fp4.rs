//! Attention with scores in 4 bits, and values in 4, 8 or 16, in the emulator: against the oracle with P relative to the
//! largest score so far, from which it may differ by no more than 16-bit attention does from its own.

use sage_core::{DType, Fp4Format, Preset, Scheme, SmoothK, SmoothQ, Smoothing, oracle};
use sage_kernels::forward::int8_scheme;
use sage_ptx::Target;
use sage_testkit::{Bias, Case, Emulated, Runner, check, check_table, table};

/// Those of FP4 values, and of FP4 scores beside others.
const VALUES: [Preset; 5] = [
    Preset::SAGE3_NVFP4,
    Preset::ATTN_QAT_NVFP4,
    Preset::SAGE3_MXFP4,
    Preset::SAGE3_NVFP4_ONE_LEVEL,
    Preset::SAGE3_NVFP4_SEQUENCE_MEAN,
];
const MIXED: [Preset; 2] = [Preset::NVFP4_FP16, Preset::NVFP4_FP8];

fn gpu() -> Emulated {
    Emulated::on(Target::SM_120A)
}

#[test]
fn every_preset_at_every_head_dimension() {
    for (i, head_dim) in [64, 128, 256, 40, 8, 31, 160].into_iter().enumerate() {
        for (j, preset) in VALUES.into_iter().chain(MIXED).enumerate() {
            let case = Case {
                head_dim,
                scheme: Some(preset.scheme(head_dim)),
                dtype: if (i + j) % 2 == 0 { DType::F16 } else { DType::BF16 },
                q_len: 70,
                kv_len: 150,
                k_bias: Bias::Channels(3.0),
                v_bias: Bias::Channels(1.0),
                ..Case::default()
            };
            check(&gpu(), &case);
        }
    }
}

/// The cases that every backend runs, in 4 bits: half of them by SageAttention3's own scheme, the others by each in
/// turn.
#[test]
fn cases_of_every_kind_are_the_oracles() {
    let of_others = |case: &Case| {
        let scheme = case.scheme.filter(|&scheme| scheme != Preset::INT8_PER_TOKEN.scheme(64));
        scheme.is_some_and(|scheme| Preset::ALL.iter().any(|preset| preset.scheme(64) == scheme))
    };
    let mut cases: Vec<Case> = table().into_iter().filter(|case| !of_others(case)).collect();
    for (number, case) in cases.iter_mut().enumerate() {
        let others: Vec<Preset> = VALUES.into_iter().skip(1).chain(MIXED).collect();
        let preset = if number % 2 == 0 { Preset::SAGE3_NVFP4 } else { others[number / 2 % others.len()] };
        case.scheme = Some(preset.scheme(case.head_dim));
    }
    // Those in single precision, and what is refused of every scheme.
    check_table(&gpu(), &cases, 16);
}

#[test]
fn rotation_and_every_smoothing() {
    let sage3 = Preset::SAGE3_NVFP4.scheme(64);
    let smooth = |q, k| Scheme { smooth: Smoothing { q, k, v: false }, ..sage3 };
    for (scheme, head_dim) in [
        (Scheme { rotate: true, ..sage3 }, 64),
        (Scheme { rotate: true, ..Preset::SAGE3_MXFP4.scheme(64) }, 72),
        (Scheme { rotate: true, ..Preset::NVFP4_FP16.scheme(64) }, 128),
        (smooth(SmoothQ::Block(64), SmoothK::Sampled(128)), 64),
        (smooth(SmoothQ::Sequence, SmoothK::Off), 128),
        (smooth(SmoothQ::Off, SmoothK::Mean), 64),
    ] {
        let base = Case { scheme: Some(scheme), head_dim, q_len: 200, kv_len: 230, ..Case::default() };
        check(&gpu(), &Case { k_bias: Bias::Channels(3.0), q_heads: 2, ..base });
    }
}

/// Of few queries the keys are split, and each part has a largest score of its own.
#[test]
fn split_keys() {
    for preset in [Preset::ATTN_QAT_NVFP4, Preset::SAGE3_NVFP4] {
        let scheme = Some(preset.scheme(64));
        let case = Case { scheme, q_len: 70, kv_len: 1100, q_heads: 4, kv_heads: 2, ..Case::default() };
        let call = case.build();
        let computed = gpu().multiprocessors(40).run(&call, scheme);
        let kernels = &computed.kernels;
        assert!(kernels.last().is_some_and(|name| name.starts_with("combine")), "{kernels:?}");
        // Most of P falls elsewhere on its grid, so that it is as far from the oracle as two roundings of it.
        let expected = gpu().expected(&call.call(), &computed.scheme);
        let error = computed.relative_l1(&expected);
        println!("{preset}: {error}");
        assert!(error < 0.12, "{preset}: {error}");
        assert!(computed.lse_error(&expected) < 5e-4);
    }
}

#[test]
fn two_levels_are_better_than_one_and_smoothing_than_none() {
    let case = Case { q_len: 200, kv_len: 500, k_bias: Bias::Channels(3.0), ..Case::default() };
    let call = case.build();
    let exact = oracle::exact(&call.call());
    let error = |scheme: Scheme| {
        let accuracy = gpu().run(&call, Some(scheme)).accuracy(&exact);
        println!("{scheme}: {accuracy}");
        accuracy.relative_l1
    };
    let sage3 = error(Preset::SAGE3_NVFP4.scheme(64));
    assert!(sage3 <= error(Preset::SAGE3_NVFP4_ONE_LEVEL.scheme(64)));
    assert!(sage3 < error(Preset::SAGE3_MXFP4.scheme(64)));
    let rough = Smoothing { q: SmoothQ::Off, k: SmoothK::Off, v: false };
    assert!(1.5 * sage3 < error(Scheme { smooth: rough, ..Preset::SAGE3_NVFP4.scheme(64) }));
    let full_values = error(Preset::NVFP4_FP16.scheme(64));
    assert!(full_values < sage3 && error(int8_scheme(DType::F16)) < full_values);
}

#[test]
fn what_other_targets_lack_is_refused_by_name() {
    let case = Case { scheme: Some(Preset::SAGE3_NVFP4.scheme(64)), ..Case::default() };
    for target in [Target::SM_80, Target::SM_90A, Target::SM_120] {
        let refused = Emulated::on(target).supports(&case.build(), case.scheme).unwrap_err();
        assert!(refused.contains(&format!("NVFP4 Q·Kᵀ on {target}")), "{refused}");
        assert!(refused.contains("sm_120a or sm_121a") && refused.contains("nearest"), "{refused}");
    }
    check(&Emulated::on(Target::SM_121A), &case);
    // Values in FP4 need the order of keys that scores in FP4 have.
    let pv = sage_core::Pv::Fp4 { format: Fp4Format::Nv, levels: sage_core::PLevels::Two };
    let mixed = Some(Scheme { pv, ..int8_scheme(DType::F16) });
    let refused = gpu().supports(&case.build(), mixed).unwrap_err();
    assert!(refused.contains("NVFP4 P·V with scores of other formats"), "{refused}");
}
