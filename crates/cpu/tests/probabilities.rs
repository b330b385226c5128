//! P in few bits, and what is subtracted from Q and V.

// Helpers unwrap too.
#![allow(clippy::unwrap_used)]

use sage_core::oracle;
use sage_core::{
    Accumulator, Alignment, Band, DType, Fp4Format, PLevels, Preset, Pv, ScaleRows, Scheme, SmoothK, SmoothQ,
    Smoothing, Tensor,
};
use sage_cpu::Cpu;
use sage_testkit::{
    Bias, CPU_QUANTISED, Case, CaseBlocks, OwnedCall, OwnedMask, Runner, Sequences, every_cpu,
};

/// Every form of P and V that is rounded to fewer bits.
const FORMS: [Pv; 9] = [
    Pv::F16(Accumulator::F32),
    Pv::BF16(Accumulator::F32),
    Pv::Fp8 { v_max: 448.0, rows: ScaleRows::All, accumulator: Accumulator::F32 },
    Pv::Fp8 { v_max: 2.25, rows: ScaleRows::All, accumulator: Accumulator::F16ThenF32 },
    Pv::Fp8 { v_max: 56.0, rows: ScaleRows::Sampled(16), accumulator: Accumulator::F32 },
    Pv::Int8,
    Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::One },
    Pv::Fp4 { format: Fp4Format::Nv, levels: PLevels::Two },
    Pv::Fp4 { format: Fp4Format::Mx, levels: PLevels::One },
];

/// Key 0 has the largest score of every row.
fn sink(case: &Case) -> OwnedCall {
    let biases: Vec<f32> = (0..case.kv_len).map(|j| if j == 0 { 12.0 } else { 0.0 }).collect();
    let mask = OwnedMask::biases(Tensor::new(biases, &[case.kv_len]).unwrap());
    OwnedCall { mask: Some(mask), ..case.build() }
}

fn check(cpu: &Cpu, built: &OwnedCall, scheme: Scheme, what: &str) {
    let run = cpu.run(built, Some(scheme));
    let expected = oracle::scheme(&built.call(), &scheme);
    if let Err(error) = run.check(&expected, &CPU_QUANTISED) {
        panic!("{error}\non {} with {scheme}: {what}", cpu.instruction_set());
    }
}

#[test]
fn p_and_v_are_rounded_as_the_oracles_are() {
    let exact = Preset::FULL.scheme(64);
    for cpu in every_cpu() {
        for pv in FORMS {
            for smooth_v in [false, true] {
                let smooth = Smoothing { v: smooth_v, ..exact.smooth };
                // Within one tile; and with the largest score in the first of several.
                let one = Case { seed: 1, q_len: 33, kv_len: 128, head_dim: 40, ..Case::f32() };
                let short = Case { seed: 2, q_len: 20, kv_len: 77, head_dim: 64, ..Case::f32() };
                let many = Case { seed: 3, q_len: 20, kv_len: 700, head_dim: 24, ..Case::f32() };
                for (built, what) in [
                    (one.build(), "one tile"),
                    (short.build(), "a short tile"),
                    (sink(&many), "a sink"),
                    (sink(&Case { sequences: Sequences::Staggered, batch: 3, ..many }), "lengths"),
                ] {
                    check(&cpu, &built, Scheme { pv, smooth, ..exact }, what);
                }
            }
        }
    }
}

#[test]
fn what_is_small_beside_the_largest_score_so_far_loses_bits() {
    // The first tile's only key outweighs all of the second's by e⁶: relative to it P is 1/4 of 127, to themselves all of it.
    let kv_len = 256;
    let zeros = |rows| Tensor::new(vec![0.0; rows * 16], &[1, 1, rows, 16]).unwrap();
    let v: Vec<f32> = (0..kv_len * 16).map(|at| if at < 128 * 16 { 0.0 } else { 1.0 }).collect();
    let mut built = OwnedCall::dense(zeros(20), zeros(kv_len), Tensor::new(v, &[1, 1, kv_len, 16]).unwrap());
    let bias = |j| match j {
        0 => 6f32,
        1..128 => f32::NEG_INFINITY,
        _ => 0.0,
    };
    built.mask =
        Some(OwnedMask::biases(Tensor::new((0..kv_len).map(bias).collect::<Vec<f32>>(), &[kv_len]).unwrap()));
    let scheme = Scheme { pv: Pv::Int8, ..Preset::FULL.scheme(16) };
    for cpu in every_cpu() {
        // 127·e⁻⁶ = 0.31 rounds to 0.
        assert_eq!(cpu.run(&built, Some(scheme)).out, vec![0.0; 20 * 16], "{}", cpu.instruction_set());
    }
    check(&Cpu::detect(), &built, scheme, "small beside a sink");
}

#[test]
fn means_of_queries_are_of_their_blocks_whatever_the_unit_of_work() {
    let case = Case {
        seed: 5,
        q_heads: 4,
        kv_heads: 2,
        q_len: 300,
        kv_len: 150,
        head_dim: 40,
        k_bias: Bias::EveryFourth(4.0),
        ..Case::f32()
    };
    let bottom = Band::causal(Alignment::BottomRight);
    for q in [SmoothQ::Block(1), SmoothQ::Block(33), SmoothQ::Block(128), SmoothQ::Sequence] {
        for (at, k) in [SmoothK::Off, SmoothK::Mean, SmoothK::Sampled(16)].into_iter().enumerate() {
            let smooth = Smoothing { q, k, v: false };
            for (preset, rotate) in
                [(Preset::FULL, false), (Preset::SAGE2_INT4_FP8, true), (Preset::NVFP4_FP8, at == 1)]
            {
                let scheme = Scheme { smooth, rotate, pv: Pv::F32, ..preset.scheme(40) };
                for case in [
                    Case { softcap: [None, Some(20.0)][at % 2], ..case.clone() },
                    Case { band: bottom, sequences: Sequences::Staggered, batch: 3, ..case.clone() },
                    Case { blocks: Some(CaseBlocks::new(33, 65)), ..case.clone() },
                ] {
                    check(&Cpu::detect(), &case.build(), scheme, &format!("{case:?}"));
                }
            }
        }
    }
    for cpu in every_cpu() {
        check(&cpu, &case.build(), Scheme { pv: Pv::F32, ..Preset::SAGE3_NVFP4.scheme(40) }, "each set");
    }
}

#[test]
fn a_mean_of_values_returns_to_rows_that_see_a_key_and_to_no_other() {
    let mut case = Case { seed: 6, q_len: 60, kv_len: 20, head_dim: 24, ..Case::f32() };
    case.band = Band::causal(Alignment::BottomRight);
    let mut built = case.build();
    built.v = built.v.map(|_, x| x + 100.0);
    let smooth = Smoothing { v: true, ..Preset::FULL.scheme(24).smooth };
    for pv in FORMS {
        let scheme = Scheme { pv, smooth, ..Preset::FULL.scheme(24) };
        check(&Cpu::detect(), &built, scheme, "far values");
        let run = Cpu::detect().run(&built, Some(scheme));
        assert!(run.out[..40 * 24].iter().all(|x| *x == 0.0));
        assert!(run.out[40 * 24..].iter().all(|x| (x - 100.0).abs() < 10.0));
    }
}

#[test]
fn every_preset_is_its_oracle() {
    for (at, preset) in Preset::ALL.iter().enumerate() {
        for (n, (q_len, kv_len, head_dim)) in
            [(3, 130, 40), (40, 129, 64), (257, 127, 32), (100, 400, 128), (64, 1, 5)].into_iter().enumerate()
        {
            let band = [Band::FULL, Band::causal(Alignment::BottomRight)][(at + n) % 2];
            let (seed, dtype) = (8 * (1 + n as u64), DType::ALL[at % 3]);
            let case = Case {
                seed,
                dtype,
                q_len,
                kv_len,
                head_dim,
                band,
                k_bias: Bias::EveryFourth(1.5),
                ..Case::f32()
            };
            let (cpu, built, scheme) = (Cpu::detect(), case.build(), preset.scheme(head_dim));
            let run = cpu.run(&built, Some(scheme));
            let expected = oracle::scheme(&built.call(), &scheme);
            if let Err(error) = run.check(&expected, &cpu.tolerance(dtype, &scheme)) {
                panic!("{error}\nwith {preset}: {case:?}");
            }
        }
    }
}
